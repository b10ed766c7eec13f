"""Fast twins of functions of the scripts: U2PL's and ESL's sampling, queues and losses, FPL's loss.

--fused off takes a script's own function, the definition, instead of the function of the same name
here. A twin takes the same arguments and returns the same up to rounding (tests/test_equations.py,
tests/test_borders.py), in tensors of fixed shapes, and never waits for a GPU.

U2PL and ESL draw the same pixels and rows from the same numbers u, without a loop over classes but
that of Eq. (10) of ESL. P pixels, features (P, D); masks (C, P) bool; u: numbers in [0, 1),
float64, from which all is drawn. A bank has the rings of all queues, one after another, and a last
row that stays 0.
"""

import importlib.util
import math
from functools import lru_cache

import torch
import torch.nn.functional as F

CHUNK = 8192  # pixels of FPL's loss at a time on a CPU: what a pass needs stays in its caches
FAR = 1e30  # from any logit


def pick(definition, args, device="cpu"):
    """Returns a script's function or the one of its name in this file, as --fused says.

    off: the script's; on: this file's; auto: this file's, but FPL's on CPUs alone, where
    benchmarks/fpl_loss.py shows a gain. device: the type of one.
    """
    slower = device != "cpu" and definition.__name__ in ("fuzzy_positive_loss", "fpl_loss")
    if args.fused == "off" or (args.fused == "auto" and slower):
        return definition
    return globals()[definition.__name__]


def upcast(x):
    """Returns x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- drawing ----


def nth(masks, n):
    """Returns which pixel is the n-th, from 0, of its mask; n: (C, K). Some pixel, if none is.

    The running count of a mask's pixels passes n at the n-th of them.
    """
    total = masks.cumsum(1, dtype=torch.int32)
    return torch.searchsorted(total, n.int() + 1).clamp(max=masks.shape[1] - 1)


def draw(n, count, u):
    """The scripts' `draw` for all classes: `count` of the numbers 0 to n - 1, none twice.

    n, count: (C, 1) int64, count <= n. u: (C, K + 1). Returns (C, K) int64; those from `count` on
    mean nothing.
    """
    j = torch.arange(u.shape[1], device=u.device)
    border = torch.minimum(j, count) * n // count.clamp(min=1)
    offset = (u[:, 1:] * border.diff(dim=1)).long()
    start = (u[:, :1] * n).long()
    return (start + border[:, :-1] + offset) % n.clamp(min=1)


# ---- queues ----


@torch.no_grad()
def push_features(bank, pushed, sizes, offered):
    """Twin of push_features. What is no feature, or would be overwritten by a newer one, goes to
    the last row of the bank: no other is written twice, as a GPU writes in any order.
    """
    features = offered[..., :-1].to(bank.dtype)
    real = offered[..., -1] > 0
    number = real.cumsum(1)  # 1, 2, ... for features
    newest = number > number[:, -1:] - sizes[:, None]  # those that fit, if a ring is too small
    first = sizes.cumsum(0) - sizes
    rows = first[:, None] + (pushed[:, None] + number - 1) % sizes[:, None]
    rows = torch.where(real & newest, rows, len(bank) - 1)
    bank.index_copy_(0, rows.flatten(), features.flatten(0, 1))
    bank[-1] = 0
    pushed += number[:, -1]


# ---- U2PL ----


@torch.no_grad()
def draw_features(rep_t, masks, u):
    """Twin of U2PL's draw_features; but rows whose last number is 0 hold any feature, not zeros."""
    count = masks.sum(1, True)
    j = torch.arange(u.shape[1] - 1, device=u.device)
    K = torch.full_like(count, len(j))
    drawn = torch.where(count > K, draw(count, K, u), j)
    features = F.normalize(rep_t[nth(masks, drawn)], dim=2)
    real = (j < count).to(features.dtype)
    return torch.cat([features, real[..., None]], 2)


def contrastive_loss(positive, negative, tau):
    """U2PL Eq. (4) of each anchor: (C, M). positive: (C, M), negative: (C, M, N), cosines."""
    scores = torch.cat([positive[..., None], negative], 2) / tau
    return scores.logsumexp(2) - scores[..., 0]


def binary_loss(positive, negative, tau):
    """U2PL Eq. (A1) of each anchor, as contrastive_loss."""
    return F.softplus((negative - positive[..., None]) / tau).mean(2)


