"""AEL and FPL+AEL: Adaptive Equalization Learning (2110.05474), FPL (arXiv:2210.08519v2) on it.

A student learns from labels and from a mean teacher's pseudo labels. AEL keeps a bank of how sure
the student is of each class and shows it more of what it knows badly: regions by CutMix, labelled
pixels by Copy-Paste, pixels in the loss. FPL replaces the loss with one pseudo label by its own.

  FPL Alg. 1, Eq. (7)-(9), (11)   cumulative_classes to fuzzy_positive_loss, text of cps_fpl.py
  AEL Eq. (1)                     supervised_loss + unsup_weight * consistency_loss
  AEL Eq. (4), (7)                class_confidence, update_confidence
  AEL Eq. (9)                     sampling_probability, draw_classes
  AEL CutMix, Copy-Paste          draw_partners, partner_mask, presence; copy_paste
  AEL Eq. (12), (13)              consistency_loss, pixel_weight, equalization_rate
  A-FPL's T (code, IJCV 2025)     adaptive_assignment

  python ael_fpl.py                                       # generated shapes, no data needed
  python ael_fpl.py --dataset camvid --split 1/8 --unsup-loss ce
  torchrun --nproc_per_node 8 ael_fpl.py --dataset cityscapes --split 1/16 --T 0.9

CamVid with 6 labels, test mIoU: AEL 37.5, with FPL 38.4, labels alone 36.6 (three seeds).
Papers, released code [D30] and this script: docs/ael_fpl.md.
"""

# ---- 1. Imports ------------------------------------------------------------------------------

import math
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import ImageOps
from scipy import ndimage
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from common import Refusal, distributed, metrics
from common.checkpoints import load_checkpoint, load_networks
from common.data import IGNORE
from common.flags import (
    Above0,
    AtLeast0,
    Backbone,
    Count,
    Inside01,
    Number,
    Rising,
    Scales,
    Seed,
    Share,
    about,
    check_fit,
    fill,
    parse,
)
from common.fused import pick
from common.run import Run, Stopped, refusals, report
from common.sources import load
from common.weights import load_backbone, load_timm

# ---- 2. Recipe -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Args:
    """All flags. A flag left out takes its value from the recipe of its data set (section 2)."""

    # -- run --
    # folder of the run; left out: runs/<script>-<dataset>-<split>-<what differs>-s<seed>
    out: str = ""
    seed: Seed = 0  # of weights, sample stream and augmentation
    resume: bool = False  # go on from last.pt in the run folder (from zero if there is none)
    eval_only: bool = False  # score --checkpoint on the --eval-on images, and stop
    checkpoint: str = ""  # a last.pt or best.pt, for --eval-only
    eval_on: Literal["val", "test"] = "val"  # which images --eval-only scores
    dry_run: bool = False  # print the resolved recipe and the files found, and stop
    list_presets: bool = False  # print the papers' results with their flags, and stop
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there is one, else CPU
    workers: Number | None = None  # loader processes per stream and training process
    amp: Literal["none", "bf16"] = "none"  # bf16: networks in bfloat16, losses in float32
    compile: bool = False  # torch.compile the networks that train
    deterministic: bool = False  # allow deterministic operations only
    log_every: Count | None = None  # steps between lines of the log
    eval_every: Count | None = None  # steps between validations
    save_every: Count | None = None  # steps between checkpoints
    pictures_every: Number | None = None  # steps between panels; 0: none
    tensorboard: bool = False  # write TensorBoard events too, if it is installed
    track: Literal["none", "trackio", "wandb"] = "none"  # log there too, if it is installed
    # -- data --
    # which images: shapes are generated, folder is any of your own
    dataset: Literal[
        "shapes", "camvid", "voc", "voc_aug", "cityscapes", "coco", "ade20k", "folder"
    ] = "shapes"
    data_root: str = ""  # folder of the data set; left out: data/<dataset>
    cache: str = ""  # folder of decoded images, made by prepare_data.py cache
    split: str | None = None  # labelled share: all, 1/r, or a count of VOC's 1,464
    # whose published lists of that share
    split_family: Literal["cps", "u2pl", "cac0", "cac1", "cac2", "unimatch"] | None = None
    split_seed: Number | None = None  # left out: every r-th image; a number: a random subset
    labeled_list: str = ""  # file of labelled images, in place of --split
    unlabeled_list: str = ""  # file of unlabelled images; left out: all others
    num_classes: Number = 0  # classes of --dataset folder
    ignore_index: Number = 255  # of --dataset folder: the value of masks that is ignored
    crop_size: Count | None = None  # side of the square crops, in pixels
    scales: Scales | None = None  # random scale: two values are a range, more are a choice
    # >>> method: network
    # -- network --
    backbone: Backbone | None = None  # resnet18, resnet50, resnet101, or any of timm: timm/NAME
    # first layers, classic: one 7x7; deep: three 3x3 of 64, 64, 128 channels; v1c: 32, 32, 64
    stem: Literal["classic", "deep", "v1c"] | None = None
    weights: str | None = None  # of the backbone: none (random), auto (ImageNet's) or a file
    init: str = ""  # a last.pt or best.pt of any of these scripts to start from
    output_stride: Literal[8, 16] | None = None  # pixels per feature of the backbone's last stage
    multi_grid: bool | None = None  # dilations grow from block to block of that stage [D6]
    aspp_rates: tuple[Count, ...] | None = None  # dilations of ASPP, in features
    head_channels: Count | None = None  # width of the head
    # <<< method: network
    # -- optimization --
    # equations, sampling, loss weights as printed (paper) or released; rates, batches: equal
    recipe: Literal["paper", "official"] = "paper"
    batch_size: Count | None = None  # labelled images per step, over all processes
    total_iters: Count | None = None  # optimizer steps
    lr: Above0 | None = None  # rate of the backbone; decays as (1 - step / total)^0.9
    lr_head: AtLeast0 | None = None  # rate of the head, as a multiple of --lr
    weight_decay: Share | None = None  # coefficient, in the optimizer
    # parameters with weight decay, weights: not those of norms, not biases
    decay_on: Literal["all", "weights"] | None = None
    aux_weight: AtLeast0 | None = None  # of the auxiliary head's loss; 0: no such head
    ohem_kept: Share | None = None  # share of a crop's pixels that OHEM keeps at least; 0: none
    # -- evaluation --
    # whole: an image in one piece; slide: in overlapping windows
    protocol: Literal["whole", "slide"] | None = None
    # in evaluation BN has means over so many labelled batches; 0: its running statistics
    precise_bn: Number | None = None
    # >>> method: args
    # -- method --
    batch_size_unlabeled: Count | None = None  # mixed images per step, over all processes
    # loss of a pixel, fpl: FPL+AEL; ce: cross-entropy, AEL
    unsup_loss: Literal["fpl", "ce"] = "fpl"
    unsup_weight: AtLeast0 = 1.0  # of the consistency loss in AEL Eq. (1)
    # which images have a consistency loss, all: labelled ones too [D17]
    consistency_on: Literal["mixed", "all"] | None = None
    # upper bound of the cumulative probability; several: each pixel's own, by A-FPL [D35]
    T: Annotated[tuple[Inside01, ...], Rising(strict=True)] | None = None
    k_max: Number | None = None  # K at most; 0: no cap
    strict: bool | None = None  # cumulative probability > T, as printed; False: >= T
    # weight of a pixel, concave: FPL Eq. (11); linear, convex: Eq. (16) [D33]
    weight: Literal["concave", "linear", "convex", "none"] = "concave"
    # what that weight averages: the K positives, or also the next class (as released)
    mean_over: Literal["positives", "positives_and_next"] | None = None
    balance: bool | None = None  # rescale FPL's loss to the value of cross-entropy
    threshold: Share | None = None  # a pixel whose teacher is less confident has loss 0
    gamma: AtLeast0 = 2.0  # exponent of the teacher's confidence in AEL Eq. (13)
    beta: AtLeast0 = 1.0  # exponent of the rate of equalization sampling
    pooled: Count | None = None  # labelled images that are one group in AEL Eq. (4), (12)
    bank_momentum: Share | None = None  # share of the bank that AEL Eq. (7) keeps
    skip_absent: bool = False  # absent classes leave the bank as it is; False: they count 0
    cutmix: bool = True  # adaptive CutMix; off: the student sees unlabelled images unmixed [D34]
    region_area: Share | None = None  # CutMix: a region above this share is cut (AEL Table 6)
    bank_area: Share | None = None  # CutMix: share of a crop that makes a class present
    paste_draws: Number | None = None  # Copy-Paste: classes per group of --pooled images; 0: none
    paste_prob: Share | None = None  # Copy-Paste: share of labelled images that are pasted onto
    paste_power: AtLeast0 | None = None  # Copy-Paste: classes by softmax((1 - confidence)^power)
    paste_not: tuple[Number, ...] | None = None  # Copy-Paste: ids of classes never pasted
    paste_scales: Scales = (0.1, 2.0)  # Copy-Paste: random scale of what is pasted
    # mode of the teacher, eval: no dropout, BN averaged as the weights
    teacher_mode: Literal["train", "eval"] = "train"
    ema_decay: Share = 0.99  # of the teacher's moving average
    # FPL's loss, off: as written here; on: the twin in common/fused.py; auto: on where it is faster
    fused: Literal["auto", "on", "off"] = "auto"
    GROUPS: ClassVar[tuple] = ("pooled",)  # of a process's labelled images: common/flags.py
    # <<< method: args

    NEEDS: ClassVar[dict] = {  # flag: what it needs to act, as common/flags.py has it
        "data_root": "dataset!=shapes",
        "cache": "dataset!=shapes",
        "split_family": "dataset!=shapes|camvid|folder, no split_seed, split!=all|list",
        "split_seed": "split!=all, no labeled_list",
        "weights": "no init",
        # >>> method: network-needs
        "stem": "backbone=resnet18|resnet50|resnet101",
        "multi_grid": "backbone=resnet18|resnet50|resnet101",
        # <<< method: network-needs
        # >>> method: needs
        "unsup_loss": "unsup_weight",
        "consistency_on": "unsup_weight",
        "T": "unsup_weight, unsup_loss=fpl",
        "k_max": "unsup_weight, unsup_loss=fpl",
        "strict": "unsup_weight, unsup_loss=fpl",
        "weight": "unsup_weight, unsup_loss=fpl",
        "mean_over": "unsup_weight, unsup_loss=fpl, weight!=none",
        "balance": "unsup_weight, unsup_loss=fpl",
        "fused": "unsup_weight, unsup_loss=fpl",
        "threshold": "unsup_weight",
        "gamma": "unsup_weight",
        "beta": "unsup_weight",
        "cutmix": "unsup_weight",
        "region_area": "unsup_weight, cutmix",
        "bank_area": "unsup_weight, cutmix",
        "paste_prob": "paste_draws",
        "paste_power": "paste_draws",
        "paste_not": "paste_draws",
        "paste_scales": "paste_draws",
        # <<< method: needs
    }


