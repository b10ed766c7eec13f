"""cps_fpl.py's loop: what each network sees in a step, what it learns from it, what is scored.

All but three use the tiny network of tests/helpers.py. A run leaves a list of its steps (watched);
one step is compared with a literal one (literal_step). As a program (python -m tests.test_cps_run
SCRIPT JSON) it makes such runs as one of several processes and saves their steps.
"""

import contextlib
import json
import math
import sys
from collections import Counter
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import cps_fpl
import sources
from common import Refusal, data, distributed, run
from common.distributed import Group
from supervised import supervised_loss
from tests.helpers import (
    differences,
    draw_tree,
    finish,
    flags,
    in_one_group,
    log,
    shrink,
    start,
    tiny_modules,
    train,
)

NAMES = ["loss", "sup", "unsup", "balance", "K", "K_gt_1", "weight", "pseudo_acc", "coverage"]
UNEVEN = ["--batch-size-unlabeled", "3"]  # no count of labelled images can pass for the other
SURE = ["--scales", "1.0", "1.5"]  # of 48x36 pixels: a crop of 32 lies inside


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return draw_tree(tmp_path_factory.mktemp("cps") / "data")


# ---- a run and its steps ----


def watched(patch, argv):
    """Runs main; returns its networks as they began and a list of its steps.

    A step: batch {stream: tensors}, keys {stream: keys of the images}, seen (one entry for each
    forward pass of a network in training), cross (what cross_loss was given), grads, weights (after
    the update, buffers too), parts, reduced (how often gradients went over all processes).
    """
    steps, networks, read, scoring = [], [], [], []

    def begin():
        empty = dict(batch={}, keys={}, seen=[], cross=None, grads={}, weights={}, reduced=[])
        steps.append(SimpleNamespace(**empty))

    def build(*given):
        net, number = whole["build"](*given), len(networks)
        networks.append(deepcopy(net))

        def saw(module, inputs, out):
            if not scoring:
                entry = dict(branch=number, image=inputs[0].clone(), grad=torch.is_grad_enabled())
                entry["logits"] = out["logits"].detach().clone()
                entry["training"] = {m.training for m in module.modules()}
                steps[-1].seen.append(entry)

        net.register_forward_hook(saw)
        return net

    def parallel(net, args, group):
        net = whole["parallel"](net, args, group)
        if isinstance(net, DistributedDataParallel):

            def count(state, bucket):
                steps[-1].reduced.append(bucket.index())
                return allreduce_hook(None, bucket)

            net.register_comm_hook(None, count)
        return net

    def make_optimizer(trained, args):
        optimizer = whole["make_optimizer"](trained, args)

        def before(*_):
            for i, net in enumerate(trained):
                for name, p in net.named_parameters():
                    steps[-1].grads[f"{i}.{name}"] = p.grad.clone()

        def after(*_):
            for i, net in enumerate(trained):
                for name, x in net.state_dict().items():
                    steps[-1].weights[f"{i}.{name}"] = x.clone()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    def cross_loss(students, teachers, inside, progress, args):
        students = list(students)
        entry = dict(students=[x.detach().clone() for x in students], inside=inside.clone())
        entry |= dict(teachers=[x.detach().clone() for x in teachers], progress=progress)
        entry["attached"] = [x.requires_grad for x in teachers]
        steps[-1].cross = entry
        return whole["cross_loss"](students, teachers, inside, progress, args)

    def open_stream(name, *given):
        for batch in whole["open_stream"](name, *given):
            steps[-1].batch[name] = {key: x.clone() for key, x in batch.items()}
            yield batch

    class Samples(cps_fpl.Samples):
        def __init__(self, some, items, with_label, scales, stream, args):
            super().__init__(some, items, with_label, scales, stream, args)
            self.stream = stream

        def __getitem__(self, number):
            sample = super().__getitem__(number)
            steps[-1].keys.setdefault(self.stream, []).append(read[-1] if read else "")
            return sample

    def evaluate(*given):
        scoring.append(1)
        result = whole["evaluate"](*given)
        scoring.pop()
        return result

    names = "build parallel make_optimizer cross_loss open_stream evaluate".split()
    whole = {name: getattr(cps_fpl, name) for name in names}
    wholly_read, step = data.Data.read, run.Run.step

    def read_one(self, item, with_label):
        read.append(item.key)
        return wholly_read(self, item, with_label)

    def logged(self, number, parts, *rest):
        steps[-1].parts = {name: x.item() for name, x in parts.items()}
        step(self, number, parts, *rest)
        begin()

    mine = [build, parallel, make_optimizer, cross_loss, open_stream, evaluate]
    for name, function in zip(names, mine, strict=True):
        patch.setattr(cps_fpl, name, function)
    patch.setattr(cps_fpl, "Samples", Samples)
    patch.setattr(data.Data, "read", read_one)
    patch.setattr(run.Run, "step", logged)
    begin()
    train(cps_fpl, argv)
    return networks, steps[:-1]


