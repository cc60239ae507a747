"""Each method against an independent reference: loops that follow the paper's text, or a closed form."""

import pytest
import torch
import torch.nn.functional as F
from test_tokens import ADAPTER, tokens_of

from mmcompress import ImageLayout, Tokens
from mmcompress.image import AveragePool, ClsTopK, GlobalCom2, GlobalRank, Random, Uniform, VisionZip
from mmcompress.image.average_pool import pooled_slots
from mmcompress.tokens import LayerState

REAL = ImageLayout(tile=(24, 24), grid=(2, 2), rows=(0, 48), columns=(0, 48), newlines=True)       # 672 x 672
PADDED = ImageLayout(tile=(24, 24), grid=(2, 2), rows=(6, 42), columns=(0, 48), newlines=True)     # 480 x 640
WIDE = ImageLayout(tile=(24, 24), grid=(1, 3), rows=(3, 21), columns=(0, 72), newlines=True)
TALL = ImageLayout(tile=(24, 24), grid=(3, 1), rows=(0, 72), columns=(4, 20), newlines=True)
ALONE = ImageLayout(tile=(24, 24), newlines=True)
LAYOUTS = [REAL, PADDED, WIDE, TALL]


def with_logits(logits, layout, features=None):
    """Tokens whose [CLS] logits are (B, tiles, patches) `logits`: one head of width one, query 1, keys the logits."""
    batch, tiles, _ = logits.shape
    cls = torch.full((batch, tiles, 1), -1e4)                          # [CLS] does not attend to itself
    state = LayerState(torch.ones(batch, tiles, 1, 1), torch.cat([cls, logits], 2)[..., None, None])
    if features is None:
        features = torch.randn(batch, layout.tokens, 4)
    return Tokens(features, layout, {-1: state, -2: state})


