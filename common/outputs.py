"""What predict.py reads and writes: images, whole files, pictures, pages, archives.

No number of a prediction is made here.
"""

import contextlib
import csv
import html
import io
import json
import os
import re
import tarfile
import urllib.parse
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import Refusal, metrics, pictures
from common.checkpoints import check_classes, writing
from common.data import FACTS, IGNORE, SPLITS, ClassRow, Data, Item, read_mask
from common.flags import NO_NUMBER
from common.run import lock
from common.sources import SUFFIXES, Tree, known_set, published

HELD = []  # locks of this process
GREYS = [0, 0, 0, 0, 0, 0, 128, 128, 128] + [255, 255, 255] * 253  # palette of K
RIGHT = (70, 70, 70)  # of an error map: where the prediction is the truth
WRONG = (235, 60, 40)
JPEG_SIDE = 60_000  # side of an overlay: a JPEG ends at 65,500, and the legend comes below
STYLE = """body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em }
img { max-width: 100%; border: 1px solid #ccc } table { border-collapse: collapse }
td, th { padding: 2px 12px 2px 0; text-align: right }
td:first-child, th:first-child { text-align: left }
figure { margin: 2em 0 } i { display: inline-block; width: 1em; height: 1em; margin-right: .5em }"""


# ---- images in -------------------------------------------------------------------------------


def find_images(places, out):
    """Returns Items of the images that places name, keyed by their path below the common folder.

    A place is a folder (with its sub-folders), a file, a pattern with * or a list: a .txt file with
    an image a line, below its own folder or the working one. What lies in out is left out. Raises
    Refusal.
    """
    files = []
    tops = []
    for place in places:
        found = [place]
        if not os.path.exists(place):
            found = sorted(glob(place, recursive=True))
        if not found:
            raise Refusal(f"{place}: no such image, folder or list")
        for name in found:
            path = Path(os.path.abspath(name))
            inside = images_in(path)
            tops += [path] if path.is_dir() else [file.parent for file in inside]
            files += inside
    written = Path(os.path.realpath(out))
    found = dict.fromkeys(files)
    files = [path for path in found if not Path(os.path.realpath(path)).is_relative_to(written)]
    if found and not files:
        raise Refusal(f"{', '.join(places)}: all images there lie in --out {out}: give another")
    if not files:
        raise Refusal(f"{', '.join(places)}: no image there ({' '.join(SUFFIXES)})")
    if len({folder.drive for folder in tops}) > 1:  # Windows
        raise Refusal(f"{', '.join(places)}: images on several drives")
    top = os.path.commonpath(tops)
    items = {}
    for path in files:
        key = path.relative_to(top).with_suffix("").as_posix()
        if key in items:
            raise Refusal(f"{path} and {items[key].image}: one name, {key}; rename one of them")
        items[key] = Item(key, path)
    return list(items.values())


def images_in(path):
    """Returns the image files that a folder, a list or a file stands for."""
    if path.is_dir():
        inside = (p.relative_to(path) for p in sorted(files_below(path)))
        seen = (p for p in inside if not any(part.startswith(".") for part in p.parts))
        return [path / p for p in seen if p.suffix.lower() in SUFFIXES]
    if path.suffix.lower() != ".txt":
        return [path]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not a readable list ({error})") from None
    names = [line.strip() for line in lines if line.strip()]
    found = []
    for name in names:
        beside = path.parent / name
        found.append(beside if beside.exists() else Path(os.path.abspath(name)))
    return found


def files_below(folder):
    """Yields the files below a folder, through links too, each folder once. Raises Refusal."""

    def stop(error):
        """A folder that cannot be read would be left out in silence."""
        raise Refusal(f"{error.filename}: not readable ({error.strerror})")

    seen = set()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def with_masks(items, folder):
    """Returns Items with their masks, FOLDER/KEY.png. Raises Refusal."""
    found = [Item(item.key, item.image, folder / f"{item.key}.png") for item in items]
    absent = [item.label for item in found if not item.label.is_file()]
    if absent:
        raise Refusal(f"{absent[0]}: no such mask ({len(absent)} of {len(found)} are absent)")
    return found


