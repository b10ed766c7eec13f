"""UniMatch's step in the order of unimatch.py and in that of the released code: time and memory.

    python benchmarks/unimatch_step.py           # writes results/unimatch_step.json, some minutes
    python benchmarks/unimatch_step.py --quick   # a small crop, nothing written

Both orders have the same networks, batches, draws and losses, with --recipe official; that they end
with the same weights is asserted first. Released: after the pass of the partners one pass of the
labelled and weak images, all of them decoded twice (the perturbed labelled ones for nothing), one
of the strong views, one sum, one backward. Here: only the weak images are decoded twice, and the
first pass goes backward before the second is made. `paper` is this script's own recipe: partners
are of the batch, so that their pass is not needed.

Time: processor time of a step on a CPU, by turns, a process of the released runs (2 + 2 images).
Memory: bytes alive at the peak, computed on fake CUDA tensors as benchmarks/memory.py does. Strong
views: milliseconds an image, of tensors as unimatch.py makes them and of PIL images as released.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torchvision.transforms.v2 import functional as colours  # noqa: E402

import unimatch  # noqa: E402
from benchmarks import fake_cuda, steps  # noqa: E402
from common.distributed import Group  # noqa: E402

RESULT = ROOT / "results" / "unimatch_step.json"
CPU = Group(0, 1, torch.device("cpu"))
GPU = Group(0, 1, fake_cuda.GPU)
CLASSES = 21
ORDERS = ("released", "official", "paper")
MEMORY = [  # data set, backbone, images of each kind in a process
    ("voc", "resnet50", 2),
    ("voc", "resnet101", 2),
    ("voc", "resnet101", 8),
    ("cityscapes", "resnet101", 2),
]


def arguments(recipe, dataset="voc", backbone="resnet50", images=2, **changes):
    """Returns the resolved flags of a data set's recipe, on the generated images."""
    split = "92" if dataset == "voc" else "1/16"
    words = f"--dataset {dataset} --split {split} --backbone {backbone} --recipe {recipe}"
    args = steps.resolved(unimatch, f"{words} --weights none".split())
    changes |= {"batch_size": images, "batch_size_unlabeled": images, "threshold": 0.0}
    return dataclasses.replace(args, dataset="shapes", split="1/16", **changes)


def released_step(student, batch, args, number, group, everything=True):
    """The losses of a step in the released order of work, and their backward.

    everything: perturbed labelled images are decoded as well, as released.
    """
    torch.manual_seed(zlib.crc32(b"%d %d 0" % (args.seed, number)))
    labeled, weak, other = (batch[name] for name in ("labeled", "unlabeled", "unlabeled.2"))
    partners = unimatch.partner_images(student, other, number, args, group)
    views = []
    masks = []
    for view in range(2):
        images, mask = unimatch.strong_views(weak["image"], f"view{view}", number, args, group)
        masks.append(mask)
        views.append(torch.where(mask, partners[view]["image"], images))
    n = len(labeled["image"])
    count = len(weak["image"])
    student.head.perturbed = n + count if everything else count
    out = student(torch.cat([labeled["image"], weak["image"]]))
    student.head.perturbed = 0
    strong = student(torch.cat(views))["logits"].chunk(2)
    taught = unimatch.make_target(out["logits"][n:], weak["inside"], args)
    terms = []
    for logits, mask, partner in zip(strong, masks, partners, strict=True):
        mixed = unimatch.mixed(mask, taught, partner)
        pixels = unimatch.inside_counts([mixed], group)[0]
        terms.append(unimatch.consistency(logits, mixed, pixels, args))
    pixels = unimatch.inside_counts([taught], group)[0]
    perturbed = unimatch.consistency(out["perturbed"][-count:], taught, pixels, args)
    sup = unimatch.supervised_loss({"logits": out["logits"][:n]}, labeled["label"].long(), args)
    unsup = 0.25 * terms[0] + 0.25 * terms[1] + 0.5 * perturbed
    ((sup + unsup) / 2).backward()


def released_run(args, group, count, classes=CLASSES, everything=True):
    """Takes steps in the released order; returns the network and the seconds of each step."""
    torch.manual_seed(args.seed)
    student = unimatch.build(args, classes, unimatch.UniMatchHead, group)
    optimizer = unimatch.make_optimizer([student], args)
    made = steps.random_batches(classes=classes)
    data = unimatch.load(args)
    streams = {}
    for name, stream in unimatch.streams(data, args).items():
        streams[name] = made(name, stream.batch, stream.with_label, args)
    seconds = []
    for number in range(count):
        begin = time.process_time()
        batch = {}
        for name, stream in streams.items():
            moved = {k: x.to(group.device, non_blocking=True) for k, x in next(stream).items()}
            batch[name] = moved
        optimizer.zero_grad(set_to_none=True)
        released_step(student, batch, args, number, group, everything)
        for params in optimizer.param_groups:
            params["lr"] = args.lr * params["scale"] * (1 - number / args.total_iters) ** 0.9
        optimizer.step()
        seconds.append(time.process_time() - begin)
    return student, seconds


