"""CPS and FPL+CPS: Fuzzy Positive Learning (arXiv:2210.08519v2, CVPR 2023) on CPS (2106.01226).

Two networks teach each other on unlabelled images. CPS: each learns the other's likeliest class.
FPL: a pixel has K positive classes, more where its teacher is unsure (Alg. 1), and each of their
logits is pushed above all others (Eq. 7), with a weight (Eq. 11).

  Alg. 1                         cumulative_classes (n), fuzzy_positive_assignment (K)
  Eq. (7), (8), (9)              fuzzy_positive_regularization
  Eq. (11), (16)                 adaptive_weight
  Eq. (1)                        losses in main; taught_loss is CPS's L12 or L21
  Eq. (2); Y of Sec. 3.2         cross_entropy; positive_set
  supplement Eq. (1), (4)        negative_loss, soft_loss (its Table 4)
  supplement Tables 1-3, 5       T_TABLE, FEW_LABELS; k_values
  Eq. (12)-(15), supp. Sec. 3    results/analysis.py
  CPS: network, CutMix           CPSHead, toggled_mask
  A-FPL's T (code, IJCV 2025)    adaptive_assignment

  python cps_fpl.py                                       # generated shapes, no data needed
  python cps_fpl.py --dataset camvid --split 1/8 --recipe official
  torchrun --nproc_per_node 8 cps_fpl.py --dataset cityscapes --split 1/16 --T 0.9

CamVid with 6 labels, test mIoU: CPS 36.3, with FPL 38.5, labels alone 35.2 (three seeds).
Paper, released code and this script: docs/cps_fpl.md.
"""

# ---- 1. Imports ------------------------------------------------------------------------------

import math
import time
import zlib
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
    backbone_2: Backbone | None = None  # of the second network; left out: as --backbone
    weights_2: str | None = None  # of that backbone; left out: as --weights
    batch_size_unlabeled: Count | None = None  # unlabelled images per step (mixed, with --cutmix)
    # loss on unlabelled images, ce: that of CPS; soft and negative: supplement Table 4
    unsup_loss: Literal["fpl", "ce", "soft", "negative"] = "fpl"
    unsup_weight: AtLeast0 | None = None  # beta in Eq. (1); 0: labelled images alone
    # upper bound of the cumulative probability; several: each pixel's own, by A-FPL [D25]
    T: Annotated[tuple[Inside01, ...], Rising(strict=True)] | None = None
    k_strategy: Literal["n-1", "n", "fixed2", "fixed3", "step"] = "n-1"  # K, supplement Table 5
    k_max: Number | None = None  # K at most; 0: no cap
    strict: bool | None = None  # cumulative probability > T, as printed; False: >= T
    # weight of a pixel, concave: Eq. (11); linear, convex: Eq. (16) [D22]
    weight: Literal["concave", "linear", "convex", "none"] = "concave"
    # what that weight averages: the K positives, or also the next class (as released)
    mean_over: Literal["positives", "positives_and_next"] | None = None
    balance: bool | None = None  # rescale the cross loss to the value of cross-entropy
    cutmix: bool = True  # the networks learn mixed images, and teach on clean ones
    same_image_cutmix: bool = False  # mix two crops of one image, as released
    # network that is scored, mean: of both networks' probabilities
    evaluate: Literal["branch1", "branch2", "mean"] = "branch1"
    # FPL's loss, off: as written here; on: the twin in common/fused.py; auto: on where it is faster
    fused: Literal["auto", "on", "off"] = "auto"
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
        "weights_2": "no init",
        "batch_size_unlabeled": "unsup_weight",
        "unsup_loss": "unsup_weight",
        "T": "unsup_weight, unsup_loss=fpl, k_strategy=n-1|n",
        "k_strategy": "unsup_weight, unsup_loss=fpl",
        "k_max": "unsup_weight, unsup_loss=fpl",
        "strict": "unsup_weight, unsup_loss=fpl, k_strategy=n-1|n",
        "weight": "unsup_weight, unsup_loss=fpl",
        "mean_over": "unsup_weight, unsup_loss=fpl, weight!=none",
        "balance": "unsup_weight, unsup_loss=fpl",
        "fused": "unsup_weight, unsup_loss=fpl",
        "cutmix": "unsup_weight",
        "same_image_cutmix": "unsup_weight, cutmix",
        "aux_weight": "never",
        # <<< method: needs
    }


