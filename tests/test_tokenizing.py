"""`mmcompress tokenize`: what it writes is what `tokenize_chunked` gives, whatever ends it, and nothing is done twice."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_codec import build, noise
from typer.testing import CliRunner

from mmcompress import cli, encoding, tokenizing
from mmcompress.audio.codec import AudioTokens, chunked, tokenize_chunked
from mmcompress.encoding import fingerprint, load_codec
from mmcompress.tokenized import CodeFolder, Source, read_manifest

soundfile = pytest.importorskip("soundfile")
RATE, FILES = 16_000, 200
runner = CliRunner()


def call(*args):
    return runner.invoke(cli.app, ["tokenize", *(str(a) for a in args)])


def output(*args, code=0):
    """What the command prints with --json: one object and nothing else."""
    result = call(*args, "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


def write(path, seconds=0.2, seed=0, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds, rate, seed).clamp(-1, 1).numpy(), rate, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny DAC."""
    folder = tmp_path_factory.mktemp("codec")
    build("dac").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(FILES):
        write(folder / f"speaker{i % 7}" / f"{i:03}.wav", 0.1 + 0.4 * i / FILES, i)
    return folder


@pytest.fixture(scope="module")
def expected(model, corpus):
    """Source -> its tokens, from this process."""
    codec = load_codec(str(model), "cpu").model
    return {str(path): tokenize_chunked(codec, path) for path in corpus.rglob("*.wav")}


