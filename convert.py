"""Masks of class ids out of other masks and of what annotation tools export, for --dataset folder.

Run by `python prepare_data.py convert`. Ids come from a table (classes.csv), by value, colour or
name, never from the numbers of an export: every tool counts in its own way.
"""

import base64
import contextlib
import functools
import io
import json
import math
import posixpath
import re
import shlex
import time
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from common import Refusal, printable
from common.data import (
    IGNORE,
    LARGEST,
    ClassRow,
    class_row,
    read_classes,
    read_colours,
    read_photograph,
    voc_colours,
)
from common.run import lock
from common.shapes import polygon
from common.sources import SUFFIXES, files_below, write

BACKGROUND = ("background", "__background__", "_background_")
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)


class Region(NamedTuple):
    """One annotated object: the name of its class, and draw() -> (H, W) bool."""

    name: str
    draw: functools.partial


class Picture(NamedTuple):
    """An annotated image: its name in the export, (W, H), Regions; later ones cover earlier."""

    name: str
    size: tuple
    regions: list


# ---- areas: a pixel belongs to what its centre lies in ----


def ellipse(center, radii, angle, height, width):
    """Returns (height, width) bool of an ellipse turned clockwise by angle, in degrees."""
    y, x = np.mgrid[:height, :width] + 0.5
    turn = math.radians(angle)
    x = x - center[0]
    y = y - center[1]
    along = (x * math.cos(turn) + y * math.sin(turn)) / max(radii[0], 1e-9)
    across = (y * math.cos(turn) - x * math.sin(turn)) / max(radii[1], 1e-9)
    return along**2 + across**2 <= 1


def box(left, top, right, bottom, angle=0.0, pivot=None):
    """Returns the corners of a box turned clockwise by angle, in degrees, about pivot (x, y)."""
    turn = math.radians(angle)
    x0, y0 = pivot or (0.0, 0.0)
    corners = []
    for x, y in ((left, top), (right, top), (right, bottom), (left, bottom)):
        turned_x = (x - x0) * math.cos(turn) - (y - y0) * math.sin(turn)
        turned_y = (x - x0) * math.sin(turn) + (y - y0) * math.cos(turn)
        corners.append((x0 + turned_x, y0 + turned_y))
    return corners


def union(rings, height, width):
    """Returns (height, width) bool: what lies in any of several polygons."""
    region = np.zeros((height, width), bool)
    for ring in rings:
        region = region | polygon([ring], height, width)
    return region


def pasted(patch, left, top, height, width):
    """Returns (height, width) bool with a smaller mask at its place, cut at the borders."""
    rows, columns = np.nonzero(patch)
    rows = rows + top
    columns = columns + left
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    region = np.zeros((height, width), bool)
    region[rows[inside], columns[inside]] = True
    return region


