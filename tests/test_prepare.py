"""Which images there are, in every layout and by every list; prepare_data.py, on miniatures."""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints
from unittest.mock import patch
from urllib.error import HTTPError
from urllib.request import Request

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import cps_fpl
import prepare_data
import trees
from common import shapes, sources
from common.data import FACTS, SPLITS, Item
from common.flags import cli
from common.sources import load
from tiny import pixels, resolved
from trees import NAMES, command, entry, flags, folder, keys_of, listed, own, picture, refusal

pytestmark = pytest.mark.usefixtures("empty_folder")
HOST = "https://host"
CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
LISTS = Path("data/splits/voc_aug")
TREE, MY = Path("tree"), Path("my")
CAM, OWN = "--dataset camvid --data-root cam", "--dataset folder --data-root own --num-classes"
ONE, OTHER = NAMES[:2]
EIGHT = [f"2007_{i:06d}" for i in (7, 3, 40, 5, 1, 22, 13, 9)]
TRAIN, VAL = trees.FINE[:2], trees.FINE[2:]


def without_mask(items):
    return [item._replace(label=None) for item in items]


@pytest.mark.smoke
@pytest.mark.parametrize("layout", trees.LAYOUTS)
def test_every_layout_is_read_without_lists_and_with_any(layout, monkeypatch, capsys):
    name, image, masks, _ = trees.LAYOUTS[layout]
    train, val = trees.KEYS[name].values()
    trees.draw(TREE, layout)

    def expected(key, column="", part="train"):
        known = trees.words(key, part)
        names = [column.lstrip("/"), *(mask.format(**known) for mask in masks)]
        mask = next(TREE / name for name in names if (TREE / name).is_file())
        return Item(key, TREE / image.format(**known), mask)

    for dataset in (name, "voc_aug") if name == "voc" else (name,):
        trees.publish_parts(monkeypatch, dataset)
        every = load(flags(TREE, dataset=dataset))
        assert every.labeled == [expected(key) for key in train]
        assert every.unlabeled == without_mask(every.labeled) and every.test == []
        assert every.val == [expected(key, part="val") for key in val]
    for pattern in trees.LINES[name].values():
        lines = [pattern.format(**trees.words(key)) for key in train]
        lists = dict(labeled_list=listed("l", *lines[1::-1]))  # its order does not matter
        lists |= dict(unlabeled_list=listed("u", *lines[:1:-1]))
        data = load(flags(TREE, dataset=name, **lists))
        items = [expected(key, *line.split()[1:]) for key, line in zip(train, lines, strict=True)]
        assert data.labeled == items[:2] and data.unlabeled == without_mask(items[2:]), pattern
    assert "note: " not in capsys.readouterr().err  # no file is said to be of no use


@pytest.mark.skipif("CAMVID" not in os.environ, reason="CAMVID names no folder of CamVid")
def test_camvid_itself_is_read():
    data = load(flags(os.environ["CAMVID"], split="1/8"))
    parts = data.labeled, data.unlabeled, data.val, data.test
    assert [len(part) for part in parts] == [46, 321, 101, 233]
    seen = [np.asarray(data.read(item, True)[1]) for part in parts[::2] for item in part[::9]]
    assert {label.shape for label in seen} == {(360, 480)}
    assert set(np.unique(seen)) == {*range(11), 255}


@pytest.mark.skipif("SPLITS" not in os.environ, reason="SPLITS names no folder of published lists")
def test_published_lists_themselves_give_every_set():
    for family in ("cps", "u2pl"):
        command(f"splits --family {family} --from", Path(os.environ["SPLITS"], family))
    names = [(d, f, s) for d in SPLITS for f in ("cps", "u2pl") for s in SPLITS[d].get(f, ())]
    for name, family, split in names:
        path = Path("data/splits", name, family, f"{split.replace('/', '_')}.txt")
        assert SPLITS[name][family][split].items() >= entry(path.read_text().split()).items()
    assert len(names) == 27


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
    assert "tried nothing: a link leads what its list names out of here" in line


