"""What is drawn, pasted, pooled and kept between steps, against oracles/ for given random numbers.

Where the numbers are equally likely, so is what an oracle draws; a few counts show it.
"""

import itertools
import math
import zlib
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import u2pl
from benchmarks import contrastive
from common import Refusal
from common.distributed import Group
from oracles import ael as ael_oracle
from oracles import esl as esl_oracle
from oracles import fpl as fpl_oracle
from oracles import mean_teacher as mt_oracle
from oracles import u2pl as u2pl_oracle

BELOW_1 = 1 - 2.0**-53  # the largest float64 of a generator's [0, 1)
NEAR = dict(rel=1e-9, abs=1e-12)  # float64
CLASSES = [2, 3, 11, pytest.param(21, marks=pytest.mark.smoke), 81]
some_classes = pytest.mark.parametrize("classes", CLASSES)
HALVES = [torch.bfloat16, torch.float16]


def generator(*seed):
    return torch.Generator().manual_seed(hash(seed) % 2**40)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed, shape))


def uniform(*shape, seed=0):
    """In [0, 1); the first is 0 and the last the largest float64 below 1."""
    u = torch.rand(*shape, dtype=torch.float64, generator=generator(seed, shape))
    u.view(-1)[0] = 0.0
    u.view(-1)[-1] = BELOW_1
    return u


def whole(classes, *shape, seed=0):
    return torch.randint(0, classes, shape, generator=generator(seed, classes))


def tuples(*sizes):
    return itertools.product(*map(range, sizes))


class Scripted:
    """Stands in for a numpy generator: its numbers are a list of shares in [0, 1)."""

    def __init__(self, shares):
        self.shares = list(shares)

    def random(self, count=None):
        if count is None:
            return self.shares.pop(0)
        return np.array([self.shares.pop(0) for _ in range(count)])

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * self.shares.pop(0)

    def integers(self, low, high=None):
        low, high = (0, low) if high is None else (low, high)
        return low + int(self.shares.pop(0) * (high - low))

    def choice(self, values):
        return values[self.integers(len(values))]


# ---- boxes, CutMix, Copy-Paste ----

BOXES = [
    (ael_fpl.half_area_box, ael_oracle.half_area_box, 3, (6, 32, 129, 769)),
    (mean_teacher.cutmix_box, mt_oracle.box, 3, (6, 16, 128, 513)),
    (cps_fpl.toggled_mask, fpl_oracle.toggled_mask, 12, (16, 57, 64)),
]


@pytest.mark.smoke
@pytest.mark.parametrize("draw, oracle, count, sizes", BOXES)
def test_boxes(draw, oracle, count, sizes):
    for size in sizes:
        shares = np.random.default_rng(size).random((100, count)).tolist()
        shares += [list(3 * s)[:count] for s in itertools.product((0.0, 0.5, BELOW_1), repeat=4)]
        for numbers in shares:
            script = Scripted(numbers)
            found = draw(script, size)
            assert not script.shares
            if count == 12:
                assert found.shape == (1, size, size) and found[0].tolist() == oracle(numbers, size)
                continue
            top, left, height, width = found
            assert found == oracle(numbers, size) and all(type(n) is int for n in found)
            assert 0 <= top <= top + height <= size and 0 <= left <= left + width <= size
            # half the area: each side is off by half a pixel at most
            assert abs(height * width - size**2 / 2) <= (height + width) / 2 + 0.25
    for draws in ([np.random.default_rng(seed) for seed in (5, 5, 6)],):
        one, same, other = (torch.as_tensor(draw(rng, 64)).tolist() for rng in draws)
        assert one == same != other