def run_lengths(counts, size):
    """Returns the bools, size of them, of run lengths, False first. Raises ValueError."""
    counts = np.asarray(counts, np.int64)
    if (counts < 0).any() or counts.sum() != size:
        raise ValueError(f"run lengths of {counts.sum()} pixels, not {size}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


# ---- COCO ----


def coco_counts(text):
    """Returns the run lengths of COCO's compressed string.

    Five bits a character, 48 added; bit 5: more follow; the last one's bit 4 is the sign. From the
    fourth number on each is the difference to the one two before.
    """
    counts = []
    value = 0
    shift = 0
    for code in text.encode():
        value += (code - 48 & 31) << shift
        shift += 5
        if code - 48 & 32:
            continue
        if code - 48 & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    return counts


def coco_region(segmentation, height, width):
    """Returns (height, width) bool of COCO's polygons or run lengths. Raises ValueError."""
    if isinstance(segmentation, dict):  # down the columns
        counts = segmentation["counts"]
        size = segmentation.get("size", [height, width])
        if size != [height, width]:
            raise ValueError(f"run lengths of {size}, of an image of {[height, width]}")
        if isinstance(counts, str):
            counts = coco_counts(counts)
        return run_lengths(counts, height * width).reshape(width, height).T
    rings = [np.reshape(ring, (-1, 2)) for ring in segmentation if len(ring) >= 6]
    return union(rings, height, width)


def coco(content, lost):
    """Returns the Pictures of COCO's instances; smaller objects cover larger ones.

    iscrowd says nothing: several tools set it for every mask. lost: Counter of what has no area.
    """
    names = {category["id"]: category["name"].strip() for category in content["categories"]}
    known = {image["id"] for image in content["images"]}
    groups = {}
    for annotation in sorted(content["annotations"], key=lambda a: (-coco_area(a), a["id"])):
        segmentation = annotation.get("segmentation")
        if not segmentation:
            lost["objects whose segmentation is empty"] += 1
            continue
        if isinstance(segmentation, list) and all(len(ring) < 6 for ring in segmentation):
            lost["objects that are points or lines"] += 1
            continue
        if annotation["image_id"] not in known:
            lost["objects of an image that is not listed"] += 1
            continue
        groups.setdefault(annotation["image_id"], []).append(annotation)
    pictures = []
    for image in content["images"]:
        size = (image["width"], image["height"])
        regions = []
        for annotation in groups.get(image["id"], []):
            draw = functools.partial(coco_region, annotation["segmentation"], size[1], size[0])
            regions.append(Region(names[annotation["category_id"]], draw))
        pictures.append(Picture(image["file_name"].replace("\\", "/"), size, regions))
    return pictures


def coco_area(annotation):
    """Returns the area that an annotation says it has, or that of its box."""
    width, height = annotation.get("bbox", (0, 0, 0, 0))[2:]
    return annotation.get("area") or width * height


# ---- LabelMe ----


def labelme(content, lost):
    """Returns the Picture of a LabelMe file, in a list; later shapes cover earlier ones."""
    size = (content["imageWidth"], content["imageHeight"])
    if None in size:
        raise ValueError("no imageWidth and imageHeight")
    regions = []
    for shape in content["shapes"]:
        draw = labelme_area(shape, size[1], size[0])
        if draw is None:
            lost[f"shapes of type {shape.get('shape_type')}, which have no area"] += 1
        else:
            regions.append(Region(shape["label"].strip(), draw))
    return [Picture(content["imagePath"].replace("\\", "/"), size, regions)]


def labelme_area(shape, height, width):
    """Returns draw() of a shape, or None where it has no area. Raises ValueError."""
    kind = shape.get("shape_type") or "polygon"
    points = [tuple(point) for point in shape["points"]]
    if kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
            patch = np.asarray(image) > 0
        left, top = (round(number) for number in points[0])
        return functools.partial(pasted, patch, left, top, height, width)
    if kind == "circle":  # its center and a point on it
        radius = math.dist(points[0], points[1])
        return functools.partial(ellipse, points[0], (radius, radius), 0.0, height, width)
    if kind == "rectangle" and len(points) == 2:
        points = box(*points[0], *points[1])
    if kind not in ("polygon", "rectangle", "oriented_rectangle") or len(points) < 3:
        return None
    return functools.partial(polygon, [points], height, width)


# ---- CVAT ----


def cvat(root, lost):
    """Returns the Pictures of "CVAT for images 1.1" (an ElementTree element).

    Shapes lie by z_order, then as in the file; later ones cover earlier ones.
    """
    if root.find("track") is not None:
        raise ValueError("tracks of a video: export it as CVAT for images")
    pictures = []
    for image in root.iter("image"):
        size = (int(image.get("width")), int(image.get("height")))
        regions = []
        for shape in sorted(image, key=lambda s: int(s.get("z_order", 0))):
            draw = cvat_area(shape, size[1], size[0])
            if draw is None:
                lost[f"shapes of type {shape.tag}, which have no area"] += 1
            else:
                regions.append(Region(shape.get("label").strip(), draw))
        pictures.append(Picture(image.get("name").replace("\\", "/"), size, regions))
    return pictures


def cvat_area(shape, height, width):
    """Returns draw() of an XML element, or None where it has no area. Raises ValueError."""
    angle = float(shape.get("rotation", 0))
    if shape.tag == "polygon":
        points = [tuple(map(float, pair.split(","))) for pair in shape.get("points").split(";")]
        return functools.partial(polygon, [points], height, width)
    if shape.tag == "box":
        left, top, right, bottom = (float(shape.get(k)) for k in ("xtl", "ytl", "xbr", "ybr"))
        pivot = ((left + right) / 2, (top + bottom) / 2)
        corners = box(left, top, right, bottom, angle, pivot)
        return functools.partial(polygon, [corners], height, width)
    if shape.tag == "ellipse":
        x, y, rx, ry = (float(shape.get(k)) for k in ("cx", "cy", "rx", "ry"))
        return functools.partial(ellipse, (x, y), (rx, ry), angle, height, width)
    if shape.tag == "mask":  # along the rows of its box
        left, top, w, h = (int(shape.get(k)) for k in ("left", "top", "width", "height"))
        counts = [int(count) for count in shape.get("rle").split(",")]
        patch = run_lengths(counts, w * h).reshape(h, w)
        return functools.partial(pasted, patch, left, top, height, width)
    return None


# ---- Label Studio ----


def label_studio(content, lost):
    """Returns the Pictures of Label Studio's own JSON (a list of tasks); later results cover."""
    pictures = []
    for task in content:
        done = [a for a in task.get("annotations", ()) if not a.get("was_cancelled")]
        if len(done) > 1:
            lost["further annotations of an image that has several"] += len(done) - 1
        regions = []
        size = None
        for result in done[0]["result"] if done else ():
            draw, label = studio_area(result)
            if draw is None:
                lost[f"results of type {result.get('type')}, or of a turned image"] += 1
                continue
            size = (result["original_width"], result["original_height"])
            regions.append(Region(label, draw))
        pictures.append(Picture(studio_name(task), size, regions))
    return pictures


def studio_name(task):
    """Returns the image's name of a task: of its address, without what an upload put before it."""
    for value in task["data"].values():
        if not isinstance(value, str):
            continue
        address = urllib.parse.urlsplit(value)
        place = urllib.parse.parse_qs(address.query).get("d", [address.path])[0]
        place = re.sub("^/?data/upload/[0-9]+/", "", urllib.parse.unquote(place))
        if place.lower().endswith(SUFFIXES):
            return re.sub(r"(^|/)[0-9a-f]{8}-(?=[^/]+$)", r"\1", place)
    raise ValueError(f"task {task.get('id')} names no image")


STUDIO_AREAS = "polygonlabels rectanglelabels ellipselabels brushlabels".split()


def studio_area(result):
    """Returns (draw(), label) of a result, (None, "") where it has no area or is turned."""
    kind = result.get("type", "")
    labels = result.get("value", {}).get(kind)
    if kind not in STUDIO_AREAS or not labels or result.get("image_rotation"):
        return None, ""
    value = result["value"]
    width = result["original_width"]
    height = result["original_height"]
    x_unit = width / 100  # lengths are in per cent
    y_unit = height / 100
    angle = value.get("rotation", 0)
    draw = None
    if kind == "polygonlabels":
        points = [(x * x_unit, y * y_unit) for x, y in value["points"]]
        draw = functools.partial(polygon, [points], height, width)
    elif kind == "rectanglelabels":  # turned about its first corner
        left = value["x"] * x_unit
        top = value["y"] * y_unit
        right = left + value["width"] * x_unit
        bottom = top + value["height"] * y_unit
        corners = box(left, top, right, bottom, angle, (left, top))
        draw = functools.partial(polygon, [corners], height, width)
    elif kind == "ellipselabels":
        center = (value["x"] * x_unit, value["y"] * y_unit)
        radii = (value["radiusX"] * x_unit, value["radiusY"] * y_unit)
        draw = functools.partial(ellipse, center, radii, angle, height, width)
    elif kind == "brushlabels" and value.get("format") == "rle":
        draw = functools.partial(brush, value["rle"], height, width)
    return draw, labels[0].strip() if draw else ""


def brush(data, height, width):
    """Returns (height, width) bool of Label Studio's brush, a list of bytes. Raises ValueError.

    Bits: 32 the number of values, 5 the bits of a value less 1, four times 4 the bits of a run's
    length less 1; then runs: 1 bit whether one value repeats, 2 bits which of the four, the length
    less 1, and the value or the values. Values are red, green, blue, alpha of each pixel.
    """
    bits = "".join(f"{byte:08b}" for byte in data)
    place = 0

    def take(count):
        """Returns the next bits as a number."""
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total = take(32)
    if total != 4 * height * width:
        raise ValueError(f"a brush of {total // 4} pixels, not {height * width}")
    depth = take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    values = np.zeros(total, np.int64)
    done = 0
    while done < total:
        repeated = take(1)
        end = done + take(lengths[take(2)]) + 1
        if repeated:
            values[done:end] = take(depth)
        else:
            values[done:end] = [take(depth) for _ in range(end - done)]
        done = end
    return values.reshape(height, width, 4)[..., 3] > 0


# ---- which export it is ----


def pictures_of(source, lost):
    """Returns the Pictures of an export: a .json or .xml file, or a folder of LabelMe's.

    lost: Counter of what could not be taken. Raises Refusal, naming the file.
    """
    source = Path(source)
    pictures = []
    files = [source]
    if source.is_dir():
        files = sorted(source.rglob("*.json"))
    hint = "; a folder with .json files is read as LabelMe's: move others out" * source.is_dir()
    for path in files:
        try:
            if path.suffix.lower() == ".xml":
                pictures += cvat(ElementTree.parse(path).getroot(), lost)
            elif source.is_dir():  # its image lies where it names one from its own folder
                (picture,) = labelme(json.loads(path.read_bytes()), lost)
                folder = path.parent.relative_to(source).as_posix()
                place = posixpath.normpath(posixpath.join(folder, picture.name))
                pictures.append(picture._replace(name=place))
            else:
                pictures += of_json(json.loads(path.read_bytes()), lost)
        except OSError as error:
            raise Refusal(f"{path}: {error.strerror or error}") from None
        except MALFORMED as error:
            why = f"not as its tool writes it ({type(error).__name__}: {error})"
            raise Refusal(f"{path}: {why}{hint}") from None
        except ElementTree.ParseError as error:
            raise Refusal(f"{path}: not readable as XML ({error})") from None
    if not pictures:
        raise Refusal(f"{source}: no annotated image in it")
    return pictures


def of_json(content, lost):
    """Returns the Pictures of a JSON file's content, by its form.

    Raises ValueError, or another of MALFORMED.
    """
    if "shapes" in content:
        return labelme(content, lost)
    if isinstance(content, list):
        return label_studio(content, lost)
    if "annotations" in content and "images" in content:
        return coco(content, lost)
    raise ValueError("neither COCO's, nor LabelMe's, nor Label Studio's")


# ---- tables ----


def read_table(path):
    """Returns ClassRows of classes.csv, or of a .txt of other tools, in its order.

    "r g b name" (label_colors.txt) or "name:r,g,b:..." (labelmap.txt). Raises Refusal.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return read_classes(path)
    entries = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not a readable table ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        first = re.fullmatch(r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(.+?)\s*", line)
        second = re.fullmatch(r"\s*(?P<name>[^:]+):(\d+),(\d+),(\d+)(:.*)?", line)
        if not first and not second:
            raise Refusal(f"{path}:{number}: neither r g b name nor name:r,g,b, with a colour")
        if first:
            *colour, name = first.groups()
        else:
            name, *colour = second.groups()[:4]
        entry = {"id": len(entries), "name": name, **dict(zip("rgb", colour, strict=True))}
        entries.append((entry, f"{path}:{number}"))
    check_count(len(entries), path)
    return [class_row(*entry) for entry in entries]


def check_count(count, source):
    """Raises Refusal where there are more classes than ids."""
    if count > LARGEST + 1:
        raise Refusal(
            f"{source}: {count} classes, and ids run from 0 to {LARGEST}: give several classes one "
            "id, in a classes.csv for --classes"
        )


def table_text(rows):
    """Returns ClassRows as the text of a classes.csv."""
    valued = any(row.value is not None for row in rows)
    lines = ["id,name,r,g,b" + ",value" * valued]
    for row in rows:
        name = row.name
        if re.search(r'[",\r\n]', name):
            name = '"' + name.replace('"', '""') + '"'
        fields = [row.id, name, *row.colour]
        if valued:
            fields.append("" if row.value is None else row.value)
        lines.append(",".join(map(str, fields)))
    return "\n".join(lines) + "\n"


def table_of_names(names, source):
    """Returns ClassRows: background, then the names by the alphabet, in VOC's colours.

    Raises Refusal, naming the source, where they are too many.
    """
    things = {name for name in names if name.casefold() not in BACKGROUND}
    names = ["background", *sorted(things)]
    check_count(len(names), source)
    colours = voc_colours(len(names)).tolist()
    return [ClassRow(i, names[i], tuple(colours[i])) for i in range(len(names))]


# ---- masks ----


def codes_of(path):
    """Returns (whether by colour, (H, W) int64) of a mask: its values, or its colours as r g b.

    Palettes are colours: every file may have its own. Raises Refusal.
    """
    image = read_colours(path)
    if image.mode == "P":
        indices = len(np.unique(np.asarray(image)))
        image = image.convert("RGB")
        codes = np.asarray(image).astype(np.int64) @ (65536, 256, 1)
        if len(np.unique(codes)) < indices:
            raise Refusal(f"{path}: its palette gives several indices one colour")
        return True, codes
    if image.mode in ("LA", "La"):
        image = image.convert("L")
    if image.mode in ("RGB", "RGBA", "RGBX", "CMYK"):
        return True, np.asarray(image.convert("RGB")).astype(np.int64) @ (65536, 256, 1)
    values = np.asarray(image)
    if values.dtype.kind == "f" and not ((values == np.rint(values)) & (abs(values) < 2**53)).all():
        raise Refusal(f"{path}: values that are no whole numbers: round them first")
    return False, values.astype(np.int64)


def named_code(by_colour, code):
    """Returns a value or a colour as a text."""
    return f"#{code:06x}" if by_colour else f"value {code}"


def table_of_codes(files):
    """Returns ClassRows of the values or colours that masks have, in order. Raises Refusal.

    Where some masks are grey and some coloured a value is the colour of that grey.
    """
    values = set()
    colours = set()
    for path in files:
        by_colour, codes = codes_of(path)
        (colours if by_colour else values).update(np.unique(codes).tolist())
        if len(colours | {65793 * value for value in values}) > LARGEST + 1:
            why = f"more than {LARGEST + 1} values or colours so far: no masks of classes"
            raise Refusal(f"{path}: {why}, or once saved as JPEG; give a table with --classes")
    grey = {65793 * value: value for value in values}
    codes = sorted(colours | set(grey))
    spread = voc_colours(len(codes)).tolist()
    rows = []
    for number, code in enumerate(codes):
        if colours:
            name = named_code(True, code)
            colour = (code >> 16, code >> 8 & 255, code & 255)
        else:
            name = named_code(False, grey[code])
            colour = spread[number]
        rows.append(ClassRow(number, name, tuple(colour), grey.get(code)))
    return rows


def ids_by(rows, key, named, path):
    """Returns {key(row): its id}. Raises Refusal, naming path, where two rows give it two ids.

    named: key -> text.
    """
    ids = {}
    for row in rows:
        first = ids.setdefault(key(row), row.id)
        if first != row.id:
            why = f"the table gives {named(key(row))} two ids, {first} and {row.id}"
            raise Refusal(f"{path}: {why}")
    return ids


def ids_of_mask(path, rows):
    """Returns the (H, W) uint8 ids of a mask by a table. Raises Refusal for what has no row.

    Colours by exact equality; values by the column value or, where no row has one, by id.
    """
    by_colour, codes = codes_of(path)
    valued = [row for row in rows if row.value is not None]
    named = functools.partial(named_code, by_colour)
    if by_colour:
        ids = ids_by(rows, lambda row: int(np.dot(row.colour, (65536, 256, 1))), named, path)
    elif valued:
        ids = ids_by(valued, lambda row: row.value, named, path)
    else:
        ids = {row.id: row.id for row in rows}
    values, places = np.unique(codes, return_inverse=True)
    strange = [code for code in values.tolist() if code not in ids]
    if strange:
        y, x = np.argwhere(codes == strange[0])[0]
        why = f"{named(strange[0])} at row {y}, column {x} has no row in the table"
        raise Refusal(f"{path}: {why}; id {IGNORE} there is ignored")
    table = np.array([ids[code] for code in values.tolist()], np.uint8)
    return table[places].reshape(codes.shape)


def ids_of_picture(picture, rows):
    """Returns the (H, W) uint8 ids of a Picture by a table, whose names its Regions have.

    Where no region lies has the id of background_of. Raises ValueError.
    """
    ids = {row.name: row.id for row in rows}
    bare = background_of(rows)
    label = np.full(picture.size[::-1], bare, np.uint8)
    for region in picture.regions:
        label[region.draw()] = ids.get(region.name, bare)
    return label


def background_of(rows):
    """Returns the id of the row that is named background, or 255: what is not drawn is ignored."""
    return next((row.id for row in rows if row.name.casefold() in BACKGROUND), IGNORE)


def check_names(names, rows, source):
    """Raises Refusal, naming the source, for a name of a Region without a row, or with two ids."""
    ids = ids_by(rows, lambda row: row.name, repr, source)
    for name in names:
        if name not in ids and name.casefold() not in BACKGROUND:
            raise Refusal(f"{source}: the table has no row named {name!r}; id {IGNORE} is ignored")


# ---- names of files ----


def mask_files(folder, strip):
    """Returns {name without suffix and without strip: file} of the masks below a folder."""
    found = {}
    for path in files_below(folder):
        if path.suffix.lower() not in (*SUFFIXES, ".gif", ".pgm", ".pbm", ".ppm", ".tga"):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.endswith(strip):
            continue
        name = name.removesuffix(strip)
        if name in found:
            raise Refusal(f"{path}: {found[name]} has the same name")
        found[name] = path
    if not found:
        what = f"no masks ending in {strip}" if strip else "no masks and no .json of LabelMe"
        raise Refusal(f"{folder}: {what} in it")
    return found


def key_of(name, known, others=()):
    """Returns the key of an image among known, None if none is its own; known may be empty.

    The longest end of its path that is a key, else, of a name without a folder, the only key with
    this last part. others: other parts' keys, with the part before them and without: an end of
    theirs is not known's.
    """
    # without Windows' drive: with it a path is absolute
    parts = re.sub(r"[.][^./]+$", "", name.removeprefix(Path(name).drive)).strip("/").split("/")
    if not known:
        return "/".join(part for part in parts if part not in ("", ".", ".."))
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if end in known:
            return end
        if end in others:
            return None
    same = [key for key in (*known, *others) if key.rpartition("/")[2] == parts[-1]]
    if len(parts) == len(same) == 1 and same[0] in known:
        return same[0]
    return None


def photographs(folder):
    """Returns {key: file} of the photographs below a folder."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in files_below(folder)
        if path.suffix.lower() in SUFFIXES
    }


