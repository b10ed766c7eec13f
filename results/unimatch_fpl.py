"""What FPL does in unimatch.py: where K > 1, what the released threshold drops, how right that is.

    python results/unimatch_fpl.py log RUN [RUN ...] --out FILE.png
    python results/unimatch_fpl.py val CHECKPOINT [--images N] --out FILE.png

log: over training. Of the weak unlabelled views the share of pixels with K > 1 and the share below
0.95, which the released threshold drops; of the labelled images how often the likeliest class is
the truth, below 0.95 and everywhere, and how often the truth is among the K positives.

val: of a checkpoint on N images of val, which the network has not learnt, by the probability of the
likeliest class: share of the pixels, accuracy, truth among the K positives, share with K > 1. Other
flags go to unimatch.py (--T, --data-root). With cross-entropy K is what FPL would take.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import unimatch  # noqa: E402
from common import Refusal, distributed, needs  # noqa: E402
from common.checkpoints import load_checkpoint, load_networks  # noqa: E402
from common.data import IGNORE  # noqa: E402
from common.flags import fill, parse  # noqa: E402
from common.sources import load  # noqa: E402
from results import logs  # noqa: E402
from results.analysis import Parser, parts_of_training  # noqa: E402

RELEASED = 0.95  # UniMatch's threshold
EDGES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, RELEASED)  # a bin begins at each, and the last ends at 1
CURVES = {  # what is drawn of a log: its words, the logged name, left or right
    "K > 1": ("K_gt_1", 0),
    "below 0.95": ("confident", 0),
    "likeliest class right": ("pseudo_acc", 1),
    "right below 0.95": ("unsure_acc", 1),
    "truth among K": ("coverage", 1),
}
STYLES = ("-", "--", ":")


def figure():
    """Returns matplotlib's Figure, saved without a display. Raises Refusal."""
    return needs("matplotlib.figure").Figure(figsize=(10, 4), dpi=120, layout="constrained")


def save(picture, out):
    """Saves a Figure. Raises Refusal."""
    try:
        picture.savefig(out, format="png")
    except OSError as error:
        raise Refusal(f"--out {out}: {error.strerror}") from None


# ---- log ----


def curve(log, name):
    """Returns (steps, values) of a logged quantity, or of 1 - confident. Raises Refusal."""
    try:
        values = [line[name] for line in log.train]
    except KeyError:
        raise Refusal(f"{log.path}: no log of unimatch.py; give a run of it") from None
    if not values:
        raise Refusal(f"{log.path}: no line of training yet; wait for --log-every steps")
    if name == "confident":
        values = [1 - value for value in values]
    return [line["step"] for line in log.train], values


def draw_logs(places, out):
    """Draws the curves of runs, a colour each, and prints three means of every one."""
    runs = logs.read_all(places)
    picture = figure()
    axes = picture.subplots(1, 2)
    print(f"{'means over tenths, %':32}   first  middle    last")
    for number, log in enumerate(runs):
        for place, (words, (name, side)) in enumerate(CURVES.items()):
            steps, values = curve(log, name)
            style = dict(color=f"C{number}", linestyle=STYLES[place - 2 * side])
            axes[side].plot(steps, [100 * v for v in values], label=f"{log.name}: {words}", **style)
            means = "".join(f"{100 * mean:8.2f}" for mean in parts_of_training(values))
            print(f"{words:32}{means}   {log.name}")
    axes[0].set(xlabel="step", ylabel="% of the pixels of weak views", ylim=(0, 100))
    axes[1].set(xlabel="step", ylabel="% of the pixels of labelled images", ylim=(0, 100))
    for side in axes:
        side.grid(alpha=0.3)
        side.legend(fontsize=7)
    save(picture, out)


# ---- val ----


def counts(logits, label, args):
    """Returns (bins, 4) float64: pixels, right ones, with the truth among K, with K > 1.

    logits: (B, C, H, W). label: (B, H, W) int64 in [0, C) or 255, which is not counted.
    """
    p, order = unimatch.by_rank(F.softmax(unimatch.upcast(logits), 1))
    K = unimatch.k_of(logits, torch.ones_like(label, dtype=torch.bool), args)
    rank = (order == label[:, None]).int().argmax(1)  # of the truth, from 0
    place = (p[:, 0, ..., None] >= torch.tensor(EDGES, device=p.device)).sum(-1) - 1
    rows = []
    for number in range(len(EDGES)):
        inside = (place == number) & (label != IGNORE)
        maps = (inside, inside & (rank == 0), inside & (rank < K), inside & (K > 1))
        rows.append([x.sum().item() for x in maps])
    return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
