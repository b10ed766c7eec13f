"""FPL (its Eq., Alg. and supplement), A-FPL's T and CPS, one pixel and one number at a time."""

import math
from collections import Counter
from itertools import product
from types import SimpleNamespace

from oracles.supervised import likeliest, log_sum_exp, mean_over, nll, scaled, softmax


def printed(**changes):
    """The flags that FPL's and AEL's losses read, as printed in the papers, with changes."""
    values = dict(T=0.9037, k_max=0, strict=True, weight="concave", mean_over="positives")
    values |= dict(k_strategy="n-1", unsup_loss="fpl", balance=False, threshold=0.0, gamma=2.0)
    values |= dict(fused="off") | changes
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
    """K: Alg. 1's max(n - 1, 1), or another strategy of supplement Table 5; k_max caps it [D13]."""
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
    pixels = list(product(range(len(p)), range(len(p[0]))))
    best = dict.fromkeys(pixels, (math.inf, 0))
    for T in flags.T:
        own = SimpleNamespace(**vars(flags) | {"T": (T,)})
        Y = {(y, x): order(p[y][x])[: positives(p[y][x], own)] for y, x in pixels}
        for y, x in pixels:
            square = [at for at in pixels if max(abs(at[0] - y), abs(at[1] - x)) <= 2]
            others = [Y[i, j] for i, j in square if (i, j) != (y, x) and inside[i][j]]
            count = Counter(sum(others, []))
            total = max(sum(count.values()), 1)
            distance = 0.0
            for c in range(len(p[0][0])):
                q = count[c] / total + 1e-6
                d = (c in Y[y, x]) / len(Y[y, x]) + 1e-6
                distance += q * math.log(q / d)
            if distance < best[y, x][0] - 1e-9:
                best[y, x] = distance, len(Y[y, x])
    return [[best[y, x][1] for x in range(len(p[0]))] for y in range(len(p))]


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
    terms = [log_N - v if c in Y else log_P + v for c, v in enumerate(z)]
    slopes = [math.exp(term - value) for term in terms]
    return value, [-slope if c in Y else slope for c, slope in enumerate(slopes)]


def weight(p, K, kind, mean_over="positives"):
    """Eq. (11), concave with A = 50, and Eq. (16); without a negative class its p is 0."""
    p = sorted(p, reverse=True) + [0.0]
    count = K + 1 if mean_over == "positives_and_next" else K  # [D15]
    mean = math.fsum(p[:count]) / count
    rest = p[K]
    gap = max(mean - rest, 0.0)  # below 0 by rounding only
    if kind == "concave":
        return math.log1p(50 * gap) / math.log1p(50 * mean)
    return {"linear": gap / mean, "convex": gap / (mean + 4 * rest), "none": 1.0}[kind]


def soft(z, q):
    """Supplement Eq. (4), sum_i q^i log(q^i / p^i); its gradient is p - q."""
    total = log_sum_exp(z)
    value = math.fsum(b * (math.log(b) - (a - total)) for a, b in zip(z, q, strict=True) if b > 0)
    return value, [a - b for a, b in zip(softmax(z), q, strict=True)]


def negative(z, q, threshold=0.2):
    """Supplement Eq. (1), -sum_j log(1 - p^j) over q^j < 0.2; 1 - p^j is the sum of the others."""
    value, total, p = 0.0, log_sum_exp(z), softmax(z)
    gradient = [0.0] * len(z)
    for j in range(len(z)):
        if q[j] < threshold:
            others = log_sum_exp(z[:j] + z[j + 1 :])
            value += total - others
            for c in range(len(z)):
                gradient[c] += p[c] if c == j else p[c] - math.exp(z[c] - others)
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


def every_fourth(image, width):
    """Which pixels of an image are in every fourth row and column."""
    return [i // width % 4 == i % width % 4 == 0 for i in range(len(image))]


def cross_loss(students, teachers, inside, progress, width, flags):
    """CPS's L12 + L21, of images of network 1 and 2 in turns: each learns from the other's.

    The balance [D16]: cross-entropy's value for FPL's, of each image alone; where it is only
    logged, of every fourth pixel each way. Returns value, gradient, parts.
    """
    balanced = flags.balance and flags.unsup_loss == "fpl"
    size = 2 if balanced else len(students)
    sampled = inside
    if not balanced and flags.unsup_loss != "ce":
        fourth = every_fourth(inside[0], width)
        sampled = [[a and b for a, b in zip(mask, fourth, strict=True)] for mask in inside]
    others = [teachers[i ^ 1] for i in range(len(teachers))]
    parts = {"unsup": 0.0, "balance": 0.0}
    total = 0.0
    gradient = []
    for group in (slice(i, i + size) for i in range(0, len(students), size)):
        maps = students[group], others[group]
        learn = lambda z, t: pixel_loss(z, softmax(t), flags, progress)  # noqa: E731
        value, slopes = mean_over(*maps, inside[group], learn)
        ce, _ = mean_over(*maps, sampled[group], lambda z, t: nll(z, likeliest(t)))
        balance = ce / value if value > 0 else 1.0
        share = size / len(students)
        factor = 2 * share * (balance if balanced else 1.0)  # L12 and L21 are added up
        parts["unsup"] += 2 * share * value
        parts["balance"] += share * balance
        total += factor * value
        gradient += [scaled(slope, factor) for slope in slopes]
    return total, gradient, parts
