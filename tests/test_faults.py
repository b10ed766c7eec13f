"""Kills, restarts and files that cannot be written or read: benchmarks/faults.py has many more.

Runs are of the tiny network of tests/helpers.py, each in a process of its own.
"""

import importlib
import os
import random
import re
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
import supervised
from benchmarks import faults
from common import Refusal, run
from tests.helpers import (
    ROOT,
    Forked,
    differences,
    draw_tree,
    finish,
    flags,
    hold_at,
    kill,
    log,
    running,
    shrink,
    snapshot,
    train,
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return draw_tree(tmp_path_factory.mktemp("faults") / "tree")


def small(tree, out, **more):
    """Flags of a run that saves every third step of twelve."""
    numbers = dict(iters=12, log=1, evaluate=5, save=3, pictures=0, batch=4)
    return flags(tree, out, **numbers | more) + ["--resume"]


def launched(argv, agent=(), name="supervised", fault=None, **more):
    """Returns a started child of benchmarks/faults.py; agent: words of torchrun, if it has one."""
    command = [sys.executable]
    command += ["-m", "torch.distributed.run", *agent] if agent else []
    command += ["benchmarks/faults.py", "--child", faults.json.dumps([name, argv, fault])]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, **quiet | more)


def forked(argv, processes=1, fault=None, hold=0, name="supervised"):
    """The same, begun at once and without torchrun. hold: as for `held`, until SIGTERM has come."""
    words = faults.json.dumps([name, argv, fault])
    if hold:
        return Forked(["-m", "tests.test_faults", words, str(hold), "0", ""], processes)
    return Forked([faults.__file__, "--child", words], processes)


def held(argv, agent, go, rank=0):
    """`launched` by torchrun; process `rank` waits in step 11 until SIGTERM or the file go comes.

    Else the run might have ended before, on a busy machine, what has to meet it at work.
    """
    command = [sys.executable, "-m", "torch.distributed.run", *agent, "-m", "tests.test_faults"]
    command += [faults.json.dumps(["supervised", argv, None]), "11", str(rank), str(go)]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, **quiet)


def reach(process, out, step):
    """Waits until the log of a started run has a step."""
    until = time.time() + 300  # a busy machine
    while True:
        text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
        steps = re.findall(r'^{"kind": "train", "step": (\d+)', text, re.M)
        if steps and int(steps[-1]) >= step:
            return
        if process.poll() is not None or time.time() > until:
            kill(process)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.005)


