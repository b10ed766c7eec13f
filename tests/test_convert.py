"""Masks of ids out of values, colours and exports; files that nothing reads."""

import base64
import json
import os
import shutil
from pathlib import Path
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest
from PIL import Image

import convert
from common.run import report
from common.sources import load
from convert import read_table
from formats import GREY, IDS, RGB, TURNED, WIDE, packed, png, saved
from processes import snapshot
from tiny import pixels
from trees import command, folder, listed, own, picture, refusal

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_what_nothing_reads_is_named(capsys):
    images = folder(Path("own"), ["a", "deep/b", "c"]) / "images"
    for path in (*images.glob("val/*"), *images.glob("test/*")):
        Image.open(path).save(path, exif=TURNED)
    strays = [images / "train/x.heic", Path("own/masks/train/a.PNG"), Path("own/masks/val/v.png")]
    for path in strays:
        os.symlink("nowhere", path)
    command(check := "check --dataset folder --num-classes 4 --data-root own")
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("note")]
    for path, line in zip(strays, lines, strict=True):
        assert str(path.parent) in line and line.endswith(f": 1, {path.name} first")
    assert "warning: 3 images have an EXIF orientation" in told.out
    for path in images.glob("val/*"):
        path.rename(path.with_suffix(".heic"))
    assert "no photograph by its suffix: " in refusal(command, check)
    Path("own/label_colors.txt").touch()
    assert "datumaro or CVAT" in refusal(load, own("own", dataset="cityscapes", num_classes=0))


def test_the_table_of_a_folder_is_its_names_colours_and_number_of_classes():
    root = folder(Path("own"))
    rows = ["id, name, r, g, b", '0, "tree, old",4,5,6', "1,b,1,2,3", "2,c,0,0,0", "3,d,0,0,9"]
    listed(root / "classes.csv", *rows, "255,void,9,9,9", "3,also d,8,8,8")
    data = load(own(root, num_classes=0))
    assert data.classes == ["tree, old", "b", "c", "d"] and data.palette[0].tolist() == [4, 5, 6]
    scores = dict(iou=[0.5] * 4, miou=0.5, accuracy=0.5, constant=0.1)
    assert "tree, old" in report(data, {"last": scores}, "val")
    assert "has 4; leave it out" in refusal(load, own(root, num_classes=5))
    for text in ("4 5 6 a b\n1 2 3 c", "# label:color_rgb:parts:actions\na b:4,5,6::\nc:1,2,3::"):
        rows_of_tool = read_table(listed(root / "labelmap.txt", text))
        assert [row[:3] for row in rows_of_tool] == [(0, "a b", (4, 5, 6)), (1, "c", (1, 2, 3))]
    for row, words in (("4,e,0,0", ":6: "), ("6,e,0,0,0", "id 4"), ("4,e,0,0,300", "(0, 0, 300)")):
        listed(root / "classes.csv", *rows, row)
        assert words in refusal(load, own(root, num_classes=0))
    listed(root / "classes.csv", "id,name")
    assert ":1: no column b, g, r" in refusal(load, own(root, num_classes=0))
    (root / "classes.csv").write_bytes(b"\xff")
    assert "not a readable table" in refusal(load, own(root, num_classes=0))


KINDS = [  # masks to convert; their ids, or words of the refusal
    (saved(Image.fromarray(IDS % 2 * 255), "PNG"), IDS % 2),
    (png(16, 0, (IDS * 1000.0).astype(">u2").view(np.uint8)), IDS),
    (png(2, 3, packed(IDS, 2), bytes(range(12))), IDS),  # its colours rise with the index
    (png(8, 2, RGB * 50), IDS),
    (saved(Image.fromarray(IDS.astype(np.float32)), "TIFF"), IDS),
    (saved(Image.fromarray(IDS + np.float32(0.5)), "TIFF"), "no whole numbers"),
    (png(2, 3, packed(IDS, 2), bytes(12)), "several indices one colour"),
    (saved(GREY, "JPEG"), "JPEG, which blurs"),
    (saved(GREY, "TIFF", compression="jpeg"), "TIFF with JPEG inside, which blurs"),
    (png(16, 2, WIDE), "mode RGB of 16 bits, of which PIL keeps 8"),
    (png(8, 4, np.stack([IDS * 80, IDS + 255 - IDS], 2)), IDS),
    (saved(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), "PNG"), "254 values"),
]


