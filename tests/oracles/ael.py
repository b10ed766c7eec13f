"""AEL (arXiv 2110.05474), one pixel, one class, one cell and one drawn number at a time.

shares: the numbers in [0, 1) that a random generator gives, in their order.
"""

import itertools
import math

from oracles.fpl import pixel_loss, positives
from oracles.supervised import likeliest, nll, scaled, softmax


def class_confidence(probs, labels, pooled, skip_absent):
    """Eq. (4): per class the sum of its means over groups of `pooled` images [D21], and how many.

    A group without the class counts with 0 [D22], or with skip_absent not at all.
    """
    classes = len(probs[0][0])
    sums = [0.0] * classes
    counts = [0] * classes
    for group, c in itertools.product(range(len(probs) // pooled), range(classes)):
        found = []
        for b in range(group * pooled, (group + 1) * pooled):
            found += [p[c] for p, k in zip(probs[b], labels[b], strict=True) if k == c]
        sums[c] += math.fsum(found) / max(len(found), 1)
        counts[c] += bool(found) or not skip_absent
    return sums, counts


def sampling_probability(bank, allowed, power):
    """Eq. (9): softmax of (1 - bank)^power over the allowed classes."""
    scores = [math.exp((1 - v) ** power) * ok for v, ok in zip(bank, allowed, strict=True)]
    return [score / math.fsum(scores) for score in scores]


def draw_class(p, u):
    """The class where the running sum of p passes u of the whole."""
    sums = enumerate(itertools.accumulate(p))
    return next(c for c, running in sums if running > u * sum(p))


def draw_partners(bank, present, count, shares):
    """A class by Eq. (9) for each image, then an image that shows it; any image, if none does."""
    p = sampling_probability(bank, [True] * len(bank), 1.0)
    pairs = []
    for u, v in zip(shares[:count], shares[count:], strict=True):
        c = draw_class(p, u)
        images = [n for n, shown in enumerate(present[c]) if shown] or range(len(present[c]))
        pairs.append([c, images[int(v * len(images))]])
    return pairs


def half_area_box(shares, size):
    """A box of half a crop, height log-uniform from size / 2 to size: top, left, height, width."""
    tall = 0.5 ** shares[0]
    height = round(size * tall)
    width = round(size * 0.5 / tall)
    return int(shares[1] * (size - height + 1)), int(shares[2] * (size - width + 1)), height, width


def equalization_rate(bank, beta):
    """Sec. 3.3: s = ((1 - bank) / max(1 - bank))^beta."""
    gaps = [max(1 - v, 0.0) for v in bank]  # above 1 by rounding only
    return [(gap / max(*gaps, 1e-12)) ** beta for gap in gaps]


def pixel_weight(conf_t, z, rate, u, gamma):
    """Eq. (13): the teacher's confidence^gamma, kept with the rate of the student's class [D24]."""
    return conf_t**gamma if u >= 1 - rate[likeliest(z)] else 0.0


def group_loss(pixels, rate, flags):
    """Eq. (12) over one group: (value, balance, slopes); pixels: (z, t, inside, u) of each."""
    top = bottom = ce_sum = plain = 0.0
    slopes = []
    for z, t, inside, u in pixels:
        q = softmax(t)
        loss, slope = pixel_loss(z, q, flags)
        w = inside * pixel_weight(max(q), z, rate, u, flags.gamma)
        certain = max(q) >= flags.threshold  # below it the loss is 0, the weight remains [D18]
        top += w * certain * loss
        bottom += w
        ce_sum += inside * nll(z, likeliest(t))[0]
        plain += inside * loss
        slopes.append(scaled(slope, w * certain))
    share = 1 / bottom if bottom else 0.0
    balance = ce_sum / plain if plain > 0 else 1.0  # [D16]
    return top * share, balance, [scaled(slope, share) for slope in slopes]


def equalized_cross_entropy(students, labels, confs, inside, rate, chances, pooled, flags):
    """Eq. (12) with given labels, 255: none; such a pixel has weight if flags.divide_by is all."""
    total = 0.0
    slopes = []
    maps = students, labels, confs, inside, chances
    images = [list(zip(*image, strict=True)) for image in zip(*maps, strict=True)]
    for first in range(0, len(images), pooled):
        rows = []
        for z, label, conf, hit, u in itertools.chain(*images[first : first + pooled]):
            known = label != 255
            loss, slope = nll(z, label) if known else (0.0, [0.0] * len(z))
            weighs = hit and (known or flags.divide_by == "all")
            rows.append((weighs * pixel_weight(conf, z, rate, u, flags.gamma), loss, slope))
        bottom = math.fsum(w for w, _, _ in rows)
        share = pooled / len(images) / bottom if bottom else 0.0
        total += share * math.fsum(w * loss for w, loss, _ in rows)
        slopes += [scaled(slope, share * w) for w, _, slope in rows]
    count = len(images[0])
    return total, [slopes[i : i + count] for i in range(0, len(slopes), count)]


def consistency(students, teachers, inside, rate, chances, pooled, width, flags):
    """Eq. (12): each group of `pooled` images by its own weights, then the mean over the groups.

    Returns value, gradient, parts. width: pixels in a row, K_gt_1 is read at every fourth each way.
    """
    rows = []
    for maps in zip(students, teachers, inside, chances, strict=True):
        rows.append(list(zip(*maps, strict=True)))
    parts = {name: [] for name in ("unsup", "balance", "kept", "conf_t", "K_gt_1")}
    total = 0.0
    slopes = []
    for first in range(0, len(rows), pooled):
        value, balance, of_group = group_loss(sum(rows[first : first + pooled], []), rate, flags)
        parts["unsup"].append(value)
        parts["balance"].append(balance)
        factor = (balance if flags.balance else 1.0) * pooled / len(rows)
        total += factor * value
        slopes += [scaled(slope, factor) for slope in of_group]
    for i, (z, t, hit, u) in itertools.chain(*map(enumerate, rows)):
        q = softmax(t)
        if hit:
            parts["kept"].append(pixel_weight(max(q), z, rate, u, flags.gamma) > 0)
            parts["conf_t"].append(max(q))
        if hit and (i // width) % 4 == (i % width) % 4 == 0:
            parts["K_gt_1"].append(positives(q, flags) > 1)
    count = len(rows[0])
    gradient = [slopes[i : i + count] for i in range(0, len(slopes), count)]
    return total, gradient, {k: math.fsum(v) / max(len(v), 1) for k, v in parts.items()}