def workers(process):
    """Returns the pids of the training processes below torchrun's agent."""
    return [
        int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The undisturbed runs: {processes: folder}."""
    folder = tmp_path_factory.mktemp("whole")
    for process in [forked(small(tree, folder / str(count)), count) for count in (1, 2)]:
        finish(process)
    return {count: folder / str(count) for count in (1, 2)}


def others(folder, out):
    """Returns the differences between two runs but for flags that change no number."""
    return [x for x in differences(folder, out) if "save_every" not in x and "workers" not in x]


# ---- SIGKILL ----


@pytest.mark.parametrize(
    "name, processes, kind, kills",
    [("supervised", 1, "checkpoint", 1), ("cps_fpl", 2, "log", 2), ("u2pl", 1, "renames", 2)],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    name, processes, kind, kills, tmp_path, monkeypatch
):
    def started(name, argv, processes, fault=None):
        words = faults.json.dumps([name, argv, fault])
        return Forked([faults.__file__, "--child", words], processes, apart=True)

    if name != "supervised":  # that one as benchmarks/faults.py starts it
        monkeypatch.setattr(faults, "started", started)
    draw_tree(tmp_path / "tree")
    rng = random.Random(5 if kind == "log" else 1)  # 5: its kills come after a checkpoint
    found = faults.case(name, processes, [kind] * kills, faults.Args(steps=20), rng, tmp_path)
    assert [k for k, _ in found] == [kind] * kills and (kind != "log" or found[0][1] >= 3)


def test_a_worker_killed_under_torchrun_is_started_again(tree, tmp_path, whole):
    out = tmp_path / "run"
    argv = [w for w in small(tree, out, workers=1) if w != "--resume"]  # torchrun's restarts resume
    agent = ("--standalone", "--nproc_per_node", "2", "--max-restarts", "3")
    process = held(argv, agent, tmp_path / "go")
    reach(process, out, 5)
    os.kill(workers(process)[1], signal.SIGKILL)
    (tmp_path / "go").touch()
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "forcefully exiting" not in text  # the other one ended by itself, loaders and all
    assert others(whole[2], out) == []


@pytest.mark.parametrize("given", [True, False], ids=["--out", "no --out"])
def test_torchrun_goes_on_alone_with_what_it_began(given, tree, tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    monkeypatch.chdir(tmp_path)
    words = [word for word in small(tree, "here") if word != "--resume"]
    if not given:
        del words[words.index("--out") : words.index("--out") + 2]
    args = run.resolve(run.parse(supervised.Args, words), supervised.preset)

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
    out, port = tmp_path / "run", str(random.Random(os.getpid()).randint(20_000, 60_000))
    agent = f"--nnodes 2 --nproc_per_node 1 --max-restarts 3 --rdzv_backend c10d --rdzv_id {port}"
    agent = [*agent.split(), "--rdzv_endpoint", f"localhost:{port}"]
    go = tmp_path / "go"
    host = held(small(tree, out), (*agent, "--rdzv_conf", "is_host=1"), go)
    other = held(small(tree, out), (*agent, "--rdzv_conf", "is_host=0"), go)
    reach(host, out, 5)
    kill(other)
    go.touch()
    other = held(small(tree, out), (*agent, "--rdzv_conf", "is_host=0"), go)
    for process in (host, other):
        finish(process)
    assert differences(whole[2], out) == []


def test_an_error_ends_a_run_with_loaders(tree, tmp_path):
    """Loaders do not listen to SIGTERM, by which Python would end them at its own end."""
    process = launched(small(tree, tmp_path / "run", workers=1), fault=("error", 3, 0))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and text.endswith("RuntimeError: as torch raises\n")


def test_a_start_from_zero_leaves_nothing_of_the_log_before(tree, tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    out = tmp_path / "run"
    with pytest.raises(KeyError), monkeypatch.context() as patch:
        patch.setattr(run.Run, "keep_last", lambda *_: {}["killed"])
        train(supervised, small(tree, out))
    train(supervised, small(tree, out) + ["--lr", "0.5"])
    head, *lines = log(out)
    assert head["args"]["lr"] == 0.5 and [x["step"] for x in lines if x["kind"] == "train"] == [
        *range(1, 13)
    ]


# ---- SIGTERM, Ctrl-C ----


def test_sigterm_saves_and_exits_143(tree, tmp_path, whole):
    out = tmp_path / "run"
    # the work that is due in a step is done before its save
    process = forked(small(tree, out, save=12, evaluate=1), hold=11)
    reach(process, out, 2)
    process.terminate()
    text, _ = process.communicate(timeout=300)
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert process.returncode == 143 and 2 < step < 12
    assert text.endswith(
        f"stopped by SIGTERM at step {step}; the same command with --resume goes on\n"
    )
    assert [x["step"] for x in log(out) if x["kind"] == "eval"] == list(range(1, step + 1))
    finish(forked(small(tree, out, save=12, evaluate=1)))
    kinds = [x["kind"] for x in log(out)]
    assert kinds == ["start"] + ["train", "eval"] * 12 + ["done"]


def test_sigterm_to_one_of_two_processes_stops_both(tree, tmp_path, whole):
    out = tmp_path / "run"
    argv = small(tree, out, save=12, workers=1)
    process = held(argv, ("--standalone", "--nproc_per_node", "2"), tmp_path / "go", rank=1)
    reach(process, out, 2)
    one, other = workers(process)
    os.kill(other, signal.SIGTERM)
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and not running(one) and not running(other)
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert 2 < step < 12 and text.count(f"stopped by SIGTERM at step {step}") == 1
    finish(forked(argv, 2))
    assert others(whole[2], out) == []


def test_the_slurm_script_saves_requeues_and_goes_on(tree, tmp_path, whole):
    """docs/scaling.md's, with a torchrun that starts the tiny network and a queue that notes."""
    page = (ROOT / "docs/scaling.md").read_text()
    (tmp_path / "job.sh").write_text(page.split("```bash\n")[1].split("```")[0])
    out, words = tmp_path / "run", small(tree, tmp_path / "run", save=12)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.test_faults"]
    command += [faults.json.dumps(["supervised", words, None]), "11", "0", str(tmp_path / "go")]
    stubs = {"torchrun": f"exec {shlex.join(command)}", "scontrol": f"echo $@ > {tmp_path}/queue"}
    for name, line in stubs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)
    job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], **quiet)
    reach(job, out, 2)
    job.terminate()
    finish(job)
    (tmp_path / "go").touch()
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert 2 < step < 12
    finish(subprocess.Popen(["bash", str(tmp_path / "job.sh")], **quiet))
    assert others(whole[2], out) == []


