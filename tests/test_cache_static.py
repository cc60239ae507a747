"""The static form of a compressed cache: it decodes as the dynamic form does, in one graph; and FlashAttention as a base."""

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from test_cache_dense import NEAR, Given, prompt, tiny_model, turns, words
from tiny import IMAGE, llava, make_inputs
from transformers import AttentionInterface, CompileConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmcompress import UnsupportedModelError
from mmcompress.cache import H2O, CompressedCache, KVMerger, MiKV, RazorAttention, SnapKV, StreamingLLM, attach
from mmcompress.cache.filling import FillingCache, StaticCompressedCache, freeze
from mmcompress.cache.view import Sight

PLANS = {"snapkv": SnapKV(0.4, recent=3), "heads unlike": RazorAttention(0.4, sinks=2, recent=3, retrieval=((0, 1), (2, 0))),
         "merged": KVMerger(0.5), "tiers": MiKV(), "rounded": MiKV(bits=4, high_bits=8), "whole": H2O(1.0)}
ROOM = 12


class Graphs:
    """A backend that runs graphs as they are, and counts them. Copies, as generation configs make, count together."""

    def __init__(self):
        self.made = []
        torch._dynamo.reset()

    def __call__(self, graph, inputs):
        self.made.append(graph)
        return graph.forward

    def __deepcopy__(self, memo):
        return self

    @property
    def count(self):
        return len(self.made)


@pytest.fixture(autouse=True)
def quiet():
    """Without it pytest records thousands of lines that dynamo traces, and prints them with a failure."""
    logger = logging.getLogger("torch")
    before, logger.propagate = logger.propagate, False
    yield
    logger.propagate = before


def filled(model, attached, ids, mask):
    cache = attached.cache()
    turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
    return cache


@torch.no_grad()
def steps(model, forward, cache, mask, n, static, first=0):
    """Logits of n tokens, one at a time, with positions as generate counts them."""
    out = []
    for i in range(first, first + n):
        longer = torch.cat([mask, mask.new_ones(len(mask), i + 1)], 1)
        given = dict(position_ids=(longer.sum(1) - 1)[:, None], past_key_values=cache)
        out.append(forward(words(len(mask), 1, i), **given, **({} if static else dict(attention_mask=longer))).logits)
    return out


def equal(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# decoding -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "family", "attention"), [(name, "llama", "sdpa") for name in PLANS] + [
    ("heads unlike", "gemma3", "sdpa"), ("tiers", "gemma3", "sdpa"), ("snapkv", "gemma3", "eager"), ("tiers", "llama", "eager"),
    ("heads unlike", "qwen2", "eager"), ("merged", "llama", "eager")])
def test_decoding_equals_the_dynamic_form_in_one_graph(name, family, attention):
    """Padded rows, grouped queries, eight steps: beyond gemma3's window of nine, once compiled, nothing again."""
    model, graphs = tiny_model(family, attention), Graphs()
    ids, mask = prompt((24, 15))
    with attach(model, PLANS[name]) as attached:
        cache = filled(model, attached, ids, mask)
        eager, compiled = cache_of(cache), cache_of(cache)
        run = torch.compile(model.forward, fullgraph=True, backend=graphs)
        want = steps(model, model, cache, mask, 8, static=False)
        equal(steps(model, model, eager, mask, 8, static=True), want)
        equal(steps(model, run, compiled, mask, 8, static=True), want)
    assert graphs.count == 1 and compiled.left == ROOM - 8 and int(compiled.get_seq_length()) == 32
    if name != "whole":
        whole = tiny_model(family, attention)
        with attach(whole, H2O(1.0)) as attached:
            other = steps(whole, whole, filled(whole, attached, ids, mask), mask, 8, static=False)
        assert (want[0] - other[0]).abs().max() > 1e-3      # something was lost that the static form has lost too


def cache_of(cache, room=ROOM):
    static = freeze(cache, room)
    assert static.is_compileable and isinstance(static, StaticCompressedCache) and not isinstance(static, CompressedCache)
    return static


def test_stock_static_cache_is_one_graph_too():
    """What the tests above stand on: if transformers' own cache did not compile, they would say nothing about ours."""
    model, graphs = tiny_model(), Graphs()
    cache = StaticCache(config=model.config, max_cache_len=40)
    run = torch.compile(model.forward, fullgraph=True, backend=graphs)
    turns(model, cache, [dict(input_ids=words(2, 24))])
    steps(model, run, cache, torch.ones(2, 24, dtype=torch.long), 8, static=True)
    assert graphs.count == 1


