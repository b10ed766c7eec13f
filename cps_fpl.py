# >>> method: header
"""CPS and FPL+CPS: Fuzzy Positive Learning (arXiv:2210.08519v2, CVPR 2023) on CPS (2106.01226).

Two networks teach each other on unlabelled images. CPS: each learns the other's likeliest class.
FPL: a pixel has K positive classes, more where its teacher is unsure (Alg. 1), and each of their
logits is pushed above all others (Eq. 7), with a weight (Eq. 11).

  Alg. 1                         cumulative_classes (n), fuzzy_positive_assignment (K)
  Eq. (7), (8), (9)              fuzzy_positive_regularization
  Eq. (11), (16)                 adaptive_weight
  Eq. (1), (2)                   losses in main; cross_loss is CPS's L12 + L21
  supplement Eq. (1), (4)        negative_loss, soft_loss (its Table 4)
  supplement Tables 1-3, 5       T in preset, k_values
  Eq. (12)-(15), supp. Sec. 3    results/analysis.py
  CPS: network, CutMix           CPSHead, toggled_mask

  python cps_fpl.py                                       # generated shapes, no data needed
  python cps_fpl.py --dataset camvid --split 1/8 --recipe official
  torchrun --nproc_per_node 8 cps_fpl.py --dataset cityscapes --split 1/16 --T 0.9

Measured: the table in README.md. Paper, released code and this script: docs/cps_fpl.md.
"""
# <<< method: header

# ---- 1. Imports ------------------------------------------------------------------------------

import time
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from common import Refusal, distributed, metrics
from common.data import IGNORE
from common.run import Run, cells, describe, launch, load_checkpoint, load_networks, report
from common.weights import load_backbone
from sources import load

# isort: split
# >>> method: imports
# <<< method: imports

# ---- 2. Recipe -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Args:
    """Every flag. None: the preset of data set, split, backbone and recipe decides."""

    # run
    out: str = ""  # run folder; left out: runs/<script>-<dataset>-<split>-s<seed>
    seed: int = 0  # of weights, sample stream and augmentation
    resume: bool = False  # go on from last.pt in the run folder (from zero if there is none)
    eval_only: bool = False  # score --checkpoint on the --eval-on images, and stop
    checkpoint: str = ""  # a last.pt or best.pt, for --eval-only
    eval_on: Literal["val", "test"] = "val"  # which images --eval-only scores
    dry_run: bool = False  # print the resolved recipe and the files found, and stop
    list_presets: bool = False  # print the papers' cells with their mIoU, and stop
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there is one, or CPU
    workers: int | None = None  # loader processes per stream and training process
    amp: Literal["none", "bf16"] = "none"  # bf16: networks in bfloat16, losses in float32
    compile: bool = False  # torch.compile the networks that train
    deterministic: bool = False  # deterministic operations only
    log_every: int | None = None  # steps
    eval_every: int | None = None  # steps
    save_every: int | None = None  # steps between checkpoints
    pictures_every: int | None = None  # steps between panels; 0: none
    tensorboard: bool = False  # TensorBoard events too, if it is installed
    # data
    dataset: Literal["shapes", "camvid", "voc", "voc_aug", "cityscapes", "folder"] = "shapes"
    data_root: str = ""  # folder of the data set; left out: data/<dataset>
    split: str | None = None  # labelled share: all, 1/r, or a count of VOC's 1,464
    split_family: Literal["cps", "u2pl", "cac0", "cac1", "cac2"] | None = None  # whose 1/r it is
    split_seed: int | None = None  # None: every r-th image; a number: a random subset
    labeled_list: str = ""  # file of labelled images, in place of --split
    unlabeled_list: str = ""  # file of unlabelled images; left out: all others
    num_classes: int = 0  # of --dataset folder
    ignore_index: int = 255  # of --dataset folder: the value in a mask that is no class
    crop_size: int | None = None  # pixels, square
    scales: tuple[float, ...] | None = None  # random scale: two values a range, more a choice
    # network
    backbone: Literal["resnet18", "resnet50", "resnet101"] | None = None
    stem: Literal["classic", "deep", "v1c"] | None = None  # 7x7; three 3x3, released; narrow
    weights: str | None = None  # of the backbone: none (random), auto (ImageNet's) or a file
    init: str = ""  # a last.pt or best.pt of any of these scripts to start from
    output_stride: Literal[8, 16] | None = None  # of the backbone's last stage
    aspp_rates: tuple[int, ...] | None = None  # dilations of ASPP's 3x3 convolutions, in cells
    # optimization
    recipe: Literal["paper", "official"] = "paper"  # as printed, or as the released code computes
    batch_size: int | None = None  # labelled images per step, over all processes
    total_iters: int | None = None  # optimizer steps
    lr: float | None = None  # of the backbone; decays as (1 - step / total)^0.9
    lr_head: float | None = None  # of the head, as a multiple of --lr
    weight_decay: float | None = None  # of SGD
    decay_on: Literal["all", "weights"] | None = None  # weights: not on BN and biases
    aux_weight: float | None = None  # of the auxiliary head's loss; 0: no such head
    ohem_kept: float | None = None  # OHEM: share of an image's pixels kept at least; 0: no OHEM
    # evaluation
    protocol: Literal["whole", "slide"] | None = None  # an image in one piece, or in windows
    # >>> method: args
    batch_size_unlabeled: int | None = None  # unlabelled images per step (mixed, with --cutmix)
    unsup_loss: Literal["fpl", "ce", "soft", "negative"] = "fpl"  # ce: CPS; others: supp. Table 4
    unsup_weight: float | None = None  # beta in Eq. (1); 0: labelled images alone
    T: float | None = None  # upper bound of the cumulative probability, in (0, 1)
    k_strategy: Literal["n-1", "n", "fixed2", "fixed3", "step"] = "n-1"  # supplement Table 5
    k_max: int | None = None  # K at most; 0: no cap
    strict: bool | None = None  # cumulative probability > T, as printed; False: >= T
    weight: Literal["concave", "linear", "convex", "none"] = "concave"  # Eq. (11), (16) [D22]
    mean_over: Literal["positives", "positives_and_next"] | None = None  # the mean in that weight
    balance: bool | None = None  # rescale the cross loss to the value of cross-entropy
    cutmix: bool = True  # the networks learn mixed images, and teach on clean ones
    same_image_cutmix: bool = False  # mix two crops of one image, as released
    evaluate: Literal["branch1", "branch2", "mean"] = "branch1"  # mean: of the probabilities
    # <<< method: args


