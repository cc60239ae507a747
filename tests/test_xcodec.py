"""The trainable X-Codec: stock parity, gradients, codebooks against loops, losses in closed form, a short training run."""

import copy
import math
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from transformers import DacConfig, HubertConfig, XcodecConfig, XcodecModel
from transformers.models.xcodec.modeling_xcodec import XcodecVectorQuantization

import mmcompress.audio
from mmcompress.audio.xcodec import (
    PQMF,
    RVQ,
    LossWeights,
    MultiFrequencyDiscriminator,
    XCodec,
    discriminator_loss,
    generator_losses,
)
from mmcompress.audio.xcodec.losses import adversarial_loss, feature_matching, magnitude, spectral_loss, sub_band_loss
from mmcompress.audio.xcodec.quantizer import follow, kmeans, residual_quantize, revive

RATE, CODES = 16_000, 64


def config(hop=40, kernel=10):
    """Books 1, 2, 4 of 64 codes x 48; hop 320 has HuBERT's own seven convolutions; kernel is the first of hop 40's."""
    ratios = {40: [5, 4, 2], 320: [8, 5, 4, 2]}[hop]
    conv = {40: dict(conv_dim=[16] * 3, conv_stride=[5, 4, 2], conv_kernel=[kernel, 4, 2], num_feat_extract_layers=3),
            320: dict(conv_dim=[16] * 7)}[hop]
    acoustic = DacConfig(encoder_hidden_size=8, decoder_hidden_size=64, downsampling_ratios=ratios, upsampling_ratios=ratios)
    acoustic.hidden_size = 16
    semantic = HubertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, **conv)
    book = 6 * RATE / hop / 1000
    return XcodecConfig(acoustic_model_config=acoustic, semantic_model_config=semantic, codebook_size=CODES,
                        target_bandwidths=[book, 2 * book, 4 * book])


def codec(hop=40, filled=True, kernel=10, **options):
    """A random model; filled: codebooks of noise, sound and teacher equally loud before them, a waveform of power 0.1."""
    torch.manual_seed(0)
    model = XCodec(config(hop, kernel), **options).eval()
    if filled:
        for q in model.quantizer.quantizers:
            q.codebook.embed.normal_()
            q.codebook.embed_avg.copy_(q.codebook.embed * 8)
            q.codebook.cluster_size.fill_(8)
            q.codebook.inited.fill_(1)
        with torch.no_grad():
            for layer in model.acoustic_encoder.modules():
                if isinstance(layer, torch.nn.Conv1d):
                    layer.weight.normal_(std=layer.weight[0].numel() ** -0.5)
            model.acoustic_encoder.conv2.weight.mul_(12 / model.acoustic_encoder(sound()).std())
            model.fc.weight.normal_(std=0.02)
            model.acoustic_decoder.conv2.weight.mul_(0.3 / model(sound()).waveform.std())
    return model


def stock_of(model):
    stock = XcodecModel(model.config).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    return stock


def sound(batch=2, samples=3200, seed=0):
    """Harmonic tones of random pitch that swell and fade, over a little noise. (B, 1, T)"""
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(samples) / RATE
    pitch = 100 + 300 * torch.rand(batch, 1, 1, generator=g)
    phase = 2 * math.pi * pitch * t * torch.arange(1, 9)[:, None]
    swell = (math.pi * (t * 5 + torch.rand(batch, 1, generator=g))).sin().square()
    return (0.3 * phase.sin().mean(1) * swell + 0.01 * torch.randn(batch, samples, generator=g))[:, None]


def book(dim=3, codes=4, started=True):
    made = XcodecVectorQuantization(XcodecConfig(codebook_size=codes, codebook_dim=dim))
    made.codebook.inited.fill_(float(started))
    return made


# the model beside stock

