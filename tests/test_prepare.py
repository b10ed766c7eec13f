"""prepare_data.py on drawn miniatures: lists, archives, downloads, VOC with SBD, checks, convert.

Nothing is fetched but from this process.
"""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints
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
from common.flags import about
from common.run import report
from common.sources import load
from formats import TURNED
from tiny import resolved
from trees import NAMES, camvid, entry, flags, folder, keys_of, listed, own, picture, refusal


def command(line, *more):
    """Runs a command as its line has it."""
    prepare_data.main([*line.split(), *map(str, more)])


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test has a current folder of its own: lists are cached below it."""
    monkeypatch.chdir(tmp_path)
    sources.lists_below.cache_clear()


def contents(root):
    """{name: bytes} of all files in root but for archives."""
    files = (p for p in Path(root).rglob("*") if p.is_file())
    ends = (".tar", ".tgz", ".zip")
    return {str(p.relative_to(root)): p.read_bytes() for p in files if p.suffix not in ends}


@pytest.fixture
def server(monkeypatch):
    """Answers in place of the network: files {address: bytes}, at most limit bytes at once."""
    made = SimpleNamespace(files={}, asked=[], ranges=True, limit=None)

    def answer(self, request, timeout):
        url, asked = request.full_url, request.get_header("Range")
        made.asked.append((url, asked))
        body = made.files.get(url)
        begin = int(asked.strip("bytes=-")) if asked and made.ranges else 0
        if body is None or begin >= len(body) > 0:
            raise HTTPError(url, 404 if body is None else 416, "no", {}, None)
        found = io.BytesIO(body[begin:][: made.limit])
        found.headers = {"Content-Length": str(len(body) - begin)}
        if begin:
            found.headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        return found

    monkeypatch.setattr("urllib.request.OpenerDirector.open", answer)
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


def test_only_https_is_fetched_from_and_no_redirect_leads_elsewhere():
    follow = sources.Redirect().redirect_request
    for url in ("ftp://host/a", "file:///etc/hostname", "data:,x", "http://host/a"):
        assert "nothing is fetched but by https" in refusal(sources.download, url, Path("c"))
        assert "https" in refusal(follow, Request("https://host/a"), None, 302, "", {}, url)


KEYS = [f"2007_{i:06d}" for i in (7, 3, 40, 5, 1, 22, 13, 9)]
LISTS, HOST = Path("data/splits/voc_aug"), "https://host"


@pytest.fixture
def small(server, monkeypatch):
    """Splits of a small voc_aug: u2pl's 1/4 and cac's are fetched, cps's 1/4 every 4th image."""
    splits = {"parts": {"train": entry(KEYS, url=f"{HOST}/train")}}
    splits["parts"]["val"] = entry(["2008_000001"], url=f"{HOST}/val")
    splits["cps"] = {"1/4": entry(sorted(KEYS)[::4])}
    splits["u2pl"] = {"1/4": entry(KEYS[:2], url=f"{HOST}/u2pl")}
    splits |= {f"cac{i}": {"1/4": entry(KEYS[i:3], url=f"{HOST}/cac")} for i in (0, 1)}
    for name in list(SPLITS):
        monkeypatch.delitem(SPLITS, name)
    monkeypatch.setitem(SPLITS, "voc_aug", splits)
    train = "".join(f"/JPEGImages/{k}.jpg /m/{k}.png\r\n" for k in KEYS).encode()
    bodies = {"train": train, "u2pl": "\n".join(KEYS[:2]).encode(), "val": b"2008_000001"}
    server.files = {f"{HOST}/{name}": body for name, body in bodies.items()}
    return server