def find_part(source, options):
    """Returns (Items with their masks, Data) of --split of --dataset, or of a checkpoint's own.

    source: the checkpoint, opened. A folder that names no classes has the checkpoint's. Raises
    Refusal, also where val is not the published one, as --eval-only does.
    """
    args = source.args
    if options.dataset not in (None, args.dataset):  # what its flags say is of its own images
        own = {"data_root": options.data_root, "ignore_index": IGNORE, "labeled_list": ""}
        args = replace(args, dataset=options.dataset, split_seed=None, **own)
    tree = Tree(args.dataset, args.data_root, any_ids=bool(args.labeled_list))
    found = tree.part(options.split)
    if not found:
        raise Refusal(f"{tree.root}: no {options.split} of {args.dataset} there")
    if published(args) and options.split == "val":
        remedy = "IMAGES with --masks FOLDER score what is here"
        known_set(f"val of {args.dataset}", found, SPLITS[args.dataset]["parts"]["val"], remedy)
    items = tree.items(options.split, found)
    names = source.data.named()
    rows = tree.classes() or [ClassRow(*row) for row in names]
    data = Data(args, [], [], [], [], rows)
    if data.num_classes != len(names):
        wrong = f"{data.num_classes} classes, the checkpoint has {len(names)}"
        raise Refusal(f"--dataset {args.dataset}: {wrong}")
    check_classes(source.saved | {"classes": names}, data)
    return items, data


def ahead(function, items, depth=2):
    """Yields function(item) for all items in order, computed in a thread up to depth ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---- files out -------------------------------------------------------------------------------

FORMS = {  # kind of file, and folder -> its ending
    "classes": ".png",
    "overlays": ".jpg",
    "confidence": ".png",
    "entropy": ".png",
    "K": ".png",
    "compared": ".jpg",
}


def put(path, write):
    """Has write(another path) write a file, then renames it: whole or absent. Returns as write."""
    new = path.with_name(f".part-{os.getpid()}-{path.name}")
    with writing(path, new):
        path.parent.mkdir(parents=True, exist_ok=True)
        returned = write(new)
        os.replace(new, path)
    return returned


def put_text(path, text):
    """Writes a text file, whole or not at all; of a name that is no UTF-8 as \\udcff."""
    put(path, lambda new: new.write_bytes(text.encode("utf-8", "backslashreplace")))


def put_picture(path, picture):
    """Writes a PIL image in the format of its suffix, whole or not at all."""
    form = {".png": "PNG", ".jpg": "JPEG"}[path.suffix]
    put(path, lambda new: picture.save(new, format=form, quality=92, compress_level=3))


def write_csv(path, rows):
    """Writes rows as a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    put_text(path, text.getvalue())


def hold(folder):
    """Keeps other processes from an output folder until this one ends. Raises Refusal."""
    file, owner = lock(folder / "lock", print)
    if owner:
        raise Refusal(f"{folder}: {owner} predicts there: wait for its end, or another --out")
    HELD.append(file)


def claim(folder, facts):
    """Makes an output folder that of facts, a dict, and of this process until it ends.

    Raises Refusal if it is that of others.
    """
    path = folder / "predict.json"
    if path.exists():
        old = None
        with writing(path), contextlib.suppress(ValueError):
            old = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(old, dict):
            raise Refusal(f"{path}: damaged, what is there may be of any network: give a new --out")
        for name, value in facts.items():
            if old.get(name) != value:
                wrong = f"{name} {old.get(name)} there, {value} here"
                raise Refusal(f"{folder}: {wrong}; another --out starts anew")
        hold(folder)
        return
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"{folder}: a file: give a new --out")
    if folder.exists() and any(path.name != "lock" for path in folder.iterdir()):
        raise Refusal(f"{folder}: holds other files: give a new --out")
    hold(folder)
    put_text(path, json.dumps(facts, indent=1) + "\n")


