"""U2PL (arXiv 2203.03884), one pixel, one anchor and one key at a time.

u: the numbers in [0, 1) from which all is drawn.
"""

import math

from oracles.fpl import order


def entropy(p):
    """Eq. (5)."""
    return -math.fsum(v * math.log(v) for v in p if v > 0)


def percentile(values, q):
    """gamma_t of Eq. (6): numpy's percentile 100 q, linear between neighbours; inf of nothing."""
    if not values:
        return math.inf
    values = sorted(values)
    place = q * (len(values) - 1)
    low = values[math.floor(place)]
    return low + (values[math.ceil(place)] - low) * (place - math.floor(place))


def unreliable_share(step, total, epochs, alpha_0):
    """Eq. (7): alpha_0 (1 - t / E), t the epoch of a step."""
    t = math.floor(epochs * step / total)
    return alpha_0 * (1 - t / epochs)


def ranks(p):
    """O(c): 0 for the likeliest class of a pixel."""
    ranked = order(p)
    return [ranked.index(c) for c in range(len(p))]


def is_anchor(p, label, c, delta_p):
    """Eq. (9)-(11): a pixel labelled c whose p(c) exceeds delta_p."""
    return label == c and p[c] > delta_p


def is_labelled_negative(ranks, label, c, r_l):
    """Eq. (14): labelled as another class, but c is among the likeliest."""
    return label not in (c, 255) and ranks[c] < r_l


def is_unlabelled_negative(ranks, candidate, c, r_l, r_h):
    """Eq. (15): unreliable, and c is neither likely nor the last."""
    return candidate and r_l <= ranks[c] < r_h


def drawn(mask, u):
    """Pixels of a mask, with replacement."""
    inside = [i for i, hit in enumerate(mask) if hit]
    return [inside[int(v * len(inside))] for v in u] if inside else []


def one_of_each_part(inside, count, u):
    """`count` of n pixels, none twice [D25]: one of each part of a circle that u[0] turns."""
    n = len(inside)
    start = int(u[0] * n)
    chosen = []
    for j in range(count):
        low = j * n // count
        high = (j + 1) * n // count
        chosen.append(inside[(start + low + int(u[j + 1] * (high - low))) % n])
    return chosen


def keys(mask, u):
    """At most len(u) - 1 pixels of N_c."""
    inside = [i for i, hit in enumerate(mask) if hit]
    K = len(u) - 1
    return inside if len(inside) <= K else one_of_each_part(inside, K, u)


def ring(keys, size):
    """A queue Q_c as it stands in memory: a new key takes the place of the oldest one."""
    places = {}
    for i, key in enumerate(keys):
        places[i % size] = key
    return list(places.values())


def unit(x):
    length = math.sqrt(math.fsum(v * v for v in x))
    return [v / max(length, 1e-12) for v in x]


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def mean(vectors):
    """Eq. (12): the mean feature."""
    return [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def contrastive(z, positive, negatives, tau):
    """Eq. (4): -log of the positive's share."""
    scores = [math.exp(dot(z, key) / tau) for key in (positive, *negatives)]
    return math.log(math.fsum(scores) / scores[0])


def binary(z, positive, negatives, tau):
    """Eq. (A1): each negative alone against the positive [D28]."""
    return math.fsum(contrastive(z, positive, [key], tau) for key in negatives) / len(negatives)


def unreliable_loss(rep_s, rep_t, masks, queues, u, v, kind, tau):
    """L_c or L_b: the mean over the classes with an anchor and a key [D26]; and which these are.

    masks: A_c. queues: the unit keys of each class. u[c][m], v[c][m][n]: what draws the anchors and
    their negatives, with replacement.
    """
    losses = []
    counted = [any(mask) and bool(queue) for mask, queue in zip(masks, queues, strict=True)]
    each = contrastive if kind == "contrastive" else binary
    for c, mask in enumerate(masks):
        if not counted[c]:
            continue
        center = unit(mean([x for x, hit in zip(rep_t, mask, strict=True) if hit]))
        anchors = drawn(mask, u[c])
        for m, pixel in enumerate(anchors):
            negatives = [queues[c][int(x * len(queues[c]))] for x in v[c][m]]
            losses.append(each(unit(rep_s[pixel]), center, negatives, tau) / len(anchors))
    return math.fsum(losses) / max(sum(counted), 1), counted