def preset(args):
    """Returns {flag: value} for the data set, split and backbone of args under its recipe."""
    # >>> method: presets
    city, voc = args.dataset == "cityscapes", args.dataset.startswith("voc")
    values = dict(backbone="resnet101", stem="v1c", output_stride=16, protocol="slide")  # [D9]
    values |= dict(scales=(0.5, 0.75, 1.0, 1.5, 1.75, 2.0), decay_on="weights", aux_weight=0.0)
    values |= dict(aspp_rates=(6, 12, 18), batch_size=8, lr=0.0025, lr_head=1.0)  # [D10]
    values |= dict(weights="auto", workers=4, log_every=50, eval_every=1000, pictures_every=5000)
    values |= dict(crop_size=512, weight_decay=4e-4, total_iters=39_680, save_every=500)  # [D11]
    values |= dict(split_family="cps", ohem_kept=0.0)
    if city:
        values |= dict(crop_size=800, weight_decay=8e-4, total_iters=44_640, ohem_kept=5 / 64)
    elif not voc:
        values |= dict(backbone="resnet50", stem="classic", protocol="whole", split="all")
    if args.dataset in ("camvid", "shapes"):  # this project's small protocols [D8]
        values |= dict(weights="none", workers=2, batch_size=4, lr=0.01, lr_head=2.0, split="1/8")
        values |= dict(weight_decay=1e-4, crop_size=128, total_iters=600, scales=(0.5, 2.0))
        values |= dict(log_every=10, eval_every=150, save_every=150, pictures_every=300)
        values |= dict(backbone="resnet18", aspp_rates=(1, 2, 3))  # 8 cells: wide taps never learn
    if args.dataset == "shapes":
        values |= dict(split="1/16", crop_size=64, total_iters=40, lr=0.02, scales=(0.75, 1.5))
    values["batch_size_unlabeled"] = args.batch_size or values["batch_size"]
    values["unsup_weight"] = 5.0 + (not args.cutmix) if city else 1.0 + 0.5 * (not args.cutmix)
    bounds = {  # T, supplement Tables 1, 2 without and with CutMix: 1/4, 1/8, 1/16 (, 1/32)
        ("cityscapes", "resnet50"): ((0.90, 0.90, 0.90, 0.95), (0.85, 0.85, 0.85, 0.90)),
        ("cityscapes", "resnet101"): ((0.90, 0.95, 0.95, 0.95), (0.85, 0.85, 0.85, 0.90)),
        ("voc_aug", "resnet50"): ((0.90, 0.90, 0.90), (0.90, 0.90, 0.95)),
        ("voc_aug", "resnet101"): ((0.90, 0.90, 0.95), (0.90, 0.90, 0.90)),
    }
    row = bounds.get((args.dataset, args.backbone or values["backbone"]), ((), ()))[args.cutmix]
    values["T"] = dict(zip(("1/4", "1/8", "1/16", "1/32"), row, strict=False)).get(args.split, 0.9)
    few = {"92": (0.95, 0.1), "183": (0.85, 0.5), "366": (0.85, 0.5), "732": (0.85, 0.5)}  # [D12]
    if args.dataset == "voc" and args.cutmix and args.split in few:
        values["T"], values["unsup_weight"] = few[args.split]
    paper = dict(k_max=0, strict=True, mean_over="positives", balance=False)
    official = dict(k_max=3, strict=False, mean_over="positives_and_next", balance=True)
    return values | {"paper": paper, "official": official}[args.recipe]
    # <<< method: presets


