"""Which images there are: every known layout with every list, published splits, one's own folder.

Lists name files inside a tree and nothing outside of it; masks of unlabelled images are not needed.
"""

import importlib
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
import trees
from benchmarks.runs import log
from common.data import SPLITS, Item
from sources import SUFFIXES, load
from trees import KEYS, LAYOUTS, NAMES, draw, entry, flags, folder, keys_of, listed, own, refusal

FORMS = {  # of a file, whatever its lines
    "plain": lambda lines: "".join(f"{line}\n" for line in lines),
    "no final newline": "\n".join,
    "CRLF": lambda lines: "".join(f"{line}\r\n" for line in lines),
    "BOM": lambda lines: "\ufeff" + "".join(f"{line}\n\n" for line in lines),
}


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch, tmp_path):
    """Each test runs in an empty folder, where published lists would be kept, without a network."""

    def never(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", never)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# ---- every layout with every list ----


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Returns a function: a layout's root and files, drawn once."""
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
    names = [column, *(mask.format(**trees.words(key, part)).split()[0] for mask in masks)]
    mask = next(name for name in names if name in files)
    return Item(key, root / image.format(**trees.words(key, part)), root / mask)


def without_mask(items):
    return [item._replace(label=None) for item in items]


PAIRS = [(layout, line) for layout, row in LAYOUTS.items() for line in trees.LINES[row[0]]]


@pytest.mark.parametrize("layout, line", PAIRS)
def test_every_layout_is_read_with_the_lists_of_every_project(
    drawn, tmp_path, monkeypatch, layout, line
):
    (root, files), name = drawn(layout), LAYOUTS[layout][0]
    trees.publish_parts(monkeypatch, name)
    keys, pattern = KEYS[name]["train"], trees.LINES[name][line]
    for form, join in FORMS.items():
        lists = {}
        for flag, some in (("labeled_list", keys[1::-1]), ("unlabeled_list", keys[:1:-1])):
            text = join([pattern.format(**trees.words(key)) for key in some])
            lists[flag] = str(tmp_path / flag)
            Path(lists[flag]).write_bytes(text.encode())
        data = load(flags(root, dataset=name, **lists))
        items = []
        for key in keys:  # the order of a list does not matter
            _, *column = pattern.format(**trees.words(key)).split()
            column = column[0].lstrip("/") if column else None
            items.append(expected(root, files, layout, key, "train", column))
        assert data.labeled == items[:2] and data.unlabeled == without_mask(items[2:]), form
        assert keys_of(data.val) == KEYS[name]["val"] and data.test == []
    for item in data.labeled:  # the pixels are its own
        image, mask = data.read(item, True)
        n, value = keys.index(item.key), files[item.label.relative_to(root).as_posix()]
        assert abs(image.getpixel((3, 3))[0] - 30 * n) <= 4  # JPEG
        assert (np.asarray(mask) == value).all() and value % 6 == n


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_without_lists(drawn, monkeypatch, layout):
    (root, files), name = drawn(layout), LAYOUTS[layout][0]
    train, val = KEYS[name].values()
    for dataset in (name, "voc_aug") if name == "voc" else (name,):
        trees.publish_parts(monkeypatch, dataset)
        every = load(flags(root, dataset=dataset))
        assert every.labeled == [expected(root, files, layout, key, "train") for key in train]
        assert every.unlabeled == without_mask(every.labeled)
        assert every.val == [expected(root, files, layout, key, "val") for key in val]
        for item in every.val:
            value = files[item.label.relative_to(root).as_posix()]
            assert (np.asarray(every.read(item, True)[1]) == value).all()
        half = load(flags(root, dataset=dataset, split="1/2", split_seed=3))
        assert len(half.labeled) == 2 and sorted(keys_of(half.labeled + half.unlabeled)) == train


@pytest.mark.smoke
@pytest.mark.parametrize("end", ["jpg", "png"])
def test_camvid_is_read_with_jpg_and_with_png_photographs(tmp_path, end):
    root = trees.camvid(tmp_path, end=end)
    data = load(flags(root, split="1/2"))
    assert keys_of(data.labeled) == NAMES[::2] and keys_of(data.unlabeled) == NAMES[1::2]
    assert keys_of(data.val) == ["v0", "v1"] and keys_of(data.test) == ["t0"]
    for i, item in zip((0, 2, 4), data.labeled, strict=True):
        assert item[1:] == (root / f"train/{item.key}.{end}", root / f"trainannot/{item.key}.png")
        image, label = data.read(item, True)
        assert image.mode == "RGB" and label.mode == "L" and image.size == label.size == (12, 9)
        colour = np.asarray(image)[0, 0].astype(int)
        assert np.abs(colour - [10 * (i + 1), 30, 40]).max() <= 4  # JPEG
        assert (np.asarray(label) == i).all()


def test_without_a_root_the_usual_folder_is_taken():
    for name in ("voc", "voc_aug", "cityscapes", "camvid", "folder"):
        place = "data/" + name.removesuffix("_aug")
        line = refusal(load, flags(dataset=name, num_classes=2 * (name == "folder")))
        assert line.startswith(f"{place}: no such folder") and "--data-root" in line
    draw(Path("data/voc"), "voc, CPS")
    draw(Path("data/cityscapes"), "cityscapes, CPS")
    folder(Path("data/folder"))
    for name in ("voc", "voc_aug", "cityscapes"):
        data = load(flags(dataset=name, split="1/4", split_seed=0))
        assert (len(data.labeled), len(data.unlabeled), len(data.val)) == (1, 3, 2)
        assert data.labeled[0].image.is_relative_to(f"data/{name.removesuffix('_aug')}")
    assert len(load(own("")).labeled) == 4


def test_to_score_a_checkpoint_only_what_is_scored_must_be_there(tmp_path):
    root = trees.camvid(tmp_path)
    shutil.rmtree(root / "train")
    data = load(flags(root, eval_only=True, eval_on="test"))
    assert (data.labeled, data.unlabeled, data.val, len(data.test)) == ([], [], [], 1)
    shutil.rmtree(root / "test")
    data = load(flags(root, eval_only=True, eval_on="val"))
    assert (data.labeled, data.unlabeled, len(data.val), data.test) == ([], [], 2, [])
    line = refusal(load, flags(root, eval_only=True, eval_on="test"))
    assert line.startswith(f"{root}: no test of camvid here (test/*)")


# ---- what lists lead to, and what they do not ----

W = dict(J="JPEGImages", S="SegmentationClass", A="SegmentationClassAug", n=NAMES[0], x="x" * 300)
W |= dict(f="2008_000008", o="2007_000032")  # with a mask of VOC's own; with SBD's alone
W |= dict(e="ulm_000001_000002", t="berlin_000354_000019", X="leftImg8bit/train_extra/ulm")
W |= dict(T="images/train", K="masks/train", V="images to train on are in val or test, {root}")
W |= dict(Y="leftImg8bit/test/berlin/berlin_000354_000019_leftImg8bit.png", z="2099_000000")
W |= dict(N="nothing: a link leads what its list names out of here")
COARSE = "/images/train_extra/{e}.png\t/segmentation/train_extra/{e}_gtCoarse.png"
FLAT = ("images/train_extra/{e}.png", "segmentation/train_extra/{e}_gtCoarse.png")
COARSE_IDS = "gtCoarse/train_extra/ulm/{e}_gtCoarse_labelIds.png"
DRAWN = {  # tree: data set, layout, another image of it, more files: what is in them
    "camvid": ("camvid", trees.camvid, NAMES[1], {}),
    "voc": ("voc", "voc, official", "2009_003377", {"copies/{o}.jpg": 9}),
    "city": ("cityscapes", "cityscapes, official", KEYS["cityscapes"]["train"][1],
             {"{X}/{e}_leftImg8bit.png": 1, COARSE_IDS: 26,
              "{Y}": 1}),
    "flat": ("cityscapes", "cityscapes, CPS", KEYS["cityscapes"]["train"][1],
             {FLAT[0]: 1, FLAT[1]: 5}),
    "folder": ("folder", lambda root: folder(root, ["a", "one/a", "b c", "d"]), "d", {}),
}  # fmt: skip
LEADS = [  # tree, links in it, a line of a list, key | image | mask; {out}: a folder outside
    ("voc", "", "{J}/{f}.jpg {S}/{f}.png", "{f} | {J}/{f}.jpg | {S}/{f}.png"),
    ("voc", "", "{J}/{o}.jpg {S}/{o}.png", "{o} | {J}/{o}.jpg | {A}/{o}.png"),  # no such mask
    ("voc", "", "{f}", "{f} | {J}/{f}.jpg | {A}/{f}.png"),
    ("voc", "", "copies/{o}.jpg\t{S}/{f}.png", "{o} | copies/{o}.jpg | {S}/{f}.png"),
    ("voc", "masks>{S}", "{J}/{f}.jpg masks/{f}.png", "{f} | {J}/{f}.jpg | masks/{f}.png"),
    ("voc", "", "{out}/{J}/{o}.jpg\t{out}/{S}/{o}.png", "{o} | {J}/{o}.jpg | {A}/{o}.png"),
    ("voc", "{o}.jpg>{out}/{J}/{o}.jpg", "{o}.jpg", "{o} | {J}/{o}.jpg | {A}/{o}.png"),
    ("voc", "m.png>{out}/{S}/{o}.png", "{o}.jpg\tm.png", "{o} | {J}/{o}.jpg | {A}/{o}.png"),
    ("voc", "l>{out}", "l/{J}/{o}.jpg\tl/{S}/{o}.png", "{o} | {J}/{o}.jpg | {A}/{o}.png"),
    ("voc", "k>{out} l>k", "l/{J}/{o}.jpg\tl/{S}/{o}.png", "{o} | {J}/{o}.jpg | {A}/{o}.png"),
    ("folder", "l>{out}", "{T}/a.png\tl/{S}/{o}.png", "a | {T}/a.png | {K}/a.png"),
    ("camvid", "l>l", "train/{n}.png\tl/a.png", "{n} | train/{n}.png | trainannot/{n}.png"),
    ("camvid", "", "train/{n}.png\t{x}.png", "{n} | train/{n}.png | trainannot/{n}.png"),
    *(("city", "", line, "{e} | {X}/{e}_leftImg8bit.png | " + COARSE_IDS)
      for line in ("{e}", COARSE, "{X}/{e}_leftImg8bit.png None")),
    ("city", "", "/images/test/{t}.png\t/x/test/{t}_gtFine.png", "{t} | {Y} | "),
    ("flat", "", COARSE, " | ".join(["{e}", *FLAT])),
    ("folder", "", "one/a", "one/a | {T}/one/a.png | {K}/one/a.png"),
    ("folder", "", "/{T}/one/a.png", "one/a | {T}/one/a.png | {K}/one/a.png"),
    ("folder", "", "{T}/b c.png\tNone", "b c | {T}/b c.png | {K}/b c.png"),
    ("folder", "", "{T}/a.png {K}/d.png", "a | {T}/a.png | {K}/d.png"),
]  # fmt: skip
NOWHERE = [  # tree, links, a line of a list, words of the refusal
    ("camvid", "", "99_0", "tried {root}/99_0, {root}/train/99_0.jpg, {root}/train/99_0.png"),
    ("camvid", "", "train/{x}.png", "has no image here"),
    ("camvid", "l>l", "train/l/a.png", "a has no image here"),
    ("camvid", "l>l", "l", "l has no image here"),
    ("camvid", "", "val/v1.png\tvalannot/v1.png", "1 {V}/val/v1.png first"),
    ("camvid", "", "test/t0.png testannot/t0.png", "1 {V}/test/t0.png first"),
    ("voc", "", "copies/one.jpg {A}/{o}.png", "no image key"),
    ("voc", "l>{out}", "l/{J}/{z}.jpg\t{S}/{f}.png", "{z} has no image here; tried {root}/"),
    ("voc", "", "{out}/{J}/{z}.jpg\t{S}/{f}.png", "{z} has no image here; tried {root}/"),
    ("folder", "l>{out}", "l/{J}/{o}.jpg\tl/{S}/{o}.png", "has no image here; tried {N}"),
    ("folder", "", "{out}/{J}/{o}.jpg\tNone", "has no image here"),
    ("folder", "", "../tree and more/{J}/{o}.jpg", "a path with .."),
]  # fmt: skip


def make(tmp_path, tree, links):
    """Draws a tree of DRAWN with links, and files of the same names outside.

    Returns its flags, with a list of another image of it, and the words of the tables.
    """
    name, layout, other, more = DRAWN[tree]
    root, out = tmp_path / "tree", tmp_path / "tree and more"
    known = W | dict(out=out, root=root, V=W["V"].format(root=root))
    draw(root, layout) if isinstance(layout, str) else layout(root)
    for place, value in more.items():
        kind = "L" if "gtCoarse" in place else "RGB"
        trees.picture(root / place.format(**known), kind, value)
    for key in (W["o"], "2099_000000"):
        trees.picture(out / f"JPEGImages/{key}.jpg", "RGB", 20)
        trees.picture(out / f"SegmentationClass/{key}.png", "L", 20)
    for link in links.format(**known).replace(str(out), "OUT").split():
        place, target = link.replace("OUT", str(out)).split(">")
        os.symlink(target, root / place)
    args = own(root) if name == "folder" else flags(root, dataset=name)
    args.labeled_list = listed(tmp_path / "good.txt", other)
    return args, known


@pytest.mark.parametrize("tree, links, line, found", LEADS)
def test_a_list_leads_to_its_files_and_to_none_outside(tmp_path, tree, links, line, found):
    args, known = make(tmp_path, tree, links)
    key, image, mask = found.format(**known).split(" | ")
    root, path = known["root"], listed(tmp_path / "list.txt", line.format(**known))
    item = Item(key, root / image, root / mask if mask else None)
    args.unlabeled_list = path
    assert load(args).unlabeled == without_mask([item])
    args.unlabeled_list, args.labeled_list = "", path
    if mask:  # a test image has none
        data = load(args)
        assert data.labeled == [item] and key not in keys_of(data.unlabeled)
        assert len(data.unlabeled) >= 3 and data.read(item, True)[1].size in ((8, 6), (12, 9))


@pytest.mark.parametrize("tree, links, line, words", NOWHERE)
@pytest.mark.parametrize("flag", ["labeled_list", "unlabeled_list"])
def test_a_list_that_leads_nowhere_is_refused(tmp_path, tree, links, line, words, flag):
    args, known = make(tmp_path, tree, links)
    setattr(args, flag, listed(tmp_path / "bad.txt", line.format(**known)))
    told = refusal(load, args)
    assert words.format(**known) in told and ("bad.txt" in told or "in val" in told)
    tried = told.partition("tried ")[2].split("; ")[0].split(", ")
    assert tried in ([""], [W["N"]]) or all(t.startswith(f"{known['root']}/") for t in tried)
    assert len(set(tried)) == len(tried)


def test_a_labelled_image_needs_its_mask_and_an_unlabelled_one_never(tmp_path, monkeypatch):
    root = trees.camvid(tmp_path / "camvid")
    for part, key in (("train", NAMES[2]), ("val", "v1"), ("test", "t0")):
        mask = root / f"{part}annot/{key}.png"
        mask.rename(tmp_path / "aside")
        assert refusal(load, flags(root)) == f"{root}: {key} has no mask here; tried {mask}"
        (tmp_path / "aside").rename(mask)
    (root / f"trainannot/{NAMES[1]}.png").unlink()
    (root / f"trainannot/{NAMES[3]}.png").unlink()
    (root / f"trainannot/{NAMES[3]}.png").mkdir()  # who opens it, fails
    one = dict(labeled_list=listed(tmp_path / "l.txt", *NAMES[::2]))
    both = one | dict(unlabeled_list=listed(tmp_path / "u.txt", *NAMES[1::2]))
    for some in (dict(split="1/2"), one, both):
        data = load(flags(root, **some))
        assert keys_of(data.unlabeled) == NAMES[1::2]
        assert all(item.label is None and not data.read(item, False)[1] for item in data.unlabeled)
    assert "has no mask" in refusal(load, flags(root))  # labelled, they are needed
    assert "give both" in refusal(load, flags(root, unlabeled_list=one["labeled_list"]))
    # VOC's say how they are made
    draw(tmp_path / "voc", "voc, official")
    trees.publish_parts(monkeypatch, "voc")
    for path in (tmp_path / "voc/SegmentationClassAug").iterdir():
        path.unlink()
    line = refusal(load, flags(tmp_path / "voc", dataset="voc"))
    assert line.endswith("; python prepare_data.py voc makes SegmentationClassAug")
    # generated pictures have all
    path = listed(tmp_path / "l.txt", "train-00007", "train-00003")
    data = load(flags(dataset="shapes", labeled_list=path))
    assert data.labeled == [Item("train-00003"), Item("train-00007")]
    assert (len(data.unlabeled), len(data.val), len(data.test)) == (318, 64, 64)
    assert not set(data.labeled) & set(data.unlabeled)
    listed(tmp_path / "l.txt", "val-00007")
    assert "val-00007" in refusal(load, flags(dataset="shapes", labeled_list=path))


@pytest.mark.parametrize("what", ["root", "folders", "files"])
def test_the_folders_of_a_data_set_may_be_links_to_another_disk(tmp_path, what):
    disk, root, keys = tmp_path / "disk", tmp_path / "tree", KEYS["voc"]["train"]
    draw(disk, "voc, official")
    if what == "root":
        os.symlink(disk, root)
    for place in () if what == "root" else sorted(disk.rglob("*")):
        link = root / place.relative_to(disk)
        if place.parent == disk if what == "folders" else place.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(place, link)
    lines, masks = ["{f}", "{J}/{f}.jpg /{A}/{f}.png"], [W["A"], W["A"]]
    if what == "root":
        lines, masks = [*lines, "{J}/{f}.jpg {S}/{f}.png"], [*masks, W["S"]]
    for line, mask in zip(lines, masks, strict=True):
        path = listed(tmp_path / "l.txt", *(line.format(**W | dict(f=key)) for key in keys[1::2]))
        data = load(flags(root, dataset="voc", labeled_list=path))
        files = [(root / f"JPEGImages/{key}.jpg", root / f"{mask}/{key}.png") for key in keys]
        items = [Item(key, *pair) for key, pair in zip(keys, files, strict=True)]
        assert data.labeled == items[1::2] and data.unlabeled == without_mask(items[::2])
        assert len(data.val) == 2 and all(data.read(item, True) for item in data.labeled)


# ---- published splits ----


def many(monkeypatch, root, dataset, count=40):
    """Draws count training images and val, makes them the published ones; returns {part: keys}."""
    name = dataset.removesuffix("_aug")
    keys = [("ulm_{:06d}_000019" if name[0] == "c" else "2009_{:06d}").format(i) for i in range(40)]
    parts = {"train": keys[:count], "val": KEYS[name]["val"]}
    monkeypatch.setitem(KEYS, name, parts)
    monkeypatch.setattr(trees, "ID", dict.fromkeys(range(99), 7))
    draw(root, "cityscapes, label ids" if name[0] == "c" else "voc, CPS")
    trees.publish_parts(monkeypatch, dataset)
    return parts


def differs(found, true):
    """What the line says of a set that is not the published one."""
    both = (found["images"], found["set"], true["images"], true["set"])
    return "{} images, set {}, instead of {}, set {}".format(*both)


@pytest.mark.parametrize("dataset", SPLITS)
def test_every_split_of_every_family_is_the_list_that_lies_there(tmp_path, monkeypatch, dataset):
    root, draws = tmp_path / "tree", random.Random(0)
    keys = many(monkeypatch, root, dataset)["train"]
    lines = sorted(trees.LINES[dataset.removesuffix("_aug")].values())
    families = {family: dict(s) for family, s in SPLITS[dataset].items() if family != "parts"}
    for family, split, one in ((f, s, e) for f in families for s, e in families[f].items()):
        if "url" in one:
            chosen, line = draws.sample(keys, 7), draws.choice(lines)
            some = [line.format(**trees.words(key)) for key in chosen]
            path = trees.publish(monkeypatch, dataset, family, split, chosen, some)
        else:
            chosen = keys[:: int(split.split("/")[1])]
            monkeypatch.setitem(SPLITS[dataset][family], split, entry(chosen))
        args = flags(root, dataset=dataset, split=split, split_family=family)
        data, true = load(args), entry(chosen)
        assert keys_of(data.labeled) == sorted(chosen), (family, split)
        assert keys_of(data.unlabeled) == [key for key in keys if key not in chosen]
        for other in (true | {"images": len(chosen) + 1}, true | {"set": "00000000"}):
            with monkeypatch.context() as patch:
                patch.setitem(SPLITS[dataset][family], split, one | other)
                assert differs(true, other) in refusal(load, args)
        for edited in ([*chosen[1:], data.unlabeled[0].key], chosen[1:]) if "url" in one else ():
            listed(path, *edited)
            assert differs(entry(edited), true) in refusal(load, args)
    for family in families:
        args = flags(root, dataset=dataset, split_family=family)
        assert keys_of(load(args).labeled) == keys_of(load(args).unlabeled) == keys
        args.split = "1/77"
        known = ", ".join(["all", *families[family]])
        line = refusal(load, args)
        assert line.startswith(f"--split 1/77 of {dataset}: {family} has {known};")
        assert "--split-seed" in line and "--labeled-list" in line


@pytest.mark.parametrize("dataset", SPLITS)
def test_what_is_there_is_the_published_set_or_a_seed_draws_from_it(tmp_path, monkeypatch, dataset):
    root = tmp_path / "tree"
    parts = many(monkeypatch, root, dataset)
    image = LAYOUTS["cityscapes, official" if dataset == "cityscapes" else "voc, CPS"][1]
    args = flags(root, dataset=dataset)
    seeded = flags(root, dataset=dataset, split="1/8", split_seed=5)
    for part, keys in parts.items():
        file = root / image.format(**trees.words(keys[1], part))
        file.rename(tmp_path / "aside")
        line = refusal(load, args)
        assert differs(entry([keys[0], *keys[2:]]), entry(keys)) in line
        assert "--labeled-list" in line and f"of {dataset}" in line
        # a seed, though it is zero, draws from what is there
        assert len(load(flags(root, dataset=dataset, split="1/8", split_seed=0)).labeled) == 5
        assert len(load(seeded).unlabeled) == (34 if part == "train" else 35)
        (tmp_path / "aside").rename(file)
        more = trees.picture(file.with_name(file.name.replace("_00", "_07", 1)), "RGB", 1)
        assert f"{len(keys) + 1} images, set " in refusal(load, args)
        more.unlink()
    data, keys = load(seeded), parts["train"]
    assert load(seeded).labeled == data.labeled and keys_of(data.labeled) != keys[::8]
    assert keys_of(data.labeled) == sorted(keys_of(data.labeled))
    assert sorted(keys_of(data.labeled + data.unlabeled)) == keys
    # lists must be the set that their split names in their family
    names = ("1/16", keys[3:6]), ("1/8", keys[3:8]), ("1/4", keys[:5])
    for split, some in names:
        monkeypatch.setitem(SPLITS[dataset]["u2pl"], split, entry(some))
    monkeypatch.setitem(SPLITS[dataset]["cac0"], "1/4", entry(keys[3:8]))  # as 2645 of 10,582
    path = listed(tmp_path / "l.txt", *keys[3:8])
    one = dict(dataset=dataset, labeled_list=path)
    says_nothing = [("u2pl", split) for split in ("list", "all", "mine", "1/0", "")]
    for family, split in (("u2pl", "1/8"), ("cac0", "1/4"), *says_nothing):
        data = load(flags(root, split=split, split_family=family, **one))
        assert keys_of(data.labeled) == keys[3:8]
        assert keys_of(data.unlabeled) == keys[:3] + keys[8:]
    for split, what in (("1/4", entry(keys[:5])["set"]), ("1/16", "of 3, set"), ("1/20", "not 2;")):
        line = refusal(load, flags(root, split=split, split_family="u2pl", **one))
        assert f"{path} with --split {split}: 5 images" in line and what in line
        assert "leave --split out" in line


# ---- a folder of one's own ----


@pytest.mark.smoke
def test_two_folders_are_a_data_set_with_sub_folders_spaces_and_any_suffix(tmp_path):
    ends = [".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"]
    assert sorted(SUFFIXES) == sorted(ends)
    names = ["B", "a", "a b", "deep/er/a", "deep/x.y", "deep/é (1)", "z.jpg", "{key}", "mask_png"]
    names += [f"k{i}" for i in range(5)]
    ends += [end.upper() for end in ends]
    root = folder(tmp_path, names, ends)
    strays = ("notes.txt", "._a.jpg", "Thumbs.db", "deep/.DS_Store", "x.json", ".hidden.png")
    for stray in strays:
        (root / "images/train" / stray).write_text("no image")
    trees.picture(root / "images/train/.ipynb_checkpoints/a-checkpoint.png", "RGB", 1)
    data = load(own(root))
    assert keys_of(data.labeled) == sorted(names) and keys_of(data.test) == ["t0"]
    assert data.unlabeled == without_mask(data.labeled) and keys_of(data.val) == ["v 0", "v1"]
    for item in data.labeled:
        i = names.index(item.key)
        assert item.image == root / f"images/train/{item.key}{ends[i]}"
        assert item.label == root / f"masks/train/{item.key}.png"
        image, mask = data.read(item, True)
        assert abs(image.getpixel((2, 2))[0] - 10 * i) <= 6 and (np.asarray(mask) == i % 4).all()
    half = load(own(root, split="1/2"))
    assert keys_of(half.labeled) == sorted(names)[::2]
    assert keys_of(half.unlabeled) == sorted(names)[1::2]


def test_images_without_a_mask_are_unlabelled_whatever_the_split(tmp_path):
    names = [f"k{i}" for i in range(10)]
    root, masked, bare = folder(tmp_path, names), names[1::2], names[::2]
    for name in bare:
        (root / f"masks/train/{name}.png").unlink()
    (root / f"masks/train/{bare[0]}.png").mkdir()  # no file
    for split, seed, labeled in (("all", None, 5), ("1/2", None, 3), ("1/5", 1, 1)):
        data = load(own(root, split=split, split_seed=seed))
        chosen = keys_of(data.labeled)
        assert len(chosen) == labeled and set(chosen) <= set(masked)
        assert seed or chosen == masked[:: 1 + (split == "1/2")]
        rest = [name for name in names if split == "all" or name not in chosen]
        assert keys_of(data.unlabeled) == rest
        assert all(item.label is None for item in data.unlabeled)
    assert "r from 2 to 5" in refusal(load, own(root, split="1/6"))
    path = listed(tmp_path / "l.txt", bare[1], masked[0])
    line = refusal(load, own(root, labeled_list=path))
    assert line.startswith(f"{path}: {bare[1]} has no mask")
    (root / "masks/val/v1.png").unlink()
    assert "v1 has no mask" in refusal(load, own(root))


def test_lists_of_ones_own_name_images_and_masks_anywhere_in_the_folder(tmp_path):
    root = tmp_path / "tree"
    for i, name in enumerate(["x 1", "x2", "sub/x3", "x4"]):
        trees.picture(root / f"photos here/{name}.JPG", "RGB", 10 * i)
        if i != 2:
            trees.picture(root / f"labels/of {name}.png", "L", i)
    tab = "photos here/{0}.JPG\tlabels/of {0}.png"
    listed(root / "train.txt", tab.format("x 1"), "photos here/sub/x3.JPG\tNone", tab.format("x2"))
    listed(root / "val.txt", tab.format("x4"))
    data, keys = load(own(root)), ["photos here/x 1", "photos here/x2"]
    files = [(root / f"photos here/{x}.JPG", root / f"labels/of {x}.png") for x in ("x 1", "x2")]
    assert data.labeled == [Item(key, *pair) for key, pair in zip(keys, files, strict=True)]
    assert keys_of(data.unlabeled) == sorted(["photos here/sub/x3", *keys])
    assert keys_of(data.val) == ["photos here/x4"] and data.test == []
    for item, i in zip((*data.labeled, *data.val), (0, 1, 3), strict=True):
        assert (np.asarray(data.read(item, True)[1]) == i).all()
    assert keys_of(load(own(root, split="1/2")).labeled) == keys[:1]
    for line in ("photos here/x2\tNone", "photos here/x2.JPG\tNone", tab.format("x2")):
        data = load(own(root, labeled_list=listed(tmp_path / "l.txt", line)))
        assert data.labeled == [Item(keys[1], *files[1])]
    # a list wins over a folder of images, and lists without masks take masks/<part>/<key>.png
    folder(root, ["q"])
    assert keys_of(load(own(root)).labeled) == keys
    listed(root / "train.txt", "images/train/q.png")
    listed(root / "val.txt", "images/val/v1.png")
    data = load(own(root))
    assert data.labeled == [Item("q", root / "images/train/q.png", root / "masks/train/q.png")]
    assert keys_of(data.val) == ["v1"]
    # a mask that a list names must be there
    (root / "masks/train/q.png").unlink()
    assert "no image to train on with a mask" in refusal(load, own(root))
    listed(root / "train.txt", "images/train/q.png typo/q.png")
    assert "q has no mask here" in refusal(load, own(root))


def test_the_folders_of_ones_own_data_may_be_links_but_what_lists_name_follows_none(tmp_path):
    disk, root = folder(tmp_path / "disk"), tmp_path / "tree"
    root.mkdir()
    for name in ("images", "masks"):
        os.symlink(disk / name, root / name)
    data = load(own(root, labeled_list=listed(tmp_path / "l.txt", "images/train/b.png", "d")))
    assert keys_of(data.labeled) == ["b", "d"] and keys_of(data.unlabeled) == ["a", "c"]
    assert data.labeled[0][1:] == (root / "images/train/b.png", root / "masks/train/b.png")
    listed(root / "val.txt", "images/val/v1.png\tmasks/val/v1.png")
    assert "a link leads what its list names" in refusal(load, own(root))


def spoil(root):
    """Yields flags of a folder, changes of it, that are refused, and words of the line."""
    for count in (-1, 0, 1, 255, 256):
        yield own(root, num_classes=count), (f"--num-classes {count}:", "2 to 254")
    for ignored in (-1, 256, 1000):
        yield own(root, ignore_index=ignored), (f"--ignore-index {ignored}:", "0 to 255")
    for changes in (dict(num_classes=19), dict(ignore_index=0), dict(ignore_index=254)):
        for name in ("shapes", "cityscapes"):
            args = flags(root if name != "shapes" else "", dataset=name, **changes)
            yield args, ("--num-classes, --ignore-index: with --dataset folder alone",)
    trees.picture(root / "images/train/one/a.jpg", "RGB", 1)
    yield own(root), ("one/a.", "another image has the key one/a too")
    shutil.rmtree(root / "images/train/one")
    for part in ("val", "train"):
        for path in (root / f"images/{part}").rglob("*.png"):
            path.unlink()
        # val is asked for first
        yield own(root), (f"{root}: no val of folder here", "val.txt", "images/val")
    yield flags(root), (f"{root}: no val of camvid here",)


def test_a_folder_that_is_not_right_is_refused_with_what_it_should_hold(tmp_path):
    root = folder(tmp_path, ["a", "one/a", "two/a"])
    assert keys_of(load(own(root)).labeled) == ["a", "one/a", "two/a"]
    for args, words in spoil(root):
        line = refusal(load, args)
        assert all(word in line for word in words), line


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_folder_of_ones_own_trains_from_a_checkpoint_of_other_classes(
    name, tmp_path, monkeypatch, capsys
):
    script = importlib.import_module(name)
    tiny.shrink(script, monkeypatch)
    tree = tiny.draw_tree(tmp_path / "camvid")
    tiny.train(script, tiny.flags(tree, tmp_path / "first", iters=2))
    root = folder(tmp_path / "tree", [f"train {i}" for i in range(8)], classes=6)
    shutil.rmtree(root / "images/test")
    argv = tiny.flags(root, tmp_path / "run", iters=2)
    argv += ["--dataset", "folder", "--num-classes", "6", "--ignore-index", "0"]
    argv += ["--protocol", "slide", "--init", str(tmp_path / "first/best.pt")]
    tiny.train(script, argv)
    assert "head random" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["networks"]
    assert all(net["head.classify.1.weight"].shape[0] == 6 for net in saved.values())
    done = log(tmp_path / "run")[-1]
    assert done["on"] == "val" and len(done["last"]["iou"]) == 6
    assert done["last"]["constant"] == 1  # of val's two masks the first is 0, ignored
