"""FPL's loss in the order of work of the released code, after the audit of it; written anew.

Only what costs time is kept as it was: one-hot maps filled on the CPU and copied to the device, of
which the last is not used; for each K the positives and negatives of all pixels as maps of C
channels, of which those of the pixels with this K are taken out by boolean indexing and put into
the result by another; a clamp without effect. The numbers are those of `--recipe official` (K at
most 3, >=, mean over K + 1). In maps of the logits' size (C = 19, 160x160) the forward pass of the
released code allocates 77, with the backward pass 150; this function 80 and 157.
"""

import torch
import torch.nn.functional as F

FILL = 1e7  # in place of infinity, as released


def one_hots(index, channels):
    """Returns (B, C, H, W) maps of 0 and 1, made on the CPU. index: (B, n, H, W), n likeliest."""
    images, count, height, width = index.shape
    maps = []
    for k in range(count):
        hot = torch.zeros(images, channels, height, width).to(index.device)
        maps.append(hot.scatter_(1, index[:, k : k + 1], 1.0))
    return maps


def weight_of(mean, rest):
    """Eq. (11) with A = 50."""
    return torch.log(1 + 50 * (mean - rest)) / torch.log(1 + 50 * mean)


def released_loss(logits_s, logits_t, T):
    """Returns (loss, weight) of every pixel, (B, H, W). Logits (B, C, H, W), C of 4 or more."""
    p = F.softmax(logits_t.detach(), 1)
    top, index = p.topk(4, 1)
    hots = one_hots(index, p.shape[1])
    running = top.cumsum(1)
    low = torch.zeros_like(logits_s) - 1
    high = torch.zeros_like(logits_s) - 1
    weight = torch.ones_like(top[:, 0])
    left = torch.ones_like(weight, dtype=torch.bool)
    for k in (1, 2, 3):
        here = left & (running[:, k] >= T) if k < 3 else left
        left = left & ~here
        mean = running[:, k] / (k + 1)
        weight[here] = weight_of(mean, top[:, k])[here]
        positive = sum(hots[:k])
        negative = 1 - positive
        channels = here[:, None].expand_as(p).contiguous()
        low[channels] = (-(logits_s * positive) - negative * FILL)[channels]
        high[channels] = (logits_s * negative - positive * FILL)[channels]
    loss = F.softplus(low.logsumexp(1) + high.logsumexp(1))
    return loss, torch.where(weight > 1, 1.0, weight)