@pytest.mark.parametrize("name", ["heads unlike", "tiers"])
def test_a_backend_that_makes_mutation_functional_takes_it(name):
    """aot_eager rewrites writes into buffers as inductor does."""
    model = tiny_model()
    ids, mask = prompt((24, 15))
    torch._dynamo.reset()
    with attach(model, PLANS[name]) as attached:
        cache = filled(model, attached, ids, mask)
        static = cache_of(cache)
        run = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        equal(steps(model, run, static, mask, 3, static=True), steps(model, model, cache, mask, 3, static=False))


def test_prompts_of_any_length_share_a_graph_where_the_budget_is_a_number():
    model, graphs = tiny_model(), Graphs()
    with attach(model, SnapKV(8, recent=3)) as attached:
        run = torch.compile(model.forward, fullgraph=True, backend=graphs)
        for lengths in ((24, 15), (31, 18), (12, 12)):
            ids, mask = prompt(lengths)
            cache = filled(model, attached, ids, mask)
            static = cache_of(cache)
            equal(steps(model, run, static, mask, 3, static=True), steps(model, model, cache, mask, 3, static=False))
    assert graphs.count == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ["snapkv", "heads unlike", "merged", "tiers", "whole"])
def test_a_second_turn_and_going_back(name, family):
    """Several tokens at once are causal among themselves; reset leaves what the prompt left."""
    model = tiny_model(family)
    ids, mask = prompt((24, 15))
    more, longer = words(2, 5, 3), torch.cat([mask, mask.new_ones(2, 5)], 1)
    positions = (longer.cumsum(1) - 1)[:, -5:]
    with attach(model, PLANS[name]) as attached:
        cache = filled(model, attached, ids, mask)
        static = cache_of(cache)
        for again in range(2):
            got = turns(model, static, [dict(input_ids=more, position_ids=positions)])
            got += steps(model, model, static, longer, 2, static=True)
            if not again:
                want = turns(model, cache, [dict(input_ids=more, position_ids=positions, attention_mask=longer)])
                want += steps(model, model, cache, longer, 2, static=False)
            equal(got, want)
            static.reset()
            assert static.left == ROOM and int(static.get_seq_length()) == 24


def test_a_cache_that_has_decoded_already():
    model = tiny_model()
    ids, mask = prompt((24, 15))
    with attach(model, MiKV()) as attached:
        cache = filled(model, attached, ids, mask)
        steps(model, model, cache, mask, 3, static=False)
        static = cache_of(cache)
        equal(steps(model, model, static, mask, 3, static=True, first=3),
              steps(model, model, cache, mask, 3, static=False, first=3))


# rows, memory ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PLANS)
def test_rows_are_reordered_in_place(name):
    model = tiny_model("gemma3")
    ids, mask = prompt((24, 15))
    order = torch.tensor([1, 0])
    with attach(model, PLANS[name]) as attached:
        cache = filled(model, attached, ids, mask)
        static = cache_of(cache)
        steps(model, model, cache, mask, 2, static=False), steps(model, model, static, mask, 2, static=True)
        before = [x.data_ptr() for layer in static.layers for x in layer.tensors()]
        cache.reorder_cache(order)
        static.reorder_cache(order)
        assert before == [x.data_ptr() for layer in static.layers for x in layer.tensors()]
        equal(steps(model, model, static, mask[order], 2, static=True, first=2),
              steps(model, model, cache, mask[order], 2, static=False, first=2))


def test_memory_that_layers_share_stays_shared():
    """As MiniCache's layers do; reordered once, not once a layer."""
    model = tiny_model()
    ids, mask = prompt((24, 15))
    order = torch.tensor([1, 0])
    with attach(model, MiKV()) as attached:
        cache = filled(model, attached, ids, mask)
        alone = freeze(cache, ROOM).nbytes
        low = cache.layers[0].parts[0]
        cache.layers[1].parts = (low, cache.layers[1].parts[1])
        static = cache_of(cache)
        assert static.nbytes == alone - low.nbytes
        cache.reorder_cache(order)
        static.reorder_cache(order)
        equal(steps(model, model, static, mask[order], 2, static=True),
              steps(model, model, cache, mask[order], 2, static=False))


