"""The reducers alone, and GlobalCom2 against its authors' public code: the same selection, and how long it takes.

    python benchmarks/selection.py --authors /path/to/GlobalCom2 --out times.csv --cases cases.csv
    python benchmarks/selection.py                      # ours alone
    python benchmarks/selection.py --small              # narrow features and few cases, on any machine

`--authors` is your own checkout of their repository, of which nothing is copied here: the functions of the per-picture
compression (and the choice of the crops' grid) are compiled out of its files, since the modules themselves import a
transformers of 2024. Both sides see the same scores and features.

Parity   for every picture size, keep and seed, on the CPU and on transformers' canvas. kind: "equal" if the patches kept
         of every crop are the same set and the thumbnail's the same list, by score; "another canvas" where they unpad
         to another size, since they truncate (27.9999999 is 27 there); "another" makes the script exit 1.
         same_grid: they would cut this picture into the same crops. order: all patches come in the same order; where
         crops lie side by side and are padded left and right theirs do not, since they put a crop's patches back by
         their number among its unpadded ones.
         sequence: newlines too; theirs emit them for padded rows, of which transformers packs none.
Time     a batch of eight 672 x 672 pictures, median of `--repeats`. Theirs gets the [CLS] logits ready made; ours computes
         them from queries and keys, as it does within a model.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import PINPOINTS, build_model, clock, positive, print_table, versions, write_csv
from torch import Tensor
from tqdm import tqdm

from mmcompress.adapters import adapter_for
from mmcompress.image import GlobalCom2, GlobalRank
from mmcompress.tokens import ImageLayout, LayerState, Reduction, Tokens

SIZES = [(672, 672), (480, 640), (640, 480), (1008, 336), (336, 1008), (333, 500), (500, 333), (337, 671), (719, 401),
         (1200, 300), (300, 1300), (900, 450), (450, 460), (601, 599), (1080, 1920), (2000, 1501), (200, 200), (97, 211),
         (396, 704)]                    # height, width; the last is unpadded differently there
KEEPS = [0.1, 0.25, 0.5, 0.75]
PATCH_ARCH = ("generate_scale_for_crop_features", "extract_actual_dimensions", "get_original_indices",
              "get_actual_crop_dimensions", "interpolate_and_split_cls_attn_scores", "select_topk_crop_features",
              "compress_thumbnail", "compress_crops", "retention_ratio")
PATCH_UTILS = ("select_best_resolution", "get_anyres_image_grid_shape")
NEWLINE = -1
KIND = ("kind", "same_grid", "padded", "order", "sequence")


# the authors' code ----------------------------------------------------------------------------------------------------


def compile_from(path: Path, names: Sequence[str], scope: dict[str, Any]) -> None:
    """Define the named functions, methods and constants of a file in `scope`, without importing the file."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            found[node.name] = node
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            found.setdefault(node.targets[0].id, node)
    if missing := sorted(set(names) - set(found)):
        raise ValueError(f"{path}: no {', '.join(missing)}; pass a checkout of github.com/xuyang-liu16/GlobalCom2")
    body: list[ast.stmt] = sorted(found.values(), key=lambda node: node.lineno)         # constants before their use
    exec(compile(ast.Module(body=body, type_ignores=[]), str(path), "exec"), scope)


@dataclass(frozen=True)
class Authors:
    """Their per-picture compression, as `prepare_inputs_labels_for_multimodal` calls it."""

    scope: dict[str, Any]

    @classmethod
    def load(cls, checkout: Path) -> Authors:
        scope: dict[str, Any] = {"torch": torch, "F": F, "np": np, "ast": ast}
        compile_from(checkout / "llava/model/llava_arch.py", PATCH_ARCH, scope)
        compile_from(checkout / "llava/mm_utils.py", PATCH_UTILS, scope)
        return cls(scope)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Crops down and across that they cut a picture into; their sizes are (width, height)."""
        across, down = self.scope["get_anyres_image_grid_shape"]((width, height), PINPOINTS, 336)
        return down, across

    def __call__(self, features: Tensor, logits: Tensor, newline: Tensor, size: tuple[int, int], grid: tuple[int, int],
                 keep: float) -> Tensor:
        """One picture: features (T, P, D), logits (T, P), newline (D,) -> the tokens kept (K, D)."""
        (height, width), (down, across) = size, grid
        owner = SimpleNamespace(model=SimpleNamespace(image_newline=newline))
        side = round(features.shape[1] ** 0.5)
        thumbnail, _ = self.scope["compress_thumbnail"](owner, features[0], logits[0], scale=keep)
        scales = self.scope["generate_scale_for_crop_features"](logits[0], across, down, base_scale=keep)
        crops = self.scope["compress_crops"](owner, features[1:], logits[1:], logits[0], across, down, side, side,
                                             (width, height), scales)
        return torch.cat([thumbnail, crops])


# parity ---------------------------------------------------------------------------------------------------------------


def random_logits(layout: ImageLayout, size: tuple[int, int], seed: int) -> Tensor:
    """Smooth blobs plus noise, of about the spread that CLIP-L's last [CLS] row has. (T, P) float32"""
    made = torch.Generator().manual_seed(1_000_003 * seed + 5003 * size[0] + size[1])
    coarse = torch.randn(layout.tiles, 1, 5, 5, generator=made)
    blobs = F.interpolate(coarse, size=layout.tile, mode="bicubic")[:, 0].flatten(1)
    offset, spread = torch.rand(2, generator=made).tolist()
    return 2 * (offset - 0.5) + (0.3 + 1.5 * spread) * (blobs + 0.7 * torch.randn(blobs.shape, generator=made))


