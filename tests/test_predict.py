"""predict.py: every checkpoint to pictures, scores, archives and files that others read."""

import csv
import io
import json
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from common import Refusal, metrics, outputs
from common.checkpoints import write_checkpoint
from common.data import FACTS
from common.flags import acting, merge
from tiny import SCORED, SCRIPTS, draw_tree, save, script, shrink

CAMVID = FACTS["camvid"]["classes"]


def checkpoint(name, folder, monkeypatch, step=600, dataset="camvid", **values):
    """Writes a last.pt of a tiny network of a script, and returns its folder."""
    module = script(name)
    shrink(module, monkeypatch)
    args = merge(module.Args(dataset=dataset, weights="none", **values), module.preset)
    names = ("branch1", "branch2") if name == "cps_fpl" else ("student", "teacher")
    networks = {}
    for seed, part in enumerate(names[: 1 if name == "supervised" else 2]):
        torch.manual_seed(seed)
        classes = len(FACTS[dataset]["classes"]) or args.num_classes
        head = getattr(module, predict.HEADS[f"{name}.py"])
        group = predict.SimpleNamespace(world=1, device=torch.device("cpu"))
        networks[part] = module.build(args, classes, head, group).state_dict()
    content = dict(script=f"{name}.py", args=acting(args), networks=networks, step=step)
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder / "last.pt", content)
    return folder


