"""FPL (its Eq., Alg. and supplement), A-FPL's T and CPS, one pixel and one number at a time."""

import math
from types import SimpleNamespace

from oracles.supervised import likeliest, log_sum_exp, mean_over, nll, scaled, softmax


def printed(**changes):
    """The flags that FPL's and AEL's losses read, as printed in the papers, with changes.

    T: a number or several.
    """
    values = dict(T=0.9037, k_max=0, strict=True, weight="concave", mean_over="positives")
    values |= dict(k_strategy="n-1", unsup_loss="fpl", balance=False, threshold=0.0, gamma=2.0)
    values |= dict(fused="off", chosen={}) | changes
    if isinstance(values["T"], float):
        values["T"] = (values["T"],)
    return SimpleNamespace(**values)


def order(p):
    """Classes from likely to unlikely; of equal ones the lowest first."""
    return sorted(range(len(p)), key=lambda c: (-p[c], c))


def cumulative_classes(p, T, strict=True):
    """Alg. 1, first half, line for line: n, the fewest classes whose sum V exceeds T."""
    p = sorted(p, reverse=True)
    V = p[0]
    for n in range(1, len(p)):
        if V > T or (V == T and not strict):  # not strict [D14]
            return n
        V = V + p[n]
    return len(p)


def positives(p, flags, progress=0.0):
    """K: Alg. 1's max(n - 1, 1), or another strategy of supplement Table 5; k_max caps it [D13].

    With several T it is what `choose` has found for this pixel.
    """
    if len(flags.T) > 1:
        return flags.chosen[tuple(p)]
    if flags.k_strategy in ("n", "n-1"):
        n = cumulative_classes(p, flags.T[0], flags.strict)
        K = n if flags.k_strategy == "n" else max(n - 1, 1)
    elif flags.k_strategy == "step":  # 3, 2, 1 by thirds of training
        K = 3 if progress < 1 / 3 else 2 if progress < 2 / 3 else 1
    else:
        K = {"fixed2": 2, "fixed3": 3}[flags.k_strategy]
    return min(K, len(p), flags.k_max or len(p))


def adaptive_positives(p, inside, flags):
    """A-FPL: K of every pixel of an image, p[y][x] a list of C, by the T that fits best."""
    H, W, C = len(p), len(p[0]), len(p[0][0])
    chosen = [[None] * W for _ in range(H)]
    for T in flags.T:
        own = SimpleNamespace(**vars(flags) | {"T": (T,)})
        K = [[positives(pixel, own) for pixel in row] for row in p]
        for y in range(H):
            for x in range(W):
                count = [0] * C
                for i in range(max(y - 2, 0), min(y + 3, H)):
                    for j in range(max(x - 2, 0), min(x + 3, W)):
                        if (i, j) != (y, x) and inside[i][j]:
                            for c in order(p[i][j])[: K[i][j]]:
                                count[c] += 1
                total = max(sum(count), 1)
                around = [c / total + 1e-6 for c in count]
                Y = order(p[y][x])[: K[y][x]]
                own = [(c in Y) / K[y][x] + 1e-6 for c in range(C)]
                pairs = zip(around, own, strict=True)
                distance = math.fsum(q * math.log(q / d) for q, d in pairs)
                best = chosen[y][x]
                if best is None or distance < best[0] - 1e-9:
                    chosen[y][x] = (distance, K[y][x])
    return [[K for _, K in row] for row in chosen]


def choose(teachers, inside, flags):
    """Fills flags.chosen with the K of every pixel of images, t[y][x] a list of C logits."""
    for image, mask in zip(teachers, inside, strict=True):
        p = [[softmax(t) for t in row] for row in image]
        for row, Ks in zip(p, adaptive_positives(p, mask, flags), strict=True):
            flags.chosen |= {tuple(q): K for q, K in zip(row, Ks, strict=True)}


def regularization(z, Y):
    """Eq. (7), log(1 + P N), P = sum_{i in Y} e^{-z^i}, N = sum_{j not in Y} e^{z^j}.

    Its gradient is Eq. (8): -N e^{-z^c} / (1 + P N) in Y, P e^{z^c} / (1 + P N) elsewhere.
    """
    others = [c for c in range(len(z)) if c not in Y]
    if not others:
        return 0.0, [0.0] * len(z)
    log_P = log_sum_exp([-z[i] for i in Y])
    log_N = log_sum_exp([z[j] for j in others])
    value = log_sum_exp([0.0, log_P + log_N])
    gradient = [0.0] * len(z)
    for c in Y:
        gradient[c] = -math.exp(log_N - z[c] - value)
    for c in others:
        gradient[c] = math.exp(log_P + z[c] - value)
    return value, gradient


