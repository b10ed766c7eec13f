"""Losses, weights and schedules at their borders, contrasts, and what is drawn, pasted, pooled,
chosen by the neighbours and kept between steps: by hand, or pixel by pixel.
"""

import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as colours

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import supervised
import u2pl
import unimatch
import unimatch_v2
from common import Refusal, fused
from common.distributed import Group
from oracles import Scripted
from oracles import fpl as fpl_oracle
from oracles.fpl import printed

BELOW_1 = 1 - 2.0**-53  # the largest float64 of a generator's [0, 1)


def normal(*shape, seed=0, spread=1.0):
    rng = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, dtype=torch.float64, generator=rng)


DYADIC = (0.125, 0.5, 0.125, 0.25)  # all sums are exact, in any type


def pixel(*values, dtype=torch.float32):
    """A map of one pixel, (1, C, 1, 1)."""
    return torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)


def test_ohem_keeps_all_pixels_tied_with_the_last_one():
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0, :2] = -2.0  # 16 hard pixels; 32 tied; 16 easy ones
    logits[:, 0, 6:] = 3.0
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    for min_kept, count in ((0, 16), (16, 16), (17, 48), (48, 48), (49, 64)):
        loss = supervised.ohem_cross_entropy(logits.requires_grad_(), label, 0.0, min_kept)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.any(1).sum() == count


