"""Parts of gpu.py that need processes: repeats, kills, process groups, signals, whole runs."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks import steps
from benchmarks.gpu_checks import without_tf32
from benchmarks.runs import differences, kill
from common import distributed

ITERS = 16  # of the runs that end
# on the generated data set: small, but the script's own network unless --tiny
SHORT = "--crop-size 64 --workers 0 --log-every 2 --save-every 8 --pictures-every 0"


def flags_of(name, out, device, iters, more="", processes=1):
    """Returns the flags of a short run, with four images of each stream in a process."""
    words = f"{SHORT} --total-iters {iters} --eval-every {iters} --device {device} {more}".split()
    words += ["--batch-size", str(4 * processes)]
    if name != "supervised":
        words += ["--batch-size-unlabeled", str(4 * processes)]
    return [*words, "--out", str(out)]


class Child:
    """A script in a process of its own; its output goes to a file beside its run folder."""

    def __init__(self, command, out):
        self.out, self.output = Path(out), Path(f"{out}.txt")
        with open(self.output, "w") as file:
            pipes = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": steps.ROOT}
            self.process = subprocess.Popen(command, **pipes)

    def steps_logged(self):
        """Returns the last step in its log, 0 if there is none."""
        with contextlib.suppress(OSError):
            text = (self.out / "log.jsonl").read_text()
            found = re.findall(r'"kind": "train", "step": (\d+)', text)
            return int(found[-1]) if found else 0
        return 0

    def reached(self, step):
        """Returns whether it has logged a step and saved a checkpoint, and is still at work."""
        there = self.steps_logged() >= step and (self.out / "last.pt").exists()
        return there and self.process.poll() is None

    def send_after(self, step, number, until):
        """Sends a signal once a step is logged and a checkpoint is there; returns whether it did.

        It did not if the run had ended before, or time was up.
        """
        while time.time() < until and self.process.poll() is None:
            if self.reached(step):
                self.process.send_signal(number)
                return True
            time.sleep(0.005)
        return False

    def wait(self, until):
        """Returns the exit code; a process that takes longer is killed with all that it started."""
        try:
            return self.process.wait(max(until - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            kill(self.process)
            return self.process.returncode

    def tail(self):
        """Returns the last line that it printed."""
        return (self.output.read_text().strip().splitlines() or [""])[-1][:200]


def soon(report, seconds=40):
    """Returns when to stop waiting for one thing: one that hangs must not cost all others."""
    return report.until if report.options.tiny else min(report.until, time.time() + seconds)


def starter(command, out, report):
    """Returns a function that gives a Child: begun now, or with --tiny not before it is called.

    Starting takes longest on a GPU's machine, cores are what a test's machine has few of.
    """
    child = None if report.options.tiny else Child(command, out)
    return lambda: child or Child(command, out)


# ---- --deterministic ----


def repeats(options, report):
    """Every script twice with --deterministic, bit for bit; once killed by SIGKILL and resumed."""
    names = ["cps_fpl"] if options.tiny else list(steps.MODES)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        children = {}
        for name in names:  # all at once: starting takes longest
            out = Path(folder) / f"{name}-killed"
            flags = flags_of(name, out, report.device.type, ITERS, "--deterministic")
            children[name] = Child(steps.command(name, flags, options.tiny), out)
        hit = killed_in_mid_run(children, soon(report, 60))
        for name, child in children.items():
            report.attempt(
                f"{name}.py",
                lambda n=name, c=child: repeated(n, c, n in hit, options, report),
                seconds=20,
            )


def killed_in_mid_run(children, until):
    """Kills each child by SIGKILL at step 10 or later, after the checkpoint of step 8.

    Returns those it hit.
    """
    hit, waiting = set(), dict(children)
    while waiting and time.time() < until:
        for name, child in list(waiting.items()):
            if child.reached(10):
                child.process.kill()
                hit.add(name)
            if name in hit or child.process.poll() is not None:
                waiting.pop(name)
        time.sleep(0.002)
    for child in children.values():
        child.wait(until)
    return hit


def repeated(name, child, hit, options, report):
    """Adds two rows for one script. child: its run; hit: whether it was killed on its way."""
    device = report.device.type
    whole = [child.out.with_name(f"{name}-{number}") for number in (1, 2)]
    for out in whole:
        flags = flags_of(name, out, device, ITERS, "--deterministic")
        steps.whole_run(name, flags, options.tiny)
    found = differences(*whole)
    report.check(f"{name}.py twice", len(found), 0, ", ".join(found[:3]))
    if not hit:
        ok = None if child.process.returncode == 0 else False  # 0: too fast to be killed
        note = f"it was not killed on its way: {child.tail()}"
        return report.row(f"{name}.py killed, resumed", ok=ok, note=note)
    flags = flags_of(name, child.out, device, ITERS, "--deterministic --resume")
    steps.whole_run(name, flags, options.tiny)
    found = differences(whole[0], child.out)
    report.check(f"{name}.py killed, resumed", len(found), 0, ", ".join(found[:3]))


# ---- processes, devices, signals ----

ENDS = {"Ctrl-C": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143)}  # and the exit code
ENDLESS = 100_000  # steps of a run that is to be ended


def processes(options, report):
    """torchrun with NCCL, DDP's no_sync, checkpoints between devices, Ctrl-C and SIGTERM."""
    device = report.device.type
    count = max(torch.cuda.device_count(), 1) if report.cuda else 2
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder, moved, stopped = Path(folder), {}, {}
        for first in dict.fromkeys((device, "cpu")):
            out = folder / f"from-{first}"
            flags = flags_of("supervised", out, first, ENDLESS)
            command = steps.command("supervised", flags, options.tiny)
            moved[first] = starter(command, out, report)
        for word in ENDS:
            flags = flags_of("cps_fpl", folder / word, device, ENDLESS)
            command = steps.command("cps_fpl", flags, options.tiny)
            stopped[word] = starter(command, folder / word, report)
        report.attempt("no_sync", lambda: accumulated(report))
        for first, child in moved.items():
            second = "cpu" if first == device else device
            report.attempt(
                f"{first} to {second}",
                lambda f=first, s=second, c=child: carried(c(), f, s, options, report),
            )
        for word, child in stopped.items():
            report.attempt(word, lambda w=word, c=child: ended(c(), w, report))
        report.attempt("torchrun", lambda: grouped(folder / "group", count, options, report))