def steps_of(tree, out, monkeypatch, *extra, **numbers):
    """Returns flags, first networks and steps of a small run with the tiny network."""
    shrink(cps_fpl, monkeypatch)
    argv = flags(tree, out, **{"log": 1, "iters": 2, **numbers}) + [*UNEVEN, *extra]
    with monkeypatch.context() as patch:
        networks, steps = watched(patch, argv)
    return run.resolve(run.parse(cps_fpl.Args, argv), cps_fpl.preset), networks, steps


def masks_of(args, step):
    """The masks of the whole batch of a step, whatever the number of processes."""
    rng = np.random.default_rng([args.seed, step])
    masks = [cps_fpl.toggled_mask(rng, args.crop_size) for _ in range(args.batch_size_unlabeled)]
    return torch.stack(masks)


def mixed(mask, first, second):
    """first, and second where mask is True: by multiplication."""
    return first * ~mask + second * mask


# ---- one step, literally ----


def likeliest(logits):
    """The likeliest class; two probabilities may be one float32 number where logits differ."""
    return logits.softmax(1).argmax(1)


def literal_step(nets, batch, args, step):
    """Returns what a step minimizes, with its graph in one piece, and the numbers of its line."""
    first, label = batch["unlabeled"], batch["labeled"]["label"]
    if args.cutmix:
        second, mask = batch["partner"], masks_of(args, step)
        with torch.no_grad():
            views = [(net(first["image"]), net(second["image"])) for net in nets]
        teachers = [mixed(mask, a["logits"], b["logits"]) for a, b in views]
        image = mixed(mask, first["image"], second["image"])
        inside = mixed(mask[:, 0], first["inside"], second["inside"])
        students = [net(image)["logits"] for net in nets]
        labeled = [net(batch["labeled"]["image"])["logits"] for net in nets]
    else:
        labeled = [net(batch["labeled"]["image"])["logits"] for net in nets]
        others = [net(first["image"])["logits"] for net in nets]
        students = [torch.cat(pair) for pair in zip(labeled, others, strict=True)]
        teachers = [logits.detach() for logits in students]
        inside = torch.cat([batch["labeled"]["inside"], first["inside"]])
    sup = sum(F.cross_entropy(logits, label, ignore_index=255) for logits in labeled)
    names = ("k_max", "strict", "weight", "mean_over")
    unsup = ce = 0
    for student, teacher in ((0, 1), (1, 0)):  # L12: the second teaches the first; L21
        pseudo = likeliest(teachers[teacher])
        losses = F.cross_entropy(students[student], pseudo, reduction="none")
        ce = ce + losses[inside].mean()
        if args.unsup_loss == "fpl":
            some = {name: getattr(args, name) for name in names}
            pair = (students[student], teachers[teacher])
            loss, weight = cps_fpl.fuzzy_positive_loss(*pair, args.T, **some)
            losses = loss * weight
        unsup = unsup + losses[inside].mean()
    balance = (ce / unsup).detach()
    cross = unsup * balance if args.balance else unsup
    numbers = {"loss": sup + args.unsup_weight * cross, "sup": sup, "unsup": unsup}
    numbers |= {"balance": balance} | literal_watch(teachers, inside, labeled, label, args)
    return numbers["loss"], {name: torch.as_tensor(x).item() for name, x in numbers.items()}


def literal_watch(teachers, inside, labeled, label, args):
    """The five means over every fourth pixel of every fourth row, of both networks together."""
    found = {name: [] for name in NAMES[4:]}
    for logits, good, truth in (
        *((x, inside, None) for x in teachers),
        *((x, label != 255, label) for x in labeled),
    ):
        prob_t = logits.detach().softmax(1)
        K = cps_fpl.fuzzy_positive_assignment(prob_t, args.T, k_max=args.k_max, strict=args.strict)
        weight = cps_fpl.adaptive_weight(prob_t, K, args.weight, args.mean_over)
        for i, y, x in good.nonzero().tolist():
            if y % 4 or x % 4:
                continue
            k = int(K[i, y, x])
            if truth is None:
                found["K"].append(k)
                found["K_gt_1"].append(k > 1)
                found["weight"].append(float(weight[i, y, x]))
            else:
                order = prob_t[i, :, y, x].sort(descending=True, stable=True)[1].tolist()
                rank = order.index(int(truth[i, y, x]))
                found["pseudo_acc"].append(rank == 0)
                found["coverage"].append(rank < k)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def literal_update(nets, momentum, args, step):
    """SGD by hand: momentum 0.9, the head's own rate, decay on weights and not on vectors."""
    for i, net in enumerate(nets):
        for name, p in net.named_parameters():
            lr = args.lr * (1 - step / args.total_iters) ** 0.9
            lr *= args.lr_head if name.startswith("head.") else 1
            push = p.grad + (args.weight_decay if p.ndim > 1 else 0) * p.detach()
            before = momentum.get((i, name))
            momentum[i, name] = push if before is None else 0.9 * before + push
            p.data -= lr * momentum[i, name]
            p.grad = None


def load_weights(nets, step):
    """Gives networks the weights after a step."""
    for i, net in enumerate(nets):
        mine = {k[2:]: x for k, x in step.weights.items() if k.startswith(f"{i}.")}
        net.load_state_dict(mine)


