"""Numerical faults: every script's answer to pictures, labels, teachers and numbers gone wrong.

Runs of the tiny network, of a few steps; every number that such a run logs or saves is finite.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import recorder
import tiny
from benchmarks.runs import differences, flat, log
from common import Refusal, run

C = 11
FLAGS = {
    "mean_teacher": "--warmup-iters 0",
    "u2pl": "--warmup-iters 0 --anchors 5 --negatives 6 --keys 7 --bank-sizes 20 12",
    "u2pl_ael": f"{tiny.MORE['u2pl_ael']} --warmup-iters 0 --delta-p 0.3",
    "esl": "--anchors 5 --negatives 6 --queue 7 --zeta 0.2",
}
PLAIN = [(name, "") for name in tiny.SCRIPTS]
RUNS = PLAIN + [
    ("mean_teacher", "--consistency mse --cutmix"),
    ("cps_fpl", "--recipe official"),
    ("cps_fpl", "--no-cutmix --unsup-loss ce"),
    ("ael_fpl", "--recipe official"),
    ("ael_fpl", "--unsup-loss ce --skip-absent"),
    ("u2pl", "--unreliable-loss binary --fused off --ohem-kept 0.1 --aux-weight 0.4"),
    ("u2pl", "--unreliable-loss none --recipe official"),
    ("u2pl_ael", "--recipe official --contrast-after 0 --unreliable-loss binary"),
    ("esl", "--fused off"),
    ("esl", "--label hard --no-contrast --no-cutmix --ohem-kept 0.1 --aux-weight 0.4"),
    ("unimatch", "--unsup-loss fpl --partner crop"),
]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Drawn trees; images of one colour; training masks of void alone; 5 classes of 11."""
    root = tmp_path_factory.mktemp("trees")
    found = {name: tiny.draw_tree(root / name) for name in ("drawn", "equal", "void")}
    for path in found["equal"].rglob("*.jpg"):
        Image.new("RGB", (48, 36)).save(path)
    for path in found["void"].glob("trainannot/*.png"):
        Image.new("L", (48, 36), 11).save(path)
    return found | {"absent": tiny.draw_tree(root / "absent", ids=5)}


def is_teacher(name):
    """Whether a network that is at work now teaches: the teacher, or a branch without gradient."""
    return name == "teacher" or (name.startswith("branch") and not torch.is_grad_enabled())


def hook(patch, change):
    """change(step, network's name, outputs) may change these in place, or return others."""
    live = {"step": 1}
    restore, step = run.Run.restore, run.Run.log_step

    def begin(self, networks, optimizer, state):
        live["state"] = state
        for key, net in networks.items():
            net.register_forward_hook(lambda *given, k=key: change(live["step"], k, given[2]))
        return restore(self, networks, optimizer, state)

    def count(self, done, *rest):
        live["step"] = done + 1
        return step(self, done, *rest)

    patch.setattr(run.Run, "restore", begin)
    patch.setattr(run.Run, "log_step", count)
    return live


def finite(folder):
    """Asserts that nothing in the checkpoints of a run is NaN or Inf; returns the last one."""
    for path in folder.glob("*.pt"):
        for key, value in flat(torch.load(path, weights_only=True)).items():
            if isinstance(value, float) or (torch.is_tensor(value) and value.is_floating_point()):
                assert torch.as_tensor(value).isfinite().all(), (path, key)
    return torch.load(folder / "last.pt", weights_only=True)


def made(patch, name, tree, out, extra, change=None):
    """Makes a run of two steps; returns their parts and the scores, all of them found finite."""
    script = tiny.script(name)
    with patch.context() as patch:
        tiny.shrink(script, patch)
        if change:
            hook(patch, change)
        argv = tiny.flags(tree, out, iters=2, log=1, evaluate=2, save=2) + extra.split()
        argv = tiny.with_acting(name, argv, FLAGS.get(name, ""))
        steps = recorder.watch(patch, script, argv).steps
    parts = [step.parts for step in steps]
    assert len(parts) == 2 and finite(out)["step"] == 2
    assert all(math.isfinite(x) for one in parts for x in one.values())
    assert log(out)[-1]["kind"] == "done"
    return parts, log(out)[-1]["last"]


