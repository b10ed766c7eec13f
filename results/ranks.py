"""U2PL's premise (Sec. 1, Fig. 2): what is the truth's rank where a prediction is unreliable?

    python results/ranks.py CHECKPOINT [--images N] [flags of u2pl.py: --alpha-0, --ranks, ...]

The network that evaluation scores, in eval mode, on N images of val, whose masks it opens. Reliable
and unreliable divide each image at its own gamma. A negative of Eq. (15) is false where its class
is the true one: "false" is the share of false ones among the keys that r_l <= rank < r_h makes.
"""

import sys
from argparse import RawTextHelpFormatter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import u2pl  # noqa: E402
from common import Refusal, distributed  # noqa: E402
from common.checkpoints import load_checkpoint, load_networks  # noqa: E402
from common.data import IGNORE  # noqa: E402
from common.flags import fill, parse  # noqa: E402
from common.run import refusals  # noqa: E402
from common.sources import load  # noqa: E402
from results.analysis import Parser, mean_logits  # noqa: E402

SHOWN = ((0, 1), (1, 2), (2, 3), (3, 5), (5, 10), (10, 20), (20, None))  # ranks of a column


def counts(prob, label, alpha):
    """Returns pixels by reliable (0), unreliable (1) and the truth's rank: (2, C) int64.

    prob: (1, C, H, W), sums to 1. label: (1, H, W) int64, 255 is not counted, nor in gamma.
    """
    inside, H = label != IGNORE, u2pl.entropy(prob)
    (gamma,) = u2pl.quantiles(H, inside, 1 - alpha)
    unreliable = u2pl.candidates(H, inside, gamma, gamma, "unreliable")
    rank = u2pl.class_ranks(u2pl.as_rows(prob)).long()  # (C, P)
    truth = rank.gather(0, label.masked_fill(~inside, 0).flatten()[None])[0]
    kinds = [(inside & ~unreliable).flatten(), unreliable.flatten()]
    return torch.stack([torch.bincount(truth[kind], minlength=len(rank)) for kind in kinds])


def lines(found, r_l, r_h):
    """Returns the table as lines; found: counts of all images, r_l < r_h: ranks of Eq. (15)."""
    C = found.shape[1]
    r_l = min(r_l, C - 1)
    r_h = min(r_h, C)
    columns = [(a, min(b or C, C)) for a, b in SHOWN if a < C]
    names = [f"{a}" if b == a + 1 else f"{a}..{b - 1}" for a, b in columns]
    yield f"{'pixels':10} {'share':>8}" + "".join(f"{n:>8}" for n in names) + f"{'false':>9}"
    for name, row in zip(("reliable", "unreliable"), found.double(), strict=True):
        share = 100 * row.sum() / found.sum()
        of_row = 100 * row / row.sum().clamp(min=1)  # of no pixel: zeros
        cells = "".join(f"{of_row[a:b].sum():8.2f}" for a, b in columns)
        false = of_row[r_l:r_h].sum() / (r_h - r_l)
        yield f"{name:10} {share:8.2f}{cells}{false:9.2f}"
    yield f"chance would have {100 / C:.2f} false, in per cent like all of these"


@torch.no_grad()
def main(argv):
    """Prints the table of one checkpoint. Raises Refusal."""
    parser = Parser(prog="ranks.py", description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="last.pt or best.pt of u2pl.py")
    parser.add_argument("--images", type=int, metavar="N", help="of val (default: all)")
    given, flags = parser.parse_known_args(argv)
    saved = load_checkpoint(given.checkpoint, u2pl.__file__)
    argv = [*flags, "--eval-only", "--checkpoint", given.checkpoint]
    args = fill(parse(u2pl.Args, u2pl.preset, argv), u2pl.preset, argv)
    group, data = distributed.setup(args.device), load(args)
    n = len(data.val) if given.images is None else given.images
    if not 1 <= n <= len(data.val):
        raise Refusal(f"--images {n}: a number from 1 to {len(data.val)}, the images of val")
    name = "teacher" if saved["step"] > args.warmup_iters else "student"
    net = u2pl.build(args, data.num_classes, u2pl.U2PLHead, group).eval()
    load_networks(saved, {name: net}, data)
    source = SimpleNamespace(script=u2pl, net=net, args=args, data=data)
    found = torch.zeros(2, data.num_classes, dtype=torch.int64)
    with u2pl.evaluating(net, data, args, group):
        for i in range(n):  # evenly spread: neighbours may be frames of one video
            image, label = u2pl.Images(data, data.val)[i * len(data.val) // n]
            image = image.to(group.device)
            prob = F.softmax(mean_logits(source, image).float(), 1)
            found += counts(prob, label[None].long().to(group.device), args.alpha_0).cpu()
    print(f"{name} of step {saved['step']}, {n} images of val; the truth's rank, from 0")
    print(*lines(found, *args.ranks), sep="\n")


if __name__ == "__main__":
    with refusals("start again"):
        main(sys.argv[1:])
