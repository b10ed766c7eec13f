"""Images and masks as they come, in every format, and from a cache; lists, splits, polygons.

What users bring: classes of their own in a whole run, masks of other formats.
"""

import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import convert
import predict
import supervised
from common import shapes
from common.data import FACTS, SPLITS, Data, Item, counts, read_mask, read_photograph, set_hash
from common.sources import choose, load, read_list
from formats import GREY, IDS, RGB, TURNED, WIDE, packed, png, saved, tiff
from prepare_data import orientation
from recorder import assert_close
from supervised import Samples, Stream
from tiny import ROOT, draw_folder, draw_tree, own_folder, shrink, train
from trees import NAMES, TRAIN_ID, command, entry, flags, folder, listed, own, picture, refusal


def reader(**changes):
    return Data(flags(**changes), [], [], [], [])


@pytest.mark.smoke
def test_an_item_is_an_rgb_photograph_and_a_mask_of_its_size(empty_folder, monkeypatch):
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
    *((tiff(bytes(128), 4, photo=2, alpha=n), "mode RGB", "a TIFF of 4 bands") for n in (0, 2)),
    (tiff(bytes(160), 5, photo=2, kinds=(0,)), "bands, bits or a compression", "bands, bits or"),
    (b"", "fetch it again", "fetch it again"),
    (saved(NOISE, "PNG")[:4000], "not readable as an image", "not readable as an image"),
    (saved(NOISE, "JPEG")[:-200], None, "not readable as an image"),
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("data, mask, photograph", FILES)
def test_a_file_is_read_as_stored_or_refused_with_the_cause(tmp_path, data, mask, photograph):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    for read, found in ((read_mask, mask), (read_photograph, photograph)):
        if isinstance(found, str):
            line = refusal(read, path)
            assert line.startswith(f"{path}: ") and found in line
        elif found is not None:
            assert (np.asarray(read(path)).reshape(4, 8, -1) == found[..., None]).all()


def test_a_palette_of_few_colours_keeps_every_index():
    mask = np.array([[0, 1, 15, 16, 200, 255]], np.uint8)
    data = io.BytesIO(convert.png(mask, [[0, 0, 0], [9, 9, 9]]))
    assert np.array_equal(np.asarray(Image.open(data)), mask)


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


TRAIN_IDS = {v: TRAIN_ID.get(v, 255) for v in (*range(34), 255)}
TABLES = [  # data set, flags, the name of a mask, {a value of it: its class or 255}
    ("camvid", {}, "k.png", {v: v for v in range(11)} | {11: 255, 255: 255}),
    ("voc", {}, "k.png", {v: v for v in range(21)} | {255: 255}),
    ("cityscapes", {}, "k_labelTrainIds.png", {v: v for v in range(19)} | {255: 255}),
    ("cityscapes", {}, "k_gtFine_labelIds.png", TRAIN_IDS),
    ("folder", dict(num_classes=2), "k.png", {0: 0, 1: 1, 255: 255}),
    ("folder", dict(num_classes=254), "k.png", {v: v for v in range(254)} | {255: 255}),
    ("folder", dict(num_classes=3, ignore_index=3), "k.png", {0: 0, 1: 1, 2: 2, 3: 255}),
]


@pytest.mark.smoke
@pytest.mark.parametrize("name, changes, end, classes", TABLES)
def test_a_value_becomes_its_class_or_is_refused(tmp_path, name, changes, end, classes):
    data = reader(dataset=name, **changes)
    item = Item("k", picture(tmp_path / "image.png", "RGB", 0, (16, 16)), tmp_path / end)
    known = np.resize(np.array(list(classes), np.uint8), (16, 16))
    Image.fromarray(known).save(item.label)
    label = np.asarray(data.read(item, True)[1])
    assert label.ravel().tolist() == [classes[value] for value in known.ravel().tolist()]
    last = max(value for value, c in classes.items() if c != 255)
    ignored = max(value for value, c in classes.items() if c == 255)
    strangers = sorted({*range(256)} - set(classes))
    for stranger in (*strangers[:2], *strangers[-2:]):
        known[5, 7] = known[9, 1] = stranger
        Image.fromarray(known).save(item.label)
        line = refusal(data.read, item, True)
        assert line.startswith(f"{item.label}: value {stranger} at row 5, column 7; ")
        assert line.endswith(f"classes are 0 to {last}, and {ignored} is ignored")