@pytest.mark.smoke
def test_a_list_is_fetched_once_checked_kept_in_its_order_and_never_mended(small, capsys):
    """One that cannot be had is refused with the command as it is typed."""
    path = LISTS / "u2pl/1_4.txt"
    for _ in range(2):
        assert sources.fetch_list("voc_aug", "u2pl", "1/4") == path
    assert capsys.readouterr().out == f"{path}: 2 images, set {entry(KEYS[:2])['set']}\n"
    assert len(small.asked) == 1 and path.read_text() == f"{KEYS[0]}\n{KEYS[1]}\n"
    path.write_text("a page")
    line = refusal(command, "splits --family u2pl")
    assert line.startswith(f"{path}: ") and "delete it" in line and path.read_text() == "a page"
    shutil.rmtree("data")
    for body in (b"2007_000007\n2007_000040\n", b"<html>moved</html>", None):
        small.files = {f"{HOST}/u2pl": body}
        line = refusal(sources.fetch_list, "voc_aug", "u2pl", "1/4")
        assert "python prepare_data.py splits --family u2pl, with --from DIR" in line
        assert "/u2pl" in line and ("404" in line or entry(KEYS[:2])["set"] in line)
    for family, split, word in (
        ("parts", "train", "cps"),
        ("cps", "1/4", "cps"),
        ("cac1", "1/4", "cac"),
    ):
        line = refusal(sources.fetch_list, "voc_aug", family, split)
        assert f"python prepare_data.py splits --family {word}, with --from DIR" in line
    assert not list(Path().rglob("*.txt"))


@pytest.mark.parametrize("dataset", SPLITS)
def test_a_list_that_cannot_be_fetched_is_refused_with_the_command_that_fetches_it(server, dataset):
    for family, split in ((f, s) for f in SPLITS[dataset] for s in SPLITS[dataset][f]):
        if (dataset, family, split) == ("coco", "parts", "train"):  # no such list
            continue
        line = refusal(sources.fetch_list, dataset, family, split)
        words = line.partition("; python prepare_data.py ")[2].partition(", with")[0]
        assert line.startswith(str(sources.LISTS)) and server.asked
        server.asked.clear()
        refusal(command, words + f" --dataset {dataset}")
        assert server.asked


def test_splits_writes_a_family_and_both_parts_from_the_network_or_a_folder(small, capsys):
    command("splits --family cps --dataset voc_aug")
    assert contents(LISTS).keys() == {"cps/1_4.txt", "parts/train.txt", "parts/val.txt"}
    assert (LISTS / "cps/1_4.txt").read_text().split() == sorted(KEYS)[::4]
    assert "all lists of cps are there" in capsys.readouterr().out
    # lists are found by their sets, whatever they are called
    shutil.rmtree("data")
    rows = [f"images/{k}.jpg\tmasks/{k}.png" for k in reversed(KEYS)]
    listed(Path("lists/deep/x.txt"), "\ufeff" + rows[0], *rows[1:])
    listed(Path("lists/notes.txt"), "notes")
    listed(Path("lists/cac.txt"), *KEYS[1:3])
    assert "2 lists" in refusal(command, "splits --family cac --from lists")
    lost = capsys.readouterr().err
    assert "cac0/1_4.txt" in lost and "val.txt" in lost
    assert (LISTS / "parts/train.txt").read_text().split() == KEYS[::-1]
    assert (LISTS / "cac1/1_4.txt").read_text().split() == KEYS[1:3]


def archive(path, files, *links):
    """Writes a tar or zip: {name: bytes}, then links: (name, target, kind)."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as opened:
            for name, data in files.items():
                opened.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.linkname, info.type = target, kind
            tar.addfile(info)
    return path


OUT = ["../evil", "a/../../evil", "/evil", "C:\\evil", "C:evil", "..\\evil", "\\\\h\\evil"]
LINKS = [("/etc/passwd", tarfile.SYMTYPE), ("../../etc/passwd", tarfile.SYMTYPE)]
LINKS += [("/etc/passwd", tarfile.LNKTYPE), ("../out", tarfile.LNKTYPE), ("", tarfile.CHRTYPE)]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_what_leads_out_or_is_cut_off_is_refused_by_name(tmp_path, kind):
    path, to, good = tmp_path / f"a.{kind}", tmp_path / "to", {"good": b"x"}
    info = zipfile.ZipInfo("l")
    info.external_attr = 0o120777 << 16
    bad = [(name, ({name: b"x"},)) for name in OUT]
    bad += [("l", ({info: "x"},))] if kind == "zip" else [("l", ({}, ("l", *one))) for one in LINKS]
    for name, (files, *links) in bad:
        archive(path, good | files, *links)
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


TRAIN, VAL = ["2007_000001", "2007_000002", "2009_000005"], ["2007_000003", "2008_000009"]
SBD = ["2007_000001", "2007_000003", "2008_000004", "2010_000006"]  # two of them VOC's too
REST = SBD[2:]
CLS, ARCHIVES = "benchmark_RELEASE/dataset/cls", [*prepare_data.ARCHIVES]


def mat(array):
    """SBD's form: a struct GTcls with Boundaries, Segmentation and CategoriesPresent."""
    file, content = io.BytesIO(), {"Boundaries": np.zeros((20, 1)), "Segmentation": array}
    savemat(file, {"GTcls": content | {"CategoriesPresent": np.unique(array)}}, do_compression=True)
    return file.getvalue()


