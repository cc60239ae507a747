"""The benchmarks of cached keys run end to end at a tiny size, and say that no GPU was measured."""

import csv
import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ABOUT = ["device", "dtype", "torch", "transformers", "mmcompress", "triton", "kernel", "note"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Import the scripts as `python benchmarks/x.py` does: their folder comes first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in {path.stem for path in BENCHMARKS.glob("*.py")} & set(sys.modules):
        del sys.modules[name]


def run(name, tmp_path, capsys):
    module, out = importlib.import_module(name), tmp_path / "rows.csv"
    assert module.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    assert "NOT MEASURED ON GPU" in capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-len(ABOUT):] == ABOUT
    assert all(r["n"] == "2" and r["note"] == "not measured on GPU" and r["triton"] and float(r["ms"]) > 0 for r in rows)
    return rows


def test_scores_beside_attention(tmp_path, capsys):
    rows = run("kv_scores", tmp_path, capsys)
    names = ["attention", "column sums", "column sums, lse", "window sums", "keep a quarter", "key norm", "key diversity"]
    assert [(r["score"], r["keys"]) for r in rows] == [(name, n) for n in ("65", "130") for name in names]
    for i, row in enumerate(rows):
        base = rows[i // len(names) * len(names)]
        assert float(row["ratio"]) == pytest.approx(float(row["ms"]) / float(base["ms"]), rel=1e-2)
        assert row["peak_mib"] == ""                                                # no GPU


def test_decode_beside_the_floor(tmp_path, capsys):
    rows = run("kv_decode", tmp_path, capsys)
    names = ["sdpa", "exact", "ragged", "int8", "int4", "int2", "kivi2", "mikv"]
    assert [(r["cache"], r["batch"]) for r in rows] == [(name, b) for b in ("1", "2") for name in names]
    elements = 2 * 2 * 160 * 16                                                     # keys and values of one row
    mib = {r["cache"]: float(r["mib"]) * 2**20 for r in rows if r["batch"] == "1"}
    grids = 2 * 2 * elements // 8                                                   # float16 scale and zero for 8 channels
    assert mib["sdpa"] == pytest.approx(4 * elements, rel=1e-3) == mib["exact"]
    for name, bits in (("int8", 8), ("int4", 4), ("int2", 2)):
        assert mib[name] == pytest.approx(elements * bits // 8 + grids, rel=1e-3)
    assert mib["ragged"] < mib["exact"]
    for row in rows:
        assert float(row["floor/ms"]) == pytest.approx(float(row["floor"]) / float(row["ms"]), rel=1e-2)
