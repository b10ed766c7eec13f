"""Kills, restarts and files that cannot be written or read: benchmarks/faults.py has many more."""

import contextlib
import errno
import io
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import queues
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import processes
import supervised
import tiny
from benchmarks import faults
from benchmarks.runs import bits, differences, running
from common import Refusal, distributed, run
from common.checkpoints import load_optimizer
from common.distributed import Group
from common.run import step_of
from processes import Forked, finish, reach
from recorder import stopped

GOES_ON = "the same command with --resume goes on\n"
FREE = ["save_every", "eval_every", "workers"]  # flags that change no number


def small(tree, out, **more):
    numbers = dict(iters=12, log=1, evaluate=5, save=3, batch=4)
    return [*tiny.flags(tree, out, **numbers | more), "--resume"]


def start(argv, count=1, fault=None, folder=processes.ROOT, program=(faults.__file__, "--child")):
    """Starts supervised.py with one of the faults of benchmarks/faults.py."""
    return Forked([*program, json.dumps(["supervised", argv, fault])], count, folder)


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The undisturbed runs: {processes: folder}."""
    folders = {count: tmp_path_factory.mktemp("whole") / "run" for count in (1, 2)}
    for count, folder in folders.items():
        finish(start(small(tree, folder), count))
    return folders


def test_a_worker_killed_under_torchrun_is_started_again(tree, tmp_path, whole):
    out, go = tmp_path / "run", tmp_path / "go"
    argv = small(tree, out, workers=1)[:-1]  # without --resume
    process = start(argv, fault=("held", 8, str(go)), program=[processes.__file__])
    reach(process, out, 5)
    os.kill(faults.tree_of(process.pid)[2], signal.SIGKILL)
    go.touch()
    assert "forcefully exiting" not in finish(process)  # the other ended by itself, with loaders
    assert differences(whole[2], out, but=FREE) == []


def test_which_start_goes_on_and_which_has_a_new_folder(tree, tmp_path, monkeypatch):
    """--resume goes on with the newest, torchrun with what it began itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    args = tiny.resolved(supervised, tiny.flags(tree, ""))
    data, group = supervised.load(args), Group(0, 1, torch.device("cpu"))
    # which torchrun, --resume, end of the folder's name, whether that run goes on
    starts = [(6, True, "", True), (7, False, "", False), (7, False, "", False)]
    starts += [(7, False, "", True), (8, False, "-2", False), (9, True, "-2", True)]
    for number, (parent, resume, end, goes_on) in enumerate(starts):
        monkeypatch.setattr(os, "getppid", Mock(return_value=parent))
        own = replace(args, resume=resume)
        one = run.Run(own, supervised.__file__, group, data, supervised.preset)
        assert (one.folder.name, one.resume) == (f"supervised-camvid-1_4-s0{end}", goes_on)
        if number > 1:  # the first two are killed before they write anything
            one.log("train", 1)


@pytest.mark.parametrize("folder, words", [("gone", "gone: process 1"), (".", "other images")])
def test_a_process_that_sees_other_files_is_refused(folder, words, tree, monkeypatch):
    of_process_0 = iter([(folder, False), {}])  # the run's folder, then the images
    monkeypatch.setattr(run, "from_first", lambda value: next(of_process_0))
    args = tiny.resolved(supervised, tiny.flags(tree, ""))
    data, group = supervised.load(args), Group(1, 2, torch.device("cpu"))
    with pytest.raises(Refusal, match=words):
        run.Run(args, supervised.__file__, group, data, supervised.preset)


def test_an_error_ends_a_run_with_loaders(tree, tmp_path):
    """Loaders do not listen to SIGTERM, by which Python would end them at its own end."""
    process = start(small(tree, tmp_path / "run", workers=1), fault=("error", 3, 0))
    assert finish(process, 1).endswith("RuntimeError: as torch raises\n")


def test_sigterm_to_one_of_two_processes_stops_both(tree, tmp_path, whole):
    """After the same step, which is saved and said once."""
    out, go = tmp_path / "run", tmp_path / "go"
    argv = small(tree, out, save=12, workers=1)
    process = start(argv, 2, ("held", 6, str(go)))
    reach(process, out, 2)
    os.kill(process.pids[1], signal.SIGTERM)
    go.touch()
    text = finish(process, 143)
    assert not any(map(running, process.pids))
    step = step_of(out / "last.pt")
    assert 2 < step < 12 and text.count(f"stopped by SIGTERM at step {step}; {GOES_ON}") == 1
    finish(start(argv, 2))
    assert differences(whole[2], out, but=FREE) == []