def test_a_split_is_its_published_list(monkeypatch):
    keys = trees.KEYS["voc"]["train"]
    trees.draw(TREE, "voc, CPS")
    trees.publish_parts(monkeypatch, "voc_aug")
    trees.publish(monkeypatch, "voc_aug", "u2pl", "1/4", keys[:2])
    path = trees.publish(monkeypatch, "voc_aug", "u2pl", "1/2", keys[1::2])
    monkeypatch.setitem(SPLITS["voc_aug"]["cps"], "1/4", entry(keys[::4]))  # no list lies there

    def given(split, family="u2pl", **more):
        return flags(TREE, dataset="voc_aug", split=split, split_family=family, **more)

    assert keys_of(given("1/2"))[:2] == [keys[1::2], keys[::2]]
    assert keys_of(given("1/4", "cps"))[:2] == [keys[:1], keys[1:]]
    listed(path, *keys[:2])
    first, second = (entry(some)["set"] for some in (keys[:2], keys[1::2]))
    assert f"2 images, set {first}, instead of 2, set {second}; " in refusal(load, given("1/2"))
    # a list of one's own must be the set that its split names in its family
    one = listed("l.txt", *keys[1::2])
    for split in ("1/2", "list", ""):
        assert keys_of(given(split, labeled_list=one))[:2] == [keys[1::2], keys[::2]]
    for split, what in (("1/4", first), ("1/20", "not 1;")):
        line = refusal(load, given(split, labeled_list=one))
        assert f"l.txt with --split {split}: 2 images" in line and what in line
    for file in [*TREE.rglob(f"*{keys[1]}*")]:
        file.unlink()
    assert "training images: 3 images, set " in refusal(load, given("all"))
    assert "1/9 of voc_aug: u2pl has all, 1/" in refusal(load, given("1/9"))
    # a seed, though it is zero, draws from what is there
    assert len(load(given("1/3", split_seed=0)).labeled) == 1


@pytest.mark.smoke
def test_two_folders_are_a_data_set_with_sub_folders_spaces_and_any_suffix():
    ends = [".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"]
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
    picture(MY / "photos here/x 1.JPG", "RGB", 0)
    picture(MY / "labels/of x 1.png", "L", 0)
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
        ("images/train/a.png typo/a.png", "a has no mask here"),  # masks/train/a.png is another
    ):
        listed("my/train.txt", line)
        assert words in refusal(load, own(MY))
    for key, end, line in (("a", "jpg", "a"), ("deep/b", "png", "b")):  # beside another of its key
        twin = picture(MY / f"images/train/{key}.{end}", "RGB", 0)
        listed("my/train.txt", line, "c,d")
        assert f"another image has the key {key} too" in refusal(load, own(MY))
        listed("my/train.txt", f"images/train/{key}.{end}", "c,d")
        assert twin in [item.image for item in load(own(MY)).labeled]


def test_voc_takes_any_ids_when_lists_say_so():
    for i, key in enumerate(["a", "b c", "d_2007", "e", "v", "w.x"]):
        picture(TREE / f"JPEGImages/{key}.jpg", "RGB", (40 * i, 0, 0))
        picture(TREE / f"SegmentationClass/{key}.png", "P", i)
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
    twin = picture(MY / "images/train/one/a.jpg", "RGB", 1)
    assert "another image has the key one/a too" in refusal(load, own(MY))
    twin.unlink()
    shutil.rmtree(MY / "images")  # val is asked for first
    line = refusal(load, own(MY))
    assert line.startswith("my: no val of folder here") and "images/val" in line


def contents(root):
    """{name: bytes} of all files in root but for archives."""
    files = (p for p in Path(root).rglob("*") if p.is_file())
    ends = (".tar", ".tgz", ".zip")
    return {str(p.relative_to(root)): p.read_bytes() for p in files if p.suffix not in ends}


