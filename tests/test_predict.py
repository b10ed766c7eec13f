"""predict.py: every checkpoint to pictures, scores, archives and files that others read."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from common import metrics
from common.checkpoints import write_checkpoint
from common.data import FACTS
from common.flags import acting, merge
from tiny import SCORED, SCRIPTS, draw_tree, script, shrink

PARTS = {"supervised": ["student"], "cps_fpl": ["branch1", "branch2"]}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Returns a function that writes run/last.pt of a tiny network of a script; returns run."""
    monkeypatch.chdir(tmp_path)

    def write(name="supervised", step=600, dataset="camvid", **values):
        module = script(name)
        shrink(module, monkeypatch)
        torch.manual_seed(0)
        args = merge(module.Args(dataset=dataset, weights="none", **values), module.preset)
        head = getattr(module, predict.HEADS[f"{name}.py"])
        classes = len(FACTS[dataset]["classes"])
        parts = PARTS.get(name, ("student", "teacher"))
        networks = {part: module.Network(args, classes, head).state_dict() for part in parts}
        content = dict(script=f"{name}.py", args=acting(args), networks=networks, step=step)
        Path("run").mkdir(exist_ok=True)
        write_checkpoint(Path("run/last.pt"), content)
        return Path("run")

    return write


def photo(path, height=40, width=52, mode="RGB", **more):
    """Saves a picture of noise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **more)


def run(words):
    predict.main([*words.split(), "--device", "cpu"])


def index(path):
    return np.array(Image.open(path))


@pytest.mark.smoke
@pytest.mark.parametrize("name", SCRIPTS)
def test_classes_are_those_of_the_scripts_own_evaluation(name, checkpoint):
    """Whole and in windows, with and without maps, of the network that the script scores."""
    source = predict.open_source(checkpoint(name, protocol="whole"))
    photo("in/a.png")
    photo("in/sub/b.png", 20, 30)
    assert source.name == SCORED[name]
    x = torch.from_numpy(index("in/a.png")).permute(2, 0, 1)
    for window, protocol in ((0, "whole"), (24, "slide")):
        args = replace(source.args, protocol=protocol, crop_size=window)
        expected = source.script.predict(source.net, x, args, 11).numpy()
        for more in ("", " --maps"):
            run(f"run in --out o{window}{more[3:]} --window {window}{more}")
            assert (index(f"o{window}{more[3:]}/classes/a.png") == expected).all()
    assert index("o0/classes/sub/b.png").shape == (20, 30)
    assert Path("o0maps/K/a.png").exists() == (name in ("cps_fpl", "ael_fpl"))
    net, classes = predict.load("run/last.pt")
    assert classes[0] == "sky" and net(x[None]).shape == (1, 11, 40, 52)


def test_maps_are_of_the_mean_logits_and_K_is_that_of_alg_1(checkpoint):
    source = predict.open_source(checkpoint("cps_fpl", T=0.9, protocol="whole"))
    for p in source.net.parameters():
        p.data *= 2  # otherwise all classes are equally likely
    x = torch.randint(0, 256, (3, 40, 52), dtype=torch.uint8)
    p = source.net(x[None])["logits"][0].double().softmax(0)
    found = predict.segment(source, x, maps=True)
    K = (p.sort(0, descending=True).values.cumsum(0) <= 0.9).sum(0).clamp(min=1)  # n - 1
    entropy = -(p * p.log()).sum(0) / np.log(11)
    assert (found["K"] == K.numpy()).mean() > 0.99 and K.unique().numel() > 1
    assert abs(found["confidence"] - 255 * p.amax(0).numpy()).max() <= 0.51
    assert abs(found["entropy"] - 255 * entropy.numpy()).max() <= 0.51


def test_networks_scales_and_flip(checkpoint):
    folder = checkpoint("cps_fpl", evaluate="branch2")
    x = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    nets = [predict.load(folder, name)[0] for name in ("branch1", None, "mean")]
    one, two, mean = [net(x).softmax(1) for net in nets]
    assert torch.allclose(mean, (one + two) / 2, atol=1e-6) and not torch.allclose(one, two)
    net = predict.open_source(folder).net
    flipped = net(x.flip(3))["logits"].flip(3).softmax(1)
    small = torch.nn.functional.interpolate(x.float(), (12, 16), mode="bilinear", antialias=True)
    scaled = script("cps_fpl").upsample(net(small)["logits"], (24, 32)).softmax(1)
    for scales, flip, other in (((1.0,), True, flipped), ((0.5, 1.0), False, scaled)):
        found = predict.Views(net, scales, flip)(x)["logits"].exp()
        assert torch.allclose(found, (two + other) / 2, atol=1e-6)
    assert predict.open_source(checkpoint("u2pl", step=3, warmup_iters=3)).name == "student"


def test_scores_are_those_of_the_confusion_matrix(checkpoint):
    tree, own = draw_tree(Path("tree")), []
    checkpoint(data_root="tree")
    run("run --split val --out o")
    run("run tree/val --masks tree/valannot --out two")
    for i in (0, 1):
        label = torch.from_numpy(index(tree / f"valannot/val{i}.png"))
        found = torch.from_numpy(index(f"o/classes/val{i}.png")).long()
        own.append(metrics.confusion_matrix(found, label, 11))
    worst = sorted((0, 1), key=lambda i: metrics.scores(own[i])["miou"])
    for out in (Path("o"), Path("two")):
        assert json.loads((out / "scores.json").read_text()) == metrics.scores(sum(own))
        rows = list(csv.reader((out / "confusion.csv").open()))
        assert [[int(n) for n in row[1:]] for row in rows[1:]] == sum(own).tolist()
        page = (out / "index.html").read_text()
        places = [page.index(f"compared/val{i}.jpg") for i in worst]
        assert places == sorted(places) and "http" not in page and "<script" not in page
        assert (out / "confusion.png").is_file() and (out / "compared/val0.jpg").is_file()
