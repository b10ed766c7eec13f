"""FixMatch and UniMatch, one pixel and one number at a time."""

from oracles import fpl
from oracles.supervised import likeliest, nll, scaled, softmax


def pixel_loss(z, t, flags):
    """Cross-entropy with a confident pseudo label, 0 elsewhere; or FPL's loss. And its gradient."""
    q = softmax(t)
    if flags.unsup_loss == "fpl":
        return fpl.pixel_loss(z, q, flags)
    value, slope = nll(z, likeliest(q))
    counts = float(max(q) >= flags.threshold)
    return counts * value, scaled(slope, counts)


def consistency(students, teachers, inside, pixels, flags):
    """The sum over pixels inside, confident or not, over `pixels`; its gradient."""
    total = 0.0
    gradient = []
    for image, other, mask in zip(students, teachers, inside, strict=True):
        gradient.append([])
        for z, t, hit in zip(image, other, mask, strict=True):
            value, slope = pixel_loss(z, t, flags) if hit else (0.0, [0.0] * len(z))
            total += value / pixels
            gradient[-1].append(scaled(slope, 1 / pixels))
    return total, gradient
