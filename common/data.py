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
from PIL import Image

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
            sizes = "{}x{} pixels, not {}x{}".format(*mask.size, *image.size)
            raise Refusal(f"{item.label}: {sizes} as its image {item.image}")
        if mask.mode not in ("L", "P"):  # P: the palette index is the class, never its colour
            raise Refusal(f"{item.label}: mode {mask.mode}, not one 8-bit channel of class ids")
        values = np.asarray(mask)
        label = self.table[values]
        if (label == 254).any():
            y, x = np.argwhere(label == 254)[0]
            what = f"value {values[y, x]} at row {y}, column {x}"
            raise Refusal(f"{item.label}: {what}; classes are 0 to {self.num_classes - 1} and 255")
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


def set_hash(items):
    """Returns the first 8 hex digits of the sha1 of the sorted keys, one per line: names a set."""
    return hashlib.sha1("\n".join(sorted(i.key for i in items)).encode()).hexdigest()[:8]


def read_list(path, pattern):
    """Returns the keys of a list file: the first match of pattern in each line's first column.

    Columns are split at TAB or space; CRLF, empty lines and a missing final newline are fine.
    Raises Refusal on a line without a key, a key that comes twice, or no line at all.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not a readable list ({error})") from None
    keys = {}
    for number, line in enumerate(lines, 1):
        column = re.split(r"[\t ]", line.strip())[0]
        if not column:
            continue
        match = re.search(pattern, column) or re.fullmatch(r"[\w.-]+", column)
        if not match or match[0] in keys:
            what = "twice" if match else "no image key"
            raise Refusal(f"{path}:{number}: {what}: {line.strip()}")
        keys[match[0]] = number
    if not keys:
        raise Refusal(f"{path}: an empty list")
    return list(keys)


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

    dataset, data_root ("" takes the data set's usual folder); split, split_seed as `choose`, or
    labeled_list and unlabeled_list instead (without the second, all other images are unlabelled).
    """
    name, facts = args.dataset, FACTS[args.dataset]
    root = Path(args.data_root or facts.get("root", "."))
    if name == "shapes":
        found = {p: {k: Item(k) for k in shapes.keys(p)} for p in ("train", "val", "test")}
    else:
        if not root.is_dir():
            raise Refusal(
                f"{root}: no such folder; --data-root names that of {name}, see docs/data.md"
            )
        found = {part: _find(root, facts, part) for part in facts["parts"]}
        if not found["val"]:
            raise Refusal(f"{root}: nothing of {name} here ({', '.join(facts['parts']['val'])})")

    if args.unlabeled_list and not args.labeled_list:
        raise Refusal("--unlabeled-list without --labeled-list: give both")
    if not found["train"] and not args.labeled_list:
        raise Refusal(f"--split of {name}: give its lists, --labeled-list and --unlabeled-list")
    if args.labeled_list:
        chosen = _listed(args.labeled_list, root, facts, "train", found["train"])
        rest = {k: item for k, item in found["train"].items() if k not in chosen}
        if args.unlabeled_list:
            rest = _listed(args.unlabeled_list, root, facts, "train", found["train"])
        labeled, unlabeled = list(chosen.values()), list(rest.values())
    else:
        parts = choose(found["train"], args.split, args.split_seed)
        labeled, unlabeled = ([found["train"][k] for k in keys] for keys in parts)
    val, test = (list(found.get(part, {}).values()) for part in ("val", "test"))
    expected = counts(name, args.split)[0] if args.labeled_list and args.split != "all" else 0
    if expected and expected != len(labeled):
        raise Refusal(f"--split {args.split} has {expected} labelled images, not {len(labeled)}")
    leak = {*labeled, *unlabeled} & {*val, *test}
    if leak:
        raise Refusal(f"{len(leak)} images to train on are in val or test: {min(leak).key} ...")
    for item in (*labeled, *val, *test):
        if item.image is not None and not (item.label and item.label.is_file()):
            raise Refusal(f"{item.image}: its mask {item.label} is missing")
    return Data(name, labeled, unlabeled, val, test)


def _find(root, facts, part):
    """{key: Item} of one part, sorted: from a list file, or from the images in its folders."""
    items = {}
    for pattern in facts["parts"][part]:
        for path in root.glob(pattern):
            if pattern.endswith(".txt"):
                items |= _listed(path, root, facts, part, {})
            elif not path.name.startswith("."):
                key = re.search(facts["key"], path.relative_to(root).as_posix())[0]
                items[key] = _item(root, facts, part, key)
    return dict(sorted(items.items()))


def _listed(path, root, facts, part, known):
    """{key: Item} of a list file, in its order; known: {key: Item} found before."""
    keys = read_list(path, facts["key"])
    items = {key: known.get(key) or _item(root, facts, part, key) for key in keys}
    for key, item in items.items():
        if item is None:
            raise Refusal(f"{path}: names {key}, which has no image under {root}")
    return items


def _item(root, facts, part, key):
    """The Item of a key, from the first image pattern that exists (None if none does)."""
    words = {"part": part, "key": key, "city": key.split("_")[0]}
    for pattern in facts.get("image", ()):
        if (root / pattern.format(**words)).is_file():
            label = root / facts["label"][0].format(**words)
            return Item(key, root / pattern.format(**words), label)
    return None
