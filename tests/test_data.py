"""Lists, splits and masks as they come; what cannot be used is refused in one line.

Trees in every layout, folders of one's own and published splits: test_layouts.py. The lists of the
released codes are read where the environment names a folder of them (SPLITS).
"""

import colorsys
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import Refusal, shapes
from common.data import FACTS, SPLITS, counts, set_hash
from sources import choose, load, read_list
from supervised import Images

NAMES = [f"0001TP_{number:06d}" for number in range(6690, 6690 + 30 * 5, 30)]


def camvid(root, extension="png", names=NAMES, size=(12, 9)):
    """A CamVid folder: five training images, two of val, one of test; mask i is class i."""
    for part, keys in (("train", names), ("val", ["v0", "v1"]), ("test", ["t0"])):
        (root / part).mkdir(parents=True)
        (root / f"{part}annot").mkdir()
        for i, key in enumerate(keys):
            Image.new("RGB", size, (20 * i, 30, 40)).save(root / part / f"{key}.{extension}")
            Image.new("L", size, i).save(root / f"{part}annot" / f"{key}.png")
    return root


def flags(root, **changes):
    values = dict(dataset="camvid", data_root=str(root), split="all", split_seed=None)
    values |= dict(split_family="cps", labeled_list="", unlabeled_list="")
    return SimpleNamespace(**values | dict(num_classes=0, ignore_index=255) | changes)


def keys_of(items):
    return [item.key for item in items]


def refusal(function, *arguments):
    """The one line that a call is refused with."""
    with pytest.raises(Refusal) as refused:
        function(*arguments)
    line = str(refused.value)
    assert line and "\n" not in line and "\r" not in line
    return line


def first_mask(root, array, **save):
    """Puts another mask in place of the first training image's; returns (Data, its Item)."""
    data = load(flags(root))
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(data.labeled[0].label, **save)
    return data, data.labeled[0]


# ---- a folder ----


@pytest.mark.smoke
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_camvid_is_read_with_jpg_and_with_png_photographs(tmp_path, extension):
    data = load(flags(camvid(tmp_path, extension), split="1/2"))
    assert keys_of(data.labeled) == [NAMES[0], NAMES[2], NAMES[4]]
    assert keys_of(data.unlabeled) == [NAMES[1], NAMES[3]]
    assert keys_of(data.val) == ["v0", "v1"] and keys_of(data.test) == ["t0"]
    assert data.num_classes == 11 and len(data.palette) == 11
    for i, item in zip((0, 2, 4), data.labeled, strict=True):
        assert item.image == tmp_path / "train" / f"{item.key}.{extension}"
        image, label = data.read(item, True)
        assert image.mode == "RGB" and label.mode == "L" and image.size == label.size == (12, 9)
        assert np.abs(np.asarray(image)[0, 0].astype(int) - [20 * i, 30, 40]).max() <= 4  # JPEG
        assert (np.asarray(label) == i).all()


def test_all_means_every_image_is_labelled_and_unlabelled(tmp_path):
    data = load(flags(camvid(tmp_path)))
    assert keys_of(data.labeled) == keys_of(data.unlabeled) == NAMES


def test_images_gives_tensors_at_the_size_of_each_image(tmp_path):
    data = load(flags(camvid(tmp_path)))
    images = Images(data, data.labeled)
    image, label = images[3]
    assert image.dtype == label.dtype == torch.uint8
    assert image.shape == (3, 9, 12) and label.shape == (9, 12)
    assert image[:, 4, 4].tolist() == [60, 30, 40] and bool((label == 3).all())


# ---- list files ----

