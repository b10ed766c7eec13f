"""Makes the missing runs of the table of real runs, the cheapest first, and says what is left.

    python results/run_table.py                                   # what is there, and hours left
    python results/run_table.py --camvid DIR --lite0 FILE         # runs, two beside each other

Protocol camvid-lite: CamVid at half its size, 1/64 of its labels where a row says nothing else,
EfficientNet-Lite0 from its ImageNet weights; docs/results.md says why, and what came of it. A run
goes on from its last checkpoint, so this command may be stopped and started again at any time. A
finished run leaves its log in results/camvid-lite/, and beside it what each test image adds to
every class (`COUNTS`), from which results/differences.py draws its intervals. Of the seeds nothing
is left out.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common import Refusal  # noqa: E402
from common.flags import Count, check_needs, cli, given_names  # noqa: E402
from common.run import refusals  # noqa: E402
from predict import open_source  # noqa: E402

LOGS = ROOT / "results" / "camvid-lite"
COUNTS = "hit truth predicted"  # per test image and class: pixels right, of the class, said to be
SEEDS = (0, 1, 2)
PROTOCOL = (
    "--dataset camvid --backbone timm/tf_efficientnet_lite0 --output-stride 16 --head-channels 64"
    " --lr 0.01 --lr-head 5 --ohem-kept 0.1 --total-iters 600 --precise-bn 20 --log-every 20"
    " --eval-every 200 --save-every 100 --pictures-every 0 --device cpu --workers 1"
)
SIZES = {  # of CamVid's images, a folder in --runs -> flags
    "half": "--crop-size 128 --scales 0.75 1.25 --batch-size 4",
    "full": "--crop-size 160 --scales 0.5 1.0 --batch-size 8",
}
SPLIT = "1/64"  # 6 images with labels
HALF = "1/128"
TWICE = "1/32"
SOME = "1/16"  # 23: labels alone are flat at their end there, and all labels 4 points above
MORE = "1/8"  # 46: with 6 FixMatch makes one class of all others, docs/results.md


class Row(NamedTuple):
    """A row of the table: a script with its flags. cost: its step in steps of supervised.py."""

    script: str
    flags: str
    cost: float
    split: str = SPLIT
    size: str = "half"


FIXMATCH = "--views 1 --no-feature-perturbation"
LONG = "--total-iters 1200 --eval-every 400"
FLAT = "--total-iters 2000 --eval-every 500"
FULL_FLAT = "--total-iters 4000 --eval-every 1000"
UNLIKE = "--backbone-2 resnet18 --weights-2 none"  # the other student, from random weights
ROWS = {  # in the order of their worth
    "labels": Row("supervised.py", "", 1),
    "all-labels": Row("supervised.py", "", 1, "all"),
    "labels-cps": Row("cps_fpl.py", "--unsup-weight 0", 3),  # labels alone, in CPS's networks
    "cps": Row("cps_fpl.py", "--unsup-loss ce", 6),
    "fpl-cps": Row("cps_fpl.py", "--unsup-loss fpl", 6),
    "ael": Row("ael_fpl.py", "--unsup-loss ce", 4),
    "fpl-ael": Row("ael_fpl.py", "--unsup-loss fpl", 4),
    "fixmatch": Row("unimatch.py", FIXMATCH, 3),
    "fpl-fixmatch": Row("unimatch.py", f"{FIXMATCH} --unsup-loss fpl", 3),
    "fixmatch-0": Row("unimatch.py", f"{FIXMATCH} --threshold 0", 3),
    "cutmix-mt": Row("mean_teacher.py", "--cutmix", 3),
    "mt": Row("mean_teacher.py", "--no-cutmix", 3),
    "fpl-cps-official": Row("cps_fpl.py", "--unsup-loss fpl --recipe official", 6),
    "u2pl": Row("u2pl.py", "--unreliable-loss contrastive", 4),
    "u2pl-neither": Row("u2pl.py", "--unreliable-loss none", 4),
    "esl": Row("esl.py", "", 4),
    "esl-soft-labels": Row("esl.py", "--no-contrast", 4),
    "esl-hard-labels": Row("esl.py", "--no-contrast --label hard", 4),
    "u2pl-binary": Row("u2pl.py", "--unreliable-loss binary", 4),
    "u2pl-ael": Row("u2pl_ael.py", "--unreliable-loss contrastive", 5),
    "u2pl-ael-neither": Row("u2pl_ael.py", "--unreliable-loss none", 5),
    "cps-unlike": Row("cps_fpl.py", f"--unsup-loss ce {UNLIKE}", 6),
    "fpl-cps-unlike": Row("cps_fpl.py", f"--unsup-loss fpl {UNLIKE}", 6),
    "labels-1_8": Row("supervised.py", "", 1, MORE),
    "fixmatch-1_8": Row("unimatch.py", FIXMATCH, 3, MORE),
    "fixmatch-0-1_8": Row("unimatch.py", f"{FIXMATCH} --threshold 0", 3, MORE),
    "fpl-fixmatch-1_8": Row("unimatch.py", f"{FIXMATCH} --unsup-loss fpl", 3, MORE),
    "unimatch-1_8": Row("unimatch.py", "", 5, MORE),
    "unimatch-0-1_8": Row("unimatch.py", "--threshold 0", 5, MORE),
    "fpl-unimatch-1_8": Row("unimatch.py", "--unsup-loss fpl", 5, MORE),
}
for _split in (HALF, TWICE):
    _name = _split.replace("/", "_")
    ROWS[f"labels-{_name}"] = Row("supervised.py", "", 1, _split)
    ROWS[f"labels-cps-{_name}"] = Row("cps_fpl.py", "--unsup-weight 0", 3, _split)
    ROWS[f"cps-{_name}"] = Row("cps_fpl.py", "--unsup-loss ce", 6, _split)
    ROWS[f"fpl-cps-{_name}"] = Row("cps_fpl.py", "--unsup-loss fpl", 6, _split)
for _set, _size, _more, _cost, _split in (
    ("full", "full", "", 3, TWICE),
    ("flat", "half", FLAT, 10 / 3, SOME),
):
    for _name in ("labels", "all-labels", "labels-cps", "cps", "fpl-cps"):
        _row = ROWS[_name]
        ROWS[f"{_set}-{_name}"] = Row(
            _row.script,
            f"{_row.flags} {_more}".strip(),
            _cost * _row.cost,
            "all" if _row.split == "all" else _split,
            _size,
        )
ROWS["long-labels"] = Row("supervised.py", LONG, 6, MORE, "full")
ROWS["long-all-labels"] = Row("supervised.py", LONG, 6, "all", "full")
# flat at their end, and all labels well above: what a table of methods would want
ROWS["full-flat-labels"] = Row("supervised.py", FULL_FLAT, 20, MORE, "full")
ROWS["full-flat-all-labels"] = Row("supervised.py", FULL_FLAT, 20, "all", "full")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Makes the runs of the table that are missing."""

    camvid: str = ""  # folder of CamVid; left out: runs nothing, prints what is there
    lite0: str = ""  # file with timm's tf_efficientnet_lite0 weights (docs/backbones.md)
    rows: tuple[str, ...] = ()  # rows to run; left out: all
    seeds: tuple[int, ...] = SEEDS
    beside: Count = 2  # runs at a time, one thread each
    runs: str = "runs/camvid-lite"  # folder of the runs

    NEEDS: ClassVar[dict] = dict.fromkeys("lite0 beside runs".split(), "camvid")


