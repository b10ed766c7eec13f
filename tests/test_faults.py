"""Kills, restarts and files that cannot be written or read: benchmarks/faults.py has many more."""

import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
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
import u2pl
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


def faulty(name, argv, count=1, fault=None, apart=True):
    """A started child of benchmarks/faults.py, with one of its faults."""
    words = faults.json.dumps([name, argv, fault])
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


@pytest.mark.parametrize(
    "name, count, kind, kills",
    [("supervised", 1, "checkpoint", 1), ("cps_fpl", 2, "log", 2), ("u2pl", 1, "renames", 2)],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    name, count, kind, kills, tmp_path, monkeypatch
):
    monkeypatch.setattr(faults, "started", faulty)  # begun at once, and without torchrun
    tiny.draw_tree(tmp_path / "tree")
    rng = random.Random(5 if kind == "log" else 1)  # 5: its kills come after a checkpoint
    found = faults.case(name, count, [kind] * kills, faults.Args(steps=20), rng, tmp_path)
    assert [k for k, _ in found] == [kind] * kills and (kind != "log" or found[0][1] >= 3)


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
    process = faulty("supervised", argv, fault=("error", 3, 0), apart=False)
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


def test_the_slurm_script_saves_requeues_and_goes_on(tmp_path):
    """docs/scaling.md's: SIGTERM reaches what torchrun started, before the job is requeued."""
    page = (tiny.ROOT / "docs/scaling.md").read_text()
    (tmp_path / "job.sh").write_text(page.split("```bash\n")[1].split("```")[0])
    training = "bash -c 'trap \"touch saved; exit 143\" TERM; touch begun; sleep 9 & wait'"
    stubs = {"torchrun": f"echo $@ > flags\n{training} &\nwait $!"}
    stubs["scontrol"] = "cat saved && echo $@ > queue"
    for name, lines in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    job.terminate()
    assert job.wait(60) == 0 and "--resume" in (tmp_path / "flags").read_text()
    assert (tmp_path / "queue").read_text() == "requeue 7\n"


