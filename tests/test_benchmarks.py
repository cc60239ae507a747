"""The benchmarks run end to end, their files are well-formed, and what they check they can also fail."""

import csv
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mmcompress.image import GlobalRank

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ABOUT = ["device", "dtype", "torch", "transformers", "mmcompress"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Import the scripts as `python benchmarks/x.py` does: their folder comes first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("common", "ttft", "selection"):
        sys.modules.pop(name, None)


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