def photo(path, height=40, width=52, mode="RGB", **more):
    """Saves a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **more)


def run(*words):
    predict.main([*map(str, words), "--device", "cpu"])


def index(path):
    return np.asarray(Image.open(path))


@pytest.mark.smoke
@pytest.mark.parametrize("name", SCRIPTS)
def test_classes_are_those_of_the_scripts_own_evaluation(name, tmp_path, monkeypatch):
    """Whole and in windows, with and without maps, of the network that the script scores."""
    folder = checkpoint(name, tmp_path / "run", monkeypatch, protocol="whole")
    photo(tmp_path / "in/sub/b.png", 20, 30)
    photo(tmp_path / "in/a.png")
    source = predict.open_source(folder)
    assert source.name == SCORED[name]
    x = torch.from_numpy(index(tmp_path / "in/a.png").copy()).permute(2, 0, 1)
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
    assert classes == CAMVID and net(x[None]).shape == (1, 11, 40, 52)


def test_maps_are_of_the_mean_logits_and_K_is_that_of_alg_1(tmp_path, monkeypatch):
    folder = checkpoint("cps_fpl", tmp_path / "run", monkeypatch, T=0.9, protocol="whole")
    source = predict.open_source(folder)
    for p in source.net.parameters():
        p.data *= 2  # otherwise all classes are equally likely
    x = torch.randint(0, 256, (3, 40, 52), dtype=torch.uint8)
    p = source.net(x[None])["logits"].softmax(1)[0].double()
    found = predict.segment(source, x, maps=True)
    ordered = p.sort(0, descending=True).values.cumsum(0)
    K = ((ordered <= 0.9).sum(0) + 1 - 1).clamp(min=1)  # n - 1
    entropy = -(p * p.log()).sum(0) / np.log(11)
    assert (found["K"] == K.numpy()).mean() > 0.99 and K.unique().numel() > 1
    assert abs(found["confidence"] - 255 * p.amax(0).numpy()).max() <= 0.51
    assert abs(found["entropy"] - 255 * entropy.numpy()).max() <= 0.51
    flat = torch.full_like(x, 100)  # windows that overlap do not make it surer
    windows = predict.segment(source, flat, window=24, maps=True)["confidence"]
    alone = predict.segment(source, flat[:, :24, :24], maps=True)["confidence"]
    assert abs(int(windows.max()) - int(alone.max())) <= 1


def test_networks_scales_and_flip(tmp_path, monkeypatch):
    folder = checkpoint("cps_fpl", tmp_path / "run", monkeypatch, evaluate="branch2")
    x = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    assert predict.open_source(folder).name == "branch2"
    one, two, mean = (
        predict.load(folder, name)[0](x).softmax(1) for name in ("branch1", "branch2", "mean")
    )
    assert torch.allclose(mean, (one + two) / 2, atol=1e-6) and not torch.allclose(one, two)
    net = predict.open_source(folder).net
    both = predict.Views(net, (1.0,), True)
    mirrored = both(x.flip(3))["logits"].flip(3)
    assert torch.allclose(both(x)["logits"], mirrored, atol=1e-4)
    p = predict.Views(net, (0.5, 1.0), False)(x)["logits"].exp()
    other = 2 * p - net(x)["logits"].softmax(1)  # of the image at half its size
    assert torch.allclose(p.sum(1), torch.ones(1, 24, 32), atol=1e-5)
    small = torch.nn.functional.interpolate(x.float(), (12, 16), mode="bilinear", antialias=True)
    logits = script("cps_fpl").upsample(net(small)["logits"], (24, 32))
    assert torch.allclose(other, logits.softmax(1), atol=1e-5)
    early = checkpoint("u2pl", tmp_path / "u", monkeypatch, step=3, warmup_iters=3)
    assert predict.open_source(early).name == "student"


def test_images_of_every_kind_and_one_that_cannot_be_read(tmp_path, monkeypatch):
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch)
    photos = tmp_path / "in"
    for name, mode in (("g.png", "L"), ("r.png", "RGBA"), ("c.jpg", "CMYK"), ("p.png", "P")):
        photo(photos / name, mode=mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo(photos / "turned.jpg", exif=exif)
    (photos / "list.txt").write_text("g.png\nr.png\n")
    words = [photos, "--out", tmp_path / "o", "--csv"]
    run(folder, *words)
    shapes = {p.stem: index(p).shape for p in (tmp_path / "o/classes").glob("*")}
    assert shapes == dict.fromkeys("g r c p turned".split(), (40, 52))
    run(folder, photos / "t*.jpg", "--out", tmp_path / "t", "--upright")
    assert index(tmp_path / "t/classes/turned.png").shape == (52, 40)
    run(folder, photos / "list.txt", "--out", tmp_path / "l")
    assert {p.name for p in (tmp_path / "l/classes").iterdir()} == {"g.png", "r.png"}
    rows = list(csv.reader((tmp_path / "o/shares.csv").open()))
    assert rows[0] == ["image", *CAMVID] and len(rows) == 6
    assert sum(map(float, rows[1][1:])) == pytest.approx(1, abs=1e-4)
    save(photos / "deep.png", np.zeros((9, 9), np.uint16))
    (photos / "z.jpg").write_bytes(b"no image")
    with pytest.raises(Refusal, match=r"2 images were not read, the first: .*deep.png: mode I;16"):
        run(folder, *words)
    assert len(list(csv.reader((tmp_path / "o/shares.csv").open()))) == 6


def test_it_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    """Ended while the third file is written: nothing half is left, and the rest is made once."""
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch)
    for i in range(4):
        photo(tmp_path / f"in/{i}.png", 30 + i)
    words = (folder, tmp_path / "in", "--out", tmp_path / "o")
    whole = outputs.overlay
    left = [2]

    def ended(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(outputs, "overlay", ended)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    monkeypatch.setattr(outputs, "overlay", whole)
    ready = [p.stem for p in (tmp_path / "o/overlays").iterdir()]
    assert len(ready) == 2 and not list((tmp_path / "o").rglob(".*"))
    seen = []
    segment = predict.segment
    monkeypatch.setattr(predict, "segment", lambda *a: seen.append(a[1].shape[1]) or segment(*a))
    run(*words)
    assert sorted(seen) == [30 + i for i in range(4) if str(i) not in ready]
    assert len(list((tmp_path / "o/overlays").iterdir())) == 4
    with pytest.raises(Refusal, match="scales .* another --out"):
        run(*words, "--scales", "0.5")


def test_scores_are_those_of_the_confusion_matrix(tmp_path, monkeypatch):
    tree = draw_tree(tmp_path / "tree")
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch, data_root=str(tree))
    run(folder, "--split", "val", "--out", tmp_path / "o")
    run(folder, tree / "val", "--masks", tree / "valannot", "--out", tmp_path / "two")
    total = 0
    for i in (0, 1):
        label = torch.from_numpy(index(tree / f"valannot/val{i}.png").copy())
        found = index(tmp_path / f"o/classes/val{i}.png").astype(np.int64)
        total = total + metrics.confusion_matrix(torch.from_numpy(found), label, 11)
    for out in (tmp_path / "o", tmp_path / "two"):
        assert json.loads((out / "scores.json").read_text()) == metrics.scores(total)
        rows = list(csv.reader((out / "confusion.csv").open()))
        assert [[int(n) for n in row[1:]] for row in rows[1:]] == total.tolist()
        page = (out / "index.html").read_text()
        places = [page.index(f"compared/val{i}.jpg") for i in (0, 1)]
        own = [float(page[:p].rpartition("mIoU ")[2].split(" %")[0]) for p in places]
        assert (places[0] < places[1]) == (own[0] <= own[1])
        assert "http" not in page and "<script" not in page
        assert (out / "confusion.png").is_file() and (out / "compared/val0.jpg").is_file()
    before = (tmp_path / "o/index.html").read_bytes()
    run(folder, "--split", "val", "--out", tmp_path / "o")  # all is there: read, not made again
    assert (tmp_path / "o/index.html").read_bytes() == before


@pytest.mark.parametrize("server", ["cityscapes", "voc"])
def test_archives_are_as_the_servers_take_them(server, tmp_path, monkeypatch):
    names = {"cityscapes": "berlin_000000_000019", "voc": "2008_000006"}
    folder = checkpoint("supervised", tmp_path / "run", monkeypatch, dataset=server)
    end = "_leftImg8bit" * (server == "cityscapes")
    photo(tmp_path / f"in/x/{names[server]}{end}.png")
    run(folder, tmp_path / "in", "--out", tmp_path / "o", "--export", server)
    classes = index(tmp_path / f"o/classes/x/{names[server]}{end}.png")
    if server == "voc":
        with tarfile.open(tmp_path / "o/voc.tgz") as archive:
            (member,) = archive.getmembers()
            assert member.name == f"results/VOC2012/Segmentation/comp6_test_cls/{names[server]}.png"
            picture = Image.open(archive.extractfile(member))
            assert (
                picture.getpalette()[3:6] == [128, 0, 0] and (np.asarray(picture) == classes).all()
            )
    else:
        with zipfile.ZipFile(tmp_path / "o/cityscapes.zip") as archive:
            assert archive.namelist() == [f"{names[server]}.png"]
            ids = np.asarray(Image.open(io.BytesIO(archive.read(archive.namelist()[0]))))
        back = np.array(FACTS["cityscapes"]["ids"]["_labelIds.png"])
        assert (back[ids] == classes).all() and ids.max() > 18
    photo(tmp_path / "other/b.png")
    with pytest.raises(Refusal, match="no name of that data set"):
        run(folder, tmp_path / "other", "--out", tmp_path / "p", "--export", server)