@pytest.mark.parametrize("data, expected", KINDS)
def test_values_and_colours_become_ids_with_a_table(data, expected):
    Path("from").mkdir()
    Path("from/a_mask.png").write_bytes(data)
    line = "convert --from from --out own --strip _mask"
    if isinstance(expected, str):
        assert expected in refusal(command, line)
        return
    command(line)
    assert np.array_equal(pixels("own/masks/train/a.png"), expected)
    Path("from/a_mask.png").write_bytes(png(8, 2, RGB + 7))
    assert "#070707 at row 0, column 0 has no row" in refusal(command, line)


def test_a_conversion_that_was_cut_off_goes_on_with_the_ids_of_the_first_call():
    for i, name in enumerate("abcd"):
        picture(Path(f"from/{name}.png"), "L", 60 * i)
    line, full = "convert --from from --out 'my own'", Path("my own/masks/train/c.png")
    full.mkdir(parents=True)  # it cannot be written
    assert "directory" in refusal(command, line)
    full.rmdir()
    left = full.with_name("." + 32 * "a")  # of a call that was killed
    left.touch()
    os.utime(left, (0, 0))
    os.remove("from/a.png")  # without it the ids of a table made anew would be others
    command(line)
    for i, name in enumerate("abcd"):
        assert (pixels(f"my own/masks/train/{name}.png") == i).all()
    assert not left.exists()


def test_a_conversion_in_place_is_refused():
    """Half of it would be read as masks to convert."""
    folder(Path("own"))
    listed("own/masks/train/x/a.json")
    os.symlink("own", "link")
    before = snapshot(Path("own"))
    for source in ("own", "own/masks", "own/masks/train", "link/masks/train", "own/masks/train/x"):
        line = refusal(command, f"convert --from {source} --out own")
        assert line.startswith(f"--from {source} is, holds or is in own/masks/train: move it")
    assert before == snapshot(Path("own"))


# ---- exports: of each tool one with two classes, a hole, an overlap and what has no area ----

SQUARE = [[1, 1], [5, 1], [5, 4], [1, 4]]
EXPECTED = np.zeros((8, 12), np.uint8)
EXPECTED[1:4, 1:5] = 1  # big
EXPECTED[1:4, 2:7] = EXPECTED[5, 9] = 2  # pen, above it
EXPECTED[2, 4] = 1  # its hole
COUNTS = "a03500NL04200d0NI"  # the pen as pycocotools 2.0.11 writes it, label_studio_sdk 2.1.2:
BRUSH = "0000018039 1bfe3700c27ff86c027ff8c027ffc360184fff338047ff99c000"
BOX = EXPECTED[1:6, 2:10] == 2
PEN = base64.b64encode(saved(Image.fromarray(BOX), "PNG")).decode()
RUNS = ", ".join(map(str, np.diff([0, *np.flatnonzero(np.diff(BOX.ravel(), prepend=False)), 40])))
SIZE = dict(width=12, height=8)


def coco():
    pen = dict(category_id=5, area=15, segmentation={"counts": COUNTS, "size": [8, 12]})
    big = dict(category_id=3, area=20, segmentation=[sum(SQUARE, [])])
    bare = dict(category_id=3, area=9, segmentation=[])
    shapes = [shape | dict(image_id=7, id=i, iscrowd=1) for i, shape in enumerate((pen, big, bare))]
    names = [{"id": 5, "name": "pen"}, {"id": 3, "name": "big"}]
    images = [dict(id=7, file_name="x\\a.jpg", **SIZE), dict(id=8, file_name="b.jpg", **SIZE)]
    return json.dumps(dict(categories=names, annotations=shapes, images=images))


def labelme():
    shapes = [
        dict(label="big", shape_type="polygon", points=SQUARE),
        dict(label="pen", shape_type="mask", points=[[2, 1], [9, 5]], mask=PEN),
        dict(label="p", shape_type="point", points=[[1, 1]]),
    ]
    return json.dumps(dict(imagePath="..\\a.jpg", imageWidth=12, imageHeight=8, shapes=shapes))


def label_studio():
    corners = [[x / 0.12, y / 0.08] for x, y in SQUARE]
    brush = {"format": "rle", "rle": list(bytes.fromhex(BRUSH))}
    results = [
        dict(type="polygonlabels", value={"polygonlabels": ["big"], "points": corners}),
        dict(type="keypointlabels", value={"keypointlabels": ["big"], "x": 1}),
        dict(type="brushlabels", value={"brushlabels": ["pen"], **brush}),
    ]
    results.append(results[0] | dict(image_rotation=90))
    results = [result | dict(original_width=12, original_height=8) for result in results]
    done = [dict(was_cancelled=True, result=[]), dict(result=results), dict(result=[])]
    task = dict(data={"n": 1, "image": "/data/upload/1/0123abcd-a.jpg"}, annotations=done)
    return json.dumps([task, dict(data={"image": "b.jpg"}, annotations=[])])


