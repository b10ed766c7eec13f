"""Images, masks and lists as users have them: read, cached, converted, and in a whole run."""

import base64
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path, PureWindowsPath
from unittest.mock import Mock
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest
import torch
from PIL import Image

import convert
import predict
import supervised
from common import outputs, shapes, sources
from common.data import FACTS, SPLITS, Data, Item, counts, read_mask, read_photograph, set_hash
from common.sources import choose, load, read_list
from convert import read_table
from prepare_data import orientation
from processes import snapshot
from recorder import assert_close
from supervised import Samples, Stream
from tiny import ROOT, draw_folder, draw_tree, own_folder, pixels, shrink, train
from trees import NAMES, command, entry, flags, folder, listed, own, picture, refusal

pytestmark = pytest.mark.usefixtures("empty_folder")

# ---- image files written byte by byte: what Pillow cannot write, or writes otherwise ----

IDS = np.arange(32, dtype=np.uint8).reshape(4, 8) % 4
RGB = np.repeat(IDS, 3, 1)
WIDE = RGB.astype(">u2").view(np.uint8)
GREY = Image.fromarray(IDS)
TURNED = Image.Exif()
TURNED[274] = 3


def png(bits, kind, rows, palette=b""):
    """A PNG of 8x4 pixels; kind 0 grey, 2 RGB, 3 palette, 4 grey and alpha."""
    head = struct.pack(">IIBBBBB", 8, 4, bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    text = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", head), (b"PLTE", palette), (b"IDAT", data), (b"IEND", b"")):
        if part or name == b"IEND":
            text += struct.pack(">I", len(part)) + name + part
            text += struct.pack(">I", zlib.crc32(name + part))
    return text


def packed(values, bits):
    return np.packbits(np.unpackbits(values[..., None], 2)[..., 8 - bits :].reshape(4, -1), 1)


def tiff(data, bands=1, bits=8, photo=1, kinds=(0,), more=()):
    """A TIFF of 8x4 pixels, of a page for each kind (tag 254: 1 an overview, 4 a mask)."""
    out = b"II*\0" + struct.pack("<I", 8 + len(data)) + bytes(data)
    tags = {256: 8, 257: 4, 259: 1, 262: photo, 273: 8, 277: bands, 278: 4, 279: len(data)}
    for left, kind in enumerate(kinds, 1 - len(kinds)):
        rows = [(tag, 3, 1, value) for tag, value in (tags | {254: kind, **dict(more)}).items()]
        end = len(out) + 2 + 12 * (len(rows) + 1) + 4
        rows.append((258, 3, bands, bits if bands == 1 else end))
        entries = [struct.pack("<HHII", *row) for row in sorted(rows)]
        out += struct.pack("<H", len(rows)) + b"".join(entries)
        out += struct.pack("<I", end + 2 * bands if left else 0) + struct.pack("<H", bits) * bands
    return out


def saved(image, kind, **more):
    image.save(file := io.BytesIO(), kind, **more)
    return file.getvalue()


def reader(**changes):
    return Data(flags(**changes), [], [], [], [])


@pytest.mark.smoke
def test_an_item_is_an_rgb_photograph_and_a_mask_of_its_size(monkeypatch):
    item = Item("k", Path("image.png"), picture(Path("mask.png"), "L", 0, (12, 9)))
    picture(item.image, "RGBA", (1, 2, 3, 0), (12, 9))
    image, _ = reader().read(item, True)
    assert image.mode == "RGB" and image.getpixel((4, 4)) == (1, 2, 3)
    picture(item.label, "L", 0, (11, 9))
    line = refusal(reader().read, item, True)
    assert line == "mask.png: 11x9 pixels, not 12x9 as its image image.png"
    item.label.unlink()
    assert refusal(reader().read, item, True) == "mask.png: no such file"
    assert reader().read(item, False)[1] is None  # who asks for no mask, opens none
    assert orientation(item.image) == orientation(item.label) == 1  # whatever cannot be read
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # the image has 108
    assert "not readable as an image" in refusal(reader().read, item, False)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 11, (90, 120), dtype=np.uint8))