def pixels_of(classes, size):
    """Returns how many pixels have each class, (size,) int64; classes: (H, W) uint8."""
    return torch.bincount(torch.from_numpy(classes).flatten(), minlength=size)


def stamp(path):
    """Returns [real path, bytes, time of the last change in ns] of a file; of none its name."""
    if path is None or not os.path.exists(path):
        return [str(path)]
    state = os.stat(path)
    return [os.path.realpath(path), state.st_size, state.st_mtime_ns]


def read_made(path):
    """Returns {key: [image, mask]} of a Writer's made.jsonl: of what the files of a name are.

    Of two lines on one name the last counts, and none that a kill cut off.
    """
    made = {}
    with writing(path), contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                key, image, mask = json.loads(line)
                made[key] = [image, mask]
    return made


class Result(NamedTuple):
    """What is kept of an image: pixels per class, (C,), and its confusions or None."""

    key: str
    counts: torch.Tensor
    confusion: torch.Tensor | None  # (C, C)
    boundaries: torch.Tensor | None = None  # (C + 1, C + 1), metrics.boundary_confusion


class Writer:
    """Writes an image's files, each whole or not at all."""

    def __init__(self, folder, kinds, data, masks=False, upright=False):
        """kinds: of FORMS, what is written; data: classes, palette, and how a mask is read.

        masks: images are read with theirs, and scored. upright: turned as their EXIF data say.
        """
        self.folder = Path(folder)
        self.kinds = kinds
        self.data = data
        self.masks = masks
        self.upright = upright
        self.made = read_made(self.folder / "made.jsonl")

    def place(self, kind, key):
        """Returns where a file of a kind is written."""
        return self.folder / kind / f"{key}{FORMS[kind]}"

    def done(self, key):
        """Returns whether all files of an image are there."""
        return all(self.place(kind, key).is_file() for kind in self.kinds)

    def own(self, item):
        """Makes the files of an image's name its own: those of another image or mask are removed.

        made.jsonl has the new ones before anything is made of them: a kill leaves no file that
        passes for another image's.
        """
        image = stamp(item.image)
        mask = [self.data.name, *stamp(item.label)]  # whose rules it is read by
        known = self.made.get(item.key, [None, None])
        others = []
        if known[0] != image:
            others = list(FORMS)
        elif item.label and known[1] != mask:
            others = ["compared"]
        if others:
            path = self.folder / "made.jsonl"
            with writing(path):
                for kind in others:
                    self.place(kind, item.key).unlink(missing_ok=True)
                with open(path, "a", encoding="utf-8") as file:  # the line before may be cut off
                    file.write(f"\n{json.dumps([item.key, image, mask])}")

    def read(self, item):
        """Returns (item, PIL image, mask or None), or the Refusal of an image that is not read.

        The image is None where its files are there.
        """
        self.own(item)
        try:
            done = self.done(item.key)
            if done and not self.masks:
                return item, None, None
            image, label = self.data.read(item, self.masks)
        except Refusal as error:
            return error
        if done:
            return item, None, label
        if self.upright:
            image = ImageOps.exif_transpose(image)
        return item, image, label

    def write(self, item, image, label, found):
        """Writes the files of an image, and returns its Result; found None: they are there."""
        if found is None:
            classes = np.array(read_mask(self.place("classes", item.key)))
        else:
            classes = found["classes"]
            self.write_maps(item.key, image, found)
        size = self.data.num_classes
        counts = pixels_of(classes, size)
        if label is None:
            return Result(item.key, counts, None)
        truth = np.asarray(label)
        if found is not None:
            self.write_compared(item.key, image, truth, classes)
        pred = torch.from_numpy(classes.astype(np.int64))
        confusion = metrics.confusion_matrix(pred, torch.from_numpy(truth.copy()), size)
        boundaries = metrics.boundary_confusion(classes, truth, size)
        return Result(item.key, counts, confusion, boundaries)

    def write_maps(self, key, image, found):
        """Writes classes, maps and overlay.

        With 256 colours: Pillow gives a palette of 16 or fewer 4 bits, which torchvision misreads.
        """
        palettes = {"classes": self.data.palette.tobytes(), "K": bytes(GREYS)}
        for kind, values in found.items():
            picture = Image.fromarray(values)
            if kind in palettes:
                picture.putpalette(palettes[kind].ljust(768, b"\0"))
            put_picture(self.place(kind, key), picture)
        if "overlays" in self.kinds:
            sheet = overlay(image, found["classes"], self.data.classes, self.data.palette)
            put_picture(self.place("overlays", key), sheet)

    def write_compared(self, key, image, truth, classes):
        """Writes image, truth, prediction and errors side by side."""
        row = {"image": np.asarray(image), "truth": truth, "prediction": classes}
        row["errors"] = error_map(classes, truth)
        put_picture(self.place("compared", key), pictures.panels([row], self.data.palette, 240))