# >>> method: recipe
# fmt: off
VOC = dict(
    backbone="resnet101", stem="v1c", weights="auto", output_stride=8, multi_grid=True,  # [D9]
    head_channels=256,
    split_family="cps", crop_size=513, scales=(0.5, 2.0),  # [D32]
    batch_size=16, batch_size_unlabeled=8,
    total_iters=39_680, lr=0.00125, lr_head=10.0, weight_decay=8e-4, decay_on="all",  # [D10] [D11]
    aux_weight=0.4, ohem_kept=50_000 / 513**2, protocol="slide", precise_bn=0, workers=4,
    pooled=2, bank_momentum=0.999, region_area=0.03, bank_area=0.03, paste_not=(0,),  # [D20] [D31]
    log_every=50, eval_every=1000, save_every=500, pictures_every=5000,
)
CITYSCAPES = VOC | dict(
    crop_size=769, total_iters=18_000, ohem_kept=50_000 / 769**2,
    region_area=0.005, bank_area=0.01, paste_not=(0, 1, 2, 8, 10),
)
COCO = VOC | dict(  # no paper's: as ESL supplement Table 2 has it
    backbone="timm/xception65.tf_in1k", output_stride=16, protocol="whole", split_family="unimatch",
)
FOLDER = VOC | dict(
    backbone="resnet50", stem="classic", split="all", protocol="whole", paste_not=(),
)
CAMVID = FOLDER | dict(  # this project's small protocols [D8]
    backbone="resnet18", weights="none", output_stride=16,
    split="1/8", crop_size=128, batch_size=4, total_iters=600,
    lr=0.01, lr_head=2.0, weight_decay=1e-4, aux_weight=0.0, ohem_kept=0.0,
    precise_bn=20, workers=2,
    bank_momentum=0.97, region_area=0.005, bank_area=0.01, paste_not=(0, 1, 3, 4, 5),
    log_every=10, eval_every=150, save_every=150, pictures_every=300,
)
SHAPES = CAMVID | dict(
    split="1/16", crop_size=64, scales=(0.75, 1.5), total_iters=80, lr=0.02,
    head_channels=64, region_area=0.03, bank_area=0.03, paste_not=(0,), workers=0,
)
PAPER = dict(
    k_max=0, strict=True, mean_over="positives", balance=False, threshold=0.0,
    consistency_on="mixed", paste_draws=3, paste_prob=1.0, paste_power=1.0,  # [D19]
)
OFFICIAL = dict(
    k_max=3, strict=False, mean_over="positives_and_next", balance=True, threshold=0.0,
    consistency_on="all", paste_draws=3, paste_prob=0.5, paste_power=0.5,
)
T_TABLE = {  # FPL supplement Tables 1 and 2: (data set, backbone): split -> T, where it is not 0.9
    ("cityscapes", "resnet50"): {"1/16": 0.95, "1/32": 0.95},
    ("cityscapes", "resnet101"): {"1/4": 0.85, "1/8": 0.85},
    ("voc_aug", "resnet50"): {"1/4": 0.95, "1/8": 0.95, "1/16": 0.95},
    ("voc_aug", "resnet101"): {"1/16": 0.95},
}
# fmt: on
DATASETS = {
    "shapes": SHAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "voc_aug": VOC,
    "cityscapes": CITYSCAPES,
    "coco": COCO,
    "ade20k": VOC | dict(protocol="whole", split_family="unimatch"),  # no paper's
    "folder": FOLDER,
}


def preset(args):
    """Returns {flag: value} for the data set, split and backbone of args under its recipe."""
    values = dict(DATASETS[args.dataset])
    if args.dataset in ("shapes", "camvid"):
        values["aspp_rates"] = (1, 2, 3)  # a crop of 128 is 8x8 there: wide taps never learn
        values["batch_size_unlabeled"] = args.batch_size or values["batch_size"]
    elif (args.output_stride or values["output_stride"]) == 16:
        values["aspp_rates"] = (6, 12, 18)
    else:
        values["aspp_rates"] = (12, 24, 36)
    table = T_TABLE.get((args.dataset, args.backbone or values["backbone"]), {})
    values["T"] = (table.get(args.split, 0.9),)
    if args.T and len(args.T) > 1 and args.fused == "on":
        raise Refusal("--fused on: the twin has one --T; leave --fused out")
    if args.recipe == "paper":
        return values | PAPER
    values = values | OFFICIAL
    if args.dataset.startswith("voc"):
        values["paste_draws"] = 1
        if args.unsup_loss == "ce":
            values["threshold"] = 0.7  # [D18]
    return values


# <<< method: recipe

# ---- 3. Method -------------------------------------------------------------------------------


# >>> method: functions
# Shapes: logits_s, logits_t, prob_t (B, C, H, W), by class; p, order (B, C, H, W), by rank, the
# teacher's likeliest class first; K and results of FPL (B, H, W). s: the student. t: its teacher;
# no gradient reaches it.


def upcast(x):
    """Returns x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def by_rank(prob_t):
    """Returns (p, order): p^1 >= p^2 >= ... of FPL Alg. 1 and their classes. Ties: lowest first."""
    return prob_t.sort(dim=1, descending=True, stable=True)


def cumulative_classes(p, T, strict=True):
    """FPL Alg. 1's n: the fewest likeliest classes with V^n > T, or >= T [D14]; C if none have."""
    V = p.cumsum(1)
    below = V <= T if strict else V < T
    return (below.sum(1) + 1).clamp(max=p.shape[1])


