"""prepare_data.py on drawn miniatures: lists, archives, downloads, VOC with SBD, checks, splits."""

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
from unittest.mock import Mock
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
from common.data import FACTS, SPLITS
from common.flags import cli
from tiny import resolved
from trees import NAMES, camvid, command, entry, flags, folder, keys_of, listed, picture, refusal

pytestmark = pytest.mark.usefixtures("empty_folder")
HOST = "https://host"


def contents(root):
    """{name: bytes} of all files in root but for archives."""
    files = (p for p in Path(root).rglob("*") if p.is_file())
    ends = (".tar", ".tgz", ".zip")
    return {str(p.relative_to(root)): p.read_bytes() for p in files if p.suffix not in ends}


@pytest.fixture
def server(monkeypatch):
    """Answers in place of the network: files {address: bytes}, at most limit bytes at once."""
    made = SimpleNamespace(files={}, asked=[], ranges=True, limit=None, length="")

    def answer(request, timeout):
        url, asked = request.full_url, request.get_header("Range")
        assert request.get_header("User-agent") == "prepare_data.py"  # some answer no other
        made.asked.append((url, asked))
        body = made.files.get(url)
        if isinstance(body, HTTPError):
            raise body
        begin = int(asked.strip("bytes=-")) if asked and made.ranges else 0
        if body is None or begin >= len(body) > 0:
            raise HTTPError(url, 404 if body is None else 416, "no", {}, None)
        found = io.BytesIO(body[begin:][: made.limit])
        found.headers = {"Content-Length": made.length or str(len(body) - begin)}
        if begin:
            found.headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        return found

    opener = SimpleNamespace(open=answer)
    monkeypatch.setattr("urllib.request.build_opener", lambda *handlers: opener)
    return made


CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.mark.smoke
@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_was_cut_off_and_is_checked(server, ranges):
    url, path, part = "https://host/a", Path("a.tar"), Path("a.tar.part")
    server.files[url], server.ranges, server.limit = CONTENT, ranges, 1_300_000
    line = refusal(sources.download, url, path, MD5)
    assert "cut off after 1300000 of 3000000 bytes; the same command goes on" in line
    assert not path.exists() and part.read_bytes() == CONTENT[:1_300_000]
    server.limit = None
    for _ in range(2):
        sources.download(url, path, MD5)
        assert path.read_bytes() == CONTENT and not part.exists()
        path.rename(part)  # killed before the rename
    assert server.asked[:2] == [(url, None), (url, "bytes=1300000-")]
    server.files[url] = CONTENT[:-1] + b"x"
    line = refusal(sources.download, url, Path("b"), MD5)
    assert "b.part: md5 " in line and f"instead of {MD5}; delete it" in line
    assert not Path("b").exists() and "404" in refusal(sources.download, url + "b", Path("c"))
    server.length, server.files[url] = "many", b"a\n"  # what no server should say
    sources.download(url, Path("d"))
    assert Path("d").read_bytes() == b"a\n"
    loop = "would lead to a loop.\nThe last was:\nFound"
    server.files[url] = HTTPError(url, 302, loop, {}, None)
    assert refusal(sources.download, url, Path("d")).endswith("to a loop. The last was: Found")


@pytest.mark.parametrize("url", ["ftp://host/a", "file:///etc/a", "data:,x", "http://host/a"])
def test_only_https_is_fetched_from_and_no_redirect_leads_elsewhere(url):
    assert "nothing is fetched but by https" in refusal(sources.download, url, Path("c"))
    follow = sources.Redirect().redirect_request
    assert "https" in refusal(follow, Request(HOST), None, 302, "", {}, url)


KEYS = [f"2007_{i:06d}" for i in (7, 3, 40, 5, 1, 22, 13, 9)]
TRAIN, VAL = trees.FINE[:2], trees.FINE[2:]
LISTS = Path("data/splits/voc_aug")