# ---- pictures and pages ----------------------------------------------------------------------


def overlay(image, classes, names, palette):
    """Returns the picture of classes, (H, W) uint8, half seen through on a PIL image, and a legend.

    The legend has the classes that occur, the most frequent first, with their share in per cent. A
    picture less than 320 pixels wide is enlarged, one of more than JPEG_SIDE is made smaller.
    """
    height, width = classes.shape
    counts = pixels_of(classes, len(names)).tolist()
    present = [i for i in np.argsort(counts, kind="stable")[::-1] if counts[i]]
    blended = Image.blend(image, Image.fromarray(palette[classes]), 0.5)
    factor = min(-(-320 // width), JPEG_SIDE // height)
    if factor > 1:
        size = (factor * width, factor * height)
        blended = blended.resize(size, Image.Resampling.NEAREST)
    blended.thumbnail((JPEG_SIDE, JPEG_SIDE))
    words = [f"{names[i]} {100 * counts[i] / classes.size:.1f} %" for i in present]
    return pictures.with_legend(blended, words, palette[present])


def confusion_picture(confusion, names):
    """Returns a picture of (C, C) counts: a row is a true class, in per cent of its pixels."""
    font = ImageFont.load_default(14)
    margin = 24 + round(max(font.getlength(name) for name in names))
    cell = 44
    side = margin + cell * len(names) + 8
    sheet = Image.new("RGB", (side, side + 28), "white")
    pen = ImageDraw.Draw(sheet)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    for i, name in enumerate(names):
        middle = margin + cell * i + cell // 2
        pen.text((margin - 8, middle), name, "black", font, anchor="rm")
        upright = Image.new("RGB", (margin - 8, 20), "white")
        ImageDraw.Draw(upright).text((0, 10), name, "black", font, anchor="lm")
        sheet.paste(upright.rotate(90, expand=True), (middle - 10, 0))
        for j, share in enumerate(shares[i]):
            x = margin + cell * j
            y = margin + cell * i
            shade = round(255 * (1 - share))
            ink = "white" if share > 0.5 else "black"
            pen.rectangle(
                (x, y, x + cell - 2, y + cell - 2), (shade, shade, 255 - (255 - shade) // 3)
            )
            if share >= 0.0005:
                text = f"{100 * share:.1f}"
                pen.text((x + cell // 2 - 1, y + cell // 2 - 1), text, ink, font, anchor="mm")
    text = "rows: truth; columns: prediction; per cent of the true class's pixels"
    pen.text((8, side + 8), text, "black", font)
    return sheet


def error_map(classes, label):
    """Returns (H, W, 3) uint8: grey where classes are the label, red where not, white: none."""
    picture = np.where((classes == label)[..., None], RIGHT, WRONG).astype(np.uint8)
    picture[label == 255] = 255
    return picture


def score_page(title, names, palette, scores, images):
    """Returns a page of HTML that needs no other file than pictures beside it.

    scores: as write_scores has them. images: rows (key, mIoU, accuracy, place of its picture).
    """
    lines = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    lines.append(f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>")
    lines.append("<table><tr><th>class</th><th>IoU, %</th><th>Boundary IoU, %</th></tr>")
    both = zip(names, palette, scores["iou"], scores["boundary_iou"], strict=True)
    for name, colour, *values in both:
        texts = ["absent" if value is None else f"{100 * value:.2f}" for value in values]
        square = "<i style='background: rgb({}, {}, {})'></i>".format(*colour)
        cells = "".join(f"<td>{text}</td>" for text in texts)
        lines.append(f"<tr><td>{square}{html.escape(name)}</td>{cells}</tr>")
    means = f"<td><b>{100 * scores['miou']:.2f}</b></td>"
    means += f"<td><b>{100 * scores['boundary_miou']:.2f}</b></td>"
    lines.append(f"<tr><td><b>mean</b></td>{means}</tr>")
    for name, key in (("accuracy", "accuracy"), ("mIoU of a constant", "constant")):
        lines.append(f"<tr><td><b>{name}</b></td><td><b>{100 * scores[key]:.2f}</b></td></tr>")
    lines.append("</table><h2>Confusion</h2><img src='confusion.png' alt='confusion matrix'>")
    lines.append(f"<h2>{len(images)} images, the worst first</h2>")
    lines.append("<p>mIoU: mean over the classes of the image, in its truth or prediction.</p>")
    for key, miou, accuracy, place in images:
        words = f"{html.escape(key)}: mIoU {100 * miou:.2f} %, accuracy {100 * accuracy:.2f} %"
        picture = f"<img loading='lazy' src='{urllib.parse.quote(os.fsencode(place))}' alt=''>"
        lines.append(f"<figure><figcaption>{words}</figcaption>{picture}</figure>")
    return "\n".join(lines) + "\n"


# ---- tables, scores, archives, a card --------------------------------------------------------


def write_shares(folder, classes, results):
    """Writes shares.csv: an image a line, the share of each class in [0, 1]."""
    rows = [["image", *classes]]
    for key, counts, *_ in results:
        shares = counts.double() / counts.sum()
        rows.append([key, *(f"{share:.6f}" for share in shares.tolist())])
    write_csv(folder / "shares.csv", rows)


def write_scores(folder, title, data, results):
    """Writes scores.json, confusion.csv, confusion.png and index.html; returns the scores.

    Raises Refusal where no mask has a class.
    """
    confusion = torch.stack([result.confusion for result in results]).sum(0)
    data.require_pixels(confusion, "these images")
    scores = metrics.scores(confusion)
    boundaries = torch.stack([result.boundaries for result in results]).sum(0)
    of_boundaries = metrics.iou_per_class(boundaries)[:-1]
    scores["boundary_miou"] = float(of_boundaries.nanmean())
    scores["boundary_iou"] = [None if x != x else round(x, 6) for x in of_boundaries.tolist()]
    put_text(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
    rows = [["truth \\ prediction", *data.classes]]
    for name, counts in zip(data.classes, confusion.tolist(), strict=True):
        rows.append([name, *counts])
    write_csv(folder / "confusion.csv", rows)
    picture = confusion_picture(confusion.numpy(), data.classes)
    put_picture(folder / "confusion.png", picture)
    images = []
    for key, _, own, _ in results:
        if own.sum():  # an image without labels has no score
            found = metrics.scores(own)
            images.append((key, found["miou"], found["accuracy"], f"compared/{key}.jpg"))
    images.sort(key=lambda row: row[1:3])
    page = score_page(title, data.classes, data.palette, scores, images)
    put_text(folder / "index.html", page)
    return scores


def check_names(server, dataset, items):
    """Raises Refusal where a checkpoint's data set or an image cannot be one for this server."""
    if dataset.removesuffix("_aug") != server:
        raise Refusal(f"--export {server}: the checkpoint is one of {dataset}, with other classes")
    names = [archive_name(server, item.key) for item in items]
    for item, name in zip(items, names, strict=True):
        if not name:
            raise Refusal(f"--export {server}: {item.key}: no name of that data set")
    if len(set(names)) < len(names):
        raise Refusal(f"--export {server}: two images have one name")


def archive_name(server, key):
    """Returns the file name in an archive of an image, "" if its key is none of that data set."""
    name = Path(key).name.removesuffix("_leftImg8bit")
    return f"{name}.png" if re.fullmatch(FACTS[server]["key"], name) else ""


def write_archive(folder, server, results, palette):
    """Writes cityscapes.zip or voc.tgz from the classes; returns its path.

    Cityscapes: ids of labels, not of training, grey. VOC: classes with their palette, below
    results/VOC2012/Segmentation/comp6_test_cls.
    """
    table = np.arange(256, dtype=np.uint8)
    if server == "cityscapes":
        for label_id, train_id in enumerate(FACTS[server]["ids"]["_labelIds.png"]):
            if train_id != IGNORE:
                table[train_id] = label_id
    path = folder / {"cityscapes": "cityscapes.zip", "voc": "voc.tgz"}[server]

    def add_all(add):
        """Has add(name, content) take every image."""
        for key, *_ in results:
            picture = Image.fromarray(table[np.asarray(read_mask(folder / f"classes/{key}.png"))])
            if server == "voc":
                picture.putpalette(palette.tobytes())
            content = io.BytesIO()
            picture.save(content, "PNG")
            add(archive_name(server, key), content.getvalue())

    def write_zip(new):
        """As the server of Cityscapes takes it."""
        with zipfile.ZipFile(new, "w") as archive:
            add_all(archive.writestr)

    def write_tar(new):
        """As the server of VOC takes it."""

        def add(name, content):
            """Adds a file where the server looks for it."""
            member = tarfile.TarInfo(f"results/VOC2012/Segmentation/comp6_test_cls/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        with tarfile.open(new, "w:gz", compresslevel=1) as archive:
            add_all(add)

    put(path, write_zip if server == "cityscapes" else write_tar)
    return path


def model_card(source, name, said, scored):
    """Returns what one has to know of a network, as Markdown: what it is and how it was made.

    scored: the scores of the log are this network's.
    """
    saved = source.saved
    start, scores = history(saved)
    lines = [f"# {name}", "", f"Semantic segmentation, {source.data.num_classes} classes:"]
    lines[-1] += f" {', '.join(source.data.classes)}."
    lines.append(f"Network {source.name} of {saved['script']}, step {saved['step']}; {said}.")
    lines += ["Images: RGB in 0 to 255; normalization is inside.", "", "| | |", "|-|-|"]
    rows = {f"{part} images, set": value for part, value in start.get("lists", {}).items()}
    for on, found in scores.items() if scored else ():
        rows[on] = f"{100 * found['miou']:.2f} %"
    versions = start.get("versions", {})
    for key, value in (rows | versions | saved["args"]).items():
        if key not in NO_NUMBER and value not in ("", None):
            lines.append(f"| {key} | {value} |")
    return "\n".join(lines) + "\n"


def history(saved):
    """Returns (first line of the log beside a checkpoint, {what: scores at its step}), or none.

    A file of --safetensors may lie beside another run's log: of it none.
    """
    path = Path(saved["path"]).parent / "log.jsonl"
    lines = []
    if saved["path"].endswith(".safetensors"):
        return {}, {}
    with contextlib.suppress(OSError):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a kill may have cut the last one off
                lines.append(json.loads(text))
    scored = {}
    for line in lines:
        if line["kind"] == "eval" and line["step"] == saved["step"]:
            scored[f"mIoU on {line['on']}"] = line
        if line["kind"] == "done":
            which = {line["step"]: "last", line["best_step"]: "best"}.get(saved["step"])
            if which in line:
                scored[f"mIoU on {line['on']}"] = line[which]
    return next(iter(lines), {}), scored
