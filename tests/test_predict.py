"""predict.py: every checkpoint to pictures, scores, archives and files that others read.

Called again, what is there is of the image and the mask that are asked for, or made anew.
"""

import csv
import importlib
import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import tiny
from common import Refusal, metrics, outputs
from common.checkpoints import write_checkpoint
from common.data import FACTS
from common.flags import acting, as_fields, merge
from results.analysis import mean_logits
from tiny import SCORED, SCRIPTS, draw_folder, draw_tree, own_folder, save, script, shrink, train
from trees import KEYS, draw, listed, publish, refusal

exporters = pytest.mark.skipif(
    torch.__version__[:4] == "2.6.",
    reason="torch 2.6 refuses --onnx, and --program of TensorFlow's padding",
)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Every test has an empty current folder and tiny networks."""
    monkeypatch.chdir(tmp_path)
    for name in SCRIPTS:
        shrink(script(name), monkeypatch)


def checkpoint(name="supervised", step=600, dataset="camvid", **values):
    """Writes run/last.pt of a script's tiny network with random weights."""
    module = script(name)
    torch.manual_seed(0)
    args = merge(module.Args(dataset=dataset, weights="none", **values), module.preset)
    head = predict.head_of(module)
    networks = {}
    for part in tiny.NETWORKS[name]:
        net = module.Network(args, len(FACTS[dataset]["classes"]), head)
        networks[part] = net.state_dict()
    content = dict(script=f"{name}.py", args=acting(args), networks=networks, step=step)
    Path("run").mkdir(exist_ok=True)
    write_checkpoint(Path("run/last.pt"), content)


