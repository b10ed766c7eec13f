"""What a data set is, and how one of its images is read. No augmentation here.

facts.json has classes, palettes, layouts and id tables; splits.json the published splits with their
hashes. common/sources.py finds the images and says which are labelled.
"""

import contextlib
import csv
import hashlib
import json
import math
import re
import shlex
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
# what PIL raises of damaged files
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError)
LARGEST = 253  # id of a class

# how Pillow hands a mask's stored values on unchanged; other ways rescale or invert grey
CODECS = ("zip", "raw", "libtiff", "packbits", "gif")
RAW_MODES = ("L", "P", "P;1", "P;2", "P;4", "1")
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp", "lerc")
TIFF_KIND = 254  # tag of a page: bit 0 an overview of another page, bit 2 a transparency mask
TIFF_BANDS = 277
ORIENTATION = 274  # EXIF's and TIFF's tag
CONVERT = (  # what to do with masks of another kind
    "python prepare_data.py convert --from DIR --out MY, where DIR has them outside of MY, "
    "makes masks of ids"
)


class Item(NamedTuple):
    """One image: its key, its file and, if it will be opened, its mask (generated: key alone)."""

    key: str
    image: Path | None = None
    label: Path | None = None


class ClassRow(NamedTuple):
    """A row of classes.csv: id (255: ignored), name, colour, and the value in masks to convert."""

    id: int
    name: str
    colour: tuple
    value: int | None = None


class Data:
    """A data set: name, classes, palette (C, 3) uint8; lists labeled, unlabeled, val, test.

    rows: those of a folder's classes.csv, which give names and colours.
    """

    def __init__(self, args, labeled, unlabeled, val, test, rows=()):
        facts = FACTS[args.dataset]
        self.name = args.dataset
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.val = val
        self.test = test
        self.cache = None  # common/cache.py's, where a script's --cache names one
        own = {row.id: row for row in reversed(rows) if row.id != IGNORE}  # the first row of an id
        names = facts.get("classes") or [own[i].name for i in sorted(own)]
        colours = facts.get("palette") or [own[i].colour for i in sorted(own)]
        self.classes = names or [f"class {i}" for i in range(args.num_classes)]
        self.num_classes = len(self.classes)
        self.palette = np.array(colours or voc_colours(self.num_classes), np.uint8)
        self.tables = {}  # end of a mask's name -> (256,) class of a value, 254: unknown
        for end, ids in (facts.get("ids", {}) | {"": range(self.num_classes)}).items():
            self.tables[end] = np.full(256, 254, np.uint8)
            self.tables[end][args.ignore_index] = IGNORE
            self.tables[end][: len(ids)] = ids

    def hashes(self):
        """Returns {list: [number of images, set hash]}."""
        names = ("labeled", "unlabeled", "val", "test")
        keys = {name: [item.key for item in getattr(self, name)] for name in names}
        return {name: [len(keys[name]), set_hash(keys[name])] for name in names}

    def named(self):
        """Returns [[id, name, colour]] of the classes, for checkpoints."""
        both = zip(self.classes, self.palette.tolist(), strict=True)
        return [[i, name, colour] for i, (name, colour) in enumerate(both)]

    def read(self, item, with_label):
        """Returns PIL (image RGB, mask L or None) of one size; mask values are in [0, C) or 255.

        Raises Refusal, naming the file, if one cannot be read, the sizes differ or a value is
        outside the classes.
        """
        if item.image is None:
            image, label = shapes.draw(item.key)
            return image, label if with_label else None
        image = self.opened(item.image, read_photograph)
        if not with_label:
            return image, None
        mask = self.opened(item.label, read_mask)
        if mask.size != image.size:
            sizes = "{}x{} pixels, not {}x{}".format(*mask.size, *image.size)
            turned = orientation(item.image)
            why = f", which EXIF says to turn (orientation {turned})" if turned != 1 else ""
            raise Refusal(f"{item.label}: {sizes} as its image {item.image}{why}")
        values = np.asarray(mask).astype(np.uint8)
        table = next(t for end, t in self.tables.items() if item.label.name.endswith(end))
        label = table[values]
        if (label == 254).any():
            y, x = np.argwhere(label == 254)[0]
            first, *_, last = np.flatnonzero(table < 254)
            what = (
                f"value {values[y, x]} at row {y}, column {x}; classes are {first} to {last}, and"
            )
            what += f" {np.flatnonzero(table == IGNORE)[-1]} is ignored"
            raise Refusal(f"{item.label}: {what}; if its ids are others, {CONVERT}")
        return image, Image.fromarray(label)

    def opened(self, path, read):
        """Returns a file as PIL has it: out of the cache, or by read(path) where that lacks it."""
        if self.cache is not None:
            image = self.cache.image(path)
            if image is not None:
                return image
        return read(path)

    def require_pixels(self, tally, masks):
        """Raises Refusal if a tally, pixels of each class (or of pairs), is 0 throughout.

        masks: which they are, "val". Scores over nothing would pass for a result.
        """
        if not tally.any():
            why = f"all is ignored: their ids are not those of {self.name}; {CONVERT}"
            raise Refusal(f"no pixel of any class in the masks of {masks}; {why}")


