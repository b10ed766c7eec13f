"""Trees in every known layout, published splits, folders of one's own; lists stay inside a tree."""

import hashlib
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import flags, keys_of, refusal

import sources
from common.data import FACTS, SPLITS, Item
from sources import SUFFIXES, load

KEYS = {
    "voc": {
        "train": ["2007_000032", "2008_000008", "2009_003377", "2011_000068"],
        "val": ["2007_000033", "2011_003276"],
    },
    "cityscapes": {
        "train": ["aachen_000000_000019", "bad-honnef_000000_080169", "jena_000078_000019"]
        + ["ulm_000001_000019"],
        "val": ["frankfurt_000001_066574", "lindau_000000_000019"],
    },
}
FINE = ["2008_000008", "2011_000068", *KEYS["voc"]["val"]]  # VOC's own masks; the rest is SBD's
OFFICIAL = "leftImg8bit/{part}/{city}/{key}_leftImg8bit.png"
TRAIN_IDS, LABEL_IDS = (
    f"gtFine/{{part}}/{{city}}/{{key}}_gtFine_label{x}Ids.png" for x in ("Train", "")
)
AUG, OWN = "SegmentationClassAug/{key}.png", "SegmentationClass/{key}.png"
LAYOUTS = {  # data set, image, masks (the preferred first), where lists lie: train's, val's
    "voc, official": ("voc", "JPEGImages/{key}.jpg", [AUG, OWN], ["train_aug", "val"]),
    "voc, trainaug": ("voc", "JPEGImages/{key}.jpg", [AUG], ["trainaug", "val"]),
    "voc, no list of 10,582": ("voc", "JPEGImages/{key}.jpg", [AUG, OWN], ["", "val"]),
    "voc, one folder of masks": ("voc", "JPEGImages/{key}.jpg", [OWN + " all"], ["", ""]),
    "voc, VOCdevkit": (
        "voc",
        "VOCdevkit/VOC2012/JPEGImages/{key}.jpg",
        [f"VOCdevkit/VOC2012/{AUG}", f"VOCdevkit/VOC2012/{OWN}"],
        ["train_aug", "val"],
    ),
    "voc, CPS": ("voc", "{fold}/image/{key}.jpg", ["{fold}/label/{key}.png"], []),
    "voc, AEL": ("voc", "image/{key}.jpg", ["label/{key}.png"], []),
    "cityscapes, official": ("cityscapes", OFFICIAL, [TRAIN_IDS, LABEL_IDS], []),
    "cityscapes, label ids": ("cityscapes", OFFICIAL, [LABEL_IDS], []),
    "cityscapes, CPS": (
        "cityscapes",
        "images/{part}/{key}.png",
        ["segmentation/{part}/{key}_gtFine.png"],
        [],
    ),
    "cityscapes, PS-MT": (
        "cityscapes",
        "images/city_gt_fine/{part}/{key}_leftImg8bit.png",
        ["annotation/city_gt_fine/{part}/{key}_gtFine.png"],
        [],
    ),
}
LINES = {
    "voc": {
        "CPS, U2PL": "{key}",
        "UniMatch": "JPEGImages/{key}.jpg SegmentationClass/{key}.png",
        "CCT": "/JPEGImages/{key}.jpg /SegmentationClassAug/{key}.png",
        "PS-MT": "/JPEGImages/{key}.jpg /{mixed}/{key}.png",
        "tab": "train_aug/image/{key}.jpg\ttrain_aug/label/{key}.png",
        "None": "JPEGImages/{key}.jpg None",
    },
    "cityscapes": {
        "CPS": "/images/train/{key}.png\t/segmentation/train/{key}_gtFine.png",
        "U2PL": OFFICIAL,
        "UniMatch": f"{OFFICIAL} {TRAIN_IDS}",
        "CCT": f"/{OFFICIAL} /{TRAIN_IDS}",
        "label ids": f"{OFFICIAL} {LABEL_IDS}",
        "PS-MT": "/images/city_gt_fine/train/{key}_leftImg8bit.png "
        "/annotation/city_gt_fine/train/{key}_gtFine.png",
        "A-FPL": "{city}/{key}_leftImg8bit.png",
        "bare": "{key}",
        "None": OFFICIAL + " None",
    },
}
FORMS = {  # of a file, whatever its lines
    "plain": lambda lines: "".join(f"{line}\n" for line in lines),
    "no final newline": "\n".join,
    "CRLF": lambda lines: "".join(f"{line}\r\n" for line in lines),
    "BOM": lambda lines: "\ufeff" + "".join(f"{line}\n\n" for line in lines),
}
# id -> train id, as the data set's own scripts have it; every other id is ignored
PAIRS = "7:0 8:1 11:2 12:3 13:4 17:5 19:6 20:7 21:8 22:9 23:10 24:11 25:12 26:13 27:14 28:15 31:16"
TRAIN_ID = dict(map(int, pair.split(":")) for pair in f"{PAIRS} 32:17 33:18".split())
ID = {train_id: label_id for label_id, train_id in TRAIN_ID.items()}


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch, tmp_path):
    """Each test runs in an empty folder, where published lists would be kept, without a network."""

    def never(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", never)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def words(key, part="train"):
    mixed = "SegmentationClass" if key in FINE else "SegmentationClassAug"
    fold = {"train": "train_aug"}.get(part, part)
    return dict(key=key, part=part, fold=fold, city=key.split("_")[0], mixed=mixed)


def picture(path, mode, value, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L" if mode == "P" else mode, size, value)
    if mode == "P":
        image.putpalette(random.Random(value).randbytes(768))
    image.save(path)
    return path


def draw(root, layout):
    """Draws a tree. Returns {its files, relative: the class in it, if a mask}.

    Image n is n * 30 in red; its preferred mask is of class n, the next one of class n + 6.
    """
    name, image, masks, lists = LAYOUTS[layout]
    files = {}
    pairs = [(part, key) for part, keys in KEYS[name].items() for key in keys]
    for n, (part, key) in enumerate(pairs):
        picture(root / image.format(**words(key, part)), "RGB", (30 * n, 0, 0))
        files[image.format(**words(key, part))] = None
        for i, pattern in enumerate(masks):
            path, *every = pattern.format(**words(key, part)).split()
            if "SegmentationClass/" in path and key not in FINE and not every:
                continue
            value = ID[n + 6 * i] if path.endswith("_labelIds.png") else n + 6 * i
            picture(root / path, "P" if "SegmentationClass/" in path else "L", value)
            files[path] = n + 6 * i
    sets = root / image.split("JPEGImages")[0] / "ImageSets/Segmentation"
    for part, file in zip(KEYS[name], lists, strict=False):
        sets.mkdir(parents=True, exist_ok=True)
        if file:
            (sets / f"{file}.txt").write_text("\n".join(KEYS[name][part]))
    if lists:
        (sets / "train.txt").write_text(KEYS["voc"]["train"][1])  # VOC's own: not the 10,582
    return files


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    made = {}

    def tree(layout):
        if layout not in made:
            root = tmp_path_factory.mktemp("tree")
            made[layout] = root, draw(root, layout)
        return made[layout]

    return tree


def expected(root, files, layout, key, part, column=None):
    """The Item by hand: a mask's column if there is such a file, else the preferred mask."""
    _, image, masks, _ = LAYOUTS[layout]
    names = [column, *(mask.format(**words(key, part)).split()[0] for mask in masks)]
    mask = next(name for name in names if name in files)
    return Item(key, root / image.format(**words(key, part)), root / mask)


def entry(keys, **more):
    text = "\n".join(sorted(keys)).encode()
    return {"images": len(keys), "set": hashlib.sha1(text).hexdigest()[:8]} | more


def publish(monkeypatch, dataset, family, split, keys, text=None, path=""):
    """Makes keys a published set, and its list lie where fetched lists are kept."""
    new = entry(keys, url="https://example.org/list.txt")
    monkeypatch.setitem(SPLITS[dataset].setdefault(family, {}), split, new)
    from sources import LISTS

    path = LISTS / dataset / family / f"{split.replace('/', '_')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(keys) if text is None else text)
    return path


def publish_parts(monkeypatch, dataset):
    for part, keys in KEYS["voc" if "voc" in dataset else dataset].items():
        publish(monkeypatch, dataset, "parts", part, keys, "\n".join(keys[::-1]))


# ---- every layout with every list ----


@pytest.mark.parametrize(
    "layout, line",
    [(layout, line) for layout, (name, *_) in LAYOUTS.items() for line in LINES[name]],
)
def test_every_layout_is_read_with_the_lists_of_every_project(
    trees, tmp_path, monkeypatch, layout, line
):
    (root, files), name = trees(layout), LAYOUTS[layout][0]
    publish_parts(monkeypatch, name)
    keys, pattern = KEYS[name]["train"], LINES[name][line]
    chosen, rest = keys[1::-1], keys[:1:-1]  # in an order of their own
    for form, join in FORMS.items():
        for file, some in (("l.txt", chosen), ("u.txt", rest)):
            text = join([pattern.format(**words(key)) for key in some])
            (tmp_path / file).write_bytes(text.encode())
        lists = dict(labeled_list=str(tmp_path / "l.txt"), unlabeled_list=str(tmp_path / "u.txt"))
        data = load(flags(root, dataset=name, **lists))
        columns = [pattern.format(**words(key)).split()[1:] for key in sorted(chosen)]
        columns = [column[0].lstrip("/") if column else None for column in columns]
        both = zip(sorted(chosen), columns, strict=True)  # the order of a list does not matter
        labeled = [expected(root, files, layout, key, "train", column) for key, column in both]
        assert data.labeled == labeled, form
        assert [item[:2] for item in data.unlabeled] == [
            expected(root, files, layout, key, "train")[:2] for key in sorted(rest)
        ]
        assert all(item.label is None for item in data.unlabeled)
        assert data.test == []
    for item in data.labeled:  # the pixels are its own
        image, mask = data.read(item, True)
        n, value = keys.index(item.key), files[item.label.relative_to(root).as_posix()]
        assert abs(image.getpixel((3, 3))[0] - 30 * n) <= 4  # JPEG
        assert (np.asarray(mask) == value).all() and value % 6 == n


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_without_lists(trees, monkeypatch, layout):
    (root, files), name = trees(layout), LAYOUTS[layout][0]
    train, val = KEYS[name].values()
    for dataset in (name, "voc_aug") if name == "voc" else (name,):
        publish_parts(monkeypatch, dataset)
        every = load(flags(root, dataset=dataset))
        assert every.labeled == [expected(root, files, layout, key, "train") for key in train]
        assert keys_of(every.unlabeled) == train
        assert every.val == [expected(root, files, layout, key, "val") for key in val]
        for item in every.val:
            value = files[item.label.relative_to(root).as_posix()]
            assert (np.asarray(every.read(item, True)[1]) == value).all()
        half = load(flags(root, dataset=dataset, split="1/2", split_seed=3))
        assert len(half.labeled) == 2 and len(half.unlabeled) == 2
        assert sorted(keys_of(half.labeled + half.unlabeled)) == train


def test_without_a_root_the_usual_folder_is_taken():
    usual = {"voc": "data/voc", "voc_aug": "data/voc", "cityscapes": "data/cityscapes"}
    usual |= {"camvid": "data/camvid", "folder": "data/folder"}
    for name, place in usual.items():
        line = refusal(load, flags("", dataset=name, num_classes=2 * (name == "folder")))
        assert line.startswith(f"{place}: no such folder") and "--data-root" in line
    draw(Path("data/voc"), "voc, CPS")
    draw(Path("data/cityscapes"), "cityscapes, CPS")
    folder(Path("data/folder"))
    for name, place in list(usual.items())[:3]:
        data = load(flags("", dataset=name, split="1/4", split_seed=0))
        assert (len(data.labeled), len(data.unlabeled), len(data.val)) == (1, 3, 2)
        assert data.labeled[0].image.is_relative_to(place)
    assert len(load(own("")).labeled) == 4


def test_a_column_that_names_a_file_comes_before_what_the_layout_has(tmp_path):
    root = tmp_path / "tree"
    draw(root, "voc, official")
    other, fine = "2007_000032", "2008_000008"
    copy = picture(root / "copies/one.jpg", "RGB", (9, 9, 9))
    lines = [
        f"JPEGImages/{fine}.jpg SegmentationClass/{fine}.png",
        f"JPEGImages/{other}.jpg SegmentationClass/{other}.png",  # there is no such mask
        "copies/one.jpg SegmentationClassAug/2011_000068.png",
    ]
    (tmp_path / "l.txt").write_text("\n".join(lines[:2]))
    one = dict(dataset="voc", labeled_list=str(tmp_path / "l.txt"))
    masks = [item.label for item in load(flags(root, **one)).labeled]
    ends = (f"SegmentationClassAug/{other}.png", f"SegmentationClass/{fine}.png")
    assert masks == [root / end for end in ends]
    (tmp_path / "l.txt").write_text(f"{fine}\n{other}")
    masks = [item.label for item in load(flags(root, **one)).labeled]
    assert masks == [root / f"SegmentationClassAug/{key}.png" for key in (other, fine)]
    (tmp_path / "l.txt").write_text(lines[2])  # an image without a key
    assert "no image key" in refusal(load, flags(root, **one))
    copy.rename(root / f"copies/{other}.jpg")
    (tmp_path / "l.txt").write_text(f"copies/{other}.jpg\tSegmentationClass/{fine}.png")
    (item,) = load(flags(root, **one)).labeled
    assert item[1:] == (root / f"copies/{other}.jpg", root / f"SegmentationClass/{fine}.png")


def test_train_extra_is_unlabelled_with_its_none_and_coarse_masks_can_be_labels(tmp_path):
    extra = ["augsburg_000000_000000", "bad-honnef_000000_000465"]
    official, flat = tmp_path / "official", tmp_path / "flat"
    draw(official, "cityscapes, official")
    draw(flat, "cityscapes, CPS")
    for key in extra:
        city = key.split("_")[0]
        picture(official / f"leftImg8bit/train_extra/{city}/{key}_leftImg8bit.png", "RGB", 1)
        picture(flat / f"images/train_extra/{key}.png", "RGB", 1)
        picture(flat / f"segmentation/train_extra/{key}_gtCoarse.png", "L", 5)
    train = KEYS["cityscapes"]["train"]
    (tmp_path / "l.txt").write_text("\n".join(train[:2]))
    for line in (
        "leftImg8bit/train_extra/{city}/{key}_leftImg8bit.png None",
        "{key}",
        "/images/train_extra/{key}.png\t/segmentation/train_extra/{key}_gtCoarse.png",
    ):
        (tmp_path / "u.txt").write_text("\n".join(line.format(**words(key)) for key in extra))
        lists = dict(labeled_list=str(tmp_path / "l.txt"), unlabeled_list=str(tmp_path / "u.txt"))
        data = load(flags(official, dataset="cityscapes", **lists))
        assert keys_of(data.labeled) == train[:2] and keys_of(data.unlabeled) == extra
        for item in data.unlabeled:
            assert item.label is None and item.image.is_relative_to(
                official / "leftImg8bit/train_extra"
            )
    assert keys_of(load(flags(flat, dataset="cityscapes", **lists)).unlabeled) == extra
    (tmp_path / "l.txt").write_text((tmp_path / "u.txt").read_text())
    data = load(flags(flat, dataset="cityscapes", labeled_list=str(tmp_path / "l.txt")))
    assert keys_of(data.labeled) == extra and keys_of(data.unlabeled) == train
    assert (np.asarray(data.read(data.labeled[1], True)[1]) == 5).all()


# ---- the ids of Cityscapes ----


def one_mask(root, end, values):
    """Draws the official tree with values in its first mask; returns (Data, its Item)."""
    draw(root, "cityscapes, label ids" if end == "labelIds" else "cityscapes, official")
    data = load(flags(root, dataset="cityscapes", split="1/4", split_seed=0))
    (item,) = data.labeled
    values = np.asarray(values, np.uint8).reshape(5, -1)
    Image.new("RGB", values.shape[::-1]).save(item.image)
    Image.fromarray(values).save(item.label)
    return data, item


@pytest.mark.smoke
def test_every_label_id_becomes_its_train_id_and_the_others_are_ignored(tmp_path):
    values = [*range(34), 255]
    data, item = one_mask(tmp_path, "labelIds", values)
    assert item.label.name.endswith("_gtFine_labelIds.png")
    label = np.asarray(data.read(item, True)[1]).ravel().tolist()
    assert label == [TRAIN_ID.get(value, 255) for value in values]
    assert sorted(set(label)) == [*range(19), 255]
    for stranger in range(34, 255):
        Image.fromarray(np.array([values[:34] + [stranger]], np.uint8).reshape(5, 7)).save(
            item.label
        )
        line = refusal(data.read, item, True)
        assert f"value {stranger} at row 4, column 6" in line and "255 is ignored" in line


def test_train_ids_are_read_as_they_are_and_never_through_the_table(tmp_path):
    values = [*range(19), 255]
    data, item = one_mask(tmp_path, "labelTrainIds", values)
    assert item.label.name.endswith("_gtFine_labelTrainIds.png")
    assert np.asarray(data.read(item, True)[1]).ravel().tolist() == values
    for stranger in range(19, 255):
        Image.fromarray(np.array([[*range(19), stranger]], np.uint8).reshape(5, 4)).save(item.label)
        line = refusal(data.read, item, True)
        assert f"value {stranger} at row 4, column 3; classes are 0 to 18" in line


# ---- published splits ----


def all_splits():
    for name, families in SPLITS.items():
        for family, splits in families.items():
            if family != "parts":
                yield from ((name, family, split, value) for split, value in splits.items())


def many(monkeypatch, root, dataset, count=40):
    """Draws count training images, and makes them the published ones; returns their keys."""
    if dataset == "cityscapes":
        names = [
            "leftImg8bit/train/ulm/{}_leftImg8bit.png",
            "gtFine/train/ulm/{}_gtFine_labelIds.png",
        ]
        keys = [f"ulm_{i:06d}_000019" for i in range(count)]
        val = draw(root, "cityscapes, official") and KEYS["cityscapes"]["val"]
        for old in KEYS["cityscapes"]["train"]:
            (root / OFFICIAL.format(**words(old))).unlink()
    else:
        names = ["train_aug/image/{}.jpg", "train_aug/label/{}.png"]
        keys = [f"2009_{i:06d}" for i in range(count)]
        val = draw(root, "voc, CPS") and KEYS["voc"]["val"]
        for old in KEYS["voc"]["train"]:
            (root / f"train_aug/image/{old}.jpg").unlink()
    for key in keys:
        picture(root / names[0].format(key), "RGB", 1)
        picture(root / names[1].format(key), "L", 8)
    publish(monkeypatch, dataset, "parts", "train", keys)
    publish(monkeypatch, dataset, "parts", "val", val)
    return keys


@pytest.mark.parametrize("dataset", SPLITS)
def test_every_split_of_every_family_is_the_list_that_lies_there(tmp_path, monkeypatch, dataset):
    root, draws = tmp_path / "tree", random.Random(0)
    keys = many(monkeypatch, root, dataset)
    for name, family, split, value in list(all_splits()):
        if name != dataset:
            continue
        if "url" in value:
            chosen = draws.sample(keys, 7)
            lines = LINES["cityscapes" if dataset == "cityscapes" else "voc"]
            line = draws.choice(sorted(lines.values()))
            text = "\n".join(line.format(**words(key)) for key in chosen)
            publish(monkeypatch, dataset, family, split, chosen, text)
        else:
            chosen = keys[:: int(split.split("/")[1])]
            monkeypatch.setitem(SPLITS[dataset][family], split, entry(chosen))
        data = load(flags(root, dataset=dataset, split=split, split_family=family))
        assert keys_of(data.labeled) == sorted(chosen), (family, split)
        assert keys_of(data.unlabeled) == [key for key in keys if key not in chosen]
        more = SPLITS[dataset][family][split] | {"images": len(chosen) + 1}
        monkeypatch.setitem(SPLITS[dataset][family], split, more)
        line = refusal(load, flags(root, dataset=dataset, split=split, split_family=family))
        assert f"{len(chosen)} images" in line and f"instead of {len(chosen) + 1}" in line
        monkeypatch.setitem(SPLITS[dataset][family], split, value | {"set": "00000000"})
        line = refusal(load, flags(root, dataset=dataset, split=split, split_family=family))
        assert str(len(chosen)) in line and entry(chosen)["set"] in line and "00000000" in line
    for family in ("cps", "u2pl", "cac0", "cac1", "cac2"):
        data = load(flags(root, dataset=dataset, split_family=family))
        assert keys_of(data.labeled) == keys_of(data.unlabeled) == keys


def test_a_family_has_lists_of_its_own(tmp_path, monkeypatch):
    keys = many(monkeypatch, tmp_path / "tree", "voc")
    chosen = {"cps": keys[3:9], "u2pl": keys[20:26], "cac1": keys[30:]}
    for family, some in chosen.items():
        publish(monkeypatch, "voc", family, "92", some)
    for family, some in chosen.items():
        data = load(flags(tmp_path / "tree", dataset="voc", split="92", split_family=family))
        assert keys_of(data.labeled) == some


@pytest.mark.parametrize(
    "dataset, split", [("voc", "92"), ("voc_aug", "1/8"), ("cityscapes", "1/8")]
)
def test_what_differs_from_the_published_sets_is_refused_with_counts_and_hashes(
    tmp_path, monkeypatch, dataset, split
):
    root = tmp_path / "tree"
    keys = many(monkeypatch, root, dataset)
    path = publish(monkeypatch, dataset, "u2pl", split, keys[5:11])
    args = flags(root, dataset=dataset, split=split, split_family="u2pl")
    assert keys_of(load(args).labeled) == keys[5:11]
    for edited in (keys[5:10], keys[5:12], [*keys[5:10], keys[20]]):
        path.write_text("\n".join(edited))
        line = refusal(load, args)
        for there in (entry(edited), entry(keys[5:11])):
            assert f"{there['images']}" in line and there["set"] in line
    path.write_text("\n".join(keys[5:11]))
    load(args)

    val = KEYS["cityscapes" if dataset == "cityscapes" else "voc"]["val"]
    image = {
        ("cityscapes", "train"): root / f"leftImg8bit/train/ulm/{keys[30]}_leftImg8bit.png",
        ("cityscapes", "val"): root / OFFICIAL.format(**words(val[1], "val")),
        ("voc", "train"): root / f"train_aug/image/{keys[30]}.jpg",
        ("voc", "val"): root / f"val/image/{val[1]}.jpg",
    }
    for part, there in (("train", keys), ("val", val)):
        file = image[dataset.split("_")[0], part]
        left = [key for key in there if not file.name.startswith(key)]
        file.rename(tmp_path / "aside")
        for kind in ("u2pl", "all"):
            some = args if kind == "u2pl" else flags(root, dataset=dataset)
            line = refusal(load, some)
            assert f"{len(left)} images, set {entry(left)['set']}" in line
            assert f"instead of {len(there)}, set {entry(there)['set']}" in line
            assert "--labeled-list" in line and dataset in line
        assert len(load(flags(root, dataset=dataset, split="1/4", split_seed=0)).labeled) == 10
        (tmp_path / "aside").rename(file)
        load(args)
        more = picture(file.with_name(file.name.replace("_00", "_07", 1)), "RGB", 1)
        line = refusal(load, args)
        assert f"{len(there) + 1} images, set " in line
        assert f"instead of {len(there)}, set {entry(there)['set']}" in line
        more.unlink()
    load(args)


def test_a_listed_image_that_is_not_there_is_refused_by_name(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    draw(root, "voc, official")
    publish_parts(monkeypatch, "voc")
    (root / "JPEGImages/2009_003377.jpg").unlink()
    line = refusal(load, flags(root, dataset="voc"))
    assert f"{root}: 2009_003377 has no image" in line
    assert str(root / "JPEGImages/2009_003377.jpg") in line  # where it was looked for
    assert str(root / "VOCdevkit/VOC2012/JPEGImages/2009_003377.jpg") in line


@pytest.mark.parametrize(
    "dataset, family, split, known",
    [
        ("voc", "cps", "1/16", "all, 92, 183, 366, 732, 1464"),
        ("voc", "cac1", "183", "all, 92"),
        ("voc_aug", "u2pl", "662", "all, 1/16, 1/8, 1/4, 1/2"),
        ("voc_aug", "cac0", "1/2", "all, 1/16, 1/8, 1/4"),
        ("cityscapes", "u2pl", "1/32", "all, 1/16, 1/8, 1/4, 1/2"),
        ("cityscapes", "cac2", "", "all, 1/30, 1/8, 1/4"),
    ],
)
def test_an_unknown_split_is_refused_with_those_of_its_family(
    tmp_path, monkeypatch, dataset, family, split, known
):
    many(monkeypatch, tmp_path / "tree", dataset, 8)
    args = flags(tmp_path / "tree", dataset=dataset, split=split, split_family=family)
    line = refusal(load, args)
    assert f"--split {split} of {dataset}" in line and f"{family} has {known};" in line
    assert "--split-seed" in line and "--labeled-list" in line


def test_a_seed_draws_from_what_is_there_whatever_is_published(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    keys = many(monkeypatch, root, "voc_aug")
    draw_one = flags(root, dataset="voc_aug", split="1/8", split_seed=5)
    whole = load(draw_one)
    assert len(whole.labeled) == 5 and sorted(keys_of(whole.labeled)) == keys_of(whole.labeled)
    assert sorted(keys_of(whole.labeled + whole.unlabeled)) == keys
    assert keys_of(load(draw_one).labeled) == keys_of(whole.labeled) != keys[::8]
    draw_one.split_seed = 0  # a seed, though it is zero
    assert len(load(draw_one).labeled) == 5
    (root / f"train_aug/image/{keys[0]}.jpg").unlink()
    assert len(load(draw_one).labeled + load(draw_one).unlabeled) == 39
    assert len(load(flags(root, dataset="voc_aug", split_seed=0)).labeled) == 39  # of all


def test_a_list_must_be_the_set_that_its_split_names(tmp_path, monkeypatch):
    root, path = tmp_path / "tree", tmp_path / "l.txt"
    keys = many(monkeypatch, root, "voc_aug")
    for split, some in (("1/16", keys[3:6]), ("1/8", keys[3:8]), ("1/4", keys[:5])):
        monkeypatch.setitem(SPLITS["voc_aug"]["u2pl"], split, entry(some))
    one = dict(dataset="voc_aug", labeled_list=str(path), split_family="u2pl")
    path.write_text("\n".join(keys[3:8]))
    for split in ("1/8", "list", "all", "mine", "1/0", ""):  # the last ones say nothing
        data = load(flags(root, split=split, **one))
        assert keys_of(data.labeled) == keys[3:8]
        assert keys_of(data.unlabeled) == keys[:3] + keys[8:]
    for split, what in (("1/4", entry(keys[:5])["set"]), ("1/16", "3"), ("1/20", "2")):
        line = refusal(load, flags(root, split=split, **one))
        assert f"--split {split}: 5 images" in line and what in line and "leave --split" in line


def test_a_list_of_a_family_with_a_count_of_its_own_goes_with_its_split(tmp_path, monkeypatch):
    root, path = tmp_path / "tree", tmp_path / "l.txt"
    keys = many(monkeypatch, root, "voc_aug")
    monkeypatch.setitem(SPLITS["voc_aug"]["cac0"], "1/4", entry(keys[:9]))  # as 2645 of 10,582
    monkeypatch.setitem(SPLITS["voc_aug"]["cps"], "1/4", entry(keys[:10]))
    path.write_text("\n".join(keys[:9]))
    one = dict(dataset="voc_aug", labeled_list=str(path), split="1/4")
    assert keys_of(load(flags(root, split_family="cac0", **one)).labeled) == keys[:9]
    assert "instead of 10" in refusal(load, flags(root, split_family="cps", **one))


# ---- a folder of one's own ----


def folder(root, names=("a", "b", "c", "d"), ends=(".png",), masks=True, classes=4):
    """Draws images/{train,val,test} and masks/...; mask i is of class i modulo classes."""
    for part, keys in (("train", names), ("val", ["v 0", "v1"]), ("test", ["t0"])):
        for i, key in enumerate(keys):
            picture(root / f"images/{part}/{key}{ends[i % len(ends)]}", "RGB", (10 * i, 0, 0))
            if masks or part != "train":
                picture(root / f"masks/{part}/{key}.png", "L", i % classes)
    return root


def own(root, **changes):
    return flags(root, **dict(dataset="folder", num_classes=4) | changes)


@pytest.mark.smoke
def test_two_folders_are_a_data_set_with_sub_folders_spaces_and_any_suffix(tmp_path):
    names = ["B", "a", "a b", "deep/er/a", "deep/x.y", "deep/é (1)", "z.jpg", "{key}", "mask_png"]
    ends = [".JPG", ".jpeg", ".bmp", ".tif", ".webp", ".png", ".PNG", ".TIFF", ".jpg"]
    root = folder(tmp_path, names, ends)
    for stray in ("notes.txt", "._a.jpg", "Thumbs.db", "deep/.DS_Store", "x.json", ".hidden.png"):
        (root / "images/train" / stray).write_text("no image")
    data = load(own(root))
    assert keys_of(data.labeled) == sorted(names) == keys_of(data.unlabeled)
    assert keys_of(data.val) == ["v 0", "v1"] and keys_of(data.test) == ["t0"]
    for item in data.labeled:
        i = names.index(item.key)
        assert item.image == root / f"images/train/{item.key}{ends[i]}"
        assert item.label == root / f"masks/train/{item.key}.png"
        image, mask = data.read(item, True)
        assert abs(image.getpixel((2, 2))[0] - 10 * i) <= 6 and (np.asarray(mask) == i % 4).all()
    half = load(own(root, split="1/2"))
    assert keys_of(half.labeled) == sorted(names)[::2]
    assert keys_of(half.unlabeled) == sorted(names)[1::2]
    assert data.classes == ["class 0", "class 1", "class 2", "class 3"] and data.num_classes == 4


def test_every_suffix_of_a_photograph_is_known(tmp_path):
    ends = [".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"]
    ends += [end.upper() for end in ends]
    root = folder(tmp_path, [f"k{i:02d}" for i in range(len(ends))], ends)
    data = load(own(root))
    assert [item.image.suffix for item in data.labeled] == ends
    assert sorted(SUFFIXES) == sorted(ends[:7])
    assert all(data.read(item, True)[0].size == (8, 6) for item in data.labeled)


def test_two_images_of_one_name_are_refused_and_the_same_name_in_two_folders_is_not(tmp_path):
    root = folder(tmp_path, ["a", "one/a", "two/a"])
    assert keys_of(load(own(root)).labeled) == ["a", "one/a", "two/a"]
    picture(root / "images/train/one/a.jpg", "RGB", 1)
    line = refusal(load, own(root))
    assert "one/a.jpg" in line or "one/a.png" in line
    assert "the key one/a" in line


def test_images_without_a_mask_are_unlabelled_whatever_the_split(tmp_path):
    names = [f"k{i}" for i in range(10)]
    root = folder(tmp_path, names)
    for name in names[::2]:
        (root / f"masks/train/{name}.png").unlink()
    masked, bare = names[1::2], names[::2]
    data = load(own(root))
    assert keys_of(data.labeled) == masked and keys_of(data.unlabeled) == names
    assert all(item.label is None for item in data.unlabeled)
    data = load(own(root, split="1/2"))
    assert keys_of(data.labeled) == masked[::2]
    assert keys_of(data.unlabeled) == [name for name in names if name not in masked[::2]]
    data = load(own(root, split="1/5", split_seed=1))
    assert len(data.labeled) == 1 and keys_of(data.labeled)[0] in masked
    assert len(data.unlabeled) == 9 and all(item.label is None for item in data.unlabeled)
    assert "r from 2 to 5" in refusal(load, own(root, split="1/6"))
    (root / f"masks/train/{bare[0]}.png").mkdir()  # no file
    assert keys_of(load(own(root)).labeled) == masked
    (tmp_path / "l.txt").write_text(f"{bare[0]}\n{masked[0]}")
    line = refusal(load, own(root, labeled_list=str(tmp_path / "l.txt")))
    assert "l.txt" in line and f"{bare[0]} has no mask" in line
    (root / "masks/val/v1.png").unlink()
    assert "v1 has no mask" in refusal(load, own(root))


def test_lists_of_ones_own_name_images_and_masks_anywhere_in_the_folder(tmp_path):
    root = tmp_path / "tree"
    for i, name in enumerate(["x 1", "x2", "sub/x3", "x4"]):
        picture(root / f"photos here/{name}.JPG", "RGB", 10 * i)
        if i != 2:
            picture(root / f"labels/of {name}.png", "L", i)
    tab = "photos here/{0}.JPG\tlabels/of {0}.png\n"
    train = [tab.format("x 1"), "photos here/sub/x3.JPG\tNone\n", tab.format("x2")]
    (root / "train.txt").write_text("".join(train))
    (root / "val.txt").write_text(tab.format("x4"))
    data = load(own(root))
    keys = ["photos here/x 1", "photos here/x2"]
    assert keys_of(data.labeled) == keys
    assert keys_of(data.unlabeled) == sorted(["photos here/sub/x3", *keys])
    assert keys_of(data.val) == ["photos here/x4"] and data.test == []
    first = root / "photos here/x 1.JPG", root / "labels/of x 1.png"
    assert data.labeled[0][1:] == first
    for item, i in zip((*data.labeled, *data.val), (0, 1, 3), strict=True):
        assert (np.asarray(data.read(item, True)[1]) == i).all()
    assert keys_of(load(own(root, split="1/2")).labeled) == keys[:1]
    for line in ("photos here/x2\tNone", "photos here/x2.JPG\tNone", tab.format("x2")):
        (tmp_path / "l.txt").write_text(line)
        data = load(own(root, labeled_list=str(tmp_path / "l.txt")))
        found = root / "photos here/x2.JPG", root / "labels/of x2.png"
        assert data.labeled == [Item(keys[1], *found)]
    # a list wins over a folder of images, and lists without masks take masks/<part>/<key>.png
    folder(root, ["q"])
    assert keys_of(load(own(root)).labeled) == keys
    for part, key in (("train", "q"), ("val", "v1")):
        (root / f"{part}.txt").write_text(f"images/{part}/{key}.png")
    data = load(own(root))
    assert data.labeled == [Item("q", root / "images/train/q.png", root / "masks/train/q.png")]
    assert keys_of(data.val) == ["v1"]


def test_lists_of_a_folder_in_the_layout_may_be_bare_or_paths(tmp_path):
    root = folder(tmp_path / "tree", ["a", "one/a", "b c", "d"])
    for lines, keys in (
        (["one/a", "d"], ["one/a", "d"]),
        (["images/train/one/a.png", "/images/train/d.png"], ["one/a", "d"]),
        (["images/train/b c.png\tmasks/train/b c.png", "a\tNone"], ["b c", "a"]),
        (["images/train/a.png masks/train/d.png"], ["a"]),
    ):
        for form in FORMS.values():
            (tmp_path / "l.txt").write_bytes(form(lines).encode())
            data = load(own(root, labeled_list=str(tmp_path / "l.txt")))
            assert keys_of(data.labeled) == sorted(keys)
            others = [key for key in ("a", "b c", "d", "one/a") if key not in keys]
            assert keys_of(data.unlabeled) == others
    assert data.labeled[0].label == root / "masks/train/d.png"  # as the list has it


@pytest.mark.smoke
@pytest.mark.parametrize("count", [2, 4, 12, 81, 254])
def test_a_folder_has_as_many_classes_as_it_says(tmp_path, count):
    data = load(own(folder(tmp_path, classes=2), num_classes=count))
    assert data.num_classes == len(data.classes) == count
    assert data.classes == [f"class {i}" for i in range(count)]
    assert data.palette.shape == (count, 3) and data.palette.dtype == np.uint8
    assert len({tuple(colour) for colour in data.palette.tolist()}) == count
    known = FACTS["voc"]["palette"]
    assert data.palette[:21].tolist() == known[:count]
    for i, colour in enumerate(data.palette.tolist()):  # VOC's rule: bit by bit
        expected = [0, 0, 0]
        for bit in range(24):
            if i >> bit & 1:
                expected[bit % 3] |= 128 >> bit // 3
        assert colour == expected
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    item = data.labeled[0]
    Image.new("RGB", (16, 16)).save(item.image)
    good = np.where(values < count, values, 255).astype(np.uint8)
    Image.fromarray(good).save(item.label)
    assert np.array_equal(np.asarray(data.read(item, True)[1]), good)
    for stranger in range(count, 255):
        bad = good.copy()
        bad[5, 7] = bad[9, 1] = stranger
        Image.fromarray(bad).save(item.label)
        line = refusal(data.read, item, True)
        assert str(item.label) in line and f"value {stranger} at row 5, column 7" in line
        assert f"0 to {count - 1}" in line and "255 is ignored" in line


@pytest.mark.parametrize("count", [-1, 0, 1, 255, 256])
def test_a_number_of_classes_that_masks_cannot_have_is_refused(tmp_path, count):
    line = refusal(load, own(folder(tmp_path), num_classes=count))
    assert f"--num-classes {count}:" in line and "2 to 254" in line


def test_classes_and_ignored_values_are_for_folders_alone(tmp_path):
    draw(tmp_path, "cityscapes, official")
    for changes in (dict(num_classes=19), dict(ignore_index=0), dict(ignore_index=254)):
        for root, dataset in (("", "shapes"), (tmp_path, "cityscapes")):
            line = refusal(load, flags(root, dataset=dataset, **changes))
            assert "--num-classes" in line and "--ignore-index" in line and "folder" in line


@pytest.mark.parametrize("ignored", [0, 11, 255])
def test_the_ignored_value_is_255_inside_and_255_is_then_a_stranger(tmp_path, ignored):
    root = folder(tmp_path)
    data = load(own(root, num_classes=11, ignore_index=ignored))
    item = data.labeled[0]
    values = np.array([[*range(11), ignored]], np.uint8)
    Image.new("RGB", (12, 1)).save(item.image)
    Image.fromarray(values).save(item.label)
    label = np.asarray(data.read(item, True)[1]).ravel().tolist()
    assert label == [255 if value == ignored else value for value in values.ravel().tolist()]
    for stranger in {255, 11, 12} - {ignored}:
        Image.fromarray(np.array([[*range(11), stranger]], np.uint8)).save(item.label)
        line = refusal(data.read, item, True)
        assert f"value {stranger} at row 0, column 11" in line
        assert "0 to 10" in line and f"and {ignored} is ignored" in line


@pytest.mark.parametrize("ignored", [-1, 256, 1000])
def test_a_value_that_no_mask_can_hold_is_refused_as_the_ignored_one(tmp_path, ignored):
    line = refusal(load, own(folder(tmp_path), ignore_index=ignored))
    assert f"--ignore-index {ignored}" in line and "255" in line


def test_an_empty_folder_is_refused_with_what_it_should_hold(tmp_path):
    line = refusal(load, own(tmp_path))
    assert str(tmp_path) in line and "val.txt" in line and "images/val" in line
    for part in ("train", "val"):
        (tmp_path / f"images/{part}").mkdir(parents=True)
    assert str(tmp_path) in refusal(load, own(tmp_path))
    picture(tmp_path / "images/train/a.png", "RGB", 1)
    line = refusal(load, own(tmp_path))  # val is needed
    assert str(tmp_path) in line and "val.txt" in line and "images/val" in line


# ---- lists stay inside ----


def outside(tmp_path):
    """A VOC tree, and images of the same keys outside of it. Returns (tree, folder outside)."""
    root, out = tmp_path / "tree", tmp_path / "tree and more"
    draw(root, "voc, official")
    for key in KEYS["voc"]["train"]:
        picture(out / f"JPEGImages/{key}.jpg", "RGB", (255, 255, 255))
        picture(out / f"SegmentationClass/{key}.png", "L", 20)
    return root, out


@pytest.mark.parametrize("way", ["absolute", "link to a file", "link to a folder", "link of links"])
def test_a_list_leads_to_nothing_outside_the_folder(tmp_path, way):
    (root, out), key = outside(tmp_path), KEYS["voc"]["train"][0]
    image, mask = f"JPEGImages/{key}.jpg", f"SegmentationClass/{key}.png"
    if way == "absolute":
        names = [str(out / image), str(out / mask)]
    elif way == "link to a file":
        (root / "links").mkdir()
        names = [f"links/{key}.jpg", f"links/{key}.png"]
        for name, file in zip(names, (image, mask), strict=True):
            os.symlink(out / file, root / name)
    else:
        os.symlink(out, root / "links")
        os.symlink("links", root / "more")
        start = "more" if way == "link of links" else "links"
        names = [f"{start}/{image}", f"{start}/{mask}"]
    (tmp_path / "l.txt").write_text("\t".join(names))
    one = dict(dataset="voc", labeled_list=str(tmp_path / "l.txt"))
    if way != "absolute":
        assert (root / names[0]).is_file()  # it could be read
    data = load(flags(root, **one))
    assert data.labeled == [Item(key, root / image, root / f"SegmentationClassAug/{key}.png")]
    pixels, label = data.read(data.labeled[0], True)
    assert max(pixels.getpixel((2, 2))) < 100 and not (np.asarray(label) == 20).any()
    (root / image).unlink()  # without one of its own it is refused, not taken from there
    line = refusal(load, flags(root, **one))
    assert f"{key} has no image" in line
    assert all(path.startswith(f"{root}/") for path in line.split("tried ")[1].split(", "))
    picture(root / image, "RGB", 1)
    (root / f"SegmentationClassAug/{key}.png").unlink()
    assert f"{key} has no mask" in refusal(load, flags(root, **one))


def test_a_list_leads_to_nothing_outside_a_folder_of_ones_own(tmp_path):
    root, out = folder(tmp_path / "tree"), picture(tmp_path / "out/secret.png", "RGB", 1)
    picture(tmp_path / "out/secret_mask.png", "L", 1)
    os.symlink(out.parent, root / "links")
    (tmp_path / "good.txt").write_text("a")
    for line in ("links/secret.png\tlinks/secret_mask.png", f"{out}\tNone", "../out/secret.png"):
        (tmp_path / "bad.txt").write_text(line)
        for lists in (("bad.txt", ""), ("good.txt", "bad.txt")):
            paths = [str(tmp_path / name) if name else "" for name in lists]
            both = dict(zip(("labeled_list", "unlabeled_list"), paths, strict=True))
            assert "bad.txt" in refusal(load, own(root, **both))
    (tmp_path / "l.txt").write_text("images/train/a.png\tlinks/secret_mask.png")
    (item,) = load(own(root, labeled_list=str(tmp_path / "l.txt"))).labeled
    assert item.label == root / "masks/train/a.png"


def test_a_link_inside_the_folder_is_followed(tmp_path):
    (root, _), key = outside(tmp_path), KEYS["voc"]["train"][1]
    os.symlink("SegmentationClass", root / "masks")
    (tmp_path / "l.txt").write_text(f"JPEGImages/{key}.jpg masks/{key}.png")
    (item,) = load(flags(root, dataset="voc", labeled_list=str(tmp_path / "l.txt"))).labeled
    assert item.label == root / f"masks/{key}.png"


@pytest.mark.parametrize("what", ["root", "folders", "files"])
def test_the_folders_of_a_data_set_may_be_links_to_another_disk(tmp_path, what):
    disk, root, keys = tmp_path / "disk", tmp_path / "tree", KEYS["voc"]["train"]
    draw(disk, "voc, official")
    if what == "root":
        os.symlink(disk, root)
    for folder_ in () if what == "root" else sorted(disk.iterdir()):
        if what == "folders":
            root.mkdir(exist_ok=True)
            os.symlink(folder_, root / folder_.name)
            continue
        for file in (file for file in folder_.rglob("*") if file.is_file()):
            (root / file.relative_to(disk)).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file, root / file.relative_to(disk))
    for line in ("{key}", "JPEGImages/{key}.jpg /SegmentationClassAug/{key}.png"):
        (tmp_path / "l.txt").write_text("\n".join(line.format(key=key) for key in keys))
        data = load(flags(root, dataset="voc", labeled_list=str(tmp_path / "l.txt")))
        ends = (("JPEGImages", "jpg"), ("SegmentationClassAug", "png"))
        assert data.labeled == [
            Item(key, *(root / f"{place}/{key}.{end}" for place, end in ends)) for key in keys
        ]
        assert len(data.val) == 2
        assert all(data.read(item, True) for item in data.labeled)
    if what == "root":
        (tmp_path / "l.txt").write_text(f"JPEGImages/{FINE[0]}.jpg SegmentationClass/{FINE[0]}.png")
        data = load(flags(root, dataset="voc", labeled_list=str(tmp_path / "l.txt")))
        assert data.labeled[0].label == root / f"SegmentationClass/{FINE[0]}.png"


@pytest.mark.parametrize("lists", [False, True])
def test_the_folders_of_ones_own_data_may_be_links_to_another_disk(tmp_path, lists):
    disk, root = folder(tmp_path / "disk"), tmp_path / "tree"
    root.mkdir()
    for name in ("images", "masks"):
        os.symlink(disk / name, root / name)
    for part in ("train", "val") if lists else ():
        names = sorted(path.name for path in (disk / "images" / part).iterdir())
        text = "".join(f"images/{part}/{name}\tmasks/{part}/{name}\n" for name in names)
        (root / f"{part}.txt").write_text(text)
    if lists:  # what a list names is followed by links no more than anywhere else
        assert "a link leads what its list names" in refusal(load, own(root))
        return
    data = load(own(root))
    assert keys_of(data.labeled) == ["a", "b", "c", "d"] and keys_of(data.val) == ["v 0", "v1"]
    assert data.labeled[0][1:] == (root / "images/train/a.png", root / "masks/train/a.png")
    (tmp_path / "l.txt").write_text("images/train/b.png\tmasks/train/b.png\nd")
    data = load(own(root, labeled_list=str(tmp_path / "l.txt")))
    assert keys_of(data.labeled) == ["b", "d"] and keys_of(data.unlabeled) == ["a", "c"]


def grey_png(path, values, bits):
    """Writes an 8-bit-less grey PNG by hand, which PIL cannot: values (H, W), bits 1, 2, 4 or 8."""
    values = np.asarray(values, np.uint8)
    planes = np.unpackbits(values[..., None], 2)[..., 8 - bits :].reshape(len(values), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in planes)
    head = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, 0, 0, 0, 0)
    text = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        text += struct.pack(">I", len(data)) + kind + data
        text += struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(text)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_grey_mask_of_two_or_four_bits_is_refused_and_never_rescaled(tmp_path, bits):
    root = folder(tmp_path)
    values = np.arange(48).reshape(6, 8) % 2
    grey_png(root / "masks/train/a.png", values, bits)
    data = load(own(root, num_classes=81))
    if bits in (2, 4):
        assert "2 or 4 bits" in refusal(data.read, data.labeled[0], True)
    else:
        assert (np.asarray(data.read(data.labeled[0], True)[1]) == values).all()
    grey_png(root / "images/train/a.png", values, bits)  # a photograph is rescaled, as it should be
    image, _ = data.read(data.unlabeled[0], False)
    assert image.getpixel((1, 0)) == (255 // (2**bits - 1),) * 3


def test_the_order_of_a_list_does_not_change_the_data(tmp_path):
    root, lists = folder(tmp_path / "tree"), []
    for i, keys in enumerate((["d", "a", "c"], ["a", "c", "d"])):
        (tmp_path / f"{i}.txt").write_text("\n".join(keys))
        lists.append(load(own(root, labeled_list=str(tmp_path / f"{i}.txt"))))
    assert lists[0].labeled == lists[1].labeled and lists[0].unlabeled == lists[1].unlabeled
    assert keys_of(lists[0].labeled) == ["a", "c", "d"]


def test_cityscapes_lists_of_test_and_coarse_images_are_read_in_the_official_tree(tmp_path):
    root = tmp_path / "tree"
    draw(root, "cityscapes, official")
    for part, key in (("test", "berlin_000354_000019"), ("train_extra", "ulm_000001_000002")):
        place = f"{part}/{key.split('_')[0]}/{key}"
        picture(root / f"leftImg8bit/{place}_leftImg8bit.png", "RGB", 1)
    picture(root / "gtCoarse/train_extra/ulm/ulm_000001_000002_gtCoarse_labelIds.png", "L", 26)
    extra = "ulm_000001_000002"
    (tmp_path / "l.txt").write_text(
        f"/images/train_extra/{extra}.png\t/segmentation/train_extra/{extra}_gtCoarse.png"
    )
    test = "berlin_000354_000019"
    (tmp_path / "u.txt").write_text(
        f"/images/test/{test}.png\t/segmentation/test/{test}_gtFine.png"
    )
    lists = dict(labeled_list=str(tmp_path / "l.txt"), unlabeled_list=str(tmp_path / "u.txt"))
    data = load(flags(root, dataset="cityscapes", **lists))
    assert keys_of(data.labeled) == [extra] and keys_of(data.unlabeled) == [test]
    assert (np.asarray(data.read(data.labeled[0], True)[1]) == 13).all()  # car


def test_missing_masks_of_voc_say_how_they_are_made(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    draw(root, "voc, official")
    publish_parts(monkeypatch, "voc")
    for path in (root / "SegmentationClassAug").iterdir():
        path.unlink()
    line = refusal(load, flags(root, dataset="voc"))
    assert "python prepare_data.py voc" in line
    tried = line.partition("tried ")[2].split(";")[0].split(", ")
    assert len(tried) == len(set(tried))


def test_a_folder_for_lists_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    keys = KEYS["voc"]["train"]
    raw = tmp_path / "raw.txt"
    raw.write_text("\n".join(keys))
    monkeypatch.setattr(sources, "SCHEMES", ("file",))
    monkeypatch.setitem(SPLITS["voc"]["u2pl"], "92", entry(keys, url=raw.as_uri()))
    Path("data").write_text("a file where the folder should be")
    line = refusal(sources.fetch_list, "voc", "u2pl", "92")
    assert "python prepare_data.py splits --family u2pl" in line


def test_a_mask_that_a_list_of_ones_own_names_must_be_there(tmp_path):
    root = folder(tmp_path)
    lines = ["images/train/a.png masks/train/a.png", "images/train/b.png typo/b.png"]
    (root / "train.txt").write_text("\n".join(lines))
    (root / "masks/train/b.png").unlink()
    assert "b has no mask here" in refusal(load, own(root))
    (root / "train.txt").write_text("\n".join([lines[0], "images/train/b.png"]))
    assert keys_of(load(own(root)).labeled) == ["a"]


def test_what_lies_in_hidden_folders_is_no_image(tmp_path):
    root = folder(tmp_path)
    picture(root / "images/train/.ipynb_checkpoints/a-checkpoint.png", "RGB", 1)
    assert keys_of(load(own(root)).unlabeled) == ["a", "b", "c", "d"]