def test_bytes_and_lengths_count_the_room():
    model = tiny_model()
    with attach(model, SnapKV(8, recent=3)) as attached:
        cache = filled(model, attached, *prompt((24, 24)))
        static = cache_of(cache)
    assert static.lengths == [8 + ROOM] * 3 == [layer.get_max_length() for layer in static.layers]
    slots = 3 * 2 * 2 * (8 + ROOM)                          # layers, rows, heads
    assert static.nbytes == slots * (2 * 8 * 4 + 4 + 1) + 3 * 2 * 8     # keys, values, column, valid; two lengths a layer
    assert cache.nbytes > 0 and not cache.layers[0].whole


def test_memory_is_taken_over():
    model = tiny_model("gemma3")
    ids, mask = prompt((24, 15))
    with attach(model, MiKV()) as attached:
        cache, other = filled(model, attached, ids, mask), filled(model, attached, ids, mask)
        codes = cache.layers[1].parts[0].keys.codes.codes.data_ptr()
        static = freeze(cache, ROOM, take=True)
        assert static.layers[1].parts[0].keys.codes.codes.data_ptr() == codes
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        equal(steps(model, model, static, mask, 2, static=True), steps(model, model, other, mask, 2, static=False))
        gc.collect()
        gc.disable()
        try:
            gone = weakref.ref(static.layers[1].parts[1].keys)
            del static
            assert gone() is None                           # no cycle holds the buffers
        finally:
            gc.enable()


# errors ---------------------------------------------------------------------------------------------------------------
def test_no_room_is_an_error():
    model = tiny_model()
    ids, mask = prompt((24, 15))
    torch._dynamo.reset()
    with attach(model, SnapKV(8, recent=3)) as attached:
        cache = filled(model, attached, ids, mask)
        with pytest.raises(ValueError, match="room=0"):
            freeze(cache, 0)
        for forward, error in ((model, ValueError), (torch.compile(model.forward, fullgraph=True, backend="aot_eager"),
                                                     RuntimeError)):
            static = cache_of(cache, 2)
            steps(model, forward, static, mask, 2, static=True)
            with pytest.raises(error, match=r"room for 2 tokens .* static\(room\)"):
                steps(model, forward, static, mask, 1, static=True)
        with pytest.raises(ValueError, match="3 more after 0"):
            turns(model, cache_of(cache, 2), [dict(input_ids=words(2, 3))])


def test_what_the_static_form_cannot_do_is_refused():
    model = tiny_model()
    ids, mask = prompt((24, 15))
    with attach(model, StreamingLLM(8, sinks=2, every=4)) as attached:
        with pytest.raises(ValueError, match="every=4"):
            freeze(filled(model, attached, ids, mask), ROOM)
        with pytest.raises(ValueError, match="every=4"):
            model.generate(ids, attention_mask=mask, max_new_tokens=4, cache_implementation="static")
    with attach(model, StreamingLLM(8, sinks=2, again=True)) as attached:
        with pytest.raises(ValueError, match="empty"):
            freeze(attached.cache(), ROOM)
        static = freeze(filled(model, attached, ids, mask), ROOM)
        steps(model, model, static, mask, 1, static=True)
        with pytest.raises(ValueError, match="again=True"):
            turns(model, static, [dict(input_ids=words(2, 3))])
        with pytest.raises(ValueError, match="cache_implementation='offloaded'"):
            model.generate(ids, max_new_tokens=4, cache_implementation="offloaded")
    with pytest.raises(UnsupportedModelError, match="stay attached"):
        steps(model, model, static, mask, 1, static=True)


def test_padding_of_whole_layers_has_to_be_known():
    """The mask of the last call is noted; one of other rows, or of four axes, does not say it."""
    model = tiny_model()
    ids, mask = prompt((24, 15, 9))
    with attach(model, H2O(1.0)) as attached:
        cache = filled(model, attached, ids, mask)
        cache.batch_select_indices(torch.tensor([2, 0]))
        with pytest.raises(ValueError, match=r"mask=attention_mask, \(2, 24\)"):
            freeze(cache, ROOM)
        rows = mask[[2, 0]]
        equal(steps(model, model, freeze(cache, ROOM, rows), rows, 2, static=True),
              steps(model, model, cache, rows, 2, static=False))


def test_chunked_layers_are_refused():
    model = tiny_model()
    with attach(model, SnapKV(8, recent=3)) as attached:
        cache = filled(model, attached, *prompt((24, 15)))
        attached.config.layer_types = ["chunked_attention", "full_attention", "full_attention"]
        with pytest.raises(UnsupportedModelError, match="chunks"):
            freeze(cache, ROOM)