FILES = [  # bytes; what is read of them, or words of the refusal; as a mask, then as a photograph
    (png(2, 3, packed(IDS, 2), bytes(range(12))), IDS, None),
    (tiff(IDS.tobytes(), kinds=(0, 1, 4)), IDS, IDS),
    (tiff(IDS.tobytes(), kinds=(0, 0, 1)), "2 pages or frames", "2 pages or frames"),
    (saved(GREY, "GIF"), IDS, IDS),
    (saved(Image.fromarray(IDS * 5), "GIF"), "GIF, whose writers number", IDS * 5),
    (saved(GREY, "TIFF", compression="tiff_lzw"), IDS, IDS),
    (png(2, 0, packed(IDS, 2)), "2 or 4 bits, which PIL rescales", IDS * 85),
    (tiff(IDS.tobytes(), photo=0), "white is stored as 0", 255 - IDS),
    (b"P4 8 4\n" + packed(IDS % 2, 1).tobytes(), "white is stored as 0", 255 - IDS % 2 * 255),
    (b"P5 8 4 3\n" + IDS.tobytes(), "another maximum than 255", IDS * 85),
    (saved(GREY, "JPEG"), "JPEG, which blurs ids", None),
    (saved(GREY, "PCX"), "PCX (pcx L), not known to keep ids", IDS),
    (png(16, 0, IDS.astype(">u2").view(np.uint8)), "not one 8-bit channel", "not 8 bits"),
    (saved(GREY, "PNG", exif=TURNED), "EXIF orientation 3", IDS),
    (png(8, 2, RGB), "mode RGB, not one 8-bit channel", IDS),
    (png(16, 2, WIDE), "mode RGB", "not 8 bits a channel"),
    (tiff(WIDE.tobytes(), 3, 16, 2), "mode RGB", "not 8 bits a channel"),
    *((tiff(bytes(128), 4, photo=2, more={338: n}), "mode RGB", "of 4 bands") for n in (0, 2)),
    (tiff(bytes(160), 5, photo=2), "bands, bits or a compression", "bands, bits or"),
    (b"", "fetch it again", "fetch it again"),
    (saved(NOISE, "PNG")[:4000], "not readable as an image", "not readable as an image"),
    (saved(NOISE, "JPEG")[:-200], None, "not readable as an image"),
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("data, mask, photograph", FILES)
def test_a_file_is_read_as_stored_or_refused_with_the_cause(data, mask, photograph):
    path = Path("text.png")
    path.write_bytes(data)
    for read, found in ((read_mask, mask), (read_photograph, photograph)):
        if isinstance(found, str):
            line = refusal(read, path)
            assert line.startswith(f"{path}: ") and found in line
        elif found is not None:
            assert (np.asarray(read(path)).reshape(4, 8, -1) == found[..., None]).all()


@pytest.mark.smoke
def test_a_fill_has_the_pixels_whose_centres_it_holds_and_pictures_are_the_same_everywhere():
    square = [(2.5, 2.5), (6.5, 2.5), (6.5, 6.5), (2.5, 6.5)]
    edge = [(0, 0), (9, 0), (9, 9), (0, 9)]
    assert shapes.polygon([edge, square], 9, 9).sum() == 81 - 16  # a hole
    for x, y in np.random.default_rng(0).uniform(0, 9, (9, 2)):  # four triangles tile the square
        parts = [[edge[i], edge[i - 1], (x, y)] for i in range(4)]
        assert (sum(shapes.polygon([part], 9, 9).astype(int) for part in parts) == 1).all()
    digest = hashlib.sha1()
    for key in (key for part in shapes.COUNTS for key in shapes.keys(part)[::-16]):
        for drawn in shapes.draw(key):
            digest.update(drawn.tobytes())
    assert digest.hexdigest() == "c384db40666745f9defe5b493fe9d2869d921dbf"


# Cityscapes' ids in the order of their train ids; every other id is ignored
LABEL_IDS = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
TRAIN_IDS = {v: LABEL_IDS.index(v) if v in LABEL_IDS else 255 for v in (*range(34), 255)}
TABLES = [  # data set, flags, the name of a mask, {a value of it: its class or 255}
    ("camvid", {}, "k.png", {v: v for v in range(11)} | {11: 255, 255: 255}),
    ("cityscapes", {}, "k_labelTrainIds.png", {v: v for v in range(19)} | {255: 255}),
    ("cityscapes", {}, "k_gtFine_labelIds.png", TRAIN_IDS),
    ("ade20k", {}, "k.png", {0: 255} | {v: v - 1 for v in range(1, 151)}),  # 255: another's masks
    ("folder", dict(num_classes=254), "k.png", {v: v for v in range(254)} | {255: 255}),
    ("folder", dict(num_classes=3, ignore_index=3), "k.png", {0: 0, 1: 1, 2: 2, 3: 255}),
]


@pytest.mark.smoke
@pytest.mark.parametrize("name, changes, end, classes", TABLES)
def test_a_value_becomes_its_class_or_is_refused(name, changes, end, classes):
    data = reader(dataset=name, **changes)
    item = Item("k", picture(Path("image.png"), "RGB", 0, (16, 16)), Path(end))
    known = np.resize(np.array(list(classes), np.uint8), (16, 16))
    Image.fromarray(known).save(item.label)
    label = np.asarray(data.read(item, True)[1])
    assert label.ravel().tolist() == [classes[value] for value in known.ravel().tolist()]
    named = [value for value, c in classes.items() if c != 255]
    ignored = max(value for value, c in classes.items() if c == 255)
    strangers = sorted({*range(256)} - set(classes))
    for stranger in (*strangers[:2], *strangers[-2:]):
        known[5, 7] = known[9, 1] = stranger
        Image.fromarray(known).save(item.label)
        line = refusal(data.read, item, True)
        assert f"{end}: value {stranger} at row 5, column 7; " in line
        ends = f"classes are {min(named)} to {max(named)}, and {ignored} is ignored"
        assert f"{ends}; if its ids are others, python prepare_data.py convert" in line


A, B = NAMES[:2]
P, M = f"train/{A}.png", f"trainannot/{A}.png"
CLIMBS = ("a/../b.png", f"{B}\t../b.png", f"{B} /../b.png")
LISTS = [  # data set, a list; its keys and the columns of the first, or what the line says of it
    ("camvid", f"\ufeff{P} {M}\rtrain/{B}.png trainannot/{B}.png\r\n", ([A, B], P, M)),
    ("camvid", f"\n\n  {B}  \n   \n\t\n\t{A}\n\n", ([B, A], B, None)),  # in its order
    ("camvid", f"{P}\tNone\ntrain/{B}.png\t\n", ([A, B], P, None)),
    ("camvid", "train/a..b.png x/..c.png", (["a..b"], "train/a..b.png", "x/..c.png")),
    ("voc", "/J/2007_000032.jpg /x/7_9.png", (["2007_000032"], "J/2007_000032.jpg", "x/7_9.png")),
    ("camvid", "\n \n\r\n", ": an empty list"),
    ("camvid", f"{A}\n{B}\n\nx/{A}.png y/{A}.png\n", f":4: twice: x/{A}.png"),
    ("camvid", "\nwhat/is/this/\n", ":2: no image key: what/is/this/"),
    ("camvid", f"{A}\n{B}\t\ta\n", f":2: more than two columns: {B}\t\ta"),
    *(("camvid", f"{A}\n{line}\n", ":2: a path with ..: ") for line in CLIMBS),
    ("camvid", "a\0b.png", ":1: a NUL: "),
    ("camvid", "a.jpg,b.png", ":1: columns with , between"),
    ("camvid", "a.png;b.png", ":1: columns with ; between"),
    ("voc", "2007_000032; 2008_000008", ":1: columns with ; between"),
    ("cityscapes", "a_000078_000019|b_000000_000019", ":1: columns with | between"),
    ("camvid", "a".encode("utf-16"), ": not a readable list (UTF-16)"),
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("name, text, expected", LISTS)
def test_a_list_is_read_in_every_form_or_refused_by_its_line(name, text, expected):
    path, pattern = Path("list.txt"), FACTS[name]["key"]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, str):
        assert refusal(read_list, path, pattern).startswith(f"{path}{expected}")
        return
    keys, image, mask = expected
    rows = read_list(path, pattern)
    assert list(rows) == keys and rows[keys[0]] == (image, mask)


@pytest.mark.smoke
@pytest.mark.parametrize("seed", [None, 0, 7])
def test_a_split_is_every_rth_key_or_the_first_of_a_permutation(seed):
    ordered = [f"k{i:04d}" for i in range(367)]
    keys = np.random.default_rng(1).permutation(ordered).tolist()
    for r in (2, 4, 8, 16):
        labeled, unlabeled = choose(keys, f"1/{r}", seed)
        # as the seeds of the runs in results/ drew; nested in r
        drawn = np.random.default_rng(seed).permutation(ordered)[: math.ceil(367 / r)]
        assert labeled == (ordered[::r] if seed is None else sorted(drawn.tolist()))
        assert unlabeled == [k for k in ordered if k not in labeled]
    assert choose(keys, "all", seed) == (ordered, ordered)
    assert "--split-seed -1" in refusal(choose, keys, "1/8", -1)
    for split in ("1/1", "1/6", "2/4", "1/-2", "1/2.0", "", "183"):
        line = f"--split {split}: all, or 1/r with r from 2 to 5"
        assert refusal(choose, NAMES, split, None) == line


COUNTS = {  # labelled and unlabelled images of the papers' splits, and of r of any number
    "voc": {"1464": (1464, 9118), "all": (10582, 10582), "1465": (0, 0)},
    "voc_aug": {"1/2": (5291, 5291), "1/16": (662, 9920), "10582": (0, 0)},
    "cityscapes": {"1/3": (992, 1983), "list": (0, 0), "1/0": (0, 0)},
    "coco": {"1/512": (232, 118055), "all": (118287, 118287)},
    "ade20k": {"1/16": (1263, 18947), "all": (20210, 20210)},
    "folder": {"1/2": (0, 0), "all": (0, 0)},
}


def test_counts_are_those_of_the_papers_and_the_published_sets_those_of_the_projects_lists():
    for name, rows in COUNTS.items():
        assert {split: counts(name, split) for split in rows} == rows
    found = []
    for name, family, split in ((d, f, s) for d in SPLITS for f in SPLITS[d] for s in SPLITS[d][f]):
        one = SPLITS[name][family][split]
        found.append(f"{name} {family} {split} {one['images']} {one.get('set', '')}".strip())
        if family != "parts" and (family[:3], split) != ("cac", "1/4"):  # CAC's: one fewer
            assert counts(name, split)[0] == one["images"]
    # read from the lists of each project
    assert (len(found), entry(found)["set"]) == (73, "fee55d3b")
    assert set_hash(["c9", "a", "c10", "b"]) == entry(["a", "b", "c10", "c9"])["set"]


MAKE = "cache --dataset camvid --data-root 'my tree' --out cache"


def read_all(data):
    """Returns the arrays of all images and masks that a run may read."""
    items = data.labeled + data.unlabeled + data.val + data.test
    pairs = [data.read(item, item.label is not None) for item in items]
    return [np.asarray(picture) for pair in pairs for picture in pair if picture is not None]


def test_what_is_read_and_its_samples_are_the_same_bit_for_bit_whatever_is_cached():
    tree = draw_tree(Path("my tree"))
    files = load(flags(tree, split="1/4"))
    args = flags(tree, split="1/4", cache="cache")
    stream = Stream(files.labeled, 4, True, (0.5, 2.0))
    expected = Samples("labeled", stream, files, args)[3]
    for gb, number in ((1, 2 * (8 + 2 + 2)), (36 * 48 * (3 + 1 + 3) / 1e9, 3)):
        command(MAKE, "--max-gb", gb)
        data = load(args)
        assert len(data.cache.files) == number
        copies = [data, pickle.loads(pickle.dumps(data))]  # as for a loader that is not forked
        shutil.rmtree("cache")
        copies.append(pickle.loads(pickle.dumps(data)))
        assert copies[1].cache.files and copies[2].cache is None
        for copy in copies:
            assert all(map(np.array_equal, read_all(files), read_all(copy)))
            assert_close(Samples("labeled", stream, copy, args)[3], expected, 0)


WRONG = [  # a file, what becomes of its bytes, words of the refusal
    ("cache/pixels.bin", lambda data: bytes([data[0] ^ 1]) + data[1:], "damaged; delete it"),
    ("cache/pixels.bin", lambda data: data[:99], "99 of"),
    ("cache/pixels.bin", lambda data: b"", "not a whole cache"),
    ("cache/index.json", lambda data: data.replace(b'"pil": "', b'"pil": "0'), "may differ"),
    ("my tree/val/val0.jpg", lambda data: data + b"0", "my tree/val/val0.jpg has changed"),
]


@pytest.mark.parametrize("name, change, words", WRONG)
def test_a_cache_that_is_not_right_is_refused_with_its_remedy(name, change, words):
    tree = draw_tree(Path("my tree"))
    command(MAKE)
    for path in tree.rglob("*.*"):
        os.utime(path, (0, 0))  # copied since: other times, the same content
    args = flags(tree, cache="cache")
    read_all(load(args))
    Path(name).write_bytes(change(Path(name).read_bytes()))
    line = refusal(lambda: read_all(load(args)))
    shutil.rmtree("cache")
    assert words in line and "no cache there" in refusal(load, args)
    command(re.search("prepare_data.py (.*) makes", line)[1])
    read_all(load(args))


def test_making_one_leaves_nothing_behind_where_it_cannot(monkeypatch):
    tree = draw_tree(Path("my tree"))
    command(MAKE)
    assert "no file of this run" in refusal(load, own(folder(Path("other")), cache="cache"))
    assert "exists" in refusal(command, MAKE)
    again = MAKE.replace("--out cache", "--out again")
    assert "not even the first" in refusal(command, again, "--max-gb", 1e-6)
    Path("again.partial").mkdir()
    assert "again.partial exists: a call makes it now" in refusal(command, again)
    Path("again.partial").rmdir()
    with monkeypatch.context() as stopped:  # Ctrl-C
        stopped.setattr("common.cache.decoded", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command(again)
    (tree / "testannot/test1.png").write_bytes(b"no image")
    assert "test1.png: not readable" in refusal(command, again)
    assert sorted(os.listdir()) == ["cache", "my tree", "other"]


# ---- masks of ids out of values, colours and exports ----


def test_what_nothing_reads_is_named(capsys):
    images = folder(Path("own"), ["a", "deep/b", "c"]) / "images"
    for path in (*images.glob("val/*"), *images.glob("test/*")):
        Image.open(path).save(path, exif=TURNED)
    strays = [images / "train/x.heic", Path("own/masks/train/a.PNG"), Path("own/masks/val/v.png")]
    for path in strays:
        os.symlink("nowhere", path)
    strays.insert(1, images / "train/link")
    os.symlink(".", strays[1])
    command(check := "check --dataset folder --num-classes 4 --data-root own")
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("note")]
    for path, line in zip(strays, lines, strict=True):
        assert str(path.parent) in line and line.endswith(f": 1, {path.name} first")
    assert "warning: 3 images have an EXIF orientation" in told.out
    assert "warning: 3 of 3 images are smaller than a crop of" in told.out
    for path in images.glob("val/*"):
        path.rename(path.with_suffix(".heic"))
    assert "no photograph by its suffix: " in refusal(command, check)
    Path("own/label_colors.txt").touch()
    assert "datumaro or CVAT" in refusal(load, own("own", dataset="cityscapes", num_classes=0))


def test_paths_of_windows(monkeypatch):
    """Backslashes in a list, also of absolute paths; a drive would lead an export's mask away."""
    monkeypatch.setattr(convert, "Path", PureWindowsPath)
    assert convert.key_of("C:/photos/a.png", {}) == "photos/a"
    monkeypatch.setattr(sources.os.path, "isabs", lambda path: path.startswith("C:"))
    monkeypatch.setattr(sources.os.path, "abspath", lambda path: "C:\\my")
    (path := Path("list.txt")).write_text("images\\train\\a.png\nC:\\my\\images\\train\\b.png")
    assert list(read_list(path, FACTS["folder"]["key"], "my")) == ["a", "b"]


def test_colours_that_were_numbered_anew_are_named(capsys):
    masks = folder(Path("own")) / "masks/train"
    for name, number, greys in (("b", 1, (0, 50, 90)), ("c", 2, (0, 50, 90)), ("d", 1, (0, 90))):
        mask = Image.new("P", Image.open(masks / f"{name}.png").size, number)
        mask.putpalette(np.repeat(np.uint8(greys), 3).tobytes())
        mask.save(masks / f"{name}.png")
        command("check --dataset folder --num-classes 4 --data-root own")
        told = f"(50, 50, 50) in that of {masks}/b.png, (90, 90, 90) in that of {masks}/d.png"
        assert (told in capsys.readouterr().out) == (name == "d")


def test_the_table_of_a_folder_is_its_names_colours_and_number_of_classes():
    root = folder(Path("own"))
    rows = ["id, name, r, g, b", '0, "tree, old",4,5,6', "1,b,1,2,3", "2,c,0,0,0", "3,d,0,0,9"]
    listed(root / "classes.csv", *rows, "255,void,9,9,9", "3,also d,8,8,8")
    data = load(own(root, num_classes=0))
    assert data.classes == ["tree, old", "b", "c", "d"] and data.palette[0].tolist() == [4, 5, 6]
    assert "has 4; leave it out" in refusal(load, own(root, num_classes=5))
    for text in ("4 5 6 a b\n1 2 3 c", "# label:color_rgb:parts:actions\na b:4,5,6::\nc:1,2,3::"):
        rows_of_tool = read_table(listed(root / "labelmap.txt", text))
        assert [row[:3] for row in rows_of_tool] == [(0, "a b", (4, 5, 6)), (1, "c", (1, 2, 3))]
    for row, words in (("4,e,0,0", ":6: "), ("6,e,0,0,0", "id 4"), ("4,e,0,0,300", "(0, 0, 300)")):
        listed(root / "classes.csv", *rows, row)
        assert words in refusal(load, own(root, num_classes=0))
    listed(root / "classes.csv", "id,name")
    assert ":1: no column b, g, r" in refusal(load, own(root, num_classes=0))
    (root / "classes.csv").write_bytes(b"\xff")
    assert "not a readable table" in refusal(load, own(root, num_classes=0))


KINDS = [  # masks to convert; their ids, or words of the refusal
    (saved(Image.fromarray(IDS % 2 * 255), "PNG"), IDS % 2),
    (png(16, 0, (IDS * 1000.0).astype(">u2").view(np.uint8)), IDS),
    (png(2, 3, packed(IDS, 2), bytes(range(12))), IDS),  # its colours rise with the index
    (png(8, 2, RGB * 50), IDS),
    (saved(Image.fromarray(IDS.astype(np.float32)), "TIFF"), IDS),
    (saved(Image.fromarray(IDS + np.float32(0.5)), "TIFF"), "no whole numbers"),
    (saved(Image.fromarray(IDS * np.float32(2**54)), "TIFF"), "no whole numbers"),
    (png(2, 3, packed(IDS, 2), bytes(12)), "several indices one colour"),
    (saved(GREY, "TIFF", compression="jpeg"), "TIFF with JPEG inside, which blurs"),
    (png(16, 2, WIDE), "mode RGB of 16 bits"),
    (png(8, 4, np.stack([IDS * 80, IDS + 255 - IDS], 2)), IDS),
    (saved(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), "PNG"), "254 values"),
]


