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


def mean_over(images, others, inside, loss):
    """The mean of loss(pixel, other) over the pixels inside of all images together; 0 over none."""
    count = max(sum(map(sum, inside)), 1)
    total = 0.0
    gradient = []
    for image, other, mask in zip(images, others, inside, strict=True):
        gradient.append([])
        for z, y, hit in zip(image, other, mask, strict=True):
            value, slope = loss(z, y) if hit else (0.0, [0.0] * len(z))
            total += value / count
            gradient[-1].append(scaled(slope, 1 / count))
    return total, gradient


def cross_entropy(images, labels):
    """U2PL Eq. (2), over the labelled pixels."""
    return mean_over(images, labels, [[k != VOID for k in label] for label in labels], nll)


def ohem_cross_entropy(images, labels, threshold, min_kept):
    """U2PL's loss_helper [D1]: chosen and averaged in each image, then over the images."""
    total = 0.0
    gradient = []
    for image, label in zip(images, labels, strict=True):
        losses = {i: nll(image[i], k) for i, k in enumerate(label) if k != VOID}
        # the probability up to which a pixel is hard; too few labelled pixels: all of them
        ranked = sorted(math.exp(-v) for v, _ in losses.values()) + [1.0] * max(min_kept, 1)
        limit = max(threshold, ranked[max(min_kept, 1) - 1])
        hard = {i: loss for i, loss in losses.items() if math.exp(-loss[0]) <= limit}
        share = 1 / max(len(hard), 1) / len(images)
        total += share * math.fsum(value for value, _ in hard.values())
        none = [0.0] * len(image[0])
        gradient.append([scaled(hard.get(i, (0, none))[1], share) for i in range(len(image))])
    return total, gradient
