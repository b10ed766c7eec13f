"""Which images there are: every known layout with every list, published splits, one's own folder.

Lists name files inside a tree and nothing outside of it; masks of unlabelled images are not needed.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import trees
from common.data import SPLITS, Item
from common.sources import SUFFIXES, load
from trees import KEYS, LAYOUTS, NAMES, draw, entry, flags, folder, keys_of, listed, own, refusal

pytestmark = pytest.mark.usefixtures("empty_folder")
TREE, MY = Path("tree"), Path("my")
ONE, OTHER = NAMES[:2]


def without_mask(items):
    return [item._replace(label=None) for item in items]


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_without_lists_and_with_any(layout, monkeypatch, capsys):
    name, image, masks, _ = LAYOUTS[layout]
    train, val = KEYS[name].values()
    files = draw(TREE, layout)

    def expected(key, part="train", column=""):
        """The Item by hand: a mask's column if there is such a file, else the preferred mask."""
        known = trees.words(key, part)
        names = [column.lstrip("/"), *(mask.format(**known) for mask in masks)]
        mask = next(name for name in names if name in files)
        return Item(key, TREE / image.format(**known), TREE / mask)

    for dataset in (name, "voc_aug") if name == "voc" else (name,):
        trees.publish_parts(monkeypatch, dataset)
        every = load(flags(TREE, dataset=dataset))
        assert every.labeled == [expected(key) for key in train]
        assert every.unlabeled == without_mask(every.labeled) and every.test == []
        assert every.val == [expected(key, "val") for key in val]
    for pattern in trees.LINES[name].values():
        lines = [pattern.format(**trees.words(key)) for key in train]
        lists = dict(labeled_list=listed("l", *lines[1::-1]))  # its order does not matter
        lists |= dict(unlabeled_list=listed("u", *lines[:1:-1]))
        data = load(flags(TREE, dataset=name, **lists))
        columns = [line.split()[1:] for line in lines]
        items = [expected(key, "train", *rest) for key, rest in zip(train, columns, strict=True)]
        assert data.labeled == items[:2] and data.unlabeled == without_mask(items[2:]), pattern
        for item in (*data.labeled, *every.labeled, *every.val):  # the pixels are its own
            photo, mask = data.read(item, True)
            n, value = [*train, *val].index(item.key), files[str(item.label.relative_to(TREE))]
            assert abs(photo.getpixel((3, 3))[0] - 30 * n) <= 4  # JPEG
            assert (np.asarray(mask) == value).all() and value % 6 == n
    assert "note: " not in capsys.readouterr().err  # no file is said to be of no use


def test_to_score_a_checkpoint_only_what_is_scored_must_be_there():
    trees.camvid(TREE)
    shutil.rmtree(TREE / "train")
    for part, number in (("test", 1), ("val", 2)):
        args = flags(TREE, eval_only=True, eval_on=part)
        data = load(args)
        assert len(getattr(data, part)) == len(data.val + data.test) == number
        assert data.labeled == data.unlabeled == []
        shutil.rmtree(TREE / part)
        assert refusal(load, args).startswith(f"tree: no {part} of camvid here ({part}/*)")


def test_a_list_leads_to_its_files_and_to_none_outside():
    trees.camvid(TREE)
    out = trees.camvid(Path("tree and more").resolve())
    for link, target in (("tree/other", out), ("tree/link", "other"), ("tree/loop", "loop")):
        os.symlink(target, link)
    good = listed("good.txt", OTHER)
    labeled = flags(TREE, labeled_list="some.txt")
    unlabeled = flags(TREE, labeled_list=good, unlabeled_list="some.txt")
    for line, mask in (
        (f"{out}/train/{ONE}.png\t{out}/trainannot/{ONE}.png", ONE),
        (f"link/train/{ONE}.png\tlink/trainannot/{ONE}.png", ONE),
        (f"train/{ONE}.png\tloop/{ONE}.png", ONE),
        (f"train/{ONE}.png trainannot/{OTHER}.png", OTHER),
    ):
        listed("some.txt", line)
        item = Item(ONE, TREE / f"train/{ONE}.png", TREE / f"trainannot/{mask}.png")
        assert load(labeled).labeled == [item] and ONE not in keys_of(labeled)[1]
        assert load(unlabeled).unlabeled == without_mask([item])
    for line, words in (
        ("99_0", "tried tree/99_0, tree/train/99_0.jpg, tree/train/99_0.png"),
        ("val/v1.png\tvalannot/v1.png", "in val or test, tree/val/v1.png first"),
    ):
        listed("some.txt", line)
        assert words in refusal(load, labeled) and words in refusal(load, unlabeled)
    assert "give both" in refusal(load, flags(TREE, unlabeled_list=good))
    folder(MY)
    os.symlink(out, MY / "link")
    line = refusal(load, own(MY, labeled_list=listed("some.txt", f"link/train/{ONE}.png")))
    assert "no image here; tried nothing: a link leads what its list names out of here" in line