CVAT = f"""<annotations><image id="0" name="a.jpg" width="12" height="8">
<mask label="pen" z_order="1" rle="{RUNS}" left="2" top="1" width="8" height="5"/>
<polygon label="big" z_order="0" points="1,1;5,1;5,4;1,4"/><points label="big" points="1,1"/>
</image><image id="1" name="b.jpg" width="12" height="8"/></annotations>"""
EXPORTS = {"c.json": coco(), "l.json": labelme(), "s.json": label_studio(), "x.xml": CVAT}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_becomes_masks_by_name_and_what_it_lost_is_counted(name, capsys):
    folder(Path("own"), ["a", "b"])
    shutil.rmtree("own/masks/train")
    listed(name, EXPORTS[name])
    line = f"convert --from {name} --out own"
    command(line)
    assert os.listdir("own/masks/train") == ["a.png"]
    assert np.array_equal(pixels("own/masks/train/a.png"), EXPECTED)
    assert load(own("own", num_classes=0)).classes == ["background", "big", "pen"]
    lost = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lost: 1 ")]
    # what has no area, or lies on a turned image; the image without a shape; a second annotation
    assert len(lost) == {"l.json": 1, "s.json": 4}.get(name, 2)
    listed("own/classes.csv", "id,name,r,g,b", "0,big,0,0,0", "1,x,0,0,0")
    assert "no row named 'pen'" in refusal(command, line)
    listed(name, EXPORTS[name][: len(EXPORTS[name]) // 2])
    assert "not" in refusal(command, line)


def turned(kind, **numbers):
    """A box or ellipse of Label Studio, turned by 90 degrees; numbers: per cent of 12x8 pixels."""
    value = {kind: ["a"], "rotation": 90, **numbers}
    result = dict(type=kind, value=value, original_width=12, original_height=8)
    return convert.studio_area(result)[0]


def test_boxes_and_ellipses_lie_where_each_tool_has_them():
    """The same area in all, turned but for labelme's; at 45 degrees clockwise is down and right."""
    box = '<box xtl="3" ytl="3" xbr="7" ybr="5" rotation="90"/>'
    ellipse = '<ellipse cx="5" cy="4" rx="2" ry="1" rotation="90"/>'
    expected = np.zeros((8, 12), bool)
    expected[2:6, 4:6] = True
    for draw in (
        convert.labelme_area(dict(shape_type="rectangle", points=[[6, 6], [4, 2]]), 8, 12),
        convert.cvat_area(fromstring(box), 8, 12),
        convert.cvat_area(fromstring(ellipse), 8, 12),
        turned("rectanglelabels", x=50, y=25, width=100 / 3, height=25),
        turned("ellipselabels", x=125 / 3, y=50, radiusX=50 / 3, radiusY=12.5),
    ):
        assert np.array_equal(draw(), expected)
    corners = convert.box(2, 3, 8, 5, 45, (5, 4))
    for area in (convert.ellipse((5, 4), (3, 1), 45, 8, 12), convert.union([corners], 8, 12)):
        assert area[5, 6] and not area[2, 6]
    circle = convert.labelme_area(dict(shape_type="circle", points=[[5, 4], [5, 5.6]]), 8, 12)()
    assert circle.sum() == 12 and circle[3, 3] and not circle[2, 3]
    # a brush of one pixel, its four values not repeated: 8 bits each, of a run of 3 + 1
    bits = f"{4:032b}" + "00111" + 4 * "0001" + "0" + "00" + "11" + 24 * "0" + 8 * "1" + 6 * "0"
    assert convert.brush(int(bits, 2).to_bytes(12, "big"), 1, 1).tolist() == [[True]]


def test_names_lead_to_photographs_and_a_table_that_is_there_is_followed():
    known = {"a", "deep/b", "1/c", "2/c"}
    names = {"x/a.png": "a", "b.png": "deep/b", "x/deep/b.1": "deep/b", "c.png": None}
    assert {name: convert.key_of(name, known) for name in names} == names
    text = convert.table_text([convert.ClassRow(0, 'a "b", c', (1, 2, 3))])
    listed("own/classes.csv", text)
    assert convert.table_text(read_table("own/classes.csv")) == text
    picture(Path("from/a.png"), "L", 0)
    command("convert --from from --out own --classes own/classes.csv")
    assert (pixels("own/masks/train/a.png") == 0).all()
    line = f"convert --from from --out own --classes {listed('t.txt', '1 2 3 other')}"
    assert "another table than --classes: move it away" in refusal(command, line)
    picture(Path("from/a.gif"), "L", 0)
    assert "from/a.png: from/a.gif has the same name" in refusal(
        command, "convert --from from --out new"
    )


def many(count):
    """CVAT's XML of one image with a shape of each of so many classes."""
    image = '<annotations><image name="x\\a.jpg" width="12" height="8">'
    shapes = [f'<polygon label="c{i}" points="1,1;5,1;5,4;1,4"/>' for i in range(count)]
    return "\n".join([image, *shapes, "</image></annotations>"])


def test_as_many_classes_as_ids_are_converted():
    command(f"convert --from {listed('x.xml', many(253))} --out own")
    known = {row.name: row.id for row in read_table("own/classes.csv")}
    assert len(known) == 254 and max(known.values()) == 253
    assert np.unique(pixels("own/masks/train/x/a.png")).tolist() == [0, known["c252"]]


C, X, T, MASKS = "c.json", "x.xml", "--classes t.txt", "from"
L, ST = "l.json", "s.json"
MISTAKES = [  # what is converted, its content, more flags, words of the refusal
    (X, many(254), "", "255 classes, and ids run from 0 to 253"),
    (X, many(2), T, "t.txt: 255 classes, and ids run from 0"),
    (C, coco().replace('"counts"', '"runs"'), "", "a: not as its tool has it (KeyError('counts'))"),
    (C, coco().replace('"pen"', "null"), "", "c.json: not as its tool writes it (Attr"),
    (X, CVAT.replace('label="big" ', ""), "", "x.xml: not as its tool writes it (Attr"),
    (C, coco(), "--strip _mask", "--strip is for a folder of masks alone"),
    (C, coco(), "--part test", "own/images/test: 2 images that are not among the photographs; 1"),
    (X, many(0), "", "1 images without a shape, which stay unlabelled without --empty"),
    (MASKS, None, "--empty", "--empty for an export"),
    (MASKS, None, "--strip k", "no mask for any photograph of own/images/train: see --part"),
    (MASKS, coco(), "", "info.json: not as its tool writes it (KeyError('imageWidth')); a folder"),
    (X, CVAT.replace(RUNS, "3"), "", "run lengths of 3 pixels, not 40"),
    (X, "<annotations><track/></annotations>", "", "tracks of a video: export it as CVAT"),
    (X, "<annotations/>", "", "x.xml: no annotated image in it"),
    (X, "<annotations>", "", "x.xml: not readable as XML"),
    (X, CVAT.replace("b.jpg", "sub/a.png"), "--empty", "sub/a.png and another image have the name"),
    (L, labelme().replace("imageWidth", "w"), "", "l.json: not as its tool writes it (Key"),
    (L, labelme().replace(": 12,", ": null,"), "", "no imageWidth and imageHeight"),
    (ST, label_studio().replace(".jpg", ".txt"), "", "task None names no image"),
    (ST, label_studio().replace('width": 12', 'width": 13'), "", "a brush of 96 pixels, not 104"),
    (C, "{}", "", "neither COCO's, nor LabelMe's, nor Label Studio's"),
    (C, None, "", "--from c.json: no such file or folder"),
    (C, coco(), "--classes no.txt", "no.txt: not a readable table"),
    (C, coco(), "--classes c.json", "c.json:1: neither r g b name nor name:r,g,b, with a colour"),
    (MASKS, None, "--strip _mask", "from: no masks ending in _mask in it"),
]


@pytest.mark.parametrize("name, text, more, words", MISTAKES)
def test_what_cannot_be_converted_is_one_line_and_no_mask(name, text, more, words):
    folder(Path("own"), ["a", "b"])
    before = snapshot(Path("own/masks"))
    listed("t.txt", *(f"{i} 0 0 c{i}" for i in range(255)))
    if name == MASKS:
        picture(Path("from/mask.png"), "L", 1)
        listed("from/notes.txt")
    if text:
        listed("from/info.json" if name == MASKS else name, text)
    assert words in refusal(command, f"convert --from {name} --out own {more}")
    assert before == snapshot(Path("own/masks"))