def masks_of_export(source, empty, known, others, given, lost):
    """Returns (rows, {key: draw() -> ids}) of an export, as Convert.masks has them.

    others: as key_of has them. empty: whether an image without a shape is background.
    """
    drawn = {}
    pictures = pictures_of(source, lost)
    names = [region.name for picture in pictures for region in picture.regions]
    rows = given or table_of_names(names, source)
    check_names(names, rows, source)
    strangers = []
    for picture in pictures:
        key = key_of(picture.name, known, others)
        if key in drawn:
            raise Refusal(f"{source}: {picture.name} and another image have the name {key}")
        if empty and picture.size is None and key in known:
            picture = picture._replace(size=read_photograph(known[key]).size)
        if key is None:
            strangers.append(picture.name)
        elif picture.size is None or not (picture.regions or empty):
            lost["images without a shape, which stay unlabelled without --empty"] += 1
        else:
            drawn[key] = functools.partial(ids_of_picture, picture, rows)
    if strangers:
        lost[f"images that are not among the photographs, {min(strangers)} first"] = len(strangers)
    return rows, drawn


def png(array, palette=None):
    """Returns an (H, W) uint8 array as the bytes of a PNG: palette indices, or grey without one."""
    picture = Image.fromarray(array)
    file = io.BytesIO()
    if palette:  # of 256 colours: with 16 or fewer Pillow cuts the indices to 4 bits
        picture.putpalette(np.array(palette, np.uint8).tobytes().ljust(768, b"\0"))
    picture.save(file, "PNG")
    return file.getvalue()


