"""A network that a released code has trained, as a checkpoint of the script here.

    python results/released.py best.pth --dataset voc --out runs/released
    python predict.py runs/released photos --out pictures
    python unimatch_v2.py --dataset folder --num-classes 4 --init runs/released/best.pt

and --eval-only --checkpoint runs/released/best.pt of that script scores it. Takes what the codes of
UniMatch V2, UniMatch (with a ResNet), U2PL and CPS save, FPL's on CPS, too: the names in the file
say which it is. Every key has to fit, but those of parts that compute nothing. The checkpoint
counts as one of a run's last step.
"""

import importlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common import Refusal  # noqa: E402
from common.checkpoints import write_checkpoint  # noqa: E402
from common.data import Data  # noqa: E402
from common.distributed import Group  # noqa: E402
from common.flags import acting, cli, merge  # noqa: E402
from common.run import refusals  # noqa: E402
from common.weights import unfit  # noqa: E402
from predict import head_of  # noqa: E402


class Code(NamedTuple):
    """A released code: the script that stands for it, and what its files have under which names."""

    script: str
    mark: str  # a key that no other code has
    parts: dict  # network here: where it lies in a file of several, and how its keys begin there
    unused: tuple  # how keys begin of what computes nothing
    last: dict  # weight here: how many input channels come last there and first here
    names: dict  # how keys begin there: here; other keys are the same


FOUR = range(4)
CODES = (
    Code(
        "unimatch_v2",
        "head.projects.0.weight",
        {"student": ("model", ""), "teacher": ("model_ema", "")},
        ("backbone.mask_token", "head.scratch.refinenet4.resConfUnit1."),  # [D6]
        {},
        {
            "head.projects.": "head.project.",
            "head.resize_layers.": "head.resize.",
            "head.scratch.output_conv.": "head.classify.",
        }
        | {f"head.scratch.layer{i + 1}_rn.": f"head.narrow.{i}." for i in FOUR}
        | {f"head.scratch.refinenet{i + 1}.resConfUnit1.": f"head.before.{i}." for i in FOUR}
        | {f"head.scratch.refinenet{i + 1}.resConfUnit2.": f"head.after.{i}." for i in FOUR}
        | {f"head.scratch.refinenet{i + 1}.out_conv.": f"head.out.{i}." for i in FOUR},
    ),
    Code(
        "unimatch",
        "head.b0.0.weight",
        {"student": ("model", "")},
        (),
        {"head.project.0.weight": 256},  # ASPP's pooled features
        {
            "head.b4.gap.1.": "head.pool.0.",
            "head.b4.gap.2.": "head.pool.1.",
            "reduce.": "head.low.",
            "fuse.0.": "head.decode.0.0.",
            "fuse.1.": "head.decode.0.1.",
            "fuse.3.": "head.decode.1.0.",
            "fuse.4.": "head.decode.1.1.",
            "classifier.": "head.classify.",
        }
        | {f"head.b{i}.": f"head.branches.{i}." for i in FOUR},
    ),
    Code(
        "u2pl",
        "decoder.low_conv.0.weight",
        {"student": ("model_state", ""), "teacher": ("teacher_state", "")},
        (),
        {},
        {
            "encoder.": "backbone.",
            "decoder.low_conv.": "head.low.",
            "decoder.aspp.conv1.1.": "head.pool.0.",
            "decoder.aspp.conv1.2.": "head.pool.1.",
            "decoder.head.": "head.project.0.",
            "auxor.aux.0.": "head.aux.0.0.",
            "auxor.aux.1.": "head.aux.0.1.",
            "auxor.aux.4.": "head.aux.2.",
        }
        | {f"decoder.aspp.conv{i + 2}.": f"head.branches.{i}." for i in FOUR}
        | {
            f"decoder.{theirs}.{i}.": f"head.{ours}.{j}."
            for theirs, ours in (("classifier", "classify"), ("representation", "represent"))
            for i, j in ((0, "0.0"), (1, "0.1"), (4, "2.0"), (5, "2.1"), (8, "4"))
        },
    ),
    Code(
        "cps_fpl",
        "head.aspp.map_convs.0.weight",
        {"branch1": ("model", "branch1."), "branch2": ("model", "branch2.")},
        (),
        {"head.decode.0.0.weight": 48},  # low-level features
        {
            "head.aspp.map_convs.": "head.branches.",
            "head.aspp.map_bn.": "head.project.0.0.",
            "head.aspp.red_conv.": "head.project.1.",
            "head.aspp.global_pooling_conv.": "head.pool.0.",
            "head.aspp.global_pooling_bn.": "head.pool.1.0.",
            "head.aspp.pool_red_conv.": "head.pool.2.",
            "head.aspp.red_bn.": "head.norm.0.",
            "head.reduce.": "head.low.",
            "head.last_conv.0.": "head.decode.0.0.",
            "head.last_conv.1.": "head.decode.0.1.",
            "head.last_conv.3.": "head.decode.1.0.",
            "head.last_conv.4.": "head.decode.1.1.",
            "classifier.": "head.classify.",
        },
    ),
)
VITS = {384: "dinov2_vits14", 768: "dinov2_vitb14", 1024: "dinov2_vitl14"}  # by their width
RESNETS = {6: "resnet50", 23: "resnet101"}  # by the blocks of layer3


