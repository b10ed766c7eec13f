"""FPL's analysis (Sec. 3.4, supplement Sec. 3): gradients, positive gradient scores, K over time.

    python results/analysis.py k LOG [LOG ...] --out FILE.png   # share with K > 1, Fig. 4a
    python results/analysis.py scores CHECKPOINT [--images N]   # R, cosine, norm by case

`scores` takes a checkpoint of cps_fpl.py: branch 2 teaches branch 1, in eval mode, on N images of
val; it prints means over the pixels of each case. Other flags go to cps_fpl.py (--T, --data-root).

Below: logits_s, prob_t (B, C, H, W), the student's and the teacher's; K
and label (B, H, W) int64, label 255 where unknown; gradients G, H (B, C, H, W), those of a pixel's
loss with respect to logits_s; all else (B, H, W).
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import cps_fpl  # noqa: E402
from common import Refusal, distributed, needs  # noqa: E402
from common.checkpoints import load_checkpoint, load_networks  # noqa: E402
from common.data import IGNORE  # noqa: E402
from common.flags import fill, parse  # noqa: E402
from common.sources import load  # noqa: E402
from cps_fpl import by_rank, positive_set, upcast  # noqa: E402
from predict import Counted  # noqa: E402
from results import logs  # noqa: E402

# ---- gradients and scores ----


def positives(prob_t, K):
    """The set Y of Alg. 1: True at the K likeliest classes; (B, C, H, W) bool."""
    return positive_set(by_rank(prob_t)[1], K)


def one_label_gradient(logits_s, label):
    """Gradient of cross-entropy, p - 1 at the label and p elsewhere; 0 where the label is 255."""
    at = label.masked_fill(label == IGNORE, 0)[:, None]
    others = F.softmax(upcast(logits_s), 1).scatter(1, at, 0.0)
    grad = others.scatter(1, at, -others.sum(1, keepdim=True))  # p - 1, where p = 1 by rounding too
    return grad.masked_fill((label == IGNORE)[:, None], 0.0)


def vanilla_gradient(logits_s, prob_t):
    """G^v, Eq. (3): cross-entropy with the teacher's likeliest class; in [-1, 1]."""
    return one_label_gradient(logits_s, by_rank(prob_t)[1][:, 0])


def ideal_gradient(logits_s, label):
    """G^ide, supplement Sec. 3.4: cross-entropy with the truth; in [-1, 1], 0 at label 255."""
    return one_label_gradient(logits_s, label)


def gradient_sum(logits_s, prob_t, K):
    """Supplement Eq. (6): sum of G^f over the negatives, minus that over Y; in [0, 1].

    ab / (1 + ab) = sigmoid(log a + log b): no exponential overflows. 0 where K = C.
    """
    Y = positives(prob_t, K)
    z = upcast(logits_s)
    a = (-z).masked_fill(~Y, -torch.inf).logsumexp(1)
    b = z.masked_fill(Y, -torch.inf).logsumexp(1)
    return torch.sigmoid(a + b)


def shares(logits_s, prob_t, K):
    """G^f / gradient_sum: -softmax(-z) inside Y, softmax(z) outside; each sums to -1 or 1."""
    Y = positives(prob_t, K)
    z = upcast(logits_s)
    inside = F.softmax((-z).masked_fill(~Y, -torch.inf), 1)
    outside = F.softmax(z.masked_fill(Y, -torch.inf), 1)  # NaN where K = C: taken nowhere
    return torch.where(Y, -inside, outside)


def fuzzy_gradient(logits_s, prob_t, K):
    """G^f, Eq. (8), the gradient of Eq. (7); in [-1, 1]. G^v where K = 1, 0 where K = C.

    Supplement Eq. (5) has it in probabilities.
    """
    return gradient_sum(logits_s, prob_t, K)[:, None] * shares(logits_s, prob_t, K)


def case(prob_t, K, label):
    """Sec. 3.4: 1, the likeliest class is the truth; 2, another of Y is; 3, none of Y; 0 at 255."""
    rank = (by_rank(prob_t)[1] == label[:, None]).int().argmax(1)
    return (1 + (rank > 0).long() + (rank >= K).long()).masked_fill(label == IGNORE, 0)


