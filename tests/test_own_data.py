"""A user's own ids, lists, classes and pixels: what they mean, or the line that says why not."""

import json
import re
import shlex
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import prepare_data
import supervised
from common.sources import load
from common.weights import load_backbone
from convert import png
from tiny import ROOT, draw_folder, own_folder, shrink, train
from trees import draw, flags, folder, keys_of, listed, own, picture, refusal


def test_voc_takes_any_ids_when_lists_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without published lists
    root = tmp_path / "tree"
    for i, key in enumerate(["a", "b c", "d_2007", "e", "v", "w.x"]):
        picture(root / f"JPEGImages/{key}.jpg", "RGB", (40 * i, 0, 0))
        picture(root / f"SegmentationClass/{key}.png", "P", i)
    for part, keys in (("train", ["a", "b c\tNone", "d_2007", "e"]), ("val", ["v", "w.x"])):
        listed(root / f"ImageSets/Segmentation/{part}.txt", *keys)
    one = listed(tmp_path / "l.txt", "JPEGImages/d_2007.jpg", "a")
    two = listed(tmp_path / "u.txt", "JPEGImages/b c.jpg\tNone")
    for dataset, lists, rest in (("voc", "", ["b c", "e"]), ("voc_aug", two, ["b c"])):
        data = load(flags(root, dataset=dataset, labeled_list=one, unlabeled_list=lists))
        assert keys_of(data.labeled) == ["a", "d_2007"] and keys_of(data.unlabeled) == rest
        assert keys_of(data.val) == ["v", "w.x"]
        assert (np.asarray(data.read(data.val[1], True)[1]) == 5).all()
    assert "no image key" in refusal(load, flags(root, dataset="voc"))
    (root / "ImageSets/Segmentation/train.txt").unlink()
    assert load(flags(root, dataset="voc", labeled_list=one)).unlabeled == []
    made = f"; python prepare_data.py voc --root {root} makes SegmentationClassAug"
    for file, told in (("SegmentationClass/a.png", True), ("JPEGImages/a.jpg", False)):
        (root / file).unlink()
        line = refusal(load, flags(root, dataset="voc", labeled_list=one))
        assert line.endswith(made) == told


SEPARATED = [  # tree, an image of it, a line of a list, the sign that is named
    ("voc, CPS", "2011_000068", "2007_000032,2008_000008", ","),
    ("voc, CPS", "2011_000068", "2007_000032; 2008_000008", ";"),
    ("cityscapes, CPS", "ulm_000001_000019", "jena_000078_000019|aachen_000000_000019", "|"),
    ("folder", "b", "a;b", ";"),
    ("folder", "b", "a, b", ","),
    ("folder", "b", "images/train/a.png;masks/train/a.png", ";"),
]


@pytest.mark.parametrize("tree, image, line, sign", SEPARATED)
def test_another_separator_is_named(tmp_path, tree, image, line, sign):
    args = flags(tmp_path / "tree", dataset=tree.partition(",")[0], num_classes=0)
    if tree == "folder":
        args = own(folder(tmp_path / "tree", ["a", "b"]))
    else:
        draw(tmp_path / "tree", tree)
    for flag in ("labeled_list", "unlabeled_list"):
        args.labeled_list = listed(tmp_path / "good.txt", image)
        setattr(args, flag, listed(tmp_path / "l.txt", line))
        told = refusal(load, args)
        assert "TAB or a" in told and (f"not at {sign}" in told or f"columns with {sign}" in told)


def test_a_folders_own_lists_take_bare_ids_and_names_with_commas(tmp_path):
    root = folder(tmp_path, ["a", "deep/b", "c,d", "one/e", "two/e"], [".png", ".JPG"])
    listed(root / "train.txt", "b", "c,d", "images/train/a.png", "two/e")
    listed(root / "val.txt", "v1")
    data = load(own(root))
    assert keys_of(data.labeled) == ["a", "c,d", "deep/b", "two/e"] and keys_of(data.val) == ["v1"]
    assert data.labeled[2].image == root / "images/train/deep/b.JPG"
    listed(root / "train.txt", "a", "e")
    assert "e has no image here" in refusal(load, own(root))
    for i, name in enumerate(("a.jpg", "deep/b.png")):  # each beside another of its key
        twin = picture(root / "images/train" / name, "RGB", i)
        key = name.partition(".")[0]
        listed(root / "train.txt", key.rpartition("/")[2], "c,d")
        assert f"another image has the key {key} too" in refusal(load, own(root))
        listed(root / "train.txt", f"images/train/{name}", "c,d")
        assert twin in [item.image for item in load(own(root)).labeled]


