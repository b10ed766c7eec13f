"""Supervised losses, one number at a time: U2PL Eq. (2) and the OHEM of its released code.

Here and in its siblings a pixel is a list of C floats, an image a list of pixels and a label a list
of classes for each image, 255 where there is none. A loss returns its value and its gradient.
"""

import math

VOID = 255


def log_sum_exp(values):
    """log sum e^v, with the largest term taken out: no overflow."""
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def softmax(z):
    total = log_sum_exp(z)
    return [math.exp(v - total) for v in z]


def likeliest(p):
    """argmax; of equal classes the lowest."""
    return p.index(max(p))


def nll(z, k):
    """-log p^k of a pixel, and its gradient p - y."""
    value = log_sum_exp(z) - z[k]
    return value, [p - (c == k) for c, p in enumerate(softmax(z))]


def scaled(vector, factor):
    return [factor * v for v in vector]


def cross_entropy(images, labels):
    """U2PL Eq. (2): the mean over the labelled pixels of all images together; 0 over none."""
    count = sum(k != VOID for label in labels for k in label)
    total = 0.0
    gradient = []
    for image, label in zip(images, labels, strict=True):
        gradient.append([])
        for z, k in zip(image, label, strict=True):
            value, slope = (0.0, [0.0] * len(z)) if k == VOID else nll(z, k)
            total += value
            gradient[-1].append(scaled(slope, 1 / max(count, 1)))
    return total / max(count, 1), gradient


def ohem_limit(probabilities, threshold, min_kept):
    """The probability up to which a pixel of an image is hard; the hardest one always is."""
    min_kept = max(min_kept, 1)
    if min_kept > len(probabilities):  # too few labelled pixels: all of them
        return 1.0
    return max(threshold, sorted(probabilities)[min_kept - 1])


def ohem_cross_entropy(images, labels, threshold, min_kept):
    """U2PL's loss_helper [D1]: chosen and averaged in each image, then over the images."""
    total = 0.0
    gradient = []
    for image, label in zip(images, labels, strict=True):
        losses = {i: nll(image[i], k) for i, k in enumerate(label) if k != VOID}
        limit = ohem_limit([math.exp(-v) for v, _ in losses.values()], threshold, min_kept)
        hard = {i: loss for i, loss in losses.items() if math.exp(-loss[0]) <= limit}
        share = 1 / max(len(hard), 1) / len(images)
        total += share * math.fsum(value for value, _ in hard.values())
        none = [0.0] * len(image[0])
        gradient.append(
            [scaled(hard[i][1], share) if i in hard else none for i in range(len(image))]
        )
    return total, gradient
