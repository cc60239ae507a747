"""Codec tokens in a stock language model: against loops, an extended vocabulary, rows alone, decoding without a cache."""

import copy
import csv
import importlib
import json
import math
from pathlib import Path

import pytest
import tiny_codec
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mmcompress.adapters.codec_lm import CodecLM
from mmcompress.audio.codec import AudioTokens

WORDS, VOCAB, LAYOUTS = 20, (8, 6, 7), ("parallel", "delay", "flatten")
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, initializer_range=0.2)


def language_model(words=WORDS, cls=LlamaForCausalLM, config=LlamaConfig, **options):
    torch.manual_seed(0)
    return cls(config(vocab_size=words, bos_token_id=None, eos_token_id=None, **{**SHAPE, **options})).eval()


def codec_lm(layout="delay", vocab=VOCAB, **options):
    torch.manual_seed(1)
    return CodecLM(language_model(), vocab, layout, **options).eval()


def recordings(*lengths, vocab=VOCAB, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = (torch.rand(len(lengths), len(vocab), max(lengths), generator=g) * torch.tensor(vocab)[:, None]).long()
    return AudioTokens(codes, torch.tensor(lengths), 50.0, vocab, "xcodec", 16_000)


def steps_of(tokens, r, layout, ended):
    """One recording's columns by loops: lists of (book, code), "pad" and "begin"; those of an end as such."""
    n, n_q = int(tokens.lengths[r]), tokens.n_q
    code = lambda k, t: (k, int(tokens.codes[r, k, t]))  # noqa: E731
    if layout == "flatten":
        steps = [[code(k, t)] for t in range(n) for k in range(n_q)]
    elif layout == "parallel":
        steps = [[code(k, t) for k in range(n_q)] for t in range(n)]
    else:
        count = (n + n_q - 1 if n else 0) if ended else n
        steps = [[code(k, s - k) if 0 <= s - k < n else "pad" for k in range(n_q)] for s in range(count)]
    streams = 1 if layout == "flatten" else n_q
    return [["begin"] * streams, *steps, *([["pad"] * streams] if ended else [])]


def read_alone(model, row, tokens, which, ended, spoken):
    """One row by itself, symbol by symbol: text logits, sum and count of each book's loss, of text none."""
    vocab, table, lm = model.vocab, model.sound.table.weight, model.lm
    first = [sum(vocab[:k]) for k in range(len(vocab))]
    place = lambda s: {"pad": sum(vocab), "begin": sum(vocab) + 1}.get(s) if isinstance(s, str) else first[s[0]] + s[1]  # noqa: E731
    embeds, targets, which = [], [], list(which)
    for i in row:
        if i != model.audio_token_id:
            embeds.append(lm.get_input_embeddings().weight[i])
            targets.append([])
            continue
        r = which.pop(0)
        seen = 0
        for step in steps_of(tokens, r, model.layout, ended[r]):
            embeds.append(sum(table[place(s)] for s in step))
            found = [s for s in step if not isinstance(s, str)]
            if step[0] == "pad" and seen >= 0 and ended[r]:             # book 0 has no more: its end, once
                found.append((0, vocab[0]))
                seen = -1
            targets.append(found if spoken[r] else [])
    states = lm.model(inputs_embeds=torch.stack(embeds)[None]).last_hidden_state[0]
    losses, counts = [torch.zeros(()) for _ in vocab], [0] * len(vocab)
    for column, found in enumerate(targets):
        for book, code in found:
            losses[book] = losses[book] - (model.sound.heads[book].weight @ states[column - 1]).log_softmax(-1)[code]
            counts[book] += 1
    return lm.lm_head(states), losses, counts


A = WORDS                                   # the placeholder
ROWS = [[1, 2, A, 3], [4, 5, 6], [A, A, 7, 8, A], [9, A]]
SIZES = (4, 1, 0, 5, 3)
ENDED = torch.tensor([True, True, True, False, True])
SPOKEN = torch.tensor([True, False, True, True, True])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_its_rows_written_out(layout, side):
    """Text and recordings in any order, rows of different lengths, text alone: logits, losses and counts of loops."""
    model, tokens = codec_lm(layout, sound_weight=0.7, book_weights=[3, 0.5, 1]), recordings(*SIZES)
    batch = model.expand(ROWS, tokens, ended=ENDED, labels=ROWS, side=side)
    with torch.no_grad():
        out = model(**batch, tokens=tokens, ended=ENDED, spoken=SPOKEN)
    sums, counts, text, words = [0.0] * 3, [0] * 3, 0.0, 0
    for b, (row, which) in enumerate(zip(ROWS, ([0], [], [1, 2, 3], [4]))):
        with torch.no_grad():
            logits, losses, n = read_alone(model, row, tokens, which, ENDED.tolist(), SPOKEN.tolist())
        torch.testing.assert_close(out.logits[b][batch["attention_mask"][b].bool()], logits, atol=1e-5, rtol=1e-4)
        sums, counts = [a + float(x) for a, x in zip(sums, losses)], [a + x for a, x in zip(counts, n)]
        ids = batch["input_ids"][b][batch["attention_mask"][b].bool()].tolist()
        for i, word in enumerate(ids[1:]):
            if word != A:
                text, words = text - float(logits[i].log_softmax(-1)[word]), words + 1
    assert [len(t) for t in out.code_targets] == counts
    assert out.book_losses.tolist() == pytest.approx([s / n for s, n in zip(sums, counts)], rel=1e-5)
    assert float(out.text_loss) == pytest.approx(text / words, rel=1e-5)
    weighted = sum(w * s / n for w, s, n in zip((3, 0.5, 1), sums, counts)) / 4.5
    assert float(out.loss) == pytest.approx(text / words + 0.7 * weighted, rel=1e-5)


def test_one_flat_book_is_an_extended_vocabulary():
    """Codes, end and begin as further rows of a stock model's own embedding and head."""
    model, tokens, size = codec_lm("flatten", (8,)), recordings(5, 3, vocab=(8,)), WORDS + 10
    stock = language_model(size)
    stock.model.load_state_dict({k: v for k, v in model.lm.model.state_dict().items() if "embed" not in k}, strict=False)
    with torch.no_grad():
        stock.model.embed_tokens.weight.copy_(torch.cat([model.lm.model.embed_tokens.weight, model.sound.table.weight]))
        stock.lm_head.weight[:WORDS] = model.lm.lm_head.weight
        stock.lm_head.weight[WORDS:-1] = model.sound.heads[0].weight
        rows = [[1, A, 2], [A, 3]]
        out = model(**model.expand(rows, tokens), tokens=tokens)
        seen = []
        for row, r in zip(rows, range(2)):
            codes = [WORDS + int(c) for c in tokens.codes[r, 0, :tokens.lengths[r]]]
            i = row.index(A)
            logits = stock(torch.tensor([[*row[:i], size - 1, *codes, size - 2, *row[i + 1:]]])).logits[0]
            torch.testing.assert_close(out.logits[r, :len(logits)], logits[:, :WORDS])
            seen.append(logits[i:i + len(codes) + 1, WORDS:-1])
    torch.testing.assert_close(out.code_logits[0], torch.cat(seen))
    assert out.code_targets[0].tolist() == [*tokens.codes[0, 0, :5].tolist(), 8, *tokens.codes[1, 0, :3].tolist(), 8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_knows_whom(layout):
    """A code changes what is predicted behind it and nothing else: in delay and flatten the later books of its frame too."""
    model, tokens, t, k = codec_lm(layout), recordings(6), 3, 1
    codes = tokens.codes.clone()
    codes[0, k, t] = (codes[0, k, t] + 1) % VOCAB[k]
    other = AudioTokens(codes, tokens.lengths, 50.0, VOCAB, "xcodec", 16_000)
    batch = model.expand([[1, A]], tokens)
    with torch.no_grad():
        one, two = (model(**batch, tokens=x).code_logits for x in (tokens, other))
    for book in range(3):
        moved = [f for f in range(6) if not torch.equal(one[book][f], two[book][f])]
        at_once = book > k and layout != "parallel"
        first = t + (max(0, k - book + 1) if layout == "delay" else not at_once)        # delay: f + book > t + k
        assert moved == list(range(first, 6)), (book, moved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_every_symbol_and_head(layout):
    model, tokens = codec_lm(layout).train(), recordings(40, 30)
    batch = model.expand([[1, A, 2], [A, 3]], tokens, labels=[[1, A, 2], [A, 3]])
    model(**batch, tokens=tokens).loss.backward()
    assert (model.sound.table.weight.grad.abs().sum(1) > 0).all()
    assert all((head.weight.grad.abs().sum(1) > 0).all() for head in model.sound.heads)
    assert all(p.grad is not None for p in model.lm.parameters())
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.lm.gradient_checkpointing_enable()
    model(**batch, tokens=tokens).loss.backward()
    for a, p in zip(plain, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_going_on_without_a_cache_alone_and_by_hand(layout):
    """Greedy: equal with and without a cache, in a batch and alone, and each new code is the best of a teacher-forced pass."""
    model, tokens, most = codec_lm(layout), recordings(4, 0, 7), 6
    rows = [[1, 2, A], [A], [3, A]]
    prompt = model.expand(rows, tokens, ended=False, side="left")
    go = dict(frames=most, temperature=0)
    whole = model.continue_sound(tokens, **prompt, **go)
    again = model.continue_sound(tokens, **prompt, **go, use_cache=False)
    assert torch.equal(whole.codes, again.codes) and torch.equal(whole.lengths, again.lengths)
    assert (whole.rate, whole.codec, whole.vocab) == (50.0, "xcodec", VOCAB)
    for b, row in enumerate(rows):
        n, end = int(tokens.lengths[b]), int(whole.lengths[b])
        assert torch.equal(whole.codes[b, :, :n], tokens.codes[b, :, :n]) and n <= end <= n + most
        alone = model.continue_sound(tokens[b], **model.expand([row], tokens[b], ended=False, side="left"), **go)
        assert torch.equal(alone.codes[0], whole[b].codes[0])
        with torch.no_grad():
            out = model(**model.expand([row], whole[b]), tokens=whole[b])
        for k in range(3):
            sure = end - (2 if layout == "delay" and end == n + most else 0) * bool(k)  # there book 0 stopped being asked
            best = out.code_logits[k].argmax(-1)
            assert torch.equal(best[n:sure], whole.codes[b, k, n:sure])
        assert (int(out.code_logits[0][end].argmax()) == VOCAB[0]) or end == n + most


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_learned_by_heart_is_gone_on_with_and_ends(layout):
    model, tokens = codec_lm(layout).train(), recordings(9, 6, 11, seed=3)
    batch = model.expand([[1, A], [2, A], [3, A]], tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch, tokens=tokens).loss.backward()
        optimizer.step()
    model.eval()
    begun = AudioTokens(tokens.codes[:, :, :2], torch.tensor([0, 1, 2]), 50.0, VOCAB, "xcodec", 16_000)
    prompt = model.expand([[1, A], [2, A], [3, A]], begun, ended=False, side="left")
    for more in (dict(temperature=0), dict(temperature=0.05, generator=torch.Generator().manual_seed(0)), dict(top_k=1)):
        said = model.continue_sound(begun, **prompt, seconds=0.4, **more)
        assert torch.equal(said.lengths, tokens.lengths) and torch.equal(said.codes, tokens.codes)
    cut = model.continue_sound(begun, **prompt, frames=3, temperature=0)
    assert cut.lengths.tolist() == [3, 4, 5]
    assert all(torch.equal(cut.codes[b, 0, :n], tokens.codes[b, 0, :n]) for b, n in enumerate(cut.lengths))


def test_sampling_follows_its_generator():
    model, tokens = codec_lm(), recordings(3, 5)
    draw = lambda seed, **more: model.continue_sound(tokens, frames=8, generator=torch.Generator().manual_seed(seed), **more)  # noqa: E731
    one, same, other = draw(0), draw(0), draw(1)
    assert torch.equal(one.codes, same.codes) and not torch.equal(one.codes, other.codes)
    few, greedy = draw(2, top_k=1), model.continue_sound(tokens, frames=8, temperature=0)
    assert torch.equal(few.codes, greedy.codes)


def test_text_is_generated_by_the_stock_model():
    model, tokens = codec_lm(), recordings(4, 2)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for options in (dict(do_sample=False), dict(num_beams=3, do_sample=False)):
        assert torch.equal(model.generate_text(ids, max_new_tokens=5, **options),
                           model.lm.generate(ids, max_new_tokens=5, **options)[:, 3:])
    rows = [[1, A, 2, 3], [A, 4]]
    batch = model.expand(rows, tokens, side="left")
    for options in (dict(do_sample=False), dict(num_beams=3, do_sample=False, num_return_sequences=2)):
        said = model.generate_text(**batch, tokens=tokens, max_new_tokens=6, **options)
        alone = [model.generate_text(**model.expand([row], tokens[b]), tokens=tokens[b], max_new_tokens=6, **options)
                 for b, row in enumerate(rows)]
        assert torch.equal(said, torch.cat(alone))
    with torch.no_grad():                                       # greedy words are the best of a teacher-forced pass
        words = model.generate_text(**batch, tokens=tokens, max_new_tokens=6, do_sample=False)
        spoken = [[*row, *more] for row, more in zip(rows, words.tolist())]
        out = model(**model.expand(spoken, tokens, side="left"), tokens=tokens)
    assert torch.equal(out.logits[:, -7:-1].argmax(-1), words)
    torch.manual_seed(0)
    assert model.generate_text(**batch, tokens=tokens, max_new_tokens=3, do_sample=True).shape == (2, 3)


def test_lora_bfloat16_and_another_family():
    from peft import LoraConfig, get_peft_model
    lm = language_model(cls=Qwen2ForCausalLM, config=Qwen2Config, tie_word_embeddings=True)
    tokens, rows = recordings(4, 3), [[1, A, 2], [A, 3]]
    plain = CodecLM(copy.deepcopy(lm), VOCAB)
    model = CodecLM(get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), VOCAB)
    model.sound.load_state_dict(plain.sound.state_dict())
    batch = model.expand(rows, tokens, labels=rows)
    torch.testing.assert_close(model(**batch, tokens=tokens).loss, plain(**batch, tokens=tokens).loss)      # LoRA begins as 0
    model(**batch, tokens=tokens).loss.backward()
    learned = {name for name, p in model.lm.named_parameters() if p.grad is not None}
    assert learned and all("lora" in name for name in learned)
    assert model.sound.table.weight.grad.abs().sum() > 0
    prompt = model.expand(rows, tokens, side="left")
    said = model.generate_text(**prompt, tokens=tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(said, plain.generate_text(**prompt, tokens=tokens, max_new_tokens=4, do_sample=False))
    go = dict(frames=3, temperature=0)
    assert torch.equal(model.continue_sound(tokens, **go).codes, plain.continue_sound(tokens, **go).codes)

    exact = plain(**batch, tokens=tokens).loss
    mixed = CodecLM(copy.deepcopy(plain.lm).to(torch.bfloat16), VOCAB)
    for half in (mixed, copy.deepcopy(plain).to(torch.bfloat16)):
        half.sound.load_state_dict(plain.sound.state_dict())
        out = half(**batch, tokens=tokens)
        assert out.loss.dtype == torch.float32 and out.loss.item() == pytest.approx(exact.item(), rel=0.03)
        out.loss.backward()
        assert half.sound.table.weight.grad.isfinite().all()
        assert len(half.continue_sound(tokens, **go)) == 2


def test_absolute_positions_are_counted_from_each_rows_beginning():
    """GPT-2's: rotary ones would not show a shift."""
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None,
                                    initializer_range=0.2)).eval()
    model, tokens, rows = CodecLM(lm, VOCAB, "delay").eval(), recordings(5, 1), [[1, 2, A, 3], [A, 3]]
    with torch.no_grad():
        for side in ("left", "right"):
            batch = model.expand(rows, tokens, side=side)
            out = model(**batch, tokens=tokens)
            for b, row in enumerate(rows):
                alone = model(**model.expand([row], tokens[b]), tokens=tokens[b]).logits[0]
                torch.testing.assert_close(out.logits[b][batch["attention_mask"][b].bool()], alone, atol=1e-5, rtol=1e-4)
    go = dict(frames=5, temperature=0)
    said = model.continue_sound(tokens, **go)
    assert torch.equal(said.codes, model.continue_sound(tokens, **go, use_cache=False).codes)
    for b in range(2):
        assert torch.equal(said[b].codes, model.continue_sound(tokens[b], **go).codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own", [False, True])
def test_sound_begins_as_loud_as_words(layout, own):
    vocab = (64, 64, 64)
    books = [torch.randn(64, 99) for _ in vocab] if own else None
    model, tokens = codec_lm(layout, vocab, codebook=books), recordings(200, vocab=vocab)
    with torch.no_grad():
        sound = model.embed(model.expand([[A]], tokens)["input_ids"], tokens)[0, 5:-5].std()
        assert float(sound / model.lm.get_input_embeddings().weight.std()) == pytest.approx(1, abs=0.15)


def test_the_codecs_own_vectors_add_to_the_embedding():
    books = [torch.randn(k, 5) for k in VOCAB]
    model, tokens = codec_lm("parallel", codebook=books), recordings(3)
    embeds = model.embed(model.expand([[A]], tokens)["input_ids"], tokens)[0]
    table, project = model.sound.table.weight, model.sound.project.weight
    for t in range(3):
        codes = tokens.codes[0, :, t].tolist()
        rows = sum(table[sum(VOCAB[:k]) + c] for k, c in enumerate(codes))
        torch.testing.assert_close(embeds[1 + t], rows + project @ sum(books[k][c] for k, c in enumerate(codes)))
    torch.testing.assert_close(embeds[0], 3 * table[-1])                                # begin has no vector
    model(**model.expand([[A]], tokens), tokens=tokens).loss.backward()
    assert project.grad.abs().sum() > 0 and not model.sound.codebook.requires_grad


@pytest.mark.parametrize("books", [None, [torch.ones(k, 3) for k in VOCAB]])
def test_saved_and_loaded(tmp_path, books):
    model, tokens = codec_lm("delay", codebook=books, sound_weight=0.5, book_weights=[1, 2, 3]), recordings(4, 2)
    model.save_pretrained(tmp_path)
    rows = [[1, A, 2], [A, 3]]
    batch = model.expand(rows, tokens, labels=rows)
    with torch.no_grad():
        expected = model(**batch, tokens=tokens)
        for again in (CodecLM.from_pretrained(tmp_path), CodecLM.from_pretrained(tmp_path, lm=model.lm)):
            assert not again.training
            out = again(**batch, tokens=tokens)
            assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)
        half = CodecLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert half.lm.dtype == torch.bfloat16 and half.sound.table.weight.dtype == torch.float32
    assert torch.equal(stock(torch.tensor([[1, 2]])).logits, model.lm(torch.tensor([[1, 2]])).logits)
    assert json.loads((tmp_path / "codec_lm.json").read_text())["layout"] == "delay"
    with pytest.raises(ValueError, match=r"holds no codec_lm\.json"):
        CodecLM.from_pretrained(tmp_path / "elsewhere")


def test_nothing_to_learn_is_no_nan():
    model, tokens = codec_lm(), recordings(3)
    rows = [[1, A, 2]]
    silent = model.expand(rows, tokens, labels=[[-100, -100, -100]])
    out = model(**silent, tokens=tokens, spoken=False)
    assert out.loss == 0 and out.code_logits is None
    out = model(**silent, tokens=tokens, spoken=torch.tensor([False]))
    assert out.loss == 0 and [len(x) for x in out.code_logits] == [0, 0, 0]
    assert model(torch.tensor([[1, 2]])).loss is None
    text = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(text).logits, model.lm(text).logits)
    assert F.cross_entropy(model.lm(text).logits[0, :-1], text[0, 1:]).isclose(model(text, labels=text).loss)


def test_errors_say_what_to_do():
    model, tokens = codec_lm(), recordings(4, 2)
    batch = model.expand([[1, A], [A]], tokens)
    for call, message in (
            (lambda: CodecLM(model.lm, VOCAB, "coarse_first"), "layout='coarse_first': one of parallel, delay, flatten"),
            (lambda: CodecLM(model.lm, ()), "pass how many codes"),
            (lambda: CodecLM(model.lm, VOCAB, book_weights=[1]), "book_weights="),
            (lambda: CodecLM(model.lm, VOCAB, codebook=[torch.ones(3, 4)]), r"codebook of \[3\] vectors"),
            (lambda: model.expand([[1, A]], tokens), "1 placeholders .* for 2 recordings"),
            (lambda: model.expand([[1, A], [A]], tokens, labels=[[1], [A]]), "pass a label for every id"),
            (lambda: model.expand([[A], [A]], recordings(4, 2, vocab=(8, 6))), r"books of \(8, 6\) codes and this model"),
            (lambda: model.expand([[A], [A]], recordings(4, 2, vocab=(*VOCAB, 9))), r"tokens.prefix\(3\)"),
            (lambda: model(**batch, tokens=tokens[0]), "14 placeholders for 8 columns of 1 recordings"),
            (lambda: model(**batch), "14 placeholders for 0 columns"),
            (lambda: model(**batch, tokens=tokens, ended=torch.tensor([True])), r"ended of shape \(1,\) for 2 recordings"),
            (lambda: model(**batch, tokens=recordings(2, 4)), "recording 1 do not lie side by side"),
            (lambda: model(torch.tensor([[A] * 4 + [1] + [A] * 4]), tokens=recordings(4)), "recording 0 do not lie side"),
            (lambda: model.generate_text(**batch, tokens=tokens), "pad on the left"),
            (lambda: model.continue_sound(tokens), "pass one of them"),
            (lambda: model.continue_sound(tokens, frames=0), "at least one frame"),
            (lambda: model.continue_sound(tokens, seconds=0.001), "at least one frame"),
            (lambda: model.continue_sound(tokens, frames=2, temperature=-1), "temperature=-1"),
            (lambda: model.continue_sound(tokens, frames=2, top_k=0), "top_k=0"),
            (lambda: model.continue_sound(tokens, frames=2, **batch), "each row must end with its own recording"),
            (lambda: model.continue_sound(recordings(1)[slice(0, 0)], frames=2), "no recordings to go on with")):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    digits = importlib.import_module("spoken_digits")
    tiny_codec.model_of("xcodec").save_pretrained(tmp_path / "codec")
    out = tmp_path / "digits.csv"
    command = ["--codec", f"tiny={tmp_path / 'codec'}", "--n-q", "2", "--steps", "2", "--batch", "2", "--train", "6",
               "--test", "4", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    digits.main(command)
    monkeypatch.setattr(digits, "train", None)                                          # everything is in the table
    digits.main(command)
    rows = list(csv.DictReader(out.open(newline="")))
    assert [(r["task"], r["voices"], r["measure"], r["book"]) for r in rows] == [
        (task, who, *what) for task, whats in (("read", [("digit errors, %", ""), ("utterances with an error, %", "")]),
                                               ("write", [("bits a code", "0"), ("bits a code", "1"), ("kbit/s", "")]))
        for who in ("known", "new") for what in whats]
    for row in rows:
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"]) and row["n"] == "4" and row["torch"]
    books = [r for r in rows if r["measure"] == "bits a code"]
    assert all(9 < float(r["value"]) < 11 and float(r["nominal"]) == 10 for r in books)       # 1,024 codes, nothing learned
    kbps = [float(r["value"]) for r in rows if r["measure"] == "kbit/s"]
    assert kbps[0] == pytest.approx(0.05 * sum(float(r["value"]) for r in books[:2]), rel=1e-3)
    wavs = sorted(path.name for path in (tmp_path / "cache").glob("wav-*/*.wav"))
    assert wavs == [f"{i}-{kind}.wav" for i in range(4) for kind in ("spoken", "written")]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert importlib.import_module("speech").normalise(digits.letters(range(10))).split() == list("bcdfghjklm")


def test_the_benchmarks_bits_are_those_of_each_recording(monkeypatch):
    pytest.importorskip("espeakng_loader")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    digits = importlib.import_module("spoken_digits")
    model, tokens = codec_lm("flatten"), recordings(5, 3, 7)
    split = digits.Split(tokens, [[1]] * 3)
    rows = digits.writing(model, split, split, size=2)
    with torch.no_grad():
        out = model(**model.expand([[A]] * 3, tokens), tokens=tokens)
    for k, row in enumerate(rows[:3]):
        real = out.code_targets[k] < VOCAB[k]
        bits = F.cross_entropy(out.code_logits[k][real], out.code_targets[k][real]) / torch.log(torch.tensor(2.0))
        assert row["value"] == pytest.approx(bits.item(), rel=1e-5) and int(real.sum()) == 15
        codes = tokens.codes[:, k][tokens.mask].tolist()
        seen = [codes.count(c) + 1 for c in codes]
        assert row["unigram"] == pytest.approx(sum(-math.log2(n / (15 + VOCAB[k])) for n in seen) / 15)
    share, low, high = digits.wilson(3, 20)
    assert share == 0.15 and low == pytest.approx(0.0524, abs=1e-4) and high == pytest.approx(0.3604, abs=1e-4)