@pytest.fixture
def server(monkeypatch):
    """Answers in place of the network: files {address: bytes}, at most limit bytes at once."""
    made = SimpleNamespace(files={}, asked=[], ranges=True, limit=None)

    def answer(request, timeout):
        url, asked = request.full_url, request.get_header("Range")
        assert request.get_header("User-agent") == "prepare_data.py"  # some answer no other
        made.asked.append((url, asked))
        body = made.files.get(url)
        begin = int(asked.strip("bytes=-")) if asked and made.ranges else 0
        if body is None or begin >= len(body):
            raise HTTPError(url, 404 if body is None else 416, "of two\nlines", {}, None)
        found = io.BytesIO(body[begin:][: made.limit])
        found.headers = {"Content-Length": str(len(body) - begin)} if len(body) > 99 else {}
        if begin:
            found.headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        return found

    opener = SimpleNamespace(open=answer)
    monkeypatch.setattr("urllib.request.build_opener", lambda *handlers: opener)
    return made


@pytest.mark.smoke
@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_was_cut_off_and_is_checked(server, ranges):
    path, part = Path("a.tar"), Path("a.tar.part")
    server.files[HOST], server.ranges, server.limit = CONTENT, ranges, 1_300_000
    line = refusal(sources.download, HOST, path, MD5)
    assert "cut off after 1300000 of 3000000 bytes; the same command goes on" in line
    assert not path.exists() and part.read_bytes() == CONTENT[:1_300_000]
    server.limit = None
    for _ in range(2):
        sources.download(HOST, path, MD5)
        assert path.read_bytes() == CONTENT and not part.exists()
        path.rename(part)  # killed before the rename
    assert server.asked[:2] == [(HOST, None), (HOST, "bytes=1300000-")]
    server.files[HOST] = CONTENT[:-1] + b"x"
    line = refusal(sources.download, HOST, Path("b"), MD5)
    assert "b.part: md5 " in line and f"instead of {MD5}; delete it" in line
    assert not Path("b").exists() and "404" in refusal(sources.download, f"{HOST}/b", Path("c"))


@pytest.mark.parametrize("url", ["ftp://host/a", "file:///etc/a", "data:,x", "http://host/a"])
def test_only_https_is_fetched_from_and_no_redirect_leads_elsewhere(url):
    assert "nothing is fetched but by https" in refusal(sources.download, url, Path("c"))
    follow = sources.Redirect().redirect_request
    assert "https" in refusal(follow, Request(HOST), None, 302, "", {}, url)


@pytest.mark.smoke
def test_a_list_is_fetched_once_checked_kept_in_its_order(server, capsys, monkeypatch):
    monkeypatch.setitem(SPLITS["voc_aug"]["u2pl"], "1/4", entry(EIGHT[:2], url=HOST))
    server.files = {HOST: "\n".join(EIGHT[:2]).encode()}
    path = LISTS / "u2pl/1_4.txt"
    for _ in range(2):
        assert sources.fetch_list("voc_aug", "u2pl", "1/4") == path
    assert capsys.readouterr().out == f"{path}: 2 images, set {entry(EIGHT[:2])['set']}\n"
    assert len(server.asked) == 1 and path.read_text() == f"{EIGHT[0]}\n{EIGHT[1]}\n"
    path.write_text("a page")
    line = refusal(sources.fetch_list, "voc_aug", "u2pl", "1/4")
    assert line.startswith(f"{path}: ") and "delete it" in line and path.read_text() == "a page"
    path.unlink()
    for body in (b"2007_000007\n2007_000040\n", b"<html>moved</html>", None):
        server.files = {HOST: body}
        line = refusal(sources.fetch_list, "voc_aug", "u2pl", "1/4")
        assert HOST in line and ("404" in line or entry(EIGHT[:2])["set"] in line)
    assert not list(Path().rglob("*.txt"))


@pytest.mark.parametrize("dataset", SPLITS)
def test_a_list_that_cannot_be_fetched_is_refused_with_the_command_that_fetches_it(server, dataset):
    for family, split in ((f, s) for f in SPLITS[dataset] for s in SPLITS[dataset][f]):
        line = refusal(sources.fetch_list, dataset, family, split)
        if family == "parts" and "url" not in SPLITS[dataset][family][split]:
            assert line.endswith(f"in its folder, {FACTS[dataset]['parts'][split][0]}")
            continue
        words = line.partition("; python prepare_data.py ")[2].partition(", with")[0]
        assert line.startswith(str(sources.LISTS)) and "with --from DIR" in line and server.asked
        server.asked.clear()
        refusal(command, words + f" --dataset {dataset}")
        assert server.asked


