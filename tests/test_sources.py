"""Which images there are: every known layout with every list, published splits, one's own folder.

Lists name files inside a tree and nothing outside of it; masks of unlabelled images are not needed.
"""

import os
import shutil

import numpy as np
import pytest

import trees
from common.data import SPLITS, Item
from common.sources import SUFFIXES, load
from trees import KEYS, LAYOUTS, NAMES, draw, entry, flags, folder, keys_of, listed, own, refusal


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch, tmp_path):
    """Each test runs in an empty folder, where published lists would be kept, without a network."""
    monkeypatch.setattr("urllib.request.OpenerDirector.open", None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def without_mask(items):
    return [item._replace(label=None) for item in items]


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_without_lists_and_with_any(layout, tmp_path, monkeypatch, capsys):
    name, image, masks, _ = LAYOUTS[layout]
    root, (train, val) = tmp_path / "tree", KEYS[name].values()
    files = draw(root, layout)

    def expected(key, part, column=None):
        """The Item by hand: a mask's column if there is such a file, else the preferred mask."""
        known = trees.words(key, part)
        names = [column, *(mask.format(**known) for mask in masks)]
        mask = next(name for name in names if name in files)
        return Item(key, root / image.format(**known), root / mask)

    for dataset in (name, "voc_aug") if name == "voc" else (name,):
        trees.publish_parts(monkeypatch, dataset)
        every = load(flags(root, dataset=dataset))
        assert every.labeled == [expected(key, "train") for key in train]
        assert every.unlabeled == without_mask(every.labeled) and every.test == []
        assert every.val == [expected(key, "val") for key in val]
    for pattern in trees.LINES[name].values():
        lists = {}
        for flag, some in (("labeled_list", train[1::-1]), ("unlabeled_list", train[:1:-1])):
            lines = [pattern.format(**trees.words(key)) for key in some]
            lists[flag] = listed(tmp_path / flag, *lines)
        data = load(flags(root, dataset=name, **lists))
        items = []
        for key in train:  # the order of a list does not matter
            _, *column = pattern.format(**trees.words(key)).split()
            items.append(expected(key, "train", column[0].lstrip("/") if column else None))
        assert data.labeled == items[:2] and data.unlabeled == without_mask(items[2:]), pattern
        for item in (*data.labeled, *every.labeled, *every.val):  # the pixels are its own
            image_, mask = data.read(item, True)
            n, value = [*train, *val].index(item.key), files[str(item.label.relative_to(root))]
            assert abs(image_.getpixel((3, 3))[0] - 30 * n) <= 4  # JPEG
            assert (np.asarray(mask) == value).all() and value % 6 == n
    assert "note: " not in capsys.readouterr().err  # no file is said to be of no use


def test_to_score_a_checkpoint_only_what_is_scored_must_be_there(tmp_path):
    root = trees.camvid(tmp_path)
    shutil.rmtree(root / "train")
    for part, number in (("test", 1), ("val", 2)):
        args = flags(root, eval_only=True, eval_on=part)
        data = load(args)
        assert len(getattr(data, part)) == len(data.val + data.test) == number
        assert data.labeled == data.unlabeled == []
        shutil.rmtree(root / part)
        assert refusal(load, args).startswith(f"{root}: no {part} of camvid here ({part}/*)")


ONE, OTHER = NAMES[:2]


def test_a_list_leads_to_its_files_and_to_none_outside(tmp_path):
    root, out = trees.camvid(tmp_path / "tree"), trees.camvid(tmp_path / "tree and more")
    for link, target in (("other", out), ("link", "other"), ("loop", "loop")):
        os.symlink(target, root / link)
    some, good = tmp_path / "some.txt", listed(tmp_path / "good.txt", OTHER)
    labeled = flags(root, labeled_list=str(some))
    unlabeled = flags(root, labeled_list=good, unlabeled_list=str(some))
    for line, mask in (
        (f"{out}/train/{ONE}.png\t{out}/trainannot/{ONE}.png", ONE),
        (f"link/train/{ONE}.png\tlink/trainannot/{ONE}.png", ONE),
        (f"train/{ONE}.png\tloop/{ONE}.png", ONE),
        (f"train/{ONE}.png trainannot/{OTHER}.png", OTHER),
    ):
        listed(some, line)
        item = Item(ONE, root / f"train/{ONE}.png", root / f"trainannot/{mask}.png")
        assert load(labeled).labeled == [item] and ONE not in keys_of(load(labeled).unlabeled)
        assert load(unlabeled).unlabeled == without_mask([item])
    for line, words in (
        ("99_0", f"tried {root}/99_0, {root}/train/99_0.jpg, {root}/train/99_0.png"),
        ("val/v1.png\tvalannot/v1.png", f"in val or test, {root}/val/v1.png first"),
    ):
        listed(some, line)
        assert words in refusal(load, labeled) and words in refusal(load, unlabeled)
    assert "give both" in refusal(load, flags(root, unlabeled_list=good))
    my = folder(tmp_path / "my")
    os.symlink(out, my / "link")
    listed(some, f"link/train/{ONE}.png")
    line = refusal(load, own(my, labeled_list=str(some)))
    assert "no image here; tried nothing: a link leads what its list names out of here" in line


def differs(found, true):
    """What the line says of keys that are not the published ones."""
    (n, found), (m, true) = (entry(keys).values() for keys in (found, true))
    return f"{n} images, set {found}, instead of {m}, set {true}"


PUBLISHED = [  # data set, a family of its splits, a layout
    ("voc_aug", "u2pl", "voc, CPS"),
    ("cityscapes", "u2pl", "cityscapes, CPS"),
    ("coco", "unimatch", "coco"),
]


@pytest.mark.parametrize("dataset, family, layout", PUBLISHED)
def test_a_split_is_its_published_list(dataset, family, layout, tmp_path, monkeypatch):
    root, keys = tmp_path / "tree", KEYS[dataset.removesuffix("_aug")]["train"]
    draw(root, layout)
    trees.publish_parts(monkeypatch, dataset)
    path = trees.publish(monkeypatch, dataset, family, "1/2", keys[1::2])
    published = {family: ("1/2", keys[1::2])}
    if dataset == "voc_aug":  # of the generated ones no list lies there
        monkeypatch.setitem(SPLITS[dataset]["cps"], "1/4", entry(keys[::4]))
        published["cps"] = ("1/4", keys[::4])
    for name, (split, chosen) in published.items():
        data = load(flags(root, dataset=dataset, split=split, split_family=name))
        assert keys_of(data.labeled) == chosen
        assert keys_of(data.unlabeled) == [key for key in keys if key not in chosen]
    listed(path, *keys[:2])
    line = refusal(load, flags(root, dataset=dataset, split="1/2", split_family=family))
    assert differs(keys[:2], keys[1::2]) in line
    # a list of one's own must be the set that its split names in its family
    trees.publish(monkeypatch, dataset, family, "1/4", keys[:2])
    one = dict(labeled_list=listed(tmp_path / "l.txt", *keys[1::2]), split_family=family)
    for split in ("1/2", "list", ""):
        data = load(flags(root, dataset=dataset, split=split, **one))
        assert (keys_of(data.labeled), keys_of(data.unlabeled)) == (keys[1::2], keys[::2])
    for split, what in (("1/4", entry(keys[:2])["set"]), ("1/20", "not 1;")):
        line = refusal(load, flags(root, dataset=dataset, split=split, **one))
        assert f"l.txt with --split {split}: 2 images" in line and what in line
    for path in [*root.rglob(f"*{keys[1]}*")]:
        path.unlink()
    line = refusal(load, flags(root, dataset=dataset))
    assert differs([keys[0], *keys[2:]], keys) in line
    # a seed, though it is zero, draws from what is there
    assert len(load(flags(root, dataset=dataset, split="1/3", split_seed=0)).labeled) == 1


@pytest.mark.smoke
def test_two_folders_are_a_data_set_with_sub_folders_spaces_and_any_suffix(tmp_path):
    ends = [".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"]
    assert sorted(SUFFIXES) == sorted(ends)
    names = ["B", "a", "deep/er/a", "deep/x.y", "deep/é (1)", "z.jpg", "{key}", "mask_png"]
    names += [f"k{i}" for i in range(6)]
    ends += [end.upper() for end in ends]
    root = tmp_path / "tree"
    os.symlink(folder(tmp_path / "disk", names, ends), root)
    for stray in ("notes.txt", "._a.jpg", "Thumbs.db", "deep/.DS_Store", ".hidden.png"):
        (root / "images/train" / stray).write_text("no image")
    data = load(own(root))
    assert keys_of(data.labeled) == sorted(names) and keys_of(data.test) == ["t0"]
    assert data.unlabeled == without_mask(data.labeled) and keys_of(data.val) == ["v0", "v1"]
    for item in data.labeled:
        i = names.index(item.key)
        assert item.image == root / f"images/train/{item.key}{ends[i]}"
        assert item.label == root / f"masks/train/{item.key}.png"
        image, _ = data.read(item, False)
        assert abs(image.getpixel((2, 2))[0] - 10 * (i + 1)) <= 6


def test_images_of_a_folder_without_a_mask_are_unlabelled_whatever_the_split(tmp_path):
    names = [f"k{i}" for i in range(10)]
    root, masked = folder(tmp_path, names), names[1::2]
    for name in names[::2]:
        (root / f"masks/train/{name}.png").unlink()
    (root / "masks/train/k0.png").mkdir()  # no file
    for split, labeled in (("all", masked), ("1/2", masked[::2])):
        data = load(own(root, split=split))
        assert keys_of(data.labeled) == labeled
        assert keys_of(data.unlabeled) == [n for n in names if split == "all" or n not in labeled]


def test_lists_name_images_by_a_path_or_by_a_bare_name_that_one_alone_has(tmp_path):
    strange = os.fsdecode(b"\xe9")
    root = folder(tmp_path, ["q", strange, "deep/b", "one/c", "two/c"])
    path = tmp_path / "l.txt"
    args = own(root, labeled_list=str(path))
    path.write_bytes(os.fsencode(f"b\n{root}/images/train/one/c.png\n{strange}"))
    data = load(args)
    assert keys_of(data.labeled) == ["deep/b", "one/c", strange]
    assert keys_of(data.unlabeled) == ["q", "two/c"] and data.hashes()["labeled"][0] == 3
    for text, words in (
        ("c", "c has no image"),
        ("b\ndeep/b", "twice"),
        (f"{strange}x", "\\udce9x has no image"),
        ("a;b", "not at ;"),
        ("q, deep/b", "not at ,"),
    ):
        path.write_bytes(os.fsencode(text))
        assert words in refusal(load, args)


def test_a_folders_own_lists_win_over_its_files(tmp_path):
    root = folder(tmp_path, ["a", "deep/b", "c,d", "q"], [".png", ".JPG"])
    trees.picture(root / "photos here/x 1.JPG", "RGB", 0)
    trees.picture(root / "labels/of x 1.png", "L", 0)
    lines = ["b", "c,d", "images/train/a.png", "images/train/q.JPG\tNone"]
    listed(root / "train.txt", *lines, "photos here/x 1.JPG\tlabels/of x 1.png")
    listed(root / "val.txt", "v1")
    (root / "masks/train/q.png").unlink()
    data = load(own(root))
    assert keys_of(data.labeled) == ["a", "c,d", "deep/b", "photos here/x 1"]
    assert data.labeled[2].image == root / "images/train/deep/b.JPG"
    assert data.labeled[3][1:] == (root / "photos here/x 1.JPG", root / "labels/of x 1.png")
    assert "q" in keys_of(data.unlabeled) and keys_of(data.val) == ["v1"]
    for line, words in (
        ("images/train/q.JPG\tNone", "no image to train on with a mask"),
        ("images/train/q.JPG typo/q.png", "q has no mask here"),  # a named mask must be there
    ):
        listed(root / "train.txt", line)
        assert words in refusal(load, own(root))
    for name, line in (("a.jpg", "a"), ("deep/b.png", "b")):  # each beside another of its key
        twin = trees.picture(root / "images/train" / name, "RGB", 0)
        listed(root / "train.txt", line, "c,d")
        key = name.partition(".")[0]
        assert f"another image has the key {key} too" in refusal(load, own(root))
        listed(root / "train.txt", f"images/train/{name}", "c,d")
        assert twin in [item.image for item in load(own(root)).labeled]


def test_voc_takes_any_ids_when_lists_say_so(tmp_path):
    root = tmp_path / "tree"
    for i, key in enumerate(["a", "b c", "d_2007", "e", "v", "w.x"]):
        trees.picture(root / f"JPEGImages/{key}.jpg", "RGB", (40 * i, 0, 0))
        trees.picture(root / f"SegmentationClass/{key}.png", "P", i)
    for part, keys in (("train", ["a", "b c\tNone", "d_2007", "e"]), ("val", ["v", "w.x"])):
        listed(root / f"ImageSets/Segmentation/{part}.txt", *keys)
    one = listed(tmp_path / "l.txt", "JPEGImages/d_2007.jpg", "a")
    two = listed(tmp_path / "u.txt", "JPEGImages/b c.jpg\tNone")
    for dataset, lists, rest in (("voc", "", ["b c", "e"]), ("voc_aug", two, ["b c"])):
        data = load(flags(root, dataset=dataset, labeled_list=one, unlabeled_list=lists))
        assert keys_of(data.labeled) == ["a", "d_2007"] and keys_of(data.unlabeled) == rest
        assert keys_of(data.val) == ["v", "w.x"]
    assert "no image key" in refusal(load, flags(root, dataset="voc"))
    (root / "ImageSets/Segmentation/train.txt").unlink()
    assert load(flags(root, dataset="voc", labeled_list=one)).unlabeled == []
    made = f"; python prepare_data.py voc --root {root} makes SegmentationClassAug"
    for file, told in (("SegmentationClass/a.png", True), ("JPEGImages/a.jpg", False)):
        (root / file).unlink()
        line = refusal(load, flags(root, dataset="voc", labeled_list=one))
        assert line.endswith(made) == told


def test_a_folder_that_is_not_right_is_refused_with_what_it_should_hold(tmp_path):
    root = folder(tmp_path, ["a", "one/a"])
    wrong = [(dict(num_classes=n), f"--num-classes {n}: how many") for n in (-1, 0, 1, 255)]
    wrong += [(dict(ignore_index=n), f"--ignore-index {n}: a value") for n in (-1, 256)]
    wrong.append((dict(ignore_index=2), "one of the classes 0 to 3"))
    for values in (dict(num_classes=19), dict(num_classes=0, ignore_index=0)):
        wrong.append((values | dict(dataset="cityscapes"), "with --dataset folder alone"))
    for changes, words in wrong:
        assert words in refusal(load, own(root, **changes))
    twin = trees.picture(root / "images/train/one/a.jpg", "RGB", 1)
    assert "another image has the key one/a too" in refusal(load, own(root))
    twin.unlink()
    for part in ("val", "train"):
        shutil.rmtree(root / f"images/{part}")  # val is asked for first
        line = refusal(load, own(root))
        assert line.startswith(f"{root}: no val of folder here") and "images/val" in line
    line = refusal(load, flags(dataset="voc_aug"))  # without a root the usual folder is taken
    assert line.startswith("data/voc: no such folder") and "--data-root" in line
