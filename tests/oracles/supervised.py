"""Losses of labels, one number at a time: U2PL Eq. (2), the OHEM of its released code, those of
Mean Teacher (T&V, arXiv 1703.01780), and ESL's with its labels.

Here and in its siblings a pixel is a list of C floats, an image a list of pixels and a label a list
of classes for each image, 255 where there is none. A loss returns its value and its gradient: a
list of C slopes for each pixel of all images.
"""

import math

VOID = 255


def log_sum_exp(values):
    """log sum e^v, with the largest term taken out: no overflow."""
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [power / math.fsum(powers) for power in powers]


def likeliest(p):
    """argmax; of equal classes the lowest."""
    return p.index(max(p))


def nll(z, k):
    """-log p^k of a pixel, and its gradient p - y."""
    value = log_sum_exp(z) - z[k]
    return value, [p - (c == k) for c, p in enumerate(softmax(z))]


def scaled(vector, factor):
    return [factor * v for v in vector]


def weighted_mean(terms):
    """The sum of weight * loss over the sum of weights; terms: weight and loss of each pixel."""
    share = 1 / (math.fsum(w for w, _ in terms) or 1.0)
    value = share * math.fsum(w * loss for w, (loss, _) in terms)
    return value, [scaled(slope, share * w) for w, (_, slope) in terms]


def mean_over(images, others, inside, loss):
    """The mean of loss(pixel, other) over the pixels inside of all images together; 0 over none."""
    pixels = zip(*(sum(maps, []) for maps in (images, others, inside)), strict=True)
    nothing = 0.0, [0.0] * len(images[0][0])
    return weighted_mean([(hit, loss(z, y) if hit else nothing) for z, y, hit in pixels])


def cross_entropy(images, labels):
    """U2PL Eq. (2), over the labelled pixels."""
    return mean_over(images, labels, [[k != VOID for k in label] for label in labels], nll)


def ohem_cross_entropy(images, labels, threshold, min_kept):
    """U2PL's loss_helper [D1]: chosen and averaged in each image, then over the images."""
    share = 1 / len(images)
    total = 0.0
    gradient = []
    for image, label in zip(images, labels, strict=True):
        pairs = zip(image, label, strict=True)
        p = [math.inf if k == VOID else math.exp(-nll(z, k)[0]) for z, k in pairs]
        # the probability up to which a pixel is hard; too few labelled pixels: all of them
        ranked = sorted(min(v, 1.0) for v in p) + [1.0] * min_kept
        limit = max(threshold, ranked[max(min_kept, 1) - 1])
        value, slopes = mean_over([image], [label], [[v <= limit for v in p]], nll)
        total += share * value
        gradient += [scaled(slope, share) for slope in slopes]
    return total, gradient


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


def soft_label(p, kind, eta, top_k):
    """ESL Eq. (3)-(5): the classes with p >= delta, the p of rank C*, their sum made 1."""
    if kind == "soft":
        return list(p)
    if kind == "hard":
        return [float(c == likeliest(p)) for c in range(len(p))]
    ranked = sorted(p, reverse=True)
    count = min(top_k, len(p))
    if kind == "dynamic":  # the fewest likeliest classes whose sum reaches eta
        count = 1
        while math.fsum(ranked[:count]) < eta and count < len(p):
            count += 1
    delta = ranked[count - 1]
    kept = [v if v >= delta else 0.0 for v in p]  # all that equal delta [D10]
    return [v / math.fsum(kept) for v in kept]


def soft_cross_entropy(images, probs, inside, kind, eta, top_k):
    """ESL Eq. (6): the mean of -sum_c y*_c log p_c over the pixels inside; y* by Eq. (3)-(5)."""

    def of_pixel(z, q):
        y, total = soft_label(q, kind, eta, top_k), log_sum_exp(z)
        slope = [math.fsum(y) * p - a for p, a in zip(softmax(z), y, strict=True)]
        return math.fsum(a * (total - v) for a, v in zip(y, z, strict=True)), slope

    return mean_over(images, probs, inside, of_pixel)