@pytest.fixture
def voc(monkeypatch):
    """Both archives in miniature in the folder `from`, fetched from there by file://.

    files: {name: bytes} of each. masks: SBD's. put() writes the archives; their hashes are right.
    """
    top = Path("drawn/VOCdevkit/VOC2012")
    for i, key in enumerate(sorted({*TRAIN, *VAL, *SBD, "2011_000099"})):  # in no list: the last
        picture(top / f"JPEGImages/{key}.jpg", "RGB", i, (9, 7))
    for key, value in zip(TRAIN + VAL, (0, 20, 255, 1, 5), strict=True):
        picture(top / f"SegmentationClass/{key}.png", "P", value, (9, 7))
    for part, keys in (("train", TRAIN), ("val", VAL), ("trainval", sorted(TRAIN + VAL))):
        listed(top / f"ImageSets/Segmentation/{part}.txt", *keys)
    listed(top / "ImageSets/Main/train.txt", "unread")
    rng = np.random.default_rng(3)
    made = SimpleNamespace(masks={key: rng.integers(0, 21, (7, 9), np.uint8) for key in SBD})
    sbd = {f"{CLS}/{key}.mat": mat(mask) for key, mask in made.masks.items()}
    made.files = [contents("drawn"), sbd | {"benchmark_RELEASE/dataset/inst/a.mat": b"unread"}]
    fine = entry(TRAIN, url=Path(listed(Path("fine"), *TRAIN)).resolve().as_uri())
    parts = {"train": entry([*TRAIN, *REST]), "val": entry(VAL)}
    monkeypatch.setitem(SPLITS, "voc", {"parts": parts, "cps": {"1464": fine}})
    monkeypatch.setattr(sources, "SCHEMES", ("file",))
    Path("from").mkdir()

    def put():
        known = {}
        for name, files in zip(ARCHIVES, made.files, strict=True):
            path = archive(Path("from").resolve() / name, files)
            known[name] = (path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest())
        monkeypatch.setattr(prepare_data, "ARCHIVES", known)

    made.put = put
    put()
    return made


@pytest.mark.smoke
def test_voc_is_built_with_the_masks_of_both_and_then_left_alone(voc, capsys, monkeypatch):
    command("voc")
    out = capsys.readouterr().out
    assert out.index("GB") < out.index("complete")  # the disk it takes is said first
    files, root = contents("data/voc"), Path("data/voc")
    for key in (*TRAIN, *VAL):
        drawn = voc.files[0][f"VOCdevkit/VOC2012/SegmentationClass/{key}.png"]
        for place in ("SegmentationClass", "SegmentationClassAug"):
            assert files[f"{place}/{key}.png"] == drawn
    for key in REST:
        with Image.open(root / f"SegmentationClassAug/{key}.png") as mask:
            assert mask.mode == "P" and np.array_equal(np.asarray(mask), voc.masks[key])
            assert mask.getpalette()[:63] == sum(FACTS["voc"]["palette"], [])
    text = files["ImageSets/Segmentation/train_aug.txt"].decode()
    assert text == "".join(f"{key}\n" for key in sorted([*TRAIN, *REST]))
    # photographs, masks, lists: no annotations, no partial folder
    assert len(files) == 8 + 5 + 7 + 4 and not list(root.glob(".*"))
    data = sources.load(flags(root, dataset="voc", split="1464"))
    assert keys_of(data.labeled) == sorted(TRAIN) and keys_of(data.unlabeled) == REST
    monkeypatch.setattr(prepare_data, "archive", lambda *some: pytest.fail("archives asked for"))
    command("voc")
    assert "data/voc: complete; next: python prepare_data.py check" in capsys.readouterr().out


