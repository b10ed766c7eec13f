"""Which images there are: every known layout with every list, published splits, one's own folder.

Lists name files inside a tree and nothing outside of it; masks of unlabelled images are not needed.
"""

import os
import random
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

    def never(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", never)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def without_mask(items):
    return [item._replace(label=None) for item in items]


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_without_lists_and_with_every_projects(tmp_path, monkeypatch, layout):
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


W = dict(J="JPEGImages", S="SegmentationClass", A="SegmentationClassAug", n=NAMES[0])
W |= dict(o="2007_000032", T="images/train", K="masks/train")  # o: with a mask of SBD's alone
TREES = {  # tree: data set, how it is drawn, another image of it
    "camvid": ("camvid", trees.camvid, NAMES[1]),
    "voc": ("voc", lambda root: draw(root, "voc, official"), "2009_003377"),
    "folder": ("folder", lambda root: folder(root, ["a", "one/a", "d"]), "d"),
}
LEADS = [  # tree, links in it, a line of a list, key | image | mask; {out}: a folder outside
    ("voc", "", "{out}/{J}/{o}.jpg\t{out}/{S}/{o}.png", "{o} | {J}/{o}.jpg | {A}/{o}.png"),
    ("voc", "k>{out} l>k", "l/{J}/{o}.jpg\tl/{S}/{o}.png", "{o} | {J}/{o}.jpg | {A}/{o}.png"),
    ("camvid", "l>l", "train/{n}.png\tl/a.png", "{n} | train/{n}.png | trainannot/{n}.png"),
    ("folder", "", "{T}/a.png {K}/d.png", "a | {T}/a.png | {K}/d.png"),
]
NOWHERE = [  # tree, links, a line of a list, words of the refusal
    ("camvid", "", "99_0", "tried {root}/99_0, {root}/train/99_0.jpg, {root}/train/99_0.png"),
    ("camvid", "", "val/v1.png\tvalannot/v1.png", "in val or test, {root}/val/v1.png first"),
    ("folder", "l>{out}", "l/{J}/{o}.jpg\tl/{S}/{o}.png",
     "has no image here; tried nothing: a link leads what its list names out of here"),
]  # fmt: skip


def make(tmp_path, tree, links):
    """Draws a tree with links, and files of the same names outside.

    Returns its flags, with a list of another image of it, and the words of the tables.
    """
    name, drawn, other = TREES[tree]
    root = tmp_path / "tree"
    out = tmp_path / "tree and more"
    known = W | dict(out=out, root=root)
    drawn(root)
    trees.picture(out / f"JPEGImages/{W['o']}.jpg", "RGB", 20)
    trees.picture(out / f"SegmentationClass/{W['o']}.png", "L", 20)
    for link in links.split():
        place, target = link.split(">")
        os.symlink(target.format(**known), root / place)
    args = own(root) if name == "folder" else flags(root, dataset=name)
    args.labeled_list = listed(tmp_path / "good.txt", other)
    return args, known


@pytest.mark.parametrize("tree, links, line, found", LEADS)
def test_a_list_leads_to_its_files_and_to_none_outside(tmp_path, tree, links, line, found):
    args, known = make(tmp_path, tree, links)
    key, image, mask = found.format(**known).split(" | ")
    root, path = known["root"], listed(tmp_path / "list.txt", line.format(**known))
    item = Item(key, root / image, root / mask)
    args.unlabeled_list = path
    assert load(args).unlabeled == without_mask([item])
    args.unlabeled_list, args.labeled_list = "", path
    data = load(args)
    assert data.labeled == [item] and key not in keys_of(data.unlabeled)


@pytest.mark.parametrize("tree, links, line, words", NOWHERE)
def test_a_list_that_leads_nowhere_is_refused(tmp_path, tree, links, line, words):
    args, known = make(tmp_path, tree, links)
    for flag in ("labeled_list", "unlabeled_list"):
        setattr(args, flag, listed(tmp_path / "bad.txt", line.format(**known)))
        assert words.format(**known) in refusal(load, args)


def test_a_labelled_image_needs_its_mask_and_an_unlabelled_one_never(tmp_path):
    root = trees.camvid(tmp_path / "camvid")
    for name in NAMES[1::2]:
        (root / f"trainannot/{name}.png").unlink()
    one = dict(labeled_list=listed(tmp_path / "l.txt", *NAMES[::2]))
    both = one | dict(unlabeled_list=listed(tmp_path / "u.txt", *NAMES[1::2]))
    for some in (dict(split="1/2"), one, both):
        data = load(flags(root, **some))
        assert keys_of(data.unlabeled) == NAMES[1::2]
        assert data.unlabeled == without_mask(data.unlabeled)
    for part, name, some in (("train", NAMES[1], {}), ("val", "v1", both)):
        path = root / f"{part}annot/{name}.png"
        path.unlink(missing_ok=True)
        line = refusal(load, flags(root, **some))
        assert line == f"{root}: {name} has no mask here; tried {path}"


def differs(found, true):
    """What the line says of a set that is not the published one."""
    both = (found["images"], found["set"], true["images"], true["set"])
    return "{} images, set {}, instead of {}, set {}".format(*both)


@pytest.fixture(params=SPLITS)
def many(request, monkeypatch, tmp_path):
    """40 training images and val of a data set, the published ones: name, root, {part: keys}."""
    dataset, name, root = request.param, request.param.removesuffix("_aug"), tmp_path / "tree"
    key, layout = {
        "voc": ("2009_{:06d}", "voc, CPS"),
        "cityscapes": ("ulm_{:06d}_000019", "cityscapes, label ids"),
        "coco": ("{:012d}", "coco"),
    }[name]
    parts = {"train": [key.format(i) for i in range(40)], "val": KEYS[name]["val"]}
    monkeypatch.setitem(KEYS, name, parts)
    monkeypatch.setattr(trees, "ID", dict.fromkeys(range(99), 7))
    draw(root, layout)
    trees.publish_parts(monkeypatch, dataset)
    return dataset, root, parts


def test_every_split_of_every_family_is_the_list_that_lies_there(many, monkeypatch):
    dataset, root, parts = many
    keys, draws = parts["train"], random.Random(0)
    lines = sorted(trees.LINES[dataset.removesuffix("_aug")].values())
    families = {family: dict(s) for family, s in SPLITS[dataset].items() if family != "parts"}
    for family, split, one in ((f, s, e) for f in families for s, e in families[f].items()):
        chosen, line = draws.sample(keys, 7), draws.choice(lines)
        if "url" in one:
            some = [line.format(**trees.words(key)) for key in chosen]
            path = trees.publish(monkeypatch, dataset, family, split, chosen, some)
        else:
            chosen = keys[:: int(split.split("/")[1])]
            monkeypatch.setitem(SPLITS[dataset][family], split, entry(chosen))
        args = flags(root, dataset=dataset, split=split, split_family=family)
        data, true = load(args), entry(chosen)
        assert keys_of(data.labeled) == sorted(chosen), (family, split)
        assert keys_of(data.unlabeled) == [key for key in keys if key not in chosen]
        if "url" in one:
            edited = [*chosen[1:], data.unlabeled[0].key]
            listed(path, *edited)
            assert differs(entry(edited), true) in refusal(load, args)


def test_what_is_there_is_the_published_set_or_a_seed_draws_from_it(many, tmp_path, monkeypatch):
    dataset, root, parts = many
    keys = parts["train"]
    family = "unimatch" if dataset == "coco" else "u2pl"
    # a list must be the set that its split names in its family
    for split, some in (("1/8", keys[3:8]), ("1/4", keys[:5])):
        monkeypatch.setitem(SPLITS[dataset][family], split, entry(some))
    one = dict(labeled_list=listed(tmp_path / "l.txt", *keys[3:8]), split_family=family)
    for split in ("1/8", "list", ""):
        data = load(flags(root, dataset=dataset, split=split, **one))
        assert (keys_of(data.labeled), keys_of(data.unlabeled)) == (keys[3:8], keys[:3] + keys[8:])
    for split, what in (("1/4", entry(keys[:5])["set"]), ("1/20", "not 2;")):
        line = refusal(load, flags(root, dataset=dataset, split=split, **one))
        assert f"l.txt with --split {split}: 5 images" in line and what in line
    for path in [*root.rglob(f"*{keys[1]}*")]:
        path.unlink()
    line = refusal(load, flags(root, dataset=dataset))
    assert differs(entry([keys[0], *keys[2:]]), entry(keys)) in line
    # a seed, though it is zero, draws from what is there
    assert len(load(flags(root, dataset=dataset, split="1/8", split_seed=0)).labeled) == 5


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
        image, mask = data.read(item, True)
        assert abs(image.getpixel((2, 2))[0] - 10 * (i + 1)) <= 6
        assert (np.asarray(mask) == i % 4).all()


def test_images_without_a_mask_are_unlabelled_whatever_the_split(tmp_path):
    names = [f"k{i}" for i in range(10)]
    root, masked = folder(tmp_path, names), names[1::2]
    for name in names[::2]:
        (root / f"masks/train/{name}.png").unlink()
    (root / "masks/train/k0.png").mkdir()  # no file
    for split, labeled in (("all", masked), ("1/2", masked[::2])):
        data = load(own(root, split=split))
        assert keys_of(data.labeled) == labeled
        assert keys_of(data.unlabeled) == [n for n in names if split == "all" or n not in labeled]


def test_lists_of_ones_own_name_images_and_masks_anywhere_in_the_folder(tmp_path):
    """By a path, or by a bare name that one image alone has; a list wins over a folder."""
    strange = os.fsdecode(b"\xe9")
    root = folder(tmp_path, ["q", strange, "deep/b", "one/c", "two/c"])
    trees.picture(root / "photos here/x 1.JPG", "RGB", 0)
    trees.picture(root / "labels/of x 1.png", "L", 0)
    args = own(root, labeled_list=str(root / "l.txt"))
    text = f"b\n{root}/images/train/one/c.png\n{strange}"
    (root / "l.txt").write_bytes(os.fsencode(text))
    data = load(args)
    assert keys_of(data.labeled) == ["deep/b", "one/c", strange]
    assert keys_of(data.unlabeled) == ["q", "two/c"] and data.hashes()["labeled"][0] == 3
    told = {"c": "c has no image", "b\ndeep/b": "twice", f"{strange}x": "\\udce9x has no image"}
    for text, words in told.items():
        (root / "l.txt").write_bytes(os.fsencode(text))
        assert words in refusal(load, args)
    (root / "masks/train/q.png").unlink()
    listed(root / "train.txt", "photos here/x 1.JPG\tlabels/of x 1.png", "images/train/q.png\tNone")
    data = load(own(root))
    files = (root / "photos here/x 1.JPG", root / "labels/of x 1.png")
    assert data.labeled == [Item("photos here/x 1", *files)]
    assert keys_of(data.unlabeled) == ["photos here/x 1", "q"]
    listed(root / "train.txt", "images/train/q.png\tNone")
    assert "no image to train on with a mask" in refusal(load, own(root))
    listed(root / "train.txt", "images/train/q.png typo/q.png")  # a named mask must be there
    assert "q has no mask here" in refusal(load, own(root))


def test_a_folder_that_is_not_right_is_refused_with_what_it_should_hold(tmp_path):
    root = folder(tmp_path, ["a", "one/a"])
    wrong = [(own(root, num_classes=n), f"--num-classes {n}: 2 to 254") for n in (-1, 0, 1, 255)]
    for n in (-1, 256):
        wrong.append((own(root, ignore_index=n), f"--ignore-index {n}: 0 to 255"))
    wrong.append((own(root, ignore_index=2), "one_of_the_classes_0_to_3"))
    for changes in (dict(num_classes=19), dict(ignore_index=0), dict(ignore_index=254)):
        args = flags(root, dataset="cityscapes", **changes)
        wrong.append((args, "--num-classes, --ignore-index: with --dataset folder alone"))
    for args, words in wrong:
        line = refusal(load, args)
        assert all(word.replace("_", " ") in line for word in words.split()), line
    twin = trees.picture(root / "images/train/one/a.jpg", "RGB", 1)
    assert "another image has the key one/a too" in refusal(load, own(root))
    twin.unlink()
    for part in ("val", "train"):
        shutil.rmtree(root / f"images/{part}")  # val is asked for first
        line = refusal(load, own(root))
        assert line.startswith(f"{root}: no val of folder here") and "images/val" in line
    line = refusal(load, flags(dataset="voc_aug"))  # without a root the usual folder is taken
    assert line.startswith("data/voc: no such folder") and "--data-root" in line
