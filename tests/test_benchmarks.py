"""The benchmarks run end to end, their files are well-formed, and what they check they can also fail."""

import csv
import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mmcompress.image import GlobalRank
from mmcompress.layers import FastV, PyramidDrop

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ABOUT = ["device", "dtype", "torch", "transformers", "mmcompress"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Import the scripts as `python benchmarks/x.py` does: their folder comes first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    ours = {path.stem for path in BENCHMARKS.glob("*.py")} | {"parity"}
    for name in [n for n in sys.modules if n.partition(".")[0] in ours]:
        del sys.modules[name]


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_ttft_writes_one_row_per_method_keep_and_batch(tmp_path, capsys):
    ttft = importlib.import_module("ttft")
    out = tmp_path / "sub" / "ttft.csv"
    arguments = ["--small", "--device", "cpu", "--repeats", "1", "--keep", "1", "0.25", "--batch", "1", "2"]
    assert ttft.main([*arguments, "--out", str(out)]) == 0
    rows = read(out)
    assert [(r["method"], float(r["keep"]), int(r["batch"])) for r in rows] == [
        (method, keep, batch) for batch in (1, 2)
        for method, keep in (("stock", 1.0), ("globalcom2", 1.0), ("global_rank", 1.0),
                             ("globalcom2", 0.25), ("global_rank", 0.25))]
    assert list(rows[0]) == [*ttft.COLUMNS, "n", *ABOUT, "parameters"]
    for row in rows:
        assert int(row["tokens"]) == (2928 if float(row["keep"]) == 1 else 732)
        assert row["n"] == "1" and row["mmcompress"] and row["peak"] == ""                          # no GPU
        stages = [row[s] for s in ttft.STAGES]
        assert ("" in stages) == (row["method"] == "stock")
        times = {name: float(row[name]) for name in ("ttft", "decode", "ideal", "ideal/ttft", "stock/ttft")}
        assert min(times.values()) > 0
        assert times["ideal/ttft"] == pytest.approx(times["ideal"] / times["ttft"], rel=1e-2)
        if row["method"] == "stock":
            assert times["stock/ttft"] == 1
        else:
            assert sum(map(float, stages)) <= times["ttft"] * 1.01                  # the stages lie within the whole
    assert "ideal/ttft" in capsys.readouterr().out


def test_ttft_measures_reducers_inside_the_language_model(tmp_path):
    ttft = importlib.import_module("ttft")
    out = tmp_path / "ttft.csv"
    arguments = ["--small", "--device", "cpu", "--repeats", "1", "--keep", "1", "--batch", "2", "--method"]
    assert ttft.main([*arguments, "--layers", "fastv,pyramid_drop", "--out", str(out)]) == 0
    rows = read(out)
    assert [r["method"] for r in rows] == ["stock", "fastv", "pyramid_drop"]
    for row in rows[1:]:
        assert (row["keep"], row["tokens"]) == ("0.75", "2196")             # all in the first of two layers, then a half
        assert sum(float(row[s]) for s in ttft.STAGES) <= float(row["ttft"]) * 1.01
        assert float(row["ideal/ttft"]) == pytest.approx(float(row["ideal"]) / float(row["ttft"]), rel=1e-2)
    with pytest.raises(SystemExit):
        ttft.main([*arguments, "--layers", "fastv,globalcom2"])
    with pytest.raises(SystemExit):
        ttft.main([*arguments, "--layers", "fastv", "--profile"])
    reducers = [ttft.IN_LAYERS["pyramid_drop"](32), ttft.IN_LAYERS["fastv"](32)]
    assert reducers == [PyramidDrop(), FastV()]                             # a 7B gets the defaults


@torch.no_grad()
def test_ideal_runs_every_layer_once():
    """Cut into parts, the stock language model gives what it gives whole, and is itself left alone."""
    ttft, common = importlib.import_module("ttft"), importlib.import_module("common")
    language_model = common.build_model(torch.device("cpu"), torch.float32, small=True).model.language_model
    embeds = torch.randn(2, 30, 64)
    first, last = ttft.some_layers(language_model, 0, 1), ttft.some_layers(language_model, 1, 2)
    hidden = first(inputs_embeds=embeds).last_hidden_state
    whole = language_model(inputs_embeds=embeds).last_hidden_state
    assert torch.equal(last(inputs_embeds=hidden).last_hidden_state, whole)
    assert len(language_model.layers) == 2 and not torch.allclose(language_model.norm(hidden), hidden)


@dataclass(frozen=True)
class Reading(GlobalRank):
    """A reducer that looks at a value on the host."""

    def reduce(self, x, k):
        assert x.features.float().abs().sum().item() > 0
        return super().reduce(x, k)


def test_profile_counts_what_a_reducer_reads_on_the_host(tmp_path, monkeypatch):
    ttft = importlib.import_module("ttft")
    out = tmp_path / "profile.csv"
    arguments = ["--small", "--device", "cpu", "--profile", "--keep", "1", "0.25", "--batch", "2", "--out", str(out)]
    assert ttft.main(arguments) == 0
    assert [(r["method"], r["batch"]) for r in read(out)] == [("globalcom2", "2"), ("global_rank", "2")]
    assert all(row[name] == "0" for row in read(out) for name in ttft.HOST_READS)
    monkeypatch.setitem(ttft.METHODS, "global_rank", Reading)
    assert ttft.main(arguments) == 1
    assert [r["aten::_local_scalar_dense"] for r in read(out)] == ["0", "1"]


# A naive rewrite of the authors' rule, one picture and one token at a time, under the names that the benchmark looks for.
STAND_IN = '''
import an_old_transformers

retention_ratio = 0.25


def generate_scale_for_crop_features(scores, across, down, base_scale=retention_ratio, temperature=10.0):
    side = int(len(scores) ** 0.5)
    mass = np.zeros(across * down)
    for i, score in enumerate(scores.tolist()):
        row, column = i // side // (side // down), i % side // (side // across)
        mass[row * across + column] += score
    sigma = np.exp((mass - mass.max()) / temperature)
    sigma /= sigma.sum() + 1e-8
    return np.minimum(base_scale * (1 + sigma - sigma.mean()), 1).tolist()


def extract_actual_dimensions(): ...
def get_original_indices(): ...
def get_actual_crop_dimensions(): ...
def interpolate_and_split_cls_attn_scores(): ...
def select_topk_crop_features(): ...


class LlavaMetaForCausalLM:
    def compress_thumbnail(self, features, scores, scale=retention_ratio):
        order = torch.argsort(scores, descending=True)[:int(len(scores) * scale)]
        return features[order], order

    def compress_crops(self, features, scores, thumbnail, across, down, height, width, size, scales):
        rows, columns = down * height, across * width
        top = left = 0
        if size[0] / size[1] > columns / rows:
            top = (rows - int(size[1] * (columns / size[0]))) // 2
        else:
            left = (columns - int(size[0] * (rows / size[1]))) // 2
        shape = rows - 2 * top, columns - 2 * left
        spread = F.interpolate(thumbnail.view(1, 1, height, width), size=shape, mode="bilinear", align_corners=False)[0, 0]
        kept = {}
        for crop in range(down * across):
            cells = [(r, c) for r in range(top, rows - top) for c in range(left, columns - left)
                     if r // height * across + c // width == crop]
            if not cells:
                continue
            own = torch.stack([scores[crop, r % height * width + c % width] for r, c in cells])
            far = torch.stack([spread[r - top, c - left] for r, c in cells])
            score = F.normalize(own, dim=0) + F.normalize(far, dim=0)
            for i in score.topk(int(len(cells) * scales[crop])).indices.tolist()[SLACK:]:
                r, c = cells[i]
                kept[r, c] = features[crop, r % height * width + c % width]
        out = []
        for r in range(rows):
            out += [kept[r, c] for c in range(columns) if (r, c) in kept]
            out.append(self.model.image_newline)
        return torch.stack(out).half()
'''
UTILS = '''
def select_best_resolution(size, resolutions):
    def use(resolution):
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return used, used - resolution[0] * resolution[1]
    return max(resolutions, key=use)


def get_anyres_image_grid_shape(size, pinpoints, side):
    width, height = select_best_resolution(size, pinpoints)
    return width // side, height // side
'''


def checkout(folder, slack):
    (folder / "llava/model").mkdir(parents=True)
    (folder / "llava/model/llava_arch.py").write_text(STAND_IN.replace("SLACK", str(slack)))
    (folder / "llava/mm_utils.py").write_text(UTILS)
    return folder


@pytest.mark.parametrize("slack, kind, status", [(0, "equal", 0), (1, "another", 1)])
def test_selection_compares_with_a_checkout(tmp_path, monkeypatch, slack, kind, status):
    """`slack` drops the best token of every crop there: the comparison has to see it."""
    selection = importlib.import_module("selection")
    monkeypatch.setattr(selection, "SIZES", [(672, 672), (640, 480), (337, 671), (300, 1300)])
    out, cases = tmp_path / "times.csv", tmp_path / "cases.csv"
    authors = checkout(tmp_path / "there", slack)
    arguments = ["--small", "--device", "cpu", "--keep", "0.25", "--repeats", "1", "--batch", "1"]
    assert selection.main([*arguments, "--authors", str(authors), "--out", str(out), "--cases", str(cases)]) == status
    assert [(r["kind"], r["same_grid"], r["thumbnail"]) for r in read(cases)] == [(kind, "True", "True")] * 4
    assert [r["newlines_ours"] for r in read(cases)] == ["48", "48", "24", "16"]
    assert [r["newlines_theirs"] for r in read(cases)] == ["48", "48", "48", "24"]
    if not slack:
        assert [r["order"] for r in read(cases)] == ["True"] * 4
        assert [r["sequence"] for r in read(cases)] == ["True", "True", "False", "False"]
    rows = read(out)
    assert [r["method"] for r in rows] == ["GlobalCom2(paper_code=True)", "GlobalCom2", "GlobalRank"]
    assert [r["parity"] for r in rows] == ["4/4" if not slack else "0/4", "", ""]
    assert all(float(r["authors/ours"]) == pytest.approx(float(r["authors_ms"]) / float(r["ms"]), rel=1e-2) for r in rows)
    assert all(r[name] for r in rows for name in ABOUT)


def test_selection_times_ours_without_a_checkout(tmp_path):
    selection = importlib.import_module("selection")
    out = tmp_path / "times.csv"
    assert selection.main(["--small", "--device", "cpu", "--keep", "0.1", "--repeats", "1", "--out", str(out)]) == 0
    rows = read(out)
    assert [(r["method"], r["authors_ms"], r["parity"]) for r in rows] == [
        ("GlobalCom2(paper_code=True)", "", ""), ("GlobalCom2", "", ""), ("GlobalRank", "", "")]
    assert all(float(r["ms"]) > 0 and r["tokens"] == "2928" and r["n"] == "1" for r in rows)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    selection = importlib.import_module("selection")
    authors = checkout(tmp_path / "there", 0)
    (authors / "llava/mm_utils.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="no get_anyres_image_grid_shape, select_best_resolution; pass a checkout"):
        selection.Authors.load(authors)


def test_random_tokens_carry_the_logits_exactly():
    selection = importlib.import_module("selection")
    common = importlib.import_module("common")
    from mmcompress.adapters import adapter_for

    layout = adapter_for(common.build_model(torch.device("cpu"), torch.float32, small=True)).layout(480, 640)
    logits = selection.random_logits(layout, (480, 640), 3)
    x = selection.as_tokens(torch.zeros(1, layout.tokens, 1), logits[None], layout)
    places = layout.places()
    assert torch.equal(x.cls_logits()[0, places.is_patch], logits.flatten()[places.patch[places.is_patch]])


# layer_parity: the authors' side is played by ours, whole or damaged


def play_authors(parity, jobs, damage):
    """What the worker would answer if the authors' code did as ours does, but for one `damage`."""
    out = {}
    for key, job in jobs.items():
        seed, heads = map(int, key.split("-"))
        answers = {}
        for case in (c for c in parity.CASES if c.key in job["calls"]):
            ours = parity.run_ours(case, parity.build(heads, seed), parity.make_inputs(case, seed))
            topk = []
            for stage in range(len(ours["kept"][0]) if ours.get("kept") else 0):
                for kept in ours["kept"]:
                    before = kept[stage - 1] if stage else torch.arange(parity.TOKENS)
                    index = torch.searchsorted(before, kept[stage])
                    if damage in ("choice", "tie") and not stage:
                        index = (set(range(len(before))) - set(index.tolist())).pop(), *index[1:].tolist()
                        index = torch.tensor(index).sort().values
                    scores = torch.ones(len(before)) if damage == "tie" else \
                        torch.full((len(before),), 0.5).index_fill(0, index, 1.0)
                    topk.append({"scores": scores, "index": index})
            ours["topk"] = topk
            if damage == "gradients":
                name = next(iter(ours["gradients"]))
                ours["gradients"] = {**ours["gradients"], name: 1.01 * ours["gradients"][name]}
            elif damage in ours:
                ours[damage] = ours[damage] + 1
            answers[case.key] = {"error": "ValueError: no"} if damage == "error" else ours
        out[key] = {"about": {"authors_torch": "2", "authors_transformers": "4"}, "answers": answers}
    return out


@pytest.mark.parametrize("method, name, damage, kind", [
    ("fastv", "one picture", None, "equal"), ("fastv", "one picture", "logits", "another"),
    ("fastv", "one picture", "choice", "another"), ("fastv", "one picture", "tie", "tied"),
    ("fastv", "one picture", "new", "another"), ("fastv", "one picture", "scores", "another"),
    ("fastv", "one picture", "error", "another"), ("fastv", "no picture, 700 tokens", "error", "another"),
    ("fastv", "two prompts, right padding", "error", "another"), ("fastv", "two prompts, right padding", None, "another"),
    ("fastv", "two prompts", None, "another"), ("fastv", "the cache of layer K-1", None, "another"),
    ("pyramid_drop", "training, right padding", None, "equal"), ("pyramid_drop", "training, right padding", "loss", "another"),
    ("pyramid_drop", "training, right padding", "gradients", "another"),
    ("pyramid_drop", "training, right padding", "labels", "another"),
    ("pyramid_drop", "training, right padding", "choice", "another"),
    ("llavolta", "training, right padding, K=2 S=8", None, "equal"),
    *(("llavolta", "training, right padding, K=2 S=8", damage, "another")
      for damage in ("logits", "loss", "gradients", "labels", "positions")),
    ("llavolta", "one picture, K=6 S=8", "scores", "another"), ("llavolta", "picture at 1,100, S=8", None, "another"),
    ("llavolta", "second has no picture", None, "another"), ("llavolta", "first has no picture", None, "another"),
    ("llavolta", "one picture and two", None, "another"), ("llavolta", "stages of training", None, "another"),
])
def test_layer_parity_sees_every_difference(tmp_path, monkeypatch, capsys, method, name, damage, kind):
    parity = importlib.import_module("layer_parity")
    monkeypatch.setattr(parity, "CASES", tuple(c for c in parity.CASES if (c.method, c.name) == (method, name)))
    monkeypatch.setattr(parity, "ask", lambda python, jobs, *checkouts: play_authors(parity, jobs, damage))
    out = tmp_path / "parity.csv"
    checkout = "--" + method.replace("_", "")
    arguments = [checkout, str(tmp_path), "--old-python", "none", "--seeds", "1"]
    assert parity.main([*arguments, "--out", str(out)]) == (kind == "another")
    (row,) = read(out)
    assert (row["method"], row["case"], row["kind"]) == (method, name, kind)
    assert all(row[name] for name in (*ABOUT, "authors_torch", "authors_transformers"))
    assert ("ValueError: no" in row["note"]) == (damage == "error")
    if kind == "equal":
        assert row["same"] == row["selections"] == str({"fastv": 1, "pyramid_drop": 6, "llavolta": 2}[method])
        assert float(row["logits"]) == 0 and (row["decoded"] == "8" or float(row["gradients"]) == 0)
    assert f"{method}: {name}" in capsys.readouterr().out or kind == "equal"


@torch.no_grad()
def test_layer_parity_writes_prompts_as_theirs():
    """One placeholder a picture, padding on the right, labels beside them, an empty picture for a prompt without one."""
    parity = importlib.import_module("layer_parity")
    case = parity.Case("pyramid_drop", "test", lambda n: [[3, 2, 4], [5], [2, 6]], answers=((), (slice(-2, None),), ()))
    model = parity.build(4, 0)
    inputs = parity.make_inputs(case, 0)
    call = parity.as_theirs(case, model, inputs)
    assert inputs["attention_mask"].sum(1).tolist() == [9 + 2 * 576, 5, 8 + 576]
    assert call["mask"].sum(1).tolist() == [11, 5, 9] and call["ids"].shape == (3, 11)
    assert (call["ids"] == parity.IMAGE_THERE).nonzero().tolist() == [[0, 3], [0, 6], [2, 2]]
    assert torch.equal(call["labels"][1, 3:5], inputs["input_ids"][1, 3:5]) and (call["labels"] != -100).sum() == 2
    features = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
    assert torch.equal(call["images"], torch.stack([*features[:2], torch.zeros_like(features[0]), features[2]]))
    fastv = parity.Case("fastv", "test", lambda n: [[parity.fastv.BEFORE, 3]])
    inputs = parity.make_inputs(fastv, 0)
    call = parity.as_theirs(fastv, model, inputs)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert torch.equal(call["embeds"][0, 35:611], features) and call["embeds"].shape[1] == 614


THEIR_PYRAMID_DROP = '''
import sys
import torch
from types import SimpleNamespace as Space

assert "mmcompress" not in sys.modules and "common" not in sys.modules


class LlavaConfig(Space): ...


class Inner(torch.nn.Module):
    def pdrop_forward(self, labels, images):
        if labels is None:
            raise ValueError("no labels")
        kept = images.sum(-1).topk(int(images.shape[1] * self.image_token_ratio_list[1])).indices
        return images.gather(1, kept[..., None].expand(-1, -1, images.shape[2])), labels + self.layer_list[0]


class LlavaLlamaForCausalLM_PDrop(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model, self.weight = Inner(), torch.nn.Parameter(torch.zeros(config.width))

    def forward(self, input_ids, attention_mask, images, labels, use_cache, return_dict):
        return Space(logits=self.model.pdrop_forward(labels=labels, images=images)[0] * self.weight, past_key_values=None)
'''


def ask_worker(folder, method, file, code, calls, config, weights):
    """The worker's answers, from a checkout that holds `code` in llava/model/language_model."""
    (folder / "llava/model/language_model").mkdir(parents=True)
    (folder / "llava/model/language_model" / file).write_text(code)
    torch.save({"config": config, "weights": weights, "calls": calls}, folder / "job-0.pt")
    command = [sys.executable, str(BENCHMARKS / "layer_parity.py"), "--worker", str(folder), method, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = torch.load(folder / "answer-0.pt")
    assert answer["about"]["authors_torch"] == torch.__version__
    return answer["answers"]


def test_layer_parity_worker_needs_no_mmcompress_and_notes_what_was_chosen(tmp_path):
    images = torch.tensor([[[1.0], [4.0], [2.0], [3.0]]])
    call = {"method": "pyramid_drop", "attention": "sdpa", "do": "forward", "cache": False, "mask": None,
            "ids": torch.ones(1, 2), "labels": torch.tensor([[1, 2]]), "images": images, "stages": ((3, 0.5),)}
    calls = {"good": call, "bad": {**call, "labels": None}, "not asked": {**call, "method": "fastv"}}
    answers = ask_worker(tmp_path, "pyramid_drop", "llava_llama_pdrop.py", THEIR_PYRAMID_DROP, calls, {"width": 1},
                         {"weight": torch.tensor([10.0])})
    assert set(answers) == {"good", "bad"} and answers["bad"] == {"error": "ValueError: no labels"}
    good = answers["good"]
    assert good["logits"].flatten().tolist() == [40.0, 30.0] and good["labels"].tolist() == [[4, 5]]
    assert [(t["scores"].tolist(), t["index"].tolist()) for t in good["topk"]] == [([1.0, 4.0, 2.0, 3.0], [1, 3])]


THEIR_LLAVOLTA = '''
import torch
from types import SimpleNamespace as Space
from torch.nn.functional import avg_pool1d, cross_entropy


class LlavaConfig(Space): ...


class Inner(torch.nn.Module):
    label_ids = None

    def visual_avg_pool1d(self, states, positions):
        pooled = avg_pool1d(positions.half(), kernel_size=self.stride, stride=self.stride).squeeze(1)
        return avg_pool1d(states, self.stride, self.stride).permute(0, 2, 1), pooled


class LlavaLlamaForCausalLM(torch.nn.Module):
    """Pools everything; the first `pivot` + 1 calls are of the first stage."""

    def __init__(self, config):
        super().__init__()
        self.model, self.weight, self.calls = Inner(), torch.nn.Parameter(torch.zeros(1)), 0
        assert config.num_hidden_layers in (1, 12)

    def post_config(self, said):
        assert said.grouping == "avgpool1d"
        self.model.said = said
        self.model.stride = said.strides.pop(0) if hasattr(said, "strides") else said.stride
        self.model.groupingLayer = said.layers.pop(0) if hasattr(said, "layers") else said.layer

    def forward(self, input_ids, attention_mask=None, images=None, labels=None, use_cache=None, return_dict=None):
        inner = self.model
        if images is None:
            if self.calls in inner.said.pivots:
                inner.stride, inner.groupingLayer = inner.said.strides.pop(0), inner.said.layers.pop(0)
            self.calls += 1
            return
        states, positions = inner.visual_avg_pool1d(images.permute(0, 2, 1), input_ids[:, None])
        inner.label_ids = positions.long()
        logits = states * self.weight
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, :logits.shape[1]][:, 1:].flatten())
        return Space(logits=logits, loss=loss, past_key_values=None)
'''


def test_layer_parity_worker_pools_in_float16_and_counts_calls(tmp_path):
    """Positions round as float16 does, or not at all; labels are those of the loss; stages are what the script says."""
    (tmp_path / "scripts/v1_5").mkdir(parents=True)
    (tmp_path / "scripts/v1_5/train-4stage.sh").write_text("NAME=x\nLAYERS=2,16\nSTRIDES=8,1\nPIVOTS=1300\n")
    positions = torch.tensor([[1022, 1023, 1101, 1102, 2101, 2103]])
    call = {"method": "llavolta", "attention": "sdpa", "do": "train", "cache": False, "mask": None, "ids": positions,
            "labels": torch.tensor([[0, 1, 0, 1, 1, 0]]), "images": torch.arange(12.0).view(1, 6, 2), "stages": ((2, 2),),
            "exact": False}
    calls = {"half": call, "exact": {**call, "exact": True}, "stages": {**call, "do": "stages", "ids": torch.ones(1, 3)}}
    answers = ask_worker(tmp_path, "llavolta", "llava_llama.py", THEIR_LLAVOLTA, calls, {"num_hidden_layers": 12},
                         {"weight": torch.tensor([10.0])})
    assert answers["half"]["positions"].tolist() == [[1022, 1102, 2102]]            # of means 1022.5, 1101.5, 2102
    assert answers["exact"]["positions"].tolist() == [[1022, 1101, 2102]]
    for name in ("half", "exact"):
        assert answers[name]["labels"].tolist() == [[-100, 1, 0]]
        assert answers[name]["logits"].tolist() == [[[10.0, 20.0], [50.0, 60.0], [90.0, 100.0]]]
    assert answers["stages"]["stages"] == [(0, 2, 8), (1301, 16, 1)]


def test_layer_parity_stages_are_the_presets():
    llavolta = importlib.import_module("parity.llavolta")
    assert llavolta.stages_of_steps() == [(0, 2, 8), (1300, 2, 2), (2600, 16, 2), (3900, 0, 1)]


def test_layer_parity_wants_a_checkout(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("layer_parity").main(["--old-python", "none"])
    assert "--llavolta" in capsys.readouterr().err


# schedules and consistency --------------------------------------------------------------------------------------------


def test_schedules_trains_the_same_data_under_each(tmp_path, capsys):
    import schedules
    recipe = Path(__file__).parents[1] / "configs" / "pico-small.yaml"
    small = ["steps=2", "batch=2", "eval.n=4", "eval.batch=4", "eval.every=0", "log_every=1"]
    argv = ["--recipe", str(recipe), "--seeds", "0", "--schedules", "plain", "heavy", "--out", str(tmp_path)]
    schedules.main(argv + [part for change in small for part in ("--set", change)])
    with open(tmp_path / "schedules.csv", newline="") as file:
        plain, heavy = csv.DictReader(file)
    assert (plain["schedule"], heavy["schedule"], plain["steps"]) == ("plain", "heavy", "2")
    # 24 of 192 tokens from layer 1 of 8 on
    assert float(heavy["image_tokens"]) / float(plain["image_tokens"]) == (192 + 7 * 24) / (8 * 192)
    assert float(heavy["flops"]) < float(plain["flops"]) / 2 and (tmp_path / "schedules.png").stat().st_size > 10000
    assert "image tokens" in capsys.readouterr().out


def test_consistency_of_a_model_with_itself_is_no_difference(tmp_path):
    import consistency

    from mmcompress.pico import WEIGHTS
    out = tmp_path / "consistency.csv"
    consistency.main(["--before", str(WEIGHTS), "--after", "pico", "--n", "16", "--cases", "GlobalRank(0.1)", "FastV(2, 0.25)",
                      "--device", "cpu", "--out", str(out)])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["reducer"], r["kind"]) for r in rows] == [(c, k) for c in ("GlobalRank(0.1)", "FastV(2, 0.25)")
                                                        for k in ("all", "cards", "receipt")]
    assert all(r["before"] == r["after"] and float(r["difference"]) == 0 for r in rows) and rows[0]["n"] == "16"


def test_video_cost_writes_a_row_a_case_and_sees_how_it_grows(tmp_path):
    cost = importlib.import_module("video_cost")
    out, plot = tmp_path / "cost.csv", tmp_path / "cost.png"
    arguments = ["--frames", "2", "4", "--width", "8", "--method", "evs", "--repeats", "1", "--device", "cpu"]
    assert cost.main([*arguments, "--out", str(out), "--plot", str(plot)]) == 0
    rows = read(out)
    assert [(r["method"], r["frames"], r["tokens"], r["kept"]) for r in rows] == [("evs", "2", "392", "196"),
                                                                                 ("evs", "4", "784", "196")]
    assert all(float(r["ms"]) > 0 and float(r["peak_mib"]) >= 0 for r in rows) and plot.stat().st_size > 10_000
    square = [{"method": "m", "frames": f, "ms": 0.1 * f * f, "peak_mib": 3.0 * f} for f in (32, 64, 128, 256)]
    [growth] = cost.exponents(square)
    assert growth["time"] == pytest.approx(2) and growth["memory"] == pytest.approx(1)


def test_video_cost_compares_with_the_prefill_it_saves(tmp_path, monkeypatch):
    cost = importlib.import_module("video_cost")
    from transformers import LlamaConfig, LlamaModel
    small = LlamaModel(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                   num_key_value_heads=1, vocab_size=8)).eval()
    monkeypatch.setattr(cost, "language_model", lambda *_: small)
    out = tmp_path / "prefill.csv"
    assert cost.main(["--prefill", "4", "--small", "--method", "evs", "random", "--repeats", "1", "--device", "cpu",
                      "--out", str(out)]) == 0
    for row in read(out):
        saved = float(row["prefill_ms"]) - float(row["prefill_kept_ms"])
        assert float(row["cost"]) == pytest.approx(float(row["reduce_ms"]) / saved, rel=1e-2)
        assert row["tokens"] == "784" and row["kept"] == {"evs": "196", "random": "78"}[row["method"]]


def test_video_parity_needs_a_checkout_and_counts_what_differs(tmp_path, monkeypatch, capsys):
    parity = importlib.import_module("video_parity")
    with pytest.raises(SystemExit):
        parity.main(["--authors", str(tmp_path)])
    assert "holds none of VidCom2, DyCoke" in capsys.readouterr().err
    module = importlib.import_module("parity.video_dycoke")
    (tmp_path / "DyCoke").mkdir()
    rows = [{"method": "DyCoke", "identical": True, "difference": 1e-7}, {"method": "DyCoke", "identical": False, "tied": True}]
    monkeypatch.setattr(module, "cases", lambda authors, seeds: rows)
    out = tmp_path / "parity.csv"
    assert parity.main(["--authors", str(tmp_path), "--methods", "dycoke", "--out", str(out)]) == 0
    rows.append({"method": "DyCoke", "identical": False})
    assert parity.main(["--authors", str(tmp_path), "--methods", "dycoke", "--out", str(out)]) == 1        # one that is no tie
    [row] = read(out)
    assert (row["cases"], row["identical"], row["tied"], row["another"]) == ("3", "1", "1", "1")


def test_video_parity_sees_another_selection(tmp_path):
    """A stand-in for a checkout whose function keeps the first cells of every frame: no case may come out identical."""
    folder = tmp_path / "DyCoke" / "llava" / "model"
    folder.mkdir(parents=True)
    (folder / "llava_arch.py").write_text(
        "def dycole_ttm(x, n=196, k=0.7):\n"
        "    frames = list(x.split(n))\n"
        "    m = int((1 - k) * n)\n"
        "    return torch.cat([f if i % 4 == 0 else f[:m] for i, f in enumerate(frames)])\n")
    importlib.import_module("video_parity")
    rows = importlib.import_module("parity.video_dycoke").cases(tmp_path, 1)
    assert rows and not any(row["identical"] or row["tied"] for row in rows)
