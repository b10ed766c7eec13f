"""predict.py: every checkpoint to pictures, scores, archives and files that others read."""

import csv
import importlib.util
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from common import Refusal, metrics
from common.checkpoints import write_checkpoint
from common.data import FACTS
from common.flags import acting, merge
from results.analysis import mean_logits
from tiny import SCORED, SCRIPTS, draw_tree, flags, save, script, shrink, train

PARTS = {"supervised": ["student"], "unimatch": ["student"], "cps_fpl": ["branch1", "branch2"]}


def checkpoint(name, folder, monkeypatch, step=600, dataset="camvid", **values):
    """Writes a last.pt of a tiny network of a script, and returns its folder."""
    module = script(name)
    shrink(module, monkeypatch)
    torch.manual_seed(0)
    args = merge(module.Args(dataset=dataset, weights="none", **values), module.preset)
    head = getattr(module, predict.HEADS[f"{name}.py"])
    networks = {}
    for part in PARTS.get(name, ("student", "teacher")):
        net = module.Network(args, len(FACTS[dataset]["classes"]), head)
        networks[part] = net.state_dict()
    content = dict(script=f"{name}.py", args=acting(args), networks=networks, step=step)
    folder.mkdir()
    write_checkpoint(folder / "last.pt", content)
    return folder


def photo(path, height=40, width=52, mode="RGB", **more):
    """Saves a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **more)


def run(*words):
    predict.main([*map(str, words), "--device", "cpu"])


def of_ones(x):
    """A network whose logits are 1 everywhere."""
    return {"logits": torch.ones(len(x), 11, *x.shape[2:])}


def index(path):
    return np.array(Image.open(path))


@pytest.mark.smoke
@pytest.mark.parametrize("name", SCRIPTS)
def test_classes_are_those_of_the_scripts_own_evaluation(name, tmp_path, monkeypatch):
    """Whole and in windows, with and without maps, of the network that the script scores."""
    folder = checkpoint(name, tmp_path / "run", monkeypatch, protocol="whole")
    photo(tmp_path / "in/a.png")
    photo(tmp_path / "in/sub/b.png", 20, 30)
    source = predict.open_source(folder)
    assert source.name == SCORED[name]
    x = torch.from_numpy(index(tmp_path / "in/a.png")).permute(2, 0, 1)
    for window, protocol in ((0, "whole"), (24, "slide")):
        args = replace(source.args, protocol=protocol, crop_size=window)
        expected = source.script.predict(source.net, x, args, 11).numpy()
        for more in ([], ["--maps"]):
            out = tmp_path / f"out{window}{len(more)}"
            run(folder, tmp_path / "in", "--out", out, "--window", window, *more)
            assert (index(out / "classes/a.png") == expected).all()
            assert index(out / "classes/sub/b.png").shape == (20, 30)
    assert (out / "K/a.png").exists() == (name in ("cps_fpl", "ael_fpl"))
    net, classes = predict.load(folder / "last.pt")
    assert classes[0] == "sky" and net(x[None]).shape == (1, 11, 40, 52)


def test_maps_are_of_the_mean_logits_and_K_is_that_of_alg_1(tmp_path, monkeypatch):
    folder = checkpoint("cps_fpl", tmp_path / "run", monkeypatch, T=(0.9,), protocol="whole")
    source = predict.open_source(folder)
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
    windows, alone = windows["confidence"], alone["confidence"]
    assert abs(int(windows.max()) - int(alone.max())) <= 1
    args = replace(source.args, protocol="slide", crop_size=24)
    same = SimpleNamespace(script=source.script, args=args, data=source.data, net=of_ones)
    assert torch.equal(mean_logits(same, x), torch.ones(1, 11, 40, 52))


def test_images_of_one_size_go_through_the_network_at_once(tmp_path, monkeypatch):
    """--batch-size: the same files, in order, whatever sizes follow one another."""
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch)
    for i, height in enumerate((30, 30, 30, 40, 30)):
        photo(tmp_path / f"in/{i}.png", height)
    seen = []
    segment = predict.segment

    def counted(source, images, *more):
        seen.append(len(images))
        return segment(source, images, *more)

    monkeypatch.setattr(predict, "segment", counted)
    for size, expected in ((1, [1] * 5), (2, [2, 1, 1, 1])):
        seen.clear()
        run(folder, tmp_path / "in", "--out", tmp_path / f"o{size}", "--batch-size", size)
        assert seen == expected
    for i in range(5):
        one, two = (index(tmp_path / f"o{size}/classes/{i}.png") for size in (1, 2))
        assert (one == two).mean() > 0.99


def test_boundary_iou_is_that_of_single_pixels(tmp_path):
    """Near: a pixel of another class, or none, within width rows and columns."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (5, 6)).repeat(4, 0).repeat(4, 1)
    label[:3, :9] = 255
    pred = np.roll(label, (1, 2), (0, 1)) % 3
    width = round(0.06 * np.hypot(*label.shape))

    def near(classes, y, x):
        """Whether a pixel's band reaches another class or the edge."""
        for v in range(y - width, y + width + 1):
            for u in range(x - width, x + width + 1):
                inside = 0 <= v < classes.shape[0] and 0 <= u < classes.shape[1]
                if not inside or classes[v, u] != classes[y, x]:
                    return True
        return False

    found = np.where(label == 255, 255, pred)
    bands = {c: (set(), set()) for c in range(3)}
    for y, x in zip(*np.nonzero(label != 255), strict=True):
        for classes, kind in ((label, 0), (found, 1)):
            if near(classes, y, x):
                bands[classes[y, x]][kind].add((y, x))
    expected = [len(a & b) / len(a | b) for a, b in bands.values()]
    counts = metrics.boundary_confusion(pred, label, 3, share=0.06)
    assert metrics.iou_per_class(counts)[:3].tolist() == pytest.approx(expected)
    assert width == 2 and 0 < min(expected) and max(expected) < 1