def fuzzy_score(logits_s, prob_t, K, label):
    """R^f, Eq. (12): G^f at the truth over the sum of G^f over Y; in [-1, 1].

    gradient_sum cancels, so the ratio is that of Eq. (13), (14) and, outside Y, -e^{z_gt} over
    sum_{j not in Y} e^{z_j}: Eq. (15) prints e^{-z} there, which Eq. (8) does not give. Where G^f
    underflows this is the limit; where K = C, G^f is 0 and so is R^f. 0 at label 255.
    """
    at = label.masked_fill(label == IGNORE, 0)[:, None]
    R = -shares(logits_s, prob_t, K).gather(1, at)[:, 0]
    return R.masked_fill((label == IGNORE) | (K == logits_s.shape[1]), 0.0)


def vanilla_score(logits_s, prob_t, label):
    """R^v, Eq. (12): 1 where the likeliest class is the truth, p_gt / (p_pse - 1) elsewhere.

    In [-1, 0] or 1, also where p_pse = 1 by rounding: it is R^f of K = 1, Eq. (9). 0 at label 255.
    """
    return fuzzy_score(logits_s, prob_t, torch.ones_like(label), label)


def direction(G):
    """G / |G|, 0 where G is 0. Scaled before squaring: nothing underflows."""
    largest = G.abs().amax(1, keepdim=True).clamp(min=torch.finfo(G.dtype).tiny)
    return F.normalize(G / largest, dim=1)


def norm(G):
    """|G|; in [0, sqrt(2)] for all three gradients, supplement Eq. (9), (10)."""
    return (G * direction(G)).sum(1)


def cosine(G, H):
    """sim(G, H), supplement Sec. 3.4; in [-1, 1], 0 where either is 0."""
    return (direction(G) * direction(H)).sum(1).clamp(-1, 1)


def least_negative_mass(n, K, T, classes):
    """Supplement Eq. (8), corrected: the least sum_{j not in Y} p^j of the teacher; n is Alg. 1's.

    Since V^{n-1} <= T, the mean m of p^n, ..., p^C is at least (1 - T) / (C - n + 1); p is sorted,
    so p^{K+1}, ..., p^{n-1} are no less than m, and the C - K negatives hold (C - K) m or more. It
    is reached: V^{n-1} = T, p^j = m for j > K. The print, K / (n - 1) (1 - T) with K = [alpha n],
    is the same at K = n - 1, where both are 1 - T; for a smaller K it is true but loose: it falls
    with K, and the least sum rises. 0 where K >= n: Eq. (7), and n = K = 1.
    """
    bound = (1 - T) * (classes - K) / (classes - n + 1)
    return bound.masked_fill(K >= n, 0.0)


# ---- python results/analysis.py k ----


def read_k(path):
    """Returns (its Log, steps, shares of pixels with K > 1) of a run. Raises Refusal."""
    log = logs.read(path)
    try:
        train = [(line["step"], line["K_gt_1"]) for line in log.train]
        steps, values = zip(*train, strict=True)  # ValueError without a line
        return log, steps, values
    except (ValueError, KeyError) as error:
        why = f"no log of cps_fpl.py on unlabelled images ({type(error).__name__}: {error})"
        raise Refusal(f"{path}: {why}") from None


