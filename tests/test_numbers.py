"""Numerical faults: every script's answer to crops without a pixel, and to NaN and Inf.

Runs of the tiny network, of a few steps.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import recorder
import tiny
from benchmarks.runs import differences, flat, log
from common import Refusal, run

FLAGS = {  # a method at work from the first step on
    "mean_teacher": "--warmup-iters 0",
    "u2pl": f"{tiny.OF_U2PL} --warmup-iters 0",
    "u2pl_ael": f"{tiny.OF_U2PL} --warmup-iters 0",
    "esl": tiny.MORE["esl"],
}
RUNS = [(name, "") for name in tiny.SCRIPTS] + [
    ("mean_teacher", "--consistency mse --cutmix"),
    ("cps_fpl", "--recipe official --no-cutmix"),
    ("ael_fpl", "--recipe official --skip-absent"),
    ("u2pl", "--unreliable-loss binary --fused off --ohem-kept 0.1 --aux-weight 0.4"),
    ("u2pl_ael", "--recipe official --contrast-after 0 --unreliable-loss binary"),
    ("esl", "--fused off"),
    ("unimatch", "--unsup-loss fpl --partner crop"),
]


def finite(folder):
    """Asserts that nothing in the checkpoints of a run is NaN or Inf; returns the last one."""
    for path in folder.glob("*.pt"):
        for key, value in flat(torch.load(path, weights_only=True)).items():
            if isinstance(value, float) or torch.is_tensor(value):
                assert torch.as_tensor(value).isfinite().all(), (path, key)
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.mark.parametrize("name, extra", RUNS)
def test_what_has_no_pixel_is_0(name, extra, tree, tmp_path, monkeypatch):
    """Crops of nothing but padding, whose labels are void."""
    out, script = tmp_path / "run", tiny.script(name)
    augment = script.augment

    def padding(*given):
        pixels, label, inside = augment(*given)
        return pixels, label if label is None else torch.full_like(label, 255), inside & False

    monkeypatch.setattr(script, "augment", padding)
    tiny.shrink(script, monkeypatch)
    argv = tiny.flags(tree, out, iters=2, log=1, evaluate=2, save=2) + extra.split()
    argv = tiny.with_acting(name, argv, FLAGS.get(name, ""))
    parts = [step.parts for step in recorder.watch(monkeypatch, script, argv).steps]
    assert len(parts) == 2 and finite(out)["step"] == 2
    assert all(math.isfinite(x) for one in parts for x in one.values())
    zero = "loss sup unsup unsup_l conf K K_gt_1 weight kept conf_t contrast classes pseudo_acc"
    assert not any(one.get(key, 0) for one in parts for key in f"{zero} coverage commonest".split())
    assert name == "esl" or not finite(out)["state"].get("pushed", torch.zeros(1)).any()


def disturb(patch, name, fault, at, value):
    """Puts a fault into a step: output, gradient, bank, teacher or its logits."""
    live = SimpleNamespace(step=1)
    restore, log_step = run.Run.restore, run.Run.log_step

    def begin(self, networks, optimizer, state):
        live.state = state
        optimizer.register_step_pre_hook(before_step)
        for key, net in networks.items():
            net.register_forward_hook(partial(after_pass, key))
        return restore(self, networks, optimizer, state)

    def after_pass(key, net, given, out):
        learns = torch.is_grad_enabled()
        teaches = key == "teacher" or (key.startswith("branch") and not learns)
        hit = dict(output=learns, teacher=teaches, logits=teaches).get(fault)
        if hit and live.step == at:
            return {k: x if (fault, k) == ("logits", "rep") else x * value for k, x in out.items()}

    def before_step(optimizer, *_):
        if live.step == at and fault == "gradient":
            params = optimizer.param_groups[0]["params"]
            grads = [p.grad for p in params if p.grad is not None]  # cps_fpl: of one network
            grads[0].fill_(value)
        elif live.step == at and fault == "bank":
            live.state["confidence" if "ael" in name else "bank"][0] = value

    def count(self, done, *rest):
        live.step = done + 1
        return log_step(self, done, *rest)

    patch.setattr(run.Run, "restore", begin)
    patch.setattr(run.Run, "log_step", count)


FAULTS = [  # what, at which of 4 steps, its value, the checkpoint before, the step that sees it
    ("gradient", 2, math.nan, 0, 2, tiny.SCRIPTS),  # a checkpoint is due
    ("gradient", 3, math.nan, 2, 4, ["supervised"]),  # in the next loss
    ("gradient", 4, math.nan, 2, 4, ["supervised"]),  # a checkpoint is due, and a score
    ("output", 3, -math.inf, 2, 3, ["supervised"]),
    ("teacher", 3, math.nan, 2, 3, [n for n in tiny.SCRIPTS if len(tiny.NETWORKS[n]) > 1]),
    ("logits", 3, math.nan, 2, 3, ["u2pl"]),  # L_u = L_c = 0 there
    ("bank", 2, math.nan, 0, 2, tiny.STATE),  # a key that no anchor met
]


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_fault_is_refused_by_its_step_and_the_run_goes_on_from_the_checkpoint_before(
    name, tree, tmp_path, monkeypatch
):
    script = tiny.script(name)

    def small(out):
        argv = tiny.flags(tree, tmp_path / out, iters=4, log=2, evaluate=4, save=2)
        return argv + FLAGS.get(name, "").split()

    tiny.shrink(script, monkeypatch)
    tiny.train(script, small("whole"))
    for fault, at, value, saved, seen, names in FAULTS:
        if name not in names:
            continue
        out = tmp_path / f"{fault}{at}"
        words = f"^loss or weights not finite at step {seen}: nothing saved since; "
        with monkeypatch.context() as patch, pytest.raises(Refusal, match=words):
            disturb(patch, name, fault, at, value)
            tiny.train(script, small(out))
        assert finite(out)["step"] == saved if saved else not list(out.glob("*.pt"))
        assert "eval" not in {line["kind"] for line in log(out)}
        if saved:
            tiny.train(script, small(out) + ["--resume"])
            assert differences(tmp_path / "whole", out) == []
            assert finite(out)["step"] == 4
