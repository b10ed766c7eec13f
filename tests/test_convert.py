"""Masks of ids out of values, colours and exports; files that nothing reads."""

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convert
import prepare_data
from common.run import report
from common.sources import load
from convert import read_table
from formats import GREY, IDS, RGB, TURNED, packed, png, saved
from trees import folder, listed, own, picture, refusal


def command(*words):
    prepare_data.main([str(word) for word in words])


def test_what_nothing_reads_and_what_two_sets_share_is_named(tmp_path, capsys):
    root = folder(tmp_path / "own", ["a", "deep/b", "c"])
    images = root / "images"
    for path in (*images.glob("val/*"), *images.glob("test/*")):  # pictures of their own
        Image.effect_noise((8, 6), 9).convert("RGB").save(path, exif=TURNED)
    check = ["check", "--dataset", "folder", "--num-classes", 4, "--data-root", root]
    strays = [images / "train/x.heic", root / "masks/train/a.PNG", root / "masks/val/v.png"]
    command(*check)
    assert "note" not in capsys.readouterr().err
    for path in strays:
        os.symlink("nowhere", path)
    command(*check)
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("note")]
    for path, line in zip(strays, lines, strict=True):
        assert str(path.parent) in line and line.endswith(f": 1, {path.name} first")
    assert "warning: 3 images have an EXIF orientation" in told.out
    (images / "val/v0.png").write_bytes((images / "train/c.png").read_bytes())
    assert "1 bad files" in refusal(command, *check)
    assert f"of val, the same as {images}/train/c.png of train" in capsys.readouterr().err
    for path in (root / "masks/train").rglob("*.png"):
        Image.new("L", (8, 6), 255).save(path)
    refusal(command, *check)
    assert "no pixel of any class in the masks of labeled" in capsys.readouterr().err
    for path in images.glob("val/*"):
        path.rename(path.with_suffix(".heic"))
    assert "no photograph by its suffix: " in refusal(command, *check)
    (root / "label_colors.txt").touch()
    assert "datumaro or CVAT" in refusal(load, own(root, dataset="cityscapes", num_classes=0))


KINDS = [  # masks to convert; their ids, or words of the refusal
    (saved(Image.fromarray(IDS % 2 * 255), "PNG"), IDS % 2),
    (png(16, 0, (IDS * 1000.0).astype(">u2").view(np.uint8)), IDS),
    (png(2, 3, packed(IDS, 2), bytes(range(12))), IDS),  # its colours rise with the index
    (png(8, 2, RGB * 50), IDS),
    (png(2, 3, packed(IDS, 2), bytes(12)), "several indices one colour"),
    (saved(GREY, "JPEG"), "JPEG, which blurs"),
]


@pytest.mark.parametrize("data, expected", KINDS)
def test_values_and_colours_become_ids_with_a_table(tmp_path, monkeypatch, data, expected):
    monkeypatch.chdir(tmp_path)
    listed(Path("from/a_mask.png"))
    Path("from/a_mask.png").write_bytes(data)
    words = ["convert", "--from", "from", "--out", "own", "--strip", "_mask"]
    if isinstance(expected, str):
        assert expected in refusal(command, *words)
        return
    command(*words)
    assert np.array_equal(np.asarray(Image.open("own/masks/train/a.png")), expected)
    Path("from/a_mask.png").write_bytes(png(8, 2, RGB + 7))
    assert "#070707 at row 0, column 0 has no row" in refusal(command, *words)


def test_the_table_of_a_folder_is_its_names_colours_and_number_of_classes(tmp_path):
    root = folder(tmp_path / "own")
    rows = ["id,name,r,g,b", '0,"tree, old",4,5,6', "1,b,1,2,3", "2,c,0,0,0", "3,d,0,0,9"]
    listed(root / "classes.csv", *rows, "255,void,9,9,9", "3,also d,8,8,8")
    data = load(own(root, num_classes=0))
    assert data.classes == ["tree, old", "b", "c", "d"] and data.palette[0].tolist() == [4, 5, 6]
    scores = dict(iou=[0.5] * 4, miou=0.5, accuracy=0.5, constant=0.1)
    assert "tree, old" in report(data, {"last": scores}, "val")
    assert "has 4; leave it out" in refusal(load, own(root, num_classes=5))
    for text in ("4 5 6 a b\n1 2 3 c", "# label:color_rgb:parts:actions\na b:4,5,6::\nc:1,2,3::"):
        rows_of_tool = read_table(listed(root / "labelmap.txt", text))
        assert [row[:3] for row in rows_of_tool] == [(0, "a b", (4, 5, 6)), (1, "c", (1, 2, 3))]
    for row, words in (("4,e,0,0", ":6: "), ("6,e,0,0,0", "id 4"), ("254,e,0,0,0", ":6: id 254")):
        listed(root / "classes.csv", *rows, row)
        assert words in refusal(load, own(root, num_classes=0))


