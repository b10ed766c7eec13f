"""Prints tables of results from the logs of runs, and keeps that of a page equal to its logs.

    python results/table.py           # print
    python results/table.py --write   # put them into docs/data.md, between two marks
    python results/table.py RUN...    # tables of any runs, folders or logs: mean and range of seeds

A log is evidence as its run wrote it: results/<script>/<name>.jsonl. A row links to its log and
says at which commit the log was written.
"""

import os.path
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common import Refusal  # noqa: E402
from common.run import refusals  # noqa: E402
from results import logs  # noqa: E402

MARKS = ("<!-- table: results/table.py --write -->\n", "<!-- end of table -->\n")
PAGES = {"docs/data.md": "*/shapes*.jsonl"}  # page -> its logs
# flags named where they differ
USUAL = {"consistency": "ce", "teacher_bn": "own", "recipe": "paper", "schedule": "paper"}
USUAL |= {"aspp_rates": [1, 2, 3], "weight": "concave", "k_strategy": "n-1", "T": 0.9}
USUAL |= {"teacher_mode": "train", "skip_absent": False, "views": 2, "partner": "batch"}
USUAL |= {"feature_perturbation": True}
USUAL |= {"same_image_cutmix": False, "evaluate": "branch1", "seed": 0, "stem": "classic"}
METHODS = {  # script -> (flag that names the method, {its value: the first words of a row})
    "supervised.py": ("", {"": "supervised"}),
    "mean_teacher.py": ("", {"": "Mean Teacher"}),
    "cps_fpl.py": ("unsup_loss", {"fpl": "FPL+CPS", "ce": "CPS"}),
    "ael_fpl.py": ("unsup_loss", {"fpl": "FPL+AEL", "ce": "AEL"}),
    "unimatch.py": ("unsup_loss", {"ce": "UniMatch", "fpl": "UniMatch, FPL"}),
    "unimatch_v2.py": ("unsup_loss", {"ce": "UniMatch V2", "fpl": "UniMatch V2, FPL"}),
    "u2pl.py": (
        "unreliable_loss",
        {"contrastive": "U2PL, L_c", "binary": "U2PL, L_b", "none": "U2PL, neither L_c nor L_b"},
    ),
    "u2pl_ael.py": (
        "unreliable_loss",
        {
            "contrastive": "U2PL with AEL, L_c",
            "binary": "U2PL with AEL, L_b",
            "none": "AEL with U2PL's labels",
        },
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
SAID = ("cutmix", "contrast")  # by the first words of a row, as what METHODS names
HEAD_OF_RUNS = "| method | seeds | last | best | at step | minutes |\n|-|-|-|-|-|-|\n"
HEAD = "| method | last | best (step) | minutes | log at its commit |\n|-|-|-|-|-|\n"


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
    if args.get("backbone_2") not in (None, args.get("backbone")):
        words.append(f"{args['backbone']} and {args['backbone_2']}")
    if args.get("views") == 1 and not args.get("feature_perturbation"):
        words = [words[0].replace("UniMatch", "FixMatch")]
        args = args | {"views": 2, "feature_perturbation": True}
    if start["script"].startswith("unimatch") and args.get("threshold", 0.95) != 0.95:
        words.append(f"threshold {args['threshold']:g}")
    for name, usual in USUAL.items():
        value = spelled(args.get(name, usual))
        if value != spelled(usual):
            words.append(f"{name} {value}")
    return ", ".join(words)


def spelled(value):
    """Returns a flag's value as one types it: the numbers of a list one after another."""
    values = value if isinstance(value, list) else [value]
    return " ".join(str(x) for x in values)


def commit(start):
    """Returns seven digits of the commit that a log names; "-dirty": with changes beside it."""
    digits, *dirty = start["git"].split("-")
    return "-".join([digits[:7], *dirty])


def table(pattern, folder=ROOT):
    """Returns caption and Markdown table of the logs under results/ whose paths fit the pattern.

    folder: that of the page, which links are relative to.
    """
    found = [logs.read(path) for path in (ROOT / "results").glob(pattern)]
    few = min(log.start["lists"]["labeled"][0] for log in found)
    constants = set()
    rows = []
    for path, start, train, _, done in found:  # a Log
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


def tables_of_runs(places):
    """Returns Markdown tables of run folders or logs, a table for each set of images scored.

    A row is of all seeds of a recipe: mean, and range of several. Raises Refusal.
    """
    groups = logs.grouped(logs.read_all(places))
    tables = {}
    for group, own in zip(groups, logs.unlike(groups), strict=True):
        start = group[0].start
        images, key = start["lists"][group[0].on]
        setting = f"{start['args']['dataset']}: mIoU in per cent on {group[0].on}, {images} images"
        tables.setdefault(f"{setting}, set {key}", []).append(row_of_runs(group, own))
    text = [
        "\n".join([f"{setting}\n", HEAD_OF_RUNS + "\n".join(rows)])
        for setting, rows in tables.items()
    ]
    return "\n\n".join([*text, "\n".join(logs.notes(groups))]).rstrip()


def row_of_runs(group, own):
    """Returns a row: group, the Logs of all seeds; own: {flag: value} that tells it from others."""
    start = group[0].start
    words = Path(start["script"]).stem
    said = set()
    if start["script"] in METHODS:
        words = method(start | {"args": start["args"] | {"seed": 0}})
        said = {METHODS[start["script"]][0], *SAID}
    for flag, value in own.items():
        word = logs.in_words(flag, value)
        if flag not in said and word not in words.split(", "):
            words += f", {word}"
    finished = [log for log in group if log.done]
    scored = [log for log in finished if "best" in log.done]
    seeds = ", ".join(str(log.start["args"]["seed"]) for log in group)
    if len(finished) < len(group):
        seeds += f" ({len(group) - len(finished)} unfinished)"
    last = logs.spread([100 * log.done["last"]["miou"] for log in finished])
    best = logs.spread([100 * log.done["best"]["miou"] for log in scored])
    steps = ", ".join(str(log.done["best_step"]) for log in scored)
    minutes = [log.train[-1]["time"]["elapsed_s"] / 60 for log in finished if log.train]
    mean = f"{sum(minutes) / len(minutes):.0f}" if minutes else "-"
    return f"| {words} | {seeds} | {last} | {best} | {steps or '-'} | {mean} |"


def between(page, marks, text):
    """Returns the text of a page with another text between its two marks."""
    before, rest = (ROOT / page).read_text().split(marks[0])
    return before + marks[0] + text + marks[1] + rest.split(marks[1])[1]


def inserted(page):
    """Returns the text of a page with its table between the marks."""
    return between(page, MARKS, table(PAGES[page], (ROOT / page).parent))


def main(argv):
    """Prints or writes what the words of the command line ask for. Raises Refusal."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    if argv and argv != ["--write"]:
        flags = [word for word in argv if word.startswith("-")]
        if flags:
            raise Refusal(f"{flags[0]}: --write alone, or folders of runs")
        print(tables_of_runs(argv))
        return
    for name, pattern in PAGES.items():
        if argv:
            (ROOT / name).write_text(inserted(name))
        else:
            print(table(pattern, (ROOT / name).parent))


if __name__ == "__main__":
    with refusals("start again"):
        main(sys.argv[1:])