def test_a_split_is_its_published_list(monkeypatch):
    keys = KEYS["voc"]["train"]
    draw(TREE, "voc, CPS")
    trees.publish_parts(monkeypatch, "voc_aug")
    trees.publish(monkeypatch, "voc_aug", "u2pl", "1/4", keys[:2])
    path = trees.publish(monkeypatch, "voc_aug", "u2pl", "1/2", keys[1::2])
    monkeypatch.setitem(SPLITS["voc_aug"]["cps"], "1/4", entry(keys[::4]))  # no list lies there

    def given(split, family="u2pl", **more):
        return flags(TREE, dataset="voc_aug", split=split, split_family=family, **more)

    assert keys_of(given("1/2"))[:2] == [keys[1::2], keys[::2]]
    assert keys_of(given("1/4", "cps"))[:2] == [keys[:1], keys[1:]]
    listed(path, *keys[:2])
    sets = [entry(some)["set"] for some in (keys[:2], keys[1::2], keys[:1] + keys[2:], keys)]
    differ = "2 images, set {}, instead of 2, set {}; ".format(*sets[:2])
    assert differ in refusal(load, given("1/2"))
    # a list of one's own must be the set that its split names in its family
    one = listed("l.txt", *keys[1::2])
    for split in ("1/2", "list", ""):
        assert keys_of(given(split, labeled_list=one))[:2] == [keys[1::2], keys[::2]]
    for split, what in (("1/4", sets[0]), ("1/20", "not 1;")):
        line = refusal(load, given(split, labeled_list=one))
        assert f"l.txt with --split {split}: 2 images" in line and what in line
    for file in [*TREE.rglob(f"*{keys[1]}*")]:
        file.unlink()
    differ = "3 images, set {}, instead of 4, set {}; ".format(*sets[2:])
    assert differ in refusal(load, given("all"))
    assert "1/9 of voc_aug: u2pl has all, 1/" in refusal(load, given("1/9"))
    # a seed, though it is zero, draws from what is there
    assert len(load(given("1/3", split_seed=0)).labeled) == 1


@pytest.mark.smoke
def test_two_folders_are_a_data_set_with_sub_folders_spaces_and_any_suffix():
    ends = [".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"]
    assert sorted(SUFFIXES) == sorted(ends)
    names = ["B", "a", "deep/er/a", "deep/x.y", "deep/é (1)", "z.jpg", "{key}", "mask_png"]
    names += [f"k{i}" for i in range(6)]
    ends += [end.upper() for end in ends]
    os.symlink(folder(Path("disk"), names, ends), MY)
    for stray in ("notes.txt", "._a.jpg", "Thumbs.db", "deep/.DS_Store", ".hidden.png"):
        (MY / "images/train" / stray).write_text("no image")
    assert keys_of(own(MY)) == [sorted(names), sorted(names), ["v0", "v1"]]
    data = load(own(MY))
    assert data.unlabeled == without_mask(data.labeled) and data.test[0].key == "t0"
    for item in data.labeled:
        i = names.index(item.key)
        assert item.image == MY / f"images/train/{item.key}{ends[i]}"
        assert item.label == MY / f"masks/train/{item.key}.png"
        image, _ = data.read(item, False)
        assert abs(image.getpixel((2, 2))[0] - 10 * (i + 1)) <= 6
    for item in data.labeled[::2]:  # without a mask: unlabelled, whatever the split
        item.label.unlink()
    data.labeled[0].label.mkdir()  # no file
    masked = sorted(names)[1::2]
    assert keys_of(own(MY))[:2] == [masked, sorted(names)]
    rest = sorted({*names} - {*masked[::2]})
    assert keys_of(own(MY, split="1/2"))[:2] == [masked[::2], rest]


def test_lists_name_images_by_a_path_or_by_a_bare_name_that_one_alone_has():
    strange = os.fsdecode(b"\xe9")
    folder(MY, ["q", strange, "deep/b", "one/c", "two/c"])
    path = Path("l.txt").resolve()
    args = own(MY, labeled_list=str(path))
    path.write_bytes(os.fsencode(f"b\n{path.parent}/my/images/train/one/c.png\n{strange}"))
    assert keys_of(args)[:2] == [["deep/b", "one/c", strange], ["q", "two/c"]]
    assert load(args).hashes()["labeled"][0] == 3
    for text, words in (
        ("c", "c has no image"),
        ("b\ndeep/b", "twice"),
        (f"{strange}x", "\\udce9x has no image"),
        ("a;b", "not at ;"),
        ("q, deep/b", "not at ,"),
    ):
        path.write_bytes(os.fsencode(text))
        assert words in refusal(load, args)