def photo(path, height=40, width=52, mode="RGB", **more):
    """Saves a picture of noise, another for each height."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **more)


def call(*words):
    predict.main([*map(str, words), "--device", "cpu"])


def scored(folder):
    return json.loads(Path(folder, "scores.json").read_text())


def files(folder):
    """Returns {kind: bytes of its file of the image f0}."""
    return {path.parent.name: path.read_bytes() for path in Path(folder).glob("*/f0.*")}


@pytest.mark.smoke
@pytest.mark.parametrize("name", SCRIPTS)
def test_classes_are_those_of_the_scripts_own_evaluation(name):
    checkpoint(name, protocol="whole")
    photo("in/a.png")
    photo("in/sub/b.png", 20, 30)
    source = predict.open_source("run")
    assert source.name == SCORED[name]
    x = torch.from_numpy(tiny.pixels("in/a.png")).permute(2, 0, 1)
    for window, protocol in ((0, "whole"), (24, "slide")):
        args = replace(source.args, protocol=protocol, crop_size=window)
        expected = source.script.predict(source.net, x, args, 11).numpy()
        for more in ([], ["--maps"]):
            out = Path(f"out{window}{len(more)}")
            call("run", "in", "--out", out, "--window", window, *more)
            assert (tiny.pixels(out / "classes/a.png") == expected).all()
            assert tiny.pixels(out / "classes/sub/b.png").shape == (20, 30)
    assert (out / "K/a.png").exists() == ("T" in source.saved["args"])
    with Image.open(out / "classes/a.png") as picture:
        colours = bytes(picture.getpalette())
    assert colours == source.data.palette.tobytes().ljust(768, b"\0")
    assert (out / "classes/a.png").read_bytes()[24] == 8  # bits of a pixel
    assert predict.load("run/last.pt")[1][0] == "sky"


def test_maps_are_of_the_mean_logits_and_K_is_that_of_alg_1():
    checkpoint("cps_fpl", T=(0.9,), protocol="whole")
    source = predict.open_source("run")
    for p in source.net.parameters():
        p.data *= 2  # otherwise all classes are equally likely
    x = torch.randint(0, 256, (3, 40, 52), dtype=torch.uint8)
    p = source.net(x[None])["logits"][0].double().softmax(0)
    (found,) = predict.segment(source, x[None], maps=True)
    K = (p.sort(0, descending=True).values.cumsum(0) <= 0.9).sum(0).clamp(min=1)  # n - 1
    entropy = -(p * p.log()).sum(0) / np.log(11)
    assert (found["K"] == K.numpy()).mean() > 0.99 and K.unique().numel() > 1
    assert abs(found["confidence"] - 255 * p.amax(0).numpy()).max() <= 0.51
    assert abs(found["entropy"] - 255 * entropy.numpy()).max() <= 0.51
    flat = torch.full_like(x, 100)  # windows that overlap do not make it surer
    (windows,) = predict.segment(source, flat[None], window=24, maps=True)
    (alone,) = predict.segment(source, flat[None, :, :24, :24], maps=True)
    assert abs(int(windows["confidence"].max()) - int(alone["confidence"].max())) <= 1
    args = replace(source.args, protocol="slide", crop_size=24)
    for pixels, side in ((predict.WHOLE, 0), (predict.WHOLE + 1, predict.WINDOW)):
        given = predict.protocol_for(source.args, pixels, 0)
        assert given.protocol == ("slide" if side else "whole") and given.crop_size in (side, 128)
    ones = SimpleNamespace(script=source.script, args=args, data=source.data)
    ones.net = lambda x: {"logits": torch.ones(len(x), 11, *x.shape[2:])}
    assert torch.equal(mean_logits(ones, x), torch.ones(1, 11, 40, 52))


def test_an_older_checkpoint_has_one_T_and_predict_shows_K_of_one_alone():
    saved = {"T": 0.9, "scales": [0.5, 2.0], "lr": 0.1}
    assert as_fields(script("cps_fpl").Args, saved) == {
        "T": (0.9,),
        "scales": (0.5, 2.0),
        "lr": 0.1,
    }
    for T, one in (([0.9], 0.9), (0.9, 0.9), ([0.8, 0.9], None), (None, None)):
        saved = {"args": {"T": T}}
        for name, found in (("cps_fpl", one), ("u2pl", None)):  # another's T is something else
            source = SimpleNamespace(saved=saved, script=script(name))
            assert predict.one_T(source) == found


def test_networks_scales_and_flip():
    checkpoint("cps_fpl", evaluate="branch2")
    content = torch.load("run/last.pt", weights_only=True)
    for weights in content["networks"].values():
        weights["head.classify.1.weight"] *= 30  # otherwise all classes are equally likely
    torch.save(content, "run/last.pt")
    x = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    nets = [predict.load("run", name)[0] for name in ("branch1", None, "mean")]
    one, two, mean = [net.net(x, upsampled=False)["logits"].softmax(1) for net in nets]
    assert torch.allclose(mean, (one + two) / 2, atol=1e-6) and not torch.allclose(one, two)
    small = torch.nn.functional.interpolate(x.float(), (12, 16), mode="bilinear", antialias=True)
    logits = [nets[1](view) for view in (x, small)]
    mirrored = [nets[1](view.flip(3)).flip(3) for view in (x, small)]
    for flip, views in ((False, logits), (True, logits + mirrored)):
        expected = sum(script("cps_fpl").upsample(view, (24, 32)).softmax(1) for view in views)
        found = predict.Views(nets[1].net, (0.5, 1.0), flip)(x)["logits"].exp()
        assert torch.allclose(found, expected / len(views), atol=1e-6)
    save(Path("a.png"), x[0].permute(1, 2, 0).numpy())
    call("run", "a.png", "--out", "o", "--maps", "--flip", "--scales", 0.5, 1)
    confidence = tiny.pixels("o/confidence/a.png")
    assert abs(confidence - 255 * found[0].amax(0).numpy()).max() <= 0.51
    checkpoint("u2pl", step=3, warmup_iters=3)
    assert predict.open_source("run").name == "student"


def trained_on(folder, out, *more, classes=0):
    """Trains a step of supervised.py; classes 0: as many as the folder's table has."""
    once = dict(iters=1, log=1, evaluate=1, save=1)
    train(script("supervised"), [*own_folder(folder, out, classes, **once), *more])


def test_bn_has_the_statistics_that_the_run_was_scored_with(monkeypatch, capsys):
    """--precise-bn: of the training images, or a note where these are not. A note on bf16 too."""
    monkeypatch.setattr(predict.distributed, "CPUINFO", Path("cpuinfo"))
    Path("cpuinfo").touch()  # of a CPU without its instructions
    draw_folder(Path("mine"), 3)
    trained_on("mine", "run", "--precise-bn", "2", classes=3)
    done = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    call("run/last.pt", "--split", "val", "--out", "scored", "--no-overlays")
    Path("mine").rename("moved")
    call("run/last.pt", "--split", "val", "--data-root", "moved", "--out", "again")
    assert scored("scored")["miou"] == scored("again")["miou"] == done["last"]["miou"]
    call("run/last.pt", "moved/images/val", "--data-root", "moved", "--out", "o")
    assert "running statistics" not in capsys.readouterr().err
    line = refusal(call, "run/last.pt", "moved/images/val", "--out", "o")
    assert "precise_bn 2 there, 0 here" in line
    said = capsys.readouterr().err
    assert "running statistics" in said and "note: --amp" not in said
    refusal(call, "run/last.pt", "moved/images/val", "--out", "o", "--amp", "bf16")
    assert "note: --amp bf16" in capsys.readouterr().err


