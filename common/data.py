"""Which images there are, which of them are labelled, and how one is read. No augmentation here.

The facts (classes, palettes, layouts, id tables) are in facts.json. Masks of unlabelled images are
never opened.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from common import Refusal, shapes

FACTS = json.loads((Path(__file__).parent / "facts.json").read_text())
FACTS["voc_aug"] = FACTS["voc"]  # one folder; the labelled are drawn from 1,464 or from 10,582
IGNORE = 255


class Item(NamedTuple):
    """One image: its key, its file and the file of its mask (the key alone if it is generated)."""

    key: str
    image: Path | None = None
    label: Path | None = None


class Data:
    """A data set: name, classes, palette (C, 3) uint8; lists labeled, unlabeled, val, test."""

    def __init__(self, name, labeled, unlabeled, val, test):
        facts = FACTS[name]
        self.name, self.classes = name, facts["classes"]
        self.palette = np.array(facts["palette"], np.uint8)
        self.labeled, self.unlabeled, self.val, self.test = labeled, unlabeled, val, test
        self.num_classes = len(self.classes)
        self.table = np.full(256, 254, np.uint8)  # value in the file -> class; 254 marks a stranger
        self.table[: self.num_classes] = np.arange(self.num_classes)
        self.table[IGNORE] = IGNORE
        for value, class_id in facts.get("ids", {}).items():
            self.table[int(value)] = class_id

    def read(self, item, with_label):
        """Returns PIL (image RGB, mask L or None) of one size; mask values are in [0, C) or 255.

        Raises Refusal, naming the file, if one cannot be read, the sizes differ or a value is
        outside the classes.
        """
        if item.image is None:
            image, label = shapes.draw(item.key)
            return image, label if with_label else None
        image = _open(item.image).convert("RGB")
        if not with_label:
            return image, None
        mask = _open(item.label)
        if mask.size != image.size:
            (w, h), (iw, ih) = mask.size, image.size
            raise Refusal(f"{item.label} is {w}x{h} pixels, its image {item.image} is {iw}x{ih}")
        if mask.mode not in ("L", "P"):  # P: the palette index is the class, never its colour
            raise Refusal(
                f"{item.label}: mode {mask.mode}; a mask has one 8-bit channel of class ids"
            )
        values = np.asarray(mask)
        label = self.table[values]
        if (label == 254).any():
            y, x = np.argwhere(label == 254)[0]
            raise Refusal(
                f"{item.label}: value {values[y, x]} at row {y}, column {x}; "
                f"{self.name} has classes 0 to {self.num_classes - 1} and {IGNORE}"
            )
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


class Images(Dataset):
    """Index -> (image (3, H, W) uint8, label (H, W) uint8) at the image's own size."""

    def __init__(self, data, items):
        self.data, self.items = data, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        image, label = self.data.read(self.items[index], True)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(label))


def set_hash(items):
    """Returns the first 8 hex digits of the sha1 of the sorted keys, one per line: names a set."""
    text = "\n".join(sorted(item.key for item in items))
    return hashlib.sha1(text.encode()).hexdigest()[:8]