@pytest.mark.parametrize("late", [True, False])  # in the last scores, before the last save
def test_sigterm_after_the_last_step_ends_at_once(late, tree, tmp_path, monkeypatch):
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
    text = finish(process, 130)
    assert text.endswith(f"stopped; {GOES_ON}") and "Traceback" not in text


def flip(path):
    """Changes one bit in a tensor of a checkpoint."""
    content = bytearray(path.read_bytes())
    means = torch.load(path)["networks"]["student"]["backbone.bn1.running_mean"]
    content[content.index(bits(means))] ^= 1
    path.write_bytes(content)


DAMAGES = [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:2000])]


@pytest.mark.parametrize("damage", DAMAGES, ids=["a bit", "gone", "cut"])
def test_a_damaged_checkpoint_is_named_and_the_older_used(damage, tree, tmp_path, capsys, whole):
    """Gone: a kill between two renames of a save. Damaged, it never becomes the older one."""
    out = tmp_path / "run"
    paths = [out / "last.pt", out / "previous.pt"]
    for _ in range(2):
        stopped("supervised", small(tree, out), 10)
        assert [step_of(path) for path in paths] == [9, 6]
        damage(out / "last.pt")
    capsys.readouterr()
    tiny.run("supervised", small(tree, out))
    printed = capsys.readouterr().out
    assert re.search("/last.pt: .*; the one before it is used\n.*going on from step 6\n", printed)
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
    both = [start(argv, 1, ("held", 3, "go"), tmp_path) for _ in range(2)]
    while len(folders := list(Path("runs").glob("*/log.jsonl"))) < 2:
        time.sleep(0.01)
    argv += ["--out", str(folders[0].parent)]
    pids = "|".join(str(process.pid) for process in both)
    living = rf"process ({pids}) of {platform.node()} writes there: end it first$"
    for more, refusal in (([], "give another --out$"), (["--resume"], living)):
        with pytest.raises(Refusal, match=refusal):
            tiny.run("supervised", [*argv, *more])
    Path("go").touch()
    for process in both:
        finish(process)
    assert [differences(whole[1], path.parent) for path in folders] == [[], []]


CHANGES = [Path.unlink, lambda path: shutil.copy(path.rename(path.with_name("old")), path)]


@pytest.mark.parametrize("change", CHANGES, ids=["removed", "replaced"])
def test_a_foreign_log_is_refused(change, tree, tmp_path, monkeypatch):
    """One that is another in a resume: test_refusals.py."""
    log_step, argv = run.Run.log_step, small(tree, tmp_path)

    def changed(self, step, *rest):
        log_step(self, step, *rest)
        if step == 5:
            change(tmp_path / "log.jsonl")

    monkeypatch.setattr(run.Run, "log_step", changed)
    with pytest.raises(Refusal, match="log.jsonl: moved, removed or replaced while this run"):
        tiny.run("supervised", argv)
    assert step_of(tmp_path / "last.pt") == 3
    if change is Path.unlink:
        with pytest.raises(Refusal, match="beside it is not there: put that"):
            tiny.run("supervised", argv)


def test_the_best_of_a_lost_future_goes_aside(tree, tmp_path, monkeypatch, capsys):
    """The one that the checkpoint names comes back; without it the next one counts."""
    mious, evaluate = iter([0.1, 0.2, 0.3, 0.15, 0.1]), supervised.evaluate
    argv, best = small(tree, tmp_path, evaluate=2, save=4), tmp_path / "best.pt"

    def other(*inputs):
        result, maps = evaluate(*inputs)
        return result | {"miou": next(mious)}, maps

    monkeypatch.setattr(supervised, "evaluate", other)
    stopped("supervised", argv, 7)
    assert [step_of(best), step_of(tmp_path / "best-before.pt")] == [6, 4]
    stopped("supervised", argv, 5)
    assert [step_of(best), step_of(tmp_path / "best-2.pt")] == [4, 6]
    best.unlink()
    stopped("supervised", argv, 7)
    assert "not the weights of step 4: the best is looked for anew" in capsys.readouterr().out
    assert step_of(best) == 6
    argv = small(tree, tmp_path / "b", evaluate=4, save=3)  # last.pt of step 3 knows no best one
    for stop in (5, 4):
        stopped("supervised", argv, stop)
    assert step_of(tmp_path / "b/best-2.pt") == 4 and not (tmp_path / "b/best.pt").exists()


