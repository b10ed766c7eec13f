"""FixMatch and UniMatch, one pixel and one number at a time."""

from oracles import fpl
from oracles.supervised import likeliest, mean_over, nll, scaled, softmax


def pixel_loss(z, t, flags):
    """Cross-entropy with a confident pseudo label, 0 elsewhere; or FPL's loss. And its gradient."""
    q = softmax(t)
    if flags.unsup_loss == "fpl":
        return fpl.pixel_loss(z, q, flags)
    value, slope = nll(z, likeliest(q))
    counts = float(max(q) >= flags.threshold)
    return counts * value, scaled(slope, counts)


def consistency(students, teachers, inside, pixels, flags):
    """The sum over pixels inside, confident or not, over `pixels`; its gradient pixel by pixel."""
    value, slopes = mean_over(students, teachers, inside, lambda z, t: pixel_loss(z, t, flags))
    share = sum(map(sum, inside)) / pixels
    return share * value, [scaled(slope, share) for slope in slopes]