@pytest.mark.parametrize("data, expected", KINDS)
def test_values_and_colours_become_ids_with_a_table(data, expected):
    Path("from").mkdir()
    Path("from/a_mask.png").write_bytes(data)
    line = "convert --from from --out own --strip _mask"
    if isinstance(expected, str):
        assert expected in refusal(command, line)
        return
    command(line)
    assert np.array_equal(pixels("own/masks/train/a.png"), expected)
    Path("from/a_mask.png").write_bytes(png(8, 2, RGB + 7))
    assert "#070707 at row 0, column 0 has no row" in refusal(command, line)


def test_a_conversion_that_was_cut_off_goes_on_with_the_ids_of_the_first_call():
    for i, name in enumerate("abcd"):
        picture(Path(f"from/{name}.png"), "L", 60 * i)
    line, full = "convert --from from --out 'my own'", Path("my own/masks/train/c.png")
    full.mkdir(parents=True)  # it cannot be written
    assert "directory" in refusal(command, line)
    full.rmdir()
    left, living, hidden = (full.with_name(f".{name}") for name in ("a" * 32, "b" * 32, "hidden"))
    for path in (left, living, hidden):  # left: of a call that was killed
        path.touch()
        os.utime(path, (0, time.time() - 100 * (path != living)))
    os.remove("from/a.png")  # without it the ids of a table made anew would be others
    command(line)
    for i, name in enumerate("abcd"):
        assert (pixels(f"my own/masks/train/{name}.png") == i).all()
    assert not left.exists() and living.exists() and hidden.exists()


