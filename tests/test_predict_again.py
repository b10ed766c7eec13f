"""predict.py called again: what is there is of the image and mask that are asked for, or made anew.

Checkpoints, data and files that a call must not take for what they are not: one line.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from common import Refusal, metrics
from common.checkpoints import write_checkpoint
from common.data import FACTS
from common.flags import acting, merge
from tiny import draw_tree, flags, save, script, shrink, train
from trees import KEYS, draw, listed, publish


def run(*words):
    predict.main([*map(str, words), "--device", "cpu"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns (tree, run) of two steps of supervised.py on CamVid's layout."""
    folder = tmp_path_factory.mktemp("again")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        supervised = script("supervised")
        shrink(supervised, patch)
        tree = draw_tree(folder / "tree")
        train(supervised, flags(tree, folder / "run", iters=2, log=2, evaluate=2, save=2))
        yield tree, folder / "run"


@pytest.fixture(autouse=True)
def small(trained, monkeypatch, tmp_path):
    """Tiny networks, in an empty folder."""
    shrink(script("supervised"), monkeypatch)
    monkeypatch.chdir(tmp_path)


def photo(path, width=48):
    save(Path(path), np.random.default_rng(0).integers(0, 256, (36, width, 3), dtype=np.uint8))


def files(folder, *kinds):
    """Returns {kind: bytes of its file of f0}."""
    return {kind: next(Path(folder, kind).glob("f0.*")).read_bytes() for kind in kinds}


def test_classes_are_of_the_image_that_is_asked_for(trained):
    """Of another folder's of the same name, of an edited one, and after a kill between two."""
    _, of = trained
    photo("a/f0.png")
    photo("b/f0.png", 40)
    kinds = ("classes", "overlays")
    expected = {}
    for name in ("a", "b"):
        run(of, name, "--out", f"only {name}", "--csv")
        expected[name] = files(f"only {name}", *kinds)
    assert expected["a"]["classes"] != expected["b"]["classes"]
    run(of, "a", "--out", "o", "--maps")
    run(of, "b", "--out", "o", "--csv")
    assert files("o", *kinds) == expected["b"]
    assert Path("o/shares.csv").read_text() == Path("only b/shares.csv").read_text()
    assert not Path("o/entropy/f0.png").exists()  # it was of a's
    shutil.copyfile("a/f0.png", "b/f0.png")
    run(of, "b", "--out", "o", "--no-overlays")
    assert files("o", "classes")["classes"] == expected["a"]["classes"]
    assert not Path("o/overlays/f0.jpg").exists()
    with open("o/made.jsonl", "a") as file:
        file.write('\n["f0", ["/')  # a kill
    for _ in range(2):
        run(of, "b", "--out", "o")
        assert files("o", *kinds) == expected["a"]
    before = Path("o/classes/f0.png").stat().st_mtime_ns
    run(of, "b", "--out", "o")
    assert Path("o/classes/f0.png").stat().st_mtime_ns == before
    Path("o/made.jsonl").unlink()  # of a version without: nobody knows what they are of
    Image.new("L", (48, 36)).save("o/classes/f0.png")
    run(of, "b", "--out", "o")
    assert files("o", *kinds) == expected["a"]


def test_what_is_compared_is_of_the_mask_that_is_scored(trained):
    _, of = trained
    photo("a/f0.png")
    for name, value in (("m", 1), ("n", 2)):
        save(Path(name, "f0.png"), np.full((36, 48), value, np.uint8))
    pictures = {}
    for name in ("m", "n"):
        run(of, "a", "--masks", name, "--out", f"only {name}")
        pictures[name] = files(f"only {name}", "compared")
    assert pictures["m"] != pictures["n"]
    run(of, "a", "--masks", "m", "--out", "o")
    run(of, "a", "--masks", "n", "--out", "o")
    assert files("o", "compared") == pictures["n"]
    run(of, "a", "--out", "o", "--maps")  # no mask is asked for, none is forgotten
    assert files("o", "compared") == pictures["n"]
    when = Path("m/f0.png").stat().st_mtime_ns + 10**9
    shutil.copyfile("m/f0.png", "n/f0.png")
    os.utime("n/f0.png", ns=(when, when))
    run(of, "a", "--masks", "n", "--out", "o")
    assert files("o", "compared") == pictures["m"]
    found = torch.from_numpy(np.array(Image.open("o/classes/f0.png"))).long()
    expected = metrics.scores(metrics.confusion_matrix(found, torch.ones_like(found), 11))
    scores = json.loads(Path("o/scores.json").read_text())
    assert {name: scores[name] for name in expected} == expected


def own(folder, *names, ids=3, void=255):
    """Draws val of a folder of one's own, 0.png of classes and void; names: of its classes.csv."""
    mask = (np.arange(48) % (ids + 1)).astype(np.uint8)[None].repeat(36, 0)
    mask[mask == ids] = void
    save(Path(folder, "masks/val/0.png"), mask)
    photo(Path(folder, "images/val/0.png"))
    save(Path(folder, "masks/train/1.png"), mask)
    photo(Path(folder, "images/train/1.png"))
    if names:
        rows = [f"{i},{name},{i},7,0" for i, name in enumerate(names)]
        Path(folder, "classes.csv").write_text("\n".join(["id,name,r,g,b", *rows]))


def trained_on(folder, out, *words):
    train(script("supervised"), [*flags(folder, out, 1, 1, 1, 1), "--dataset", "folder", *words])


