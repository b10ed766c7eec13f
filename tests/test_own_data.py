"""What users bring: files of other formats, classes of their own in a whole run, weights of timm.

The blocks of docs/formats.md are run as they stand, on files that each format's library writes.
"""

import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import prepare_data
import supervised
from common.weights import load_backbone
from convert import png
from tiny import ROOT, draw_folder, own_folder, shrink, train
from trees import listed

PAGE = (ROOT / "docs/formats.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", PAGE, re.M))


def block(section):
    (text,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], re.M | re.S)
    return text


def drawn(seed, h=18, w=22):
    """Where the liver is: a shape without any symmetry, another for each seed."""
    area = np.zeros((h, w), bool)
    area[2 : 7 + seed % 5, 3 : 9 + seed // 5] = area[2, 9:15] = True
    area[4, 5] = False
    return area


def nifti(seed):
    import nibabel

    areas = {f"ct_{k:03}": drawn(seed + k) for k in range(3)}
    right_front_up = np.zeros((22, 18, 3))
    for k, area in enumerate(areas.values()):
        for y, x in np.argwhere(area):  # rows from front to back, columns from right to left
            right_front_up[21 - x, 17 - y, k] = 1
    axes = [[2, -1], [0, 1], [1, -1]]  # on disk another order, two of them turned
    for name, values in (("ct", right_front_up * 400 - 160), ("ct_labels", right_front_up * 6)):
        image = nibabel.Nifti1Image(values.astype(np.float32), np.diag([2, 2, 5, 1.0]))
        image = image.as_reoriented(np.array(axes))
        image.header.set_data_dtype(np.uint8)  # with a slope
        nibabel.save(image, f"{name}.nii.gz")
    return areas


def dicom_seg(seed):
    import highdicom as hd
    import pydicom
    from pydicom.sr.codedict import codes

    areas = {f"ct_{k:03}": drawn(seed + k) for k in range(3)}
    areas["ct_001"] &= False  # a frame that the file leaves out
    slices = []
    Path("series").mkdir()
    for k, area in enumerate(areas.values()):
        one = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = hd.UID()
        one.ImagePositionPatient = [0, 0, 5 * k]
        one.Rows, one.Columns = area.shape
        one.PixelData = (area * 400 + 864 + seed).astype("<i2").tobytes()  # 1024 is 0 HU
        one.save_as(f"series/{one.SOPInstanceUID}.dcm")
        slices.append(one)
    kind = hd.seg.SegmentAlgorithmTypeValues.MANUAL
    liver = hd.seg.SegmentDescription(1, "liver", codes.SCT.Organ, codes.SCT.Liver, kind)
    pixels = np.stack([*areas.values()]).astype(np.uint8)
    about = ([liver], hd.UID(), 2, hd.UID(), 1, "maker", "model", "1", "1")
    hd.seg.Segmentation(slices[::-1], pixels[::-1], "BINARY", *about).save_as("seg.dcm")
    return areas


BLOCKS = [("NIfTI", "nibabel", nifti), ("DICOM-SEG", "highdicom", dicom_seg)]


@pytest.mark.parametrize("section, library, write", BLOCKS)
@pytest.mark.filterwarnings("ignore")
def test_a_block_makes_images_and_masks_that_check_takes(
    section, library, write, tmp_path, monkeypatch, capsys
):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    listed(Path("my/classes.csv"), *re.findall("^    (.+,.+,.+)", SECTIONS["First"], re.M)[:4])
    for seed, part in ((0, "train"), (10, "val")):
        areas = write(seed)
        code = block("First") + block(section)
        exec(code.replace("train", part), {"__name__": "pasted"})
        for key, area in areas.items():
            ids = np.asarray(Image.open(f"my/masks/{part}/{key}.png"))
            picture = np.asarray(Image.open(f"my/images/{part}/{key}.png").convert("L"))
            assert np.array_equal(ids, area)
            assert picture[ids == 0].mean() <= 40 and (picture[ids == 1] >= 140).all()
        for path in [path for path in Path().iterdir() if path.name != "my"]:
            path.rename(f"{path}.{part}")  # the next part's files are new
    prepare_data.main("check --dataset folder --data-root my".split())
    assert "every file can be read" in capsys.readouterr().out


def test_the_first_block_takes_several_values_of_a_class_and_none_without_a_row(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = ["0,a,0,0,0,3", "1,b,0,0,0,4", "1,b,0,0,0,5"]
    listed(Path("my/classes.csv"), "id,name,r,g,b,value", *rows)
    exec(block("First"), space := {})
    grey = np.zeros((1, 3), np.uint8)
    space["put"]("x", grey, np.array([[3, 4, 5]]))
    assert np.asarray(Image.open("my/masks/train/x.png")).tolist() == [[0, 1, 1]]
    with pytest.raises(KeyError, match="6"):
        space["put"]("x", grey, np.array([[3, 4, 6]]))
    assert space["grey"](np.array([-9, 0, 1, 2, 3]), 0, 2).tolist() == [0, 0, 128, 255, 255]


CONSTANT = [  # ids of the masks, 9 is ignored; what the first evaluation says, and of which command
    ([0, 9, 0], "val's masks hold one class", "convert"),
    ([0, 1, 2], "one class everywhere", "stats"),
]


@pytest.mark.parametrize("ids, said, command", CONSTANT)
def test_a_run_names_its_classes_and_says_once_what_a_constant_scores(
    ids, said, command, tmp_path, monkeypatch, capsys
):
    """The names: in log, checkpoint, panels and predictions."""
    shrink(supervised, monkeypatch)
    monkeypatch.setattr(supervised, "predict", lambda net, x, *some: torch.zeros_like(x[0]).long())
    root = draw_folder(tmp_path / "my own", 3)
    for path in root.glob("masks/*/*.png"):
        Image.open(path).point([*ids, *[9] * 253]).save(path)
    names = ["bare ground", "tree", "a, b"]
    rows = [f'{i},"{name}",{90 * i},7,0' for i, name in enumerate(names)]
    listed(root / "classes.csv", "id,name,r,g,b", *rows)
    run = tmp_path / "run"
    argv = own_folder(root, run, 0, iters=4, evaluate=2, save=4, pictures=4)
    train(supervised, [*argv, "--ignore-index", "9"])
    pattern = f"^{said}.*: python prepare_data.py ({command} .*)$"
    (line,) = re.findall(pattern, capsys.readouterr().out, re.M)
    if command == "stats":
        prepare_data.main(shlex.split(line))
    start, *_, done = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert start["classes"] == names and len(done["last"]["iou"]) == 3
    source = predict.open_source(str(run))
    assert source.data.classes == names and source.data.palette.tolist()[2] == [180, 7, 0]
    predict.main([str(run), "--split", "val", "--out", str(tmp_path / "scored")])
    assert "bare ground" in (tmp_path / "scored/index.html").read_text()
    below = np.asarray(Image.open(run / "panels/000004-val.png"))[2 * 176 :]  # of the two images
    assert all((below == [90 * i, 7, 0]).all(2).any() for i in {*ids} - {9})


def test_a_palette_of_few_colours_keeps_every_index():
    mask = np.array([[0, 1, 15, 16, 200, 255]], np.uint8)
    for count in (2, 16, 256):
        data = io.BytesIO(png(mask, [[i, i, i] for i in range(count)]))
        assert np.array_equal(np.asarray(Image.open(data)), mask)


STEMS = [("resnet50s", "deep", (64, 64, 128)), ("resnet101c", "v1c", (32, 32, 64))]


@pytest.mark.parametrize("name, stem, widths", STEMS)
def test_timms_networks_have_the_keys_and_features_of_a_stem(tmp_path, name, stem, widths):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name).eval()
    net = supervised.torchvision.models.get_model(name[:-1], weights=None)
    del net.fc, net.avgpool
    supervised.deepen_stem(net, widths)
    x = torch.randn(1, 3, 32, 32)
    state = theirs.state_dict()
    for content in (state, {"model": {f"module.{key}": value for key, value in state.items()}}):
        torch.save(content, tmp_path / "w.pth")
        load_backbone(net, str(tmp_path / "w.pth"), name[:-1], stem)
        assert torch.equal(supervised.features(net.eval(), x)[3], theirs.forward_features(x))
