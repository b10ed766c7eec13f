"""UniMatch V2 and FixMatch on DINOv2 (arXiv:2410.10777, TPAMI 2025), with cross-entropy or FPL.

A teacher, the moving average of the student, labels weakly augmented images; the student learns
these labels on strong views of the same crops, with CutMix. FixMatch has one strong view; UniMatch
V2 has two, and the channels that one view's features lose are those that the other's keep.
--unsup-loss fpl (2210.08519v2) has K labels a pixel (Alg. 1) in place of one above --threshold.
DINOv2 (arXiv:2304.07193) or DINOv3 (arXiv:2508.10104), and DPT (arXiv:2103.13413), the network, are
section 4.

  teacher                      update_teacher, ema_decay, the text of mean_teacher.py
  weak-to-strong consistency   make_target, pixel_loss, consistency, the text of unimatch.py
  strong views, CutMix         drawn_operations, strong_view, drawn_box, mixed, strong_views
  complementary dropout        complementary_masks
  FPL Alg. 1, Eq. (7), (11)    fuzzy_positive_loss and what it calls, the text of ael_fpl.py
  A-FPL's T (code, IJCV 2025)  adaptive_assignment
  DINOv2, DINOv3               ViT, Block; position_embedding; RoPE, apply_rope
  DPT                          Residual, DPTHead
  AdamW with two rates         make_optimizer

  python unimatch_v2.py                                   # generated shapes, no data needed
  python unimatch_v2.py --dataset voc --split 92 --views 1                             # FixMatch
  torchrun --nproc_per_node 4 unimatch_v2.py --dataset cityscapes --split 1/16 \
      --backbone dinov2_vitb14 --unsup-loss fpl

Not measured with pretrained weights. Released code and this script: docs/unimatch_v2.md.
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
from PIL import ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import functional as colours

from common import Refusal, distributed, metrics
from common.checkpoints import load_checkpoint, load_networks
from common.data import IGNORE, counts
from common.flags import (
    Above0,
    AtLeast0,
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
from common.weights import load_dino

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
    # ViT-S, ViT-B or ViT-L of DINOv2 or DINOv3, with patches of 14 or 16 pixels
    backbone: (
        Literal[
            "dinov2_vits14",
            "dinov2_vitb14",
            "dinov2_vitl14",
            "dinov3_vits16",
            "dinov3_vitb16",
            "dinov3_vitl16",
        ]
        | None
    ) = None
    # of the backbone: none (random), auto (Meta's; DINOv2's alone) or a file [D9]
    weights: str | None = None
    init: str = ""  # a last.pt or best.pt of this script to start from
    freeze: Number = 0  # the first so many blocks of the backbone learn nothing
    # keep no activations of a block: less memory, each block is computed twice
    checkpoint_activations: bool = False
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
    batch_size_unlabeled: Count | None = None  # unlabelled images per step, over all processes
    views: Literal[1, 2] = 2  # strong views of an unlabelled image; 1: FixMatch
    # channels that the features of one view lose are those that the other's keep
    complementary_dropout: bool = True
    kept_whole: Share = 0.5  # share of the images whose features lose no channel [D24]
    ema_decay: Share = 0.996  # of the teacher's moving average
    unsup_loss: Literal["ce", "fpl"] = "ce"  # on unlabelled images
    threshold: Share | None = None  # tau, the least confidence of a pseudo label that counts
    # CutMix shows, batch: the next image; reversed: that of the process's batch reversed [D10]
    partner: Literal["batch", "reversed"] | None = None
    # upper bound of the cumulative probability; several: each pixel's own, by A-FPL [D21]
    T: Annotated[tuple[Inside01, ...], Rising(strict=True)] | None = None
    k_max: Number | None = None  # K at most; 0: no cap
    strict: bool | None = None  # cumulative probability > T, as printed; False: >= T
    # weight of a pixel, concave: FPL Eq. (11); linear, convex: Eq. (16)
    weight: Literal["concave", "linear", "convex", "none"] = "concave"
    # what that weight averages: the K positives, or also the next class (as released)
    mean_over: Literal["positives", "positives_and_next"] | None = None
    # FPL's loss, off: as written here; on: the twin in common/fused.py; auto: on where it is faster
    fused: Literal["auto", "on", "off"] = "auto"
    PAIRS: ClassVar[str] = ""  # CutMix always mixes pairs of a process: common/flags.py
    # <<< method: args

    NEEDS: ClassVar[dict] = {  # flag: what it needs to act, as common/flags.py has it
        "data_root": "dataset!=shapes",
        "cache": "dataset!=shapes",
        "split_family": "dataset!=shapes|camvid|folder, no split_seed, split!=all|list",
        "split_seed": "split!=all, no labeled_list",
        "weights": "no init",
        # >>> method: network-needs
        # <<< method: network-needs
        # >>> method: needs
        "complementary_dropout": "views=2",
        "kept_whole": "views=2, complementary_dropout",
        "threshold": "unsup_loss=ce",  # [D20]
        "T": "unsup_loss=fpl",
        "k_max": "unsup_loss=fpl",
        "strict": "unsup_loss=fpl",
        "weight": "unsup_loss=fpl",
        "mean_over": "unsup_loss=fpl, weight!=none",
        "fused": "unsup_loss=fpl",
        "aux_weight": "never",
        # <<< method: needs
    }


# >>> method: recipe
# fmt: off
VOC = dict(  # the released configurations
    backbone="dinov2_vits14", weights="auto",  # [D9]
    split_family="u2pl", crop_size=518, scales=(0.5, 2.0), batch_size=16,  # [D19]
    lr=5e-6, lr_head=40.0, weight_decay=0.01, decay_on="all",  # [D7] [D29]
    aux_weight=0.0, ohem_kept=0.0, threshold=0.95, T=(0.9,),
    protocol="whole", precise_bn=0, workers=4,
    log_every=50, eval_every=1000, save_every=500, pictures_every=5000,
)
CITYSCAPES = VOC | dict(
    split_family="cps", crop_size=798, batch_size=8,
    ohem_kept=100_000 / 798**2,  # 200,000 pixels of the two crops of a process [D1]
    protocol="slide",
)
COCO = VOC | dict(split_family="unimatch")
FOLDER = VOC | dict(split="all", total_iters=20_000)  # what fits any images
CAMVID = VOC | dict(  # this project's small protocols [D8]
    weights="none", split="1/8", crop_size=126, batch_size=4, total_iters=600,
    lr=1e-4, lr_head=10.0, workers=2,
    log_every=20, eval_every=150, save_every=150, pictures_every=300,
)
SHAPES = CAMVID | dict(
    split="1/16", crop_size=70, scales=(0.75, 1.5), total_iters=40,
    log_every=5, eval_every=40, save_every=40, pictures_every=40, workers=0,
)
RECIPES = {  # [D10] [D13] to [D15]
    "paper": dict(partner="batch", k_max=0, strict=True, mean_over="positives"),
    "official": dict(partner="reversed", k_max=3, strict=False, mean_over="positives_and_next"),
}
# fmt: on
DATASETS = {
    "shapes": SHAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "voc_aug": VOC,
    "cityscapes": CITYSCAPES,
    "coco": COCO,
    "ade20k": COCO | dict(batch_size=8),
    "folder": FOLDER,
}


def steps_as_released(args, batch_size):
    """Steps of the released runs: 60 passes (City 180, COCO 20) over the unlabelled images [D22].

    By the split's counts, also beside --unlabeled-list; 0 where they are unknown. Each of four
    processes drops its last batch.
    """
    passes = {"cityscapes": 180, "coco": 20}.get(args.dataset, 60)
    _, unlabeled = counts(args.dataset, args.split)
    images = math.ceil(unlabeled / 4)  # of a process
    return passes * (images // max(batch_size // 4, 1))


def preset(args):
    """Returns {flag: value} for the data set and split of args under its recipe."""
    values = DATASETS[args.dataset] | RECIPES[args.recipe]
    batch_size = args.batch_size or values["batch_size"]
    values["batch_size_unlabeled"] = batch_size
    steps = steps_as_released(args, args.batch_size_unlabeled or batch_size)
    values["total_iters"] = steps or values.get("total_iters")
    size = SIZES[args.backbone or values["backbone"]]
    values["crop_size"] = nearest_multiple(values["crop_size"], size.patch)  # [D32]
    if args.T and len(args.T) > 1 and args.fused == "on":
        raise Refusal("--fused on: the twin has one --T; leave --fused out")
    if args.precise_bn:
        raise Refusal("--precise-bn: there is no BN in a ViT and DPT; leave it out")
    if args.checkpoint_activations and args.freeze == size.depth:
        raise Refusal(f"--checkpoint-activations: no block learns beside --freeze {args.freeze}")
    return values


# <<< method: recipe

# ---- 3. Method -------------------------------------------------------------------------------


# >>> method: functions
# Shapes: images (B, 3, H, W) uint8; logits (B, C, H, W), by class; p, order (B, C, H, W), by rank,
# the likeliest class first; inside, K, conf, pseudo and every loss of a pixel (B, H, W). s: of the
# view that learns. t: of the one that teaches; no gradient reaches it. target: {name: map} of
# make_target, which CutMix mixes as it mixes images.

# ---- strong views ----


def drawn_operations(rng, size):
    """Draws what makes a strong view in a crop of this side: [(function, its numbers)] [D18].

    In the order of application; the functions are those of torchvision.transforms.v2.functional.
    With probability 0.8 brightness, contrast and saturation change by up to 0.5 and hue by up to
    0.25, in any order; grey with 0.2; with 0.5 a Gaussian blur of deviation 0.1 to 2 pixels, cut
    after four of it.
    """
    jitter = [
        ("adjust_brightness", rng.uniform(0.5, 1.5)),
        ("adjust_contrast", rng.uniform(0.5, 1.5)),
        ("adjust_saturation", rng.uniform(0.5, 1.5)),
        ("adjust_hue", rng.uniform(-0.25, 0.25)),
    ]
    operations = []
    if rng.random() < 0.8:
        operations += [jitter[i] for i in rng.permutation(4)]
    if rng.random() < 0.2:
        operations.append(("rgb_to_grayscale", 3))  # channels
    if rng.random() < 0.5:
        deviation = rng.uniform(0.1, 2)
        side = 2 * min(math.ceil(4 * deviation), size - 1) + 1  # of its kernel
        operations.append(("gaussian_blur", side, deviation))
    return operations


def strong_view(image, operations):
    """Returns an image (3, H, W) uint8 after operations, on its device; each rounds to uint8."""
    for name, *numbers in operations:
        image = getattr(colours, name)(image, *numbers)
    return image


def drawn_box(rng, size):
    """Draws CutMix's box in a crop, (top, left, height, width); in half of the cases empty [D23].

    Area between 0.02 and 0.4 of the crop, height / width between 0.3 and 1 / 0.3; ratio and place
    are drawn again until the box fits, the area is kept.
    """
    if rng.random() < 0.5:
        return 0, 0, 0, 0
    area = rng.uniform(0.02, 0.4) * size * size
    while True:
        ratio = rng.uniform(0.3, 1 / 0.3)
        height = int(math.sqrt(area * ratio))
        width = int(math.sqrt(area / ratio))
        top = int(rng.integers(size))
        left = int(rng.integers(size))
        if top + height <= size and left + width <= size:
            return top, left, height, width


def strong_views(weak, name, step, args, group):
    """Returns strong views of this process's weak images, and masks of their boxes.

    Images as weak; masks (B, 1, H, W) bool, True: the partner is seen. A function of (seed, name,
    sample number), the same for any number of processes.
    """
    first = step * args.batch_size_unlabeled + group.rank * len(weak)
    images = []
    masks = np.zeros((len(weak), 1, *weak.shape[2:]), bool)
    for i, image in enumerate(weak):
        rng = np.random.default_rng([args.seed, zlib.crc32(name.encode()), first + i])
        images.append(strong_view(image, drawn_operations(rng, args.crop_size)))
        top, left, height, width = drawn_box(rng, args.crop_size)
        masks[i, :, top : top + height, left : left + width] = True
    return torch.stack(images), distributed.to_device(masks, group)


def swapped(maps):
    """Returns {name: map} with the images of each pair (2k, 2k + 1) exchanged."""
    return {name: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) for name, x in maps.items()}


def partners(maps, args):
    """Returns {name: map} of the images that CutMix shows in the boxes, by --partner [D10]."""
    if args.partner == "reversed":
        return {name: x.flip(0) for name, x in maps.items()}
    return swapped(maps)


def mixed(mask, own, partner):
    """CutMix: {name: map} of the partner where mask (B, 1, H, W) is True; all maps alike."""
    masks = {4: mask, 3: mask[:, 0]}  # by the dimensions of a map
    return {name: torch.where(masks[x.ndim], partner[name], x) for name, x in own.items()}


# ---- teacher ----


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


# ---- FPL ----


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


def k_of(logits_t, inside, args, stride=1):
    """Returns K of Alg. 1 for one --T, of A-FPL for several; of every stride-th pixel each way."""
    if len(args.T) > 1:
        return adaptive_assignment(logits_t, inside, args)[..., ::stride, ::stride]
    p, _ = by_rank(F.softmax(upcast(logits_t.detach()[..., ::stride, ::stride]), 1))
    return fuzzy_positive_assignment(p, args.T[0], k_max=args.k_max, strict=args.strict)


# ---- consistency ----


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


def make_target(logits_t, inside, args):
    """Returns what the views of an image learn, {name: map}, detached.

    inside: the pixels that count. ce: also pseudo, the likeliest class, int64, and conf, its
    probability. fpl: also logits, and with several --T K, chosen here, before CutMix, by neighbours
    of the same image.
    """
    if args.unsup_loss == "ce":
        prob = F.softmax(upcast(logits_t.detach()), 1)
        return {"inside": inside, "conf": prob.amax(1), "pseudo": prob.argmax(1)}
    target = {"inside": inside, "logits": logits_t.detach()}
    if len(args.T) > 1:
        target["K"] = adaptive_assignment(logits_t, inside, args)
    return target


def pixel_loss(logits_s, target, args):
    """Returns the loss of every pixel, whether it is inside or not.

    ce: cross-entropy with the pseudo label, 0 where its confidence is below the threshold. fpl:
    FPL Eq. (7) times its weight, Eq. (11).
    """
    if args.unsup_loss == "ce":
        nll = F.cross_entropy(upcast(logits_s), target["pseudo"], reduction="none")
        return nll * (target["conf"] >= args.threshold)
    return pixel_fpl(logits_s, target["logits"], target.get("K"), args)


def consistency(logits_s, target, count, args):
    """Returns a view's loss, a scalar: the sum over the pixels inside, divided by count [D16].

    count: of inside_counts, 0-dim. Pixels below the threshold are among them, as released.
    """
    return (pixel_loss(logits_s, target, args) * target["inside"]).sum() / count


def inside_counts(views, group):
    """Returns each view's number of pixels inside, averaged over processes, (len(views),), above 0.

    views: dicts with "inside". A loss divided by it becomes the mean over the batch of all
    processes, as gradients are averaged over processes [D16].
    """
    inside = torch.stack([view["inside"].sum() for view in views])
    return distributed.reduced(inside).clamp(min=1) / group.world


def complementary_masks(images, channels, whole, device):
    """Draws what the features of two strong views are multiplied by, (2, images, channels, 1, 1).

    A channel of an image is 2 in one view and 0 in the other, at even odds; a share `whole` of the
    images, rounded down and drawn at random, has 1 in both [D24].
    """
    first = 2 * torch.empty(images, channels, device=device).bernoulli_(0.5)
    masks = torch.stack([first, 2 - first])
    kept = torch.randperm(images, device=device)[: int(images * whole)]
    masks.index_fill_(1, kept, 1.0)  # an assigned 1.0 would make the host wait for CUDA
    return masks[..., None, None]


def masked_mean(x, mask):
    """Mean of x over the pixels where mask is True; 0 over none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def statistics(logits, inside, args, truth=None, K=None):
    """Returns means over every fourth pixel inside each way, 0-dim. K: A-FPL's, if it is known.

    Without truth: commonest, the share of the class that is predicted most often (near 1: collapse
    to one class); confident, the share of p >= 0.95; K; K_gt_1, the share of K > 1; weight. With
    truth (B, H, W): pseudo_acc, the share where the likeliest class is right; unsure_acc, the same
    where p < 0.95; coverage, the share where the true class is a positive.
    """
    p, order = by_rank(F.softmax(upcast(logits[..., ::4, ::4]), 1))
    K = k_of(logits, inside, args, 4) if K is None else K[..., ::4, ::4]
    inside = inside[..., ::4, ::4]
    sure = p[:, 0] >= 0.95  # the released threshold, under any loss
    if truth is None:
        classes = torch.arange(p.shape[1], device=p.device)[:, None]
        each = (order[:, 0].flatten() == classes) & inside.flatten()
        return {
            "commonest": each.sum(1).amax() / inside.sum().clamp(min=1),
            "confident": masked_mean(sure, inside),
            "K": masked_mean(K, inside),
            "K_gt_1": masked_mean(K > 1, inside),
            "weight": masked_mean(adaptive_weight(p, K, args.weight, args.mean_over), inside),
        }
    rank = (order == truth[:, None, ::4, ::4]).int().argmax(1)  # of the truth, from 0
    return {
        "pseudo_acc": masked_mean(rank == 0, inside),
        "unsure_acc": masked_mean(rank == 0, inside & ~sure),
        "coverage": masked_mean(rank < K, inside),
    }