def test_a_part_is_scored_by_the_checkpoints_classes(trained):
    """Those of its names, or of no name; val is the published one, as with --eval-only."""
    tree, of = trained
    full = "--weights none --lr 0.01 --backbone resnet18 --output-stride 16 --split all".split()
    own("named", "road", "tree", "car")
    trained_on("named", "r", *full)
    own("other", "tree", "road", "car")
    own("bare")
    own("two", "road", "tree")
    own("void", void=9)
    own("zero", *predict.load(of)[1], ids=11, void=200)
    trained_on("zero", "z", *full, "--ignore-index", "200")
    camvid = draw_tree(Path("camvid"), ids=11)
    save(camvid / "valannot/val0.png", np.full((36, 48), 255, np.uint8))
    trained_on("void", "v", *full, "--num-classes", "3", "--ignore-index", "9")
    score = ("--split", "val", "--out", "o")
    run("r", *score, "--data-root", "bare")  # no names, nor their number: the checkpoint's
    assert json.loads(Path("o/scores.json").read_text())["constant"] == pytest.approx(1 / 9)
    assert "road" in Path("o/index.html").read_text()
    run("v", "--split", "val", "--out", "o2")  # classes without names may be any
    run("v", "--split", "val", "--out", "o3", "--data-root", "void")
    save(Path("zero/masks/val/0.png"), np.full((36, 48), 255, np.uint8))
    run(of, "--split", "val", "--dataset", "folder", "--data-root", "zero", "--out", "o4")
    run("z", "--split", "val", "--dataset", "camvid", "--data-root", camvid, "--out", "o5")
    for words, line in (
        (("r", *score, "--data-root", "other"), "class 0 is road there and tree here"),
        (("r", *score, "--data-root", "two"), "2 classes, the checkpoint has 3"),
        (("v", *score, "--dataset", "camvid", "--data-root", tree), "11 classes, .* has 3"),
        (
            ("v", "--split", "val", "--out", "o6", "--data-root", "bare"),
            "bare/masks/val/0.png: value 255 .* 9 is ignored",
        ),
    ):
        with pytest.raises(Refusal, match=line):
            run(*words)


def test_val_is_the_published_one(monkeypatch):
    """As with --eval-only: another set of --split val is refused, without labels of one's own."""
    write_checkpoint_of("voc", Path("n.pt"))
    publish(monkeypatch, "voc", "parts", "val", KEYS["voc"]["val"])
    draw(Path("tree"), "voc, official")
    words = ("n.pt", "--split", "val", "--data-root", "tree", "--out")
    run(*words, "o")
    assert len(list(Path("o/classes").iterdir())) == 2
    listed(Path("tree/ImageSets/Segmentation/val.txt"), KEYS["voc"]["val"][0])
    with pytest.raises(Refusal, match="val of voc: 1 images, set .* instead of 2, .* --masks"):
        run(*words, "o2")
    assert not Path("o2").exists()
    write_checkpoint_of("voc", Path("n.pt"), split_seed=0)
    run(*words, "o3")  # a run on images of one's own choice
    with pytest.raises(Refusal, match="val of voc_aug: 1 images"):
        run(*words, "o4", "--dataset", "voc_aug")  # about which that run says nothing


def write_checkpoint_of(dataset, path, **values):
    """Writes a checkpoint of supervised.py with random weights."""
    module = script("supervised")
    args = merge(module.Args(dataset=dataset, weights="none", **values), module.preset)
    net = module.Network(args, len(FACTS[dataset]["classes"]), module.DeepLabV3Plus)
    networks = {"student": net.state_dict()}
    content = dict(script="supervised.py", args=acting(args), networks=networks, step=1)
    write_checkpoint(path, content)


def test_what_would_be_ignored_or_overwritten_is_one_line(trained):
    _, of = trained
    photo("a/f0.png")
    for words, line in (
        (("--program", "n.pt2", "--amp", "bf16"), "--amp bf16 does nothing here: it needs --out"),
        (("--safetensors", "net.md"), "net.md: a file whose name ends in .safetensors"),
        (("--onnx", "net"), "--onnx net: a file whose name ends in .onnx"),
        (("--program", "n.pt"), "ends in .pt2"),
        (("a", "--out", "o", "--data-root", "b"), "--data-root b does nothing here"),
    ):
        with pytest.raises(Refusal, match=line):
            run(of, *words)
    for content in (b"", b'{"amp": "no', b"[1]", b"\xff"):
        Path("o").mkdir(exist_ok=True)
        Path("o/predict.json").write_bytes(content)
        with pytest.raises(Refusal, match="o/predict.json: damaged, .* give a new --out"):
            run(of, "a", "--out", "o")
    assert not list(Path().glob("n*"))


def test_a_model_card_goes_without_half_a_line_and_never_over_another_text(trained):
    pytest.importorskip("safetensors")
    _, of = trained
    shutil.copytree(of, "r")
    log = Path("r/log.jsonl").read_text()
    for kept, told in ((log + '{"kind": "ev', True), (log[:50], False), ("", False)):
        Path("r/log.jsonl").write_text(kept)
        run("r", "--safetensors", "n.safetensors")  # again: the card is its own
        assert ("| mIoU on val |" in Path("n.md").read_text()) == told
    Path("README.md").write_text("# Mine")
    with pytest.raises(Refusal, match="README.md: no model card of README.safetensors"):
        run(of, "--safetensors", "README.safetensors")
    assert Path("README.md").read_text() == "# Mine" and not Path("README.safetensors").exists()