def test_networks_scales_and_flip(tmp_path, monkeypatch):
    folder = checkpoint("cps_fpl", tmp_path / "run", monkeypatch, evaluate="branch2")
    x = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    nets = [predict.load(folder, name)[0] for name in ("branch1", None, "mean")]
    one, two, mean = [net(x).softmax(1) for net in nets]
    assert torch.allclose(mean, (one + two) / 2, atol=1e-6) and not torch.allclose(one, two)
    net = predict.open_source(folder).net
    both = predict.Views(net, (1.0,), True)
    expected = (two + net(x.flip(3))["logits"].flip(3).softmax(1)) / 2
    assert torch.allclose(both(x)["logits"].exp(), expected, atol=1e-6)
    small = torch.nn.functional.interpolate(x.float(), (12, 16), mode="bilinear", antialias=True)
    logits = script("cps_fpl").upsample(net(small)["logits"], (24, 32))
    scaled = predict.Views(net, (0.5, 1.0), False)(x)["logits"].exp()
    assert torch.allclose(scaled, (two + logits.softmax(1)) / 2, atol=1e-6)
    checkpoint("u2pl", tmp_path / "u", monkeypatch, step=3, warmup_iters=3)
    assert predict.open_source(tmp_path / "u").name == "student"


def test_images_of_every_kind_and_one_that_cannot_be_read(tmp_path, monkeypatch):
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch)
    photos = tmp_path / "in"
    for name, mode in (("g.png", "L"), ("r.png", "RGBA"), ("c.jpg", "CMYK"), ("p.png", "P")):
        photo(photos / name, mode=mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo(photos / "turned.jpg", exif=exif)
    (photos / "list.txt").write_text("g.png\nr.png\n")
    save(photos / "deep.png", np.zeros((9, 9), np.uint16))
    (photos / "z.jpg").write_bytes(b"no image")
    with pytest.raises(Refusal, match=r"2 images were not read, the first: .*deep.png: mode I;16"):
        run(folder, photos, "--out", tmp_path / "o", "--csv")
    shapes = {p.stem: index(p).shape for p in (tmp_path / "o/classes").glob("*")}
    assert shapes == dict.fromkeys("g r c p turned".split(), (40, 52))
    rows = list(csv.reader((tmp_path / "o/shares.csv").open()))
    assert rows[0][:2] == ["image", "sky"] and len(rows) == 6
    assert sum(map(float, rows[1][1:])) == pytest.approx(1, abs=1e-4)
    run(folder, photos / "t*.jpg", "--out", tmp_path / "t", "--upright")
    assert index(tmp_path / "t/classes/turned.png").shape == (52, 40)
    run(folder, photos / "list.txt", "--out", tmp_path / "l")
    assert {p.name for p in (tmp_path / "l/classes").iterdir()} == {"g.png", "r.png"}


def test_it_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch)
    for i in range(4):
        photo(tmp_path / f"in/{i}.png", 30 + i)
    words = (folder, tmp_path / "in", "--out", tmp_path / "o")
    save_whole = Image.Image.save

    def ended(image, path, **more):
        save_whole(image, path, **more)
        if path.name == ".part-1.jpg":  # a whole class map, half an overlay
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", ended)
        run(*words)
    ready = {p.stem: p.stat().st_mtime_ns for p in (tmp_path / "o/overlays").glob("[!.]*")}
    assert "1" not in ready
    run(*words)
    after = {p.stem: p.stat().st_mtime_ns for p in (tmp_path / "o/overlays").iterdir()}
    assert set(after) == set("0123") and ready.items() <= after.items()
    with pytest.raises(Refusal, match="scales .* another --out"):
        run(*words, "--scales", "0.5")


