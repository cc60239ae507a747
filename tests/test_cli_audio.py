"""`mmcompress run` and `viz` on recordings, as a user types them, on tiny checkpoints with their processors."""

import base64
import io
import json

import av
import numpy as np
import pytest
import soundfile
import tiny_audio
import torch
import transformers
from PIL import Image
from tiny import EOS, IMAGE, PAD, VOCAB
from tiny_video import VIDEO
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import mmcompress
from mmcompress import asking, cli
from mmcompress.checkpoint import HEARING, hearing_rate, load

RATE, WINDOW = 16_000, 2                        # of the checkpoints: samples a second, and seconds that they hear at a time
QUESTION = "w5 w6 w7"
runner = CliRunner()


def call(*args):
    return runner.invoke(cli.app, [str(a) for a in args])


def output(*args):
    """What a command prints with --json: one object and nothing else."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def sound(seconds, rate=RATE):
    """A tone that goes on and off over a little noise."""
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.3 * np.sin(2 * np.pi * 440 * t) * (t % 0.5 < 0.3) + 0.01 * noise).astype(np.float32)


def extractor():
    return transformers.WhisperFeatureExtractor(feature_size=tiny_audio.BINS, chunk_length=WINDOW, sampling_rate=RATE)


def words(extra, named=False):
    """A tokenizer whose token of id n is "wn", or what `extra` calls it; `named`: "<|x|>" is its attribute x_token, too."""
    vocab = {extra.get(n, f"w{n}"): n for n in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [name for n, name in extra.items() if n not in (PAD, EOS)]
    if named:
        marks = {f"{name.strip('<|>').lower()}_token": name for name in marks}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=extra[PAD], eos_token=extra[EOS],
                                                unk_token="w3", extra_special_tokens=marks)


def save_qwen2_audio(folder):
    tokenizer = words({PAD: "<pad>", EOS: "<|im_end|>", 1: "<|im_start|>", tiny_audio.AUDIO: "<|AUDIO|>",
                       tiny_audio.BOA: "<|audio_bos|>", tiny_audio.EOA: "<|audio_eos|>"})
    transformers.Qwen2AudioProcessor(extractor(), tokenizer).save_pretrained(folder)
    tiny_audio.build("qwen2_audio").save_pretrained(folder)


TEMPLATE = """{% for m in messages %}{% for c in m["content"] %}{% if c["type"] == "audio" %}AUDIO{% elif c["type"]=="video" %}
VIDEO{% else %} {{ c["text"] }}{% endif %}{% endfor %}{% endfor %}""".replace("VIDEO", "<|vision_bos|><|VIDEO|><|vision_eos|>")


def save_audioflamingo3(folder):
    tokenizer = words({PAD: "<pad>", EOS: "<end>", tiny_audio.AUDIO: "<sound>"})
    transformers.AudioFlamingo3Processor(extractor(), tokenizer, chat_template=TEMPLATE.replace("AUDIO", "<sound>")
                                         ).save_pretrained(folder)
    tiny_audio.build("audioflamingo3").save_pretrained(folder)


def save_omni(folder):
    """Qwen2.5-Omni as its checkpoints are: the part that reads prompts lies within."""
    tokenizer = words({PAD: "<pad>", EOS: "<end>", tiny_audio.AUDIO: "<|AUDIO|>", tiny_audio.BOA: "<|audio_bos|>",
                       tiny_audio.EOA: "<|audio_eos|>", IMAGE: "<|IMAGE|>", VIDEO: "<|VIDEO|>",
                       tiny_audio.VISION_START: "<|vision_bos|>", tiny_audio.VISION_END: "<|vision_eos|>"}, named=True)
    sight = dict(patch_size=4, merge_size=2, temporal_patch_size=2)
    template = TEMPLATE.replace("AUDIO", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    transformers.Qwen2_5OmniProcessor(
        transformers.Qwen2VLImageProcessor(**sight), transformers.Qwen2VLVideoProcessor(**sight, cap_pixels_per_frame=False),
        extractor(), tokenizer, chat_template=template).save_pretrained(folder)
    thinker = tiny_audio.build("qwen2_5_omni_thinker")
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    model.thinker.load_state_dict(thinker.state_dict())
    model.save_pretrained(folder)


def write_film(path):
    """A second and a half: eight frames a second, and a sound."""
    with av.open(str(path), "w") as out:
        film, track = out.add_stream("libx264", rate=8), out.add_stream("aac", rate=RATE)
        film.height, film.width, film.pix_fmt, track.layout = 64, 64, "yuv420p", "mono"
        for i in range(12):
            out.mux(film.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8), format="rgb24")))
        for at, part in enumerate(np.split(sound(1.536), 24)):
            frame = av.AudioFrame.from_ndarray(part[None], format="fltp", layout="mono")
            frame.rate, frame.pts = RATE, 1024 * at
            out.mux(track.encode(frame))
        out.mux([*film.encode(None), *track.encode(None)])


def save_whisper(folder):
    """Whisper without languages, whose tokenizer knows the 256 bytes, its marks and the timestamps of a window."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>",
             "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer = transformers.WhisperTokenizer(vocab={c: i for i, c in enumerate(letters)} | {names[0]: len(letters)}, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": names[1:]})
    tokenizer.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(50 * WINDOW + 1)])
    number = tokenizer.convert_tokens_to_ids
    transformers.WhisperProcessor(extractor(), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=tiny_audio.BINS, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=tiny_audio.STATES, max_target_positions=64, pad_token_id=number(names[0]), init_std=0.2,
        bos_token_id=number(names[0]), eos_token_id=number(names[0]), decoder_start_token_id=number(names[1]),
        suppress_tokens=None, begin_suppress_tokens=None)
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        is_multilingual=False, max_length=12, no_timestamps_token_id=number(names[-1]), max_initial_timestamp_index=50,
        suppress_tokens=[number(n) for n in names[1:]], decoder_start_token_id=number(names[1]), bos_token_id=number(names[0]),
        eos_token_id=number(names[0]), pad_token_id=number(names[0]))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with recordings, a film, a picture and four checkpoints."""
    folder = tmp_path_factory.mktemp("files")
    for name, seconds, rate in (("short.wav", 1.5, RATE), ("long.wav", 4.6, RATE), ("slow.wav", 1.5, 8000)):
        soundfile.write(folder / name, sound(seconds, rate), rate)
    Image.new("RGB", (336, 168), "red").save(folder / "picture.png")
    builds = {"chat": save_qwen2_audio, "whisper": save_whisper, "af3": save_audioflamingo3, "omni": save_omni}
    for name, build in builds.items():
        build(folder / name)
    write_film(folder / "film.mp4")
    return folder


def ask(files, *more, model="chat"):
    return ("run", "--model", files / model, "--prompt", QUESTION, "--max-new-tokens", "2", *more)


def listen(files, *more):
    return ("run", "--model", files / "whisper", *more)


def counts(got):
    return [(i["modality"], i["tokens_before"], i["tokens_after"]) for i in got["report"]["items"]]


def test_a_chat_model_answers_as_the_stock_model_does(files):
    model, processor = load(str(files / "chat"), "cpu", "auto", "sdpa")
    heard = mmcompress.audio.load(files / "short.wav")
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": QUESTION}]}],
                                         add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, audio=[heard.samples.numpy()], sampling_rate=RATE, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    got = output(*ask(files, "--audio", files / "short.wav", "--audio-reducer", "stride", "--keep", "1.0"))
    assert got["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert counts(got) == [("audio", 37, 37)] and got["report"]["prompt_before"] == inputs["input_ids"].shape[1]


def test_run_says_what_was_read_and_what_was_saved(files, tmp_path):
    got = output(*ask(files, "--audio", files / "long.wav", "--start", 0.5, "--end", 1.7, "--audio-reducer", "mean_pool",
                      "--keep", 10, "--plot", tmp_path / "new" / "spans.png"))
    assert got["recording"] == {"path": str(files / "long.wav"), "seconds": 1.2, "start": 0.5, "end": 1.7, "sample_rate": RATE,
                                "source_rate": RATE, "source_channels": 1}
    assert counts(got) == [("audio", 30, 10)] and got["report"]["prompt_before"] - got["report"]["prompt_after"] == 20
    assert got["clip"] is None and Image.open(got["plot"]).size[0] > 1000


@pytest.mark.parametrize("name,seconds", [("short.wav", 1.5), ("long.wav", 4.6)])
def test_whisper_writes_down_what_the_stock_model_does(files, name, seconds):
    """Over one window, and over as many as the recording needs, with nothing cut off."""
    model, processor = load(str(files / "whisper"), "cpu", "auto", "sdpa")
    samples, long = mmcompress.audio.load(files / name).samples.numpy(), seconds > WINDOW
    inputs = processor(audio=samples, sampling_rate=RATE, return_tensors="pt", truncation=False, return_attention_mask=True,
                       padding="longest" if long else "max_length")
    ids = model.generate(inputs["input_features"], attention_mask=inputs["attention_mask"], return_timestamps=long or None,
                         do_sample=False)
    got = output(*listen(files, "--audio", files / name, "--audio-reducer", "stride", "--keep", "1.0"))
    assert got["answer"] == processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip() and got["prompt"] is None
    assert got["recording"]["seconds"] == seconds
    assert len(counts(got)) >= seconds / WINDOW and set(counts(got)) == {("audio", 100, 100)}


def test_whisper_with_fewer_states(files, tmp_path):
    result = call(*listen(files, "--audio", files / "long.wav", "--audio-reducer", "mean_pool", "--keep", "20",
                          "--plot", tmp_path / "spans.png"))
    assert result.exit_code == 0, result.stderr
    assert "MeanPool(keep=20)" in result.stdout and "audio 2 (prompt 0): 100 -> 20 tokens" in result.stdout
    assert Image.open(tmp_path / "spans.png").format == "PNG"


def test_a_long_recording_is_several_windows_of_a_model_that_takes_them(files):
    got = output(*ask(files, "--audio", files / "long.wav", "--audio-reducer", "mean_pool", model="af3"))
    assert counts(got) == [("audio", 115, 28)] and got["recording"]["seconds"] == 4.6


def test_a_film_and_its_sound(files):
    """Both from one file, by the part of Qwen2.5-Omni that reads prompts; frames stand where the film has them."""
    both = ("--audio", files / "film.mp4", "--video", files / "film.mp4", "--frames", 4)
    got = output(*ask(files, *both, "--audio-reducer", "stride", "--keep", 9, model="omni"))
    (seen, _, every), heard = counts(got)
    assert seen == "video" and every > 0 and heard == ("audio", 38, 9) and got["clip"]["frames"] == 4
    model, processor = load(str(files / "omni"), "cpu", "auto", "sdpa")
    assert type(model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    shown = asking.open_shown([], files / "film.mp4", frames=4, audio=files / "film.mp4")
    seconds = asking.inputs_of(model, processor, shown, QUESTION)["video_second_per_grid"]
    assert float(seconds[0]) == pytest.approx(2 * np.diff(shown.clip.timestamps).mean())


def test_a_budget_decides_how_many_are_kept(files):
    short = ("--audio", files / "short.wav", "--audio-reducer", "stride")
    assert counts(output(*ask(files, *short, "--budget", "12"))) == [("audio", 37, 12)]
    assert counts(output(*ask(files, *short, "--budget", "0.5"))) == [("audio", 37, 18)]


def test_a_file_is_read_at_the_rate_of_the_model(files):
    got = output(*ask(files, "--audio", files / "slow.wav", "--audio-reducer", "stride"))
    assert (got["recording"]["source_rate"], got["recording"]["sample_rate"]) == (8000, RATE) and counts(got)[0][1] == 37
    assert hearing_rate(str(files / "chat")) == RATE


@pytest.mark.parametrize("model,before", [("chat", 37), ("whisper", 100)])
def test_viz(files, tmp_path, model, before):
    got = output("viz", "--audio", files / "short.wav", "--model", files / model, "--out", tmp_path / "spans.png", "--method",
                 "mean_pool", "--keep", 10)
    assert (got["tokens_before"], got["tokens_after"], got["reducer"]) == (before, 10, "MeanPool(keep=10)")
    pixels = np.asarray(Image.open(tmp_path / "spans.png").convert("RGB"))
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def one_line(result, word):
    assert result.exit_code == 2 and result.stdout == "", (result.exit_code, result.stdout)
    said = [line for line in result.stderr.splitlines() if not line.startswith("[transformers]")]
    assert len(said) == 1 and said[0].startswith("error: ") and word in said[0], result.stderr


@pytest.mark.parametrize("model,more,word", [
    ("chat", ("--audio", "lost.wav"), "lost.wav does not exist"), ("chat", ("--audio", "picture.png"), "picture.png"),
    ("chat", ("--audio", "long.wav", "--audio-reducer", "stride"),
     "4.6 s, and Qwen2AudioProcessor hears 2.0 s at most; pass --end 2"),
    ("chat", ("--audio", "short.wav", "--start", "9"), "start=9"), ("chat", ("--end", "3"), "--audio FILE"),
    ("chat", ("--image", "picture.png", "--end", "3"), "--end without --video or --audio"),
    ("chat", ("--image", "picture.png"), "--image: Qwen2AudioForConditionalGeneration sees no pictures"),
    ("chat", ("--image", "picture.png", "--audio-reducer", "stride"), "without --audio"),
    ("chat", ("--audio", "short.wav", "--audio-reducer", "globalcom2"), "known: "),
    ("chat", ("--audio", "short.wav", "--audio-reducer", "stride", "--keep", "2", "--budget", "3"), "pass one of them"),
    ("chat", ("--audio", "short.wav", "--audio-reducer", "stride", "--budget", "much"), "--budget much"),
    ("chat", ("--audio", "short.wav", "--config", "a.yaml", "--budget", "3"), "not both"),
    ("whisper", ("--audio", "short.wav", "--audio-reducer", "stride"), "takes no question; leave it out"),
    ("pico", ("--audio", "short.wav"),
     "the embedded model does not hear; pass --model with a folder or hub id such as openai/whisper"),
])
def test_user_errors_are_one_line(files, monkeypatch, model, more, word):
    monkeypatch.chdir(files)
    args = list(ask(files, *more))
    args[2] = model
    one_line(call(*args), word)


def test_errors_of_whisper_and_of_a_missing_question(files, monkeypatch):
    monkeypatch.chdir(files)
    both = ("--image", "picture.png", "--audio", "short.wav", "--image-reducer", "uniform")
    one_line(call(*listen(files, *both)), "sees no pictures")
    one_line(call("run", "--model", "chat", "--audio", "short.wav", "--audio-reducer", "stride"), "--prompt is missing")
    one_line(call("viz", "--model", "whisper", "--audio", "long.wav", "--method", "stride", "--out", "o.png"), "2 s at a time")
    one_line(call("viz", "--image", "picture.png", "--audio", "short.wav", "--out", "o.png"), "one of them")


def test_voxtral_is_given_the_recording_within_the_conversation(files):
    class Processor:
        def apply_chat_template(self, conversation):
            return conversation

    shown = asking.open_shown([], None, audio=files / "short.wav")
    [turn] = asking._conversation(Processor(), shown, QUESTION)
    sound_part, text_part = turn["content"]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound_part["base64"])), dtype="float32")
    assert rate == RATE and (samples == shown.recording.sound.samples.numpy()).all()
    assert text_part == {"type": "text", "text": QUESTION} and sound_part["type"] == "audio"


def test_defaults_are_registered():
    assert all(name in mmcompress.available(slot) for slot, name in cli.DEFAULTS.items())
    assert set(cli.DEFAULTS) == set(cli.QUESTIONS)


def test_model_types_that_hear_are_the_adapters_that_do():
    from importlib import import_module

    from mmcompress.adapters import _ADAPTERS, _INSIDE

    classes = {kind: getattr(import_module(f"mmcompress.adapters.{t.partition(':')[0]}"), t.partition(":")[2])
               for kind, t in _ADAPTERS.items()}
    assert set(HEARING) == {kind for kind, adapter in classes.items() if adapter.audio_inputs} | set(_INSIDE)