def assert_close(mine, theirs, rel):
    """Every tensor equals its namesake up to rel of its largest number."""
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        scale = theirs[name].double().abs().max().item()
        distance = (x.double() - theirs[name].double()).abs().max().item()
        assert distance <= rel * scale, f"{name}: {distance} of {scale}"


LITERAL = [
    ["--unsup-loss", "ce"],
    [],
    ["--recipe", "official", "--T", "0.5"],
    ["--unsup-loss", "ce", "--no-cutmix"],
    ["--no-cutmix", "--recipe", "official", "--T", "0.5"],
]


@pytest.mark.smoke
@pytest.mark.parametrize("extra", LITERAL, ids=" ".join)
def test_steps_are_those_of_one_backward_of_the_whole_loss(extra, tree, tmp_path, monkeypatch):
    extra = [*extra, "--unsup-weight", "2.5", "--lr-head", "3", "--weight-decay", "0.1"]
    args, nets, steps = steps_of(tree, tmp_path / "run", monkeypatch, *extra)
    assert args.lr_head == 3 and args.weight_decay == 0.1 and args.decay_on == "weights"
    momentum = {}
    for number, step in enumerate(steps):
        if number:  # bit for bit: no pixel near a tie changes its likeliest class
            load_weights(nets, steps[number - 1])
        loss, numbers = literal_step(nets, step.batch, args, number)
        loss.backward()
        grads = {f"{i}.{k}": p.grad for i, n in enumerate(nets) for k, p in n.named_parameters()}
        # float32: sums of 3,000 pixels in another order, through six layers; 1e-5 of the largest
        assert_close(step.grads, grads, 3e-5)
        literal_update(nets, momentum, args, number)
        weights = {f"{i}.{k}": x for i, n in enumerate(nets) for k, x in n.state_dict().items()}
        assert_close(step.weights, weights, 1e-5)
        assert list(step.parts) == NAMES
        # means over 2,000 numbers or fewer in float32: a few 1e-7 relative
        assert step.parts == pytest.approx(numbers, rel=1e-5)
    assert 0 < steps[0].parts["K_gt_1"] and 0 < steps[0].parts["unsup"]
    assert not steps[0].cross["inside"].all()  # padding occurs, and is left out


# ---- what each network sees ----


def inputs_of(step, branch):
    return [entry["image"] for entry in step.seen if entry["branch"] == branch]


@pytest.mark.smoke
def test_with_cutmix_a_network_sees_both_clean_images_the_mixed_and_the_labelled(
    tree, tmp_path, monkeypatch
):
    args, _, steps = steps_of(tree, tmp_path / "run", monkeypatch, iters=3, evaluate=1)
    assert len(steps) == 3
    for number, step in enumerate(steps):
        clean = [step.batch[name]["image"] for name in ("unlabeled", "partner")]
        order = [*clean, mixed(masks_of(args, number), *clean), step.batch["labeled"]["image"]]
        for branch in (0, 1):
            seen = inputs_of(step, branch)
            assert len(seen) == 4
            assert all(torch.equal(a, b) for a, b in zip(seen, order, strict=True))
            kinds = [e["grad"] for e in step.seen if e["branch"] == branch]
            assert kinds == [False, False, True, True]
        assert all(e["training"] == {True} for e in step.seen)  # never in eval mode
        assert batches_tracked(step) == {4 * (number + 1)}


@pytest.mark.smoke
def test_without_cutmix_a_network_sees_the_labelled_and_the_unlabelled_image(
    tree, tmp_path, monkeypatch
):
    extra = ("--no-cutmix",)
    _, _, steps = steps_of(tree, tmp_path / "run", monkeypatch, *extra, iters=3, evaluate=1)
    for number, step in enumerate(steps):
        assert list(step.batch) == ["labeled", "unlabeled"]
        order = [step.batch[name]["image"] for name in ("labeled", "unlabeled")]
        for branch in (0, 1):
            seen = inputs_of(step, branch)
            assert len(seen) == 2
            assert all(torch.equal(a, b) for a, b in zip(seen, order, strict=True))
        assert all(e["training"] == {True} and e["grad"] for e in step.seen)
        assert batches_tracked(step) == {2 * (number + 1)}
        # the labelled pixels come first, those of the void class and all
        assert torch.equal(step.cross["inside"][:2], step.batch["labeled"]["inside"])
        assert torch.equal(step.cross["inside"][2:], step.batch["unlabeled"]["inside"])
        assert not torch.equal(step.cross["inside"][:2], step.batch["labeled"]["label"] != 255)