@pytest.mark.smoke
def test_a_list_is_fetched_once_checked_kept_in_its_order(server, capsys, monkeypatch):
    monkeypatch.setitem(SPLITS["voc_aug"]["u2pl"], "1/4", entry(KEYS[:2], url=HOST))
    server.files = {HOST: "\n".join(KEYS[:2]).encode()}
    path = LISTS / "u2pl/1_4.txt"
    monkeypatch.setattr(sources, "tqdm", bar := Mock(wraps=sources.tqdm))
    for _ in range(2):
        assert sources.fetch_list("voc_aug", "u2pl", "1/4") == path
    assert bar.call_args.kwargs["disable"]  # a list is small
    assert capsys.readouterr().out == f"{path}: 2 images, set {entry(KEYS[:2])['set']}\n"
    assert len(server.asked) == 1 and path.read_text() == f"{KEYS[0]}\n{KEYS[1]}\n"
    path.write_text("a page")
    line = refusal(sources.fetch_list, "voc_aug", "u2pl", "1/4")
    assert line.startswith(f"{path}: ") and "delete it" in line and path.read_text() == "a page"
    path.unlink()
    for body in (b"2007_000007\n2007_000040\n", b"<html>moved</html>", None):
        server.files = {HOST: body}
        line = refusal(sources.fetch_list, "voc_aug", "u2pl", "1/4")
        assert HOST in line and ("404" in line or entry(KEYS[:2])["set"] in line)
    assert not list(Path().rglob("*.txt"))


@pytest.mark.parametrize("dataset", SPLITS)
def test_a_list_that_cannot_be_fetched_is_refused_with_the_command_that_fetches_it(server, dataset):
    for family, split in ((f, s) for f in SPLITS[dataset] for s in SPLITS[dataset][f]):
        line = refusal(sources.fetch_list, dataset, family, split)
        if (dataset, family, split) == ("coco", "parts", "train"):
            assert line.endswith("they are those in its folder, train2017/*")
            continue
        words = line.partition("; python prepare_data.py ")[2].partition(", with")[0]
        assert line.startswith(str(sources.LISTS)) and "with --from DIR" in line and server.asked
        server.asked.clear()
        refusal(command, words + f" --dataset {dataset}")
        assert server.asked


def test_splits_finds_a_family_and_both_parts_by_their_sets(capsys, monkeypatch):
    splits = {
        "parts": {"train": entry(KEYS, url=HOST), "val": entry(VAL, url=HOST)},
        "cps": {"1/4": entry(sorted(KEYS)[::4])},  # in no list: every 4th image
        "cac0": {"1/4": entry(KEYS[:3], url=HOST)},
        "cac1": {"1/4": entry(KEYS[1:3], url=HOST)},
    }
    for name in list(SPLITS):
        monkeypatch.delitem(SPLITS, name)
    monkeypatch.setitem(SPLITS, "voc_aug", splits)
    rows = [f"images/{k}.jpg\tmasks/{k}.png" for k in reversed(KEYS)]
    for name, lines in (("deep/x", rows), ("a", VAL), ("b", ["notes"]), ("c", KEYS[1:3])):
        listed(f"lists/{name}.txt", *lines)
    command("splits --family cps --dataset voc_aug --from lists")
    assert "all lists of cps are there" in capsys.readouterr().out
    assert "1 lists" in refusal(command, "splits --family cac --from lists")
    assert "cac0/1_4.txt" in capsys.readouterr().err
    found = {name: text.decode().split() for name, text in contents(LISTS).items()}
    parts = {"parts/train.txt": KEYS[::-1], "parts/val.txt": VAL}
    assert found == parts | {"cps/1_4.txt": sorted(KEYS)[::4], "cac1/1_4.txt": KEYS[1:3]}


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


OUT = ["../evil", "a/../../evil", "/evil", "C:\\evil", "C:evil", "..\\evil", "\\\\h\\evil"]
LINKS = [("/etc/passwd", tarfile.SYMTYPE), ("../../etc/passwd", tarfile.SYMTYPE)]
LINKS += [("/etc/passwd", tarfile.LNKTYPE), ("../out", tarfile.LNKTYPE), ("", tarfile.CHRTYPE)]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_what_leads_out_or_is_cut_off_is_refused_by_name(tmp_path, kind):
    path, to = tmp_path / f"a.{kind}", tmp_path / "to"
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


REST = ["2007_000032", "2009_003377"]
SBD = [TRAIN[0], VAL[0], *REST]  # two of them VOC's too
CLS, TOP = "benchmark_RELEASE/dataset/cls", "VOCdevkit/VOC2012"


def mat(array):
    """What is read of SBD's form: a struct GTcls with a Segmentation."""
    file = io.BytesIO()
    savemat(file, {"GTcls": {"Segmentation": array}}, do_compression=True)
    return file.getvalue()


RNG = np.random.default_rng(3)
MASKS = {key: RNG.integers(0, 21, (6, 8), np.uint8) for key in SBD}