# ---- what is there ----


def log_path(name, seed):
    """Returns where the log of a finished run lies."""
    return LOGS / f"{name}-s{seed}.jsonl"


def logs_of(name):
    """Returns {seed: path} of a row's logs that are there."""
    paths = {seed: log_path(name, seed) for seed in SEEDS}
    return {seed: path for seed, path in paths.items() if path.is_file()}


def seconds(path):
    """Returns the seconds that a finished run took, without its evaluations' start and end."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return max(line["time"]["elapsed_s"] for line in lines if line["kind"] == "train")


def estimate(name):
    """Returns the seconds that a run of a row takes: measured on its other seeds, or by its cost.

    Where no run at all has ended, a step of supervised.py counts as a second.
    """
    own = [seconds(path) for path in logs_of(name).values()]
    if own:
        return sum(own) / len(own)
    unit = [seconds(path) / ROWS[row].cost for row in ROWS for path in logs_of(row).values()]
    steps = int(PROTOCOL.split("--total-iters ")[1].split()[0])
    return ROWS[name].cost * (sum(unit) / len(unit) if unit else steps)


def missing(rows, seeds):
    """Returns [(row, seed)] that have no log: all of one seed before the next, cheapest first."""
    open_runs = [(n, s) for n in rows for s in seeds if not log_path(n, s).is_file()]
    return sorted(open_runs, key=lambda run: (run[1], estimate(run[0])))


def overview(rows, seeds):
    """Returns the lines that say what is there and what is left."""
    lines = []
    for name in rows:
        row = ROWS[name]
        there = map(str, logs_of(name))
        line = f"{name:18} {row.script:16} {row.size} size, split {row.split:5} {row.flags:42}"
        lines.append(f"{line} seeds there: {' '.join(there) or 'none'}")
    left = sum(estimate(name) for name, _ in missing(rows, seeds)) / 3600
    lines.append(f"{len(missing(rows, seeds))} runs left, {left:.1f} hours of one core")
    return lines


# ---- runs ----


def halved(source, target):
    """Writes CamVid at half its size into target, what is missing of it: each image the mean of
    2x2 pixels, each mask one of them. Returns target.
    """
    files = [file for file in Path(source).rglob("*/*") if file.suffix in (".jpg", ".png")]
    for file in sorted(files):
        new = (Path(target) / file.relative_to(source)).with_suffix(".png")
        if not new.exists():
            with Image.open(file) as picture:
                mask = file.parent.name.endswith("annot")
                size = (picture.width // 2, picture.height // 2)
                small = (
                    picture.resize(size, Image.Resampling.NEAREST) if mask else picture.reduce(2)
                )
                new.parent.mkdir(parents=True, exist_ok=True)
                partial = new.with_name(f"{new.name}.partial")
                small.save(partial, "png")
                partial.replace(new)
    return target


class Stop:
    """Ctrl-C and SIGTERM: no further run starts, those in progress save and end."""

    def __init__(self):
        self.asked = threading.Event()
        self.running = set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, *_):
        """Passes the word on to the runs."""
        self.asked.set()
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)


def command(name, seed, args):
    """Returns the command line of a run."""
    row = ROWS[name]
    flags = f"{PROTOCOL} {SIZES[row.size]} {row.flags}".split()
    data = ["--data-root", f"{args.runs}/{row.size}", "--weights", str(weights(args))]
    run = ["--split", row.split, "--seed", str(seed), "--out", str(folder(name, seed, args))]
    return [sys.executable, row.script, *flags, *data, *run]


def weights(args):
    """Returns where the runs find the weights: their logs name no place outside the checkout."""
    return Path(args.runs).parent / "tf_efficientnet_lite0.pth"


def folder(name, seed, args):
    """Returns the folder of a run."""
    return Path(args.runs, f"{name}-s{seed}")


def make(name, seed, args, stop):
    """Runs one run to its end and keeps its log and counts. Returns a line that says so."""
    if stop.asked.is_set():
        return ""
    out = folder(name, seed, args)
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{out}.out", "a") as said:
        process = subprocess.Popen(
            [*command(name, seed, args), "--resume"],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,  # Ctrl-C reaches it by stop alone
        )
        stop.running.add(process)
        if stop.asked.is_set():  # between the two lines above
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        stop.running.discard(process)
    if stop.asked.is_set():
        return f"{name}, seed {seed}: stopped"
    if code:
        return f"{name}, seed {seed}: ended with code {code}, see {out}.out"
    done = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    try:
        counts = count_images(out)
    except Refusal as error:  # such as images that were moved since
        return f"{name}, seed {seed}: {error}"
    scored = 100 * done["last"]["miou"]
    counted = float(miou(*(counts[kind].sum(0) for kind in COUNTS.split())))
    if abs(counted - scored) > 0.01:
        return f"{name}, seed {seed}: scored {scored:.2f} %, its images say {counted:.2f} %"
    LOGS.mkdir(exist_ok=True)
    np.savez_compressed(counts_path(name, seed), **counts)
    shutil.copyfile(out / "log.jsonl", log_path(name, seed))  # last: it says that all is there
    return f"{name}, seed {seed}: test mIoU {scored:.2f} %"


def counts_path(name, seed):
    """Returns where the counts of a finished run lie."""
    return LOGS / f"{name}-s{seed}.npz"


def miou(hit, truth, predicted):
    """Mean IoU in per cent over the classes that occur; counts: (..., C), summed over images."""
    union = truth + predicted - hit
    iou = hit / np.maximum(union, 1)
    present = union > 0
    return 100 * (iou * present).sum(-1) / np.maximum(present.sum(-1), 1)


def count_images(run):
    """Returns {name of COUNTS: (test images, C) int32} of a run's last checkpoint.

    The sums over images are those of the confusion matrix that gave the run's last test scores.
    """
    source = open_source(run / "last.pt")
    script, args = source.script, source.args
    data = script.load(args)
    classes = data.num_classes
    found = {name: [] for name in COUNTS.split()}
    images = script.Images(data, data.test)
    for index in range(len(data.test)):
        image, label = images[index]
        pred = script.predict(source.net, image, args, classes)
        confusion = script.metrics.confusion_matrix(pred, label, classes)
        found["hit"].append(confusion.diag())
        found["truth"].append(confusion.sum(1))
        found["predicted"].append(confusion.sum(0))
    return {name: torch.stack(rows).numpy().astype(np.int32) for name, rows in found.items()}


def main(args):
    """Prints what is there; with --camvid makes the rest. Raises Refusal."""
    check_needs(args, given_names(args))
    rows = args.rows or tuple(ROWS)
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise Refusal(f"--rows {' '.join(unknown)}: known are {' '.join(ROWS)}")
    print("\n".join(overview(rows, args.seeds)), flush=True)
    if not args.camvid:
        return
    for name, path in (("--camvid", args.camvid), ("--lite0", args.lite0)):
        if not path or not Path(path).exists():
            raise Refusal(f"{name} {path or '(none)'}: not there; docs/backbones.md, docs/data.md")
    halved(args.camvid, Path(args.runs, "half"))
    full = Path(args.runs, "full")
    if not full.exists():
        full.symlink_to(Path(args.camvid).resolve())
    if not (weights(args).exists() and weights(args).samefile(args.lite0)):
        shutil.copyfile(args.lite0, weights(args))
    stop = Stop()
    with ThreadPoolExecutor(args.beside) as pool:
        runs = missing(rows, args.seeds)
        try:
            for line in pool.map(lambda run: make(*run, args, stop), runs):
                if line:
                    print(line, flush=True)
        except Exception:  # a fault of this script: not after all other runs
            stop.ask()
            raise
    print(overview(rows, args.seeds)[-1])


if __name__ == "__main__":
    with refusals("the same command goes on"):
        main(cli(Args))
