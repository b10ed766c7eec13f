"""ael_fpl.py's loop: what student and teacher see in a step, the two banks, partners, resume.

All but one use the tiny network of tests/helpers.py. A run leaves a list of its steps (watched);
each is compared with a literal one (literal_step). As a program (python -m tests.test_ael_run
SCRIPT JSON) it makes such runs as one of several processes and saves their steps.
"""

import json
import math
import random
import re
import shutil
import sys
import time
import zlib
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import ael_fpl
import sources
import supervised
from common import Refusal, run
from tests.helpers import (
    ROOT,
    Forked,
    differences,
    draw_tree,
    finish,
    flags,
    in_one_group,
    kill_at_step,
    log,
    shrink,
    start,
    tiny_modules,
    train,
)

NAMES = ["loss", "sup", "unsup", "balance", "kept", "conf_t", "K_gt_1"]
UNEVEN = ["--batch-size-unlabeled", "3"]  # no count of labelled images can pass for the other
SURE = ["--scales", "1.0", "1.5"]  # of 48x36 pixels: a crop of 32 lies inside
UNLABELED = (1, 2, 3, 5, 6, 7)  # of train0 to train7, at 1/4


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return draw_tree(tmp_path_factory.mktemp("ael") / "data")


# ---- a run and its steps ----


def copied(tensors):
    """Returns a copy of a dict of tensors."""
    return {name: x.detach().clone() for name, x in tensors.items()}


def watched(patch, argv):
    """Runs main; returns its networks as they began, their state then, and a list of its steps.

    A step: batch {stream: tensors}, seen (one entry for each forward pass in training), given (what
    consistency_loss was), grads, student, teacher and state (all after it), parts, spent, reduced
    (how often gradients went over all processes), attached (teacher's parameters with a gradient).
    """
    found = SimpleNamespace(networks={}, state={}, steps=[], wrapped=[], start=None)
    scoring, live = [], {}

    def begin():
        empty = dict(batch={}, seen=[], given=[], grads={}, reduced=[], attached=[])
        found.steps.append(SimpleNamespace(**empty))

    def restore(self, networks, optimizer, state):
        found.start = whole["restore"](self, networks, optimizer, state)
        found.networks, found.state = deepcopy(networks), copied(state)
        live.update(networks=networks, state=state)
        for name, net in networks.items():

            def saw(module, inputs, out, name=name):
                if not scoring:
                    entry = dict(net=name, image=inputs[0].clone(), grad=torch.is_grad_enabled())
                    entry["training"] = sorted({m.training for m in module.modules()})
                    found.steps[-1].seen.append(entry | {"logits": out["logits"].detach().clone()})

            net.register_forward_hook(saw)

        def before(*_):
            step = found.steps[-1]
            for name, p in networks["student"].named_parameters():
                step.grads[name] = p.grad.clone()
            for name, p in networks["teacher"].named_parameters():
                step.attached += [name] if p.requires_grad or p.grad is not None else []

        optimizer.register_step_pre_hook(before)
        return found.start

    def parallel(net, args, group):
        made = whole["parallel"](net, args, group)
        found.wrapped.append(type(made).__name__)
        if isinstance(made, DistributedDataParallel):

            def count(state, bucket):
                found.steps[-1].reduced.append(bucket.index())
                return allreduce_hook(None, bucket)

            made.register_comm_hook(None, count)
        return made

    def consistency_loss(logits_s, logits_t, inside, rate, pooled, args):
        given = dict(student=logits_s, teacher=logits_t, inside=inside, rate=rate)
        found.steps[-1].given.append(copied(given) | {"pooled": pooled})
        return whole["consistency_loss"](logits_s, logits_t, inside, rate, pooled, args)

    def open_stream(name, *given):
        for batch in whole["open_stream"](name, *given):
            found.steps[-1].batch[name] = copied(batch)
            yield batch

    def evaluate(net, *given):
        scoring.append(1)
        mode = [m.training for m in net.modules()]
        result = whole["evaluate"](net, *given)
        assert mode == [m.training for m in net.modules()]
        scoring.pop()
        return result

    def step(self, number, parts, lr, began, spent):
        entry = found.steps[-1]
        entry.parts, entry.spent = {k: x.item() for k, x in parts.items()}, dict(spent)
        entry.state, entry.random = copied(live["state"]), torch.rand(1).item()
        for name, net in live["networks"].items():
            setattr(entry, name, copied(net.state_dict()))
        whole["step"](self, number, parts, lr, began, spent)
        begin()

    mine = [parallel, consistency_loss, open_stream, evaluate]
    whole = {function.__name__: getattr(ael_fpl, function.__name__) for function in mine}
    whole |= {"restore": run.Run.restore, "step": run.Run.step}
    for function in mine:
        patch.setattr(ael_fpl, function.__name__, function)
    patch.setattr(run.Run, "restore", restore)
    patch.setattr(run.Run, "step", step)
    begin()
    train(ael_fpl, argv)
    found.steps.pop()
    return found


def steps_of(tree, out, monkeypatch, *extra, **numbers):
    """Returns resolved flags and what was seen of a small run with the tiny network."""
    shrink(ael_fpl, monkeypatch)
    argv = flags(tree, out, **{"log": 1, "iters": 2, "batch": 4, **numbers}) + [*UNEVEN, *extra]
    with monkeypatch.context() as patch:
        found = watched(patch, argv)
    return run.resolve(run.parse(ael_fpl.Args, argv), ael_fpl.preset), found


# ---- one step, literally ----


