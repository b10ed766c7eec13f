"""Labelled images only: the "SupOnly" rows of U2PL (arXiv:2203.03884v2) and ESL (ICCV 2023).

DeepLabv3+ on the labelled images, nothing else: the floor under every other script, and with
`--split all` the ceiling. The other scripts are this file plus their method, in marked seams:
`diff supervised.py mean_teacher.py` is Mean Teacher and nothing more.

  U2PL Eq. (2)     cross_entropy, ohem_cross_entropy, supervised_loss
  U2PL Sec. 4.1    DeepLabV3Plus, u2pl_recipe

  python supervised.py                                    # generated shapes, about a minute
  python supervised.py --dataset camvid --split 1/8
  torchrun --nproc_per_node 8 supervised.py --dataset cityscapes --split 1/16 --labeled-list FILE

CamVid, test mIoU: 36.6 with 6 labels, 40.7 with all (three seeds, docs/results.md).
Paper, released code and this script: docs/supervised.md.
"""

# ---- 1. Imports ------------------------------------------------------------------------------

import math
import time
import zlib
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

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
from common.data import IGNORE, counts
from common.flags import (
    Above0,
    AtLeast0,
    Backbone,
    Count,
    Number,
    Scales,
    Seed,
    Share,
    about,
    fill,
    parse,
)
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
    # how long, paper: passes over the labels; matched: the steps of mean_teacher.py
    schedule: Literal["paper", "matched"] = "paper"
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
        "schedule": "dataset!=shapes|camvid|folder, no total_iters",
        "recipe": "never",  # [D11]
        "unlabeled_list": "never",
        # <<< method: needs
    }


# >>> method: recipe
# fmt: off
VOC = dict(  # U2PL Sec. 4.1 and its released configurations
    backbone="resnet101", stem="v1c", weights="auto", output_stride=8, multi_grid=True,  # [D9]
    head_channels=256,
    split_family="u2pl", crop_size=513, scales=(0.5, 2.0), batch_size=16,
    lr=0.001, lr_head=10.0, weight_decay=1e-4, decay_on="all", aux_weight=0.0, ohem_kept=0.0,
    protocol="slide", precise_bn=0, workers=4,
    log_every=50, eval_every=1000, save_every=500, pictures_every=5000,
)
CITYSCAPES = VOC | dict(
    crop_size=769, lr=0.01, lr_head=1.0, weight_decay=5e-4, aux_weight=0.4,  # [D7]
    ohem_kept=50_000 / 769**2,  # 100,000 pixels of the two crops of a process [D1]
)
COCO = VOC | dict(  # ESL supplement Table 2 [D9]
    backbone="timm/xception65.tf_in1k", output_stride=16, protocol="whole", split_family="unimatch",
)
FOLDER = VOC | dict(  # what fits any images
    backbone="resnet50", stem="classic", protocol="whole", split="all", total_iters=20_000,
)
CAMVID = VOC | dict(  # this project's small protocols [D8]
    backbone="resnet18", stem="classic", weights="none", output_stride=16,
    split="1/8", crop_size=128, batch_size=4, total_iters=600,
    lr=0.01, lr_head=2.0, protocol="whole", precise_bn=20, workers=2,
    log_every=20, eval_every=150, save_every=150, pictures_every=300,
)
SHAPES = CAMVID | dict(
    split="1/16", crop_size=64, scales=(0.75, 1.5), batch_size=8, total_iters=120, lr=0.02,
    head_channels=64, eval_every=60, save_every=60, pictures_every=60, workers=0,
)
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


def u2pl_recipe(args):
    """U2PL Sec. 4.1: {flag: value} of a data set, and ASPP's dilations for the output stride."""
    values = dict(DATASETS[args.dataset])
    if args.dataset in ("shapes", "camvid"):
        values["aspp_rates"] = (1, 2, 3)  # a crop of 128 is 8x8 there: wide taps never learn
    elif (args.output_stride or values["output_stride"]) == 16:
        values["aspp_rates"] = (6, 12, 18)
    else:
        values["aspp_rates"] = (12, 24, 36)
    return values


def u2pl_schedule(args, batch_size):
    """U2PL Sec. 4.1: (passes over the unlabelled images, the steps of such a run).

    By the split's counts; 0 where they are unknown. Each of U2PL's processes drops its last batch.
    """
    passes = 80
    processes = 4
    if args.dataset == "cityscapes":
        passes = 200
        processes = 8
    elif args.dataset == "coco":
        passes = 30  # UniMatch's
    _, unlabeled = counts(args.dataset, args.split)
    images = math.ceil(unlabeled / processes)  # of a process
    batch = max(batch_size // processes, 1)
    return passes, passes * (images // batch)


def preset(args):
    """Returns {flag: value} for the data set, split and backbone of args under its recipe."""
    values = u2pl_recipe(args)
    batch_size = args.batch_size or values["batch_size"]
    passes, semi_supervised = u2pl_schedule(args, batch_size)
    labels, _ = counts(args.dataset, args.split)
    if labels and args.schedule == "paper":  # [D10]
        values["total_iters"] = passes * math.ceil(labels / batch_size)
    elif labels:
        values["total_iters"] = semi_supervised
    return values


# <<< method: recipe

# ---- 3. Method -------------------------------------------------------------------------------


# >>> method: functions
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
    return {"labeled": Stream(data.labeled, args.batch_size, True, args.scales)}
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
    networks = {"student": student}
    trained = [student]

    def scored(step):
        """The network that evaluation scores after so many steps."""
        return student

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
        out = student_parallel(x_l)
        loss = supervised_loss(out, y_l, args)
        loss.backward()
        logged = {"loss": loss}
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
            maps = {"image": x_l, "label": y_l, "prediction": out["logits"].argmax(1)}
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