def data_flags(args):
    """Returns the flags that say which data set it is, as one types them."""
    words = ["--dataset", args.dataset]
    if args.data_root:
        words += ["--data-root", args.data_root]
    if args.num_classes:
        words += ["--num-classes", str(args.num_classes)]
    if args.ignore_index != IGNORE:
        words += ["--ignore-index", str(args.ignore_index)]
    return shlex.join(words)


def voc_colours(count):
    """Returns (count, 3) colours by VOC's rule, all different up to 256."""
    bits = np.arange(count)[:, None] >> np.arange(3)
    return sum(((bits >> 3 * i) & 1) << (7 - i) for i in range(8))


def read_classes(path):
    """Returns the ClassRows of a classes.csv: columns id, name, r, g, b and, if there, value.

    An id may come in several rows: several values or colours are then one class. Raises Refusal,
    naming the line, where a row is not right or an id below the last is missing.
    """
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = {"id", "name", "r", "g", "b"} - set(reader.fieldnames or ())
            if missing:
                raise Refusal(f"{path}:1: no column {', '.join(sorted(missing))}")
            for entry in reader:
                if any(entry[name] for name in reader.fieldnames):  # else a spreadsheet's empty row
                    rows.append(class_row(entry, f"{path}:{reader.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refusal(f"{path}: not a readable table ({error})") from None
    ids = {row.id for row in rows} - {IGNORE}
    lacking = set(range(max(ids, default=0) + 1)) - ids
    if lacking:
        raise Refusal(f"{path}: no row has the id {min(lacking)}: ids run from 0 without a gap")
    return rows


def class_row(entry, place):
    """Returns the ClassRow of a dict of texts. Raises Refusal, naming the place."""
    try:
        number = int(entry["id"])
        colour = tuple(int(entry[channel]) for channel in "rgb")
        value = int(entry["value"]) if entry.get("value") else None
    except (TypeError, ValueError) as error:
        raise Refusal(f"{place}: {error}") from None
    if not 0 <= number <= LARGEST and number != IGNORE:
        raise Refusal(f"{place}: id {number}: 0 to {LARGEST}, or {IGNORE} for what is ignored")
    if not all(0 <= channel <= 255 for channel in colour):
        raise Refusal(f"{place}: colour {colour}: three numbers from 0 to 255")
    return ClassRow(number, (entry["name"] or f"class {number}").strip(), colour, value)


# ---- one file ----


def read_photograph(path):
    """Returns an image as PIL RGB. Raises Refusal where 8 bits a channel would not be all of it."""
    return _open(path, check_photograph).convert("RGB")


def read_mask(path):
    """Returns a mask, PIL 1, L or P, with the values that the file stores. Raises Refusal."""
    return _open(path, check_mask)


def read_colours(path):
    """Returns a mask of any kind that is not lossy, as PIL opens it. Raises Refusal."""
    return _open(path, check_lossless)


def orientation(path):
    """Returns the EXIF orientation of an image file, 1 (as stored) where it has none."""
    with contextlib.suppress(*UNREADABLE), Image.open(path) as image:
        return image.getexif().get(ORIENTATION, 1)
    return 1


def _open(path, check):
    """Returns a file as PIL has it, loaded. check(image) -> "" or why it cannot be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file is one line
            image = Image.open(path)
            with image:
                wrong = pages(image) or check(image)
                if wrong:
                    raise Refusal(f"{path}: {wrong}")
                image.load()
                return image
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file") from None
    except UNREADABLE as error:
        why = f"not readable as an image ({error}): {remedy(path, error)}"
        raise Refusal(f"{path}: {why}") from None


def remedy(path, error):
    """Returns what to do about a file that PIL does not read."""
    if isinstance(error, Image.DecompressionBombError):
        return "cut it into tiles"
    if "MAX_TEXT" in str(error):
        return "save it without its long texts"
    head = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(12)
    if head[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "a telephone's HEIC, whatever its name: save it as JPEG or PNG"
    if head[:2] in (b"II", b"MM"):
        kind = "a damaged TIFF, or of a number of bands, bits or a compression that Pillow lacks"
        return f"{kind}: save it as PNG, photographs with three bands"
    return "fetch it again"


def raw_form(image):
    """Returns (codec, raw mode) of an open image: how PIL will read the stored values."""
    if not image.tile:
        return "", image.mode
    codec, _, _, rest = image.tile[0]
    if isinstance(rest, str):
        return codec, rest
    if rest and isinstance(rest[0], str):
        return codec, rest[0]
    return codec, image.mode


def pages(image):
    """Returns why an open image of several pages cannot be used, or "".

    Overviews and transparency masks of a TIFF are no pages, and what a telephone adds to its JPEG
    is no second photograph.
    """
    if not getattr(image, "is_animated", False) or image.format == "MPO":
        return ""
    count = getattr(image, "n_frames", 1) if image.format != "TIFF" else tiff_pages(image)
    return f"{count} pages or frames: save each as a file" if count > 1 else ""


def tiff_pages(image):
    """Returns how many pages of an open TIFF are no overview or mask of another; it stays open."""
    count = 1
    number = 1
    while True:
        try:
            image.seek(number)
        except EOFError:
            break
        except SyntaxError:
            pass  # a page of bits that PIL does not know; its tags are read
        count += not image.tag_v2.get(TIFF_KIND, 0) & 5
        number += 1
    image.seek(0)
    return count


def check_photograph(image):
    """Returns why an open image is no photograph of 8 bits a channel, or ""."""
    codec, raw = raw_form(image)
    deep = codec.startswith("ppm") and image.tile[0][3][-1] > 255
    if deep or image.mode[0] in "IF" or ";16" in raw:  # PIL would clip or shift
        how = "scale it to 8, all images alike (docs/formats.md)"
        return f"mode {image.mode} ({raw}), not 8 bits a channel: {how}"
    if image.format != "TIFF":
        return ""
    bands = image.tag_v2.get(TIFF_BANDS, 1)
    if "X" in raw or (bands > 3 and image.mode != "CMYK"):
        return f"a TIFF of {bands} bands, the last maybe no alpha: save one or three to train on"
    return turned(image)


def turned(image):
    """Returns why an open image that has a tag of orientation is not read as stored, or "".

    Asked last: it makes PIL load a PNG, which then no longer tells its raw mode.
    """
    tag = image.getexif().get(ORIENTATION, 1)
    return f"EXIF orientation {tag}: turn its pixels and save it without" if tag != 1 else ""


def renumbered(image):
    """Returns why the indices of an open GIF may be no ids, or "".

    Pillow, as others, numbers the colours that occur anew where it writes one.
    """
    if image.format != "GIF":
        return ""
    colours = np.asarray(image.convert("RGB"))
    if (colours == np.asarray(image)[..., None]).all():  # each is the grey of its index
        return ""
    return f"GIF, whose writers number the colours anew: its indices may be no ids; {CONVERT}"


def lossy(image):
    """Returns why an open image cannot hold ids or colours exactly, or ""."""
    kind = image.format
    inside = image.info.get("compression") if kind == "TIFF" else ""
    if kind not in LOSSY and inside not in LOSSY_IN_TIFF:
        return ""
    if inside:
        kind = f"TIFF with {inside.removeprefix('tiff_').upper()} inside"
    return f"{kind}, which blurs ids into others: make the masks anew, as PNG"


def check_lossless(image):
    """Returns why an open image cannot be a mask to convert, or ""."""
    if ";16" in raw_form(image)[1] and image.mode[0] != "I":
        return f"mode {image.mode} of 16 bits, of which PIL keeps 8: save it with 8"
    return lossy(image) or turned(image)


def check_mask(image):
    """Returns why an open image is no mask of class ids, or "". P: the index is the class."""
    if wrong := lossy(image):
        return wrong
    if image.mode not in ("1", "L", "P"):
        return f"mode {image.mode}, not one 8-bit channel of class ids: {CONVERT}"
    codec, raw = raw_form(image)
    if raw in ("L;2", "L;4"):
        return f"grey of 2 or 4 bits, which PIL rescales: save it with 8, or {CONVERT}"
    if raw.endswith("I"):
        return f"white is stored as 0, which PIL inverts: save it otherwise, or {CONVERT}"
    if codec.startswith("ppm") and image.tile[0][3][-1] != 255:
        return f"grey with another maximum than 255, which PIL rescales: {CONVERT}"
    if codec not in CODECS or raw not in RAW_MODES:
        return f"{image.format} ({codec} {raw}), not known to keep ids as stored: save it as PNG"
    return renumbered(image) or turned(image)


# ---- sets ----


def set_hash(keys):
    """Returns the first 8 hex digits of the sha1 of the sorted keys, one per line: names a set."""
    names = "\n".join(sorted(keys)).encode("utf-8", "surrogateescape")  # as the disk has them
    return hashlib.sha1(names).hexdigest()[:8]


def counts(dataset, split):
    """Returns (labelled, unlabelled) images of a split, from the facts alone; (0, 0) if unknown.

    A published name, or 1/r of any r, as --split-seed draws it.
    """
    known = {
        name: entry["images"]
        for family in reversed(SPLITS.get(dataset, {}).values())  # the first wins: CAC's differ
        for name, entry in family.items()
    }
    pool = known.get("train", 0)
    labels = known.get(split, 0)
    if not labels and (fraction := re.fullmatch(r"1/([1-9]\d*)", split or "")):
        labels = math.ceil(pool / int(fraction[1]))
    if split == "all":
        return pool, pool
    if not 0 < labels < pool:
        return 0, 0
    return labels, pool - labels
