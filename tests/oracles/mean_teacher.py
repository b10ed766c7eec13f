"""Mean Teacher (T&V, arXiv 1703.01780), one number at a time."""

import math

from oracles.supervised import likeliest, mean_over, nll, softmax


def consistency_ce(images, probs, inside):
    """U2PL Eq. (3), (6) without their filter [D10]: the label is the teacher's likeliest class."""
    return mean_over(images, probs, inside, lambda z, q: nll(z, likeliest(q)))


def squared_distance(z, q):
    """|| p - q ||^2 of a pixel, summed over classes [D11]; d p^i / d z^c = p^i ([i = c] - p^c)."""
    p = softmax(z)
    gaps = [a - b for a, b in zip(p, q, strict=True)]
    along = math.fsum(a * g for a, g in zip(p, gaps, strict=True))
    slope = [2 * a * (g - along) for a, g in zip(p, gaps, strict=True)]
    return math.fsum(g * g for g in gaps), slope


def consistency_mse(images, probs, inside):
    """T&V Sec. 2: || f(x, theta') - f(x, theta) ||^2."""
    return mean_over(images, probs, inside, squared_distance)