A, B = NAMES[:2]
LISTS = {
    "tab": f"train/{A}.png\ttrainannot/{A}.png\ntrain/{B}.png\ttrainannot/{B}.png\n",
    "space": f"train/{A}.jpg trainannot/{A}.png\ntrain/{B}.jpg trainannot/{B}.png\n",
    "crlf": f"train/{A}.png trainannot/{A}.png\r\ntrain/{B}.png trainannot/{B}.png\r\n",
    "crlf bare": f"{A}\r\n{B}\r\n",
    "no final newline": f"train/{A}.png\ntrain/{B}.png",
    "leading slash": f"/train/{A}.png /trainannot/{A}.png\n/train/{B}.png /trainannot/{B}.png\n",
    "absolute": f"/SegNet/CamVid/train/{A}.png /SegNet/CamVid/trainannot/{A}.png\n"
    f"/SegNet/CamVid/train/{B}.png /SegNet/CamVid/trainannot/{B}.png\n",
    "bare": f"{A}\n{B}\n",
    "blank lines": f"\n\n{A}\n   \n\t\n{B}\n\n",
    "spaces around": f"  {A}  \n\t{B}\t\n",
    "no mask": f"train/{A}.png None\ntrain/{B}.png None\n",
    "no mask, tab": f"train/{A}.png\tNone\ntrain/{B}.png\t\n",
    "blanks about a tab": f" train/{A}.png \t trainannot/{A}.png \n{B} \t None\n",
    "many blanks": f"train/{A}.png   trainannot/{A}.png\n  {B}   None\n",
    "byte order mark": f"\ufeff{A}\n{B}\n",
    "old line ends": f"{A}\r{B}\r",
}
COLUMNS = {
    "tab": (f"train/{A}.png", f"trainannot/{A}.png"),
    "space": (f"train/{A}.jpg", f"trainannot/{A}.png"),
    "crlf": (f"train/{A}.png", f"trainannot/{A}.png"),
    "no final newline": (f"train/{A}.png", None),
    "leading slash": (f"train/{A}.png", f"trainannot/{A}.png"),
    "absolute": (f"SegNet/CamVid/train/{A}.png", f"SegNet/CamVid/trainannot/{A}.png"),
    "no mask": (f"train/{A}.png", None),
    "no mask, tab": (f"train/{A}.png", None),
    "blanks about a tab": (f"train/{A}.png", f"trainannot/{A}.png"),
    "many blanks": (f"train/{A}.png", f"trainannot/{A}.png"),
}  # of the first line; the others are bare


@pytest.mark.smoke
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_read_in_every_form(tmp_path, kind):
    root = camvid(tmp_path / "data")
    (tmp_path / "list.txt").write_bytes(LISTS[kind].encode())
    rows = read_list(tmp_path / "list.txt", FACTS["camvid"]["key"])
    assert list(rows) == [A, B] and rows[A] == COLUMNS.get(kind, (A, None))
    data = load(flags(root, labeled_list=str(tmp_path / "list.txt")))
    assert keys_of(data.labeled) == [A, B] and keys_of(data.unlabeled) == NAMES[2:]


def test_a_list_is_read_in_its_order_and_loaded_in_that_of_its_keys(tmp_path):
    (tmp_path / "list.txt").write_text(f"{NAMES[3]}\n{NAMES[0]}\n{NAMES[2]}\n")
    pattern = FACTS["camvid"]["key"]
    assert list(read_list(tmp_path / "list.txt", pattern)) == [NAMES[3], NAMES[0], NAMES[2]]
    root, one = camvid(tmp_path / "data"), dict(labeled_list=str(tmp_path / "list.txt"))
    data = load(flags(root, **one, unlabeled_list=str(tmp_path / "list.txt")))
    assert keys_of(data.labeled) == [NAMES[0], NAMES[2], NAMES[3]] == keys_of(data.unlabeled)
    assert keys_of(load(flags(root, **one)).unlabeled) == [NAMES[1], NAMES[4]]


def test_to_score_a_checkpoint_only_what_is_scored_must_be_there(tmp_path):
    root = camvid(tmp_path)
    shutil.rmtree(root / "train")
    data = load(flags(root, eval_only=True, eval_on="test"))
    assert (len(data.labeled), len(data.val), len(data.test)) == (0, 0, 1)
    shutil.rmtree(root / "test")
    load(flags(root, eval_only=True, eval_on="val"))
    line = refusal(load, flags(root, eval_only=True, eval_on="test"))
    assert line.startswith(f"{root}: no test of camvid here")


@pytest.mark.parametrize(
    "name, line, key, mask",
    [
        ("voc", "2007_000032", "2007_000032", None),
        (
            "voc",
            "/JPEGImages/2007_000032.jpg /x/2007_000039.png",
            "2007_000032",
            "x/2007_000039.png",
        ),
        ("voc_aug", "JPEGImages/2011_000068.jpg a/b.png", "2011_000068", "a/b.png"),
        ("cityscapes", "aachen/aachen_000000_000019_leftImg8bit.png", "aachen_000000_000019", None),
        (
            "cityscapes",
            "bad-honnef_000000_000465.png\t/x_gt.png",
            "bad-honnef_000000_000465",
            "x_gt.png",
        ),
        ("cityscapes", "train_extra/ulm/ulm_000001_000002_x.png None", "ulm_000001_000002", None),
        ("folder", "images/train/a b/c d.e.JPG\tmasks/x y.png", "a b/c d.e", "masks/x y.png"),
        ("folder", "train2017/000000177254.jpg None", "train2017/000000177254", None),
        ("folder", "images/trainer/a.webp", "images/trainer/a", None),
        ("camvid", "/SegNet/CamVid/train/0001TP_006690.png", "0001TP_006690", None),
    ],
)
def test_lines_of_the_released_lists_give_their_keys(tmp_path, name, line, key, mask):
    (tmp_path / "list.txt").write_text(line)
    first = re.split("\t" if "\t" in line else " ", line)[0].lstrip("/")
    assert read_list(tmp_path / "list.txt", FACTS[name]["key"]) == {key: (first, mask)}