def test_a_folders_own_lists_win_over_its_files():
    folder(MY, ["a", "deep/b", "c,d", "q"], [".png", ".JPG"])
    trees.picture(MY / "photos here/x 1.JPG", "RGB", 0)
    trees.picture(MY / "labels/of x 1.png", "L", 0)
    lines = ["b", "c,d", "images/train/a.png", "images/train/q.JPG\tNone"]
    listed("my/train.txt", *lines, "photos here/x 1.JPG\tlabels/of x 1.png")
    listed("my/val.txt", "v1")
    (MY / "masks/train/q.png").unlink()
    labeled = ["a", "c,d", "deep/b", "photos here/x 1"]
    assert keys_of(own(MY)) == [labeled, [*labeled, "q"], ["v1"]]
    items = load(own(MY)).labeled
    assert items[2].image == MY / "images/train/deep/b.JPG"
    assert items[3][1:] == (MY / "photos here/x 1.JPG", MY / "labels/of x 1.png")
    for line, words in (
        ("images/train/q.JPG\tNone", "no image to train on with a mask"),
        ("images/train/q.JPG typo/q.png", "q has no mask here"),  # a named mask must be there
    ):
        listed("my/train.txt", line)
        assert words in refusal(load, own(MY))
    for key, end, line in (("a", "jpg", "a"), ("deep/b", "png", "b")):  # beside another of its key
        twin = trees.picture(MY / f"images/train/{key}.{end}", "RGB", 0)
        listed("my/train.txt", line, "c,d")
        assert f"another image has the key {key} too" in refusal(load, own(MY))
        listed("my/train.txt", f"images/train/{key}.{end}", "c,d")
        assert twin in [item.image for item in load(own(MY)).labeled]


def test_voc_takes_any_ids_when_lists_say_so():
    for i, key in enumerate(["a", "b c", "d_2007", "e", "v", "w.x"]):
        trees.picture(TREE / f"JPEGImages/{key}.jpg", "RGB", (40 * i, 0, 0))
        trees.picture(TREE / f"SegmentationClass/{key}.png", "P", i)
    train = Path(listed("tree/ImageSets/Segmentation/train.txt", "a", "b c\tNone", "d_2007", "e"))
    listed(train.with_name("val.txt"), "v", "w.x")
    one = listed("l.txt", "JPEGImages/d_2007.jpg", "a")
    two = listed("u.txt", "JPEGImages/b c.jpg\tNone")
    for dataset, lists, rest in (("voc", "", ["b c", "e"]), ("voc_aug", two, ["b c"])):
        args = flags(TREE, dataset=dataset, labeled_list=one, unlabeled_list=lists)
        assert keys_of(args) == [["a", "d_2007"], rest, ["v", "w.x"]]
    assert "no image key" in refusal(load, flags(TREE, dataset="voc"))
    train.unlink()
    args = flags(TREE, dataset="voc", labeled_list=one)
    assert load(args).unlabeled == []
    made = "; python prepare_data.py voc --root tree makes SegmentationClassAug"
    for file, told in (("SegmentationClass/a.png", True), ("JPEGImages/a.jpg", False)):
        (TREE / file).unlink()
        assert refusal(load, args).endswith(made) == told


WRONG = [  # flags of a folder of four classes, words of the refusal
    *((dict(num_classes=n), f"--num-classes {n}: how many") for n in (-1, 0, 1, 255)),
    *((dict(ignore_index=n), f"--ignore-index {n}: a value") for n in (-1, 256)),
    (dict(ignore_index=2), "one of the classes 0 to 3"),
    (dict(dataset="cityscapes", num_classes=19), "with --dataset folder alone"),
    (dict(dataset="cityscapes", num_classes=0, ignore_index=0), "with --dataset folder alone"),
    (dict(dataset="voc_aug", data_root=""), "data/voc: no such folder; --data-root names"),
]


def test_a_folder_that_is_not_right_is_refused_with_what_it_should_hold():
    folder(MY, ["a", "one/a"])
    for changes, words in WRONG:
        assert words in refusal(load, own(MY, **changes))
    twin = trees.picture(MY / "images/train/one/a.jpg", "RGB", 1)
    assert "another image has the key one/a too" in refusal(load, own(MY))
    twin.unlink()
    for part in ("val", "train"):
        shutil.rmtree(MY / f"images/{part}")  # val is asked for first
        line = refusal(load, own(MY))
        assert line.startswith("my: no val of folder here") and "images/val" in line
