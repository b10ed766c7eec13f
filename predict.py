"""From a checkpoint of any script to pictures, scores, archives and a network to take away.

  python predict.py runs/NAME photos --out pictures           # folders, files, globs, lists (.txt)
  python predict.py runs/NAME photos --out pictures --maps --csv
  python predict.py runs/NAME --split val --out scored        # IoU, confusion, worst images first
  python predict.py runs/NAME photos --masks masks --out scored
  python predict.py runs/NAME photos --out test --export cityscapes
  python predict.py runs/NAME --onnx net.onnx

The network, its windows and its classes are those of the script that wrote the checkpoint, which is
imported: nothing of them is repeated here. In Python, an image (B, 3, H, W) of 0..255 in, logits
(B, C, H, W) out:

  from predict import load
  net, classes = load("runs/NAME/best.pt")
  logits = net(image)

docs/predict.md has what each file is, and the rules.
"""

# ---- 1. Imports ------------------------------------------------------------------------------

import hashlib
import importlib
import importlib.util
import io
import json
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from common import Refusal, distributed, outputs
from common.checkpoints import load_checkpoint, load_networks
from common.data import ClassRow, Data
from common.flags import (
    NO_NUMBER,
    Count,
    Number,
    Scales,
    as_fields,
    check_needs,
    cli,
    given_names,
    merge,
    without_weights,
)
from common.run import machine_remedy, refusals, report

# ---- 2. Options ------------------------------------------------------------------------------

WHOLE = 4_000_000  # pixels; a larger image goes through in windows whatever the protocol
WINDOW = 1024  # their side then
SIZES = ((2, 97, 65), (1, 64, 128))  # images, height, width that an export is verified on
ENDINGS = {"onnx": ".onnx", "program": ".pt2", "safetensors": ".safetensors"}  # flag -> of its file


@dataclass(frozen=True, kw_only=True)
class Args:
    """Predicts images with a checkpoint: classes, overlays, maps, scores, archives, exports."""

    run: tyro.conf.Positional[str]  # a run's folder (its best.pt, or else last.pt) or a checkpoint
    images: tyro.conf.Positional[tuple[str, ...]] = ()  # folders, files, globs, lists (.txt)
    out: str = ""  # folder for all that is written; started again, it goes on there
    # which of the checkpoint's; left out: the one that its run scored
    network: Literal["branch1", "branch2", "mean", "student", "teacher"] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there is one, else CPU
    # of predictions; bf16: network in bfloat16, what follows in float32
    amp: Literal["none", "bf16"] = "none"
    batch_size: Count = 1  # images at once, of one size and one after the other, in one piece
    window: Number = 0  # side of the windows; 0: as the checkpoint was evaluated
    scales: Scales = (1.0,)  # of the image; probabilities are averaged
    flip: bool = False  # average with the mirrored image
    upright: bool = False  # turn photographs as their EXIF data say; training reads them as stored
    overlays: bool = True  # pictures of the classes on the image, with a legend
    maps: bool = False  # confidence, entropy and, of runs with FPL, K
    csv: bool = False  # shares.csv: the share of each class in each image
    # scores
    split: Literal["val", "test"] | None = None  # predict and score this part of the data set
    # of --split; left out: the one trained on
    dataset: (
        Literal["shapes", "camvid", "voc", "voc_aug", "cityscapes", "coco", "ade20k", "folder"]
        | None
    ) = None
    # of --split, and of --precise-bn's images; left out: the one trained on
    data_root: str = ""
    masks: str = ""  # folder of masks, named as the images: score the images
    # to take away
    export: Literal["cityscapes", "voc"] | None = None  # archive for the test server
    onnx: str = ""  # write the network as this ONNX file
    program: str = ""  # write it by torch.export as this .pt2 file
    safetensors: str = ""  # write its weights as this file, and a model card beside it

    NEEDS: ClassVar[dict] = {  # flag: what it needs to act, as common/flags.py has it
        **dict.fromkeys("amp batch_size window scales flip".split(), "out"),
        **dict.fromkeys("maps csv export overlays".split(), "out"),
        "dataset": "split",
        "masks": "images",
        "upright": "images, no masks",
    }