@pytest.mark.parametrize("cutmix", ["--cutmix", "--no-cutmix"])
def test_without_weight_labelled_images_alone_are_seen_and_no_other_opened(
    cutmix, tmp_path, monkeypatch
):
    tree = draw_tree(tmp_path / "data")
    for i in (1, 2, 3, 5, 6, 7):
        (tree / f"train/train{i}.jpg").write_bytes(b"never opened")
    extra = ("--unsup-weight", "0", cutmix)
    numbers = dict(evaluate=1, pictures=1)
    _, nets, steps = steps_of(tree, tmp_path / "run", monkeypatch, *extra, **numbers)
    assert (tmp_path / "run/panels/000002-train.png").exists()
    for number, step in enumerate(steps):
        assert list(step.batch) == list(step.keys) == ["labeled"] and step.cross is None
        for branch in (0, 1):
            (seen,) = inputs_of(step, branch)
            assert torch.equal(seen, step.batch["labeled"]["image"])
        assert all(e["training"] == {True} and e["grad"] for e in step.seen)
        assert batches_tracked(step) == {number + 1}
        assert list(step.parts) == ["loss", "sup", "pseudo_acc", "coverage"]
        assert step.parts["loss"] == step.parts["sup"] > 0
    image, label = (steps[0].batch["labeled"][name] for name in ("image", "label"))
    sup = [F.cross_entropy(net(image)["logits"], label, ignore_index=255) for net in nets]
    # two means of at most 2,000 numbers in float32
    assert steps[0].parts["sup"] == pytest.approx(sum(x.item() for x in sup), rel=1e-6)
    line = next(line for line in log(tmp_path / "run") if line["kind"] == "train")
    names = ["kind", "step", "lr", "loss", "sup", "pseudo_acc", "coverage", "time"]
    assert list(line) == names


def batches_tracked(step):
    return {int(x) for name, x in step.weights.items() if name.endswith("num_batches_tracked")}


# ---- the mask ----


@pytest.mark.smoke
def test_image_inside_and_teachers_are_mixed_with_one_mask(tree, tmp_path, monkeypatch):
    args, _, steps = steps_of(tree, tmp_path / "run", monkeypatch, "--seed", "3")
    for number, step in enumerate(steps):
        mask = masks_of(args, number)
        first, second = (step.batch[name] for name in ("unlabeled", "partner"))
        inside = mixed(mask[:, 0], first["inside"], second["inside"])
        assert torch.equal(step.cross["inside"], inside)
        assert not torch.equal(inside, mixed(~mask[:, 0], first["inside"], second["inside"]))
        assert step.cross["attached"] == [False, False]
        for branch, teacher in enumerate(step.cross["teachers"]):
            a, b, student, _ = [e["logits"] for e in step.seen if e["branch"] == branch]
            assert torch.equal(teacher, torch.where(mask, b, a))
            assert torch.equal(step.cross["students"][branch], student)
        assert step.cross["progress"] == number / 2


def test_masks_are_a_function_of_seed_and_step(tree, tmp_path, monkeypatch):
    def masks(name, *extra):
        """Of each step, where the mixed image is not the first one."""
        _, _, steps = steps_of(tree, tmp_path / name, monkeypatch, *SURE, *extra)
        clean = [s.batch["unlabeled"]["image"] for s in steps]
        return [(inputs_of(s, 0)[2] != x).any(1) for s, x in zip(steps, clean, strict=True)]

    one, other = masks("one", "--seed", "5"), masks("other", "--seed", "6")
    # a pixel that is equal in both images hides one of the mask's
    args = SimpleNamespace(seed=5, crop_size=32, batch_size_unlabeled=3)
    for number, shown in enumerate(one):
        true = masks_of(args, number)[:, 0]
        assert not (shown & ~true).any() and (shown & true).sum() > 0.9 * true.sum()
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])
    assert not torch.equal(one[0][0], one[0][1])  # each image of a batch has its own


# ---- which images ----


def test_the_partners_are_all_unlabelled_images_in_another_order(tree, tmp_path, monkeypatch):
    _, _, steps = steps_of(tree, tmp_path / "run", monkeypatch, iters=8)
    seen = {name: [k for s in steps for k in s.keys[name]] for name in ("unlabeled", "partner")}
    assert seen["unlabeled"] != seen["partner"]
    for keys in seen.values():  # 24 images: four rounds of six
        assert Counter(keys) == {f"train{i}": 4 for i in (1, 2, 3, 5, 6, 7)}
    assert {k for s in steps for k in s.keys["labeled"]} == {"train0", "train4"}


