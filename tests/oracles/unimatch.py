"""FixMatch and UniMatch, one pixel and one number at a time; A-FPL's choice of T."""

import math
from types import SimpleNamespace

from oracles import fpl
from oracles.supervised import likeliest, nll, scaled, softmax


def pixel_loss(z, t, flags):
    """Cross-entropy with a confident pseudo label, 0 elsewhere; or FPL's loss. And its gradient."""
    q = softmax(t)
    if flags.unsup_loss == "fpl":
        return fpl.pixel_loss(z, q, SimpleNamespace(**vars(flags) | {"T": flags.T[0]}))
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


def adaptive_positives(p, inside, flags):
    """A-FPL [D21]: K of every pixel of an image, p[y][x] a list of C, by the T that fits best."""
    H, W, C = len(p), len(p[0]), len(p[0][0])
    chosen = [[None] * W for _ in range(H)]
    for T in flags.T:
        own = SimpleNamespace(**vars(flags) | {"T": T})
        K = [[fpl.positives(pixel, own) for pixel in row] for row in p]
        for y in range(H):
            for x in range(W):
                count = [0] * C
                for i in range(max(y - 2, 0), min(y + 3, H)):
                    for j in range(max(x - 2, 0), min(x + 3, W)):
                        if (i, j) != (y, x) and inside[i][j]:
                            for c in fpl.order(p[i][j])[: K[i][j]]:
                                count[c] += 1
                total = max(sum(count), 1)
                around = [c / total + 1e-6 for c in count]
                positives = fpl.order(p[y][x])[: K[y][x]]
                own = [(c in positives) / K[y][x] + 1e-6 for c in range(C)]
                pairs = zip(around, own, strict=True)
                distance = math.fsum(q * math.log(q / d) for q, d in pairs)
                best = chosen[y][x]
                if best is None or distance < best[0] - 1e-9:
                    chosen[y][x] = (distance, K[y][x])
    return [[K for _, K in row] for row in chosen]