@pytest.mark.smoke
@pytest.mark.parametrize("count", [2, 4, 6])
def test_cutmix_mixes_all_maps_alike_in_pairs(count):
    maps = whole(256, count, 3, 12, 12), normal(count, 5, 12, 12), normal(count, 12, 12) > 0
    held = [x.clone() for x in maps]
    boxes = [mt_oracle.box(u, 12) for u in uniform(count, 3).tolist()]
    mixed = mean_teacher.cutmix(boxes, *maps)
    assert all(torch.equal(x, old) for x, old in zip(maps, held, strict=True))  # not in place
    for old, new in zip(maps, mixed, strict=True):
        assert new.dtype == old.dtype
        for i, y, x in tuples(count, 12, 12):
            source = mt_oracle.cutmix_source(boxes, i, y, x)
            assert torch.equal(new[i, ..., y, x], old[source, ..., y, x])


def seen_classes(classes, side, seed, grain=1, padded=False):
    """(side, side) uint8 classes in squares of `grain` cells; padded below and right."""
    rng = np.random.default_rng([seed, classes, side, grain])
    seen = rng.integers(0, classes, (side, side)).astype(np.uint8)
    seen = np.ascontiguousarray(seen.repeat(grain, 0).repeat(grain, 1)[:side, :side])
    if padded:
        seen[side - side // 4 :] = 255
        seen[:, side - side // 3 :] = 255
    return seen


@some_classes
def test_boxes_of_large_components_are_equally_likely(classes):
    for seed, (side, grain) in enumerate(itertools.product((1, 4, 9), (1, 3))):
        seen = seen_classes(classes, side, seed, grain, padded=seed % 2 == 1)
        for less, c, cells in itertools.product((0, 3), range(min(classes, 4)), (0, 1, 1.5, 4.5)):
            size, area = 4 * side - less, cells / seen.size
            boxes = ael_oracle.component_boxes(seen.tolist(), c, area, size)
            shares = [(i + 0.5) / len(boxes) for i in range(len(boxes))] or [0.5]
            found = [ael_fpl.component_box(seen, c, area, size, Scripted([u])) for u in shares]
            assert Counter(found) == Counter(boxes or [None])


def test_a_component_must_be_larger_than_the_area_and_may_touch_at_corners():
    seen = np.zeros((8, 8), np.uint8)
    seen[1:3, 2:6] = seen[5, 5:7] = 7  # 8 cells and 2, of 64
    seen[7, 7] = 255
    for c, area, box in (
        *((7, 8 / 64, None), (7, 7 / 64, (4, 8, 8, 16)), (7, 2 / 64, (4, 8, 8, 16))),
        *((0, 52 / 64, (0, 0, 32, 32)), (0, 53 / 64, None), (3, 0.0, None)),
    ):
        assert ael_fpl.component_box(seen, c, area, 32, np.random.default_rng(0)) == box
    for eye in (np.eye(4), np.eye(4)[::-1]):
        found = ael_fpl.component_box(eye.astype(np.uint8), 1, 3 / 16, 13, np.random.default_rng(0))
        assert found == (0, 0, 13, 13)  # the last cells end with the crop


@some_classes
def test_a_mask_is_the_box_of_a_component_or_half_the_crop(classes):
    total = 0
    for seed, size in enumerate((16, 33, 46)):
        side = len(range(0, size, 4))
        seen = np.stack([seen_classes(classes, side, 10 * seed + i, 2, i % 2) for i in range(6)])
        chosen = whole(classes, 6, seed=seed).tolist()
        chosen[0] = int(seen[0, 0, 0])
        area = (0.9, 3.9, 4.5)[seed] / side**2
        shares = uniform(6, 3, seed=seed).tolist()
        mask, regions = ael_fpl.partner_mask(seen, chosen, [*map(Scripted, shares)], area, size)
        assert mask.dtype == torch.bool and mask.shape == (6, size, size)
        for i, c in enumerate(chosen):
            boxes = ael_oracle.component_boxes(seen[i].tolist(), c, area, size)
            regions -= bool(boxes)
            total += bool(boxes)
            boxes = boxes or [ael_oracle.half_area_box(shares[i], size)]
            assert mask[i].tolist() in [ael_oracle.box_mask(box, size) for box in boxes]
        assert regions == 0
    assert total > 0


@some_classes
def test_a_class_is_present_if_it_covers_the_area(classes):
    for seed, area in itertools.product(range(3), (0.0, 1 / 64, 2 / 64, 0.5, 1.0)):
        seen = np.stack([seen_classes(classes, 8, seed + i, 1 + i, i % 2) for i in range(4)])
        seen[3] = seed
        found = ael_fpl.presence(torch.from_numpy(seen), classes, area)
        assert found.dtype == torch.bool and found.shape == (4, classes)
        for b, c in tuples(4, classes):
            assert found[b, c] == ael_oracle.present(seen[b].tolist(), c, area)


@some_classes
def test_pixels_of_drawn_classes_cover_the_chosen_images(classes):
    pasted = 0
    for seed in range(4):
        base, source = (
            dict(image=whole(256, 4, 3, 6, 5, seed=s), label=whole(classes, 4, 6, 5, seed=s))
            for s in (seed, seed + 50)
        )
        for x in (base, source):
            x["inside"] = normal(4, 6, 5, seed=len(x["label"])) > -1
            x["label"][normal(4, 6, 5, seed=seed) > 1] = 255
        held = [{k: v.clone() for k, v in x.items()} for x in (base, source)]
        drawn = whole(classes, 4, seed, seed=seed)  # none at first; may repeat
        chosen = torch.tensor([True, False, True, seed > 1])
        found = ael_fpl.copy_paste(base, source, drawn, chosen)
        assert set(found) == set(base)
        for b, y, x in tuples(4, 6, 5):
            over = bool(chosen[b]) and source["label"][b, y, x].item() in drawn[b].tolist()
            pasted += over
            for key in found:
                assert torch.equal(
                    found[key][b, ..., y, x], (source if over else base)[key][b, ..., y, x]
                )
        for x, before in zip((base, source), held, strict=True):  # both are left as they were
            assert all(torch.equal(x[key], before[key]) for key in x)
    assert pasted > 0


# ---- AEL: confidence, classes, partners ----


@some_classes
def test_the_confidence_of_a_class_and_its_moving_mean(classes):
    """Also: processes add up, and half precision counts in float32."""
    for seed, skip in itertools.product(range(3), (False, True)):
        prob = normal(4, classes, 6, 5, seed=seed).softmax(1)
        label = whole(classes, 4, 6, 5, seed=seed)
        label[uniform(4, 6, 5) < 0.2] = 255
        label[label == seed] = 255  # absent
        lists = prob.movedim(1, -1).flatten(1, 2).tolist(), label.flatten(1).tolist()
        for pooled in (1, 2, 4):
            found = ael_fpl.class_confidence(prob, label, pooled, skip)
            sums, counts = ael_oracle.class_confidence(*lists, pooled, skip)
            assert found[0].tolist() == pytest.approx(sums, **NEAR)
            assert found[1].tolist() == counts
            assert skip or torch.equal(found, ael_fpl.class_confidence(prob, label, pooled))
            for momentum in (0.0, 0.97, 1.0):
                bank = uniform(classes, seed=seed)
                new = ael_fpl.update_confidence(bank, found, momentum).tolist()
                rows = zip(bank.tolist(), sums, counts, strict=True)
                expected = [ael_oracle.moved_confidence(*row, momentum) for row in rows]
                assert new == pytest.approx(expected, **NEAR)
                assert all(
                    a == b for a, b, n in zip(new, bank.tolist(), counts, strict=True) if not n
                )
        halves = [
            ael_fpl.class_confidence(*x, 2, skip)
            for x in zip(prob.split(2), label.split(2), strict=True)
        ]
        assert torch.allclose(sum(halves), ael_fpl.class_confidence(prob, label, 2, skip))
        for dtype in HALVES:
            low = ael_fpl.class_confidence(prob.to(dtype), label, 2, skip)
            assert torch.equal(
                low, ael_fpl.class_confidence(prob.to(dtype).float(), label, 2, skip)
            )


@some_classes
def test_sampling_probabilities_and_rates_of_classes(classes):
    """Eq. (9), and Sec. 3.3; a bank that a rounding has put above 1 counts as 1."""
    for seed, power in itertools.product(range(3), (0.0, 0.5, 1.0, 2.0)):
        bank = uniform(classes, seed=seed)
        bank[-1] = 1.0
        allowed = torch.arange(classes) % 3 != seed
        for mask in (None, allowed):
            found = ael_fpl.sampling_probability(bank, mask, power)
            hits = [True] * classes if mask is None else mask.tolist()
            expected = ael_oracle.sampling_probability(bank.tolist(), hits, power)
            assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
        if power:
            found = ael_fpl.equalization_rate(bank, power).tolist()
            assert found == pytest.approx(
                ael_oracle.equalization_rate(bank.tolist(), power), rel=1e-12
            )
    one = ael_fpl.sampling_probability(bank.numpy())
    assert torch.equal(one, ael_fpl.sampling_probability(bank, None, 1.0))
    assert torch.equal(ael_fpl.equalization_rate(bank), ael_fpl.equalization_rate(bank, 1.0))
    above = torch.tensor([0.5, 1 + 1e-6])
    assert ael_fpl.sampling_probability(above, power=0.5).isfinite().all()


@some_classes
def test_classes_are_drawn_by_the_inverse_of_the_running_sum(classes):
    for seed in range(5):
        p = uniform(classes, seed=seed) * (uniform(classes, seed=seed + 9) > 0.3)
        p[seed % classes] = 1.0
        for probs in (p, p.float()):
            steps = list(itertools.accumulate(probs.tolist()))
            # just below and above every step: float32 would not tell them apart
            edges = [v / steps[-1] * side for v in steps for side in (1 - 1e-12, 1 + 1e-12)]
            u = torch.tensor(
                [v for v in edges if v < 1] + uniform(50).tolist(), dtype=torch.float64
            )
            found = ael_fpl.draw_classes(probs, u)
            assert found.dtype == torch.int64
            assert found.tolist() == [ael_oracle.draw_class(probs.tolist(), v) for v in u.tolist()]


@pytest.mark.parametrize(
    "scale, dtype", [(1, torch.float64), (1, torch.float32), (8, torch.float64)]
)
def test_draws_at_the_steps_of_the_running_sum(scale, dtype):
    p = scale * torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0, 0.0], dtype=dtype)  # dyadic
    u = [0.0, 0.25 - 2.0**-54, 0.25, 0.5 - 2.0**-54, 0.5, BELOW_1]
    u = torch.tensor(u, dtype=torch.float64)
    assert ael_fpl.draw_classes(p, u).tolist() == [1, 1, 3, 3, 4, 4]
    assert ael_fpl.draw_classes(p, u.view(2, 3).T.contiguous()).tolist() == [[1, 3], [1, 4], [3, 4]]
    assert ael_fpl.draw_classes(p, u.view(2, 3)[:, 3:]).shape == (2, 0)


