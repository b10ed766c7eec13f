"""U2PL (arXiv 2203.03884), one pixel, one anchor and one key at a time.

u: the numbers in [0, 1) from which all is drawn.
"""

import math

from oracles.fpl import order
from oracles.supervised import VOID


def entropy(p):
    """Eq. (5)."""
    return -math.fsum(v * math.log(v) for v in p if v > 0)


def negatives(probs, labels, c, r_l, r_h):
    """N_c, as a mask; the first half of the pixels are labelled, of the others 255 is reliable."""
    found = []
    for i, (p, label) in enumerate(zip(probs, labels, strict=True)):
        rank = order(p).index(c)
        if 2 * i < len(probs):  # Eq. (14): labelled as another class, but c is among the likeliest
            found.append(label not in (c, VOID) and rank < r_l)
        else:  # Eq. (15): unreliable, and c is neither likely nor the last
            found.append(label != VOID and r_l <= rank < r_h)
    return found


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
    return list({i % size: key for i, key in enumerate(keys)}.values())


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
    """L_c or L_b: the mean over the classes with an anchor and a key [D26]; and how many these are.

    masks: A_c. queues: the unit keys of each class. u[c][m], v[c][m][n]: what draws the anchors and
    their negatives, with replacement.
    """
    losses = []
    each = contrastive if kind == "contrastive" else binary
    for c, (mask, queue) in enumerate(zip(masks, queues, strict=True)):
        inside = [i for i, hit in enumerate(mask) if hit]
        if not inside or not queue:
            continue
        center = unit(mean([rep_t[i] for i in inside]))
        of_class = []
        for x, row in zip(u[c], v[c], strict=True):
            anchor = unit(rep_s[inside[int(x * len(inside))]])
            negatives = [queue[int(y * len(queue))] for y in row]
            of_class.append(each(anchor, center, negatives, tau))
        losses.append(math.fsum(of_class) / len(of_class))
    return math.fsum(losses) / max(len(losses), 1), len(losses)
