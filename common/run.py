"""The run folder: refusals, log, progress, checkpoints, exact resume. No number is made here.

runs/<name>/  log.jsonl  last.pt  best.pt  panels/*.png
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy
import PIL
import torch
import torchvision
import tyro
from tqdm import tqdm

from common import Refusal, pictures
from common.data import load, set_hash
from common.distributed import from_first, max_over_processes, sum_over_processes

# flags that do not change a number: free to differ when a run goes on
FREE = set(
    "out resume eval_only checkpoint eval_on dry_run list_presets device workers data_root "
    "log_every save_every pictures_every tensorboard".split()
)

# ---- command line ----


def parse(cls, argv=None):
    """Returns cls filled from the command line; tyro's box around a wrong flag becomes one line."""
    with contextlib.redirect_stderr(io.StringIO()) as text:
        try:
            return tyro.cli(cls, args=argv)
        except SystemExit as stop:
            if stop.code != 2:  # --help
                raise
    lines = [line.strip("│ ") for line in text.getvalue().splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰─"]
    ends = [i for i, line in enumerate(lines) if line.startswith(("Argument help", "For full"))]
    raise Refusal(" ".join(lines[: min(ends, default=None)]).replace(" .", "."))


def resolve(args, preset):
    """Returns args with every None filled: field default < preset < recipe < explicit flag.

    preset: function of args to a dict. With --eval-only the flags of the checkpoint's run come
    before the preset. Raises Refusal for a field that nothing sets.
    """
    if args.eval_only:
        if not args.checkpoint:
            raise Refusal("--eval-only without --checkpoint: name a last.pt or best.pt")
        given = {k: v for k, v in vars(args).items() if v != getattr(type(args)(), k)}
        saved = load_checkpoint(args.checkpoint)["args"]
        saved = {k: saved[k] for k in set(saved) & set(vars(args)) - FREE}
        args = replace(args, **saved | {"scales": tuple(saved["scales"])} | given)
    values = {k: v for k, v in preset(args).items() if getattr(args, k) is None}
    args = replace(args, **values)
    if args.labeled_list and args.split is None:
        args = replace(args, split="list")
    unset = [
        f.name for f in fields(args) if getattr(args, f.name) is None and f.name != "split_seed"
    ]
    if unset and not args.list_presets:
        names = ", ".join("--" + name.replace("_", "-") for name in unset)
        raise Refusal(f"no preset of {args.dataset} sets {names}: give a value")
    return args


def launch(cls, preset, main):
    """Runs main on the resolved flags; a Refusal becomes one line and exit code 2."""
    try:
        main(resolve(parse(cls), preset))
    except Refusal as error:
        # a loader process wraps the message in a traceback and leaves it as the last line
        line = str(error).strip().splitlines()[-1].removeprefix("common.Refusal: ")
        # before the process group exists, every process refuses alike: one of them says it
        if torch.distributed.is_initialized() or os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on", file=sys.stderr, flush=True)
        code = 130
    else:
        return
    os._exit(code)  # others may wait in a collective: no orderly end of the process group


def plain(args):
    """Returns the flags as a dict of JSON values (tuples become lists)."""
    return json.loads(json.dumps(asdict(args)))


# ---- the run folder ----


def load_checkpoint(path):
    """Returns a checkpoint's dict, on the CPU (weights_only: no code is run). Raises Refusal."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["step"], checkpoint["args"], checkpoint["networks"], checkpoint["script"]
        return checkpoint
    except FileNotFoundError:
        raise Refusal(f"{path}: no such checkpoint") from None
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refusal(f"{path}: damaged, or no checkpoint of these scripts ({line})") from None


class Run:
    """One run folder. Only process 0 writes; the folder appears with the first line of the log."""

    def __init__(self, args, script, group, data):
        """args: resolved flags. script: path. data: its lists are counted and hashed for the log.

        Raises Refusal if the folder exists and --resume was not given.
        """
        self.args, self.script, self.group, self.data = args, Path(script), group, data
        self.first, self.begin, self.start = group.rank == 0, 0, time.time()
        self.bar, self.board, self.file, self.parts = None, None, None, []
        self.meter = torch.zeros(
            0, device=group.device
        )  # since the last line: steps, sums of parts
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=group.device)
        self.best = {"miou": -1.0, "step": 0}
        self.folder = Path(from_first(self._folder()))
        if self.folder.exists() and not args.resume:
            raise Refusal(
                f"{self.folder} exists: --resume goes on there, --out names another folder"
            )
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise Refusal("--tensorboard: not installed; pip install tensorboard") from None
            self.board = SummaryWriter

    def _folder(self):
        """--out, or runs/<script>-<dataset>-<split>-s<seed>: free, or with --resume the newest."""
        a = self.args
        name = f"runs/{self.script.stem}-{a.dataset}-{a.split.replace('/', '_')}-s{a.seed}"
        names = [name, *(f"{name}-{i}" for i in range(2, 10_000))]
        free = next(i for i, n in enumerate(names) if not Path(n).exists())
        return a.out or names[max(free - 1, 0) if a.resume else free]

    def restore(self, networks, optimizer, state):
        """With --resume, fills all three from last.pt; returns the step to go on from, or 0.

        The log is cut back to that step. Raises Refusal if the file is damaged or was written by
        another script or recipe (naming the first flag that differs).
        """
        path = self.folder / "last.pt"
        if not self.args.resume:
            return 0
        if not path.exists():
            self._cut_log(-1)
            self.say(f"{self.folder}: no checkpoint yet, starting from zero")
            return 0
        saved, mine = load_checkpoint(path), plain(self.args)
        if saved["script"] != self.script.name:
            raise Refusal(f"{path}: written by {saved['script']}, not by {self.script.name}")
        for name in sorted((set(mine) | set(saved["args"])) - FREE):
            old, new = saved["args"].get(name), mine.get(name)
            if old != new:
                flag = "--" + name.replace("_", "-")
                raise Refusal(f"{path}: of another recipe ({flag} {old} there, {new} here)")
        for name, net in networks.items():
            net.load_state_dict(saved["networks"][name])
        optimizer.load_state_dict(saved["optimizer"])
        for name, value in saved["state"].items():
            state[name] = value.to(state[name].device) if torch.is_tensor(value) else value
        self.meter, self.best = saved["meter"].to(self.group.device), saved["best"]
        self.begin = saved["step"]
        self._cut_log(self.begin)
        self.say(f"{self.folder}: going on from step {self.begin}")
        return self.begin

    def _cut_log(self, step):
        path, kept = self.folder / "log.jsonl", []
        if not self.first or not path.exists():
            return
        for line in path.read_text().splitlines(keepends=True):
            with contextlib.suppress(ValueError):  # the last line, if a kill cut it off
                entry = json.loads(line)
                if entry["kind"] != "done" and entry.get("step", -1) <= step:
                    kept.append(line)
        if kept:
            path.with_suffix(".tmp").write_text("".join(kept))
            os.replace(path.with_suffix(".tmp"), path)
        else:
            path.unlink()

    def _save(self, name, networks, **content):
        """Writes beside the file, then renames: a kill leaves the old one or the new one."""
        content["networks"] = {k: net.state_dict() for k, net in networks.items()}
        finite = [v.isfinite().all() for net in content["networks"].values() for v in net.values()]
        check_finite(-1 if torch.stack(finite).all() else content["step"])
        if self.first:
            content |= {"script": self.script.name, "args": plain(self.args)}
            path = self.folder / name
            with open(path.with_suffix(".tmp"), "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path.with_suffix(".tmp"), path)

    def keep_last(self, step, networks, optimizer, state):
        """Saves last.pt: all that the run needs to go on, tensors and plain values."""
        more = {"state": state, "meter": self.meter, "best": self.best}
        self._save("last.pt", networks, step=step, optimizer=optimizer.state_dict(), **more)

    def keep_best(self, step, result, rows, networks):
        """Logs a validation (scores, panels); saves best.pt if its mIoU is the highest so far."""
        self.log("eval", step, on="val", **result)
        self.say(f"val mIoU {result['miou']:.4f} (a constant: {result['constant']:.4f})", step)
        if self.args.pictures_every:
            self.panels(f"{step:06d}-val", rows)
        if result["miou"] > self.best["miou"]:
            self.best = {"miou": result["miou"], "step": step}
            self._save("best.pt", networks, step=step)

    def load_best(self, networks):
        """Loads best.pt into the networks; returns its step."""
        saved = load_checkpoint(self.folder / "best.pt")
        for name, net in networks.items():
            net.load_state_dict(saved["networks"][name])
        return saved["step"]

    # ---- log and progress ----

    def due(self, step, every):
        """Returns whether something is due: every so many steps (0: never), and at the end."""
        return bool(every) and (step % every == 0 or step == self.args.total_iters)

    def step(self, step, parts, lr, begin, waited):
        """Takes the loss parts of one step ({name: 0-dim tensor}) and writes a line when it is due.

        lr: of this step. begin: when it began. waited: seconds for data. Never waits for the device
        but when something is due; then raises Refusal if a loss was not finite, naming the step.
        """
        values = torch.stack([v.detach().float() for v in parts.values()])
        sums = torch.cat([values.new_ones(1), values])
        self.meter = self.meter + sums if len(self.meter) else sums
        bad = (self.bad_step < 0) & ~torch.isfinite(values).all()
        self.bad_step = torch.where(bad, step, self.bad_step)
        if self.first and sys.stderr.isatty():
            if self.bar is None:
                total = self.args.total_iters
                self.bar = tqdm(total=total, initial=self.begin, unit="step", dynamic_ncols=True)
            self.bar.update(step - self.bar.n)
        a = self.args
        if any(self.due(step, n) for n in (a.log_every, a.eval_every, a.save_every)):
            check_finite(int(max_over_processes(self.bad_step)))
        if not self.due(step, a.log_every):
            return
        count, *sums = sum_over_processes(self.meter.clone()).tolist()
        self.meter.zero_()
        means = {name: s / count for name, s in zip(parts, sums, strict=True)}
        times = {"data_ms": waited * 1e3, "step_ms": (time.time() - begin) * 1e3}
        times["elapsed_s"] = time.time() - self.start
        if self.group.device.type == "cuda":
            times["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        times = {name: round(value, 2) for name, value in times.items()}
        self.log("train", step, lr=lr, **means, time=times)
        words = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(f"{words}  lr {lr:.1e}  {times['step_ms']:.0f} ms", step)

    def log(self, kind, step, **values):
        """Appends one line to log.jsonl; what depends on the clock belongs in values["time"]."""
        if not self.first:
            return
        entries = [{"kind": kind, "step": step, **values}]
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "log.jsonl").exists():
                entries.insert(0, self._header())
            self.file = open(self.folder / "log.jsonl", "a")
            self.board = self.board and self.board(str(self.folder))
        for entry in entries:
            self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        for name, value in values.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def _header(self):
        def git(*words):
            command = ["git", "-C", str(self.script.resolve().parent), *words]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError:
                return None
            return done.stdout.strip() if done.returncode == 0 else None

        head = {"kind": "start", "script": self.script.name, "argv": sys.argv[1:]}
        head["sha256"] = hashlib.sha256(self.script.read_bytes()).hexdigest()
        head["commit"], head["changed"] = git("rev-parse", "HEAD"), git("status", "--porcelain")
        head |= {"args": plain(self.args), "lists": lists(self.data)}
        modules = {"numpy": numpy, "pillow": PIL, "torch": torch, "torchvision": torchvision}
        head["versions"] = {k: m.__version__ for k, m in modules.items()}
        head["versions"]["python"] = platform.python_version()
        cuda = self.group.device.type == "cuda"
        head["device"] = torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}"
        return head | {"threads": torch.get_num_threads(), "world": self.group.world}

    def say(self, text, step=None):
        """Prints one line from process 0, with step and ETA if step is given."""
        if step is not None:
            left = (time.time() - self.start) / max(step - self.begin, 1)
            left = int(left * (self.args.total_iters - step))
            eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            text = f"step {step}/{self.args.total_iters}  {text}  ETA {eta}"
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif self.first:
            print(text, flush=True)

    def panels(self, name, maps):
        """Saves panels/<name>.png; maps: {title: (B, ...) tensor}, the first 4 shown, or rows."""
        if self.first:
            if isinstance(maps, dict):
                count = min(4, *(len(v) for v in maps.values()))
                maps = [{k: v[i].detach().cpu() for k, v in maps.items()} for i in range(count)]
            path = self.folder / "panels" / f"{name}.png"
            pictures.save_panels(path, maps, self.data.palette)

    def finish(self, results, on):
        """Logs and prints the scores of last and best, and where everything is."""
        best = self.best["step"]
        self.log("done", self.args.total_iters, on=on, best_step=best, **results)
        self.say(report(self.data, results, on))
        self.say(f"{self.folder}: log.jsonl, last.pt, best.pt (of step {best}), panels/")
        flags = f"--eval-only --checkpoint {self.folder}/best.pt"
        self.say(f"score again: python {self.script.name} {flags}")
        if self.args.dataset == "shapes":
            self.say("next: --split all is the ceiling; photographs: docs/data.md")
        for thing in (self.bar, self.board, self.file):
            if thing is not None:
                thing.close()


def check_finite(bad_step):
    """Raises Refusal if bad_step, the first step with a number that is not finite, is not -1."""
    if bad_step >= 0:
        raise Refusal(
            f"loss or weights not finite at step {bad_step}, nothing saved since: lower --lr"
        )


# ---- what is printed ----


def table(rows):
    """Returns rows (lists of strings) as aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def report(data, results, on):
    """Returns a table of IoU per class and mIoU in per cent; results: {column: scores}."""

    def percent(x):
        return "absent" if x is None else f"{100 * x:.2f}"

    rows = [[f"IoU on {on}", *results]]
    for i, name in enumerate(data.classes):
        rows.append([name, *(percent(r["iou"][i]) for r in results.values())])
    for name, key in (
        ("mIoU", "miou"),
        ("accuracy", "accuracy"),
        ("mIoU of a constant", "constant"),
    ):
        rows.append([name, *(percent(r[key]) for r in results.values())])
    return table(rows)


def lists(data):
    """Returns {list: [number of images, set hash]} of a Data."""
    names = ("labeled", "unlabeled", "val", "test")
    return {n: [len(getattr(data, n)), set_hash(getattr(data, n))] for n in names}


def describe(args):
    """Returns what --dry-run prints: the resolved recipe, images per process, the files found."""
    rows = [[k, str(v)] for k, v in plain(args).items() if v not in ("", None)]
    world = int(os.environ.get("WORLD_SIZE", 1))
    rows.append(["labelled images per process", f"{args.batch_size / world:g} ({world} processes)"])
    try:
        rows += [[f"{n} images", f"{c}, set {h}"] for n, (c, h) in lists(load(args)).items() if c]
    except Refusal as error:
        rows.append(["files", str(error)])
    return table(rows)


def cells(script):
    """Returns the papers' results for a script as a table: what --list-presets prints."""
    rows = [["flags", "paper", "mIoU"]]
    for entry in json.loads((Path(__file__).parent / "papers.json").read_text()):
        for split, miou in entry["miou"].items() if entry["script"] == Path(script).stem else ():
            flags = f"--dataset {entry['dataset']} --split {split} {entry['flags']}".strip()
            rows.append([flags, entry["source"], f"{miou:.2f}"])
    return table(rows)