def test_splits_finds_a_family_and_both_parts_by_their_sets(capsys):
    splits = {
        "parts": {"train": entry(EIGHT, url=HOST), "val": entry(VAL, url=HOST)},
        "cps": {"1/4": entry(sorted(EIGHT)[::4])},  # in no list: every 4th image
        "cac0": {"1/4": entry(EIGHT[:3], url=HOST)},
        "cac1": {"1/4": entry(EIGHT[1:3], url=HOST)},
    }
    rows = [f"images/{k}.jpg\tmasks/{k}.png" for k in reversed(EIGHT)]
    for name, lines in (("deep/x", rows), ("a", VAL), ("b", ["notes"]), ("c", EIGHT[1:3])):
        listed(f"lists/{name}.txt", *lines)
    with patch.dict(SPLITS, {"voc_aug": splits}, clear=True):
        command("splits --family cps --dataset voc_aug --from lists")
        assert "all lists of cps are there" in capsys.readouterr().out
        assert "1 lists" in refusal(command, "splits --family cac --from lists")
    assert "cac0/1_4.txt" in capsys.readouterr().err
    found = {name: text.decode().split() for name, text in contents(LISTS).items()}
    parts = {"parts/train.txt": EIGHT[::-1], "parts/val.txt": VAL}
    assert found == parts | {"cps/1_4.txt": sorted(EIGHT)[::4], "cac1/1_4.txt": EIGHT[1:3]}


def archive(path, files):
    """Writes a tar or zip of {name: bytes, or (target, kind) of a link}."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as opened:
            for name, data in files.items():
                opened.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.linkname, info.type = data
                data = b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


OUT = ["a/../../evil", "/evil", "C:evil", "..\\evil", "\\\\h\\evil"]
LINKS = [("/etc/passwd", tarfile.SYMTYPE), ("../out", tarfile.LNKTYPE), ("", tarfile.CHRTYPE)]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_what_leads_out_or_is_cut_off_is_refused_by_name(kind):
    path, to = Path(f"a.{kind}"), Path("to")
    bad = [(name, name, b"x") for name in OUT]  # its name, its key, its content
    link = zipfile.ZipInfo("l")
    link.external_attr = 0o120777 << 16
    bad += [("l", link, "x")] if kind == "zip" else [("l", "l", one) for one in LINKS]
    for name, key, content in bad:
        archive(path, {"good": b"x", key: content})
        for wanted in (".", "^good$"):  # checked though nobody wants it
            line = refusal(list, prepare_data.members(path, to, wanted))
            assert line.startswith(f"{path}: unsafe") and repr(name) in line
    archive(path, {"good": CONTENT[:40_000]})
    assert list(prepare_data.members(path, to, ".")) == [("good", CONTENT[:40_000])]
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.0):
        path.write_bytes(whole[: int(share * 40_000)])
        line = refusal(list, prepare_data.members(path, to, "."))
        assert line.startswith(f"{path}: damaged or cut off")


def mat(array):
    """What is read of SBD's form: a struct GTcls with a Segmentation."""
    file = io.BytesIO()
    savemat(file, {"GTcls": {"Segmentation": array}}, do_compression=True)
    return file.getvalue()


REST = ["2007_000032", "2009_003377"]
CLS, TOP = "benchmark_RELEASE/dataset/cls", "VOCdevkit/VOC2012"
VOC_TAR, SBD_TGZ = prepare_data.ARCHIVES
SBD = [TRAIN[0], VAL[0], *REST]  # two of them VOC's too
MASKS = {key: np.full((6, 8), i, np.uint8) for i, key in enumerate(SBD)}