def test_lists_that_cannot_be_used_are_refused_by_file_and_line(tmp_path):
    pattern, path = FACTS["camvid"]["key"], tmp_path / "list.txt"
    for text in ("", "\n \n\r\n"):
        path.write_text(text)
        assert refusal(read_list, path, pattern) == f"{path}: an empty list"
    path.write_text(f"{A}\n{B}\n\ntrain/{A}.png trainannot/{A}.png\n")
    line = refusal(read_list, path, pattern)
    assert f"{path}:4" in line and "twice" in line and A in line
    for wrong, key in (("what/is/this/", pattern), ("2007-000032", FACTS["voc"]["key"])):
        path.write_text(f"\n{wrong}\n")
        line = refusal(read_list, path, key)
        assert f"{path}:2: no image key" in line and wrong in line
    for more in (f"{B} a b", f"{B}\ta\tb", f"{B}\t\ta"):
        path.write_text(f"{A}\n{more}\n")
        line = refusal(read_list, path, pattern)
        assert f"{path}:2" in line and "more than two columns" in line and more in line
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert str(path) in refusal(read_list, path, pattern)
    assert "absent.txt" in refusal(read_list, tmp_path / "absent.txt", pattern)


@pytest.mark.parametrize("name", ["a/../b.png", "../b.png", "/../b.png", "a/.."])
def test_a_path_that_climbs_is_refused_by_file_and_line(tmp_path, name):
    for text in (f"{A}\n{name}\n", f"{A}\n{B}\t{name}\n", f"{A}\n{B} {name}"):
        (tmp_path / "list.txt").write_text(text)
        line = refusal(read_list, tmp_path / "list.txt", FACTS["camvid"]["key"])
        assert "list.txt:2: a path with .." in line and name in line
    (tmp_path / "list.txt").write_text("train/a..b.png train/..c.png")  # dots, no climbing
    rows = read_list(tmp_path / "list.txt", FACTS["camvid"]["key"])
    assert rows == {"a..b": ("train/a..b.png", "train/..c.png")}


@pytest.mark.parametrize("bad", ["a\0b.png", "x" * 300 + ".png", "loop/a.png", "loop"])
def test_a_name_that_no_file_can_have_is_refused_or_passed_over_but_never_a_crash(tmp_path, bad):
    root = camvid(tmp_path / "data")
    os.symlink("loop", root / "loop")
    (tmp_path / "first.txt").write_text(f"train/{bad}\n")
    line = refusal(load, flags(root, labeled_list=str(tmp_path / "first.txt")))
    assert "first.txt" in line
    (tmp_path / "second.txt").write_text(f"train/{A}.png\t{bad}\n")
    try:  # the mask is found by its key, or the line is refused
        data = load(flags(root, labeled_list=str(tmp_path / "second.txt")))
        assert data.labeled[0].label == root / f"trainannot/{A}.png"
    except Refusal as line:
        assert "second.txt" in str(line) and "\n" not in str(line)


def test_a_list_that_names_an_absent_image_is_refused_with_file_and_key(tmp_path):
    root, good, bad = camvid(tmp_path / "data"), tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(A)
    bad.write_text(f"{B}\n0099XX_000000\n")
    for lists in ((bad, ""), (good, bad)):
        names = dict(zip(("labeled_list", "unlabeled_list"), map(str, lists), strict=True))
        line = refusal(load, flags(root, **names))
        assert str(bad) in line and "0099XX_000000 has no image" in line
        assert all(f"train/0099XX_000000.{end}" in line for end in ("jpg", "png"))  # tried
    assert "--labeled-list" in refusal(load, flags(root, unlabeled_list=str(good)))


def test_a_list_of_generated_pictures_is_read_too(tmp_path):
    (tmp_path / "l.txt").write_text("train-00007\ntrain-00003\n")
    data = load(flags("", dataset="shapes", labeled_list=str(tmp_path / "l.txt")))
    assert keys_of(data.labeled) == ["train-00003", "train-00007"]
    assert len(data.unlabeled) == 318
    assert not set(keys_of(data.labeled)) & set(keys_of(data.unlabeled))
    assert (len(data.val), len(data.test)) == (64, 64)
    assert data.read(data.labeled[0], True)[1].tobytes() == shapes.draw("train-00003")[1].tobytes()
    assert data.read(data.unlabeled[0], False)[1] is None
    (tmp_path / "l.txt").write_text("val-00007\n")
    line = refusal(load, flags("", dataset="shapes", labeled_list=str(tmp_path / "l.txt")))
    assert "val-00007" in line


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
        assert len(labeled) == math.ceil(count / r)
        assert unlabeled == [k for k in ordered if k not in labeled]
        assert labeled == sorted(labeled) and len(set(labeled)) == len(labeled)
        assert before is None or set(labeled) <= before
        before = set(labeled)
    assert choose(shuffled(count), "all", seed) == (ordered, ordered)