# >>> method: recipe
# fmt: off
VOC = dict(
    backbone="resnet101", stem="v1c", weights="auto", output_stride=16, multi_grid=True,  # [D9]
    head_channels=256,
    aspp_rates=(6, 12, 18),
    split_family="cps", crop_size=512, scales=(0.5, 0.75, 1.0, 1.5, 1.75, 2.0), batch_size=8,
    total_iters=39_680, lr=0.0025, lr_head=1.0,  # [D10] [D11]
    weight_decay=4e-4, decay_on="weights",
    aux_weight=0.0, ohem_kept=0.0, unsup_weight=1.0, T=(0.9,),
    protocol="slide", precise_bn=0, workers=4,
    log_every=50, eval_every=1000, save_every=500, pictures_every=5000,
)
CITYSCAPES = VOC | dict(
    crop_size=800, total_iters=44_640, weight_decay=8e-4, ohem_kept=5 / 64, unsup_weight=5.0,
)
COCO = VOC | dict(  # no paper's: as ESL supplement Table 2 has it
    backbone="timm/xception65.tf_in1k", protocol="whole", split_family="unimatch",
)
FOLDER = VOC | dict(backbone="resnet50", stem="classic", split="all", protocol="whole")
CAMVID = FOLDER | dict(  # this project's small protocols [D8]
    backbone="resnet18", weights="none",
    aspp_rates=(1, 2, 3),  # a crop of 128 is 8x8 there: wide taps never learn
    split="1/8", crop_size=128, scales=(0.5, 2.0), batch_size=4, total_iters=600,
    lr=0.01, lr_head=2.0, weight_decay=1e-4, precise_bn=20, workers=2,
    log_every=10, eval_every=150, save_every=150, pictures_every=300,
)
SHAPES = CAMVID | dict(
    split="1/16", crop_size=64, scales=(0.75, 1.5), head_channels=64, total_iters=24, lr=0.02,
    workers=0,
)
RECIPES = {  # [D13] to [D16]
    "paper": dict(k_max=0, strict=True, mean_over="positives", balance=False),
    "official": dict(k_max=3, strict=False, mean_over="positives_and_next", balance=True),
}
T_TABLE = {  # FPL supplement: (data set, backbone, CutMix): split -> T, where it is not 0.9
    ("cityscapes", "resnet50", False): {"1/32": 0.95},  # Table 1
    ("cityscapes", "resnet101", False): {"1/32": 0.95, "1/16": 0.95, "1/8": 0.95},
    ("voc_aug", "resnet101", False): {"1/16": 0.95},
    ("cityscapes", "resnet50", True): {"1/16": 0.85, "1/8": 0.85, "1/4": 0.85},  # Table 2
    ("cityscapes", "resnet101", True): {"1/16": 0.85, "1/8": 0.85, "1/4": 0.85},
    ("voc_aug", "resnet50", True): {"1/16": 0.95},
}
FEW_LABELS = {  # VOC's 1,464, CutMix: T of FPL supplement Table 3, beta as CPS's author says [D12]
    "92": dict(T=(0.95,), unsup_weight=0.1),
    "183": dict(T=(0.85,), unsup_weight=0.5),
    "366": dict(T=(0.85,), unsup_weight=0.5),
    "732": dict(T=(0.85,), unsup_weight=0.5),
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
    values = DATASETS[args.dataset] | RECIPES[args.recipe]
    values["batch_size_unlabeled"] = args.batch_size or values["batch_size"]
    backbone = args.backbone or values["backbone"]
    values["backbone_2"] = backbone
    values["weights_2"] = args.weights or values["weights"]
    table = T_TABLE.get((args.dataset, backbone, args.cutmix), {})
    values["T"] = (table.get(args.split, 0.9),)
    if args.cutmix and args.dataset == "voc":
        values.update(FEW_LABELS.get(args.split, {}))
    if not args.cutmix:  # CPS's weights of Eq. (1)
        values["unsup_weight"] = 6.0 if args.dataset == "cityscapes" else 1.5
    if args.T and len(args.T) > 1 and (args.fused == "on" or args.k_strategy == "n"):
        raise Refusal("--T: several need --k-strategy n-1, and no --fused on, whose twin has one")
    return values


# <<< method: recipe

# ---- 3. Method -------------------------------------------------------------------------------


# >>> method: functions
# Shapes: logits_s, prob_t (B, C, H, W), by class; p, order (B, C, H, W), by rank, the teacher's
# likeliest class first; K, weights and losses of pixels (B, H, W). s: the network that learns.
# t: the one that teaches; no gradient reaches it.


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


def soft_loss(logits_s, prob_t):
    """Supplement Eq. (4), sum_i q^i log(q^i / p^i); q = prob_t, p of the student."""
    log_p = F.log_softmax(upcast(logits_s), 1)
    return F.kl_div(log_p, upcast(prob_t.detach()), reduction="none").sum(1)


def negative_loss(logits_s, prob_t, threshold=0.2):
    """Supplement Eq. (1), -sum_j log(1 - p^j), p the student's, over classes with prob_t < 0.2.

    The threshold is of the teacher's probability [D23]. Eq. (2) is the same sum by logits. 1 - p of
    the likeliest class is computed as the sum of the other p, since the difference rounds to 0.
    """
    log_p = F.log_softmax(upcast(logits_s), 1)
    top = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, log_p.argmax(1, True), True)
    others = log_p.masked_fill(top, -torch.inf)
    log_not = torch.where(top, others.logsumexp(1, True), torch.log1p(-others.exp()))
    return -(log_not * (upcast(prob_t) < threshold)).sum(1)


