"""mean_teacher.py: pseudo labels, consistency, teacher and CutMix against loops over scalars."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from common.run import resolve
from mean_teacher import (
    Args,
    consistency_ce,
    consistency_mse,
    cutmix,
    cutmix_box,
    ema_decay,
    preset,
    pseudo_labels,
    sigmoid_rampup,
    update_teacher,
)

# U2PL audit, section 2: steps of the semi-supervised runs, and steps in one pass
STEPS = {
    ("voc", "92"): (52_400, 655),
    ("voc", "183"): (52_000, 650),
    ("voc", "366"): (51_040, 638),
    ("voc", "732"): (49_200, 615),
    ("voc", "1464"): (45_600, 570),
    ("voc_aug", "1/16"): (49_600, 620),
    ("voc_aug", "1/8"): (46_240, 578),
    ("voc_aug", "1/4"): (39_680, 496),
    ("voc_aug", "1/2"): (26_400, 330),
    ("cityscapes", "1/16"): (34_800, 174),
    ("cityscapes", "1/8"): (32_600, 163),
    ("cityscapes", "1/4"): (27_800, 139),
    ("cityscapes", "1/2"): (18_600, 93),
}
CONSISTENCIES = [consistency_ce, consistency_mse]


def views(seed, classes=4, spread=2.0):
    """Returns student logits (2, C, 6, 5), a leaf, the teacher's logits alike, and inside."""
    rng = torch.Generator().manual_seed(seed)
    logits = [spread * torch.randn(2, classes, 6, 5, generator=rng) for _ in range(2)]
    inside = torch.rand(2, 6, 5, generator=rng) < 0.7
    return *(x.requires_grad_() for x in logits), inside


def scalar_softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / math.fsum(e) for v in e]


def at(x, i, y, x_):
    """Returns the channels of a pixel as floats."""
    return x[i, :, y, x_].tolist()


def places(inside):
    b, h, w = inside.shape
    return [(i, y, x) for i in range(b) for y in range(h) for x in range(w) if inside[i, y, x]]


def scalar_consistency(kind, logits_s, prob_t, inside):
    """Oracle of both: the mean over the pixels inside, in float64."""
    losses = []
    for place in places(inside):
        p, q = scalar_softmax(at(logits_s, *place)), at(prob_t, *place)
        if kind is consistency_ce:
            losses.append(-math.log(p[q.index(max(q))]))
        else:
            losses.append(math.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True)))
    return math.fsum(losses) / len(losses)


# ---- pseudo_labels, consistency ----


def test_pseudo_labels_are_the_most_probable_class_and_255_outside():
    _, logits_t, inside = views(0)
    prob_t = logits_t.detach().softmax(1)
    labels = pseudo_labels(prob_t, inside)
    assert labels.dtype == torch.int64 and labels.shape == inside.shape
    seen = set()
    for i, y, x in np.ndindex(*inside.shape):
        p = at(prob_t, i, y, x)
        expected = p.index(max(p)) if inside[i, y, x] else 255
        assert labels[i, y, x] == expected
        seen.add(expected)
    assert seen == {0, 1, 2, 3, 255}


def test_a_tie_goes_to_the_lowest_class():
    prob_t = torch.tensor([0.1, 0.4, 0.1, 0.4]).view(1, 4, 1, 1).expand(1, 4, 8, 9)
    labels = pseudo_labels(prob_t, torch.ones(1, 8, 9, dtype=torch.bool))
    assert torch.equal(labels, torch.ones(1, 8, 9, dtype=torch.int64))