def stream_of(args, count, name, numbers):
    """Returns which of count images the samples of a stream show: rounds, each in a new order."""
    order = [args.seed, zlib.crc32(name.encode()), 0]
    laps = [np.random.default_rng([*order, n // count]).permutation(count) for n in numbers]
    return [int(lap[n % count]) for lap, n in zip(laps, numbers, strict=True)]


def shown(args, images, items, stream, numbers, indices, scales, with_label):
    """Returns image, inside and label of samples: each a given image, augmented by its number."""
    found = {"image": [], "inside": [], "label": []}
    for number, index in zip(numbers, indices, strict=True):
        rng = np.random.default_rng([args.seed, zlib.crc32(stream.encode()), 1, number])
        pair = images.read(items[index], with_label)
        image, label, inside = ael_fpl.augment(*pair, rng, args.crop_size, scales)
        for key, x in zip(found, (image, inside, label), strict=True):
            found[key] += [] if x is None else [torch.from_numpy(x)]
    return {key: torch.stack(some) for key, some in found.items() if some}


def partners(args, images, indices, step):
    """Returns image and inside of the partners of a step: drawn images, their own augmentation."""
    numbers = [step * args.batch_size_unlabeled + i for i in range(len(indices))]
    given = images.unlabeled, "unlabeled.partner", numbers, indices, args.scales, False
    return shown(args, images, *given)


def pasted(args, confidence, batch, rng):
    """Returns the labelled images with what is pasted onto them, pixels by a mask in numpy."""
    classes = [c for c in range(len(confidence)) if c not in args.paste_not]
    score = np.exp([(1 - float(confidence[c])) ** args.paste_power for c in classes])
    u, ends = rng.random((args.batch_size, args.paste_draws + 1)), np.cumsum(score) / score.sum()
    found = copied(batch["labeled"])
    for i, (coin, *_) in enumerate(u):
        draws = u[i // args.pooled * args.pooled, 1:]  # one set of classes for a group
        drawn = [classes[int((ends <= x).sum())] for x in draws]
        hit = np.isin(batch["paste"]["label"][i].numpy(), drawn) & (coin < args.paste_prob)
        for key, x in found.items():
            x[i] = torch.where(torch.from_numpy(hit), batch["paste"][key][i], x[i])
    return found


def literal_confidence(logits, label, bank, args):
    """The bank after a step: per class the mean over groups of the mean p of the true class."""
    prob, new = logits.detach().double().softmax(1), bank.double().clone()
    for c in range(len(bank)):
        values = []
        for at in range(0, len(label), args.pooled):
            hit = label[at : at + args.pooled] == c
            if hit.any() or not args.skip_absent:
                p = prob[at : at + args.pooled, c][hit]
                values.append(p.mean().item() if hit.any() else 0.0)
        if values:
            mean = sum(values) / len(values)
            new[c] = args.bank_momentum * bank[c] + (1 - args.bank_momentum) * mean
    return new


def literal_consistency(student, teacher, inside, confidence, pooled, args):
    """Returns what is minimized, and unsup, balance, kept, conf_t, K_gt_1; a loop over groups."""
    prob = teacher.softmax(1)
    conf, pseudo = prob.amax(1), prob.argmax(1)
    gap = 1 - confidence
    rate = (gap / gap.max()) ** args.beta
    keep = torch.rand_like(conf) >= 1 - rate[student.detach().argmax(1)]
    ce = loss = F.cross_entropy(student, pseudo, reduction="none")
    some = {name: getattr(args, name) for name in ("k_max", "strict")}
    if args.unsup_loss == "fpl":
        how = some | dict(weight=args.weight, mean_over=args.mean_over)
        one, weight = ael_fpl.fuzzy_positive_loss(student, teacher, args.T, **how)
        loss = one * weight
    whole, unsup, balance = [], [], []
    for at in range(0, len(student), pooled):
        good = inside[at : at + pooled]
        w, k, plain, cross = (x[at : at + pooled][good] for x in (conf, keep, loss, ce))
        w = w**args.gamma * k
        unsup.append((w * plain * (conf[at : at + pooled][good] >= args.threshold)).sum() / w.sum())
        balance.append((cross.sum() / plain.sum()).detach())
        whole.append(unsup[-1] * (balance[-1] if args.balance else 1))
    few = (slice(None), slice(None), slice(None, None, 4), slice(None, None, 4))
    K = ael_fpl.fuzzy_positive_assignment(prob[few], args.T, **some)[inside[few[1:]]]
    numbers = {"unsup": sum(unsup) / len(unsup), "balance": sum(balance) / len(balance)}
    numbers |= {"kept": keep[inside].float().mean(), "conf_t": conf[inside].mean()}
    return sum(whole) / len(whole), numbers | {"K_gt_1": (K > 1).float().mean()}


def literal_step(student, teacher, state, entry, images, args, step):
    """Returns the loss of a step with its graph, the numbers of its line, and the state after it.

    student, teacher: networks as they were before it. entry: the step, for its batch and, where a
    rounding could decide a draw of pixels, its bank.
    """
    B, C, rng = args.batch_size_unlabeled, len(state["confidence"]), None
    first, rng = entry.batch["unlabeled"], np.random.default_rng([args.seed, step])
    classes, indices = state["draws"][0].T.tolist()
    second = partners(args, images, indices, step)
    labeled = pasted(args, state["confidence"], entry.batch, rng)
    label = labeled["label"]
    # passes in the loop's order: dropout is a function of the step
    torch.manual_seed((args.seed * 1_000_003 + step) * 1024)
    out = student(labeled["image"])["logits"]
    with torch.no_grad():
        on_labels = teacher(labeled["image"])["logits"] if args.consistency_on == "all" else None
        views = teacher(torch.cat([first["image"], second["image"]]))["logits"]
    # banks
    new = {"draws": ael_fpl.draw_partners(state["confidence"], state["present"], B, rng)}
    new["draws"] = torch.cat([state["draws"][1:], new["draws"][None]])
    new["confidence"] = literal_confidence(out, label, state["confidence"], args)
    new["present"], seen = state["present"].clone(), views.argmax(1)[:, ::4, ::4]
    seen[~torch.cat([first["inside"], second["inside"]])[:, ::4, ::4]] = 255
    rounds = stream_of(args, len(images.unlabeled), "unlabeled", range(step * B, step * B + B))
    for image, cells in zip(rounds + indices, seen, strict=True):  # partners after first images
        for c in range(C):
            new["present"][c, image] = (cells == c).sum() >= args.bank_area * cells.numel()
    # boxes
    mask, boxes = torch.zeros(B, args.crop_size, args.crop_size, dtype=torch.bool), 0
    rngs = np.random.default_rng([args.seed, step]).spawn(B)
    for i, (cells, c, own) in enumerate(zip(seen[B:], classes, rngs, strict=True)):
        cells = cells.byte().numpy()
        box = ael_fpl.component_box(cells, c, args.region_area, args.crop_size, own)
        boxes += box is not None
        top, left, h, w = box or ael_fpl.half_area_box(own, args.crop_size)
        mask[i, top : top + h, left : left + w] = True
    # losses
    teachers, image = views[:B].clone(), first["image"].clone()
    inside = first["inside"].clone()
    for i, one in enumerate(mask):
        image[i][:, one], inside[i][one] = second["image"][i][:, one], second["inside"][i][one]
        teachers[i][:, one] = views[B + i][:, one]
    logits = student(image)["logits"]
    sup = supervised.supervised_loss({"logits": out}, label, args)
    bank = entry.state["confidence"]
    whole, numbers = literal_consistency(logits, teachers, inside, bank, 1, args)
    if args.consistency_on == "all":
        given = out, on_labels, labeled["inside"], bank, args.pooled, args
        more, numbers_l = literal_consistency(*given)
        whole, numbers["unsup_l"] = whole + more, numbers_l["unsup"]
    loss = sup + args.unsup_weight * whole
    numbers = {"loss": loss, "sup": sup} | numbers | {"bank": bank.mean(), "regions": boxes / B}
    seen = [("student", labeled["image"], out), ("student", image, logits)]
    teacher_saw = [("teacher", torch.cat([first["image"], second["image"]]), views)]
    if args.consistency_on == "all":
        teacher_saw = [("teacher", labeled["image"], on_labels), *teacher_saw]
    seen[1:1] = teacher_saw
    given = dict(student=logits, teacher=teachers, inside=inside)
    numbers = {k: torch.as_tensor(x).item() for k, x in numbers.items()}
    return SimpleNamespace(loss=loss, parts=numbers, state=new, seen=seen, given=given)


def literal_update(student, teacher, momentum, args, step):
    """SGD by hand, momentum 0.9 and the head's own rate; then the teacher's average."""
    for name, p in student.named_parameters():
        lr = args.lr * (1 - step / args.total_iters) ** 0.9
        lr *= args.lr_head if name.startswith("head.") else 1
        no = args.decay_on == "weights" and p.ndim == 1
        push = p.grad + (0 if no else args.weight_decay) * p.detach()
        momentum[name] = 0.9 * momentum[name] + push if name in momentum else push
        p.data -= lr * momentum[name]
        p.grad = None
    keep = min(1 - 1 / (step + 1), args.ema_decay)
    mine, names = student.state_dict(), dict(teacher.named_parameters())
    for name, x in teacher.state_dict().items():
        if name in names or args.teacher_mode == "eval" and name.endswith(("_mean", "_var")):
            x.copy_(keep * x + (1 - keep) * mine[name])


def assert_close(mine, theirs, rel):
    """Every tensor equals its namesake up to rel of its largest number."""
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        scale = theirs[name].double().abs().max().item()
        distance = (x.double() - theirs[name].double()).abs().max().item()
        assert distance <= rel * scale, f"{name}: {distance} of {scale}"


OFFICIAL = ["--recipe", "official"]
LITERAL = [
    ["--T", "0.2", "--ema-decay", "0.6"],
    ["--unsup-loss", "ce", "--skip-absent", "--beta", "0.5", "--gamma", "1", "--threshold", "0.12"],
    [*OFFICIAL, "--T", "0.3"],
    [*OFFICIAL, "--unsup-loss", "ce", "--pooled", "4", "--teacher-mode", "eval"],
    ["--consistency-on", "all", "--pooled", "1", "--ohem-kept", "0.2", "--decay-on", "weights"],
]


@pytest.mark.smoke
@pytest.mark.parametrize("extra", LITERAL, ids=" ".join)
def test_a_step_is_the_literal_one(extra, tree, tmp_path, monkeypatch):
    extra = [*extra, "--unsup-weight", "2.5", "--lr-head", "3", "--weight-decay", "0.1"]
    extra += ["--seed", "3", "--lr", "0.05", "--bank-momentum", "0.7"]
    extra += ["--bank-area", "0.08", "--region-area", "0.02"]  # 6 and more than 1 cell of 64
    numbers = dict(iters=6, evaluate=2)
    args, found = steps_of(tree, tmp_path / "run", monkeypatch, *extra, **numbers)
    images, momentum, sparse = sources.load(args), {}, 0
    student, teacher = found.networks["student"], found.networks["teacher"]
    state, mode = found.state, args.teacher_mode == "train"
    assert found.wrapped == ["Network"] and len(found.steps) == 6
    for number, step in enumerate(found.steps):
        literal = literal_step(student, teacher, state, step, images, args, number)
        # what was seen, bit for bit, and by a network in which mode
        assert len(step.seen) == len(literal.seen) == 3 + (args.consistency_on == "all")
        for entry, (net, image, logits) in zip(step.seen, literal.seen, strict=True):
            assert entry["net"] == net and torch.equal(entry["image"], image), net
            assert torch.equal(entry["logits"], logits), net
            assert entry["grad"] == (net == "student")
            assert entry["training"] == [net == "student" or mode]
        for name, x in literal.given.items():
            assert torch.equal(step.given[0][name], x), name
        assert [entry["pooled"] for entry in step.given] == [1, args.pooled][: len(step.given)]
        # float64 beside float32 means of at most 4,000 probabilities
        bank = step.state["confidence"]
        assert_close({"bank": bank}, {"bank": literal.state["confidence"]}, 1e-6)
        assert not torch.equal(bank, state["confidence"]) and 0 <= bank.min() <= bank.max() <= 1
        for name in ("present", "draws"):
            assert torch.equal(step.state[name], literal.state[name]), name
        sparse += not step.state["present"].all() and step.state["present"].any()
        # float32: sums of 4,000 pixels in another order, through six layers; 1e-5 of the largest
        literal.loss.backward()
        assert step.attached == []
        assert_close(step.grads, {k: p.grad for k, p in student.named_parameters()}, 3e-5)
        literal_update(student, teacher, momentum, args, number)
        assert_close(step.student, student.state_dict(), 1e-5)
        assert_close(step.teacher, teacher.state_dict(), 1e-5)
        names = [*NAMES, *(["unsup_l"] if args.consistency_on == "all" else []), "bank", "regions"]
        assert list(step.parts) == names
        # means over 4,000 numbers or fewer in float32: a few 1e-7 relative
        assert step.parts == pytest.approx(literal.parts, rel=1e-5)
        student.load_state_dict(step.student)  # no rounding is carried on
        teacher.load_state_dict(step.teacher)
        state = step.state
    assert sparse >= 5  # the image bank tells images apart
    assert not all(x["inside"].all() for s in found.steps for x in s.given)  # padding occurs
    parts = [step.parts for step in found.steps]
    assert 0 < parts[-1]["kept"] < 1 and any(0 < p["regions"] for p in parts)
    ce = args.unsup_loss == "ce"
    assert all(p["unsup"] > 0 and (p["balance"] == 1) == ce for p in parts)
    assert any(0 < p["K_gt_1"] < 1 for p in parts) or args.T == 0.9
    # the first update copies the student, and no other
    for name, _ in student.named_parameters():
        assert torch.equal(found.steps[0].student[name], found.steps[0].teacher[name])
        assert not torch.equal(step.student[name], step.teacher[name])


@pytest.mark.smoke
def test_the_streams_are_rounds_of_images_each_at_its_scales(tree, tmp_path, monkeypatch):
    extra = ["--seed", "2", "--paste-scales", "0.2", "0.4"]
    args, found = steps_of(tree, tmp_path / "run", monkeypatch, *extra, iters=4)
    images = sources.load(args)
    assert args.paste_scales == (0.2, 0.4) and args.scales == (0.5, 2.0)
    for name, items, batch, scales in (
        ("labeled", images.labeled, 4, (0.5, 2.0)),
        ("paste", images.labeled, 4, (0.2, 0.4)),
        ("unlabeled", images.unlabeled, 3, (0.5, 2.0)),
    ):
        for number, step in enumerate(found.steps):
            numbers = range(number * batch, number * batch + batch)
            indices = stream_of(args, len(items), name, numbers)
            with_label = name != "unlabeled"
            expected = shown(args, images, items, name, numbers, indices, scales, with_label)
            assert step.batch[name].keys() == expected.keys()
            for key, x in expected.items():
                assert torch.equal(step.batch[name][key], x), (name, key)


# ---- the teacher ----


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_teachers_bn_is_its_own_or_averaged_like_the_weights(mode, tree, tmp_path, monkeypatch):
    extra = ["--teacher-mode", mode]
    _, found = steps_of(tree, tmp_path / "run", monkeypatch, *extra, iters=4, evaluate=1)
    before = found.networks["teacher"].state_dict()
    assert_close(before, found.networks["student"].state_dict(), 0)  # a copy
    for number, step in enumerate(found.steps):
        for name, x in step.teacher.items():
            if name.endswith("num_batches_tracked"):
                # one pass of the teacher and two of the student in a step
                assert (x, step.student[name]) == ((mode == "train") * (number + 1), 2 * number + 2)
            elif name.endswith(("running_mean", "running_var")) and number == 0:
                assert torch.equal(x, step.student[name]) == (mode == "eval"), name
            elif name.endswith("running_mean") and mode == "eval":
                keep = 1 - 1 / (number + 1)
                expected = keep * before[name] + (1 - keep) * step.student[name]
                assert torch.allclose(x, expected, atol=1e-6), name  # two roundings of float32
        (views,) = [e for e in step.seen if e["net"] == "teacher"]
        assert views["training"] == [mode == "train"]
        net = found.networks["teacher"]
        net.load_state_dict(before)
        with torch.no_grad():
            alone = net.eval()(views["image"])["logits"]
        assert torch.equal(alone, views["logits"]) == (mode == "eval")  # nothing random
        before = step.teacher


def miou(net, tree, part, count):
    """mIoU of a network in eval mode, by a loop over images."""
    confusion = np.zeros((11, 11), np.int64)
    for i in range(count):
        pixels = np.array(Image.open(tree / f"{part}/{part}{i}.jpg"))
        with torch.no_grad():
            logits = net.eval()(torch.from_numpy(pixels).permute(2, 0, 1)[None])["logits"]
        label = np.array(Image.open(tree / f"{part}annot/{part}{i}.png"))
        np.add.at(confusion, (label[label < 11], logits[0].argmax(0).numpy()[label < 11]), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((confusion.diagonal()[union > 0] / union[union > 0]).mean())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_teacher_is_scored_in_eval_mode_and_eval_only_repeats_it(
    mode, tree, tmp_path, monkeypatch, capsys
):
    build = ael_fpl.build

    def build_with_quick_bn(*given):
        net = build(*given)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.8
        return net

    monkeypatch.setattr(ael_fpl, "build", build_with_quick_bn)  # in eval mode more than a constant
    out, extra = tmp_path / "run", ["--teacher-mode", mode, "--lr", "0.1"]
    _, found = steps_of(tree, out, monkeypatch, *extra, iters=4, evaluate=1)
    lines = [line["miou"] for line in log(out) if line["kind"] == "eval"]
    own = {"teacher": [], "student": []}
    for step in found.steps:
        for name, net in found.networks.items():
            net.load_state_dict(getattr(step, name))
            own[name].append(miou(net, tree, "val", 2))
    assert lines == pytest.approx(own["teacher"], abs=1e-12)
    assert own["teacher"] != own["student"]
    done = log(out)[-1]
    assert done["best_step"] == 1 + lines.index(max(lines))
    for name in ("last", "best"):
        capsys.readouterr()
        checkpoint = ["--eval-only", "--checkpoint", str(out / f"{name}.pt"), "--eval-on", "test"]
        train(ael_fpl, [*checkpoint, "--workers", "0"])
        printed = re.search(r"^mIoU +([\d.]+)$", capsys.readouterr().out, re.M)[1]
        assert printed == f"{100 * done[name]['miou']:.2f}"


# ---- partners ----


@pytest.mark.smoke
def test_partners_are_drawn_from_the_banks_of_four_steps_before(tree, tmp_path, monkeypatch):
    extra = ["--seed", "5", "--lr", "0.05", "--bank-momentum", "0.5"]
    args, found = steps_of(tree, tmp_path / "run", monkeypatch, *extra, iters=12)
    images, B = sources.load(args), args.batch_size_unlabeled
    states = [found.state, *(step.state for step in found.steps)]  # at the beginning of step s
    others = {lag: 0 for lag in (0, 2, 3, 5)}
    for number, step in enumerate(found.steps):
        draws = states[number]["draws"][0]
        if number >= 4:
            for lag in (4, *others):
                rng = np.random.default_rng([args.seed, number - 4])
                rng.random(args.batch_size * (args.paste_draws + 1))
                bank = states[max(number - lag, 0)]
                again = ael_fpl.draw_partners(bank["confidence"], bank["present"], B, rng)
                assert lag != 4 or torch.equal(again, draws)
                if lag != 4:
                    others[lag] += not torch.equal(again, draws)
            for c, image in draws.tolist():  # it showed the class, or nothing did
                shown = states[number - 4]["present"][c]
                assert shown[image] or not shown.any()
        second = partners(args, images, draws[:, 1].tolist(), number)
        (views,) = [e["image"] for e in step.seen if e["net"] == "teacher"]
        assert torch.equal(views[B:], second["image"])
        assert torch.equal(views[:B], step.batch["unlabeled"]["image"])
    assert all(others.values()), others  # any other lag would be seen


@pytest.mark.smoke
def test_the_first_four_partners_are_any_image(tree, tmp_path, monkeypatch):
    args, found = steps_of(tree, tmp_path / "run", monkeypatch, "--seed", "8", iters=1)
    rng = np.random.default_rng([8, zlib.crc32(b"bank")])
    confidence = rng.random(11, np.float32)
    assert found.state["confidence"].tolist() == confidence.tolist()
    assert found.state["present"].shape == (11, 6) and not found.state["present"].any()
    assert found.state["present"].dtype == torch.bool
    score = np.exp(1 - confidence.astype(float))
    chances = np.cumsum(score) / score.sum()
    for draws in found.state["draws"]:
        classes = [int((chances <= u).sum()) for u in rng.random(3)]
        assert draws.tolist() == [[c, int(rng.integers(6))] for c in classes]
    assert found.state["draws"].shape == (4, 3, 2)


def test_an_image_that_comes_twice_is_remembered_as_it_was_seen_last(tree, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("train/train0.jpg\ntrain/train4.jpg\n")
    (tmp_path / "two.txt").write_text("train/train1.jpg\ntrain/train2.jpg\n")
    lists = ["--labeled-list", tmp_path / "one.txt", "--unlabeled-list", tmp_path / "two.txt"]
    argv = flags(tree, tmp_path / "run", log=1, iters=6, batch=4)
    argv = [a for a in argv if a not in ("--split", "1/4")] + [*UNEVEN, *map(str, lists)]
    argv += ["--lr", "0.1", "--bank-area", "0.1"]
    shrink(ael_fpl, monkeypatch)
    with monkeypatch.context() as patch:
        found = watched(patch, argv)
    args = run.resolve(run.parse(ael_fpl.Args, argv), ael_fpl.preset)
    images, state, torn = sources.load(args), found.state, 0
    for number, step in enumerate(found.steps):
        (views,) = [e for e in step.seen if e["net"] == "teacher"]
        second = partners(args, images, state["draws"][0, :, 1].tolist(), number)
        inside = torch.cat([step.batch["unlabeled"]["inside"], second["inside"]])
        shows = []
        for logits, good in zip(views["logits"], inside, strict=True):
            cells = logits[:, ::4, ::4].argmax(0)[good[::4, ::4]].bincount(minlength=11)
            shows.append(cells >= 0.1 * 64)
        numbers = range(3 * number, 3 * number + 3)
        order = stream_of(args, 2, "unlabeled", numbers) + state["draws"][0, :, 1].tolist()
        for image in (0, 1):  # six views of two images
            mine = [s for s, i in zip(shows, order, strict=True) if i == image]
            assert not mine or torch.equal(step.state["present"][:, image], mine[-1])
            torn += any(not torch.equal(mine[-1], s) for s in mine[:-1])
        state = step.state
    assert torn  # views of one image differed


# ---- exact resume ----


def stop_in(patch, stop):
    """Lets a run be interrupted in a step, before anything of it is logged."""
    whole = run.Run.step

    def step(self, number, *rest):
        if number == stop:
            raise KeyboardInterrupt
        whole(self, number, *rest)

    patch.setattr(run.Run, "step", step)


def unlike(folder, other, flag):
    """Returns the differences of two run folders but for one flag, which makes no number."""
    heads = [log(f)[0]["args"] for f in (folder, other)]
    for head in heads:
        for name in (flag, "out", "resume"):
            head.pop(name)
    wrong = [] if heads[0] == heads[1] else ["flags"]
    skipped = (f"last.pt.args.{flag}", f"best.pt.args.{flag}", "log.jsonl:1:")
    return wrong + [line for line in differences(folder, other) if not line.startswith(skipped)]


@pytest.mark.smoke
@pytest.mark.parametrize("extra", [[], [*OFFICIAL, "--teacher-mode", "eval"]], ids=" ".join)
def test_a_run_stopped_in_any_step_and_resumed_equals_the_whole_one(
    extra, tree, tmp_path, monkeypatch
):
    shrink(ael_fpl, monkeypatch)
    numbers = dict(iters=8, log=2, evaluate=4, batch=4)
    extra = [*UNEVEN, "--lr", "0.05", *extra]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(ael_fpl, flags(tree, whole, save=8, **numbers) + extra)
    saved = torch.load(whole / "last.pt", weights_only=True)
    assert sorted(saved["networks"]) == ["student", "teacher"]
    shapes = {name: (x.dtype, tuple(x.shape)) for name, x in saved["state"].items()}
    assert shapes == {
        "confidence": (torch.float32, (11,)),
        "present": (torch.bool, (11, 6)),
        "draws": (torch.int64, (4, 3, 2)),
    }
    for step, save in ((2, 1), (3, 1), (4, 1), (6, 5), (7, 2), (8, 3)):  # saved after step - 1
        argv = flags(tree, stopped, save=save, **numbers) + extra
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_in(patch, step)
            train(ael_fpl, argv)
        at = (step - 1) // save * save
        assert torch.load(stopped / "last.pt", weights_only=True)["step"] == at
        with monkeypatch.context() as patch:
            found = watched(patch, argv + ["--resume"])
        assert found.start == at and len(found.steps) == 8 - at
        assert unlike(whole, stopped, "save_every") == [], step
        shutil.rmtree(stopped)


def test_runs_killed_with_and_without_workers_and_resumed_equal_the_whole_one(
    tree, tmp_path, monkeypatch
):
    seed = random.randrange(10_000)
    print(f"the kill's seed: {seed}")
    shrink(ael_fpl, monkeypatch)
    iters, runs = 60, {}
    numbers = dict(iters=iters, log=2, evaluate=50, save=3, batch=4)
    for workers in (0, 2):
        out = tmp_path / f"killed{workers}"
        argv = flags(tree, out, workers=workers, **numbers) + [*UNEVEN, *OFFICIAL]
        process = start("ael_fpl", argv, hold=iters - 1)
        kill_at_step(process, out, random.Random(seed + workers).randint(1, iters * 2 // 3))
        assert '"done"' not in (out / "log.jsonl").read_text(), f"killed too late, seed {seed}"
        runs[out] = argv
    train(ael_fpl, flags(tree, tmp_path / "whole", **numbers) + [*UNEVEN, *OFFICIAL])
    for out, argv in runs.items():
        train(ael_fpl, argv + ["--resume"])
        assert unlike(tmp_path / "whole", out, "workers") == [], seed


def test_loader_workers_change_nothing_but_what_is_waited_for(tree, tmp_path, monkeypatch):
    shrink(ael_fpl, monkeypatch)
    for workers in (0, 1, 2):
        argv = flags(tree, tmp_path / str(workers), iters=6, workers=workers, batch=4)
        train(ael_fpl, [*argv, *UNEVEN])
    for workers in ("1", "2"):
        assert unlike(tmp_path / "0", tmp_path / workers, "workers") == []


# ---- two processes ----

# Without BN and dropout a step is a mean over images; beta 0: no pixel is left out at random.
JOBS = {"mixed": [], "all": [*OFFICIAL, "--T", "0.3"], "skip": ["--skip-absent", "--pooled", "1"]}


def without_bn():
    """Returns the tiny modules without BN and dropout."""
    modules = tiny_modules(ael_fpl)
    whole = modules["make_backbone"]

    def make_backbone(args):
        net = whole(args)
        for module in list(net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
        for p in net.parameters():
            p.data *= 3  # keeps the signal alive
        return net

    class Head(modules["DeepLabV3Plus"]):
        dropout = 0.0

    return {"make_backbone": make_backbone, "DeepLabV3Plus": Head}


def job_flags(tree, out, name):
    """Every pixel is labelled and inside, so that a mean of means is the mean."""
    extra = ["--batch-size-unlabeled", "4", *SURE, "--beta", "0", "--lr", "0.002", *JOBS[name]]
    return flags(tree, out, iters=7, log=1, evaluate=7, save=7, batch=4) + extra


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns {job: (one process, [each of two])}, and the folder of three whole runs of two."""
    folder = tmp_path_factory.mktemp("pairs")
    tree = draw_tree(folder / "data", ids=11)
    jobs = [["bare", 0, job_flags(tree, folder / f"two-{name}", name)] for name in JOBS]
    numbers = dict(iters=7, log=2, evaluate=7, save=2, batch=4)
    for extra, name in (([], "paper"), (OFFICIAL, "official")):
        more = ["--batch-size-unlabeled", "4", *extra]
        jobs += [["whole", 0, flags(tree, folder / f"{name}-whole", **numbers) + more]]
        stopped = flags(tree, folder / f"{name}-stopped", **numbers) + more
        jobs += [["whole", 6 if extra else 4, stopped], ["whole", 0, stopped + ["--resume"]]]
    process = start("ael_fpl", *jobs, processes=2, program="tests.test_ael_run")
    alone = {}
    for name in JOBS:
        with pytest.MonkeyPatch.context() as patch:
            for part, value in without_bn().items():
                patch.setattr(ael_fpl, part, value)
            alone[name] = watched(patch, job_flags(tree, folder / f"one-{name}", name)).steps
    finish(process)
    return {name: (alone[name], both(folder / f"two-{name}")) for name in JOBS}, folder


def both(out):
    """Returns the steps that both processes of a run left."""
    saved = [torch.load(f"{out}.rank{k}", weights_only=True) for k in (0, 1)]
    assert [wrapped for wrapped, _ in saved] == [["DistributedDataParallel"]] * 2  # one network
    return [[SimpleNamespace(**step) for step in steps] for _, steps in saved]


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_take_the_steps_of_one(name, pairs):
    alone, shares = pairs[0][name]
    for number, (one, first, second) in enumerate(zip(alone, *shares, strict=True)):
        assert all(x["inside"].all() for x in one.given)
        assert (one.batch["labeled"]["label"] != 255).all()
        for key, x in first.grads.items():
            assert torch.equal(x, second.grads[key])  # one reduced sum on both
        # float32 sums of 8,000 pixels in another order, through six layers; the weights differ
        # by as little in the steps before
        assert_close(first.grads, one.grads, 5e-5)
        for net in ("student", "teacher"):
            assert_close(getattr(first, net), getattr(one, net), 2e-6)
        for part in one.parts:
            mean = (first.parts[part] + second.parts[part]) / 2
            # means of float32 numbers, as above
            assert mean == pytest.approx(one.parts[part], rel=2e-5), (number, part)
        assert first.parts["bank"] == second.parts["bank"]
        # means of 8,000 probabilities in float32
        assert_close(first.state, one.state, 1e-5)
        assert torch.equal(first.state["draws"], one.state["draws"])
        assert (first.reduced, second.reduced, one.reduced) == ([0], [0], [])  # once a step


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_share_out_the_images_and_the_draws_of_one(name, pairs):
    alone, shares = pairs[0][name]
    pasted_onto = set()
    for one, *two in zip(alone, *shares, strict=True):
        for stream, batch in one.batch.items():
            for key, x in batch.items():
                assert torch.equal(torch.cat([s.batch[stream][key] for s in two]), x)
        for k, entry in enumerate(one.seen):
            mine = [s.seen[k] for s in two]
            assert [e["net"] for e in mine] == [entry["net"]] * 2
            images = torch.cat([e["image"] for e in mine])
            if entry["net"] == "teacher" and k == len(one.seen) - 2:
                images = torch.cat([images[[0, 1, 4, 5]], images[[2, 3, 6, 7]]])  # first, second
            assert torch.equal(images, entry["image"])
        base = one.batch["labeled"]["image"]
        changed = (one.seen[0]["image"] != base).flatten(1).any(1).tolist()
        pasted_onto |= set(enumerate(changed))
        for first, second in zip(*(s.state.items() for s in two), strict=True):
            assert first[0] == second[0]
            assert first[1].numpy().tobytes() == second[1].numpy().tobytes(), first[0]
    if name == "all":  # each image has a coin of its own
        assert {(i, x) for i in (0, 3) for x in (True, False)} <= pasted_onto


@pytest.mark.parametrize("name", ["paper", "official"])
def test_two_processes_have_one_state_and_resume_exactly(name, pairs):
    folder = pairs[1]
    assert differences(folder / f"{name}-whole", folder / f"{name}-stopped") == []
    shares = both(folder / f"{name}-whole")
    assert len(shares[0]) == len(shares[1]) == 7
    for first, second in zip(*shares, strict=True):
        for part in ("state", "student", "teacher"):  # BN's statistics too: those of the first
            mine, theirs = getattr(first, part), getattr(second, part)
            assert mine.keys() == theirs.keys()
            for key, x in mine.items():
                assert x.numpy().tobytes() == theirs[key].numpy().tobytes(), key
        assert not torch.equal(first.seen[-1]["image"], second.seen[-1]["image"])
        # the channels that dropout leaves out: each process has its own
        assert first.random != second.random
    last = torch.load(folder / f"{name}-whole/last.pt", weights_only=True)
    for key, x in last["state"].items():
        assert torch.equal(x, first.state[key]), key
    resumed = both(folder / f"{name}-stopped")
    for share, steps in zip(resumed, shares, strict=True):
        assert len(share) == (3 if name == "official" else 5)  # from step 4 or 2
        for one, other in zip(share[::-1], steps[::-1], strict=False):
            for key, x in one.state.items():
                assert torch.equal(x, other.state[key]), key
            for a, b in zip(one.seen, other.seen, strict=True):
                assert torch.equal(a["logits"], b["logits"])


# ---- what is refused ----


@pytest.mark.smoke
def test_one_image_on_one_process_is_refused_and_two_run(tree, tmp_path, monkeypatch):
    shrink(ael_fpl, monkeypatch)
    for name, batch, unlabeled, words in (
        ("labelled", 1, 2, ["1 labeled image per process", "plain BN"]),
        ("unlabelled", 2, 1, ["1 unlabeled image per process", "plain BN"]),
        ("groups", 2, 2, ["--pooled 3", "2 labelled images per process"]),
        ("no group", 2, 2, ["--pooled 0"]),
    ):
        argv = flags(tree, tmp_path / name, batch=batch)
        pooled = {"groups": "3", "no group": "0"}.get(name, "1")
        argv += ["--batch-size-unlabeled", str(unlabeled), "--pooled", pooled]
        with pytest.raises(Refusal) as refused:
            train(ael_fpl, argv)
        line = str(refused.value)
        assert all(word in line for word in words) and "\n" not in line
        assert not (tmp_path / name).exists()
    argv = flags(tree, tmp_path / "run", iters=2, batch=2) + ["--batch-size-unlabeled", "2"]
    train(ael_fpl, argv)
    assert log(tmp_path / "run")[-1]["kind"] == "done"


@pytest.mark.smoke
def test_nothing_to_paste_is_refused(tree, tmp_path, monkeypatch):
    shrink(ael_fpl, monkeypatch)
    argv = flags(tree, tmp_path / "run", iters=2)
    for never in (range(11), [0, 11]):  # none is left; a class that is not there
        with pytest.raises(Refusal, match="--paste-not.* 0 to 10") as refused:
            train(ael_fpl, [*argv, "--paste-not", *map(str, never)])
        assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
    train(ael_fpl, [*argv, "--paste-not", *map(str, range(10))])  # one is left
    argv[argv.index("--out") + 1] = str(tmp_path / "none")
    train(ael_fpl, [*argv, "--paste-not", *map(str, range(11)), "--paste-draws", "0"])


def partner_alone(tree):
    """Returns a seed, and the image that is a partner in the first step but no first image."""
    for seed in range(100):
        rng = np.random.default_rng([seed, zlib.crc32(b"bank")])
        bank, empty = rng.random(11, np.float32), torch.zeros(11, 6, dtype=torch.bool)
        drawn = ael_fpl.draw_partners(bank, empty, 2, rng)[:, 1].tolist()
        rounds = stream_of(SimpleNamespace(seed=seed), 6, "unlabeled", range(2))
        rest = [i for i in drawn if i not in rounds]
        if rest:
            return seed, tree / f"train/train{UNLABELED[rest[0]]}.jpg"
    raise AssertionError("no such seed")


def test_a_damaged_partner_is_refused_by_name_in_one_line(tmp_path, monkeypatch):
    tree = draw_tree(tmp_path / "data")
    seed, path = partner_alone(tree)
    path.write_bytes(path.read_bytes()[:200])
    argv = flags(tree, tmp_path / "run") + ["--batch-size-unlabeled", "2", "--seed", str(seed)]
    with monkeypatch.context() as patch, pytest.raises(Refusal, match=re.escape(str(path))):
        shrink(ael_fpl, patch)
        train(ael_fpl, argv)
    # the real network and the real end of a process: threads do not hold it up
    process = Forked([str(ROOT / "ael_fpl.py"), *argv, "--weights", "none"], apart=True)
    _, text = process.communicate()
    assert process.returncode == 2, text
    (line,) = text.splitlines()
    assert line.startswith(f"ael_fpl.py: {path}: not readable as an image")
    assert not (tmp_path / "run").exists()


def test_masks_of_unlabelled_images_are_never_opened(tmp_path, monkeypatch):
    tree = draw_tree(tmp_path / "data")
    for i in UNLABELED:
        (tree / f"trainannot/train{i}.png").write_bytes(b"never opened")
    _, found = steps_of(tree, tmp_path / "run", monkeypatch, *OFFICIAL, iters=6, pictures=3)
    assert set(found.steps[0].batch) == {"labeled", "paste", "unlabeled"}
    assert set(found.steps[0].batch["unlabeled"]) == {"image", "inside"}
    assert (tmp_path / "run/panels/000006-train.png").exists()


def test_weights_that_are_not_finite_are_refused_and_never_saved(tree, tmp_path, monkeypatch):
    shrink(ael_fpl, monkeypatch)
    argv = flags(tree, tmp_path / "run", iters=8, log=2, evaluate=8, save=2) + UNEVEN
    whole, calls = ael_fpl.update_teacher, []

    def update_teacher(teacher, student, *rest):
        calls.append(1)
        whole(teacher, student, *rest)
        if len(calls) == 3:
            with torch.no_grad():
                next(student.parameters()).fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(ael_fpl, "update_teacher", update_teacher)
        with pytest.raises(Refusal, match="not finite at step 4"):
            train(ael_fpl, argv)
    assert len(calls) == 4
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert saved["step"] == 2 and saved["state"]["confidence"].isfinite().all()
    train(ael_fpl, argv + ["--resume"])  # and from there it goes on
    assert log(tmp_path / "run")[-1]["kind"] == "done"


# ---- Copy-Paste, kinds of runs ----


@pytest.mark.smoke
def test_pasting_is_switched_off_by_draws_or_by_chance(tree, tmp_path, monkeypatch):
    shares = {}
    for draws, chance in ((0, 1.0), (3, 0.0), (3, 1.0), (3, 0.5)):
        extra = ["--paste-draws", str(draws), "--paste-prob", str(chance), "--paste-not"]
        out = tmp_path / f"{draws}-{chance}"
        _, found = steps_of(tree, out, monkeypatch, *extra, "--paste-scales", "1", "2", iters=6)
        same = []
        for step in found.steps:
            base, seen = step.batch["labeled"]["image"], step.seen[0]["image"]
            same += (seen == base).flatten(1).all(1).tolist()
        shares[draws, chance] = sum(same) / len(same)
    assert shares[0, 1.0] == shares[3, 0.0] == 1
    assert shares[3, 1.0] < 0.25 < shares[3, 0.5] < 0.9  # a class may be missing in a crop


@pytest.mark.smoke
def test_a_run_starts_from_a_supervised_one(tree, tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    train(supervised, flags(tree, tmp_path / "first", iters=3, save=3))
    init = str(tmp_path / "first/last.pt")
    capsys.readouterr()
    _, found = steps_of(tree, tmp_path / "run", monkeypatch, "--init", init)
    words = f"starting from {init}, step 3: student from its student; teacher from its student\n"
    assert words in capsys.readouterr().out
    theirs = torch.load(init, weights_only=True)["networks"]["student"]
    for net in found.networks.values():
        assert_close(net.state_dict(), theirs, 0)
    assert found.start == 0 and log(tmp_path / "run")[-1]["kind"] == "done"


def own_folder(root, classes):
    """Draws a folder of one's own: blocks of few of its classes, and of the ignored value."""
    rng = np.random.default_rng(classes)
    for part, count in (("train", 8), ("val", 2), ("test", 2)):
        for kind in ("images", "masks"):
            (root / kind / part).mkdir(parents=True)
        for i in range(count):
            mask = rng.integers(0, classes + 1, (6, 7)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
            mask[mask == classes] = 255
            pixels = rng.integers(0, 256, (36, 42, 3), dtype=np.uint8)
            Image.fromarray(mask).save(root / f"masks/{part}/{i}.png")
            Image.fromarray(pixels).save(root / f"images/{part}/{i}.png")
    return root


RECIPES = [
    ["--recipe", recipe, "--unsup-loss", loss]
    for recipe in ("paper", "official")
    for loss in ("fpl", "ce")
]
NUMBERS = dict(total_iters=2, log_every=1, eval_every=2, save_every=2, pictures_every=2, workers=0)
NUMBERS |= dict(batch_size=4, batch_size_unlabeled=3, crop_size=32, lr=0.01, output_stride=16)


@pytest.mark.smoke
@pytest.mark.parametrize("classes", [2, 81])
def test_two_classes_and_81_train_to_finite_numbers(classes, tmp_path, monkeypatch):
    shrink(ael_fpl, monkeypatch)
    root = own_folder(tmp_path / "data", classes)
    for number, extra in enumerate(RECIPES):
        out = tmp_path / str(number)
        words = ["--dataset", "folder", "--data-root", str(root), "--num-classes", str(classes)]
        words += ["--out", str(out), "--split", "1/4", "--device", "cpu", "--weights", "none"]
        for name, value in NUMBERS.items():
            words += ["--" + name.replace("_", "-"), str(value)]
        with monkeypatch.context() as patch:
            found = watched(patch, [*words, "--backbone", "resnet18", *extra])
        for step in found.steps:
            assert all(math.isfinite(x) for x in step.parts.values()), extra
            tensors = (*step.grads.values(), *step.student.values(), *step.teacher.values())
            assert all(x.isfinite().all() for x in tensors)
            assert step.state["confidence"].shape == (classes,)
            assert step.state["present"].shape == (classes, 6)
            if classes == 2:  # one positive: FPL is cross-entropy with a weight
                assert step.parts["K_gt_1"] == 0
        done = log(out)[-1]
        assert done["kind"] == "done" and len(done["best"]["iou"]) == classes
        assert (out / "panels/000002-train.png").exists()


def slowly(function):
    """Returns a function that takes 10 ms more."""

    def slower(*given):
        time.sleep(0.01)
        return function(*given)

    return slower


@pytest.mark.smoke
@pytest.mark.parametrize("extra", RECIPES, ids=" ".join)
def test_lines_of_the_log_have_one_set_of_names_and_three_times(extra, tree, tmp_path, monkeypatch):
    for name in ("copy_paste", "partner_mask"):  # before and after the networks' passes
        monkeypatch.setattr(ael_fpl, name, slowly(getattr(ael_fpl, name)))
    _, found = steps_of(tree, tmp_path / "run", monkeypatch, *extra, iters=4, log=2)
    lines = [line for line in log(tmp_path / "run") if line["kind"] == "train"]
    names = [*NAMES, *(["unsup_l"] if "official" in extra else []), "bank", "regions"]
    assert len(lines) == 2
    for line, steps in zip(lines, (found.steps[:2], found.steps[2:]), strict=True):
        assert list(line) == ["kind", "step", "lr", *names, "time"]
        assert list(line["time"]) == ["data_ms", "bank_ms", "step_ms", "elapsed_s"]
        for step in steps:
            assert list(step.parts) == names and set(step.spent) == {"data", "bank"}
            assert step.spent["data"] > 0 and step.spent["bank"] > 0.02
        for part in ("data", "bank"):
            mean = 1e3 * sum(step.spent[part] for step in steps) / 2
            assert line["time"][f"{part}_ms"] == pytest.approx(mean, abs=0.01)
        assert line["time"]["data_ms"] + line["time"]["bank_ms"] < line["time"]["step_ms"]
        for name in names:  # means since the line before
            mean = sum(step.parts[name] for step in steps) / 2
            assert line[name] == pytest.approx(mean, rel=1e-6, abs=1e-12)
        shares = ("kept", "conf_t", "K_gt_1", "bank", "regions")
        assert all(0 <= line[name] <= 1 for name in shares)
    ce = extra[-1] == "ce"
    assert all((line["balance"] == 1) == ce for line in lines)
    for step in found.steps:
        more = step.parts.get("unsup_l", 0)
        if ce or "paper" in extra:  # with a balance for each group the sum is another
            whole = step.parts["sup"] + step.parts["unsup"] + more
            assert step.parts["loss"] == pytest.approx(whole, rel=1e-6)


def test_pictures_of_one_colour_and_masks_of_nothing_stay_finite(tmp_path, monkeypatch):
    tree = draw_tree(tmp_path / "data")
    for i in range(8):
        for path in (tree / f"train/train{i}.jpg", tree / f"trainannot/train{i}.png"):
            colour = (90, 120, 30) if path.suffix == ".jpg" else 11  # CamVid's void
            Image.new("RGB" if path.suffix == ".jpg" else "L", (48, 36), colour).save(path)
    for number, extra in enumerate((*RECIPES, ["--skip-absent"])):
        out = tmp_path / str(number)
        _, found = steps_of(tree, out, monkeypatch, *extra, iters=6)
        for step in found.steps:
            assert all(math.isfinite(x) for x in step.parts.values()), extra
            tensors = (*step.grads.values(), *step.student.values(), *step.teacher.values())
            assert all(x.isfinite().all() for x in tensors)
            assert step.parts["sup"] == 0
        first, last = found.state["confidence"], step.state["confidence"]
        # absent classes count with 0, six times with weight 0.03
        expected = first if "--skip-absent" in extra else first * 0.97**6
        assert torch.allclose(last, expected, atol=1e-6)
        assert log(out)[-1]["kind"] == "done"


def main(jobs):
    """Makes the runs as one of several processes; leaves <out>.rank<k>: the steps."""
    whole = tiny_modules(ael_fpl)

    def watch(kind, stop, argv):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (without_bn() if kind == "bare" else whole).items():
                patch.setattr(ael_fpl, name, value)
            if stop:
                stop_in(patch, stop)
                with pytest.raises(KeyboardInterrupt):
                    train(ael_fpl, argv)
                return
            found = watched(patch, argv)
        out = argv[argv.index("--out") + 1]
        steps = [vars(step) for step in found.steps]
        torch.save([found.wrapped, steps], f"{out}.rank{torch.distributed.get_rank()}")

    in_one_group(ael_fpl, [lambda job=job: watch(*job) for job in jobs])


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