def test_a_random_split_is_a_function_of_its_seed_alone():
    keys = shuffled(200)
    first = choose(keys, "1/8", 3)
    np.random.seed(1)
    assert choose(sorted(keys), "1/8", 3) == first
    others = [tuple(choose(keys, "1/8", seed)[0]) for seed in range(6)]
    assert len(set(others)) == 6 and tuple(sorted(keys)[::8]) not in others


@pytest.mark.parametrize(
    "split", ["1/0", "1/1", "1/6", "1/999", "2/4", "1/x", "1/-2", "1/2.0", "1/", "", "half", "183"]
)
def test_a_split_that_does_not_exist_is_refused_with_the_right_ones(tmp_path, split):
    line = refusal(load, flags(camvid(tmp_path), split=split))
    assert split in line and "all" in line and "1/r" in line and "5" in line
    assert choose(NAMES, "1/5", None)[0] == [NAMES[0]]


def test_a_set_is_named_by_a_hash_of_its_sorted_keys():
    by_hand = hashlib.sha1(b"a\nb\nc10\nc9").hexdigest()[:8]
    assert set_hash(["c9", "a", "c10", "b"]) == by_hand
    assert set_hash(dict.fromkeys(["c10", "b", "c9", "a"])) == by_hand
    assert set_hash(["a", "b"]) != by_hand
    assert set_hash([]) == "da39a3ee"  # sha1 of nothing


def test_counts_are_those_of_the_papers():
    def labels(name, splits):
        return [counts(name, split)[0] for split in splits]

    fractions = ("1/16", "1/8", "1/4", "1/2")
    assert labels("voc_aug", fractions) == [662, 1323, 2646, 5291]
    assert labels("cityscapes", fractions) == [186, 372, 744, 1488]
    classic = ("92", "183", "366", "732", "1464")
    assert labels("voc", classic) == [92, 183, 366, 732, 1464]
    assert counts("voc", "92") == (92, 10490) and counts("voc_aug", "1/2") == (5291, 5291)
    assert counts("cityscapes", "1/16") == (186, 2789)
    assert counts("cityscapes", "1/32") == (93, 2882) and counts("voc", "1464") == (1464, 9118)
    assert counts("cityscapes", "1/3") == (992, 1983)  # with --split-seed
    assert counts("voc", "all") == (10582, 10582) and counts("cityscapes", "all") == (2975, 2975)


def test_counts_of_what_is_unknown_are_zero():
    for name, split in (
        *(("cityscapes", split) for split in (None, "", "list", "1/0", "0", "x/2", "1/x", "-3")),
        *(("voc", split) for split in ("1/1", "1465", "10582")),
        *(("voc_aug", "10582"), ("cityscapes", "2975"), ("folder", "1/2"), ("folder", "all")),
        ("camvid", "1/8"),
        ("camvid", "all"),
        ("shapes", "1/16"),
    ):
        assert counts(name, split) == (0, 0), (name, split)


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
}


@pytest.mark.smoke
def test_the_published_splits_are_those_found_in_the_lists_of_the_projects():
    known = {}
    for name, entries in PUBLISHED.items():
        for words in map(str.split, entries.split(", ")):
            known[(*name.split(), words[0])] = (int(words[-2]), words[-1])
    for name, pool in (("voc", VOC), ("voc_aug", VOC), ("cityscapes", "- " + CITY)):
        _, train, val = pool.split()
        size = (2975, 500) if name == "cityscapes" else (10582, 1449)
        known[name, "parts", "train"], known[name, "parts", "val"] = (
            (size[0], train),
            (size[1], val),
        )
        assert counts(name, "all") == (size[0], size[0])
    found = {
        (name, family, split): (entry["images"], entry["set"])
        for name, families in SPLITS.items()
        for family, splits in families.items()
        for split, entry in splits.items()
    }
    if ("cityscapes", "cps", "1/32") not in found:
        del known["cityscapes", "cps", "1/32"]
    assert found == known
    for (name, family, split), (images, _) in found.items():
        if family != "parts" and (family[:3], split) != ("cac", "1/4"):
            assert counts(name, split)[0] == images, (name, family, split)  # CAC's: one fewer


