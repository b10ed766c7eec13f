"""results/run_table.py and differences.py: what is missing, and what a difference says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.metrics import confusion_matrix, scores
from results import differences, run_table


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Returns a function that writes a finished run, with the counts of its images."""
    monkeypatch.setattr(run_table, "LOGS", tmp_path)

    def write(name, seed, hit, seconds=60):
        truth = np.full((9, 2), 100, np.int32)
        counts = dict(hit=truth * hit // 100, truth=truth, predicted=truth)
        np.savez_compressed(run_table.counts_path(name, seed), **counts)
        miou = run_table.miou(*(counts[kind].sum(0) for kind in run_table.COUNTS.split())) / 100
        lines = [{"kind": "train", "time": {"elapsed_s": seconds}}]
        lines += [{"kind": "done", "last": {"miou": miou}, "best": {"miou": miou}}]
        text = "\n".join(json.dumps(line) for line in lines)
        run_table.log_path(name, seed).write_text(text)

    return write


def test_sums_over_images_give_the_mean_iou_of_the_confusion_matrix():
    pred, label = torch.randint(4, (2, 50, 60), generator=torch.Generator().manual_seed(0))
    matrix = confusion_matrix(pred, label + (label == 3) * 252, 4)  # class 3 is never labelled
    sums = (m.numpy() for m in (matrix.diag(), matrix.sum(1), matrix.sum(0)))
    assert run_table.miou(*sums) == pytest.approx(100 * scores(matrix)["miou"])


def test_half_the_size_is_the_mean_of_four_pixels_and_one_pixel_of_a_mask(tmp_path):
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 8
    for part, pixels in (("val", image), ("valannot", image[..., 0])):
        (tmp_path / "all" / part).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / f"all/{part}/a.png")
    half = run_table.halved(tmp_path / "all", tmp_path / "half")
    mean = image.reshape(1, 2, 2, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(np.array(Image.open(half / "val/a.png"))[0], mean[0])
    mask = np.array(Image.open(half / "valannot/a.png"))[0]
    assert mask[0] in image[:, :2, 0] and mask[1] in image[:, 2:, 0]


def test_what_is_missing_comes_by_seed_then_by_cost(logs):
    rows = ("fpl-cps", "labels")
    assert run_table.missing(rows, (0, 1)) == [(n, s) for s in (0, 1) for n in reversed(rows)]
    logs("labels", 0, 50, seconds=1800)
    assert run_table.missing(rows, (0,)) == [("fpl-cps", 0)]
    assert run_table.estimate("fpl-cps") == 6 * 1800  # by the cost of a step
    assert run_table.overview(rows, (0, 1))[-1] == "3 runs left, 6.5 hours of one core"


def test_a_claim_holds_where_all_of_the_interval_is_above_zero(logs):
    for seed, (better, worse) in enumerate(((60, 50), (70, 65), (66, 60))):
        logs("cps", seed, better)
        logs("labels", seed, worse)
    seeds, gaps, interval = differences.difference("cps", "labels", draws=200)
    iou = [100 * h / (200 - h) for h in (60, 50, 70, 65, 66, 60)]
    assert gaps == pytest.approx([a - b for a, b in zip(iou[::2], iou[1::2], strict=True)])
    assert 0 < interval[0] < sum(gaps) / 3 < interval[1]
    assert differences.verdict(seeds, interval) == "holds"
    back = differences.difference("labels", "cps", draws=200)
    assert differences.verdict(back[0], back[2]) == "does not hold"
    assert differences.verdict([0], interval) == "not yet told"
    assert "| CPS is above labels alone | FPL Table 1 | +" in differences.table()
