"""The run folder: refusals, signals, log, progress, exact resume. No number is made here.

runs/<name>/  log.jsonl  last.pt  previous.pt  best.pt  best-before.pt  panels/*.png  lock

A run folder has one owner, process 0 of one run, from its first second to its last; every
checkpoint knows the log that it belongs to, by its length and hash. No log is ever deleted; of
last.pt the one before is kept, of best.pt the one that last.pt names.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy
import PIL
import torch
import torchvision
from tqdm import tqdm

from common import Refusal, pictures
from common.checkpoints import (
    NEVER,
    check_classes,
    check_finite,
    check_form,
    check_tensors,
    load_checkpoint,
    load_init,
    load_networks,
    load_optimizer,
    load_state,
    write_checkpoint,
    writing,
)
from common.data import CONVERT, data_flags
from common.distributed import ReduceOp, from_first, reduced, slow_bf16
from common.flags import NO_NUMBER, acting, as_fields, run_name
from common.track import Tracker, require

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

COLUMNS = 119  # of a line on the console


# what the machine refuses, as torch and Python word it, and the remedy
MACHINE = {
    r"shared memory|Bus error|No space left on device.*torch_": (
        "no shared memory for the loaders: --workers 0, or a larger /dev/shm (docker: --shm-size)"
    ),
    r"Too many open files|received 0 items of ancdata": (
        "too many open files: ulimit -n 4096, or --workers 0"
    ),
    r"No space left on device|Disk quota exceeded|not enough space on the disk": (
        "no space left: free some, or give another --out"
    ),
    r"Permission denied|Read-only file system|Operation not permitted|Access is denied": (
        "not permitted: who owns the file or folder, and may it be read and written?"
    ),
    r"can't allocate memory|Cannot allocate memory|out of memory|Unable to allocate|"
    r"not enough memory|paging file|error code: <1455>|Invalid buffer size|STATUS_ALLOC_FAILED": (
        "out of memory: a smaller --batch-size or --crop-size, --protocol slide or fewer --workers"
    ),
    r"worker.*(exited unexpectedly|killed by signal)": (
        "a loader has ended, by an error above or as Linux ends one where memory ends: "
        "fewer --workers, or more memory"
    ),
    r"gloo.*(Connection (closed|reset) by peer|Broken pipe)": (
        "another process has ended: its own line says why"
    ),
}


class Stopped(Exception):
    """SIGTERM came; all is saved."""

    def __init__(self, step):
        super().__init__(f"stopped by SIGTERM at step {step}")


@contextlib.contextmanager
def refusals(resume="the same command with --resume goes on"):
    """A Refusal becomes one line and exit code 2, Ctrl-C one and 130, SIGTERM one and 143.

    resume: what to do after a stop.
    """

    def interrupt(*_):
        """Ctrl-C ends the loaders at once: one that loses its reader prints a traceback."""
        end_loaders()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    if getattr(sys.stdout, "errors", "") == "strict":  # a name that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        except SystemExit:  # --help
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # a reader who left is met here, not at Python's own end
        return
    except Refusal as error:
        # a loader process wraps the message in a traceback and leaves it as the last line
        message = str(error).strip().splitlines()[-1].removeprefix("common.Refusal: ")
        line = f"{Path(sys.argv[0]).name}: {message}"
        code = 2
    except (KeyboardInterrupt, Stopped) as error:
        code = 143 if isinstance(error, Stopped) else 130
        line = f"{str(error) or 'stopped'}; {resume}"
    except BaseException as error:
        end_loaders()  # deaf to SIGTERM: the exit would wait for them for ever
        if isinstance(error, BrokenPipeError) and nobody_reads():
            os._exit(141)  # | head: as programs end that SIGPIPE ends
        remedy = machine_remedy(error)
        if not remedy:
            raise
        line = f"{Path(sys.argv[0]).name}: {remedy}"
        code = 2
    end_loaders()
    # where they stop alike, before there is a group or by a signal, one of each machine says it
    rank = os.environ.get("RANK", "0")
    says = "0" in (rank, os.environ.get("LOCAL_RANK")) or not rank.isdecimal()
    if code == 2 and not says:
        if not torch.distributed.is_initialized():
            time.sleep(10)  # torchrun ends all when one has ended: this one, if another has said it
        says = True
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if says:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the live line
        print(clear + line, file=sys.stderr, flush=True)
    os._exit(code)  # others may wait in a collective: no orderly end of the process group


def nobody_reads():
    """Returns whether stdout is a pipe whose reader has ended."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Windows has no poll
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)  # that the reader has gone is told unasked
        return bool(pipe.poll(0))
    return False