@some_classes
def test_partners_are_a_class_by_eq_9_and_an_image_that_shows_it(classes):
    for seed, count in enumerate((1, 2, 7, 40)):
        present = uniform(classes, count, seed=seed) < 0.4
        present[0] = False  # nowhere: any image
        bank, shares = uniform(classes, seed=seed), uniform(60, seed=seed).tolist()
        script = Scripted(shares)
        found = ael_fpl.draw_partners(bank, present, 30, script)
        assert found.dtype == torch.int64 and not script.shares
        expected = ael_oracle.draw_partners(bank.tolist(), present.tolist(), 30, shares)
        assert found.tolist() == expected
        again = ael_fpl.draw_partners(bank.numpy(), present, 30, Scripted(shares))
        assert torch.equal(found, again)
    with pytest.raises(Refusal, match="no unlabelled images"):
        ael_fpl.draw_partners(bank, present[:, :0], 4, Scripted([]))


# ---- U2PL ----


def test_candidates_have_more_entropy_than_gamma_or_less_than_the_lower_limit():
    H = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    inside = torch.tensor([[[True, True, True, False]]])
    limits = H[0, 0, 1], H[0, 0, 1]  # neither where it is equal
    for which, expected in (
        *(("unreliable", [False, False, True, False]), ("reliable", [True, False, False, False])),
        ("all", [True, True, True, False]),
    ):
        assert u2pl.candidates(H, inside, *limits, which)[0, 0].tolist() == expected
    nothing = u2pl.quantiles(H, inside & False, 0.8, 0.2)
    assert nothing.tolist() == [math.inf] * 2  # and lets nothing through
    assert not u2pl.candidates(H, inside & False, *nothing, "all").any()
    found = u2pl.quantiles(H.masked_fill(~inside, torch.nan), inside, 0.0, 0.5, 1.0)
    assert found.tolist() == H[0, 0, :3].tolist() and found.dtype == torch.float32
    half = torch.tensor([[0.5, 0.5], [0.25, 0.75]])  # an anchor has more than delta_p
    found = u2pl.anchor_masks(half, torch.tensor([0, 1]), 0.5)
    assert found.tolist() == [[False, False], [False, True]]