@pytest.mark.parametrize("hop, samples", [(40, 3200), (320, 6400)])
def test_codes_and_waveform_are_stocks(hop, samples):
    model = codec(hop)
    stock, audio = stock_of(model), sound(samples=samples)
    with torch.no_grad():
        out = model(audio)
        codes = stock.encode(audio).audio_codes
        assert torch.equal(out.codes, codes) and torch.equal(model.encode(audio).audio_codes, codes)
        assert codes.shape == (2, 4, samples // hop) and codes.unique().numel() > 8
        torch.testing.assert_close(out.waveform, stock.decode(codes).audio_values, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.waveform, stock(audio).audio_values, atol=1e-5, rtol=0)
        two = model(audio, n_q=2)
        assert torch.equal(two.codes, codes[:, :2])
        torch.testing.assert_close(two.waveform, stock.decode(codes[:, :2]).audio_values, atol=1e-5, rtol=0)
        hidden = stock.semantic_model(F.pad(audio[:, 0], (hop // 2, hop // 2)), output_hidden_states=True).hidden_states
        torch.testing.assert_close(out.teacher, torch.stack(hidden).mean(0).transpose(1, 2))
        odd = sound(samples=samples + 37)
        assert torch.equal(model.encode(odd).audio_codes, stock.encode(odd).audio_codes)


def test_a_teacher_with_a_frame_more():
    """Its convolutions see a hop less, so stock pads the encoder's audio too."""
    model, audio = codec(kernel=5), sound()
    stock = stock_of(model)
    with torch.no_grad():
        out, codes = model(audio), stock.encode(audio).audio_codes
        assert codes.shape[2] == 81 and torch.equal(out.codes, codes) and out.waveform.shape == audio.shape
        torch.testing.assert_close(out.waveform, stock(audio).audio_values, atol=1e-5, rtol=0)
        assert torch.equal(codec(kernel=5, semantic=False)(audio).codes,
                           stock_of(codec(kernel=5, semantic=False)).encode(audio).audio_codes)


def test_checkpoints_go_both_ways(tmp_path):
    model = codec()
    stock, audio = stock_of(model), sound()
    codes = stock.encode(audio).audio_codes
    stock.save_pretrained(tmp_path / "stock")
    again = XCodec.from_pretrained(tmp_path / "stock", rvq=RVQ(books=(3,)))
    assert again.books == (3,) and all(q.codebook.inited for q in again.quantizer.quantizers)
    assert not any(p.requires_grad for p in again.semantic_model.parameters()) and not again.semantic_model.training
    assert all(p.requires_grad for n, p in again.named_parameters() if not n.startswith("semantic_model."))
    assert torch.equal(again(audio).codes, codes)
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(XcodecModel.from_pretrained(tmp_path / "ours").encode(audio).audio_codes, codes)
    assert mmcompress.audio.XCodec is XCodec


def test_batch_is_single():
    model, audio = codec(), sound(3)
    with torch.no_grad():
        whole, parts = model(audio), [model(a[None]) for a in audio]
    assert torch.equal(whole.codes, torch.cat([p.codes for p in parts]))
    torch.testing.assert_close(whole.waveform, torch.cat([p.waveform for p in parts]), atol=1e-5, rtol=0)


def test_gradients_reach_all_but_the_teacher():
    model, audio = codec(filled=False).train(), sound()
    out = model(audio, step=0, n_q=4)
    torch.testing.assert_close(out.semantic_loss, (out.semantic - out.teacher).square().mean())
    generator_losses(out, audio, PQMF())["loss"].backward()
    for name, weight in model.named_parameters():
        if name.startswith("semantic_model."):
            assert weight.grad is None and not weight.requires_grad, name
        else:
            assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0, name


def test_each_loss_reaches_its_part():
    model, audio = codec().train(), sound()
    model(audio, step=0, n_q=2).semantic_loss.backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"acoustic_encoder", "encoder_semantic", "fc", "fc1", "decoder_semantic"}
    model.zero_grad()
    model(audio, step=1, n_q=2).commit_loss.backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"acoustic_encoder", "encoder_semantic", "fc"}


def test_the_teacher_stays():
    model, audio = codec(), sound()
    model.semantic_model.config.layerdrop = model.semantic_model.config.hidden_dropout = 0.9
    teacher = copy.deepcopy(model.semantic_model.state_dict())
    before = model(audio).teacher
    assert model.train() is model and model.training and not any(m.training for m in model.semantic_model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        out = model(audio, step=step)
        torch.testing.assert_close(out.teacher, before, atol=0, rtol=0)
        assert not out.teacher.requires_grad
        optimizer.zero_grad()
        out.semantic_loss.backward()
        optimizer.step()
    assert all(torch.equal(teacher[k], v) for k, v in model.semantic_model.state_dict().items())


def test_without_semantics_the_size_is_the_same():
    full, plain, audio = codec(), codec(semantic=False), sound()
    assert {k: v.shape for k, v in full.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    expected = stock_of(plain).encode(audio).audio_codes                        # stock asks its teacher, to no effect
    plain.semantic_model.forward = None                                         # nobody calls it
    assert torch.equal(plain.encode(audio).audio_codes, expected)
    out = plain.train()(audio, step=0, n_q=4)
    assert torch.equal(out.codes, expected) and out.semantic_loss == 0 and not out.semantic.any()
    generator_losses(out, audio, PQMF())["loss"].backward()
    trained = {n.split(".")[0] for n, p in plain.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {"acoustic_encoder", "acoustic_decoder", "fc", "fc2"}


def test_weight_norm_and_back():
    model, audio = codec(), sound()
    keys, before = set(model.state_dict()), model(audio).waveform
    model.apply_weight_norm()
    torch.testing.assert_close(model(audio).waveform, before, atol=1e-5, rtol=0)
    model.train()(audio, step=0).waveform.square().mean().backward()
    model.remove_weight_norm()
    assert set(model.eval().state_dict()) == keys
    stock_of(model)


def test_errors_say_what_to_do():
    model = codec()
    with pytest.raises(ValueError, match="average channels"):
        model(torch.zeros(1, 2, 400))
    with pytest.raises(ValueError, match="multiple of 40"):
        model(torch.zeros(1, 1, 401))
    with pytest.raises(ValueError, match="this codec has 4"):
        model(sound(), n_q=5)
    with pytest.raises(ValueError, match="needs the step"):
        model.train()(sound())
    with pytest.raises(ValueError, match="this codec has 4"):
        codec(rvq=RVQ(books=(2, 9)))
    for wrong in (dict(decay=1.0), dict(epsilon=0.0), dict(dead=-1.0), dict(books=()), dict(iterations=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RVQ(**wrong)


# codebooks

def test_straight_through_is_the_identity():
    torch.manual_seed(0)
    books = [book() for _ in range(3)]
    for b in books:
        b.codebook.embed.normal_()
    x, weight = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    q = residual_quantize(books, x)
    looked_up = sum(b.decode(q.codes[:, i]) for i, b in enumerate(books))
    torch.testing.assert_close(q.values, looked_up)
    (grad,) = torch.autograd.grad((q.values * weight).sum(), x, retain_graph=True)
    assert torch.equal(grad, weight)
    residual, expected = x.detach(), torch.zeros(2, 3, 7)                       # of the commitment: 2 (r_i - q_i) / numel each
    for i, b in enumerate(books):
        left = residual - b.decode(q.codes[:, i])
        torch.testing.assert_close(q.commit[i], left.square().mean())
        expected, residual = expected + 2 * left / x.numel(), left
    torch.testing.assert_close(torch.autograd.grad(q.commit.sum(), x)[0], expected)


def test_kmeans_beside_a_loop():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    means, counts = kmeans(x, 5, RVQ(iterations=4), torch.Generator().manual_seed(2))
    slow = [x[i] for i in torch.randperm(40, generator=torch.Generator().manual_seed(2))[:5]]
    for _ in range(4):
        groups = [[] for _ in slow]
        for v in x:
            groups[min(range(5), key=lambda k: float((v - slow[k]).square().sum()))].append(v)
        slow = [torch.stack(g).mean(0) if g else m for g, m in zip(groups, slow)]
    torch.testing.assert_close(means, torch.stack(slow))
    assert counts.tolist() == [len(g) for g in groups]
    few, _ = kmeans(x[:3], 5, RVQ(), torch.Generator().manual_seed(0))          # fewer vectors than codes
    assert few.isfinite().all()


def test_books_start_where_the_clusters_are():
    centres = torch.tensor([[5.0, 0, 0], [-5, 0, 0], [0, 5, 0], [0, -5, 0]])
    x = (centres.repeat(25, 1) + 0.01 * torch.randn(100, 3))[None].transpose(1, 2)
    b = book(started=False)
    for seed in range(20):                                                      # k-means may merge two from a poor start
        b.codebook.inited.zero_()
        q = residual_quantize([b], x, RVQ(seed=seed))
        if q.codes.unique().numel() == 4:
            break
    assert b.codebook.inited and sorted(b.codebook.cluster_size.tolist()) == [25] * 4
    assert (torch.cdist(centres, b.codebook.embed).min(1).values < 0.02).all()
    embed = b.codebook.embed.clone()
    residual_quantize([b], x, RVQ(seed=seed), step=1)
    torch.testing.assert_close(b.codebook.embed, embed, atol=1e-4, rtol=0)      # a centre keeps its place: averages agree


def test_moving_averages_beside_a_loop():
    torch.manual_seed(0)
    b, rvq = book().codebook, RVQ(decay=0.9, epsilon=1e-3, dead=0)
    b.embed.normal_()
    b.embed_avg.copy_(b.embed * 3)
    b.cluster_size.fill_(3)
    size, total = b.cluster_size.tolist(), b.embed_avg.tolist()
    for _ in range(5):
        x = torch.randn(20, 3)
        codes = b.encode(x)
        follow(b, x, codes, rvq)
        for k in range(4):
            mine = [v for v, c in zip(x.tolist(), codes.tolist()) if c == k]
            size[k] = 0.9 * size[k] + 0.1 * len(mine)
            total[k] = [0.9 * t + 0.1 * sum(v[j] for v in mine) for j, t in enumerate(total[k])]
        n = sum(size)
        embed = [[t / ((size[k] + 1e-3) / (n + 4e-3) * n) for t in total[k]] for k in range(4)]
        torch.testing.assert_close(b.embed, torch.tensor(embed))
        torch.testing.assert_close(b.cluster_size, torch.tensor(size))


def test_dead_codes_revive():
    torch.manual_seed(0)
    b = book(codes=6)
    b.codebook.embed.copy_(torch.randn(6, 3) + torch.tensor([0, 0, 0, 1e3, 1e3, 1e3])[:, None])
    b.codebook.cluster_size.copy_(torch.tensor([9.0, 2.0, 5.0, 1.9, 0.0, 0.5]))
    b.codebook.embed_avg.copy_(b.codebook.embed * b.codebook.cluster_size[:, None])
    before, x = b.codebook.embed.clone(), torch.randn(50, 3)
    revive(b.codebook, x, RVQ(), RVQ().generator(0, 0))
    assert torch.equal(b.codebook.embed[:3], before[:3])
    assert all((v == x).all(1).any() for v in b.codebook.embed[3:]) and len(b.codebook.embed[3:].unique(dim=0)) == 3
    assert b.codebook.cluster_size.tolist() == [9, 2, 5, 2, 2, 2]
    torch.testing.assert_close(b.codebook.embed_avg[3:], 2 * b.codebook.embed[3:])
    used = b.codebook.encode(x).unique()
    residual_quantize([b], x.T[None], RVQ(), step=1)
    assert {3, 4, 5} <= set(used.tolist()) and (b.codebook.embed.abs() < 10).all()


def test_busy_codes_split():
    b, rvq = book(codes=6), RVQ(revival="split")
    b.codebook.embed.copy_(torch.randn(6, 3))
    b.codebook.cluster_size.copy_(torch.tensor([9.0, 3.9, 5.0, 1.9, 0.0, 0.5]))
    b.codebook.embed_avg.copy_(b.codebook.embed * b.codebook.cluster_size[:, None])
    before, x = b.codebook.embed.clone(), torch.randn(50, 3)
    revive(b.codebook, x, rvq, rvq.generator(0, 0))
    assert b.codebook.cluster_size.tolist() == [4.5, pytest.approx(3.9), 2.5, 4.5, 2.5, 0.5]       # 3.9 has no two halves of 2
    assert torch.equal(b.codebook.embed[[0, 1, 2, 5]], before[[0, 1, 2, 5]])
    for dead, busy in ((3, 0), (4, 2)):
        step = (b.codebook.embed[dead] - before[busy]) / 0.1 + before[busy]
        assert torch.isclose(step, x, atol=1e-4).all(1).any()
    rows = b.codebook.cluster_size[[0, 2, 3, 4], None] * b.codebook.embed[[0, 2, 3, 4]]
    torch.testing.assert_close(b.codebook.embed_avg[[0, 2, 3, 4]], rows)


def test_splitting_keeps_late_books_in_use():
    """What a late book sees is noise of many dimensions: there a code on a vector is the nearest to hardly any other."""
    used = {}
    for revival in ("vector", "split"):
        b, rvq, g = book(dim=64, codes=64, started=False), RVQ(decay=0.9, dead=0.5, revival=revival), torch.Generator()
        g.manual_seed(0)
        for step in range(60):
            residual_quantize([b], torch.randn(1, 64, 160, generator=g), rvq, step)
        used[revival] = len(b.codebook.encode(torch.randn(2000, 64, generator=g)).unique()) / 64
    assert used["split"] > 0.9 > 0.7 > used["vector"]


def test_autocast_leaves_codes_and_spectra_alone():
    model, audio, bank = codec(), sound(), PQMF()
    x, view = torch.randn(2, 48, 90), MultiFrequencyDiscriminator((32,), (32,)).views[0]
    exact = residual_quantize(model.quantizer.quantizers, x), sub_band_loss(0.9 * audio, audio, bank), view(audio[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        rough = residual_quantize(model.quantizer.quantizers, x), sub_band_loss(0.9 * audio, audio, bank), view(audio[:, 0])
        out = model.train()(audio, step=0)
        generator_losses(out, audio, bank)["loss"].backward()
    assert torch.equal(exact[0].codes, rough[0].codes) and exact[1] == rough[1] and torch.equal(exact[2], rough[2])
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_books_learn_in_training_only():
    model, audio = codec(), sound()
    state = copy.deepcopy(model.quantizer.state_dict())
    model(audio)
    assert all(torch.equal(state[k], v) for k, v in model.quantizer.state_dict().items())
    model.train()(audio, step=0, n_q=2)
    moved = [not torch.equal(state[f"quantizers.{i}.codebook.embed"], q.codebook.embed)
             for i, q in enumerate(model.quantizer.quantizers)]
    assert moved == [True, True, False, False]


def test_dropout_of_books_depends_on_seed_and_step_alone():
    model, audio = codec().train(), sound()
    drawn = [RVQ().draw(step, model.books) for step in range(300)]
    random.seed(5)
    assert drawn == [RVQ().draw(step, model.books) for step in range(300)]
    assert drawn != [RVQ(seed=1).draw(step, model.books) for step in range(300)]
    assert {n: drawn.count(n) > 70 for n in model.books} == {1: True, 2: True, 4: True}
    assert [model(audio, step=s).codes.shape[1] for s in range(4)] == drawn[:4]
    one, two = codec(filled=False).train(), codec(filled=False).train()
    one(audio, step=3)
    torch.manual_seed(9)
    two(audio, step=3)                                                          # torch's global state plays no part
    assert all(torch.equal(a, b) for a, b in zip(one.quantizer.buffers(), two.quantizer.buffers()))


def _rank(rank, path, x, rvq):
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    b = book(codes=8, started=False)
    for step in range(3):
        residual_quantize([b], x[step, rank:rank + 1], rvq, step)
    torch.save(b.state_dict(), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_two_processes_learn_as_one(tmp_path):
    x, rvq = torch.randn(3, 2, 3, 12, generator=torch.Generator().manual_seed(0)), RVQ(dead=2.5)
    mp.start_processes(_rank, (str(tmp_path), x, rvq), nprocs=2, start_method="fork")
    alone = book(codes=8, started=False)
    for step in range(3):
        residual_quantize([alone], x[step], rvq, step)
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


# losses and discriminator

@pytest.mark.parametrize("bands, decibels", [(4, 55), (6, 55), (8, 45)])
def test_sub_bands_give_the_sound_back(bands, decibels):
    bank, x = PQMF(bands), torch.randn(2, 1, bands * 400, generator=torch.Generator().manual_seed(0))
    y = bank.analysis(x)
    assert y.shape == (2, bands, 400)
    error = (bank.synthesis(y) - x)[..., 100:-100]
    assert 10 * math.log10(x.square().mean() / error.square().mean()) > decibels
    for k in range(bands):                                                      # a tone amid band k lies there alone
        tone = (math.pi * (k + 0.5) / bands * torch.arange(bands * 400)).sin()[None, None]
        power = bank.analysis(tone)[0, :, 50:-50].square().mean(1)
        assert power.argmax() == k and power[k] / power.sum() > 0.99


def test_spectral_losses_in_closed_form():
    real = torch.randn(2, 1, 4800, generator=torch.Generator().manual_seed(0))
    bank = PQMF()
    for a in (0.5, 1.0, 3.0):
        for convergence, log in (spectral_loss(a * real[:, 0], real[:, 0]), sub_band_loss(a * real, real, bank)):
            assert float(convergence) == pytest.approx(abs(a - 1), abs=1e-4)
            assert float(log) == pytest.approx(abs(math.log(a)), abs=1e-3)
    sine = 0.7 * (2 * math.pi * 64 / 1024 * torch.arange(4096)).sin()           # on bin 64: A / 2 * sum of the window
    peak = magnitude(sine[None], 1024, 240, 960)[0, :, 8]
    assert peak.argmax() == 64 and float(peak[64]) == pytest.approx(0.7 / 2 * 480, rel=1e-4)
    silence = torch.zeros(1, 4800, requires_grad=True)
    loss = sum(spectral_loss(silence, torch.zeros(1, 4800)))
    assert loss == 0 and torch.autograd.grad(loss, silence)[0].isfinite().all()
    with pytest.raises(ValueError, match="longer segments"):
        spectral_loss(real[:, 0, :1024], real[:, 0, :1024])


def test_adversarial_losses_in_closed_form():
    ones, halves = [torch.ones(2, 1, 3, 3), torch.ones(2, 1, 5, 2)], [torch.full((2, 1, 3, 3), 0.5), torch.zeros(2, 1, 5, 2)]
    assert adversarial_loss(ones) == 0 and adversarial_loss(halves) == (0.25 + 1) / 2
    assert discriminator_loss(fake=halves, real=ones) == 0.25 / 2
    real = [[torch.zeros(2, 3), torch.zeros(4)], [torch.zeros(1)]]
    fake = [[torch.full((2, 3), 3.0, requires_grad=True), torch.zeros(4)], [torch.full((1,), -6.0)]]
    assert feature_matching(fake, real) == 3 and feature_matching(real, real) == 0
    assert not feature_matching(real, fake).requires_grad                       # the real sound's features are a target
    with pytest.raises(ValueError, match="features=-1"):
        LossWeights(features=-1.0)


def test_discriminator():
    torch.manual_seed(0)
    judge = MultiFrequencyDiscriminator()
    assert [sum(isinstance(m, torch.nn.Conv2d) for m in j.modules()) for j in judge.judges] == [7] * 6
    assert [j.layers[-1].in_channels for j in judge.judges] == [64, 128, 256, 512, 512, 512]
    view = judge.views[2]                                                       # hop 128, fft 512
    tone = (2 * math.pi * 1000 / RATE * torch.arange(8192)).sin()[None]         # on bin 32
    linear, decibels = view(torch.cat([tone, 0 * tone]))[:, :, :, 20].transpose(0, 1)
    assert linear.shape == (2, 257)
    quiet = 1e-7**0.5 * view.mel.sum(0)                                         # silence: every bin at the floor
    torch.testing.assert_close(linear[1], quiet)
    torch.testing.assert_close(decibels[1], ((20 * quiet.log10() + 80) / 100).clamp(0, 1))
    bins = magnitude(tone, 512, 128, 512)[0, :, 20] / 512**0.5
    band = int(linear[0].argmax())                                              # mel(1000 Hz) of mel(8000 Hz), 257 bands
    mel = [2595 * math.log10(1 + f / 700) for f in (1000, 8000)]
    assert abs(band + 1 - mel[0] / mel[1] * 258) <= 1
    assert linear[0].max() <= bins.sum() and float(decibels[0, band]) == pytest.approx(
        min(1, (20 * math.log10(linear[0, band]) + 80) / 100), abs=1e-5)
    small = MultiFrequencyDiscriminator((32, 64), (64, 32))
    audio = sound(3, 1024).requires_grad_()
    scores, features = small(audio)
    assert [len(f) for f in features] == [6, 6] and [s.shape[0] for s in scores] == [3, 3]
    turned = small(audio.flip(0))[0]
    assert all(torch.allclose(a.flip(0), b, atol=1e-5) for a, b in zip(turned, scores))
    (adversarial_loss(scores) + feature_matching(features, [[0 * x for x in f] for f in features])).backward()
    assert audio.grad.isfinite().all() and audio.grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in small.parameters())
    with pytest.raises(ValueError, match="needs 512"):
        small(sound(1, 480))
    with pytest.raises(ValueError, match="multiples of 32"):
        MultiFrequencyDiscriminator((32,), (48,))


def test_generator_losses_are_a_weighted_sum():
    model, audio, judge = codec(), sound(), MultiFrequencyDiscriminator((32,), (32,))
    out, weights = model(audio), LossWeights(adversarial=2, features=3, full=5, sub=7, commit=11, semantic=13)
    terms = generator_losses(out, audio, PQMF(), weights, fake=judge(out.waveform), real=judge(audio))
    expected = sum(getattr(weights, name) * value for name, value in terms.items() if name != "loss")
    torch.testing.assert_close(terms["loss"], expected)
    assert set(terms) == {"adversarial", "features", "full", "sub", "commit", "semantic", "loss"}
    assert set(generator_losses(out, audio, PQMF(), LossWeights(semantic=0))) == {"full", "sub", "commit", "loss"}
    with pytest.raises(ValueError, match="belong together"):
        generator_losses(out, audio, PQMF(), fake=judge(audio))


def test_thirty_steps_learn():
    torch.manual_seed(0)
    model, judge, bank = codec(filled=False), MultiFrequencyDiscriminator((32, 64), (32, 32)), PQMF()
    held_out = sound(4, seed=99)
    generator = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, betas=(0.8, 0.99))
    critic = torch.optim.AdamW(judge.parameters(), lr=2e-4, betas=(0.8, 0.99))

    def reads():
        with torch.no_grad():
            out = model.eval()(held_out)
            return {k: float(v) for k, v in generator_losses(out, held_out, bank).items()}, out.codes

    before = None
    for step in range(30):
        audio = sound(4, seed=step)
        out = model.train()(audio, step=step, n_q=4 if step == 0 else None)
        losses = generator_losses(out, audio, bank, fake=judge(out.waveform), real=judge(audio))
        if before is None:
            before, _ = reads()                                                 # every book has started
        generator.zero_grad()
        losses["loss"].backward()
        generator.step()
        critic.zero_grad()
        discriminator_loss(judge(out.waveform.detach())[0], judge(audio)[0]).backward()
        critic.step()
    after, codes = reads()
    assert after["loss"] < before["loss"] / 2 and after["semantic"] < before["semantic"] / 2
    assert after["full"] < 0.8 * before["full"]
    used = [codes[:, i].unique().numel() for i in range(4)]                     # the first book chases what the teacher teaches
    assert min(used) > 8 and sum(used) > 2 * CODES
