"""A tiny data set and a tiny network: what tests of whole runs train on, in milliseconds a step."""

import contextlib
import importlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn

from common import flags as flags_of

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "supervised mean_teacher cps_fpl ael_fpl u2pl u2pl_ael esl unimatch unimatch_v2".split()
OF_U2PL = "--anchors 5 --negatives 6 --keys 7 --bank-sizes 20 12 --delta-p 0.1"
MORE = {  # flags that make a run of a few steps do all that a long one does
    "mean_teacher": "--cutmix --warmup-iters 3",
    "u2pl": f"--warmup-iters 2 {OF_U2PL}",
    "u2pl_ael": f"--warmup-iters 2 {OF_U2PL}",
    "esl": "--anchors 6 --negatives 7 --queue 5 --parts 3 --zeta 0.12",
    "unimatch": "--threshold 0.13",
    "unimatch_v2": "--threshold 0.3",
}
# the network that is scored; else:
SCORED = {"supervised": "student", "unimatch": "student", "cps_fpl": "branch1"}
SCORED |= {name: "teacher" for name in SCRIPTS if name not in SCORED}
LINES = {  # what a line of the log has, in this order
    "supervised": "loss",
    "mean_teacher": "loss sup unsup conf",
    "cps_fpl": "loss sup unsup balance K K_gt_1 weight pseudo_acc coverage",
    "ael_fpl": "loss sup unsup balance kept conf_t K_gt_1 bank regions",
    "u2pl": "loss sup unsup unsup_weight contrast classes entropy",
    "u2pl_ael": "loss sup unsup unsup_weight kept contrast classes entropy confidence regions",
    "esl": "loss sup unsup contrast anchors parts dominant conf",
    "unimatch": """loss sup strong perturbed confident K K_gt_1 weight pseudo_acc unsure_acc
        coverage""",
    "unimatch_v2": "loss sup strong confident K K_gt_1 weight pseudo_acc unsure_acc coverage",
}
STATE = {  # what a checkpoint holds beside the networks
    "ael_fpl": "confidence present draws",
    "u2pl": "bank pushed",
    "u2pl_ael": "confidence present draws bank pushed",
    "esl": "prototypes bank pushed",
}


def script(name):
    return importlib.import_module(name)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def draw_tree(root, train=8, val=2, test=2, ids=12):
    """Draws CamVid's layout, 48x36 pixels, masks of blocks; of 12 ids the last is void."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val), ("test", test)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            mask = rng.integers(0, ids, (6, 8)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
            noise = rng.integers(0, 40, (36, 48, 3))
            pixels = (mask[..., None] * np.array([18, 7, 13]) + noise).astype(np.uint8)
            save(root / part / f"{part}{i}.jpg", pixels)
            save(root / f"{part}annot/{part}{i}.png", mask)
    return root


def draw_folder(root, classes, void=255, first=0):
    """Draws a folder of one's own, 42x36 pixels: blocks of classes from `first` on, and of none."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for i in range(count):
            mask = rng.integers(first, classes + 1, (6, 7)).astype(np.uint8)
            mask[mask == classes] = void
            pixels = rng.integers(0, 256, (36, 42, 3), dtype=np.uint8)
            save(root / f"masks/{part}/{i}.png", mask.repeat(6, 0).repeat(6, 1))
            save(root / f"images/{part}/{i}.png", pixels)
    return root


