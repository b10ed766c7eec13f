"""Fast twins of what u2pl.py and esl.py define one class at a time: sampling, queues, losses.

--fused off takes a script's own function, the definition, instead of the function of the same name
here. A twin takes the same arguments, draws the same pixels and rows from the same numbers u, and
returns the same up to rounding (tests/test_fused.py). It has no loop over classes but that of
Eq. (10) of ESL, tensors of fixed shapes, and never waits for the device.

P pixels, features (P, D); masks (C, P) bool; u: numbers in [0, 1), float64, from which all is
drawn. A bank has the rings of all queues, one after another, and a last row that stays 0.
"""

import torch
import torch.nn.functional as F


def pick(definition, args):
    """Returns a script's function with --fused off, or else the one of its name in this file."""
    if args.fused == "off":
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
    """Twin of U2PL's draw_features, but that any feature stands beside a 0, and not zeros."""
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
    """Twin of ESL's draw_anchors for all classes: pixels (C, A), and which are anchors, bool.

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
    """Twin of ESL's part_contrast. A class at a time gets its cosines with the whole bank,
    (A, C K q), which nothing keeps: memory is linear in C.
    """
    R = len(pushed)  # C K
    pixels, real = draw_anchors(ids, R // args.parts, u_anchors, args)
    part = ids[pixels].clamp(max=R - 1)
    rows, both = draw_entries(part, pushed.clamp(max=args.queue), args.queue, u_entries)
    real = real & both
    z = F.normalize(upcast(rep_s[pixels]), dim=2)
    losses = []
    for anchors, entries in zip(z, rows, strict=True):
        scores = (anchors @ bank.T).gather(1, entries) / args.sigma
        losses.append(scores.logsumexp(1) - scores[:, 0])
    losses = torch.where(real, torch.stack(losses), 0.0)
    return (losses.sum(1) / real.sum(1).clamp(min=1)).mean(), real.sum()