def machine_remedy(error):
    """Returns the line for an error that the machine's limits cause, "" for any other."""
    if not isinstance(error, (MemoryError, OSError, RuntimeError)):
        return ""
    text = " ".join(str(error).split()) or "out of memory"  # MemoryError says nothing
    for pattern, remedy in MACHINE.items():
        if re.search(pattern, text):
            return f"{remedy} ({text[:150]})"
    return ""


def end_loaders():
    """Kills the loader processes, which would live on for seconds."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise for each of them
    for loader in multiprocessing.active_children():
        loader.kill()


class Run:
    """One run folder. Only process 0 writes."""

    def __init__(self, args, script, group, data, preset):
        """args: resolved flags. script: path. data: its lists are counted and hashed for the log.

        preset: as fill takes it; the folder is named by what differs from it. Raises Refusal if
        the folder exists and --resume was not given, or if processes see other files.
        """
        self.args = args
        self.script = Path(script)
        self.group = group
        self.data = data
        self.first = group.rank == 0
        self.begin = 0  # the step that this start goes on from
        self.start = time.time()
        self.spent = 0.0  # seconds before a resume
        self.signalled = False  # this process has had SIGTERM
        self.asked = False  # a process has had SIGTERM: the loop is to end
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "signalled", True))
        self.sha256 = hashlib.sha256(self.script.read_bytes()).hexdigest()
        self.lock = None
        self.bar = None
        self.tracker = None
        self.file = None
        self.meter = torch.zeros(0, device=group.device)  # steps and sums since the last line
        self.clock = Counter()  # steps, and seconds for data and all, likewise
        self.bad_step = torch.full((), NEVER, dtype=torch.int64, device=group.device)
        self.best = {"miou": -1.0, "step": 0}
        self.hash = hashlib.sha256()  # of all lines of the log
        self.saved_best = 0  # the step of the best weights that last.pt names
        self.written_best = 0  # the step of those in best.pt
        require(args)
        name = f"runs/{run_name(script, args, preset)}"
        name, self.resume = from_first(self._own_folder(name) if self.first else None)
        self.folder = Path(name)
        if not self.folder.is_dir():
            wrong = f"process {group.rank} does not see it: one file system for all machines"
            raise Refusal(f"{self.folder}: {wrong}")
        if from_first(data.hashes()) != data.hashes():
            raise Refusal(f"process {group.rank} has other images than process 0: the same for all")

    def _own_folder(self, name):
        """Makes this process the owner of a folder; returns its name, and whether its run goes on.

        --out, or name, name-2 and so on: the newest with --resume, or if this torchrun began it and
        starts it again; else the first that is free. Raises Refusal.
        """
        args = self.args
        names = [name, *(f"{name}-{i}" for i in range(2, 10_000))]
        free = next(i for i, n in enumerate(names) if holds_nothing(Path(n)))
        newest = Path(args.out or names[max(free - 1, 0)])
        if args.resume or began_here(newest):
            make_folder(newest)
            if owner := self._lock(newest):
                raise Refusal(f"{newest}: {owner} writes there: end it first")
            return str(newest), True
        for folder in map(Path, [args.out] if args.out else names[free:]):
            if not (make_folder(folder) or holds_nothing(folder)):
                wrong = f"{folder} exists: --resume goes on there, or give another --out"
            elif owner := self._lock(folder):
                wrong = f"{folder}: {owner} writes there: give another --out"
            else:
                return str(folder), False
        raise Refusal(wrong)

    def _lock(self, folder):
        """Holds folder/lock until this process ends; returns who does, if it is another."""
        self.lock, owner = lock(folder / "lock", self.say)
        return owner

    # ---- starting ----

    def restore(self, networks, optimizer, state):
        """With --resume, fills all three from last.pt; returns the step to go on from, or 0.

        From previous.pt, if that is damaged. The log is cut back to that step. Raises Refusal if
        both are, or if another script or recipe wrote it (naming the first flag that differs).
        """
        names = ("last.pt", "previous.pt")
        found = any((self.folder / name).exists() for name in names)
        self._introduce(networks)
        if not self.resume or not from_first(found):
            source = load_init(self.args.init, networks, self.data) if self.args.init else "zero"
            self._put_aside()
            self.say(f"run folder: {self.folder}, starting from {source}")
            return 0
        saved = self._newest_whole()
        self._refuse_other(saved)
        load_networks(saved, networks)
        load_optimizer(saved, optimizer)
        load_state(saved, state)
        meter = saved["meter"].to(self._precise())  # before it moves: MPS has no float64
        self.meter = meter.to(self.group.device) * self.first  # all processes' in one
        self.best = saved["best"]
        self.begin = saved["step"]
        self.spent = saved["time"]["elapsed_s"]
        if self.first:
            self._cut_log(saved)
            self._match_best()
        self.best = from_first(self.best)
        self.saved_best = self.best["step"]
        self.written_best = self.best["step"]
        self.say(f"run folder: {self.folder}, going on from step {self.begin}")
        self._log_resume()
        return self.begin

    def _put_aside(self):
        """Renames what a run has left that was ended before its first checkpoint."""
        log = self.folder / "log.jsonl"
        if self.first and log.exists():
            best = self.folder / "best.pt"
            with writing(log):
                os.replace(log, free_name(log))
                if best.exists():
                    os.replace(best, free_name(best))

    def _introduce(self, networks):
        """Says what computes what on what."""
        millions = sum(p.numel() for net in networks.values() for p in net.parameters()) / 1e6
        images = [f"{count} {name}" for name, (count, _) in self.data.hashes().items() if count]
        self.say(
            f"{self.script.stem}: {self._device()}, {self.group.world} x "
            f"{torch.get_num_threads()} threads; {len(networks)} networks of "
            f"{millions / len(networks):.1f} M parameters; images: {', '.join(images)}"
        )
        batch = self.args.batch_size // self.group.world
        synchronized = self.group.world > 1 and self.group.device.type == "cuda"
        norms = any("running_mean" in key for net in networks.values() for key in net.state_dict())
        if norms and batch < 4 and not synchronized and not self.args.precise_bn:
            self.say(f"{batch} labelled images feed BN: --precise-bn 20 may score differently")
        if note := slow_bf16(self.args.amp, self.group.device):
            self.say(note)

    def _newest_whole(self):
        """Returns last.pt, or previous.pt if that is damaged. Raises Refusal if both are."""
        last = self.folder / "last.pt"
        previous = self.folder / "previous.pt"
        try:
            return load_checkpoint(last)
        except Refusal as error:
            if not previous.exists():
                raise
            self.say(f"{error}; the one before it is used")
        saved = load_checkpoint(previous)
        if self.first:  # it must not become the previous one
            with writing(last), contextlib.suppress(FileNotFoundError):
                os.replace(last, self.folder / "damaged.pt")
        return saved

    def _refuse_other(self, saved):
        """Raises Refusal where a checkpoint's dict is not one of this very run."""
        path = saved["path"]
        check_form(saved)
        if saved["script"] != self.script.name:
            wrong = f"written by {saved['script']}, not by {self.script.name}"
            raise Refusal(f"{path}: {wrong}; --init starts from it")
        check_classes(saved, self.data)
        given = as_fields(type(self.args), saved["args"])
        for old, new, kind in (
            (given, as_fields(type(self.args), acting(self.args)), "another recipe, --{}"),
            (saved["lists"], self.data.hashes(), "other {} images,"),
        ):
            both = sorted(set(old) & set(new))  # first: the others act or not for these
            for name in both + sorted(set(old) ^ set(new)):
                if name not in NO_NUMBER and old.get(name) != new.get(name):
                    wrong = f"{old.get(name)} there and {new.get(name)} here"
                    wrong = f"{kind.format(name.replace('_', '-'))} {wrong}"
                    raise Refusal(f"{path}: {wrong}; another --out starts anew")
        if not 0 < saved["step"] <= self.args.total_iters:
            raise Refusal(f"{path}: step {saved['step']} of {self.args.total_iters}")
        step = torch.tensor(saved["step"])
        if reduced(step.clone(), ReduceOp.MIN) != reduced(step, ReduceOp.MAX):
            raise Refusal(f"{path}: processes see different ones: one file system for all")

    def _cut_log(self, saved):
        """Takes from the log what came after a checkpoint, into lost.jsonl. Raises Refusal.

        The log must begin with the very bytes that stood there when the checkpoint was saved.
        """
        path = self.folder / "log.jsonl"
        with writing(path):
            lines = path.read_bytes() if path.exists() else b""
        kept = lines[: saved["log"]["bytes"]]
        self.hash = hashlib.sha256(kept)
        if self.hash.hexdigest() != saved["log"]["sha256"]:
            wrong = "is not there" if not lines else "is not the log that belongs to it"
            raise Refusal(
                f"{saved['path']}: {path.name} beside it {wrong}: put that back, or start anew "
                f"with another --out and --init {saved['path']}"
            )
        if lines == kept:
            return
        with writing(path):
            with open(self.folder / "lost.jsonl", "ab") as lost:
                lost.write(lines[len(kept) :])
            path.with_suffix(".tmp").write_bytes(kept)
            os.replace(path.with_suffix(".tmp"), path)

    def _match_best(self):
        """Finds the best.pt that the checkpoint names; one of a future that is lost goes aside."""
        best = self.folder / "best.pt"
        before = self.folder / "best-before.pt"
        step = self.best["step"]
        if step and step_of(best) != step:
            if best.exists():
                os.replace(best, free_name(best))
            if step_of(before) == step:
                os.replace(before, best)
            else:
                self.say(f"{best}: not the weights of step {step}: the best is looked for anew")
                self.best = {"miou": -1.0, "step": 0}
        elif not step and best.exists():
            os.replace(best, free_name(best))

    def _log_resume(self):
        """Writes and says how this start differs from the one before."""
        if not self.first:
            return
        old = self._starts()[-1]
        new = self._header() | {"kind": "resume"}
        for name in ("versions", "device", "threads", "world", "sha256", "common"):
            if old.get(name) != new[name]:
                self.say(f"{name}: {old.get(name)} before, {new[name]} now")
        del new["kind"]
        self.log("resume", self.begin, best_step=self.best["step"], **new)

    def _starts(self):
        """Returns the lines of the log that begin a run or go on with it."""
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["kind"] in ("start", "resume")]

    # ---- checkpoints ----

    def _save(self, name, networks, **content):
        content["networks"] = {k: net.state_dict() for k, net in networks.items()}
        if not self.first:
            return
        self._open()
        content["script"] = self.script.name
        content["args"] = acting(self.args)
        content["classes"] = self.data.named()
        content["sha256"] = self.sha256
        self._check_log()
        with writing(self.folder / "log.jsonl"):  # a power cut takes no line that is named below
            os.fsync(self.file.fileno())
        content["log"] = {"bytes": self.file.tell(), "sha256": self.hash.hexdigest()}
        previous = None
        if name == "last.pt":
            previous = self.folder / "previous.pt"
        elif self.saved_best and self.written_best == self.saved_best:
            previous = self.folder / "best-before.pt"  # last.pt names it
        write_checkpoint(self.folder / name, content, previous)
        if name == "best.pt":
            self.written_best = content["step"]

    def _check_log(self):
        """Raises Refusal if the log at its path is not the file that this run writes."""
        path = self.folder / "log.jsonl"
        own = os.fstat(self.file.fileno())
        if not path.exists() or not os.path.samestat(own, path.stat()):
            raise Refusal(f"{path}: moved, removed or replaced while this run writes it")

    def keep_last(self, step, networks, optimizer, state):
        """Saves last.pt: all that the run needs to go on, tensors and plain values.

        The one before becomes previous.pt.
        """
        check_tensors(step, networks, state)
        self._save(
            "last.pt",
            networks,
            step=step,
            optimizer=optimizer.state_dict(),
            state=state,
            meter=reduced(self.meter.clone()),
            best=self.best,
            time={"elapsed_s": self.spent + time.time() - self.start},
            lists=self.data.hashes(),
        )
        self.saved_best = self.best["step"]
        if step == self.args.total_iters:  # only scores are left, which --resume makes anew
            signal.signal(signal.SIGTERM, self._stop)
            if self.signalled:
                self._stop()

    def _stop(self, *_):
        """Ends this process at once; the others need no word, as nothing is left to save."""
        raise Stopped(self.args.total_iters)

    def keep_best(self, step, result, maps, networks):
        """Logs a validation (scores, panels); saves best.pt if its mIoU is the highest so far."""
        check_tensors(step, networks)
        self.log("eval", step, on="val", **result)
        miou = 100 * result["miou"]
        constant = 100 * result["constant"]
        self.say(f"val mIoU {miou:.2f} % (a constant: {constant:.2f} %)", step)
        if not self.best["step"] and result["constant"] >= result["miou"]:
            self.say(at_constant(result, self.args))
        if self.args.pictures_every:
            self.panels(f"{step:06d}-val", maps)
        if result["miou"] > self.best["miou"]:
            self.best = {"miou": result["miou"], "step": step}
            self._save("best.pt", networks, step=step)

    # ---- log and console ----

    def due(self, step, every):
        """Returns whether something is due: every so many steps (0: never), and at the end."""
        return bool(every) and (step % every == 0 or step == self.args.total_iters)

    def log_step(self, step, logged, lr, begin, spent):
        """Takes what a step logs ({name: 0-dim tensor}) and writes a line of means when it is due.

        lr: of this step. begin: when it began. spent: {what: seconds of it}. Never waits for the
        device but when something is due; then raises Refusal if a number was not finite, naming the
        step.
        """
        values = torch.stack([v.detach().to(self._precise()) for v in logged.values()])
        sums = torch.cat([values.new_ones(1), values])
        if len(self.meter) not in (0, len(sums)):
            raise Refusal(f"{self.folder}: the meter of its checkpoint is that of other numbers")
        self.meter = self.meter + sums if len(self.meter) else sums
        self.bad_step = self.bad_step.clamp(max=torch.where(values.isfinite().all(), NEVER, step))
        self._advance(step)
        # SIGTERM: all processes learn of it in the same step, which is saved
        self.asked = bool(reduced(torch.tensor(int(self.signalled)), ReduceOp.MAX))
        args = self.args
        intervals = (args.log_every, args.eval_every, args.save_every, args.pictures_every)
        if self.asked or any(self.due(step, every) for every in intervals):
            check_finite(int(reduced(self.bad_step.clone(), ReduceOp.MIN)))
        totals = []  # since the last line, of all processes: how many steps, then each sum
        if self.due(step, args.log_every):
            totals = reduced(self.meter.clone()).tolist()
        self.clock.update(spent, step=time.time() - begin, steps=1)
        if step == self.begin + 1:
            self.say(f"first step: {time.time() - begin:.1f} s")
        if totals:
            self._line(step, logged, lr, totals)

    def _advance(self, step):
        """Moves the live line, where there is a terminal."""
        if self.first and sys.stderr.isatty():
            if self.bar is None:
                total = self.args.total_iters
                self.bar = tqdm(total=total, initial=self.begin, unit="step", dynamic_ncols=True)
            self.bar.update(step - self.bar.n)

    def _line(self, step, logged, lr, totals):
        count, *sums = totals
        means = {name: s / count for name, s in zip(logged, sums, strict=True)}
        steps = self.clock.pop("steps")
        times = {f"{name}_ms": round(1e3 * t / steps, 2) for name, t in self.clock.items()}
        times["elapsed_s"] = round(self.spent + time.time() - self.start, 1)
        self.meter = torch.zeros_like(self.meter)
        self.clock = Counter()
        if self.group.device.type == "cuda":
            times["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        self.log("train", step, lr=lr, **means, time=times)
        numbers = [f"{name} {value:.3g}" for name, value in means.items()]
        self.say(f"{times['step_ms']:.0f} ms", step, numbers)

    def log(self, kind, step, **values):
        """Appends one line to log.jsonl; what depends on the clock belongs in values["time"]."""
        if not self.first:
            return
        self._open()
        self._write({"kind": kind, "step": step, **values})
        self.tracker.numbers(kind, values, step)

    def _open(self):
        if self.file is None:
            with writing(self.folder / "log.jsonl"):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file = open(self.folder / "log.jsonl", "ab")
            if not self.file.tell():
                self._write(self._header())
            self.tracker = Tracker(self.args, self.folder, self.begin, self.data.classes)

    def _write(self, entry):
        line = (json.dumps(entry) + "\n").encode()
        with writing(self.folder / "log.jsonl"):
            self.file.write(line)
            self.file.flush()
        self.hash.update(line)

    def _header(self):
        modules = {"numpy": numpy, "pillow": PIL, "torch": torch, "torchvision": torchvision}
        versions = {name: module.__version__ for name, module in modules.items()}
        versions["python"] = platform.python_version()
        return {
            "kind": "start",
            "script": self.script.name,
            "argv": sys.argv[1:],
            "git": git_state(self.script.resolve().parent),
            "job": job(),
            "sha256": self.sha256,
            "common": hash_of_folder(Path(__file__).parent),
            "args": acting(self.args),
            "lists": self.data.hashes(),
            "classes": list(self.data.classes),
            "versions": versions,
            "device": self._device(),
            "threads": torch.get_num_threads(),
            "world": self.group.world,
        }

    def _precise(self):
        """Returns the type of the log's sums: MPS has no float64."""
        return torch.float32 if self.group.device.type == "mps" else torch.float64

    def _device(self):
        if self.group.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{self.group.device.type.upper()}, {platform.machine()}"

    def say(self, text, step=None, numbers=()):
        """Prints one line from process 0, with step and ETA if step is given.

        numbers: texts that stand before, as many as a line has room for; the log has all.
        """
        if step is not None:
            seconds = (time.time() - self.start) / (step - self.begin)
            left = timedelta(seconds=int(seconds * (self.args.total_iters - step)))
            text = f"{text}  ETA {left}"
            line = f"step {step}/{self.args.total_iters}  "
            for number in numbers:
                if len(line) + len(number) + len(text) + 2 <= COLUMNS:
                    line += f"{number}  "
            text = line + text
        if self.first:
            self._print(text)

    def _print(self, text):
        """Prints a line; where nobody reads any more, the run goes on: log.jsonl is the record."""
        try:
            if self.bar is not None:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except (OSError, ValueError):
            sys.stdout = open(os.devnull, "w")

    def panels(self, name, maps):
        """Saves panels/<name>.png of the first 4; maps: {title: (B, ...) tensor or B tensors}."""
        if self.first:
            count = min(4, *map(len, maps.values()))
            rows = [{k: v[i].detach().cpu() for k, v in maps.items()} for i in range(count)]
            path = self.folder / f"panels/{name}.png"
            with writing(path):
                sheet = pictures.panels(rows, self.data.palette)
                sheet = pictures.with_legend(sheet, self.data.classes, self.data.palette)
                path.parent.mkdir(parents=True, exist_ok=True)
                sheet.save(path)
            self._open()
            self.tracker.picture(path)

    def load_best(self, networks):
        """Fills networks from best.pt; returns its step.

        None with a word if it is not there for all processes: one alone would wait for the others.
        """
        path = self.folder / "best.pt"
        step = 0
        wrong = f"{path}: not read by every process"
        try:
            saved = load_checkpoint(path, self.script)
            if saved["step"] != self.best["step"]:
                raise Refusal(f"{path}: of step {saved['step']}, not of {self.best['step']}")
            step = load_networks(saved, networks)
        except Refusal as error:
            wrong = error
        if reduced(torch.tensor(step, device=self.group.device), ReduceOp.MIN):
            return step
        self.say(f"{wrong}; only the last weights are scored")
        return None

    def finish(self, results, on):
        """Logs and prints the scores of last and best, and the commands that show the next."""
        self.log("done", self.args.total_iters, on=on, best_step=self.best["step"], **results)
        self.say(report(self.data, results, on))
        checkpoint = self.folder / ("best.pt" if "best" in results else "last.pt")
        run = shlex.quote(self.folder.as_posix())
        self.say(f"next: python predict.py {run} IMAGES --out pictures  # new images")
        self.say(f"      python predict.py {run} --split {on} --out scored  # errors, worst first")
        self.say(f"      python results/curves.py {run}")
        file = shlex.quote(checkpoint.as_posix())
        self.say(f"      python {self.script.name} --eval-only --checkpoint {file}")
        for writer in (self.bar, self.tracker, self.file):
            if writer is not None:
                writer.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_folder(folder):
    """Makes a folder and those above; returns False if it is there already. Raises Refusal."""
    with writing(folder):
        above = next((p for p in (folder, *folder.parents) if p.exists()), folder)  # no such drive
        if not above.is_dir():
            raise Refusal(f"{above}: a file, no folder: give another --out")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()  # of two starts at once one fails here
        except FileExistsError:
            return False
    return True


def lock(path, say):
    """Holds a file until it is closed or this process ends; returns (it, who does, if another).

    say: called with a line where the file system has no locks. Raises Refusal.
    """
    if fcntl is None:
        return None, ""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no child inherits it
    except BlockingIOError:
        file.seek(0)
        return file, file.read().strip() or "another process"
    except OSError as error:  # a file system without locks
        say(f"{path.parent}: not locked ({error.strerror}): start nothing else there")
    file.truncate(0)
    file.write(f"process {os.getpid()} of {platform.node()}\n")
    file.flush()
    return file, ""


def holds_nothing(folder):
    """Returns whether a folder is absent, or holds nothing but the lock of a start that failed."""
    return not folder.exists() or (
        folder.is_dir() and {p.name for p in folder.iterdir()} <= {"lock"}
    )


def job():
    """Returns what names the torchrun that started this process, now and after a failure."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if not name:
        return None
    began = ""  # in a container every torchrun is process 1
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
        began = f", began at tick {ticks} of boot {boot}"
    return f"{name}, process {os.getppid()}{began}"


def began_here(folder):
    """Returns whether the run in a folder was begun by the torchrun of this process."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        with open(folder / "log.jsonl") as file:
            return json.loads(file.readline())["job"] == job() is not None
    return False


def free_name(path):
    """Returns a name beside a file that no file has: log-2.jsonl and so on."""
    names = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(2, 10_000))
    return next(name for name in names if not name.exists())