def checked(options, argv):
    """Returns options. Raises Refusal where one cannot act."""
    check_needs(options, given_names(options, argv))
    if options.images and options.split:
        raise Refusal("images and --split: give one of them")
    for name, ending in ENDINGS.items():
        value = getattr(options, name)
        if value and Path(value).suffix != ending:
            raise Refusal(f"--{name} {value}: a file whose name ends in {ending}")
    pictured = bool(options.images or options.split)
    if pictured != bool(options.out):
        raise Refusal("--out DIR with images or --split, and with them alone")
    if not (pictured or options.onnx or options.program or options.safetensors):
        raise Refusal("nothing to do: give images, --split, --onnx, --program or --safetensors")
    return options


# ---- 3. A checkpoint's network ---------------------------------------------------------------


class Source(NamedTuple):
    """A checkpoint, opened: its script, resolved flags, classes and palette, and one network."""

    saved: dict
    script: Any
    args: Any
    data: Data
    name: str  # of the network
    net: nn.Module  # in eval mode; forward: (B, 3, H, W) 0..255 -> {"logits": (B, C, H, W)}
    networks: dict  # {name: network} that it is made of


class Logits(nn.Module):
    """A network by itself: images (B, 3, H, W), RGB in 0..255 -> logits (B, C, H, W) float32."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        return self.net(image)["logits"]


def load(path, network=None, device="cpu"):
    """Returns (Logits in eval mode, class names) of a run's folder or a checkpoint file.

    network: branch1, branch2, mean, student, teacher; None: the one that was scored. Raises
    Refusal.
    """
    source = open_source(path, network, torch.device(device))
    return Logits(source.net).eval(), list(source.data.classes)


def open_source(path, network=None, device="cpu", amp="none"):
    """Returns the Source of a run's folder or a checkpoint file. Raises Refusal."""
    return build_source(read_saved(path), network, device, amp)


def read_saved(path):
    """Returns the dict of a run's folder or a checkpoint file, as load_checkpoint does."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).is_file()]
        if not found:
            raise Refusal(f"{path}: neither best.pt nor last.pt there: give a run's folder")
        path = found[0]
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    return load_checkpoint(path)


def with_root(saved, options):
    """Returns a checkpoint's dict with --data-root, where that holds the data set trained on.

    Raises Refusal where nothing reads data.
    """
    args = saved["args"]
    if options.data_root and not (options.split or args.get("precise_bn")):
        wrong = "does nothing here: it needs --split, or a run of --precise-bn"
        raise Refusal(f"--data-root {options.data_root} {wrong}")
    if options.data_root and options.dataset in (None, args["dataset"]):
        return saved | {"args": args | {"data_root": options.data_root}}
    return saved


def script_of(saved):
    """Returns the script, imported, that wrote a checkpoint's dict. Raises Refusal."""
    file = Path(__file__).parent / Path(str(saved["script"])).name
    if not file.is_file() or "\ndef build(" not in file.read_text(encoding="utf-8"):
        raise Refusal(f"{saved['path']}: of {saved['script']}, which is no script of this checkout")
    return importlib.import_module(file.stem)


def head_of(script):
    """Returns the class of a script's head: the one whose name ends so, or DeepLabV3Plus."""
    own = [value for name, value in vars(script).items() if name.endswith("Head")]
    return own[0] if own else script.DeepLabV3Plus