def of_checkpoint(checkpoint, images, flags):
    """Returns (step, args, counts over that many images of val). Raises Refusal."""
    saved = load_checkpoint(checkpoint, unimatch.__file__)
    argv = [*flags, "--eval-only", "--checkpoint", checkpoint]
    args = fill(parse(unimatch.Args, unimatch.preset, argv), unimatch.preset, argv)
    group = distributed.setup(args.device)
    data = load(args)
    net = unimatch.build(args, data.num_classes, unimatch.UniMatchHead, group)
    step = load_networks(saved, {"student": net}, data)
    if not 1 <= images <= len(data.val):
        raise Refusal(f"--images {images}: a number from 1 to {len(data.val)}, the images of val")
    found = torch.zeros(len(EDGES), 4, dtype=torch.float64)
    with unimatch.evaluating(net, data, args, group):
        for number in range(images):  # evenly spread: neighbours may be frames of one video
            image, label = unimatch.Images(data, data.val)[number * len(data.val) // images]
            logits = net(image[None].to(group.device))["logits"]
            found += counts(logits, label[None].long().to(group.device), args)
    return step, args, found


def draw_val(checkpoint, images, flags, out):
    """Draws what `of_checkpoint` found, and prints it."""
    step, args, found = of_checkpoint(checkpoint, images, flags)
    rows = torch.cat([found, found[:-1].sum(0, keepdim=True)])  # the last: all that is dropped
    share = 100 * rows[:, 0] / found[:, 0].sum().clamp(min=1)
    of_bin = 100 * rows[:, 1:] / rows[:, :1]  # nan: no pixel
    names = [f"{low:g}" for low in EDGES]
    T = " ".join(map(str, args.T))
    print(f"step {step}, {images} images of val, T {T}, in %, by the largest probability")
    print(f"{'from':>6}{'pixels':>9}{'right':>9}{'among K':>9}{'K > 1':>9}")
    for name, pixels, cells in zip([*names, "< 0.95"], share, of_bin, strict=True):
        print(f"{name:>6}{pixels:9.2f}" + "".join(f"{cell:9.2f}" for cell in cells))
    picture = figure()
    axes = picture.subplots()
    colours = ["tab:orange"] * (len(EDGES) - 1) + ["tab:blue"]
    label = "pixels; orange: dropped by 0.95"
    axes.bar(names, share[:-1].tolist(), color=colours, alpha=0.4, label=label)
    for column, words in enumerate(("right", "truth among K", "K > 1")):
        axes.plot(names, of_bin[:-1, column].tolist(), marker=".", label=words)
    title = f"step {step}, {images} images of val, T {T}"
    axes.set(xlabel="largest probability, from", ylabel="%", ylim=(0, 100), title=title)
    axes.grid(alpha=0.3)
    picture.legend(loc="outside lower center", ncols=4, fontsize=8)
    save(picture, out)


def main(argv=None):
    """Runs one command; returns the exit code: 2 for a Refusal, which becomes one line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="log|val")
    log = commands.add_parser("log", allow_abbrev=False)
    log.add_argument("runs", nargs="+", metavar="RUN", help="folders or logs of unimatch.py")
    val = commands.add_parser("val", allow_abbrev=False)
    val.add_argument("checkpoint", metavar="CHECKPOINT", help="last.pt or best.pt of unimatch.py")
    val.add_argument("--images", type=int, default=20, metavar="N", help="of val (default 20)")
    for command in (log, val):
        command.add_argument("--out", required=True, metavar="FILE.png", help="where it goes")
    try:
        args, flags = parser.parse_known_args(argv)
        if args.command == "val":
            draw_val(args.checkpoint, args.images, flags, args.out)
        elif flags:
            parser.error(f"unknown: {' '.join(flags)}")
        else:
            draw_logs(args.runs, args.out)
    except Refusal as error:
        print(f"unimatch_fpl.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