def label_map(target, args):
    """Returns an image's pseudo label as a panel, int64; -1, white, where it does not count."""
    if args.unsup_loss == "ce":
        unused = ~target["inside"] | (target["conf"] < args.threshold)
        return target["pseudo"].masked_fill(unused, -1)
    return target["logits"].argmax(1).masked_fill(~target["inside"], -1)


def view_maps(number, view, logits_s, args):
    """Returns panels of a strong view, {title: map}; K, of its target, with FPL alone."""
    maps = {
        f"strong {number}": view["strong"],
        f"mixed {number}": view["image"],
        f"label {number}": label_map(view, args),
    }
    if args.unsup_loss == "fpl":
        K = view["K"] if "K" in view else k_of(view["logits"], view["inside"], args)
        maps[f"K {number}"] = (K - 1) / 2
    maps[f"student {number}"] = logits_s.argmax(1)
    return maps


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
GRID = 37  # patches a side of images of 518 pixels, DINOv2's last resolution in training


class Size(NamedTuple):
    """A published ViT of DINOv2 or DINOv3, and the DPT that UniMatch V2 puts on it."""

    version: int  # of DINO: 2 or 3
    patch: int  # its side in pixels
    eps: float  # of the norms
    width: int  # channels of a token
    depth: int  # blocks
    heads: int  # of attention
    taken: tuple  # blocks, from 0, whose tokens DPT takes
    maps: tuple  # channels of its four maps
    fused: int  # channels that they have where they are added