def test_ctrl_c_ends_within_two_seconds(tree, tmp_path):
    out = tmp_path / "run"
    process = launched(small(tree, out, iters=4000, workers=1), start_new_session=True)
    reach(process, out, 2)
    begin = time.time()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loaders too
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and time.time() - begin < 10  # 2 on an idle machine
    assert text.endswith("stopped; the same command with --resume goes on\n")
    assert "Traceback" not in text


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
    damage, tree, tmp_path, monkeypatch, capsys
):
    shrink(supervised, monkeypatch)
    train(supervised, small(tree, tmp_path / "whole"))
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        keep = run.Run.keep_last

        def keep_and_stop(self, step, *rest):
            keep(self, step, *rest)
            if step == 9:
                raise KeyboardInterrupt

        patch.setattr(run.Run, "keep_last", keep_and_stop)
        train(supervised, small(tree, out))
    steps = [torch.load(out / f"{n}.pt", weights_only=True)["step"] for n in ("last", "previous")]
    assert steps == [9, 6]
    DAMAGES[damage](out / "last.pt")
    capsys.readouterr()
    train(supervised, small(tree, out))
    printed = capsys.readouterr().out
    assert f"{out}/last.pt: " in printed and "; the one before it is used" in printed
    assert "going on from step 6" in printed
    assert differences(tmp_path / "whole", out) == []
    assert [
        torch.load(out / f"{n}.pt", weights_only=True)["step"] for n in ("last", "previous")
    ] == [12, 9]
    for name in ("last", "previous"):
        flip(out / f"{name}.pt")
    with pytest.raises(Refusal, match="previous.pt: damaged"):
        train(supervised, small(tree, out))


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(tree, tmp_path, monkeypatch):
    """Were the damaged one renamed at the next save, a kill in that moment would leave nothing."""
    shrink(supervised, monkeypatch)
    out, keep, steps = tmp_path / "run", run.Run.keep_last, []

    def keep_and_stop(self, step, *rest):
        keep(self, step, *rest)
        steps.append(torch.load(out / "last.pt", weights_only=True)["step"])
        if step == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "keep_last", keep_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(supervised, small(tree, out))
        assert steps.pop() == 9
        assert torch.load(out / "previous.pt", weights_only=True)["step"] == 6
        flip(out / "last.pt")


@pytest.mark.parametrize(
    "fault, why", [("full", "File too large"), ("locked", "Permission denied")]
)
def test_a_checkpoint_that_cannot_be_written(fault, why, tree, tmp_path, whole):
    if fault == "locked" and os.geteuid() != 0:
        pytest.skip("privileges can be dropped by root alone")
    out = tmp_path / "run"
    process = forked(small(tree, out), fault=(fault, {"full": 3, "locked": 1}[fault], 0.5))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    line = f"{out}/last.pt: cannot be written ({why}); what was saved before is whole"
    assert text.splitlines()[-1].endswith(line) and "Traceback" not in text
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 3
    assert fault == "locked" or not list(out.glob("*.tmp"))
    os.chmod(out, 0o755)
    finish(forked(small(tree, out)))
    assert differences(whole[1], out) == []


