"""What users bring: masks of other formats, classes of their own, weights of timm."""

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


def test_the_block_that_others_of_the_page_begin_with_makes_ids_by_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ["0,a,0,0,0,3", "1,b,0,0,0,4", "1,b,0,0,0,5"]
    listed(Path("my/classes.csv"), "id,name,r,g,b,value", *rows)
    page = (ROOT / "docs/formats.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], space := {})
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
