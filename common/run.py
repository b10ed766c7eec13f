"""The run folder: refusals, signals, log, progress, exact resume. No number is made here.

runs/<name>/  log.jsonl  last.pt  previous.pt  best.pt  panels/*.png
"""

import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
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
    check_finite,
    check_tensors,
    load_checkpoint,
    load_init,
    load_networks,
    write_checkpoint,
    writing,
)
from common.distributed import ReduceOp, from_first, reduced
from common.flags import NO_NUMBER, plain

COLUMNS = 119  # of a line on the console


class Stopped(Exception):
    """SIGTERM came; all is saved."""

    def __init__(self, step):
        super().__init__(f"stopped by SIGTERM at step {step}")


@contextlib.contextmanager
def refusals():
    """A Refusal becomes one line and exit code 2, Ctrl-C one and 130, SIGTERM one and 143."""

    def interrupt(*_):
        """Ctrl-C ends the loaders at once: one that loses its reader prints a traceback."""
        end_loaders()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
        return
    except Refusal as error:
        # a loader process wraps the message in a traceback and leaves it as the last line
        message = str(error).strip().splitlines()[-1].removeprefix("common.Refusal: ")
        line = f"{Path(sys.argv[0]).name}: {message}"
        code = 2
    except (KeyboardInterrupt, Stopped) as error:
        code = 143 if isinstance(error, Stopped) else 130
        line = f"{str(error) or 'stopped'}; the same command with --resume goes on"
    except BaseException:
        end_loaders()  # deaf to SIGTERM: the exit would wait for them for ever
        raise
    end_loaders()
    # where all processes stop alike, before there is a group or by a signal, one of them says it
    rank = os.environ.get("RANK", "0")
    alone = code == 2 and torch.distributed.is_initialized()
    sys.stdout.flush()
    if rank == "0" or not rank.isdecimal() or alone:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the live line
        print(clear + line, file=sys.stderr, flush=True)
    os._exit(code)  # others may wait in a collective: no orderly end of the process group


