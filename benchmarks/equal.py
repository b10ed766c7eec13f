"""Do two checkouts compute the same numbers? Short runs of every script in all its modes.

    git worktree add ../before HEAD~1
    python benchmarks/equal.py ../before .
    python benchmarks/equal.py ../before . --only cps_fpl u2pl --workers 2

Each run is a script as its command line is, on the generated data set, with the real networks on
the CPU: 20 steps, a validation, a checkpoint and panels. Compared are the log, but for times, and
every tensor of last.pt and best.pt, bit for bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import bits, flat, log  # noqa: E402
from common import Refusal  # noqa: E402
from common.run import refusals  # noqa: E402

SHORT = "--crop-size 33 --batch-size 2 --workers 0 --device cpu --log-every 1".split()
AT_THE_END = "--total-iters --eval-every --save-every --pictures-every".split()
MODES = {
    "supervised": [
        "",
        "--ohem-kept 0.1 --aux-weight 0.4 --protocol slide --stem deep",
        "--decay-on weights --scales 1 --stem v1c --output-stride 8",
    ],
    "mean_teacher": [
        "--warmup-iters 2",
        "--cutmix --warmup-iters 2",
        "--consistency mse --rampup-iters 9 --teacher-bn average",
        "--cutmix --cutmix-prob 1 --aux-weight 0.4",
    ],
    "cps_fpl": [
        "",
        "--recipe official",
        "--no-cutmix",
        "--same-image-cutmix --k-strategy step --weight linear",
        "--unsup-loss ce",
        "--unsup-loss soft --evaluate mean",
        "--unsup-loss negative --no-cutmix",
        "--unsup-weight 0",
        "--k-strategy n --k-max 2 --weight convex --evaluate branch2",
        "--T 0.84 0.89 0.94 0.99",
    ],
    "ael_fpl": [
        "",
        "--recipe official",
        "--unsup-loss ce",
        "--recipe official --unsup-loss ce --aux-weight 0.4 --teacher-mode eval",
        "--paste-draws 0 --skip-absent",
        "--recipe official --T 0.84 0.89 0.94 0.99",
    ],
    "u2pl": [
        "--warmup-iters 2",
        "--warmup-iters 2 --recipe official --cutmix-prob 1",
        "--warmup-iters 2 --unreliable-loss binary --no-bank",
        "--warmup-iters 2 --unreliable-loss none --no-cutmix --no-dpa",
        "--warmup-iters 2 --negatives-from reliable --bank-dtype bf16",
    ],
    "u2pl_ael": [
        "--warmup-iters 2",
        "--recipe official --contrast-after 2",
        "--warmup-iters 2 --unreliable-loss none --paste-draws 0 --no-cutmix",
    ],
    "esl": [
        "",
        "--no-contrast",
        "--no-contrast --label hard --no-cutmix",
        "--label topk --top-k 2 --cutmix-prob 0.5",
        "--label soft --aux-weight 0.4",
    ],
    "unimatch_v2": [
        "--threshold 0.3",
        "--threshold 0.3 --recipe official",
        "--unsup-loss fpl --freeze 2 --checkpoint-activations",
    ],
    "unimatch": [
        "--threshold 0.3",
        "--threshold 0.3 --recipe official",
        "--threshold 0 --views 1 --no-feature-perturbation",
        "--unsup-loss fpl --recipe official",
        "--unsup-loss fpl --T 0.84 0.89 0.94 0.99",
    ],
}


def train(checkout, script, flags, folder, processes):
    """Runs a script of a checkout in a folder; returns what it printed last if it failed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [f"{checkout}/{script}.py", *flags, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)
    return "" if done.returncode == 0 else "failed: " + (done.stderr.strip() or "?")[-300:]


def numbers(folder):
    """Returns {name: value} of all that a run has computed."""
    found = {}
    for name in ("last.pt", "best.pt"):
        saved = torch.load(folder / name, weights_only=True)
        kept = ("networks", "optimizer", "state", "meter", "best", "step", "lists")
        found |= {f"{name}{k}": v for k, v in flat({k: saved.get(k) for k in kept}).items()}
    for number, line in enumerate(log(folder)):
        line.pop("time", None)
        if line["kind"] != "start":
            found[f"log.jsonl:{number}"] = json.dumps(line)
    return found


def different(before, after):
    """Returns the names of what two dicts of `numbers` have not in common."""
    wrong = []
    for name in sorted(set(before) | set(after)):
        a = before.get(name)
        b = after.get(name)
        if torch.is_tensor(a) and torch.is_tensor(b):
            equal = a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
        else:
            equal = type(a) is type(b) and a == b
        if not equal:
            wrong.append(name)
    return wrong


def compare(checkouts, script, flags, processes, steps):
    """Runs one mode in both checkouts; returns (what was run, what differs)."""
    mode = [*SHORT, *flags.split()]
    for flag in AT_THE_END:
        mode += [flag, str(steps)]
    if processes > 1:
        mode += ["--batch-size", "4"]
    title = f"{script} {flags}" + (f", {processes} processes" if processes > 1 else "")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("before", "after")]
        for checkout, folder in zip(checkouts, folders, strict=True):
            if failure := train(checkout, script, mode, folder, processes):
                return title, [f"{checkout}: {failure}"]
        return title, different(*map(numbers, folders))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="*", default=list(MODES), help="scripts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    checkouts = (args.before.resolve(), args.after.resolve())
    for checkout in checkouts:
        if not (checkout / "supervised.py").is_file():
            raise Refusal(f"{checkout}: no checkout of these scripts")
    if unknown := set(args.only) - set(MODES):
        raise Refusal(f"--only {' '.join(sorted(unknown))}: the scripts are {', '.join(MODES)}")
    jobs = [(script, flags, 1) for script in args.only for flags in MODES[script]]
    jobs += [(script, MODES[script][0], 2) for script in args.only]
    failed = 0
    with ThreadPoolExecutor(args.workers) as pool:
        for title, wrong in pool.map(lambda job: compare(checkouts, *job, args.steps), jobs):
            failed += bool(wrong)
            print(f"{title}: {'equal' if not wrong else wrong[:6]}", flush=True)
    print(f"{len(jobs) - failed} of {len(jobs)} runs are equal")
    return 1 if failed else 0


if __name__ == "__main__":
    with refusals("start again"):
        sys.exit(main())