def tiny_modules(module, bare=False):
    """Returns stand-ins for make_backbone and the heads; bare: without BN and dropout."""
    if hasattr(module, "SIZES"):  # its own DINOv2 and DPT without attention and residual units

        class Block(nn.Linear):
            def __init__(self, width, heads):
                super().__init__(width, width)

        class Head(module.DPTHead):
            def __init__(self, *given):
                super().__init__(*given)
                self.before = self.after = nn.ModuleList(nn.Identity() for _ in range(4))
                for p in self.parameters():
                    p.data *= 2  # keeps the signal alive

        small = module.Size(8, 4, 2, (0, 1, 2, 3), (4, 4, 8, 8), 8)
        return {"SIZES": dict.fromkeys(module.SIZES, small), "Block": Block, "DPTHead": Head}

    def block(inputs, outputs, stride):
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(conv, norm(outputs), nn.ReLU())

    def norm(channels):
        return nn.Identity() if bare else nn.BatchNorm2d(channels)

    def make_backbone(args):
        net = nn.Module()
        net.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        net.bn1 = norm(8)
        net.relu = nn.ReLU()
        net.maxpool = nn.MaxPool2d(3, 2, 1)
        for i in (1, 2, 3, 4):
            setattr(net, f"layer{i}", block(8, 8, 2 if i == 2 else 1))
        for p in net.parameters() if bare else ():
            p.data *= 3  # keeps the signal alive
        return net

    class Head(nn.Module):
        dropout = 0.0 if bare else 0.1
        has_aux = True

        def __init__(self, channels, num_classes, args):
            super().__init__()
            self.classify = nn.Sequential(nn.Dropout2d(self.dropout), nn.Conv2d(8, num_classes, 1))
            aux = self.has_aux and args.aux_weight
            self.aux = nn.Conv2d(8, num_classes, 1) if aux else None

        def forward(self, stages, size):
            out = {"logits": module.upsample(self.classify(stages[3]).float(), size)}
            if self.aux is not None:
                out["aux"] = module.upsample(self.aux(stages[2]).float(), size)
            return out

    class HeadOfCPS(Head):  # its tensors are others than those of the other heads
        dropout = 0.0
        has_aux = False

        def __init__(self, channels, num_classes, args):
            super().__init__(channels, num_classes, args)
            self.register_buffer("other", torch.zeros(1))

    class HeadWithFeatures(Head):
        with_features = False

        def __init__(self, channels, num_classes, args):
            super().__init__(channels, num_classes, args)
            self.represent = nn.Sequential(nn.Dropout2d(self.dropout), nn.Conv2d(8, 6, 1))

        def forward(self, stages, size):
            fused = stages[0] + module.upsample(stages[3], stages[0].shape[2:])
            coarse = self.classify(fused).float()
            out = {"logits": module.upsample(coarse, size), "coarse": coarse}
            if self.aux is not None:
                out["aux"] = module.upsample(self.aux(stages[2]).float(), size)
            if self.training or self.with_features:
                out["rep"] = self.represent(fused)
            return out

    class HeadWithParts(HeadWithFeatures):
        width = 8

        def forward(self, stages, size):
            out = super().forward(stages, size)
            return out | ({"encoder": stages[3]} if "rep" in out else {})

    class HeadOfUniMatch(Head):
        perturbed = 0
        dropout = 0.0
        has_aux = False

        def forward(self, stages, size):
            n, high = self.perturbed, stages[3]
            if n:
                high = torch.cat([high, module.feature_perturbation(high[-n:])])
            logits = module.upsample(self.classify(high).float(), size)
            return {"logits": logits[:-n], "perturbed": logits[-n:]} if n else {"logits": logits}

    parts = {"make_backbone": make_backbone, "DeepLabV3Plus": Head, "CPSHead": HeadOfCPS}
    parts |= {
        "UniMatchHead": HeadOfUniMatch,
        "U2PLHead": HeadWithFeatures,
        "ESLHead": HeadWithParts,
    }
    return {name: part for name, part in parts.items() if hasattr(module, name)}


def shrink(module, monkeypatch, bare=False):
    """Gives a script the tiny network for the length of a test."""
    for name, value in tiny_modules(module, bare).items():
        monkeypatch.setattr(module, name, value)


def flags(tree, out, iters=8, log=2, evaluate=4, save=4, pictures=0, workers=0, batch=2):
    """Returns the flags of a small run on a drawn tree: two of eight images labelled at 1/4."""
    numbers = dict(total_iters=iters, log_every=log, eval_every=evaluate, save_every=save)
    numbers |= dict(pictures_every=pictures, workers=workers, batch_size=batch, crop_size=32)
    numbers["precise_bn"] = 0
    words = ["--data-root", str(tree), "--out", str(out), *"--dataset camvid --split 1/4".split()]
    for name, value in numbers.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words + ["--device", "cpu"]


def own_folder(root, out, classes, network="--backbone resnet18 --output-stride 16", **numbers):
    """Returns the flags of a small run on a folder of one's own."""
    words = [*flags(root, out, **numbers), "--dataset", "folder", "--num-classes", str(classes)]
    return words + f"--weights none --lr 0.01 {network}".split()


def resolved(module, argv):
    """Returns the resolved flags of a command line."""
    return flags_of.fill(flags_of.parse(module.Args, module.preset, argv), module.preset, argv)


def with_acting(name, argv, more=None):
    """Returns flags with those of a text, MORE's if it is left out, that act beside them."""
    module = script(name)
    more = MORE.get(name, "") if more is None else more
    parsed = flags_of.parse(module.Args, module.preset, [*more.split(), *argv])
    acts = flags_of.acting(flags_of.fill(parsed, module.preset, []))
    for flag in more.split("--")[:0:-1]:
        key = flag.split()[0].removeprefix("no-").replace("-", "_")
        argv = [*f"--{flag}".split(), *argv] if key in acts else argv
    return argv


def train(module, argv):
    """Does in this process what a script's command line would; a Refusal goes through."""
    args = resolved(module, argv)
    if args.dry_run or args.list_presets:
        flags_of.about(args, module.__file__)
    else:
        module.main(args)


def run(name, argv):
    """Makes a run of a script with the tiny network."""
    module = script(name)
    with patch.multiple(module, **tiny_modules(module)):
        train(module, argv)


# ---- the parsers of flags ----


def made_once(make):
    """Returns make with a memory: tyro makes its parser of sixty flags anew for each parse.

    That is a third of a run of the tiny network, and every test of a run parses twice.
    """
    known = {}

    def recall(kind, *given, **more):
        key = (kind, repr(given), repr(more))
        if key not in known:
            known[key] = make(kind, *given, **more)
        return known[key]

    return recall


with contextlib.suppress(ImportError, AttributeError):  # another tyro: slower, nothing else
    from tyro._parsers import ParserSpecification as Specification

    Specification.from_callable_or_type = staticmethod(
        made_once(Specification.from_callable_or_type)
    )