def grouped(out, count, options, report):
    """A run of several processes, or of one under torchrun, ends well and says how many it had."""
    flags = flags_of("cps_fpl", out, report.device.type, 4, processes=count)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = steps.command("cps_fpl", flags, options.tiny)[1:]
    child = Child([*launch, "--nproc_per_node", str(count), *script], out)
    code = child.wait(report.until)
    world = None
    if code == 0:
        world = json.loads((out / "log.jsonl").read_text().splitlines()[0])["world"]
    note = f"{'NCCL' if report.cuda else 'gloo'}, {count} process(es)"
    if report.cuda:
        note += "; SyncBN acts from two GPUs on" if count == 1 else "; with SyncBN"
    if code:
        note += f"; exit code {code}: {child.tail()}"
    late = code != 0 and report.left() <= 1  # the clock ended it, which is no failure
    report.row("torchrun", ok=None if late else world == count, world=world, note=note)


def accumulated(report):
    """In DDP a backward under no_sync and one without give the sum of both gradients."""
    without_tf32()
    words = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words["MASTER_PORT"] = free.getsockname()[1]
    with patch.dict(os.environ, {key: str(value) for key, value in words.items()}):
        group = distributed.setup(report.device.type)
        try:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
            net = net.to(group.device)
            ids = [group.device.index] if report.cuda else None
            wrapped = nn.parallel.DistributedDataParallel(net, device_ids=ids)
            x, y = torch.randn(2, 4, 3, 16, 16).to(group.device)
            sent = []  # a bucket of gradients each

            def noted(state, bucket):
                sent.append(bucket)
                return allreduce_hook(state, bucket)

            wrapped.register_comm_hook(None, noted)
            with distributed.no_sync(wrapped):
                wrapped(x).square().mean().backward()
            report.check("DDP: no_sync sends nothing", len(sent), 0)
            wrapped(y).square().mean().backward()
            report.check("DDP: then all is sent", float(not sent), 0)
            found = torch.cat([p.grad.flatten() for p in net.parameters()])
            net.zero_grad()
            (net(x).square().mean() + net(y).square().mean()).backward()
            truth = torch.cat([p.grad.flatten() for p in net.parameters()])
            error = float((found - truth).norm() / truth.norm())
            report.check("DDP: no_sync, then a backward", error, 1e-5)
        finally:
            distributed.teardown()