# an export of each tool has two classes, a hole, an overlap and what has no area
SQUARE = [[1, 1], [5, 1], [5, 4], [1, 4]]
EXPECTED = np.zeros((8, 12), np.uint8)
EXPECTED[1:4, 1:5] = 1  # big
EXPECTED[1:4, 2:7] = EXPECTED[5, 9] = 2  # pen, above it
EXPECTED[2, 4] = 1  # its hole
CODED = "a03500NL04200d0NI"  # the pen as pycocotools 2.0.11 writes it, label_studio_sdk 2.1.2:
BRUSH = "0000018039 1bfe3700c27ff86c027ff8c027ffc360184fff338047ff99c000"
BOX = EXPECTED[1:6, 2:10] == 2
PEN = base64.b64encode(saved(Image.fromarray(BOX), "PNG")).decode()
RUNS = ", ".join(map(str, np.diff([0, *np.flatnonzero(np.diff(BOX.ravel(), prepend=False)), 40])))
SIZE = dict(width=12, height=8)
STUDIO = dict(original_width=12, original_height=8)


def coco():
    pen = dict(category_id=5, area=15, segmentation={"counts": CODED, "size": [8, 12]})
    big = dict(category_id=3, area=20, segmentation=[sum(SQUARE, [])])
    bare = dict(category_id=3, area=9, segmentation=[])
    line = bare | dict(segmentation=[[0, 0, 9, 9]])
    shapes = [pen, big, bare, line, bare | big | dict(image_id=9)]
    shapes = [dict(image_id=7, id=i, iscrowd=1) | shape for i, shape in enumerate(shapes)]
    names = [{"id": 5, "name": "pen"}, {"id": 3, "name": "big"}]
    images = [dict(id=7, file_name="x\\a.jpg", **SIZE), dict(id=8, file_name="b.jpg", **SIZE)]
    return json.dumps(dict(categories=names, annotations=shapes, images=images))


