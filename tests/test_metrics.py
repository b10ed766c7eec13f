"""Scores against double loops and exact fractions; panels against the colours they must show."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import shapes
from common.data import Data, Item
from common.distributed import Group
from common.metrics import confusion_matrix, iou_per_class, scores
from common.pictures import colour, save_panels
from supervised import evaluate

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 90, 250]], np.uint8)


def count(pred, label, classes):
    """A double loop over pixels: rows are the truth, columns the prediction."""
    table = [[0] * classes for _ in range(classes)]
    for p, t in zip(pred.flatten().tolist(), label.flatten().tolist(), strict=True):
        if t < classes:
            table[t][p] += 1
    return table


def exact_iou(table):
    """Intersection over union per class as a fraction; None for a class without any pixel."""
    result, classes = [], len(table)
    for c in range(classes):
        union = sum(table[c][k] + table[k][c] for k in range(classes)) - table[c][c]
        result.append(Fraction(table[c][c], union) if union else None)
    return result


def exact_mean(table):
    present = [v for v in exact_iou(table) if v is not None]
    return sum(present) / len(present)


def draw(classes, shape, seed, kind=torch.int64):
    """Prediction and label; a sixth of the label is 255, some of it the first value past C."""
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randint(0, classes, shape, generator=generator)
    label = torch.randint(0, classes, shape, generator=generator)
    agree = torch.rand(shape, generator=generator) < 0.5
    label = torch.where(agree, pred, label)
    void = torch.randint(0, 6, shape, generator=generator)
    label = label.masked_fill(void == 0, 255)
    if classes < 255:
        label[..., 0] = classes
    return pred, label.to(kind)


@pytest.mark.smoke
@pytest.mark.parametrize("classes", [1, 2, 5, 21])
@pytest.mark.parametrize("kind", [torch.int64, torch.uint8])
def test_the_confusion_matrix_is_a_double_loop_over_valid_pixels(classes, kind):
    pred, label = draw(classes, (2, 17, 23), classes, kind)
    matrix = confusion_matrix(pred, label, classes)
    assert matrix.dtype == torch.int64 and matrix.shape == (classes, classes)
    assert matrix.tolist() == count(pred, label, classes)
    assert int(matrix.sum()) == int((label < classes).sum())


def test_only_ignored_pixels_count_nothing_and_score_zero():
    label = torch.full((4, 5), 255)
    matrix = confusion_matrix(torch.zeros(4, 5, dtype=torch.int64), label, 3)
    assert matrix.tolist() == [[0] * 3] * 3
    result = scores(matrix)
    assert result == {"miou": 0.0, "accuracy": 0.0, "constant": 0.0, "iou": [None] * 3}


def test_two_shards_sum_to_the_whole():
    pred, label = draw(7, (9, 11, 6), 1)
    parts = [confusion_matrix(pred[r::2], label[r::2], 7) for r in (0, 1)]
    assert torch.equal(parts[0] + parts[1], confusion_matrix(pred, label, 7))


@pytest.mark.smoke
def test_iou_accuracy_and_mean_are_the_exact_fractions():
    for seed in range(5):
        pred, label = draw(6, (13, 19), seed)
        table = count(pred, label, 6)
        iou = iou_per_class(torch.tensor(table))
        result = scores(torch.tensor(table))
        # 1e-12: the rounding of a few float64 operations
        assert iou.dtype == torch.float64
        assert iou.tolist() == pytest.approx([float(v) for v in exact_iou(table)], abs=1e-12)
        assert result["miou"] == pytest.approx(float(exact_mean(table)), abs=1e-12)
        hits = Fraction(sum(table[c][c] for c in range(6)), sum(map(sum, table)))
        assert result["accuracy"] == pytest.approx(float(hits), abs=1e-12)
        # printed to six decimals
        assert result["iou"] == pytest.approx([float(v) for v in exact_iou(table)], abs=5.1e-7)


def test_a_class_that_never_occurs_is_none_and_leaves_the_mean_alone():
    table = [[3, 0, 1, 0], [0, 0, 0, 0], [2, 0, 4, 0], [0, 0, 0, 0]]  # 1 and 3 nowhere
    assert iou_per_class(torch.tensor(table)).isnan().tolist() == [False, True, False, True]
    result = scores(torch.tensor(table))
    assert [v is None for v in result["iou"]] == [False, True, False, True]
    assert result["miou"] == pytest.approx((3 / 6 + 4 / 7) / 2, abs=1e-12)


def test_a_class_that_is_only_predicted_counts_as_zero():
    result = scores(torch.tensor([[3, 1], [0, 0]]))
    assert result["iou"] == [0.75, 0.0] and result["miou"] == 0.375
    result = scores(torch.tensor([[3, 0], [1, 0]]))  # and one that is only in the labels
    assert result["iou"] == [0.75, 0.0] and result["miou"] == 0.375


def test_a_whole_data_set_of_pixels_is_counted_without_rounding():
    many = 2**40  # Cityscapes' 500 images are 2**30 pixels; float32 would lose the 3 and the 1
    table = [[many, 3], [1, many + 5]]
    result = scores(torch.tensor(table))
    assert 1 - result["accuracy"] == pytest.approx(4 / (2 * many + 9), rel=1e-3)
    assert 1 - result["miou"] == pytest.approx(float(1 - exact_mean(table)), rel=1e-3)


@pytest.mark.parametrize("classes", [1, 2, 4, 8])
def test_the_constant_is_the_best_constant_prediction(classes):
    for seed in range(8):
        pred, label = draw(classes, (6, 9), 100 + seed)
        if seed % 2 and classes > 2:
            label[label == 1] = 0  # a class that does not occur
        best = 0.0
        for c in range(classes):
            table = count(torch.full_like(pred, c), label, classes)
            best = max(best, float(exact_mean(table)))
        found = scores(confusion_matrix(pred, label, classes))["constant"]
        assert found == pytest.approx(best, abs=1e-12)


class Oracle(torch.nn.Module):
    """A network that sees only the red of a pixel: its class is red modulo 7."""

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        one_hot = torch.nn.functional.one_hot(x[:, 0].long() % 7, 7)
        return {"logits": one_hot.permute(0, 3, 1, 2).float()}


def test_evaluation_scores_every_image_once_and_gives_the_mode_back():
    items = [Item(key) for key in shapes.keys("val")[:6]]
    args = SimpleNamespace(dataset="shapes", num_classes=0, ignore_index=255)
    data, net = Data(args, [], [], items, []), Oracle()
    total = np.zeros((7, 7), np.int64)
    for item in items:
        image, label = shapes.draw(item.key)
        red = torch.from_numpy(np.array(image)[..., 0] % 7)
        total += np.array(count(red, torch.from_numpy(np.array(label)), 7))
    for training in (True, False):
        net.train(training)
        args, cpu = SimpleNamespace(workers=0, protocol="whole"), torch.device("cpu")
        result, rows = evaluate(net, data, items, args, Group(0, 1, cpu))
        assert net.training is training
        assert result["miou"] == pytest.approx(float(exact_mean(total.tolist())), abs=1e-12)
        assert set(rows) == {"image", "label", "prediction"}
        assert all(len(maps) == 4 for maps in rows.values())


# ---- pictures ----


def test_an_image_is_shown_as_it_is_in_either_order_of_its_axes():
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    assert np.array_equal(colour(image, PALETTE), image)
    assert np.array_equal(colour(torch.from_numpy(image).permute(2, 0, 1), PALETTE), image)


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_a_label_takes_the_palette_and_everything_outside_is_white(kind):
    label = np.array([[0, 1, 2], [255, 3, 1]], kind)
    white = [255, 255, 255]
    expected = [[[10, 20, 30], [200, 0, 0], [0, 90, 250]], [white, white, [200, 0, 0]]]
    picture = colour(label, PALETTE)
    assert picture.dtype == np.uint8 and picture.tolist() == expected
    assert colour(torch.from_numpy(label), PALETTE).tolist() == expected


def test_truth_values_and_probabilities_are_grey():
    assert colour(np.array([[True, False]]), PALETTE).tolist() == [[[255] * 3, [0] * 3]]
    grey = colour(torch.tensor([[0.0, 0.5, 1.0, 1.7, -0.2]]), PALETTE)
    assert grey.dtype == np.uint8
    assert grey[0, :, 0].tolist() in ([0, 127, 255, 255, 0], [0, 128, 255, 255, 0])
    assert (grey == grey[..., :1]).all()


@pytest.mark.smoke
def test_panels_reopen_with_every_map_in_its_place(tmp_path):
    image = torch.full((3, 40, 60), 77, dtype=torch.uint8)
    label = torch.zeros(40, 60, dtype=torch.int64)
    label[:, 30:] = 1
    label[20:] = 255
    confidence = torch.full((40, 60), 1.0)
    rows = [
        {"image": image, "label": label, "inside": label != 255, "confidence": confidence},
        {"image": image[:, :, :20]},  # a narrower picture, and fewer of them
    ]
    path = tmp_path / "new" / "folder" / "a.png"
    save_panels(path, rows, PALETTE, height=80)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.mode == "RGB"
        assert sheet.size == (4 * (120 + 4), 2 * (80 + 16))  # 60 x 40 at height 80: 120 wide
        pixels = np.array(sheet)

    def cell(row, column):  # well inside a map: title and gap are at most 16 and 4 pixels
        return pixels[96 * row + 18 : 96 * row + 92, 124 * column + 6 : 124 * column + 118]

    assert (cell(0, 0) == 77).all()
    colours = {tuple(c) for c in cell(0, 1).reshape(-1, 3).tolist()}
    assert colours == {(10, 20, 30), (200, 0, 0), (255, 255, 255)}  # no mixed colour: nearest
    assert cell(0, 1)[2, 2].tolist() == [10, 20, 30] and cell(0, 1)[2, -2].tolist() == [200, 0, 0]
    assert (cell(0, 2)[:30] == 255).all() and (cell(0, 2)[-30:] == 0).all()
    assert (cell(0, 3) == 255).all()
    assert (pixels[96 + 18 : 96 + 92, 6:38] == 77).all()
    assert (pixels[96:, 60:] == 255).all()  # nothing beside the narrow one
    assert (pixels[:16] != 255).any()  # titles
