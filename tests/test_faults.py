"""Kills, restarts and files that cannot be written or read: benchmarks/faults.py has many more."""

import contextlib
import errno
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import convert
import prepare_data
import processes
import supervised
import tiny
from benchmarks import faults
from benchmarks.runs import bits, differences, running
from common import Refusal, run, sources
from common.distributed import Group
from processes import Forked, finish, reach
from recorder import stopped

GOES_ON = "the same command with --resume goes on\n"
FREE = ["save_every", "eval_every", "workers"]  # flags that change no number


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiny.draw_tree(tmp_path_factory.mktemp("faults") / "tree")


def small(tree, out, *words, **more):
    numbers = dict(iters=12, log=1, evaluate=5, save=3, batch=4)
    return [*tiny.flags(tree, out, **numbers | more), "--resume", *words]


def words_of(argv, fault=None):
    """What a child of benchmarks/faults.py is told: supervised.py with one of its faults."""
    return json.dumps(["supervised", argv, fault])


def start(argv, count=1, fault=None, folder=processes.ROOT):
    return Forked([faults.__file__, "--child", words_of(argv, fault)], count, folder)


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The undisturbed runs: {processes: folder}."""
    folders = {count: tmp_path_factory.mktemp("whole") / "run" for count in (1, 2)}
    for count, folder in folders.items():
        finish(start(small(tree, folder), count))
    return folders


def test_a_worker_killed_under_torchrun_is_started_again(tree, tmp_path, whole):
    out, go = tmp_path / "run", tmp_path / "go"
    argv = [word for word in small(tree, out, workers=1) if word != "--resume"]  # restarts resume
    process = Forked([processes.__file__, words_of(argv, ("held", 8, str(go)))])
    reach(process, out, 5)
    os.kill(faults.tree_of(process.pid)[2], signal.SIGKILL)
    go.touch()
    assert "forcefully exiting" not in finish(process)  # the other ended by itself, with loaders
    assert differences(whole[2], out, but=FREE) == []


def test_torchrun_goes_on_alone_with_what_it_began(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = tiny.resolved(supervised, tiny.flags(tree, ""))
    data, group = supervised.load(args), Group(0, 1, torch.device("cpu"))

    def started():
        one = run.Run(args, supervised.__file__, group, data, supervised.preset)
        return one, one.folder.name, one.resume

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "getppid", lambda: 7)
    one, name, resume = started()
    assert not resume and started()[1:] == (name, False)  # killed before it wrote anything
    one.log("train", 1)
    assert started()[1:] == (name, True)
    monkeypatch.setattr(os, "getppid", lambda: 8)  # another torchrun
    assert started()[1:] == (f"{name}-2", False)


def test_an_error_ends_a_run_with_loaders(tree, tmp_path):
    """Loaders do not listen to SIGTERM, by which Python would end them at its own end."""
    process = start(small(tree, tmp_path / "run", workers=1), fault=("error", 3, 0))
    assert process.text().endswith("RuntimeError: as torch raises\n") and process.returncode == 1


def test_sigterm_to_one_of_two_processes_stops_both(tree, tmp_path, whole):
    """After the same step, which is saved and said once."""
    out, go = tmp_path / "run", tmp_path / "go"
    argv = small(tree, out, save=12, workers=1)
    process = start(argv, 2, ("held", 6, str(go)))
    reach(process, out, 2)
    os.kill(process.pids[1], signal.SIGTERM)
    go.touch()
    text = process.text()
    assert process.returncode == 143 and not any(map(running, process.pids))
    step = step_of(out / "last.pt")
    assert 2 < step < 12 and text.count(f"stopped by SIGTERM at step {step}; {GOES_ON}") == 1
    finish(start(argv, 2))
    assert differences(whole[2], out, but=FREE) == []


@pytest.mark.parametrize("late", [True, False], ids=["in the last scores", "before the last save"])
def test_sigterm_after_the_last_step_ends_at_once_and_resume_scores(
    late, tree, tmp_path, monkeypatch
):
    out, score = tmp_path / "run", supervised.evaluate

    def signalled(net, data, items, *rest):
        if (items is data.test) == late and (out / "last.pt").is_file():
            os.kill(os.getpid(), signal.SIGTERM)
        return score(net, data, items, *rest)

    argv = small(tree, out, iters=2, evaluate=2, save=2 if late else 1)
    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(supervised, "evaluate", signalled)
        tiny.run("supervised", argv)
    assert step_of(out / "last.pt") == 2 and '"done"' not in (out / "log.jsonl").read_text()
    tiny.run("supervised", argv)
    assert '"done"' in (out / "log.jsonl").read_text().splitlines()[-1]


def test_ctrl_c_ends_at_once(tree, tmp_path):
    process = start(small(tree, tmp_path / "run", iters=4000, workers=1))
    reach(process, tmp_path / "run", 2)
    for pid in faults.tree_of(process.pid):  # as a terminal does: to the loaders too
        os.kill(pid, signal.SIGINT)
    text = process.text()
    assert process.returncode == 130
    assert text.endswith(f"stopped; {GOES_ON}") and "Traceback" not in text


def test_ctrl_c_ends_prepare_data_with_130(monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "cli", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as left:
        prepare_data.main([])
    assert left.value.code == 130 and "the same command goes on" in capsys.readouterr().err


def flip(path):
    """Changes one bit in a tensor of a checkpoint."""
    content = bytearray(path.read_bytes())
    means = torch.load(path)["networks"]["student"]["backbone.bn1.running_mean"]
    content[content.index(bits(means))] ^= 1
    path.write_bytes(content)


DAMAGES = [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:2000])]


@pytest.mark.parametrize("damage", DAMAGES, ids=["a bit", "gone", "cut"])
def test_a_damaged_newest_checkpoint_is_named_and_the_older_used(
    damage, tree, tmp_path, capsys, whole
):
    """It never becomes the older one: a kill in the next save would leave nothing.

    Gone is what a kill between the two renames of a save leaves.
    """
    out = tmp_path / "run"
    paths = [out / "last.pt", out / "previous.pt"]
    for _ in range(2):
        stopped("supervised", small(tree, out), 10)
        assert [step_of(path) for path in paths] == [9, 6]
        damage(out / "last.pt")
    capsys.readouterr()
    tiny.run("supervised", small(tree, out))
    printed = capsys.readouterr().out
    assert f"{out}/last.pt: " in printed and "; the one before it is used" in printed
    assert "going on from step 6" in printed
    assert differences(whole[1], out) == []
    assert [step_of(path) for path in paths] == [12, 9]
    for path in paths:
        flip(path)
    with pytest.raises(Refusal, match="previous.pt: damaged"):
        tiny.run("supervised", small(tree, out))


def test_a_run_that_lives_has_its_folder_alone(tree, tmp_path, monkeypatch, whole):
    """Another start takes the next free name; with the same --out or --resume it is refused."""
    monkeypatch.chdir(tmp_path)
    argv = small(tree, "")[:-1]  # without --resume
    first, second = (start(argv, 1, ("held", 3, "go"), tmp_path) for _ in range(2))
    while len(folders := list(Path("runs").glob("*/log.jsonl"))) < 2:
        time.sleep(0.01)
    out = folders[0].parent
    for more, end in (([], "give another --out"), (["--resume"], "end it first")):
        with pytest.raises(Refusal, match=f"{end}$") as refused:
            tiny.run("supervised", [*argv, "--out", str(out), *more])
        living = rf"process ({first.pid}|{second.pid}) of {platform.node()} writes there"
        assert not more or re.search(living, str(refused.value))
    Path("go").touch()
    for process in (first, second):
        finish(process)
    assert [differences(whole[1], path.parent) for path in folders] == [[], []]


GONE = "log.jsonl: moved, removed or replaced while this run writes it"
NOT_THERE, NOT_IT = "beside it is not there: put that", "beside it is not the log that belongs"
LOGS = {  # what is done to it, and the refusals of a run that lives and of its resume
    "removed": (Path.unlink, GONE, NOT_THERE),
    "replaced": (lambda log: shutil.copy(log.rename(log.with_name("old")), log), GONE, ""),
    "cut": (lambda log: log.write_bytes(log.read_bytes()[:99]), "", NOT_IT),
    "changed": (lambda log: log.write_text(log.read_text().replace("loss", "lose")), "", NOT_IT),
}


@pytest.mark.parametrize("change, at_save, at_resume", LOGS.values(), ids=LOGS)
def test_a_foreign_log_is_refused(change, at_save, at_resume, tree, tmp_path, monkeypatch):
    log_step, argv = run.Run.log_step, small(tree, tmp_path)

    def changed(self, step, *rest):
        log_step(self, step, *rest)
        if step == 5:
            change(tmp_path / "log.jsonl")
        assert at_save or step < 5, "ended"

    monkeypatch.setattr(run.Run, "log_step", changed)
    for refusal in filter(None, (at_save or "ended", at_resume)):
        with pytest.raises(Exception, match=refusal):
            tiny.run("supervised", argv)
    assert step_of(tmp_path / "last.pt") == 3


def test_the_best_of_a_lost_future_goes_aside(tree, tmp_path, monkeypatch):
    """The one that the checkpoint names comes back."""
    rising, evaluate = itertools.count(1), supervised.evaluate
    argv, best = small(tree, tmp_path, evaluate=2, save=4), tmp_path / "best.pt"

    def better(*inputs):
        result, maps = evaluate(*inputs)
        return result | {"miou": next(rising) / 100}, maps

    monkeypatch.setattr(supervised, "evaluate", better)
    stopped("supervised", argv, 7)
    assert [step_of(best), step_of(tmp_path / "best-before.pt")] == [6, 4]
    stopped("supervised", argv, 5)
    assert [step_of(best), step_of(tmp_path / "best-2.pt")] == [4, 6]


@pytest.fixture
def exits(monkeypatch):
    """The end of a process is a SystemExit."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