def test_images_of_every_kind_several_at_once_and_one_that_cannot_be_read():
    """--batch-size: as many of one size as follow one another."""
    checkpoint()
    for name, mode in (("g.png", "L"), ("r.png", "RGBA"), ("c.jpg", "CMYK"), ("p.png", "P")):
        photo(f"in/{name}", mode=mode)
    photo("in/s.png", 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo("in/turned.jpg", exif=exif)
    listed(Path("in/list.txt"), "g.png", "p.png")
    save(Path("in/deep.png"), np.zeros((9, 9), np.uint16))
    Path("in/z.jpg").write_bytes(b"no image")
    with patch.object(predict, "segment", wraps=predict.segment) as segment:
        line = refusal(call, "run", "in", "--out", "o", "--csv", "--batch-size", 2)
    assert [len(given.args[1]) for given in segment.call_args_list] == [1, 2, 1, 1, 1]
    assert line.startswith("2 images were not read, the first: ") and "deep.png: mode I;16" in line
    shapes = {path.stem: tiny.pixels(path).shape for path in Path("o/classes").glob("*")}
    assert shapes == dict.fromkeys("g r c p turned".split(), (40, 52)) | {"s": (30, 52)}
    head, first, *more = csv.reader(open("o/shares.csv"))
    assert head[:2] == ["image", "sky"] and len(more) == 5
    assert sum(map(float, first[1:])) == pytest.approx(1, abs=1e-4)
    assert outputs.pixels_of(np.zeros((2, 3), np.uint8), 4).tolist() == [6, 0, 0, 0]
    items = iter(range(9))
    assert next(outputs.ahead(abs, items)) == 0 and next(items) == 3  # two more were begun
    call("run", "in/t*.jpg", "--out", "t", "--upright")
    assert tiny.pixels("t/classes/turned.png").shape == (52, 40)
    call("run", "in/list.txt", "--out", "l")
    assert {path.name for path in Path("l/classes").iterdir()} == {"g.png", "p.png"}
    for name in ("g.png", "p.png"):  # alone as beside the other
        assert (tiny.pixels(f"l/classes/{name}") == tiny.pixels(f"o/classes/{name}")).mean() > 0.99


def test_it_goes_on_where_it_was_ended():
    checkpoint()
    for i in range(4):
        photo(f"in/{i}.png", 30 + i)
    rename = os.replace

    def ended(new, path):
        if path.name == "1.jpg":  # a whole class map, an overlay without its name
            raise KeyboardInterrupt
        rename(new, path)

    with patch.object(os, "replace", ended), pytest.raises(KeyboardInterrupt):
        call("run", "in", "--out", "o")
    assert not Path("o/overlays/1.jpg").exists()
    ready = len(list(Path("o/overlays").glob("[0-9]*")))
    with patch.object(predict, "segment", wraps=predict.segment) as segment:
        call("run", "in", "--out", "o")
    assert segment.call_count == 4 - ready
    assert len(list(Path("o/overlays").glob("[0-9]*"))) == 4
    Path("o/classes/2.png").write_bytes(b"")
    assert "o/classes/2.png: not readable" in refusal(call, "run", "in", "--out", "o", "--csv")
    assert "another --out" in refusal(call, "run", "in", "--out", "o", "--scales", "0.5")


def made(*words):
    """Calls into one folder and into a new one; returns the files, which are the same in both."""
    new = f"new{len(list(Path().glob('new*')))}"
    for out in ("o", new):
        call("run", *words, "--out", out)
    for path in Path(new).glob("s*"):  # shares.csv, scores.json
        assert path.read_text() == Path("o", path.name).read_text()
    assert files("o") == files(new)
    return files(new)


def test_files_are_of_the_image_and_the_mask_that_are_asked_for():
    """Of another folder's of the same name, of an edited one, and after a kill between two."""
    checkpoint()
    photo("a/f0.png")
    photo("b/f0.png", 30)
    of_a = made("a", "--maps")
    of_b = made("b", "--csv")
    assert of_a["classes"] != of_b["classes"]
    shutil.copyfile("a/f0.png", "b/f0.png")
    assert made("b", "--no-overlays") == {"classes": of_a["classes"]}
    with open("o/made.jsonl", "a") as file:
        file.write('\n["f0", ["/')  # a kill
    for _ in range(2):
        made("b")
    Path("o/made.jsonl").unlink()  # of a version without: nobody knows what they are of
    Image.new("L", (52, 40)).save("o/classes/f0.png")
    made("b")
    for name, value in (("m", 1), ("n", 2)):
        save(Path(name, "f0.png"), np.full((40, 52), value, np.uint8))
    one, two = (made("b", "--masks", name)["compared"] for name in "mn")
    assert one != two
    call("run", "b", "--out", "o")  # no mask is asked for, none is forgotten
    assert files("o")["compared"] == two
    shutil.copyfile("m/f0.png", "n/f0.png")
    os.utime("n/f0.png", (0, 0))
    assert made("b", "--masks", "n")["compared"] == one


def test_boundary_iou_is_that_of_single_pixels():
    """Near: a pixel of another class, or none, within width rows and columns."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (5, 6)).repeat(4, 0).repeat(4, 1)
    label[:3, :9] = 255
    pred = np.roll(label, (1, 2), (0, 1)) % 3
    width = round(0.06 * np.hypot(*label.shape))
    bands = []  # of each class, the places near its boundary: the truth's, the prediction's
    for classes in (label, np.where(label == 255, 255, pred)):
        around = np.pad(classes, width, constant_values=-1)
        around = np.lib.stride_tricks.sliding_window_view(around, (2 * width + 1,) * 2)
        near = (around != classes[..., None, None]).any((2, 3))
        bands.append([near & (classes == c) for c in range(3)])
    expected = [(a & b).sum() / (a | b).sum() for a, b in zip(*bands, strict=True)]
    counts = metrics.boundary_confusion(pred, label, 3, share=0.06)
    assert metrics.iou_per_class(counts)[:3].tolist() == pytest.approx(expected)
    assert width == 2 and 0 < min(expected) and max(expected) < 1


def test_scores_are_those_of_the_confusion_matrix():
    draw_tree(Path("tree"))
    checkpoint(data_root="tree")
    call("run", "--split", "val", "--out", "o")
    call("run", "tree/val", "--masks", "tree/valannot", "--out", "two")
    assert not Path("o/shares.csv").exists()  # of --csv
    own, bands = [], []
    for name in ("val0", "val1"):
        label, found = (tiny.pixels(f"{at}/{name}.png") for at in ("tree/valannot", "o/classes"))
        bands.append(metrics.boundary_confusion(found, label, 11))
        label, found = torch.from_numpy(label), torch.from_numpy(found).long()
        own.append(metrics.confusion_matrix(found, label, 11))
    boundary = [round(x, 6) for x in metrics.iou_per_class(sum(bands))[:-1].tolist()]
    worst = sorted((0, 1), key=lambda i: metrics.scores(own[i])["miou"])
    assert metrics.scores(sum(own)).items() <= scored("o").items()
    found = [float("nan") if x is None else x for x in scored("o")["boundary_iou"]]
    assert found == pytest.approx(boundary, nan_ok=True)
    _, *rows = csv.reader(open("o/confusion.csv"))
    assert [[int(count) for count in row[1:]] for row in rows] == sum(own).tolist()
    page = Path("o/index.html").read_text()
    places = [page.index(f"compared/val{i}.jpg") for i in worst]
    assert places == sorted(places) and "http" not in page and "<script" not in page
    width, height = Image.open("o/confusion.png").size
    assert height == width + 28 and Path("o/compared/val0.jpg").is_file()
    os.remove("o/scores.json")
    call("run", "--split", "val", "--out", "o")  # classes are there: read, not made again
    assert scored("o") == scored("two")
    save(Path("void/val0.png"), np.full_like(tiny.pixels("tree/valannot/val0.png"), 255))
    line = refusal(call, "run", "tree/val/val0.*", "--masks", "void", "--out", "n")
    assert "no pixel of any class in the masks of these images" in line


def test_folders_behind_links_are_read_once_and_one_that_cannot_be_read_is_named(monkeypatch):
    photo("far/a.png")
    Path("in").mkdir()
    os.symlink("../far", "in/link")
    os.symlink("..", "far/loop")
    assert [item.key for item in outputs.find_images(["in", "in"], "o")] == ["link/a"]
    assert "in: all images there lie in --out in/link" in refusal(
        outputs.find_images, ["in"], "in/link"
    )
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "denied", "in/link")))
    assert "in/link: not readable (denied)" in refusal(outputs.find_images, ["in"], "o")


def test_overlays_of_thin_images_fit_into_a_jpeg():
    for height, width, size in ((700, 1, (85, 59_500)), (70_000, 2, (2, 60_000))):
        image, classes = Image.new("RGB", (width, height)), np.zeros((height, width), np.uint8)
        sheet = outputs.overlay(image, classes, ["a"], np.zeros((1, 3), np.uint8))
        assert sheet.width == size[0] and size[1] <= sheet.height < 65_500


def named(folder, *names):
    """Gives a folder a table with the names of its classes."""
    rows = [f"{i},{name},{i},7,0" for i, name in enumerate(names)]
    listed(Path(folder, "classes.csv"), "id,name,r,g,b", *rows)


def test_a_part_is_scored_by_the_checkpoints_classes():
    """Those of its names, or of no name; what its flags say of ids holds for its own data set."""
    draw_folder(Path("mine"), 3)
    draw_folder(Path("like camvid"), 11, void=200)
    camvid = draw_tree(Path("camvid"), ids=11)
    score = ("--split", "val", "--out")
    of_camvid = ("--dataset", "camvid", "--data-root", "camvid")

    named("mine", "road", "tree", "car")
    trained_on("mine", "named")
    named("mine", "tree", "road", "car")
    assert "class 0 is road there and tree here" in refusal(call, "named", *score, "o")
    Path("mine/classes.csv").unlink()
    call("named", *score, "o")  # no names, nor their number: the checkpoint's
    assert len(scored("o")["iou"]) == 3 and "road" in Path("o/index.html").read_text()
    line = refusal(call, "named", *score, "o2", *of_camvid)
    assert "11 classes, the checkpoint has 3" in line

    named("like camvid", *FACTS["camvid"]["classes"])
    trained_on("like camvid", "alike", "--ignore-index", "200")
    call("alike", *score, "o3")
    assert "value 255" in refusal(call, "alike", *score, "o4", "--data-root", "mine")
    save(camvid / "valannot/val0.png", np.full((36, 48), 255, np.uint8))
    call("alike", *score, "o5", *of_camvid)


def test_val_is_the_published_one(monkeypatch):
    checkpoint(dataset="voc")
    publish(monkeypatch, "voc", "parts", "val", KEYS["voc"]["val"])
    draw(Path("tree"), "voc, official")
    words = ("run", "--split", "val", "--data-root", "tree", "--out")
    call(*words, "o")
    listed(Path("tree/ImageSets/Segmentation/val.txt"), KEYS["voc"]["val"][0])
    with pytest.raises(Refusal, match="val of voc: 1 images, set .* instead of 2, .* --masks"):
        call(*words, "o2")
    assert not Path("o2").exists()
    checkpoint(dataset="voc", split_seed=0)
    call(*words, "o3")  # a run on images of one's own choice
    line = refusal(call, *words, "o4", "--dataset", "voc_aug")  # about which it says nothing
    assert "val of voc_aug: 1 images" in line


ARCHIVES = [  # the server, an image, its archive, the file in that
    ("cityscapes", "berlin_000000_000019_leftImg8bit", "zip", "berlin_000000_000019.png"),
    ("voc", "2008_000006", "tgz", "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"),
]


@pytest.mark.parametrize("server, image, ending, inside", ARCHIVES)
def test_archives_are_as_the_servers_take_them(server, image, ending, inside):
    """Cityscapes' own tool gives our scores of its archive."""
    checkpoint(dataset=server)
    photo(f"in/x/{image}.png")
    call("run", "in", "--out", "o", "--export", server)
    shutil.unpack_archive(f"o/{server}.{ending}", "u")
    assert [path for path in Path("u").rglob("*") if path.is_file()] == [Path("u", inside)]
    meant = np.array(FACTS[server].get("ids", {}).get("_labelIds.png", range(256)))
    found = tiny.pixels(f"o/classes/x/{image}.png")
    assert (meant[tiny.pixels(Path("u", inside))] == found).all()
    for path, words in (
        (f"in/y/{image}.png", "two images have one name"),
        ("in/n.png", "n: no name"),
    ):
        photo(path)
        assert words in refusal(call, "run", "in", "--out", "o2", "--export", server)
    if server == "cityscapes":
        module = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
        tool = pytest.importorskip(module)
        truth = np.random.default_rng(0).integers(0, 34, (5, 4)).repeat(8, 0).repeat(13, 1)
        file = "berlin_000000_000019_gtFine_labelIds.png"
        save(Path(file), truth.astype(np.uint8))
        pair = map(torch.from_numpy, (found.astype(int), meant[truth]))
        ours = metrics.scores(metrics.confusion_matrix(*pair, 19))
        tool.args.quiet, tool.args.evalInstLevelScore, tool.args.JSONOutput = True, False, False
        theirs = tool.evaluateImgLists([f"u/{inside}"], [file], tool.args)
        assert theirs["averageScoreClasses"] == pytest.approx(ours["miou"])


@exporters
def test_exports_are_what_the_network_computes():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("safetensors")
    checkpoint("cps_fpl")
    x = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    photo("in/a.png")
    listed(Path("in/b.png"), "no image")  # is named at the end
    words = "--out o --onnx n.onnx --program n.pt2 --safetensors n.safetensors"
    line = refusal(call, "run", "in", "--network", "branch2", *words.split())
    assert line.startswith("1 images were not read, the first: ") and "in/b.png" in line
    session = onnxruntime.InferenceSession("n.onnx")
    by_onnx = torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0])
    by_torch = torch.export.load("n.pt2").module()(x)
    for logits in (by_onnx, by_torch, predict.load("n.safetensors")[0](x)):
        assert torch.allclose(logits, predict.load("run", "branch2")[0](x), atol=1e-4)
    assert "branch2 of cps_fpl.py, step 600" in Path("n.md").read_text()