def test_what_is_there_stays_archives_and_other_files(voc, monkeypatch):
    monkeypatch.setattr(sources, "SCHEMES", ())  # archives that are there are not fetched
    shutil.copytree("from", "one")
    command("voc --root one")
    root = Path("one")
    listed(root / "JPEGImages/mine.jpg", "mine")
    other = Path(listed(root / f"SegmentationClass/{TRAIN[0]}.png", "mine too"))
    (root / "ImageSets/Segmentation/train_aug.txt").unlink()
    before = contents(root)
    assert refusal(command, "voc --root one").startswith(f"{other}: another file than")
    assert contents(root) == before
    other.unlink()
    command("voc --root one")
    assert len(contents(root)) == len(before) + 1


def test_a_build_killed_anywhere_is_made_whole_by_the_next(voc, monkeypatch):
    command("voc --from from --root whole")
    places = [(os, "replace", at) for at in (1, 2, 3, 4)]
    places += [(Path, "write_bytes", at) for at in (1, 9, 13, 17)]
    for owner, name, at in (*places, (Path, "write_text", 1), (shutil, "rmtree", 1)):
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


R, TOP = f"{CLS}/{REST[0]}.mat", "VOCdevkit/VOC2012"
WRONG = np.zeros((7, 9), np.uint8)
WRONG[3, 4] = 21
DAMAGE = [  # archive (0: VOC's), member, its new content (None: gone), a word of the refusal
    (1, R, mat(WRONG * 0)[:150], f"{REST[0]}.mat: not readable as a mask"),
    (1, R, mat(WRONG), f"{REST[0]}.mat: uint8 of shape (7, 9)"),  # 21 is no class
    (1, R, mat(WRONG.T * 0), f"{REST[0]}.mat: another size"),
    (0, f"{TOP}/SegmentationClass/{VAL[0]}.png", None, f"no SegmentationClass/{VAL[0]}"),
    (1, f"{CLS}/2011_000099.mat", mat(WRONG * 0), "6 images, set"),
    (0, f"{TOP}/ImageSets/Segmentation/trainval.txt", b"a", "trainval.txt: not train and val"),
]


def test_archives_that_are_not_right_leave_nothing_in_place(voc):
    good = [dict(files) for files in voc.files]
    for which, name, content, word in DAMAGE:
        voc.files = [dict(files) for files in good]
        voc.files[which].pop(name, None)
        voc.files[which] |= {} if content is None else {name: content}
        voc.put()
        assert word in refusal(command, "voc --from from"), name
        assert not list(Path("data/voc").iterdir())
    path = Path("from/benchmark.tgz")
    path.write_bytes(path.read_bytes()[:-20])
    assert "md5" in refusal(command, "voc --from from") and not contents("data")


def test_cityscapes_says_what_is_missing_and_is_unpacked_from_its_zips(capsys, monkeypatch):
    places = [f"train/jena/jena_000000_00000{i}" for i in (1, 2)] + ["val/ulm/ulm_000000_000001"]
    parts = {"train": entry([place[11:] for place in places[:2]]), "val": entry([places[2][8:]])}
    monkeypatch.setitem(SPLITS, "cityscapes", {"parts": parts})
    root = Path("data/cityscapes")
    for place in places:
        picture(root / f"leftImg8bit/{place}_leftImg8bit.png", "L", 0)
        picture(root / f"gtFine/{place}_gtFine_labelIds.png", "L", 0)
    whole = contents(root)
    for top in ("leftImg8bit", "gtFine"):
        files = {name: data for name, data in whole.items() if name.startswith(top)}
        archive(root / f"{top}_trainvaltest.zip", {"README": "x", f"{top}/": ""} | files)
        shutil.rmtree(root / top)
    command("cityscapes")
    assert "train: 2 of 2 images; masks: 2 labelIds\n" in capsys.readouterr().out
    assert contents(root) == whole and not list(root.glob(".*"))
    (root / "gtFine/train/jena/jena_000000_000002_gtFine_labelIds.png").unlink()
    os.remove(root / "leftImg8bit/val/ulm/ulm_000000_000001_leftImg8bit.png")
    line = refusal(command, "cityscapes")
    assert "train: 1 images without a mask, jena_000000_000002 first; val: 0 of 1 images" in line


