"""Faults of files, for benchmarks/faults.py: operations killed, two writers, contents, moves.

operations: a run's every file operation below its folder is counted (open to write, write,
truncate, fsync, mkdir, rename, unlink, lock); then, for each, a run is killed there, a write after
half of its bytes, and started again. It has to end as the undisturbed run, bit for bit, and every
whole line that the killed run had logged has to be in a file of the folder still.
writers: two starts at once, in the default folder and with one --out, and --resume beside a living
run; with one process and, by torchrun, with two.
moves: the folder or the log moved away in mid-run, best.pt of a future that a kill took.
contents: a checkpoint whose parts are taken away or changed, each in turn: the resume is one line
that names the part and ends with 2, or it ends as the undisturbed run.
"""

import builtins
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import tiny
from benchmarks import faults
from benchmarks.runs import differences

NUMBERS = dict(iters=6, log=1, evaluate=3, save=2, pictures=6, batch=4)
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.truncate", "fcntl.lockf")
ABSENT = object()  # stands for a part that is taken away


# ---- in a forked process ----


def count_operations(folder, last, found):
    """Appends each file operation below a folder to the list found; kills at number `last`.

    last: from 1; 0: none. Opens are those that can write.
    """
    folder = str(folder)
    plain_open = io.open
    fsync = os.fsync

    def operation(name):
        """Counts one; returns whether it is the last."""
        found.append(name)
        return len(found) == last

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Counted(io.FileIO):
        """A file whose writes are operations, each one call of the system."""

        def write(self, data):
            if operation(f"write {Path(self.name).name}"):
                super().write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
                die()
            return super().write(data)

        def truncate(self, size=None):
            if operation(f"truncate {Path(self.name).name}"):
                die()
            return super().truncate(size)

    def opened(file, mode="r", buffering=-1, *rest, **named):
        """In place of open, for files of the folder that are written."""
        below = isinstance(file, (str, Path)) and str(file).startswith(folder)
        if not below or set(mode) <= set("rbt"):
            return plain_open(file, mode, buffering, *rest, **named)
        raw = Counted(str(file), mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered)

    def audited(event, args):
        """Python calls it before each operation that it names."""
        if event == "open":
            path, _, flags = args
            wanted = str(path).startswith(folder) and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            wanted = event == "fcntl.lockf" or str(args[0]).startswith(folder)
        if wanted and operation(f"{event} {Path(str(args[0])).name}"):
            die()

    def synchronized(number):
        if operation("fsync"):
            die()
        fsync(number)

    io.open = builtins.open = opened
    os.fsync = synchronized
    sys.addaudithook(lambda event, args: audited(event, args) if event in watched else None)
    watched = {"open", *CHANGES}