class Same(torch.nn.Module):
    """A pooling, convolutions that pad as TensorFlow does, and autocast that is not on."""

    def __init__(self):
        super().__init__()
        same = importlib.import_module("timm.layers").Conv2dSame
        layers = [same(3, 3, 3, stride, dilation=dilation) for stride, dilation in ((2, 1), (1, 2))]
        pool = torch.nn.MaxPool2d(3, 2, 1)
        self.layers = torch.nn.Sequential(pool, *layers, *layers, same(3, 3, 1, 2))

    def forward(self, image):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return self.layers(image.float())


@exporters
def test_networks_that_pad_as_tensorflow_does_are_exported_for_any_size():
    pytest.importorskip("timm")
    sides = itertools.product(range(1, 20), range(1, 8), range(1, 5), range(1, 4))
    theirs = importlib.import_module("timm.layers.padding").get_same_padding
    assert all(predict.same_padding(*each) == theirs(*each) for each in sides)
    model = Same().requires_grad_(False).eval()
    assert "within 0e+00" in predict.write_program(Path("n.pt2"), model)
    autocast = torch.autocast
    with pytest.raises(RuntimeError):
        predict.exported(model, lambda *_, **__: torch.zeros(2) + torch.zeros(3))
    assert torch.autocast is autocast
    assert importlib.import_module("timm.layers.padding").get_same_padding is theirs