def test_coco_masks_hold_the_smaller_instance_on_top_and_crowds_below():
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    root, (width, height) = Path("data/coco"), (12, 8)
    rows = [  # category, area, crowd, segmentation: boxes, and runs down the columns
        (90, 4.0, 0, [[4, 4, 6, 4, 6, 6, 4, 6]]),
        (1, 40.0, 0, [[1, 1, 9, 1, 9, 7, 1, 7], [10, 0, 12, 0, 12, 2, 10, 2]]),
        (13, 90.0, 1, {"counts": [2 * 8, 16, 64], "size": [height, width]}),
    ]
    fields = ("category_id", "area", "iscrowd", "segmentation")
    rows = [dict(zip(fields, row, strict=True), image_id=7, id=9) for row in rows]
    good = {"categories": [{"id": i, "name": "x"} for i in reversed(ids)], "annotations": rows}
    good["images"] = []
    for name in (123456, 7):
        file = f"{name:012d}.jpg"
        picture(root / "train2017" / file, "RGB", 0, (width, height))
        good["images"].append(dict(id=name, file_name=file, width=width, height=height))
    train = Path(listed(root / "annotations/instances_train2017.json", "{}"))
    listed(root / "annotations/instances_val2017.json", json.dumps(good | {"images": []}))
    assert str(train) in refusal(command, "coco") and not list(root.glob("*.txt"))
    train.write_text(json.dumps(good))
    command("coco")
    expected = np.zeros((height, width), np.uint8)
    expected[:, 2:4] = 12
    expected[1:7, 1:9] = expected[:2, 10:] = 1
    expected[4:6, 4:6] = 80
    assert np.array_equal(np.asarray(Image.open(root / "masks/000000000007.png")), expected)
    assert not np.asarray(Image.open(root / "masks/000000123456.png")).any()
    lines = [f"train2017/{i:012d}.jpg masks/{i:012d}.png" for i in (7, 123456)]
    assert (root / "train.txt").read_text().splitlines() == lines


CAM, OWN = "--dataset camvid --data-root cam", "--dataset folder --data-root own --num-classes"


@pytest.mark.smoke
def test_a_drawn_list_is_that_of_the_same_split_and_seed(capsys):
    root = camvid(Path("cam"))
    command(f"make-split {CAM} --share 1/2 --seed 5 --out lists/5.txt")
    keys = keys_of(sources.load(flags(root, labeled_list="lists/5.txt")).labeled)
    assert keys == sources.choose(NAMES, "1/2", 5)[0] and len(keys) == 3
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"lists/5.txt: 3 of 5 images, set {entry(keys)['set']}"
    words = f"next: python cps_fpl.py {CAM} --labeled-list lists/5.txt"
    assert second == f"{words}    # or another script"
    for words in ("", "--labels 2 --share 1/2", "--share half", "--labels 6"):
        assert "--labels" in refusal(command, f"make-split {CAM} --out l.txt {words}")
    assert not Path("l.txt").exists()


def test_every_class_means_every_class_as_few_images_changed_as_that_takes():
    folder(Path("own"))
    command(f"make-split {OWN} 4 --every-class --labels 4 --out all.txt")
    line = refusal(command, f"make-split {OWN} 4 --every-class --labels 3 --out few.txt")
    assert "too few" in line and line.rpartition(": ")[2] in "0 1 2 3"
    assert not Path("few.txt").exists()
    # for a missing class the last image that is not needed goes
    present = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 0]], bool)
    assert prepare_data.with_every_class(present, 3) == [0, 2, 3]


def test_stats_are_shares_of_pixels_and_numbers_of_images(capsys):
    assert "--crop-size" in refusal(command, f"stats {OWN} 4 --crop-size 64")
    mask = Image.fromarray(np.array([[3] * 8] + [[255] * 8] * 2 + [[1] * 8] * 3, np.uint8))
    mask.save(folder(Path("own")) / "masks/train/d.png")
    command(f"stats {OWN} 4")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = ["27.273 1", "40.909 2", "27.273 1", "4.545 1"]  # of 48, 72, 48, 8 pixels of 176
    assert [" ".join(row[2:4]) for row in rows[1:5]] == expected
    assert rows[5][:3] == ["ignored", "8.333", "1"]  # 16 of 192
    assert rows[1][4:] == ["50.000", "1"]  # val


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "coco", "camvid"])
def test_check_and_stats_take_the_splits_of_the_scripts(dataset, monkeypatch):
    asked = get_type_hints(prepare_data.Split)["split_family"]
    assert asked == get_type_hints(cps_fpl.Args)["split_family"]
    monkeypatch.setattr(prepare_data, "load", lambda args: args)
    recipe = cps_fpl.preset(cps_fpl.Args(dataset=dataset))
    for kind in (prepare_data.Check, prepare_data.Stats):
        assert kind(dataset=dataset).load().split_family == recipe.get("split_family", "cps")
        assert kind(dataset=dataset, split_family="cac1").load().split_family == "cac1"


