"""Miniature data sets in every known layout, lists, flags: places, ids and hashes written out."""

import hashlib
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import prepare_data
from common import Refusal
from common.data import SPLITS
from common.sources import load

NAMES = [f"0001TP_{number:06d}" for number in range(6690, 6840, 30)]  # CamVid's way of naming
VOC = ["2007_000032", "2008_000008", "2009_003377", "2011_000068"]
CITY = "aachen_000000_000019 bad-honnef_000000_080169 jena_000078_000019 ulm_000001_000019".split()
COCO = [f"{number:012}" for number in (9, 177254, 283213, 581929)]
ADE = [f"ADE_train_{number:08}" for number in (1, 186, 1609, 20210)]
KEYS = {
    "voc": {"train": VOC, "val": ["2007_000033", "2011_003276"]},
    "cityscapes": {"train": CITY, "val": ["frankfurt_000001_066574", "lindau_000000_000019"]},
    "coco": {"train": COCO, "val": ["000000000139", "000000581781"]},
    "ade20k": {"train": ADE, "val": ["ADE_val_00000001", "ADE_val_00002000"]},
}
FINE = ["2008_000008", "2011_000068", *KEYS["voc"]["val"]]  # VOC's own masks; the rest is SBD's
OFFICIAL = "leftImg8bit/{part}/{city}/{key}_leftImg8bit.png"
TRAIN_IDS = "gtFine/{part}/{city}/{key}_gtFine_labelTrainIds.png"
LABEL_IDS = "gtFine/{part}/{city}/{key}_gtFine_labelIds.png"
AUG, OWN = "SegmentationClassAug/{key}.png", "SegmentationClass/{key}.png"
KIT, LISTS = "VOCdevkit/VOC2012/", ["train_aug", "val"]
SCENES = ("images/{long}/{key}.jpg", "annotations/{long}/{key}.png")
CPS = ["segmentation/{part}/{key}_gtFine.png"]
PSMT = ("images/city_gt_fine/{part}/{key}_leftImg8bit", "annotation/city_gt_fine/{part}/{key}")
LAYOUTS = {  # data set, image, masks (the preferred first), lists in ImageSets: train's, val's
    "voc, official": ("voc", "JPEGImages/{key}.jpg", [AUG, OWN], ["train_aug", "val"]),
    "voc, trainaug": ("voc", "JPEGImages/{key}.jpg", [AUG], ["trainaug", "val"]),
    "voc, no list of 10,582": ("voc", "JPEGImages/{key}.jpg", [AUG, OWN], ["train", "val"]),
    "voc, VOCdevkit": ("voc", KIT + "JPEGImages/{key}.jpg", [KIT + AUG, KIT + OWN], LISTS),
    "voc, CPS": ("voc", "{fold}/image/{key}.jpg", ["{fold}/label/{key}.png"], []),
    "voc, AEL": ("voc", "image/{key}.jpg", ["label/{key}.png"], []),
    "cityscapes, official": ("cityscapes", OFFICIAL, [TRAIN_IDS, LABEL_IDS], []),
    "cityscapes, label ids": ("cityscapes", OFFICIAL, [LABEL_IDS], []),
    "cityscapes, CPS": ("cityscapes", "images/{part}/{key}.png", CPS, []),
    "cityscapes, PS-MT": ("cityscapes", PSMT[0] + ".png", [PSMT[1] + "_gtFine.png"], []),
    "coco": ("coco", "{part}2017/{key}.jpg", ["masks/{key}.png"], []),
    "ade20k": ("ade20k", SCENES[0], [SCENES[1]], []),
}  # fmt: skip
LINES = {  # of the lists of each project
    "voc": {
        "CPS, U2PL": "{key}",
        "UniMatch": "JPEGImages/{key}.jpg SegmentationClass/{key}.png",
        "tab": "train_aug/image/{key}.jpg\ttrain_aug/label/{key}.png",
    },
    "cityscapes": {
        "CPS": "/images/train/{key}.png\t/segmentation/train/{key}_gtFine.png",
        "U2PL": OFFICIAL,
        "UniMatch": f"{OFFICIAL} {TRAIN_IDS}",
        "A-FPL": "{city}/{key}_leftImg8bit.png",
    },
    "coco": {"UniMatch": "train2017/{key}.jpg masks/{key}.png", "PseudoSeg": "train2017/{key}"},
    "ade20k": {"UniMatch V2": " ".join(SCENES)},
}