@pytest.mark.smoke
@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize("seed", range(4))
def test_consistency_equals_a_loop_over_scalars(consistency, seed):
    logits_s, logits_t, inside = views(seed, classes=2 + seed)
    prob_t = logits_t.detach().softmax(1)
    loss = consistency(logits_s, prob_t, inside)
    expected = scalar_consistency(consistency, logits_s, prob_t, inside)
    # float32 sum of at most 60 terms of order 1: a few 1e-7 relative
    assert loss.item() == pytest.approx(expected, rel=3e-6) and loss.shape == ()


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_consistency_over_nothing_is_zero_with_a_zero_gradient(consistency):
    logits_s, logits_t, inside = views(1)
    loss = consistency(logits_s, logits_t.detach().softmax(1), torch.zeros_like(inside))
    (grad,) = torch.autograd.grad(loss, logits_s)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))  # a NaN would not be equal


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_consistency_has_no_gradient_for_the_teacher_and_none_outside(consistency):
    logits_s, logits_t, inside = views(2)
    prob_t = logits_t.softmax(1)  # attached: the loss itself has to cut it off
    consistency(logits_s, prob_t, inside).backward()
    assert logits_t.grad is None or not logits_t.grad.any()
    assert torch.equal(logits_s.grad.abs().sum(1) > 0, inside)


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_consistency_of_bfloat16_logits_is_computed_in_float32(consistency):
    logits_s, logits_t, inside = views(3)
    half, prob_t = logits_s.detach().bfloat16(), logits_t.detach().softmax(1)
    loss = consistency(half, prob_t, inside)
    assert loss.dtype == torch.float32
    assert loss.item() == consistency(half.float(), prob_t, inside).item()


@pytest.mark.parametrize("seed", range(5))
def test_the_squared_distance_lies_between_0_and_2(seed):
    logits_s, logits_t, inside = views(seed, spread=10.0**seed)
    loss = consistency_mse(logits_s, logits_t.detach().softmax(1), inside).item()
    assert 0 < loss <= 2
    same = consistency_mse(logits_s, logits_s.detach().softmax(1), inside).item()
    assert same == 0  # one softmax, twice


def test_the_squared_distance_of_two_certain_and_different_views_is_2():
    logits_s, prob_t = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    logits_s[:, 0], prob_t[:, 2] = 200.0, 1.0  # exp(-200) is 0 in float32
    assert consistency_mse(logits_s, prob_t, torch.ones(1, 2, 2, dtype=torch.bool)).item() == 2


# ---- schedules ----


def test_the_ramp_up_rises_from_exp_minus_5_to_1_and_stays():
    for step in range(0, 31):
        t = step / 20 if step < 20 else 1.0
        # float64 on both sides: the last bits of exp
        assert sigmoid_rampup(step, 20) == pytest.approx(math.exp(-5 * (1 - t) ** 2), rel=1e-14)
    assert sigmoid_rampup(20, 20) == sigmoid_rampup(10**6, 20) == 1.0


def test_a_ramp_up_of_length_0_is_1_from_the_start():
    assert sigmoid_rampup(0, 0) == sigmoid_rampup(5, 0) == 1.0


def test_the_teachers_decay_starts_with_a_copy_and_stops_at_its_limit():
    assert [ema_decay(n, 0.99) for n in (0, 1, 3)] == [0.0, 0.5, 0.75]
    # one division in float64
    assert ema_decay(97, 0.99) == pytest.approx(97 / 98, rel=1e-15)
    assert ema_decay(100, 0.99) == ema_decay(10**6, 0.99) == 0.99
    assert ema_decay(3, 0.6) == 0.6


# ---- update_teacher ----