SQUARE = [[1, 1], [5, 1], [5, 4], [1, 4]]
EXPECTED = np.zeros((8, 12), np.uint8)
EXPECTED[1:4, 1:5] = 1  # big
EXPECTED[1:4, 2:7] = EXPECTED[5, 9] = 2  # pen, above it
EXPECTED[2, 4] = 1  # its hole
COUNTS = "a03500NL04200d0NI"  # the pen as pycocotools 2.0.11 writes it, label_studio_sdk 2.1.2:
BRUSH = "0000018039 1bfe3700c27ff86c027ff8c027ffc360184fff338047ff99c000"
BOX = EXPECTED[1:6, 2:10] == 2
PEN = base64.b64encode(saved(Image.fromarray(BOX), "PNG")).decode()
SIZE = dict(width=12, height=8)


def coco():
    names = [{"id": 5, "name": "pen"}, {"id": 3, "name": "big"}]
    rows = [(5, 15, {"counts": COUNTS, "size": [8, 12]}), (3, 20, [sum(SQUARE, [])]), (3, 9, [])]
    rows = [dict(image_id=7, id=i, iscrowd=1, category_id=r[0], area=r[1], segmentation=r[2])
            for i, r in enumerate(rows)]  # fmt: skip
    images = [dict(id=7, file_name="x/a.jpg", **SIZE), dict(id=8, file_name="b.jpg", **SIZE)]
    return json.dumps(dict(categories=names, annotations=rows, images=images))


def labelme():
    shapes_ = [
        ("big", "polygon", SQUARE),
        ("pen", "mask", [[2, 1], [9, 5]]),
        ("p", "point", [[1, 1]]),
    ]
    rows = [dict(label=n, shape_type=k, points=p, mask=PEN) for n, k, p in shapes_]
    return json.dumps(dict(imagePath="..\\a.jpg", imageWidth=12, imageHeight=8, shapes=rows))


def label_studio():
    corners = [[x / 0.12, y / 0.08] for x, y in SQUARE]
    values = [("polygonlabels", "big", {"points": corners}), ("keypointlabels", "big", {"x": 1})]
    values.append(("brushlabels", "pen", {"format": "rle", "rle": list(bytes.fromhex(BRUSH))}))
    rows = [dict(type=kind, value=value | {kind: [name]}, original_width=12, original_height=8)
            for kind, name, value in values]  # fmt: skip
    task = dict(data={"image": "/data/upload/1/0123abcd-a.jpg"}, annotations=[{"result": rows}])
    return json.dumps([task, dict(data={"image": "b.jpg"}, annotations=[])])


RUNS = ", ".join(map(str, np.diff([0, *np.flatnonzero(np.diff(BOX.ravel(), prepend=False)), 40])))
CVAT = f"""<annotations><image id="0" name="a.jpg" width="12" height="8">
<mask label="pen" z_order="1" rle="{RUNS}" left="2" top="1" width="8" height="5"/>
<polygon label="big" z_order="0" points="1,1;5,1;5,4;1,4"/><points label="big" points="1,1"/>
</image><image id="1" name="b.jpg" width="12" height="8"/></annotations>"""


@pytest.mark.parametrize("name, text", [("c.json", coco()), ("l.json", labelme()), ("x.xml", CVAT),
                                        ("s.json", label_studio())])  # fmt: skip