def labelme():
    shapes = [
        dict(label="big", shape_type="polygon", points=SQUARE),
        dict(label="pen", shape_type="mask", points=[[2, 1], [9, 5]], mask=PEN),
        dict(label="p", shape_type="point", points=[[1, 1]]),
    ]
    return json.dumps(dict(imagePath="..\\a.jpg", imageWidth=12, imageHeight=8, shapes=shapes))


def label_studio():
    corners = [[x / 0.12, y / 0.08] for x, y in SQUARE]
    brush = {"format": "rle", "rle": list(bytes.fromhex(BRUSH))}
    results = [
        dict(type="polygonlabels", value={"polygonlabels": ["big"], "points": corners}),
        dict(type="keypointlabels", value={"keypointlabels": ["big"], "x": 1}),
        dict(type="brushlabels", value={"brushlabels": ["pen"], **brush}),
    ]
    results.append(results[0] | dict(image_rotation=90))
    results = [result | STUDIO for result in results]
    results.append(dict(type="choices", value={"choices": ["big"]}))  # of the image, without a size
    done = [dict(was_cancelled=True, result=[]), dict(result=results), dict(result=[])]
    task = dict(data={"n": 1, "image": "/data/upload/1/0123abcd-a.jpg"}, annotations=done)
    return json.dumps([task, dict(data={"image": "b.jpg"}, annotations=[])])


