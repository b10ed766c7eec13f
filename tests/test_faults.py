"""Kills, restarts and files that cannot be written or read: benchmarks/faults.py has many more."""

import itertools
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import processes
import recorder
import supervised
import tiny
from benchmarks import faults
from benchmarks.runs import bits, differences, running
from common import Refusal, run
from common.distributed import Group
from processes import finish, reach, start

GOES_ON = "the same command with --resume goes on\n"
FREE = ["save_every", "eval_every", "workers"]  # flags that change no number


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiny.draw_tree(tmp_path_factory.mktemp("faults") / "tree")


def small(tree, out, *words, **more):
    numbers = dict(iters=12, log=1, evaluate=5, save=3, batch=4)
    return [*tiny.flags(tree, out, **numbers | more), "--resume", *words]


def faulty(name, argv, count=1, fault=None, apart=False):
    """A started child of benchmarks/faults.py, with one of its faults."""
    words = json.dumps([name, argv, fault])
    return processes.Forked([faults.__file__, "--child", words], count, apart=apart)


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def train(argv, patch, module=supervised):
    with patch.context() as own:
        tiny.shrink(module, own)
        tiny.train(module, argv)


def stopped(argv, patch, step):
    with patch.context() as own, pytest.raises(KeyboardInterrupt):
        recorder.stop_in(own, step)
        train(argv, own)


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The undisturbed runs: {processes: folder}."""
    folders = {count: tmp_path_factory.mktemp("whole") / "run" for count in (1, 2)}
    for count, folder in folders.items():
        finish(start("supervised", small(tree, folder), count))
    return folders


KILLS = [("supervised", 1, ["checkpoint", "renames"], 2), ("cps_fpl", 2, ["log"], 6)]


@pytest.mark.parametrize("name, count, kinds, at", KILLS)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    name, count, kinds, at, tmp_path, monkeypatch
):
    """Half way through the second save, between the second renames, in the sixth line."""

    def quick(name, argv, *rest):  # begun at once, without torchrun, and with no loader to start
        return faulty(name, [*argv, "--workers", "0"], *rest, apart=True)

    monkeypatch.setattr(faults, "started", quick)
    tiny.draw_tree(tmp_path / "tree")
    rng = Mock(**{"randint.return_value": at, "random.return_value": 0.5})
    found = faults.case(name, count, kinds, faults.Args(steps=12), rng, tmp_path)
    assert [kind for kind, _ in found] == kinds and found[-1][1] > 3  # after a checkpoint


def test_a_worker_killed_under_torchrun_is_started_again(tree, tmp_path, whole):
    out, go = tmp_path / "run", tmp_path / "go"
    argv = [word for word in small(tree, out, workers=1) if word != "--resume"]  # restarts resume
    process = start("supervised", argv, hold=11, agent=2, go=str(go))
    reach(process, out, 5)
    os.kill(faults.tree_of(process.pid)[2], signal.SIGKILL)
    go.touch()
    text = finish(process)
    assert "forcefully exiting" not in text  # the other one ended by itself, loaders and all
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
    argv = small(tree, tmp_path / "run", workers=1)
    process = faulty("supervised", argv, fault=("error", 3, 0))
    text, _ = process.communicate()
    assert process.returncode == 1 and text.endswith("RuntimeError: as torch raises\n")


def test_sigterm_to_one_of_two_processes_stops_both(tree, tmp_path, whole):
    """After the same step, which is saved and said once."""
    out = tmp_path / "run"
    argv = small(tree, out, save=12, workers=1)
    process = start("supervised", argv, 2, hold=11, rank=1)
    reach(process, out, 2)
    os.kill(process.pids[1], signal.SIGTERM)
    text, _ = process.communicate()
    assert process.returncode == 143 and not any(map(running, process.pids))
    step = step_of(out / "last.pt")
    assert 2 < step < 12 and text.count(f"stopped by SIGTERM at step {step}; {GOES_ON}") == 1
    finish(start("supervised", argv, 2))
    assert differences(whole[2], out, but=FREE) == []


@pytest.mark.parametrize("late", [True, False], ids=["in the last scores", "before the last save"])
def test_sigterm_after_the_last_step_ends_at_once_and_resume_scores(
    late, tree, tmp_path, monkeypatch
):
    script, out = tiny.script("supervised"), tmp_path / "run"
    tiny.shrink(script, monkeypatch)
    score = script.evaluate

    def signalled(net, data, items, *rest):
        if (items is data.test) == late and (out / "last.pt").is_file():
            os.kill(os.getpid(), signal.SIGTERM)
        return score(net, data, items, *rest)

    argv = small(tree, out, iters=2, evaluate=2, save=2 if late else 1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(script, "evaluate", signalled)
        tiny.train(script, argv)
    assert step_of(out / "last.pt") == 2 and '"done"' not in (out / "log.jsonl").read_text()
    tiny.train(script, argv)
    assert '"done"' in (out / "log.jsonl").read_text().splitlines()[-1]


def test_ctrl_c_ends_at_once(tree, tmp_path):
    process = start("supervised", small(tree, tmp_path / "run", iters=4000, workers=1))
    reach(process, tmp_path / "run", 2)
    for pid in faults.tree_of(process.pid):  # as a terminal does: to the loaders too
        os.kill(pid, signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 130
    assert text.endswith(f"stopped; {GOES_ON}") and "Traceback" not in text


def flip(path):
    """Changes one bit in a tensor of a checkpoint."""
    content = bytearray(path.read_bytes())
    means = torch.load(path)["networks"]["student"]["backbone.bn1.running_mean"]
    content[content.index(bits(means))] ^= 1
    path.write_bytes(content)


DAMAGES = [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:2000])]


@pytest.mark.parametrize("damage", DAMAGES, ids=["a bit", "gone", "cut"])
def test_a_damaged_newest_checkpoint_is_named_and_the_older_used(
    damage, tree, tmp_path, monkeypatch, capsys, whole
):
    """It never becomes the older one: a kill in the next save would leave nothing."""
    out = tmp_path / "run"
    paths = [out / "last.pt", out / "previous.pt"]
    for _ in range(2):
        stopped(small(tree, out), monkeypatch, 10)
        assert [step_of(path) for path in paths] == [9, 6]
        damage(out / "last.pt")
    capsys.readouterr()
    train(small(tree, out), monkeypatch)
    printed = capsys.readouterr().out
    assert f"{out}/last.pt: " in printed and "; the one before it is used" in printed
    assert "going on from step 6" in printed
    assert differences(whole[1], out) == []
    assert [step_of(path) for path in paths] == [12, 9]
    for path in paths:
        flip(path)
    with pytest.raises(Refusal, match="previous.pt: damaged"):
        train(small(tree, out), monkeypatch)


def test_a_run_that_lives_has_its_folder_alone(tree, tmp_path, monkeypatch, whole):
    """Another start takes the next free name; with the same --out or --resume it is refused."""
    monkeypatch.chdir(tmp_path)
    argv = small(tree, "")[:-1]  # without --resume
    words = [processes.__file__, "supervised", json.dumps(argv), '{"hold": 3, "go": "go"}']
    first, second = (processes.Forked(words, folder=tmp_path) for _ in range(2))
    while len(folders := list(Path("runs").glob("*/log.jsonl"))) < 2:
        time.sleep(0.01)
    out = folders[0].parent
    for more, end in (([], "give another --out"), (["--resume"], "end it first")):
        with pytest.raises(Refusal, match=f"{end}$") as refused:
            train([*argv, "--out", str(out), *more], monkeypatch)
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

    for refusal in filter(None, (at_save or "ended", at_resume)):
        with monkeypatch.context() as patch, pytest.raises(Exception, match=refusal):
            patch.setattr(run.Run, "log_step", changed)
            train(argv, patch)
    assert step_of(tmp_path / "last.pt") == 3


def test_the_best_of_a_lost_future_goes_aside(tree, tmp_path, monkeypatch):
    """The one that the checkpoint names comes back."""
    rising, evaluate = itertools.count(1), supervised.evaluate
    argv, best = small(tree, tmp_path, evaluate=2, save=4), tmp_path / "best.pt"

    def better(*inputs):
        result, maps = evaluate(*inputs)
        return result | {"miou": next(rising) / 100}, maps

    monkeypatch.setattr(supervised, "evaluate", better)
    stopped(argv, monkeypatch, 7)
    assert [step_of(best), step_of(tmp_path / "best-before.pt")] == [6, 4]
    stopped(argv, monkeypatch, 5)
    assert [step_of(best), step_of(tmp_path / "best-2.pt")] == [4, 6]


MACHINE = {
    "worker (pid 7) is killed by signal: Bus error": "--workers 0, or a larger /dev/shm",
    "[Errno 24] Too many open files": "ulimit -n 4096",
    "DefaultCPUAllocator: can't allocate memory": "a smaller --batch-size",
}


@pytest.mark.parametrize("text", MACHINE)
def test_a_machine_that_is_too_small_is_one_line(text, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(supervised, "evaluate", Mock(side_effect=RuntimeError(text)))
    monkeypatch.setattr(run, "end_loaders", lambda: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end, run.refusals():
        train(small(tree, tmp_path), monkeypatch)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and text in line and MACHINE[text] in line


def test_a_closed_stdout_stops_nothing(tree, tmp_path, monkeypatch, whole):
    with open(tmp_path / "out", "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
    train(small(tree, tmp_path / "run"), monkeypatch)
    assert differences(whole[1], tmp_path / "run") == []


def test_a_checkpoint_that_cannot_be_written(tree, tmp_path, whole):
    out = tmp_path / "run"
    process = faulty("supervised", small(tree, out), fault=("full", 3, 0.5))
    text, _ = process.communicate()
    assert process.returncode == 2 and "Traceback" not in text
    line = f"{out}/last.pt: cannot be written (File too large); what was saved before is whole"
    assert text.splitlines()[-1].endswith(line) and step_of(out / "last.pt") == 3
    assert not list(out.glob("*.tmp"))
    finish(start("supervised", small(tree, out)))
    assert differences(whole[1], out) == []


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


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_deterministic_run_repeats_itself(name, device, tree, tmp_path, monkeypatch):
    words = f"{tiny.MORE.get(name, '')} --deterministic --device {device} --ohem-kept 0.3"
    try:
        for out in ("one", "two"):
            argv = tiny.with_acting(name, small(tree, tmp_path / out, iters=6), words)
            train(argv, monkeypatch, tiny.script(name))
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(tmp_path / "one", tmp_path / "two") == []


# what torch 2.6 documents to raise on CUDA with deterministic algorithms: names in aten
RAISES = """_adaptive_avg_pool2d_backward adaptive_max_pool2d_backward put_ put histc median
fractional_max_pool2d_backward max_unpool2d upsample_linear1d_backward grid_sampler_2d_backward
upsample_bilinear2d_backward upsample_bicubic2d_backward reflection_pad2d_backward nanmedian
kthvalue _embedding_bag scatter_reduce scatter_reduce_ _ctc_loss_backward""".split()


class Weak(TorchDispatchMode):
    """Collects the operations that torch documents to raise, or to need a newer torch."""

    found = frozenset()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        weak = name in RAISES or name == "cumsum" and args[0].is_floating_point()
        # the mean or sum of a loss; 0: none, each pixel's own
        weak |= name in ("nll_loss_forward", "nll_loss2d_forward") and args[3] != 0
        weak |= name == "bincount" and len(args) > 1 and args[1] is not None
        self.found |= {name} if weak else set()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_what_has_no_deterministic_kernel_on_cuda(name, tree, tmp_path, monkeypatch):
    """docs/reliability.md has why each of them is there; cumsum: cumulative probabilities."""
    words = f"{tiny.MORE.get(name, '')} --ohem-kept 0.1 --aux-weight 0.4"
    argv = tiny.with_acting(name, small(tree, tmp_path / "run"), words)
    with Weak() as weak:
        train(argv, monkeypatch, tiny.script(name))
    plain = ("supervised", "mean_teacher", "u2pl")
    sums = set() if name in plain else {"cumsum"}
    assert weak.found == {"upsample_bilinear2d_backward", "kthvalue"} | sums