def build_source(saved, network=None, device="cpu", amp="none"):
    """Returns the Source of a checkpoint's dict. Raises Refusal."""
    path = saved["path"]
    script = script_of(saved)
    args = arguments(script, saved["args"], amp)
    rows = [ClassRow(*row) for row in saved.get("classes", ())]  # older ones name none
    data = Data(args, [], [], [], [], rows)
    group = SimpleNamespace(world=1, device=torch.device(device))
    name = network or saved.get("network") or scored_name(saved, args)
    known = list(saved["networks"])
    if {"branch1", "branch2"} <= set(known):
        known.append("mean")
    if name not in known:
        raise Refusal(f"{path}: no network {name}; --network takes {', '.join(known)}")
    parts = ["branch1", "branch2"] if name == "mean" else [name]
    of_branch = getattr(script, "of_branch", lambda args, part: args)  # cps_fpl.py's may differ
    head = head_of(script)
    networks = {
        part: script.build(of_branch(args, part), data.num_classes, head, group) for part in parts
    }
    load_networks(saved, networks)
    net = script.Average(networks.values()) if name == "mean" else networks[name]
    net.requires_grad_(False).eval()
    if args.precise_bn and not estimate_bn(script, net, args, torch.device(device)):
        args = replace(args, precise_bn=0)
    return Source(saved, script, args, data, name, net, networks)


def estimate_bn(script, net, args, device):
    """Gives a network the statistics of --precise-bn, as the run's evaluation had them, in place.

    They are those of training images. Returns whether these are there: where they are not, a note
    says that the running ones stay.
    """
    try:
        data = script.load(args)
    except Refusal as error:
        print(f"note: BN's running statistics are used, no --precise-bn: {error}", file=sys.stderr)
        return False
    with script.evaluating(net, data, args, distributed.Group(0, 1, device)):
        scored = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(scored)
    return True


def arguments(script, saved, amp):
    """Returns a script's Args as a checkpoint's dict of those that acted has them, resolved."""
    names = {field.name for field in fields(script.Args)}
    kept = {k: v for k, v in as_fields(script.Args, saved).items() if k in names}
    kept.update(without_weights(names), amp=amp)
    return merge(script.Args(**kept), script.preset)


def scored_name(saved, args):
    """Returns the name of the network that the script's own evaluation scores at this step."""
    if hasattr(args, "evaluate"):
        return args.evaluate
    if "teacher" in saved["networks"] and saved["step"] > getattr(args, "warmup_iters", 0):
        return "teacher"
    return next(iter(saved["networks"]))


class Views(nn.Module):
    """A network that looks at an image at several scales and mirrored.

    "logits" is the logarithm of the mean of the views' probabilities, at the image's size whatever
    upsampled says. In windows every window is scaled by itself: memory stays bounded.
    """

    def __init__(self, net, scales, flip):
        super().__init__()
        self.net = net
        self.scales = scales
        self.flip = flip

    def forward(self, x, upsampled=True):
        total = 0.0
        size = x.shape[2:]
        for scale in self.scales:
            scaled = [max(round(scale * side), 1) for side in size]
            view = x.float()
            if scale != 1:
                view = F.interpolate(view, scaled, mode="bilinear", antialias=scale < 1)
            for mirrored in (False, True)[: 1 + self.flip]:
                logits = self.net(view.flip(3) if mirrored else view)["logits"]
                logits = logits.flip(3) if mirrored else logits
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=True)
                total = total + F.softmax(logits, 1)
        count = len(self.scales) * (1 + self.flip)
        return {"logits": (total / count).clamp(min=1e-30).log()}