NEXT = {  # data set: its layout, flags of check, those that are printed beside data set and root
    "shapes": (None, "--split 1/2", "--split 1/2"),
    "camvid": (trees.camvid, "--split 1/2 --crop-size 33", "--split 1/2 --crop-size 33"),
    "folder": (folder, "--num-classes 4 --ignore-index 9 --split 1/2 --split-seed 3",
               "--num-classes 4 --ignore-index 9 --split 1/2 --split-seed 3"),
    "voc": ("voc, official", "--labeled-list l.txt", "--labeled-list l.txt"),
    "voc_aug": ("voc, CPS", "--split 1/2", "--split 1/2 --split-family cps"),
    "cityscapes": ("cityscapes, official", "--split 1/2 --split-family u2pl",
                   "--split 1/2 --split-family u2pl"),
    "coco": ("coco", "--split 1/32", "--split 1/32 --split-family unimatch"),
}  # fmt: skip


@pytest.mark.parametrize("dataset", NEXT)
def test_the_next_command_of_check_trains_on_what_was_checked(dataset, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "COUNTS", dict.fromkeys(shapes.COUNTS, 8))
    layout, more, printed = NEXT[dataset]
    where = f"--dataset {dataset}"
    if layout:
        where += " --data-root 'my tree'"
    if isinstance(layout, str):
        trees.draw(Path("my tree"), layout)
        keys = trees.KEYS[dataset.removesuffix("_aug")]["train"]
        trees.publish_parts(monkeypatch, dataset)
        for family, some in (("cps", keys[::2]), ("u2pl", keys[:2]), ("unimatch", keys[2:])):
            for split in ("1/2", "1/32"):
                trees.publish(monkeypatch, dataset, family, split, some)
        listed(Path("l.txt"), *keys[1:3])
    elif layout:
        layout(Path("my tree"))
    for flags_, expected in ((more, printed), ("", "--split all")):
        if dataset == "folder" and not flags_:
            flags_ = "--num-classes 4"
            expected = f"{flags_} {expected}"
        prepare_data.main(shlex.split(f"check {where} {flags_}"))
        told = capsys.readouterr()
        assert "note: " not in told.err
        out = told.out.splitlines()
        last = f"next: python cps_fpl.py {where} {expected}    # or another script"
        assert out[-1] == last
        args = resolved(cps_fpl, [*shlex.split(out[-1], comments=True)[3:], "--dry-run"])
        about(args, "cps_fpl.py")
        found = load(args).hashes()
        for line in filter(re.compile(r"\w+: \d+ images").match, out):
            name, count, _, _, digest = re.findall(r"\w+", line)[:5]
            assert found[name] == [int(count), digest]


IDLE = [  # a command that says nothing of what its flag does or takes
    ("check --dataset folder --crop-size -3", "--crop-size -3: a number from 1 to"),
    ("check --dataset folder --crop-size 0", "--crop-size 0: a number from 1 to"),
    ("stats --dataset camvid --split 1/2 --split-seed -1", "--split-seed -1: a number from 0 to"),
    ("check --dataset folder --num-classes -1", "--num-classes -1: a number from 0 to"),
    ("make-split --dataset camvid --out l --labels 0", "--labels 0: a number from 1 to"),
    ("make-split --dataset camvid --out l --labels 1 --seed -1", "--seed -1: a number from 0 to"),
    ("cache --dataset camvid --out c --max-gb 0", "--max-gb 0.0: a number from 1e-12"),
    ("check --dataset folder --split 1/2 --split-family u2pl", "--split-family u2pl does nothing"),
    ("stats --dataset voc_aug --split-family cps", "does nothing here: it needs --dataset voc or"),
    ("check --dataset voc --split-family u2pl --labeled-list l", "and --split other than all"),
    ("check --dataset voc --split 1/8 --split-family cps --split-seed 0", "and no --split-seed"),
    ("check --dataset camvid --split-seed 1", "--split-seed 1 does nothing here: it needs --split"),
    ("stats --dataset voc --split 1/8 --split-seed 1 --labeled-list l", "and no --labeled-list"),
    ("check --dataset shapes --data-root d", "--data-root d does nothing here: it needs --dataset"),
]