needs_lists = pytest.mark.skipif(
    "SPLITS" not in os.environ, reason="SPLITS names no folder of lists"
)
LINE = {"voc": rb"\d{4}_\d{6}", "cityscapes": rb"[a-z-]+_\d{6}_\d{6}"}
BOTH = {  # a folder of UniMatch's lists: the entry that they equal
    **{f"pascal/{n}": ("voc", "u2pl", n) for n in ("92", "183", "366", "732", "1464")},
    **{f"pascal/1_{r}": ("voc_aug", "cps", f"1/{r}") for r in (4, 8, 16)},
    **{f"pascal/u2pl_1_{r}": ("voc_aug", "u2pl", f"1/{r}") for r in (4, 8, 16)},
    **{f"cityscapes/1_{r}": ("cityscapes", "cps", f"1/{r}") for r in (2, 4, 8, 16)},
    "cityscapes/1_30": ("cityscapes", "cac0", "1/30"),
}


@pytest.fixture(scope="module")
def released():
    """{path below the folder: (data set, its keys in order)} of all lists of the released codes."""
    root, lists = Path(os.environ["SPLITS"]), {}
    for path in sorted(root.rglob("*.txt")):
        name = "voc" if "pascal" in path.as_posix() else "cityscapes"
        rows = read_list(path, FACTS[name]["key"])
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
        assert list(rows) == [re.search(LINE[name], line)[0].decode() for line in lines], path
        for line, (image, mask) in zip(lines, rows.values(), strict=True):
            words = [word.lstrip(b"/").decode() for word in line.split()]
            assert [image, *([mask] if mask else [])] == words, path
        lists[path.relative_to(root).as_posix()] = (name, list(rows))
    return lists


@needs_lists
def test_every_released_list_has_the_count_and_the_hash_of_its_set(released):
    assert len(released) >= 94
    checked = 0
    for name, families in SPLITS.items():
        for family, splits in families.items():
            for split, entry in splits.items():
                folder = "u2pl" if "/U2PL/" in entry.get("url", "") else "cps"
                if "TorchSemiSeg" not in entry.get("url", "") and folder == "cps":
                    continue  # generated, or of a project without lists here
                ends = [p for p in released if p.startswith(folder)]
                path, *others = [p for p in ends if entry["url"].endswith(p[len(folder) :])]
                keys = released[path][1][:: entry.get("every", 1)]
                assert not others and len(keys) == entry["images"], path
                by_hand = hashlib.sha1("\n".join(sorted(keys)).encode()).hexdigest()[:8]
                assert by_hand == set_hash(keys) == entry["set"], (name, family, split)
                checked += 1
    assert checked >= 28
    for folder, (name, family, split) in BOTH.items():
        entry, (_, keys) = SPLITS[name][family][split], released[f"unimatch/{folder}/labeled.txt"]
        assert (len(keys), set_hash(keys)) == (entry["images"], entry["set"]), folder
    for path, (name, keys) in released.items():
        if Path(path).name in ("train_aug.txt", "val.txt"):
            part = "val" if path.endswith("val.txt") else "train"
            if not path.endswith("train_val.txt"):
                assert set_hash(keys) == SPLITS[name]["parts"][part]["set"], path


@needs_lists
def test_labelled_and_unlabelled_are_disjoint_and_together_all_training_images(released):
    pools = {"voc": "cps/pascal_voc/train_aug.txt", "cityscapes": "cps/city/config_new/train.txt"}
    pairs = 0
    for path, (name, keys) in released.items():
        file = Path(path).name
        other = path[: -len(file)] + file.replace("labeled", "unlabeled")
        if "labeled" not in file or "unlabeled" in file:
            continue
        labeled, unlabeled = set(keys), set(released[other][1])
        if "pseudoseg" in file:  # CPS's: the rest of the 1,464 alone, and one image twice
            assert len(labeled & unlabeled) == 1
            assert labeled | unlabeled == set(released["cps/pascal_voc/train.txt"][1])
        else:
            assert not labeled & unlabeled, path
            assert labeled | unlabeled == set(released[pools[name]][1]), path
        pairs += 1
    assert pairs >= 41


@needs_lists
def test_the_splits_of_cps_are_every_rth_image(released):
    ordered = sorted(released["cps/pascal_voc/train_aug.txt"][1])
    city = released["cps/city/config_new/train.txt"][1]  # in the order of the list
    for r in (2, 4, 8, 16):
        labeled, unlabeled = choose(reversed(ordered), f"1/{r}", None)
        assert labeled == ordered[::r]
        ends = [f"train_aug_{kind}_1-{r}.txt" for kind in ("labeled", "unlabeled")]
        shipped = [released[f"cps/pascal_voc/subset_train_aug/{end}"][1] for end in ends]
        assert shipped == [labeled, unlabeled]  # in the same order
        entry = SPLITS["voc_aug"]["cps"][f"1/{r}"]
        assert "url" not in entry  # generated, never fetched
        assert (entry["images"], entry["set"]) == (len(labeled), set_hash(labeled))
        assert released[f"cps/city/config_new/subset_train/{ends[0]}"][1] == city[::r]
    assert (len(city[::32]), set_hash(city[::32])) == (93, "cfcc853b")