@pytest.fixture
def voc(monkeypatch, server):
    """Both archives in miniature, in `from` and on the server; returns {archive: its files}."""
    trees.draw(Path("drawn"), "voc, VOCdevkit")
    top = Path("drawn") / TOP
    picture(top / "JPEGImages/2011_000099.jpg", "RGB", 0)  # in no list
    for part, keys in (("train", TRAIN), ("trainval", TRAIN + VAL)):
        listed(top / f"ImageSets/Segmentation/{part}.txt", *keys)
    listed(top / "ImageSets/Main/train.txt", "unread")
    sbd = {f"{CLS}/{key}.mat": mat(mask) for key, mask in MASKS.items()}
    sbd["benchmark_RELEASE/dataset/inst/a.mat"] = b"unread"
    parts = {"train": entry([*TRAIN, *REST]), "val": entry(VAL)}
    fine = entry(TRAIN, url=f"{HOST}/fine")
    monkeypatch.setitem(SPLITS, "voc", {"parts": parts, "cps": {"1464": fine}})
    server.files[fine["url"]] = "\n".join(TRAIN).encode()
    files = {VOC_TAR: contents("drawn"), SBD_TGZ: sbd}
    for name in files:
        url = f"{HOST}/{name}"
        data = archive(Path("from") / name, files[name]).read_bytes()
        monkeypatch.setitem(prepare_data.ARCHIVES, name, (url, hashlib.md5(data).hexdigest()))
        server.files[url] = data
    return files


@pytest.mark.smoke
def test_voc_is_built_with_the_masks_of_both_and_then_left_alone(voc, capsys):
    command("voc")
    out = capsys.readouterr().out
    assert out.index("GB") < out.index("complete")  # the disk it takes is said first
    files, root = contents("data/voc"), Path("data/voc")
    for key in (*TRAIN, *VAL):
        drawn = voc[VOC_TAR][f"{TOP}/SegmentationClass/{key}.png"]
        for place in ("SegmentationClass", "SegmentationClassAug"):
            assert files[f"{place}/{key}.png"] == drawn
    for key in REST:
        with Image.open(root / f"SegmentationClassAug/{key}.png") as mask:
            assert mask.mode == "P" and np.array_equal(np.asarray(mask), MASKS[key])
            assert mask.getpalette()[:63] == sum(FACTS["voc"]["palette"], [])
    text = files["ImageSets/Segmentation/train_aug.txt"].decode()
    assert text == "".join(f"{key}\n" for key in sorted([*TRAIN, *REST]))
    # photographs, masks, lists: no annotations, no partial folder
    assert len(files) == 7 + 4 + 6 + 4 and not list(root.glob(".*"))
    assert keys_of(flags(root, dataset="voc", split="1464")) == [TRAIN, REST, VAL]
    lists = root / "ImageSets/Segmentation"
    (lists / "train_aug.txt").rename(lists / "trainaug.txt")  # MMSegmentation's name of it
    command("voc")
    assert capsys.readouterr().out.splitlines()[1].startswith("data/voc: complete; next: python ")


def test_what_is_there_stays_archives_and_other_files(voc, server):
    server.files.clear()  # archives that are there are not fetched
    root = shutil.copytree("from", "one")
    command("voc --root one")
    listed("one/JPEGImages/mine.jpg", "mine")
    other = listed(f"one/SegmentationClass/{TRAIN[0]}.png", "mine too")
    os.remove("one/ImageSets/Segmentation/train_aug.txt")
    before = contents(root)
    assert refusal(command, "voc --root one").startswith(f"{other}: another file than")
    assert contents(root) == before
    os.remove(other)
    command("voc --root one")
    assert len(contents(root)) == len(before) + 1


KILLS = [(os, "replace", n) for n in (1, 2, 3, 4)]  # owner and name of a function, its call
KILLS += [(Path, "write_bytes", n) for n in (1, 9, 13, 17)]
KILLS += [(Path, "write_text", 1), (shutil, "rmtree", 1)]


def test_a_build_killed_anywhere_is_made_whole_by_the_next(voc, monkeypatch):
    command("voc --from from --root whole")
    for owner, name, at in KILLS:
        root, real, left = Path(f"{name}{at}"), getattr(owner, name), iter(range(at - 1))

        def until_killed(*some, real=real, left=left, **more):
            next(left)
            return real(*some, **more)

        with monkeypatch.context() as kill, pytest.raises(StopIteration):
            kill.setattr(owner, name, until_killed)
            command("voc --from from --root", root)
        command("voc --from from --root", root)
        assert contents(root) == contents("whole") and not list(root.glob(".*"))


