"""results/figures.py: what is computed for the papers' figures, and every figure of tiny runs."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from common import Refusal
from results import analysis, figures
from tiny import draw_tree, flags, script, shrink, train, with_acting

pytest.importorskip("matplotlib")


def test_weights_boundaries_and_stages_by_hand():
    rest, weights = figures.weight_curves(points=39)
    for x, concave, linear, convex in zip(rest, *weights.values(), strict=True):
        gap = 0.475 - x  # T / K - max over the negatives
        expected = [np.log1p(50 * gap) / np.log1p(50 * 0.475), gap / 0.475, gap / (0.475 + 4 * x)]
        assert [concave, linear, convex] == pytest.approx(expected, abs=1e-12)
    label = torch.randint(0, 2, (1, 9, 12), generator=torch.Generator().manual_seed(3)) * 255
    label[:, :, 4:] = 1
    for y, x in np.ndindex(9, 12):
        around = label[0, max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4]
        assert figures.at_boundary(label)[0, y, x] == (len(around.unique()) > 1)
    steps = dict.fromkeys((7, 48, 60, 100, 120))
    for total, expected in ((120, [7, 60, 120]), (1000, [100, 120]), (8, [7])):
        run = figures.Run("", "", {"total_iters": total}, None, steps)
        assert figures.stages(run) == expected


def test_points_of_two_groups_stay_together_in_the_plane():
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 20)
    x = np.eye(6)[labels] + 0.05 * rng.standard_normal((40, 6))
    assert figures.purity(x, labels) == 1
    assert 0.3 < figures.purity(rng.standard_normal((40, 6)), labels) < 0.7  # 19 of 39
    points = figures.tsne(x)
    gaps = np.linalg.norm(points[:, None] - points, axis=2)
    same = labels[:, None] == labels
    assert points.shape == (40, 2) and gaps[same].max() < gaps[~same].min()
    P = figures.similarities(((x[:, None] - x) ** 2).sum(2), 5)
    assert np.allclose(P, P.T) and P.sum() == pytest.approx(1, abs=1e-6)


SCRIPTS = ("cps_fpl", "u2pl", "esl", "supervised")


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """The folders of tiny runs of SCRIPTS, with checkpoints of steps 4 and 8, the working one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        tree = draw_tree(figures.Path("tree").absolute())
        for name in SCRIPTS:
            shrink(script(name), patch)
            train(script(name), with_acting(name, flags(tree, name)))
        yield list(SCRIPTS)


def test_every_figure_is_drawn_of_whole_runs_and_says_what_it_lacks_of_less(runs, capsys):
    figures.main([*runs, "--out", "drawn", "--images", "2", "--shown", "1"])
    text = capsys.readouterr().out
    pictures = sorted(path.stem for path in figures.Path("drawn").iterdir())
    assert pictures == sorted(figures.FIGURES) and text.count("  the paper: ") == len(pictures)
    for name in pictures:
        with Image.open(f"drawn/{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 22)) > 8, name
    # the same as evaluation, and as results/analysis.py, on the same images
    for name in runs:
        lines = [json.loads(line) for line in open(f"{name}/log.jsonl")]
        miou = [e["miou"] for e in lines if e["kind"] == "eval"][-1]
        assert re.search(rf": {name} \({name}.py\), step 8: mIoU {100 * miou:.2f} %", text), name
    assert analysis.main(["scores", "cps_fpl/last.pt", "--images", "2", "--device", "cpu"]) == 0
    for row in capsys.readouterr().out.splitlines()[2:]:
        case, share, _, _, vanilla, fuzzy, *_ = row.split()
        found = re.search(rf"case {case}: (\S+) % of pixels, R\^v (\S+), R\^f (\S+)\n", text)
        expected = [float(share), float(vanilla), float(fuzzy)]
        assert [*map(float, found.groups())] == pytest.approx(expected, abs=6e-3, nan_ok=True)
    figures.main(["cps_fpl/log.jsonl", "--out", "fewer"])
    text = capsys.readouterr().out
    assert {path.stem for path in figures.Path("fewer").iterdir()} == {"fpl_4a", "fpl_4b"}
    assert "fpl_s3: not drawn: FPL supplement Fig. 3" in text
    assert text.count("needs a checkpoint of a run of cps_fpl.py\n") == 8
    with pytest.raises(Refusal, match="tree: no log of a run"):
        figures.main(["tree"])


def test_keep_holds_what_a_run_wrote_by_a_second_name(runs):
    figures.main(["esl", "--keep"])  # it has ended: one look
    assert os.path.samefile("esl/last.pt", "esl/kept/000008.pt")
    os.remove("esl/last.pt")
    assert list(figures.read_run("esl").checkpoints) == [4, 8]
    assert figures.read_run("esl/kept/000008.pt").last == 8
