"""Few bits: the published formulas, error bounds, exact bytes, and Triton codes equal to torch's."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kv_ops import BACKENDS, DEVICE, needs_triton, poisoned  # noqa: F401

from mmcompress.ops.kv_quant import balancer, pack, quantize, quantized_bytes, unpack

pytestmark = pytest.mark.usefixtures("poisoned")
GRIDS = (torch.float16, torch.bfloat16, torch.float32)


def slots(n, d=16, dtype=torch.float32, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, 3, d, generator=g) * torch.rand(d, generator=g).mul(3 * spread).exp() + torch.randn(d, generator=g)
    return x.to(DEVICE, dtype).transpose(1, 2)


def mikv_by_loop(x, bits, group):
    """Eq. 1 for one token's group at a time, in float64."""
    out, levels = x.double().clone(), 2 ** bits - 1
    for row in out.view(-1, group):
        low, step = row.min(), (row.max() - row.min()) / levels
        row.copy_(((row - low) / step).round() * step + low)
    return out


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_tokens_follow_equation_1(bits):
    x = slots(7).contiguous()
    got = quantize(x, bits, grid=torch.float32, kernel="torch")
    torch.testing.assert_close(got.dequantize().double(), mikv_by_loop(x, bits, 8), rtol=1e-5, atol=1e-5)
    assert got.shape == (2, 3, 7, 16) and got.scale.shape == (2, 3, 7, 2) and got.group == (1, 8)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_channels_are_tokens_turned(bits):
    x = slots(64)
    got = quantize(x, bits, "channel", 32, grid=torch.float32, kernel="torch")
    turned = mikv_by_loop(x.transpose(2, 3).contiguous(), bits, 32).transpose(2, 3)
    torch.testing.assert_close(got.dequantize().double(), turned, rtol=1e-5, atol=1e-5)
    assert got.scale.shape == (2, 3, 2, 16) and got.group == (32, 1)


@given(st.integers(0, 10_000), st.sampled_from([8, 4, 2]), st.sampled_from(["token", "channel"]), st.sampled_from(GRIDS),
       st.sampled_from([-6.0, 0.0, 2.0]))