def test_scores_are_those_of_the_confusion_matrix(tmp_path, monkeypatch):
    tree = draw_tree(tmp_path / "tree")
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch, data_root=str(tree))
    run(folder, "--split", "val", "--out", tmp_path / "o")
    run(folder, tree / "val", "--masks", tree / "valannot", "--out", tmp_path / "two")
    own = []
    for i in (0, 1):
        label = torch.from_numpy(index(tree / f"valannot/val{i}.png"))
        found = torch.from_numpy(index(tmp_path / f"o/classes/val{i}.png")).long()
        own.append(metrics.confusion_matrix(found, label, 11))
    worst = sorted((0, 1), key=lambda i: metrics.scores(own[i])["miou"])
    for out in (tmp_path / "o", tmp_path / "two"):
        scores = json.loads((out / "scores.json").read_text())
        assert {k: scores[k] for k in metrics.scores(sum(own))} == metrics.scores(sum(own))
        rows = list(csv.reader((out / "confusion.csv").open()))
        assert [[int(n) for n in row[1:]] for row in rows[1:]] == sum(own).tolist()
        page = (out / "index.html").read_text()
        places = [page.index(f"compared/val{i}.jpg") for i in worst]
        assert places == sorted(places) and "http" not in page and "<script" not in page
        assert (out / "confusion.png").is_file() and (out / "compared/val0.jpg").is_file()
    run(folder, "--split", "val", "--out", tmp_path / "o")  # all is there: read, not made again
    assert (tmp_path / "o/index.html").read_text().endswith(page[-100:])
    browser = shutil.which("chromium")
    if browser:  # opened from the file, without a network
        seen = seen_by(browser, tmp_path / "o/index.html", tmp_path)
        red = (seen[..., 0] > 220) & (seen[..., 1] < 80) & (seen[..., 2] < 60)
        assert red.sum() > 10_000  # errors, of an untrained network


def seen_by(browser, page, folder):
    """Returns the pixels that a browser shows of a page: (1500, 1200, 3) uint8."""
    words = "--headless --no-sandbox --disable-gpu --window-size=1200,1500".split()
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}/profile"]
    command = [browser, *words, f"--screenshot={folder}/seen.png", page.as_uri()]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return np.array(Image.open(folder / "seen.png").convert("RGB"))


@pytest.mark.parametrize("server", ["cityscapes", "voc"])
def test_archives_are_as_the_servers_take_them(server, tmp_path, monkeypatch):
    name = {"cityscapes": "berlin_000000_000019", "voc": "2008_000006"}[server]
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch, dataset=server)
    photo(tmp_path / f"in/x/{name}.png")
    run(folder, tmp_path / "in", "--out", tmp_path / "o", "--export", server)
    classes = index(tmp_path / f"o/classes/x/{name}.png")
    table = np.arange(256)
    inside = f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png"
    archive = tmp_path / "o/voc.tgz"
    if server == "cityscapes":
        table = np.array(FACTS[server]["ids"]["_labelIds.png"])
        inside = f"{name}.png"
        archive = tmp_path / "o/cityscapes.zip"
    shutil.unpack_archive(archive, tmp_path / "u")
    assert [p for p in (tmp_path / "u").rglob("*") if p.is_file()] == [tmp_path / "u" / inside]
    assert (table[index(tmp_path / "u" / inside)] == classes).all()


def test_the_official_tool_of_cityscapes_gives_our_scores_of_an_archive(tmp_path, monkeypatch):
    module = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    tool = pytest.importorskip(module)
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch, dataset="cityscapes")
    name = "berlin_000000_000019"
    photo(tmp_path / f"in/{name}_leftImg8bit.png")
    run(folder, tmp_path / "in", "--out", tmp_path / "o", "--export", "cityscapes")
    shutil.unpack_archive(tmp_path / "o/cityscapes.zip", tmp_path / "u")
    truth = np.random.default_rng(0).integers(0, 34, (5, 4)).repeat(8, 0).repeat(13, 1)
    save(tmp_path / f"{name}_gtFine_labelIds.png", truth.astype(np.uint8))
    ids = np.array(FACTS["cityscapes"]["ids"]["_labelIds.png"])
    classes = index(tmp_path / f"o/classes/{name}_leftImg8bit.png").astype(np.int64)
    pair = [torch.from_numpy(x) for x in (classes, ids[truth])]
    ours = metrics.scores(metrics.confusion_matrix(*pair, 19))
    tool.args.quiet, tool.args.evalInstLevelScore, tool.args.JSONOutput = True, False, False
    pictures = (
        [str(tmp_path / "u" / f"{name}.png")],
        [str(tmp_path / f"{name}_gtFine_labelIds.png")],
    )
    theirs = tool.evaluateImgLists(*pictures, tool.args)
    assert theirs["averageScoreClasses"] == pytest.approx(ours["miou"])


