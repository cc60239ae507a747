"""Scores of cached keys against their definitions; the Triton twins run by the interpreter where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from kv_ops import BACKENDS, DEVICE, needs_triton, poisoned  # noqa: F401

from mmcompress.ops import kv_scores
from mmcompress.ops.kv_scores import add_column_sums, column_sums, column_sums_reference, row_lse

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}       # sums are float32 from equal inputs


pytestmark = pytest.mark.usefixtures("poisoned")


def heads(n, m=None, b=2, hq=4, hkv=2, d=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + n)
    q = torch.randn(b, hq, n if m is None else m, d, generator=g).to(DEVICE, dtype)
    return q, torch.randn(b, hkv, n, d, generator=g).to(DEVICE, dtype)


def by_sdpa(q, k, seen, weight):
    """Column sums out of torch's own attention: with the unit matrix for values, its output is the attention map."""
    b, hq = q.shape[:2]
    hkv, n = k.shape[1:3]
    eye = torch.eye(n, dtype=torch.float64, device=q.device).expand(b, hq, n, n)
    wide = k.double().repeat_interleave(hq // hkv, 1)
    attention = F.scaled_dot_product_attention(q.double(), wide, eye, attn_mask=seen)                # (B, Hq, M, N)
    return (attention * weight).view(b, hkv, -1, n).sum(2).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 63, 65, 200])