class Counted(nn.Module):
    """A network with a channel of ones after its logits: windows that overlap are counted."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)["logits"]
        return {"logits": torch.cat([logits, torch.ones_like(logits[:, :1])], 1)}


# ---- 4. Prediction ---------------------------------------------------------------------------


def protocol_for(args, pixels, window):
    """Returns args with the protocol and the window for an image of so many pixels."""
    if window:
        return replace(args, protocol="slide", crop_size=window)
    if args.protocol == "whole" and pixels > WHOLE:
        return replace(args, protocol="slide", crop_size=WINDOW)
    return args


@torch.no_grad()
def segment(source, images, window=0, maps=False):
    """Returns a {name: (H, W) uint8} for each image, (B, 3, H, W) uint8 on the network's device.

    classes, as the script's predict has them; with maps confidence, entropy (over log C), both 255
    for 1, and K of Alg. 1, where the script has it and the checkpoint has a T. In one piece all
    images go through the network at once, and memory grows with their pixels; in windows one after
    the other, and but for the results it grows with an image's width, not with its height.
    """
    args = protocol_for(source.args, images[0, 0].numel(), window)
    if args.protocol == "slide":
        return [segment_in_windows(source, image, args, maps) for image in images]
    if maps:
        logits = Counted(source.net)(images)["logits"]
        return [described_in_rows(source, [sums]) for sums in logits]
    logits = source.net(images, upsampled=False)["logits"]
    return [as_arrays({"classes": c}) for c in source.script.likeliest(logits, images.shape[2:])]


def segment_in_windows(source, image, args, maps):
    """Returns what segment does of one image, (3, H, W) uint8, by the windows of args."""
    classes = source.data.num_classes
    if maps:
        parts = source.script.slide(Counted(source.net), image, args.crop_size, classes + 1)
        return described_in_rows(source, parts)
    return as_arrays({"classes": source.script.predict(source.net, image, args, classes)})


def described_in_rows(source, parts):
    """Returns {name: (H, W) uint8} of parts of one image from top to bottom, 64 rows at a time."""
    rows = [described(source, some) for part in parts for some in part.split(64, dim=1)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def as_arrays(maps):
    """Returns {name: tensor of integers below 256} as {name: uint8 array}."""
    return {name: value.to(torch.uint8).cpu().numpy() for name, value in maps.items()}


def one_T(source):
    """Returns the T of a run with FPL; None of others, and where each pixel chose among several."""
    T = source.saved["args"].get("T")
    several = T if isinstance(T, list) else [T]
    known = hasattr(source.script, "fuzzy_positive_assignment")
    return several[0] if known and len(several) == 1 else None


def described(source, sums):
    """Returns {name: (rows, W) uint8} of rows of summed logits with their counts (Counted)."""
    logits = sums[None, :-1]
    prob = F.softmax(logits / sums[None, -1:], 1)
    found = {"classes": logits.argmax(1)}
    entropy = -torch.special.xlogy(prob, prob).sum(1) / np.log(prob.shape[1])
    found["confidence"] = (255 * prob.amax(1)).round()
    found["entropy"] = (255 * entropy).round().clamp(0, 255)
    if one_T(source):
        p, _ = source.script.by_rank(prob)
        given = vars(source.args)
        rule = {name: given[name] for name in given.keys() & {"k_max", "strict"}}
        found["K"] = source.script.fuzzy_positive_assignment(p, one_T(source), **rule)
    return as_arrays({name: value[0] for name, value in found.items()})


# ---- 5. All images ---------------------------------------------------------------------------


def predict_all(options, source, device):
    """Predicts all images; returns (Results in their order, Data of the masks, what was not read).

    One thread reads ahead, two write, and the network runs in between. An image that cannot be read
    is named and left out.
    """
    scored = bool(options.split or options.masks)
    data = source.data
    if options.split:
        items, data = outputs.find_part(source, options)
    else:
        items = outputs.find_images(options.images, options.out)
    if options.masks:
        items = outputs.with_masks(items, Path(options.masks))
    if options.export:
        outputs.check_names(options.export, source.args.dataset, items)
    outputs.claim(Path(options.out), facts_of(options, source))
    if len(options.scales) > 1 or options.scales[0] != 1 or options.flip:
        source = source._replace(net=Views(source.net, options.scales, options.flip))
    kinds = kinds_of(options, source)
    writer = outputs.Writer(options.out, kinds, data, scored, options.upright)
    unread = []
    pending = deque()
    results = []
    every = 0.5 if sys.stderr.isatty() else 10  # seconds between lines
    bar = tqdm(total=len(items), unit="image", mininterval=every, dynamic_ncols=True)
    reads = outputs.ahead(writer.read, items, depth=2 * options.batch_size)
    with bar, ThreadPoolExecutor(2) as pool:
        for group in grouped(reads, options.batch_size):
            bar.update(len(group))
            if isinstance(group[0], Refusal):
                unread.append(str(group[0]))
                bar.write(unread[-1], file=sys.stderr)
                continue
            maps = [None]
            image = group[0][1]
            if image is not None:
                maps = segment_or_say(source, group, options, device)
            for read, found in zip(group, maps, strict=True):
                pending.append(pool.submit(writer.write, *read, found))
            large = image is not None and image.width * image.height > WHOLE
            while len(pending) > 3 * options.batch_size * (not large):  # memory for one large image
                results.append(pending.popleft().result())
        results += [future.result() for future in pending]
    return results, data, unread


def grouped(reads, size):
    """Yields what was read in lists: up to size images of one size to predict, or one other thing.

    reads: (item, image, label), image None where its files are there, or the Refusal of an image.
    """
    group = []
    for read in reads:
        alone = isinstance(read, Refusal) or read[1] is None
        if group and (alone or len(group) == size or read[1].size != group[0][1].size):
            yield group
            group = []
        if alone:
            yield [read]
        else:
            group.append(read)
    if group:
        yield group


def kinds_of(options, source):
    """Returns the kinds of files that an image gets, of outputs.FORMS."""
    kinds = ["classes"]
    if options.overlays:
        kinds.append("overlays")
    if options.maps:
        kinds += ["confidence", "entropy"]
    if options.maps and one_T(source):
        kinds.append("K")
    if options.split or options.masks:
        kinds.append("compared")
    return kinds


def segment_or_say(source, group, options, device):
    """Returns what segment does of a group of images. Raises Refusal where memory does not do."""
    try:
        images = np.stack([np.array(image) for _, image, _ in group])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
        return segment(source, pixels, options.window, options.maps)
    except (MemoryError, RuntimeError) as error:
        if not machine_remedy(error):
            raise
        item, image, _ = group[0]
        remedy = "--window 512, or a smaller one"
        if len(group) > 1:
            remedy = f"a smaller --batch-size than {options.batch_size}"
        size = f"{len(group)} x {image.width}x{image.height}"
        raise Refusal(f"{item.image or item.key}: {size} pixels, out of memory: {remedy}") from None


def facts_of(options, source):
    """Returns what the numbers in an output folder depend on, as JSON values."""
    saved = source.saved
    return {
        "amp": options.amp,
        "window": options.window,
        "scales": list(options.scales),
        "flip": options.flip,
        "upright": options.upright,
        "sha256": hashlib.sha256(Path(saved["path"]).read_bytes()).hexdigest(),
        "network": source.name,
        "script": saved["script"],
        "step": saved["step"],
        "precise_bn": source.args.precise_bn,  # 0 too where the training images are not there
    }


# ---- 6. A network to take away ---------------------------------------------------------------


def need(flag, *modules):
    """Raises Refusal if a module that a flag wants is not installed."""
    absent = [name for name in modules if not importlib.util.find_spec(name)]
    if absent:
        names = " ".join(absent)
        raise Refusal(f"{flag}: {names} not installed; pip install {names}")


def verified(run, model):
    """Returns how far run(image) is from model(image) at SIZES, in words. Raises Refusal.

    run: the written network, images (B, 3, H, W) uint8 -> logits. Neither the number of images nor
    their sizes are those that it was written with.
    """
    largest = 0.0
    for number, height, width in SIZES:
        generator = torch.Generator().manual_seed(0)
        shape = (number, 3, height, width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        expected = model(image)
        found = run(image)
        if found.shape != expected.shape:
            raise Refusal(f"verified: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        largest = max(largest, float((found - expected).abs().max() / expected.abs().max()))
    if not largest < 1e-3:
        raise Refusal(f"verified: logits differ by {largest:.1e} of the largest: not written")
    return f"float32, logits within {largest:.0e} of the largest one at {len(SIZES)} sizes"


def same_padding(x, kernel_size, stride, dilation):
    """Returns the padding of a side of x pixels as timm's get_same_padding does, int or SymInt.

    timm's takes math.ceil, which a .pt2 file cannot hold, and max, which makes the expression of a
    size longer layer by layer, until torch.export takes minutes. Here max is left where it counts.
    """
    least = (kernel_size - 1) * dilation + 1 - stride  # the padding where stride divides x
    padding = (x + stride - 1) // stride * stride - x + least
    return padding if least >= 0 else max(padding, 0)


def exported(model, convert):
    """Returns convert(model, (image,), dynamic_shapes=...) with free numbers and sizes."""
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    image = torch.zeros(3, 3, 128, 160, dtype=torch.uint8)
    with ExitStack() as patched:
        # the network is in float32; torch 2.6 exports no autocast block that takes sizes
        patched.enter_context(mock.patch("torch.autocast", lambda *_, **__: nullcontext()))
        if "timm" in sys.modules:
            patched.enter_context(mock.patch("timm.layers.padding.get_same_padding", same_padding))
        return convert(model, (image,), dynamic_shapes={"image": free})


def write_onnx(path, model):
    """Writes a network as one ONNX file, input image, output logits; returns what was verified."""
    import onnxruntime

    def convert(*given, **more):
        """torch's exporter, with names for input and output."""
        names = {"input_names": ["image"], "output_names": ["logits"]}
        return torch.onnx.export(*given, dynamo=True, verbose=False, **names, **more)

    def write(new):
        """Writes the ONNX file new and has onnxruntime verify it."""
        exported(model, convert).save(str(new), external_data=False)
        session = onnxruntime.InferenceSession(str(new), providers=["CPUExecutionProvider"])

        def run(image):
            """The file's logits of images (B, 3, H, W) uint8."""
            return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])

        return verified(run, model)

    return outputs.put(path, write)