def flags(root="", **changes):
    """Returns the flags that finding images and drawing samples read; every image is labelled."""
    values = dict(dataset="camvid", data_root=str(root), split="all", split_seed=None)
    values |= dict(split_family="cps", labeled_list="", unlabeled_list="")
    values |= dict(num_classes=0, ignore_index=255, seed=0, crop_size=24, scales=(0.5, 2.0))
    values |= dict(batch_size=8, batch_size_unlabeled=8, total_iters=4, workers=0)
    return SimpleNamespace(**values | changes)


def own(root, **changes):
    return flags(root, **dict(dataset="folder", num_classes=4) | changes)


def keys_of(args):
    """Returns the keys of the images that flags lead to: labelled, unlabelled, of val."""
    data = load(args)
    return [[item.key for item in items] for items in (data.labeled, data.unlabeled, data.val)]


def refusal(function, *arguments):
    """Returns the one line that a call is refused with."""
    with pytest.raises(Refusal) as refused:
        function(*arguments)
    line = str(refused.value)
    assert line and "\n" not in line and "\r" not in line
    return line


def listed(path, *lines):
    """Writes a list; returns its path as a flag has it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return str(path)


def entry(keys, **more):
    """Returns a set as common/splits.json has it, made by hand."""
    digest = hashlib.sha1("\n".join(sorted(keys)).encode()).hexdigest()[:8]
    return {"images": len(keys), "set": digest} | more


def words(key, part="train"):
    """Returns what stands in the place of each {word} of a layout or a line."""
    fold = {"train": "train_aug"}.get(part, part)
    long = {"train": "training", "val": "validation"}[part]
    return dict(key=key, part=part, fold=fold, long=long, city=key.split("_")[0])


def picture(path, mode, value, size=(8, 6)):
    """Draws a picture of one colour, or of one index of a palette that is all black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L" if mode == "P" else mode, size, value)
    if mode == "P":
        image.putpalette(bytes(768))
    image.save(path)
    return path


def folder(root, names=("a", "b", "c", "d"), ends=(".png",), images="images/{}", masks="masks/{}"):
    """Draws train, two of val, one of test; image i is 10 (i + 1) in red, its mask all i % 4."""
    for part, keys in (("train", names), ("val", ["v0", "v1"]), ("test", ["t0"])):
        for i, key in enumerate(keys):
            image = root / images.format(part) / f"{key}{ends[i % len(ends)]}"
            picture(image, "RGB", (10 * (i + 1), 30, 40 * len(part)))
            picture(root / masks.format(part) / f"{key}.png", "L", i % 4)
    return root


def camvid(root):
    return folder(root, NAMES, images="{}", masks="{}annot")


def draw(root, layout):
    """Draws a tree: image n is 30 n in red, its preferred mask is all n, the next one n + 6."""
    name, image, masks, lists = LAYOUTS[layout]
    pairs = [(part, key) for part, keys in KEYS[name].items() for key in keys]
    for n, (part, key) in enumerate(pairs):
        photo, *places = (pattern.format(**words(key, part)) for pattern in (image, *masks))
        picture(root / photo, "RGB", 30 * n)
        for i, path in enumerate(places):
            palette = "SegmentationClass/" in path
            if not palette or key in FINE:
                picture(root / path, "P" if palette else "L", n + 6 * i)
    sets = root / image.split("JPEGImages")[0] / "ImageSets/Segmentation"
    for keys, file in zip(KEYS[name].values(), lists, strict=False):
        listed(sets / f"{file}.txt", *keys)
    if lists:
        listed(sets / "train.txt", KEYS["voc"]["train"][1])  # VOC's own: not the 10,582


def publish(monkeypatch, dataset, family, split, keys):
    """Makes keys a published set, and its list lie where fetched lists are kept; returns where."""
    new = entry(keys, url="https://example.org/list.txt")
    monkeypatch.setitem(SPLITS[dataset].setdefault(family, {}), split, new)
    name = split.replace("/", "_")
    return listed(f"data/splits/{dataset}/{family}/{name}.txt", *reversed(keys))


def publish_parts(monkeypatch, dataset):
    """Makes the drawn images of a data set the published ones."""
    for part, keys in KEYS[dataset.removesuffix("_aug")].items():
        publish(monkeypatch, dataset, "parts", part, keys)


def command(line, *more):
    """Runs a command of prepare_data.py as its line has it."""
    prepare_data.main([*shlex.split(line), *map(str, more)])