def fuzzy_positive_assignment(p, T, *, k_max=0, strict=True):
    """FPL Alg. 1: K = max(n - 1, 1) positive classes, int64; at most k_max, if not 0 [D13]."""
    K = (cumulative_classes(p, T, strict) - 1).clamp(min=1)
    if k_max:
        K = K.clamp(max=k_max)
    return K


def positive_set(order, K):
    """Y, the K likeliest classes of FPL Sec. 3.2: (B, C, H, W) bool, by class again."""
    first_K = torch.arange(order.shape[1], device=order.device).view(-1, 1, 1) < K[:, None]
    return torch.zeros_like(first_K).scatter(1, order, first_K)


def fuzzy_positive_regularization(logits_s, order, K):
    """FPL Eq. (7): log(1 + sum_{i in Y} e^{-z^i} * sum_{j not in Y} e^{z^j}).

    Y: the teacher's K likeliest classes. z: the student's logits. At least 0; no gradient through
    order and K; its gradient is Eq. (8). Cross-entropy where K = 1 (Eq. 9); 0 where K = C leaves no
    negative.
    """
    z = upcast(logits_s)
    Y = positive_set(order, K)
    positives = (-z).masked_fill(~Y, -torch.inf).logsumexp(1)  # the smooth -min of Eq. (6)
    negatives = z.masked_fill(Y, -torch.inf).logsumexp(1)  # its smooth max
    return F.softplus(positives + negatives)


def adaptive_weight(p, K, kind="concave", mean_over="positives"):
    """FPL Eq. (11), concave: log(1 + A (mean - next)) / log(1 + A mean), A = 50. In [0, 1].

    mean: of the K positives' p; "positives_and_next": of K + 1 classes, as released [D15]. next:
    the largest p of a negative. Eq. (16), linear: (mean - next) / mean; convex: (mean - next) /
    (mean + 4 next). none: 1.
    """
    positive_sum = p.cumsum(1).gather(1, K[:, None] - 1)[:, 0]  # over i in Y
    padded = F.pad(p, (0, 0, 0, 0, 0, 1))  # a class C + 1 of p = 0: K = C has a negative too
    next_p = padded.gather(1, K[:, None])[:, 0]  # p^{K+1}, the max over j not in Y
    mean = positive_sum / K
    if mean_over == "positives_and_next":
        mean = (positive_sum + next_p) / (K + 1)
    gap = (mean - next_p).clamp(min=0)  # below 0 by rounding only
    if kind == "none":
        return torch.ones_like(gap)
    if kind == "concave":
        return torch.log1p(50 * gap) / torch.log1p(50 * mean)
    return gap / (mean + {"linear": 0, "convex": 4}[kind] * next_p)


def fuzzy_positive_loss(
    logits_s, logits_t, T, *, k_max=0, strict=True, weight="concave", mean_over="positives"
):
    """Every pixel's loss: FPL Eq. (7) times its weight, Eq. (11). Logits of any float type.

    The definition; common/fused.py has a fast twin of this name (--fused).
    """
    p, order = by_rank(F.softmax(upcast(logits_t.detach()), 1))
    K = fuzzy_positive_assignment(p, T, k_max=k_max, strict=strict)
    loss = fuzzy_positive_regularization(logits_s, order, K)
    return loss * adaptive_weight(p, K, weight, mean_over)


def adaptive_assignment(logits_t, inside, args):
    """A-FPL's K (its code, IJCV 2025), int64: by the T of --T that fits a pixel's neighbours best.

    d: 1 / K on the pixel's K positives. q: each class's share of the positives of its neighbours,
    which are the other pixels of the 5x5 square around it that are not padding. Best is the
    smallest KL(q || d), with 1e-6 added to q and d; of equal ones the lowest T.
    """
    p, order = by_rank(F.softmax(upcast(logits_t.detach()), 1))
    best = torch.full_like(p[:, 0], torch.inf)
    chosen = torch.zeros_like(order[:, 0])
    for T in args.T:
        K = fuzzy_positive_assignment(p, T, k_max=args.k_max, strict=args.strict)
        Y = positive_set(order, K).to(p.dtype)
        counted = Y * inside[:, None]
        around = F.avg_pool2d(counted, 5, 1, 2, divisor_override=1) - counted
        q = around / around.sum(1, True).clamp(min=1) + 1e-6
        d = Y / K[:, None] + 1e-6
        distance = (q * (q.log() - d.log())).sum(1)
        chosen = torch.where(distance < best, K, chosen)
        best = torch.minimum(distance, best)
    return chosen


def pixel_fpl(logits_s, logits_t, K, args):
    """FPL's loss of every pixel by the flags. K: A-FPL's, of several --T; None: Alg. 1's."""
    if K is not None:  # the twin has one T
        p, order = by_rank(F.softmax(upcast(logits_t.detach()), 1))
        weight = adaptive_weight(p, K, args.weight, args.mean_over)
        return weight * fuzzy_positive_regularization(logits_s, order, K)
    return pick(fuzzy_positive_loss, args, logits_s.device.type)(
        logits_s,
        logits_t,
        args.T[0],
        k_max=args.k_max,
        strict=args.strict,
        weight=args.weight,
        mean_over=args.mean_over,
    )


def mixed_k(mask, own, partner, args):
    """Returns A-FPL's K of images after CutMix, with several --T; None with one.

    mask: (B, 1, H, W) bool. own, partner: logits and inside of what is mixed, where K is chosen:
    surroundings are those of a pixel's own image.
    """
    if len(args.T) == 1:
        return None
    K = adaptive_assignment(*own, args)
    return torch.where(mask[:, 0], adaptive_assignment(*partner, args), K)


def class_confidence(prob, label, pooled, skip_absent=False):
    """AEL Eq. (4): the mean probability of the true class, per class, summed over groups.

    prob: (B, C, H, W), detached. label: (B, H, W) int64 in [0, C) or 255. The pixels of `pooled`
    images are one group [D21]; a group without the class counts with 0 [D22], or with skip_absent
    not at all. Returns (2, C): the sum of the groups' means, and how many groups count.
    """
    c = torch.arange(prob.shape[1], device=prob.device).view(-1, 1, 1)
    hit = label[:, None] == c  # (B, C, H, W)
    total = torch.where(hit, upcast(prob), 0.0).sum((2, 3)).unflatten(0, (-1, pooled)).sum(1)
    pixels = hit.sum((2, 3)).unflatten(0, (-1, pooled)).sum(1)  # (groups, C), as total
    mean = total / pixels.clamp(min=1)
    counted = torch.ones_like(pixels)
    if skip_absent:
        counted = pixels > 0
    return torch.stack([mean.sum(0), counted.sum(0).to(total.dtype)])


def update_confidence(confidence, sums, momentum):
    """AEL Eq. (7): the bank (C,) becomes momentum * itself + (1 - momentum) * mean confidence.

    sums: class_confidence, of all processes. A class that no group counts stays as it is.
    """
    new = momentum * confidence + (1 - momentum) * sums[0] / sums[1].clamp(min=1)
    return torch.where(sums[1] > 0, new, confidence)


def confidence_after(confidence, logits, label, args):
    """AEL Eq. (4), (7): the bank (C,) after a step, from labelled images of all processes.

    logits (B, C, H, W): the student's, detached here. label (B, H, W) int64: of this process.
    """
    prob = logits.detach().softmax(1)
    sums = class_confidence(prob, label, args.pooled, args.skip_absent)
    return update_confidence(confidence, distributed.reduced(sums), args.bank_momentum)


def sampling_probability(confidence, allowed=None, power=1.0):
    """AEL Eq. (9): softmax((1 - confidence)^power) over allowed classes, (C,) bool; 0 elsewhere."""
    score = (1 - confidence.double()).clamp(min=0) ** power
    if allowed is not None:
        score = score.masked_fill(~allowed, -torch.inf)
    return score.softmax(0)


def draw_classes(prob, u):
    """Draws classes from prob (C,): where its running sum passes u, float64 in [0, 1); int64."""
    total = prob.double().cumsum(0)
    return torch.searchsorted(total, u * total[-1], right=True).clamp(max=len(prob) - 1)