def test_what_torch_does_not_export_is_refused_in_a_line():
    def fails(error):
        """Returns a writer that raises error."""
        return Mock(side_effect=error)

    for error in (
        AssertionError("Guard failed: (image.size()[2] % 2 != 0"),
        ValueError("a \x1b[96mb"),
    ):
        line = refusal(predict.or_refused, fails(error), Path("n.pt2"), None)
        assert line.startswith(f"n.pt2: torch {torch.__version__} does not export this network")
        assert "Error: Guard failed: " in line or "(ValueError: a)" in line
    with pytest.raises(RuntimeError, match="memory"):
        memory = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")
        predict.or_refused(fails(memory), Path("n.pt2"), None)


def test_a_model_card_goes_without_half_a_line_and_never_over_another_text():
    pytest.importorskip("safetensors")
    draw_folder(Path("mine"), 3)
    trained_on("mine", "run", "--precise-bn", "2", classes=3)
    log = Path("run/log.jsonl").read_text()
    for kept, told in ((log + '{"kind": "ev', True), (log[:50], False), ("", False)):
        Path("run/log.jsonl").write_text(kept)
        call("run", "--safetensors", "n.safetensors")  # again: the card is its own
        assert ("| mIoU on val |" in Path("n.md").read_text()) == told
    source = predict.open_source("run")
    Path("run/log.jsonl").write_text(log)
    assert "mIoU" not in outputs.model_card(source, "n", "", False)  # of another network
    assert outputs.history(source.saved | {"path": "run/n.safetensors"}) == ({}, {})
    Path("mine").rename("moved")
    predict.load("n.safetensors")  # BN's statistics of --precise-bn are in the file
    Path("p.safetensors").write_bytes(b"x")
    assert "no file of --safetensors" in refusal(call, "p.safetensors", "a.png", "--out", "o")
    Path("README.md").write_text("# Mine")
    line = refusal(call, "run", "--safetensors", "README.safetensors")
    assert "README.md: no model card of README.safetensors" in line
    assert Path("README.md").read_text() == "# Mine" and not Path("README.safetensors").exists()


