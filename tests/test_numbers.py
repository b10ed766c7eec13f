"""Numerical faults: every script's answer to pictures, labels, teachers and numbers gone wrong.

Runs of the tiny network, of a few steps; every number that such a run logs or saves is finite.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

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
    ("u2pl_ael", "--recipe official --contrast-after 0 --unreliable-loss binary"),
    ("esl", "--fused off"),
    ("unimatch", "--unsup-loss fpl --partner crop"),
]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Drawn trees: as they are, and with training masks of void alone."""
    root = tmp_path_factory.mktemp("trees")
    found = {name: tiny.draw_tree(root / name) for name in ("drawn", "void")}
    for path in found["void"].glob("trainannot/*.png"):
        Image.new("L", (48, 36), 11).save(path)
    return found


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


def made(patch, name, tree, out, extra, change):
    """Makes a run of two steps; returns their parts. All that it logs and saves is finite."""
    script = tiny.script(name)
    with patch.context() as patch:
        tiny.shrink(script, patch)
        hook(patch, change)
        argv = tiny.flags(tree, out, iters=2, log=1, evaluate=2, save=2) + extra.split()
        argv = tiny.with_acting(name, argv, FLAGS.get(name, ""))
        steps = recorder.watch(patch, script, argv).steps
    parts = [step.parts for step in steps]
    assert len(parts) == 2 and finite(out)["step"] == 2
    assert all(math.isfinite(x) for one in parts for x in one.values())
    assert log(out)[-1]["kind"] == "done"
    return parts


def large(step, key, out):
    return {k: 1e4 * x / x.detach().abs().amax() for k, x in out.items()}


def padded(augment):
    """Crops of nothing but padding."""

    def padding(image, label, *rest):
        pixels, label, inside = augment(image, label, *rest)
        return pixels, label if label is None else np.full_like(label, 255), inside & False

    return padding


def taught(logits):
    """Teachers that give some classes a logit, {class: logit}, and all others 0."""

    def teach(step, key, out):
        for name in {"logits", "coarse"} & out.keys() if is_teacher(key) else ():
            out[name][:] = 0.0
            for c, value in logits.items():
                out[name][:, c] = value

    return teach


TEACHERS = {"flat": {}, "certain": {3: 1e4}, "tied": {2: 8.0, 5: 8.0}}
CHANGES = {kind: taught(logits) for kind, logits in TEACHERS.items()} | {"large": large}
TAUGHT = PLAIN[1:] + [("cps_fpl", "--recipe official"), ("u2pl_ael", "--recipe official")]
TAUGHT.remove(("unimatch", ""))  # it teaches itself, with gradient
CASES = [("padding", *one) for one in RUNS]
CASES += [(kind, *one) for kind in ("large", "void") for one in PLAIN]
CASES += [("crumbs", name, "") for name in ("supervised", "ael_fpl")]
CASES += [(kind, *one) for kind in TEACHERS for one in TAUGHT]


@pytest.mark.parametrize("kind, name, extra", CASES)
def test_every_number_stays_finite(kind, name, extra, trees, tmp_path, monkeypatch):
    """What has no pixel is 0; what a teacher that is known gives is known as well."""
    out, script = tmp_path / "run", tiny.script(name)
    if kind == "padding":
        monkeypatch.setattr(script, "augment", padded(script.augment))
    if kind == "crumbs":
        extra += " --scales 0.03 0.04" + " --paste-scales 0.03 0.04" * ("ael" in name)
    change = CHANGES.get(kind, lambda step, key, out: None)
    parts = made(monkeypatch, name, trees.get(kind, trees["drawn"]), out, extra, change)
    supervision = max(one.get("sup", one["loss"]) for one in parts)
    assert supervision > 100 if kind == "large" else supervision >= 0
    if kind == "void":
        assert supervision == 0
    if kind == "padding":
        zero = "loss sup unsup unsup_l conf K K_gt_1 weight kept conf_t contrast classes pseudo_acc"
        assert not any(one.get(key, 0) for one in parts for key in f"{zero} coverage".split())
        assert name == "esl" or not finite(out)["state"].get("pushed", torch.zeros(1)).any()
    if kind in TEACHERS:
        K = min(9 if kind == "flat" else 1, 3 if "official" in extra else C)  # Alg. 1, T = 0.9
        weight = 1.0 if kind == "certain" else 0.0  # Eq. (11): the next class is as likely
        for one in parts:
            assert one.get("K", K) == K
            assert one.get("weight", weight) == pytest.approx(weight, abs=1e-5)
            # all entropies are equal: none is below gamma
            assert "u2pl" not in name or one["unsup"] == 0


def disturb(patch, name, fault, at, value):
    """Puts a fault into a step: output, gradient, bank, teacher or its logits; as a context."""

    def change(step, key, out):
        hit = torch.is_grad_enabled() if fault == "output" else is_teacher(key)
        if step == at and hit and fault not in ("gradient", "bank"):
            return {k: x if (fault, k) == ("logits", "rep") else x * value for k, x in out.items()}

    live = hook(patch, change)

    def spoil(optimizer, *_):
        if live["step"] == at and fault == "gradient":
            optimizer.param_groups[0]["params"][0].grad.fill_(value)
        elif live["step"] == at and fault == "bank":
            live["state"]["confidence" if "ael" in name else "bank"][0] = value

    return register_optimizer_step_pre_hook(spoil)


FAULTS = [  # what, at which of 4 steps, its value, the checkpoint before, the step that sees it
    ("gradient", 2, math.nan, 0, 2, tiny.SCRIPTS),  # a checkpoint is due
    ("gradient", 3, math.nan, 2, 4, ["supervised"]),  # in the next loss
    ("gradient", 4, math.nan, 2, 4, ["supervised"]),  # a checkpoint is due, and a score
    ("output", 3, -math.inf, 2, 3, ["supervised"]),
    ("teacher", 3, math.nan, 2, 3, [n for n in tiny.SCRIPTS[1:] if n != "unimatch"]),
    ("logits", 3, math.nan, 2, 3, ["u2pl"]),  # L_u = L_c = 0 there
    ("bank", 2, math.nan, 0, 2, tiny.STATE),  # a key that no anchor met
]


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_fault_is_refused_by_its_step_and_the_run_goes_on_from_the_checkpoint_before(
    name, trees, tmp_path, monkeypatch
):
    """As if nothing had happened."""
    script = tiny.script(name)

    def small(out):
        numbers = dict(iters=4, log=2, evaluate=4, save=2)
        argv = tiny.flags(trees["drawn"], tmp_path / out, **numbers)
        return argv + FLAGS.get(name, "").split()

    tiny.shrink(script, monkeypatch)
    tiny.train(script, small("whole"))
    for fault, at, value, saved, seen, names in FAULTS:
        if name not in names:
            continue
        out = tmp_path / f"{fault}{at}"
        words = f"^loss or weights not finite at step {seen}: nothing saved since; "
        with monkeypatch.context() as patch, disturb(patch, name, fault, at, value):
            with pytest.raises(Refusal, match=words):
                tiny.train(script, small(out))
        assert finite(out)["step"] == saved if saved else not list(out.glob("*.pt"))
        assert "eval" not in {line["kind"] for line in log(out)}
        if saved:
            tiny.train(script, small(out) + ["--resume"])
            assert differences(tmp_path / "whole", out) == []
            assert finite(out)["step"] == 4
