"""The README's first command, as it is and as it was: wall time and mIoU of whole runs, in turns.

    python benchmarks/first_command.py   # results/first_command.json; two idle cores, 8 minutes

Both commits are checked out in a temporary folder, and each runs `python cps_fpl.py` there by this
Python and its packages, from its start to its last line: imports, generated pictures, training,
panels, validation and test. Each runs once to warm the disk; then they take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.runs import spread  # noqa: E402
from common import Refusal  # noqa: E402
from common.run import refusals  # noqa: E402

RESULT = ROOT / "results" / "first_command.json"
BEFORE = "a102efb"  # of 21 November 2026: the last commit before the work on speed began


def git(*words):
    """Returns what git prints in this checkout; raises Refusal if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise Refusal(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def run(checkout, folder):
    """Runs the command; returns its wall seconds and the mIoU of the last weights on test, in %."""
    words = [sys.executable, "cps_fpl.py", "--out", str(folder)]
    begin = time.perf_counter()
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise Refusal(f"{checkout}: {done.stderr.strip()[-300:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("mIoU  "))
    return seconds, float(line.split()[1])


def measure(options, scratch):
    """Runs both commits in turns; returns what is written."""
    before = git("rev-parse", "--short=7", options.before)
    after = git("rev-parse", "--short=7", "HEAD")
    if git("status", "--porcelain", "--", "*.py"):
        raise Refusal("scripts differ from the commit: commit first, a clone of it is run")
    checkouts = {}
    for commit in (before, after):
        checkouts[commit] = scratch / commit
        git("clone", "--quiet", str(ROOT), str(checkouts[commit]))
        git("-C", str(checkouts[commit]), "checkout", "--quiet", commit)
    times = {commit: [] for commit in checkouts}
    scores = {}
    for number in range(options.rounds + 1):
        for commit, checkout in checkouts.items():
            seconds, scores[commit] = run(checkout, scratch / f"{commit}-{number}")
            print(f"{commit}  {seconds:.1f} s  {scores[commit]:.2f} mIoU", flush=True)
            if number:  # the first warms
                times[commit].append(seconds)
    rows = [
        {"commit": commit, **row, "miou": scores[commit]} for commit, row in spread(times).items()
    ]
    load = os.getloadavg()[0]
    about = {"rounds": options.rounds, "torch": torch.__version__, "load": load}
    return about | {"threads": torch.get_num_threads(), "rows": rows}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    for row in found["rows"]:
        print(f"{row['commit']}  {row['s']:.1f} s, ratio {row['ratio']:.2f}  {row['miou']:.2f}")
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    with refusals("start again"):
        sys.exit(main())
