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
from common import metrics
from tiny import draw_tree, flags, save, script, shrink, train


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
