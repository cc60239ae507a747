"""Methods that shrink the KV cache beside public code: the same slots kept, by the same scores, from the same tensors.

    python benchmarks/cache_parity.py --authors DIR --out benchmarks/results/cache_parity.csv

DIR holds your own checkouts, of which nothing is copied here, under these names: SnapKV (FasterDecoding), H2O (FMInference),
streaming-llm (mit-han-lab), by the methods' authors; msmodelslim (Ascend) and golden-stick (mindspore-ai), by RazorAttention's
company; kvpress (NVIDIA), KVCache-Factory (Zefan-Cai) and compaction (smejak), by others. What has no folder is left out. The
authors of MiniCache and KVMerger published no code, KNorm's and KeyDiff's was not looked for, and of EMS there is none.

Their files import a transformers of 2024, MindSpore or Ascend's tools, so the classes are compiled out of the files by name,
and get what they use of the rest from `STANDINS`: base classes that do nothing, torch in place of MindSpore, and for kvpress
the queries themselves in place of a projection. Both sides see the same tensors, float32 on the CPU, causal attention: normal
noise, or keys that walk from token to token, with small ones in front, copies of earlier keys, and queries that look for some
of them. Code that knows no grouped queries gets one query head a key head; H2O's, which adds up its batch, row by row.

A line per method and file. equal: cases in which every head keeps the same slots. tied: those in which what differs has scores
within 1e-5 of one another, relative to them, so that the sort decides. another: the rest, and those whose scores differ by more
than 1e-4 of the largest; with one the script exits 1. difference: the largest absolute difference of a score, ours brought to
their scale (a mean to a sum); "-" where they have none.

Some lines compare something else. H2O of kvpress is its ObservedAttention: sums divided by how many queries see the token, so
ours are divided too. RazorAttention's probe: which heads echo and induct, a share of them rounded as they do, by maps that are
ours; compensation: what is left of a head's keys and values, their budget counting the extra token. KVMerger: which tokens are
pivots of as many sets, found by them with a bisection, for keys of positive cosine, and by attention that is not causal;
difference is that of the merged keys, for information: theirs have another first width of the kernel. MiniCache: of the angles,
then of directions and restored vectors; layers that are nearly equal in all tokens are not drawn, as there its angles have a
floor and its order is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from common import positive, print_table, versions, write_csv
from parity.cache_case import Case, Found, Scope, cases, choice, close, compiled, far, scored, verdict
from parity.theirs import Watch
from torch import Tensor
from tqdm import tqdm
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half
from video_parity import commit

from mmcompress.cache import H2O, CachePlan, KeyDiff, KNorm, KVMerger, RazorAttention, SnapKV, StreamingLLM
from mmcompress.cache.minicache import angle, furthest, interpolate, norms, restore, retained
from mmcompress.cache.retrieval_heads import echo_and_induction
from mmcompress.cache.slots import exactly
from mmcompress.cache.view import Sight

COLUMNS = ("method", "source", "file", "cases", "equal", "tied", "another", "difference", "commit")


# Methods: what was compiled, and a case -> what was found.
def snapkv(cluster: Any, case: Case) -> Found:
    """A `SnapKVCluster`, whose scores are sums over the window."""
    window, kernel = (8, 5) if case.keep % 2 else (4, 7)
    with Watch() as watch:
        made = cluster(window_size=window, max_capacity_prompt=case.keep, kernel_size=kernel)
        _, kept = made.update_kv(case.keys, case.queries.flatten(1, 2), case.values, None, None)
    scores = watch.topk[-1]["scores"].view(*case.keys.shape[:2], -1)
    plan = SnapKV(case.keep, recent=window, kernel=kernel)
    return verdict(case.view, plan, kept[..., 0], scores, lambda s: s * window)


def h2o(cluster: Any, case: Case) -> Found:
    window = case.keep // 2
    with Watch() as watch:
        made = cluster(window_size=window, max_capacity_prompt=case.keep)
        _, kept = made.update_kv(case.keys, case.queries.flatten(1, 2), case.values, None, None)
    scores = watch.topk[-1]["scores"].view(*case.keys.shape[:2], -1)
    return verdict(case.view, H2O(case.keep, recent=window), kept[..., 0], scores)


def h2o_authors(cache: Any, case: Case) -> Found:
    """`H2OKVCache_LayerWise`, which is for one row."""
    window, kept, scores = case.keep // 2, [], []
    for row, maps in enumerate(case.maps):
        with Watch() as watch, contextlib.redirect_stdout(io.StringIO()):
            _, values = cache(case.keep - window, window)((case.keys[row, None], case.values[row, None]), maps[None])
        kept.append(values[..., 0])
        scores.append(watch.topk[-1]["scores"].view(1, case.keys.shape[1], -1))
    return verdict(case.view, H2O(case.keep, recent=window), torch.cat(kept), torch.cat(scores))


def l2norm(cluster: Any, case: Case) -> Found:
    _, kept = cluster(case.keep, 2).update_kv(case.keys, case.queries.flatten(1, 2), case.values, None, None)
    return verdict(case.view, KNorm(case.keep), kept[..., 0])


def streaming(cluster: Any, case: Case) -> Found:
    made = cluster(window_size=case.keep - 4, max_capacity_prompt=case.keep)
    _, kept = made.update_kv(case.keys, case.queries.flatten(1, 2), case.values, None, None)
    return verdict(case.view, StreamingLLM(case.keep), kept[..., 0])


def streaming_authors(cache: Any, case: Case) -> Found:
    with contextlib.redirect_stdout(io.StringIO()):
        [[_, kept]] = cache(start_size=4, recent_size=case.keep - 4)([[case.keys, case.values]])
    return verdict(case.view, StreamingLLM(case.keep), kept[..., 0])


def press(made: Any, plan: CachePlan, case: Case, first: int, maps: bool = False,
          adjust: Callable[[Tensor], Tensor] = lambda s: s) -> Found:
    """One of kvpress: what its `compress` keeps, and its scores of the first slots."""
    _, heads, groups, n, d = case.queries.shape
    module = SimpleNamespace(config=SimpleNamespace(num_attention_heads=heads * groups, num_key_value_heads=heads), head_dim=d,
                             queries=case.queries.flatten(1, 2))
    made.compression_ratio = 1 - (case.keep + 0.5) / n
    one = torch.ones(len(case.keys), n, d)                          # hidden states, and rotation by no angle
    with Watch() as watch:
        _, kept = made.compress(module, one, case.keys, case.values, case.maps if maps else None,
                                {"position_embeddings": (one, torch.zeros_like(one))})
    scores = watch.topk[-1]["scores"].view(case.keys.shape[:3])[..., :first]
    return verdict(case.view, plan, kept[..., 0], scores if first else None, adjust)


def asked(module: Any, hidden: Tensor) -> Tensor:
    """In place of kvpress' projection: the last queries, as many as hidden states."""
    return module.queries[:, :, -hidden.shape[1]:]