def test_ohem_keeps_a_share_of_the_pixels_of_a_crop():
    """U2PL's, CPS's, at least one; the auxiliary head alike, times its weight."""
    label = torch.randint(4, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    logits = normal(2, 4, 16, 16) + 4 * F.one_hot(label, 4).movedim(3, 1)  # few are hard
    for share, crop, count in ((50_000 / 769**2, 32, 87), (5 / 64, 40, 125), (1e-6, 16, 1)):
        args = SimpleNamespace(aux_weight=0.4, ohem_kept=share, crop_size=crop)
        loss = supervised.supervised_loss({"logits": logits}, label, args)
        assert loss == supervised.ohem_cross_entropy(logits, label, 0.7, count)
        both = supervised.supervised_loss({"logits": logits, "aux": 0 * logits}, label, args)
        assert both.item() == pytest.approx(loss.item() + 0.4 * math.log(4), rel=1e-6)


def test_schedules():
    """T&V App. B; U2PL Eq. (7), in stairs: an epoch is 12.5 steps."""
    assert mean_teacher.sigmoid_rampup(0, 0) == 1
    for step, power in ((0, -5), (10, -5 / 4), (20, 0), (30, 0)):
        assert mean_teacher.sigmoid_rampup(step, 20) == pytest.approx(math.exp(power))
    args = SimpleNamespace(alpha_0=0.4, epochs=80, total_iters=1000, dpa=True)
    for step, left in ((0, 80), (12, 80), (13, 79), (25, 78), (500, 40), (999, 1)):
        assert u2pl.unreliable_share(step, args) == pytest.approx(0.4 * left / 80)
    args.dpa = False
    assert u2pl.unreliable_share(999, args) == 0.4


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_strict_decides_where_a_sum_equals_the_bound(dtype):
    p, _ = cps_fpl.by_rank(pixel(*DYADIC, dtype=dtype))  # V = 1/2, 3/4, 7/8, 1
    for T, n in ((0.5, 2), (0.75, 3), (0.875, 4)):
        assert cps_fpl.cumulative_classes(p, T) == n  # strict is the default
        assert cps_fpl.cumulative_classes(p, T, strict=False) == n - 1
        assert cps_fpl.fuzzy_positive_assignment(p, T) == n - 1
        assert cps_fpl.fuzzy_positive_assignment(p, T, strict=False) == max(n - 2, 1)
    short = pixel(0.3, 0.3, 0.2, 0.1, dtype=dtype)  # no sum reaches T: all classes
    assert cps_fpl.cumulative_classes(short, 0.95) == 4


def test_statistics_are_of_every_fourth_pixel_of_both_networks():
    """With T = 0.9 K is 1 and 2; columns in between are of a class that is nowhere else."""
    sure, unsure, between = [0.96, 0.03, 0.01], [0.3, 0.5, 0.2], [0.01, 0.01, 0.98]
    rows = torch.tensor([[sure, *3 * [between], last] for last in (unsure, sure)]).log()
    networks = [row.T[None, :, None] for row in rows]
    args = fpl_oracle.printed(T=0.9)
    weights = fpl_oracle.weight(sure, 1, "concave"), fpl_oracle.weight(unsure, 2, "concave")
    for label, K, weight, right, covered in (
        ([0, 2, 2, 255, 0], 1.25, 0.75 * weights[0] + 0.25 * weights[1], 0.75, 1),
        ([255, 2, 2, 255, 2], 1.5, 0.5 * sum(weights), 0, 0),
        ([255, 2, 2, 255, 255], 0, 0, 0, 0),
    ):
        label = torch.tensor([[label]])
        found = cps_fpl.teacher_statistics(networks, label != 255, 0.0, args)
        assert found == pytest.approx(dict(K=K, K_gt_1=max(K - 1, 0), weight=weight))
        found = cps_fpl.label_statistics(networks, label, 0.0, args)
        assert found == dict(pseudo_acc=right, coverage=covered)


def test_a_k_that_is_given_takes_the_place_of_alg_1():
    """With several T: what one T has chosen is learned as with that T."""
    z, t = normal(2, 2, 2, 5, 6, 6, spread=2.0)
    inside = normal(2, 6, 6) > -1
    one, several = (fpl_oracle.printed(T=T, gamma=0.0) for T in (0.95, (0.4, 0.8)))
    K = [cps_fpl.k_maps(logits, inside, 0.0, one) for logits in t]
    for function, *maps in ((cps_fpl.cross_loss, z, t), (cps_fpl.teacher_statistics, t)):
        given = *map(list, maps), inside, 0.0
        assert function(*given, several, K) == function(*given, one)
    given = z[1], t[0], inside, torch.ones(5), 2
    assert ael_fpl.consistency_loss(*given, several, K[0]) == ael_fpl.consistency_loss(*given, one)
    target = {"logits": t[0], "inside": inside}
    for script in (unimatch, unimatch_v2):
        found = script.consistency(z[1], target | {"K": K[0]}, 9, several)
        assert found == script.consistency(z[1], target, 9, one)


def test_a_batch_of_unlike_processes_has_the_mean_over_its_pixels(monkeypatch):
    """[D16]: 6 pixels inside here and 2 there, of losses that sum to 6 log 2 and 2 log 2."""
    shares = [torch.arange(8).view(1, 2, 4) < count for count in (6, 2)]
    args = printed(unsup_loss="ce")
    for script in (unimatch, unimatch_v2):
        counted = lambda x: torch.tensor([8])  # noqa: E731 - of both
        monkeypatch.setattr(script.distributed, "reduced", counted)
        losses = []
        for inside in shares:
            target = {"inside": inside, "pseudo": inside.long(), "conf": inside + 0.5}
            (count,) = script.inside_counts([target], SimpleNamespace(world=2))
            assert count == 4  # of an average process
            losses.append(script.consistency(torch.zeros(1, 2, 2, 4), target, count, args))
        assert sum(losses) / 2 == pytest.approx(math.log(2))


def test_the_average_of_certain_networks_is_finite_and_the_surer_one_decides():
    """The average has x's size, or with upsampled=False that of network 1's logits."""
    z = torch.full((1, 4, 1, 2), -1e4)
    z[0, 1, 0, 0] = 1e4
    z[0, 2, 0, 1] = 2e4
    average = cps_fpl.Average([Given(z), Given(z)])
    x = torch.zeros(1, 3, 4, 7)
    log_p = average(x, upsampled=False)["logits"]
    torch.testing.assert_close(log_p, z.log_softmax(1))  # finite
    assert log_p.sum(3).argmax(1) == 2
    assert torch.equal(average(x)["logits"], cps_fpl.upsample(log_p, (4, 7)))
    other = cps_fpl.Average([Given(z), Given(z[..., :1])])  # whose backbone rounds down
    p = (z.softmax(1) + z[..., :1].softmax(1)) / 2
    torch.testing.assert_close(other(x, upsampled=False)["logits"].exp(), p)


class Given(torch.nn.Module):
    """A network that has the logits given, at its stride."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x, upsampled=True):
        return {"logits": cps_fpl.upsample(self.logits, x.shape[2:] if upsampled else None)}


@pytest.mark.smoke
@pytest.mark.parametrize(
    "draw, size, shares, box",
    [  # top, left, height and width
        (ael_fpl.half_area_box, 6, (0, 0, 0), (0, 0, 6, 3)),
        (ael_fpl.half_area_box, 6, (BELOW_1, BELOW_1, BELOW_1), (3, 0, 3, 6)),
        (ael_fpl.half_area_box, 129, (0.5, 0.25, 0.75), (9, 29, 91, 91)),
        (mean_teacher.cutmix_box, 6, (0, 0, 0), (0, 0, 4, 4)),
        (mean_teacher.cutmix_box, 6, (BELOW_1, BELOW_1, BELOW_1), (2, 1, 4, 5)),
        (mean_teacher.cutmix_box, 129, (0.5, 0.25, 0.75), (11, 24, 86, 97)),
    ],
)
def test_boxes_of_half_a_crop(draw, size, shares, box):
    """AEL: the height is log-uniform; else the width is uniform, above half the side [D13]."""
    assert draw(Scripted(*shares), size) == box


@pytest.mark.smoke
def test_three_boxes_toggle_what_they_cover():
    """[D17]: a share of the area from 1/4 to 1/2, log-uniform height, place; a third is a box's."""
    script = Scripted(*[0] * 4, *[BELOW_1] * 4, 0.5, 0.5, 0.25, 0.0)
    expected = torch.zeros(1, 100, 100, dtype=torch.bool)
    for top, left, height, width in ((0, 0, 58, 14), (71, 42, 29, 58), (16, 0, 35, 35)):
        expected[:, top : top + height, left : left + width] ^= True
    assert torch.equal(cps_fpl.toggled_mask(script, 100), expected) and not script.shares


def test_a_component_must_be_larger_than_the_area_and_may_touch_at_corners():
    """[D23]: a cell is 4x4 pixels, the last one ends with the crop; components equally likely."""
    seen = np.zeros((8, 8), np.uint8)
    seen[1:3, 2:6] = seen[5, 5:7] = 7  # 8 cells and 2, of 64
    seen[7, 7] = 255
    large, small = (4, 8, 8, 16), (20, 20, 4, 8)
    for c, area, share, box in (
        *((7, 8 / 64, 0.0, None), (7, 7 / 64, BELOW_1, large), (7, 2 / 64, BELOW_1, large)),
        *((7, 1 / 64, 0.49, large), (7, 1 / 64, 0.5, small)),
        *((0, 52 / 64, 0.0, (0, 0, 32, 32)), (0, 53 / 64, 0.0, None), (3, 0.0, 0.0, None)),
    ):
        assert ael_fpl.component_box(seen, c, area, 32, Scripted(share)) == box
    for eye in (np.eye(4), np.eye(4)[::-1]):
        found = ael_fpl.component_box(eye.astype(np.uint8), 1, 3 / 16, 13, Scripted(0.0))
        assert found == (0, 0, 13, 13)
    # a class is present if it covers the area: 10 cells
    for area, expected in ((0.0, True), (10 / 64, True), (11 / 64, False)):
        assert ael_fpl.presence(torch.from_numpy(seen)[None], 8, area)[0, 7] == expected


def test_pixels_of_drawn_classes_cover_the_chosen_images():
    label = torch.tensor([[[0, 1], [2, 255]]]).repeat(3, 1, 1)
    yes = torch.ones(3, 2, 2, dtype=torch.bool)
    base = {"image": torch.zeros(3, 1, 2, 2), "label": 0 * label + 9, "inside": ~yes}
    source = {"image": torch.ones(3, 1, 2, 2), "label": label, "inside": yes}
    drawn = torch.tensor([[0, 2], [1, 1], [0, 2]])
    found = ael_fpl.copy_paste(base, source, drawn, torch.tensor([True, True, False]))
    expected = [[[0, 9], [2, 9]], [[9, 1], [9, 9]], [[9, 9], [9, 9]]]
    assert found["label"].tolist() == expected
    assert torch.equal(found["inside"], found["label"] < 9)
    assert torch.equal(found["image"][:, 0], found["inside"].float())


def test_the_confidence_of_a_class_and_its_moving_mean():
    """Eq. (4), [D21], [D22]; Eq. (7). No pixel is of class 2."""
    p = torch.tensor([[0.2, 0.4, 0.6], [0.1, 0.3, 0.5], [0.9, 0.9, 0.9], [0.8, 0.6, 0.4]]).double()
    prob = torch.stack([p, 1 - p, 0 * p], 1)[:, :, None]
    label = torch.tensor([[0, 0, 1], [0, 255, 255], [1, 1, 255], [1, 255, 255]])[:, None]
    for pooled, sums, counts in (
        (1, (0.3 + 0.1, 0.4 + 0.1 + 0.2, 0), (2, 3, 0)),
        (2, (0.7 / 3, 0.4 + 0.4 / 3, 0), (1, 2, 0)),
    ):
        for skip_absent, groups in ((True, counts), (False, (4 / pooled,) * 3)):
            found = ael_fpl.class_confidence(prob, label, pooled, skip_absent)
            assert torch.allclose(found, torch.tensor([sums, groups]).double())
    found = torch.tensor([[0.4, 0.7, 0.0], [2, 4, 0]])
    new = ael_fpl.update_confidence(torch.full((3,), 0.5), found, 0.9)
    assert new.tolist() == pytest.approx([0.45 + 0.02, 0.45 + 0.0175, 0.5])


def test_sampling_probabilities_and_rates_of_classes():
    """Eq. (9), and Sec. 3.3; a bank that a rounding has put above 1 counts as 1."""
    gap = torch.tensor([1.0, 2.0, 4.0, 1.0], dtype=torch.float64).log()
    p = ael_fpl.sampling_probability(1 - gap)
    assert p.tolist() == pytest.approx([1 / 8, 2 / 8, 4 / 8, 1 / 8])
    p = ael_fpl.sampling_probability(1 - gap, torch.tensor([True, False, True, True]))
    assert p.tolist() == pytest.approx([1 / 6, 0, 4 / 6, 1 / 6])
    p = ael_fpl.sampling_probability(1 - gap, None, 2.0)
    assert torch.allclose(p, gap.square().softmax(0))
    bank = torch.tensor([0.5, 0.75, 1, 1 + 1e-6])
    assert ael_fpl.sampling_probability(bank, None, 0.5).isfinite().all()
    assert ael_fpl.equalization_rate(bank).tolist() == [1, 0.5, 0, 0]
    assert ael_fpl.equalization_rate(bank, 2.0).tolist() == [1, 0.25, 0, 0]
    assert not ael_fpl.equalization_rate(torch.ones(5), 0.5).any()  # no NaN


@pytest.mark.parametrize("scale, dtype", [(1, torch.float32), (8, torch.float64)])
def test_draws_at_the_steps_of_the_running_sum(scale, dtype):
    p = scale * torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0, 0.0], dtype=dtype)  # dyadic
    u = [[0.0, 0.25 - 2.0**-54, 0.25], [0.5 - 2.0**-54, 0.5, BELOW_1]]
    found = ael_fpl.draw_classes(p, torch.tensor(u, dtype=torch.float64))
    assert found.tolist() == [[1, 1, 3], [3, 4, 4]]