@dataclass(frozen=True, kw_only=True)
class Options:
    """Makes a checkpoint of a script here out of one of a released code."""

    file: Annotated[str, tyro.conf.Positional]  # .pth of the released code
    dataset: Literal["voc", "voc_aug", "cityscapes", "coco", "ade20k"]  # that it was trained on
    out: str  # the folder to make; best.pt is written there


def read(path):
    """Returns what torch.save wrote. Raises Refusal.

    Scores in it may be numpy's numbers; beyond those no object is made.
    """
    numbers = [np.dtype, type(np.dtype("float64"))]
    scalar = np.float64(0).__reduce__()[0]
    numbers += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(numbers):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file") from None
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise Refusal(f"{path}: no checkpoint of a released code ({line})") from None


def part_of(saved, place, begin):
    """Returns the state dict of a network in what a file holds, without DDP's prefix and its own.

    A file may be one state dict alone, which is then that of all networks. {} of anything else.
    """
    found = saved.get(place, saved)
    if not isinstance(found, dict):
        return {}
    tensors = {str(key): value for key, value in found.items() if torch.is_tensor(value)}
    state = {key.removeprefix("module."): value for key, value in tensors.items()}
    return {key.removeprefix(begin): value for key, value in state.items() if key.startswith(begin)}


def code_of(saved, path):
    """Returns (the Code that wrote a file, {network here: its state dict there}).

    Raises Refusal.
    """
    for code in CODES:
        states = {name: part_of(saved, *where) for name, where in code.parts.items()}
        if all(code.mark in state for state in states.values()):
            return code, states
    scripts = ", ".join(code.script for code in CODES)
    raise Refusal(f"{path}: none of the networks that the released codes of {scripts} save")


def translated(state, code):
    """Returns a state dict of a released code under the names of its script here."""
    found = {}
    for key, value in state.items():
        if key.startswith(code.unused):
            continue
        begin = next((begin for begin in code.names if key.startswith(begin)), "")
        key = code.names.get(begin, "") + key[len(begin) :]
        if key in code.last and value.dim() == 4:
            value = value.roll(code.last[key], 1)
        found[key] = value
    return found


def args_of(script, state, dataset):
    """Returns the Args of a script here for a translated network."""
    given = dict(dataset=dataset, split="all", weights="none")
    if script.__name__ == "unimatch_v2":
        token = state.get("backbone.cls_token", torch.empty(0))  # (1, 1, width)
        given["backbone"] = VITS.get(token.numel())
    else:
        blocks = {key.split(".")[2] for key in state if key.startswith("backbone.layer3.")}
        given |= dict(backbone=RESNETS.get(len(blocks)), stem="deep")
    if any(key.startswith("head.aux.") for key in state):
        given["aux_weight"] = 0.4
    return merge(script.Args(**given), script.preset)


def main(argv=None):
    """Writes best.pt. Raises Refusal."""
    options = cli(Options, argv)
    folder = Path(options.out)
    if folder.exists():
        raise Refusal(f"--out {folder} exists: give another")
    code, states = code_of(read(options.file), options.file)
    script = importlib.import_module(code.script)
    networks = {name: translated(state, code) for name, state in states.items()}
    args = args_of(script, next(iter(networks.values())), options.dataset)
    data = Data(args, [], [], [], [])
    net = script.build(args, data.num_classes, head_of(script), Group(0, 1, torch.device("cpu")))
    for state in networks.values():
        if bad := unfit(state, net):
            what = f"{args.backbone} of {code.script}.py for the {data.num_classes} classes"
            names = ", ".join(sorted(bad)[:3])
            raise Refusal(
                f"{options.file}: {len(bad)} keys do not fit {what} of {data.name} ({names})"
            )
    folder.mkdir(parents=True)
    content = dict(script=f"{code.script}.py", args=acting(args), classes=data.named())
    content |= dict(networks=networks, step=args.total_iters)
    write_checkpoint(folder / "best.pt", content)
    file = shlex.quote((folder / "best.pt").as_posix())
    print(f"{file}: {' and '.join(networks)}, {args.backbone}, {data.num_classes} classes")
    print(f"next: python {code.script}.py --eval-only --checkpoint {file}")


if __name__ == "__main__":
    with refusals("start again"):
        main()