REFUSED = [  # the flags, words of the line
    ("", "nothing to do"),
    ("a.png", "--out DIR with images"),
    ("no.png --out o", "no.png: no such image"),
    ("b.png b.jpg --out o", "one name, b; rename"),
    ("a.png --out o --network teacher", "--network takes student"),
    ("a.png --out o --masks run", "run/a.png: no such mask"),
    ("a.png --out o --split val", "images and --split: give one of them"),
    ("run --out o", "run: no image there (.jpg "),
    ("b.txt --out o", "b.txt: not a readable list"),
    ("--split test --dataset folder --data-root own --out o", "own: no test of folder there"),
    ("a.png --out o --scales 0", "--scales 0"),
    ("a.png --out o --export voc", "is one of camvid"),
    ("a.png --out o --data-root b", "--data-root b does nothing here"),
    ("a.png --out o --dataset voc", "--dataset voc does nothing here"),
    ("a.png --out run", "holds other files"),
    ("a.png --out b.png", "b.png: a file: give a new --out"),
    ("a.png --out o --batch-size 0", "--batch-size 0: a number from 1"),
    ("--split val --out o --dataset voc", "data/voc: no such folder"),
    ("--onnx n.onnx", "pip install onnx onnxscript onnxruntime"),
    ("--onnx net", "--onnx net: a file whose name ends in .onnx"),
    ("--program n.pt", "--program n.pt: a file whose name ends in .pt2"),
    ("--program n.pt2 --amp bf16", "--amp bf16 does nothing here: it needs --out"),
    ("--safetensors net.md", "net.md: a file whose name ends in .safetensors"),
]


