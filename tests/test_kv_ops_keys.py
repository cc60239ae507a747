"""Scores of keys alone and pooling against loops that follow their definition."""

import pytest
import torch
from kv_ops import BACKENDS, DEVICE, poisoned  # noqa: F401

from mmcompress.ops.kv_keys import key_diversity, key_diversity_reference, key_norm, pool_scores

pytestmark = pytest.mark.usefixtures("poisoned")


def keys(n, d=24, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    k = torch.randn(2, n, 3, d, generator=g).to(DEVICE, dtype).transpose(1, 2)                     # strided, as projections
    return k, (torch.rand(2, n, generator=g) > 0.3).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, dtype", [(1, torch.float32), (63, torch.bfloat16), (65, torch.float16), (65, torch.float32),
                                      (200, torch.bfloat16)], ids=str)
def test_norm_and_diversity_of_valid_keys(n, dtype, backend):
    k, valid = keys(n, dtype=dtype)
    valid[:, 0] = True
    norm, diversity = key_norm(k, valid, kernel=backend), key_diversity(k, valid, kernel=backend)
    for b in range(2):
        for h in range(3):
            own = k[b, h].double()
            length = own.square().sum(-1).sqrt()
            mean = (own / length[:, None])[valid[b]].mean(0)
            cosine = (own @ mean) / (length * mean.square().sum().sqrt())
            expected = torch.where(valid[b], -length, -torch.inf), torch.where(valid[b], -cosine, -torch.inf)
            torch.testing.assert_close(norm[b, h], expected[0].float(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(diversity[b, h], expected[1].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(key_diversity_reference(k, valid), diversity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(key_norm(k, kernel=backend), -k.float().norm(dim=-1))
    torch.testing.assert_close(key_diversity(k, kernel=backend), key_diversity_reference(k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_of_any_content_changes_nothing(backend):
    k, _ = keys(65)
    valid = torch.arange(65, device=DEVICE).expand(2, -1) >= 9
    k[:, :, :9] = 0                                                                 # zero keys have no direction
    for score in (key_norm, key_diversity):
        got = score(k, valid, kernel=backend)
        assert (got[..., :9] == -torch.inf).all()
        torch.testing.assert_close(got[..., 9:], score(k[:, :, 9:], kernel=backend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("size", [1, 5, 7])
@pytest.mark.parametrize("n", [1, 63, 65])
def test_pooling_by_its_definition(n, size, kind):
    g = torch.Generator().manual_seed(n)
    scores, half = torch.rand(2, 2, n, generator=g) - 0.5, size // 2
    valid = torch.rand(2, 2, n, generator=g) > 0.3
    pooled, free = pool_scores(scores, size, kind, valid), pool_scores(scores, size, kind)
    for b in range(2):
        for h in range(2):
            for j in range(n):
                near = range(max(0, j - half), min(n, j + half + 1))
                window = [float(scores[b, h, i]) for i in near]
                inside = [float(scores[b, h, i]) for i in near if valid[b, h, i]]
                reduce = max if kind == "max" else lambda x: sum(x) / size
                assert float(free[b, h, j]) == pytest.approx(reduce(window), abs=1e-6)
                expected = reduce(inside) if valid[b, h, j] else -float("inf")
                assert float(pooled[b, h, j]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_a_padded_row_pools_as_the_row_alone(kind):
    scores = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(40)[None] >= 11
    torch.testing.assert_close(pool_scores(scores, 7, kind, valid)[..., 11:], pool_scores(scores[..., 11:], 7, kind))


def test_refusals_give_the_value():
    for options, message in ((dict(kernel_size=4), "kernel_size=4"), (dict(kind="sum"), "kind='sum'")):
        with pytest.raises(ValueError, match=message):
            pool_scores(torch.zeros(1, 1, 8), **options)
    with pytest.raises(ValueError, match=r"k \(2, 3\)"):
        key_norm(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"valid \(2, 8\)"):
        key_norm(torch.zeros(1, 2, 9, 4), torch.ones(2, 8))
