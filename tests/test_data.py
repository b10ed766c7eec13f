"""Images and masks as they come, lists, splits, the generated pictures; refusals name the file.

Trees in every layout and published splits: test_sources.py, the released lists: test_prepare.py.
Real photographs are read where the environment names their folder (CAMVID).
"""

import colorsys
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import shapes
from common.data import FACTS, SPLITS, Data, Item, counts, set_hash
from sources import choose, load, read_list
from trees import NAMES, ROOT, TRAIN_ID, entry, flags, picture, refusal


def reader(**changes):
    return Data(flags(**changes), [], [], [], [])


@pytest.fixture
def item(tmp_path):
    """An image of 12x9 pixels and its mask, of class 0."""
    image, label = tmp_path / "image.png", tmp_path / "mask.png"
    return Item("k", picture(image, "RGB", 7, (12, 9)), picture(label, "L", 0, (12, 9)))


def grey_png(path, values, bits):
    """Writes a grey PNG of few bits by hand, which PIL cannot: values (H, W); bits 1, 2, 4 or 8."""
    values = np.asarray(values, np.uint8)
    planes = np.unpackbits(values[..., None], 2)[..., 8 - bits :].reshape(len(values), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in planes)
    head = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, 0, 0, 0, 0)
    text = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        text += struct.pack(">I", len(data)) + kind + data
        text += struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(text)


# ---- what cannot be read ----


def cut(share, kind="PNG"):
    """Returns what saves noise and leaves the first share of the file."""

    def spoil(path):
        noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(noise if path.stem == "image" else noise[..., 0] % 11).save(path, kind)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    return spoil