def test_partners_are_a_class_by_eq_9_and_an_image_that_shows_it():
    """Classes are drawn with 1/4, 1/2 and 1/4; nothing shows class 0: any image."""
    bank = 1 - torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64).log()
    present = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 1]]).bool()
    script = Scripted(0.2, 0.3, 0.7, 0.8, 0.6, 0.4, 0.5, BELOW_1)
    found = ael_fpl.draw_partners(bank, present, 4, script)
    assert found.tolist() == [[0, 2], [1, 1], [1, 3], [2, 3]]
    with pytest.raises(Refusal, match="no unlabelled images"):
        ael_fpl.draw_partners(bank, present[:, :0], 4, Scripted())


def test_candidates_have_more_entropy_than_gamma_or_less_than_the_lower_limit():
    """Eq. (5), (6), (8), (11), (15), Table 4; equal to a limit is neither.

    gamma is numpy's percentile of what is inside [D20].
    """
    assert u2pl.entropy(pixel(0.2, 0.3, 0.5, 0.0)).item() == pytest.approx(1.0296530)
    H = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    inside = H < 0.4
    for which, expected in {"unreliable": [2], "reliable": [0], "all": [0, 1, 2]}.items():
        found = u2pl.candidates(H, inside, H[0, 0, 1], H[0, 0, 1], which)
        assert found.flatten().nonzero().flatten().tolist() == expected
    label = u2pl.reliable_labels(torch.tensor([[[3, 4, 5, 6]]]), H, H[0, 0, 2])
    assert label.tolist() == [[[3, 4, 255, 255]]]
    assert u2pl.unsup_weight(label, inside, 2.5) == 3.75
    assert u2pl.unsup_weight(label.fill_(255), inside, 2.5) == 7.5  # no label: as of one
    assert u2pl.quantiles(H, inside & False, 0.8).tolist() == [math.inf]  # lets nothing through
    shares = 0.0, 0.2, 0.5, 0.8, 1.0
    H, inside = normal(2, 9, 7).abs(), normal(2, 9, 7, seed=1) > 0
    found = u2pl.quantiles(H.masked_fill(~inside, torch.nan), inside, *shares)
    expected = np.percentile(H[inside].numpy(), [100 * q for q in shares])
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_anchors_and_negatives():
    """U2PL Eq. (9) to (16), pixel by pixel; of 60 the first half is labelled."""
    prob = normal(60, 6).round().softmax(1)  # of equal classes the lowest is the likelier one
    label = torch.randint(7, (60,), generator=torch.Generator().manual_seed(0))
    label[label == 6] = 255
    candidate = normal(30, seed=1) > 0
    delta_p = prob.median()  # an anchor has more
    A_c = u2pl.anchor_masks(prob, label, delta_p)
    N_c = u2pl.negative_masks(u2pl.class_ranks(prob), label, candidate, 2, 5)
    for c, i in np.ndindex(6, 60):
        rank = sorted(range(6), key=lambda k: -prob[i, k].item()).index(c)
        negative = label[i].item() not in (c, 255) and rank < 2
        if i >= 30:
            negative = candidate[i - 30] and 2 <= rank < 5
        assert N_c[c, i] == negative
        assert A_c[c, i] == (label[i] == c and prob[i, c] > delta_p)


