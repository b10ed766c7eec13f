"""The run folder: refusals, log, progress, checkpoints, exact resume. No number is made here.

runs/<name>/  log.jsonl  last.pt  previous.pt  best.pt  panels/*.png
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy
import PIL
import torch
import torchvision
import tyro
from tqdm import tqdm

from common import Refusal, pictures
from common.data import set_hash
from common.distributed import Group, ReduceOp, from_first, reduced, share

NO_NUMBER = """out resume eval_only checkpoint eval_on dry_run list_presets device workers data_root
log_every save_every pictures_every tensorboard""".split()
POSITIVE = """batch_size batch_size_unlabeled total_iters crop_size scales aspp_rates lr log_every
eval_every save_every T pooled paste_scales epochs tau anchors negatives keys bank_sizes parts top_k
queue sigma""".split()
TOP = {"T": 0.9999, "seed": 2**32 - 1}  # the seed: of steps, in torch's 64 bits
SHARES = "_prob _decay _kept _momentum _area _share threshold alpha_0 delta_p theta zeta".split()
NEVER = 2**62  # later than any step


def cli(kind, argv=None, **more):
    """Returns what tyro.cli makes of the flags; its box around a mistake becomes a Refusal."""
    with contextlib.redirect_stderr(io.StringIO()) as text:
        try:
            return tyro.cli(kind, args=argv, **more)
        except SystemExit as stop:
            if stop.code != 2:  # --help
                raise
    lines = [line.strip("│ ") for line in text.getvalue().splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰─"]
    ends = [i for i, line in enumerate(lines) if line.startswith(("Argument help", "For full"))]
    raise Refusal(" ".join(lines[: min(ends, default=None)]).replace(" .", "."))


def parse(cls, argv=None):
    """Returns cls filled from the flags; with --eval-only a checkpoint's stand below them."""
    args = cli(cls, argv)
    if not args.eval_only and (args.checkpoint or args.eval_on != "val"):
        raise Refusal("--checkpoint, --eval-on: with --eval-only; --init starts from a checkpoint")
    if not args.eval_only:
        return args
    saved = load_checkpoint(args.checkpoint or "--eval-only needs --checkpoint")["args"]
    names = set(saved) & set(vars(args)) - (set(NO_NUMBER) - {"data_root", "workers"})
    saved = {k: tuple(v) if isinstance(v := saved[k], list) else v for k in names}
    return cli(cls, argv, default=replace(args, **saved | {"weights": "none"}))


def resolve(args, preset):
    """Returns args with every None filled: field default < preset < recipe < explicit flag.

    preset: function of args to a dict. Raises Refusal for a field that nothing sets, and for a
    number out of range.
    """
    if args.labeled_list and args.split is None:
        args = replace(args, split="list")
    values = preset(args) | ({"weights": "none"} if args.init else {})
    ratio, lr = (args.batch_size or 0) / values.get("batch_size", 1), values.get("lr")
    if args.lr is None and lr and ratio not in (0, 1) and os.environ.get("RANK", "0") == "0":
        print(f"--lr {lr:g} is kept; the linear rule would have {lr * ratio:g} for this batch")
    args = replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if value is None and name != "split_seed" and not args.list_presets:
            raise Refusal(f"no preset of {args.dataset} sets {flag}: give a value")
        if name.endswith("scales") and (not value or list(value) != sorted(value)):
            raise Refusal(f"{flag} {value}: one number or more, rising")
        if name == "ranks" and value[0] >= value[1]:
            raise Refusal(f"{flag} {value}: the first below the second")
        for number in value if isinstance(value, tuple) else [value]:
            low = 0 if name not in POSITIVE else 1 if isinstance(number, int) else 1e-12
            high = TOP.get(name, 1 if name.endswith(tuple(SHARES)) else float("inf"))
            if isinstance(number, (int, float)) and not low <= number <= high:
                raise Refusal(f"{flag} {number}: a number from {low:g} to {high}")
    return args


def launch(cls, preset, main):
    """Runs main on the resolved flags; refusals as `refusing` has them."""
    refusing(lambda: main(resolve(parse(cls), preset)))


