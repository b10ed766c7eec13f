"""Which images there are, which of them are labelled, and how one is read. No augmentation here.

facts.json has classes, palettes, layouts and id tables; splits.json the published splits with their
hashes. Masks of unlabelled images are never opened.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import Refusal, shapes

HERE = Path(__file__).parent
FACTS, SPLITS = (json.loads((HERE / f"{name}.json").read_text()) for name in ("facts", "splits"))
FACTS["voc_aug"] = FACTS["voc"]  # one folder; the labelled are drawn from 1,464 or from 10,582
PARTS = ("train", "val", "test")
IGNORE = 255


class Item(NamedTuple):
    """One image: its key, its file and, if it will be opened, its mask (generated: key alone)."""

    key: str
    image: Path | None = None
    label: Path | None = None


class Data:
    """A data set: name, classes, palette (C, 3) uint8; lists labeled, unlabeled, val, test."""

    def __init__(self, args, labeled, unlabeled, val, test):
        facts, self.name = FACTS[args.dataset], args.dataset
        self.labeled, self.unlabeled, self.val, self.test = labeled, unlabeled, val, test
        self.classes = facts.get("classes") or [f"class {i}" for i in range(args.num_classes)]
        self.num_classes = len(self.classes)
        bits = np.arange(self.num_classes)[:, None] >> np.arange(3)
        spread = sum(((bits >> 3 * i) & 1) << (7 - i) for i in range(8))  # VOC's rule
        self.palette = np.array(facts.get("palette") or spread, np.uint8)
        self.tables = {}  # end of a mask's name -> (256,) class of each value, 254 for a stranger
        for end, ids in (facts.get("ids", {}) | {"": range(self.num_classes)}).items():
            self.tables[end] = np.full(256, 254, np.uint8)
            self.tables[end][: len(ids)] = ids
            self.tables[end][args.ignore_index] = IGNORE

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
            raise Refusal(f"{item.image}: mode {image.mode}, not 8 bits a channel")
        image = image.convert("RGB")
        if not with_label:
            return image, None
        mask = _open(item.label)
        if mask.size != image.size:
            sizes = "{}x{} pixels, not {}x{}".format(*mask.size, *image.size)
            raise Refusal(f"{item.label}: {sizes} as its image {item.image}")
        if mask.mode not in ("1", "L", "P"):  # P: the palette index is the class, never its colour
            raise Refusal(f"{item.label}: mode {mask.mode}, not one 8-bit channel of class ids")
        values = np.asarray(mask).astype(np.uint8)
        table = next(t for end, t in self.tables.items() if item.label.name.endswith(end))
        label = table[values]
        if (label == 254).any():
            y, x = np.argwhere(label == 254)[0]
            *_, last = np.flatnonzero(table < 254)
            what = f"value {values[y, x]} at row {y}, column {x}; classes are 0 to {last}, and"
            raise Refusal(f"{item.label}: {what} {np.flatnonzero(table == IGNORE)[-1]} is ignored")
        return image, Image.fromarray(label)


def _open(path):
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refusal(f"{path}: not readable as an image ({error})") from None


def set_hash(keys):
    """Returns the first 8 hex digits of the sha1 of the sorted keys, one per line: names a set."""
    return hashlib.sha1("\n".join(sorted(keys)).encode()).hexdigest()[:8]


def choose(keys, split, seed):
    """Returns (labelled, unlabelled) keys: all, or every r-th of the sorted ones and the rest.

    split: "all" or "1/r". seed: None, or that of a random subset of ceil(n / r) keys, nested in r.
    """
    keys = sorted(keys)
    if split == "all":
        return keys, keys
    match = re.fullmatch(r"1/([1-9]\d*)", split)
    if not match or not 2 <= int(match[1]) <= len(keys):
        raise Refusal(f"--split {split}: all, or 1/r with r from 2 to {len(keys)}")
    r = int(match[1])
    order = np.random.default_rng(seed).permutation(keys)[: math.ceil(len(keys) / r)]
    chosen = set(keys[::r] if seed is None else order.tolist())
    return [k for k in keys if k in chosen], [k for k in keys if k not in chosen]


def counts(dataset, split):
    """Returns (labelled, unlabelled) images of a split, from the facts alone; (0, 0) if unknown."""
    pool, match = FACTS[dataset].get("pool", 0), re.fullmatch(r"(1/)?([1-9]\d*)", split or "")
    if split == "all" or not pool or not match:
        return (pool, pool) if split == "all" else (0, 0)
    labels = math.ceil(pool / int(match[2])) if match[1] else int(match[2])
    fits = not match[1] and labels <= 1464 if dataset == "voc" else labels < pool
    return (labels, pool - labels) if fits else (0, 0)


def load(args):
    """Returns the Data that the flags name; every file that will be opened exists. Raises Refusal.

    dataset, data_root; num_classes and ignore_index of a folder; split with split_family, or with
    split_seed as `choose` has it; or labeled_list and unlabeled_list (without the second, all other
    images are unlabelled). A folder's images without a mask are unlabelled whatever the split.
    """
    from sources import Tree, named, read_list  # they need this module

    own, tree = args.dataset == "folder", Tree(args.dataset, args.data_root)
    if own and not 2 <= args.num_classes <= 254:
        raise Refusal(f"--num-classes {args.num_classes}: how many the masks have, 2 to 254")
    if not 0 <= args.ignore_index <= 255:
        raise Refusal(f"--ignore-index {args.ignore_index}: a value of a mask, 0 to 255")
    if not own and (args.num_classes or args.ignore_index != IGNORE):
        raise Refusal("--num-classes, --ignore-index: with --dataset folder alone")
    if args.unlabeled_list and not args.labeled_list:
        raise Refusal("--unlabeled-list without --labeled-list: give both")
    train, val, test = (tree.part(part, not args.unlabeled_list) for part in PARTS)
    if not val:
        some = ", ".join(tree.facts["parts"]["val"])
        raise Refusal(f"{tree.root}: nothing of {args.dataset} here ({some})")
    if args.labeled_list:
        labeled = read_list(args.labeled_list, tree.facts["key"])
        unlabeled = {key: row for key, row in train.items() if key not in labeled}
        if args.unlabeled_list:
            unlabeled = read_list(args.unlabeled_list, tree.facts["key"])
        entry = SPLITS.get(args.dataset, {}).get(args.split_family, {}).get(args.split, {})
        expected = entry.get("images") or counts(args.dataset, args.split)[0]
        if args.split != "all" and expected not in (0, len(labeled)):
            found = f"has {expected} labelled images, not {len(labeled)}"
            raise Refusal(f"--split {args.split} {found}")
    else:
        masked = [k for k in train if not own or tree.file("train", k, [train[k]], 1)]
        if args.dataset in SPLITS and args.split_seed is None:
            parts = named(args, masked, list(val))
        else:
            parts = choose(masked, args.split, args.split_seed)
        if len(masked) < len(train):
            parts = (parts[0], sorted(set(train) - set(parts[0])))
        labeled, unlabeled = ({key: train[key] for key in keys} for keys in parts)
    lists = [tree.items("train", labeled, train, args.labeled_list)]
    lists += [tree.items("train", unlabeled, train, args.unlabeled_list, masks=False)]
    lists += [tree.items("val", val), tree.items("test", test)]
    files = [{item.image or item.key for item in one} for one in lists]
    leak = (files[0] | files[1]) & (files[2] | files[3])
    if leak:
        raise Refusal(f"{len(leak)} images to train on are in val or test: {min(leak)} ...")
    return Data(args, *lists)
