"""What this checkout's commit takes beside an earlier one, in turns: time, memory, mIoU.

    python benchmarks/before.py                    # results/before.json, an hour
    python benchmarks/before.py --parts command    # this part is made again
    python benchmarks/before.py --rounds 1 --out FILE

command  the README's first command: wall time of `python cps_fpl.py` from its start to its last
         line, and the mIoU of its last weights on test. It wants two idle cores.
cps      two steps of cps_fpl.py by each recipe, CutMix, crop 448, ResNet-18, 2 images a kind: the
         process's processor time but for its imports, and its peak memory above libraries (of a
         process that imports cps_fpl.py), weights and momentum (the length of last.pt). Freed
         memory is given back at once, which costs both commits some time.
input    samples of images drawn as Cityscapes and VOC have them (benchmarks/input.py), with masks
         and without: processor time of one thread. Then supervised.py on the former with crops of
         800 and without workers: data_ms of its log. This commit from files and from --cache.
calls    FPL's loss of both networks by the official recipe with its gradient, the confusion matrix,
         predict's windows: benchmarks/before_parts.py, processor time of one thread. What they
         return is equal, as asserted.

Both commits are cloned into a temporary folder and run there, in turns, by this Python and its
packages. A shallow clone has not the earlier one: git fetch --unshallow.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import prepare_data  # noqa: E402
from benchmarks import input as images  # noqa: E402
from benchmarks.runs import spread  # noqa: E402
from common import Refusal  # noqa: E402
from common.run import refusals  # noqa: E402

RESULT = ROOT / "results" / "before.json"
BEFORE = "a102efb"  # of 21 November 2026: the last commit before the work on speed began
CPS = "--batch-size 2 --total-iters 2 --workers 0 --pictures-every 0 --eval-every 9 --device cpu"
DATA = (
    "--dataset folder --num-classes 19 --backbone resnet18 --weights none --crop-size 800"
    " --batch-size 2 --total-iters 3 --log-every 1 --eval-every 9 --workers 0 --pictures-every 0"
    " --device cpu"
)
PARTS_FILE = ROOT / "benchmarks" / "before_parts.py"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory: the peak is of what is in use
OLD_DEFAULTS = "--head-channels 256 --precise-bn 0"  # what the earlier commit has no flags for
CALLS = [("cross_loss", 19), ("cross_loss", 150), ("confusion", 19), ("slide", 19), ("slide", 150)]


def git(*words):
    """Returns what git prints in this checkout; raises Refusal if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise Refusal(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def cloned(before, scratch):
    """Returns {commit: checkout} of the earlier commit and of this one."""
    if git("status", "--porcelain", "--", "*.py"):
        raise Refusal("scripts differ from the commit: commit first, a clone of it is run")
    checkouts = {}
    for name in (before, "HEAD"):
        commit = git("rev-parse", "--short=7", name)
        checkouts[commit] = scratch / commit
        git("clone", "--quiet", str(ROOT), str(checkouts[commit]))
        git("-C", str(checkouts[commit]), "checkout", "--quiet", commit)
    if len(checkouts) < 2:
        raise Refusal(f"--before {before} is this commit")
    return checkouts


def run(words, checkout, **settings):
    """Runs Python in a checkout; returns its output, wall and processor seconds.

    settings: of its environment.
    """
    environment = os.environ | settings
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words], cwd=checkout, stdout=out, stderr=error, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, error):
            stream.seek(0)
        if process.returncode:
            raise Refusal(f"{checkout.name}, {' '.join(words)}: {error.read().strip()[-300:]}")
        found = {"out": out.read(), "wall_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime}
    return found


def in_turns(checkouts, rounds, call):
    """Returns {commit: [what call(commit, checkout) returns in each round]}."""
    found = {commit: [] for commit in checkouts}
    for _ in range(rounds):
        for commit, checkout in checkouts.items():
            row = call(commit, checkout)
            print(f"  {commit}  {row}", flush=True)
            found[commit].append(row)
    return found


def compared(found, name):
    """Returns rows, one a commit: the median of a value and its ratio to the earlier commit."""
    times = {commit: [row[name] for row in rows] for commit, rows in found.items()}
    return [{"commit": commit, **row} for commit, row in spread(times).items()]


def command(checkouts, scratch, options):
    """The first command: a row a commit, with its mIoU."""

    def call(commit, checkout):
        out = Path(tempfile.mkdtemp(dir=scratch), "run")
        done = run(["cps_fpl.py", "--out", str(out)], checkout)
        (miou,) = re.findall(r"^mIoU  +([\d.]+)", done["out"], re.MULTILINE)
        return {"s": done["wall_s"], "miou": float(miou)}

    in_turns(checkouts, 1, call)  # warms the disk
    found = in_turns(checkouts, options.rounds, call)
    rows = compared(found, "s")
    for row in rows:
        row["miou"] = found[row["commit"]][-1]["miou"]
    return rows


def cps(checkouts, scratch, options):
    """Two steps of CPS by each recipe: rows of the processor time and of the peak."""
    rows = []
    for recipe in ("paper", "official"):
        found = in_turns(checkouts, options.rounds, two_steps(checkouts, scratch, options, recipe))
        for name in ("cpu_s", "peak_mib"):
            rows += [{"recipe": recipe, "what": name, **row} for row in compared(found, name)]
    return rows


def two_steps(checkouts, scratch, options, recipe):
    """Returns the function that takes the steps in a checkout, for in_turns."""
    first = next(iter(checkouts))

    def call(commit, checkout):
        out = Path(tempfile.mkdtemp(dir=scratch), "run")
        words = ["cps_fpl.py", *CPS.split(), "--crop-size", str(options.crop), "--out", str(out)]
        words += ["--recipe", recipe]
        words += OLD_DEFAULTS.split() if commit != first else []
        peak = [str(PARTS_FILE), "peak"]
        libraries = run(peak, checkout, **ONE_THREAD, **GIVEN_BACK)
        steps = run([*peak, *words], checkout, **ONE_THREAD, **GIVEN_BACK)
        most, least = (float(done["out"].splitlines()[-1]) for done in (steps, libraries))
        weights = (out / "last.pt").stat().st_size / 2**20
        seconds = steps["cpu_s"] - libraries["cpu_s"]
        return {"cpu_s": seconds, "peak_mib": most - least - weights}

    return call


def calls(checkouts, scratch, options):
    """Calls of before_parts.py: rows of their processor seconds, equal in what they return."""
    rows = []
    for part, classes in CALLS:
        words = [str(PARTS_FILE), part, "--classes", str(classes)]
        values = {}

        def call(commit, checkout, words=words, values=values):
            found = json.loads(run(words, checkout, **ONE_THREAD)["out"])
            values[commit] = found["value"]
            return {"s": found["s"]}

        print(f" {part}, {classes} classes")
        found = in_turns(checkouts, options.rounds, call)
        assert same(*values.values()), (part, classes)
        rows += [{"what": part, "classes": classes, **row} for row in compared(found, "s")]
    return rows


def samples(checkouts, scratch, options):
    """Samples of images: rows of the seconds of one, and of data_ms in a run's log."""
    now = list(checkouts)[-1]
    ways = checkouts | {f"{now}, cache": checkouts[now]}
    rows = []
    for kind, (size, suffix, grain, crop) in images.KINDS.items():
        data = scratch / suffix
        images.draw(data, size, suffix, grain, 12)
        source = dict(dataset="folder", data_root=str(data), num_classes=19)
        prepare_data.Cache(**source, out=f"{data}-cache").run()
        for masks in (False, True):
            words = [str(PARTS_FILE), "samples", "--classes", "19", "--data", str(data)]
            words += ["--crop", str(crop), *["--masks"] * masks]

            def call(way, checkout, words=words, data=data):
                cached = ["--cache", f"{data}-cache"] * way.endswith("cache")
                found = json.loads(run([*words, *cached], checkout, **ONE_THREAD)["out"])
                return {"s": found["s"] / 12}  # a call makes six batches of two

            print(f" {kind}, masks: {masks}")
            found = in_turns(ways, options.rounds, call)
            about = {"what": f"{kind}, crop {crop}", "masks": masks}
            rows += [about | row for row in compared(found, "s")]
    return rows + [{"what": "data_ms", **row} for row in data_ms(ways, scratch, options)]


def data_ms(ways, scratch, options):
    """Returns a row for each way: seconds that a step's data took, by its log."""
    data = scratch / "png"
    first = next(iter(ways))

    def call(way, checkout):
        for file in scratch.glob("png*/**/*"):  # not what a disk takes
            if file.is_file():
                file.read_bytes()
        out = Path(tempfile.mkdtemp(dir=scratch), "run")
        words = ["supervised.py", "--data-root", str(data), "--out", str(out), *DATA.split()]
        words += OLD_DEFAULTS.split() if way != first else []
        if way.endswith("cache"):
            words += ["--cache", f"{data}-cache"]
        run(words, checkout, **ONE_THREAD)
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        steps = [line["time"]["data_ms"] for line in lines if line["kind"] == "train"]
        return {"s": statistics.median(steps) / 1e3}

    return compared(in_turns(ways, options.rounds, call), "s")


def same(a, b):
    """Is what two calls returned the same? Floats may differ by rounding."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b


PARTS = {"command": command, "cps": cps, "input": samples, "calls": calls}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--crop", type=int, default=448, help="of the part cps")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checkouts = cloned(options.before, scratch)
        for name in options.parts:
            print(name)
            about = {"torch": torch.__version__, "rounds": options.rounds}
            if name == "command":
                about["threads"] = torch.get_num_threads()
            if name == "cps":
                about["crop"] = options.crop
            rows = PARTS[name](checkouts, scratch, options)
            about["load"] = os.getloadavg()[0]
            found[name] = about | {"rows": rows}
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    with refusals("start again"):
        sys.exit(main())