def crop_grid(layout):
    """For each crop the (row, column) of its unpadded patches on the canvas, and their place in the sequence."""
    places = layout.places()
    out = []
    for j in range(layout.crops):
        at = (places.tile == 1 + j).nonzero()[:, 0]
        inside = places.patch[at] - (1 + j) * 576
        gy, gx = divmod(j, layout.grid[1])
        out.append((at, inside, gy * 24 + inside // 24, gx * 24 + inside % 24))
    return out


def paper_code_by_loops(logits, layout, keep):
    """The authors' rule for one picture, in plain loops. logits (tiles, 576) -> positions in their order."""
    gh, gw = layout.grid
    thumbnail = logits[0].view(24, 24).double()
    k = int(576 * keep)
    order = sorted(range(576), key=lambda i: -float(logits[0, i]))[:k]                   # score order, not raster
    sums = [0.0] * (gh * gw)
    for r in range(24):
        for c in range(24):
            sums[min(r // (24 // gh), gh - 1) * gw + min(c // (24 // gw), gw - 1)] += float(thumbnail[r, c])
    heat = torch.tensor(sums, dtype=torch.float64)
    heat = ((heat - heat.max()) / 10).exp()
    sigma = heat / (heat.sum() + 1e-8)
    rates = [min(1.0, float(keep * (1 + s - sigma.mean()))) for s in sigma]
    spread = F.interpolate(logits[:1].view(1, 1, 24, 24), size=layout.size, mode="bilinear", align_corners=False)[0, 0]
    kept = []
    for (at, inside, rows, columns), rate, local in zip(crop_grid(layout), rates, logits[1:]):
        if not len(at):
            continue
        a, g = local[inside], spread[rows - layout.rows[0], columns - layout.columns[0]]
        score = a / a.norm() + g / g.norm()
        kept += at[score.argsort(descending=True)[:int(len(at) * rate)]].tolist()
    return order + sorted(kept + layout.places().newline.tolist())


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["square", "padded", "wide", "tall"])
def test_paper_code_selects_what_the_authors_code_selects(layout, keep):
    g = torch.Generator().manual_seed(int(100 * keep))
    logits = torch.randn(3, layout.tiles, 576, generator=g) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1)
    reducer = GlobalCom2(keep=keep, paper_code=True)
    x = with_logits(logits, layout)
    out = reducer(x)
    assert out.index.shape[1] == reducer.count(layout)
    for b in range(3):
        index = out.index[b][out.valid[b]]
        assert index.tolist() == paper_code_by_loops(logits[b], layout, keep)
        slots = out.source[b][index]
        assert torch.equal(slots, torch.arange(len(index))) and int((out.source[b] >= 0).sum()) == len(index)
        assert torch.equal(out.tokens[b][out.valid[b]], x.features[b][index])


def test_paper_code_saturates_as_the_notes_say():
    """Block sums (60, 20, -10, -40) at R = .25 give (.433, .192, .188, .188); at .75 the first is clipped, not passed on."""
    logits = torch.zeros(1, 5, 576)
    for block, total in enumerate((60.0, 20.0, -10.0, -40.0)):
        rows, columns = slice(12 * (block // 2), 12 * (block // 2) + 12), slice(12 * (block % 2), 12 * (block % 2) + 12)
        logits[0, 0].view(24, 24)[rows, columns] = total / 144
    out = GlobalCom2(keep=0.25, paper_code=True)(with_logits(logits + 1e-4 * torch.rand_like(logits[:, 1:2]), REAL))
    tile = REAL.places().tile[out.index[0][out.valid[0]]]
    assert [int((tile == j).sum()) for j in range(5)] == [144, int(576 * 0.43307), int(576 * 0.19199), int(576 * 0.1878),
                                                          int(576 * 0.1875)]
    full = GlobalCom2(keep=0.75, paper_code=True)(with_logits(logits + 1e-4 * torch.rand_like(logits[:, 1:2]), REAL))
    tile = REAL.places().tile[full.index[0][full.valid[0]]]
    assert int((tile == 1).sum()) == 576 and int((tile > 0).sum()) < 0.75 * 4 * 576


def paper_by_loops(probabilities, layout, k, temperature=0.5, alpha=0.5):
    """The paper's rule for one picture without newlines: Webster's apportionment of k to thumbnail and crops."""
    thumbnail = probabilities[0].view(1, 1, 24, 24)
    (_, gw), (r0, r1), (c0, c1) = layout.grid, layout.rows, layout.columns
    density, sizes = [], []
    for j in range(layout.crops):
        gy, gx = divmod(j, gw)
        top, bottom = (min(max(v, r0), r1) for v in (24 * gy, 24 * gy + 24))
        left, right = (min(max(v, c0), c1) for v in (24 * gx, 24 * gx + 24))
        total = area = 0.0
        for r in range(24):                     # thumbnail cell r covers canvas rows [r0 + r (r1-r0)/24, ...)
            y = (r1 - r0) / 24
            shown = max(0.0, min(bottom, r0 + (r + 1) * y) - max(top, r0 + r * y)) / y
            for c in range(24):
                z = (c1 - c0) / 24
                width = max(0.0, min(right, c0 + (c + 1) * z) - max(left, c0 + c * z)) / z
                total += shown * width * float(thumbnail[0, 0, r, c])
                area += shown * width
        density.append(total / area)
        sizes.append((bottom - top) * (right - left))
    heat = torch.tensor(density)
    sigma = (heat / heat.mean() / temperature).softmax(0)
    weight = [576.0] + [n * (1 + float(s) - 1 / layout.crops) for n, s in zip(sizes, sigma)]
    spread = F.interpolate(thumbnail, size=layout.size, mode="bilinear", align_corners=False)[0, 0]
    scores = [(torch.arange(576), probabilities[0])]
    for (at, inside, rows, columns), local in zip(crop_grid(layout), probabilities[1:]):
        scores.append((at, alpha * spread[rows - r0, columns - c0] + (1 - alpha) * local[inside]))
    won = [0] * (1 + layout.crops)
    for _ in range(k):
        quotient = [w / (2 * n + 1) if n < len(s) else -1 for w, n, (s, _) in zip(weight, won, scores)]
        won[quotient.index(max(quotient))] += 1
    return sorted(i for n, (at, s) in zip(won, scores) for i in at[s.argsort(descending=True)[:n]].tolist())


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["square", "padded", "wide", "tall"])
def test_globalcom2_is_the_papers_rule_at_an_exact_total(layout, keep):
    logits = torch.randn(2, layout.tiles, 576, generator=torch.Generator().manual_seed(7)) * 2
    reducer = GlobalCom2(keep=keep, newlines="none")
    out = reducer(with_logits(logits, layout))
    for b in range(2):
        expected = paper_by_loops(logits[b].softmax(-1), layout, reducer.count(layout))
        assert len(set(expected) ^ set(out.index[b].tolist())) <= 2     # a tie in float32 may fall either way


def test_globalcom2_budgets_adapt_and_are_redistributed():
    """Attention on one quarter of the thumbnail moves tokens to that crop; what it cannot hold goes to the others."""
    logits = torch.zeros(1, 5, 576)
    logits[0, 0].view(24, 24)[:12, :12] = 1.0
    logits = logits + 0.01 * torch.randn(1, 5, 576, generator=torch.Generator().manual_seed(0))
    x = with_logits(logits, REAL)
    tile = REAL.places().tile

    def counts(keep, **options):
        kept = tile[GlobalCom2(keep=keep, newlines="none", **options)(x).index[0]]
        return [int((kept == j).sum()) for j in range(5)]

    quarter = counts(0.25)
    assert sum(quarter) == 732 and quarter[1] > 1.3 * quarter[2] and abs(quarter[0] - 0.25 * 576) < 4
    flat = counts(0.25, temperature=1e6)
    assert max(flat[1:]) - min(flat[1:]) <= 1                                   # no temperature, no adaptation
    assert counts(0.25, temperature=0.1)[1] > quarter[1]
    most = counts(0.9, temperature=0.1)
    assert most[1] == 576 and sum(most) == int(2928 * 0.9)                      # clipped, and the total is exact
    assert counts(0.25, alpha=0.0) == quarter                                   # alpha moves tokens inside crops only


def test_globalcom2_cosine_ranks_by_the_negative_cosine_to_the_mean():
    x = tokens_of(ADAPTER.layout(24, 24), cls=False)                            # a padded two-crop picture
    layout = x.layout
    out = GlobalCom2(keep=0.3, newlines="none", alpha=0.0)(x)
    tile = layout.places().tile
    for b in range(2):
        for j in range(layout.tiles):
            at = (tile == j).nonzero()[:, 0]
            if not len(at):
                continue
            members = x.features[b][at]
            score = -F.cosine_similarity(members, members.mean(0), dim=-1)
            n = int((tile[out.index[b]] == j).sum())
            assert set(at[score.argsort(descending=True)[:n]].tolist()) == set(out.index[b][tile[out.index[b]] == j].tolist())


@pytest.mark.parametrize("scores", ["auto", "attention", "logits", "cosine"])
def test_globalcom2_on_a_single_tile(scores):
    logits = torch.randn(1, 1, 576)
    x = with_logits(logits, ALONE)
    out = GlobalCom2(keep=101, scores=scores)(x)
    assert out.index.shape == (1, 101) and int(out.index[0, -1]) == 576         # 100 patches and the newline
    if scores != "cosine":
        assert set(out.index[0, :-1].tolist()) == set(logits[0, 0].topk(100).indices.tolist())


def global_rank_by_loops(x, b, k, alpha=0.5, width=3, power=1.0, own=0):
    """The ranking of one picture's canvas: scores, horizontal mean, suppression one token at a time, rows paid for."""
    layout, places = x.layout, x.places
    attention = x.cls_attention(-1)[b]
    on_canvas = [i for i in range(layout.tokens) if places.tile[i] > 0]
    rows, columns = layout.size
    local = attention[on_canvas].view(rows, columns)
    spread = F.interpolate(attention[:layout.thumbnail_tokens].view(1, 1, *layout.tile), size=(rows, columns),
                           mode="bilinear", align_corners=False)[0, 0]
    score = (1 - alpha) * local / local.norm() + alpha * spread / spread.norm()
    half = width // 2
    score = torch.stack([score[:, max(0, c - half):c + half + 1].mean(1) for c in range(columns)], 1).flatten()
    features = x.features[b, on_canvas] - x.features[b, on_canvas].mean(0)
    tile = places.tile[on_canvas]
    order = score.argsort(descending=True, stable=True).tolist()
    final = score.clone()
    for at, i in enumerate(order):
        better = [j for j in order[:at] if tile[j] == tile[i]]
        if better:
            likeness = F.cosine_similarity(features[i][None], features[better], dim=-1).max().clamp(0, 1)
            final[i] = score[i] * (1 - likeness) ** power
    thumbnail = attention[:layout.thumbnail_tokens].argsort(descending=True, stable=True).tolist()
    ranking = thumbnail[:own] + [on_canvas[i] for i in final.argsort(descending=True, stable=True).tolist()]
    chosen, opened, spent = [], set(), 0
    for at, i in enumerate(ranking):
        line = int(places.line[i])
        cost = 1 + (line >= 0 and line not in opened)
        if spent + cost > k:
            if spent < k:
                chosen.append(next(j for j in ranking[at:] if int(places.line[j]) in opened))
            break
        spent += cost
        chosen.append(i)
        opened |= {line} - {-1}
    return sorted(chosen + [int(places.newline[line]) for line in opened])


@pytest.mark.parametrize("size", [(48, 48), (40, 60), (70, 30)])
@pytest.mark.parametrize("options", [{}, {"smooth": 1, "redundancy": 0.0}, {"smooth": 5, "redundancy": 2.0, "alpha": 0.2},
                                     {"thumbnail": 0.25}, {"thumbnail": 0.0}],
                         ids=["default", "plain", "wide", "thumbnail", "commander only"])
def test_global_rank(size, options):
    x = tokens_of(ADAPTER.layout(*size), seed=3)
    k = int(0.45 * x.layout.tokens)
    out = GlobalRank(keep=k, **options)(x)
    names = {"smooth": "width", "redundancy": "power", "alpha": "alpha"}
    given = {names[n]: v for n, v in options.items() if n in names}
    for b in range(2):
        own = round(36 * options.get("thumbnail", (k / x.layout.tokens) ** 4))
        expected = global_rank_by_loops(x, b, k, own=own, **given)
        assert out.index[b].tolist() == expected


def test_global_rank_of_a_thumbnail_alone_and_its_errors():
    logits = torch.randn(1, 1, 576)
    out = GlobalRank(keep=101, smooth=1, redundancy=0.0, alpha=0.0)(with_logits(logits, ALONE))
    assert out.index[0].tolist() == [*sorted(logits[0, 0].topk(100).indices.tolist()), 576]
    for bad in ({"alpha": 1.5}, {"thumbnail": -0.1}, {"smooth": 2}, {"redundancy": -1}, {"scores": "logits"},
                {"newlines": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            GlobalRank(**bad)


def test_global_rank_drops_what_repeats():
    """Two equal regions of top score: one copy is enough, and the tokens go elsewhere."""
    layout = ImageLayout(tile=(6, 6), grid=(1, 2), rows=(0, 6), columns=(0, 12))
    logits = torch.zeros(1, 3, 36)
    logits[0, 1, :12] = 4.0                                                     # crop 1: two rows stand out, and repeat
    logits[0, 2, :6] = 1.0                                                      # crop 2: one row stands out less
    features = torch.randn(1, layout.tokens, 16, generator=torch.Generator().manual_seed(0))
    places = layout.places()
    first = (places.tile == 1) & (places.patch - 36 < 12)
    features[0, first] = features[0, first.nonzero()[0, 0]].clone()
    x = with_logits(logits, layout, features)
    plain = GlobalRank(keep=12, smooth=1, redundancy=0.0)(x)
    ours = GlobalRank(keep=12, smooth=1)(x)
    assert int(first[plain.index[0]].sum()) >= 10 and int(first[ours.index[0]].sum()) <= 2


def test_cls_topk_is_topk():
    x = tokens_of(REAL, batch=2)
    out = ClsTopK(keep=300, newlines="none")(x)
    places = REAL.places()
    for b in range(2):
        state = x.vision[-1]
        row = torch.stack([(state.keys[b, t] * state.query[b, t]).sum(-1) * 4 ** -0.5 for t in range(5)])    # (T, S, H)
        attention = row.softmax(1).mean(2)[:, 1:].flatten()
        best = attention[places.patch].masked_fill(~places.is_patch, -1).topk(300).indices
        assert out.index[b].tolist() == sorted(best.tolist())


def visionzip_by_loops(x, b, k, merged, merge):
    places, layout = x.places, x.layout
    attention = x.cls_attention(-2)[b]
    ranked = [sorted((places.tile == t).nonzero()[:, 0].tolist(), key=lambda i: -float(attention[i]))
              for t in range(layout.tiles)]
    won = [0] * layout.tiles
    for _ in range(k - merged):                 # the next seat goes to the largest quotient, ties to the earlier token
        open_tiles = [t for t in range(layout.tiles) if won[t] < len(ranked[t])]
        t = max(open_tiles, key=lambda t: (round(len(ranked[t]) / (2 * won[t] + 1), 6), -ranked[t][won[t]]))
        won[t] += 1
    dominant = sorted(i for t, n in enumerate(won) for i in ranked[t][:n])
    rest = [i for i in places.is_patch.nonzero()[:, 0].tolist() if i not in set(dominant)]
    anchors = [rest[c * len(rest) // merged] for c in range(merged)]
    keys = x.keys(-2)[b]
    groups = {a: [] for a in anchors}
    for i in rest:
        if i not in groups:
            groups[max(anchors, key=lambda a: float(F.cosine_similarity(keys[i], keys[a], dim=0)))].append(i)
    out = {i: x.features[b, i] for i in dominant}
    for a, others in groups.items():
        if merge == "average":
            out[a] = x.features[b, [a, *others]].mean(0)
        else:
            out[a] = x.features[b, a] + (x.features[b, others].mean(0) if others else 0)
    return sorted(out), torch.stack([out[i] for i in sorted(out)]), {i: a for a, o in groups.items() for i in o}


@pytest.mark.parametrize("merge", ["average", "sum"])
def test_visionzip(merge):
    x = tokens_of(ADAPTER.layout(48, 40), seed=4)
    reducer = VisionZip(keep=64, merge=merge)
    out = reducer(x)
    for b in range(2):
        index, tokens, merged_into = visionzip_by_loops(x, b, 64, 10, merge)
        assert out.index[b].tolist() == index
        torch.testing.assert_close(out.tokens[b], tokens)
        for token, anchor in merged_into.items():
            assert int(out.source[b, token]) == index.index(anchor)
        assert int(out.mass[b].sum()) == x.layout.patches
    assert VisionZip(keep=0.99)(x).index.shape[1] == int(0.99 * x.layout.tokens)         # newlines fill what patches cannot


def test_average_pool_where_sides_divide_is_adaptive_pooling():
    layout = ImageLayout(tile=(4, 4), grid=(2, 2), rows=(0, 8), columns=(0, 8), newlines=False)
    x = Tokens(torch.randn(2, 80, 3), layout)
    out = AveragePool(keep=0.25)(x)
    thumbnail = F.adaptive_avg_pool2d(x.features[:, :16].view(2, 4, 4, 3).permute(0, 3, 1, 2), 2)
    canvas = F.adaptive_avg_pool2d(x.features[:, 16:].view(2, 8, 8, 3).permute(0, 3, 1, 2), 4)
    expected = torch.cat([thumbnail.flatten(2), canvas.flatten(2)], 2).transpose(1, 2)
    torch.testing.assert_close(out.tokens, expected)
    assert out.mass.tolist() == [[4.0] * 20] * 2


def test_average_pool_keeps_one_newline_a_band():
    slots, index = pooled_slots(REAL, 732)
    places = REAL.places()
    newline_slots = sorted({slots[i] for i in places.newline.tolist()})
    bands = len(newline_slots)
    assert all(not places.is_patch[index[s]] for s in newline_slots)
    patch_slots = {slots[i] for i in places.is_patch.nonzero()[:, 0].tolist()}
    assert not patch_slots & set(newline_slots) and len(patch_slots) + bands == 732
    assert 23 <= bands <= 25                                                     # 48 rows at a quarter: about half


def test_uniform_and_random():
    x = tokens_of(ADAPTER.layout(48, 48))                                        # 192 tokens
    assert Uniform(keep=4)(x).index.tolist() == [[24, 72, 120, 168]] * 2
    a, b = Random(keep=50, seed=1)(x).index, Random(keep=50, seed=2)(x).index
    assert torch.equal(a[0], a[1]) and torch.equal(a, Random(keep=50, seed=1)(x).index) and not torch.equal(a, b)
    kept = torch.zeros(192)
    for seed in range(400):
        kept[Random(keep=48, seed=seed)(x).index[0]] += 1
    assert kept.min() > 60 and kept.max() < 145                                  # 100 +- 5 sigma: every token alike