def break_chunk(path):
    """Spoils the name of the second part of a PNG's pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    place = whole.rindex(b"IDAT")
    assert whole.index(b"IDAT") < place
    path.write_bytes(whole[:place] + b"\0\1\2\3" + whole[place + 4 :])


def deep(dtype):
    return lambda path: Image.fromarray(np.full((9, 12), 20000, dtype)).save(path, "TIFF")


def flat(mode, width=12, height=9):
    return lambda path: picture(path, mode, 0, (width, height))


SPOILED = [  # the file, what happens to it, words of the line
    *(("image", cut(n, kind), "not readable as an image") for n in (0.5, 0.0, 0.01, 0.9)
      for kind in ("PNG", "JPEG")),
    ("image", lambda path: path.write_text("the file has moved\n\n"), "fetch it again"),
    ("image", break_chunk, "not readable as an image"),
    ("image", Path.unlink, "no such file"),
    *(("image", deep(dtype), "mode ") for dtype in (np.uint16, np.int32, np.float32)),
    ("label", Path.unlink, "no such file"),
    ("label", cut(0.5), "not readable as an image"),
    *(("label", flat("L", w, h), f"{w}x{h} pixels, not 12x9") for w, h in ((9, 12), (12, 8))),
    ("label", flat("L", 11), "11x9 pixels, not 12x9 as its image "),
    *(("label", flat(mode), f"mode {mode}, not one 8-bit channel")
      for mode in ("RGB", "RGBA", "LA")),
    ("label", flat("I;16"), ", not one 8-bit channel"),  # older versions of Pillow read I
    *(("label", lambda path, bits=bits: grey_png(path, np.zeros((9, 12)), bits), "2 or 4 bits")
      for bits in (2, 4)),
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("which, spoil, word", SPOILED)
def test_what_cannot_be_read_is_refused_by_name(item, which, spoil, word):
    path = getattr(item, which)
    spoil(path)
    line = refusal(reader().read, item, True)
    assert line.startswith(f"{path}: ") and word in line
    if word.endswith("its image "):
        assert str(item.image) in line
    if which == "label":  # who asks for no mask, opens none
        assert reader().read(item, False)[1] is None


# ---- photographs and masks as they come ----


def test_photographs_of_every_kind_are_read_as_rgb_but_for_one_too_large(item, monkeypatch):
    colours = Image.new("P", (12, 9), 3)
    colours.putpalette([0] * 9 + [5, 6, 7])
    for photograph, expected in (
        (Image.new("L", (12, 9), 77), (77, 77, 77)),
        (Image.new("RGBA", (12, 9), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("LA", (12, 9), (78, 9)), (78, 78, 78)),
        (Image.new("1", (12, 9), 1), (255, 255, 255)),
        (colours, (5, 6, 7)),
    ):
        photograph.save(item.image)
        image = reader().read(item, True)[0]
        assert image.mode == "RGB" and image.size == (12, 9)
        assert image.getpixel((4, 4)) == expected
    for bits in (1, 2, 4, 8):  # a photograph of few bits is rescaled, as it should be
        grey_png(item.image, np.arange(108).reshape(9, 12) % 2, bits)
        assert reader().read(item, False)[0].getpixel((1, 0)) == (255 // (2**bits - 1),) * 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # the image has 108
    line = refusal(reader().read, item, False)
    assert line.startswith(f"{item.image}: not readable as an image")


@pytest.mark.parametrize("kind", ["palette of 8 bits", "palette of 4 bits", "grey of 8", "1", "L"])
def test_the_value_of_a_mask_is_the_class_whatever_its_colour(item, kind):
    values = np.random.default_rng(0).integers(0, 11, (9, 12), dtype=np.uint8)
    if kind[0] == "p":
        bits, mask = int(kind[11]), Image.fromarray(values)
        mask.putpalette(np.random.default_rng(1).integers(0, 256, 3 * 2**bits).tolist())
        assert (np.asarray(mask.convert("L")) != values).mean() > 0.5
        mask.save(item.label, bits=bits)
        assert item.label.read_bytes()[24:26] == bytes([bits, 3])  # of a PNG's header
    elif kind == "grey of 8":
        grey_png(item.label, values, 8)
    else:
        values = values % 2 if kind == "1" else values
        Image.fromarray(values == 1 if kind == "1" else values).save(item.label)
    with Image.open(item.label) as stored:
        assert stored.mode == {"p": "P", "g": "L"}.get(kind[0], kind)
    label = reader().read(item, True)[1]
    assert label.mode == "L" and np.array_equal(np.asarray(label), values)


def tables():
    """Yields data set, flags, the name of a mask, and {a value of it: its class or 255}."""
    yield "camvid", {}, "k.png", {v: v for v in range(11)} | {11: 255, 255: 255}
    for name, end, count in (("voc", "k.png", 21), ("cityscapes", "k_labelTrainIds.png", 19)):
        yield name, {}, end, {v: v for v in range(count)} | {255: 255}
    ids = {v: TRAIN_ID.get(v, 255) for v in (*range(34), 255)}
    yield "cityscapes", {}, "k_gtFine_labelIds.png", ids
    for count in (2, 4, 12, 81, 254):
        yield "folder", dict(num_classes=count), "k.png", {v: v for v in range(count)} | {255: 255}
    for ignored in (0, 11):
        classes = {v: v for v in range(11)} | {ignored: 255}
        yield "folder", dict(num_classes=11, ignore_index=ignored), "k.png", classes


@pytest.mark.smoke
@pytest.mark.parametrize("name, changes, end, classes", list(tables()))
def test_every_value_becomes_its_class_or_255_and_any_other_is_refused_with_its_place(
    tmp_path, name, changes, end, classes
):
    data = reader(dataset=name, **changes)
    item = Item("k", picture(tmp_path / "image.png", "RGB", 0, (16, 16)), tmp_path / end)
    known = np.resize(np.array(list(classes), np.uint8), (16, 16))
    Image.fromarray(known).save(item.label)
    label = np.asarray(data.read(item, True)[1])
    assert label.ravel().tolist() == [classes[value] for value in known.ravel().tolist()]
    last = max(value for value, c in classes.items() if c != 255)
    ignored = max(value for value, c in classes.items() if c == 255)
    for stranger in {*range(256)} - set(classes):
        known[5, 7] = known[9, 1] = stranger
        Image.fromarray(known).save(item.label)
        line = refusal(data.read, item, True)
        assert line.startswith(f"{item.label}: value {stranger} at row 5, column 7; ")
        assert line.endswith(f"classes are 0 to {last}, and {ignored} is ignored")


@pytest.mark.parametrize("count", [2, 12, 81, 254])
def test_classes_of_ones_own_have_names_and_vocs_colours(count):
    data = reader(dataset="folder", num_classes=count)
    assert data.num_classes == count and data.palette.dtype == np.uint8
    assert data.classes == [f"class {i}" for i in range(count)]
    assert data.palette[:21].tolist() == FACTS["voc"]["palette"][:count]
    for i, colour in enumerate(data.palette.tolist()):  # VOC's rule: bit by bit
        expected = [0, 0, 0]
        for bit in range(24):
            if i >> bit & 1:
                expected[bit % 3] |= 128 >> bit // 3
        assert colour == expected
    assert data.palette.shape == (count, 3)


# ---- list files ----

A, B = NAMES[:2]
P, M = f"train/{A}.png", f"trainannot/{A}.png"
FORMS = [  # data set, a list, its keys, the columns of the first; B's do not matter
    ("camvid", f"{P}\t{M}\ntrain/{B}.png\ttrainannot/{B}.png\n", [A, B], P, M),
    ("camvid", f"train/{A}.jpg {M}\n{B}.jpg x/{B}.png\n", [A, B], f"train/{A}.jpg", M),
    ("camvid", f"{P} {M}\r\ntrain/{B}.png trainannot/{B}.png\r\n", [A, B], P, M),
    ("camvid", f"{A}\r\n{B}\r\n", [A, B], A, None),
    ("camvid", f"{P}\ntrain/{B}.png", [A, B], P, None),  # no final newline
    ("camvid", f"/{P} /{M}\n/train/{B}.png\n", [A, B], P, M),
    ("camvid", f"/Seg/{P} /Seg/{M}\n/Seg/{B}.png", [A, B], f"Seg/{P}", f"Seg/{M}"),
    ("camvid", f"\n\n{A}\n   \n\t\n{B}\n\n", [A, B], A, None),
    ("camvid", f"  {A}  \n\t{B}\t\n", [A, B], A, None),
    ("camvid", f"{P} None\ntrain/{B}.png None\n", [A, B], P, None),
    ("camvid", f"{P}\tNone\ntrain/{B}.png\t\n", [A, B], P, None),
    ("camvid", f" {P} \t {M} \n{B} \t None\n", [A, B], P, M),
    ("camvid", f"{P}   {M}\n  {B}   None\n", [A, B], P, M),
    ("camvid", f"\ufeff{A}\n{B}\n", [A, B], A, None),  # a byte order mark
    ("camvid", f"{A}\r{B}\r", [A, B], A, None),
    ("camvid", f"{NAMES[3]}\n{A}\n{B}\n", [NAMES[3], A, B], NAMES[3], None),  # in its order
    ("camvid", "train/a..b.png x/..c.png", ["a..b"], "train/a..b.png", "x/..c.png"),  # no climbing
    # lines of the released lists
    ("voc", "2007_000032", ["2007_000032"], "2007_000032", None),
    ("voc", "/J/2007_000032.jpg /x/7_9.png", ["2007_000032"], "J/2007_000032.jpg", "x/7_9.png"),
    ("voc_aug", "J/2011_000068.jpg a/b.png", ["2011_000068"], "J/2011_000068.jpg", "a/b.png"),
    ("cityscapes", "u/u_000000_000019_x.png", ["u_000000_000019"], "u/u_000000_000019_x.png", None),
    ("cityscapes", "a-b_000000_000465.p\t/x", ["a-b_000000_000465"], "a-b_000000_000465.p", "x"),
    ("folder", "images/val/a b/c.e.JPG\tm/x y.p", ["a b/c.e"], "images/val/a b/c.e.JPG", "m/x y.p"),
    ("folder", "train2017/0177254.jpg None", ["train2017/0177254"], "train2017/0177254.jpg", None),
    ("folder", "images/trainer/a.webp", ["images/trainer/a"], "images/trainer/a.webp", None),
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("name, text, keys, image, mask", FORMS)
def test_a_list_is_read_in_every_form_and_in_its_order(tmp_path, name, text, keys, image, mask):
    (tmp_path / "list.txt").write_bytes(text.encode())
    rows = read_list(tmp_path / "list.txt", FACTS[name]["key"])
    assert list(rows) == keys and rows[keys[0]] == (image, mask)


CLIMBS = ("a/../b.png", "../b.png", "/../b.png", "a/..")
UNUSABLE = [  # data set, bytes of a list (None: no file), what the line says after the file's name
    *(("camvid", text, ": an empty list") for text in (b"", b"\n \n\r\n")),
    ("camvid", f"{A}\n{B}\n\nx/{A}.png y/{A}.png\n".encode(), f":4: twice: x/{A}.png"),
    ("camvid", b"\nwhat/is/this/\n", ":2: no image key: what/is/this/"),
    ("voc", b"\n2007-000032\n", ":2: no image key: 2007-000032"),
    *(("camvid", f"{A}\n{more}\n".encode(), f":2: more than two columns: {more}")
      for more in (f"{B} a b", f"{B}\ta\tb", f"{B}\t\ta")),
    *(("camvid", text.format(A, B, name).encode(), ":2: a path with ..: ") for name in CLIMBS
      for text in ("{0}\n{2}\n", "{0}\n{1}\t{2}\n", "{0}\n{1} {2}")),
    ("camvid", b"a\0b.png", ":1: a NUL: "),
    ("camvid", b"\xff\xfe\x00\x81", ": not a readable list ("),
    ("camvid", None, ": not a readable list ("),
]  # fmt: skip


@pytest.mark.parametrize("name, text, words", UNUSABLE)
def test_lists_that_cannot_be_used_are_refused_by_file_and_line(tmp_path, name, text, words):
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_bytes(text)
    assert refusal(read_list, path, FACTS[name]["key"]).startswith(f"{path}{words}")


# ---- splits ----


def shuffled(count):
    keys = [f"k{i:04d}" for i in range(count)]
    return [keys[i] for i in np.random.default_rng(1).permutation(count)]


@pytest.mark.smoke
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("count", [320, 367, 16])
def test_a_split_is_every_rth_key_or_a_random_set_as_large_and_nested(count, seed):
    before, ordered = None, sorted(shuffled(count))
    for r in (2, 4, 8, 16):
        labeled, unlabeled = choose(shuffled(count), f"1/{r}", seed)
        if seed is None:
            assert labeled == [k for i, k in enumerate(ordered) if i % r == 0]
        assert len(labeled) == math.ceil(count / r) == len(set(labeled))
        assert unlabeled == [k for k in ordered if k not in labeled]
        assert labeled == sorted(labeled)
        assert before is None or set(labeled) <= before
        before = set(labeled)
    assert choose(shuffled(count), "all", seed) == (ordered, ordered)
    assert choose(shuffled(count), f"1/{count}", None)[0] == ordered[:1]


def test_a_random_split_is_a_function_of_its_seed_alone():
    keys = shuffled(200)
    first = choose(keys, "1/8", 3)
    np.random.seed(1)
    assert choose(sorted(keys), "1/8", 3) == first
    # the seeds of the runs in results/: the first of numpy's permutation
    assert first[0] == sorted(np.random.default_rng(3).permutation(sorted(keys))[:25].tolist())
    others = [tuple(choose(keys, "1/8", seed)[0]) for seed in range(6)]
    assert len(set(others)) == 6 and tuple(sorted(keys)[::8]) not in others
    assert "--split-seed -1" in refusal(choose, keys, "1/8", -1)


WRONG = ["1/0", "1/1", "1/6", "1/999", "2/4", "1/x", "1/-2", "1/2.0", "1/", "", "half", "183"]


@pytest.mark.parametrize("split", WRONG)
def test_a_split_that_does_not_exist_is_refused_with_the_right_ones(split):
    line = refusal(choose, NAMES, split, None)
    assert line == f"--split {split}: all, or 1/r with r from 2 to 5"


def test_a_set_is_named_by_a_hash_of_its_sorted_keys():
    by_hand = entry(["a", "b", "c10", "c9"])["set"]
    assert set_hash(["c9", "a", "c10", "b"]) == by_hand
    assert set_hash(dict.fromkeys(["c10", "b", "c9", "a"])) == by_hand != set_hash(["a", "b"])
    assert set_hash([]) == "da39a3ee"  # sha1 of nothing


COUNTS = {  # labelled and unlabelled images of the papers' splits, and of r of any number
    "voc": {"92": (92, 10490), "1464": (1464, 9118), "all": (10582, 10582), "1465": (0, 0)}
    | {"1/1": (0, 0), "10582": (0, 0)},
    "voc_aug": {"1/2": (5291, 5291), "1/16": (662, 9920), "10582": (0, 0)},
    "cityscapes": {"1/16": (186, 2789), "1/32": (93, 2882), "1/3": (992, 1983), "2975": (0, 0)}
    | {"all": (2975, 2975)}
    | dict.fromkeys((None, "", "list", "1/0", "0", "x/2", "1/x", "-3"), (0, 0)),
    "folder": dict.fromkeys(("1/2", "all"), (0, 0)),
    "camvid": dict.fromkeys(("1/8", "all"), (0, 0)),
    "shapes": {"1/16": (0, 0)},
}


def test_counts_are_those_of_the_papers_and_zero_where_unknown():
    for name, rows in COUNTS.items():
        assert {split: counts(name, split) for split in rows} == rows


# ---- the published splits ----

VOC, CITY = "6ed871ae 5b12fb32 93298139", "2f23650c 7a7abbc4"  # train, train_aug, val; train, val
PUBLISHED = {  # family of a data set: images and set of each split, from the lists of each project
    "voc cps": "92 84057fcd, 183 4e6f730e, 366 2a4c7848, 732 62be75ca, 1464 6ed871ae",
    "voc u2pl": "92 84057fcd, 183 4e6f730e, 366 2a4c7848, 732 9b3141cd, 1464 6ed871ae",
    "voc cac0": "92 84057fcd, 183 4e6f730e, 366 2a4c7848, 732 9b3141cd, 1464 6ed871ae",
    "voc cac1": "92 752cf0c1",
    "voc cac2": "92 3ff32332",
    "voc_aug cps": "1/16 662 09539463, 1/8 1323 31380de8, 1/4 2646 668265d6, 1/2 5291 dad2c983",
    "voc_aug u2pl": "1/16 662 653d5723, 1/8 1323 1811c303, 1/4 2646 27e75f38, 1/2 5291 9d551940",
    "voc_aug cac0": "1/16 662 e7d3f5c0, 1/8 1323 c62365df, 1/4 2645 7ce9effc",
    "voc_aug cac1": "1/16 662 a305e0c2, 1/8 1323 a8a86f39, 1/4 2645 dd239d3d",
    "voc_aug cac2": "1/16 662 0a12f423, 1/8 1323 84ad6848, 1/4 2645 4416f802",
    "cityscapes cps": "1/32 93 cfcc853b, 1/16 186 b94f8275, 1/8 372 40a12d18, 1/4 744 8a411d06, "
    "1/2 1488 54ca38a4",
    "cityscapes u2pl": "1/16 186 b0c3510f, 1/8 372 77d92651, 1/4 744 305dd8d9, 1/2 1488 a525f271",
    "cityscapes cac0": "1/30 100 8853fbfd, 1/8 372 77d92651, 1/4 744 e3f8aa37",
    "cityscapes cac1": "1/30 100 42385441, 1/8 372 7acc79de, 1/4 744 5d453085",
    "cityscapes cac2": "1/30 100 a495caa4, 1/8 372 0c3757b5, 1/4 744 3a6753f0",
    "voc parts": "train 10582 5b12fb32, val 1449 93298139",
    "voc_aug parts": "train 10582 5b12fb32, val 1449 93298139",
    "cityscapes parts": "train 2975 2f23650c, val 500 7a7abbc4",
}


@pytest.mark.smoke
def test_the_published_splits_are_those_found_in_the_lists_of_the_projects():
    known, found = {}, {}
    for name, entries in PUBLISHED.items():
        for words in map(str.split, entries.split(", ")):
            known[(*name.split(), words[0])] = (int(words[-2]), words[-1])
    for name, families in SPLITS.items():
        for family, splits in families.items():
            for split, one in splits.items():
                found[name, family, split] = (one["images"], one["set"])
                assert "url" in one or (name, family) == ("voc_aug", "cps")  # those are generated
                if family != "parts" and (family[:3], split) != ("cac", "1/4"):  # CAC's: one fewer
                    assert counts(name, split)[0] == one["images"]
    assert found == known


# ---- the generated pictures ----


@pytest.fixture(scope="module")
def drawn():
    """{part: {key: (image, label) as arrays}} of all generated pictures."""
    every = {}
    for part in ("train", "val", "test"):
        pairs = {key: shapes.draw(key) for key in shapes.keys(part)}
        for image, label in pairs.values():
            assert (image.mode, label.mode) == ("RGB", "L")
            assert image.size == label.size == (shapes.SIZE, shapes.SIZE) == (64, 64)
        every[part] = {key: tuple(map(np.asarray, pair)) for key, pair in pairs.items()}
    return every


@pytest.mark.smoke
def test_a_picture_is_a_function_of_its_key_and_all_differ(drawn):
    np.random.seed(4)
    for key in ("train-00319", "train-00000"):
        again = shapes.draw(key)
        for old, new in zip(drawn["train"][key], again, strict=True):
            assert np.array_equal(old, new)
        image, label = reader(dataset="shapes").read(Item(key), True)
        assert (image.tobytes(), label.tobytes()) == tuple(one.tobytes() for one in again)
        assert reader(dataset="shapes").read(Item(key), False)[1] is None
    assert [len(pictures) for pictures in drawn.values()] == [320, 64, 64]
    assert len({image.tobytes() for part in drawn.values() for image, _ in part.values()}) == 448
    keys = ["train-00000", "val-00005", "test-00063"]
    code = (
        "from common import shapes\nfrom zlib import crc32\n"
        f"for image, label in map(shapes.draw, {keys}):\n"
        "    print(crc32(image.tobytes() + label.tobytes()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    pairs = (drawn[key.partition("-")[0]][key] for key in keys)
    mine = [zlib.crc32(image.tobytes() + label.tobytes()) for image, label in pairs]
    assert done.stdout.split() == [str(one).encode() for one in mine]  # another hash seed


def test_every_value_is_a_class_and_all_seven_occur_in_every_part(drawn):
    for part in drawn.values():
        tallies = np.stack([np.bincount(label.ravel(), minlength=7) for _, label in part.values()])
        assert tallies.shape[1] == 7  # no value above 6
        # six figures equally likely, two or three a picture: each in about a third of them
        assert ((tallies > 0).mean(0) > 0.1).all()
        shares = tallies.sum(0) / tallies.sum()
        assert shares.argmax() == 0 and shares.min() > 0.01


def test_colour_tells_the_pair_and_not_the_two_of_a_pair(drawn):
    hues = {c: [] for c in range(1, 7)}
    for image, label in drawn["train"].values():
        for c in hues:
            inner = image[label == c]
            if len(inner) >= 100:  # enough to average the noise out
                hues[c].append(colorsys.rgb_to_hsv(*(inner.mean(0) / 255))[0])

    def apart(a, b):
        distances = [min((x - y) % 1, (y - x) % 1) for x in hues[a] for y in hues[b]]
        return sum(distances) / len(distances)

    for a in range(1, 7):
        assert len(hues[a]) > 30
        for b in range(1, 7):
            if (a - 1) // 2 == (b - 1) // 2:
                # a normal hue of deviation 0.035: 0.04 apart on average, and no more across a pair
                assert apart(a, b) < 0.07 and apart(a, b) < apart(a, a) + 0.03
            else:
                assert apart(a, b) > 0.2  # a third of the circle, less the deviations


# ---- the real photographs ----


@pytest.mark.skipif("CAMVID" not in os.environ, reason="CAMVID does not name the CamVid folder")
def test_the_real_camvid_has_its_images_and_every_mask_can_be_read():
    data = load(flags(os.environ["CAMVID"], split="1/8"))
    assert (len(data.labeled), len(data.unlabeled)) == (46, 321)
    assert (len(data.val), len(data.test), data.num_classes) == (101, 233, 11)
    whole = load(flags(os.environ["CAMVID"]))
    seen, void = np.zeros(256, np.int64), 0
    for item in (*whole.labeled, *whole.val, *whole.test):
        with Image.open(item.image) as image, Image.open(item.label) as mask:
            assert image.size == mask.size == (480, 360)
            raw = np.asarray(mask)
        label = np.asarray(whole.read(item, True)[1])
        assert np.array_equal(label, np.where(raw == 11, 255, raw))
        seen += np.bincount(label.ravel(), minlength=256)
    void = seen[255] / seen.sum()
    assert set(np.flatnonzero(seen).tolist()) == {*range(11), 255}
    assert 0.02 < void < 0.05 and seen.sum() == 701 * 480 * 360  # 4 % of train, 1.7 % of val
