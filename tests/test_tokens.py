"""Layouts against transformers' own packing; budgets and reductions by property."""

import hypothesis.strategies as st
import pytest
import torch
from conftest import METHODS
from hypothesis import given, settings
from tiny import SIDE, llava_next
from transformers.models.llava_next.modeling_llava_next import unpad_image

from mmcompress import ImageLayout, SignalError, Tokens
from mmcompress.adapters import adapter_for
from mmcompress.budget import check_keep, keep_count
from mmcompress.registry import reducer_class
from mmcompress.tokens import LayerState

MODEL = llava_next()
ADAPTER = adapter_for(MODEL)
REAL = llava_next(side=336, patch=14, pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])  # as released
sizes = st.tuples(st.integers(40, 1400), st.integers(40, 1400))
keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 400))


def tokens_of(layout, batch=2, dim=8, cls=True, seed=0):
    """Random tokens of a layout, with two captured layers of two heads."""
    g = torch.Generator().manual_seed(seed)
    def state():
        return LayerState(torch.randn(batch, layout.tiles, 2, 4, generator=g),
                          torch.randn(batch, layout.tiles, layout.thumbnail_tokens + cls, 2, 4, generator=g))
    return Tokens(torch.randn(batch, layout.tokens, dim, generator=g), layout, {-1: state(), -2: state()},
                  torch.randn(batch, 5, dim, generator=g), torch.ones(batch, 5, dtype=torch.bool))


@given(sizes, st.booleans())
@settings(max_examples=200, deadline=None)
def test_layout_is_transformers_packing(size, real):
    """Feed numbered patches through the stock packing: every token must be where the layout says."""
    model = REAL if real else MODEL
    layout = adapter_for(model).layout(*size)
    patches = torch.arange(layout.tiles * layout.thumbnail_tokens, dtype=torch.float32)
    packed, lengths = model.pack_image_features([patches.view(layout.tiles, -1, 1)], torch.tensor([size]), "default",
                                                image_newline=torch.tensor([-1.0]))
    assert int(lengths[0]) == layout.tokens == len(packed[0])
    places = layout.places()
    expected = torch.where(places.is_patch, places.patch.float(), -1.0)
    assert torch.equal(packed[0][:, 0], expected)
    assert torch.equal(places.newline, (packed[0][:, 0] < 0).nonzero()[:, 0])
    assert layout.patches == int(places.is_patch.sum()) and layout.newline_tokens == len(places.newline)
    # each row is closed by its own newline: the next one in the sequence
    for number in range(0, layout.newline_tokens, 5):
        at = int(places.newline[number])
        row = packed[0][at - layout.size[1]:at, 0]
        assert (row >= 0).all() and (places.line[at - layout.size[1]:at + 1] == number).all()


@given(sizes)
@settings(max_examples=100, deadline=None)
def test_layout_of_the_real_shape_is_what_the_processor_counts(pico_processor, size):
    layout = adapter_for_pico().layout(*size)
    assert pico_processor._get_num_multimodal_tokens([size])["num_image_tokens"] == [layout.tokens]
    rows = torch.arange(layout.canvas[0] * layout.canvas[1]).view(1, *layout.canvas)
    assert tuple(unpad_image(rows, size).shape[1:]) == layout.size


_PICO = []


def adapter_for_pico():
    if not _PICO:
        import mmcompress
        _PICO.append(adapter_for(mmcompress.pico.load()[0]))
    return _PICO[0]


@pytest.fixture(scope="session")
def pico_processor(pico):
    return pico[1]


def test_a_single_tile_has_one_newline_or_none():
    patches = torch.arange(36.0).view(1, 36, 1)
    packed, _ = MODEL.pack_image_features([patches], torch.tensor([[24, 24]]), "default", image_newline=torch.tensor([-1.0]))
    alone = ImageLayout(tile=(6, 6), newlines=True)
    assert alone.tokens == len(packed[0]) == 37 and alone.tiles == 1
    assert torch.equal(torch.where(alone.places().is_patch, alone.places().patch, -1).float(), packed[0][:, 0])
    assert ImageLayout(tile=(6, 6)).tokens == 36


