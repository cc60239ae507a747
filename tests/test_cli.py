"""The commands as a user types them: what lands on stdout, what on stderr, and how they end."""

import json

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import mmcompress
from mmcompress import cli, demo, docs, options, tables
from mmcompress.errors import SignalError
from mmcompress.eval import Row, questions, wilson

QUESTION = next(q for q in questions(40, "cli") if q.size == (168, 336))
runner = CliRunner()


def call(*args):
    return runner.invoke(cli.app, [str(a) for a in args])


def output(*args):
    """What a command prints with --json: one object and nothing else."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def picture(tmp_path):
    QUESTION.image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_list_shows_the_registry():
    listed = output("list")["methods"]
    names = [(slot, name) for slot in mmcompress.registry.SLOTS for name in mmcompress.available(slot)]
    assert [(m["slot"], m["name"]) for m in listed] == names
    for m in listed:
        cls = mmcompress.registry.reducer_class(m["slot"], m["name"])
        assert cls(**m["options"]) == cls()                         # the defaults it shows are the defaults
        assert m["about"] and "\n" not in m["about"]
    shown = call("list").stdout
    assert all(name in shown for _, name in names)


def test_eval_takes_all_and_options_together(tmp_path):
    got = output("eval", "pico", "--methods", "all,globalcom2:paper_code=true", "--keep", "0.3", "--n", "2", "--out", tmp_path,
                 "--positions", "closed")
    methods = list(dict.fromkeys(r["method"] for r in got["rows"]))
    assert methods == ["all tokens", *mmcompress.available("image"), "globalcom2:paper_code=true"]
    assert {r["positions"] for r in got["rows"] if r["method"] != "all tokens"} == {"closed"}
    assert "paper_code" in (tmp_path / "pico.csv").read_text() and (tmp_path / "pico.png").stat().st_size > 10_000


def test_eval_compares_on_the_same_questions(tmp_path):
    args = ("eval", "pico", "--methods", "uniform,random", "--keep", "0.2,1.0", "--n", "6", "--out", tmp_path)
    shown = call(*args, "--against", "random")
    assert shown.exit_code == 0 and "points ahead of random" in shown.stdout
    assert shown.stdout.rpartition("ahead of")[2].count("+0.0 ± 0.0") >= 2      # keep 1.0: not one question differs
    assert call(*args, "--against", "nobody").exit_code == 2


def test_eval_and_run_reduce_inside_the_language_model(tmp_path):
    stages, nested = "pyramid_drop:stages=[[2,0.5],[6,0.25]]:positions=original", "in_layer:reducer={name: uniform, keep: 0.3}"
    got = output("eval", "pico", "--methods", f"fastv:layer=4,pyramid_drop,{stages},{nested}", "--keep", "0.5,0.3",
                 "--n", "2", "--out", tmp_path)
    rows = {(r["method"], r["keep"]): r for r in got["rows"] if r["kind"] == "all"}
    assert list(rows) == [("all tokens", 1.0), ("fastv:layer=4", 0.5), ("fastv:layer=4", 0.3), ("pyramid_drop", None),
                          (stages, None), (nested, None)]
    whole = rows["all tokens", 1.0]["tokens_before"]
    assert abs(rows["fastv:layer=4", 0.5]["tokens_after"] - 0.75 * whole) < 1            # mean over the eight layers
    assert abs(rows["pyramid_drop", None]["tokens_after"] - whole * (1 + 0.5 + 0.25 + 0.125) / 4) < 2
    picture = tmp_path / "card.png"
    questions(1, "cli")[0].image.save(picture)
    ask = ["run", "--model", "pico", "--image", picture, "--prompt", "how many cards are there?", "--max-new-tokens", "3"]
    report = output(*ask, "--layers", "{name: fastv, layer: 2, keep: 0.25}")["report"]
    assert report["reducer"] == "FastV(layer=2, keep=0.25)" and report["layers"][0]["layer"] == 2
    assert output(*ask, "--layers", "fastv", "--keep", "0.5")["report"]["reducer"].startswith("GlobalRank(keep=0.5) + FastV(")


def test_run_keeps_the_cache_small(picture, tmp_path):
    ask = ["run", "--model", "pico", "--image", picture, "--prompt", "how many cards are there?", "--max-new-tokens", "3"]
    alone = output(*ask, "--cache", "{name: snapkv, keep: 0.5, recent: 4}")["report"]
    assert alone["reducer"] == "SnapKV(keep=0.5, recent=4)" == alone["cache"]["label"] and alone["items"] == []
    assert alone["cache"]["slots"] == [alone["prompt_before"] // 2] * alone["depth"]
    plans = "[knorm, {name: recent, keep: 0.1}]"
    both = output(*ask, "--image-reducer", "uniform", "--keep", "0.5", "--cache", plans)["report"]
    assert both["reducer"] == "Uniform(keep=0.5) + KNorm(keep=0.25) + Recent(keep=0.1)"
    assert set(both["cache"]["slots"]) == {alone["prompt_before"] // 10}              # of the whole prompt, not of what came in
    assert both["cache"]["tokens"] == both["prompt_after"] < 0.6 * both["prompt_before"]
    for wrong, said in ((["--cache", "nope"], "no cache reducer named 'nope'"), (["--cache", "{"], "--cache {: not valid YAML"),
                        (["--cache", "knorm", "--layers", "fastv"], "pass one of them"),
                        (["--cache", "knorm", "--config", "configs/globalcom2-25.yaml"], "not both"),
                        (["--cache", "knorm", "--plot", tmp_path / "kept.png"], "add --image-reducer")):
        result = call(*ask, *wrong)
        assert result.exit_code == 2 and said in result.stderr


def test_markdown_is_a_table_of_every_method():
    table = docs.methods_table()
    assert call("list", "--markdown").stdout == table
    lines = table.splitlines()
    assert len(lines) == 2 + sum(len(mmcompress.available(slot)) for slot in mmcompress.registry.SLOTS)
    assert all(line.count(" | ") == 4 for line in lines if not line.startswith("|-"))
    assert "`keep=0.25`" in lines[2] and "[CLS]" in table


@pytest.mark.parametrize("text,value", [("0.25", 0.25), ("186", 186), ("1.0", 1.0), ("1", 1), ("1e-1", 0.1)])
def test_keep(text, value):
    assert options.parse_keep(text) == value and type(options.parse_keep(text)) is type(value)


def test_options_become_fields():
    reducer = cli.reducer_of("globalcom2", "0.5", ["alpha=0.3", "newlines=none", "paper_code=false", "temperature=null"])
    assert reducer == mmcompress.image.GlobalCom2(keep=0.5, alpha=0.3, newlines="none")


def test_run_answers_as_the_stock_model_does(picture, pico):
    model, processor = pico
    inputs = processor(images=QUESTION.image, text=mmcompress.pico.prompt(QUESTION.question), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    stock = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    got = output("run", "--model", "pico", "--image", picture, "--prompt", QUESTION.question, "--keep", "1.0")
    assert got["answer"] == stock and got["report"]["tokens_after"] == got["report"]["tokens_before"] == 444


def test_run_from_a_folder_with_a_count_and_a_plot(picture, tmp_path):
    plot = tmp_path / "new" / "kept.png"
    result = call(*ask(picture, model=mmcompress.pico.WEIGHTS), "--image-reducer", "cls_topk", "--keep", "100",
                  "--option", "newlines=none", "--plot", plot, "--max-new-tokens", "4")
    assert result.exit_code == 0, result.stderr
    assert "444 -> 100 tokens" in result.stdout and "newlines 12 -> 0" in result.stdout and str(plot) in result.stdout
    assert Image.open(plot).format == "PNG"


def test_run_with_a_file_and_two_pictures(picture, tmp_path):
    (tmp_path / "config.yaml").write_text("image: {name: uniform, keep: 30}\npositions: original\n")
    got = output("run", "--model", "pico", "--image", picture, "--image", picture, "--prompt", "how many cards are there?",
                 "--config", tmp_path / "config.yaml", "--max-new-tokens", "3")
    assert [i["tokens_after"] for i in got["report"]["items"]] == [30, 30]
    assert got["report"]["prompt_before"] - got["report"]["prompt_after"] == 2 * (444 - 30)


def ask(picture, *more, model="pico"):
    return ("run", "--model", model, "--image", picture, "--prompt", "what?", *more)


@pytest.mark.parametrize("more,word", [
    (("--keep", "1.5"), "keep=1.5"), (("--keep", "some"), "--keep some"), (("--image-reducer", "nope"), "known: "),
    (("--option", "alpha"), "key=value"), (("--option", "beta=1"), "no option beta"), (("--option", "alpha=2"), "alpha=2"),
    (("--config", "nowhere.yaml"), "nowhere.yaml"), (("--config", "a.yaml", "--keep", "0.5"), "not both"),
    (("--dtype", "float7"), "float7"), (("--device", "warp"), "warp"), (("--image", "lost.png"), "lost.png"),
])
def test_user_errors_are_one_line(picture, more, word):
    result = call(*ask(picture, *more))
    assert result.exit_code == 2 and result.stdout == ""
    assert word in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_model_that_is_not_there(picture, tmp_path):
    result = call(*ask(picture, model=tmp_path / "no" / "model"))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_a_model_without_an_adapter(picture, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    result = call(*ask(picture, model=tmp_path))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "'bert'" in result.stderr and "llava_next" in result.stderr


def test_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    result = call(*ask(tmp_path / "text.png"))
    assert result.exit_code == 2 and "not a picture" in result.stderr


@pytest.mark.parametrize("error", [SignalError, OSError, ImportError, mmcompress.WrapError])
def test_other_errors_of_use(monkeypatch, picture, error):
    def fail(*args):
        raise error("first line\nsecond line")

    monkeypatch.setattr(cli, "reducer_of", fail)
    result = call(*ask(picture))
    assert (result.exit_code, result.stderr) == (2, "error: first line\n")
    assert isinstance(call("--debug", *ask(picture)).exception, error)


def test_bugs_are_not_swallowed(monkeypatch, picture):
    monkeypatch.setattr(cli, "reducer_of", lambda *args: 1 / 0)
    assert isinstance(call(*ask(picture)).exception, ZeroDivisionError)


def test_viz(picture, tmp_path):
    got = output("viz", "--image", picture, "--out", tmp_path / "kept.png", "--method", "uniform", "--keep", "50")
    assert (got["tokens_before"], got["tokens_after"]) == (444, 50)
    assert Image.open(tmp_path / "kept.png").size[0] > 600


def test_eval_pico(tmp_path):
    got = output("eval", "pico", "--methods", "uniform,cls_topk", "--keep", "20,0.1", "--n", "5", "--out", tmp_path)
    whole = [r for r in got["rows"] if r["kind"] == "all"]
    assert [(r["method"], r["keep"]) for r in whole] == [
        ("all tokens", 1.0), ("uniform", 20), ("uniform", 0.1), ("cls_topk", 20), ("cls_topk", 0.1)]
    assert all(r["n"] == 5 and r["low"] <= r["accuracy"] <= r["high"] for r in whole)
    assert whole[1]["tokens_after"] == 20
    assert len((tmp_path / "pico.csv").read_text().splitlines()) == 1 + len(got["rows"])
    assert Image.open(tmp_path / "pico.png").format == "PNG"


def test_eval_pico_table_fits_a_terminal(capsys):
    rows = [Row(m, 0.25, kind, 500, 450, 0.9, *wilson(450, 500), 632.4, 158.1)
            for m in ("globalcom2", "average_pool") for kind in ("all", "cards", "receipt")]
    Console(width=80).print(tables.accuracies(rows))
    shown = capsys.readouterr().out
    assert shown.count("90.0 (87-92)") == 6 and shown.count("158") == 2 and "…" not in shown


def test_demo(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "SCENES", (("cards", 168, 336),))
    result = call("demo", "--out", tmp_path, "--keep", "40", "--method", "uniform")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("444 → 40") == 2 and "Uniform(keep=40)" in result.stdout
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["kept-1.png", "sheet.png"]
    assert all(str(p) in result.stdout for p in tmp_path.iterdir())
    got = output("demo", "--out", tmp_path, "--keep", "40", "--method", "uniform")
    assert [a["stock"] for a in got["answers"]] == [a["truth"] for a in got["answers"]]        # pico reads this scene
    for ms in got["milliseconds"].values():
        assert {"encode", "reduce", "pack", "prefill", "decode"} < set(ms) and min(ms.values()) > 0
        assert ms["total"] >= max(ms["encode"], ms["prefill"])


def test_default_method_is_registered():
    assert cli.DEFAULT in mmcompress.available("image")