@needs_lists
def test_the_families_share_as_few_images_as_chance_gives(released):
    def shared(name, splits):
        for split in splits:
            if name == "voc_aug":
                cps = "cps/pascal_voc/subset_train_aug/train_aug_labeled_1-{}.txt"
                u2pl = f"u2pl/pascal/{SPLITS[name]['u2pl'][f'1/{split}']['images']}/labeled.txt"
            else:
                cps = "cps/city/config_new/subset_train/train_aug_labeled_1-{}.txt"
                u2pl = f"u2pl/cityscapes/{SPLITS[name]['u2pl'][f'1/{split}']['images']}/labeled.txt"
            yield len({*released[cps.format(split)][1]} & {*released[u2pl][1]})

    assert list(shared("voc_aug", (16, 8, 4, 2))) == [43, 172, 666, 2690]
    assert list(shared("cityscapes", (16, 8, 4, 2))) == [8, 48, 182, 720]
    fine = set(released["cps/pascal_voc/train.txt"][1])
    for family, path, expected in (
        ("cps", "cps/pascal_voc/subset_train_aug/train_aug_labeled_1-16.txt", 93),
        ("u2pl", "u2pl/pascal/662/labeled.txt", 662),  # U2PL's are finely annotated, all of them
    ):
        assert len(fine & set(released[path][1])) == expected, family


# ---- what is refused ----


def test_a_missing_or_empty_folder_is_refused_by_name(tmp_path):
    absent = tmp_path / "absent"
    line = refusal(load, flags(absent))
    assert str(absent) in line and "--data-root" in line
    assert str(tmp_path) in refusal(load, flags(tmp_path))


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_labelled_image_without_a_mask_is_refused_before_anything_is_read(tmp_path, part):
    root = camvid(tmp_path)
    mask = next((root / f"{part}annot").iterdir())
    mask.unlink()
    line = refusal(load, flags(root))
    assert str(mask) in line and f"{mask.stem} has no mask" in line


def test_no_mask_of_an_unlabelled_image_is_opened_or_needed(tmp_path):
    root = camvid(tmp_path)
    masks = [root / "trainannot" / f"{NAMES[i]}.png" for i in (1, 3)]
    masks[0].unlink()
    masks[1].unlink()
    masks[1].mkdir()
    (tmp_path / "l.txt").write_text("\n".join(NAMES[::2]))
    (tmp_path / "u.txt").write_text("\n".join(NAMES[1::2]))
    one = dict(labeled_list=str(tmp_path / "l.txt"))
    for some in (dict(split="1/2"), one, one | dict(unlabeled_list=str(tmp_path / "u.txt"))):
        data = load(flags(root, **some))
        assert keys_of(data.unlabeled) == NAMES[1::2]
        assert [item.label for item in data.unlabeled] == [None, None]
        assert all(data.read(item, False)[1] is None for item in data.unlabeled)
    refusal(load, flags(root))  # labelled, they are


def test_an_image_to_train_on_is_in_neither_val_nor_test(tmp_path):
    root = camvid(tmp_path / "data")
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(A)
    for line, key in (
        ("val/v1.png\tvalannot/v1.png", "v1"),
        ("test/t0.png testannot/t0.png", "t0"),
    ):
        bad.write_text(line)
        for lists in ((bad, ""), (good, bad)):
            names = dict(zip(("labeled_list", "unlabeled_list"), map(str, lists), strict=True))
            line = refusal(load, flags(root, **names))
            assert "1 images" in line and key in line


def test_a_mask_that_vanishes_later_is_refused_when_it_is_read(tmp_path):
    data = load(flags(camvid(tmp_path)))
    data.labeled[0].label.unlink()
    assert str(data.labeled[0].label) in refusal(data.read, data.labeled[0], True)
    data.labeled[1].image.unlink()
    line = refusal(data.read, data.labeled[1], False)
    assert line == f"{data.labeled[1].image}: no such file"