def refusing(call):
    """Runs call(); a Refusal becomes one line and exit code 2, Ctrl-C code 130, SIGTERM 143."""

    def interrupt(*_):
        """Ctrl-C ends the loaders at once: one that loses its reader prints a traceback."""
        end_loaders()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        return call()
    except (Refusal, KeyboardInterrupt) as error:
        stop = error
    except BaseException:
        end_loaders()  # deaf to SIGTERM: the exit would wait for them for ever
        raise
    end_loaders()
    rank, clear = os.environ.get("RANK", "0"), "\r\x1b[K" * sys.stderr.isatty()  # the live line
    if isinstance(stop, Refusal):
        # a loader process wraps the message in a traceback and leaves it as the last line
        line = str(stop).strip().splitlines()[-1].removeprefix("common.Refusal: ")
        code, line = 2, f"{Path(sys.argv[0]).name}: {line}"
    else:  # with words: SIGTERM
        code = 143 if stop.args else 130
        line = f"stopped{stop}; the same command with --resume goes on"
    # where all processes stop alike, before there is a group or by a signal, one of them says it
    sys.stdout.flush()
    if rank == "0" or not rank.isdecimal() or code == 2 and torch.distributed.is_initialized():
        print(clear + line, file=sys.stderr, flush=True)
    os._exit(code)  # others may wait in a collective: no orderly end of the process group


def end_loaders():
    """Kills the loader processes, which would live on for seconds."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise for each of them
    for loader in multiprocessing.active_children():
        loader.kill()


def plain(args):
    """Returns the flags as a dict of JSON values (tuples become lists)."""
    return json.loads(json.dumps(asdict(args)))


def load_checkpoint(path, script=None):
    """Returns a checkpoint's dict, on the CPU (weights_only: no code is run).

    Raises Refusal if it is absent, damaged or, with script (a path), written by another script.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if bad := file.testzip():  # torch.load does not check the sums
                raise ValueError(f"checksum of {bad}")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        by = (saved["script"], saved["step"], dict(saved["args"]))[0]
        dict(next(iter(saved["networks"].values())))
    except FileNotFoundError:
        raise Refusal(f"{path}: no such checkpoint") from None
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        line = f"damaged, or no checkpoint of these scripts ({line})"
        raise Refusal(f"{path}: {line}; give another --checkpoint, --init or --out") from None
    if script and by != Path(script).name:
        wrong = f"written by {by}, not by {Path(script).name}"
        raise Refusal(f"{path}: {wrong}; --init starts from it")
    return saved | {"path": str(path)}


def load_networks(saved, networks):
    """Fills {name: network} from a checkpoint's dict; returns its step. Raises Refusal."""
    try:
        for name, net in networks.items():
            net.load_state_dict(saved["networks"][name])
    except RuntimeError as error:
        line = f"does not fit these flags ({' '.join(str(error).split())[:150]})"
        raise Refusal(f"{saved['path']}: {line}; give those that it was trained with") from None
    return saved["step"]


def load_init(path, networks):
    """Starts networks from a checkpoint of any of these scripts; returns in words what was taken.

    Each takes the network of its name, or else the first. A head that does not fit stays random; so
    does that of a second branch which would equal the first: such a pair never disagrees.
    """
    saved, words, taken = load_checkpoint(path), [], set()
    for name, net in networks.items():
        source = name if name in saved["networks"] else next(iter(saved["networks"]))
        twin = source in taken and name.startswith("branch")
        taken.add(source)
        old, own = saved["networks"][source], net.state_dict()
        shapes = ({k: v.shape for k, v in s.items() if k.startswith("head.")} for s in (old, own))
        head = next(shapes) == next(shapes) and not twin
        part = old if head else {k: v for k, v in old.items() if not k.startswith("head.")}
        rest = {k: v for k, v in own.items() if k.startswith("head.")}
        load_networks(saved | {"networks": {name: rest | part}}, {name: net})
        words.append(f"{name} from its {source}" + ", head random" * (not head))
    return f"{path}, step {saved['step']}: {'; '.join(words)}"