R = f"{CLS}/{REST[0]}.mat"
ZEROS = np.zeros((6, 8), np.uint8)
DAMAGE = [  # archive, member, its new content (None: gone), words of the refusal
    (SBD_TGZ, R, mat(ZEROS)[:150], f"{REST[0]}.mat: not readable as a mask"),
    (SBD_TGZ, R, mat(ZEROS + 21), f"{REST[0]}.mat: uint8 of shape (6, 8)"),  # 21 is no class
    (SBD_TGZ, R, mat(ZEROS.T), f"{REST[0]}.mat: another size"),
    (VOC_TAR, f"{TOP}/SegmentationClass/{VAL[0]}.png", None, f"no SegmentationClass/{VAL[0]}"),
    (SBD_TGZ, f"{CLS}/2011_000099.mat", mat(ZEROS), "5 images, set"),
    (VOC_TAR, f"{TOP}/ImageSets/Segmentation/trainval.txt", b"a", "trainval.txt: not train"),
]


@pytest.mark.parametrize("name, member, content, words", DAMAGE)
def test_wrong_archives_leave_nothing_in_place(voc, monkeypatch, name, member, content, words):
    voc[name].pop(member, None)
    if content is not None:
        voc[name][member] = content
    archive(Path("from") / name, voc[name])
    assert "md5" in refusal(command, "voc --from from")
    monkeypatch.setattr(prepare_data, "check_md5", lambda *given: None)
    assert words in refusal(command, "voc --from from")
    assert not list(Path("data/voc").iterdir())


# zip files: (their one folder, what lies there)
CITY_ZIPS = {f"{name}_trainvaltest": ("", [name]) for name in ("leftImg8bit", "gtFine")}
ADE_ZIPS = {"ADEChallengeData2016": ("ADEChallengeData2016/", ["images", "annotations"])}
ZIPS = [  # layout, kind of its masks, zip files; what is lost
    ("cityscapes, label ids", "labelIds", CITY_ZIPS, "jena*Ids.png lin*8bit.png frank*8bit.png"),
    ("ade20k", "class ids", ADE_ZIPS, "*train_00001609.png *val_00000001.jpg *val_00002000.jpg"),
]


@pytest.mark.parametrize("layout, kind, zips, lost", ZIPS)
def test_what_lies_in_zips_is_unpacked_and_what_is_missing_is_said(
    layout, kind, zips, lost, capsys, monkeypatch
):
    name = trees.LAYOUTS[layout][0]
    root = Path("data", name)
    trees.publish_parts(monkeypatch, name)
    trees.draw(root, layout)
    whole = contents(root)
    for file, (top, folders) in zips.items():
        members = {f"{top}{folders[0]}/train/": ""}
        archive(root / f"{file}.zip", members | {top + path: data for path, data in whole.items()})
        for each in folders:
            shutil.rmtree(root / each)
    command(name)
    said = capsys.readouterr().out
    assert f"train: 4 of 4 images; masks: 4 {kind}\n" in said and "complete; next: python" in said
    assert contents(root) == whole and not list(root.glob(".*"))
    for pattern in lost.split():
        os.remove(next(root.rglob(pattern)))
    line = refusal(command, name)
    key = trees.KEYS[name]["train"][2]
    assert f"train: 1 images without a mask, {key} first; val: 0 of 2 images" in line
    shutil.rmtree(root)
    archive(root / f"{next(iter(zips))}.zip", {"readme.txt": b""})
    assert "none of the files" in refusal(command, name) and len(os.listdir(root)) == 1