def clear_left(folder):
    """Removes what a killed `write` has left below a folder; a living one takes no minute."""
    for path in Path(folder).rglob(".*"):
        if not re.fullmatch("[.][0-9a-f]{32}", path.name):
            continue
        with contextlib.suppress(OSError):  # another call removes it too
            if time.time() - path.stat().st_mtime > 60:
                path.unlink()


# ---- the command ----

From = Annotated[str, tyro.conf.arg(name="from")]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Masks of class ids for --dataset folder, from other masks or an annotation tool's export."""

    source: From  # folder of masks or of LabelMe's .json; COCO or Label Studio .json; CVAT .xml
    out: str  # folder of the data set, to which masks/<part> and classes.csv are added
    part: Literal["train", "val", "test"] = "train"  # which images these are
    classes: str = ""  # classes.csv, label_colors.txt or labelmap.txt; left out: out's, else made
    strip: str = ""  # what a mask's name has at its end and its image's has not, such as _mask
    empty: bool = False  # an image without a shape is background; else it stays unlabelled

    def run(self):
        """Writes table and masks; counts what could not be taken. Raises Refusal.

        The table comes first: where a call is cut off, the next has the ids of the first. Half of a
        conversion in place would be read as masks to convert.
        """
        out = Path(self.out)
        images = out / "images" / self.part
        masks = out / "masks" / self.part
        source = Path(self.source).resolve()
        if not source.exists():
            raise Refusal(f"--from {self.source}: no such file or folder")
        written = masks.resolve()
        if source in (written, *written.parents) or written in source.parents:
            raise Refusal(f"--from {self.source} is, holds or is in {masks}: move it away first")
        if out.is_dir():
            held, owner = lock(out / ".lock", print)  # held: closed, it would be free
            if owner:
                raise Refusal(f"{out}: {owner} converts there: wait for its end")
        known = photographs(images)
        lost = Counter()
        given = self.table(out / "classes.csv")
        rows, drawn = self.masks(known, given, lost)
        said = [f"{count} {what}" for what, count in sorted(lost.items())]
        if not drawn or (known and not set(known) & set(drawn)):
            first = [min(names) for names in (known, drawn) if names]
            said += [f"names are such as {' and '.join(first)}, with sub-folders"] * bool(first)
            raise Refusal(
                f"--from {self.source}: no mask for any photograph of {images}: "
                + "; ".join([*said, "see --part, --strip (of masks), --empty (of an export)"])
            )
        if not (out / "classes.csv").exists():
            write(out / "classes.csv", table_text(rows).encode())
        clear_left(masks)
        for key, draw in tqdm(sorted(drawn.items()), "masks", unit="file", disable=None):
            try:
                label = draw()
            except MALFORMED as error:
                why = f"not as its tool has it ({type(error).__name__}: {error})"
                raise Refusal(f"{self.source}: {key}: {why}") from None
            write(masks / f"{key}.png", png(label))
        print("\n".join(printable(f"id {row.id}: {row.name}") for row in rows))
        for note in self.notes(rows, drawn, given):
            print(printable(f"note: {note}"))
        print(*(printable(f"lost: {line}\n") for line in said), sep="", end="")
        print(f"{masks}: {len(drawn)} masks")
        print(
            f"{out}/classes.csv: names, colours and ids (255: no class), to change and call again"
        )
        print(
            "next: python prepare_data.py check --dataset folder "
            f"--data-root {shlex.quote(self.out)}"
        )

    def notes(self, rows, drawn, given):
        """Yields what to look at: values, undrawn pixels and masks of earlier calls."""
        void = [row.id for row in rows if row.value == 255 and row.id != IGNORE]
        if void and len(rows) > 2 and not given:  # of two values it is the second class
            white = ", and where some masks have 1 bit, value 1 is its white: one id for both"
            rest = white * any(row.value == 1 for row in rows)
            yield f"value 255 is class {void[0]}: if it is no class, its id is to be 255{rest}"
        images = Path(self.out, "images").resolve()
        source = Path(self.source).resolve()
        if self.of_masks() and images in (source, *source.parents):
            yield "masks among the photographs are taken for images without labels: move them out"
        if not (self.of_masks() or any(row.name.casefold() in BACKGROUND for row in rows)):
            yield f"no class is named background: where nothing is drawn is {IGNORE}, ignored"
        earlier = sorted(set(photographs(Path(self.out, "masks", self.part))) - set(drawn))
        if earlier:
            yield f"{len(earlier)} masks of earlier calls, {earlier[0]} first, stay as they are"
        changed = Path(self.out, "classes.csv").stat().st_mtime
        for part in ("train", "val", "test"):
            masks = photographs(Path(self.out, "masks", part))
            old = sorted(key for key, file in masks.items() if file.stat().st_mtime < changed)
            if old:
                what = f"{len(old)} masks of {part}, {old[0]} first, are older than the table"
                yield f"{what}: convert them again if their ids have changed"

    def of_masks(self):
        """Returns whether the source is a folder of masks, and no export."""
        return Path(self.source).is_dir() and not any(Path(self.source).rglob("*.json"))

    def masks(self, known, given, lost):
        """Returns (rows, {key: draw() -> ids}) of a folder of masks or of an export.

        known: {key: photograph} of this part. given: ClassRows, or [] to make them. lost: Counter.
        Raises Refusal.
        """
        of_masks = self.of_masks()
        if (self.empty and of_masks) or (self.strip and not of_masks):
            why = "--strip is for a folder of masks alone, --empty for an export"
            raise Refusal(f"{self.source}: {why}")
        if of_masks:
            files = mask_files(Path(self.source), self.strip)
            rows = given or table_of_codes(files.values())
            masks = {key: functools.partial(ids_of_mask, file, rows) for key, file in files.items()}
            return rows, masks
        others = set()
        for part in {"train", "val", "test"} - {self.part}:
            for key in photographs(Path(self.out, "images", part)):
                others |= {key, f"{part}/{key}"}
        return masks_of_export(self.source, self.empty, known, others, given, lost)

    def table(self, path):
        """Returns the ClassRows to follow, [] if they are to be made; path: that of --out."""
        there = read_table(path) if path.exists() else []
        if not self.classes:
            return there
        rows = read_table(self.classes)
        if there and rows != there:
            raise Refusal(
                f"{path} is another table than --classes: move it away, or leave that out"
            )
        return rows