def draw_partners(confidence, present, count, rng):
    """AEL's adaptive CutMix: (count, 2) int64, classes by AEL Eq. (9) and images that show them.

    confidence: (C,), on the CPU. present: (C, N) bool, whether the teacher last saw class c in
    unlabelled image n; if it saw it in none, any image is drawn. Raises Refusal without images.
    """
    if not present.shape[1]:
        raise Refusal("no unlabelled images to draw a partner from")
    classes = draw_classes(sampling_probability(confidence), torch.from_numpy(rng.random(count)))
    pairs = []
    for c in classes.tolist():
        images = present[c].nonzero()[:, 0].tolist() or range(present.shape[1])
        pairs.append((c, images[rng.integers(len(images))]))
    return torch.tensor(pairs)


def half_area_box(rng, size):
    """A random box of half a square crop of size pixels, height log-uniform: top, left, h, w."""
    tall = 0.5 ** rng.random()
    h = round(size * tall)
    w = round(size * 0.5 / tall)
    top = int(rng.integers(size - h + 1))
    left = int(rng.integers(size - w + 1))
    return top, left, h, w


def component_box(coarse, c, area, size, rng):
    """The tight box of a connected component of class c (8 neighbours): top, left, h, w, in pixels.

    coarse: (h, w) uint8 array, the teacher's class of every 4th pixel each way [D23], 255 outside
    the image. Components above `area`, a share of the crop, are equally likely; None without one.
    """
    labels, _ = ndimage.label(coarse == c, np.ones((3, 3)))
    large = np.flatnonzero(np.bincount(labels.ravel())[1:] > area * coarse.size)
    if not len(large):
        return None
    rows, columns = ndimage.find_objects(labels)[rng.choice(large)]
    top = 4 * rows.start
    left = 4 * columns.start
    return top, left, min(4 * rows.stop, size) - top, min(4 * columns.stop, size) - left


def partner_mask(coarse, classes, rngs, area, size):
    """AEL's adaptive CutMix: where mixed images show their partners, (B, size, size) bool.

    coarse (B, h, w), area, size: as component_box takes them; without a component a box of half the
    crop. classes, rngs: one per image. Returns also the number of components.
    """
    mask = torch.zeros(len(coarse), size, size, dtype=torch.bool)
    regions = 0
    for i, (c, rng) in enumerate(zip(classes, rngs, strict=True)):
        box = component_box(coarse[i], c, area, size, rng)
        regions += box is not None
        top, left, h, w = box or half_area_box(rng, size)
        mask[i, top : top + h, left : left + w] = True
    return mask, regions


def presence(coarse, num_classes, area):
    """Which classes cover at least `area`, a share of the crop: (B, C) bool; coarse: (B, h, w)."""
    classes = torch.arange(num_classes, device=coarse.device).view(-1, 1, 1)
    return (coarse[:, None] == classes).sum((2, 3)) >= area * coarse[0].numel()


def own_slice(total, group):
    """Returns which of a step's images, `total` over all processes, are this process's."""
    count = total // group.world
    return slice(group.rank * count, (group.rank + 1) * count)


def teacher_sight(logits_t, inside, confidence, args):
    """What banks and boxes need of a step, on the CPU: one copy, the only wait for the device.

    logits_t (2b, C, H, W), inside (2b, H, W): of this process's unlabelled images, then of their
    partners. Returns the confidence bank (C,); presence (2B, C) uint8 in the images of all
    processes, then in all their partners; coarse (b, h, w) of this process's partners.
    """
    coarse = logits_t[..., ::4, ::4].argmax(1).masked_fill(~inside[..., ::4, ::4], IGNORE).byte()
    present = presence(coarse, len(confidence), args.bank_area).byte()
    present = distributed.gathered(present).unflatten(1, (2, -1))  # (world, 2, b, C)
    present = present.transpose(0, 1).flatten(0, 2)
    return distributed.to_host(confidence, present, coarse.chunk(2)[1])


def adaptive_cutmix(logits_t, inside, images, state, rng, args, group):
    """AEL's adaptive CutMix of a step: masks (b, H, W) bool, and how many of them are a region.

    logits_t, inside: as teacher_sight takes them. images: indices of the unlabelled images that
    all processes mix; the first of state["draws"] are their partners. Partners of the step four
    later are drawn from both banks as they are [D27]; then the image bank takes in this step.
    With --no-cutmix all that is the same, and no mask has a box.
    """
    confidence, present, coarse = teacher_sight(logits_t, inside, state["confidence"], args)
    classes, partners = state["draws"][0].T.tolist()
    draws = draw_partners(confidence, state["present"], len(classes), rng)
    state["draws"] = torch.cat([state["draws"][1:], draws[None]])
    for image, row in zip([*images, *partners], present, strict=True):
        state["present"][:, image] = row  # an image that comes twice: as it was seen last
    own = own_slice(len(classes) if args.cutmix else 0, group)  # --no-cutmix: empty, no boxes
    mask, regions = partner_mask(
        coarse.numpy(),
        classes[own],
        rng.spawn(len(classes))[own],  # a generator of its own for every box
        args.region_area,
        args.crop_size,
    )
    return distributed.to_device(mask, group), regions


def copy_paste(base, source, drawn, chosen):
    """AEL's adaptive Copy-Paste: in chosen images, (B,) bool, pixels of drawn classes cover base.

    base, source: dicts of image, label, inside (B, ..., H, W). drawn: their class ids, (B, n).
    """
    alpha = (source["label"][:, None] == drawn[..., None, None]).any(1) & chosen.view(-1, 1, 1)
    masks = {"image": alpha[:, None], "label": alpha, "inside": alpha}
    return {key: torch.where(mask, source[key], base[key]) for key, mask in masks.items()}