def test_coco_masks_hold_the_smaller_instance_on_top_and_crowds_below():
    rows = [  # category, area, crowd, segmentation: boxes, and runs down the columns
        (160, 4.0, 0, [[4, 4, 6, 4, 6, 6, 4, 6]]),
        (2, 40.0, 0, [[1, 1, 9, 1, 9, 7, 1, 7], [10, 0, 12, 0, 12, 2, 10, 2]]),
        (24, 90.0, 1, {"counts": [2 * 8, 16, 64], "size": [8, 12]}),
    ]
    fields = ("category_id", "area", "iscrowd", "segmentation")
    root = Path("data/coco")
    for i in (123456, 7):
        picture(root / f"train2017/{i}.jpg", "RGB", 0, (12, 8))
    content = {
        "categories": [{"id": i} for i in range(160, 0, -2)],
        "annotations": [dict(zip(fields, row, strict=True), image_id=7, id=9) for row in rows],
        "images": [dict(id=i, file_name=f"{i}.jpg", width=12, height=8) for i in (123456, 7)],
    }
    train = listed(root / "annotations/instances_train2017.json", "{}")
    listed(root / "annotations/instances_val2017.json", json.dumps(content | {"images": []}))
    assert train in refusal(command, "coco") and not list(root.glob("*.txt"))
    listed(train, json.dumps(content))
    command("coco")
    expected = np.zeros((8, 12), np.uint8)
    expected[:, 2:4] = 12
    expected[1:7, 1:9] = expected[:2, 10:] = 1
    expected[4:6, 4:6] = 80
    assert np.array_equal(pixels(root / "masks/000000000007.png"), expected)
    assert not pixels(root / "masks/000000123456.png").any()
    lines = "train2017/7.jpg masks/000000000007.png\ntrain2017/123456.jpg masks/000000123456.png\n"
    assert (root / "train.txt").read_text() == lines


@pytest.mark.smoke
def test_a_drawn_list_is_that_of_the_same_split_and_seed(capsys):
    root = trees.camvid(Path("cam"))
    command(f"make-split {CAM} --share 1/2 --seed 5 --out lists/5.txt")
    keys = keys_of(flags(root, labeled_list="lists/5.txt"))[0]
    assert keys == sources.choose(NAMES, "1/2", 5)[0] and len(keys) == 3
    said = capsys.readouterr().out
    assert said.startswith(f"lists/5.txt: 3 of 5 images, set {entry(keys)['set']}\n")
    assert f"next: python cps_fpl.py {CAM} --labeled-list lists/5.txt  " in said
    for words in ("", "--labels 2 --share 1/2", "--share half", "--labels 6"):
        assert "--labels" in refusal(command, f"make-split {CAM} --out l.txt {words}")
    folder(Path("own"), ["a\tb"])  # lines of a list have two names, a TAB between them
    line = refusal(command, f"make-split {OWN} 4 --labels 1 --out l.txt")
    assert "names that a list cannot hold" in line and not Path("l.txt").exists()


def test_every_class_means_every_class_as_few_images_changed_as_that_takes():
    folder(Path("own"))
    command(f"make-split {OWN} 4 --every-class --labels 4 --out all.txt")
    line = refusal(command, f"make-split {OWN} 4 --every-class --labels 3 --out few.txt")
    assert "too few" in line and line.rpartition(": ")[2] in "0 1 2 3"
    assert not Path("few.txt").exists()
    listed("own/masks/train/a.png", "bad")
    line = refusal(command, f"make-split {OWN} 4 --every-class --labels 3 --out few.txt")
    assert "train/a.png: not readable" in line
    # for a missing class the last image that is not needed goes
    present = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 0]], bool)
    assert prepare_data.with_every_class(present, 3) == [0, 2, 3]


