"""Lists, splits, layouts and masks as they come; what cannot be used is refused in one line."""

import colorsys
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import Refusal, shapes
from common.data import FACTS, Item, choose, counts, load, read_list, set_hash
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
    return SimpleNamespace(**values | dict(labeled_list="", unlabeled_list="") | changes)


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


# ---- layouts ----


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


def test_voc_is_read_from_its_lists_and_its_palette_masks(tmp_path):
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    keys = ["2007_000032", "2007_000039", "2011_003276", "2008_000008"]
    for i, key in enumerate(keys):
        Image.new("RGB", (7, 5), (50, 60, 70)).save(tmp_path / "JPEGImages" / f"{key}.jpg")
        if i != 1:  # the unlabelled image has no mask, and needs none
            mask = Image.new("P", (7, 5), 20 - i)
            mask.putpalette(list(range(255, -1, -1)) * 3)
            mask.save(tmp_path / f"SegmentationClassAug/{key}.png")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text(keys[3])
    (tmp_path / "l.txt").write_text(
        f"/JPEGImages/{keys[2]}.jpg /SegmentationClass/x.png\n{keys[0]}"
    )
    (tmp_path / "u.txt").write_text(f"JPEGImages/{keys[1]}.jpg\n")
    lists = dict(labeled_list=str(tmp_path / "l.txt"), unlabeled_list=str(tmp_path / "u.txt"))
    for name in ("voc", "voc_aug"):
        data = load(flags(tmp_path, dataset=name, **lists))
        assert keys_of(data.labeled) == [keys[2], keys[0]]
        assert keys_of(data.unlabeled) == [keys[1]] and keys_of(data.val) == [keys[3]]
        assert data.num_classes == 21
        assert (np.asarray(data.read(data.labeled[0], True)[1]) == 18).all()
        assert data.read(data.unlabeled[0], False)[1] is None
    assert "--labeled-list" in refusal(load, flags(tmp_path, dataset="voc", split="1/16"))


def test_cityscapes_is_read_in_its_official_tree_with_lists_of_every_kind(tmp_path):
    keys = ["jena_000078_000019", "hamburg_000000_080169", "ulm_000001_000019"]
    for key, part in zip(keys, ("train", "train", "val"), strict=True):
        for tree, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelTrainIds")):
            folder = tmp_path / tree / part / key.split("_")[0]
            folder.mkdir(parents=True)
            mode, colour = ("RGB", (1, 2, 3)) if tree == "leftImg8bit" else ("L", 18)
            Image.new(mode, (8, 4), colour).save(folder / f"{key}_{end}.png")
    lines = [
        f"/images/train/{keys[0]}.png\t/segmentation/train/{keys[0]}_gtFine.png",
        f"leftImg8bit/train/hamburg/{keys[1]}_leftImg8bit.png",
    ]
    (tmp_path / "l.txt").write_text("\n".join(lines))
    data = load(flags(tmp_path, dataset="cityscapes", labeled_list=str(tmp_path / "l.txt")))
    assert keys_of(data.labeled) == keys[:2] and data.unlabeled == []
    assert keys_of(data.val) == keys[2:] and data.num_classes == 19
    assert (np.asarray(data.read(data.labeled[0], True)[1]) == 18).all()
    halves = load(flags(tmp_path, dataset="cityscapes", split="1/2"))
    assert keys_of(halves.labeled) == [keys[1]] and keys_of(halves.unlabeled) == [keys[0]]


def test_images_gives_tensors_at_the_size_of_each_image(tmp_path):
    data = load(flags(camvid(tmp_path)))
    images = Images(data, data.labeled)
    image, label = images[3]
    assert len(images) == 5 and image.dtype == label.dtype == torch.uint8
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
}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_read_in_every_form(tmp_path, kind):
    root = camvid(tmp_path / "data")
    (tmp_path / "list.txt").write_bytes(LISTS[kind].encode())
    assert read_list(tmp_path / "list.txt", FACTS["camvid"]["key"]) == [A, B]
    data = load(flags(root, labeled_list=str(tmp_path / "list.txt")))
    assert keys_of(data.labeled) == [A, B] and keys_of(data.unlabeled) == NAMES[2:]


def test_the_order_of_a_list_is_kept(tmp_path):
    (tmp_path / "list.txt").write_text(f"{NAMES[3]}\n{NAMES[0]}\n{NAMES[2]}\n")
    assert read_list(tmp_path / "list.txt", "x{9}") == [NAMES[3], NAMES[0], NAMES[2]]


@pytest.mark.parametrize(
    "name, line, key",
    [
        ("voc", "2007_000032", "2007_000032"),
        ("voc", "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", "2007_000032"),
        ("voc_aug", "JPEGImages/2011_000068.jpg SegmentationClass/2011_000068.png", "2011_000068"),
        ("cityscapes", "aachen/aachen_000000_000019_leftImg8bit.png", "aachen_000000_000019"),
        ("cityscapes", "/images/train_extra/bad-honnef_000000_000465.png\t/x_gtCoarse.png", None),
        ("cityscapes", "leftImg8bit/train_extra/ulm/ulm_000001_000002_leftImg8bit.png None", None),
    ],
)
def test_lines_of_the_released_lists_give_their_keys(tmp_path, name, line, key):
    (tmp_path / "list.txt").write_text(line)
    key = key or ("bad-honnef_000000_000465" if "bad" in line else "ulm_000001_000002")
    assert read_list(tmp_path / "list.txt", FACTS[name]["key"]) == [key]


