"""Decode attention over ragged slots and tiers, against torch's own attention and a softmax over everything at once."""

import pytest
import torch
import torch.nn.functional as F
from kv_ops import BACKENDS, DEVICE, poisoned  # noqa: F401

from mmcompress.ops import kv_decode
from mmcompress.ops.kv_decode import Slots, decode_attention, decode_attention_reference, merge_by_lse
from mmcompress.ops.kv_quant import balancer, quantize

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def split(monkeypatch):
    """Small runs, so that slots are split."""
    monkeypatch.setattr(kv_decode, "BLOCK", 64)
    if "triton" in BACKENDS:
        from mmcompress.ops.triton import kv_decode as fused

        monkeypatch.setattr(fused, "LEAST", 64)


def cache(n, b=2, hq=4, hkv=2, d=16, dv=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(b, h, s, w, generator=g).to(DEVICE, dtype) for h, s, w in ((hq, 1, d), (hkv, n, d), (hkv, n, dv)))
    return q, k, v


def by_sdpa(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v, mask = (x.double().repeat_interleave(group, 1) for x in (k, v, mask))
    return F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask[:, :, None]).to(q.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, hq, hkv, d, dv, dtype", [
    (1, 4, 2, 16, 16, torch.float32), (63, 3, 3, 24, 40, torch.bfloat16), (65, 6, 1, 16, 16, torch.float16),
    (65, 20, 1, 16, 16, torch.float32), (200, 4, 2, 40, 16, torch.float32), (200, 4, 2, 16, 40, torch.bfloat16)], ids=str)