CVAT = f"""<annotations><image id="0" name="a.jpg" width="12" height="8">
<mask label="pen" z_order="1" rle="{RUNS}" left="2" top="1" width="8" height="5"/>
<polygon label="big" z_order="0" points="1,1;5,1;5,4;1,4"/><points label="big" points="1,1"/>
</image><image id="1" name="b.jpg" width="12" height="8"/></annotations>"""
EXPORTS = {"c.json": coco(), "l.json": labelme(), "s.json": label_studio(), "x.xml": CVAT}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_becomes_masks_by_name_and_what_it_lost_is_counted(name, capsys):
    folder(Path("own"), ["a", "b"])
    shutil.rmtree("own/masks/train")
    listed(name, EXPORTS[name])
    line = f"convert --from {name} --out own"
    command(line)
    assert os.listdir("own/masks/train") == ["a.png"]
    assert np.array_equal(pixels("own/masks/train/a.png"), EXPECTED)
    assert load(own("own", num_classes=0)).classes == ["background", "big", "pen"]
    lost = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lost: 1 ")]
    # what has no area, or lies on a turned image; the image without a shape; a second annotation
    assert len(lost) == {"l.json": 1, "s.json": 5, "c.json": 4}.get(name, 2)
    command(f"{line} --empty")
    if name in ("c.json", "x.xml"):
        assert np.array_equal(pixels("own/masks/train/b.png"), np.zeros((8, 12)))
    if name == "s.json":  # a task without a result says no size: the photograph does
        assert np.array_equal(pixels("own/masks/train/b.png"), np.zeros((6, 8)))
    listed("own/classes.csv", "id,name,r,g,b", "0,big,0,0,0", "1,x,0,0,0")
    assert "no row named 'pen'" in refusal(command, line)


def test_boxes_and_ellipses_lie_where_each_tool_has_them():
    """The same area in all, turned but for labelme's; at 45 degrees clockwise is down and right."""

    def turned(kind, **numbers):
        """Label Studio's, of numbers in per cent."""
        value = {kind: ["a"], "rotation": 90, **numbers}
        return convert.studio_area(dict(type=kind, value=value, **STUDIO))[0]

    box = '<box xtl="3" ytl="3" xbr="7" ybr="5" rotation="90"/>'
    ellipse = '<ellipse cx="5" cy="4" rx="2" ry="1" rotation="90"/>'
    expected = np.zeros((8, 12), bool)
    expected[2:6, 4:6] = True
    for draw in (
        convert.labelme_area(dict(shape_type="rectangle", points=[[6, 6], [4, 2]]), 8, 12),
        convert.cvat_area(fromstring(box), 8, 12),
        convert.cvat_area(fromstring(ellipse), 8, 12),
        turned("rectanglelabels", x=50, y=25, width=100 / 3, height=25),
        turned("ellipselabels", x=125 / 3, y=50, radiusX=50 / 3, radiusY=12.5),
    ):
        assert np.array_equal(draw(), expected)
    corners = convert.box(2, 3, 8, 5, 45, (5, 4))
    for area in (convert.ellipse((5, 4), (3, 1), 45, 8, 12), convert.union([corners], 8, 12)):
        assert area[5, 6] and not area[2, 6]
    circle = convert.labelme_area(dict(shape_type="circle", points=[[5, 4], [5, 5.6]]), 8, 12)()
    assert circle.sum() == 12 and circle[3, 3] and not circle[2, 3]
    # a brush of one pixel, its four values not repeated: 8 bits each, of a run of 3 + 1
    bits = f"{4:032b}" + "00111" + 4 * "0001" + "0" + "00" + "11" + 24 * "0" + 8 * "1" + 6 * "0"
    assert convert.brush(int(bits, 2).to_bytes(12, "big"), 1, 1).tolist() == [[True]]


def test_names_lead_to_photographs_and_a_table_that_is_there_is_followed():
    known = {"a", "deep/b", "1/c", "2/c"}
    names = {"x/a.png": "a", "b.png": "deep/b", "x/deep/b.1": "deep/b", "c.png": None}
    assert {name: convert.key_of(name, known) for name in names} == names
    text = convert.table_text([convert.ClassRow(0, 'a "b", c', (1, 2, 3))])
    listed("own/classes.csv", text)
    assert convert.table_text(read_table("own/classes.csv")) == text
    picture(Path("from/a.png"), "L", 0)
    command("convert --from from --out own --classes own/classes.csv")
    assert (pixels("own/masks/train/a.png") == 0).all()
    line = f"convert --from from --out own --classes {listed('t.txt', '1 2 3 other')}"
    assert "another table than --classes: move it away" in refusal(command, line)
    others = {"b", "val/b", "e/f", "val/e/f"}  # of val
    names = {"b.png": None, "val/b.png": None, "x/e/f.png": None, "val/a.png": "a", "y/g.png": None}
    assert {name: convert.key_of(name, {"a", "1/b", "2/g"}, others) for name in names} == names
    picture(Path("from/a.gif"), "L", 0)
    assert "a.gif has the same name" in refusal(command, "convert --from from --out new")


def test_a_photograph_that_is_not_read_has_its_remedy():
    heads = {b"\0\0\0\x18ftypheic": "a telephone's HEIC, whatever its name", b"II*\0": "a damaged"}
    for head, remedy in (heads | {b"GIF89a": "fetch it again"}).items():
        Path("a.jpg").write_bytes(head + bytes(9))
        assert f"): {remedy}" in refusal(read_photograph, Path("a.jpg"))


