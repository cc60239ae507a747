"""Rankings and newline policies against loops that follow their definition."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mmcompress import ImageLayout
from mmcompress.ops.canvas import crop_mass, crop_tokens, spread_over_canvas
from mmcompress.ops.pooling import average_by_slot, even_split, grid_cells
from mmcompress.ops.ranking import apportion, keep_with_newlines, ranks, ranks_within, topk_in_order

LAYOUT = ImageLayout(tile=(4, 4), grid=(2, 3), rows=(1, 7), columns=(0, 12), newlines=True)


def kept_by_definition(scores, layout, k):
    """The longest prefix of the ranking whose tokens and newly opened rows fit, then the one slot that may be left."""
    places = layout.places()
    ranking = [int(i) for i in scores.argsort(descending=True, stable=True) if places.is_patch[i]]
    chosen, rows, spent = [], set(), 0
    at = len(ranking)
    for n, i in enumerate(ranking):
        line = int(places.line[i])
        cost = 1 + (line >= 0 and line not in rows)
        if spent + cost > k:
            at = n
            break
        spent += cost
        chosen.append(i)
        rows |= {line} - {-1}
    if spent < k:
        open_ones = [i for i in ranking[at:] if int(places.line[i]) in rows or int(places.line[i]) < 0]
        chosen.append((open_ones or ranking[at:])[0])
    return sorted(chosen + [int(places.newline[line]) for line in rows])


@given(st.integers(0, 10_000), st.integers(1, LAYOUT.tokens - 1), st.booleans())
@settings(max_examples=300, deadline=None)
def test_newlines_of_kept_rows(seed, k, ties):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, LAYOUT.tokens, generator=g)
    if ties:
        scores = (scores * 2).round()
    index = keep_with_newlines(scores, LAYOUT.places(), k, "kept")
    for b in range(3):
        assert index[b].tolist() == kept_by_definition(scores[b].masked_fill(~LAYOUT.places().is_patch, -9e9), LAYOUT, k)


@given(st.integers(0, 1000), st.integers(7, LAYOUT.tokens - 1))
@settings(max_examples=50, deadline=None)
def test_all_and_no_newlines(seed, k):
    places = LAYOUT.places()
    scores = torch.randn(1, LAYOUT.tokens, generator=torch.Generator().manual_seed(seed))
    newlines = set(places.newline.tolist())
    every = set(keep_with_newlines(scores, places, k, "all")[0].tolist())
    assert newlines <= every and len(every) == k
    none = set(keep_with_newlines(scores, places, k, "none")[0].tolist())
    assert len(none & newlines) == max(0, k - LAYOUT.patches)
    best = scores[0].masked_fill(~places.is_patch, -9e9).argsort(descending=True)
    assert every - newlines == set(best[:k - len(newlines)].tolist())
    assert none - newlines == set(best[:min(k, LAYOUT.patches)].tolist())


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_apportion_is_websters_method(seed, seats, parties):
    """At every length the ranking gives the seats that the divisor method hands out one by one."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 20, (parties,), generator=g).tolist()
    weight = torch.rand(parties, generator=g).double() + 0.05
    group = torch.tensor([p for p, s in enumerate(sizes) for _ in range(s)])
    scores = torch.randn(1, len(group), generator=g)
    seats = min(seats, len(group))
    admitted = apportion(scores, group, weight[None].float())[0].argsort(descending=True)[:seats]
    won = [0] * parties
    for _ in range(seats):
        quotient = [float(weight[p]) / (2 * won[p] + 1) if won[p] < sizes[p] else -1.0 for p in range(parties)]
        won[quotient.index(max(quotient))] += 1
    for p in range(parties):
        mine = [int(i) for i in admitted if group[i] == p]
        assert len(mine) == won[p]
        best = scores[0].masked_fill(group != p, -9e9).argsort(descending=True)[:won[p]]
        assert set(mine) == set(best.tolist())                      # each party sends its best