def put(monkeypatch, *files):
    """Writes VOC's and SBD's archives, {name: bytes}, into `from`; their hashes are right."""
    for name, content in zip(prepare_data.ARCHIVES, files, strict=True):
        data = archive(Path("from") / name, content).read_bytes()
        known = (f"{HOST}/{name}", hashlib.md5(data).hexdigest())
        monkeypatch.setitem(prepare_data.ARCHIVES, name, known)


@pytest.fixture
def voc(monkeypatch, server):
    """Both archives in miniature, in `from` and on the server; returns their files."""
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
    put(monkeypatch, contents("drawn"), sbd)
    server.files = {f"{HOST}/{path.name}": path.read_bytes() for path in Path("from").iterdir()}
    server.files[fine["url"]] = "\n".join(TRAIN).encode()
    return contents("drawn"), sbd


@pytest.mark.smoke
def test_voc_is_built_with_the_masks_of_both_and_then_left_alone(voc, capsys, monkeypatch):
    command("voc")
    out = capsys.readouterr().out
    assert out.index("GB") < out.index("complete")  # the disk it takes is said first
    files, root = contents("data/voc"), Path("data/voc")
    for key in (*TRAIN, *VAL):
        drawn = voc[0][f"{TOP}/SegmentationClass/{key}.png"]
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
    monkeypatch.setattr(prepare_data, "archive", lambda *some: pytest.fail("archives asked for"))
    command("voc")
    assert "data/voc: complete; next: python prepare_data.py check" in capsys.readouterr().out


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

        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(owner, name, until_killed)
            command("voc --from from --root", root)
        # the lists come last: with them, all is there
        assert bool(prepare_data.lacking(root)) != (root / "ImageSets").exists()
        command("voc --from from --root", root)
        assert contents(root) == contents("whole") and not list(root.glob(".*"))


R = f"{CLS}/{REST[0]}.mat"
WRONG = np.zeros((6, 8), np.uint8)
WRONG[3, 4] = 21
DAMAGE = [  # archive (0: VOC's), member, its new content (None: gone), a word of the refusal
    (1, R, mat(WRONG * 0)[:150], f"{REST[0]}.mat: not readable as a mask"),
    (1, R, mat(WRONG), f"{REST[0]}.mat: uint8 of shape (6, 8)"),  # 21 is no class
    (1, R, mat(WRONG.T * 0), f"{REST[0]}.mat: another size"),
    (0, f"{TOP}/SegmentationClass/{VAL[0]}.png", None, f"no SegmentationClass/{VAL[0]}"),
    (1, f"{CLS}/2011_000099.mat", mat(WRONG * 0), "5 images, set"),
    (0, f"{TOP}/ImageSets/Segmentation/trainval.txt", b"a", "trainval.txt: not train and val"),
]


@pytest.mark.parametrize("which, name, content, words", DAMAGE)
def test_wrong_archives_leave_nothing_in_place(voc, monkeypatch, which, name, content, words):
    voc[which].pop(name, None)
    if content is not None:
        voc[which][name] = content
    put(monkeypatch, *voc)
    assert words in refusal(command, "voc --from from")
    assert not list(Path("data/voc").iterdir())
    path = Path("from/benchmark.tgz")
    path.write_bytes(path.read_bytes()[:-20])
    assert "md5" in refusal(command, "voc --from from") and not contents("data")


def test_cityscapes_says_what_is_missing_and_is_unpacked_from_its_zips(capsys, monkeypatch):
    root = Path("data/cityscapes")
    trees.publish_parts(monkeypatch, "cityscapes")
    trees.draw(root, "cityscapes, label ids")
    whole = contents(root)
    for top in ("leftImg8bit", "gtFine"):
        files = {name: data for name, data in whole.items() if name.startswith(top)}
        archive(root / f"{top}_trainvaltest.zip", {"README": "x", f"{top}/": ""} | files)
        shutil.rmtree(root / top)
    command("cityscapes")
    said = capsys.readouterr().out
    assert "train: 4 of 4 images; masks: 4 labelIds\n" in said and "complete; next: python" in said
    assert contents(root) == whole and not list(root.glob(".*"))
    for name in ("jena*_labelIds.png", "lindau*_leftImg8bit.png", "frankfurt*_leftImg8bit.png"):
        os.remove(next(root.rglob(name)))
    line = refusal(command, "cityscapes")
    assert "train: 1 images without a mask, jena_000078_000019 first; val: 0 of 2 images" in line