@pytest.mark.smoke
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_a_photograph_cut_short_anywhere_is_refused_by_name(tmp_path, extension):
    data = load(flags(camvid(tmp_path, extension)))
    item, rng = data.labeled[0], np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(item.image)
    whole = item.image.read_bytes()
    assert data.read(item, False)[0].size == (120, 90)
    for part in (0.5, 0.0, 0.01, 0.9):
        item.image.write_bytes(whole[: int(len(whole) * part)])
        assert str(item.image) in refusal(data.read, item, False)
    item.image.write_text("a page that says the file has moved\n\n")
    assert str(item.image) in refusal(data.read, item, False)


def test_a_mask_cut_in_half_is_refused_by_name(tmp_path):
    values = np.random.default_rng(0).integers(0, 11, (90, 120), dtype=np.uint8)
    data, item = first_mask(camvid(tmp_path, size=(120, 90)), values)
    assert np.array_equal(np.asarray(data.read(item, True)[1]), values)
    whole = item.label.read_bytes()
    item.label.write_bytes(whole[: len(whole) // 2])
    assert str(item.label) in refusal(data.read, item, True)


def test_a_png_with_a_broken_chunk_is_refused_by_name(tmp_path):
    data = load(flags(camvid(tmp_path)))
    item, rng = data.labeled[0], np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(item.image)
    whole = item.image.read_bytes()
    place = whole.rindex(b"IDAT")
    assert whole.index(b"IDAT") < place  # the second part of the pixels
    item.image.write_bytes(whole[:place] + b"\0\1\2\3" + whole[place + 4 :])
    line = refusal(data.read, item, False)
    assert f"{item.image}: not readable as an image" in line


def test_an_image_too_large_to_be_one_is_refused_by_name(tmp_path, monkeypatch):
    data = load(flags(camvid(tmp_path)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # the images have 108
    line = refusal(data.read, data.labeled[0], False)
    assert f"{data.labeled[0].image}: not readable as an image" in line


@pytest.mark.parametrize("width, height", [(9, 12), (12, 8), (11, 9)])
def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path, width, height):
    data, item = first_mask(camvid(tmp_path), np.zeros((height, width), np.uint8))
    line = refusal(data.read, item, True)
    assert str(item.label) in line and str(item.image) in line
    assert f"{width}x{height} pixels" in line and "12x9" in line


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_a_mask_that_is_not_one_channel_of_eight_bits_is_refused_with_its_mode(tmp_path, mode):
    data, item = first_mask(camvid(tmp_path), Image.new(mode, (12, 9)))
    line = refusal(data.read, item, True)
    assert str(item.label) in line and "8-bit" in line and "mode" in line


@pytest.mark.smoke
@pytest.mark.parametrize("value", [12, 100, 254])
def test_a_value_outside_the_classes_is_refused_with_its_place(tmp_path, value):
    values = np.zeros((9, 12), np.uint8)
    values[6, 5] = values[7, 1] = value
    data, item = first_mask(camvid(tmp_path), values)
    line = refusal(data.read, item, True)
    assert str(item.label) in line and f"value {value} " in line
    assert "row 6, column 5" in line and "0 to 10" in line and "255" in line


# ---- masks and photographs as they come ----


def test_void_and_ignored_pixels_become_255(tmp_path):
    values = np.arange(12, dtype=np.uint8).repeat(9).reshape(12, 9).T.copy()  # a class per column
    values[0, 0] = 255
    data, item = first_mask(camvid(tmp_path), values)
    label = np.asarray(data.read(item, True)[1])
    for y in range(9):
        for x in range(12):
            expected = 255 if x == 11 or (y, x) == (0, 0) else x
            assert label[y, x] == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_the_index_of_a_palette_mask_is_the_class_whatever_its_colour(tmp_path, bits):
    values = np.random.default_rng(0).integers(0, 11, (9, 12), dtype=np.uint8)
    picture = Image.fromarray(values)
    picture.putpalette(np.random.default_rng(1).integers(0, 256, 3 * 2**bits).tolist())
    assert picture.mode == "P" and (np.asarray(picture.convert("L")) != values).mean() > 0.5
    data, item = first_mask(camvid(tmp_path), picture, bits=bits)
    with Image.open(item.label) as stored:
        assert stored.mode == "P"
        assert item.label.read_bytes()[24] == bits  # of a PNG's header
    label = data.read(item, True)[1]
    assert label.mode == "L" and np.array_equal(np.asarray(label), values)


@pytest.mark.parametrize("name, count", [("camvid", 11), ("folder", 2)])
def test_a_mask_of_one_bit_has_classes_0_and_1(tmp_path, name, count):
    camvid(tmp_path)
    if name == "folder":
        for old, new in (("train", "images/train"), ("trainannot", "masks/train")):
            for part in ("train", "val"):
                place = tmp_path / new.replace("train", part)
                place.parent.mkdir(exist_ok=True)
                (tmp_path / old.replace("train", part)).rename(place)
    data = load(flags(tmp_path, dataset=name, num_classes=2 if name == "folder" else 0))
    item = data.labeled[0]
    values = np.random.default_rng(0).integers(0, 2, (9, 12)) == 1
    Image.fromarray(values).save(item.label)
    with Image.open(item.label) as stored:
        assert stored.mode == "1"
    assert data.num_classes == count
    label = data.read(item, True)[1]
    assert label.mode == "L" and np.array_equal(np.asarray(label), values.astype(np.uint8))


def test_grey_transparent_and_palette_photographs_are_read_as_rgb(tmp_path):
    data = load(flags(camvid(tmp_path)))
    item = data.labeled[0]
    colours = Image.new("P", (12, 9), 3)
    colours.putpalette([0] * 9 + [5, 6, 7])
    for picture, expected in (
        (Image.new("L", (12, 9), 77), (77, 77, 77)),
        (Image.new("RGBA", (12, 9), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("LA", (12, 9), (78, 9)), (78, 78, 78)),
        (Image.new("1", (12, 9), 1), (255, 255, 255)),
        (colours, (5, 6, 7)),
    ):
        picture.save(item.image)
        image = data.read(item, True)[0]
        assert image.mode == "RGB" and image.size == (12, 9)
        assert image.getpixel((4, 4)) == expected


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_photograph_of_sixteen_bits_is_refused_and_not_read_as_white(tmp_path, dtype):
    data = load(flags(camvid(tmp_path)))
    item = data.labeled[0]
    Image.fromarray(np.full((9, 12), 20000, dtype)).save(item.image, "TIFF")
    line = refusal(data.read, item, True)
    assert str(item.image) in line and "mode " in line


# ---- the generated pictures ----


def content(key):
    image, label = shapes.draw(key)
    return image.tobytes() + label.tobytes()


@pytest.mark.smoke
def test_a_key_gives_the_same_picture_twice_and_in_another_process():
    keys = ["train-00000", "train-00319", "val-00005", "test-00063"]
    mine = [hashlib.sha1(content(k)).hexdigest() for k in keys]
    np.random.seed(4)
    assert [hashlib.sha1(content(k)).hexdigest() for k in reversed(keys)] == mine[::-1]
    code = (
        "import hashlib; from common import shapes\n"
        f"for key in {keys}:\n"
        "    image, label = shapes.draw(key)\n"
        "    print(hashlib.sha1(image.tobytes() + label.tobytes()).hexdigest())"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert done.stdout.decode().split() == mine


def test_parts_share_no_picture_and_every_picture_differs():
    parts = {part: [content(key) for key in shapes.keys(part)] for part in ("train", "val", "test")}
    assert [len(pictures) for pictures in parts.values()] == [320, 64, 64]
    assert len({picture for pictures in parts.values() for picture in pictures}) == 448


def test_every_value_is_a_class_and_all_seven_occur_in_every_part():
    for part in ("train", "val", "test"):
        pixels, pictures = [0] * 7, [0] * 7
        for key in shapes.keys(part):
            image, label = shapes.draw(key)
            assert image.mode == "RGB" and label.mode == "L"
            assert image.size == label.size == (shapes.SIZE, shapes.SIZE)
            tally = np.bincount(np.asarray(label).ravel(), minlength=7).tolist()
            assert len(tally) == 7, f"{key}: a value above 6"
            for c in range(7):
                pixels[c] += tally[c]
                pictures[c] += tally[c] > 0
        # six figures equally likely, two or three a picture: each in about a third of them
        assert all(n > 0.1 * len(shapes.keys(part)) for n in pictures), pictures
        assert pixels[0] == max(pixels) and min(pixels) > 0.01 * sum(pixels), pixels


def test_colour_tells_the_pair_and_not_the_two_of_a_pair():
    hues = {c: [] for c in range(1, 7)}
    for key in shapes.keys("train"):
        image, label = (np.asarray(picture) for picture in shapes.draw(key))
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
    seen, void = set(), 0
    for item in (*whole.labeled, *whole.val, *whole.test):
        with Image.open(item.image) as image, Image.open(item.label) as mask:
            assert image.size == mask.size == (480, 360)
            raw = np.asarray(mask)
        label = np.asarray(whole.read(item, True)[1])
        assert ((label < 11) | (label == 255)).all()
        assert np.array_equal(label == 255, raw == 11)
        assert np.array_equal(label[raw < 11], raw[raw < 11])
        seen |= set(np.flatnonzero(np.bincount(label.ravel())).tolist())
        void += int((label == 255).sum())
    assert seen == {*range(11), 255}
    assert 0.02 < void / (701 * 480 * 360) < 0.05  # 4 % of train, 1.7 % of val, 3.8 % of test