def write_program(path, model):
    """Writes a network by torch.export; returns what was verified."""

    def write(new):
        """Writes the program new, reads it back and verifies it."""
        program = exported(model, torch.export.export)
        # after a max pooling torch 2.9 and 2.10 want sizes as odd or even as the example's
        program._guards_code = []
        content = io.BytesIO()  # torch's own writer ends otherwise on a full disk
        torch.export.save(program, content)
        new.write_bytes(content.getvalue())
        return verified(torch.export.load(new).module(), model)

    return outputs.put(path, write)


def or_refused(write, path, model):
    """Returns write(path, model). Raises Refusal where this torch does not export the network."""
    try:
        return write(path, model)
    except (Refusal, OSError):
        raise
    except Exception as error:  # torch's exporters and onnxruntime raise anything
        if machine_remedy(error):
            raise
        words = str(error).partition("\x1b")[0].strip()  # torch colours what follows
        cause = f"{type(error).__name__}: {words[:150]}".splitlines()[0]
        wrong = f"torch {torch.__version__} does not export this network ({cause})"
        raise Refusal(f"{path}: {wrong}; docs/predict.md") from error


def write_safetensors(path, source):
    """Writes a network's weights, with what it takes to build it, and a model card beside them.

    open_source reads the file as a checkpoint; BN's statistics are in it, whichever they are.
    Returns what was verified. Raises Refusal where another text has the card's name.
    """
    from safetensors.torch import save

    card = path.with_suffix(".md")
    title = f"# {path.name}\n"  # as model_card begins
    if card.exists() and not card.read_bytes().startswith(title.encode()):
        raise Refusal(f"{card}: no model card of {path.name}: give --safetensors another name")
    saved = source.saved
    facts = {"script": saved["script"], "step": saved["step"], "network": source.name}
    facts["classes"] = saved.get("classes", [])
    args = {k: v for k, v in saved["args"].items() if k not in NO_NUMBER}
    facts["args"] = args | {"precise_bn": 0}
    weights = {}
    for part, net in source.networks.items():
        for name, value in net.state_dict().items():
            weights[f"{part}.{name}"] = value.contiguous()

    def write(new):
        """Writes the weights new, builds the network from them and verifies it."""
        new.write_bytes(save(weights, metadata={k: json.dumps(v) for k, v in facts.items()}))
        again = build_source(load_safetensors(new))
        return verified(Logits(again.net), Logits(source.net))

    said = outputs.put(path, write)
    scored = source.name == scored_name(saved, source.args)
    outputs.put_text(card, outputs.model_card(source, path.name, said, scored))
    return said