def test_what_cannot_be_done_is_one_line(monkeypatch):
    checkpoint(precise_bn=0)
    for name in ("a.png", "b.png", "b.jpg", *(f"own/{x}/train/a.png" for x in ("images", "masks"))):
        photo(name, mode="L")
    Path("b.txt").write_bytes(b"\xff")
    monkeypatch.setattr(predict.importlib.util, "find_spec", lambda name: None)
    for words, line in REFUSED:
        assert line in refusal(call, "run", *words.split())
    assert "neither best.pt nor last.pt" in refusal(call, ".", "a.png", "--out", "o")
    net, _ = predict.load("run")
    assert "differ by" in refusal(predict.verified, lambda image: 1.01 * net(image), net)
    assert "shape (2, 11, 97, 1), not (2, 11, 97, 65)" in refusal(
        predict.verified, lambda image: net(image)[..., :1], net
    )
    for name in ("own.py", "convert.py", "", 3):
        line = refusal(predict.build_source, dict(script=name, path="p.pt"))
        assert line == f"p.pt: of {name}, which is no script of this checkout"
    monkeypatch.setattr(predict, "segment", Mock(side_effect=MemoryError))
    for count, words in ((1, "--window 512"), (2, "a smaller --batch-size than 2")):
        line = refusal(call, "run", "own", "--out", "m", "--batch-size", count)
        assert f"a.png: {count} x 52x40 pixels, out of memory: {words}" in line
    for content in (b"", b'{"amp": "no', b"[1]", b"\xff"):
        Path("o").mkdir(exist_ok=True)
        Path("o/predict.json").write_bytes(content)
        line = refusal(call, "run", "a.png", "--out", "o")
        assert "o/predict.json: damaged, " in line and "give a new --out" in line
    assert not list(Path().glob("n*"))