class Run:
    """One run folder. Only process 0 writes; the folder appears with the first line of the log."""

    def __init__(self, args, script, group, data):
        """args: resolved flags. script: path. data: its lists are counted and hashed for the log.

        Raises Refusal if the folder exists and --resume was not given.
        """
        self.args, self.script, self.group, self.data = args, Path(script), group, data
        self.first, self.begin, self.told, self.asked = group.rank == 0, 0, False, False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "told", True))
        self.sha256 = hashlib.sha256(self.script.read_bytes()).hexdigest()
        self.start, self.spent = time.time(), 0.0  # now, and seconds before a resume
        self.bar, self.board, self.file = None, None, None
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
        a = self.args
        name = f"runs/{self.script.stem}-{a.dataset}-{a.split.replace('/', '_')}-s{a.seed}"
        names = [name, *(f"{name}-{i}" for i in range(2, 10_000))]
        free = next(i for i, n in enumerate(names) if not Path(n).exists())
        newest = a.out or names[max(free - 1, 0)]
        again = a.resume or began_here(Path(newest))
        return newest if again else a.out or names[free], again

    def restore(self, networks, optimizer, state):
        """With --resume, fills all three from last.pt; returns the step to go on from, or 0.

        From previous.pt, if that is damaged. The log is cut back to that step. Raises Refusal if
        both are, or if another script or recipe wrote it (naming the first flag that differs).
        """
        path, previous = (self.folder / name for name in ("last.pt", "previous.pt"))
        if not self.resume or not from_first(path.exists() or previous.exists()):
            what = load_init(self.args.init, networks) if self.args.init else "zero"
            if self.first:  # of a run that was killed before its first checkpoint
                with writing(self.folder / "log.jsonl"):
                    (self.folder / "log.jsonl").unlink(missing_ok=True)
            self.say(f"run folder: {self.folder}, starting from {what}")
            return 0
        try:
            saved = load_checkpoint(path)
        except Refusal as error:
            if not previous.exists():
                raise
            self.say(f"{error}; the one before it is used")
            saved = load_checkpoint(previous)
            if self.first:  # it must not become the previous one
                with writing(path), contextlib.suppress(FileNotFoundError):
                    os.replace(path, self.folder / "damaged.pt")
            path = previous
        if not {"optimizer", "state", "meter", "best", "time", "lists"} <= set(saved):
            raise Refusal(f"{path}: a best.pt, which holds no optimizer; --init starts from it")
        if saved["script"] != self.script.name:
            wrong = f"written by {saved['script']}, not by {self.script.name}"
            raise Refusal(f"{path}: {wrong}; --init starts from it")
        recipe = saved["args"], plain(self.args), "another recipe, --{}"
        for old, new, what in (recipe, (saved["lists"], lists(self.data), "other {} images,")):
            for name in sorted((set(old) | set(new)) - set(NO_NUMBER)):
                if old.get(name) != new.get(name):
                    wrong = f"{old.get(name)} there and {new.get(name)} here"
                    wrong = f"{what.format(name.replace('_', '-'))} {wrong}"
                    raise Refusal(f"{path}: {wrong}; another --out starts anew")
        step = torch.tensor(saved["step"])
        if reduced(step.clone(), ReduceOp.MIN) != reduced(step, ReduceOp.MAX):
            raise Refusal(f"{path}: processes see different ones: one file system for all")
        load_networks(saved, networks)
        optimizer.load_state_dict(saved["optimizer"])
        for name, value in saved["state"].items():
            state[name] = value.to(state[name].device) if torch.is_tensor(value) else value
        self.meter = saved["meter"].to(self.group.device) * self.first  # all processes' in one
        self.best, self.begin, self.spent = saved["best"], saved["step"], saved["time"]["elapsed_s"]
        self._cut_log(self.begin)
        if saved["sha256"] != self.sha256:
            self.log("resume", self.begin, sha256=self.sha256, was=saved["sha256"])
        self.say(f"run folder: {self.folder}, going on from step {self.begin}")
        return self.begin

    def _cut_log(self, step):
        path, kept = self.folder / "log.jsonl", b""
        if not (self.first and path.exists()):
            return
        with writing(path):
            lines = path.read_bytes().splitlines()
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    if entry["kind"] != "done" and entry.get("step", -1) <= step:
                        kept += line + b"\n"
                except (ValueError, TypeError, LookupError):
                    if number < len(lines):  # a kill cuts off the last one
                        line = f"line {number} is none of a log; move the file away"
                        raise Refusal(f"{path}: {line}") from None
            path.with_suffix(".tmp").write_bytes(kept)
            os.replace(path.with_suffix(".tmp"), path)

    def _save(self, name, networks, **content):
        """Writes beside the file, then renames: a kill leaves the old one, the new one, or both."""
        content["networks"] = {k: net.state_dict() for k, net in networks.items()}
        if self.first:
            self._open()
            content |= {"script": self.script.name, "args": plain(self.args)}
            content["sha256"] = self.sha256
            path = self.folder / name
            new = path.with_suffix(".tmp")
            with writing(path, new):
                with open(new, "wb") as file:
                    torch.save(content, file)
                    file.flush()
                    os.fsync(file.fileno())
                if name == "last.pt" and path.exists():
                    os.replace(path, self.folder / "previous.pt")
                os.replace(new, path)

    def keep_last(self, step, networks, optimizer, state):
        """Saves last.pt: all that the run needs to go on, tensors and plain values.

        The one before becomes previous.pt. After SIGTERM it ends the run (see step).
        """
        check_tensors(step, networks, state)
        more = {"state": state, "meter": reduced(self.meter.clone()), "best": self.best}
        spent = self.spent + time.time() - self.start
        more |= {"time": {"elapsed_s": spent}, "lists": lists(self.data)}
        self._save("last.pt", networks, step=step, optimizer=optimizer.state_dict(), **more)
        if self.asked:
            raise KeyboardInterrupt(f" by SIGTERM at step {step}")

    def keep_best(self, step, result, maps, networks):
        """Logs a validation (scores, panels); saves best.pt if its mIoU is the highest so far."""
        check_tensors(step, networks)
        self.log("eval", step, on="val", **result)
        self.say(f"val mIoU {result['miou']:.4f} (a constant: {result['constant']:.4f})", step)
        if self.args.pictures_every:
            self.panels(f"{step:06d}-val", maps)
        if result["miou"] > self.best["miou"]:
            self.best = {"miou": result["miou"], "step": step}
            self._save("best.pt", networks, step=step)

    def due(self, step, every):
        """Returns whether something is due: every so many steps (0: never), and at the end."""
        return bool(every) and (step % every == 0 or step == self.args.total_iters)

    def step(self, step, parts, lr, begin, spent):
        """Takes the loss parts of one step ({name: 0-dim tensor}) and writes a line when it is due.

        lr: of this step. begin: when it began. spent: {part: seconds of it}. Never waits for the
        device but when something is due; then raises Refusal if a loss was not finite, naming the
        step.
        """
        precise = torch.float32 if self.group.device.type == "mps" else torch.float64
        values = torch.stack([v.detach().to(precise) for v in parts.values()])
        sums = torch.cat([values.new_ones(1), values])
        self.meter = self.meter + sums if len(self.meter) else sums
        self.bad_step = self.bad_step.clamp(max=torch.where(values.isfinite().all(), NEVER, step))
        if self.first and sys.stderr.isatty():
            if self.bar is None:
                total = self.args.total_iters
                self.bar = tqdm(total=total, initial=self.begin, unit="step", dynamic_ncols=True)
            self.bar.update(step - self.bar.n)
        a = self.args
        # SIGTERM: all processes learn of it in the same step, which is saved
        self.asked = bool(reduced(torch.tensor(int(self.told)), ReduceOp.MAX))
        due, work = self.due(step, a.log_every), (a.eval_every, a.save_every, a.pictures_every)
        if due or self.asked or any(self.due(step, every) for every in work):
            check_finite(int(reduced(self.bad_step.clone(), ReduceOp.MIN)))
        count, *sums = reduced(self.meter.clone()).tolist() if due else (1,)
        self.clock.update(spent, step=time.time() - begin, steps=1)
        if due:
            self._line(step, parts, lr, count, sums)

    def _line(self, step, parts, lr, count, sums):
        means = {name: s / count for name, s in zip(parts, sums, strict=True)}
        steps = self.clock.pop("steps")
        times = {f"{name}_ms": round(1e3 * t / steps, 2) for name, t in self.clock.items()}
        times["elapsed_s"] = round(self.spent + time.time() - self.start, 1)
        self.meter, self.clock = torch.zeros_like(self.meter), Counter()
        if self.group.device.type == "cuda":
            times["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        self.log("train", step, lr=lr, **means, time=times)
        words = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(f"{words}  lr {lr:.1e}  {times['step_ms']:.0f} ms", step)

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
        git = None
        with contextlib.suppress(OSError):  # no git here
            where = ["git", "-C", self.script.resolve().parent]
            command = [*where, "describe", "--always", "--dirty", "--abbrev=40"]
            git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        head = {"kind": "start", "script": self.script.name, "argv": sys.argv[1:], "git": git}
        head |= {"job": job(), "sha256": self.sha256}
        head |= {"args": plain(self.args), "lists": lists(self.data)}
        modules = {"numpy": numpy, "pillow": PIL, "torch": torch, "torchvision": torchvision}
        versions = {name: module.__version__ for name, module in modules.items()}
        head["versions"] = versions | {"python": platform.python_version()}
        cuda = self.group.device.type == "cuda"
        head["device"] = torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}"
        return head | {"threads": torch.get_num_threads(), "world": self.group.world}

    def say(self, text, step=None):
        """Prints one line from process 0, with step and ETA if step is given."""
        if step is not None:
            each, total = (time.time() - self.start) / (step - self.begin), self.args.total_iters
            left = timedelta(seconds=int(each * (total - step)))
            text = f"step {step}/{total}  {text}  ETA {left}"
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
        """Logs and prints the scores of last and best, and where everything is."""
        self.log("done", self.args.total_iters, on=on, best_step=self.best["step"], **results)
        self.say(report(self.data, results, on))
        flags = f"--eval-only --checkpoint {self.folder}/best.pt"
        self.say(f"next: python {self.script.name} {flags}, or --split all: the ceiling")
        for thing in (self.bar, self.board, self.file):
            if thing is not None:
                thing.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def writing(path, new=None):
    """What cannot be written becomes a Refusal that names it; the file `new` is removed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save's
        if not isinstance(cause, OSError):
            raise
        with contextlib.suppress(OSError):
            if new:
                new.unlink()
        why = f"cannot be written ({cause.strerror})"
        raise Refusal(f"{path}: {why}; what was saved before is whole") from None


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


def check_finite(bad_step):
    """Raises Refusal if bad_step, the first with a number that is not finite, is not NEVER."""
    if bad_step < NEVER:
        wrong = f"loss or weights not finite at step {bad_step}: nothing saved since"
        raise Refusal(f"{wrong}; a lower --lr, or --resume")


def check_tensors(step, networks, state=()):
    """Raises Refusal, naming step, if a network or a tensor of state is not finite."""
    tensors = [v for net in networks.values() for v in net.state_dict().values()]
    tensors += [v for v in dict(state).values() if torch.is_tensor(v)]
    device = tensors[0].device
    fine = torch.stack([v.isfinite().all().to(device, non_blocking=True) for v in tensors])
    check_finite(NEVER if fine.all() else step)


def report(data, results, on):
    """Returns a table of IoU per class and mIoU in per cent; results: {column: scores}."""
    names = [*data.classes, "mIoU", "accuracy", "mIoU of a constant"]
    lines = [f"{'IoU on ' + on:22}" + "".join(f"{column:>10}" for column in results)]
    for i, name in enumerate(names):
        row = ([*r["iou"], r["miou"], r["accuracy"], r["constant"]][i] for r in results.values())
        cells = ("absent" if v is None else f"{100 * v:.2f}" for v in row)
        lines.append(f"{name:22}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def lists(data):
    """Returns {list: [number of images, set hash]} of a Data."""
    keys = {n: [i.key for i in getattr(data, n)] for n in ("labeled", "unlabeled", "val", "test")}
    return {name: [len(some), set_hash(some)] for name, some in keys.items()}


def describe(args, load):
    """Returns what --dry-run prints: the resolved recipe, images per process, what load finds."""
    rows = [(k, v) for k, v in plain(args).items() if v not in ("", None)]
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdecimal() or world == "0":
        raise Refusal(f"WORLD_SIZE {world} not set as torchrun does: start with torchrun")
    group = Group(0, int(world), None)
    rows.append(("labelled per process", share(args.batch_size, group, "labelled")))
    try:
        rows += [(f"{n} images", f"{c}, set {h}") for n, (c, h) in lists(load(args)).items() if c]
    except Refusal as error:
        rows.append(("files", error))
    return "\n".join(f"{name:22} {value}" for name, value in rows)


def cells(script):
    """Returns the papers' results for a script, flags and mIoU: what --list-presets prints."""
    lines = []
    for entry in json.loads((Path(__file__).parent / "papers.json").read_text()):
        for split, miou in entry["miou"].items() if entry["script"] == Path(script).stem else ():
            flags = f"--dataset {entry['dataset']} --split {split} {entry['flags']}"
            lines.append(f"{miou:6.2f}  {flags:82}  {entry['source']}")
    return "\n".join(lines)