# generate -------------------------------------------------------------------------------------------------------------
WAYS = {"greedy": dict(do_sample=False), "sampling": dict(do_sample=True, top_k=0, temperature=1.5),
        "beams": dict(num_beams=3), "beams, several": dict(num_beams=4, num_return_sequences=2),
        "sampling, several": dict(do_sample=True, top_k=0, num_return_sequences=3)}
SCORED = dict(return_dict_in_generate=True, output_scores=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["snapkv", "heads unlike", "tiers", "whole"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_generate_makes_the_same_tokens(family, name, way):
    model = tiny_model(family)
    ids, mask = prompt((24, 15))
    outs = []
    with attach(model, PLANS[name]) as attached:
        for kind in (None, "static"):
            torch.manual_seed(7)
            outs.append(model.generate(ids, attention_mask=mask, max_new_tokens=9, cache_implementation=kind, **SCORED,
                                       **WAYS[way]))
            assert attached.tally.layers or name == "whole"
    want, got = outs
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(a, b, **NEAR)
    static = got.past_key_values
    assert isinstance(static, StaticCompressedCache) and static.room == 9 and static.left == 1
    assert model.generation_config.cache_implementation is None


def compiling(graphs):
    """transformers compiles by itself on a GPU alone; here it is told to."""
    config = CompileConfig(backend=graphs, mode=None)
    config._compile_all_devices = True
    return dict(compile_config=config, cache_implementation="static")


def test_generate_compiles_the_decoding_once():
    """fullgraph=True is transformers' own default."""
    model, graphs = tiny_model(), Graphs()
    with attach(model, SnapKV(8, recent=3)):
        for lengths in ((24, 15), (31, 18)):
            ids, mask = prompt(lengths)
            want = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
            got = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, **compiling(graphs))
            assert torch.equal(got, want)
            assert graphs.count == 1


def test_generate_goes_on_from_a_static_cache():
    model = tiny_model()
    ids, mask = prompt((20, 13))
    more = words(2, 4, 3)

    def talk(room, **options):
        first = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
                               **options)
        both = torch.cat([first.sequences, more], 1)
        ones = torch.cat([mask, mask.new_ones(2, both.shape[1] - 20)], 1)
        return model.generate(both, attention_mask=ones, past_key_values=first.past_key_values, max_new_tokens=6,
                              do_sample=False)

    with attach(model, SnapKV(0.4, recent=3)):
        assert torch.equal(talk(ROOM, cache_implementation="static", max_cache_len=40), talk(None))
        with pytest.raises(ValueError, match="room for 5 tokens"):
            talk(ROOM, cache_implementation="static")


def test_a_prompt_in_chunks():
    model = tiny_model()
    ids, mask = prompt((30, 21))
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, prefill_chunk_size=8)
    graphs = Graphs()
    with attach(model, StreamingLLM(0.4, sinks=2, again=True)):
        want = model.generate(ids, **options)
        got = model.generate(ids, **options, **compiling(graphs))
    assert torch.equal(got, want) and graphs.count == 1     # chunks fill the dynamic form, which is not compiled


def test_pictures():
    model, graphs = llava(), Graphs()
    inputs = make_inputs(model, [[(24, 24)], [(24, 24)] * 2])
    options = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE])
    with attach(model, SnapKV({"image": 0.25}, recent=3)):
        want = model.generate(**inputs, **options)
        got = model.generate(**inputs, **options, **compiling(graphs))
    assert torch.equal(got, want) and graphs.count == 1


def test_a_filling_cache_says_that_it_compiles_until_the_prompt_comes():
    model = tiny_model()
    with attach(model, SnapKV(8, recent=3)) as attached:
        cache = FillingCache(attached.config, attached.plan, "cpu", 30)
        assert cache.is_compileable
        cache.promised = False
        assert not cache.is_compileable
        turns(model, cache, [dict(input_ids=words(1, 24))])
        assert cache.frozen().room == 6 and cache.nbytes == 0