def test_stats_are_shares_of_pixels_and_numbers_of_images(capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    mask = Image.fromarray(np.array([[3] * 8] + [[255] * 8] * 2 + [[1] * 8] * 3, np.uint8))
    mask.save(folder(Path("own")) / "masks/train/d.png")
    command(f"stats {OWN} 4 --out shares.png")
    assert Image.open("shares.png").size == (640, 400)
    *rows, drawn = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert drawn == ["shares.png:", "drawn"]
    expected = ["27.273 1", "40.909 2", "27.273 1", "4.545 1"]  # of 48, 72, 48, 8 pixels of 176
    assert [" ".join(row[2:4]) for row in rows[1:5]] == expected
    assert rows[5][:3] == ["ignored", "8.333", "1"]  # 16 of 192
    assert rows[1][4:] == ["50.000", "1"]  # val
    listed("own/masks/val/v0.png", "bad")
    assert "v0.png: not readable" in refusal(command, f"stats {OWN} 4")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    remedy = "pip install matplotlib, or -r requirements-dev.txt"
    assert remedy in refusal(command, f"stats {OWN} 4 --out new.png")


NEXT = [  # flags of check, what its next command has beside them
    ("--dataset camvid --data-root 'my tree'", "--split all"),
    ("--dataset folder --num-classes 4 --ignore-index 9 --split 1/2", ""),
    ("--dataset voc --labeled-list l.txt --unlabeled-list u.txt", ""),
    ("--dataset cityscapes --split 1/2 --split-family u2pl --crop-size 33", ""),
    ("--dataset coco --split 1/32", "--split-family unimatch"),
    ("--dataset ade20k --split 1/64", "--split-family unimatch"),
    ("--dataset coco --split 1/2 --split-seed 3", ""),
]


@pytest.mark.parametrize("given, added", NEXT)
def test_the_next_command_of_check_is_of_what_was_checked(given, added):
    check = cli(prepare_data.Check, shlex.split(given))
    assert check.in_flags() == f"{given} {added}".strip()
    args = vars(resolved(cps_fpl, shlex.split(check.in_flags())))
    own = vars(check) | dict(split_family=check.family(), crop_size=args["crop_size"])
    own["split"] = "list" if check.labeled_list else check.split
    assert {name: args[name] for name in own} == own
    kinds = map(get_type_hints, (prepare_data.Split, cps_fpl.Args))
    assert len({kind["split_family"] for kind in kinds}) == 1


def test_the_crop_that_check_proposes_is_16_k_plus_1_and_half_of_the_images_fill_it(capsys):
    four, one = [(40, 200), (50, 60), (300, 70), (99, 99)], [(73, 64)]
    for crop, images, fits in (100, four, 65), (60, four, None), (65, one, 49), (64, one, None):
        prepare_data.Check(dataset="folder", crop_size=crop).tell_padding(images)
        said = capsys.readouterr().out
        assert said.endswith(f": train with --crop-size {fits}\n") if fits else not said


def test_check_of_generated_pictures_tells_their_counts(capsys, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", dict.fromkeys(shapes.COUNTS, 8))
    command("check --dataset shapes --split 1/4")
    counts = re.findall("^(.*) images, set", capsys.readouterr().out, re.M)
    assert counts == ["labeled: 2", "unlabeled: 6", "val: 8", "test: 8"]


def test_check_tells_counts_sets_sizes_and_labels_and_the_number_of_bad_files(capsys):
    root = trees.camvid(Path("cam"))
    picture(root / f"trainannot/{NAMES[2]}.png", "L", 11)  # void
    picture(root / f"trainannot/{NAMES[4]}.png", "L", 4)
    picture(root / f"train/{NAMES[3]}.png", "RGB", 0, (5, 40))
    listed(root / f"trainannot/{NAMES[3]}.png", "bad")  # unlabelled: never opened
    command(f"check {CAM} --split 1/2")
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"next: python cps_fpl.py {CAM} --split 1/2    # or another script"
    start = f"labeled: 3 images, set {entry(NAMES[::2])['set']}, 8x6 to 8x6 pixels"
    assert out[0] == f"{start}, classes 0 to 4, 33.33 % ignored"
    assert out[1].startswith("warning: in no labelled mask: 1 (building), 2 (")
    assert re.findall(r"\d+", out[1]) == "1 2 3 5 6 7 8 9 10".split()
    assert out[2] == f"unlabeled: 2 images, set {entry(NAMES[1::2])['set']}, 8x6 to 5x40 pixels"
    # pixels of two sets, in files that differ; no class in val; a mask that is no image
    shown = Image.open(root / f"train/{NAMES[1]}.png")
    shown.save(root / "val/v1.png")  # of one colour, as a tile without data: no leak
    shown.putpixel((0, 0), (1, 2, 3))
    shown.save(root / f"train/{NAMES[1]}.png")
    shown.save(root / "val/v0.png", compress_level=0)
    for name in ("v0", "v1"):
        picture(root / f"valannot/{name}.png", "L", 255)
    assert refusal(command, f"check {CAM}").startswith("3 bad files, the first 3 named above")
    told = capsys.readouterr()
    assert f"{NAMES[3]}.png: not readable" in told.err and "masks of val; all" in told.err
    assert f"v0.png: an image of val, the same as {root}" in told.err
    assert "v1.png" not in told.err
    assert "is in no labelled mask" not in told.out