def read_list(path, pattern):
    """Returns the keys of a list file: the first match of pattern in each line's first column.

    Columns are split at TAB or space; CRLF, empty lines and a missing final newline are fine.
    Raises Refusal on a line without a key, a key that comes twice, or no line at all.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not a readable list ({error})") from None
    keys = {}
    for number, line in enumerate(lines, 1):
        column = re.split(r"[\t ]", line.strip())[0]
        if not column:
            continue
        match = re.search(pattern, column) or re.fullmatch(r"[\w.-]+", column)
        if not match or match[0] in keys:
            raise Refusal(
                f"{path}:{number}: {'twice' if match else 'no image key'}: {line.strip()}"
            )
        keys[match[0]] = number
    if not keys:
        raise Refusal(f"{path}: an empty list")
    return list(keys)


def choose(keys, split, seed):
    """Returns (labelled, unlabelled) keys: all, or every r-th of the sorted ones and the rest.

    split: "all" or "1/r". seed: None, or the seed of a random subset of ceil(n / r) keys instead.
    Subsets of one seed are nested in 1/r.
    """
    keys = sorted(keys)
    if split == "all":
        return keys, keys
    match = re.fullmatch(r"1/([1-9]\d*)", split)
    if not match or not 2 <= int(match[1]) <= len(keys):
        raise Refusal(f"--split {split}: all, or 1/r with r from 2 to {len(keys)}")
    if seed is None:
        labeled = keys[:: int(match[1])]
    else:
        order = np.random.default_rng(seed).permutation(len(keys))
        labeled = sorted(keys[i] for i in order[: math.ceil(len(keys) / int(match[1]))])
    taken = set(labeled)
    return labeled, [k for k in keys if k not in taken]


def counts(dataset, split):
    """Returns (labelled, unlabelled) images of a split, from the facts alone; (0, 0) if unknown."""
    pool, (name, _, r) = FACTS[dataset].get("pool", 0), (split or "").partition("/")
    if split == "all" or not pool or not (r or name).isdecimal() or not int(r or name):
        return pool if split == "all" else 0, pool if split == "all" else 0
    labels = math.ceil(pool / int(r)) if r else int(name)
    return labels, pool - labels


def load(args):
    """Returns the Data that the flags name; every file that will be opened exists. Raises Refusal.

    dataset, data_root ("" takes the data set's usual folder); split, split_seed as `choose`, or
    labeled_list and unlabeled_list instead (without the second, all other images are unlabelled).
    """
    name, facts = args.dataset, FACTS[args.dataset]
    labeled_list, unlabeled_list = args.labeled_list, args.unlabeled_list
    root = Path(args.data_root or facts.get("root", "."))
    if name == "shapes":
        found = {p: {k: Item(k) for k in shapes.keys(p)} for p in ("train", "val", "test")}
    else:
        if not root.is_dir():
            raise Refusal(f"{root}: no such folder; --data-root names the folder of {name}")
        found = {part: _find(root, facts, part) for part in facts["parts"]}
        if not found["val"]:
            raise Refusal(
                f"{root}: no images of {name} here ({' or '.join(facts['parts']['val'])})"
            )

    def listed(path):
        items = []
        for key in read_list(path, facts["key"]):
            item = found["train"].get(key) or _item(root, facts, "train", key)
            if item is None:
                raise Refusal(f"{path}: names {key}, which is not among the images under {root}")
            items.append(item)
        return items

    if labeled_list:
        labeled = listed(labeled_list)
        taken = {item.key for item in labeled}
        rest = [item for key, item in sorted(found["train"].items()) if key not in taken]
        unlabeled = listed(unlabeled_list) if unlabeled_list else rest
    elif unlabeled_list:
        raise Refusal("--unlabeled-list without --labeled-list: give both")
    elif not found["train"]:
        raise Refusal(
            f"--split {args.split} of {name}: give its lists, --labeled-list and --unlabeled-list"
        )
    else:
        parts = choose(found["train"], args.split, args.split_seed)
        labeled, unlabeled = ([found["train"][k] for k in keys] for keys in parts)
    val, test = (list(found.get(part, {}).values()) for part in ("val", "test"))
    for item in (*labeled, *val, *test):
        if item.image is not None and not (item.label and item.label.is_file()):
            raise Refusal(f"{item.image}: its mask {item.label} is missing")
    return Data(name, labeled, unlabeled, val, test)


def _find(root, facts, part):
    """{key: Item} of one part, sorted: from a list file, or from the images in its folders."""
    keys = set()
    for pattern in facts["parts"][part]:
        if pattern.endswith(".txt"):
            keys |= (
                set(read_list(root / pattern, facts["key"])) if (root / pattern).exists() else set()
            )
        else:
            names = (path.relative_to(root).as_posix() for path in root.glob(pattern))
            keys |= {re.search(facts["key"], name)[0] for name in names}
    return {key: item for key in sorted(keys) if (item := _item(root, facts, part, key))}


def _item(root, facts, part, key):
    """The Item of a key, from the first image pattern that exists (None if none does)."""
    words = {"part": part, "key": key, "city": key.split("_")[0]}
    for pattern in facts.get("image", ()):
        if (root / pattern.format(**words)).is_file():
            label = root / facts["label"][0].format(**words)
            return Item(key, root / pattern.format(**words), label)
    return None