def test_coco_masks_hold_the_smaller_instance_on_top_and_crowds_below():
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    rows = [  # category, area, crowd, segmentation: boxes, and runs down the columns
        (90, 4.0, 0, [[4, 4, 6, 4, 6, 6, 4, 6]]),
        (1, 40.0, 0, [[1, 1, 9, 1, 9, 7, 1, 7], [10, 0, 12, 0, 12, 2, 10, 2]]),
        (13, 90.0, 1, {"counts": [2 * 8, 16, 64], "size": [8, 12]}),
    ]
    fields = ("category_id", "area", "iscrowd", "segmentation")
    root, names = Path("data/coco"), {i: f"{i:012d}" for i in (123456, 7)}
    for name in names.values():
        picture(root / f"train2017/{name}.jpg", "RGB", 0, (12, 8))
    content = {
        "categories": [{"id": i, "name": "x"} for i in reversed(ids)],
        "annotations": [dict(zip(fields, row, strict=True), image_id=7, id=9) for row in rows],
        "images": [dict(id=i, file_name=f"{names[i]}.jpg", width=12, height=8) for i in names],
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
    for i, classes in ((7, expected), (123456, expected * 0)):
        assert np.array_equal(np.asarray(Image.open(root / f"masks/{names[i]}.png")), classes)
    lines = [f"train2017/{names[i]}.jpg masks/{names[i]}.png" for i in (7, 123456)]
    assert (root / "train.txt").read_text().splitlines() == lines


CAM, OWN = "--dataset camvid --data-root cam", "--dataset folder --data-root own --num-classes"


@pytest.mark.smoke
def test_a_drawn_list_is_that_of_the_same_split_and_seed(capsys):
    root = camvid(Path("cam"))
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
    ("--dataset shapes --split 1/2", ""),
    ("--dataset camvid --data-root 'my tree'", "--split all"),
    ("--dataset folder --num-classes 4 --ignore-index 9 --split 1/2 --split-seed 3", ""),
    ("--dataset voc --labeled-list l.txt --unlabeled-list u.txt", ""),
    ("--dataset cityscapes --split 1/2 --split-family u2pl --crop-size 33", ""),
    ("--dataset coco --split 1/32", "--split-family unimatch"),
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
    sizes = [(40, 200), (50, 60), (300, 70), (99, 99)]
    prepare_data.Check(dataset="folder", crop_size=100).tell_padding(sizes)
    said = "4 of 4 images are smaller than a crop of 100 pixels, the rest of it is padding"
    assert f"{said}: train with --crop-size 65\n" in capsys.readouterr().out
    prepare_data.Check(dataset="folder", crop_size=60).tell_padding(sizes)
    assert not capsys.readouterr().out


def test_check_of_generated_pictures_tells_their_counts(capsys, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", dict.fromkeys(shapes.COUNTS, 8))
    command("check --dataset shapes --split 1/4")
    counts = re.findall("^(.*) images, set", capsys.readouterr().out, re.M)
    assert counts == ["labeled: 2", "unlabeled: 6", "val: 8", "test: 8"]


def test_check_tells_counts_sets_sizes_and_labels_and_the_number_of_bad_files(capsys):
    root = camvid(Path("cam"))
    picture(root / f"trainannot/{NAMES[2]}.png", "L", 11)  # void
    picture(root / f"trainannot/{NAMES[4]}.png", "L", 4)
    picture(root / f"train/{NAMES[3]}.png", "RGB", 0, (5, 40))
    listed(root / f"trainannot/{NAMES[3]}.png", "bad")  # unlabelled: never opened
    command(f"check {CAM} --split 1/2")
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"next: python cps_fpl.py {CAM} --split 1/2    # or another script"
    start = f"labeled: 3 images, set {entry(NAMES[::2])['set']}, 8x6 to 8x6 pixels"
    assert out[0] == f"{start}, classes 0 to 4, 33.33 % ignored"
    never = [line.split()[2] for line in out if line.startswith("warning")]
    assert never == "1 2 3 5 6 7 8 9 10".split()
    assert out[10] == f"unlabeled: 2 images, set {entry(NAMES[1::2])['set']}, 8x6 to 5x40 pixels"
    # pixels of two sets, in files that differ; no class in val; a mask that is no image
    Image.open(root / f"train/{NAMES[1]}.png").save(root / "val/v0.png", compress_level=0)
    for name in ("v0", "v1"):
        picture(root / f"valannot/{name}.png", "L", 255)
    assert refusal(command, f"check {CAM}").startswith("3 bad files, the first 3 named above")
    told = capsys.readouterr()
    assert f"{NAMES[3]}.png: not readable" in told.err and "masks of val; all" in told.err
    assert f"v0.png: an image of val, the same as {root}" in told.err
    assert "is in no labelled mask" not in told.out
