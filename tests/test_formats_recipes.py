"""The blocks of docs/formats.md, run as they stand on files that each format's library has written.

What is drawn: (H, W) bool, where the liver is, and a picture in which it is bright.
"""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from formats import saved
from tiny import ROOT
from trees import listed

PAGE = (ROOT / "docs/formats.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", PAGE, re.M))


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


def geotiff(seed):
    import rasterio

    area = drawn(seed, 600, 30)
    area[550 + seed :] = True
    bands = np.stack([area * k * 1000 + 1 for k in (1, 2, 3)]).astype(np.uint16)
    bands[:, :, :2] = 0
    grid = dict(
        driver="GTiff", height=600, width=30, transform=rasterio.Affine(10, 0, 0, 0, -10, 9)
    )
    with rasterio.open("scene.tif", "w", count=3, dtype="uint16", nodata=0, **grid) as file:
        file.write(bands)
    values = np.where(area, 6, 0).astype(np.uint8)
    values[0] = 99
    with rasterio.open("labels.tif", "w", count=1, dtype="uint8", nodata=99, **grid) as file:
        file.write(values, 1)
    ids = area.astype(np.uint8)
    ids[0] = ids[:, :2] = 255
    return {"scene_0_0": ids[:512], "scene_512_0": ids[512:]}


def ome_zarr(seed):
    import zarr
    from ome_zarr import writer

    area = drawn(seed, 600, 40)
    area[550 + seed :] = True
    group = zarr.open_group("cells.zarr", mode="w")
    image = (area[None] * 3900 + 100).astype(np.uint16)
    writer.write_image(image, group, axes="cyx")
    writer.write_labels(np.where(area, 6, 0).astype(np.uint16), group, "cells", axes="yx")
    return {"cells_0_0": area[:512], "cells_512_0": area[512:]}


def video(seed):
    import av

    area = drawn(seed, 32, 64)
    picture = np.repeat(area[..., None] * np.uint8(255), 3, 2)
    with av.open("clip.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=5, width=32, height=64, pix_fmt="yuv420p")
        stream.set_display_rotation(90)
        for _ in range(21):  # stored as a telephone held upright stores it
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(picture, -1)))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    for number in (0, 20):
        listed(Path(f"masks of clip/{number}.png"))
        Image.fromarray(np.uint8(area * 6)).save(f"masks of clip/{number}.png")
    return {"clip_000000": area, "clip_000010": None, "clip_000020": area}


def labelme(seed):
    from labelme._label_file import write_label_file

    area = drawn(seed)
    Path("annotated").mkdir()
    Image.fromarray(np.uint8(area * 255)).save("annotated/a.png")
    mask = base64.b64encode(saved(Image.fromarray(area), "PNG")).decode()
    shape = dict(label="liver", shape_type="mask", points=[[0, 0], [21, 17]], mask=mask, flags={})
    size = dict(image_height=18, image_width=22)
    write_label_file("annotated/a.json", shapes=[shape], image_path="a.png", **size)
    return {"a": area}


def label_studio(seed):
    from label_studio_sdk.converter import brush

    area = drawn(seed)
    Path("media/upload/1").mkdir(parents=True)
    Image.fromarray(np.uint8(area * 255)).save("media/upload/1/0123abcd-a.png")
    Image.fromarray(np.uint8(area * 255)).save("liver.png")
    found = brush.image2annotation("liver.png", "liver", "tag", "image")
    task = {"id": 1, "data": {"image": "/data/upload/1/0123abcd-a.png"}, "annotations": [found]}
    Path("project.json").write_text(json.dumps([task]))
    return {"a": area}


def cvat(seed):
    from datumaro.components.annotation import Mask
    from datumaro.components.dataset import Dataset
    from datumaro.components.dataset_base import DatasetItem
    from datumaro.components.media import Image as Media

    area = drawn(seed)
    photograph = Media.from_numpy(data=np.repeat(area[..., None] * np.uint8(255), 3, 2), ext=".png")
    item = DatasetItem("a", media=photograph, annotations=[Mask(area, label=1)])
    data = Dataset.from_iterable([item], categories=["pen", "liver"])
    data.export("export", "cvat", save_media=True)
    Path("export/default.xml").rename("export/annotations.xml")  # as CVAT names it
    return {"a": area}


FORMATS = {  # section: modules, what writes its files
    "NIfTI": ("nibabel", nifti),
    "DICOM-SEG": ("highdicom", dicom_seg),
    "GeoTIFF": ("rasterio", geotiff),
    "OME-Zarr": ("ome_zarr", ome_zarr),
    "Video": ("av", video),
    "labelme": ("labelme._label_file", labelme),
    "Label Studio": ("label_studio_sdk", label_studio),
    "CVAT": ("datumaro", cvat),
}


def block(section):
    (text,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], re.M | re.S)
    return text


@pytest.mark.parametrize("section", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_a_block_makes_images_and_masks_that_check_takes(section, tmp_path, monkeypatch, capsys):
    text = block(section)
    module, write = FORMATS[section]
    assert len(text.splitlines()) <= 16
    pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    table = re.findall("^    (.+,.+,.+)", SECTIONS["First"], re.M)[:4]
    listed(Path("my/classes.csv"), *table)
    for seed, part in ((0, "train"), (10, "val")):
        areas = write(seed)
        exec((block("First") + text).replace("train", part), {"__name__": "pasted"})
        for command in re.findall("^    python prepare_data.py (.*)", SECTIONS[section], re.M):
            prepare_data.main([*command.split(), "--part", part])
        for key, area in areas.items():
            path, mask = (Path(f"my/{kind}/{part}/{key}.png") for kind in ("images", "masks"))
            assert path.is_file() and mask.is_file() == (area is not None)
            if area is None:  # unlabelled, which no image of val is
                path.unlink()
                continue
            ids = np.asarray(Image.open(mask))
            picture = np.asarray(Image.open(path).convert("L"))
            assert np.array_equal(ids, area)
            for number, low, high in ((0, 0, 40), (1, 140, 255)):
                assert low <= (picture[ids == number].mean() if number in ids else low) <= high
        for path in [path for path in Path().iterdir() if path.name != "my"]:
            path.rename(f"{path}.{part}")  # the next part's files are new
    prepare_data.main("check --dataset folder --data-root my".split())
    assert "every file can be read" in capsys.readouterr().out


def test_the_page_has_these_formats_and_a_value_without_a_row_stops(tmp_path, monkeypatch):
    assert ["First", *FORMATS] == [*SECTIONS]
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