MACHINE = {
    "worker (pid 7) is killed by signal: Bus error": "--workers 0, or a larger /dev/shm",
    "[Errno 24] Too many open files": "ulimit -n 4096",
    "DefaultCPUAllocator: can't allocate memory": "a smaller --batch-size",
    os.strerror(errno.ENOSPC): "no space left: ",
}


@pytest.mark.parametrize("text", MACHINE)
def test_a_machine_that_is_too_small_is_one_line(text, exits, capsys):
    with pytest.raises(SystemExit) as end, run.refusals():
        raise RuntimeError(text)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and text in line and MACHINE[text] in line


@pytest.mark.parametrize("flag", ["--help", "--list-presets"])
def test_a_reader_that_leaves_ends_a_command_quietly(flag, exits, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end, run.refusals():
        tiny.train(supervised, [flag])
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.close()
    assert (end.value.code, capsys.readouterr().err) == (128 + signal.SIGPIPE, "")


def test_a_closed_stdout_stops_nothing(tree, tmp_path, monkeypatch, whole):
    with open(tmp_path / "out", "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
    tiny.run("supervised", small(tree, tmp_path / "run"))
    assert differences(whole[1], tmp_path / "run") == []


def test_a_checkpoint_that_cannot_be_written(tree, tmp_path, whole):
    out = tmp_path / "run"
    process = start(small(tree, out), fault=("full", 3, 0.5))
    text = process.text()
    assert process.returncode == 2 and "Traceback" not in text
    line = f"{out}/last.pt: cannot be written (File too large); what was saved before is whole"
    assert text.splitlines()[-1].endswith(line) and step_of(out / "last.pt") == 3
    assert not list(out.glob("*.tmp"))
    tiny.run("supervised", small(tree, out))
    assert differences(whole[1], out) == []
    with pytest.raises(Refusal, match="cannot be written"):
        run.make_folder(Path("x" * 300))


@pytest.mark.parametrize("world, device, loaders", [(1, "cpu", 2), (2, "cpu", 0), (2, "cuda", 2)])
def test_no_loader_is_forked_for_an_evaluation_beside_gloo(world, device, loaders, monkeypatch):
    """docs/reliability.md: such a child may wait for ever."""
    asked = []
    monkeypatch.setattr(supervised, "DataLoader", lambda *_, **how: asked.append(how) or [])
    group = Group(0, world, SimpleNamespace(type=device))
    with pytest.raises(AttributeError):  # of a data set that is none
        args = SimpleNamespace(workers=2)
        supervised.evaluate(torch.nn.Identity(), SimpleNamespace(), range(8), args, group)
    assert asked[0]["num_workers"] == loaders


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_deterministic_run_is_allowed_what_it_needs(name, tree, tmp_path):
    """On a CPU; that it repeats itself on CUDA is a part of benchmarks/gpu.py."""
    argv = small(tree, tmp_path / "run", "--deterministic", "--ohem-kept", "0.3", iters=4, save=4)
    try:
        tiny.run(name, tiny.with_acting(name, argv))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


class Answer(io.BytesIO):
    headers = {"Content-Length": "many"}


def test_answers_that_no_server_should_give(tmp_path, monkeypatch):
    url, path = "https://host/list.txt", tmp_path / "list.txt"
    loop = "would lead to a loop.\nThe last was:\nFound"
    answers = Mock(side_effect=[Answer(b"a\n"), urllib.error.HTTPError(url, 302, loop, {}, None)])
    monkeypatch.setattr("urllib.request.OpenerDirector.open", answers)
    sources.download(url, path)
    assert path.read_bytes() == b"a\n"
    with pytest.raises(Refusal, match="would lead to a loop. The last was: Found$"):
        sources.download(url, path)


def test_what_a_killed_conversion_left_goes_and_a_living_ones_stays(tmp_path):
    old, new, other = (tmp_path / f".{name}" for name in ("a" * 32, "b" * 32, "hidden"))
    for file in (old, new, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (0, time.time() - 100))
    convert.clear_left(tmp_path)
    assert not old.exists() and new.exists() and other.exists()


@pytest.mark.parametrize("words, told", [("", 1), ("--crop-size 65", 1), ("--crop-size 64", 0)])
def test_check_tells_a_crop_larger_than_most_images(words, told, tmp_path, capsys):
    root = tiny.draw_folder(tmp_path, 2)
    for path in root.glob("*/*/*.png"):
        Image.open(path).resize((73, 64), Image.Resampling.NEAREST).save(path)
    flags = f"check --dataset folder --data-root {root} --num-classes 2 {words}".split()
    prepare_data.main(flags)
    text = capsys.readouterr().out
    assert text.count("warning: 8 of 8 images are smaller than a crop of") == told
    assert text.count("train with --crop-size 49\n") == told


@pytest.mark.parametrize("parts, every, words", [
    pytest.param("moves", 1, "put aside as best-2.pt, the run ends equal", marks=pytest.mark.slow),
    ("operations", 16, "supervised: 4 kills, all end equal: "),
    ("contents", 24, "refused in one line, "),
])  # fmt: skip
def test_some_of_the_faults_of_files(parts, every, words):
    """Equal runs, whole lines of the log kept, one line for each content that does not fit.

    Operations: half of last.pt, of best.pt and of a line are written.
    """
    flags = ["--files", "--parts", parts, "--every", every, "--scripts", "supervised"]
    assert words in finish(Forked([faults.__file__, *flags]))