def test_exports_are_what_the_network_computes(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("safetensors")
    folder = checkpoint("cps_fpl", tmp_path / "run", monkeypatch)
    x = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    files = [tmp_path / name for name in ("n.onnx", "n.pt2", "n.safetensors")]
    flags = zip(("--onnx", "--program", "--safetensors"), files, strict=True)
    run(folder, "--network", "branch2", *(word for pair in flags for word in pair))
    session = onnxruntime.InferenceSession(str(files[0]))
    by_onnx = torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0])
    by_torch = torch.export.load(files[1]).module()(x)
    for logits in (by_onnx, by_torch, predict.load(files[2])[0](x)):
        assert torch.allclose(logits, predict.load(folder, "branch2")[0](x), atol=1e-4)
    assert "branch2 of cps_fpl.py, step 600" in (tmp_path / "n.md").read_text()
    if importlib.util.find_spec("openvino"):
        import openvino

        core = openvino.Core()
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # left alone it may choose bfloat16
        compiled = core.compile_model(core.read_model(files[0]), "CPU", exact)
        by_openvino = torch.from_numpy(compiled({"image": x.numpy()})["logits"])
        assert torch.allclose(by_openvino, by_torch, atol=1e-4)
    net, _ = predict.load(folder)
    with pytest.raises(Refusal, match="differ by"):
        predict.verified(lambda image: 1.01 * net(image), net)


def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch):
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch)
    for name in ("a.png", "b.png", "b.jpg"):
        photo(tmp_path / name)
    monkeypatch.setattr(predict.importlib.util, "find_spec", lambda name: None)
    image = tmp_path / "a.png"
    out = ("--out", tmp_path / "o")
    for words, message in (
        ((folder,), "nothing to do"),
        ((tmp_path, image, *out), "neither best.pt nor last.pt"),
        ((folder, image), "--out DIR with images"),
        ((folder, tmp_path / "no.png", *out), "no.png: no such image"),
        ((folder, tmp_path / "b.png", tmp_path / "b.jpg", *out), "one name, b; rename"),
        ((folder, image, *out, "--network", "teacher"), "--network takes student"),
        ((folder, image, *out, "--masks", folder), "run/a.png: no such mask"),
        ((folder, image, *out, "--dataset", "voc"), "does nothing here"),
        ((folder, image, *out, "--scales", "0"), "--scales 0"),
        ((folder, "--split", "val", *out, "--dataset", "voc"), "data/voc: no such folder"),
        ((folder, image, *out, "--export", "voc"), "is one of camvid"),
        ((folder, image, "--out", folder), "holds other files"),
        ((folder, "--onnx", tmp_path / "n.onnx"), "pip install onnx onnxscript onnxruntime"),
    ):
        with pytest.raises(Refusal, match=message):
            run(*words)


def test_bn_has_the_statistics_that_the_run_was_scored_with(tmp_path, monkeypatch, capsys):
    """--precise-bn: of the training images, or a note where these are not."""
    monkeypatch.chdir(tmp_path)
    draw_tree(Path("tree"))
    supervised = script("supervised")
    shrink(supervised, monkeypatch)
    argv = flags(Path("tree"), tmp_path / "run", iters=2, log=2, evaluate=2, save=2)
    train(supervised, [*argv, "--precise-bn", "2"])
    scored = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["last"]
    run(tmp_path / "run/last.pt", "--split", "test", "--out", "scored", "--no-overlays")
    assert json.loads(Path("scored/scores.json").read_text())["miou"] == scored["miou"]
    assert "running statistics" not in capsys.readouterr().err
    Path("tree").rename("moved")
    words = (tmp_path / "run/last.pt", "--split", "test", "--data-root", "moved", "--out", "again")
    more = []
    if importlib.util.find_spec("safetensors"):
        more = ["--safetensors", "n.safetensors"]
    run(*words, *more)
    assert json.loads(Path("again/scores.json").read_text())["miou"] == scored["miou"]
    if more:
        predict.load("n.safetensors")  # the statistics are in it
    photo(Path("in/a.png"))
    run(words[0], "in", "--data-root", "moved", "--out", "a")
    assert "running statistics" not in capsys.readouterr().err
    with pytest.raises(Refusal, match="precise_bn 2 there, 0 here"):
        run(words[0], "in", "--out", "a")
    assert "running statistics" in capsys.readouterr().err