def own_run(args, count, classes=CLASSES):
    """Takes steps of unimatch.py's main; returns the network and the seconds of each step."""
    marks = []
    watch = steps.take(
        unimatch,
        args,
        CPU,
        count,
        before=lambda watch: marks.append(time.process_time()),
        after=lambda watch, done: marks.append(time.process_time()),
        batches=steps.random_batches(classes=classes),
        classes=classes,
    )
    return watch.networks["student"], np.diff(marks).tolist()


def apart():
    """Returns how far the weights of both orders are apart after a step, of the step's length.

    Asserts that it is next to nothing.
    """
    args = arguments("official", backbone="resnet18", stem="classic", crop_size=65)
    first = released_run(args, CPU, 0)[0].state_dict()
    released = released_run(args, CPU, 1, everything=False)[0].state_dict()
    own = own_run(args, 1)[0].state_dict()
    weights = [name for name, x in first.items() if name.endswith("weight") and x.ndim > 1]
    distance = sum(float((own[n] - released[n]).square().sum()) for n in weights) ** 0.5
    length = sum(float((own[n] - first[n]).square().sum()) for n in weights) ** 0.5
    assert length > 0 and distance < 1e-3 * length, (distance, length)
    return distance / length


def times(crop, rounds):
    """Returns {order: {s, ratio, low, high}} of a step on a CPU; ratios to the released order."""
    found = {order: [] for order in ORDERS}
    for _ in range(rounds):
        args = arguments("official", crop_size=crop)
        found["released"].append(released_run(args, CPU, 2)[1][1])  # the first one warms up
        for recipe in ("official", "paper"):
            found[recipe].append(own_run(arguments(recipe, crop_size=crop), 2)[1][1])
    rows = {}
    for order, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found["released"], strict=True)]
        rows[order] = {
            "s": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return rows


def peaks(dataset, backbone, images):
    """Returns {order: GB at the peak of the second step}, on fake CUDA tensors."""
    classes = 19 if dataset == "cityscapes" else CLASSES
    args = arguments("official", dataset, backbone, images)
    with fake_cuda.fake_cuda() as mode:
        released_run(args, GPU, 2, classes)
    found = {"released": mode.peak / 1e9}
    for recipe in ("official", "paper"):
        args = arguments(recipe, dataset, backbone, images)
        batches = steps.random_batches(classes=classes)
        mode = fake_cuda.fake_steps("unimatch", args, batches=batches, classes=classes)
        found[recipe] = mode.peak / 1e9
    return found


def by_pil(picture, operations):
    """A strong view of a PIL image by Pillow's own operations, as released."""
    for name, *numbers in operations:
        if name == "gaussian_blur":
            picture = picture.filter(ImageFilter.GaussianBlur(numbers[-1]))
        else:
            picture = getattr(colours, name)(picture, *numbers)
    return picture


def views(crop, count):
    """Returns mean milliseconds of a strong view of this side, by tensors and by PIL."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (crop // 8 + 1, crop // 8 + 1, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((crop, crop), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    drawn = [unimatch.drawn_operations(rng, crop) for _ in range(count)]
    found = {}
    for word, function, image in (
        ("tensor", unimatch.strong_view, tensor),
        ("PIL", by_pil, picture),
    ):
        begin = time.process_time()
        for operations in drawn:
            function(image, operations)
        found[word] = 1e3 * (time.process_time() - begin) / count
    blurs = [[row for row in rows if row[0] == "gaussian_blur"] for rows in drawn]
    begin = time.process_time()
    for operations in blurs:
        unimatch.strong_view(tensor, operations)
    found["blur"] = 1e3 * (time.process_time() - begin) / count
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": args.rounds}
    found["apart"] = apart()
    print(f"weights apart by {found['apart']:.0e} of a step")
    found["views"] = {side: views(side, 8 if args.quick else 60) for side in (321, 513, 801)}
    for side, row in found["views"].items():
        words = ", ".join(f"{word} {ms:.1f}" for word, ms in row.items())
        print(f"strong view of {side}: {words} ms")
    found["memory"] = []
    for row in MEMORY[:1] if args.quick else MEMORY:
        gb = peaks(*row)
        found["memory"].append(dict(zip(("dataset", "backbone", "images"), row, strict=True)) | gb)
        print(*row, ", ".join(f"{order} {x:.2f} GB" for order, x in gb.items()), flush=True)
    found["crop"] = 97 if args.quick else 321
    found["time"] = times(found["crop"], args.rounds)
    found["load"] = os.getloadavg()[0]
    for order, row in found["time"].items():
        words = f"{row['ratio']:.2f} [{row['low']:.2f}..{row['high']:.2f}]"
        print(f"{order:10}{row['s']:8.2f} s  {words}")
    if not args.quick:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