def end_loaders():
    """Kills the loader processes, which would live on for seconds."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise for each of them
    for loader in multiprocessing.active_children():
        loader.kill()


class Run:
    """One run folder. Only process 0 writes; the folder appears with the first line of the log."""

    def __init__(self, args, script, group, data):
        """args: resolved flags. script: path. data: its lists are counted and hashed for the log.

        Raises Refusal if the folder exists and --resume was not given.
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
        self.bar = None
        self.board = None
        self.file = None
        self.meter = torch.zeros(0, device=group.device)  # steps and sums since the last line
        self.clock = Counter()  # steps, and seconds for data and all, likewise
        self.bad_step = torch.full((), NEVER, dtype=torch.int64, device=group.device)
        self.best = {"miou": -1.0, "step": 0}
        name, self.resume = from_first(self._folder())
        self.folder = Path(name)
        above = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        if not above.is_dir():
            raise Refusal(f"{above}: a file, no folder: give another --out")
        if self.folder.exists() and not self.resume:
            raise Refusal(f"{self.folder} exists: --resume goes on there, or give another --out")
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise Refusal("--tensorboard: not installed; pip install tensorboard")

    def _folder(self):
        """--out or runs/<script>-<dataset>-<split>-s<seed>, and whether the run there goes on.

        That is the newest with --resume, or if this torchrun began it and starts it again; or free.
        """
        args = self.args
        split = args.split.replace("/", "_")
        name = f"runs/{self.script.stem}-{args.dataset}-{split}-s{args.seed}"
        names = [name, *(f"{name}-{i}" for i in range(2, 10_000))]
        free = next(i for i, n in enumerate(names) if not Path(n).exists())
        newest = args.out or names[max(free - 1, 0)]
        if args.resume or began_here(Path(newest)):
            return newest, True
        return args.out or names[free], False

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
            source = load_init(self.args.init, networks) if self.args.init else "zero"
            if self.first:  # of a run that was killed before its first checkpoint
                with writing(self.folder / "log.jsonl"):
                    (self.folder / "log.jsonl").unlink(missing_ok=True)
            self.say(f"run folder: {self.folder}, starting from {source}")
            return 0
        saved = self._newest_whole()
        self._refuse_other(saved)
        load_networks(saved, networks)
        optimizer.load_state_dict(saved["optimizer"])
        for name, value in saved["state"].items():
            state[name] = value.to(state[name].device) if torch.is_tensor(value) else value
        self.meter = saved["meter"].to(self.group.device) * self.first  # all processes' in one
        self.best = saved["best"]
        self.begin = saved["step"]
        self.spent = saved["time"]["elapsed_s"]
        self._cut_log(self.begin)
        if saved["sha256"] != self.sha256:
            self.log("resume", self.begin, sha256=self.sha256, was=saved["sha256"])
        self.say(f"run folder: {self.folder}, going on from step {self.begin}")
        return self.begin

    def _introduce(self, networks):
        """Says what computes what on what."""
        millions = sum(p.numel() for net in networks.values() for p in net.parameters()) / 1e6
        images = [f"{count} {name}" for name, (count, _) in self.data.hashes().items() if count]
        self.say(
            f"{self.script.stem}: {self._device()}, {self.group.world} x "
            f"{torch.get_num_threads()} threads; {len(networks)} networks of "
            f"{millions / len(networks):.1f} M parameters; images: {', '.join(images)}"
        )

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
        if not {"optimizer", "state", "meter", "best", "time", "lists"} <= set(saved):
            raise Refusal(f"{path}: a best.pt, which holds no optimizer; --init starts from it")
        if saved["script"] != self.script.name:
            wrong = f"written by {saved['script']}, not by {self.script.name}"
            raise Refusal(f"{path}: {wrong}; --init starts from it")
        for old, new, kind in (
            (saved["args"], plain(self.args), "another recipe, --{}"),
            (saved["lists"], self.data.hashes(), "other {} images,"),
        ):
            for name in sorted((set(old) | set(new)) - set(NO_NUMBER)):
                if old.get(name) != new.get(name):
                    wrong = f"{old.get(name)} there and {new.get(name)} here"
                    wrong = f"{kind.format(name.replace('_', '-'))} {wrong}"
                    raise Refusal(f"{path}: {wrong}; another --out starts anew")
        step = torch.tensor(saved["step"])
        if reduced(step.clone(), ReduceOp.MIN) != reduced(step, ReduceOp.MAX):
            raise Refusal(f"{path}: processes see different ones: one file system for all")

    def _cut_log(self, step):
        """Takes from the log what came after a step."""
        path = self.folder / "log.jsonl"
        if not (self.first and path.exists()):
            return
        kept = b""
        with writing(path):
            lines = path.read_bytes().splitlines()
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    if entry["kind"] != "done" and entry.get("step", -1) <= step:
                        kept += line + b"\n"
                except (ValueError, TypeError, LookupError):
                    if number < len(lines):  # a kill cuts off the last one
                        wrong = f"line {number} is no line of a log; move the file away"
                        raise Refusal(f"{path}: {wrong}") from None
            path.with_suffix(".tmp").write_bytes(kept)
            os.replace(path.with_suffix(".tmp"), path)

    # ---- checkpoints ----

    def _save(self, name, networks, **content):
        content["networks"] = {k: net.state_dict() for k, net in networks.items()}
        if not self.first:
            return
        self._open()
        content["script"] = self.script.name
        content["args"] = plain(self.args)
        content["sha256"] = self.sha256
        previous = self.folder / "previous.pt" if name == "last.pt" else None
        write_checkpoint(self.folder / name, content, previous)

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

    def keep_best(self, step, result, maps, networks):
        """Logs a validation (scores, panels); saves best.pt if its mIoU is the highest so far."""
        check_tensors(step, networks)
        self.log("eval", step, on="val", **result)
        miou = 100 * result["miou"]
        constant = 100 * result["constant"]
        self.say(f"val mIoU {miou:.2f} % (a constant: {constant:.2f} %)", step)
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
        precise = torch.float32 if self.group.device.type == "mps" else torch.float64
        values = torch.stack([v.detach().to(precise) for v in logged.values()])
        sums = torch.cat([values.new_ones(1), values])
        self.meter = self.meter + sums if len(self.meter) else sums
        self.bad_step = self.bad_step.clamp(max=torch.where(values.isfinite().all(), NEVER, step))
        self._advance(step)
        # SIGTERM: all processes learn of it in the same step, which is saved
        self.asked = bool(reduced(torch.tensor(int(self.signalled)), ReduceOp.MAX))
        args = self.args
        intervals = (args.log_every, args.eval_every, args.save_every, args.pictures_every)
        if self.asked or any(self.due(step, every) for every in intervals):
            check_finite(int(reduced(self.bad_step.clone(), ReduceOp.MIN)))
        due = self.due(step, args.log_every)
        count, *sums = reduced(self.meter.clone()).tolist() if due else (1,)
        self.clock.update(spent, step=time.time() - begin, steps=1)
        if step == self.begin + 1:
            self.say(f"first step: {time.time() - begin:.1f} s")
        if due:
            self._line(step, logged, lr, count, sums)

    def _advance(self, step):
        """Moves the live line, where there is a terminal."""
        if self.first and sys.stderr.isatty():
            if self.bar is None:
                total = self.args.total_iters
                self.bar = tqdm(total=total, initial=self.begin, unit="step", dynamic_ncols=True)
            self.bar.update(step - self.bar.n)

    def _line(self, step, logged, lr, count, sums):
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
        with writing(self.folder / "log.jsonl"):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
        for name, value in values.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def _open(self):
        if self.file is None:
            with writing(self.folder / "log.jsonl"):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file = open(self.folder / "log.jsonl", "a")
                if not self.file.tell():
                    self.file.write(json.dumps(self._header()) + "\n")
                    self.file.flush()
            if self.args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder))

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
            "args": plain(self.args),
            "lists": self.data.hashes(),
            "versions": versions,
            "device": self._device(),
            "threads": torch.get_num_threads(),
            "world": self.group.world,
        }

    def _device(self):
        if self.group.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"CPU, {platform.machine()}"

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
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif self.first:
            print(text, flush=True)

    def panels(self, name, maps):
        """Saves panels/<name>.png of the first 4; maps: {title: (B, ...) tensor or B tensors}."""
        if self.first:
            count = min(4, *map(len, maps.values()))
            rows = [{k: v[i].detach().cpu() for k, v in maps.items()} for i in range(count)]
            path = self.folder / f"panels/{name}.png"
            with writing(path):
                pictures.save_panels(path, rows, self.data.palette)

    def finish(self, results, on):
        """Logs and prints the scores of last and best, and what can be done next."""
        self.log("done", self.args.total_iters, on=on, best_step=self.best["step"], **results)
        self.say(report(self.data, results, on))
        checkpoint = self.folder / "best.pt"
        self.say(f"next: python {self.script.name} --eval-only --checkpoint {checkpoint}")
        for writer in (self.bar, self.board, self.file):
            if writer is not None:
                writer.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def job():
    """Returns what names the torchrun that started this process, now and after a failure."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{name}, process {os.getppid()}" if name else None


def began_here(folder):
    """Returns whether the run in a folder was begun by the torchrun of this process."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        with open(folder / "log.jsonl") as file:
            return json.loads(file.readline())["job"] == job() is not None
    return False


def git_state(folder):
    """Returns the commit of a checkout and whether it was changed; None without git."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def report(data, results, on):
    """Returns a table of IoU per class and mIoU in per cent; results: {column: scores}."""
    names = [*data.classes, "mIoU", "accuracy", "mIoU of a constant"]
    lines = [f"{'IoU on ' + on + ', %':22}" + "".join(f"{column:>10}" for column in results)]
    for i, name in enumerate(names):
        line = f"{name:22}"
        for scores in results.values():
            value = [*scores["iou"], scores["miou"], scores["accuracy"], scores["constant"]][i]
            line += f"{'absent' if value is None else f'{100 * value:.2f}':>10}"
        lines.append(line)
    return "\n".join(lines)