def k_values(p, progress, args):
    """K by --k-strategy: Alg. 1, its n, 2, 3, or 3, 2, 1 by thirds of training (supp. Table 5).

    progress: the share of training that is done, in [0, 1).
    """
    if args.k_strategy == "n-1":
        return fuzzy_positive_assignment(p, args.T[0], k_max=args.k_max, strict=args.strict)
    K = cumulative_classes(p, args.T[0], args.strict)
    third = min(int(3 * progress), 2)  # of training: 0, 1, 2
    fixed = {"fixed2": 2, "fixed3": 3, "step": 3 - third}
    if args.k_strategy in fixed:
        K = torch.full_like(K, fixed[args.k_strategy])
    if args.k_max:
        K = K.clamp(max=args.k_max)
    return K.clamp(max=p.shape[1])


def mixed_teacher(net, mask, own, partner, args):
    """Returns a teacher's logits of clean images, mixed by CutMix; A-FPL's K, None with one --T.

    mask: (B, 1, H, W) bool. own, partner: the batches that are mixed. K is chosen before it is
    mixed, so that a pixel's neighbours are those of its own image.
    """
    z_own = net(own["image"])["logits"]
    z_partner = net(partner["image"])["logits"]
    logits = torch.where(mask, z_partner, z_own)
    if len(args.T) == 1:
        return logits, None
    K = adaptive_assignment(z_own, own["inside"], args)
    K_partner = adaptive_assignment(z_partner, partner["inside"], args)
    return logits, torch.where(mask[:, 0], K_partner, K)


@torch.no_grad()
def foreseen(net, image):
    """Returns the detached logits of a training-mode pass that main makes again, with a graph.

    BN's running statistics are restored. Wrong for a network with dropout, which draws anew.
    """
    before = [buffer.clone() for buffer in net.buffers()]
    logits = net(image)["logits"]
    for buffer, value in zip(net.buffers(), before, strict=True):
        buffer.copy_(value)
    return logits