@pytest.mark.parametrize("of", [u2pl, fused])
def test_pixels_are_drawn_one_of_each_arc(of):
    """U2PL [D25]: of ten in a circle that begins at 2, arcs of 3, 3 and 4; or all of two."""
    u = torch.tensor([0.25, 0.0, 0.5, BELOW_1], dtype=torch.float64)
    assert u2pl.draw(torch.arange(10), 3, u).tolist() == [2, 6, 1]
    rep = normal(10, 4)
    drawn = [[2, 6, 1], [3, 7], []]
    masks = torch.zeros(3, 10, dtype=torch.bool)
    masks[0] = masks[1, 3] = masks[1, 7] = True
    for found, pixels in zip(of.draw_features(rep, masks, u.expand(3, 4)), drawn, strict=True):
        assert found[:, -1].tolist() == [1] * len(pixels) + [0] * (3 - len(pixels))
        assert torch.allclose(found[: len(pixels), :-1], F.normalize(rep[pixels], dim=1))


@pytest.mark.parametrize("of", [u2pl, fused])
def test_features_wait_in_rings(of):
    """U2PL Alg. 1: a new one takes the oldest one's place. 9 is none; a ring of 2 is offered 3."""
    bank, pushed, sizes = torch.zeros(6, 2), torch.zeros(2, dtype=torch.int64), [3, 2]
    for values in ([[1, 9, 2], [4, 5, 6]], [[3, 7, 9], [9, 8, 9]]):
        offered = torch.tensor(values, dtype=torch.float32)
        offered = torch.stack([offered, -offered, (offered < 9).float()], 2)
        of.push_features(bank, pushed, torch.tensor(sizes), offered)
    assert bank[:, 0].tolist() == [7, 2, 3, 6, 8, 0] and pushed.tolist() == [4, 4]
    assert torch.equal(bank[:, 1], -bank[:, 0])