def small_net(seed):
    """Returns convolution and BN with random weights and running statistics."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    for tensor in (*net.parameters(), net[1].running_mean, net[1].running_var):
        tensor.data = torch.rand(tensor.shape)
    net[1].num_batches_tracked.fill_(10 + seed)
    return net


@pytest.mark.smoke
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("buffers", ["own", "average"])
def test_the_teacher_moves_as_a_loop_over_scalars_does(decay, buffers):
    teacher, student = small_net(1), small_net(2)
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    theirs = {name: x.clone() for name, x in student.state_dict().items()}
    update_teacher(teacher, student, decay, buffers)
    params = {name for name, _ in teacher.named_parameters()}
    for name, now in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], theirs[name]), name
        t, s = before[name].flatten().tolist(), theirs[name].flatten().tolist()
        if name.endswith("num_batches_tracked"):
            assert now.item() == 11
        elif name in params or buffers == "average":
            expected = [decay * a + (1 - decay) * b for a, b in zip(t, s, strict=True)]
            # numbers in [0, 1], two float32 roundings of 6e-8 each
            assert now.flatten().tolist() == pytest.approx(expected, abs=2e-7), name
        else:
            assert now.flatten().tolist() == t, name


def test_a_decay_of_0_copies_the_student_bit_for_bit():
    teacher, student = small_net(1), small_net(2)
    update_teacher(teacher, student, ema_decay(0, 0.99), "average")
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(t, s)
    assert torch.equal(teacher[1].running_var, student[1].running_var)


def test_the_update_leaves_no_graph_and_no_shared_memory():
    teacher, student = small_net(1), small_net(2)
    update_teacher(teacher, student, 0.0, "own")
    with torch.no_grad():
        student[0].weight.zero_()
    assert teacher[0].weight.abs().sum() > 0
    assert teacher[0].weight.is_leaf and teacher[0].weight.grad_fn is None


def test_the_update_follows_any_memory_layout():
    teacher = small_net(1).to(memory_format=torch.channels_last)
    student, twin = small_net(2), small_net(1)
    update_teacher(teacher, student, 0.25, "own")
    update_teacher(twin, student, 0.25, "own")
    assert torch.equal(teacher[0].weight, twin[0].weight)  # the same operation on each number


# ---- CutMix ----


@pytest.mark.smoke
@pytest.mark.parametrize("size", [16, 128, 513])
def test_a_box_has_half_the_area_and_lies_inside(size):
    boxes = [cutmix_box(np.random.default_rng(seed), size) for seed in range(300)]
    for top, left, height, width in boxes:
        assert all(type(n) is int for n in (top, left, height, width))
        assert 0 <= top <= top + height <= size and 0 <= left <= left + width <= size
        # the height is rounded to a pixel: half a row of the box at most
        assert abs(height * width - size * size / 2) <= width / 2
        assert 2 * height > size and 2 * width > size
    widths = {width for *_, width in boxes}
    assert min(widths) < 0.57 * size + 1 and max(widths) > 0.94 * size - 1
    assert size > 16 or widths == set(range(9, 16))  # both ends occur


@pytest.mark.parametrize("size", [16, 128, 513])
def test_a_box_is_put_anywhere_with_equal_probability(size):
    boxes = [cutmix_box(np.random.default_rng([seed, size]), size) for seed in range(300)]
    for start, side in ((0, 2), (1, 3)):
        room = [(box[start], size - box[side]) for box in boxes]
        assert any(s == 0 for s, _ in room) or size > 16  # both ends are reached
        assert any(s == r > 0 for s, r in room) or size > 16
        shares = [s / r for s, r in room if r]
        # 200 or more uniform numbers: deviation of the mean 0.29 / sqrt(200) = 0.02; five of them
        assert abs(sum(shares) / len(shares) - 0.5) < 0.1 + 1 / size
        assert len({s for s, _ in room}) >= min(size / 4, 20)


def test_a_box_is_a_function_of_the_generators_seed():
    draw = [cutmix_box(np.random.default_rng(seed), 513) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def batch(seed, images=4, size=12):
    """Returns image uint8, probabilities and inside of a batch, and one box per image."""
    torch.manual_seed(seed)
    image = torch.randint(256, (images, 3, size, size), dtype=torch.uint8)
    prob = torch.randn(images, 5, size, size).softmax(1)
    rng = np.random.default_rng(seed)
    return (image, prob, torch.rand(images, size, size) < 0.6), [
        cutmix_box(rng, size) for _ in range(images)
    ]


@pytest.mark.smoke
@pytest.mark.parametrize("images", [2, 4, 6])
def test_cutmix_equals_a_loop_over_pixels(images):
    maps, boxes = batch(images, images)
    mixed = cutmix(boxes, *maps)
    assert len(mixed) == 3
    for old, new in zip(maps, mixed, strict=True):
        assert new.dtype == old.dtype and new.shape == old.shape
        for i in range(images):
            partner = i + 1 if i % 2 == 0 else i - 1
            top, left, height, width = boxes[i]
            for y in range(12):
                for x in range(12):
                    hit = top <= y < top + height and left <= x < left + width
                    source = partner if hit else i
                    assert torch.equal(new[i, ..., y, x], old[source, ..., y, x])


def test_cutmix_keeps_image_probabilities_and_inside_together():
    size = 12
    number = torch.arange(4 * size * size).view(4, size, size)  # names every pixel of the batch
    maps = number[:, None].expand(4, 3, size, size), number[:, None] / 1024, number % 3 == 0
    _, boxes = batch(0)
    image, prob, inside = cutmix(boxes, *maps)
    assert not torch.equal(image[:, 0], number)
    assert torch.equal(image, image[:, :1].expand_as(image))
    assert torch.equal((prob[:, 0] * 1024).long(), image[:, 0])  # a power of two: exact
    assert torch.equal(inside, image[:, 0] % 3 == 0)


def test_cutmix_changes_neither_its_input_nor_a_pixel_outside_the_box():
    maps, boxes = batch(1)
    copies = [x.clone() for x in maps]
    mixed = cutmix(boxes, *maps)
    for old, copy, new in zip(maps, copies, mixed, strict=True):
        assert torch.equal(old, copy)
        assert new.data_ptr() != old.data_ptr()
        for i, (top, left, height, width) in enumerate(boxes):
            out = torch.ones(12, 12, dtype=torch.bool)
            out[top : top + height, left : left + width] = False
            assert out.any() and torch.equal(new[i][..., out], copy[i][..., out])


def test_probabilities_still_sum_to_1_after_cutmix():
    maps, boxes = batch(2)
    total = cutmix(boxes, *maps)[1].sum(1)
    # softmax over five classes in float32
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


# ---- recipes ----


@pytest.mark.parametrize("dataset, split", STEPS)
def test_steps_and_warm_up_of_every_split_are_the_audits(dataset, split):
    total, epoch = STEPS[dataset, split]
    paper = resolve(Args(dataset=dataset, split=split), preset)
    official = resolve(Args(dataset=dataset, split=split, recipe="official"), preset)
    assert paper.total_iters == official.total_iters == total
    assert paper.warmup_iters == (20 * epoch if dataset == "cityscapes" else epoch)
    assert official.warmup_iters == (0 if dataset == "cityscapes" else epoch)
    assert (paper.batch_size, paper.batch_size_unlabeled, paper.rampup_iters) == (16, 16, 0)


def test_the_other_recipe_changes_the_warm_up_on_cityscapes_alone():
    for dataset, split in (("cityscapes", "1/8"), ("voc", "92"), ("camvid", "1/8")):
        both = [
            vars(resolve(Args(dataset=dataset, split=split, recipe=recipe), preset))
            for recipe in ("paper", "official")
        ]
        changed = {name for name in both[0] if both[0][name] != both[1][name]} - {"recipe"}
        assert changed == ({"warmup_iters"} if dataset == "cityscapes" else set())


def test_mean_teacher_is_the_audits_reading_of_the_rows():
    args = resolve(Args(dataset="voc", split="732"), preset)
    assert (args.consistency, args.consistency_weight, args.ema_decay) == ("ce", 1.0, 0.99)
    assert (args.teacher_bn, args.cutmix, args.cutmix_prob) == ("own", False, 0.5)


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_the_squared_distance_brings_its_papers_ramp_up_and_no_warm_up(recipe):
    flags = dict(dataset="voc", split="92", consistency="mse", recipe=recipe)
    args = resolve(Args(**flags, total_iters=150_000), preset)
    assert (args.rampup_iters, args.warmup_iters) == (40_000, 0)
    assert resolve(Args(**flags), preset).rampup_iters == 52_400 * 4 // 15


def test_an_explicit_flag_beats_recipe_and_preset():
    flags = dict(dataset="cityscapes", split="1/8", recipe="official")
    assert resolve(Args(**flags), preset).warmup_iters == 0
    args = resolve(Args(**flags, warmup_iters=77, batch_size_unlabeled=8, lr=0.5), preset)
    assert (args.warmup_iters, args.batch_size_unlabeled, args.lr) == (77, 8, 0.5)
    args = resolve(Args(dataset="voc", split="92", warmup_iters=0), preset)
    assert args.warmup_iters == 0  # a falsy value is explicit too


def test_the_warm_up_follows_an_explicit_number_of_steps():
    args = resolve(Args(dataset="voc", split="92", total_iters=800), preset)
    assert (args.total_iters, args.warmup_iters) == (800, 10)


def test_the_unlabelled_batch_follows_the_labelled_one():
    args = resolve(Args(dataset="voc", split="92", batch_size=8), preset)
    assert (args.batch_size, args.batch_size_unlabeled) == (8, 8)
