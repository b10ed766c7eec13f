"""A network that its authors released, as a checkpoint of the script here.

    python results/released.py best.pth --dataset voc --out runs/released
    python unimatch_v2.py --eval-only --checkpoint runs/released/best.pt    # beside their number
    python predict.py runs/released photos --out pictures
    python unimatch_v2.py --dataset folder --num-classes 4 --init runs/released/best.pt

Takes what unimatch_v2.py of UniMatch V2 saves, a .pth with student and teacher, and gives both the
names that they have here. Every key must fit, but those of two parts that compute nothing: the
token of pretraining's masks, and a unit of DPT that is never called [D6]. The step of the
checkpoint is the number of their epochs.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import unimatch_v2  # noqa: E402
from common import Refusal  # noqa: E402
from common.checkpoints import write_checkpoint  # noqa: E402
from common.data import Data  # noqa: E402
from common.distributed import Group  # noqa: E402
from common.flags import acting, cli, merge  # noqa: E402
from common.run import refusals  # noqa: E402
from common.weights import unfit  # noqa: E402

BACKBONES = {384: "dinov2_vits14", 768: "dinov2_vitb14", 1024: "dinov2_vitl14"}  # by their width
UNUSED = ("backbone.mask_token", "head.scratch.refinenet4.resConfUnit1.")
NAMES = {  # of DPT, there and here; the ViT has Meta's names in both
    r"^head\.projects\.": "head.project.",
    r"^head\.resize_layers\.": "head.resize.",
    r"^head\.scratch\.layer(\d)_rn\.": "head.narrow.{}.",
    r"^head\.scratch\.refinenet(\d)\.resConfUnit1\.": "head.before.{}.",
    r"^head\.scratch\.refinenet(\d)\.resConfUnit2\.": "head.after.{}.",
    r"^head\.scratch\.refinenet(\d)\.out_conv\.": "head.out.{}.",
    r"^head\.scratch\.output_conv\.": "head.classify.",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Makes a checkpoint of unimatch_v2.py out of one of UniMatch V2's."""

    file: Annotated[str, tyro.conf.Positional]  # their best.pth or latest.pth
    dataset: Literal["voc", "voc_aug", "cityscapes", "coco", "ade20k"]  # that it was trained on
    out: str  # the folder to make; best.pt is written there


def renamed(key):
    """Returns the name that a parameter of theirs has in unimatch_v2.py."""
    for pattern, name in NAMES.items():
        if match := re.match(pattern, key):
            number = int(match[1]) - 1 if match.groups() else 0  # they count from 1
            return name.format(number) + key[match.end() :]
    return key


def translated(state):
    """Returns a state dict of theirs, with or without DDP's prefix, under the names here."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    return {renamed(key): value for key, value in state.items() if not key.startswith(UNUSED)}


def released(path):
    """Returns (student, teacher, epochs) of a file: state dicts under the names here.

    Scores in it may be numpy's numbers; beyond those no object is made. Raises Refusal.
    """
    numbers = [np.dtype, type(np.dtype("float64"))]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        numbers.append((np.float64(0).__reduce__()[0], f"{module}.scalar"))
    try:
        with torch.serialization.safe_globals(numbers):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        student = saved.get("model", saved)
        teacher = saved.get("model_ema", student)
        return translated(student), translated(teacher), int(saved.get("epoch", -1)) + 1
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file") from None
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise Refusal(f"{path}: no checkpoint of UniMatch V2 ({line})") from None


def args_of(state, dataset, path):
    """Returns the Args of unimatch_v2.py for a network of theirs. Raises Refusal."""
    width = getattr(state.get("backbone.cls_token"), "shape", (0,))[-1]
    if width not in BACKBONES:
        raise Refusal(f"{path}: no DINOv2 of {', '.join(BACKBONES.values())}, with DPT")
    given = dict(dataset=dataset, split="all", backbone=BACKBONES[width], weights="none")
    return merge(unimatch_v2.Args(**given), unimatch_v2.preset)


def main(argv=None):
    """Writes best.pt. Raises Refusal."""
    options = cli(Options, argv)
    folder = Path(options.out)
    if folder.exists():
        raise Refusal(f"--out {folder} exists: give another")
    student, teacher, epochs = released(options.file)
    args = args_of(student, options.dataset, options.file)
    data = Data(args, [], [], [], [])
    net = unimatch_v2.build(
        args, data.num_classes, unimatch_v2.DPTHead, Group(0, 1, torch.device("cpu"))
    )
    networks = {"student": student, "teacher": teacher}
    for state in networks.values():
        if bad := unfit(state, net):
            names = ", ".join(sorted(bad)[:3])
            what = f"{args.backbone} with DPT for the {data.num_classes} classes of {data.name}"
            raise Refusal(f"{options.file}: {len(bad)} keys do not fit {what} ({names})")
    content = dict(script="unimatch_v2.py", args=acting(args), classes=data.named())
    folder.mkdir(parents=True)
    write_checkpoint(folder / "best.pt", content | dict(networks=networks, step=epochs))
    file = shlex.quote((folder / "best.pt").as_posix())
    print(f"{file}: student and teacher, {args.backbone}, {epochs} epochs")
    print(f"next: python unimatch_v2.py --eval-only --checkpoint {file}")


if __name__ == "__main__":
    with refusals():
        main()