def test_the_share_of_unreliable_pixels_falls_in_stairs():
    for total, epochs, alpha in ((1000, 80, 0.2), (10, 200, 0.4)):
        args = SimpleNamespace(alpha_0=alpha, epochs=epochs, total_iters=total, dpa=True)
        for step in range(total):
            expected = u2pl_oracle.unreliable_share(step, total, epochs, alpha)
            assert u2pl.unreliable_share(step, args) == pytest.approx(expected, rel=1e-12)
        args.dpa = False
        assert u2pl.unreliable_share(total - 1, args) == alpha


@pytest.mark.parametrize(
    "full, small", [((513, 9), (129, 3)), ((11, 64), (4, 17)), ((4, 5), (4, 5))]
)
def test_pixels_at_stride_4_are_in_the_order_of_labels(full, small):
    x = torch.arange(2 * full[0] * full[1]).view(2, *full)
    found = u2pl.nearest(x, small).view(2, *small)
    for b, i, j in tuples(2, *small):
        assert found[b, i, j] == x[b, i * full[0] // small[0], j * full[1] // small[1]]
    maps = x[:, None].contiguous(memory_format=torch.channels_last)
    rows = u2pl.as_rows(maps)
    assert rows[:, 0].equal(x.flatten()) and rows.data_ptr() == maps.data_ptr()


@pytest.mark.parametrize("n, K", [(1, 5), (11, 4), (30, 2), (101, 64)])
def test_keys_are_drawn_each_as_often_and_none_twice(n, K):
    """[D25]; Eq. (9) of ESL draws its anchors so, ceil(0.1 n) at most."""
    turns = 4000
    u = torch.rand(turns, K + 1, dtype=torch.float64, generator=generator(n))
    keys = u2pl.draw_keys(torch.eye(n).double(), torch.ones(turns, n).bool(), u)
    drawn = keys[..., :-1].mul(keys[..., -1:]).sum(1)
    share = min(K, n) / n
    assert (drawn.sum(1) == min(K, n)).all() and drawn.max() == 1
    assert not u2pl.draw_keys(
        torch.eye(n).requires_grad_(), torch.ones(1, n).bool(), u[:1]
    ).requires_grad
    spread = math.sqrt(turns * share * (1 - share))
    assert (drawn.sum(0) - turns * share).abs().max() <= 4.5 * spread
    for count, row in itertools.product((0, min(K, n), min(K + 1, n), n), u[:5]):
        mask = torch.arange(n) < count
        found = u2pl.draw_keys(torch.eye(n).double(), mask[None], row[None])[0]
        expected = u2pl_oracle.keys(mask.tolist(), row.tolist())
        assert found[:, :-1].argmax(1)[found[:, -1] > 0].tolist() == expected
    args, ids = SimpleNamespace(anchor_share=0.1), torch.zeros(n, dtype=torch.int64)
    for row in u[:5]:
        pixels, real = esl.draw_anchors(ids, 1, 1, args, row[None])
        expected = esl_oracle.anchors([0] * n, 0, 1, 0.1, row.tolist())
        assert pixels[real].tolist() == expected and len(set(expected)) == int(real.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bank_is_a_queue_for_each_class(dtype):
    """The newest keys in their order; the last row stays 0; a ring may be smaller than a push."""
    sizes, D, K = [7, 3, 5], 4, 4
    bank, pushed = torch.zeros(sum(sizes) + 1, D, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    queues = [deque(maxlen=size) for size in sizes]
    for turn in range(20):
        offered = normal(3, K, D + 1, seed=turn)
        # 17 pixels: any number above 0 is real
        offered[..., -1] = 17.0 * (uniform(3, K, seed=turn) < [0.0, 0.3, 1.0][turn % 3])
        offered.requires_grad_()
        u2pl.push_keys(bank, pushed, torch.tensor(sizes), offered)
        assert not bank.requires_grad and not bank[-1].any()
        for c, ring in enumerate(bank[:-1].split(sizes)):
            queues[c].extend(key[:-1].to(dtype).tolist() for key in offered[c] if key[-1] > 0)
            filled = min(int(pushed[c]), sizes[c])
            turned = int(pushed[c]) % sizes[c] if filled == sizes[c] else 0
            assert ring.roll(-turned, 0)[:filled].tolist() == list(queues[c])
            assert not ring[filled:].any()


class Places(TorchDispatchMode):
    """Keeps the rows that index_copy_ writes."""

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        if "index_copy_" in str(operation):
            self.rows = inputs[2].tolist()
        return operation(*inputs, **(named or {}))


def test_no_row_of_the_bank_is_written_twice_in_a_step():
    """A GPU writes in any order."""
    bank, pushed, offered = torch.zeros(11, 2), torch.tensor([5, 2]), torch.ones(2, 9, 3)
    offered[1, 4, 2] = 0
    with Places() as places:
        u2pl.push_keys(bank, pushed, torch.tensor([7, 3]), offered)
    assert sorted(row for row in places.rows if row != 10) == list(range(10))
    assert pushed.tolist() == [14, 10]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("M, N", [(50, 256), (16, 5)])
def test_both_sides_of_the_benchmark_compute_the_same(M, N, dtype):
    size = dict(images=4, size=25, channels=16, first=900, rest=700)
    contrastive.compared(contrastive.Args(**size, anchors=M, negatives=N, bank_dtype=dtype))


# ---- ESL ----


def test_soft_labels_at_their_borders():
    def label(p, kind, eta=0.95, top_k=5):
        args = SimpleNamespace(label=kind, eta=eta, top_k=top_k)
        return esl.soft_label(torch.tensor(p).view(1, -1, 1, 1), args).flatten().tolist()

    assert label([0.5, 0.25, 0.25], "dynamic", 0.75) == [0.5, 0.25, 0.25]  # C* is 2; ties are kept
    assert label([0.5, 0.25, 0.25], "dynamic", 0.5) == [1, 0, 0]  # sum >= eta
    assert label([0.5, 0.25, 0.25], "topk", top_k=2) == [0.5, 0.25, 0.25]
    for kind, target in (("dynamic", [0.25] * 4), ("topk", [0.25] * 4), ("hard", [1, 0, 0, 0])):
        assert label([0.25] * 4, kind, 0.3, 1) == target
    for kind in ("dynamic", "topk", "soft"):
        assert all(map(math.isnan, label([math.nan] * 3, kind)))
    prob = (2 * normal(1, 7, 5, 80)).softmax(1)
    for eta in (0.3, 0.8, 0.95):  # the set is as large as FPL's n; a sure pixel is one-hot
        target = esl.soft_label(prob, SimpleNamespace(label="dynamic", eta=eta))
        assert (target > 0).sum(1).equal(cps_fpl.cumulative_classes(prob, eta, strict=False))
        assert torch.equal(target.amax(1) == 1, prob.amax(1) >= eta)


@pytest.mark.parametrize("m, M", [(1, 5), (2, 9), (8, 128), (33, 513), (5, 5), (9, 4)])
def test_aligned_is_the_nearest_with_corners_on_corners(m, M):
    x = torch.arange(M)[None, :, None].expand(1, M, M) * 1000 + torch.arange(M)
    rows = [esl_oracle.near(i, m, M) for i in range(m)]
    assert esl.aligned(x, (m, m))[0].tolist() == [[1000 * r + c for c in rows] for r in rows]


def test_absent_parts_stay_and_anchors_without_keys_or_negatives_do_not_count():
    rep, P = normal(2, 4, 5, 6), normal(4, 3, 4)
    assert torch.equal(esl.update_prototypes(P, torch.zeros(12, 5), 0.9), P)  # bit for bit
    args = SimpleNamespace(parts=3, queue=3, anchors=4, negatives=7, anchor_share=0.3, sigma=0.5)
    bank, ids = F.normalize(normal(37, 4), dim=1), whole(13, 2, 9, 12)
    for full, some in ((range(12), True), ((), False), ((4,), False), ((4, 7), True)):
        pushed = torch.tensor([2 * (r in full) for r in range(12)])
        state = dict(prototypes=P, bank=bank, pushed=pushed)
        loss, count = esl.part_contrast(rep.requires_grad_(), ids, state, args)
        assert (loss.item() > 0) == (count.item() > 0) == some
        (gradient,) = torch.autograd.grad(loss, rep)
        assert gradient.isfinite().all() and bool(gradient.any()) == some


@pytest.mark.parametrize("K, n", [(1, 1), (1, 30), (4, 60), (6, 60), (5, 3)])
def test_kmeans_is_lloyds_loop(K, n):
    x, u = normal(n, 3, seed=2), uniform(K, seed=1)
    found = esl.kmeans(x, K, u).flatten().tolist()
    expected = esl_oracle.kmeans(x.tolist(), K, u.tolist())
    assert found == pytest.approx(sum(expected, []), rel=1e-6, abs=1e-9)
    few = esl.kmeans(x, K, u, steps=2).flatten().tolist()
    expected = esl_oracle.kmeans(x.tolist(), K, u.tolist(), steps=2)
    assert few == pytest.approx(sum(expected, []), rel=1e-6, abs=1e-9)


def test_kmeans_of_few_directions_leaves_zeros_and_an_emptied_cluster_keeps_its_centre(monkeypatch):
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])  # two directions
    assert sorted(esl.kmeans(x, 5, uniform(5)).tolist()) == [[0, 0]] * 3 + [[0, 3], [1.5, 0]]
    assert not esl.kmeans(x[:0], 3, uniform(3)).any()
    assert not esl.kmeans(torch.zeros(4, 2), 2, uniform(2)).any()
    x, u, one_hot, seen = normal(300, 3, seed=1), uniform(6, seed=1), F.one_hot, []

    def emptied(index, count):  # the second step takes all away from the last cluster
        seen.append(1)
        return one_hot(index % 5 if len(seen) == 2 else index, count)

    first = F.normalize(esl.kmeans(x, 6, u, steps=1), dim=1)[5]
    monkeypatch.setattr(F, "one_hot", emptied)
    kept = esl.kmeans(x, 6, u, steps=2)[5]
    assert len(seen) == 2 and kept.norm() == pytest.approx(1.0) and kept @ first > 0.9


class Labelled:
    """A data set whose colour is the feature; class 2 is nowhere."""

    def __init__(self, count=6, scale=1):
        self.labeled, self.num_classes, self.scale = list(range(count)), 3, scale

    def read(self, item, with_label):
        rng = np.random.default_rng(item)
        label = rng.integers(0, 2, (4 + item % 2, 4)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        label[:8, :8] = 255
        image = rng.integers(0, 256, (*label.shape, 3)).astype(np.uint8)
        size = label.shape[1] * self.scale, label.shape[0] * self.scale
        return [Image.fromarray(x).resize(size, Image.Resampling.NEAREST) for x in (image, label)]


def prototypes(patch, data, stride, world=1, seed=0):
    """first_prototypes of each process, one after another, and the pixels that K-means saw."""
    args, seen, whole = SimpleNamespace(seed=seed, parts=2), [], esl.kmeans
    encoder = lambda image: {"encoder": F.avg_pool2d(image.float(), stride)}  # noqa: E731
    sent, found = [[] for _ in range(world)], []
    patch.setattr(esl, "kmeans", lambda x, K, u: seen.append(x) or whole(x, K, u))
    for turn, rank in tuples(2, world):  # first what each would send, then with that of all
        place = itertools.count()

        def gathered(x, turn=turn, rank=rank, place=place):
            if turn == 0:
                sent[rank].append(x.clone())
            i = next(place)
            return torch.stack([s[i] for s in sent]) if turn and x.ndim < 3 else x[None]

        patch.setattr(esl.distributed, "gathered", gathered)
        seen.clear()
        group = Group(rank, world, torch.device("cpu"))
        found.append(esl.first_prototypes(encoder, data, 3, args, group))
    return found[world:], list(seen)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_first_prototypes_do_not_depend_on_the_processes(world, monkeypatch):
    with monkeypatch.context() as patch:
        (one,), pixels = prototypes(patch, Labelled(), 8)
    assert one.shape == (3, 2, 3) and one[:2].any(2).all() and not one[2].any()
    # all cells but one of each image, which is void
    assert len(pixels[0]) + len(pixels[1]) == sum(4 * (4 + i % 2) - 1 for i in range(6))
    with monkeypatch.context() as patch:
        several, _ = prototypes(patch, Labelled(), 8, world)
    assert len(several) == world and all(P.equal(one) for P in several)
    with monkeypatch.context() as patch:
        assert not prototypes(patch, Labelled(), 8, seed=1)[0][0].equal(one)


def test_of_too_many_pixels_those_with_the_lowest_numbers_remain(monkeypatch):
    data = Labelled(4, 3)
    with monkeypatch.context() as patch:
        _, seen = prototypes(patch, data, 1, seed=3)
    for c in range(2):
        pixels = []
        for i in range(4):
            image, label = map(np.array, data.read(i, True))
            u = np.random.default_rng([3, zlib.crc32(b"pixels"), i]).random(label.size)
            rows = image.reshape(-1, 3)
            pixels += [(u[j], tuple(rows[j])) for j in np.flatnonzero(label.ravel() == c)]
        assert len(pixels) > 5_000
        assert seen[c].tolist() == [list(map(float, x)) for _, x in sorted(pixels)[:5_000]]
    assert seen[2].shape == (0, 3)


@pytest.mark.parametrize("C, D", [(19, 2048), (21, 2048), (81, 2048), (11, 512), (2, 2048)])
def test_first_prototypes_stay_within_their_memory(C, D, monkeypatch):
    """The tensor of pixels has at most 1 GiB; here none is made."""
    made, zeros, data = [], torch.zeros, Labelled(0)
    data.num_classes = C
    monkeypatch.setattr(torch, "zeros", lambda *s, **k: made.append(s) or zeros(*s[:1], 1, D))
    monkeypatch.setattr(esl, "kmeans", lambda x, K, u: zeros(K, D))
    group = Group(0, 1, torch.device("cpu"))
    esl.first_prototypes(None, data, D, SimpleNamespace(seed=0, parts=2), group)
    assert made[0][0] == C and made[0][2] == D
    assert 4 * math.prod(made[0]) <= 2**30 and made[0][1] >= 1_600
