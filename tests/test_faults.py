"""Kills, restarts and files that cannot be written or read: benchmarks/faults.py has many more.

Runs are of the tiny network, most in processes of their own.
"""

import os
import random
import shlex
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mean_teacher
import processes
import supervised
import tiny
from benchmarks import faults
from benchmarks.runs import differences, kill, log, running
from common import Refusal, run
from processes import by_torchrun, finish, reach, snapshot, start

TWO = ("--standalone", "--nproc_per_node", "2")
GOES_ON = "the same command with --resume goes on\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiny.draw_tree(tmp_path_factory.mktemp("faults") / "tree")


def small(tree, out, *words, **more):
    """Flags of a run that saves every third step of twelve."""
    numbers = dict(iters=12, log=1, evaluate=5, save=3, pictures=0, batch=4)
    return [*tiny.flags(tree, out, **numbers | more), "--resume", *words]


def held(argv, go, rank=0):
    """The words of a run whose process `rank` waits in step 11 for SIGTERM or the file go.

    Else the run might have ended before, on a busy machine, what has to meet it at work.
    """
    settings = dict(launch=True, hold=11, rank=rank, go=str(go))
    return processes.command("supervised", argv, **settings)


def faulty(name, argv, count=1, fault=None, apart=True):
    """A started child of benchmarks/faults.py, with one of its faults."""
    words = faults.json.dumps([name, argv, fault])
    return processes.Forked([faults.__file__, "--child", words], count, apart=apart)


def workers(process):
    """Returns the pids of the training processes below torchrun's agent."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def train(argv, patch, module=supervised):
    with patch.context() as own:
        tiny.shrink(module, own)
        tiny.train(module, argv)


def stopped_after_save(argv, patch, at):
    """Makes a run that ends right after it saved step `at`."""
    keep = run.Run.keep_last

    def keep_and_stop(self, step, *rest):
        keep(self, step, *rest)
        if step == at:
            raise KeyboardInterrupt

    with patch.context() as own, pytest.raises(KeyboardInterrupt):
        own.setattr(run.Run, "keep_last", keep_and_stop)
        train(argv, own)


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The undisturbed runs: {processes: folder}."""
    folder = tmp_path_factory.mktemp("whole")
    for count in (1, 2):
        argv = small(tree, folder / str(count))
        finish(start("supervised", argv, processes=count, launch=True))
    return {count: folder / str(count) for count in (1, 2)}


FREE = ["save_every", "eval_every", "workers"]  # flags that change no number


# ---- SIGKILL ----


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
    process = by_torchrun([*TWO, "--max-restarts", "3"], held(argv, go))
    reach(process, out, 5)
    os.kill(workers(process)[1], signal.SIGKILL)
    go.touch()
    text = finish(process)
    assert "forcefully exiting" not in text  # the other one ended by itself, loaders and all
    assert differences(whole[2], out, but=FREE) == []


@pytest.mark.parametrize("given", [True, False], ids=["--out", "no --out"])
def test_torchrun_goes_on_alone_with_what_it_began(given, tree, tmp_path, monkeypatch):
    tiny.shrink(supervised, monkeypatch)
    monkeypatch.chdir(tmp_path)
    words = [word for word in small(tree, "here") if word != "--resume"]
    if not given:
        del words[words.index("--out") : words.index("--out") + 2]
    args = tiny.resolved(supervised, words)

    def started():
        one = run.Run(args, supervised.__file__, run.Group(0, 1, torch.device("cpu")), data)
        return str(one.folder), one.resume, one

    data = supervised.load(args)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "getppid", lambda: 7)
    name, resume, one = started()
    assert not resume
    assert started()[:2] == (name, False)  # killed before it wrote anything
    one.log("train", 1)
    assert started()[:2] == (name, True)
    monkeypatch.setattr(os, "getppid", lambda: 8)  # another torchrun
    if given:
        with pytest.raises(Refusal, match="here exists"):
            started()
    else:
        assert started()[:2] == (f"{name}-2", False)