def parts_of_training(values):
    """Returns the means over the first, the middle and the last tenth (one value at least)."""
    tenth = max(len(values) // 10, 1)
    begins = (0, (len(values) - tenth) // 2, len(values) - tenth)
    return [sum(values[i : i + tenth]) / tenth for i in begins]


def plot_k(paths, out):
    """Draws one curve per log into a PNG and prints three means of each. Raises Refusal."""
    runs = [read_k(path) for path in paths]
    Figure = needs("matplotlib.figure").Figure  # without pyplot: saved by Agg, no display
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    print(f"{'pixels with K > 1':18}first tenth     middle  last tenth")
    names = logs.labels([[log] for log, *_ in runs])
    for name, (_, steps, values) in zip(names, runs, strict=True):
        axes.plot(steps, [100 * v for v in values], marker="." * (len(steps) < 60), label=name)
        cells = (f"{100 * v:8.2f} %" for v in parts_of_training(values))
        print(f"{'to step ' + str(steps[-1]):18}" + "  ".join(cells) + f"   {name}")
    axes.set(xlabel="step", ylabel="pixels with K > 1, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise Refusal(f"--out {out}: {error.strerror}") from None


# ---- python results/analysis.py scores ----


def measures(logits_s, prob_t, K, label):
    """Returns {column: (B, H, W)}, what `scores` averages over the pixels of a case."""
    fuzzy = fuzzy_gradient(logits_s, prob_t, K)
    vanilla = vanilla_gradient(logits_s, prob_t)
    ideal = ideal_gradient(logits_s, label)
    similar = cosine(fuzzy, ideal)
    return {
        "pixels": torch.ones_like(similar),
        "K = 1": K == 1,
        "R^v": vanilla_score(logits_s, prob_t, label),
        "R^f": fuzzy_score(logits_s, prob_t, K, label),
        "sim(f,ide)": similar,
        "sim(v,ide)": cosine(vanilla, ideal),
        "sim(f)>0": similar > 0,
        "|G^f|": norm(fuzzy),
        "|G^v|": norm(vanilla),
        "|G^ide|": norm(ideal),
    }


@torch.no_grad()
def mean_logits(source, image):
    """Returns the logits of an image (3, H, W) by the run's protocol: (1, C, H, W), all in memory.

    Where windows overlap, their mean.
    """
    args = source.args
    if args.protocol == "whole":
        return source.net(image[None])["logits"]
    classes = source.data.num_classes
    parts = source.script.slide(Counted(source.net), image, args.crop_size, classes + 1)
    sums = torch.cat([part.clone() for part in parts], 1)[None]
    return sums[:, :-1] / sums[:, -1:]


@torch.no_grad()
def print_scores(checkpoint, images, flags):
    """Prints the means of `measures` over a case's pixels (nan: none), in val. Raises Refusal."""
    saved = load_checkpoint(checkpoint, cps_fpl.__file__)
    argv = [*flags, "--eval-only", "--checkpoint", checkpoint]
    args = fill(parse(cps_fpl.Args, cps_fpl.preset, argv), cps_fpl.preset, argv)
    group, data = distributed.setup(args.device), load(args)
    student, teacher = (
        cps_fpl.build(args, data.num_classes, cps_fpl.CPSHead, group).eval() for _ in (1, 2)
    )
    step = load_networks(saved, {"branch1": student, "branch2": teacher}, data)
    if not 1 <= images <= len(data.val):
        raise Refusal(f"--images {images}: a number from 1 to {len(data.val)}, the images of val")
    progress = max(step - 1, 0) / args.total_iters  # of the last step that was trained
    sums = 0
    of_student = cps_fpl.evaluating(student, data, args, group)
    of_teacher = cps_fpl.evaluating(teacher, data, args, group)
    with of_student, of_teacher:
        for i in range(images):  # evenly spread: neighbours may be frames of one video
            image, label = cps_fpl.Images(data, data.val)[i * len(data.val) // images]
            image, label = image[None].to(group.device), label[None].long().to(group.device)
            logits_t = teacher(image)["logits"]
            prob_t = F.softmax(upcast(logits_t), 1)
            K = cps_fpl.k_maps(logits_t, torch.ones_like(label, dtype=bool), progress, args)
            logits_s = student(image)["logits"].double()  # float32 has no gradient of a sure pixel
            columns = measures(logits_s, prob_t, K, label)
            masks = [case(prob_t, K, label) == c for c in (1, 2, 3)]
            rows = [[x[mask].double().sum().item() for x in columns.values()] for mask in masks]
            sums = sums + torch.tensor(rows, dtype=torch.float64)
    words = " ".join(map(str, args.T))
    print(f"step {step}, {images} images of val, branch 2 teaches branch 1, T {words}")
    print("case" + "".join(f"{name:>11}" for name in columns))
    for c, row in enumerate(sums, 1):
        cells = [100 * row[0] / sums[:, 0].sum(), *(row[1:] / row[0])]
        print(f"{c:<4}{cells[0]:9.2f} %" + "".join(f"{cell:11.4f}" for cell in cells[1:]))


# ---- command line ----


class Parser(argparse.ArgumentParser):
    """argparse whose errors are Refusals."""

    def error(self, message):
        raise Refusal(message)


def main(argv=None):
    """Runs one command; returns the exit code: 2 for a Refusal, which becomes one line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="k|scores")
    k = commands.add_parser("k", allow_abbrev=False)
    k.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl of cps_fpl.py")
    k.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    scores = commands.add_parser("scores", allow_abbrev=False)
    scores.add_argument("checkpoint", metavar="CHECKPOINT", help="last.pt or best.pt of cps_fpl.py")
    scores.add_argument("--images", type=int, default=20, metavar="N", help="of val (default 20)")
    try:
        args, flags = parser.parse_known_args(argv)
        if args.command == "scores":
            print_scores(args.checkpoint, args.images, flags)
        elif flags:
            parser.error(f"unknown: {' '.join(flags)}")
        else:
            plot_k(args.logs, args.out)
    except Refusal as error:
        print(f"analysis.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