def test_it_is_attention(n, hq, hkv, d, dv, dtype, backend):
    q, k, v = cache(n, 2, hq, hkv, d, dv, dtype)
    out, lse = decode_attention(q, Slots(k, v), kernel=backend)
    assert out.dtype == dtype and out.shape == (2, hq, 1, dv) and lse.shape == (2, hq, 1)
    torch.testing.assert_close(out, by_sdpa(q, k, v, torch.zeros(2, hkv, n, device=DEVICE)), rtol=TOLERANCE[dtype],
                               atol=TOLERANCE[dtype])
    logits = q.double() @ k.double().repeat_interleave(hq // hkv, 1).transpose(2, 3) / d ** 0.5
    torch.testing.assert_close(lse, logits.logsumexp(-1).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_slots_with_bias_where_missing_ones_hold_nan(backend):
    q, k, v = cache(200)
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[200, 65], [1, 130]], device=DEVICE)
    valid = (torch.rand(2, 2, 200, generator=g) > 0.3).to(DEVICE)
    valid[..., 0] = True
    bias = torch.randn(2, 2, 200, generator=g).to(DEVICE)
    bias[..., 7] = -torch.inf
    seen = valid & (torch.arange(200, device=DEVICE) < lengths[..., None]) & (bias > -torch.inf)
    expected = by_sdpa(q, k, v, bias.masked_fill(~seen, -torch.inf))
    k[~seen], v[~seen] = torch.nan, torch.nan
    out, lse = decode_attention(q, Slots(k, v, lengths, valid, bias), kernel=backend)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    reference = decode_attention_reference(q, Slots(k, v, lengths, valid, bias))
    torch.testing.assert_close((out, lse), reference, rtol=1e-5, atol=1e-5)
    only = decode_attention(q, Slots(k[..., :1, :], v[..., :1, :], bias=bias[..., :1]), kernel=backend)[0]
    torch.testing.assert_close(out[1, :2], only[1, :2], rtol=1e-5, atol=1e-5)       # length 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_is_a_mask_of_two_axes_and_nothing_seen_gives_nothing(backend):
    q, k, v = cache(65)
    valid = torch.arange(65, device=DEVICE) >= torch.tensor([[65], [20]], device=DEVICE)
    out, lse = decode_attention(q, Slots(k, v, valid=valid), kernel=backend)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    alone = decode_attention(q[1:], Slots(k[1:, :, 20:], v[1:, :, 20:]), kernel=backend)
    torch.testing.assert_close((out[1:], lse[1:]), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_mass_stands_for_equal_copies(backend):
    q, k, v = cache(63)
    bias = torch.zeros(2, 2, 63, device=DEVICE)
    bias[..., 5] = torch.tensor(9.0).log()
    many = [torch.cat([x, x[:, :, 5:6].expand(-1, -1, 8, -1)], 2) for x in (k, v)]
    one, copies = decode_attention(q, Slots(k, v, bias=bias), kernel=backend), decode_attention(q, Slots(*many), kernel=backend)
    torch.testing.assert_close(one, copies, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiers_are_one_cache_cut_anywhere(backend):
    q, k, v = cache(200)
    bias = torch.randn(2, 2, 200, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    whole = decode_attention(q, Slots(k, v, bias=bias), kernel=backend)
    cuts = [(0, 1), (1, 66), (66, 200)]
    tiers = [Slots(k[:, :, a:z], v[:, :, a:z], bias=bias[..., a:z]) for a, z in cuts]
    torch.testing.assert_close(decode_attention(q, *tiers, kernel=backend), whole, rtol=1e-5, atol=1e-5)
    nothing = Slots(k, v, lengths=torch.zeros(2, 2, dtype=torch.int32, device=DEVICE))
    torch.testing.assert_close(decode_attention(q, nothing, *tiers, kernel=backend), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits, dtype", [(8, torch.float16), (4, torch.float32), (4, torch.bfloat16), (2, torch.float32)],
                         ids=str)
def test_few_bits_beside_exact_slots(bits, dtype, backend):
    q, k, v = cache(130, d=24, dv=16, dtype=dtype)
    lengths = torch.tensor([[30, 17], [1, 30]], device=DEVICE)
    valid = torch.ones(2, 2, 100, dtype=torch.bool, device=DEVICE)
    valid[1, 0, 40:70] = False
    old_k, old_v = k[:, :, :100], v[:, :, :100]
    b = balancer(q, old_k)
    mikv = Slots(quantize(old_k * b, bits), quantize(old_v, bits), valid=valid, balance=b)
    kivi = Slots(quantize(old_k, bits, "channel", 20), quantize(old_v, bits, group=8), valid=valid)
    exact = Slots(k[:, :, 100:], v[:, :, 100:], lengths)
    filled = Slots(quantize(old_k, bits, "channel", 4), quantize(old_v, bits), valid=valid)          # groups that fill a tile
    for old in (mikv, kivi, filled):
        got, reference = decode_attention(q, old, exact, kernel=backend), decode_attention_reference(q, old, exact)
        torch.testing.assert_close(got[0], reference[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(got[1], reference[1], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_bits_come_closer_to_the_exact_cache_one_by_one():
    q, k, v = cache(200)
    exact = decode_attention(q, Slots(k, v))[0]
    errors = [(decode_attention(q, Slots(quantize(k, bits), quantize(v, bits)))[0] - exact).abs().max() for bits in (2, 4, 8)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[2] < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_slots_in_few_bits_may_hold_nan(backend):
    q, k, v = cache(64)
    lengths = torch.tensor([[32, 64], [0, 32]], device=DEVICE)
    low = Slots(quantize(k, 4), quantize(v, 4), lengths)
    expected = decode_attention(q, low, kernel=backend)
    for x in (low.k, low.v):
        for scale in (x.scale, x.zero):
            scale[torch.arange(64, device=DEVICE) >= lengths[..., None]] = torch.nan
    torch.testing.assert_close(decode_attention(q, low, kernel=backend), expected)
    assert not expected[0].isnan().any()


def test_it_compiles_whole():
    q, k, v = cache(130)
    low = Slots(quantize(k, 4), quantize(v, 4), valid=torch.ones(2, 130, dtype=torch.bool, device=DEVICE))
    compiled = torch.compile(decode_attention, fullgraph=True, backend="eager")
    tiers = low, Slots(k, v)
    torch.testing.assert_close(compiled(q, *tiers, kernel="torch"), decode_attention(q, *tiers, kernel="torch"))


def test_merging_parts_by_definition():
    logits, values = torch.randn(3, 5, 7), torch.randn(3, 5, 7, 4)
    logits[1] = -torch.inf
    outs = torch.stack([torch.nan_to_num(part.softmax(-1))[:, None] @ value for part, value in zip(logits, values)])[:, :, 0]
    out, lse = merge_by_lse(outs, logits.logsumexp(-1))
    every = logits.transpose(0, 1).flatten(1)
    torch.testing.assert_close(lse, every.logsumexp(-1))
    torch.testing.assert_close(out, (every.softmax(-1)[:, None] @ values.transpose(0, 1).flatten(1, 2))[:, 0])


def test_refusals_give_the_value():
    q, k, v = cache(9)
    for call, message in ((lambda: decode_attention(q), "no tier"),
                          (lambda: decode_attention(k, Slots(k, v)), r"q \(2, 2, 9, 16\)"),
                          (lambda: decode_attention(q, Slots(k, v[:, :, :5])), r"v \(2, 2, 5, 16\)"),
                          (lambda: decode_attention(q, Slots(k, v, valid=torch.ones(2, 4))), r"valid \(2, 4\)"),
                          (lambda: decode_attention(q[:, :3], Slots(k, v)), "Hkv a divisor of Hq")):
        with pytest.raises(ValueError, match=message):
            call()