def test_column_sums_are_those_of_attention(n, backend):
    b = 1 if n == 200 else 2                                                        # the interpreter is slow
    q, k = heads(n, b=b)
    causal = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril()
    sums = column_sums(q, k, kernel=backend)
    torch.testing.assert_close(sums, by_sdpa(q, k, causal, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.sum(-1), torch.full((b, 2), 2.0 * n, device=DEVICE), rtol=1e-5, atol=1e-5)  # rows sum to 1
    torch.testing.assert_close(column_sums(q, k, heads="mean", kernel=backend), sums / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("hq, hkv, d", [(3, 3, 16), (6, 2, 24), (4, 1, 40)])
def test_every_dtype_and_grouping(dtype, hq, hkv, d, backend):
    q, k = heads(65, hq=hq, hkv=hkv, d=d, dtype=dtype)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)                              # as projections leave them
    sums, tolerance = column_sums(q, k, kernel=backend), TOLERANCE[dtype]
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, column_sums_reference(q, k), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_equals_each_row_alone(backend):
    q, k = heads(65)
    valid = torch.arange(65, device=DEVICE) >= torch.tensor([[0], [20]], device=DEVICE)
    q[1, :, :20], k[1, :, :20] = 50.0, -7.0                                         # padding may hold anything
    sums = column_sums(q, k, valid=valid, kernel=backend)
    assert (sums[1, :, :20] == 0).all()
    alone = column_sums(q[1:, :, 20:], k[1:, :, 20:], kernel=backend)
    torch.testing.assert_close(sums[1:, :, 20:], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[:1], column_sums(q[:1], k[:1], kernel=backend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_bias_weights_and_a_window_that_stops_early(backend):
    q, k = heads(200, m=65)
    g = torch.Generator().manual_seed(1)
    valid = (torch.rand(2, 2, 200, generator=g) > 0.3).to(DEVICE)
    valid[..., 100:165] = True                                                      # the queries' own columns
    bias, weights = torch.randn(2, 2, 200, generator=g).to(DEVICE), torch.rand(2, 4, 65, generator=g).to(DEVICE)
    seen = torch.arange(200, device=DEVICE) <= 100 + torch.arange(65, device=DEVICE)[:, None]
    mask = bias.double()[:, :, None].masked_fill(~(valid[:, :, None] & seen), -torch.inf).repeat_interleave(2, 1)
    sums = column_sums(q, k, first=100, valid=valid, bias=bias, weights=weights, kernel=backend)
    torch.testing.assert_close(sums, by_sdpa(q, k, mask, weights[..., None]), rtol=1e-5, atol=1e-5)
    assert (sums[..., 165:] == 0).all() and (sums[~valid] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_mass_stands_for_equal_copies(backend):
    q, k = heads(63)
    copies = torch.cat([k[:, :, :1].expand(-1, -1, 3, -1), k], 2)                   # four equal keys instead of one
    bias = torch.zeros(2, 2, 63, device=DEVICE)
    bias[..., 0] = torch.tensor(4.0).log()
    sums, many = column_sums(q, k, bias=bias, kernel=backend), column_sums(q, copies, kernel=backend)
    torch.testing.assert_close(sums[..., 0], many[..., :4].sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[..., 1:], many[..., 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_from_elsewhere_see_every_column(backend):
    q, k = heads(63, m=7)
    valid = torch.arange(63, device=DEVICE).expand(2, -1) % 3 > 0
    mask = valid[:, None, None]
    sums = column_sums(q, k, causal=False, valid=valid, kernel=backend)
    torch.testing.assert_close(sums, by_sdpa(q, k, mask, 1), rtol=1e-5, atol=1e-5)
    nothing = column_sums(q, k, causal=False, valid=torch.zeros_like(valid), kernel=backend)
    assert (nothing == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(1, 64), (32, 1, 32), (65,)])
def test_chunks_add_up_to_the_whole(cuts, backend):
    q, k = heads(65)
    valid = torch.arange(65, device=DEVICE) >= torch.tensor([[0], [35]], device=DEVICE)
    sums, at = None, 0
    for size in cuts:
        stop = at + size
        sums = add_column_sums(sums, q[:, :, at:stop], k[:, :, :stop], valid=valid[:, :stop], heads="mean", kernel=backend)
        at = stop
    torch.testing.assert_close(sums, column_sums_reference(q, k, valid=valid, heads="mean"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_lse_and_sums_from_a_given_one(backend):
    q, k = heads(65, m=33)
    valid = torch.arange(65, device=DEVICE) >= torch.tensor([[0], [40]], device=DEVICE)
    lse = row_lse(q, k, valid=valid, kernel=backend)
    seen = (torch.arange(65, device=DEVICE) <= 32 + torch.arange(33, device=DEVICE)[:, None]) & valid[:, None, None]
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) / 4
    torch.testing.assert_close(lse, logits.masked_fill(~seen, -torch.inf).logsumexp(-1).float(), rtol=1e-5, atol=1e-5)
    assert (lse[1, :, :8] == -torch.inf).all()                                      # padding sees nothing
    again = column_sums(q, k, valid=valid, lse=lse, kernel=backend)
    torch.testing.assert_close(again, column_sums_reference(q, k, valid=valid), rtol=1e-5, atol=1e-5)


@needs_triton
def test_a_window_of_few_queries_is_split_over_its_columns(monkeypatch):
    from mmcompress.ops.triton import kv_scores as fused

    monkeypatch.setattr(fused, "LEAST", 64)
    q, k = heads(200, m=7)
    valid = torch.arange(200, device=DEVICE) >= torch.tensor([[0], [150]], device=DEVICE)            # whole parts see nothing
    split, whole = (column_sums(q, k, valid=valid, kernel=kernel) for kernel in ("triton", "torch"))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


def test_it_compiles_whole():
    q, k = heads(65)
    compiled = torch.compile(column_sums, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, kernel="torch"), column_sums(q, k, kernel="torch"))


def test_the_torch_version_never_holds_the_map(monkeypatch):
    """Peak of one block of rows, counted in elements of every tensor that is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(kv_scores, "ROWS", 16)
    sizes = []
    for n in (256, 512):
        with Largest() as seen:
            column_sums(*heads(n), kernel="torch")
        sizes.append(seen.size)
    assert sizes[1] <= 2 * sizes[0] and sizes[1] <= 8 * 512 * 16                     # no more than q itself


@pytest.mark.parametrize("options, message", [
    (dict(heads="max"), "heads='max'"), (dict(first=5), "first=5 for 9 queries and 9 keys"),
    (dict(valid=torch.ones(2, 5)), r"valid \(2, 5\)"), (dict(weights=torch.ones(2, 3, 9)), r"weights \(2, 3, 9\)"),
    (dict(kernel="cuda"), "kernel='cuda'")])
def test_refusals_give_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        column_sums(*heads(9), **options)
    with pytest.raises(ValueError, match="3 query heads, 2 KV heads"):
        column_sums(torch.ones(1, 3, 4, 8), torch.ones(1, 2, 4, 8))
    with pytest.raises(ValueError, match=r"q torch.float64"):
        column_sums(torch.ones(1, 2, 4, 8).double(), torch.ones(1, 2, 4, 8).double())


def test_missing_triton_names_the_extra(monkeypatch):
    monkeypatch.setattr("mmcompress.ops.kernels.HAS_TRITON", False)
    with pytest.raises(ImportError, match=r"mmcompress\[kernels\]"):
        column_sums(*heads(9), kernel="triton")
