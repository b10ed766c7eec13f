"""Prints the tables of results from the logs under results/, and keeps the pages equal to them.

    python results/table.py           # print
    python results/table.py --write   # put them into README.md and docs/data.md, between two marks

A log is evidence as its run wrote it: results/<script>/<name>.jsonl.
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- table: results/table.py --write -->\n", "<!-- end of table -->\n")
PAGES = {"README.md": "*/camvid*.jsonl", "docs/data.md": "*/shapes*.jsonl"}  # page -> its logs
# flags named where they differ
USUAL = {"consistency": "ce", "teacher_bn": "own", "recipe": "paper", "schedule": "paper"}
USUAL |= {"aspp_rates": [1, 2, 3], "weight": "concave", "k_strategy": "n-1", "T": 0.9}
USUAL |= {"teacher_mode": "train", "skip_absent": False}
USUAL |= {"same_image_cutmix": False, "evaluate": "branch1", "seed": 0, "stem": "classic"}
USUAL |= {"contrast": True}
ORDER = "supervised.py mean_teacher.py cps_fpl.py ael_fpl.py u2pl.py esl.py".split()
LOSSES = {  # the first word of a row
    "cps_fpl.py": {"fpl": "FPL", "ce": "CPS"},
    "ael_fpl.py": {"fpl": "FPL+AEL", "ce": "AEL"},
    "u2pl.py": {"contrastive": "L_c", "binary": "L_b", "none": "neither L_c nor L_b"},
    "esl.py": {"dynamic": "ESL", "topk": "top k", "soft": "soft labels", "hard": "hard labels"},
}


def read(path):
    """Returns (start, train lines, eval lines, done) of a log."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = {kind: [e for e in entries if e["kind"] == kind] for kind in ("train", "eval", "done")}
    return entries[0], kinds["train"], kinds["eval"], kinds["done"][-1]


def row(path):
    """Returns the cells of one log's row, sort key first."""
    start, train, evals, done = read(path)
    args, script = start["args"], start["script"]
    flags = [f"{k} {args[k]}" for k in USUAL if args.get(k, USUAL[k]) != USUAL[k]]
    if args.get("unsup_weight") == 0:
        flags.insert(0, "labels alone")
    else:
        flags[:0] = ["CutMix"] * args.get("cutmix", False)
        for loss in {"unsup_loss", "unreliable_loss", "label"} & set(args):
            flags.insert(0, LOSSES[script].get(args[loss], args[loss]))
    flags = ", ".join(flags) or "-"
    same = hashlib.sha256((ROOT / script).read_bytes()).hexdigest() == start["sha256"]
    minutes = train[-1]["time"]["elapsed_s"] / 60
    link = path.relative_to(ROOT).as_posix() + ("" if same else ", older script")
    return (
        (ORDER.index(script), -start["lists"]["labeled"][0], flags != "labels alone", flags),
        f"| {script} | {flags} | {args['split']} ({start['lists']['labeled'][0]}) "
        f"| {args['total_iters']} | {100 * done['last']['miou']:.2f} "
        f"| {100 * done['best']['miou']:.2f} ({done['best_step']}) "
        f"| {100 * max(e['miou'] for e in evals):.2f} | {100 * done['last']['constant']:.2f} "
        f"| {minutes:.0f} | {link} |",
    )


def table(pattern):
    """Returns the Markdown table of all logs whose path under results/ fits the pattern."""
    head = "| script | flags | labels | steps | test mIoU, last | test mIoU, best on val (step) "
    head += "| val, best | constant | minutes | |\n|-|-|-|-|-|-|-|-|-|-|\n"
    rows = sorted(row(path) for path in (ROOT / "results").glob(pattern))
    return head + "".join(text + "\n" for _, text in rows)


def inserted(page):
    """Returns the text of a page with its table between the marks."""
    before, rest = (ROOT / page).read_text().split(MARKS[0])
    return before + MARKS[0] + table(PAGES[page]) + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    for name, logs in PAGES.items():
        if sys.argv[1:] == ["--write"]:
            (ROOT / name).write_text(inserted(name))
        else:
            print(table(logs))