def by_queries(scores: Tensor) -> Tensor:
    """Sums divided by the number of queries that see each slot."""
    return scores / torch.arange(scores.shape[-1], 0, -1)


def probe(score: Callable[[Tensor, int], tuple[Any, Any]], most: Callable[[list[float], int], list[float]], select: Any,
          case: Case) -> Found:
    """Which heads echo and induct over four repetitions; the rows of a case are its layers.

    score   (map (N, N), period) -> their echo and induction of a head, on the scale of ours
    most    the largest of each group of query heads; select: ({layer: scores}, share) -> {layer: heads}
    """
    n = min(case.keys.shape[2], 64) // 4 * 4                        # few, for their loops over all of a map
    case = Case(case.queries[..., :n, :], case.keys[:, :, :n], case.values[:, :, :n], n)
    ours = echo_and_induction(case.view, n // 4)                                                    # (2, B, H)
    each = torch.tensor([[score(head, n // 4) for head in row] for row in case.maps]).permute(2, 0, 1)
    theirs = torch.tensor([[most(row, case.queries.shape[2]) for row in kind] for kind in each.tolist()])
    picked, wanted = torch.zeros_like(ours, dtype=torch.bool), torch.zeros_like(ours, dtype=torch.bool)
    for kind in range(2):
        for layer, heads in select(dict(enumerate(theirs[kind].tolist())), 0.35).items():
            wanted[kind, layer, heads] = True
        picked[kind].view(-1)[ours[kind].flatten().topk(round(ours[kind].numel() * 0.35)).indices] = True
    return scored(choice(picked.flatten(1), wanted.flatten(1), ours.flatten(1)), ours, theirs)


def probe_ascend(scope: Scope, case: Case) -> Found:
    def score(head: Tensor, period: int) -> tuple[Tensor, Tensor]:
        scope["DUMMY_INPUT_LENGTH"] = period
        after_one = F.pad(head, (1, 0, 1, 0))
        return scope["SoftmaxDumpOutput"]._get_copying_matching_score(after_one), \
            scope["SoftmaxDumpOutput"]._get_prefix_matching_score(after_one)

    made = object.__new__(scope["RARopeCompressor"])
    return probe(score, lambda row, groups: made.max_every_group({0: row}, groups)[0], made.select_top_heads, case)


def probe_mindspore(scope: Scope, case: Case) -> Found:
    made = object.__new__(scope["RACompressCell"])

    def score(head: Tensor, period: int) -> tuple[Tensor, Tensor]:
        scope["DUMMY_INPUT_LENGTH"] = period
        echo, induction = made._calc_score(head)
        scale = len(head)**2 / (len(head) - period)                 # theirs is a mean over the map, ours over the queries
        return echo * scale, induction * scale

    return probe(score, made._max_every_group, object.__new__(scope["RazorAttention"])._select_top_heads, case)


def compensation(scope: Scope, case: Case) -> Found:
    """What is left of a head that retrieves nothing, with the compensation token and without."""
    made, theirs, ours = object.__new__(scope["DeployRACompressCell"]), [], []
    for virtual in (True, False):
        made.cfg = SimpleNamespace(local_capacity=case.keep, sink_size=4)
        x, plan = case.view, RazorAttention(case.keep - virtual, recent=0, sinks=4, compensation=virtual)
        slots = plan.fold(x, plan.evict(x, plan.scores(x)))
        ours += [torch.cat([exactly(slots.keys), exactly(slots.values)], -1)]
        whole = torch.cat([case.keys, case.values], -1)
        theirs += [torch.stack([made._compress(row.transpose(0, 1), virtual).transpose(0, 1) for row in whole])]
    return close(ours, theirs)


def kvmerger(scope: Scope, case: Case) -> Found:
    """Pivots and merged keys, head by head; tied where two cosines at the threshold are nearer than their bisection sees."""
    case = replace(case, keys=case.keys + 2 * case.keys.std())
    n, heavy = case.keys.shape[2], case.keys.shape[2] // 10
    x = replace(case.view, sight=Sight(torch.ones(1, 1, n, n, dtype=torch.bool), 0))
    plan = KVMerger(case.keep, sinks=0, recent=0, eps=-1.0, heavy=heavy)
    scores = plan.scores(x)
    kept = plan.evict(x, scores)
    merged, theirs = exactly(plan.fold(x, kept).keys), scope["KVMergerCompaction"](top_k_ratio=(heavy + 0.5) / n)
    out: Found = {"equal": True, "tied": False, "difference": None}
    for at in [(b, h) for b in range(len(case.keys)) for h in range(case.keys.shape[1])]:
        keys, _, _, pivots = theirs.compute_compacted_cache(case.keys[at], case.values[at], case.queries[at][0], case.keep)
        if kept.mask[at].nonzero().flatten().tolist() == sorted(pivots):
            out["difference"] = max(out["difference"] or 0.0, far(merged[at], keys))
            continue
        near = F.cosine_similarity(case.keys[at][1:], case.keys[at][:-1], dim=-1).sort().values
        out = {**out, "equal": False, "tied": out["equal"] | out["tied"] and bool((near.diff() < 2e-6).any())}
    return out


def pair(case: Case) -> tuple[Tensor, Tensor]:
    """Keys of two layers: some tokens nearly alike, some not at all."""
    g = torch.Generator().manual_seed(case.keep)
    apart = torch.linspace(0.05, 2, case.keys.shape[2])[torch.randperm(case.keys.shape[2], generator=g)]
    return case.keys, 1.5 * case.keys + apart[:, None] * torch.randn(case.keys.shape, generator=g)


def minicache_choice(scope: Scope, case: Case) -> Found:
    below, above = pair(case)
    made = scope["compress_minicache_pair"](above, below, retention_ratio=0.05)
    between, everywhere = angle(below, above), torch.ones(case.keys.shape[:3], dtype=torch.bool)
    ours = furthest(between, everywhere, retained(case.keys.shape[2], 0.05))
    theirs = torch.zeros_like(ours).scatter(2, made[6], True)
    return scored(choice(ours, theirs, between), between, math.pi * made[3])


def minicache_vectors(scope: Scope, case: Case) -> Found:
    below, above = pair(case)
    ours, theirs = [], []
    for t in (0.0, 0.3, 0.6, 1.0):
        shared, high, low, _ = scope["minicache_slerp"](above, below, interpolation=t)
        theirs += [shared, *scope["restore_minicache_pair"](shared, high, low)]
        direction = interpolate(below, above, t)
        ours += [direction, restore(direction, norms(above)), restore(direction, norms(below))]
    return close(ours, theirs)


STANDINS: Scope = {
    "BasePress": object, "CompAlgo": object, "Cell": object, "CompactionAlgorithm": object,
    "AttentionType": SimpleNamespace(DECODER=None), "logger": logging.getLogger(__name__), "_debug_print": lambda *_: None,
    "get_prerope_query_states": asked, "repeat_kv": repeat_kv, "rotate_half": rotate_half, "ms": torch, "mint": torch,
    "ops": SimpleNamespace(mean=lambda x, axis=None, keep_dims=False: x.mean(dim=axis, keepdim=keep_dims),
                           cat=lambda parts, axis: torch.cat(parts, axis)),
}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    sources  file -> what is compiled out of it; run: (those names, a case) -> found; single: one query head a key head
    """

    method: str
    folder: str
    sources: Mapping[str, tuple[str, ...]]
    run: Callable[[Scope, Case], Found]
    single: bool = False

    @property
    def file(self) -> str:
        return list(self.sources)[-1]


def factory(method: str, name: str, run: Callable[[Any, Case], Found]) -> Line:
    helpers = ("repeat_kv", "_gqa_groups", "_reduce_group_scores",
               "_grouped_window_attn_cache", "_select_topk_kv")
    return Line(method, "KVCache-Factory", {"pyramidkv/pyramidkv_utils.py": (*helpers, name)},
                lambda scope, case: run(scope[name], case))


def kvpress(method: str, file: str, name: str, run: Callable[[Any, Case], Found]) -> Line:
    sources = {"kvpress/presses/scorer_press.py": ("ScorerPress",), f"kvpress/presses/{file}.py": (name,)}
    return Line(method, "kvpress", sources, lambda scope, case: run(scope[name], case))


def width(case: Case) -> int:
    return case.keys.shape[2]


STICK = "mindspore_gs/experimental/long_context_compress/razor_attention/"
WRAPPERS = STICK + "wrappers/vllm_mindspore/attention_wrappers.py"
MINICACHE = {"pyramidkv/minicache.py": (
    "minicache_slerp", "_check_pair", "_unit_and_magnitude", "select_minicache_retention_indices", "_gather_tokens",
    "_scatter_tokens", "compress_minicache_pair", "restore_minicache_pair")}
LINES = (
    Line("SnapKV", "SnapKV", {"snapkv/monkeypatch/snapkv_utils.py": ("SnapKVCluster",)},
         lambda scope, case: snapkv(scope["SnapKVCluster"], case), single=True),
    factory("SnapKV", "SnapKVCluster", snapkv),
    kvpress("SnapKV", "snapkv_press", "SnapKVPress",
            lambda made, case: press(made(window_size=8), SnapKV(case.keep, recent=8), case, width(case) - 8)),
    Line("H2O", "H2O", {"h2o_hf/utils_real_drop/modify_llama.py": ("H2OKVCache_LayerWise",)},
         lambda scope, case: h2o_authors(scope["H2OKVCache_LayerWise"], case), single=True),
    factory("H2O", "H2OKVCluster", h2o),
    kvpress("H2O", "observed_attention_press", "ObservedAttentionPress",
            lambda made, case: press(made(), H2O(case.keep, recent=0), case, width(case), maps=True, adjust=by_queries)),
    Line("StreamingLLM", "streaming-llm",
         {"streaming_llm/kv_cache.py": ("StartRecentKVCache", "slice2d", "slice3d", "slice1d", "DIM_TO_SLICE")},
         lambda scope, case: streaming_authors(scope["StartRecentKVCache"], case)),
    factory("StreamingLLM", "StreamingLLMKVCluster", streaming),
    kvpress("StreamingLLM", "streaming_llm_press", "StreamingLLMPress",
            lambda made, case: press(made(), StreamingLLM(case.keep), case, 0)),
    kvpress("KNorm", "knorm_press", "KnormPress", lambda made, case: press(made(), KNorm(case.keep), case, width(case))),
    factory("KNorm", "L2NormCluster", l2norm),
    kvpress("KeyDiff", "keydiff_press", "KeyDiffPress",
            lambda made, case: press(made(), KeyDiff(case.keep), case, width(case))),
    Line("RazorAttention, probe", "msmodelslim",
         {"msmodelslim/pytorch/ra_compression/ra_rope_tools.py": ("RARopeCompressor", "SoftmaxDumpOutput")}, probe_ascend),
    Line("RazorAttention, probe", "golden-stick",
         {STICK + "razor_attention.py": ("RazorAttention",), WRAPPERS: ("RACompressCell",)}, probe_mindspore),
    Line("RazorAttention, compensation", "golden-stick", {WRAPPERS: ("DeployRACompressCell",)}, compensation),
    Line("KVMerger", "compaction", {"compaction/algorithms/kvmerger.py": ("KVMergerCompaction",)}, kvmerger, single=True),
    Line("MiniCache, angles", "KVCache-Factory", MINICACHE, minicache_choice),
    Line("MiniCache, vectors", "KVCache-Factory", MINICACHE, minicache_vectors),
)


def summarize(line: Line, found: Sequence[Found]) -> dict[str, Any]:
    equal, tied = sum(bool(f["equal"]) for f in found), sum(bool(f["tied"]) for f in found)
    worst = max((f["difference"] for f in found if f["difference"] is not None), default=None)
    return {"method": line.method, "source": line.folder, "file": line.file, "cases": len(found), "equal": equal, "tied": tied,
            "another": len(found) - equal - tied, "difference": worst}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, metavar="DIR", required=True, help="folder of your checkouts")
    parser.add_argument("--seeds", type=positive, default=10, help="draws per shape, share and kind of tensors")
    parser.add_argument("--out", type=Path, help="write a line per method to this CSV file")
    args = parser.parse_args(argv)
    there = [line for line in LINES if (args.authors / line.folder).is_dir()]
    for folder in dict.fromkeys(line.folder for line in LINES if line not in there):
        print(f"no checkout at {args.authors / folder}, its methods are left out", file=sys.stderr)
    if not there:
        parser.error(f"--authors {args.authors}: holds none of {', '.join(dict.fromkeys(line.folder for line in LINES))}")
    drawn = list(cases(args.seeds))
    about = versions(torch.device("cpu"), torch.float32)
    rows = []
    for line in tqdm(there, desc="parity", unit="line"):
        scope = compiled(args.authors / line.folder, line.sources, STANDINS)
        found = [line.run(scope, case.single if line.single else case) for case in drawn]
        rows.append({**summarize(line, found), "commit": commit(args.authors / line.folder), **about})
    print_table(f"ours and public code\n{', '.join(f'{k} {v}' for k, v in about.items())}", rows, COLUMNS)
    if args.out is not None:
        write_csv(args.out, rows)
    return int(any(row["another"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
