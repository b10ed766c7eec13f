"""results/ranks.py: its table against a loop over pixels."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import u2pl
from common.run import parse, plain, refusing, resolve
from results import ranks
from tests.helpers import draw_tree, shrink


def scalar_counts(prob, label, alpha):
    """Returns {(unreliable, the truth's rank): pixels} of lists (C, H, W) and (H, W)."""
    pixels = []
    for y, row in enumerate(label):
        for x, truth in enumerate(row):
            p = [plane[y][x] for plane in prob]
            if truth != 255:
                H = -sum(v * np.log(v) for v in p if v)
                above = sum(v > p[truth] or (v == p[truth] and c < truth) for c, v in enumerate(p))
                pixels.append((H, above))
    gamma, found = np.percentile([H for H, _ in pixels], 100 * (1 - alpha)), {}
    for H, rank in pixels:
        found[H > gamma, rank] = found.get((H > gamma, rank), 0) + 1
    return found


@pytest.mark.parametrize("classes, alpha", [(2, 0.4), (11, 0.2), (23, 0.05)])
def test_counts(classes, alpha):
    rng = torch.Generator().manual_seed(classes)
    prob = (2 * torch.randn(1, classes, 9, 14, generator=rng, dtype=torch.float64)).softmax(1)
    label = torch.randint(0, classes, (1, 9, 14), generator=rng)
    label[0, :2] = 255
    found = ranks.counts(prob, label, alpha)
    expected = scalar_counts(prob[0].tolist(), label[0].tolist(), alpha)
    assert found.shape == (2, classes) and found.sum() == 7 * 14 == sum(expected.values())
    for kind in range(2):
        for rank in range(classes):
            assert found[kind, rank] == expected.get((bool(kind), rank), 0)


def test_lines():
    found = torch.tensor([[60, 10, 5, 4, 1], [8, 5, 4, 2, 1]])
    head, reliable, unreliable, last = ranks.lines(found, 3, 20)
    assert head.split() == ["pixels", "share", "0", "1", "2", "3..4", "false"]
    assert reliable.split() == ["reliable", "80.00", "75.00", "12.50", "6.25", "6.25", "3.12"]
    assert unreliable.split() == ["unreliable", "20.00", "40.00", "25.00", "20.00", "15.00", "7.50"]
    assert "20.00 false" in last
    assert list(ranks.lines(found, 1, 3))[2].split()[-1] == "22.50"
    assert list(ranks.lines(found, 10, 20))[2].split()[-1] == "5.00"  # cut to the last rank


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Returns (path, saved content) of an untrained u2pl.py with tiny networks."""
    shrink(u2pl, monkeypatch)
    tree = draw_tree(tmp_path / "tree", train=4, val=3, test=0)
    argv = ["--dataset", "camvid", "--data-root", str(tree), "--split", "1/2"]
    args, nets = resolve(parse(u2pl.Args, argv), u2pl.preset), {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        nets[name] = u2pl.Network(args, 11, u2pl.U2PLHead).state_dict()
    content = {"script": "u2pl.py", "step": 600, "args": plain(args), "networks": nets}
    torch.save(content, tmp_path / "last.pt")
    return tmp_path / "last.pt", content


@pytest.mark.parametrize("step, name", [(60, "student"), (61, "teacher")])
def test_the_table_is_of_the_network_that_is_scored(checkpoint, capsys, step, name):
    path, content = checkpoint
    torch.save(content | {"step": step}, path)
    ranks.main([str(path), "--images", "2", "--device", "cpu", "--alpha-0", "0.3"])
    head, *table = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{name} of step {step}, 2 images")
    args = resolve(parse(u2pl.Args, ["--dataset", "camvid"]), u2pl.preset)
    net, found = u2pl.Network(args, 11, u2pl.U2PLHead).eval(), 0
    net.load_state_dict(content["networks"][name])
    root = content["args"]["data_root"]
    for i in (0, 1):
        image = np.array(Image.open(f"{root}/val/val{i}.jpg").convert("RGB"))
        truth = np.array(Image.open(f"{root}/valannot/val{i}.png"))
        with torch.no_grad():
            x = torch.from_numpy(image).permute(2, 0, 1)[None]
            prob = net(x)["logits"].softmax(1)
        label = torch.from_numpy(np.where(truth == 11, 255, truth))[None].long()
        found = found + ranks.counts(prob, label, 0.3)
    assert table == list(ranks.lines(found, 3, 20))


def test_what_cannot_be_counted_is_refused(checkpoint, tmp_path, capsys, monkeypatch):
    path, content = checkpoint
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))

    def refusal(*argv):
        with pytest.raises(SystemExit) as stop:
            refusing(lambda: ranks.main([str(word) for word in argv]))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1
        return lines[0]

    for count in (0, 4):
        assert f"--images {count}: a number from 1 to 3" in refusal(path, "--images", count)
    assert "CHECKPOINT" in refusal()
    assert re.search("--nonsense", refusal(path, "--nonsense", "3"))
    assert "no such checkpoint" in refusal(tmp_path / "absent.pt")
    torch.save(content | {"script": "mean_teacher.py"}, path)
    assert "written by mean_teacher.py" in refusal(path)
