"""FPL's loss in the order of work of the released code, after the audit of it; written anew.

Only what costs time is kept as it was: one-hot maps filled on the CPU and copied to the device, of
which the last is not used; for each K a pass over the positives and negatives of all pixels, whose
maps of C channels are filled by boolean indexing, though a pixel needs one of them; a clamp without
effect. The numbers are those of `--recipe official` (K at most 3, >=, mean over K + 1).
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
    K = torch.where(running[:, 1] >= T, 1, torch.where(running[:, 2] >= T, 2, 3))
    loss = torch.zeros_like(top[:, 0]) - 1
    weight = torch.zeros_like(top[:, 0])
    planes = torch.zeros_like(p)
    for k in (1, 2, 3):
        planes = planes + hots[k - 1]
        positive = planes > 0
        low = -logits_s
        low[~positive] = -FILL
        high = logits_s.clone()
        high[positive] = -FILL
        every = F.softplus(low.logsumexp(1) + high.logsumexp(1), threshold=20)
        here = K == k
        loss[here] = every[here]
        mean = running[:, k][here] / (k + 1)
        weight[here] = weight_of(mean, top[:, k][here])
    return loss, torch.where(weight > 1, 1.0, weight)