def contrastive(z, positive, negatives, tau):
    """U2PL Eq. (4), ESL Eq. (10): -log of the positive's share of all keys, by cosines."""
    scores = torch.stack([F.cosine_similarity(z, key, 0) for key in (positive, *negatives)])
    return -(scores / tau).log_softmax(0)[0]


def same_contrast(loss_of, rep_s, expected):
    """Value and gradient; in half precision as in float32, however long the features are."""
    value = loss_of(rep_s)
    found, wanted = (torch.autograd.grad(x, rep_s)[0] for x in (value, expected))
    assert value.item() == pytest.approx(expected.item()) and torch.allclose(found, wanted)
    low = 1e4 * rep_s.detach().bfloat16()
    assert loss_of(low).dtype == torch.float32 and torch.equal(loss_of(low), loss_of(low.float()))


@pytest.mark.smoke
@pytest.mark.parametrize("of", [u2pl, fused])
@pytest.mark.parametrize("kind, N", [("contrastive", 2), ("contrastive", 600), ("binary", 2)])
def test_contrast_with_unreliable_pixels(of, kind, N):
    """U2PL Eq. (4), (A1), (12): the mean over the classes with an anchor and a key [D26]."""
    rep_s, rep_t = (normal(12, 5, seed=seed).requires_grad_() for seed in (0, 1))
    masks = torch.zeros(4, 12, dtype=torch.bool)
    masks[0, :5] = masks[1, 6] = masks[3, 7:] = True
    sizes, pushed = torch.tensor([3, 2, 2, 4]), torch.tensor([5, 0, 2, 3])
    bank = F.normalize(normal(12, 5, seed=2), dim=1)
    M = 3
    u = torch.rand(4, M + M * N, dtype=torch.float64)
    u[:, M - 1] = u[:, -1] = BELOW_1
    args = SimpleNamespace(anchors=M, negatives=N, unreliable_loss=kind, tau=0.3)
    losses = []
    for c, keys in ((0, bank[:3]), (3, bank[7:10])):  # class 1 has no key, class 2 no anchor
        own = masks[c].nonzero()[:, 0]
        for m in range(M):
            z = rep_s[own[int(u[c, m] * len(own))]]
            drawn = keys[(3 * u[c, M + m * N :][:N]).long()]
            for negatives in [drawn] if kind == "contrastive" else drawn[:, None]:
                losses.append(contrastive(z, rep_t[own].mean(0), negatives, 0.3))

    def loss_of(x, masks=masks):
        t, keys = (y.to(u2pl.upcast(x).dtype) for y in (rep_t, bank))
        return of.unreliable_loss(x, t, masks, keys, pushed, sizes, u, args)

    same_contrast(lambda x: loss_of(x)[0], rep_s, sum(losses) / len(losses))
    value, counted = loss_of(rep_s)
    assert counted.tolist() == [True, False, False, True]
    assert torch.autograd.grad(value, rep_t, allow_unused=True) == (None,)
    nothing, counted = loss_of(rep_s, masks & False)
    assert nothing == 0 and not counted.any() and not torch.autograd.grad(nothing, rep_s)[0].any()