def k_maps(logits, inside, progress, args, stride=1):
    """Returns K of every stride-th pixel each way: by --k-strategy, of A-FPL for several --T."""
    if len(args.T) > 1:
        return adaptive_assignment(logits, inside, args)[..., ::stride, ::stride]
    p, _ = by_rank(F.softmax(upcast(logits.detach()[..., ::stride, ::stride]), 1))
    return k_values(p, progress, args)


def masked_mean(x, mask):
    """Mean of x over the pixels where mask is True; 0 over none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def fpl_loss(logits_s, logits_t, progress, args, K=None):
    """Returns FPL's loss of every pixel, Eq. (7) times its weight, and the pseudo label, int64.

    The definition; common/fused.py has a fast twin of this name (--fused), but with one T alone.
    """
    p, order = by_rank(F.softmax(upcast(logits_t.detach()), 1))
    if K is None:
        K = k_values(p, progress, args)
    weight = adaptive_weight(p, K, args.weight, args.mean_over)  # [D24]
    return weight * fuzzy_positive_regularization(logits_s, order, K), order[:, 0]


def loss_of_pixels(logits_s, logits_t, progress, args, K):
    """Returns --unsup-loss of every pixel, and the pseudo label, int64, detached. Not of ce."""
    if K is not None:  # of several --T; the twin has one
        return fpl_loss(logits_s, logits_t, progress, args, K)
    if args.unsup_loss == "fpl":
        loss_of = pick(fpl_loss, args, logits_s.device.type)
        return loss_of(logits_s, logits_t, progress, args)
    prob_t = F.softmax(upcast(logits_t.detach()), 1)
    pseudo = prob_t.argmax(1)
    if args.unsup_loss == "soft":
        return soft_loss(logits_s, prob_t), pseudo
    return negative_loss(logits_s, prob_t), pseudo  # [D23]


def taught_loss(logits_s, logits_t, inside, progress, args, K=None):
    """CPS's L12 or L21: (loss of the network that learns, cross-entropy in its place), scalars.

    logits_s: of that network. logits_t: of the other, detached here. inside: (B, H, W) bool, the
    pixels that count. K: A-FPL's, or None. The second is detached. --unsup-loss ce: both are equal.
    FPL with --balance: both are of each image, (B,). Else the second is only logged, and is the
    mean over every fourth pixel each way.
    """
    if args.unsup_loss == "ce":
        pseudo = F.softmax(upcast(logits_t.detach()), 1).argmax(1)
        ce = cross_entropy(logits_s, pseudo.masked_fill(~inside, IGNORE))  # FPL Eq. (2)
        return ce, ce.detach()
    loss, pseudo = loss_of_pixels(logits_s, logits_t, progress, args, K)
    pseudo = pseudo.masked_fill(~inside, IGNORE)
    if args.unsup_loss == "fpl" and args.balance:
        z = upcast(logits_s.detach())
        nll = F.cross_entropy(z, pseudo, ignore_index=IGNORE, reduction="none")
        return torch.vmap(masked_mean)(loss, inside), torch.vmap(masked_mean)(nll, inside)
    ce = cross_entropy(logits_s.detach()[..., ::4, ::4], pseudo[..., ::4, ::4])
    return masked_mean(loss, inside), ce


def balanced(losses, args):
    """Returns (L12 + L21, a scalar to be minimized; what is logged of it, {name: 0-dim}).

    losses: taught_loss of both networks, or (0.0, 0.0) for one whose turn is to come. unsup: the
    sum before --balance. balance: cross-entropy / unsup, by which --balance multiplies FPL's sum,
    image by image [D16].
    """
    unsup = sum(loss for loss, _ in losses)
    ce = sum(ce for _, ce in losses)
    balance = torch.where(unsup > 0, ce / unsup.detach().clamp(min=1e-12), 1.0)
    logged = {"unsup": unsup.detach().mean(), "balance": balance.mean()}
    if args.balance and args.unsup_loss == "fpl":
        unsup = unsup * balance
    return unsup.mean(), logged


def cross_loss(students, teachers, inside, progress, args, K=(None, None)):
    """CPS's L12 + L21: network 1 learns from 2, 2 from 1. Returns (what is minimized, logged).

    students, teachers: logits of both. inside: (B, H, W) bool, what counts. K: A-FPL's, or None.
    For --no-cutmix: with CutMix main computes one loss after the other, to free each graph.
    """
    rows = zip(students, reversed(teachers), reversed(K), strict=True)
    losses = [taught_loss(z, t, inside, progress, args, K_t) for z, t, K_t in rows]
    return balanced(losses, args)


@torch.no_grad()
def teacher_statistics(teachers, inside, progress, args, K=(None, None)):
    """Means over every fourth pixel inside each way, 0-dim: K; K_gt_1, its share (Fig. 4a); weight.

    teachers: logits of both networks, (B, C, H, W). inside: (B, H, W) bool. K: A-FPL's, or None.
    """
    p, _ = by_rank(F.softmax(upcast(torch.cat(teachers)[..., ::4, ::4]), 1))
    inside = torch.cat([inside, inside])[..., ::4, ::4]
    K = torch.cat(K)[..., ::4, ::4] if len(args.T) > 1 else k_values(p, progress, args)
    weight = adaptive_weight(p, K, args.weight, args.mean_over)
    return {
        "K": masked_mean(K, inside),
        "K_gt_1": masked_mean(K > 1, inside),
        "weight": masked_mean(weight, inside),
    }


@torch.no_grad()
def label_statistics(logits, label, progress, args):
    """Returns means over every fourth labelled pixel each way, of both networks' logits, 0-dim.

    pseudo_acc: share where the likeliest class is right. coverage: share where the true one is a
    positive.
    """
    label = torch.cat([label, label])
    K = k_maps(torch.cat(logits), label < IGNORE, progress, args, 4)
    label = label[..., ::4, ::4]
    _, order = by_rank(F.softmax(upcast(torch.cat(logits)[..., ::4, ::4]), 1))
    rank = (order == label[:, None]).int().argmax(1)  # of the truth, from 0
    return {
        "pseudo_acc": masked_mean(rank == 0, label < IGNORE),
        "coverage": masked_mean(rank < K, label < IGNORE),
    }


def toggled_mask(rng, size, device="cpu"):
    """CPS's CutMix: three boxes of 1/12 to 1/6 of the crop toggle what they cover [D17]: bool."""
    mask = torch.zeros(1, size, size, dtype=torch.bool, device=device)
    for _ in range(3):
        area = rng.uniform(0.25, 0.5)  # of the three boxes together
        tall = area ** rng.uniform()
        wide = area / tall
        h = round(size * tall * 3**-0.5)
        w = round(size * wide * 3**-0.5)
        y = round((size - h) * rng.uniform())
        x = round((size - w) * rng.uniform())
        mask[:, y : y + h, x : x + w].logical_not_()
    return mask


