"""Per-class IoU of two runs in the layout of FPL supplement Table 6, the hardest class first.

    python results/compare.py A B [--rows] [--score best]   # run folders or logs; A: the baseline

On Cityscapes the table's own columns (1/32 of the labels) stand beside them: common/papers.json.

IoU in per cent with two decimals; improvements in points, between the numbers as printed. Hard is
what A scores low, so noise in A alone makes hard classes rise and easy ones fall.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common import Refusal  # noqa: E402
from common.data import FACTS  # noqa: E402
from common.flags import NO_NUMBER, cli  # noqa: E402
from common.run import refusals  # noqa: E402
from results import logs  # noqa: E402


def load(path, score):
    """Returns name, facts, classes, iou (None: absent), miou of a run. Raises Refusal."""
    log = logs.read(path)
    start = log.start
    done = log.done
    if not done:
        raise Refusal(f"{log.path}: no line of kind done: let the run finish")
    try:
        args = start["args"]
        on = done["on"]
        iou = [v if v is None else round(100 * v, 2) for v in done[score]["iou"]]
        miou = round(100 * done[score]["miou"], 2)
        classes = start.get("classes") or FACTS[args["dataset"]].get("classes")
        classes = classes or [f"class {i}" for i in range(len(iou))]
        if len(classes) != len(iou):
            raise ValueError(f"{len(iou)} classes, {args['dataset']} has {len(classes)}")
        sets = {k: f"{count} images, set {key}" for k, (count, key) in start["lists"].items()}
        facts = {"data set": args["dataset"], "classes": ", ".join(classes)}
        facts["scored on"] = f"{on}, {sets[on]}"
        facts |= {"labelled": sets["labeled"], "seed": args["seed"], "steps": args["total_iters"]}
        return SimpleNamespace(
            name=log.name, facts=facts, classes=classes, iou=iou, miou=miou, flags=args
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise Refusal(f"{log.path}: not the log of a finished run ({why})") from None


def hardest_first(a, b):
    """Returns (classes by ascending a, ties by index; classes that are None in a or in b)."""
    absent = [i for i, pair in enumerate(zip(a, b, strict=True)) if None in pair]
    return sorted(set(range(len(a))) - set(absent), key=lambda i: (a[i], i)), absent


def cells(names, classes, a, b, mious):
    """Supplement Table 6 as rows of text, one per class, mIoU last; a, b: per cent per class."""
    present, absent = hardest_first(a, b)
    mean_a, mean_b = mious
    if a.count(None) < len(absent) or b.count(None) < len(absent):  # over what both have
        count = max(len(present), 1)
        mean_a = round(sum(a[i] for i in present) / count, 2)
        mean_b = round(sum(b[i] for i in present) / count, 2)
    rows = [("Class", *names, "Improvement")]
    rows += [row_of(classes[i], a[i], b[i]) for i in present]
    rows += [(classes[i], "absent", "absent", "absent") for i in absent]
    return [*rows, row_of("mIoU", mean_a, mean_b)]


def row_of(name, x, y):
    """Returns two numbers and their difference as a row of texts."""
    return name, f"{x:.2f}", f"{y:.2f}", f"{y - x:+.2f}"


def published(dataset):
    """Supplement Table 6 of a data set, {method: {class: IoU in per cent}}, or {}: AEL, FPL+AEL."""
    entries = json.loads((ROOT / "common/papers.json").read_text())
    entries = [entry for entry in entries if "iou" in entry and entry["dataset"] == dataset]
    return {entry["source"].split(", ")[1]: entry["iou"] for entry in entries}


def beside(rows, method, iou):
    """Returns rows as cells has them with a column more: the paper's numbers of a method."""
    column = {"Class": f"paper: {method}", "mIoU": f"{sum(iou.values()) / len(iou):.2f}"}
    column |= {name: f"{value:.2f}" for name, value in iou.items()}
    return [(*row, column[row[0]]) for row in rows]


def markdown(rows):
    """Returns rows of text as a Markdown table with padded cells; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * (width - 1) + ":" for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.rjust, row, widths))} |" for row in rows)


def summary(a, b):
    """Returns in numbers what supplement Sec. 4.2 claims; hard: the lower half of a, floored."""
    gains = [round(b[i] - a[i], 2) for i in hardest_first(a, b)[0]]
    half, n = len(gains) // 2, len(gains)
    hard, easy = (sum(g) / max(len(g), 1) for g in (gains[:half], gains[half:]))
    text = f"{sum(g > 0 for g in gains)} of {n} classes rise, {sum(g < 0 for g in gains)} fall; "
    return text + f"on average {hard:+.2f} in the {half} hardest, {easy:+.2f} in {n - half} others"


@dataclass(frozen=True)
class Args:
    """Per-class IoU of two runs, the hardest class first, as in FPL supplement Table 6."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]  # the baseline
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]  # run folders or logs
    score: Literal["last", "best"] = "last"  # of the last step, or of the best one on val
    rows: bool = False  # a row per class, not a column


def main(argv=None):
    """Prints table, summary and what else differs between the two runs. Raises Refusal."""
    args = cli(Args, argv)
    a, b = load(args.a, args.score), load(args.b, args.score)
    unlike = {k: f"{k} {v} against {b.facts[k]}" for k, v in a.facts.items() if v != b.facts[k]}
    words = "; ".join(unlike.values())
    if set(unlike) - {"labelled", "seed", "steps"}:
        raise Refusal(f"{args.a}, {args.b}: {words}: nothing to compare")
    names = (a.name, b.name) if a.name != b.name else (args.a, args.b)
    rows = cells(names, a.classes, a.iou, b.iou, (a.miou, b.miou))
    for method, iou in published(a.flags["dataset"]).items():
        rows = beside(rows, method, iou)
    print(markdown(rows if args.rows else list(zip(*rows, strict=True))))
    print(f"\n{args.score} step, {a.facts['scored on']}; one seed each\n{summary(a.iou, b.iou)}")
    if words:
        print(f"warning: {words}: the improvement is not that of the method alone")
    for name in sorted((set(a.flags) & set(b.flags)) - set(NO_NUMBER)):
        if a.flags[name] != b.flags[name]:
            flag = "--" + name.replace("_", "-")
            print(f"{flag}: {a.flags[name]} against {b.flags[name]}")


if __name__ == "__main__":
    with refusals("start again"):
        main()