@pytest.mark.smoke
def test_same_image_cutmix_mixes_two_crops_of_one_image(tree, tmp_path, monkeypatch):
    extra = ("--same-image-cutmix",)
    _, _, steps = steps_of(tree, tmp_path / "same", monkeypatch, *extra, iters=4)
    _, _, plain = steps_of(tree, tmp_path / "plain", monkeypatch, iters=4)
    for step, other in zip(steps, plain, strict=True):
        assert list(step.batch) == ["labeled", "unlabeled", "unlabeled.2"]
        assert step.keys["unlabeled"] == step.keys["unlabeled.2"] == other.keys["unlabeled"]
        one, two = (step.batch[name]["image"] for name in ("unlabeled", "unlabeled.2"))
        assert torch.equal(one, other.batch["unlabeled"]["image"])
        assert all(not torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert torch.equal(inputs_of(step, 1)[1], two)


# ---- two processes ----

# With a network that has no BN. The soft loss: a rounding cannot change the class that is taught.
JOBS = {
    "cutmix": ["--unsup-loss", "soft"],
    "no-cutmix": ["--unsup-loss", "soft", "--no-cutmix"],
    "same-image": ["--unsup-loss", "soft", "--same-image-cutmix"],
    "labels": ["--unsup-weight", "0"],
}


def without_bn():
    """Returns the tiny modules without BN: then a step is a mean over images."""
    modules = tiny_modules(cps_fpl)
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

    return modules | {"make_backbone": make_backbone}


def job_flags(tree, out, name):
    """Every pixel is labelled and inside, so that a mean of means is the mean."""
    extra = ["--batch-size-unlabeled", "6", *SURE, "--unsup-weight", "20", *JOBS[name]]
    return flags(tree, out, iters=3, log=1, evaluate=3, save=3, batch=4) + extra


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns {job: (steps of one process, [steps of each of two])}."""
    folder = tmp_path_factory.mktemp("pairs")
    tree = draw_tree(folder / "data", ids=11)
    argvs = [[name, *job_flags(tree, folder / f"two-{name}", name)] for name in JOBS]
    process = start("cps_fpl", *argvs, processes=2, program="tests.test_cps_run")
    alone = {}
    for name in JOBS:
        with pytest.MonkeyPatch.context() as patch:
            for part, value in without_bn().items():
                patch.setattr(cps_fpl, part, value)
            alone[name] = watched(patch, job_flags(tree, folder / f"one-{name}", name))[1]
    finish(process)
    found = {}
    for name in JOBS:
        both = [torch.load(folder / f"two-{name}.rank{k}", weights_only=True) for k in (0, 1)]
        found[name] = (alone[name], [[SimpleNamespace(**s) for s in steps] for steps in both])
    return found


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_take_the_steps_of_one(name, pairs):
    alone, both = pairs[name]
    for number, (one, first, second) in enumerate(zip(alone, *both, strict=True)):
        if one.cross:
            assert one.cross["inside"].all()
        assert (one.batch["labeled"]["label"] != 255).all()
        for name_, x in first.grads.items():
            assert torch.equal(x, second.grads[name_])  # one reduced sum on both
        # float32 sums of 12,000 pixels in another order, through six layers; the weights differ
        # by as little in the steps before
        assert_close(first.grads, one.grads, 2e-5)
        assert_close(first.weights, one.weights, 1e-6)
        for part in one.parts.keys() & {"loss", "sup", "unsup"}:
            mean = (first.parts[part] + second.parts[part]) / 2
            # means of float32 numbers, as above
            assert mean == pytest.approx(one.parts[part], rel=1e-5), (number, part)
        assert all(x.abs().max() > 1e-4 for x in one.grads.values())
    labels = pairs["labels"][0][0].grads  # the cross loss has its part in what was compared
    for name_, x in alone[0].grads.items() if name != "labels" else ():
        assert (x - labels[name_]).abs().max() > 0.05 * x.abs().max(), name_


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_share_out_the_images_and_the_masks_of_one(name, pairs):
    alone, both = pairs[name]
    for one, *shares in zip(alone, *both, strict=True):
        for stream, keys in one.keys.items():
            assert keys == [key for share in shares for key in share.keys[stream]]
            here = [share.batch[stream]["image"] for share in shares]
            assert torch.equal(torch.cat(here), one.batch[stream]["image"])
        if name in ("cutmix", "same-image"):
            for branch in (0, 1):
                here = [inputs_of(share, branch)[2] for share in shares]
                assert torch.equal(torch.cat(here), inputs_of(one, branch)[2])  # the mixed
        if name == "same-image":
            for share in shares:
                assert share.keys["unlabeled"] == share.keys["unlabeled.2"]


@pytest.mark.parametrize("name", JOBS)
def test_gradients_go_over_the_processes_once_a_step(name, pairs):
    for steps in pairs[name][1]:
        # one bucket for each network
        assert [step.reduced for step in steps] == [[0, 0]] * 3
    assert [step.reduced for step in pairs[name][0]] == [[]] * 3


@pytest.mark.smoke
def test_a_network_alone_has_nothing_to_hold_back():
    with distributed.no_sync(nn.Linear(1, 1)) as nothing:
        assert nothing is None
    seen = []

    class Parallel(nn.Module):
        @contextlib.contextmanager
        def no_sync(self):
            seen.append("begin")
            yield
            seen.append("end")

    with distributed.no_sync(Parallel()):
        assert seen == ["begin"]
    assert seen == ["begin", "end"]


# ---- what is scored ----


def scores(nets, kind, tree, part, count):
    """mIoU of one network, or of both's mean probabilities, by a loop over images."""
    confusion = np.zeros((11, 11), np.int64)
    for i in range(count):
        pixels = np.array(Image.open(tree / f"{part}/{part}{i}.jpg"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        with torch.no_grad():
            prob = [net.eval()(image)["logits"].double().softmax(1) for net in nets]
        prob = {"branch1": prob[0], "branch2": prob[1], "mean": (prob[0] + prob[1]) / 2}[kind]
        pred = prob.argmax(1)[0].numpy()
        label = np.array(Image.open(tree / f"{part}annot/{part}{i}.png"))
        np.add.at(confusion, (label[label < 11], pred[label < 11]), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((confusion.diagonal()[union > 0] / union[union > 0]).mean())


KINDS = ["branch1", "branch2", "mean"]
TIE = 4e-4  # of a mIoU: a pixel whose likeliest two are rounded apart, of 300 in each of 11 classes


def test_the_network_that_evaluate_names_is_scored_and_best_follows_it(
    tree, tmp_path, monkeypatch, capsys
):
    trained, bests, chosen = {}, {}, set()
    for kind in KINDS:
        out = tmp_path / kind
        extra = ("--evaluate", kind, "--lr", "0.1")
        args, nets, steps = steps_of(tree, out, monkeypatch, *extra, iters=6, evaluate=1, save=6)
        lines = [line["miou"] for line in log(out) if line["kind"] == "eval"]
        trained[kind] = steps[-1].weights
        own = []
        for step in steps:
            load_weights(nets, step)
            own.append({k: scores(nets, k, tree, "val", 2) for k in KINDS})
        assert lines == pytest.approx([score[kind] for score in own], abs=TIE)
        values = [sorted(score.values()) for score in own]
        assert any(a + 3 * TIE < b and b + 3 * TIE < c for a, b, c in values)  # can be told apart
        saved = torch.load(out / "best.pt", weights_only=True)
        assert saved["step"] == 1 + lines.index(max(lines)) == log(out)[-1]["best_step"]
        chosen.add(saved["step"])
        names = {f"{i}.{k}": x for i in (0, 1) for k, x in saved["networks"][KINDS[i]].items()}
        best = steps[saved["step"] - 1].weights
        assert all(torch.equal(x, best[name]) for name, x in names.items())
        for i, net in enumerate(nets):
            net.load_state_dict(saved["networks"][KINDS[i]])
        bests[kind] = {k: scores(nets, k, tree, "test", 2) for k in KINDS}
        assert log(out)[-1]["best"]["miou"] == pytest.approx(bests[kind][kind], abs=TIE)
    assert len(chosen) > 1  # not the best of one of them always
    for kind in KINDS[1:]:  # scoring changes nothing of the training
        assert all(torch.equal(x, trained[kind][k]) for k, x in trained["branch1"].items())
    checkpoint = ["--eval-only", "--checkpoint", str(tmp_path / "branch2/best.pt")]
    for asked in (None, *KINDS):  # left out: the checkpoint's own
        capsys.readouterr()
        extra = ["--evaluate", asked] if asked else []
        train(cps_fpl, [*checkpoint, "--eval-on", "test", "--workers", "0", *extra])
        (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("mIoU  ")]
        expected = 100 * bests["branch2"][asked or "branch2"]
        assert float(line.split()[1]) == pytest.approx(expected, abs=100 * TIE + 0.005)


@pytest.mark.smoke
def test_the_mean_is_that_of_probabilities_not_of_logits():
    class Fixed(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.tensor(logits).view(1, -1, 1, 1)

        def forward(self, x):
            return {"logits": self.logits}

    nets = [Fixed([4.0, 0.0, 3.5]), Fixed([-9.0, 2.0, 0.0])]
    logits = cps_fpl.Average(nets)(None)["logits"]
    prob = sum(net(None)["logits"].softmax(1) for net in nets) / 2
    # a float32 logarithm and its inverse
    assert torch.allclose(logits.exp(), prob, atol=1e-6)
    # means of logits -2.5, 1, 1.75; of probabilities 0.31, 0.45, 0.25
    assert sum(net(None)["logits"] for net in nets).argmax() == 2 and logits.argmax() == 1


@pytest.mark.smoke
def test_the_mean_brings_both_networks_into_eval_mode_and_back(tree, tmp_path, monkeypatch):
    shrink(cps_fpl, monkeypatch)
    argv = flags(tree, tmp_path / "run")
    args = run.resolve(run.parse(cps_fpl.Args, argv), cps_fpl.preset)
    images, modes = sources.load(args), []
    nets = [cps_fpl.Network(args, 11, cps_fpl.CPSHead) for _ in (1, 2)]
    for net in nets:
        net.register_forward_hook(lambda module, *_: modes.append(module.training))
    group = Group(0, 1, torch.device("cpu"))
    result, _ = cps_fpl.evaluate(cps_fpl.Average(nets), images, images.val, args, group)
    assert modes == [False] * 4 and all(net.training for net in nets)
    assert result["miou"] == pytest.approx(scores(nets, "mean", tree, "val", 2), abs=TIE)


# ---- how they begin ----


def begun(argv, monkeypatch):
    """Returns the two networks of main before the first step."""
    found = []

    def make_optimizer(trained, args):
        found.extend(trained)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cps_fpl, "make_optimizer", make_optimizer)
        train(cps_fpl, argv)
    return [net.state_dict() for net in found]


def test_both_networks_begin_with_the_given_backbone_and_heads_of_their_own(
    tree, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, tmp_path / "w.pth")
    argv = flags(tree, tmp_path / "run") + ["--weights", str(tmp_path / "w.pth")]
    one, two = begun(argv, monkeypatch)
    assert one.keys() == two.keys()
    for name, x in one.items():
        if name.startswith("backbone."):
            given = theirs[name.removeprefix("backbone.")]
            assert torch.equal(x, given) and torch.equal(two[name], given)
        elif x.ndim == 4 or name == "head.classify.bias":
            assert not torch.equal(x, two[name]), name
        else:
            assert torch.equal(x, two[name]), name  # BN: 1 and 0


def test_random_networks_differ_and_are_functions_of_the_seed(tree, tmp_path, monkeypatch):
    shrink(cps_fpl, monkeypatch)
    argv = flags(tree, tmp_path / "run")
    pairs = [begun([*argv, "--seed", str(seed)], monkeypatch) for seed in (0, 0, 1)]
    kernels = [name for name, x in pairs[0][0].items() if x.ndim == 4]
    assert len(kernels) == 6
    for name in kernels:
        states = [state[name] for pair in pairs for state in pair]
        assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[3])
        assert len({x.numpy().tobytes() for x in states}) == 4, name


# ---- every flag, two steps ----

VARIANTS = [
    *(["--unsup-loss", loss] for loss in ("fpl", "ce", "soft", "negative")),
    *(["--unsup-loss", loss, "--balance", "True"] for loss in ("ce", "soft", "negative")),
    *(["--k-strategy", k] for k in ("n", "fixed2", "fixed3", "step")),
    *(["--weight", weight] for weight in ("linear", "convex", "none")),
    ["--recipe", "official"],
    ["--recipe", "official", "--balance", "False", "--k-max", "2", "--strict", "True"],
    ["--no-cutmix"],
    ["--no-cutmix", "--recipe", "official", "--mean-over", "positives"],
    ["--no-cutmix", "--unsup-loss", "negative"],
    ["--ohem-kept", "0.2"],
]


@pytest.mark.parametrize("extra", VARIANTS, ids=" ".join)
def test_every_kind_of_loss_is_finite_and_logged_as_what_is_minimized(
    extra, tree, tmp_path, monkeypatch
):
    extra = [*extra, "--unsup-weight", "0.7", "--T", "0.3"]
    args, _, steps = steps_of(tree, tmp_path / "run", monkeypatch, *extra)
    lines = [line for line in log(tmp_path / "run") if line["kind"] == "train"]
    assert len(lines) == 2
    for line, step in zip(lines, steps, strict=True):
        assert list(line) == ["kind", "step", "lr", *NAMES, "time"]
        assert all(math.isfinite(line[name]) and line[name] >= 0 for name in NAMES)
        assert all(line[name] <= 1 for name in ("K_gt_1", "weight", "pseudo_acc", "coverage"))
        assert 1 <= line["K"] <= 11 and line["pseudo_acc"] <= line["coverage"]
        image, label = (step.batch["labeled"][name] for name in ("image", "label"))
        labeled = [e["logits"] for e in step.seen if torch.equal(e["image"], image)]
        assert len(labeled) == 2
        sup = sum(supervised_loss({"logits": x}, label, args).item() for x in labeled)
        assert line["sup"] == pytest.approx(sup, rel=1e-6)  # the same sums, added in float32
        factor = line["balance"] if args.balance and args.unsup_loss == "fpl" else 1
        # float32 sums and products of three numbers
        whole = line["sup"] + 0.7 * line["unsup"] * factor
        assert line["loss"] == pytest.approx(whole, rel=1e-6)
        # unsup times balance is the cross-entropy with the other's likeliest class; a pixel of
        # thousands may tie
        ce = 0
        teachers = reversed(step.cross["teachers"])
        for student, teacher in zip(step.cross["students"], teachers, strict=True):
            losses = F.cross_entropy(student, likeliest(teacher), reduction="none")
            ce += losses[step.cross["inside"]].mean().item()
        assert line["unsup"] * line["balance"] == pytest.approx(ce, rel=1e-4)
        if args.unsup_loss == "ce":
            assert line["balance"] == 1.0
        assert all(x.isfinite().all() for x in step.weights.values())


@pytest.mark.smoke
def test_the_k_of_a_step_is_that_of_its_strategy(tree, tmp_path, monkeypatch):
    for strategy, K in (
        ("fixed2", [2, 2, 2]),
        ("fixed3", [3, 3, 3]),
        ("step", [3, 2, 1]),
    ):
        extra = ("--k-strategy", strategy)
        _, _, steps = steps_of(tree, tmp_path / strategy, monkeypatch, *extra, iters=3)
        assert [step.parts["K"] for step in steps] == K
        assert [step.parts["K_gt_1"] for step in steps] == [k > 1 for k in K]
        assert [step.cross["progress"] for step in steps] == [0, 1 / 3, 2 / 3]
    extra = ("--T", "0.3", "--weight", "none")
    runs = {k: steps_of(tree, tmp_path / k, monkeypatch, "--k-strategy", k, *extra) for k in "n"}
    runs["n-1"] = steps_of(tree, tmp_path / "n-1", monkeypatch, *extra)
    (n, one) = (runs[k][2][0].parts for k in ("n", "n-1"))
    assert n["K"] > one["K"] > 1 and n["sup"] == one["sup"] and n["unsup"] != one["unsup"]
    assert n["weight"] == one["weight"] == 1.0


# ---- two classes and many ----


class Pictures(data.Data):
    """Random pictures of any number of classes, in place of a data set."""

    def __init__(self, classes):
        items = [data.Item(f"i{n:02d}") for n in range(12)]
        self.name, self.classes = "pictures", [str(i) for i in range(classes)]
        self.num_classes = classes
        self.palette = np.random.default_rng(0).integers(0, 256, (classes, 3), dtype=np.uint8)
        self.labeled, self.unlabeled, self.val, self.test = (items[n : n + 3] for n in (0, 3, 6, 9))

    def read(self, item, with_label):
        rng = np.random.default_rng(int(item.key[1:]))
        ids = rng.integers(0, self.num_classes, (7, 6)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
        pixels = rng.integers(0, 256, (42, 36, 3), dtype=np.uint8)
        return Image.fromarray(pixels), Image.fromarray(ids) if with_label else None


FEW = [[], ["--recipe", "official", "--no-cutmix"], ["--k-strategy", "fixed3"]]
FEW += [
    ["--k-strategy", "n", "--balance", "True"],
    ["--unsup-loss", "soft"],
    ["--unsup-loss", "negative"],
]


@pytest.mark.smoke
@pytest.mark.parametrize("classes", [2, 81])
def test_two_classes_and_81_train_to_finite_numbers(classes, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(cps_fpl, "load", lambda args: Pictures(classes))
    for number, extra in enumerate(FEW):
        out = tmp_path / str(number)
        _, _, steps = steps_of(tree, out, monkeypatch, *extra, pictures=2)
        for step in steps:
            assert all(math.isfinite(x) for x in step.parts.values()), extra
            assert all(x.isfinite().all() for x in (*step.grads.values(), *step.weights.values()))
            assert step.cross["teachers"][0].shape[1] == classes
        last = steps[-1].parts
        if classes == 2 and "fixed3" in extra:  # every class is a positive: nothing to learn
            assert (last["K"], last["unsup"], last["loss"]) == (2, 0, last["sup"])
        elif classes == 2 and "n" not in extra:
            assert (last["K"], last["K_gt_1"]) == (1, 0)
        elif "fixed3" in extra:
            assert last["K"] == 3
        elif "n" in extra or not extra:
            assert last["K"] > 50 or classes == 2  # nothing is known: K takes nearly all of T
        done = log(out)[-1]
        assert done["kind"] == "done" and len(done["best"]["iou"]) == classes
        assert (out / "panels/000002-train.png").exists()


# ---- what is refused when streams are opened ----


@pytest.mark.smoke
@pytest.mark.parametrize("partner", ["partner", "unlabeled.2"])
def test_a_batch_that_does_not_divide_or_is_one_image_is_refused(partner, tree, tmp_path):
    extra = ["--batch-size-unlabeled", "6"]
    extra += ["--same-image-cutmix"] if partner == "unlabeled.2" else []
    argv = flags(tree, tmp_path / "run", batch=8) + extra
    args = run.resolve(run.parse(cps_fpl.Args, argv), cps_fpl.preset)
    images, cpu = sources.load(args), torch.device("cpu")
    assert list(cps_fpl.streams(images, args)) == ["labeled", "unlabeled", partner]
    for name in ("unlabeled", partner):
        for world, words in ((4, "divide over 4 processes"), (6, "plain BN needs two")):
            with pytest.raises(Refusal, match=words) as refused:
                cps_fpl.open_stream(name, images, args, Group(0, world, cpu), 0)
            assert name in str(refused.value) and "\n" not in str(refused.value)
        assert len(next(cps_fpl.open_stream(name, images, args, Group(1, 2, cpu), 0))["image"]) == 3
    # labels alone: nothing unlabelled is there to be shared out
    args = run.replace(args, unsup_weight=0.0)
    assert list(cps_fpl.streams(images, args)) == ["labeled"]


# ---- deterministic ----


def test_a_deterministic_run_repeats_itself(tree, tmp_path, monkeypatch):
    shrink(cps_fpl, monkeypatch)
    try:
        for name in ("one", "two"):
            argv = flags(tree, tmp_path / name, log=1, pictures=4) + ["--deterministic"]
            train(cps_fpl, [*argv, "--recipe", "official", "--ohem-kept", "0.3"])
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(tmp_path / "one", tmp_path / "two") == []
    assert len(log(tmp_path / "one")) == 1 + 8 + 2 + 1  # start, steps, evaluations, done


def test_another_seed_gives_another_log(tree, tmp_path, monkeypatch):
    runs = [
        steps_of(tree, tmp_path / name, monkeypatch, "--seed", seed)[2]
        for name, seed in (("one", "0"), ("twin", "0"), ("other", "1"))
    ]
    losses = [[step.parts["loss"] for step in steps] for steps in runs]
    assert losses[0] == losses[1] != losses[2]


def main(argvs):
    """Makes the runs as one of several processes; leaves <out>.rank<k>: the steps."""
    for name, value in without_bn().items():
        setattr(cps_fpl, name, value)

    def watch(argv):
        with pytest.MonkeyPatch.context() as patch:
            _, steps = watched(patch, argv)
        out = argv[argv.index("--out") + 1]
        rank = torch.distributed.get_rank()
        torch.save([vars(step) for step in steps], f"{out}.rank{rank}")

    in_one_group(cps_fpl, [lambda argv=argv: watch(argv) for _, *argv in argvs])


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