def as_tokens(features: Tensor, logits: Tensor, layout: ImageLayout) -> Tokens:
    """Tokens whose `cls_logits` are exactly `logits`: (B, T, P) as keys of one channel, the query 1."""
    keys = F.pad(logits, (1, 0))[..., None, None]                                       # (B, T, 1 + P, 1, 1)
    return Tokens(features, layout, vision={-1: LayerState(query=torch.ones_like(keys[:, :, 0]), keys=keys)})


def ours_in_order(logits: Tensor, layout: ImageLayout, keep: float) -> list[int]:
    """Packed positions that `GlobalCom2(paper_code=True)` keeps of one picture, in its order."""
    x = as_tokens(torch.zeros(1, layout.tokens, 1), logits[None], layout)
    reduction: Reduction = GlobalCom2(keep=keep, paper_code=True)(x)
    assert reduction.valid is not None
    return reduction.index[0, reduction.valid[0]].tolist()


def theirs_in_order(authors: Authors, logits: Tensor, layout: ImageLayout, size: tuple[int, int], keep: float
                    ) -> list[int]:
    """Packed positions that the authors keep of one picture, in their order; every newline is -1."""
    tiles, patches = logits.shape
    names = torch.cartesian_prod(torch.arange(tiles), torch.arange(patches)).float()    # exact, also in their float16
    kept = authors(names.view(tiles, patches, 2), logits, torch.tensor([-1.0, 0.0]), size, layout.grid, keep).long()
    patch = torch.where(kept[:, 0] < 0, NEWLINE, kept[:, 0] * patches + kept[:, 1])
    places = layout.places()
    position = dict(zip(places.patch[places.is_patch].tolist(), places.is_patch.nonzero()[:, 0].tolist()))
    return [NEWLINE if p == NEWLINE else position[p] for p in patch.tolist()]


