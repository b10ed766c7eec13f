"""What a data set is, and how one of its images is read. No augmentation here.

facts.json has classes, palettes, layouts and id tables; splits.json the published splits with their
hashes. common/sources.py finds the images and says which are labelled.
"""

import hashlib
import json
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import Refusal, shapes

HERE = Path(__file__).parent
FACTS, SPLITS = (json.loads((HERE / f"{name}.json").read_text()) for name in ("facts", "splits"))
FACTS["voc_aug"] = FACTS["voc"]  # one folder; the labelled are drawn from 1,464 or from 10,582
SPLITS["voc_aug"]["parts"] = SPLITS["voc"]["parts"]
IGNORE = 255


class Item(NamedTuple):
    """One image: its key, its file and, if it will be opened, its mask (generated: key alone)."""

    key: str
    image: Path | None = None
    label: Path | None = None


class Data:
    """A data set: name, classes, palette (C, 3) uint8; lists labeled, unlabeled, val, test."""

    def __init__(self, args, labeled, unlabeled, val, test):
        facts = FACTS[args.dataset]
        self.name = args.dataset
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.val = val
        self.test = test
        self.classes = facts.get("classes") or [f"class {i}" for i in range(args.num_classes)]
        self.num_classes = len(self.classes)
        bits = np.arange(self.num_classes)[:, None] >> np.arange(3)
        spread = sum(((bits >> 3 * i) & 1) << (7 - i) for i in range(8))  # VOC's rule
        self.palette = np.array(facts.get("palette") or spread, np.uint8)
        self.tables = {}  # end of a mask's name -> (256,) class of a value, 254: unknown
        for end, ids in (facts.get("ids", {}) | {"": range(self.num_classes)}).items():
            self.tables[end] = np.full(256, 254, np.uint8)
            self.tables[end][: len(ids)] = ids
            self.tables[end][args.ignore_index] = IGNORE

    def hashes(self):
        """Returns {list: [number of images, set hash]}."""
        names = ("labeled", "unlabeled", "val", "test")
        keys = {name: [item.key for item in getattr(self, name)] for name in names}
        return {name: [len(keys[name]), set_hash(keys[name])] for name in names}

    def read(self, item, with_label):
        """Returns PIL (image RGB, mask L or None) of one size; mask values are in [0, C) or 255.

        Raises Refusal, naming the file, if one cannot be read, the sizes differ or a value is
        outside the classes.
        """
        if item.image is None:
            image, label = shapes.draw(item.key)
            return image, label if with_label else None
        image = _open(item.image)
        if image.mode[0] in "IF":  # PIL would clip them to white
            raise Refusal(f"{item.image}: mode {image.mode}, not 8 bits a channel: convert it")
        image = image.convert("RGB")
        if not with_label:
            return image, None
        mask = _open(item.label, mask=True)
        if mask.size != image.size:
            sizes = "{}x{} pixels, not {}x{}".format(*mask.size, *image.size)
            raise Refusal(f"{item.label}: {sizes} as its image {item.image}")
        if mask.mode not in ("1", "L", "P"):  # P: the palette index is the class, never its colour
            raise Refusal(
                f"{item.label}: mode {mask.mode}, not one 8-bit channel of class ids: convert it"
            )
        values = np.asarray(mask).astype(np.uint8)
        table = next(t for end, t in self.tables.items() if item.label.name.endswith(end))
        label = table[values]
        if (label == 254).any():
            y, x = np.argwhere(label == 254)[0]
            *_, last = np.flatnonzero(table < 254)
            what = f"value {values[y, x]} at row {y}, column {x}; classes are 0 to {last}, and"
            raise Refusal(f"{item.label}: {what} {np.flatnonzero(table == IGNORE)[-1]} is ignored")
        return image, Image.fromarray(label)


def _open(path, mask=False):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file is one line
            image = Image.open(path)
        with image:
            if mask and image.format == "PNG" and image.mode == "L" and image.tile[0][3] != "L":
                raise Refusal(f"{path}: grey of 2 or 4 bits, which PIL rescales: save it with 8")
            image.load()
            return image
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refusal(f"{path}: not readable as an image ({error}): fetch it again") from None


def set_hash(keys):
    """Returns the first 8 hex digits of the sha1 of the sorted keys, one per line: names a set."""
    return hashlib.sha1("\n".join(sorted(keys)).encode()).hexdigest()[:8]


def counts(dataset, split):
    """Returns (labelled, unlabelled) images of a split, from the facts alone; (0, 0) if unknown.

    1/r of any r, as --split-seed draws it, or a published name.
    """
    known = {k: e["images"] for f in SPLITS.get(dataset, {}).values() for k, e in f.items()}
    pool = known.get("train", 0)
    labels = known.get(split, 0)
    if fraction := re.fullmatch(r"1/([1-9]\d*)", split or ""):
        labels = math.ceil(pool / int(fraction[1]))
    if split == "all":
        return pool, pool
    if not 0 < labels < pool:
        return 0, 0
    return labels, pool - labels