def test_lists_that_cannot_be_used_are_refused_by_file_and_line(tmp_path):
    pattern, path = FACTS["camvid"]["key"], tmp_path / "list.txt"
    for text in ("", "\n \n\r\n"):
        path.write_text(text)
        assert refusal(read_list, path, pattern) == f"{path}: an empty list"
    path.write_text(f"{A}\n{B}\n\ntrain/{A}.png trainannot/{A}.png\n")
    line = refusal(read_list, path, pattern)
    assert f"{path}:4" in line and "twice" in line and A in line
    path.write_text(f"{A}\nwhat/is/this?\n")
    line = refusal(read_list, path, pattern)
    assert f"{path}:2" in line and "what/is/this?" in line
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert str(path) in refusal(read_list, path, pattern)
    assert "absent.txt" in refusal(read_list, tmp_path / "absent.txt", pattern)


def test_a_list_that_names_an_absent_image_is_refused_with_file_and_key(tmp_path):
    root, good, bad = camvid(tmp_path / "data"), tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(A)
    bad.write_text(f"{B}\n0099XX_000000\n")
    for lists in ((bad, ""), (good, bad)):
        names = dict(zip(("labeled_list", "unlabeled_list"), map(str, lists), strict=True))
        line = refusal(load, flags(root, **names))
        assert str(bad) in line and "0099XX_000000" in line
    assert "--labeled-list" in refusal(load, flags(root, unlabeled_list=str(good)))


def test_a_list_of_generated_pictures_is_read_too(tmp_path):
    (tmp_path / "l.txt").write_text("train-00007\ntrain-00003\n")
    data = load(flags("", dataset="shapes", labeled_list=str(tmp_path / "l.txt")))
    assert keys_of(data.labeled) == ["train-00007", "train-00003"]
    assert len(data.unlabeled) == 318 and not set(data.labeled) & set(data.unlabeled)
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
    assert set_hash([Item(k) for k in ("c9", "a", "c10", "b")]) == by_hand
    assert set_hash([Item(k) for k in ("a", "b")]) != by_hand
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
    assert counts("voc", "all") == (10582, 10582) and counts("cityscapes", "all") == (2975, 2975)


def test_counts_of_what_is_unknown_are_zero():
    for name, split in (
        *(("cityscapes", split) for split in (None, "", "list", "1/0", "0", "x/2", "1/x", "-3")),
        ("camvid", "1/8"),
        ("camvid", "all"),
        ("shapes", "1/16"),
    ):
        assert counts(name, split) == (0, 0), (name, split)


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
    assert str(mask) in line and mask.stem in line and "missing" in line


def test_a_mask_that_vanishes_later_is_refused_when_it_is_read(tmp_path):
    data = load(flags(camvid(tmp_path)))
    data.labeled[0].label.unlink()
    assert str(data.labeled[0].label) in refusal(data.read, data.labeled[0], True)
    data.labeled[1].image.unlink()
    assert str(data.labeled[1].image) in refusal(data.read, data.labeled[1], False)


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


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path):
    data, item = first_mask(camvid(tmp_path), np.zeros((12, 9), np.uint8))  # turned by 90 degrees
    line = refusal(data.read, item, True)
    assert str(item.label) in line and str(item.image) in line
    assert "9x12" in line and "12x9" in line


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_a_mask_that_is_not_one_channel_of_eight_bits_is_refused_with_its_mode(tmp_path, mode):
    data, item = first_mask(camvid(tmp_path), Image.new(mode, (12, 9)))
    line = refusal(data.read, item, True)
    assert str(item.label) in line and "8-bit" in line and "mode" in line


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
    assert picture.mode == "P"
    data, item = first_mask(camvid(tmp_path), picture, bits=bits)
    with Image.open(item.label) as stored:
        assert stored.mode == "P"
    label = data.read(item, True)[1]
    assert label.mode == "L" and np.array_equal(np.asarray(label), values)


def test_grey_transparent_and_palette_photographs_are_read_as_rgb(tmp_path):
    data = load(flags(camvid(tmp_path)))
    item = data.labeled[0]
    colours = Image.new("P", (12, 9), 3)
    colours.putpalette([0] * 9 + [5, 6, 7])
    for picture, expected in (
        (Image.new("L", (12, 9), 77), (77, 77, 77)),
        (Image.new("RGBA", (12, 9), (1, 2, 3, 0)), (1, 2, 3)),
        (colours, (5, 6, 7)),
    ):
        picture.save(item.image)
        image = data.read(item, True)[0]
        assert image.mode == "RGB" and image.size == (12, 9)
        assert image.getpixel((4, 4)) == expected


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