@pytest.mark.parametrize("line, words", IDLE)
def test_a_number_out_of_range_and_a_flag_that_does_nothing_are_refused(line, words):
    assert words in refusal(command, line)


def test_check_tells_counts_sets_sizes_and_labels_and_the_number_of_bad_files(capsys):
    root = camvid(Path("cam"))
    picture(root / f"trainannot/{NAMES[2]}.png", "L", 11)  # void
    picture(root / f"trainannot/{NAMES[4]}.png", "L", 4)
    picture(root / f"train/{NAMES[3]}.png", "RGB", 0, (20, 10))
    listed(root / f"trainannot/{NAMES[3]}.png", "bad")  # unlabelled: never opened
    command(f"check {CAM} --split 1/2")
    out = capsys.readouterr().out.splitlines()
    start = f"labeled: 3 images, set {entry(NAMES[::2])['set']}, 8x6 to 8x6 pixels"
    assert out[0] == f"{start}, classes 0 to 4, 33.33 % ignored"
    never = [line.split()[2] for line in out if line.startswith("warning")]
    assert never == "1 2 3 5 6 7 8 9 10".split()
    assert out[10] == f"unlabeled: 2 images, set {entry(NAMES[1::2])['set']}, 8x6 to 20x10 pixels"
    assert refusal(command, f"check {CAM}").startswith("1 bad files, the first 1 named above")


def test_what_nothing_reads_and_what_two_sets_share_is_named(capsys):
    root = folder(Path("own"), ["a", "deep/b", "c"])
    images, check = root / "images", f"check {OWN} 4"
    for path in (*images.glob("val/*"), *images.glob("test/*")):  # pictures of their own
        Image.effect_noise((8, 6), 9).convert("RGB").save(path, exif=TURNED)
    strays = [images / "train/x.heic", root / "masks/train/a.PNG", root / "masks/val/v.png"]
    for path in strays:
        os.symlink("nowhere", path)
    command(check)
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("note")]
    for path, line in zip(strays, lines, strict=True):
        assert str(path.parent) in line and line.endswith(f": 1, {path.name} first")
    assert "warning: 3 images have an EXIF orientation" in told.out
    (images / "val/v0.png").write_bytes((images / "train/c.png").read_bytes())
    assert "1 bad files" in refusal(command, check)
    assert f"of val, the same as {images}/train/c.png of train" in capsys.readouterr().err
    for path in (root / "masks/train").rglob("*.png"):
        Image.new("L", (8, 6), 255).save(path)
    assert "2 bad files" in refusal(command, check)
    assert "no pixel of any class in the masks of labeled" in capsys.readouterr().err


def test_the_table_of_a_folder_is_its_names_colours_and_number_of_classes():
    root = folder(Path("own"))
    rows = ["id,name,r,g,b", '0,"tree, old",4,5,6', "1,b,1,2,3", "2,c,0,0,0", "3,d,0,0,9"]
    listed(root / "classes.csv", *rows, "255,void,9,9,9", "3,also d,8,8,8")
    data = load(own(root, num_classes=0))
    assert data.classes == ["tree, old", "b", "c", "d"] and data.palette[0].tolist() == [4, 5, 6]
    scores = dict(iou=[0.5] * 4, miou=0.5, accuracy=0.5, constant=0.1)
    assert "tree, old" in report(data, {"last": scores}, "val")
    assert "has 4; leave it out" in refusal(load, own(root, num_classes=5))
    for row, words in (("4,e,0,0", ":6: "), ("6,e,0,0,0", "id 4"), ("254,e,0,0,0", ":6: id 254")):
        listed(root / "classes.csv", *rows, row)
        assert words in refusal(load, own(root, num_classes=0))
