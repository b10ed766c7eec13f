"""AEL (arXiv 2110.05474), FixMatch and UniMatch, one pixel and one drawn number at a time."""

import math

from oracles.fpl import every_fourth, pixel_loss, positives
from oracles.supervised import likeliest, mean_over, nll, scaled, softmax, weighted_mean


def consistency(students, teachers, inside, rate, chances, pooled, width, flags):
    """Eq. (12): each group of `pooled` images by its own weights, then the mean over the groups.

    Returns value, gradient, parts. width: pixels in a row, K_gt_1 is read at every fourth each way.
    """
    places = [every_fourth(image, width) for image in students]
    maps = zip(students, teachers, inside, chances, places, strict=True)
    images = [list(zip(*image, strict=True)) for image in maps]
    parts = {name: [] for name in ("unsup", "balance", "kept", "conf_t", "K_gt_1")}
    total = 0.0
    gradient = []
    for first in range(0, len(images), pooled):
        terms = []
        ce_sum = plain = 0.0
        for z, t, hit, u, fourth in sum(images[first : first + pooled], []):
            q = softmax(t)
            loss, slope = pixel_loss(z, q, flags)
            # Eq. (13): the teacher's confidence, kept with the rate of the student's class [D24]
            weight = hit * max(q) ** flags.gamma * (u >= 1 - rate[likeliest(z)])
            certain = max(q) >= flags.threshold  # below it the loss is 0, the weight remains [D18]
            terms.append((weight, (certain * loss, scaled(slope, certain))))
            if hit and (fourth or flags.balance):  # without it the balance is only logged
                ce_sum += nll(z, likeliest(t))[0]
                plain += loss
            if hit:
                parts["kept"].append(weight > 0)
                parts["conf_t"].append(max(q))
            if hit and fourth:
                parts["K_gt_1"].append(positives(q, flags) > 1)
        value, slopes = weighted_mean(terms)
        parts["unsup"].append(value)
        parts["balance"].append(ce_sum / plain if plain > 0 else 1.0)  # [D16]
        share = pooled / len(images) * (parts["balance"][-1] if flags.balance else 1.0)
        total += share * value
        gradient += [scaled(slope, share) for slope in slopes]
    return total, gradient, {k: math.fsum(v) / max(len(v), 1) for k, v in parts.items()}


def weak_to_strong(students, teachers, inside, pixels, flags):
    """UniMatch: what a sure teacher teaches, over `pixels`; its gradient pixel by pixel."""

    def learn(z, t):
        q = softmax(t)
        certain = max(q) >= flags.threshold
        loss, slope = pixel_loss(z, q, flags)
        return certain * loss, scaled(slope, certain)

    value, slopes = mean_over(students, teachers, inside, learn)
    share = sum(map(sum, inside)) / pixels
    return share * value, [scaled(slope, share) for slope in slopes]
