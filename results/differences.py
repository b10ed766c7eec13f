"""Do the papers' claims hold here? The table of camvid-lite, and paired differences of its rows.

    python results/differences.py           # print
    python results/differences.py --write   # put them into docs/results.md and README.md

A difference is taken seed by seed, between runs with the same labelled images, sample stream and
schedule. Its interval: test images and seeds are drawn again with replacement, 5,000 times, the
same for both rows; the middle 95 % of the differences of mean mIoU. With three seeds it says little
of what a fourth would give, and the page says so.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common.data import FACTS  # noqa: E402
from results.logs import spread  # noqa: E402
from results.run_table import COUNTS, ROWS, SEEDS, SPLIT, counts_path, logs_of, miou  # noqa: E402
from results.table import between  # noqa: E402

MARKS = ("<!-- table: results/differences.py --write -->\n", "<!-- end of table -->\n")
CLAIM_HEAD = ["| claim | paper | mIoU | points, seed by seed | 95 % | here |", "|-|-|-|-|-|-|"]
OF_CPS = (
    ("CPS is above labels alone", "cps", "labels-cps"),
    ("FPL improves CPS", "fpl-cps", "cps"),
    ("FPL+CPS is above labels alone", "fpl-cps", "labels-cps"),
)
CLAIMS = (  # (the claim, its place in the papers, the row, the row that it is above)
    *((claim, "FPL Table 1", row, base) for claim, row, base in OF_CPS),
    ("FPL as released improves CPS", "FPL Table 1", "fpl-cps-official", "cps"),
    ("AEL is above labels alone", "FPL Table 2", "ael", "labels"),
    ("FPL improves AEL", "FPL Table 2", "fpl-ael", "ael"),
    ("CutMix improves Mean Teacher", "U2PL Table 1", "cutmix-mt", "mt"),
    ("CutMix-MT is above labels alone", "U2PL Table 1", "cutmix-mt", "labels"),
    ("U2PL is above labels alone", "U2PL Table 1", "u2pl", "labels"),
    ("U2PL's contrast improves its base", "U2PL Table 6", "u2pl", "u2pl-neither"),
    ("L_c is above L_b", "U2PL Table A3, A4", "u2pl", "u2pl-binary"),
    ("U2PL with AEL is above labels alone", "U2PL Table 3", "u2pl-ael", "labels"),
    ("U2PL with AEL is above U2PL", "U2PL Table 3", "u2pl-ael", "u2pl"),
    ("U2PL with AEL is above AEL", "U2PL Table 3", "u2pl-ael", "ael"),
    ("The contrast improves U2PL with AEL", "none", "u2pl-ael", "u2pl-ael-neither"),
    ("ESL is above labels alone", "ESL supp. Table 1", "esl", "labels"),
    ("ESL is above U2PL", "ESL", "esl", "u2pl"),
    ("ESL's contrast improves its soft labels", "ESL Table 4", "esl", "esl-soft-labels"),
    ("ESL's soft labels improve hard ones", "ESL Table 4", "esl-soft-labels", "esl-hard-labels"),
    ("FixMatch is above labels alone, 6 labels", "UniMatch", "fixmatch", "labels"),
    ("FixMatch is above labels alone, 1/8", "UniMatch", "fixmatch-1_8", "labels-1_8"),
    ("UniMatch improves FixMatch, 1/8", "UniMatch", "unimatch-1_8", "fixmatch-1_8"),
    ("FPL improves FixMatch at threshold 0, 1/8", "none", "fpl-fixmatch-1_8", "fixmatch-0-1_8"),
    ("FPL improves FixMatch with its threshold, 1/8", "none", "fpl-fixmatch-1_8", "fixmatch-1_8"),
    ("FPL improves UniMatch at threshold 0, 1/8", "none", "fpl-unimatch-1_8", "unimatch-0-1_8"),
    ("FPL improves UniMatch with its threshold, 1/8", "none", "fpl-unimatch-1_8", "unimatch-1_8"),
    ("CPS of unlike networks is above CPS of two alike", "none", "cps-unlike", "cps"),
    ("FPL improves CPS of unlike networks", "none", "fpl-cps-unlike", "cps-unlike"),
)
for _words, _row in (
    ("half the labels", "{}-1_128"),
    ("twice the labels", "{}-1_32"),
    ("full size", "full-{}"),
    ("23 labels, 2,000 steps", "flat-{}"),
):
    CLAIMS += tuple(
        (f"{claim}, {_words}", "FPL Table 1", _row.format(row), _row.format(base))
        for claim, row, base in OF_CPS
    )


def runs(name):
    """Returns {seed: the done line of a row's log}."""
    logs = logs_of(name)
    return {seed: json.loads(path.read_text().splitlines()[-1]) for seed, path in logs.items()}


def resampled(name, seeds, drawn):
    """Returns (draws, seeds) mIoU of a row; drawn: (draws, images), how often an image counts."""
    found = []
    for seed in seeds:
        with np.load(counts_path(name, seed)) as counts:
            found.append(miou(*(drawn @ counts[kind] for kind in COUNTS.split())))
    return np.stack(found, 1)


def difference(name, base, draws=5000):
    """Returns (seeds, difference per seed of the last test mIoU, interval of their mean).

    Points of mIoU. The interval's ends are None where the rows have no seed in common.
    """
    seeds = sorted(set(runs(name)) & set(runs(base)))
    if not seeds:
        return seeds, [], (None, None)
    with np.load(counts_path(name, seeds[0])) as counts:
        images = len(counts["hit"])
    rng = np.random.default_rng([0, 0xD1FF])
    drawn = rng.multinomial(images, np.full(images, 1 / images), draws).astype(float)
    chosen = rng.integers(len(seeds), size=(draws, len(seeds)))
    gaps = resampled(name, seeds, drawn) - resampled(base, seeds, drawn)
    means = np.take_along_axis(gaps, chosen, 1).mean(1)
    everything = np.ones((1, images))
    exact = resampled(name, seeds, everything) - resampled(base, seeds, everything)
    return seeds, exact[0].tolist(), tuple(np.percentile(means, [2.5, 97.5]))


def verdict(seeds, interval):
    """Returns what the interval says of a claim that the difference is positive."""
    if len(seeds) < len(SEEDS):
        return "not yet told"
    if interval[0] > 0:
        return "holds"
    if interval[1] < 0:
        return "does not hold"
    return "cannot be told"


def by_class():
    """Returns the lines of a table: test IoU of each class, last, per cent, mean over seeds."""
    classes = FACTS["camvid"]["classes"]
    lines = [f"| row | {' | '.join(classes)} |", "|-" * (1 + len(classes)) + "|"]
    for name in ROWS:
        found = [line["last"]["iou"] for line in runs(name).values()]
        if found:
            means = 100 * np.mean(found, 0)
            lines.append(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return lines


def mean_miou(name, seeds):
    """Returns a row's last test mIoU in per cent, its mean over these seeds."""
    done = runs(name)
    return 100 * np.mean([done[seed]["last"]["miou"] for seed in seeds])


def claims():
    """Returns a line of a table for each claim: means of both rows, their difference, verdict."""
    lines = []
    for claim, paper, name, base in CLAIMS:
        seeds, gaps, interval = difference(name, base)
        numbers = "- | - | -"
        if gaps:
            points = ", ".join(f"{gap:+.1f}" for gap in gaps)
            numbers = f"{mean_miou(base, seeds):.1f} to {mean_miou(name, seeds):.1f}"
            numbers += f" | {points} | {interval[0]:+.1f} to {interval[1]:+.1f}"
        lines.append(f"| {claim} | {paper} | {numbers} | {verdict(seeds, interval)} |")
    return lines


def rows():
    """Returns the lines of a table: test mIoU of each row."""
    lines = ["| row | seeds | test mIoU, last | test mIoU, best on val |", "|-|-|-|-|"]
    for name, row in ROWS.items():
        done = runs(name)
        if done:
            last = spread([100 * line["last"]["miou"] for line in done.values()], 1)
            best = spread([100 * line["best"]["miou"] for line in done.values()], 1)
            flags = f"{row.script} {row.flags}".strip()
            if row.split != SPLIT or row.size == "full":
                flags += f" --split {row.split}"
            seeds = " ".join(str(seed) for seed in done)
            name += ", full size" * (row.size == "full")
            lines.append(f"| {name}: `{flags}` | {seeds} | {last} | {best} |")
    return lines


def tables():
    """Returns {page: its tables as Markdown}; README: FPL's own claims that all seeds tell of."""
    judged = claims()
    own = [claim.startswith("FPL") and paper.startswith("FPL") for claim, paper, *_ in CLAIMS]
    told = [line for line, of_fpl in zip(judged, own, strict=True) if of_fpl]
    told = [line for line in told if "not yet told" not in line]
    parts = [*rows(), "", *CLAIM_HEAD, *judged, "", *by_class()]
    return {
        "README.md": "\n".join(CLAIM_HEAD + told) + "\n",
        "docs/results.md": "\n".join(parts) + "\n",
    }


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    if sys.argv[1:] not in ([], ["--write"]):
        sys.exit(f"differences.py {' '.join(sys.argv[1:])}: --write or nothing")
    for name, text in tables().items():
        if sys.argv[1:]:
            (ROOT / name).write_text(between(name, MARKS, text))
        else:
            print(f"{name}\n\n{text}")