def ended(child, word, report):
    """A signal ends a run with its code; after SIGTERM the step that it ended in is saved."""
    number, code = ENDS[word]
    hit = child.send_after(10, number, soon(report))
    begin = time.time()
    found = child.wait(soon(report, 20))
    seconds = round(time.time() - begin, 2)
    note = child.tail()
    right = hit and found == code
    if word == "SIGTERM":
        step = torch.load(child.out / "last.pt", "cpu", weights_only=True)["step"]
        right = right and f"by SIGTERM at step {step};" in note
    report.row(word, ok=right, code=found, seconds=seconds, note=note)


def carried(child, first, second, options, report):
    """A run that was killed on one device goes on from its checkpoint on another."""
    hit = child.send_after(10, signal.SIGKILL, soon(report))
    child.wait(soon(report))
    begun = child.steps_logged()
    flags = flags_of("supervised", child.out, second, ENDLESS, "--resume")
    other = Child(steps.command("supervised", flags, options.tiny), child.out)
    going = other.send_after(begun + 4, signal.SIGKILL, soon(report))
    other.wait(soon(report))
    note = f"killed after step {begun}, then seen at step {other.steps_logged()}"
    report.row(f"checkpoint from {first} to {second}", ok=hit and going, note=note)


# ---- the protocol camvid-small ----

PROTOCOL = {
    "supervised": {"labels alone": ""},
    "cps_fpl": {"FPL": "", "CPS": "--unsup-loss ce"},
    "mean_teacher": {"CutMix-MT": "--cutmix"},
    "ael_fpl": {"FPL+AEL": ""},
    "u2pl": {"U2PL": ""},
    "esl": {"ESL": ""},
}


def camvid(options, report):
    """Runs camvid-small with 1/8 of the labels until time is up; logs go beside the JSON."""
    logs = Path(options.out).resolve().with_suffix("")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, arms in PROTOCOL.items():
            for arm, words in arms.items():
                out = Path(folder) / f"{name}-{arm.replace(' ', '-')}"
                what = name, arm, words, out, logs, options, report
                report.attempt(f"{name}.py {arm}", lambda w=what: one_arm(*w), seconds=20)
                if options.tiny:
                    return


def one_arm(name, arm, words, out, logs, options, report):
    """Adds the row of one run; keeps its log. A run that time cut off has not failed."""
    flags = f"--dataset camvid --split 1/8 {words} --device {report.device.type}".split()
    flags += ["--data-root", options.camvid, "--out", str(out)]
    if options.tiny:
        flags += "--total-iters 2 --eval-every 2 --crop-size 32 --workers 0".split()
    if options.weights:
        flags += "--backbone resnet50 --stem classic --weights".split() + [options.weights]
    begin = time.time()
    child = Child(steps.command(name, flags, options.tiny), out)
    code = child.wait(report.until - 5)
    if code:
        late = report.left() <= 6
        note = f"no time to finish: {child.tail()}" if late else f"exit code {code}: {child.tail()}"
        return report.row(f"{name}.py {arm}", ok=None if late else False, note=note)
    logs.mkdir(parents=True, exist_ok=True)
    shutil.copy(out / "log.jsonl", logs / f"{out.name}.jsonl")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    report.row(
        f"{name}.py {arm}",
        last=round(100 * log[-1]["last"]["miou"], 2),
        best=round(100 * log[-1]["best"]["miou"], 2),
        minutes=round((time.time() - begin) / 60, 1),
        note="test mIoU" + (", ImageNet weights" if options.weights else ""),
    )
