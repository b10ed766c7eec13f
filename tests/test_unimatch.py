"""unimatch.py and unimatch_v2.py: what is drawn; several T; results/unimatch_fpl.py.

Their networks: test_network.py. Their losses: test_equations.py. Their steps: test_steps.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as colours

import cps_fpl
import predict
import tiny
import unimatch
import unimatch_v2 as v2
from common import distributed
from common.flags import as_fields
from oracles import Scripted
from oracles import fpl as fpl_oracle
from oracles.fpl import printed
from results import unimatch_fpl

ALONE = distributed.Group(0, 1, torch.device("cpu"))


def test_several_T_choose_K_by_the_neighbours():
    args = printed(T=(0.4437, 0.6437, 0.8937, 0.9837), k_max=4)
    rng = torch.Generator().manual_seed(0)
    for classes, spread in ((3, 2), (11, 2), (11, 0)):
        t = spread * torch.randn(3, classes, 5, 6, generator=rng, dtype=torch.float64)
        t = F.avg_pool2d(t, 3, 1, 1)  # so that neighbours agree somewhere
        inside = torch.rand(3, 5, 6, generator=rng) < torch.tensor([0.7, 1.0, 0.0]).view(3, 1, 1)
        K = unimatch.adaptive_assignment(t, inside, args)
        rows = zip(t.softmax(1).movedim(1, -1).tolist(), inside.tolist(), strict=True)
        assert K.tolist() == [fpl_oracle.adaptive_positives(*row, args) for row in rows]
        assert len(K.unique()) > 1 or (classes, spread) != (11, 2)


def test_statistics():
    """Two pixels of two classes, or the first alone; T 0.9: K is 1 and 2."""
    prob = torch.tensor([[0.96, 0.03, 0.01], [0.3, 0.5, 0.2]], dtype=torch.float64)
    logits = prob.log().T.repeat_interleave(4, 1).view(1, 3, 1, 8)  # of which every fourth counts
    inside, args = torch.ones(1, 1, 8, dtype=torch.bool), printed(T=0.9)
    first = torch.arange(8).view(1, 1, 8) < 4
    p = prob.sort(1, descending=True).values.T[None, :, None]
    weight = unimatch.adaptive_weight(p, torch.tensor([[[1, 2]]])).mean()
    means = dict(commonest=0.5, confident=0.5, K=1.5, K_gt_1=0.5)
    means["weight"] = pytest.approx(weight.item())
    assert unimatch.statistics(logits, inside, args) == means
    assert unimatch.statistics(logits, first, args)["commonest"] == 1
    truth = torch.zeros(1, 1, 8, dtype=torch.int64)
    for mask, accuracy in ((inside, 0.5), (first, 1)):
        means = dict(pseudo_acc=accuracy, unsure_acc=0, coverage=1)
        assert unimatch.statistics(logits, mask, args, truth) == means


def test_boxes_are_drawn_as_released():
    """[D23]: none at even odds; a box that does not fit has another ratio and place."""
    square = 0.7 / (1 / 0.3 - 0.3)
    for shares, box in (  # of 200 pixels; of 4,000, 115 high at first
        ([0.49], (0, 0, 0, 0)),
        ([0.5, 0, 0, 0.94, 0, 0, 0.93, 0.76, 0, 0.93, 0.75], (93, 75, 7, 25)),
        ([0.5, 0, 1, 0.01, 0.02], (1, 2, 25, 7)),
        ([0.5, 1, 1, 0, 0, square, 0.37, 0.37], (37, 37, 63, 63)),
    ):
        script = Scripted(*shares)
        assert unimatch.drawn_box(script, 100) == box and not script.shares


def test_operations_are_drawn_as_released():
    assert unimatch.drawn_operations(Scripted(0, 0, 0, 0, 0.8, 0.2, 0.5), 9) == []
    for part, crop, change, hue, deviation, side in (
        (0, 20, 0.5, -0.25, 0.1, 3),
        (1, 20, 1.5, 0.25, 2.0, 17),
        (1, 8, 1.5, 0.25, 2.0, 15),
    ):
        script = Scripted(*[part] * 4, 0.79, 0.19, 0.49, part)
        names = "saturation", "contrast", "brightness"
        jitter = [("adjust_hue", hue), *((f"adjust_{name}", change) for name in names)]
        rest = [("rgb_to_grayscale", 3), ("gaussian_blur", side, pytest.approx(deviation))]
        assert unimatch.drawn_operations(script, crop) == jitter + rest


def test_strong_views_are_torchvisions_of_uint8():
    """Of (seed, name, sample number); here of the second of two processes."""
    args = SimpleNamespace(seed=3, batch_size_unlabeled=16, crop_size=40)
    weak = torch.randint(0, 256, (8, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    weak = F.avg_pool2d(weak.float(), 5, 1, 2).byte()
    found, masks = unimatch.strong_views(weak, "view0", 7, args, ALONE._replace(rank=1))
    assert found.dtype == torch.uint8 and masks.any() and not masks.all()
    for i, image in enumerate(weak):
        rng = np.random.default_rng([3, unimatch.zlib.crc32(b"view0"), 120 + i])
        for name, *numbers in unimatch.drawn_operations(rng, 40):
            image = getattr(colours, name)(image, *numbers)
        top, left, height, width = unimatch.drawn_box(rng, 40)
        assert torch.equal(image, found[i]) and masks[i].sum() == height * width
        assert masks[i, 0, top : top + height, left : left + width].all()


@pytest.mark.smoke
@pytest.mark.parametrize("images, whole, kept", [(6, 0.5, 3), (5, 0.5, 2), (1, 0.5, 0), (4, 1, 4)])
def test_dropout_is_complementary_and_leaves_some_images_whole(images, whole, kept):
    """[D24]: a channel is dropped in one of the views, at even odds."""
    torch.manual_seed(0)
    for _ in range(20):
        first, second = v2.complementary_masks(images, 1000, whole, "cpu")
        assert first.shape == (images, 1000, 1, 1) and torch.equal(first + second, 0 * first + 2)
        alike = (first == 1).flatten(1)
        assert (alike.all(1) | ~alike.any(1)).all() and alike.all(1).sum() == kept
        dropped = first[~alike.all(1)]
        assert ((dropped == 0) | (dropped == 2)).all()
        assert kept == images or 0.4 < (dropped == 2).float().mean() < 0.6


def test_an_older_checkpoint_has_one_T_and_predict_shows_K_of_one_alone():
    saved = {"T": 0.9, "scales": [0.5, 2.0], "lr": 0.1}
    assert as_fields(cps_fpl.Args, saved) == {"T": (0.9,), "scales": (0.5, 2.0), "lr": 0.1}
    for T, one in (([0.9], 0.9), (0.9, 0.9), ([0.8, 0.9], None), (None, None)):
        assert predict.one_T(SimpleNamespace(saved={"args": {"T": T}})) == one


def test_what_fpl_does_there_is_counted_and_drawn(tmp_path, monkeypatch, capsys):
    """Pixels: sure and right; 0.65, wrong, the truth second; void. T 0.95: K is 1, 2, 2."""
    prob = torch.tensor([[0.97, 0.02, 0.01], [0.65, 0.25, 0.1], [0.4, 0.3, 0.3]])
    args = printed(T=0.95)
    found = unimatch_fpl.counts(prob.log().T[None, :, None], torch.tensor([[[0, 1, 255]]]), args)
    assert found.tolist() == [[0] * 4] * 2 + [[1, 0, 1, 1]] + [[0] * 4] * 3 + [[1, 1, 1, 0]]
    tiny.shrink(unimatch, monkeypatch)
    run, out = tmp_path / "run", tmp_path / "x.png"
    argv = tiny.flags(tiny.draw_tree(tmp_path / "data"), run, log=1, iters=2, evaluate=2, save=2)
    tiny.train(unimatch, [*argv, *"--unsup-loss fpl --T 0.2 0.5".split()])
    rows = (f"log {run}", 0), (f"val {run}/last.pt --images 2", 0)
    for words, code in (*rows, (f"val {run}/last.pt --images 9", 2), (f"log {out}", 2)):
        out.unlink(missing_ok=True)
        assert unimatch_fpl.main([*words.split(), "--out", str(out)]) == code
        assert out.exists() == (code == 0)
    assert "2 images of val, T 0.2 0.5" in capsys.readouterr().out
