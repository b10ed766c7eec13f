"""Runs as others see them: their folders compared, their processes ended, their times."""

import contextlib
import json
import os
import signal
import statistics
import time
from pathlib import Path

import torch


def flat(value, name=""):
    """Returns a checkpoint as {path: leaf}: tensors and plain values."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    leaves = {}
    for key, part in items:
        leaves |= flat(part, f"{name}.{key}")
    return leaves


def differences(folder, other, but=()):
    """Returns the names of all that differs between two run folders, but for their place and times.

    Checkpoints are compared bit for bit, the log line by line, but for the lines of resumes. but:
    flags that make no number.
    """
    wrong = []
    but = {"out", "resume", *but}
    for name in ("last.pt", "best.pt"):
        one, two = (flat(torch.load(f / name, "cpu", weights_only=True)) for f in (folder, other))
        clock = {".time.elapsed_s", ".log.bytes", ".log.sha256"}
        for key in sorted((set(one) | set(two)) - clock - {f".args.{name}" for name in but}):
            a, b = one.get(key), two.get(key)
            if torch.is_tensor(a) and torch.is_tensor(b):
                same = a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
            else:
                same = type(a) is type(b) and a == b
            wrong += [] if same else [f"{name}{key}"]
    one, two = ([x for x in log(f) if x["kind"] != "resume"] for f in (folder, other))
    if len(one) != len(two):
        wrong.append(f"log.jsonl: {len(one)} and {len(two)} lines")
    for number, (a, b) in enumerate(zip(one, two, strict=False), 1):
        for line in (a, b):
            for name in ("time", "argv", "git", "job"):  # git: others may commit meanwhile
                line.pop(name, None)
            for name in but:
                line.get("args", {}).pop(name, None)
        wrong += [] if a == b else [f"log.jsonl:{number}: {a} and {b}"]
    return wrong


def bits(x):
    """Returns the bytes of a tensor of any type."""
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def log(folder):
    """Returns the lines of a run's log as dicts."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def kill(process):
    """SIGKILLs a started process and all that it started, torchrun's workers too; waits."""
    pids = list(getattr(process, "pids", [process.pid]))
    for pid in pids:  # grows: torchrun's workers are sessions of their own
        children = Path(f"/proc/{pid}/task/{pid}/children")
        pids += map(int, children.read_text().split()) if children.exists() else ()
    if process.poll() is None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(running(pid) for pid in pids):
        time.sleep(0.01)


def running(pid):
    """Returns whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def spread(times):
    """Returns {name: {s, ratio, low, high}} of {name: seconds of each round}, to the first name."""
    base = next(iter(times.values()))
    rows = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        rows[name] = {"s": statistics.median(own), "ratio": statistics.median(ratios)}
        rows[name] |= {"low": min(ratios), "high": max(ratios)}
    return rows