# fmt: off
V2 = dict(version=2, patch=14, eps=1e-6)
V3 = dict(version=3, patch=16, eps=1e-5)
VIT_S = dict(
    width=384, depth=12, heads=6, taken=(2, 5, 8, 11), maps=(48, 96, 192, 384), fused=64,
)
VIT_B = dict(
    width=768, depth=12, heads=12, taken=(2, 5, 8, 11), maps=(96, 192, 384, 768), fused=128,
)
VIT_L = dict(
    width=1024, depth=24, heads=16, taken=(4, 11, 17, 23), maps=(256, 512, 1024, 1024), fused=256,
)
# fmt: on
SIZES = {
    "dinov2_vits14": Size(**V2, **VIT_S),
    "dinov2_vitb14": Size(**V2, **VIT_B),
    "dinov2_vitl14": Size(**V2, **VIT_L),
    "dinov3_vits16": Size(**V3, **VIT_S),
    "dinov3_vitb16": Size(**V3, **VIT_B),
    "dinov3_vitl16": Size(**V3, **VIT_L),
}


class RoPE(nn.Module):
    """DINOv3's rotary position embedding.

    forward: h, w, others -> cos and sin (others + h w, d / 2) float32, d the width of a head. The
    patch at (i, j) has the coordinates (2 i + 1) / h - 1 and (2 j + 1) / w - 1; a coordinate c
    rotates d / 4 pairs of channels by the angles 2 pi c / period. Nothing is drawn in training
    [D31]. The first `others` tokens, which are no patches, have the angle 0.
    """

    def __init__(self, d):
        super().__init__()
        self.register_buffer("periods", 100 ** (torch.arange(d // 4) / (d // 4)))  # [D30]

    def forward(self, h, w, others):
        rows = (2 * torch.arange(h, device=self.periods.device) + 1) / h - 1
        columns = (2 * torch.arange(w, device=self.periods.device) + 1) / w - 1
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), 2)
        angles = 2 * math.pi * places[..., None] / self.periods  # (h, w, 2, d / 4)
        angles = F.pad(angles.flatten(2).flatten(0, 1), (0, 0, others, 0))
        return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotates the pairs of channels (i, i + d / 2) of queries or keys (B, heads, N, d)."""
    a, b = x.chunk(2, 3)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], 3).to(x.dtype)


class KMaskedLinear(nn.Linear):
    """Queries, keys and values of DINOv3: the bias of keys is masked."""

    def __init__(self, width):
        super().__init__(width, 3 * width)
        mask = torch.ones(3, width)
        mask[1] = 0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    """Self-attention of tokens (B, N, width). rope: RoPE's (cos, sin), or None."""

    def __init__(self, size):
        super().__init__()
        self.heads = size.heads
        if size.version == 3:
            self.qkv = KMaskedLinear(size.width)
        else:
            self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q = apply_rope(q, *rope)
            k = apply_rope(k, *rope)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.gamma * x.to(self.gamma.dtype)  # tokens are float32 under autocast too


class Block(nn.Module):
    """Attention, then an MLP, of normalized tokens (B, N, width), each scaled and added."""

    def __init__(self, size):
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, size.eps)
        self.attn = Attention(size)
        self.ls1 = LayerScale(size.width)
        self.norm2 = nn.LayerNorm(size.width, size.eps)
        self.mlp = nn.Sequential()
        self.mlp.fc1 = nn.Linear(size.width, 4 * size.width)
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = nn.Linear(4 * size.width, size.width)
        self.ls2 = LayerScale(size.width)

    def forward(self, x, rope):
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2's or DINOv3's ViT; its parameters have the names of Meta's files.

    DINOv2, here without register tokens, adds a position embedding to every patch; DINOv3 has four
    register tokens, and RoPE in every block. forward: (B, 3, H, W) normalized, H and W multiples of
    the patch -> what the taken blocks make of the patches, normalized once more: four (B, width, H
    / patch, W / patch).
    """

    checkpointed = False  # --checkpoint-activations

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(3, size.width, size.patch, size.patch)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, size.eps)
        if size.version == 3:
            self.storage_tokens = nn.Parameter(torch.zeros(1, 4, size.width))
            nn.init.trunc_normal_(self.storage_tokens, std=0.02)
            self.rope_embed = RoPE(size.width // size.heads)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID * GRID, size.width))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        patches = self.patch_embed(x).to(self.cls_token.dtype)
        h, w = patches.shape[2:]
        rope = None
        if self.size.version == 3:
            first = torch.cat([self.cls_token, self.storage_tokens], 1)
            rope = self.rope_embed(h, w, first.shape[1])
        else:
            first = self.cls_token + self.pos_embed[:, :1]
            patches = patches + position_embedding(self.pos_embed[:, 1:], h, w)
        first = first.expand(x.shape[0], -1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)
        maps = []
        for number, block in enumerate(self.blocks):
            learns = torch.is_grad_enabled() and next(block.parameters()).requires_grad
            if self.checkpointed and learns:
                x = checkpoint(block, x, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope)
            if number in self.size.taken:
                normalized = self.norm(x)[:, first.shape[1] :]
                maps.append(normalized.transpose(1, 2).unflatten(2, (h, w)))
        return maps


def position_embedding(grid, h, w):
    """Returns the embedding (1, GRID^2, width) interpolated to h x w patches, (1, width, h, w).

    As published [D27]: bicubic, without antialiasing, by the factors (h + 0.1) / GRID and (w + 0.1)
    / GRID, which also say where is sampled; as it is for GRID x GRID.
    """
    rows = torch.arange(h, device=grid.device, dtype=grid.dtype)
    columns = torch.arange(w, device=grid.device, dtype=grid.dtype)
    kept = (rows[-1] + 1 == GRID) & (columns[-1] + 1 == GRID)  # tensors: an export is of all
    with torch.autocast(grid.device.type, enabled=False):
        grid = grid.unflatten(1, (GRID, GRID))
        grid = torch.einsum("hi,bijc->bhjc", bicubic_weights(rows, kept), grid)
        return torch.einsum("wj,bhjc->bchw", bicubic_weights(columns, kept), grid)


def bicubic_weights(places, kept):
    """Returns the weights of GRID values in each of n places, (n, GRID): Keys' cubic, a = -0.75.

    places: 0 ... n - 1. kept: bool, the places are those of the values. Beyond the border lies the
    last value.
    """
    step = torch.where(kept, 1.0, GRID / (places[-1] + 1.1))
    at = (places + 0.5) * step - 0.5
    values = torch.arange(GRID, device=places.device)
    weights = 0.0
    for offset in (-1, 0, 1, 2):
        tap = at.floor() + offset
        d = (at - tap).abs()
        near = (1.25 * d - 2.25) * d * d + 1
        far = ((-0.75 * d + 3.75) * d - 6) * d + 3
        hit = tap.clamp(0, GRID - 1)[:, None] == values
        weights = weights + hit * torch.where(d <= 1, near, far)[:, None]
    return weights


def make_backbone(args):
    """Returns the ViT of --backbone.

    The first --freeze blocks and what comes before them do not learn, and with all blocks the last
    norm does not either. Raises Refusal for more blocks than there are.
    """
    net = ViT(SIZES[args.backbone])
    load_dino(net, args.weights, args.backbone)
    depth = len(net.blocks)
    if args.freeze > depth:
        raise Refusal(f"--freeze {args.freeze}: {args.backbone} has {depth} blocks")
    net.checkpointed = args.checkpoint_activations
    if args.freeze:
        net.requires_grad_(False)
        net.blocks[args.freeze :].requires_grad_()
        net.norm.requires_grad_(args.freeze < depth)
    return net


def features(net, x):
    """Returns a ViT's four maps of images (B, 3, H, W) of any size.

    They are resized so that each side is the nearest multiple of a patch, as released for
    evaluation; a crop of such sides stays as it is [D28].
    """
    size = [nearest_multiple(side, net.size.patch) for side in x.shape[2:]]
    return net(upsample(x, size))


def nearest_multiple(side, patch):
    """Returns the multiple of patch nearest to side, at least one; half a patch is rounded up."""
    return max((side + patch // 2) // patch, 1) * patch


# <<< method: backbone


# >>> method: head
class Residual(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, around a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DPTHead(nn.Module):
    """DPT as UniMatch V2 has it: no BN, no dropout; the class token is not read.

    Four maps at the stride of a patch become maps at 1/4, 1/2, 1 and 2 of that and are added from
    the coarsest up.
    forward: stages (four (B, width, h, w)), size (H, W) -> dict of logits (B, C, H, W) float32.
    masks: None, or what the stages are multiplied by, (B, width, 1, 1).
    """

    masks = None

    def __init__(self, channels, num_classes, args):
        super().__init__()
        size = SIZES[args.backbone]
        width = size.fused
        pairs = zip(channels, size.maps, strict=True)
        self.project = nn.ModuleList(nn.Conv2d(before, after, 1) for before, after in pairs)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(size.maps[0], size.maps[0], 4, 4),
                nn.ConvTranspose2d(size.maps[1], size.maps[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(size.maps[3], size.maps[3], 3, 2, 1),
            ]
        )
        self.narrow = nn.ModuleList(nn.Conv2d(c, width, 3, 1, 1, bias=False) for c in size.maps)
        self.before = nn.ModuleList(Residual(width) for _ in range(3))  # not of the coarsest [D6]
        self.after = nn.ModuleList(Residual(width) for _ in range(4))
        self.out = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(4))
        self.classify = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, num_classes, 1)
        )

    def forward(self, stages, size):
        if self.masks is not None:
            stages = [stage * self.masks for stage in stages]
        maps = []
        for number, stage in enumerate(stages):
            stage = self.resize[number](self.project[number](stage))
            maps.append(self.narrow[number](stage))
        x = maps[3]
        for number in (3, 2, 1, 0):
            if number < 3:
                x = x + self.before[number](maps[number])
            finer = [2 * side for side in x.shape[2:]]
            if number:
                finer = maps[number - 1].shape[2:]
            x = self.out[number](upsample(self.after[number](x), finer))
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
        channels = 4 * [SIZES[args.backbone].width]
        mean = torch.tensor(MEAN)
        std = torch.tensor(STD)
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
    """Returns AdamW over what learns; "scale" is a group's multiple of lr."""
    groups = []
    for module, scale in (("backbone", 1.0), ("head", args.lr_head)):
        params = [p for net in trained for p in getattr(net, module).parameters()]
        params = [p for p in params if p.requires_grad]
        weights = [p for p in params if p.ndim > 1]
        vectors = [p for p in params if p.ndim < 2]  # of norms, factors of channels, biases
        vector_decay = 0.0 if args.decay_on == "weights" else args.weight_decay
        groups.append({"params": weights, "scale": scale, "weight_decay": args.weight_decay})
        groups.append({"params": vectors, "scale": scale, "weight_decay": vector_decay})
    return torch.optim.AdamW(groups, args.lr)


