"""Mean Teacher (T&V, arXiv 1703.01780) and CutMix, one number at a time."""

import math

from oracles.supervised import VOID, cross_entropy, likeliest, scaled, softmax


def pseudo_labels(probs, inside):
    """U2PL Eq. (6) without its filter [D10]: the teacher's likeliest class, 255 outside."""
    return [
        [likeliest(p) if hit else VOID for p, hit in zip(image, mask, strict=True)]
        for image, mask in zip(probs, inside, strict=True)
    ]


def consistency_ce(images, probs, inside):
    """U2PL Eq. (3) without its filter [D10]."""
    return cross_entropy(images, pseudo_labels(probs, inside))


def consistency_mse(images, probs, inside):
    """T&V Sec. 2: || f(x, theta') - f(x, theta) ||^2, summed over classes [D11]."""
    count = max(sum(map(sum, inside)), 1)
    total = 0.0
    gradient = []
    for image, teacher, mask in zip(images, probs, inside, strict=True):
        gradient.append([])
        for z, q, hit in zip(image, teacher, mask, strict=True):
            p = softmax(z)
            gaps = [a - b for a, b in zip(p, q, strict=True)]
            total += hit * math.fsum(g * g for g in gaps) / count
            # d p^i / d z^c = p^i ([i = c] - p^c)
            along = math.fsum(a * g for a, g in zip(p, gaps, strict=True))
            slope = [2 * a * (g - along) for a, g in zip(p, gaps, strict=True)]
            gradient[-1].append(scaled(slope, hit / count))
    return total, gradient


def rampup(step, length):
    """T&V App. B: exp(-5 (1 - t)^2), t from 0 to 1 over the ramp."""
    t = step / length if step < length else 1.0
    return math.exp(-5 * (1 - t) ** 2)


def moved(teacher, student, decay):
    """U2PL Sec. 3.1: theta_t <- decay theta_t + (1 - decay) theta_s."""
    return [decay * t + (1 - decay) * s for t, s in zip(teacher, student, strict=True)]


def box(shares, size):
    """Half the area of a crop [D13]: a width above size / 2, then the height, then its place."""
    narrowest = size // 2 + 1
    width = narrowest + int(shares[0] * (size - narrowest))
    height = round(size * size / 2 / width)
    top = int(shares[1] * (size - height + 1))
    left = int(shares[2] * (size - width + 1))
    return top, left, height, width


def cutmix_source(boxes, i, y, x):
    """The image that image i shows at a pixel: in its box its partner of the pair (2k, 2k + 1)."""
    top, left, height, width = boxes[i]
    hit = top <= y < top + height and left <= x < left + width
    partner = i + 1 if i % 2 == 0 else i - 1
    return partner if hit else i