@pytest.mark.parametrize("batch, precise_bn, told", [(3, 0, True), (4, 0, False), (3, 5, False)])
def test_few_images_for_batch_norm_are_told(batch, precise_bn, told):
    args = SimpleNamespace(batch_size=batch, precise_bn=precise_bn, amp="none")
    one = Mock(args=args, group=Group(0, 1, torch.device("cpu")), script=Path("supervised.py"))
    one.data.hashes.return_value = {"labeled": (3, "set")}
    run.Run._introduce(one, {"student": torch.nn.BatchNorm2d(1)})
    assert ("3 labelled images feed BN" in one.say.call_args.args[0]) == told


FEATURES = [(f"avx2 {name}", False) for name in ("avx512_bf16", "amx_bf16", "bf16")]
FEATURES += [("avx2 avx512vl", True), (None, False)]


@pytest.mark.parametrize("features, told", FEATURES)
def test_bf16_on_a_cpu_without_its_instructions_is_told(features, told, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "CPUINFO", tmp_path / "cpuinfo")
    if features:
        distributed.CPUINFO.write_text(f"flags : fpu {features}")
    for amp, device in (("bf16", "cpu"), ("none", "cpu"), ("bf16", "cuda")):
        args = SimpleNamespace(batch_size=4, precise_bn=0, amp=amp)
        one = Mock(args=args, group=Group(0, 1, torch.device(device)), script=Path("a.py"))
        one.data.hashes.return_value = {}
        run.Run._introduce(one, {"student": torch.nn.Linear(1, 1)})
        said = one.say.call_args.args[0]
        assert ("--amp bf16" in said) == (told and (amp, device) == ("bf16", "cpu"))


def test_without_its_best_pt_a_run_says_that_the_last_weights_alone_are_scored(
    tmp_path, monkeypatch, capsys
):
    one = Mock(folder=tmp_path, script=Path("supervised.py"), say=print, best={"step": 2})
    one.group.device = "cpu"
    for why in ("no such checkpoint", "of step 3, not of 2"):
        assert run.Run.load_best(one, {}) is None
        said = capsys.readouterr().out
        assert said.endswith(f"best.pt: {why}; only the last weights are scored\n")
        monkeypatch.setattr(run, "load_checkpoint", lambda *_: {"step": 3})
    one.best["step"] = 3
    monkeypatch.setattr(run, "load_networks", lambda saved, _: saved["step"])
    assert run.Run.load_best(one, {}) == 3
    monkeypatch.setattr(run, "reduced", lambda step, op: step * 0)  # another process has it not
    assert run.Run.load_best(one, {}) is None
    assert "not read by every process; only the last" in capsys.readouterr().out


def test_the_log_is_on_the_disk_before_the_checkpoint_that_names_it(tmp_path, monkeypatch):
    one = Mock(folder=tmp_path, first=True, saved_best=0, script=Path("a.py"), sha256="0")
    one.data.named.return_value = []
    one.file = open(tmp_path / "log.jsonl", "ab")
    one.hash.hexdigest.return_value = "1"
    monkeypatch.setattr(run, "acting", lambda args: {})
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    run.Run._save(one, "best.pt", {}, step=1)
    assert synced == [(tmp_path / name).stat().st_ino for name in ("log.jsonl", "best.pt")]


@pytest.fixture
def exits(monkeypatch):
    """The end of a process is a SystemExit."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


MACHINE = {
    "worker (pid 7) is killed by signal: Bus error": "--workers 0, or a larger /dev/shm",
    "[Errno 24] Too many open files": "ulimit -n 4096",
    "worker (pid(s) 7) exited unexpectedly": "fewer --workers",
    "gloo/transport/tcp/pair.cc:554 Read error: Connection reset by peer": "another process has",
    "DefaultCPUAllocator: can't allocate memory": "a smaller --batch-size",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": (
        "a smaller --batch-size"
    ),
    "DefaultCPUAllocator: not enough memory": "a smaller --batch-size",  # Windows
    os.strerror(errno.ENOSPC): "no space left: ",
    os.strerror(errno.EACCES): "not permitted: ",
}


class NoBatches(torch.utils.data.Dataset):
    """Its items are functions, which no process can hand to another."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return lambda: index