def load_safetensors(path):
    """Returns a file of write_safetensors as the dict of a checkpoint. Raises Refusal."""
    need(str(path), "safetensors")
    from safetensors import SafetensorError, safe_open

    networks = {}
    try:
        with safe_open(path, "pt") as file:
            facts = {name: json.loads(value) for name, value in file.metadata().items()}
            for key in file.keys():
                part, _, name = key.partition(".")
                networks.setdefault(part, {})[name] = file.get_tensor(key)
        return {name: facts[name] for name in ("script", "args", "step", "network")} | {
            "classes": facts.get("classes", []),
            "networks": networks,
            "path": str(path),
        }
    except (OSError, SafetensorError, AttributeError, KeyError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise Refusal(f"{path}: no file of --safetensors ({line})") from None


# ---- 7. The command line ---------------------------------------------------------------------


def main(argv=None):
    """Does what the flags say. Raises Refusal."""
    argv = sys.argv[1:] if argv is None else argv
    options = checked(cli(Args, argv), argv)
    if options.onnx:
        need("--onnx", "onnx", "onnxscript", "onnxruntime")
    if options.safetensors:
        need("--safetensors", "safetensors")
    group = distributed.setup(options.device)
    if group.world > 1:
        raise Refusal("one process alone: leave torchrun out")
    saved = with_root(read_saved(options.run), options)
    source = build_source(saved, options.network, group.device, options.amp)
    of = f"{source.name} of {source.saved['script']}, step {source.saved['step']}"
    print(f"{source.saved['path']}: {of}, {source.data.num_classes} classes", flush=True)
    unread = []
    if options.out:
        if note := distributed.slow_bf16(options.amp, group.device):
            print(f"note: {note}", file=sys.stderr)
        unread = predict_and_write(options, source, group.device)
    if options.onnx or options.program or options.safetensors:
        take_away(options, build_source(saved, options.network))
    if unread:
        raise Refusal(f"{len(unread)} images were not read, the first: {unread[0]}")


def predict_and_write(options, source, device):
    """Predicts images; writes what --csv, masks and --export ask for.

    Returns a line for each image that was not read.
    """
    folder = Path(options.out)
    results, data, unread = predict_all(options, source, device)
    print(f"{folder}: {len(results)} images in {folder / 'classes'}", flush=True)
    if options.csv:
        outputs.write_shares(folder, source.data.classes, results)
        print(f"{folder / 'shares.csv'}: share of each class in each image")
    if results and results[0].confusion is not None:
        of = options.split or options.masks
        title = f"{source.saved['path']} on {of}"
        scores = outputs.write_scores(folder, title, data, results)
        print(report(data, {"predict": scores}, of))
        print(f"{folder / 'index.html'}: the same, and the worst images first")
    if options.export and not unread:
        print(outputs.write_archive(folder, options.export, results, source.data.palette))
    return unread


def take_away(options, source):
    """Writes what --onnx, --program and --safetensors ask for, on the CPU in float32."""
    model = Logits(source.net).eval()
    warnings.simplefilter("ignore")  # the exporters' own
    if options.onnx:
        print(f"{options.onnx}: {or_refused(write_onnx, Path(options.onnx), model)}")
    if options.program:
        print(f"{options.program}: {or_refused(write_program, Path(options.program), model)}")
    if options.safetensors:
        print(f"{options.safetensors}: {write_safetensors(Path(options.safetensors), source)}")


if __name__ == "__main__":
    with refusals("the same command goes on"):
        main()
