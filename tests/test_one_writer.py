"""Faults of files: a few of benchmarks/faults_files.py; downloads, readers and names that fail."""

import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
import urllib.error

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

import convert
import prepare_data
import processes
import tiny
from benchmarks import faults
from common import Refusal, run, sources


def test_a_reader_that_leaves_ends_a_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "supervised.py", "--help"]
    done = subprocess.run(command, cwd=tiny.ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_full_disk_is_no_reader_that_left(monkeypatch):
    remedy = run.machine_remedy(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert remedy.startswith("no space left: ")
    with pytest.raises(Refusal, match="cannot be written"):
        run.make_folder(tiny.Path("x" * 300))


class Answer(io.BytesIO):
    headers = {"Content-Length": "many"}


def test_answers_that_no_server_should_give(tmp_path, monkeypatch):
    url, path = "https://host/list.txt", tmp_path / "list.txt"
    opened = "urllib.request.OpenerDirector.open"
    monkeypatch.setattr(opened, lambda *_, **__: Answer(b"a\n"))
    bars = []

    def bar(**words):
        bars.append(words["disable"])
        return tqdm(**words)

    monkeypatch.setattr(sources, "tqdm", bar)
    sources.download(url, path)
    assert path.read_bytes() == b"a\n"
    sources.download(url, path, hashlib.md5(b"a\n").hexdigest())
    assert bars == [True, None]  # lists are small: no bar; of the rest one on a terminal

    def loop(*_, **__):
        raise urllib.error.HTTPError(
            url, 302, "would lead to a loop.\nThe last was:\nFound", {}, None
        )

    monkeypatch.setattr(opened, loop)
    with pytest.raises(Refusal, match="would lead to a loop. The last was: Found$"):
        sources.download(url, path)


def test_ctrl_c_ends_prepare_data_with_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "cli", interrupted)
    with pytest.raises(SystemExit) as left:
        prepare_data.main([])
    assert left.value.code == 130 and "the same command goes on" in capsys.readouterr().err


def test_what_a_killed_conversion_left_goes_and_a_living_ones_stays(tmp_path):
    old, new, other = (tmp_path / f".{name}" for name in ("a" * 32, "b" * 32, "hidden"))
    for file in (old, new, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (0, time.time() - 100))
    convert.clear_left(tmp_path)
    assert not old.exists() and new.exists() and other.exists()


@pytest.mark.parametrize("side, words, told", [(70, "", "65"), (200, "", "193"), (600, "", ""),
                                               (600, "--crop-size 700", "593")])  # fmt: skip
def test_check_tells_a_crop_larger_than_most_images(side, words, told, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part, i in (("train", 0), ("train", 1), ("val", 0)):
        for kind, shape in (("images", (side, side + 9, 3)), ("masks", (side, side + 9))):
            (tmp_path / kind / part).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 2, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / part / f"{i}.png")
    flags = f"check --dataset folder --data-root {tmp_path} --num-classes 2 {words}".split()
    prepare_data.main(flags)
    text = capsys.readouterr().out
    assert text.count("warning: 2 of 2 images are smaller") == bool(told)
    assert f"train with --crop-size {told}\n" in text or not told


@pytest.mark.parametrize("parts, every, words", [
    pytest.param("moves", 1, "put aside as best-2.pt, the run ends equal", marks=pytest.mark.slow),
    ("operations", 11, "supervised: 6 kills, all end equal: "),
    ("contents", 24, "refused in one line, "),
])  # fmt: skip
def test_some_of_the_faults_of_files(parts, every, words):
    """Equal runs, whole lines of the log kept, one line for each content that does not fit."""
    flags = ["--files", "--parts", parts, "--every", every, "--scripts", "supervised"]
    process = processes.Forked([faults.__file__, *flags])
    assert words in processes.finish(process)