def test_ctrl_c_ends_within_seconds(tree, tmp_path):
    process = start("supervised", small(tree, tmp_path / "run", iters=4000, workers=1))
    reach(process, tmp_path / "run", 2)
    begin = time.time()
    for pid in faults.tree_of(process.pid):  # as a terminal does: to the loaders too
        os.kill(pid, signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 130 and time.time() - begin < 20  # 2 on an idle machine
    assert text.endswith(f"stopped; {GOES_ON}") and "Traceback" not in text


def flip(path):
    """Changes one bit in a tensor of a checkpoint."""
    content = bytearray(path.read_bytes())
    means = torch.load(path)["networks"]["student"]["backbone.bn1.running_mean"]
    content[content.index(bits(means))] ^= 1
    path.write_bytes(content)


DAMAGES = {"a bit": flip, "gone": Path.unlink, "empty": lambda path: path.write_bytes(b"")}
DAMAGES["cut"] = lambda path: path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_used(
    damage, tree, tmp_path, monkeypatch, capsys, whole
):
    """It never becomes the older one: a kill in the next save would leave nothing."""
    out = tmp_path / "run"
    paths = [out / "last.pt", out / "previous.pt"]
    for _ in range(2):
        stopped(small(tree, out), monkeypatch, 10)
        assert [step_of(path) for path in paths] == [9, 6]
        DAMAGES[damage](out / "last.pt")
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


def held(tree, folder, out, *words):
    """A started run, in a folder of its own, that waits in step 3 for the file `go` there."""
    flags = json.dumps([*small(tree, out)[:-1], *words])  # without --resume
    words = [processes.__file__, "supervised", flags, json.dumps(dict(hold=3, go="go"))]
    return processes.Forked(words, folder=folder)


@pytest.mark.parametrize("name", ["", "run"])
def test_two_starts_at_once_have_a_folder_each_or_one_is_refused(name, tree, tmp_path, whole):
    """As is --resume beside a run that lives."""
    out = tmp_path / name if name else ""
    living = [held(tree, tmp_path, out) for _ in range(2)]
    if name:
        while all(process.poll() is None for process in living):
            time.sleep(0.01)
        living.sort(key=lambda process: process.returncode is not None)
        owner = f"{out}: process {living[0].pid} of {platform.node()} writes there: "
        reach(living[0], out, 2)
        for refused, end in (
            (living.pop(), "give another --out\n"),
            (held(tree, tmp_path, out, "--resume"), f"{owner}end it first\n"),
        ):
            text, _ = refused.communicate()
            assert refused.returncode == 2 and text.endswith(end)
    (tmp_path / "go").touch()
    for process in living:
        finish(process)
    folders = [out] if name else list((tmp_path / "runs").iterdir())
    assert len(folders) == len(living) and not sum((differences(whole[1], x) for x in folders), [])


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


CONTENTS = {
    "optimizer is not": lambda saved: saved["optimizer"]["param_groups"].pop(),
    "state is not": lambda saved: saved["state"].pop("bank"),
    "step 13 of 12": lambda saved: saved.update(step=13),
    "meter is none": lambda saved: saved.update(meter=[0.0]),
}
MACHINE = {
    "worker (pid 7) is killed by signal: Bus error": "--workers 0, or a larger /dev/shm",
    "[Errno 24] Too many open files": "ulimit -n 4096",
    "DefaultCPUAllocator: can't allocate memory": "a smaller --batch-size",
}


@pytest.mark.parametrize("text", [*CONTENTS, *MACHINE])
def test_wrong_content_and_small_machines_are_one_line(text, tree, tmp_path, monkeypatch, capsys):
    argv = tiny.with_acting("u2pl", small(tree, tmp_path, save=12))
    if text in CONTENTS:
        train(argv, monkeypatch, u2pl)
        saved = torch.load(tmp_path / "last.pt", weights_only=True)
        CONTENTS[text](saved)
        torch.save(saved, tmp_path / "last.pt")
    else:
        monkeypatch.setattr(u2pl, "evaluate", Mock(side_effect=RuntimeError(text)))
    monkeypatch.setattr(run, "end_loaders", lambda: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, run.refusals():
        train(argv, monkeypatch, u2pl)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and text in line
    assert MACHINE.get(text, f"{tmp_path}/last.pt: ") in line


def test_a_closed_stdout_stops_nothing(tree, tmp_path, monkeypatch, whole):
    with open(tmp_path / "out", "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
    train(small(tree, tmp_path / "run"), monkeypatch)
    assert differences(whole[1], tmp_path / "run") == []


ROOT_ALONE = pytest.mark.skipif(os.geteuid() != 0, reason="root alone can drop privileges")
FAULTS = [("full", 3, 0.5), pytest.param(("locked", 1, 0.5), marks=ROOT_ALONE)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_cannot_be_written(fault, tree, tmp_path, whole):
    out = tmp_path / "run"
    process = faulty("supervised", small(tree, out), fault=fault, apart=False)
    text, _ = process.communicate()
    assert process.returncode == 2 and "Traceback" not in text
    why = {"full": "File too large", "locked": "Permission denied"}[fault[0]]
    line = f"{out}/last.pt: cannot be written ({why}); what was saved before is whole"
    assert text.splitlines()[-1].endswith(line) and step_of(out / "last.pt") == 3
    assert fault[0] == "locked" or not list(out.glob("*.tmp"))
    os.chmod(out, 0o755)
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
    words = f"--deterministic --device {device} --ohem-kept 0.3".split()
    try:
        for out in ("one", "two"):
            argv = tiny.with_acting(name, small(tree, tmp_path / out, *words))
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
    sums = {"cumsum"} if name in ("cps_fpl", "ael_fpl", "esl") else set()
    assert weak.found == {"upsample_bilinear2d_backward", "kthvalue"} | sums