# ---- 3. Method -------------------------------------------------------------------------------


def cross_entropy(logits, label):
    """U2PL Eq. (2): mean of -log p_label over the pixels with label != 255; 0 if there is none.

    logits: (B, C, H, W) of any float type. label: (B, H, W) int64 in [0, C) or 255. A scalar.
    """
    nll = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    return nll.sum() / (label != IGNORE).sum().clamp(min=1)


def ohem_cross_entropy(logits, label, threshold, min_kept):
    """Cross-entropy over hard pixels: p_label <= max(threshold, the min_kept-th smallest p_label).

    logits: (B, C, H, W). label: (B, H, W) int64 in [0, C) or 255. threshold: probability in [0, 1].
    min_kept: pixels per image kept at least (all, if an image has fewer valid ones). Chosen and
    averaged per image, then averaged over images [D1]. A scalar, 0 if nothing is valid.
    """
    nll = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none").flatten(1)
    valid = (label != IGNORE).flatten(1)
    p = torch.exp(-nll.detach()).masked_fill(~valid, float("inf"))
    rank = min(max(min_kept, 1), p.shape[1])
    limit = p.kthvalue(rank, dim=1, keepdim=True).values.clamp(min=threshold)
    kept = valid & (p <= limit)
    return ((nll * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()


def supervised_loss(out, label, args):
    """U2PL L_s: cross-entropy or OHEM of the main head, plus aux_weight times the auxiliary's.

    out: the network's dict for the labelled images. label: (B, H, W) int64. A scalar.
    """
    losses = []
    for logits in (out["logits"], out.get("aux")):
        if logits is not None and args.ohem_kept:
            pixels = round(args.ohem_kept * args.crop_size**2)
            losses.append(ohem_cross_entropy(logits, label, 0.7, pixels))
        elif logits is not None:
            losses.append(cross_entropy(logits, label))
    return losses[0] + (args.aux_weight * losses[1] if len(losses) > 1 else 0.0)


# >>> method: functions
# Shapes: logits_s, prob_t, p, order (B, C, H, W); K and every result (B, H, W). s: the network that
# learns. t: the one that teaches; no gradient reaches it.


def upcast(x):
    """Returns x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def by_rank(prob_t):
    """Returns (p, order): p^1 >= p^2 >= ... of Alg. 1, and whose they are. Ties: lowest class."""
    return prob_t.sort(dim=1, descending=True, stable=True)


def cumulative_classes(p, T, strict=True):
    """Alg. 1, n: how many of the likeliest classes it takes until V^n > T (or >= T [D14])."""
    V = p.cumsum(1)
    below = V <= T if strict else V < T
    return (below.sum(1) + 1).clamp(max=p.shape[1])


def fuzzy_positive_assignment(p, T, *, k_max=0, strict=True):
    """Alg. 1: K = max(n - 1, 1) positive classes, int64; at most k_max, if that is not 0 [D13]."""
    K = (cumulative_classes(p, T, strict) - 1).clamp(min=1)
    return K.clamp(max=k_max) if k_max else K


def fuzzy_positive_regularization(logits_s, order, K):
    """Eq. (7): log(1 + sum_{i in Y} e^{-z^i} * sum_{j not in Y} e^{z^j}), Y the K likeliest.

    Its gradient is Eq. (8). Cross-entropy where K = 1 (Eq. 9); 0 where K = C leaves no negative.
    """
    z = upcast(logits_s)
    first_K = torch.arange(z.shape[1], device=z.device).view(-1, 1, 1) < K[:, None]
    Y = torch.zeros_like(first_K).scatter(1, order, first_K)
    positives = (-z).masked_fill(~Y, -torch.inf).logsumexp(1)  # -min, Eq. (6)
    negatives = z.masked_fill(Y, -torch.inf).logsumexp(1)  # max
    return F.softplus(positives + negatives)


def adaptive_weight(p, K, kind="concave", mean_over="positives"):
    """Eq. (11), concave with A = 50, or Eq. (16), linear and convex; none: 1. In [0, 1].

    mean_over="positives_and_next": the mean of K + 1 classes, as released [D15].
    """
    total = p.cumsum(1).gather(1, K[:, None] - 1)[:, 0]
    rest = F.pad(p, (0, 0, 0, 0, 0, 1)).gather(1, K[:, None])[:, 0]  # max over j not in Y, or 0
    mean = total / K if mean_over == "positives" else (total + rest) / (K + 1)
    gap = (mean - rest).clamp(min=0)  # below 0 by rounding only
    if kind == "concave":
        return torch.log1p(50 * gap) / torch.log1p(50 * mean)
    other = {"linear": gap / mean, "convex": gap / (mean + 4 * rest), "none": torch.ones_like(gap)}
    return other[kind]


def soft_loss(logits_s, prob_t):
    """Supplement Eq. (4), sum_i q^i log(q^i / p^i); q = prob_t, p of the student."""
    log_p = F.log_softmax(upcast(logits_s), 1)
    return F.kl_div(log_p, upcast(prob_t.detach()), reduction="none").sum(1)


def negative_loss(logits_s, prob_t, threshold=0.2):
    """Supplement Eq. (1), -sum_j log(1 - p^j), p the student's, over classes with prob_t < 0.2."""
    log_p = F.log_softmax(upcast(logits_s), 1)
    top = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, log_p.argmax(1, True), True)
    others = log_p.masked_fill(top, -torch.inf)  # 1 - p^top is their sum: nothing cancels
    log_not = torch.where(top, others.logsumexp(1, True), torch.log1p(-others.exp()))
    return -(log_not * (upcast(prob_t) < threshold)).sum(1)


def k_values(p, phase, args):
    """K by --k-strategy: Alg. 1, its n, 2, 3, or 3, 2, 1 by thirds of training (supp. Table 5)."""
    if args.k_strategy == "n-1":
        return fuzzy_positive_assignment(p, args.T, k_max=args.k_max, strict=args.strict)
    K = cumulative_classes(p, args.T, args.strict)
    if args.k_strategy != "n":
        third = min(int(3 * phase), 2)
        K = torch.full_like(K, {"fixed2": 2, "fixed3": 3, "step": 3 - third}[args.k_strategy])
    return K.clamp(max=min(args.k_max or p.shape[1], p.shape[1]))


def masked_mean(x, mask):
    """Mean of x over the pixels where mask is True; 0 over none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def cross_loss(students, teachers, inside, phase, args):
    """CPS's L12 + L21: network 1 learns from 2, 2 from 1. Returns (what is minimized, parts).

    students, teachers: logits of both. inside: (B, H, W) bool, the pixels that count. parts: unsup,
    the sum; balance: its cross-entropy / unsup, a factor of FPL with --balance [D16].
    """
    unsup, ce = 0.0, 0.0
    for logits_s, logits_t in zip(students, reversed(teachers), strict=True):
        prob_t = F.softmax(upcast(logits_t.detach()), 1)
        pseudo = prob_t.argmax(1).masked_fill(~inside, IGNORE)
        if args.unsup_loss == "ce":
            loss = cross_entropy(logits_s, pseudo)  # FPL Eq. (2)
        elif args.unsup_loss == "fpl":
            p, order = by_rank(prob_t)
            K = k_values(p, phase, args)
            weight = adaptive_weight(p, K, args.weight, args.mean_over)
            loss = masked_mean(weight * fuzzy_positive_regularization(logits_s, order, K), inside)
        else:
            distance = soft_loss if args.unsup_loss == "soft" else negative_loss
            loss = masked_mean(distance(logits_s, prob_t), inside)
        unsup += loss
        ce += loss.detach() if args.unsup_loss == "ce" else cross_entropy(logits_s.detach(), pseudo)
    balance = torch.where(unsup > 0, ce / unsup.detach().clamp(min=1e-12), 1.0)
    factor = balance if args.balance and args.unsup_loss == "fpl" else 1.0
    return unsup * factor, {"unsup": unsup.detach(), "balance": balance}


@torch.no_grad()
def watch(logits, mask, label, phase, args):
    """Returns 0-dim means over mask, (B, H, W) bool, on every fourth pixel of every fourth row.

    logits: of both networks. Without label: K; K_gt_1, the share with K > 1 (Fig. 4a); weight. With
    label, (B, H, W): pseudo_acc, the likeliest class is right; coverage, the truth is a positive.
    """
    p, order = by_rank(F.softmax(upcast(torch.cat(logits)[..., ::4, ::4]), 1))
    K = k_values(p, phase, args)
    weight = adaptive_weight(p, K, args.weight, args.mean_over)
    maps = {"K": K, "K_gt_1": K > 1, "weight": weight}
    if label is not None:
        rank = (order == torch.cat([label, label])[:, None, ::4, ::4]).int().argmax(1)
        maps = {"pseudo_acc": rank == 0, "coverage": rank < K}
    mask = torch.cat([mask, mask])[..., ::4, ::4]
    return {name: masked_mean(x, mask) for name, x in maps.items()}


def toggled_mask(rng, size, device="cpu"):
    """CPS's CutMix: three boxes of 1/12 to 1/6 of the crop toggle what they cover [D17]: bool."""
    mask = torch.zeros(1, size, size, dtype=torch.bool, device=device)
    for _ in range(3):
        area = rng.uniform(0.25, 0.5)
        tall = area ** rng.uniform()
        h, w = (round(size * side * 3**-0.5) for side in (tall, area / tall))
        y, x = (round((size - side) * rng.uniform()) for side in (h, w))
        mask[:, y : y + h, x : x + w].logical_not_()
    return mask


def partner(args):
    """The stream that the unlabelled images are mixed with: other images, or other crops [D18]."""
    return "unlabeled.2" if args.same_image_cutmix else "partner"


def cutmix_masks(args, step, group):
    """This process's masks of a step, (B, 1, H, W) bool: a function of (seed, step) [D17]."""
    rng = np.random.default_rng([args.seed, step])  # all masks are drawn by all processes
    total, size = args.batch_size_unlabeled, args.crop_size
    masks = torch.stack([toggled_mask(rng, size, group.device) for _ in range(total)])
    return masks.chunk(group.world)[group.rank]


class Average(nn.ModuleList):
    """Networks scored as one: "logits" is the logarithm of their mean probabilities."""

    def forward(self, x):
        log_p = torch.stack([F.log_softmax(net(x)["logits"], 1) for net in self])
        return {"logits": log_p.logsumexp(0) - np.log(len(self))}  # finite where all p round to 0


# <<< method: functions

# ---- 4. Model --------------------------------------------------------------------------------


def make_backbone(args):
    """Returns torchvision's ResNet without its classifier, with the stem and stride of args.

    Deep stems are three 3x3 convolutions: 64, 64, 128 channels (deep) or 32, 32, 64 (v1c) [D9]. At
    output stride 16 (8) the blocks of layer4 have dilations 2, 4, 8 (4, 8, 16): multi-grid [D6].
    """
    net = torchvision.models.get_model(args.backbone, weights=None)
    del net.fc, net.avgpool
    if args.stem != "classic":
        wide, last = (64, 128) if args.stem == "deep" else (32, 64)

        def unit(inputs, outputs, stride):
            """Convolution, BN, ReLU."""
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)

        third = nn.Conv2d(wide, last, 3, 1, 1, bias=False)
        net.conv1 = nn.Sequential(*unit(3, wide, 2), *unit(wide, wide, 1), third)
        net.bn1, net.inplanes = nn.BatchNorm2d(last), last
        net.layer1 = net._make_layer(type(net.layer1[0]), 64, len(net.layer1))
        for module in (*net.conv1.modules(), *net.layer1.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    load_backbone(net, args.weights, args.backbone, args.stem)
    base = 32 // args.output_stride
    if base == 4:
        dilate(net.layer3, [1] + [2] * (len(net.layer3) - 1))
    dilate(net.layer4, [base, 2 * base, 4 * base][: len(net.layer4)])
    return net


def dilate(stage, dilations):
    """Takes the stride out of a ResNet stage; the 3x3 convolutions of each block get a dilation."""
    for block, d in zip(stage, dilations, strict=True):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (d, d)


# >>> method: head
class CPSHead(nn.Module):
    """CPS's released head: ASPP with LeakyReLU, pooled branch added, low level 48, no dropout.

    forward: as DeepLabV3Plus of supervised.py; a dict of logits (B, C, H, W) in float32.
    """

    def __init__(self, channels, num_classes, args):
        super().__init__()

        def conv(inputs, kernel=1, dilation=1):
            """Convolution to 256 channels of the same size."""
            return nn.Conv2d(inputs, 256, kernel, 1, kernel // 2 * dilation, dilation, bias=False)

        def norm(inputs):
            """BN and LeakyReLU."""
            return nn.Sequential(nn.BatchNorm2d(inputs), nn.LeakyReLU(0.01, inplace=True))

        branches = [conv(channels[3]), *(conv(channels[3], 3, r) for r in args.aspp_rates)]
        self.branches, wide = nn.ModuleList(branches), 256 * len(branches)
        self.project = nn.Sequential(norm(wide), conv(wide))
        self.pool = nn.Sequential(conv(channels[3]), norm(256), conv(256))
        self.norm = norm(256)
        self.low = conv_bn_relu(channels[0], 48, 1)
        self.decode = nn.Sequential(conv_bn_relu(304, 256, 3), conv_bn_relu(256, 256, 3))
        self.classify = nn.Conv2d(256, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, stages, size):
        low, high = self.low(stages[0]), stages[3]
        pooled = self.pool(high.mean((2, 3), keepdim=True))
        aspp = self.norm(self.project(torch.cat([b(high) for b in self.branches], 1)) + pooled)
        aspp = upsample(aspp, low.shape[2:]).to(low.dtype)  # float32 under CUDA's autocast
        x = self.decode(torch.cat([low, aspp], 1))
        return {"logits": upsample(self.classify(x).float(), size)}


# <<< method: head


def conv_bn_relu(inputs, outputs, kernel, dilation=1, bias=False):
    """Returns convolution (same size), BN, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2 * dilation, dilation, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def upsample(x, size):
    """Bilinear with align_corners=True, as all released networks do."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, RGB, 0..255


class Network(nn.Module):
    """Backbone and head. forward: (B, 3, H, W) uint8 RGB in 0..255 -> the head's dict."""

    def __init__(self, args, num_classes, head):
        super().__init__()
        self.amp = args.amp == "bf16"
        self.backbone = make_backbone(args)
        channels = [(1 if args.backbone == "resnet18" else 4) * c for c in (64, 128, 256, 512)]
        self.head = head(channels, num_classes, args)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        h = ((x.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        net, stages = self.backbone, []
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            h = net.maxpool(net.relu(net.bn1(net.conv1(h))))
            for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
                h = stage(h)
                stages.append(h)
            return self.head(stages, x.shape[2:])


def build(args, num_classes, head, group):
    """Returns a Network on the device: channels last, SyncBN on CUDA with several processes."""
    net = Network(args, num_classes, head).to(group.device, memory_format=torch.channels_last)
    sync = group.world > 1 and group.device.type == "cuda"
    return nn.SyncBatchNorm.convert_sync_batchnorm(net) if sync else net


def parallel(net, args, group):
    """Returns net as training calls it: in DDP with several processes, compiled if asked."""
    if group.world > 1:
        ids = [group.device.index] if group.device.type == "cuda" else None
        net = nn.parallel.DistributedDataParallel(net, device_ids=ids)
        net.broadcast_buffers = False  # BN: synchronized on CUDA, copied after the step on CPU
    return torch.compile(net) if args.compile else net


# ---- 5. Data and augmentation ----------------------------------------------------------------


def augment(image, label, rng, crop, scales):
    """Random scale, flip and crop in one warp; a result that is too small is padded around.

    image: PIL RGB. label: PIL L or None. crop: pixels. scales: two values are a range whose halves
    below and above 1 are equally likely, more are a choice. Returns (3, crop, crop) uint8,
    (crop, crop) uint8 or None, and inside (crop, crop) bool. Kernel: bilinear without antialiasing,
    as all released code [D3], nearest for the label. Padding: mean colour, 255 [D2], inside False.
    """
    (w, h), low, high = image.size, scales[0], scales[-1]
    if len(scales) != 2:
        scale = float(rng.choice(scales))
    elif low < 1 < high:
        scale = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    else:
        scale = rng.uniform(low, high)
    nw, nh = max(int(w * scale), 1), max(int(h * scale), 1)  # the whole image after scaling
    flip = rng.random() < 0.5
    x, y = ((n - crop) // 2 if n < crop else int(rng.integers(n - crop + 1)) for n in (nw, nh))
    sx, sy = w / nw, h / nh
    warp = (-sx, 0, w - x * sx, 0, sy, y * sy) if flip else (sx, 0, x * sx, 0, sy, y * sy)

    def apply(picture, kernel, fill):
        """The warped picture as an array."""
        mode = Image.Transform.AFFINE
        return np.array(picture.transform((crop, crop), mode, warp, kernel, fillcolor=fill))

    pixels = apply(image, Image.Resampling.BILINEAR, tuple(round(m) for m in MEAN))
    columns, rows = np.arange(x, x + crop), np.arange(y, y + crop)
    inside = np.outer((0 <= rows) & (rows < nh), (0 <= columns) & (columns < nw))
    label = label and apply(label, Image.Resampling.NEAREST, IGNORE)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), label, inside


class Samples(Dataset):
    """Sample number -> dict of image, inside and, if masks are opened, label (int64).

    A function of (seed, stream, number) alone. The images come in rounds, each in a new order [D4];
    stream "a.b" takes them in the order of stream "a", with an augmentation of its own.
    """

    def __init__(self, data, items, with_label, scales, stream, args):
        self.data, self.items, self.with_label = data, items, with_label
        self.crop, self.scales = args.crop_size, scales
        names = (stream.split(".")[0], stream)
        self.order, self.warp = ([args.seed, zlib.crc32(name.encode())] for name in names)

    def which(self, number):
        """Returns the index of the item that sample `number` shows."""
        lap, place = divmod(number, len(self.items))
        return np.random.default_rng([*self.order, 0, lap]).permutation(len(self.items))[place]

    def __getitem__(self, number):
        return self.sample(self.which(number), number)

    def sample(self, index, number):
        """Returns the item of this index as sample `number` would show it."""
        image, label = self.data.read(self.items[index], self.with_label)
        rng = np.random.default_rng([*self.warp, 1, number])
        image, label, inside = augment(image, label, rng, self.crop, self.scales)
        sample = {"image": torch.from_numpy(image), "inside": torch.from_numpy(inside)}
        return sample if label is None else sample | {"label": torch.from_numpy(label).long()}


def streams(data, args):
    """Returns {name: (items, images per step over all processes, open the masks?, scales)}."""
    # >>> method: draw
    drawn = {"labeled": (data.labeled, args.batch_size, True, args.scales)}
    names = ["unlabeled", partner(args)] if args.cutmix else ["unlabeled"]
    for name in names if args.unsup_weight else []:
        drawn[name] = (data.unlabeled, args.batch_size_unlabeled, False, args.scales)
    return drawn
    # <<< method: draw


def open_stream(name, data, args, group, start):
    """Returns an iterator over this process's batches of a stream, from step start to the end."""
    items, batch, with_label, scales = streams(data, args)[name]
    here = distributed.share(batch, group, name)
    if not items:
        what = "that --labeled-list leaves" if args.labeled_list else f"in --split {args.split}"
        raise Refusal(f"no {name} images {what} of {args.dataset}: label fewer")
    if here < 2 and not (group.world > 1 and group.device.type == "cuda"):
        raise Refusal(f"{here} {name} image per process: plain BN needs two, enlarge the batch")
    first = [step * batch + group.rank * here for step in range(start, args.total_iters)]
    samples = Samples(data, items, with_label, scales, name, args)
    batches = [range(n, n + here) for n in first]
    options = dict(num_workers=args.workers, pin_memory=group.device.type == "cuda")
    # a generator of its own: the global one stays a function of the step
    options |= dict(generator=torch.Generator(), worker_init_fn=distributed.unstoppable)
    return iter(DataLoader(samples, batch_sampler=batches, **options))


# ---- 6. Evaluation ---------------------------------------------------------------------------


class Images(Dataset):
    """Index -> (image (3, H, W) uint8, label (H, W) uint8) at the image's own size."""

    def __init__(self, data, items):
        self.data, self.items = data, items

    def __getitem__(self, index):
        image, label = self.data.read(self.items[index], True)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(label))


def predict(net, image, args, num_classes):
    """Returns the logits (C, H, W) of one image, (3, H, W) uint8, by the protocol of args.

    whole: in one piece. slide: summed over square windows of crop_size, 2/3 of it apart, the last
    shifted inside; an image smaller than a window stands in the middle of the mean colour.
    """
    if args.protocol == "whole":
        return net(image[None])["logits"][0]
    (h, w), n, step = image.shape[1:], args.crop_size, -(-2 * args.crop_size // 3)
    top, left, down, right = max(n - h, 0) // 2, max(n - w, 0) // 2, max(h - n, 0), max(w - n, 0)
    canvas = image.new_tensor([[[round(m)]] for m in MEAN]).repeat(1, down + n, right + n)
    canvas[:, top : top + h, left : left + w] = image
    logits = torch.zeros(num_classes, *canvas.shape[1:], device=image.device)
    for y in range(0, down + step, step):
        for x in range(0, right + step, step):
            y0, x0 = min(y, down), min(x, right)
            window = (slice(None), slice(y0, y0 + n), slice(x0, x0 + n))
            logits[window] += net(canvas[window][None])["logits"][0]
    return logits[:, top : top + h, left : left + w]


@torch.no_grad()
def evaluate(net, data, items, args, group):
    """Returns (scores of net in eval mode over items, panels of the first images).

    One confusion matrix over all images and processes; every image is seen once, unpadded [D5].
    """
    training = net.training
    net.eval()
    mine = range(group.rank, len(items), group.world)
    shown = mine[:: max(len(mine) // 4, 1)][:4]
    # beside gloo none: a child that is forked soon after a collective may hang (Python 3.11)
    workers = 0 if group.world > 1 and group.device.type == "cpu" else args.workers
    options = dict(num_workers=workers, generator=torch.Generator())
    options |= dict(sampler=mine, batch_size=None, worker_init_fn=distributed.unstoppable)
    loader = DataLoader(Images(data, items), **options)
    confusion = torch.zeros(2 * (data.num_classes,), dtype=torch.int64, device=group.device)
    maps = {"image": [], "label": [], "prediction": []}
    for index, (image, label) in zip(mine, loader, strict=True):
        pred = predict(net, image.to(group.device), args, data.num_classes).argmax(0)
        confusion += metrics.confusion_matrix(pred, label.to(group.device), data.num_classes)
        if index in shown:
            for name, shot in zip(maps, (image, label, pred), strict=True):
                maps[name].append(shot)
    net.train(training)
    return metrics.scores(distributed.reduced(confusion).cpu()), maps


# ---- 7. Training -----------------------------------------------------------------------------


def make_optimizer(trained, args):
    """Returns SGD (momentum 0.9) over the trained networks; "scale" is a group's multiple of lr."""
    groups = []
    for part, scale in (("backbone", 1.0), ("head", args.lr_head)):
        params = [p for net in trained for p in getattr(net, part).parameters()]
        for vector in (False, True):  # BN and biases are vectors, all other weights are not
            decay = 0.0 if vector and args.decay_on == "weights" else args.weight_decay
            some = [p for p in params if (p.ndim == 1) == vector]
            groups.append({"params": some, "scale": scale, "weight_decay": decay})
    return torch.optim.SGD(groups, args.lr, momentum=0.9)


def main(args):
    """Trains, or does what --eval-only, --dry-run or --list-presets ask; args as resolved."""
    if args.list_presets or args.dry_run:
        return print(cells(__file__) if args.list_presets else describe(args, load))
    group = distributed.setup(args.device)
    torch.use_deterministic_algorithms(args.deterministic)
    data = load(args)

    # -- networks --
    torch.manual_seed(args.seed)
    # >>> method: networks
    trained = [build(args, data.num_classes, CPSHead, group) for _ in (1, 2)]
    branches = [parallel(net, args, group) for net in trained]
    networks = {"branch1": trained[0], "branch2": trained[1]}

    def scored(step):
        """The network that evaluation scores [D19]."""
        return (networks | {"mean": Average(trained)})[args.evaluate]

    # <<< method: networks
    if args.eval_only:
        step = load_networks(load_checkpoint(args.checkpoint, __file__), networks)
        result, _ = evaluate(scored(step), data, getattr(data, args.eval_on), args, group)
        if group.rank == 0:
            print(report(data, {f"step {step}": result}, args.eval_on))
        return distributed.teardown()
    optimizer = make_optimizer(trained, args)
    # >>> method: state
    state = {}
    # <<< method: state
    run = Run(args, __file__, group, data)
    start = run.restore(networks, optimizer, state)
    batches = {name: open_stream(name, data, args, group, start) for name in streams(data, args)}

    # -- steps --
    for step in range(start, args.total_iters):
        begin = time.time()
        torch.manual_seed((args.seed * 1_000_003 + step) * 1024 + group.rank)  # dropout
        batch = {name: next(b) for name, b in batches.items()}
        spent = {"data": time.time() - begin}  # seconds
        for stream in batch.values():
            for key, tensor in stream.items():
                stream[key] = tensor.to(group.device, non_blocking=True)
        x_l, y_l = batch["labeled"]["image"], batch["labeled"]["label"]
        decay = (1 - step / args.total_iters) ** 0.9  # poly
        for params in optimizer.param_groups:
            params["lr"] = args.lr * params["scale"] * decay
        optimizer.zero_grad(set_to_none=True)
        # >>> method: losses
        phase, cross, parts = step / args.total_iters, 0.0, {}
        inside = batch["labeled"]["inside"]
        if args.unsup_weight and args.cutmix:
            u0, u1 = batch["unlabeled"], batch[partner(args)]
            mask = cutmix_masks(args, step, group)  # True: the partner is shown
            x_u = torch.where(mask, u1["image"], u0["image"])
            inside = torch.where(mask[:, 0], u1["inside"], u0["inside"])
            teachers = []
            with torch.no_grad():  # in training mode: clean views move BN's statistics too [D20]
                for net in branches:
                    z0, z1 = net(u0["image"])["logits"], net(u1["image"])["logits"]
                    teachers.append(torch.where(mask, z1, z0))
            with distributed.no_sync(branches[0]), distributed.no_sync(branches[1]):
                students = [net(x_u)["logits"] for net in branches]
                cross, parts = cross_loss(students, teachers, inside, phase, args)
                (args.unsup_weight * cross).backward()  # now: frees its graph before the next one
            del students
        logits = [net(x_l)["logits"] for net in branches]
        sup = sum(supervised_loss({"logits": z}, y_l, args) for z in logits)
        if args.unsup_weight and not args.cutmix:  # labelled images teach as well [D21]
            z_u = [net(batch["unlabeled"]["image"])["logits"] for net in branches]
            teachers = [torch.cat(pair) for pair in zip(logits, z_u, strict=True)]
            inside = torch.cat([inside, batch["unlabeled"]["inside"]])
            cross, parts = cross_loss(teachers, teachers, inside, phase, args)
        loss = sup + args.unsup_weight * cross  # Eq. (1)
        (sup if args.cutmix else loss).backward()
        if args.unsup_weight:
            parts |= watch(teachers, inside, None, phase, args)
        parts = {"loss": loss, "sup": sup} | parts | watch(logits, y_l < IGNORE, y_l, phase, args)
        # <<< method: losses
        optimizer.step()
        # >>> method: after-step
        # <<< method: after-step
        if group.world > 1 and group.device.type == "cpu":  # there BN is not synchronized
            distributed.copy_buffers(*networks.values())
        done = step + 1
        run.step(done, parts, args.lr * decay, begin, spent)
        if run.due(done, args.pictures_every):
            # >>> method: panels
            prob_t = F.softmax(logits[1].detach(), 1)
            p, _ = by_rank(prob_t)
            K = k_values(p, phase, args)
            maps = {"image": x_l, "truth": y_l, "pseudo label": prob_t.argmax(1)}
            maps |= {"K: 1, 2, 3 or more": (K - 1) / 2, "branch 1": logits[0].argmax(1)}
            maps["weight"] = adaptive_weight(p, K, args.weight, args.mean_over)
            if args.unsup_weight and args.cutmix:
                maps |= {"mixed": x_u, "its pseudo label": teachers[1].argmax(1)}
            # <<< method: panels
            run.panels(f"{done:06d}-train", maps)
        if run.due(done, args.eval_every):
            run.keep_best(done, *evaluate(scored(done), data, data.val, args, group), networks)
        if run.due(done, args.save_every) or run.asked:  # by SIGTERM: it ends here
            run.keep_last(done, networks, optimizer, state)

    # -- last and best --
    on = "test" if data.test else "val"
    results = {"last": evaluate(scored(args.total_iters), data, getattr(data, on), args, group)[0]}
    best = load_networks(load_checkpoint(run.folder / "best.pt", __file__), networks)
    results["best"] = evaluate(scored(best), data, getattr(data, on), args, group)[0]
    run.finish(results, on)
    distributed.teardown()


if __name__ == "__main__":
    launch(Args, preset, main)