def forked(name, argv, output, before=None, after=None):
    """Does in a forked process what a command line does; returns its exit code, -9 if killed."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            if before:
                before()
            faults.child(json.dumps([name, argv, None]))
            if after:
                after()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- kills at operations ----


def whole_lines(text):
    """Returns the whole lines of a log as a set."""
    return set(text.split(b"\n")[:-1])


def kill_operations(name, folder, every=1):
    """Kills a run at (every so many of) its file operations; returns {what it is: kills}."""
    tree = folder / "tree"
    words = [*faults.MORE.get(name, "").split(), "--resume"]
    noise = folder / "output"
    counted = folder / "counted.json"

    def flags(out):
        return [*tiny.flags(tree, out, **NUMBERS), *words]

    found = []
    whole = folder / f"{name}-whole"
    code = forked(
        name,
        flags(whole),
        noise,
        lambda: count_operations(whole, 0, found),
        lambda: counted.write_text(json.dumps(found)),
    )
    assert code == 0, noise.read_text()
    operations = json.loads(counted.read_text())
    kinds = {}
    for number, operation in list(enumerate(operations, 1))[every - 1 :: every]:
        out = folder / f"{name}-cut"
        shutil.rmtree(out, ignore_errors=True)
        count = lambda out=out, number=number: count_operations(out, number, [])  # noqa: E731
        code = forked(name, flags(out), noise, count)
        assert code == -signal.SIGKILL, (number, operation, code, noise.read_text()[-2000:])
        log = out / "log.jsonl"
        lines = whole_lines(log.read_bytes()) if log.exists() else set()
        code = forked(name, flags(out), noise)
        assert code == 0, (number, operation, noise.read_text()[-2000:])
        wrong = differences(whole, out)
        kept = set().union(*(whole_lines(path.read_bytes()) for path in out.glob("*.jsonl")))
        assert not wrong and lines <= kept, (number, operation, wrong, lines - kept)
        kind = operation.split()[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


# ---- two writers ----


def ended(process, code, words=""):
    """Waits for a started run; fails if it does not end with code (torchrun's is 1) and words."""
    _, text = process.communicate(timeout=900)
    codes = {code, 1} if code else {0}
    assert process.returncode in codes and words in text, (process.returncode, words, text)


def two_writers(count, folder):
    """Two starts at once, each of three ways; yields what was seen of each."""
    place = folder / f"writers{count}"
    place.mkdir()
    go = place / "go"
    tree = folder / "tree"

    def start(out, *more, hold=True):
        fault = ("held", 3, str(go)) if hold else None
        argv = [*tiny.flags(tree, out, **NUMBERS), *more]
        return faults.started("supervised", argv, count, fault, place)

    def wait(path):
        until = time.time() + 300
        while not (path.exists() and b'"step": 2' in path.read_bytes()):
            assert time.time() < until, path
            time.sleep(0.05)

    whole = place / "whole"
    ended(start(whole, hold=False), 0)
    both = [start("") for _ in range(2)]
    go.touch()
    for process in both:
        ended(process, 0)
    made = sorted((place / "runs").iterdir())
    wrong = [differences(whole, out) for out in made]
    assert len(made) == 2 and wrong == [[], []], (made, wrong)
    yield f"default folder: {made[0].name} and {made[1].name}, both end equal"
    go.unlink()
    out = place / "same"
    both = [start(out) for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.05)
    both.sort(key=lambda process: process.returncode is None)
    ended(both[0], 2, "give another --out")  # its owner, or that it exists: who came first
    wait(out / "log.jsonl")
    ended(start(out, "--resume"), 2, "writes there: end it first")
    go.touch()
    ended(both[1], 0)
    assert not differences(whole, out)
    yield "one --out: one is refused in one line, the other ends equal"
    yield "--resume beside it: refused, the run ends equal"


# ---- moves ----


def moves(folder):
    """The folder, the log, best.pt moved under a run; yields what was seen of each."""
    tree = folder / "tree"
    place = folder / "moves"
    place.mkdir()
    whole = place / "whole"
    noise = place / "output"

    def flags(out):
        return [*tiny.flags(tree, out, **NUMBERS), "--resume"]

    def moving(old, new, step=3):
        """Lets the run move a file in a step."""

        def before():
            log_step = faults.run.Run.log_step

            def moved(self, done, *rest):
                log_step(self, done, *rest)
                if done == step:
                    os.rename(old, new)

            faults.run.Run.log_step = moved

        return before

    assert forked("supervised", flags(whole), noise) == 0
    for what in ("the folder", "the log"):
        out = place / what.split()[1]
        old = out if what == "the folder" else out / "log.jsonl"
        away = place / f"away-{out.name}"
        text = place / f"output-{out.name}"
        assert forked("supervised", flags(out), text, moving(old, away)) == 2, text.read_text()
        last = text.read_text().splitlines()[-1]
        assert "Traceback" not in text.read_text() and str(out) in last, last
        if old == out:
            shutil.rmtree(out, ignore_errors=True)
        os.rename(away, old)  # put back
        assert forked("supervised", flags(out), noise) == 0, noise.read_text()
        assert not differences(whole, out)
        yield f"{what} moved away: one line, code 2; put back and resumed it ends equal"
    out = place / "future"

    def dies():
        keep_last = faults.run.Run.keep_last

        def killed(self, step, *rest):
            if step == 4:  # best.pt is of step 3, last.pt of step 2
                os.kill(os.getpid(), signal.SIGKILL)
            keep_last(self, step, *rest)

        faults.run.Run.keep_last = killed

    assert forked("supervised", flags(out), noise, dies) == -signal.SIGKILL
    lost = torch.load(out / "best.pt", weights_only=True)["step"]
    assert forked("supervised", flags(out), noise) == 0
    assert not differences(whole, out) and lost == 3 and (out / "best-2.pt").exists()
    yield "best.pt of a lost future: put aside as best-2.pt, the run ends equal"


# ---- contents ----


def variants(value):
    """Yields (name, value) of what stands in a checkpoint in place of a part."""
    yield "absent", ABSENT
    yield "None", None
    yield "text", "text"
    if torch.is_tensor(value):
        yield "other dtype", value.to(torch.int16 if value.is_floating_point() else torch.float32)
        yield "one more dimension", value[None].clone()
        if value.ndim and len(value) > 1:
            yield "shorter", value[:-1].clone()
    elif isinstance(value, (dict, list)):
        yield "empty", type(value)()
        if isinstance(value, list) and value:
            yield "shorter", value[:-1]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield "negative", -1
        yield "huge", 10**9


def paths(value, path=()):
    """Yields the paths of the parts of a checkpoint; of equals, as tensors are, first and last."""
    yield path
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    equals = [key for key, part in value.items() if torch.is_tensor(part) or isinstance(key, int)]
    for key, part in value.items():
        if key not in equals[1:-1]:
            yield from paths(part, (*path, key))


def replaced(value, path, new):
    """Returns a checkpoint with another part at a path; containers are copied."""
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    part = replaced(value[path[0]], path[1:], new)
    if part is not ABSENT:
        copied[path[0]] = part
    elif isinstance(copied, dict):
        del copied[path[0]]
    else:
        copied.pop(path[0])
    return copied


def contents(name, folder, every=1):
    """Changes (every so many) parts of a last.pt in turn; returns (refused, harmless) counts."""
    tree = folder / "tree"
    place = folder / f"{name}-contents"
    place.mkdir()
    words = [*faults.MORE.get(name, "").split(), "--resume"]
    out = place / "run"
    argv = [*tiny.flags(tree, out, **NUMBERS), *words]
    noise = place / "output"
    assert forked(name, argv, noise, lambda: stop_after(4)) == 143, noise.read_text()
    shutil.copytree(out, place / "begun")
    assert forked(name, argv, noise) == 0, noise.read_text()
    out.rename(place / "whole")
    saved = torch.load(place / "begun/last.pt", weights_only=True)
    refused = harmless = 0
    wrong = []
    for path in list(paths(saved))[::every]:
        part = saved
        for key in path:
            part = part[key]
        flag = path[:1] == ("args",) and len(path) > 1  # compared with this run's, all alike
        for variant, new in variants(part):
            if path == () and new is ABSENT or flag and variant != "text":
                continue
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(place / "begun", out)
            (out / "previous.pt").unlink()  # which would be taken
            torch.save(replaced(saved, path, new), out / "last.pt")
            noise.write_text("")
            code = forked(name, argv, noise)
            text = noise.read_text()
            last = (text.splitlines() or [""])[-1]
            if code == 2 and "Traceback" not in text and str(out) in last:
                refused += 1
            elif code == 0 and whole_again(place / "whole", out):
                harmless += 1
            else:
                wrong.append((".".join(map(str, path)), variant, code, last[:200]))
                print("WRONG", *wrong[-1], flush=True)
    assert not wrong, f"{len(wrong)} contents accepted or not refused in one line"
    return refused, harmless


def whole_again(whole, out):
    """Returns whether a run folder has all that another has, and equals it."""
    there = all((out / name).exists() for name in ("last.pt", "best.pt"))
    return there and not differences(whole, out)


def stop_after(step):
    """Lets a run have SIGTERM in a step, which it saves."""
    log_step = faults.run.Run.log_step

    def stopped(self, done, *rest):
        self.signalled = done == step
        log_step(self, done, *rest)

    faults.run.Run.log_step = stopped