# FlashAttention -------------------------------------------------------------------------------------------------------
@pytest.fixture
def flash():
    """No flash package is here: a stand-in that reads what flash attention is given, and computes the same with SDPA."""
    names = ("flash_attention_2", "flash_attention_3")
    stock, calls = {name: ALL_ATTENTION_FUNCTIONS[name] for name in names}, []

    def stand_in(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None,
                 **kwargs):
        assert module.config._attn_implementation in names      # kernels are looked up by it
        assert attention_mask is None or attention_mask.ndim == 2
        assert "attn_implementation" not in kwargs and module.layer_idx >= 0
        calls.append(module.layer_idx)
        queries, columns = query.shape[2], key.shape[2]
        row, column = torch.arange(columns - queries, columns)[:, None], torch.arange(columns)
        seen = column <= row
        if sliding_window is not None:
            seen = seen & (column > row - sliding_window)
        seen = seen.expand(len(query), 1, -1, -1)
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None]
        groups = query.shape[1] // key.shape[1]
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    for name in names:
        AttentionInterface.register(name, stand_in)
    yield calls
    for name, function in stock.items():
        AttentionInterface.register(name, function)


def flash_model(family, name="flash_attention_2"):
    model = tiny_model(family)
    model.config._attn_implementation = name
    return model


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flash_on_whole_layers_is_stock(family, name, flash):
    model = flash_model(family, name)
    ids, mask = prompt((24, 15))
    want = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    called = len(flash)
    with attach(model, H2O(1.0)) as attached:
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), want)
        assert attached.config._attn_implementation == f"mmcompress_{name}"
    assert len(flash) == 2 * called and model.config._attn_implementation == name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", [*PLANS, "h2o", "given"])
def test_flash_under_slots_equals_sdpa(name, family, side, flash):
    """Padded rows; a prompt, a second turn, and single tokens."""
    g = torch.Generator().manual_seed(0)
    given = Given({i: torch.rand(2, 24, generator=g) < 0.5 for i in range(3)})
    plan = {**PLANS, "h2o": H2O(0.4, again=True), "given": given}[name]
    ids, mask = prompt((24, 15), side)
    more = words(2, 6, 1)
    ones = lambda n: torch.cat([mask, mask.new_ones(2, n)], 1)  # noqa: E731
    calls = [dict(input_ids=ids, attention_mask=mask), dict(input_ids=more, attention_mask=ones(6)),
             dict(input_ids=more[:, :1], attention_mask=ones(7)), dict(input_ids=more[:, 1:2], attention_mask=ones(8))]
    outs = []
    for model in (tiny_model(family), flash_model(family)):
        with attach(model, plan) as attached:
            outs.append(turns(model, attached.cache(), calls))
    real = mask.bool()
    torch.testing.assert_close(outs[1][0][real], outs[0][0][real], atol=1e-5, rtol=1e-5)
    equal(outs[1][1:], outs[0][1:])
    assert flash


def test_flash_without_padding_and_static(flash):
    model = flash_model("llama")
    ids = words(2, 24)
    with attach(model, SnapKV(8, recent=3)):
        want = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static"), want)
    other = tiny_model("llama")
    with attach(other, SnapKV(8, recent=3)):
        assert torch.equal(other.generate(ids, max_new_tokens=8, do_sample=False), want)


def test_a_two_axes_mask_reads_as_a_causal_one_with_padding():
    g = torch.Generator().manual_seed(0)
    _, mask = prompt((9, 6))
    columns = torch.arange(9)
    four = (columns <= columns[5:, None]) & mask.bool()[:, None, None]
    model = tiny_model()
    with attach(model, Given({i: torch.rand(2, 9, generator=g) < 0.7 for i in range(3)})) as attached:
        slots = filled(model, attached, words(2, 9), mask).layers[0].slots
    rows = torch.arange(4).expand(2, -1)
    flat, full = Sight(mask, 5), Sight(four, 5)
    assert torch.equal(flat.seen(slots, rows), full.seen(slots, rows))
    assert torch.equal(flat.real(2, 9, mask.device), full.real(2, 9, mask.device))
    assert flat.kind(4) == full.kind(4) == (True, True)
    assert Sight(mask.flip(1), 5).kind(4) == (True, False)
    one = replace(flat, start=8)
    assert torch.equal(one.newest(slots), one.seen(slots, rows[:, :1])[:, :, 0])
    with pytest.raises(ValueError, match="4 columns"):
        Sight(mask[:, :4], 5).seen(slots, rows)
    with pytest.raises(ValueError, match="attention mask of shape"):
        Sight(mask[None], 5)


def test_other_bases_are_refused():
    model = tiny_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="sdpa, eager, flash_attention_2"):
        attach(model, SnapKV(8))
