"""ESL, one pixel, one part and one entry at a time.

u: the numbers in [0, 1) from which all is drawn. Part k of class c is number c K + k, C K is none.
"""

import math

from oracles.supervised import VOID, likeliest, log_sum_exp, mean_over, softmax
from oracles.u2pl import contrastive, dot, mean, one_of_each_part, unit


def soft_label(p, kind, eta, top_k):
    """Eq. (3)-(5): the classes with p >= delta, the p of rank C*, their sum made 1."""
    if kind == "soft":
        return list(p)
    if kind == "hard":
        return [float(c == likeliest(p)) for c in range(len(p))]
    ranked = sorted(p, reverse=True)
    count = min(top_k, len(p))
    if kind == "dynamic":  # Eq. (4): the fewest likeliest classes whose sum reaches eta
        count = 1
        while math.fsum(ranked[:count]) < eta and count < len(p):
            count += 1
    delta = ranked[count - 1]
    kept = [v if v >= delta else 0.0 for v in p]  # all that equal delta [D10]
    return [v / math.fsum(kept) for v in kept]


def soft_cross_entropy(images, targets, inside):
    """Eq. (6): the mean of -sum_c y*_c log p_c over the pixels inside."""

    def of_pixel(z, y):
        total = log_sum_exp(z)
        slope = [math.fsum(y) * p - a for p, a in zip(softmax(z), y, strict=True)]
        return math.fsum(a * (total - v) for a, v in zip(y, z, strict=True)), slope

    return mean_over(images, targets, inside, of_pixel)


def part_of(feature, label, prototypes):
    """Eq. (7): the part of its class whose prototype is nearest; of equal ones the lowest."""
    K = len(prototypes[0])
    if label == VOID:
        return len(prototypes) * K
    cosines = [dot(unit(feature), unit(prototype)) for prototype in prototypes[label]]
    return label * K + cosines.index(max(cosines))


def moved_prototype(old, features, theta):
    """Eq. (8), (12): towards the mean of the part's features; an absent part stays [D15]."""
    if not features:
        return old
    return [theta * a + (1 - theta) * b for a, b in zip(old, mean(features), strict=True)]


def anchors(ids, c, K, share, u):
    """Eq. (9): a share of the pixels of class c, rounded up, at most len(u) - 1 [D19]."""
    own = [i for i, part in enumerate(ids) if part // K == c]
    count = min(math.ceil(share * len(own)), len(u) - 1)
    return one_of_each_part(own, count, u)


def entries(ring, filled, u):
    """The positive and the negatives of an anchor, as (ring, place); None without either.

    Negatives come from all other rings together, those of its class too. filled: entries a ring.
    """
    others = [(r, i) for r, count in enumerate(filled) for i in range(count) if r != ring]
    if not filled[ring] or not others:
        return None
    return [(ring, int(u[0] * filled[ring])), *(others[int(v * len(others))] for v in u[1:])]


def part_contrast(rep_s, ids, queues, u, v, K, share, sigma):
    """L_CTR: the mean of Eq. (10) over a class's anchors, then over all classes [D20].

    rep_s: the student's features of the pixels. queues: the unit keys of each part. Returns the
    value and how many anchors there are.
    """
    C = len(queues) // K
    value = 0.0
    number = 0
    for c in range(C):
        losses = []
        for a, pixel in enumerate(anchors(ids, c, K, share, u[c])):
            places = entries(ids[pixel], [len(queue) for queue in queues], v[c][a])
            if places:
                positive, *negatives = [queues[r][i] for r, i in places]
                losses.append(contrastive(unit(rep_s[pixel]), positive, negatives, sigma))
        value += math.fsum(losses) / max(len(losses), 1) / C
        number += len(losses)
    return value, number