def test_a_loader_that_cannot_hand_on_a_batch_ends_instead_of_being_waited_for():
    more = dict(num_workers=1, batch_size=None, worker_init_fn=distributed.unstoppable)
    loader = torch.utils.data.DataLoader(NoBatches(), timeout=60, **more)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loader)


def test_a_loader_that_cannot_hand_on_a_batch_ends_in_one_line(exits, monkeypatch, capsys):
    monkeypatch.setattr(queues.Queue, "_on_queue_feeder_error", None)
    distributed.unstoppable(0)
    for error, remedy in (("AF_UNIX path too long", ": a shorter TMPDIR"), ("no files left", "")):
        with pytest.raises(SystemExit, match="1"):
            queues.Queue._on_queue_feeder_error(OSError(error), None)
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"a loader cannot hand on a batch: {error}{remedy}"


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_are_no_group_are_told_so(name, monkeypatch, capsys):
    for count, told in (("1", False), ("8", True)):
        monkeypatch.setenv(name, count)
        assert distributed.setup("cpu").world == 1
        assert ("one of 8 processes" in capsys.readouterr().err) == told


@pytest.mark.parametrize("text", MACHINE)
def test_a_machine_that_is_too_small_is_one_line(text, exits, capsys):
    with pytest.raises(SystemExit) as end, run.refusals():
        raise RuntimeError(text)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and text in line and MACHINE[text] in line


def test_an_optimizer_saved_by_an_older_torch_goes_on():
    """AdamW's groups have had one name more since torch 2.7; another value is another recipe."""
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).backward()
    optimizer.step()
    saved = {"path": "last.pt", "optimizer": optimizer.state_dict()}
    (group,) = saved["optimizer"]["param_groups"]
    del group["maximize"]
    load_optimizer(saved, optimizer)
    group["betas"] = (0.5, 0.999)
    with pytest.raises(Refusal, match="betas of its group 0"):
        load_optimizer(saved, optimizer)


def test_a_name_that_stdout_cannot_encode_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with run.refusals():
        print("caf\xe9")
    assert sys.stdout.buffer.getvalue() == b"caf\\xe9\n"


@pytest.mark.parametrize("local, waits", [("0", 0), ("1", 1)])
def test_one_process_of_a_machine_says_it_at_once(local, waits, exits, monkeypatch, capsys):
    for name, value in ("RANK", "3"), ("LOCAL_RANK", local):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", waited := Mock())
    with pytest.raises(SystemExit), run.refusals():
        raise Refusal("no")
    assert capsys.readouterr().err.count("no\n") == 1 and waited.call_count == waits


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
    text = finish(start(small(tree, out), fault=("full", 3, 0.5)), 2)
    line = f"{out}/last.pt: cannot be written (File too large); what was saved before is whole"
    assert text.splitlines()[-1].endswith(line) and "Traceback" not in text
    assert step_of(out / "last.pt") == 3
    assert not list(out.glob("*.tmp"))
    tiny.run("supervised", small(tree, out))
    assert differences(whole[1], out) == []
    with pytest.raises(Refusal, match="cannot be written"):
        run.make_folder(Path("x" * 300))


@pytest.mark.parametrize("world, device, loaders", [(1, "cpu", 2), (2, "cpu", 0), (2, "cuda", 2)])
def test_no_loader_is_forked_for_an_evaluation_beside_gloo(world, device, loaders, monkeypatch):
    """docs/reliability.md: such a child may wait for ever."""
    loader = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(supervised, "DataLoader", loader)
    group = Group(0, world, SimpleNamespace(type=device))
    with pytest.raises(InterruptedError):
        supervised.evaluate(torch.nn.Identity(), Mock(), range(8), Mock(workers=2), group)
    assert loader.call_args.kwargs["num_workers"] == loaders


@pytest.mark.parametrize("parts, every, words", [
    pytest.param("moves", 1, "put aside as best-2.pt, the run ends equal", marks=pytest.mark.slow),
    ("operations", 16, "supervised: 4 kills, all end equal: "),
    ("contents", 24, "refused in one line, "),
])  # fmt: skip
def test_some_of_the_faults_of_files(parts, every, words):
    """Operations: half of last.pt, of best.pt and of a line are written."""
    flags = ["--files", "--parts", parts, "--every", every, "--scripts", "supervised"]
    assert words in finish(Forked([faults.__file__, *flags]))
