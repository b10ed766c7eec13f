"""unimatch.py: strong views, boxes, losses against the oracle, the head, a step written out."""

import itertools
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as colours

import predict
import recorder
import tiny
import unimatch
from common import Refusal, distributed
from common.distributed import Group
from common.flags import fill, parse
from oracles import fpl as fpl_oracle
from oracles import unimatch as oracle

ALONE = Group(0, 1, torch.device("cpu"))


def flags(**changes):
    """The flags that the losses read."""
    values = dict(unsup_loss="ce", threshold=0.3, T=(0.9037,), views=2, feature_perturbation=True)
    return fpl_oracle.printed(**values | changes)


def images(x):
    """(B, C, H, W) or (B, H, W) as a list of images, each a list of pixels."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(1, 2).tolist()


def drawn(classes, kind, seed=0, dtype=torch.float64):
    """Logits of a student and a teacher (3, C, 5, 6), and inside; the last image has nothing."""
    rng = torch.Generator().manual_seed(seed)
    z, t = torch.randn(2, 3, classes, 5, 6, generator=rng, dtype=torch.float64)
    t = {"random": 2 * t, "tied": t.round().clamp(-1, 1), "sure": 1000 * t, "flat": 0 * t}[kind]
    inside = torch.rand(3, 5, 6, generator=rng) < torch.tensor([0.7, 1.0, 0.0]).view(3, 1, 1)
    return (2 * z).to(dtype), t.to(dtype), inside


# ---- losses ----

RELEASED = dict(k_max=3, strict=False, mean_over="positives_and_next")
LOSSES = [dict(threshold=tau) for tau in (0.0, 0.3, 0.95)]
LOSSES += [dict(unsup_loss="fpl", **more) for more in ({}, RELEASED, dict(T=(0.6037,)))]
LOSSES += [dict(unsup_loss="fpl", weight=kind, fused="on") for kind in ("linear", "none")]


@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_consistency_is_the_oracles_and_sees_what_it_should(changes):
    """Value and gradient; nothing outside, none to the teacher, in float32 whatever comes in."""
    args = flags(**changes)

    def found(z, t, inside, pixels=17.0):
        z = z.detach().requires_grad_()
        loss = unimatch.consistency(z, unimatch.lesson(t, inside, args), pixels, args)
        return loss, torch.autograd.grad(loss, z)[0]

    kinds = ("random", "tied", "sure", "flat")
    for classes, kind, dtype in itertools.product((2, 5, 21), kinds, (torch.float64, torch.float)):
        z, t, inside = drawn(classes, kind, classes, dtype)
        loss, gradient = found(z, t, inside)
        value, slopes = oracle.consistency(*map(images, (z, t, inside)), 17.0, args)
        near = dict(rel=1e-9, abs=3e-9) if dtype == torch.float64 else dict(rel=1e-5, abs=5e-6)
        assert loss.item() == pytest.approx(value, **near)
        slopes = [number for image in slopes for slope in image for number in slope]
        assert gradient.movedim(1, -1).flatten().tolist() == pytest.approx(slopes, **near)
        outside = ~inside[:, None]
        again = found(torch.where(outside, -z, z), torch.where(outside, -t, t), inside)
        assert torch.equal(again[0], loss) and not gradient[outside.expand_as(z)].any()
    assert found(z, t, inside & False)[0] == 0
    if args.unsup_loss == "ce":  # a confidence at the threshold counts
        taught = unimatch.lesson(t, inside, args)
        taught["conf"] = torch.full_like(taught["conf"], args.threshold)
        assert (unimatch.pixel_loss(z, taught, args) > 0).all()
    t.requires_grad_()
    assert not any(x.requires_grad for x in unimatch.lesson(t, inside, args).values())
    for low in (torch.bfloat16, torch.float16):
        z, t = (x.to(low) for x in drawn(19, "random", 1)[:2])
        loss, _ = found(z, t, inside)
        assert loss.dtype == torch.float32 and loss == found(z.float(), t.float(), inside)[0]


@pytest.mark.parametrize("kind", ["random", "tied", "flat"])
def test_several_T_choose_K_by_the_neighbours(kind):
    for classes, seed in ((3, 0), (11, 1), (11, 2)):
        _, t, inside = drawn(classes, kind, seed)
        args = flags(unsup_loss="fpl", T=(0.4437, 0.6437, 0.8937, 0.9837), k_max=4)
        smooth = F.avg_pool2d(t, 3, 1, 1)  # so that neighbours agree somewhere
        taught = unimatch.lesson(smooth, inside, args)
        p = smooth.softmax(1).movedim(1, -1).tolist()
        rows = zip(p, inside.tolist(), strict=True)
        assert taught["K"].tolist() == [fpl_oracle.adaptive_positives(*row, args) for row in rows]
        assert kind != "random" or classes < 5 or taught["K"].unique().numel() > 1


def test_statistics():
    """Two pixels, the second one void in the end; T 0.9: K is 1 and 2."""
    prob = torch.tensor([[0.96, 0.03, 0.01], [0.5, 0.3, 0.2]], dtype=torch.float64)
    logits = prob.log().T.repeat_interleave(4, 1).view(1, 3, 1, 8)  # of which every fourth counts
    inside, args = torch.ones(1, 1, 8, dtype=torch.bool), flags(T=(0.9,))
    found = unimatch.statistics(logits, inside, args)
    weight = unimatch.adaptive_weight(prob.T[None, :, None], torch.tensor([[[1, 2]]])).mean()
    assert found == dict(confident=0.5, K=1.5, K_gt_1=0.5, weight=pytest.approx(weight.item()))
    truth = torch.tensor([0, 1]).repeat_interleave(4).view(1, 1, 8)
    found = unimatch.statistics(logits, inside, args, truth)
    assert found == dict(pseudo_acc=0.5, unsure_acc=0, coverage=1)
    found = unimatch.statistics(logits, inside & (truth == 0), args, truth)
    assert found == dict(pseudo_acc=1, unsure_acc=0, coverage=1)


def test_a_mean_is_that_of_the_whole_batch(monkeypatch):
    """Averaged over two processes of 5 and 9 pixels inside the sums count as over 14."""
    views = [{"inside": torch.arange(30) < n} for n in (5, 9, 0)]
    assert unimatch.shared_pixels(views, ALONE).tolist() == [5, 9, 1]
    monkeypatch.setattr(distributed, "reduced", lambda x: x + torch.tensor([9, 5, 0]))
    assert unimatch.shared_pixels(views, ALONE._replace(world=2)).tolist() == [7, 7, 0.5]


# ---- what is drawn ----


def test_boxes_have_the_released_odds_areas_and_ratios():
    """Half are none; areas and ratios fill their bounds, 0.73 are taller than wide [D23]."""
    rng = np.random.default_rng(0)
    boxes = np.array([unimatch.drawn_box(rng, 1000) for _ in range(4000)])
    some = boxes[boxes[:, 2] > 0]
    assert 0.47 < len(some) / 4000 < 0.53 and (some[:, :2] + some[:, 2:] <= 1000).all()
    areas, ratios = some[:, 2] * some[:, 3] / 1e6, some[:, 2] / some[:, 3]
    for values, low, high in ((areas, 0.02, 0.4), (ratios, 0.3, 1 / 0.3)):
        assert 0.98 * low <= values.min() < 1.2 * low and 0.9 * high < values.max() <= 1.02 * high
    assert 0.7 < (ratios > 1).mean() < 0.76 and 0.19 < areas.mean() < 0.21
    assert abs(some[:, 0].mean() + some[:, 2].mean() / 2 - 500) < 15  # anywhere, evenly


def test_operations_have_the_released_odds_ranges_and_orders():
    rng, seen, orders = np.random.default_rng(0), {}, set()
    for _ in range(4000):
        found = unimatch.drawn_operations(rng, 64)
        orders.add(tuple(name for name, *_ in found if name.startswith("adjust")))
        rest = [name for name, *_ in found if not name.startswith("adjust")]
        assert found[len(found) - len(rest) :] == [row for row in found if row[0] in rest]
        assert rest == sorted(set(rest), reverse=True)  # grey before blur
        for name, *some in found:
            seen.setdefault(name, []).append(some[-1])
            assert name != "gaussian_blur" or some[0] == 2 * int(np.ceil(4 * some[1])) + 1
    assert len(orders) == 25  # 24, and none
    ends = {f"adjust_{name}": (0.8, 0.5, 1.5) for name in ("brightness", "contrast", "saturation")}
    ends |= {"rgb_to_grayscale": (0.2, 3, 3), "gaussian_blur": (0.5, 0.1, 2)}
    ends["adjust_hue"] = (0.8, -0.25, 0.25)
    assert seen.keys() == ends.keys()
    for name, (odds, low, high) in ends.items():
        assert abs(len(seen[name]) / 4000 - odds) < 0.03, name
        assert low <= min(seen[name]) < low + 0.01 and high - 0.01 < max(seen[name]) <= high


def test_strong_views_are_torchvisions_of_uint8_and_do_not_depend_on_processes():
    """Of (seed, name, sample number); blur is the whole Gaussian but for rounding."""
    args = SimpleNamespace(seed=3, batch_size_unlabeled=8, crop_size=40)
    weak = torch.randint(0, 256, (8, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    weak = F.avg_pool2d(weak.float(), 5, 1, 2).byte()
    found, masks = unimatch.strong_views(weak, "view0", 7, args, ALONE)
    assert found.dtype == torch.uint8 and masks.any() and not masks.all()
    for rank in (0, 1):
        own = slice(4 * rank, 4 * rank + 4)
        part = unimatch.strong_views(weak[own], "view0", 7, args, ALONE._replace(rank=rank))
        assert torch.equal(part[0], found[own]) and torch.equal(part[1], masks[own])
    for i, image in enumerate(weak):
        rng = np.random.default_rng([3, unimatch.zlib.crc32(b"view0"), 56 + i])
        for name, *numbers in unimatch.drawn_operations(rng, 40):
            image = getattr(colours, name)(image, *numbers)
        top, left, height, width = unimatch.drawn_box(rng, 40)
        assert torch.equal(image, found[i]) and masks[i].sum() == height * width
        assert masks[i, 0, top : top + height, left : left + width].all()
    assert not torch.equal(unimatch.strong_views(weak, "view1", 7, args, ALONE)[0], found)
    for deviation in (0.1, 0.3, 1.0, 2.0):
        side = 2 * int(np.ceil(4 * deviation)) + 1
        blurred = unimatch.strong_view(weak[0], [("gaussian_blur", side, deviation)]).int()
        whole = colours.gaussian_blur(weak[0], [33, 33], [deviation, deviation]).int()
        assert (blurred - whole).abs().max() <= 1


# ---- network ----


def test_the_head_decodes_the_last_images_once_more_with_channels_dropped(monkeypatch):
    """A channel of an image is 0 or doubled; clean ones are as without it."""
    features = torch.randn(5, 400, 3, 3)
    ratio = unimatch.feature_perturbation(features) / features
    assert ((ratio == ratio[..., :1, :1]) & ((ratio == 0) | (ratio == 2))).all()
    assert 0.45 < (ratio == 2).float().mean() < 0.55
    args = SimpleNamespace(head_channels=16, aspp_rates=(1, 2))
    head = unimatch.UniMatchHead([4, 8, 16, 32], 5, args).eval()
    stages = [torch.randn(3, c, s, s) for c, s in ((4, 16), (8, 8), (16, 4), (32, 4))]
    clean = head(stages, (61, 61))["logits"]
    seen = []
    monkeypatch.setattr(unimatch, "feature_perturbation", lambda x: seen.append(x) or 3 * x)
    head.perturbed = 2
    out = head(stages, (61, 61))
    assert torch.allclose(out["logits"], clean, atol=1e-5) and out["logits"].shape == clean.shape
    assert [torch.equal(x, stages[i][1:]) for x, i in zip(seen, (0, 3), strict=True)] == [True] * 2
    head.perturbed = 0
    tripled = head([3 * x[1:] for x in stages], (61, 61))["logits"]
    assert torch.allclose(out["perturbed"], tripled, atol=1e-4)


@pytest.mark.parametrize("backbone, millions", [("resnet50", 40.5), ("resnet101", 59.5)])
def test_networks_have_the_parameters_and_dilations_that_the_released_logs_have(backbone, millions):
    words = f"--dataset voc --split 92 --stem deep --weights none --backbone {backbone}".split()
    args = fill(parse(unimatch.Args, unimatch.preset, words), unimatch.preset, words)
    with torch.device("meta"):
        net = unimatch.Network(args, 21, unimatch.UniMatchHead)
        eight = unimatch.make_backbone(unimatch.replace(args, output_stride=8))
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert round(count, 1) == millions
    for backbone, expected in ((net.backbone, [1, 2, 2]), (eight, [2, 4, 4])):
        assert [block.conv2.dilation[0] for block in backbone.layer4] == expected
        assert backbone.layer4[0].conv2.stride == (1, 1)


# ---- the step ----


def literal(student, batch, args, number):
    """A step in one graph and one sum, its maps mixed by multiplication: the loss, its parts."""
    weak, x_l, y_l = batch["unlabeled"], batch["labeled"]["image"], batch["labeled"]["label"].long()
    n, partner = len(x_l), None
    if args.partner == "crop":
        partner = batch["unlabeled.2"]
        with torch.no_grad():
            t_m = student.eval()(partner["image"])["logits"]
        student.train()
    student.head.perturbed = len(weak["image"]) * args.feature_perturbation
    out = student(torch.cat([x_l, weak["image"]]))
    student.head.perturbed = 0
    t = out["logits"][n:].detach()

    def taught(z, logits, inside, K):
        q = logits.softmax(1)
        if args.unsup_loss == "ce":
            loss = F.cross_entropy(z, q.argmax(1), reduction="none") * (q.amax(1) >= args.threshold)
        else:
            p, order = unimatch.by_rank(q)
            loss = unimatch.fuzzy_positive_regularization(z, order, K)
            loss = loss * unimatch.adaptive_weight(p, K, args.weight, args.mean_over)
        return loss[inside].sum() / inside.sum()

    def K_of(logits, inside):
        return unimatch.k_of(logits, inside, args)

    K, pairs = K_of(t, weak["inside"]), [i ^ 1 for i in range(len(t))]
    mixed, lessons = [], []
    for view in range(args.views):
        x, mask = unimatch.strong_views(weak["image"], f"view{view}", number, args, ALONE)
        own = [x, t, weak["inside"], K]
        other = [part[pairs] for part in own]
        if partner:
            x_m, _ = unimatch.strong_views(partner["image"], f"partner{view}", number, args, ALONE)
            other = [x_m, t_m, partner["inside"], K_of(t_m, partner["inside"])]
        masks = [mask, mask, mask[:, 0], mask[:, 0]]
        maps = [a * ~m + b * m for a, b, m in zip(own, other, masks, strict=True)]
        mixed.append(maps[0])
        lessons.append(maps[1:])
    z = student(torch.cat(mixed))["logits"].chunk(args.views)
    strong = [taught(a, *b) for a, b in zip(z, lessons, strict=True)]
    sup = F.cross_entropy(out["logits"][:n], y_l, ignore_index=255)
    strong = sum(strong) / len(strong)
    perturbed = torch.zeros(())
    loss = (sup + strong) / 2
    if args.feature_perturbation:
        perturbed = taught(out["perturbed"], t, weak["inside"], K)
        loss = sup / 2 + strong / 4 + perturbed / 4
    return loss, dict(loss=loss, sup=sup, strong=strong, perturbed=perturbed)


STEPS = ["", "--views 1 --no-feature-perturbation", "--recipe official", "--unsup-loss fpl --T 0.3"]
STEPS += ["--views 1 --unsup-loss fpl --T 0.2 0.3 0.5", "--recipe official --unsup-loss fpl"]


@pytest.mark.parametrize("row", STEPS)
def test_every_step_is_the_literal_one(row, tmp_path, monkeypatch):
    tree = tiny.draw_tree(tmp_path / "data")
    argv = tiny.flags(tree, tmp_path / "run", log=1, iters=3, evaluate=9, save=9, pictures=3)
    argv = tiny.with_acting("unimatch", [*argv, *"--batch-size-unlabeled 4".split(), *row.split()])
    with monkeypatch.context() as patch:
        tiny.shrink(unimatch, patch)
        found = recorder.watch(patch, unimatch, argv)
    args, passes, net = tiny.resolved(unimatch, argv), [], found.networks["student"]
    recorder.listen({"student": net}, passes.append)
    for number, step in enumerate(found.steps):
        passes.clear()
        torch.manual_seed(zlib.crc32(b"%d %d 0" % (args.seed, number)))
        loss, parts = literal(net, step.batch, args, number)
        for entry, twin in zip(step.seen, passes, strict=True):  # what it saw, in which mode
            assert torch.equal(entry["image"], twin["image"])
            assert entry["training"] == twin["training"] and entry["grad"] == twin["grad"]
        loss.backward()
        for key, p in net.named_parameters():
            own = step.grads[f"student.{key}"]
            assert (own - p.grad).abs().max() <= 5e-5 * p.grad.abs().max(), key
            p.grad = None
        assert {k: step.parts[k] for k in parts} == pytest.approx(
            {k: x.item() for k, x in parts.items()}, rel=1e-5, abs=1e-6
        )
        assert step.parts["strong"] > 0 and 0 < step.parts["coverage"] <= 1
        net.load_state_dict(step.nets["student"])
    titles = list(found.steps[-1].maps)
    if args.unsup_loss == "ce":
        label, conf = (found.steps[-1].maps[title] for title in ("its pseudo label", "confidence"))
        assert (label[conf < args.threshold] == -1).all() and (label >= 0).any()  # white
    assert ("perturbed features" in titles) == args.feature_perturbation
    assert sum(title.startswith("mixed") for title in titles) == args.views
    assert ("K 1" in titles) == (args.unsup_loss == "fpl")


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    tree = tiny.draw_tree(tmp_path / "data")
    tiny.shrink(unimatch, monkeypatch)
    for words, line in (
        ("--batch-size-unlabeled 3", "CutMix mixes pairs: an even --batch-size-unlabeled"),
        ("--unsup-loss fpl --threshold 0.9", "--threshold 0.9 does nothing here: it needs"),
        ("--unsup-loss fpl --T 0.9 0.8", "--T (0.9, 0.8): one number or more, rising"),
    ):
        argv = [*tiny.flags(tree, tmp_path / words[-3:]), *words.split()]
        with pytest.raises(Refusal, match=f"^{re.escape(line)}[^\n]*$"):
            tiny.train(unimatch, argv)


def test_predict_shows_K_of_one_T_alone():
    for T, one in (([0.9], 0.9), (0.9, 0.9), ([0.8, 0.9], None), (None, None)):
        assert predict.one_T(SimpleNamespace(saved={"args": {"T": T}})) == one