def lines(out):
    path = out / "manifest.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def tree(out):
    """Code file -> (inode, time of change)"""
    return {str(p.relative_to(out)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.rglob("*.safetensors")}


def check(out, expected):
    """The manifest has every source once, with the codes of `expected`, and there is nothing else."""
    rows = lines(out)
    assert sorted(row["source"] for row in rows) == sorted(expected)
    assert sorted(row["file"] for row in rows) == sorted(tree(out)) and not (out / ".unfinished").exists()
    for row in rows:
        tokens, wanted = AudioTokens.load(out / row["file"]), expected[row["source"]]
        assert torch.equal(tokens.codes, wanted.codes) and torch.equal(tokens.lengths, wanted.lengths)
        assert (row["n_q"], row["frames"]) == (wanted.n_q, int(wanted.lengths))
        assert row["bytes"] == os.stat(out / row["file"]).st_size
        assert row["kbps"] == pytest.approx(wanted.kbps) and row["seconds"] == pytest.approx(float(wanted.seconds))
        assert (row["size"], row["mtime_ns"]) == (os.stat(row["source"]).st_size, os.stat(row["source"]).st_mtime_ns)


def children(pid):
    """Processes that are workers of `pid`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# what ends a run --------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux which processes there are")
@pytest.mark.parametrize("workers", (1, 2))
def test_a_killed_run_goes_on_where_it_was(tmp_path, model, corpus, expected, workers):
    out = tmp_path / "codes"
    arguments = [str(corpus), "--model", str(model), "--out", str(out), "--workers", str(workers), "--device", "cpu"]
    run = subprocess.Popen([sys.executable, "-m", "mmcompress", "tokenize", *arguments], stdout=subprocess.DEVNULL,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: len(lines(out)) >= 60 or run.poll() is not None)
        pids = children(run.pid) if run.poll() is None else []
    finally:
        run.kill()
        run.wait()
    assert len(pids) == (0 if workers == 1 else workers)
    wait_for(lambda: not any(map(alive, pids)))                         # none works on for nobody
    before = {row["file"] for row in lines(out)}
    assert 60 <= len(before) < FILES
    files = {name: stat for name, stat in tree(out).items() if name in before}
    assert len(files) == len(before)
    (out / ".unfinished").mkdir(exist_ok=True)
    (out / ".unfinished" / "7.safetensors").write_bytes(b"half")
    with (out / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"source": "/somewhere/el')                     # cut in the middle of a line
    result = output(*arguments)
    assert (result["skipped"], result["done"], result["failed"]) == (len(before), FILES - len(before), 0)
    check(out, expected)
    assert files.items() <= tree(out).items()                           # what was finished was not written again
    assert output(*arguments)["skipped"] == FILES


@pytest.fixture
def interruptible():
    """As from a terminal: a shell that starts tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_a_run_cleanly(tmp_path, model, corpus, expected, number):
    out = tmp_path / "codes"
    arguments = (corpus, "--model", model, "--out", out)

    def stop():
        wait_for(lambda: len(lines(out)) >= 10)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = output(*arguments, code=128 + number)
    thread.join()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert result["interrupted"] == number and not (out / ".unfinished").exists()
    noted = list(read_manifest(out))
    assert 10 <= len(noted) < FILES and 0 <= len(noted) - result["done"] <= 1       # it may come while a line is noted
    for name in tree(out):
        AudioTokens.load(out / name)                                    # no half files
    assert output(*arguments)["skipped"] == len(noted)
    check(out, expected)


@pytest.mark.usefixtures("interruptible")
def test_what_was_read_while_a_signal_came_is_not_believed(tmp_path, model, monkeypatch):
    """soundfile's callbacks swallow KeyboardInterrupt and the file seems to end: codes of half a file must not be noted."""
    paths = [write(tmp_path / "in" / f"{i}.wav", 0.4, i) for i in range(4)]
    whole = chunked.load

    def load(path, *args, **options):
        sound = whole(path, *args, **options)
        if Path(path) != paths[2]:
            return sound
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return replace(sound, samples=sound.samples[:2000])

    monkeypatch.setattr(chunked, "load", load)
    arguments = (tmp_path / "in", "--model", model, "--out", tmp_path / "out")
    assert output(*arguments, code=130)["done"] == 2
    monkeypatch.undo()
    assert output(*arguments)["done"] == 2
    codec = load_codec(str(model), "cpu").model
    check(tmp_path / "out", {str(p): tokenize_chunked(codec, p) for p in paths})


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux which processes there are")
def test_a_worker_that_dies_costs_one_file_and_the_end_of_a_run_ends_all(tmp_path, model, corpus, expected):
    out = tmp_path / "codes"
    task = encoding.Task(str(model), "cpu", out, 5, 60.0, None)
    with CodeFolder(out, {"n_q": 5}) as folder:
        jobs = folder.pending([Source(Path(path), Path(path).name) for path in expected])
        answers, found = encoding.by_workers(jobs, 1, task), []
        for job, answer in answers:
            found.append((job, answer))
            if len(found) == 5:
                first = children(os.getpid())
                os.kill(first[0], signal.SIGKILL)
            if len(found) == 120:
                break
        workers = children(os.getpid())
        assert len(first) == len(workers) == 1 and first != workers         # there is another
        answers.close()
        assert not any(map(alive, workers))
    [failed] = [(job, answer) for job, answer in found if isinstance(answer, str)]
    assert "exit code -9" in failed[1]
    assert len({job for job, _ in found}) == 120
    for job, answer in found:
        if job is not failed[0]:
            assert answer.source == job.source
            assert torch.equal(AudioTokens.load(out / answer.file).codes, expected[job.source].codes)


def test_workers_that_cannot_load_the_model_say_why(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    task = encoding.Task(str(tmp_path), "cpu", tmp_path, 5, 60.0, None)
    with pytest.raises(OSError, match="model_type 'bert'"):
        list(encoding.by_workers([encoding.Job("a", "b")], 1, task))


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path, model, monkeypatch):
    """Not one failure after the other: the disk is full for all."""
    for i in range(3):
        write(tmp_path / "in" / f"{i}.wav")
    asked = []
    monkeypatch.setattr(encoding, "write_codes", lambda *a: asked.append(a) or (_ for _ in ()).throw(OSError("disk full")))
    result = call(tmp_path / "in", "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "disk full" in result.stderr and len(asked) == 1


# what is done again -----------------------------------------------------------------------------------------------------

def test_what_changed_is_done_again_and_nothing_else(tmp_path, model):
    codec = load_codec(str(model), "cpu").model
    paths = [write(tmp_path / "in" / f"{name}.wav", 0.2, i) for i, name in enumerate("abcdef")]
    out = tmp_path / "out"
    arguments = (tmp_path / "in", "--model", model, "--out", out)
    assert output(*arguments)["done"] == 6
    before = tree(out)
    write(paths[0], 0.4, seed=9)                                        # another size
    os.utime(paths[1], ns=(1, os.stat(paths[1]).st_mtime_ns + 1))       # another time
    (out / "in" / "c.wav.safetensors").unlink()
    with (out / "in" / "d.wav.safetensors").open("r+b") as file:
        file.truncate(20)
    rows = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text("\n".join(rows[:4] + [rows[4]]))        # e's has no end, f's is not there
    result = output(*arguments)
    assert (result["done"], result["skipped"]) == (5, 1)
    check(out, {str(path): tokenize_chunked(codec, path) for path in paths})
    after = tree(out)
    assert [name for name in before if before[name] == after[name]] == ["in/e.wav.safetensors"]


def test_a_source_that_became_unreadable_leaves_no_old_codes(tmp_path, model):
    path, out = write(tmp_path / "in" / "a.wav"), tmp_path / "out"
    assert output(path, "--model", model, "--out", out)["done"] == 1
    path.write_text("no sound")
    assert output(path, "--model", model, "--out", out, code=1)["failed"] == 1
    assert not tree(out) and not lines(out)


def test_what_is_not_asked_for_again_stays(tmp_path, model):
    a, b, out = write(tmp_path / "a.wav"), write(tmp_path / "b.wav", seed=1), tmp_path / "out"
    output(a, "--model", model, "--out", out)
    output(b, "--model", model, "--out", out)
    a.unlink()
    assert output(b, "--model", model, "--out", out)["skipped"] == 1
    assert [row["file"] for row in lines(out)] == ["a.wav.safetensors", "b.wav.safetensors"] and len(tree(out)) == 2


def test_files_that_cannot_be_read_do_not_stop_the_others(tmp_path, model):
    folder, out = tmp_path / "in", tmp_path / "out"
    good = [write(folder / name, seed=i) for i, name in enumerate(("a.wav", "z.flac"))]
    bad = {"empty.wav": b"", "text.mp3": b"not a sound", "cut.wav": write(folder / "cut.wav", 0.3).read_bytes()[:2000]}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    result = call(folder, "--model", model, "--out", out)
    assert result.exit_code == 1 and "2 files done, 0 skipped, 3 failed" in result.stdout
    reported = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(reported) == 3 and all(any(str(folder / name) in line for line in reported) for name in bad)
    assert any("empty (0 bytes)" in line for line in reported) and any("cut off or damaged" in line for line in reported)
    write(folder / "cut.wav", 0.3)                                      # mended
    result = output(folder, "--model", model, "--out", out, code=1)
    assert (result["done"], result["skipped"], result["failed"]) == (1, 2, 2)
    assert {f["source"] for f in result["failures"]} == {str(folder / "empty.wav"), str(folder / "text.mp3")}
    codec = load_codec(str(model), "cpu").model
    check(out, {str(p): tokenize_chunked(codec, p) for p in (*good, folder / "cut.wav")})


# names ------------------------------------------------------------------------------------------------------------------

def test_no_two_sources_share_a_code_file(tmp_path, model):
    """One name with two suffixes, in several folders, in other letters, and folders of one name; each source once."""
    given = [tmp_path / "x" / "corpus", tmp_path / "y" / "corpus", tmp_path / "x" / "single.wav", tmp_path / "y" / "single.wav"]
    paths = [*(given[0] / name for name in ("a.wav", "a.flac", "A.wav", "sub/a.wav")), given[1] / "a.wav", *given[2:]]
    for i, path in enumerate(paths):
        write(path, 0.1 + 0.05 * i, i)
    (given[0] / "notes.txt").write_text("no sound")
    (given[0] / "._a.wav").write_text("no sound either")
    codec, out = load_codec(str(model), "cpu").model, tmp_path / "out"
    expected = {str(path): tokenize_chunked(codec, path) for path in paths}
    arguments = (*given, paths[0], tmp_path / "x" / ".." / "x" / "single.wav", "--model", model, "--out", out)
    assert output(*arguments)["done"] == len(paths)
    check(out, expected)
    names = {row["file"].casefold() for row in lines(out)}
    assert len(names) == len(paths)
    assert {"corpus/a.flac.safetensors", "corpus/sub/a.wav.safetensors", "single.wav.safetensors"} <= names
    before = tree(out)
    assert output(*reversed(given), "--model", model, "--out", out)["skipped"] == len(paths)   # in any order
    assert tree(out) == before


def test_long_names_fit(tmp_path, model):
    paths = [write(tmp_path / "in" / ("ü" * 120 + end + ".wav"), seed=i) for i, end in enumerate("ab")]
    assert output(tmp_path / "in", "--model", model, "--out", tmp_path / "out")["done"] == 2
    codec = load_codec(str(model), "cpu").model
    check(tmp_path / "out", {str(p): tokenize_chunked(codec, p) for p in paths})


def test_names_that_are_not_utf8(tmp_path, model):
    path = os.fsencode(write(tmp_path / "in" / "a.wav")).replace(b"a.wav", b"\xe9.wav")
    try:
        os.rename(tmp_path / "in" / "a.wav", path)
    except OSError:
        pytest.skip("this file system has only UTF-8")
    assert output(tmp_path / "in", "--model", model, "--out", tmp_path / "out")["done"] == 1
    assert output(tmp_path / "in", "--model", model, "--out", tmp_path / "out")["skipped"] == 1
    Path(os.fsdecode(path)).write_bytes(b"broken")
    [failure] = output(tmp_path / "in", "--model", model, "--out", tmp_path / "out", code=1)["failures"]
    assert r"\udce9.wav" in failure["source"]


# settings ---------------------------------------------------------------------------------------------------------------

def test_other_settings_are_refused(tmp_path, model):
    path, out = write(tmp_path / "a.wav"), tmp_path / "out"
    other = tmp_path / "other"
    weights = load_codec(str(model), "cpu").model
    with torch.no_grad():
        next(weights.parameters()).view(-1)[0] += 1e-3
    weights.save_pretrained(other)
    base = (path, "--out", out, "--model")
    output(*base, model, "--n-q", 3)
    before = tree(out), (out / "settings.json").read_text()
    for options, words in (((model,), ("n_q=3", "n_q=5")), ((other, "--n-q", 3), (f"model={model}", f"model={other}")),
                           ((model, "--n-q", 3, "--chunk", 30), ("chunk=60.0", "chunk=30.0")),
                           ((model, "--n-q", 3, "--context", 1), ("context=None", "context=1.0"))):
        result = call(*base, *options)
        assert result.exit_code == 2 and "pass another --out" in result.stderr
        assert all(word in result.stderr for word in words), result.stderr
        assert (tree(out), (out / "settings.json").read_text()) == before
    moved = shutil.copytree(model, tmp_path / "moved")                  # the same weights, and the same books
    assert output(*base, moved, "--kbps", 0.9)["skipped"] == 1
    assert fingerprint(load_codec(str(moved), "cpu").model) == json.loads(before[1])["fingerprint"] != fingerprint(weights)


def test_the_codes_are_those_that_the_options_ask_for(tmp_path, model):
    path = write(tmp_path / "a.wav", 1.3)
    codec = load_codec(str(model), "cpu").model
    for options, wanted in ((("--kbps", 0.7), dict(kbps=0.7)), (("--tokens-per-second", 210), dict(tokens_per_second=210)),
                            (("--n-q", 1, "--chunk", 0.3, "--context", 0), dict(n_q=1, chunk=0.3, context=0))):
        out = tmp_path / options[0].strip("-")
        output(path, "--model", model, "--out", out, *options)
        check(out, {str(path): tokenize_chunked(codec, path, **wanted)})
    whole, cut = tokenize_chunked(codec, path, n_q=1), AudioTokens.load(tmp_path / "n-q" / "a.wav.safetensors")
    assert not torch.equal(whole.codes, cut.codes)                      # so that chunk and context are seen to arrive


def test_one_run_at_a_time(tmp_path, model):
    pytest.importorskip("fcntl")
    path = write(tmp_path / "a.wav")
    with CodeFolder(tmp_path / "out", {"n_q": 5}):
        result = call(path, "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "another run is writing" in result.stderr


def test_what_makes_no_sense_is_refused_at_once(tmp_path, model, monkeypatch):
    path, out = write(tmp_path / "a.wav"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for arguments, message in (((path, "--n-q", 2, "--kbps", 1), "--n-q and --kbps: each says"),
                               ((path, "--tokens-per-second", 50, "--kbps", 1), "--kbps and --tokens-per-second"),
                               ((path, "--n-q", 9), "n_q=9: pass an int in 1"), ((path, "--kbps", 0.1), "kbps=0.1: one book"),
                               ((path, "--workers", 0), "--workers 0: at least 1"), ((path, "--chunk", 0), "chunk=0.0"),
                               ((path, "--context", -1), "context=-1.0"), ((path, "--device", "cuda:99"), "no such device"),
                               ((tmp_path / "empty",), "holds no file that is named like a sound"),
                               ((tmp_path / "none.wav",), "does not exist"), ((path, "--model", tmp_path / "bert"), "'bert'")):
        result = call("--model", model, "--out", out, *arguments)
        assert result.exit_code == 2 and message in result.stderr, result.stderr
        assert not out.exists()
    monkeypatch.setattr(tokenizing, "device_of", lambda name: "cuda")
    result = call("--model", model, "--out", out, path, "--workers", 2)
    assert result.exit_code == 2 and "on cuda one process does the work" in result.stderr


def test_the_summary_says_what_was_done(tmp_path, model):
    paths = [write(tmp_path / "in" / f"{i}.wav", 0.2 + 0.1 * i, i) for i in range(4)]
    arguments = (tmp_path / "in", "--model", model, "--out", tmp_path / "out", "--n-q", 2)
    result = output(*arguments)
    frames = [-(-soundfile.info(p).frames // 320) for p in paths]
    assert (result["done"], result["skipped"], result["failed"], result["failures"]) == (4, 0, 0, [])
    assert result["tokens"] == 2 * sum(frames) and result["seconds"] == pytest.approx(sum(frames) / 50)
    assert (result["n_q"], result["kbps"], result["interrupted"]) == (2, pytest.approx(0.6), None)
    assert result["realtime"] == pytest.approx(result["seconds"] / result["took"])
    shutil.rmtree(tmp_path / "out")
    shown = call(*arguments)
    assert shown.exit_code == 0 and "4 files done, 0 skipped, 0 failed" in shown.stdout
    assert f"{2 * sum(frames)} tokens, 2 a frame, nominally 0.6 kbps" in shown.stdout