def test_parts_and_prototypes():
    """ESL Eq. (7), (8), (12), pixel by pixel; class 0 has no prototype yet: its first part."""
    E, P = normal(2, 4, 3, 5).float(), normal(3, 2, 4, seed=1).float()
    P[0] = 0.0
    label = torch.randint(4, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    label[label > 1] = 255  # nothing is of class 2
    ids = esl.part_ids(E, P, label)
    for b, y, x in np.ndindex(2, 3, 5):
        expected = 6
        if label[b, y, x] != 255:
            cosines = F.cosine_similarity(P[label[b, y, x]], E[b, :, y, x][None])
            expected = 2 * label[b, y, x] + cosines.argmax()
        assert ids[b, y, x] == expected
    of_one_pixel = torch.tensor([[3.0, 1.0]])
    assert esl.update_prototypes(torch.zeros(1, 1, 1), of_one_pixel, 0.5).item() == 1.5
    sums = esl.part_sums(E, ids, 6)
    new = esl.update_prototypes(P, sums.sum(0), 0.9).flatten(0, 1)
    for r, old in enumerate(P.flatten(0, 1)):
        mask = ids == r
        expected = torch.cat([(E * mask[:, None]).sum((2, 3)), mask.sum((1, 2))[:, None]], 1)
        assert torch.allclose(sums[:, r], expected, atol=1e-6)
        features = E.movedim(1, -1)[mask]
        expected = 0.9 * old + 0.1 * features.mean(0) if len(features) else old
        assert torch.allclose(new[r], expected, atol=1e-6)


@pytest.mark.parametrize("of", [esl, fused])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_contrast_with_parts(of, share):
    """ESL Eq. (9), (10): the mean over a class's anchors, then over all classes [D19], [D20]."""
    rep_s, bank = normal(30, 5).requires_grad_(), F.normalize(normal(19, 5, seed=1), dim=1)
    ids = torch.randint(7, (30,), generator=torch.Generator().manual_seed(0))  # 6: no candidate
    pushed = torch.tensor([5, 0, 1, 2, 0, 0])  # no key of class 2
    rows = [3 * part + i for part in range(6) for i in range(min(pushed[part], 3))]
    args = SimpleNamespace(parts=2, queue=3, anchors=4, negatives=5, anchor_share=share, sigma=0.3)
    u, v = torch.rand(3, 5, dtype=torch.float64), torch.rand(3, 4, 6, dtype=torch.float64)
    total, number = 0 * rep_s.sum(), 0
    for c in range(3):
        own = (ids // 2 == c).nonzero()[:, 0]
        count = min(math.ceil(share * len(own)), 4)
        losses = []
        for i, chances in zip(esl.draw(own, count, u[c]), v[c], strict=False):
            positives = [row for row in rows if row // 3 == ids[i]]
            negatives = [row for row in rows if row // 3 != ids[i]]
            if positives:
                key = bank[positives[int(chances[0] * len(positives))]]
                drawn = [bank[negatives[int(x * len(negatives))]] for x in chances[1:]]
                losses.append(contrastive(rep_s[i], key, drawn, 0.3))
        total = total + sum(losses) / max(len(losses), 1) / 3
        number += len(losses)

    def loss_of(x, pushed=pushed):
        return of.part_contrast(x, ids, bank.to(esl.upcast(x).dtype), pushed, u, v, args)

    same_contrast(lambda x: loss_of(x)[0], rep_s, total)
    assert loss_of(rep_s)[1] == number
    # without a negative there is no anchor
    assert [x.item() for x in loss_of(rep_s, pushed * (pushed > 2))] == [0, 0]


@pytest.mark.parametrize("m, M", [(1, 5), (2, 9), (8, 128), (33, 513), (129, 513), (5, 5), (9, 4)])
def test_pixels_of_a_smaller_map(m, M):
    """U2PL [D21]: row floor(i M / m). ESL [D24]: corners on corners, the nearest, halves go up."""
    x = torch.arange(2 * M * (M + 2)).view(2, M, M + 2)
    for resized, place in (
        (u2pl.nearest, lambda i, m, M: i * M // m),
        (esl.aligned, lambda i, m, M: math.floor(i * (M - 1) / max(m - 1, 1) + 0.5)),
    ):
        rows = [place(i, m, M) for i in range(m)]
        columns = [place(i, m + 1, M + 2) for i in range(m + 1)]
        found = resized(x, (m, m + 1)).view(2, m, m + 1)  # U2PL: in the order of labels
        assert torch.equal(found, x[:, rows][:, :, columns])
    if m <= M:  # ESL: up and down again unchanged
        assert torch.equal(esl.aligned(esl.aligned(found, (M, M + 2)), (m, m + 1)), found)


def test_soft_labels_at_their_borders():
    """A sum that reaches eta is enough. What is not a number is one in the label too."""
    args = SimpleNamespace(label="dynamic", eta=0.5, top_k=2)
    assert esl.soft_label(pixel(0.5, 0.25, 0.25), args).flatten().tolist() == [1, 0, 0]
    for args.label in ("dynamic", "topk"):
        assert esl.soft_label(pixel(math.nan, math.nan, math.nan), args).isnan().all()


def test_kmeans_by_hand():
    """[D22]: k-means++ by u, Lloyd's steps of directions, raw means at last; zeros for no part."""
    ends = lambda K: torch.linspace(0, BELOW_1, K, dtype=torch.float64)  # noqa: E731
    # the second of three directions, then the third; the first is as near to both: the lowest
    found = esl.kmeans(torch.eye(3).double(), 2, torch.tensor([0.5, 0.75]), steps=1)
    assert found.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    here, there = (torch.tensor(x) + 0.3 * normal(20, 3) for x in ([1.0, 2, 2], [-4.0, 0, 1]))
    found = esl.kmeans(torch.cat([here, there]), 2, ends(2))
    assert torch.allclose(found, torch.stack([here.mean(0), there.mean(0)]), rtol=1e-9)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])  # two directions
    assert sorted(esl.kmeans(x, 5, ends(5)).tolist()) == [[0, 0]] * 3 + [[0, 3], [1.5, 0]]
    assert not esl.kmeans(x[:0], 3, ends(3)).any()


def test_first_prototypes_are_of_the_pixels_with_the_lowest_numbers(monkeypatch):
    """[D22]: 5,000 of each class, by numbers of the seed and the image; class 2 is nowhere."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, 130, 120), generator=rng).byte()
    labels[labels == 2] = 255
    images = torch.randint(256, (2, 130, 120, 3), generator=rng).byte()

    data = SimpleNamespace(labeled=[0, 1], num_classes=3)
    data.read = lambda i, _: [Image.fromarray(x[i].numpy()) for x in (images, labels)]
    monkeypatch.setattr(esl, "kmeans", lambda x, *_: F.pad(x, (0, 0, 0, 5_000 - len(x)), value=-1))

    def prototypes(rank, world):
        net, args = lambda x: {"encoder": x.float()}, SimpleNamespace(seed=3, parts=2)
        return esl.first_prototypes(net, data, 3, args, Group(rank, world, torch.device("cpu")))

    found = prototypes(0, 1)
    numbers = [np.random.default_rng([3, zlib.crc32(b"pixels"), i]) for i in range(2)]
    order = torch.from_numpy(np.concatenate([rng.random(130 * 120) for rng in numbers])).argsort()
    for c in range(2):
        own = order[labels.flatten()[order] == c]
        assert torch.equal(found[c], images.flatten(0, 2)[own[:5_000]])
    assert (found[2] == -1).all()  # of no pixel
    second = []  # of two processes: what it hands over
    gathered = "common.distributed.gathered"
    monkeypatch.setattr(gathered, lambda x: (second.insert(0, x), x[None])[1])
    prototypes(1, 2)
    monkeypatch.setattr(gathered, lambda x: torch.stack([x, second.pop()]))
    assert torch.equal(prototypes(0, 2), found) and not second


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


def test_statistics_of_unimatch():
    """Two pixels of two classes, or the first alone; T 0.9: K is 1 and 2."""
    prob = torch.tensor([[0.96, 0.03, 0.01], [0.3, 0.5, 0.2]], dtype=torch.float64)
    logits = prob.log().T.repeat_interleave(4, 1).view(1, 3, 1, 8)  # of which every fourth counts
    inside, args = torch.ones(1, 1, 8, dtype=torch.bool), printed(T=0.9)
    first = torch.arange(8).view(1, 1, 8) < 4
    each = [fpl_oracle.weight(p, K, "concave") for p, K in zip(prob.tolist(), (1, 2), strict=True)]
    means = dict(commonest=0.5, confident=0.5, K=1.5, K_gt_1=0.5)
    means["weight"] = pytest.approx(sum(each) / 2)
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
        image = torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
        cut, whole = (colours.gaussian_blur(image, n, deviation) for n in (side, 63))
        assert (cut.int() - whole.int()).abs().max() <= 1


def test_strong_views_are_torchvisions_of_uint8():
    """Of (seed, name, sample number); here of the second of two processes."""
    args = SimpleNamespace(seed=3, batch_size_unlabeled=16, crop_size=40)
    weak = torch.randint(0, 256, (8, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    weak = F.avg_pool2d(weak.float(), 5, 1, 2).byte()
    found, masks = unimatch.strong_views(weak, "view0", 7, args, Group(1, 2, torch.device("cpu")))
    assert found.dtype == torch.uint8 and masks.any() and not masks.all()
    for i, image in enumerate(weak):
        rng = np.random.default_rng([3, zlib.crc32(b"view0"), 120 + i])
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
        first, second = unimatch_v2.complementary_masks(images, 1000, whole, "cpu")
        assert first.shape == (images, 1000, 1, 1) and torch.equal(first + second, 0 * first + 2)
        alike = (first == 1).flatten(1)
        assert (alike.all(1) | ~alike.any(1)).all() and alike.all(1).sum() == kept
        dropped = first[~alike.all(1)]
        assert ((dropped == 0) | (dropped == 2)).all()
        assert kept == images or 0.4 < (dropped == 2).float().mean() < 0.6