A, B = NAMES[:2]
P, M = f"train/{A}.png", f"trainannot/{A}.png"
CLIMBS = ("a/../b.png", f"{B}\t../b.png", f"{B} /../b.png", "a/..")
LISTS = [  # data set, a list; its keys and the columns of the first, or what the line says of it
    ("camvid", f"{P} {M}\r\ntrain/{B}.png trainannot/{B}.png\r\n", ([A, B], P, M)),
    ("camvid", f"\n\n  {B}  \n   \n\t\n\t{A}\n\n", ([B, A], B, None)),  # in its order
    ("camvid", f"{P}\tNone\ntrain/{B}.png\t\n", ([A, B], P, None)),
    ("camvid", f"\ufeff{A}\r{B}\r", ([A, B], A, None)),  # a byte order mark
    ("camvid", "train/a..b.png x/..c.png", (["a..b"], "train/a..b.png", "x/..c.png")),
    ("voc", "/J/2007_000032.jpg /x/7_9.png", (["2007_000032"], "J/2007_000032.jpg", "x/7_9.png")),
    ("folder", "images/val/a b/c.JPG\tm/x y.p", (["a b/c"], "images/val/a b/c.JPG", "m/x y.p")),
    ("camvid", "\n \n\r\n", ": an empty list"),
    ("camvid", f"{A}\n{B}\n\nx/{A}.png y/{A}.png\n", f":4: twice: x/{A}.png"),
    ("camvid", "\nwhat/is/this/\n", ":2: no image key: what/is/this/"),
    ("camvid", f"{A}\n{B}\t\ta\n", f":2: more than two columns: {B}\t\ta"),
    *(("camvid", f"{A}\n{line}\n", ":2: a path with ..: ") for line in CLIMBS),
    ("camvid", "a\0b.png", ":1: a NUL: "),
    ("camvid", "a.jpg,b.png", ":1: columns with , between"),
    ("voc", "2007_000032; 2008_000008", ":1: columns with ; between"),
    ("cityscapes", "a_000078_000019|b_000000_000019", ":1: columns with | between"),
    ("folder", "images/train/a.png;masks/train/a.png", ":1: columns with ; between"),
    ("camvid", "a".encode("utf-16"), ": not a readable list (UTF-16)"),
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("name, text, expected", LISTS)
def test_a_list_is_read_in_every_form_or_refused_by_its_line(tmp_path, name, text, expected):
    path, pattern = tmp_path / "list.txt", FACTS[name]["key"]
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
    "voc": {"92": (92, 10490), "1464": (1464, 9118), "all": (10582, 10582), "1465": (0, 0)},
    "voc_aug": {"1/2": (5291, 5291), "1/16": (662, 9920), "10582": (0, 0)},
    "cityscapes": {"1/16": (186, 2789), "1/3": (992, 1983), "list": (0, 0), "1/0": (0, 0)},
    "coco": {"1/512": (232, 118055), "1/32": (3697, 114590), "all": (118287, 118287)},
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
    assert (len(found), entry(found)["set"]) == (65, "3365c239")
    assert set_hash(["c9", "a", "c10", "b"]) == entry(["a", "b", "c10", "c9"])["set"]


# ---- the cache of decoded images ----

MAKE = "cache --dataset camvid --data-root 'my tree' --out cache"


def read_all(data):
    """Returns the arrays of all images and masks that a run may read."""
    items = data.labeled + data.unlabeled + data.val + data.test
    pairs = [data.read(item, item.label is not None) for item in items]
    return [np.asarray(picture) for pair in pairs for picture in pair if picture is not None]


@pytest.fixture
def tree(empty_folder):
    return draw_tree(Path("my tree"))


def test_what_is_read_and_its_samples_are_the_same_bit_for_bit_whatever_is_cached(tree):
    """Whole, cut by --max-gb, in another process, and after it was deleted."""
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


MASK = "my tree/trainannot/train0.png"
WRONG = [  # a file, what becomes of its bytes, words of the refusal
    ("cache/pixels.bin", lambda data: bytes([data[0] ^ 1]) + data[1:], "damaged; delete it"),
    ("cache/pixels.bin", lambda data: data[:99], "99 of"),
    ("cache/pixels.bin", lambda data: b"", "not a whole cache"),
    ("cache/index.json", lambda data: data.replace(b'"pil": "', b'"pil": "0'), "may differ"),
    (MASK, lambda data: data + b"0", f"{MASK} has changed"),
]


@pytest.mark.parametrize("name, change, words", WRONG)
def test_a_cache_that_is_not_right_is_refused_with_its_remedy(name, change, words, tree):
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


def test_making_one_leaves_nothing_behind_where_it_cannot(tree):
    command(MAKE)
    assert "no file of this run" in refusal(load, own(folder(Path("other")), cache="cache"))
    assert "exists" in refusal(command, MAKE)
    again = MAKE.replace("--out cache", "--out again")
    assert "not even the first" in refusal(command, again, "--max-gb", 1e-6)
    (tree / "testannot/test1.png").write_bytes(b"no image")
    assert "test1.png: not readable" in refusal(command, again)
    assert sorted(os.listdir()) == ["cache", "my tree", "other"]


# ---- a folder of one's own in a whole run; other formats ----

CONSTANT = [  # ids of the masks, 9 is ignored; what the first evaluation says, and of which command
    ([0, 9, 0], "val's masks hold one class", "convert"),
    ([0, 1, 2], "one class everywhere", "stats"),
]


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("ids, said, remedy", CONSTANT)
def test_a_run_names_its_classes_and_says_what_a_constant_scores(
    ids, said, remedy, monkeypatch, capsys
):
    """The names: in log, checkpoint and panels."""
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
    (line,) = re.findall(pattern, capsys.readouterr().out, re.M)
    if remedy == "stats":
        command(line)
    start, *_, done = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
    assert start["classes"] == names and len(done["last"]["iou"]) == 3
    source = predict.open_source("run")
    assert source.data.classes == names and source.data.palette.tolist()[2] == [180, 7, 0]
    below = np.asarray(Image.open("run/panels/000004-val.png"))[2 * 176 :]  # of the two images
    assert all((below == [90 * i, 7, 0]).all(2).any() for i in {*ids} - {9})


def test_the_block_that_others_of_the_page_begin_with_makes_ids_by_the_table(empty_folder):
    rows = ["0,a,0,0,0,3", "1,b,0,0,0,4", "1,b,0,0,0,5"]
    listed("my/classes.csv", "id,name,r,g,b,value", *rows)
    page = (ROOT / "docs/formats.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], space := {})
    space["put"]("x", np.zeros((1, 3), np.uint8), np.array([[3, 4, 5]]))
    assert np.asarray(Image.open("my/masks/train/x.png")).tolist() == [[0, 1, 1]]
    assert space["grey"](np.array([-9, 0, 1, 2, 3]), 0, 2).tolist() == [0, 0, 128, 255, 255]