@settings(max_examples=30, deadline=None)
def test_errors_stay_within_the_bound(seed, bits, along, grid, spread):
    x = slots(12, seed=seed, spread=spread)
    got = quantize(x, bits, along, 4, grid=grid, kernel="torch")
    scale, tokens, channels = got.scale.float(), *got.group
    grouped = x.reshape(2, 3, 12 // tokens, tokens, 16 // channels, channels)
    low, high = grouped.amin((3, 5)), grouped.amax((3, 5))
    bound = scale / 2 + torch.finfo(grid).eps / 2 * (low.abs() + high - low) + 1e-5
    error = (got.dequantize() - x).abs().reshape(grouped.shape).amax((3, 5))
    assert (error <= bound).all()
    assert (scale <= (high - low) / (2 ** bits - 1) * (1 + torch.finfo(grid).eps) + 1e-7).all()      # the bound is not bought


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_pack_and_unpack_and_the_grid_is_a_fixed_point(bits):
    codes = torch.randint(0, 2 ** bits, (3, 5, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed, per = pack(codes, bits), 8 // bits
    assert packed.shape[-1] == 16 // per and torch.equal(unpack(packed, bits), codes)
    assert int(packed[0, 0, 1]) == sum(int(codes[0, 0, per + p]) << (bits * p) for p in range(per))
    once = quantize(slots(8), bits, grid=torch.float32, kernel="torch").dequantize()
    torch.testing.assert_close(quantize(once, bits, grid=torch.float32, kernel="torch").dequantize(), once)


def test_flat_groups_are_exact_and_huge_values_saturate():
    x = torch.full((1, 1, 4, 8), 0.5)
    got = quantize(x, 2)
    assert torch.equal(got.dequantize(), x) and (got.scale == 0).all()
    x[..., 0] = 1e6
    assert quantize(x, 4).dequantize().isfinite().all()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("along, group", [("token", None), ("token", 4), ("channel", 16)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bytes_are_counted_exactly_and_in_advance(bits, along, group, grid):
    got = quantize(slots(32), bits, along, group, grid=grid)
    held = sum(t.numel() * t.element_size() for t in (got.codes, got.scale, got.zero))
    assert got.nbytes == held == quantized_bytes((2, 3, 32, 16), bits, along, group, grid)


def test_mikv_at_two_bits_with_groups_of_64_holds_an_element_in_two_and_a_half_bits():
    assert quantized_bytes((1, 8, 1000, 128), 2) * 8 == 1000 * 8 * 128 * 2.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_widen_a_channel(backend):
    x = slots(32).clone()
    valid = torch.arange(32, device=DEVICE).expand(2, -1) >= 5
    clean = x.clone()
    x[:, :, :5] = 1000.0
    clean[:, :, :5] = clean[:, :, 5:6]                                              # widens nothing either
    got = quantize(x, 4, "channel", 16, valid=valid, kernel=backend)
    assert torch.equal(got.dequantize()[:, :, 5:], quantize(clean, 4, "channel", 16, kernel=backend).dequantize()[:, :, 5:])
    assert got.dequantize().isfinite().all()


@pytest.mark.parametrize("bits, dtype, grid", [(8, torch.float16, torch.float32), (4, torch.bfloat16, torch.float16),
                                               (2, torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("n, d, along, group", [(1, 16, "token", None), (65, 24, "token", None), (33, 40, "token", 8),
                                                (65, 24, "channel", 13), (64, 16, "channel", 32), (3, 16, "channel", 1)])
@needs_triton
def test_triton_writes_the_same_codes(n, d, along, group, bits, dtype, grid):
    x = slots(n, d, dtype)[:1]
    valid = (torch.rand(1, 3, n, generator=torch.Generator().manual_seed(n)) > 0.2).to(DEVICE)
    for mask in (None, valid):
        one, two = (quantize(x, bits, along, group, valid=mask, grid=grid, kernel=kernel) for kernel in ("torch", "triton"))
        assert torch.equal(one.scale, two.scale) and torch.equal(one.zero, two.zero) and torch.equal(one.codes, two.codes)


@pytest.mark.parametrize("along", ["token", "channel"])
@needs_triton
def test_triton_with_a_grid_in_bfloat16(along):
    """The interpreter cuts float32 to bfloat16 instead of rounding it, so there scales are equal only to one unit."""
    x = slots(32)
    one, two = (quantize(x, 4, along, 8, grid=torch.bfloat16, kernel=kernel) for kernel in ("torch", "triton"))
    torch.testing.assert_close(one.scale, two.scale, rtol=2 ** -7, atol=0)
    torch.testing.assert_close(one.zero, two.zero, rtol=2 ** -7, atol=0)
    spread = (g.float().repeat_interleave(two.group[0], 2).repeat_interleave(two.group[1], 3) for g in (two.scale, two.zero))
    scale, zero = spread
    codes = ((x - zero) / scale + 0.5).floor().clamp(0, 15).to(torch.uint8)
    assert torch.equal(unpack(two.codes, 4), codes)


def test_the_balancer_follows_equation_2_and_helps_uneven_channels():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 40, 16, generator=g), torch.randn(2, 2, 50, 16, generator=g)
    k[..., 3] *= 30                                                                 # an outlier channel, as in Qwen's keys
    b = balancer(q, k)
    assert b.shape == (2, 2, 1, 16)
    for row in range(2):
        for head in range(2):
            most_q = q[row, 2 * head:2 * head + 2].abs().amax((0, 1))
            torch.testing.assert_close(b[row, head, 0], (most_q / k[row, head].abs().amax(0)).sqrt())
    wide, logits = k.repeat_interleave(2, 1), q @ k.repeat_interleave(2, 1).transpose(2, 3)
    plain = quantize(wide, 2).dequantize()
    balance = b.repeat_interleave(2, 1)
    balanced = quantize(wide * balance, 2).dequantize()
    torch.testing.assert_close((q / balance) @ (wide * balance).transpose(2, 3), logits, rtol=1e-4, atol=1e-3)
    error = [(x - logits).square().mean() for x in (q @ plain.transpose(2, 3), (q / balance) @ balanced.transpose(2, 3))]
    assert error[1] < error[0]


def test_the_balancer_reads_no_padding_and_no_empty_channel():
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 2, 10, 8, generator=g), torch.randn(1, 1, 30, 8, generator=g)
    valid = torch.arange(30)[None] >= 24
    expected = balancer(q[:, :, -6:], k[:, :, -6:])
    q[:, :, :4], k[:, :, :24] = 99, -99
    torch.testing.assert_close(balancer(q, k, valid), expected)
    q[..., 2] = 0
    assert float(balancer(q, k)[0, 0, 0, 2]) == 1


@pytest.mark.parametrize("options, message", [
    (dict(bits=3), "bits=3"), (dict(bits=4, along="row"), "along='row'"), (dict(bits=4, group=5), "group=5: must divide 16"),
    (dict(bits=2, group=2), "4 channels share a byte"), (dict(bits=4, along="channel"), "group=32: must divide 9, the tokens"),
    (dict(bits=4, grid=torch.int8), "grid=torch.int8")])
def test_refusals_give_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        quantize(slots(9), **options)