def never(step, key, out):
    """Classes that are not in the labels are not predicted either."""
    for name in {"logits", "coarse", "aux"} & out.keys():
        out[name][:, 5:] -= 1e4


def large(step, key, out):
    return {k: 1e4 * x / x.detach().abs().amax() for k, x in out.items()}


def padded(augment):
    """Crops of nothing but padding."""

    def padding(image, label, *rest):
        pixels, label, inside = augment(image, label, *rest)
        return pixels, label if label is None else np.full_like(label, 255), inside & False

    return padding


CASES = [(kind, *one) for kind in ("padding", "absent", "large") for one in RUNS]
CASES += [(kind, *one) for kind in ("equal", "void", "crumbs") for one in PLAIN]


@pytest.mark.parametrize("kind, name, extra", CASES)
def test_every_number_stays_finite(kind, name, extra, trees, tmp_path, monkeypatch):
    """What has no pixel is 0; a class that never occurs has no IoU, and AEL's confidence falls."""
    out, script = tmp_path / "run", tiny.script(name)
    if kind == "padding":
        monkeypatch.setattr(script, "augment", padded(script.augment))
    if kind == "crumbs":
        extra += " --scales 0.03 0.04" + " --paste-scales 0.03 0.04" * ("ael" in name)
    change = {"absent": never, "large": large}.get(kind)
    parts, scores = made(monkeypatch, name, trees.get(kind, trees["drawn"]), out, extra, change)
    supervision = max(one.get("sup", one["loss"]) for one in parts)
    assert supervision > {"large": 100, "equal": 0}.get(kind, -1)
    if kind == "void":
        assert supervision == 0
    if kind == "padding":
        zero = "loss sup unsup unsup_l conf K K_gt_1 weight kept conf_t contrast classes pseudo_acc"
        assert not any(one.get(key, 0) for one in parts for key in f"{zero} coverage".split())
        assert name == "esl" or not finite(out)["state"].get("pushed", torch.zeros(1)).any()
    if kind == "absent":
        assert scores["iou"][5:] == [None] * 6 and None not in scores["iou"][:5]
        assert scores["miou"] == pytest.approx(sum(scores["iou"][:5]) / 5, abs=1e-5)


TIED = {"flat": {}, "certain": {3: 1e4}, "tied": {2: 8.0, 5: 8.0}}  # class: logit; others are 0
TAUGHT = [x for x in RUNS[1:] if "no-cutmix" not in x[1]]
TAUGHT = [x for x in TAUGHT if x[0] != "unimatch"]  # it teaches itself, with gradient
TAUGHT += [("cps_fpl", f"--unsup-loss {loss}") for loss in ("ce", "soft", "negative")]


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("name, extra", TAUGHT)
def test_teachers_of_every_kind(kind, name, extra, trees, tmp_path, monkeypatch):
    """Alg. 1 with T = 0.9 of 11 equal classes: K = 9; of a certain teacher or of two classes: 1."""

    def teach(step, key, out):
        for logits in (x for k, x in out.items() if k in ("logits", "coarse") and is_teacher(key)):
            logits[:] = 0.0
            for c, value in TIED[kind].items():
                logits[:, c] = value

    out = tmp_path / "run"
    extra += " --scales 1 1.5"  # of 48x36 pixels: a crop of 32 lies inside
    steps, scores = made(monkeypatch, name, trees["drawn"], out, extra, teach)
    for parts in steps:
        half = 2 if name == "unimatch_v2" else 1  # its loss is a mean
        assert half * parts["loss"] >= parts["sup"] > 0
        K = min(9 if kind == "flat" else 1, 3 if "official" in extra else C)
        assert parts.get("K", K) == K and parts.get("K_gt_1", K > 1) == (K > 1)
        weight = 1.0 if kind == "certain" else 0.0  # Eq. (11): the next class is as likely
        assert parts.get("weight", weight) == pytest.approx(weight, abs=1e-5)
        q = {"flat": 1 / C, "certain": 1.0, "tied": 1 / (2 + 9 * math.exp(-8))}[kind]
        assert parts.get("conf_t", q) == pytest.approx(q, rel=1e-6)
        if "u2pl" in name:  # all entropies are equal: neither H < gamma nor H > gamma
            lambda_u = 1 if (name, "official" in extra) == ("u2pl_ael", True) else 2 * 32 * 32
            assert parts["unsup"] == 0 and parts["unsup_weight"] == lambda_u
    if kind == "certain":  # it is scored as well
        assert [bool(x) for x in scores["iou"]] == [c == 3 for c in range(C)]
    if "u2pl" in name and "none" not in extra:
        # p(c) > 0.3: no class, class 3, classes 2 and 5; r_l = 3: of the three likeliest classes
        assert sum(parts["classes"] for parts in steps) <= 2 * len(TIED[kind])
        pushed = finite(out)["state"]["pushed"].nonzero()[:, 0].tolist()
        assert pushed == {"flat": [0, 1, 2], "certain": [0, 1, 3], "tied": [0, 2, 5]}[kind]