def step_of(path):
    """Returns the step of a checkpoint file; None if there is none, or it is damaged."""
    with contextlib.suppress(Refusal):
        return load_checkpoint(path)["step"]
    return None


def hash_of_folder(folder):
    """Returns the first 16 digits of a sha256 over the code and the facts in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def git_state(folder):
    """Returns the commit of a checkout and whether it was changed; None without git."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def at_constant(result, args):
    """Returns why one class everywhere may score as much as a network, and the command that tells.

    result: scores of a first evaluation.
    """
    if result["constant"] == 1:
        return f"val's masks hold one class and ignored pixels, as those of 0 and 255 do: {CONVERT}"
    command = f"python prepare_data.py stats {data_flags(args)}"
    return f"one class everywhere scores as much: too early, or wrong masks or --lr: {command}"


def report(data, results, on):
    """Returns a table of IoU per class and mIoU in per cent; results: {column: scores}."""
    names = [f"IoU on {on}, %", *data.classes, "mIoU", "accuracy", "mIoU of a constant"]
    columns = [[title, *in_per_cent(scores)] for title, scores in results.items()]
    lines = []
    for name, *cells in zip(names, *columns, strict=True):
        lines.append(f"{name:22}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def in_per_cent(scores):
    """Returns scores as texts: IoU of each class, mIoU, accuracy, mIoU of a constant."""
    values = [*scores["iou"], scores["miou"], scores["accuracy"], scores["constant"]]
    return ["absent" if value is None else f"{100 * value:.2f}" for value in values]