def adaptive_copy_paste(batch, confidence, allowed, rng, args, group):
    """AEL's adaptive Copy-Paste of a step: a dict as batch["labeled"], covered by batch["paste"].

    Classes are drawn from the confidence bank by AEL Eq. (9), one set for each group of `pooled`
    images [D19]. allowed: (C,) bool. rng: equal on all processes.
    """
    # per image: a number that decides on pasting, then its classes' (a group has its first one's)
    shape = (group.world, args.batch_size // group.world, 1 + args.paste_draws)
    u = distributed.to_device(rng.random(shape)[group.rank], group)  # (b, 1 + draws)
    prob = sampling_probability(confidence, allowed, args.paste_power)
    chosen = u[:, 0] < args.paste_prob
    drawn = draw_classes(prob, u[:: args.pooled, 1:]).repeat_interleave(args.pooled, 0)
    return copy_paste(batch["labeled"], batch["paste"], drawn, chosen)


def equalization_rate(confidence, beta=1.0):
    """AEL's equalization sampling: s = ((1 - conf_c) / max_c(1 - conf_c))^beta, (C,) in [0, 1]."""
    gap = (1 - confidence).clamp(min=0)
    return (gap / gap.max().clamp(min=1e-12)) ** beta


def pixel_weight(conf_t, logits_s, rate, u, gamma):
    """AEL Eq. (13): conf_t^gamma, and 0 for a pixel that equalization sampling leaves out.

    conf_t: (B, H, W), the teacher's. Kept with the rate of the class that the student predicts
    [D24]: where u, uniform in [0, 1), is at least 1 - rate. Detached.
    """
    return conf_t**gamma * (u >= 1 - rate[logits_s.detach().argmax(1)])


def masked_mean(x, mask):
    """Mean of x over the pixels where mask is True; 0 over none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def consistency_loss(logits_s, logits_t, inside, rate, pooled, args, K=None):
    """AEL Eq. (12): sum of weight * loss over sum of weight, per `pooled` images, then averaged.

    weight: Eq. (13). loss: cross-entropy with the teacher's likeliest class, FPL Eq. (2), or FPL's;
    0 where the teacher is below the threshold, though the weight stays in the denominator [D18]. K:
    A-FPL's of mixed images; None: chosen here, by --T.
    Returns (what is minimized, logged): unsup, before the balance [D16]; balance, without --balance
    of every fourth pixel each way; kept, the share of pixels that sampling keeps; conf_t; K_gt_1,
    of every fourth pixel too.
    """
    prob_t = F.softmax(upcast(logits_t.detach()), 1)
    conf_t, pseudo = prob_t.max(1)
    if K is None and len(args.T) > 1:
        K = adaptive_assignment(logits_t, inside, args)
    if args.unsup_loss == "fpl":
        loss = pixel_fpl(logits_s, logits_t, K, args)
    else:
        loss = F.cross_entropy(upcast(logits_s), pseudo, reduction="none")
    weight = pixel_weight(conf_t, logits_s, rate, torch.rand_like(conf_t), args.gamma) * inside
    certain = conf_t >= args.threshold

    def of_groups(x):
        """Sums of a map over the images of each group, (groups,)."""
        return x.sum((1, 2)).view(-1, pooled).sum(1)

    unsup = of_groups(weight * loss * certain) / of_groups(weight).clamp(min=1e-12)
    stride = 1 if args.balance else 4  # without --balance it is only logged
    seen = inside[..., ::stride, ::stride]
    unweighted = of_groups(loss.detach()[..., ::stride, ::stride] * seen)
    z = upcast(logits_s.detach()[..., ::stride, ::stride])
    ce = F.cross_entropy(z, pseudo[..., ::stride, ::stride], reduction="none")
    balance = of_groups(ce * seen) / unweighted.clamp(min=1e-12)
    balance = balance.where(unweighted > 0, 1.0)
    minimized = unsup * balance if args.balance else unsup
    if K is None:
        p, _ = by_rank(prob_t[..., ::4, ::4])
        K = fuzzy_positive_assignment(p, args.T[0], k_max=args.k_max, strict=args.strict)
    else:
        K = K[..., ::4, ::4]
    logged = {
        "unsup": unsup.mean().detach(),
        "balance": balance.mean(),
        "kept": masked_mean(weight > 0, inside),
        "conf_t": masked_mean(conf_t, inside),
        "K_gt_1": masked_mean(K > 1, inside[..., ::4, ::4]),
    }
    return minimized.mean(), logged


def ema_decay(count, decay):
    """min(1 - 1 / (count + 1), decay) [D12]: the first update (count 0) copies the student."""
    return min(1 - 1 / (count + 1), decay)


@torch.no_grad()
def update_teacher(teacher, student, decay, buffers):
    """U2PL Sec. 3.1: theta_t <- decay theta_t + (1 - decay) theta_s, in place.

    buffers: "average" does the same to BN's running statistics, "own" leaves the teacher its own.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    if buffers == "average":
        pairs += zip(teacher.buffers(), student.buffers(), strict=True)
    pairs = [(t, s) for t, s in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - decay)


class Partners:
    """The images that unlabelled ones are mixed with, loaded by threads while steps go on [D27].

    A sample is a function of (seed, its number, the image that was drawn) alone.
    """

    def __init__(self, data, args, group):
        stream = streams(data, args)["unlabeled"]
        self.samples = Samples("unlabeled.partner", stream, data, args)
        self.args = args
        self.group = group
        self.threads = ThreadPoolExecutor(4)
        self.loading = {}  # step -> its samples, as they come

    def numbers(self, step):
        """Returns the numbers of the samples of a step, of all processes."""
        count = self.args.batch_size_unlabeled
        return range(step * count, (step + 1) * count)

    def images(self, step):
        """Returns the indices of the unlabelled images of a step, of all processes."""
        return [self.samples.which(number) for number in self.numbers(step)]

    def prefetch(self, step, draws):
        """Begins to load what draws, (steps, B, 2), has for this step and those after it."""
        for ahead, images in enumerate(draws[:, :, 1].tolist(), step):
            if ahead not in self.loading and ahead < self.args.total_iters:
                own = own_slice(len(images), self.group)
                numbers = self.numbers(ahead)[own]
                self.loading[ahead] = self.threads.map(self.samples.sample, images[own], numbers)

    def take(self, step):
        """Returns this process's partners of a step on the device: image, inside (b, ..., H, W)."""
        samples = torch.utils.data.default_collate(list(self.loading.pop(step)))
        return {key: distributed.to_device(x, self.group) for key, x in samples.items()}

    def finish(self):
        """Waits until no thread is at work."""
        self.loading = {step: list(samples) for step, samples in self.loading.items()}


@contextmanager
def timed(spent, name):
    """Adds the seconds of a with block to spent[name]."""
    begin = time.time()
    yield
    spent[name] = spent.get(name, 0.0) + time.time() - begin


# <<< method: functions


def cross_entropy(logits, label):
    """FPL Eq. (2), U2PL Eq. (2): mean of -log p_label over the pixels with label != 255, or 0.

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
    """L_s: cross-entropy or OHEM of the main head, plus aux_weight times the auxiliary head's.

    out: the network's dict for the labelled images. label: (B, H, W) int64. A scalar.
    """

    def loss(logits):
        """Of one head, a scalar."""
        if args.ohem_kept:
            pixels = round(args.ohem_kept * args.crop_size**2)
            return ohem_cross_entropy(logits, label, 0.7, pixels)  # [D1]
        return cross_entropy(logits, label)

    if "aux" in out:
        return loss(out["logits"]) + args.aux_weight * loss(out["aux"])
    return loss(out["logits"])


# ---- 4. Model --------------------------------------------------------------------------------

MEAN = (123.675, 116.28, 103.53)  # ImageNet, RGB, 0..255
STD = (58.395, 57.12, 57.375)


# >>> method: backbone
DILATIONS = {  # of layer4's blocks, by output stride and --multi-grid
    (16, True): (2, 4, 8),
    (16, False): (1, 2, 2),
    (8, True): (4, 8, 16),
    (8, False): (2, 4, 4),
}


def make_backbone(args):
    """Returns torchvision's ResNet without its classifier, or features of a network of timm.

    Deep stems are three 3x3 convolutions: 64, 64, 128 channels (deep) or 32, 32, 64 (v1c) [D9]. The
    blocks of layer4 have DILATIONS [D6]. timm's networks keep their own normalization; their
    features have strides 4, 8, 16 and output_stride.
    """
    if args.backbone.startswith("timm/"):
        return load_timm(args.backbone, args.weights, args.output_stride)
    net = torchvision.models.get_model(args.backbone, weights=None)
    del net.fc, net.avgpool
    if args.stem == "deep":
        deepen_stem(net, (64, 64, 128))
    elif args.stem == "v1c":
        deepen_stem(net, (32, 32, 64))
    load_backbone(net, args.weights, args.backbone, args.stem)
    if args.output_stride == 8:
        dilate(net.layer3, [1] + [2] * (len(net.layer3) - 1))
    dilate(net.layer4, DILATIONS[args.output_stride, args.multi_grid])
    return net


def deepen_stem(net, channels):
    """Puts three 3x3 convolutions of these channels in place of a ResNet's one of 7x7."""
    first, second, third = channels
    net.conv1 = nn.Sequential(
        nn.Conv2d(3, first, 3, 2, 1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(inplace=True),
        nn.Conv2d(first, second, 3, 1, 1, bias=False),
        nn.BatchNorm2d(second),
        nn.ReLU(inplace=True),
        nn.Conv2d(second, third, 3, 1, 1, bias=False),
    )
    net.bn1 = nn.BatchNorm2d(third)
    # layer1 again, for its new number of input channels: torchvision's own way to make a stage
    net.inplanes = third
    net.layer1 = net._make_layer(type(net.layer1[0]), 64, len(net.layer1))
    for module in (*net.conv1.modules(), *net.layer1.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def dilate(stage, dilations):
    """Takes the stride out of a ResNet stage; the 3x3 convolutions of block i get dilations[i]."""
    for block, d in zip(stage, dilations, strict=False):  # ResNet-18 has two blocks
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (d, d)


def features(net, x):
    """Returns the outputs of a backbone's last four stages, strides 4 to output_stride."""
    if hasattr(net, "feature_info"):  # timm's
        return net(x)
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    stages = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        stages.append(x)
    return stages


def conv_bn_relu(inputs, outputs, kernel, dilation=1, bias=False):
    """Returns convolution (same size), BN, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2 * dilation, dilation, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


# <<< method: backbone


# >>> method: head
class DeepLabV3Plus(nn.Module):
    """The head of U2PL's released code: ASPP, low-level branch of 256 channels, two 3x3 blocks.

    --head-channels makes the 256 another number. forward: stages (list of four (B, c, h, w)
    features, strides 4 to output_stride), size (H, W) -> dict of logits (B, C, H, W) and, with
    --aux-weight, the auxiliary head's; both float32.
    """

    def __init__(self, channels, num_classes, args):
        super().__init__()
        width = args.head_channels
        branches = [conv_bn_relu(channels[3], width, 1)]
        branches += [conv_bn_relu(channels[3], width, 3, dilation=r) for r in args.aspp_rates]
        self.branches = nn.ModuleList(branches)
        self.pool = conv_bn_relu(channels[3], width, 1)
        together = width * (len(branches) + 1)
        self.project = nn.Sequential(conv_bn_relu(together, width, 3), nn.Dropout2d(0.1))
        self.low = conv_bn_relu(channels[0], width, 1, bias=True)
        self.classify = two_blocks(2 * width, width, num_classes)
        self.aux = None
        if args.aux_weight:
            block = conv_bn_relu(channels[2], width, 3, bias=True)
            self.aux = nn.Sequential(block, nn.Dropout2d(0.1), nn.Conv2d(width, num_classes, 1))

    def fuse(self, stages):
        """Low-level and ASPP features at stride 4: (B, 2 width, H/4, W/4)."""
        low = self.low(stages[0])
        high = stages[3]
        pooled = self.pool(high.mean((2, 3), keepdim=True)).expand(-1, -1, *high.shape[2:])
        dilated = [branch(high) for branch in self.branches]
        aspp = self.project(torch.cat([pooled, *dilated], 1))
        aspp = upsample(aspp, low.shape[2:]).to(low.dtype)  # float32 under CUDA's autocast
        return torch.cat([low, aspp], 1)

    def forward(self, stages, size):
        out = {"logits": upsample(self.classify(self.fuse(stages)).float(), size)}
        if self.aux is not None:
            out["aux"] = upsample(self.aux(stages[2]).float(), size)
        return out


def two_blocks(inputs, width, outputs):
    """Returns a head of U2PL Sec. 4.1: two Conv-BN-ReLU(-Dropout) blocks and a 1x1."""
    layers = []
    for i in (inputs, width):
        layers += [conv_bn_relu(i, width, 3, bias=True), nn.Dropout2d(0.1)]
    return nn.Sequential(*layers, nn.Conv2d(width, outputs, 1))


# <<< method: head


def upsample(x, size):
    """Bilinear with align_corners=True, as all released networks do; size None: as it is."""
    if size is None:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class Network(nn.Module):
    """Backbone and head. forward: (B, 3, H, W) uint8 RGB in 0..255 -> the head's dict.

    upsampled=False: logits at the head's stride, where C maps of full size would not fit.
    """

    def __init__(self, args, num_classes, head):
        super().__init__()
        self.amp = args.amp == "bf16"
        self.backbone = make_backbone(args)
        # >>> method: channels
        channels = [64, 128, 256, 512]
        mean = torch.tensor(MEAN)
        std = torch.tensor(STD)
        if args.backbone.startswith("timm/"):
            channels = self.backbone.feature_info.channels()
            mean = 255 * torch.tensor(self.backbone.default_cfg["mean"])
            std = 255 * torch.tensor(self.backbone.default_cfg["std"])
        elif args.backbone != "resnet18":  # bottlenecks
            channels = [4 * c for c in channels]
        # <<< method: channels
        self.head = head(channels, num_classes, args)
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)

    def forward(self, x, upsampled=True):
        layout = distributed.layout(x.device)
        h = ((x.float() - self.mean) / self.std).contiguous(memory_format=layout)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            stages = features(self.backbone, h)
            return self.head(stages, x.shape[2:] if upsampled else None)


def build(args, num_classes, head, group):
    """Returns a Network on the device, in its layout; SyncBN on CUDA with several processes."""
    layout = distributed.layout(group.device)
    net = Network(args, num_classes, head).to(group.device, memory_format=layout)
    if group.world > 1 and group.device.type == "cuda":
        return distributed.sync_bn(net)
    return net


def parallel(net, args, group):
    """Returns net as training calls it: in DDP with several processes, compiled if asked."""
    if group.world > 1:
        net = nn.parallel.DistributedDataParallel(net)
        net.broadcast_buffers = False  # BN: synchronized on CUDA, copied after the step on CPU
    if args.compile:
        return torch.compile(net)
    return net


# ---- 5. Data and augmentation ----------------------------------------------------------------


def augment(image, label, rng, crop, scales):
    """Random scale, flip and crop; an image that is then too small is padded around.

    image: PIL RGB. label: PIL L or None. crop: pixels. scales: as random_scale takes them. Returns
    (3, crop, crop) uint8, (crop, crop) uint8 or None, and inside (crop, crop) bool. What the crop
    shows is cut out first, in whole pixels, then scaled [D3]. Kernel: bilinear without
    antialiasing, nearest for the label. Padding: mean colour, 255 [D2], inside False.
    """
    w, h = image.size
    scale = random_scale(rng, scales)
    seen_w = min(math.ceil(crop / scale), w)  # pixels of the image that the crop shows
    seen_h = min(math.ceil(crop / scale), h)
    new_w = min(math.ceil(seen_w * scale), crop)  # pixels of the crop that show them
    new_h = min(math.ceil(seen_h * scale), crop)
    flip = rng.random() < 0.5
    x = int(rng.integers(w - seen_w + 1))
    y = int(rng.integers(h - seen_h + 1))
    left = (crop - new_w) // 2
    top = (crop - new_h) // 2
    sides = (left, crop - new_w - left, top, crop - new_h - top)

    def scaled(picture, kernel):
        """What the crop shows of a picture, (bands, new_h, new_w)."""
        part = picture.crop((x, y, x + seen_w, y + seen_h))
        if flip:
            part = ImageOps.mirror(part)
        return F.interpolate(pil_to_tensor(part)[None], (new_h, new_w), mode=kernel)[0]

    bands = zip(scaled(image, "bilinear"), MEAN, strict=True)
    pixels = torch.stack([F.pad(band, sides, value=round(mean)) for band, mean in bands])
    if label is not None:
        label = F.pad(scaled(label, "nearest-exact")[0], sides, value=IGNORE)
    inside = F.pad(torch.ones(new_h, new_w, dtype=torch.bool), sides)
    return pixels, label, inside


def random_scale(rng, scales):
    """Two values: a range; where 1 is inside, half of the scales are below it. Else: a choice."""
    if len(scales) != 2:
        return float(rng.choice(scales))
    low, high = scales
    if not low < 1 < high:
        return rng.uniform(low, high)
    if rng.random() < 0.5:
        return rng.uniform(low, 1)
    return rng.uniform(1, high)


@lru_cache(maxsize=8)
def shuffled(length, *seed):
    """Returns 0 ... length - 1 in the random order of a seed; the last few are cached."""
    return np.random.default_rng(seed).permutation(length)


class Samples(Dataset):
    """Sample number -> dict of image, inside and, if masks are opened, label (uint8).

    A function of (seed, stream, number) alone. The images come in rounds, each in a new order [D4];
    stream "a.b" takes them in the order of stream "a", with an augmentation of its own.
    """

    def __init__(self, name, stream, data, args):
        self.data = data
        self.items = stream.items
        self.with_label = stream.with_label
        self.crop = args.crop_size
        self.scales = stream.scales
        self.order_seed = [args.seed, zlib.crc32(name.split(".")[0].encode()), 0]
        self.warp_seed = [args.seed, zlib.crc32(name.encode()), 1]

    def which(self, number):
        """Returns the index of the item that sample `number` shows."""
        lap, place = divmod(number, len(self.items))
        return shuffled(len(self.items), *self.order_seed, lap)[place]

    def __getitem__(self, number):
        return self.sample(self.which(number), number)

    def sample(self, index, number):
        """Returns the item of this index as sample `number` would show it."""
        image, label = self.data.read(self.items[index], self.with_label)
        rng = np.random.default_rng([*self.warp_seed, number])
        image, label, inside = augment(image, label, rng, self.crop, self.scales)
        sample = {"image": image, "inside": inside}
        if label is not None:
            sample["label"] = label
        return sample


class Stream(NamedTuple):
    """What is drawn: from which items, images per step over all processes, and how."""

    items: list
    batch: int
    with_label: bool  # are masks opened?
    scales: tuple


def streams(data, args):
    """Returns {name: Stream}."""
    # >>> method: draw
    return {
        "labeled": Stream(data.labeled, args.batch_size, True, args.scales),
        "paste": Stream(data.labeled, args.batch_size, True, args.paste_scales),  # [D28]
        "unlabeled": Stream(data.unlabeled, args.batch_size_unlabeled, False, args.scales),
    }
    # <<< method: draw


def open_stream(name, data, args, group, start):
    """Returns an iterator over this process's batches of a stream, from step start to the end."""
    stream = streams(data, args)[name]
    images = distributed.share(stream.batch, group, name)  # of a step, of this process
    if not stream.items:
        origin = "that --labeled-list leaves" if args.labeled_list else f"in --split {args.split}"
        raise Refusal(
            f"no {name} images {origin} of {args.dataset}: "
            "give fewer images labels, or --unlabeled-list"
        )
    firsts = [step * stream.batch + group.rank * images for step in range(start, args.total_iters)]
    loader = DataLoader(
        Samples(name, stream, data, args),
        batch_sampler=[range(first, first + images) for first in firsts],
        num_workers=args.workers,
        pin_memory=group.device.type == "cuda",
        generator=torch.Generator(),  # the global one stays a function of the step
        worker_init_fn=distributed.unstoppable,
    )
    return iter(loader)


# ---- 6. Evaluation ---------------------------------------------------------------------------


class Images(Dataset):
    """Index -> (image (3, H, W) uint8, label (H, W) uint8) at the image's own size."""

    def __init__(self, data, items):
        self.data = data
        self.items = items

    def __getitem__(self, index):
        image, label = self.data.read(self.items[index], True)
        return pil_to_tensor(image), pil_to_tensor(label)[0]


def predict(net, image, args, num_classes):
    """Returns the likeliest class of each pixel, (H, W) int64, of one image, (3, H, W) uint8.

    By the protocol of args, whole: in one piece. slide: in windows. Neither holds C maps of a whole
    large image at once; slide holds those of a row of windows.
    """
    if args.protocol == "whole":
        return likeliest(net(image[None], upsampled=False)["logits"], image.shape[1:])[0]
    return torch.cat(
        [logits.argmax(0) for logits in slide(net, image, args.crop_size, num_classes)]
    )


def slide(net, image, window, num_classes):
    """Yields the logits of an image from top to bottom, (C, some rows, W).

    They are summed over square windows, 2/3 of one apart, the last shifted inside; an image smaller
    than a window stands in the middle of the mean colour.
    """
    h, w = image.shape[1:]
    top = max(window - h, 0) // 2
    left = max(window - w, 0) // 2
    mean = image.new_tensor([round(m) for m in MEAN]).view(3, 1, 1)
    canvas = mean.repeat(1, max(h, window), max(w, window))
    canvas[:, top : top + h, left : left + w] = image
    _, canvas_h, canvas_w = canvas.shape
    if canvas_h == canvas_w == window:  # one window: its logits are the sums
        yield net(canvas[None])["logits"][0, :, top : top + h, left : left + w]
        return
    starts = window_starts(canvas_h, window)
    # of the rows from y on; classes last in memory, as in networks' logits: argmax is faster so
    sums = torch.zeros(window, canvas_w, num_classes, device=image.device).permute(2, 0, 1)
    for y, next_y in zip(starts, [*starts[1:], canvas_h], strict=True):
        for x in window_starts(canvas_w, window):
            part = canvas[None, :, y : y + window, x : x + window]
            sums[:, :, x : x + window] += net(part)["logits"][0]
        done = next_y - y  # rows that no later window reaches
        # top > 0 only where one row of windows covers the image
        yield sums[:, top : min(done, top + h), left : left + w]
        for row in range(done, window):  # they move up, one by one: no copy of all
            sums[:, row - done] = sums[:, row]
        sums[:, window - done :] = 0


def window_starts(length, window):
    """Returns where windows begin, 2/3 of a window apart; the last is shifted inside."""
    stride = math.ceil(2 * window / 3)
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def likeliest(logits, size):
    """Returns the argmax over classes, (B, H, W), of (B, C, h, w) upsampled to size.

    24 classes at a time, to hold few such maps. Ties go to the lowest class, as argmax has it.
    """
    best, classes = upsample(logits[:, :24], size).max(1)
    for first in range(24, logits.shape[1], 24):
        value, index = upsample(logits[:, first : first + 24], size).max(1)
        classes = torch.where(value > best, first + index, classes)
        best = torch.maximum(value, best)
    return classes


@contextmanager
def evaluating(net, data, args, group):
    """Context manager: net in eval mode, with BN's statistics by --precise-bn.

    These are means over fixed batches of labelled images, the same on all processes, dropout off;
    on exit the running ones are restored. With few images a batch running statistics may fit
    no image: docs/supervised.md.
    """
    training = net.training
    net.eval()
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    running = [(deepcopy(norm.state_dict()), norm.momentum) for norm in norms]
    if args.precise_bn:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches
            norm.train()
        alone = distributed.Group(0, 1, group.device)
        short = replace(args, total_iters=args.precise_bn, workers=0)
        for batch in open_stream("labeled", data, short, alone, 0):
            net(batch["image"].to(group.device))
    net.eval()
    yield
    for norm, (statistics, momentum) in zip(norms, running, strict=True):
        norm.load_state_dict(statistics)
        norm.momentum = momentum
    net.train(training)


@torch.no_grad()
def evaluate(net, data, items, args, group):
    """Returns (scores of net in eval mode over items, panels of the first images).

    One confusion matrix over all images and processes; every image is seen once, unpadded [D5].
    """
    indices = range(group.rank, len(items), group.world)  # of this process
    pictured = indices[:: max(len(indices) // 4, 1)][:4]
    # gloo, the CPU's backend: a loader forked soon after a collective may hang (Python 3.11)
    gloo = group.world > 1 and group.device.type == "cpu"
    loader = DataLoader(
        Images(data, items),
        sampler=indices,
        batch_size=None,
        num_workers=0 if gloo else args.workers,
        generator=torch.Generator(),
        worker_init_fn=distributed.unstoppable,
    )
    confusion = torch.zeros(2 * (data.num_classes,), dtype=torch.int64, device=group.device)
    maps = {"image": [], "label": [], "prediction": []}
    with evaluating(net, data, args, group):
        for index, (image, label) in zip(indices, loader, strict=True):
            pred = predict(net, image.to(group.device), args, data.num_classes)
            confusion += metrics.confusion_matrix(pred, label.to(group.device), data.num_classes)
            if index in pictured:
                maps["image"].append(image)
                maps["label"].append(label)
                maps["prediction"].append(pred)
    total = distributed.reduced(confusion).cpu()
    data.require_pixels(total, "the evaluation")
    return metrics.scores(total), maps


# ---- 7. Training -----------------------------------------------------------------------------


# >>> method: optimizer
def make_optimizer(trained, args):
    """Returns SGD (momentum 0.9) over the trained networks; "scale" is a group's multiple of lr."""
    groups = []
    for module, scale in (("backbone", 1.0), ("head", args.lr_head)):
        params = [p for net in trained for p in getattr(net, module).parameters()]
        weights = [p for p in params if p.ndim > 1]
        vectors = [p for p in params if p.ndim < 2]  # of BN, biases, single factors
        vector_decay = 0.0 if args.decay_on == "weights" else args.weight_decay
        groups.append({"params": weights, "scale": scale, "weight_decay": args.weight_decay})
        groups.append({"params": vectors, "scale": scale, "weight_decay": vector_decay})
    return torch.optim.SGD(groups, args.lr, momentum=0.9)


# <<< method: optimizer


def main(args):
    """Trains, or scores with --eval-only; args as fill returns them."""
    group = distributed.setup(args.device)
    torch.use_deterministic_algorithms(args.deterministic)
    data = load(args)

    # -- networks --
    torch.manual_seed(args.seed)
    # >>> method: networks
    student = build(args, data.num_classes, DeepLabV3Plus, group)
    student_parallel = parallel(student, args, group)
    teacher = deepcopy(student).requires_grad_(False).train(args.teacher_mode == "train")  # [D25]
    networks = {"student": student, "teacher": teacher}
    trained = [student]

    def scored(step):
        """The network that evaluation scores."""
        return teacher

    # <<< method: networks
    if args.eval_only:
        step = load_networks(load_checkpoint(args.checkpoint, __file__), networks, data)
        result, _ = evaluate(scored(step), data, getattr(data, args.eval_on), args, group)
        if group.rank == 0:
            print(report(data, {f"step {step}": result}, args.eval_on))
        return distributed.teardown()
    optimizer = make_optimizer(trained, args)
    # >>> method: state
    distributed.need_float64(group, "classes and partners are drawn")
    C = data.num_classes
    check_fit(args, group.world, data.num_classes)
    pasted = set(range(C)) - set(args.paste_not)
    if (args.paste_draws and not pasted) or max(args.paste_not, default=0) >= C:
        raise Refusal(f"--paste-not: some of the classes 0 to {C - 1}; --paste-draws 0: no pasting")
    allowed = torch.tensor([c in pasted for c in range(C)], device=group.device)
    rng = np.random.default_rng([args.seed, zlib.crc32(b"bank")])
    confidence = torch.from_numpy(rng.random(C, np.float32))  # [D26]
    present = torch.zeros(C, len(data.unlabeled), dtype=torch.bool)
    draws = [draw_partners(confidence, present, args.batch_size_unlabeled, rng) for _ in range(4)]
    state = {
        "confidence": distributed.to_device(confidence, group),
        "present": present,
        "draws": torch.stack(draws),  # of the next four steps [D27]
    }
    partners = Partners(data, args, group)
    # <<< method: state
    for name, stream in streams(data, args).items():
        distributed.check_bn(trained, name, stream.batch, group)
    run = Run(args, __file__, group, data, preset)
    start = run.restore(networks, optimizer, state)
    batches = {name: open_stream(name, data, args, group, start) for name in streams(data, args)}

    # -- steps --
    for step in range(start, args.total_iters):
        begin = time.time()
        # for dropout; a hash, as torch's CPU generator keeps 32 bits of a seed
        torch.manual_seed(zlib.crc32(b"%d %d %d" % (args.seed, step, group.rank)))
        batch = {name: next(b) for name, b in batches.items()}
        spent = {"data": time.time() - begin}  # seconds
        for sample in batch.values():
            for name, tensor in sample.items():
                sample[name] = distributed.to_device(tensor, group)
            if "label" in sample:
                sample["label"] = sample["label"].long()  # uint8 until here: less to move
        x_l = batch["labeled"]["image"]
        y_l = batch["labeled"]["label"]
        decay = (1 - step / args.total_iters) ** 0.9  # poly
        for settings in optimizer.param_groups:
            settings["lr"] = args.lr * settings["scale"] * decay
        optimizer.zero_grad(set_to_none=True)
        # >>> method: losses
        # equal on all processes [D29]
        rng = np.random.default_rng([args.seed, zlib.crc32(b"mix"), step])
        u0 = batch["unlabeled"]
        with timed(spent, "bank"):
            partners.prefetch(step, state["draws"])
            u1 = partners.take(step)
            labeled = adaptive_copy_paste(batch, state["confidence"], allowed, rng, args, group)
        x_l = labeled["image"]
        y_l = labeled["label"]
        with distributed.no_sync(student_parallel):  # gradients are averaged in the last backward
            out = student_parallel(x_l)
            sup = supervised_loss(out, y_l, args)
            confidence = confidence_after(state["confidence"], out["logits"], y_l, args)
            rate = equalization_rate(confidence, args.beta)
            logged_labeled = {}
            loss_l = sup
            if args.consistency_on == "all":
                with torch.no_grad():
                    labeled_t = teacher(x_l)["logits"]
                unsup_l, logged_l = consistency_loss(  # Eq. (12) [D17]
                    out["logits"], labeled_t, labeled["inside"], rate, args.pooled, args
                )
                logged_labeled["unsup_l"] = logged_l["unsup"]
                loss_l = sup + args.unsup_weight * unsup_l
            loss_l.backward()  # now: frees its graph before the unlabelled images are seen
            del out
        with torch.no_grad():
            clean_t = teacher(torch.cat([u0["image"], u1["image"]]))["logits"]
        with timed(spent, "bank"):
            mask, regions = adaptive_cutmix(
                clean_t,
                torch.cat([u0["inside"], u1["inside"]]),
                partners.images(step),
                state,
                rng,
                args,
                group,
            )
        state["confidence"] = confidence
        x_u = torch.where(mask[:, None], u1["image"], u0["image"])
        inside = torch.where(mask, u1["inside"], u0["inside"])
        z0, z1 = clean_t.chunk(2)
        mixed_t = torch.where(mask[:, None], z1, z0)
        K = mixed_k(mask[:, None], (z0, u0["inside"]), (z1, u1["inside"]), args)
        logits_s = student_parallel(x_u)["logits"]
        unsup, logged_mixed = consistency_loss(  # Eq. (12)
            logits_s, mixed_t, inside, rate, 1, args, K
        )
        # the auxiliary head learns from labels alone, but DDP must see its parameters in this pass
        unused = 0.0 * sum(p.sum() for p in student.head.aux.parameters()) if args.aux_weight else 0
        (args.unsup_weight * unsup + unused).backward()
        logged = {
            "loss": loss_l + args.unsup_weight * unsup,  # AEL Eq. (1)
            "sup": sup,
            **logged_mixed,
            **logged_labeled,
            "bank": confidence.mean(),
            "regions": torch.full_like(sup, regions / len(x_u)),
        }
        # <<< method: losses
        optimizer.step()
        # >>> method: after-step
        update_teacher(
            teacher,
            student,
            ema_decay(step, args.ema_decay),
            "own" if args.teacher_mode == "train" else "average",
        )
        if run.due(step + 1, args.eval_every):  # its loaders fork: no thread may be at work
            partners.finish()
        # <<< method: after-step
        if group.world > 1 and group.device.type == "cpu":  # there BN is not synchronized
            distributed.copy_buffers(*networks.values())
        done = step + 1
        run.log_step(done, logged, args.lr * decay, begin, spent)
        if run.due(done, args.pictures_every):
            # >>> method: panels
            conf_t = F.softmax(mixed_t, 1).amax(1)
            weight = pixel_weight(conf_t, logits_s, rate, torch.rand_like(conf_t), args.gamma)
            maps = {
                "labelled, pasted": x_l,
                "label": y_l,
                "mixed": x_u,
                "box": mask,
                "pseudo label": mixed_t.argmax(1),
                "weight": weight * inside,
                "student": logits_s.argmax(1),
            }
            # <<< method: panels
            run.panels(f"{done:06d}-train", maps)
        if run.due(done, args.eval_every):
            scores, panels = evaluate(scored(done), data, data.val, args, group)
            run.keep_best(done, scores, panels, networks)
        if run.due(done, args.save_every) or run.asked:
            run.keep_last(done, networks, optimizer, state)
        if run.asked:  # by SIGTERM; all processes learn of it in the same step
            raise Stopped(done)

    # -- last and best --
    on = "test" if data.test else "val"
    items = getattr(data, on)
    results = {}
    results["last"], _ = evaluate(scored(args.total_iters), data, items, args, group)
    best = run.load_best(networks)
    if best == args.total_iters:  # the same weights
        results["best"] = results["last"]
    elif best is not None:
        results["best"], _ = evaluate(scored(best), data, items, args, group)
    run.finish(results, on)
    distributed.teardown()


if __name__ == "__main__":
    with refusals():  # what the user gave wrong is one line and exit code 2
        args = fill(parse(Args, preset), preset)
        if args.dry_run or args.list_presets:
            about(args, __file__)
        else:
            main(args)
