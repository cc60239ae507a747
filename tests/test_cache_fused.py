"""The cache on its fused kernels, run by Triton's interpreter: the same logits and choices as on torch."""

import pytest
import torch
from test_cache_dense import NEAR, kept_columns, prompt, tiny_model, turns, words

from mmcompress.cache import H2O, KeyDiff, KNorm, KVMerger, MiKV, MiniCache, RazorAttention, SnapKV, attach, chain
from mmcompress.cache import attention as cache_attention
from mmcompress.ops import kernels, kv_decode, kv_keys, kv_quant, kv_scores

pytest.importorskip("triton")

PLANS = {"snapkv": SnapKV(0.5, recent=4), "h2o": H2O(0.5, every=2), "knorm": KNorm(0.4), "keydiff": KeyDiff(0.4),
         "kvmerger": KVMerger(0.4, mass=True, eps=-1.0),
         "mikv": MiKV(bits=4, high=0.25), "minicache": MiniCache(start=0, bits=4),
         "razor": RazorAttention(0.3, sinks=1, recent=3, retrieval=((0, 1),)),
         "snapkv + mikv": chain([SnapKV(0.6, recent=4), MiKV(bits=2)])}


@pytest.fixture
def fused(monkeypatch):
    """As on a GPU: "auto" takes the kernels. -> what was launched"""
    ran = set()

    def always(kernel, x):
        chosen = kernel != "torch" and kernels.use_triton("triton", x)
        if chosen:
            ran.add(x.shape[-2])
        return chosen

    def switch(on):
        for module in (kv_decode, kv_keys, kv_quant, kv_scores, cache_attention):
            monkeypatch.setattr(module, "use_triton", always if on else kernels.use_triton)
        return ran

    return switch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PLANS)
def test_kernels_and_torch_agree_through_the_cache(name, side, fused):
    """A padded prompt, a second turn, two tokens one by one."""
    (ids, mask), more = prompt((19, 12), side), words(2, 3, 1)
    ones = lambda n: torch.cat([mask, mask.new_ones(2, n)], 1)  # noqa: E731
    calls = [dict(input_ids=ids, attention_mask=mask), dict(input_ids=more, attention_mask=ones(3)),
             *(dict(input_ids=more[:, :1], attention_mask=ones(4 + i)) for i in range(2))]
    made = {}
    for on in (False, True):
        ran, model = fused(on), tiny_model(depth=2)
        with torch.no_grad(), attach(model, PLANS[name]) as attached:
            cache = attached.cache()
            made[on] = turns(model, cache, calls), kept_columns(cache)
        assert bool(ran) is on
    for a, b in zip(made[True][0], made[False][0]):
        torch.testing.assert_close(a, b, **NEAR)
    assert all(torch.equal(kept, made[False][1][layer]) for layer, kept in made[True][1].items())