def partner_stream(args):
    """The stream that unlabelled images are mixed with: other images, or other crops [D18]."""
    return "unlabeled.2" if args.same_image_cutmix else "partner"


def cutmix_masks(args, step, group):
    """This process's masks of a step, (B, 1, H, W) bool: a function of (seed, step) [D17]."""
    # all masks are drawn by all processes
    rng = np.random.default_rng([args.seed, zlib.crc32(b"mix"), step])
    masks = [
        toggled_mask(rng, args.crop_size, group.device) for _ in range(args.batch_size_unlabeled)
    ]
    return torch.stack(masks).chunk(group.world)[group.rank]


def of_branch(args, name):
    """Returns args as a network, branch1 or branch2, has them: with its backbone and weights."""
    if name == "branch1":
        return args
    return replace(args, backbone=args.backbone_2, weights=args.weights_2)


class Average(nn.ModuleList):
    """Networks scored as one: "logits" is the logarithm of their mean probabilities.

    Averaged at the head's stride and then upsampled, as one network's logits are: maps of x's size
    are those of one network.
    """

    def forward(self, x, upsampled=True):
        logits = [net(x, upsampled=False)["logits"] for net in self]
        # where one backbone rounds a size up, the other may round it down
        logits = [upsample(z, logits[0].shape[2:]) for z in logits]
        # finite where all p round to 0, and in an ONNX file too
        log_p = torch.stack(logits).log_softmax(2).logsumexp(0) - np.log(len(self))
        return {"logits": upsample(log_p, x.shape[2:] if upsampled else None)}


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
class CPSHead(nn.Module):
    """CPS's released head: ASPP with LeakyReLU, pooled branch added, low level 48, no dropout.

    forward: as DeepLabV3Plus of supervised.py; a dict of logits (B, C, H, W) in float32.
    """

    def __init__(self, channels, num_classes, args):
        super().__init__()
        width = args.head_channels

        def conv(inputs, kernel=1, dilation=1):
            """Convolution to the head's width, of the same size."""
            return nn.Conv2d(inputs, width, kernel, 1, kernel // 2 * dilation, dilation, bias=False)

        def norm(inputs):
            """BN and LeakyReLU."""
            return nn.Sequential(nn.BatchNorm2d(inputs), nn.LeakyReLU(0.01, inplace=True))

        branches = [conv(channels[3])]
        for rate in args.aspp_rates:
            branches.append(conv(channels[3], 3, rate))
        self.branches = nn.ModuleList(branches)
        together = width * len(branches)
        self.project = nn.Sequential(norm(together), conv(together))
        self.pool = nn.Sequential(conv(channels[3]), norm(width), conv(width))
        self.norm = norm(width)
        self.low = conv_bn_relu(channels[0], 48, 1)
        first = conv_bn_relu(width + 48, width, 3)
        self.decode = nn.Sequential(first, conv_bn_relu(width, width, 3))
        self.classify = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, stages, size):
        low = self.low(stages[0])
        high = stages[3]
        pooled = self.pool(high.mean((2, 3), keepdim=True))
        dilated = torch.cat([branch(high) for branch in self.branches], 1)
        aspp = self.norm(self.project(dilated) + pooled)
        aspp = upsample(aspp, low.shape[2:]).to(low.dtype)  # float32 under CUDA's autocast
        x = self.decode(torch.cat([low, aspp], 1))
        return {"logits": upsample(self.classify(x).float(), size)}


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
    found = {"labeled": Stream(data.labeled, args.batch_size, True, args.scales)}
    unlabeled = Stream(data.unlabeled, args.batch_size_unlabeled, False, args.scales)
    if args.unsup_weight:
        found["unlabeled"] = unlabeled
    if args.unsup_weight and args.cutmix:
        found[partner_stream(args)] = unlabeled
    return found
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
    networks = {
        name: build(of_branch(args, name), data.num_classes, CPSHead, group)
        for name in ("branch1", "branch2")
    }
    trained = list(networks.values())
    branches = [parallel(net, args, group) for net in trained]

    def scored(step):
        """The network that evaluation scores [D19]."""
        if args.evaluate == "mean":
            return Average(trained)
        return networks[args.evaluate]

    # <<< method: networks
    if args.eval_only:
        step = load_networks(load_checkpoint(args.checkpoint, __file__), networks, data)
        result, _ = evaluate(scored(step), data, getattr(data, args.eval_on), args, group)
        if group.rank == 0:
            print(report(data, {f"step {step}": result}, args.eval_on))
        return distributed.teardown()
    optimizer = make_optimizer(trained, args)
    # >>> method: state
    state = {}
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
        # With CutMix: 1. both networks as teachers, on clean images, without gradient; 2. images
        # and what the teachers say of them are mixed; 3. each network in turn: L12 or L21 on the
        # mixed images and L_s on labelled ones, backward and step. Without: labelled and unlabelled
        # images both teach [D21], with one backward and step. --unsup-weight 0: L_s alone.
        progress = step / args.total_iters
        mixes = args.unsup_weight > 0 and args.cutmix
        cross = sup = 0.0
        logits = []
        losses = [(0.0, 0.0), (0.0, 0.0)]  # taught_loss of each network
        K = [None, None]  # A-FPL's, of both teachers; with one --T the loss finds it
        logged = {}
        if mixes:
            u0 = batch["unlabeled"]
            u1 = batch[partner_stream(args)]
            mask = cutmix_masks(args, step, group)  # True: u1, the partner, is seen
            x_mixed = torch.where(mask, u1["image"], u0["image"])
            inside = torch.where(mask[:, 0], u1["inside"], u0["inside"])
            with torch.no_grad():  # in training mode: clean views move BN's statistics too [D20]
                mixed = (mixed_teacher(net, mask, u0, u1, args) for net in branches)
                teachers, K = zip(*mixed, strict=True)
                if args.balance and args.unsup_loss == "fpl":  # needs both networks' losses
                    losses[1] = taught_loss(
                        foreseen(branches[1], x_mixed), teachers[0], inside, progress, args, K[0]
                    )
        in_turns = args.cutmix  # each network has its own backward passes and step: half the graphs
        for i, net in enumerate(branches):
            if mixes:
                with distributed.no_sync(net):
                    losses[i] = taught_loss(
                        net(x_mixed)["logits"], teachers[1 - i], inside, progress, args, K[1 - i]
                    )
                    cross, logged = balanced(losses, args)
                    (args.unsup_weight * cross).backward()
                losses[i] = [x.detach() for x in losses[i]]
            logits.append(net(x_l)["logits"])
            sup_of_net = supervised_loss({"logits": logits[i]}, y_l, args)
            if in_turns:
                sup_of_net.backward()
            if in_turns and i == 0:
                optimizer.step()  # of this network, as the other one has no gradient yet
                optimizer.zero_grad(set_to_none=True)
            sup = sup + sup_of_net
        if args.unsup_weight and not args.cutmix:  # labelled images teach as well [D21]
            z_u = [net(batch["unlabeled"]["image"])["logits"] for net in branches]
            teachers = [torch.cat(pair) for pair in zip(logits, z_u, strict=True)]
            inside = torch.cat([batch["labeled"]["inside"], batch["unlabeled"]["inside"]])
            if len(args.T) > 1:
                K = [adaptive_assignment(z, inside, args) for z in teachers]
            # one pass of each network: it learns from the other's, and teaches it
            cross, logged = cross_loss(teachers, teachers, inside, progress, args, K)
        loss = sup + args.unsup_weight * cross  # Eq. (1)
        if not in_turns:
            loss.backward()
        logged = {"loss": loss, "sup": sup, **logged}
        if args.unsup_weight:
            logged.update(teacher_statistics(teachers, inside, progress, args, K))
        logged.update(label_statistics(logits, y_l, progress, args))
        # <<< method: losses
        optimizer.step()
        # >>> method: after-step
        # <<< method: after-step
        if group.world > 1 and group.device.type == "cpu":  # there BN is not synchronized
            distributed.copy_buffers(*networks.values())
        done = step + 1
        run.log_step(done, logged, args.lr * decay, begin, spent)
        if run.due(done, args.pictures_every):
            # >>> method: panels
            p, order = by_rank(F.softmax(logits[1].detach(), 1))
            K = k_maps(logits[1], batch["labeled"]["inside"], progress, args)
            maps = {
                "image": x_l,
                "truth": y_l,
                "pseudo label": order[:, 0],
                "K: 1, 2, 3 or more": (K - 1) / 2,
                "branch 1": logits[0].argmax(1),
                "weight": adaptive_weight(p, K, args.weight, args.mean_over),
            }
            if mixes:
                maps["mixed"] = x_mixed
                maps["its pseudo label"] = teachers[1].argmax(1)
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