def test_two_machines_one_of_which_is_killed(tree, tmp_path, whole, monkeypatch):
    """Two agents on loopback; the second dies with all it started, and is started again."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # docs/scaling.md
    out, go, port = tmp_path / "run", tmp_path / "go", processes.free_port()
    agent = f"--nnodes 2 --nproc_per_node 1 --max-restarts 3 --rdzv_backend c10d --rdzv_id {port}"
    agent = [*agent.split(), "--rdzv_endpoint", f"localhost:{port}", "--rdzv_conf"]
    words = held(small(tree, out), go)
    host = by_torchrun([*agent, "is_host=1"], words)
    other = by_torchrun([*agent, "is_host=0"], words)
    reach(host, out, 5)
    kill(other)
    go.touch()
    other = by_torchrun([*agent, "is_host=0"], words)
    for process in (host, other):
        finish(process)
    assert differences(whole[2], out) == []


def test_an_error_ends_a_run_with_loaders(tree, tmp_path):
    """Loaders do not listen to SIGTERM, by which Python would end them at its own end."""
    argv = small(tree, tmp_path / "run", workers=1)
    process = faulty("supervised", argv, fault=("error", 3, 0), apart=False)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and text.endswith("RuntimeError: as torch raises\n")


def test_a_start_from_zero_leaves_nothing_of_the_log_before(tree, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(KeyError), monkeypatch.context() as patch:
        patch.setattr(run.Run, "keep_last", lambda *_: {}["killed"])
        train(small(tree, out), patch)
    train(small(tree, out, "--lr", "0.5"), monkeypatch)
    head, *lines = log(out)
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert head["args"]["lr"] == 0.5 and steps == [*range(1, 13)]


# ---- SIGTERM, Ctrl-C ----


def test_sigterm_saves_and_exits_143_and_another_number_of_processes_goes_on(tree, tmp_path, whole):
    out = tmp_path / "run"
    argv = small(tree, out, save=12, evaluate=1)  # work due in a step is done before its save
    process = processes.Forked(held(argv, ""))
    reach(process, out, 2)
    process.terminate()
    text, _ = process.communicate(timeout=300)
    step = step_of(out / "last.pt")
    assert process.returncode == 143 and 2 < step < 12
    assert text.endswith(f"stopped by SIGTERM at step {step}; {GOES_ON}")
    assert [x["step"] for x in log(out) if x["kind"] == "eval"] == list(range(1, step + 1))
    finish(start("supervised", argv, processes=2))
    assert [x["kind"] for x in log(out)] == ["start"] + ["train", "eval"] * 12 + ["done"]
    assert [x["step"] for x in log(out) if x["kind"] == "train"] == list(range(1, 13))


def test_sigterm_to_one_of_two_processes_stops_both(tree, tmp_path, whole):
    out = tmp_path / "run"
    argv = small(tree, out, save=12, workers=1)
    process = processes.Forked(held(argv, "", rank=1), 2)
    reach(process, out, 2)
    os.kill(process.pids[1], signal.SIGTERM)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 143 and not any(map(running, process.pids))
    step = step_of(out / "last.pt")
    assert 2 < step < 12 and text.count(f"stopped by SIGTERM at step {step}") == 1
    finish(start("supervised", argv, processes=2))
    assert differences(whole[2], out, but=FREE) == []


def test_the_slurm_script_saves_requeues_and_goes_on(tree, tmp_path, whole):
    """docs/scaling.md's, with a torchrun that starts the tiny network and a queue that notes."""
    page = (tiny.ROOT / "docs/scaling.md").read_text()
    (tmp_path / "job.sh").write_text(page.split("```bash\n")[1].split("```")[0])
    out, go = tmp_path / "run", tmp_path / "go"
    command = [sys.executable, "-m", "torch.distributed.run", *TWO]
    command += held(small(tree, out, save=12), go)
    stubs = {"torchrun": f"exec {shlex.join(command)}", "scontrol": f"echo $@ > {tmp_path}/queue"}
    (tmp_path / "bin").mkdir()
    for name, line in stubs.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], cwd=tiny.ROOT, **quiet)
    reach(job, out, 2)
    job.terminate()
    finish(job)
    go.touch()
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
    assert 2 < step_of(out / "last.pt") < 12
    finish(subprocess.Popen(["bash", str(tmp_path / "job.sh")], cwd=tiny.ROOT, **quiet))
    assert differences(whole[2], out, but=FREE) == []


def test_ctrl_c_ends_within_seconds(tree, tmp_path):
    out = tmp_path / "run"
    words = processes.command("supervised", small(tree, out, iters=4000, workers=1), launch=True)
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([sys.executable, *words], start_new_session=True, **quiet)
    reach(process, out, 2)
    begin = time.time()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loaders too
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and time.time() - begin < 20  # 2 on an idle machine
    assert text.endswith(f"stopped; {GOES_ON}") and "Traceback" not in text


# ---- files that cannot be read or written ----


def flip(path):
    """Changes one bit in the middle of the largest tensor of a checkpoint."""
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    content, at = bytearray(path.read_bytes()), largest.header_offset
    lengths = struct.unpack("<HH", content[at + 26 : at + 30])  # of name and extra field
    content[at + 30 + sum(lengths) + largest.file_size // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "text": lambda path: path.write_text("no checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_used(
    damage, tree, tmp_path, monkeypatch, capsys, whole
):
    """It never becomes the older one: a kill in the next save would leave nothing."""
    out = tmp_path / "run"
    paths = [out / "last.pt", out / "previous.pt"]
    for _ in range(2):
        stopped_after_save(small(tree, out), monkeypatch, 9)
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