# <<< method: optimizer


def main(args):
    """Trains, or scores with --eval-only; args as fill returns them."""
    group = distributed.setup(args.device)
    torch.use_deterministic_algorithms(args.deterministic)
    data = load(args)

    # -- networks --
    torch.manual_seed(args.seed)
    # >>> method: networks
    student = build(args, data.num_classes, DPTHead, group)
    student_parallel = parallel(student, args, group)
    teacher = deepcopy(student).requires_grad_(False)  # never in DDP
    networks = {"student": student, "teacher": teacher}
    trained = [student]

    def scored(step):
        """The network that evaluation scores, and that is reported [D25]."""
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
    state = {}  # the teacher is among the networks
    check_fit(args, group.world, data.num_classes)
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
        weak = batch["unlabeled"]
        teacher.eval()
        with torch.no_grad():  # the teacher sees the weak view, and all channels of its features
            logits_w = teacher(weak["image"])["logits"]
        target = make_target(logits_w, weak["inside"], args)
        views = []
        for number in range(args.views):
            images, mask = strong_views(weak["image"], f"view{number}", step, args, group)
            own = {"image": images, **target}
            views.append(mixed(mask, own, partners(own, args)))
            views[-1]["strong"] = images
        with distributed.no_sync(student_parallel):  # gradients are averaged in the last backward
            logits_l = student_parallel(x_l)["logits"]
            sup = supervised_loss({"logits": logits_l}, y_l, args)
            (sup / 2).backward()  # L = (sup + strong) / 2, term by term: frees their graphs
        if args.views == 2 and args.complementary_dropout:
            width = SIZES[args.backbone].width
            masks = complementary_masks(len(weak["image"]), width, args.kept_whole, group.device)
            student.head.masks = masks.flatten(0, 1)
        x_s = torch.cat([view["image"] for view in views])
        logits_s = student_parallel(x_s)["logits"].chunk(args.views)
        student.head.masks = None
        rows = zip(logits_s, views, inside_counts(views, group), strict=True)
        strong = sum(consistency(z, view, count, args) for z, view, count in rows) / args.views
        (strong / 2).backward()
        logged = {
            "loss": ((sup + strong) / 2).detach(),
            "sup": sup,
            "strong": strong,
            **statistics(logits_w, weak["inside"], args, K=target.get("K")),
            **statistics(logits_l, y_l < IGNORE, args, y_l),
        }
        # <<< method: losses
        optimizer.step()
        # >>> method: after-step
        # ViT and DPT have no buffers that change [D26]
        update_teacher(teacher, student, ema_decay(step, args.ema_decay), "own")
        # <<< method: after-step
        if group.world > 1 and group.device.type == "cpu":  # there BN is not synchronized
            distributed.copy_buffers(*networks.values())
        done = step + 1
        run.log_step(done, logged, args.lr * decay, begin, spent)
        if run.due(done, args.pictures_every):
            # >>> method: panels
            maps = {
                "weak": weak["image"],
                "its pseudo label": label_map(target, args),
                "confidence": F.softmax(upcast(logits_w.detach()), 1).amax(1),
                "K: 1, 2, 3 or more": (k_of(logits_w, weak["inside"], args) - 1) / 2,
            }
            for number, view in enumerate(views):
                maps.update(view_maps(number + 1, view, logits_s[number], args))
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
