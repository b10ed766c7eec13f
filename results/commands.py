"""The command of every entry of the papers' tables, and why some numbers cannot be expected.

    python results/commands.py                          # all of them
    python results/commands.py --scripts cps_fpl u2pl   # of two scripts
    python results/commands.py --gpus 4 --rate 1.5      # four GPUs, of 1.5 megapixels a second

Entries are those of common/papers.json, steps and batches those that the flags resolve to.
GPU-hours are steps x images of a step x pixels of a crop / rate, the rate the same for every method
and backbone. The default, 0.4 megapixels of crops per GPU and second, is that of AEL on Cityscapes
with eight V100: FPL's supplement, Table 7, has 730 s for an epoch, by AEL's code 163 steps of 24
crops of 769 x 769 (its 835 s for 579 steps on VOC would be 0.55). Nothing was measured here.
"""

import dataclasses
import importlib
import json
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common import Refusal  # noqa: E402
from common.flags import Above0, Count, cli, fill, met, parse  # noqa: E402
from common.run import refusals  # noqa: E402

RELEASED = "supervised mean_teacher cps_fpl ael_fpl u2pl u2pl_ael unimatch"  # has code
VOC = "voc voc_aug"
PUBLISHED = "voc voc_aug cityscapes"
REASONS = (  # scripts, data sets, a word of the flags or source, one that is not there; the reason
    (RELEASED, PUBLISHED, "", "", "D9: weights of another stem, --stem deep --weights FILE"),
    (
        RELEASED, PUBLISHED, "", "last",
        "D5: it is the best of many scores on val, not the last",
    ),
    (
        "supervised mean_teacher ael_fpl u2pl esl", VOC, "", "",
        "D5: VOC is scored on a centre crop, where padding counts as background",
    ),
    (
        "cps_fpl", PUBLISHED, "", "--no-cutmix",
        "D18: an image is mixed with another crop of itself, --same-image-cutmix",
    ),
    ("cps_fpl", PUBLISHED, "FPL+CPS", "", "D11: up to 18 % more steps than CPS"),
    (
        "ael_fpl", "cityscapes", "FPL Table", "",
        "D32: other labelled images, drawn as docs/ael_fpl.md says and given by --labeled-list",
    ),
    ("ael_fpl", VOC, "", "", "D28: Copy-Paste pastes an image onto itself"),
    ("u2pl u2pl_ael", PUBLISHED, "", "none", "D16: the released L_c is not the printed one"),
    ("u2pl_ael", PUBLISHED, "", "", "D35: the released filter leaves out the surest pixels"),
    (
        "unimatch", PUBLISHED, "", "last",
        "D10: an image is mixed with another crop of itself, --partner crop",
    ),
)  # fmt: skip


@dataclasses.dataclass
class Options:
    """Which entries, and on what."""

    scripts: tuple[str, ...] = ()  # left out: all
    gpus: Count = 8  # processes of torchrun at most; fewer where a batch does not divide
    rate: Above0 = 0.4  # megapixels of crops that a GPU trains on in a second


def entries():
    """Yields (entry of papers.json, split) of every number."""
    for entry in json.loads((ROOT / "common/papers.json").read_text()):
        for split in entry["miou"]:
            yield entry, split


def resolved(entry, split):
    """Returns (the flags of an entry's split, as words; what they resolve to)."""
    script = importlib.import_module(entry["script"])
    words = ["--dataset", entry["dataset"], "--split", split, *shlex.split(entry["flags"])]
    return words, fill(parse(script.Args, script.preset, words), script.preset, words)


def gpu_hours(args, rate):
    """Returns the hours of one GPU that trains on `rate` megapixels of crops in a second."""
    images = args.batch_size + getattr(args, "batch_size_unlabeled", 0)
    return args.total_iters * images * args.crop_size**2 / (1e6 * rate) / 3600


def processes(args, most):
    """Returns the largest number of processes, at most `most`, that share the batches evenly."""
    parts = [args.batch_size // getattr(args, "pooled", 1)]
    unlabeled = getattr(args, "batch_size_unlabeled", 0)
    if unlabeled:
        pairs = met(getattr(type(args), "PAIRS", "never"), args)
        parts.append(unlabeled // 2 if pairs else unlabeled)
    return max(n for n in range(1, most + 1) if all(part % n == 0 for part in parts))


def reasons(entry):
    """Returns why an entry's numbers cannot be expected, each with its row of the script's page."""
    found = []
    text = f"{entry['flags']} {entry['source']}"
    for scripts, datasets, word, other, reason in REASONS:
        meant = entry["script"] in scripts.split() and entry["dataset"] in datasets.split()
        if meant and word in text and not (other and other in text):
            found.append(reason)
    return found


def main(options):
    """Prints all entries asked for."""
    known = {entry["script"] for entry, _ in entries()}
    if unknown := set(options.scripts) - known:
        raise Refusal(
            f"--scripts {' '.join(unknown)}: only {', '.join(sorted(known))} have entries"
        )
    for entry, split in entries():
        if options.scripts and entry["script"] not in options.scripts:
            continue
        words, args = resolved(entry, split)
        hours = gpu_hours(args, options.rate)
        print(f"{entry['miou'][split]:6.2f}  {entry['source']}, {split}")
        print(f"        {args.total_iters:,} steps, about {hours:,.0f} GPU-hours")
        for reason in reasons(entry):
            print(f"        docs/{entry['script']}.md, {reason}")
        count = processes(args, options.gpus)
        command = f"torchrun --nproc_per_node {count} {entry['script']}.py"
        print(f"        {command} {shlex.join(words)}\n")


if __name__ == "__main__":
    with refusals("start again"):
        main(cli(Options))