@pytest.mark.parametrize(
    "fault, why", [("full", "File too large"), ("locked", "Permission denied")]
)
def test_a_checkpoint_that_cannot_be_written(fault, why, tree, tmp_path, whole):
    if fault == "locked" and os.geteuid() != 0:
        pytest.skip("privileges can be dropped by root alone")
    out = tmp_path / "run"
    fault = (fault, {"full": 3, "locked": 1}[fault], 0.5)
    process = faulty("supervised", small(tree, out), fault=fault, apart=False)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    line = f"{out}/last.pt: cannot be written ({why}); what was saved before is whole"
    assert text.splitlines()[-1].endswith(line) and "Traceback" not in text
    assert step_of(out / "last.pt") == 3
    assert fault[0] == "locked" or not list(out.glob("*.tmp"))
    os.chmod(out, 0o755)
    finish(start("supervised", small(tree, out)))
    assert differences(whole[1], out) == []


def test_what_is_no_checkpoint_of_this_run_is_refused(tree, tmp_path, monkeypatch):
    """One that runs code; another script's, which is not taken for damage; one of another step."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "trap").mkdir()
    torch.save({"script": "supervised.py", "step": 1, "args": Trap()}, tmp_path / "trap/last.pt")
    with pytest.raises(Refusal, match="last.pt: damaged"):
        train(small(tree, tmp_path / "trap"), monkeypatch)
    assert not (tmp_path / "sprung").exists()
    argv = small(tree, tmp_path / "run")
    train(argv, monkeypatch)
    before = snapshot(tmp_path / "run")
    with pytest.raises(Refusal, match="last.pt: written by supervised.py, not by mean_teacher.py"):
        train(argv, monkeypatch, mean_teacher)
    most = {run.ReduceOp.MAX: 1}  # another process has one of a later step
    monkeypatch.setattr(run, "reduced", lambda x, op=run.ReduceOp.SUM: x + most.get(op, 0))
    with pytest.raises(Refusal, match="last.pt: processes see different ones"):
        train(argv, monkeypatch)
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("world, device, loaders", [(1, "cpu", 2), (2, "cpu", 0), (2, "cuda", 2)])
def test_no_loader_is_forked_for_an_evaluation_beside_gloo(world, device, loaders, monkeypatch):
    """docs/reliability.md: such a child may wait for ever."""

    class Stop(Exception):
        pass

    def loader(dataset, num_workers, **options):
        assert num_workers == loaders
        raise Stop

    monkeypatch.setattr(supervised, "DataLoader", loader)
    group = run.Group(0, world, SimpleNamespace(type=device))
    with pytest.raises(Stop):
        args = SimpleNamespace(workers=2)
        supervised.evaluate(torch.nn.Identity(), SimpleNamespace(), range(8), args, group)


# ---- deterministic ----


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_deterministic_run_repeats_itself(name, device, tree, tmp_path, monkeypatch):
    words = f"{tiny.MORE.get(name, '')} --deterministic --device {device} --ohem-kept 0.3".split()
    try:
        for out in ("one", "two"):
            train(small(tree, tmp_path / out, *words), monkeypatch, tiny.script(name))
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(tmp_path / "one", tmp_path / "two") == []


# what torch 2.6 documents to raise on CUDA with deterministic algorithms: names in aten
RAISES = """_adaptive_avg_pool2d_backward adaptive_max_pool2d_backward
fractional_max_pool2d_backward max_unpool2d upsample_linear1d_backward
upsample_bilinear2d_backward upsample_bicubic2d_backward reflection_pad2d_backward
_embedding_bag put_ put histc median nanmedian grid_sampler_2d_backward
scatter_reduce scatter_reduce_ _ctc_loss_backward kthvalue""".split()
SUMS = ("cps_fpl", "ael_fpl", "esl")  # their cumulative probabilities


class Weak(TorchDispatchMode):
    """Collects the operations that torch documents to raise, or to need a newer torch."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, mean = func.overloadpacket.__name__, ("nll_loss_forward", "nll_loss2d_forward")
        weak = name in RAISES or name == "cumsum" and args[0].is_floating_point()
        weak |= name in mean and args[3] != 0  # a mean or a sum; 0: none, each pixel's own
        weak |= name == "bincount" and len(args) > 1 and args[1] is not None
        self.found |= {name} if weak else set()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_what_has_no_deterministic_kernel_on_cuda(name, tree, tmp_path, monkeypatch):
    """docs/reliability.md has why each of them is there."""
    words = f"{tiny.MORE.get(name, '')} --ohem-kept 0.1 --aux-weight 0.4".split()
    with Weak() as weak:
        train(small(tree, tmp_path / "run", *words), monkeypatch, tiny.script(name))
    sums = {"cumsum"} if name in SUMS else set()
    assert weak.found == {"upsample_bilinear2d_backward", "kthvalue"} | sums
