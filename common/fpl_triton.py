"""FPL's loss as one kernel for a GPU, in Triton: reads both logits once and writes one gradient.

A pixel needs no sort. Class i is positive exactly if fewer than K classes come before it, larger
ones and equal ones of lower number; and the probabilities up to it sum to what V is at its rank.
Up to rounding what the definitions in cps_fpl.py and ael_fpl.py compute (tests/test_equations.py,
in Triton's interpreter). Not measured on a GPU: benchmarks/gpu.py does. benchmarks/kernel.py has
what the compiler makes of it: a thread has all classes of its pixel in registers, so that no sum
over classes goes through other threads.
"""

import torch
import triton
import triton.language as tl

LARGEST = 32  # classes: of more a thread's registers do not hold all
WARPS = 4
BLOCK = 32 * WARPS  # pixels, one for each thread


@triton.jit
def read(start, step, there, c, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, missing):
    """Returns (WIDTH, BLOCK) numbers, one class after the other; missing: of classes that are none.

    Read at once they would be spread over threads as they lie in memory, which costs an exchange
    between threads in each sum over classes.
    """
    x = tl.full((WIDTH, BLOCK), missing, tl.float32)
    for j in tl.static_range(C):
        x = tl.where(c == j, tl.load(start + j * step, there, 0.0).to(tl.float32)[None, :], x)
    return x


@triton.jit
def in_order(p, c, C: tl.constexpr):
    """Returns of each class how many come before it, and V at its rank, summed in float64."""
    rank = tl.zeros_like(p).to(tl.int32)
    V = p.to(tl.float64)
    for j in tl.static_range(C):
        other = tl.sum(tl.where(c == j, p, 0.0), 0)[None, :]
        before = (other > p) | ((other == p) & (c > j))
        rank += before.to(tl.int32)
        V += tl.where(before, other, 0.0).to(tl.float64)
    return rank, V.to(tl.float32)


@triton.jit
def weight_of(mean, rest, WEIGHT: tl.constexpr):
    """Eq. (11) or (16)."""
    gap = tl.maximum(mean - rest, 0.0)
    if WEIGHT == "concave":
        weight = tl.log(1 + 50 * gap) / tl.log(1 + 50 * mean)
    elif WEIGHT == "linear":
        weight = gap / mean
    elif WEIGHT == "convex":
        weight = gap / (mean + 4 * rest)
    else:
        weight = gap * 0 + 1
    return weight


@triton.jit
def kernel(
    z_from,
    t_from,
    loss_to,
    pseudo_to,
    gradient_to,
    pixels,  # of an image
    total,  # pixels of all images
    image_step,
    class_step,
    pixel_step,
    T,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STRICT: tl.constexpr,
    MINUS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    WEIGHT: tl.constexpr,
    FOLLOWING: tl.constexpr,
):
    """BLOCK pixels: Eq. (7) times Eq. (11) or (16), the likeliest class, and Eq. (8) times that."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH)[:, None]
    place = pixel // pixels * image_step + pixel % pixels * pixel_step
    there = pixel < total
    t = read(t_from + place, class_step, there, c, C, WIDTH, BLOCK, -float("inf"))
    z = read(z_from + place, class_step, there, c, C, WIDTH, BLOCK, 0.0)
    p = tl.exp(t - tl.max(t, 0)[None, :])
    p = tl.where(c < C, p / tl.sum(p, 0)[None, :], -1.0)  # -1: no class
    rank, V = in_order(p, c, C)
    below = (V <= T) if STRICT else (V < T)
    n = tl.sum((below & (c < C)).to(tl.int32), 0) + 1
    K = tl.minimum(tl.maximum(tl.minimum(n, C) - MINUS, LEAST), MOST)[None, :]
    Y = (rank < K) & (c < C)
    negative = (rank >= K) & (c < C)
    pseudo = tl.sum(tl.where((rank == 0) & (c < C), c, 0), 0)
    # Eq. (11), (16)
    last = tl.sum(tl.where(Y, p, 0.0).to(tl.float64), 0).to(tl.float32)
    rest = tl.maximum(tl.max(tl.where(negative, p, 0.0), 0), 0.0)
    number = tl.sum(Y.to(tl.float32), 0)
    weight = weight_of((last + FOLLOWING * rest) / (number + FOLLOWING), rest, WEIGHT)
    # Eq. (7), (8)
    high = tl.max(tl.where(negative, z, -1e30), 0)[None, :]
    low = tl.min(tl.where(Y, z, 1e30), 0)[None, :]
    up = tl.where(negative, tl.exp(z - high), 0.0)
    down = tl.where(Y, tl.exp(low - z), 0.0)
    above = tl.sum(up, 0)[None, :]
    under = tl.sum(down, 0)[None, :]
    left = above != 0  # K = C leaves no negative; NaN is left
    above = tl.where(left, above, 1.0)
    x = (high + tl.log(above)) + (tl.log(under) - low)
    bend = tl.exp(-tl.abs(x))
    loss = tl.where(left, tl.maximum(x, 0.0) + tl.log(1 + bend), 0.0)
    slope = tl.where(left, tl.where(x >= 0, 1.0, bend) / (1 + bend), 0.0) * weight[None, :]
    gradient = slope * (up / above - down / under)
    tl.store(loss_to + pixel, tl.sum(loss, 0) * weight, there)
    tl.store(pseudo_to + pixel, pseudo.to(tl.int64), there)
    for j in tl.static_range(C):
        of_class = tl.sum(tl.where(c == j, gradient, 0.0), 0).to(gradient_to.dtype.element_ty)
        tl.store(gradient_to + place + j * class_step, of_class, there)


def takes(logits_s, logits_t):
    """Returns whether the kernel computes these logits: on a GPU, in one layout, no float64."""
    dense = logits_s.is_contiguous() or logits_s.is_contiguous(memory_format=torch.channels_last)
    return (
        logits_s.is_cuda
        and dense
        and logits_s.stride() == logits_t.stride()
        and logits_s.shape[1] <= LARGEST
        and torch.float64 not in (logits_s.dtype, logits_t.dtype)
    )


def launch(logits_s, logits_t, rule):
    """Returns loss (B, H, W) float32, pseudo label (B, H, W) int64, gradient (B, C, H, W).

    logits: (B, C, H, W) as `takes` has them. rule: that of common/fused.py.
    """
    T, strict, minus, least, most, weight, mean_over = rule
    B, C, H, W = logits_s.shape
    gradient = torch.empty_like(logits_s)
    loss = torch.empty(B, H, W, device=logits_s.device)
    pseudo = torch.empty(B, H, W, dtype=torch.int64, device=logits_s.device)
    image_step, class_step, _, pixel_step = logits_s.stride()
    with torch.cuda.device_of(logits_s):  # Triton takes the current device
        kernel[(triton.cdiv(B * H * W, BLOCK),)](
            logits_s,
            logits_t,
            loss,
            pseudo,
            gradient,
            H * W,
            B * H * W,
            image_step,
            class_step,
            pixel_step,
            T,
            C=C,
            WIDTH=triton.next_power_of_2(C),
            BLOCK=BLOCK,
            STRICT=strict,
            MINUS=minus,
            LEAST=least,
            MOST=min(most, C),
            WEIGHT=weight,
            FOLLOWING=int(mean_over == "positives_and_next"),
            num_warps=WARPS,
        )
    return loss, pseudo, gradient
