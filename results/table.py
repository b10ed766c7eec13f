"""Prints the tables of results from the logs under results/, and keeps the pages equal to them.

    python results/table.py           # print
    python results/table.py --write   # put them into README.md and docs/data.md, between two marks

A log is evidence as its run wrote it: results/<script>/<name>.jsonl. A row links to its log and
says at which commit the log was written.
"""

import json
import os.path
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common import Refusal  # noqa: E402
from common.run import refusals  # noqa: E402

MARKS = ("<!-- table: results/table.py --write -->\n", "<!-- end of table -->\n")
PAGES = {"README.md": "*/camvid*.jsonl", "docs/data.md": "*/shapes*.jsonl"}  # page -> its logs
# flags named where they differ
USUAL = {"consistency": "ce", "teacher_bn": "own", "recipe": "paper", "schedule": "paper"}
USUAL |= {"aspp_rates": [1, 2, 3], "weight": "concave", "k_strategy": "n-1", "T": 0.9}
USUAL |= {"teacher_mode": "train", "skip_absent": False}
USUAL |= {"same_image_cutmix": False, "evaluate": "branch1", "seed": 0, "stem": "classic"}
METHODS = {  # script -> (flag that names the method, {its value: the first words of a row})
    "supervised.py": ("", {"": "supervised"}),
    "mean_teacher.py": ("", {"": "Mean Teacher"}),
    "cps_fpl.py": ("unsup_loss", {"fpl": "FPL+CPS", "ce": "CPS"}),
    "ael_fpl.py": ("unsup_loss", {"fpl": "FPL+AEL", "ce": "AEL"}),
    "u2pl.py": (
        "unreliable_loss",
        {"contrastive": "U2PL, L_c", "binary": "U2PL, L_b", "none": "U2PL, neither L_c nor L_b"},
    ),
    "esl.py": (
        "label",
        {
            "dynamic": "ESL",
            "topk": "ESL, top k",
            "soft": "ESL, all classes",
            "hard": "ESL, hard labels",
        },
    ),
}
HEAD = "| method | last | best (step) | minutes | log at its commit |\n|-|-|-|-|-|\n"


def read(path):
    """Returns (start, train lines, eval lines, done) of a log."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = {kind: [e for e in entries if e["kind"] == kind] for kind in ("train", "eval", "done")}
    return entries[0], kinds["train"], kinds["eval"], kinds["done"][-1]


def method(start):
    """Returns a row's words from the first line of its log: the method, then what is unusual."""
    args = start["args"]
    flag, names = METHODS[start["script"]]
    words = [names[args.get(flag, "")]]
    if args.get("unsup_weight") == 0:
        words = ["CPS's two networks, labels alone"]
    elif args.get("cutmix"):
        words.append("CutMix")
    if args.get("contrast") is False:
        words.append("no L_CTR")
    for name, usual in USUAL.items():
        value = args.get(name, usual)
        if isinstance(value, list):
            value = " ".join(str(x) for x in value)
            usual = " ".join(str(x) for x in usual)
        if value != usual:
            words.append(f"{name} {value}")
    return ", ".join(words)


def commit(start):
    """Returns seven digits of the commit that a log names; "-dirty": with changes beside it."""
    digits, *dirty = start["git"].split("-")
    return "-".join([digits[:7], *dirty])


def table(pattern, folder=ROOT):
    """Returns caption and Markdown table of the logs under results/ whose paths fit the pattern.

    folder: that of the page, which links are relative to.
    """
    logs = [(path, *read(path)) for path in (ROOT / "results").glob(pattern)]
    few = min(start["lists"]["labeled"][0] for _, start, *_ in logs)
    constants = set()
    rows = []
    for path, start, train, _, done in logs:
        args = start["args"]
        labels = start["lists"]["labeled"][0]
        words = method(start)
        if labels == few:
            share = args["split"]
        else:
            words += f", {labels} labels"
        constant = f"{100 * done['last']['constant']:.2f}"
        constants.add((args["dataset"], args["total_iters"], done["on"], constant))
        last = f"{100 * done['last']['miou']:.2f}"
        best = f"{100 * done['best']['miou']:.2f} ({done['best_step']})"
        minutes = f"{train[-1]['time']['elapsed_s'] / 60:.0f}"
        link = f"[{path.stem} at {commit(start)}]({os.path.relpath(path, folder)})"
        alone = args.get("unsup_weight") == 0
        order = (list(METHODS).index(start["script"]), -labels, not alone, words)
        rows.append((order, f"| {words} | {last} | {best} | {minutes} | {link} |\n"))
    ((dataset, steps, on, constant),) = constants  # one table, one setting
    caption = f"{dataset}: mIoU on {on} in per cent after {steps} steps (last), and after the step "
    caption += f"that is best on val.\n{few} labels ({share}) where a row does not say how many. "
    caption += f"The best constant prediction has {constant}.\n\n"
    return caption + HEAD + "".join(row for _, row in sorted(rows))


def inserted(page):
    """Returns the text of a page with its table between the marks."""
    before, rest = (ROOT / page).read_text().split(MARKS[0])
    between = table(PAGES[page], (ROOT / page).parent)
    return before + MARKS[0] + between + MARKS[1] + rest.split(MARKS[1])[1]


def main(argv):
    """Prints the tables, or writes them into their pages. Raises Refusal for any other word."""
    if argv not in ([], ["--write"]):
        raise Refusal(f"{' '.join(argv)}: --write or nothing; the runs are those in results/")
    for name, logs in PAGES.items():
        if argv:
            (ROOT / name).write_text(inserted(name))
        else:
            print(table(logs, (ROOT / name).parent))


if __name__ == "__main__":
    with refusals():
        main(sys.argv[1:])