def test_keep():
    assert keep_count(744, 0.25) == 186 and keep_count(744, 100) == 100 and keep_count(10, 400) == 10
    assert keep_count(10, 0.01) == 1 and keep_count(3, 1.0) == 3 and keep_count(10, 0.3) == 3   # 10 * .3 = 3.0000000000000004
    assert keep_count(10, 0.7) == 7                                                             # 10 * .7 = 7.000000000000001
    for bad in (0, -1, 0.0, 1.5, -0.1, True, "0.5", float("nan")):
        with pytest.raises(ValueError, match=r"keep="):
            check_keep(bad)
    with pytest.raises(ValueError, match=r"keep=1.5: a ratio lies in \(0, 1\]; pass an int for a token budget"):
        check_keep(1.5)


@given(sizes, keeps, st.sampled_from(METHODS), st.integers(0, 1000))
@settings(max_examples=250, deadline=None)
def test_every_budget_is_exact(size, keep, name, seed):
    layout = ADAPTER.layout(*size)
    reducer = reducer_class("image", name)(keep=keep)
    x = tokens_of(layout, seed=seed)
    out = reducer(x)
    k, n = reducer.count(layout), layout.tokens
    assert k == (min(n, keep) if isinstance(keep, int) else max(1, int(n * keep + 1e-9)))
    assert out.tokens.shape == (2, k, 8) and out.index.shape == (2, k) and out.source.shape == (2, n)
    assert out.valid is None and torch.isfinite(out.tokens).all()
    assert (out.index.diff(dim=1) > 0).all() and out.index.min() >= 0 and out.index.max() < n      # ascending, no repeats
    slots = torch.arange(k).expand(2, k)
    assert torch.equal(out.source.gather(1, out.index), slots)                  # an output stands for where it came from
    assert out.source.min() >= -1 and out.source.max() < k
    counts = torch.zeros(2, k + 1).scatter_add(1, out.source + 1, torch.ones(2, n))[:, 1:]
    assert torch.equal(counts, torch.ones(2, k) if out.mass is None else out.mass)
    if out.mass is None:                                                        # a selection copies, to the bit
        assert torch.equal(out.tokens, x.features.gather(1, out.index[..., None].expand(-1, -1, 8)))
    alone = reducer(Tokens(x.features[1:], layout,
                           {k: LayerState(v.query[1:], v.keys[1:]) for k, v in x.vision.items()},
                           x.question[1:], x.question_mask[1:]))
    assert torch.equal(alone.index[0], out.index[1])


def test_merged_tokens_are_the_means_of_their_sources(method):
    layout = ADAPTER.layout(300, 200)
    x = tokens_of(layout)
    out = reducer_class("image", method)(keep=0.3)(x)
    if out.mass is None:
        return
    for b in range(2):
        for slot in range(0, out.tokens.shape[1], 7):
            members = x.features[b][out.source[b] == slot]
            assert len(members) == out.mass[b, slot]
            torch.testing.assert_close(out.tokens[b, slot], members.mean(0))


def test_cls_row_is_the_towers_own_attention():
    """Hooked q and k under SDPA give the [CLS] row that eager attention reports, layer by layer."""
    model = llava_next(attn_implementation="eager")
    pixels = torch.randn(5, 3, SIDE, SIDE)
    size = torch.tensor([[48, 48]])
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    layout = ADAPTER.layout(48, 48)
    encoded = adapter_for(model).encode({"pixel_values": pixels[None], "image_sizes": size}, (-1, -2, 0))
    x = Tokens(encoded.features[0][None], layout, encoded.state([layout], [0]))
    for layer in (-1, -2, 0):
        row = maps[layer][:, :, 0, 1:].mean(1).flatten()                                             # (tiles * patches,)
        expected = torch.where(layout.places().is_patch, row[layout.places().patch], 0.0)
        torch.testing.assert_close(x.cls_attention(layer)[0], expected, atol=1e-7, rtol=1e-5)
    assert not any(m._forward_hooks for name, m in model.named_modules() if name.endswith("_proj"))


def test_asking_for_what_is_not_there():
    layout = ADAPTER.layout(48, 48)
    x = tokens_of(layout, cls=False)
    with pytest.raises(SignalError, match=r"no \[CLS\] token.*scores='cosine'"):
        x.cls_attention()
    with pytest.raises(SignalError, match=r"layer 3 was not captured.*captures"):
        x.cls_attention(3)


def test_places_outlive_inference_mode():
    layout = ADAPTER.layout(77, 133)
    with torch.inference_mode():
        layout.places()
    features = torch.randn(1, layout.tokens, 4, requires_grad=True)
    features.index_select(1, layout.places().patch % layout.tokens).sum().backward()
    assert features.grad is not None