def disturb(patch, name, fault, at, value):
    """Injects a fault into a step: output, gradient, bank, teacher or, of it, the logits alone."""
    script = tiny.script(name)

    def change(step, key, out):
        hit = torch.is_grad_enabled() if fault == "output" else is_teacher(key)
        if step == at and hit and fault not in ("gradient", "bank"):
            return {k: x if (fault, k) == ("logits", "rep") else x * value for k, x in out.items()}

    live, make = hook(patch, change), script.make_optimizer

    def make_optimizer(*inputs):
        optimizer = make(*inputs)

        def spoil(*_):
            if live["step"] == at and fault == "gradient":
                optimizer.param_groups[0]["params"][0].grad.fill_(value)
            elif live["step"] == at and fault == "bank":
                live["state"]["confidence" if "ael" in name else "bank"][0] = value

        optimizer.register_step_pre_hook(spoil)
        return optimizer

    patch.setattr(script, "make_optimizer", make_optimizer)


FEW = ["supervised", "esl"]  # what no method can change
FAULTS = [  # what, at which of 8 steps, its value, the checkpoint before, the step that sees it
    ("gradient", 2, math.nan, 0, 2, tiny.SCRIPTS),  # a checkpoint is due
    ("gradient", 5, math.nan, 4, 6, FEW),  # in the next loss
    ("gradient", 8, math.nan, 6, 8, FEW),  # a checkpoint is due, and a score
    ("output", 5, -math.inf, 4, 5, FEW),
    ("teacher", 5, math.nan, 4, 5, [n for n in tiny.SCRIPTS[1:] if n != "unimatch"]),
    ("logits", 5, math.nan, 4, 5, ["u2pl"]),  # L_u = L_c = 0 there
    ("bank", 4, math.nan, 2, 4, tiny.STATE),  # a key that no anchor met
]


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_fault_is_refused_by_its_step_and_the_run_goes_on_from_the_checkpoint_before(
    name, trees, tmp_path, monkeypatch
):
    """As if nothing had happened."""
    script, words = tiny.script(name), FLAGS.get(name, "").split()

    def small(out):
        return tiny.flags(trees["drawn"], tmp_path / out, log=2, evaluate=8, save=2) + words

    tiny.shrink(script, monkeypatch)
    tiny.train(script, small("whole"))
    for fault, at, value, saved, seen, names in FAULTS:
        if name not in names:
            continue
        out = tmp_path / f"{fault}{at}"
        argv = small(out)
        with monkeypatch.context() as patch:
            disturb(patch, name, fault, at, value)
            with pytest.raises(Refusal) as refusal:
                tiny.train(script, argv)
        start = f"loss or weights not finite at step {seen}: nothing saved since; "
        assert str(refusal.value).startswith(start), fault
        assert finite(out)["step"] == saved if saved else not list(out.glob("*.pt"))
        assert "eval" not in {line["kind"] for line in log(out)}
        tiny.train(script, argv + ["--resume"])
        assert differences(tmp_path / "whole", out) == []
        assert finite(out)["step"] == 8