def test_an_export_becomes_masks_by_name_and_what_it_lost_is_counted(tmp_path, capsys, name, text):
    root = folder(tmp_path / "own", ["a", "b"])
    for path in root.glob("masks/train/*"):
        path.unlink()
    source = listed(tmp_path / name, text)
    command("convert", "--from", source, "--out", root)
    assert [path.name for path in root.glob("masks/train/*")] == ["a.png"]
    assert np.array_equal(np.asarray(Image.open(root / "masks/train/a.png")), EXPECTED)
    assert load(own(root, num_classes=0)).classes == ["background", "big", "pen"]
    lost = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lost: 1 ")]
    assert len(lost) == 2 - (name == "l.json")  # what has no area; the image without a shape
    listed(root / "classes.csv", "id,name,r,g,b", "0,big,0,0,0", "1,x,0,0,0")
    assert "no row named 'pen'" in refusal(command, "convert", "--from", source, "--out", root)
    listed(Path(source), text[: len(text) // 2])
    assert "not" in refusal(command, "convert", "--from", source, "--out", root)


def test_a_conversion_that_was_cut_off_goes_on_with_the_ids_of_the_first_call(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abcd"):
        listed(Path(f"from/{name}.png"))
        Image.fromarray(np.full((4, 8), 60 * i, np.uint8)).save(f"from/{name}.png")
    words = ["convert", "--from", "from", "--out", "my own"]
    real = convert.write

    def full(path, data):
        if path.name == "c.png":
            raise OSError("no space")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write", full)
        assert "no space" in refusal(command, *words)
    os.remove("from/a.png")  # without it the ids of a table made anew would be others
    command(*words)
    for i, name in enumerate("abcd"):
        assert (np.asarray(Image.open(f"my own/masks/train/{name}.png")) == i).all()
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    os.symlink("my own", "link")
    for source in ("my own", "my own/masks", "my own/masks/train", "link/masks/train"):
        line = refusal(command, "convert", "--from", source, "--out", "my own")
        assert line.startswith(f"--from {source} is, holds or is in my own/masks/train: move it")
    listed(Path("deep/masks/train/x/a.json"))
    line = refusal(command, "convert", "--from", "deep/masks/train/x", "--out", "deep")
    assert "move it away first" in line
    assert before == {path: path.read_bytes() for path in before}


def many(count):
    """COCO's JSON of so many categories, each with an object in a.jpg."""
    names = [dict(id=i, name=f"c{i}") for i in range(count)]
    one = dict(image_id=7, area=1, segmentation=[sum(SQUARE, [])])
    rows = [one | dict(id=i, category_id=i) for i in range(count)]
    images = [dict(id=7, file_name="x\\a.jpg", **SIZE)]
    return json.dumps(dict(categories=names, annotations=rows, images=images))


C, T, MASKS = "c.json", "--classes t.txt", "from"
MISTAKES = [  # what is converted, its content, more flags, words of the refusal
    (C, many(254), "", "255 classes, and ids run from 0 to 253"),
    (C, many(2), T, "t.txt: 255 classes, and ids run from 0"),
    (C, coco().replace('"counts"', '"runs"'), "", "a: not as its tool has it (KeyError('counts'))"),
    (C, coco().replace('"pen"', "null"), "", "c.json: not as its tool writes it (Attr"),
    ("x.xml", CVAT.replace('label="big" ', ""), "", "x.xml: not as its tool writes it (Attr"),
    (C, coco(), "--strip _mask", "--strip is for a folder of masks alone"),
    (C, coco(), "--part test", "own/images/test: 2 images that are not among the photographs; 1"),
    (C, many(0), "", "1 images without a shape, which stay unlabelled without --empty"),
    (MASKS, None, "--empty", "--empty for an export"),
    (MASKS, None, "--strip k", "no mask for any photograph of own/images/train: see --part"),
    (MASKS, coco(), "", "info.json: not as its tool writes it (KeyError('imageWidth')); a folder"),
]


@pytest.mark.parametrize("name, text, more, words", MISTAKES)
def test_what_cannot_be_converted_is_one_line_and_no_mask(
    tmp_path, monkeypatch, name, text, more, words
):
    monkeypatch.chdir(tmp_path)
    own_masks = folder(Path("own"), ["a", "b"]) / "masks"
    before = {path: path.read_bytes() for path in own_masks.rglob("*.png")}
    Path(name).parent.mkdir(exist_ok=True)
    listed(Path("t.txt"), *(f"{i} 0 0 c{i}" for i in range(255)))
    if name == MASKS:
        picture(Path("from/mask.png"), "L", 1)
        listed(Path("from/notes.txt"))
    if text:
        listed(Path("from/info.json" if name == MASKS else name), text)
    line = refusal(command, "convert", "--from", name, "--out", "own", *more.split())
    assert words in line
    assert before == {path: path.read_bytes() for path in own_masks.rglob("*.png")}


def test_as_many_classes_as_ids_are_converted(tmp_path):
    source = listed(tmp_path / C, many(253))
    command("convert", "--from", source, "--out", tmp_path / "own")
    ids = {row.name: row.id for row in read_table(tmp_path / "own/classes.csv")}
    assert len(ids) == 254 and sorted(ids.values())[-1] == 253
    mask = np.asarray(Image.open(tmp_path / "own/masks/train/x/a.png"))
    assert np.unique(mask).tolist() == [0, ids["c252"]]