def test_ranks_and_ties():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert ranks(scores).tolist() == [[3, 0, 1, 2]]
    assert ranks_within(scores, torch.tensor([0, 1, 1, 0])).tolist() == [[1, 0, 1, 0]]
    assert topk_in_order(scores, 2).tolist() == [[1, 2]]


def test_crop_mass_is_the_block_sum_where_nothing_is_padded():
    layout = ImageLayout(tile=(6, 6), grid=(2, 3), rows=(0, 12), columns=(0, 18))
    thumbnail = torch.rand(2, 6, 6)
    mass, shown = crop_mass(thumbnail, layout)
    expected = thumbnail.view(2, 2, 3, 3, 2).sum((2, 4)).flatten(1)
    torch.testing.assert_close(mass, expected)
    assert shown.all() and crop_tokens(layout, thumbnail.device).tolist() == [36.0] * 6


def test_crop_mass_follows_the_padding():
    """The thumbnail has no padding: a crop that shows a sliver owns a sliver of it, and its rate is by area."""
    layout = ImageLayout(tile=(6, 6), grid=(3, 1), rows=(5, 13), columns=(0, 6))       # crops show 1, 6 and 1 rows of 8
    thumbnail = torch.ones(1, 6, 6)
    mass, shown = crop_mass(thumbnail, layout)
    assert shown.all()
    torch.testing.assert_close(mass, torch.full((1, 3), 12.0))                         # even attention, equal rates
    assert crop_tokens(layout, thumbnail.device).tolist() == [6.0, 36.0, 6.0]
    thumbnail = torch.zeros(1, 6, 6)
    thumbnail[:, 0, :] = 1.0                                                           # the top sixth: 8/6 canvas rows
    mass, _ = crop_mass(thumbnail, layout)
    torch.testing.assert_close(mass[0, 0] / mass[0].sum(), torch.tensor(0.75 * 6 / (0.75 * 6 + 0.25)), atol=1e-5, rtol=1e-5)
    padded = ImageLayout(tile=(6, 6), grid=(3, 1), rows=(6, 12), columns=(0, 6))       # outer crops are padding alone
    mass, shown = crop_mass(torch.rand(1, 6, 6), padded)
    assert shown.tolist() == [False, True, False] and mass[0, 0] == mass[0, 2] == 0


def test_spread_keeps_constants_and_the_thumbnail():
    thumbnail = torch.rand(1, 4, 4)
    spread = spread_over_canvas(thumbnail, LAYOUT)
    assert spread.shape == (1, LAYOUT.tokens)
    assert torch.equal(spread[:, :16], thumbnail.flatten(1))
    assert (spread[:, LAYOUT.places().newline] == 0).all()
    level = spread_over_canvas(torch.full((1, 4, 4), 0.7), LAYOUT)[:, LAYOUT.places().is_patch]
    torch.testing.assert_close(level, torch.full_like(level, 0.7))


def test_pooling_partitions():
    assert even_split(7, 3) == [2, 2, 3] and sum(even_split(100, 7)) == 100
    cells = grid_cells(4, 6, [2, 3])
    assert cells == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 3, 3, 4, 4]] * 2
    x = torch.randn(2, 5, 3)
    mean, mass = average_by_slot(x, torch.tensor([0, 1, 0, -1, 1]), 2)
    torch.testing.assert_close(mean[:, 0], (x[:, 0] + x[:, 2]) / 2)
    torch.testing.assert_close(mean[:, 1], (x[:, 1] + x[:, 4]) / 2)
    assert mass.tolist() == [2, 2]


@pytest.mark.parametrize("policy", ["kept", "all", "none"])
def test_a_bad_policy_is_refused(policy):
    from mmcompress.image import ClsTopK
    assert ClsTopK(newlines=policy).newlines == policy
    with pytest.raises(ValueError, match="newlines='some': one of kept, all, none"):
        ClsTopK(newlines="some")
    with pytest.raises(ValueError, match=r"budget of 3 tokens does not exceed the 6 newline tokens"):
        ClsTopK(keep=3, newlines="all").count(LAYOUT)