def test_a_labelme_file_is_of_the_image_beside_it(capsys):
    folder(Path("own"), ["A/1", "B/1"])
    shutil.rmtree("own/masks/train")
    listed("from/B/1.json", labelme().replace("..\\\\a.jpg", "1.png"))
    command("convert --from from --out own")
    assert [*Path("own/masks/train").rglob("*.png")] == [Path("own/masks/train/B/1.png")]
    listed("from/C/1.json", labelme().replace("..\\\\a.jpg", "1.png"))
    command("convert --from from --out own")
    assert "lost: 1 images that are not among the photographs, C/1.png first" in (
        capsys.readouterr().out
    )


def test_a_table_says_what_is_not_drawn_and_gives_nothing_two_ids(capsys):
    row = "id,name,r,g,b,value"
    rows = ["0,Background,0,0,0,0", "1,big,9,9,9,1", "2,pen,8,8,8,2"]
    x = listed("x.xml", CVAT)
    command(f"convert --from {x} --out own --classes {listed('t.csv', row, *rows, ',,,,,')}")
    assert np.array_equal(pixels("own/masks/train/a.png"), EXPECTED)
    assert "note" not in capsys.readouterr().out
    rows[0] = "0,other,0,0,0,0"
    command(f"convert --from {x} --out new --classes {listed('t.csv', row, *rows)}")
    assert np.array_equal(pixels("new/masks/train/a.png") == 255, EXPECTED == 0)
    assert "note: no class is named background: where nothing is" in capsys.readouterr().out
    picture(Path("v/a.png"), "L", 1)
    picture(Path("c/b.png"), "RGB", (9, 9, 9))
    for source, again, words in (
        (x, "3,pen,7,7,7,3", "x.xml: the table gives 'pen' two ids, 2 and 3"),
        ("v", "3,d,7,7,7,1", "v/a.png: the table gives value 1 two ids, 1 and 3"),
        ("c", "3,d,9,9,9,3", "c/b.png: the table gives #090909 two ids, 1 and 3"),
    ):
        table = listed("t.csv", row, *rows, again)
        assert words == refusal(
            command, f"convert --from {source} --out two-{source} --classes {table}"
        )
    for name in "bc":
        next(Path("v").iterdir()).rename(f"v/{name}.png")
        command("convert --from v --out own --part val")
    told = capsys.readouterr().out
    assert "note: 1 masks of earlier calls, b first, stay as they are" in told
    assert "are older" not in told
    os.utime("own/classes.csv", (later := time.time() + 9, later))
    command("convert --from v --out own --part test")
    words = "note: 2 masks of val, b first, are older than the table: convert them again if"
    assert words in capsys.readouterr().out
    for name, value in (("a", 0), ("b", 1), ("c", 255)):
        picture(Path(f"near/images/train/{name}_m.png"), "L", value)
        picture(Path(f"near/images/train/{name}.png"), "L", 0)
    command("convert --from near/images/train --out near --strip _m")
    told = capsys.readouterr().out
    assert "value 1 is its white: one id for both" in told and "move them out" in told
    listed("near/images/train/l.json", labelme().replace("..\\\\a.jpg", "a.png"))
    listed("t.csv", row, "255,background,0,0,0,", *rows[1:], "0,other,7,7,7,")
    command("convert --from near/images/train --out fresh --classes t.csv")
    assert "note" not in capsys.readouterr().out


HOLDS = """import fcntl, sys
files = [open(path, "a+") for path in ("own/.lock", "out/lock")]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("process 7 of here", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()"""


def test_two_calls_do_not_write_one_folder(monkeypatch):
    picture(Path("from/a.png"), "L", 0)
    Path("out").mkdir()
    Path("own").mkdir()
    line = "own: process 7 of here converts there: wait for its end"
    other = [sys.executable, "-c", HOLDS]
    with subprocess.Popen(other, text=True, stdin=-1, stdout=-1) as first:
        assert first.stdout.readline() == "held\n"
        assert refusal(command, "convert --from from --out own") == line
        assert "out: process 7 of here predicts" in refusal(outputs.claim, Path("out"), {})
        first.communicate("")
    ends = []

    def write(*given):
        """A call writes: nobody else may."""
        ends.append(subprocess.run(other, stderr=subprocess.DEVNULL, input=b"").returncode)
        sources.write(*given)

    monkeypatch.setattr(convert, "write", write)
    command("convert --from from --out own")
    assert ends == [1, 1] and pixels("own/masks/train/a.png").size
    outputs.claim(Path("out"), {})
    Path("own/.lock").unlink()
    assert subprocess.run(other, stderr=subprocess.DEVNULL, input=b"").returncode == 1


def many(count):
    """CVAT's XML of one image with a shape of each of so many classes."""
    image = '<annotations><image name="x\\a.jpg" width="12" height="8">'
    shapes = [f'<polygon label="c{i}" points="1,1;5,1;5,4;1,4"/>' for i in range(count)]
    return "\n".join([image, *shapes, "</image></annotations>"])


def test_as_many_classes_as_ids_are_converted():
    command(f"convert --from {listed('x.xml', many(253))} --out own")
    assert [row.id for row in read_table("own/classes.csv")] == [*range(254)]
    assert pixels("own/masks/train/x/a.png").any()


