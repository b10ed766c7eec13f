"""What --precise-bn is worth: mIoU of the same weights with and without, at batches of 2, 4 and 8.

python benchmarks/precise_bn.py                            # shapes, three seeds
python benchmarks/precise_bn.py --dataset camvid --data-root DIR --seeds 0 --iters 150

supervised.py trains by the small protocol of its data set, with a head of 256 channels, cut to
--iters steps (0: all), with --batch-size images a step and the rate left as it is. After each third
of the steps val is scored twice: with BN's running statistics, and with those of 20 batches
(--precise-bn 20). Rows go into results/precise_bn.json, in place of older ones of the same data
set, batch and seed.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import supervised  # noqa: E402
from benchmarks import steps  # noqa: E402
from common.distributed import setup  # noqa: E402
from common.flags import cli  # noqa: E402
from common.run import refusals  # noqa: E402

FILE = ROOT / "results" / "precise_bn.json"
KEYS = ("dataset", "batch", "seed", "step")


@dataclass
class Options:
    """What is trained."""

    dataset: str = "shapes"
    data_root: str = ""
    batches: tuple[int, ...] = (2, 4, 8)  # labelled images a step
    seeds: tuple[int, ...] = (0, 1, 2)
    iters: int = 0  # steps; 0: the protocol's
    device: str = "cpu"
    out: str = str(FILE)


def measure(options, batch, seed):
    """Trains one run; returns its rows, one for each third of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--dataset", options.dataset, "--batch-size", batch, "--seed", seed]
        words += ["--head-channels", 256]
        words += ["--out", f"{folder}/run", "--device", options.device]
        if options.data_root:
            words += ["--data-root", options.data_root]
        if options.iters:
            words += ["--total-iters", options.iters]
        args = steps.resolved(supervised, words)
        data = supervised.load(args)
        group = setup(options.device)
        rows = []

        def after(watch, done):
            if done % max(args.total_iters // 3, 1):
                return
            row = {"dataset": options.dataset, "batch": batch, "seed": seed, "step": done}
            for name, batches in (("running", 0), ("precise", 20)):
                scored = replace(args, precise_bn=batches)
                net = watch.networks["student"]
                scores, _ = supervised.evaluate(net, data, data.val, scored, group)
                row[name] = round(100 * scores["miou"], 2)
            row["constant"] = round(100 * scores["constant"], 2)
            rows.append(row)
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)

        # of one step more the last is not taken
        longer = replace(args, total_iters=args.total_iters + 1)
        steps.take(supervised, longer, group, args.total_iters, after=after)
    return rows


def table(rows):
    """Returns the rows as Markdown: seeds side by side, running and then precise."""
    lines = ["| data set | batch | step | running, each seed | `--precise-bn 20`, each seed |"]
    lines.append("|-|-|-|-|-|")
    groups = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["batch"], row["step"]), []).append(row)
    for key, group in sorted(groups.items()):
        cells = [" ".join(f"{row[name]:.2f}" for row in group) for name in ("running", "precise")]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)


def main(options):
    """Trains all that is asked for; keeps the other rows that the file has; prints the table."""
    path = Path(options.out)
    rows = {}
    if path.exists():
        rows = {tuple(r[key] for key in KEYS): r for r in json.loads(path.read_text())["rows"]}
    for seed in options.seeds:
        for batch in options.batches:
            for row in measure(options, batch, seed):
                rows[tuple(row[key] for key in KEYS)] = row
            made = sorted(rows.values(), key=lambda row: [row[key] for key in KEYS])
            found = {"torch": torch.__version__, "rows": made}
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(made))


if __name__ == "__main__":
    with refusals("start again"):
        main(cli(Options))