def truncated_size(size: tuple[int, int], layout: ImageLayout) -> tuple[int, int]:
    """Unpadded canvas where the scaled side is truncated, 27.9999999 to 27; transformers rounds to 7 digits first."""
    (height, width), (rows, columns) = size, layout.canvas
    if width / height > columns / rows:
        return rows - 2 * ((rows - int(height * (columns / width))) // 2), columns
    return rows, columns - 2 * ((columns - int(width * (rows / height))) // 2)


def compare(authors: Authors, layout: ImageLayout, size: tuple[int, int], keep: float, seed: int) -> dict[str, Any]:
    """One case: what is equal, and if not, what kind of difference it is."""
    case: dict[str, Any] = {"height": size[0], "width": size[1], "grid": f"{layout.grid[0]}x{layout.grid[1]}",
                            "same_grid": authors.grid(*size) == layout.grid, "padded": layout.size != layout.canvas,
                            "keep": keep, "seed": seed}
    logits = random_logits(layout, size, seed)
    tile = [NEWLINE if t < 0 else t for t in layout.places().tile.tolist()]
    ours = ours_in_order(logits, layout, keep)
    theirs = theirs_in_order(authors, logits, layout, size, keep)
    by_tile = [[[p for p in kept if p != NEWLINE and tile[p] == t] for t in range(layout.tiles)]
               for kept in (ours, theirs)]
    thumbnail = by_tile[0][0] == by_tile[1][0]
    tied = torch.equal(*(logits[0, kept[0]] for kept in by_tile))           # their sort leaves equal scores in any order
    crops = [set(a) == set(b) for a, b in zip(by_tile[0][1:], by_tile[1][1:])]
    plain = [p if tile[p] >= 0 else NEWLINE for p in ours]
    in_order = [p for p in plain if p != NEWLINE] == [p for p in theirs if p != NEWLINE]
    newlines = plain.count(NEWLINE), theirs.count(NEWLINE)
    if truncated_size(size, layout) != layout.size:
        kind = "another canvas"
    elif not tied or not all(crops):
        kind = "another"
    else:
        kind = "equal" if thumbnail else "equal up to tied scores"
    return {**case, "kind": kind, "thumbnail": thumbnail, "crops": f"{sum(crops)}/{len(crops)}", "order": in_order,
            "sequence": plain == theirs, "newlines_ours": newlines[0], "newlines_theirs": newlines[1],
            "patches": len(ours) - newlines[0]}


def parity(authors: Authors, layout_of: Callable[[int, int], ImageLayout], sizes: Sequence[tuple[int, int]],
           keeps: Sequence[float], seeds: int) -> list[dict[str, Any]]:
    cases = [(size, keep, seed) for size in sizes for keep in keeps for seed in range(seeds)]
    return [compare(authors, layout_of(*size), size, keep, seed)
            for size, keep, seed in tqdm(cases, desc="parity", unit="case")]


# time -----------------------------------------------------------------------------------------------------------------


def time_reducers(authors: Authors | None, layout: ImageLayout, batch: int, width: int, heads: int, keeps: Sequence[float],
                  repeats: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """ms per batch of pictures of this layout, ours and theirs on the same features."""
    tiles, patches = layout.tiles, layout.thumbnail_tokens
    state = LayerState(query=torch.randn(batch, tiles, heads, 64, device=device, dtype=dtype),
                       keys=torch.randn(batch, tiles, 1 + patches, heads, 64, device=device, dtype=dtype))
    all_tiles = torch.randn(batch, tiles, patches, width, device=device, dtype=dtype)
    packed = all_tiles.flatten(1, 2).index_select(1, layout.places(device).patch)               # newlines: any token
    x = Tokens(packed, layout, vision={-1: state})
    logits = (torch.einsum("bthd,btshd->bths", state.query.float(), state.keys.float()) / 8).mean(2)[..., 1:]
    newline = torch.zeros(width, device=device, dtype=dtype)
    rows = []
    for keep in tqdm(keeps, desc="time", unit="keep"):
        theirs_ms, theirs_n = None, min(repeats, 3)
        if authors is not None:
            def theirs(keep: float = keep) -> list[Tensor]:
                return [authors(f, s, newline, (672, 672), layout.grid, keep) for f, s in zip(all_tiles, logits)]

            theirs_ms = clock(theirs, device, theirs_n, warm_up=1)
        for name, reducer in (("GlobalCom2(paper_code=True)", GlobalCom2(keep=keep, paper_code=True)),
                              ("GlobalCom2", GlobalCom2(keep=keep)), ("GlobalRank", GlobalRank(keep=keep))):
            ms = clock(lambda reducer=reducer: reducer(x), device, repeats)
            rows.append({"method": name, "keep": keep, "batch": batch, "tokens": layout.tokens, "width": width, "ms": ms,
                         "authors_ms": theirs_ms, "authors_n": None if theirs_ms is None else theirs_n,
                         "authors/ours": None if theirs_ms is None else theirs_ms / ms})
    return rows


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, metavar="DIR", help="your checkout of the authors' repository")
    parser.add_argument("--small", action="store_true", help="width 32, batch 2, two keeps, one seed, 2 repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: float16; cpu: float32")
    parser.add_argument("--width", type=positive, help="of the features; default: 4096; cpu: 256")
    parser.add_argument("--batch", type=positive, help="pictures timed together; default: 8")
    parser.add_argument("--keep", type=float, nargs="+")
    parser.add_argument("--seeds", type=positive, default=5, help="random score maps per size and keep")
    parser.add_argument("--repeats", type=positive, help="default: 11")
    parser.add_argument("--out", type=Path, help="write the times to this CSV file")
    parser.add_argument("--cases", type=Path, help="write every parity case to this CSV file")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = torch.device(args.device)
    cpu = device.type == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if cpu else "float16"))
    width = args.width or (32 if args.small else 256 if cpu else 4096)
    batch, repeats = args.batch or (2 if args.small else 8), args.repeats or (2 if args.small else 11)
    keeps, seeds = args.keep or (KEEPS[:2] if args.small else KEEPS), 1 if args.small else args.seeds
    adapter = adapter_for(build_model(torch.device("cpu"), torch.float32, small=True))      # its geometry is the 7B's
    authors = None if args.authors is None else Authors.load(args.authors)
    about = versions(device, dtype)

    failed, equal, cases = False, None, []
    if authors is not None:
        cases = parity(authors, adapter.layout, SIZES, keeps, seeds)
        failed = any(case["kind"] == "another" for case in cases)
        equal = f"{sum(case['kind'] == 'equal' for case in cases)}/{len(cases)}"
        kinds = Counter(tuple(case[c] for c in KIND) for case in cases)
        print_table(f"parity with the authors' selection, {len(SIZES)} sizes x {len(keeps)} keeps x {seeds} seeds",
                    [{**dict(zip(KIND, kind)), "cases": count} for kind, count in kinds.items()], (*KIND, "cases"))
        if args.cases is not None:
            write_csv(args.cases, cases)
    rows = time_reducers(authors, adapter.layout(672, 672), batch, width, 16 if width >= 1024 else 4, keeps, repeats,
                         device, dtype)
    rows = [{**row, "parity": equal if "paper_code" in row["method"] else None, "n": repeats, **about} for row in rows]
    print_table(f"milliseconds for a batch of {batch} pictures of 672 x 672; {', '.join(about.values())}; n = {repeats}",
                rows, ("method", "keep", "ms", "authors_ms", "authors/ours", "parity"))
    if args.out is not None:
        write_csv(args.out, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