C, X, T, MASKS = "c.json", "x.xml", "--classes t.txt", "from"
L, ST = "l.json", "s.json"
IN, LINK = "own/masks/train", "link/masks/train"
MISTAKES = [  # what is converted, its content, more flags, words of the refusal
    (X, many(254), "", "255 classes, and ids run from 0 to 253"),
    (X, many(2), T, "t.txt: 255 classes, and ids run from 0"),
    (C, coco().replace('"counts"', '"runs"'), "", "a: not as its tool has it (Key"),
    (C, coco().replace("[8, 12]", "[12, 8]"), "", "run lengths of [12, 8], of an image of [8, 12]"),
    (C, coco().replace('"pen"', "null"), "", "c.json: not as its tool writes it (Attr"),
    (C, coco(), "--strip _mask", "--strip is for a folder of masks alone"),
    (
        C,
        coco(),
        "--part test",
        "own/images/test: 2 images that are not among the photographs, b.jpg first",
    ),
    (X, many(0), "", "1 images without a shape, which stay unlabelled without --empty"),
    (MASKS, None, "--empty", "--empty for an export"),
    (MASKS, None, "--strip k", "are such as a and mas, with sub-folders; see --part, --strip"),
    (MASKS, coco(), "", "(KeyError: 'imageWidth'); a folder with .json files is read as LabelMe's"),
    (X, CVAT.replace(RUNS, "3"), "", "run lengths of 3 pixels, not 40"),
    (X, "<annotations><track/></annotations>", "", "tracks of a video: export it as CVAT"),
    (X, "<annotations/>", "", "x.xml: no annotated image in it"),
    (X, "<annotations>", "", "x.xml: not readable as XML"),
    (X, CVAT.replace("b.jpg", "sub/a.png"), "--empty", "sub/a.png and another image have the name"),
    (L, labelme().replace(": 12,", ": null,"), "", "no imageWidth and imageHeight"),
    (ST, label_studio().replace(".jpg", ".txt"), "", "task None names no image"),
    (ST, label_studio().replace('width": 12', 'width": 13'), "", "a brush of 96 pixels, not 104"),
    (C, "{", "", "c.json: not as its tool writes it (JSONDecodeError"),
    (C, "{}", "", "neither COCO's, nor LabelMe's, nor Label Studio's"),
    (C, None, "", "--from c.json: no such file or folder"),
    (C, coco(), "--classes no.txt", "no.txt: not a readable table"),
    (C, coco(), "--classes u.txt", "u.txt:1: colour (300, 2, 3): three numbers from 0 to 255"),
    (C, coco(), "--classes c.json", "c.json:1: neither r g b name nor name:r,g,b, with a colour"),
    (MASKS, None, "--strip _mask", "from: no masks ending in _mask in it"),
    *((where, None, "", f"--from {where} is, holds or is in {IN}") for where in ("own", IN, LINK)),
    (f"{IN}/a.json", labelme(), "", f"a.json is, holds or is in {IN}: move it away"),
]


@pytest.mark.parametrize("name, text, more, words", MISTAKES)
def test_what_cannot_be_converted_is_one_line_and_no_mask(name, text, more, words):
    folder(Path("own"), ["a", "b"])
    os.symlink("own", "link")
    listed("t.txt", *(f"{i} 0 0 c{i}" for i in range(255)))
    listed("u.txt", "300 2 3 a")
    if name == MASKS:
        picture(Path("from/mask.png"), "L", 1)
        listed("from/notes.txt")
    if text:
        listed("from/info.json" if name == MASKS else name, text)
    before = snapshot(Path("own/masks"))
    assert words in refusal(command, f"convert --from {name} --out own {more}")
    assert before == snapshot(Path("own/masks"))


# ---- a folder of one's own in a whole run; other formats ----

CONSTANT = [  # ids of the masks, 9 is ignored; what the first evaluation says, and of which command
    ([0, 9, 0], "val's masks hold one class", "convert"),
    ([0, 1, 2], "one class everywhere", "stats"),
]


@pytest.mark.parametrize("ids, said, remedy", CONSTANT)
def test_a_run_names_its_classes_and_a_constants_scores(ids, said, remedy, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    monkeypatch.setattr(supervised, "predict", lambda net, x, *some: torch.zeros_like(x[0]).long())
    root = draw_folder(Path("my own"), 3)
    for path in root.glob("masks/*/*.png"):
        Image.open(path).point([*ids, *[9] * 253]).save(path)
    names = ["bare ground", "tree", "a, b"]
    rows = [f'{i},"{name}",{90 * i},7,0' for i, name in enumerate(names)]
    listed(root / "classes.csv", "id,name,r,g,b", *rows)
    argv = own_folder(root, "run", 0, iters=4, evaluate=2, save=4, pictures=4)
    train(supervised, [*argv, "--ignore-index", "9"])
    pattern = f"^{said}.*: python prepare_data.py ({remedy} .*)$"
    out = capsys.readouterr().out
    (line,) = re.findall(pattern, out, re.M)
    assert "bare ground" in out
    if remedy == "stats":
        command(line)
    start, *_, done = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
    assert start["classes"] == names and len(done["last"]["iou"]) == 3
    source = predict.open_source("run")
    assert source.data.classes == names and source.data.palette.tolist()[2] == [180, 7, 0]
    below = np.asarray(Image.open("run/panels/000004-val.png"))[2 * 176 :]  # of the two images
    assert all((below == [90 * i, 7, 0]).all(2).any() for i in {*ids} - {9})


def test_the_block_that_others_of_the_page_begin_with_makes_ids_by_the_table():
    rows = ["0,a,0,0,0,3", "1,b,0,0,0,4", "1,b,0,0,0,5"]
    listed("my/classes.csv", "id,name,r,g,b,value", *rows)
    page = (ROOT / "docs/formats.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], space := {})
    space["put"]("x", np.zeros((1, 3), np.uint8), np.array([[3, 4, 5]]))
    assert np.asarray(Image.open("my/masks/train/x.png")).tolist() == [[0, 1, 1]]
    assert space["grey"](np.array([-9, 0, 1, 2, 3]), 0, 2).tolist() == [0, 0, 128, 255, 255]
