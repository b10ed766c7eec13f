"""A tiny data set and a tiny network: what tests of whole runs train on, in milliseconds a step."""

import contextlib
import importlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn

import predict
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
NETWORKS = dict.fromkeys(SCRIPTS, ["student", "teacher"])
NETWORKS |= {"supervised": ["student"], "unimatch": ["student"], "cps_fpl": ["branch1", "branch2"]}
SCORED = {name: networks[-1] for name, networks in NETWORKS.items()} | {"cps_fpl": "branch1"}
LINES = {  # what a line of the log has, in this order
    "supervised": "loss",
    "mean_teacher": "loss sup unsup conf",
    "cps_fpl": "loss sup unsup balance K K_gt_1 weight pseudo_acc coverage",
    "ael_fpl": "loss sup unsup balance kept conf_t K_gt_1 bank regions",
    "u2pl": "loss sup unsup unsup_weight contrast classes entropy",
    "u2pl_ael": "loss sup unsup unsup_weight kept contrast classes entropy confidence regions",
    "esl": "loss sup unsup contrast anchors parts dominant conf",
    "unimatch": """loss sup strong perturbed commonest confident K K_gt_1 weight pseudo_acc
        unsure_acc coverage""",
    "unimatch_v2": """loss sup strong commonest confident K K_gt_1 weight pseudo_acc unsure_acc
        coverage""",
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


def pixels(path):
    return np.array(Image.open(path))


def draw_tree(root, val=2, ids=12):
    """Draws CamVid's layout, 48x36 pixels, masks of blocks; of 12 ids the last is void."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", val), ("test", 2)):
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
    if hasattr(module, "SIZES"):  # its own ViT and DPT without attention and residual units

        class Block(nn.Linear):
            def __init__(self, size):
                super().__init__(size.width, size.width)

            def forward(self, x, rope):
                return super().forward(x)

        class Head(module.DPTHead):
            def __init__(self, *given):
                super().__init__(*given)
                self.before = self.after = nn.ModuleList(nn.Identity() for _ in range(4))
                for p in self.parameters():
                    p.data *= 2  # keeps the signal alive

        small = dict(width=8, depth=4, heads=2, taken=(0, 1, 2, 3), maps=(4, 4, 8, 8), fused=8)
        sizes = {name: size._replace(**small) for name, size in module.SIZES.items()}
        return {"SIZES": sizes, "Block": Block, "DPTHead": Head}

    norm = nn.Identity if bare else nn.BatchNorm2d

    def make_backbone(args):
        net = nn.Module()
        net.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        net.bn1 = norm(8)
        net.relu = nn.ReLU()
        net.maxpool = nn.MaxPool2d(3, 2, 1)
        for i in (1, 2, 3, 4):
            conv = nn.Conv2d(8, 8, 3, 2 if i == 2 else 1, 1, bias=False)
            setattr(net, f"layer{i}", nn.Sequential(conv, norm(8), nn.ReLU()))
        for p in net.parameters() if bare else ():
            p.data *= 3  # keeps the signal alive
        return net

    head = predict.head_of(module)
    kind = next(name for name, value in vars(module).items() if value is head)
    features = kind in ("U2PLHead", "ESLHead")
    has_aux = features or kind == "DeepLabV3Plus"
    dropout = 0.1 if has_aux and not bare else 0.0

    class Head(nn.Module):
        width = 8
        with_features = False  # esl.py asks for them by this, unimatch.py for its perturbed images
        perturbed = 0

        def __init__(self, channels, num_classes, args):
            super().__init__()
            self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(8, num_classes, 1))
            self.aux = nn.Conv2d(8, num_classes, 1) if has_aux and args.aux_weight else None
            if features:
                self.represent = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(8, 6, 1))
            if kind == "CPSHead":  # its tensors are others than those of the other heads
                self.register_buffer("other", torch.zeros(1))

        def forward(self, stages, size):
            n, high = self.perturbed, stages[3]
            if features:
                high = stages[0] + module.upsample(high, stages[0].shape[2:])
            if n:
                high = torch.cat([high, module.feature_perturbation(high[-n:])])
            coarse = self.classify(high).float()
            logits = module.upsample(coarse, size)
            if n:
                return {"logits": logits[:-n], "perturbed": logits[-n:]}
            out = {"logits": logits}
            if self.aux is not None:
                out["aux"] = module.upsample(self.aux(stages[2]).float(), size)
            if features:
                out["coarse"] = coarse
                if self.training or self.with_features:
                    out |= {"rep": self.represent(high), "encoder": stages[3]}
            return out

    return {"make_backbone": make_backbone, kind: Head}


def shrink(module, monkeypatch, bare=False):
    for name, value in tiny_modules(module, bare).items():
        monkeypatch.setattr(module, name, value)


def flags(tree, out, iters=8, log=2, evaluate=4, save=4, pictures=0, workers=0, batch=2):
    """Returns the flags of a small run on a drawn tree: two of eight images labelled at 1/4."""
    words = f"""--dataset camvid --split 1/4 --crop-size 32 --precise-bn 0 --device cpu
        --total-iters {iters} --log-every {log} --eval-every {evaluate} --save-every {save}
        --pictures-every {pictures} --workers {workers} --batch-size {batch}"""
    return ["--data-root", str(tree), "--out", str(out), *words.split()]


def own_folder(root, out, classes, **numbers):
    """Returns the flags of a small run on a folder of one's own."""
    words = [*flags(root, out, **numbers), "--dataset", "folder", "--num-classes", str(classes)]
    return words + "--weights none --lr 0.01 --backbone resnet18 --output-stride 16".split()


def resolved(module, argv):
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


with contextlib.suppress(ImportError, AttributeError):  # another tyro: slower, nothing else
    from tyro._parsers import ParserSpecification as Specification

    make, made = Specification.from_callable_or_type, {}

    def recall(kind, *given, **more):
        """Makes a parser of sixty flags once: else that is a third of a run of the tiny network."""
        key = (kind, repr(given), repr(more))
        if key not in made:
            made[key] = make(kind, *given, **more)
        return made[key]

    Specification.from_callable_or_type = staticmethod(recall)