def anchor_losses(z, center, bank, rows, args):
    """U2PL Eq. (4) or (A1) of each anchor: (C, M). z: (C, M, D), center: (C, D), unit features.

    rows: (C, M, N), of the bank. A few anchors at a time get their loss and at once its gradient
    with respect to z: each row is fetched once, and a step never holds all of them. The result is
    the losses as numbers, plus (z - z) times that gradient: 0, but for backward, which finds there
    the gradient that is known already. So there is no second derivative.
    """
    loss_of = contrastive_loss if args.unreliable_loss == "contrastive" else binary_loss
    losses = []
    gradients = []
    chunk = max(512 // args.negatives, 1)  # anchors; so 512 rows of a class at a time, or N
    for anchors, index in zip(z.detach().split(chunk, 1), rows.split(chunk, 1), strict=True):
        features = bank.index_select(0, index.flatten()).to(z.dtype).view(*index.shape, -1)
        with torch.enable_grad():
            anchors.requires_grad_()
            positive = (anchors * center[:, None]).sum(2)
            negative = (features @ anchors[..., None])[..., 0]
            loss = loss_of(positive, negative, args.tau)
            gradients += torch.autograd.grad(loss.sum(), anchors)
        losses.append(loss.detach())
    return torch.cat(losses, 1) + ((z - z.detach()) * torch.cat(gradients, 1)).sum(2)


def unreliable_loss(rep_s, rep_t, masks, bank, pushed, sizes, u, args):
    """Twin of U2PL's unreliable_loss."""
    M = args.anchors
    N = args.negatives
    filled = torch.minimum(pushed, sizes)
    drawn = nth(masks, (u[:, :M] * masks.sum(1, True)).long())
    first = (sizes.cumsum(0) - sizes)[:, None, None]
    rows = first + (u[:, M:].unflatten(1, (M, N)) * filled[:, None, None]).long()
    z = F.normalize(upcast(rep_s[drawn]), dim=2)
    centers = masks.to(rep_t.dtype) @ rep_t / masks.sum(1, True).clamp(min=1)  # Eq. (12)
    losses = anchor_losses(z, F.normalize(centers, dim=1), bank, rows, args)
    counted = masks.any(1) & (filled > 0)
    loss = torch.where(counted, losses.mean(1), 0.0)
    return loss.sum() / counted.sum().clamp(min=1), counted


# ---- ESL ----


def draw_anchors(ids, C, u, args):
    """The anchors of ESL's part_contrast: pixels (C, A), and which are anchors, bool.

    u: (C, A + 1).
    """
    masks = ids // args.parts == torch.arange(C, device=ids.device)[:, None]
    n = masks.sum(1, True)
    A = u.shape[1] - 1
    count = (args.anchor_share * n.double()).ceil().long().clamp(max=A)
    real = torch.arange(A, device=u.device) < count
    return nth(masks, draw(n, count, u)), real


def draw_entries(part, filled, q, u):
    """ESL Eq. (10), the positive and the negatives of each anchor, with replacement: rows.

    part: (C, A), the anchor's. filled: (C K,), features in each ring, of size q. u: (C, A, 1 + N).
    Returns rows (C, A, 1 + N), the positive first, and which anchors have both kinds, bool. The
    features of all rings are numbered through, ring by ring; a negative's number is one of those
    outside the anchor's ring, so it steps over that.
    """
    ends = filled.cumsum(0)
    starts = ends - filled
    own = filled[part]
    outside = ends[-1] - own
    number = (u[..., 1:] * outside[..., None]).long()
    number += torch.where(number >= starts[part][..., None], own[..., None], 0)
    ring = torch.searchsorted(ends, number, right=True).clamp(max=len(ends) - 1)
    negative = ring * q + number - starts[ring]
    positive = part[..., None] * q + (u[..., :1] * own[..., None]).long()
    return torch.cat([positive, negative], -1), (own > 0) & (outside > 0)


def part_contrast(rep_s, ids, bank, pushed, u_anchors, u_entries, args):
    """Twin of ESL's part_contrast, a class at a time. Its keys are gone when the next one comes:
    the gradient in the anchors is made beside the loss, so that memory is linear in C.
    """
    pixels, real = draw_anchors(ids, len(u_anchors), u_anchors, args)
    part = ids[pixels].clamp(max=len(pushed) - 1)
    rows, both = draw_entries(part, pushed.clamp(max=args.queue), args.queue, u_entries)
    z = F.normalize(upcast(rep_s[pixels]), dim=2)
    losses = []
    slopes = []
    with torch.no_grad():
        for anchors, entries in zip(z, rows, strict=True):
            keys = bank[entries]  # (A, 1 + N, D)
            scores = (keys @ anchors[..., None])[..., 0] / args.sigma
            losses.append(scores.logsumexp(1) - scores[:, 0])
            share = scores.softmax(1)[:, None] @ keys
            slopes.append((share[:, 0] - keys[:, 0]) / args.sigma)
    nothing = ((z - z.detach()) * torch.stack(slopes)).sum(2)  # 0, with Eq. (10)'s gradient in z
    real &= both
    total = torch.where(real, torch.stack(losses) + nothing, 0.0).sum(1)
    return (total / real.sum(1).clamp(min=1)).mean(), real.sum()


# ---- FPL ----
# Pixels stand last here: (C, n) or, ranked, (R, n); results of a pixel are (1, n). R: how many of
# the likeliest classes decide, one more than can be positive. rule: T, strict; K = n - minus, at
# least `least` and at most `most`; kind of weight; mean_over.


@lru_cache
def comparators(C, R):
    """Returns pairs (i, j), i < j: the larger number of each pair of C is put at i, one pair after
    another, and the R largest stand first, in order. Batcher's odd-even merge sort, less what does
    not reach those places.
    """
    pairs = []
    for merge in range((C - 1).bit_length()):  # of runs of 2^merge numbers that are in order
        for power in range(merge, -1, -1):
            k = 2**power
            for i in range(k % 2**merge, C - k):
                if (i - k % 2**merge) // k % 2 == 0 and i >> (merge + 1) == (i + k) >> (merge + 1):
                    pairs.append((i, i + k))
    reached = set(range(R))
    kept = []
    for pair in reversed(pairs):
        if reached.intersection(pair):
            reached.update(pair)
            kept.append(pair)
    return kept[::-1]


def ranked(p, out):
    """Writes the R largest of p (C, n) in descending order into out (R, n), without a sort."""
    rows = list(p)
    for i, j in comparators(len(p), len(out)):
        larger = torch.maximum(rows[i], rows[j])
        rows[j] = torch.minimum(rows[i], rows[j])
        rows[i] = larger
    return torch.stack(rows[: len(out)], out=out)


def running_sum(p, out):
    """Writes p.cumsum(0) as a CPU computes it, summed in float64, but row by row, into out."""
    total = torch.zeros_like(p[0], dtype=torch.float64)
    for row, result in zip(p, out, strict=True):
        result.copy_(total.add_(row))
    return out


def weight_of(total, rest, K, kind, mean_over):
    """Eq. (11) or (16). total: of the K positives; rest: of the likeliest negative, or 0."""
    following = int(mean_over == "positives_and_next")
    mean = (total + following * rest) / (K + following)
    gap = (mean - rest).clamp(min=0)
    if kind == "concave":
        return torch.log1p(50 * gap) / torch.log1p(50 * mean)
    if kind == "none":
        return torch.ones_like(gap)
    return gap / (mean + {"linear": 0, "convex": 4}[kind] * rest)


def positives(p, last, rest, K):
    """Returns Y: 1 for the K likeliest classes, 0 for others, in the place of p (C, n).

    last, rest: the probabilities ranked K and K + 1. Where they are equal, the lowest classes of
    that probability are taken.
    """
    if p.device.type != "cpu" or (rest == last).any():  # rare; to ask is to wait for a GPU
        equal = p == last
        place = (p > last).sum(0) + equal.cumsum(0)  # 1 is the first, for those that are equal
        return p.copy_((p > last) | (equal & (place <= K)))
    return p.ge_(last)


def exp_(x):
    """Returns exp of x in the place of x. By exp2: on x86 torch's exp is MKL's, which takes more
    than twice as long on some CPUs, and ten times where the result is next to nothing.
    """
    return x.mul_(1 / math.log(2)).exp2_()


def fpl_of_pixels(z, t, space, T, strict, minus, least, most, *weight):
    """Returns Eq. (7) times its weight, (n,); the pseudo label, (n,) int64; and the gradient by z,
    Eq. (8) times the weight, (C, n). z, t: (C, n), logits of the student and the teacher.

    space: (4, C, n) in the type of the loss, for the maps in between; the gradient is one of them,
    until the next call. To allocate such a map takes a CPU as long as to fill it.
    """
    one, two, three, four = space
    C = len(t)
    R = min(most + 1, C)
    p = torch.softmax(one.copy_(t), 0, out=two)
    top = ranked(p, out=one[:R])
    V = running_sum(top, out=three[:R])
    below = torch.le if strict else torch.lt
    n = below(V, T, out=four[:R]).sum(0, True) + 1  # Alg. 1; out: faster than of bool
    K = (n.long().clamp(max=C) - minus).clamp(least, min(most, C))
    last = top.gather(0, K - 1)
    rest = top.gather(0, K.clamp(max=R - 1)).masked_fill(K == C, 0)
    weight = weight_of(V.gather(0, K - 1), rest, K, *weight)
    places = torch.arange(C, 0, -1, device=p.device, dtype=p.dtype)
    likeliest = torch.eq(p, top[0], out=three)
    # the lowest of equals; some class where all are NaN, so that the loss tells
    pseudo = C - likeliest.mul_(places[:, None]).amax(0).long().clamp(min=1)
    Y = positives(p, last, rest.masked_fill(K == C, -1), K)
    z = one.copy_(z)
    negative = torch.sub(z, Y, alpha=FAR, out=three)  # the negatives' logits; positives: far below
    positive = torch.add(z, Y.neg_().add_(1), alpha=FAR, out=four)  # the positives'; others: above
    high = negative.amax(0, True)
    low = positive.amin(0, True)
    negative = exp_(negative.sub_(high))
    positive = exp_(torch.sub(low, positive, out=positive))
    above = negative.sum(0, True)
    under = positive.sum(0, True)
    x = (high + above.log()) + (under.log() - low)
    slope = x.sigmoid() * weight
    gradient = negative.mul_(slope / above).addcmul_(positive, slope / under, value=-1)
    return (F.softplus(x) * weight)[0], pseudo, gradient


def kernels(logits_s, logits_t):
    """Returns common/fpl_triton.py if it computes the loss of these logits, on a GPU, else None."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    from common import fpl_triton

    if fpl_triton.takes(logits_s, logits_t):
        return fpl_triton
    return None


class FPL(torch.autograd.Function):
    """FPL's loss of every pixel and the pseudo label. The gradient is made with the loss and kept,
    the only map of C channels, and backward multiplies it in place: it can be taken once, and there
    is no second derivative.
    """

    @staticmethod
    def forward(ctx, logits_s, logits_t, rule):
        if kernel := kernels(logits_s, logits_t):
            loss, pseudo, gradient = kernel.launch(logits_s, logits_t, rule)
            ctx.gradient = gradient
            ctx.mark_non_differentiable(pseudo)
            return loss, pseudo
        rows = logits_s.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if rows else torch.contiguous_format
        gradient = torch.empty_like(logits_s, memory_format=layout)
        loss = torch.empty_like(upcast(logits_s[:, 0]), memory_format=torch.contiguous_format)
        pseudo = torch.empty_like(loss, dtype=torch.int64)
        pixels = loss.shape[1:].numel()
        size = min(CHUNK, pixels) if loss.device.type == "cpu" else pixels
        space = loss.new_empty(4, logits_s.shape[1], size)
        for maps in zip(logits_s, logits_t, loss, pseudo, gradient, strict=True):
            chunks = [x.flatten(-2).split(size, -1) for x in maps]
            for z, t, *results in zip(*chunks, strict=True):
                found = fpl_of_pixels(z, t, space[..., : z.shape[1]], *rule)
                # turned: so torch is faster where results are in channels-last
                torch._foreach_copy_([x.t() for x in results], [x.t() for x in found])
        ctx.gradient = gradient
        ctx.mark_non_differentiable(pseudo)
        return loss, pseudo

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        """The kept gradient, (B, C, H, W), times that of each pixel's loss, (B, H, W)."""
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError("FPL's twin has one backward; --fused off has as many as you like")
        ctx.gradient = None
        return gradient.mul_(upstream[:, None].to(gradient.dtype)), None, None


def fuzzy_positive_loss(
    logits_s, logits_t, T, *, k_max=0, strict=True, weight="concave", mean_over="positives"
):
    """Twin of ael_fpl.py's."""
    rule = (T, strict, 1, 1, k_max or logits_s.shape[1], weight, mean_over)
    return FPL.apply(logits_s, logits_t, rule)[0]


def fpl_loss(logits_s, logits_t, progress, args):
    """Twin of cps_fpl.py's, with one T."""
    C = logits_s.shape[1]
    fixed = {"fixed2": 2, "fixed3": 3, "step": 3 - min(int(3 * progress), 2)}.get(args.k_strategy)
    most = min(args.k_max or C, fixed or C)
    minus = int(args.k_strategy == "n-1")
    rule = (args.T[0], args.strict, minus, min(fixed or 1, most), most, args.weight, args.mean_over)
    return FPL.apply(logits_s, logits_t, rule)