def test_a_malicious_checkpoint_is_refused(tree, tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "run").mkdir()
    torch.save({"script": "supervised.py", "step": 1, "args": Trap()}, tmp_path / "run/last.pt")
    with pytest.raises(Refusal, match="last.pt: damaged"):
        train(supervised, small(tree, tmp_path / "run"))
    assert not (tmp_path / "sprung").exists()


def test_another_script_is_not_taken_for_damage(tree, tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    train(supervised, small(tree, tmp_path / "run"))
    before = snapshot(tmp_path / "run")
    shrink(mean_teacher, monkeypatch)
    with pytest.raises(Refusal, match="last.pt: written by supervised.py, not by mean_teacher.py"):
        train(mean_teacher, small(tree, tmp_path / "run"))
    assert snapshot(tmp_path / "run") == before


def test_processes_that_see_different_checkpoints_are_refused(tree, tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    train(supervised, small(tree, tmp_path / "run"))
    most = {run.ReduceOp.MAX: 1}  # another process has one of a later step
    monkeypatch.setattr(run, "reduced", lambda x, op=run.ReduceOp.SUM: x + most.get(op, 0))
    with pytest.raises(Refusal, match="last.pt: processes see different ones"):
        train(supervised, small(tree, tmp_path / "run"))


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


# ---- another number of processes ----


def test_a_resumed_run_may_have_another_number_of_processes(tree, tmp_path):
    out = tmp_path / "run"
    process = forked(small(tree, out), hold=11)
    reach(process, out, 4)
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == 143
    finish(forked(small(tree, out), 2))
    steps = [x["step"] for x in log(out) if x["kind"] == "train"]
    assert steps == list(range(1, 13)) and log(out)[-1]["kind"] == "done"


@pytest.mark.parametrize("world", [2, 4])
def test_the_stream_of_samples_does_not_depend_on_the_number_of_processes(world, tree, tmp_path):
    words = small(tree, tmp_path, batch=8) + ["--split", "all"]
    args = run.resolve(run.parse(supervised.Args, words), supervised.preset)
    data = supervised.load(args)

    def batches(rank, count, start):
        group = run.Group(rank, count, torch.device("cpu"))
        return [b["image"] for b in supervised.open_stream("labeled", data, args, group, start)]

    alone = batches(0, 1, 0)
    parts = [batches(rank, world, 5) for rank in range(world)]  # resumed at step 5
    assert len(alone) == 12 and len(parts[0]) == 7
    for step, several in enumerate(zip(*parts, strict=True), 5):
        assert torch.cat(several).equal(alone[step])


# ---- deterministic ----


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
@pytest.mark.parametrize("name", faults.SCRIPTS)
def test_a_deterministic_run_repeats_itself(name, device, tree, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    shrink(module, monkeypatch)
    words = faults.MORE.get(name, "").split() + ["--deterministic", "--device", device]
    try:
        for out in ("one", "two"):
            train(module, small(tree, tmp_path / out) + words)
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


@pytest.mark.parametrize("name", faults.SCRIPTS)
def test_what_has_no_deterministic_kernel_on_cuda(name, tree, tmp_path, monkeypatch):
    """docs/reliability.md has why each of them is there."""
    module = importlib.import_module(name)
    shrink(module, monkeypatch)
    words = faults.MORE.get(name, "").split() + ["--ohem-kept", "0.1", "--aux-weight", "0.4"]
    with Weak() as weak:
        train(module, small(tree, tmp_path / "run") + words)
    sums = {"cumsum"} if name in ("cps_fpl", "ael_fpl", "esl") else set()
    assert weak.found == {"upsample_bilinear2d_backward", "kthvalue"} | sums


if __name__ == "__main__":  # the child of benchmarks/faults.py, waiting: see `held`
    words, number, rank, go = sys.argv[1:]
    hold_at(int(number), int(rank), lambda run: run.told or go and Path(go).exists())
    faults.child(words)