def weight(p, K, kind, mean_over="positives"):
    """Eq. (11), concave with A = 50, and Eq. (16); without a negative class its p is 0."""
    p = sorted(p, reverse=True) + [0.0]
    count = K + 1 if mean_over == "positives_and_next" else K  # [D15]
    mean = math.fsum(p[:count]) / count
    rest = p[K]
    gap = max(mean - rest, 0.0)  # below 0 by rounding only
    if kind == "concave":
        return math.log1p(50 * gap) / math.log1p(50 * mean)
    if kind == "linear":
        return gap / mean
    if kind == "convex":
        return gap / (mean + 4 * rest)
    return 1.0


def soft(z, q):
    """Supplement Eq. (4), sum_i q^i log(q^i / p^i); its gradient is p - q."""
    total = log_sum_exp(z)
    value = math.fsum(b * (math.log(b) - (a - total)) for a, b in zip(z, q, strict=True) if b > 0)
    return value, [a - b for a, b in zip(softmax(z), q, strict=True)]


def negative(z, q, threshold=0.2):
    """Supplement Eq. (1), -sum_j log(1 - p^j) over q^j < 0.2; 1 - p^j is the sum of the others."""
    value = 0.0
    gradient = [0.0] * len(z)
    total = log_sum_exp(z)
    for j in range(len(z)):
        if q[j] < threshold:
            others = log_sum_exp(z[:j] + z[j + 1 :])
            value += total - others
            for c in range(len(z)):
                gradient[c] += math.exp(z[c] - total)
                gradient[c] -= math.exp(z[c] - others) if c != j else 0.0
    return value, gradient


def pixel_loss(z, q, flags, progress=0.0):
    """The loss of a pixel by --unsup-loss, and its gradient. q: the teacher's probabilities."""
    if flags.unsup_loss == "ce":
        return nll(z, likeliest(q))  # Eq. (2)
    if flags.unsup_loss != "fpl":
        return soft(z, q) if flags.unsup_loss == "soft" else negative(z, q)
    K = positives(q, flags, progress)
    value, slope = regularization(z, order(q)[:K])
    w = weight(q, K, flags.weight, flags.mean_over)
    return w * value, scaled(slope, w)  # Eq. (7) times Eq. (11)


def cross_loss(students, teachers, inside, progress, flags):
    """CPS's L12 + L21: network 1 learns from 2, 2 from 1. Returns value, gradients, parts.

    students, teachers: images of both networks. The balance [D16]: cross-entropy's value for FPL's,
    of each image alone.
    """
    if len(inside) > 1 and flags.balance and flags.unsup_loss == "fpl":
        alone = []
        for i in range(len(inside)):
            nets = [[net[i : i + 1] for net in nets] for nets in (students, teachers)]
            alone.append(cross_loss(*nets, inside[i : i + 1], progress, flags))
        values, slopes, parts = zip(*alone, strict=True)
        share = 1 / len(inside)
        both = [[[scaled(g, share) for g in one[net][0]] for one in slopes] for net in (0, 1)]
        parts = {name: math.fsum(part[name] for part in parts) * share for name in parts[0]}
        return math.fsum(values) * share, both, parts
    unsup = 0.0
    ce = 0.0
    gradients = []
    for own, other in ((0, 1), (1, 0)):
        maps = students[own], teachers[other], inside
        value, slopes = mean_over(*maps, lambda z, t: pixel_loss(z, softmax(t), flags, progress))
        unsup += value
        ce += mean_over(*maps, lambda z, t: nll(z, likeliest(t)))[0]
        gradients.append(slopes)
    balance = ce / unsup if unsup > 0 else 1.0
    factor = balance if flags.balance and flags.unsup_loss == "fpl" else 1.0
    gradients = [[[scaled(g, factor) for g in image] for image in net] for net in gradients]
    return factor * unsup, gradients, {"unsup": unsup, "balance": balance}


def toggled_mask(shares, size):
    """CPS's CutMix: three boxes of a third of a random area, each turns what it covers."""
    mask = [[False] * size for _ in range(size)]
    for k in range(3):
        share, form, vertical, horizontal = shares[4 * k : 4 * k + 4]
        area = 0.25 + 0.25 * share
        tall = math.exp(form * math.log(area))  # log-uniform from area to 1
        height = round(tall * math.sqrt(1 / 3) * size)
        width = round(area / tall * math.sqrt(1 / 3) * size)
        top = round((size - height) * vertical)
        left = round((size - width) * horizontal)
        for y in range(top, top + height):
            for x in range(left, left + width):
                mask[y][x] = not mask[y][x]
    return mask