def test_check_finds_a_picture_in_two_sets_in_two_formats_and_tells_all_that_is_wrong(
    tmp_path, capsys
):
    root = draw_folder(tmp_path / "my", 4)
    command = f"check --dataset folder --data-root {root} --num-classes 4".split()
    prepare_data.main(command)
    Image.open(root / "images/train/7.png").save(root / "images/val/z.bmp")
    (root / "masks/val/z.png").touch()
    (root / "masks/train/3.png").write_bytes(b"cut")
    for path in root.glob("masks/val/*"):
        Image.new("L", (42, 36), 255).save(path)
    assert "3 bad files" in refusal(prepare_data.main, command)
    told = capsys.readouterr()
    for words in (
        "z.bmp: an image of val, the same as",
        "3.png: not readable",
        "masks of val; all",
    ):
        assert words in told.err
    assert "is in no labelled mask" not in told.out


@pytest.mark.parametrize("table", [[0, 255, 0], [1, 1, 1], [0, 1, 2]])
def test_a_first_evaluation_that_a_constant_reaches_says_so_once(
    table, tmp_path, monkeypatch, capsys
):
    shrink(supervised, monkeypatch)
    monkeypatch.setattr(supervised, "predict", lambda net, x, *some: torch.zeros_like(x[0]).long())
    root = draw_folder(tmp_path / "my own", 3)
    for path in root.glob("masks/*/*.png"):  # as 0 and 9, as one class, or as they are
        Image.open(path).point([9 if i == 255 else i for i in table] + [9] * 253).save(path)
    listed(root / "classes.csv", "id,name,r,g,b", *(f"{i},{i},{i},0,0" for i in range(3)))
    argv = own_folder(root, tmp_path / "run", 0, iters=4, evaluate=2)
    train(supervised, [*argv, "--ignore-index", "9"])
    pattern = "^(val's masks hold one class|one class everywhere).*: python prepare_data.py (.*)$"
    ((what, command),) = re.findall(pattern, capsys.readouterr().out, re.M)
    assert what.startswith("val's") == command.startswith("convert") == (table[2] != 2)
    if table[2] == 2:
        prepare_data.main(shlex.split(command))


def test_names_of_classes_are_in_log_checkpoint_panels_and_predictions(tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    root = draw_folder(tmp_path / "my", 3)
    names = ["bare ground", "tree", "a, b"]
    rows = [f'{i},"{name}",{90 * i},7,0' for i, name in enumerate(names)]
    listed(root / "classes.csv", "id,name,r,g,b", *rows)
    run = tmp_path / "run"
    train(supervised, own_folder(root, run, 0, iters=2, evaluate=2, save=2, pictures=2))
    start, *_, done = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert start["classes"] == names and len(done["last"]["iou"]) == 3
    source = predict.open_source(str(run))
    assert source.data.classes == names and source.data.palette.tolist()[2] == [180, 7, 0]
    predict.main([str(run), "--split", "val", "--out", str(tmp_path / "scored")])
    assert "bare ground" in (tmp_path / "scored/index.html").read_text()
    below = np.asarray(Image.open(run / "panels/000002-val.png"))[2 * 176 :]  # of the two images
    assert all((below == [90 * i, 7, 0]).all(2).any() for i in range(3))


@pytest.mark.parametrize("colours", [2, 4, 16, 17, 256])
def test_a_palette_of_few_colours_keeps_every_index(colours):
    mask = np.array([[0, 1, 15, 16, 200, 255]], np.uint8)
    data = png(mask, [[i, i, i] for i in range(colours)])
    (packed,) = re.findall(b"IDAT(.*)........IEND", data, re.S)
    assert data[24:26] == b"\x08\x03" and zlib.decompress(packed)[1:] == mask.tobytes()  # 8 bits


@pytest.mark.parametrize("name, stem", [("resnet50s", "deep"), ("resnet101c", "v1c")])
def test_timms_networks_have_the_keys_and_features_of_a_stem(tmp_path, monkeypatch, name, stem):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/backbones.md").read_text()
    text = re.search(r"^```python\n(.*?)^```$", page, re.M | re.S)[1]  # the first block
    text = text.replace("resnet50s", name).replace(".gluon_in1k", "").replace("True", "False")
    exec(text, space := {})
    net = supervised.torchvision.models.get_model(name[:-1], weights=None)
    del net.fc, net.avgpool
    supervised.deepen_stem(net, (64, 64, 128) if stem == "deep" else (32, 32, 64))
    state = torch.load(f"{name}.pth", weights_only=True)
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, "wrapped.pth")
    x = torch.randn(1, 3, 32, 32)
    for file in (f"{name}.pth", "wrapped.pth"):
        load_backbone(net, file, name[:-1], stem)
        found = supervised.features(net.eval(), x)[3]
        assert torch.equal(found, space["net"].eval().forward_features(x))


@pytest.mark.parametrize("scale", [0.75, 1.3, 2.0])
def test_a_scaled_training_picture_is_half_a_grey_level_darker(scale):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    size = int(90 * scale)
    rng = np.random.default_rng(3)
    found, _, _ = supervised.augment(Image.fromarray(pixels), None, rng, size, (scale,))
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    exact = supervised.F.interpolate(values, (size, size), mode="bilinear")[0].numpy()
    assert 0.4 < np.mean(exact - found) < 0.55
