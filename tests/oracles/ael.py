"""AEL (arXiv 2110.05474), one pixel and one drawn number at a time."""

import math

from oracles.fpl import every_fourth, pixel_loss, positives
from oracles.supervised import VOID, likeliest, nll, scaled, softmax, weighted_mean


def pixel_weight(conf_t, z, rate, u, gamma):
    """Eq. (13): the teacher's confidence^gamma, kept with the rate of the student's class [D24]."""
    return conf_t**gamma if u >= 1 - rate[likeliest(z)] else 0.0


def group_means(groups, factors):
    """Eq. (12): each group's mean by its own weights, and of these the mean, times a factor each.

    groups: weight and loss of each pixel.
    """
    total = 0.0
    gradient = []
    for terms, factor in zip(groups, factors, strict=True):
        value, slopes = weighted_mean(terms)
        total += factor * value / len(groups)
        gradient += [scaled(slope, factor / len(groups)) for slope in slopes]
    return total, gradient


def in_groups(pooled, *maps):
    """Lists of the pixels of `pooled` images: of each pixel what the maps have there."""
    images = [list(zip(*image, strict=True)) for image in zip(*maps, strict=True)]
    return [sum(images[i : i + pooled], []) for i in range(0, len(images), pooled)]


def equalized_cross_entropy(students, labels, confs, inside, rate, chances, pooled, flags):
    """Eq. (12) with given labels, 255: none; such a pixel has weight if flags.divide_by is all."""
    groups = []
    for group in in_groups(pooled, students, labels, confs, inside, chances):
        groups.append([])
        for z, label, conf, hit, u in group:
            known = label != VOID
            weight = pixel_weight(conf, z, rate, u, flags.gamma)
            weight *= hit and (known or flags.divide_by == "all")
            groups[-1].append((weight, nll(z, label) if known else (0.0, [0.0] * len(z))))
    return group_means(groups, [1.0] * len(groups))


def consistency(students, teachers, inside, rate, chances, pooled, width, flags):
    """Eq. (12), by groups of `pooled` images. Returns value, gradient, parts.

    width: pixels in a row, K_gt_1 is read at every fourth each way.
    """
    places = [every_fourth(image, width) for image in students]
    parts = {name: [] for name in ("unsup", "balance", "kept", "conf_t", "K_gt_1")}
    groups = []
    for group in in_groups(pooled, students, teachers, inside, chances, places):
        terms = []
        ce_sum = plain = 0.0
        for z, t, hit, u, fourth in group:
            q = softmax(t)
            loss, slope = pixel_loss(z, q, flags)
            weight = hit * pixel_weight(max(q), z, rate, u, flags.gamma)
            certain = max(q) >= flags.threshold  # below it the loss is 0, the weight remains [D18]
            terms.append((weight, (certain * loss, scaled(slope, certain))))
            ce_sum += hit * nll(z, likeliest(t))[0]
            plain += hit * loss
            if hit:
                parts["kept"].append(weight > 0)
                parts["conf_t"].append(max(q))
            if hit and fourth:
                parts["K_gt_1"].append(positives(q, flags) > 1)
        parts["unsup"].append(weighted_mean(terms)[0])
        parts["balance"].append(ce_sum / plain if plain > 0 else 1.0)  # [D16]
        groups.append(terms)
    factors = parts["balance"] if flags.balance else [1.0] * len(groups)
    means = {name: math.fsum(values) / max(len(values), 1) for name, values in parts.items()}
    return *group_means(groups, factors), means
