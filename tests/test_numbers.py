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
import u2pl
from benchmarks.runs import differences, flat, log
from common import Refusal, run

C = 11
FLAGS = {name: [] for name in tiny.SCRIPTS} | {"mean_teacher": ["--warmup-iters", "0"]}
FLAGS["u2pl"] = "--warmup-iters 0 --anchors 5 --negatives 6 --keys 7 --bank-sizes 20 12".split()
FLAGS["esl"] = "--anchors 5 --negatives 6 --queue 7 --zeta 0.2".split()
RUNS = [(name, "") for name in tiny.SCRIPTS]
RUNS += [("mean_teacher", "--consistency mse --cutmix")]
RUNS += [("cps_fpl", "--recipe official"), ("cps_fpl", "--no-cutmix --unsup-loss ce")]
RUNS += [("ael_fpl", "--recipe official"), ("ael_fpl", "--unsup-loss ce --skip-absent")]
RUNS += [("u2pl", "--unreliable-loss binary --ohem-kept 0.1 --aux-weight 0.4")]
RUNS += [("u2pl", "--unreliable-loss none --recipe official")]
RUNS += [("esl", "--label hard --ohem-kept 0.1 --aux-weight 0.4")]
RUNS += [("esl", "--label soft --no-contrast --no-cutmix")]
every_run = pytest.mark.parametrize("name, extra", RUNS)


def repaint(root, colour=None, mask=None):
    """A drawn tree whose images are of one colour each, or whose masks are of one value."""
    tiny.draw_tree(root)
    for number, path in enumerate(sorted(root.rglob("*.*"))):
        if path.suffix == ".jpg" and colour:
            Image.new("RGB", (48, 36), colour(number)).save(path)
        elif path.suffix == ".png" and mask is not None:
            Image.new("L", (48, 36), mask).save(path)
    return root


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    return {
        "drawn": tiny.draw_tree(root / "drawn"),
        "colours": repaint(root / "colours", lambda i: (20 * i % 256, 255 - 9 * i, 7 * i)),
        "equal": repaint(root / "equal", lambda _: (0, 0, 0)),
        "void": repaint(root / "void", mask=11),  # CamVid's void: 255
        "few": tiny.draw_tree(root / "few", ids=5),
    }


def is_teacher(name):
    """Whether a network that is at work now teaches: the teacher, or a branch without gradient."""
    return name == "teacher" or (name.startswith("branch") and not torch.is_grad_enabled())


def hook(patch, script, change):
    """change(step, network's name, outputs) may change these in place; an evaluation is step 0."""
    live = dict(step=1, scoring=False)
    restore, step, evaluate = run.Run.restore, run.Run.step, script.evaluate

    def begin(self, networks, *rest):
        for key, net in networks.items():
            of = lambda _, inputs, out, key=key: change(  # noqa: E731
                0 if live["scoring"] else live["step"], key, out
            )
            net.register_forward_hook(of)
        return restore(self, networks, *rest)

    def count(self, done, *rest):
        live["step"] = done + 1
        return step(self, done, *rest)

    def score(*inputs):
        live["scoring"] = True
        result = evaluate(*inputs)
        live["scoring"] = False
        return result

    patch.setattr(run.Run, "restore", begin)
    patch.setattr(run.Run, "step", count)
    patch.setattr(script, "evaluate", score)
    return live


def finite(folder):
    """Asserts that nothing in the checkpoints of a run is NaN or Inf; returns the last one."""
    for path in folder.glob("*.pt"):
        for key, value in flat(torch.load(path, weights_only=True)).items():
            if isinstance(value, float) or (torch.is_tensor(value) and value.is_floating_point()):
                assert torch.as_tensor(value).isfinite().all(), (path, key)
    return torch.load(folder / "last.pt", weights_only=True)


def made(patch, name, tree, out, extra="", change=None):
    """Makes a run of two steps; returns these and the scores, with all its numbers found finite."""
    script = tiny.script(name)
    with patch.context() as patch:
        tiny.shrink(script, patch)
        if change:
            hook(patch, script, change)
        argv = tiny.flags(tree, out, iters=2, log=1, evaluate=2, save=2)
        steps = recorder.watch(patch, script, argv + FLAGS[name] + extra.split()).steps
    assert len(steps) == 2 and finite(out)["step"] == 2
    assert all(math.isfinite(x) for step in steps for x in step.parts.values())
    assert log(out)[-1]["kind"] == "done"
    return steps, log(out)[-1]["last"]


def supervision(step):
    """L_s of a step: supervised.py logs it as its loss."""
    return step.parts.get("sup", step.parts["loss"])


# ---- images, labels ----


IMAGES = [(kind, *x) for kind in ("equal", "void", "crumbs") for x in RUNS]
IMAGES += [("colours", name, "") for name in tiny.SCRIPTS]


@pytest.mark.parametrize("kind, name, extra", IMAGES)
def test_images_of_one_colour_masks_of_void_and_crops_of_almost_nothing(
    kind, name, extra, trees, tmp_path, monkeypatch
):
    if kind == "crumbs":
        extra += " --scales 0.03 0.04" + " --paste-scales 0.03 0.04" * (name == "ael_fpl")
    tree = trees.get(kind, trees["drawn"])
    steps, scores = made(monkeypatch, name, tree, tmp_path / "run", extra)
    if kind == "void":
        assert all(supervision(step) == 0 for step in steps)
        assert scores == dict(miou=0.0, accuracy=0.0, constant=0.0, iou=[None] * C)
    elif kind != "crumbs":
        assert all(supervision(step) > 0 for step in steps)


@every_run
def test_crops_of_nothing_but_padding(name, extra, trees, tmp_path, monkeypatch):
    whole = tiny.script(name).augment

    def augment(image, label, *rest):
        pixels, label, inside = whole(image, label, *rest)
        return pixels, label if label is None else np.full_like(label, 255), inside & False

    monkeypatch.setattr(tiny.script(name), "augment", augment)
    steps, _ = made(monkeypatch, name, trees["drawn"], tmp_path / "run", extra)
    zero = {"loss", "sup", "unsup", "unsup_l", "conf", "K", "K_gt_1", "weight", "kept", "conf_t"}
    zero |= {"contrast", "classes", "pseudo_acc", "coverage"}
    for step in steps:
        assert all(x == 0 for key, x in step.parts.items() if key in zero), step.parts
    if name == "u2pl" and "none" not in extra:
        assert not finite(tmp_path / "run")["state"]["pushed"].any()


@every_run
def test_classes_that_never_occur(name, extra, trees, tmp_path, monkeypatch):
    def never(step, key, out):
        for logits in (x for k, x in out.items() if k not in ("rep", "encoder")):
            logits[:, 5:] -= 1e4  # not predicted either

    out = tmp_path / "run"
    _, scores = made(monkeypatch, name, trees["few"], out, extra, never)
    assert scores["iou"][5:] == [None] * 6 and None not in scores["iou"][:5]
    assert scores["miou"] == pytest.approx(sum(scores["iou"][:5]) / 5, abs=1e-5)
    if name == "ael_fpl":  # their confidence: 0 in each of 2 steps, or not counted
        script = tiny.script(name)
        first = np.random.default_rng([0, script.zlib.crc32(b"bank")]).random(C, np.float32)
        bank = finite(out)["state"]["confidence"][5:].numpy()
        assert bank == pytest.approx(first[5:] * (1 if "skip" in extra else 0.97**2), rel=1e-5)


def test_a_class_predicted_but_absent_scores_0(trees, tmp_path, monkeypatch):
    def always(step, key, out):
        out["logits"][:, 7] += 1e4

    _, scores = made(monkeypatch, "supervised", trees["few"], tmp_path / "run", "", always)
    assert scores["iou"] == [0.0] * 5 + [None, None, 0.0, None, None, None]
    assert scores["miou"] == scores["accuracy"] == 0


# ---- teachers, huge outputs ----

TIED = {"flat": {}, "certain": {3: 1e4}, "tied": {2: 8.0, 5: 8.0}}  # class: logit; others are 0


def teaching(kind):
    """Teachers of a kind; "one class": of their own logits."""

    def change(step, key, out):
        for logits in (x for k, x in out.items() if k in ("logits", "coarse") and is_teacher(key)):
            if kind == "one class":
                logits[:, 3] = logits.amax(1) + 1
                continue
            logits[:] = 0.0
            for c, value in TIED[kind].items():
                logits[:, c] = value

    return change


TAUGHT = [x for x in RUNS[1:] if x[0] != "cps_fpl" or "no-cutmix" not in x[1]]
TAUGHT += [("cps_fpl", f"--unsup-loss {loss}") for loss in ("ce", "soft", "negative")]


@pytest.mark.parametrize("kind", [*TIED, "one class"])
@pytest.mark.parametrize("name, extra", TAUGHT)
def test_teachers_of_every_kind(kind, name, extra, trees, tmp_path, monkeypatch):
    """Alg. 1 with T = 0.9 of 11 equal classes: K = 9; of a certain teacher or of two classes: 1."""
    out = tmp_path / "run"
    extra += " --scales 1 1.5"  # of 48x36 pixels: a crop of 32 lies inside
    steps, scores = made(monkeypatch, name, trees["drawn"], out, extra, teaching(kind))
    for parts in (step.parts for step in steps):
        assert parts["loss"] >= parts["sup"] > 0
        if kind == "one class":
            continue
        K = min(9 if kind == "flat" else 1, 3 if "official" in extra else C)
        assert parts.get("K", K) == K and parts.get("K_gt_1", K > 1) == (K > 1)
        weight = 1.0 if kind == "certain" else 0.0  # Eq. (11): the next class is as likely
        assert parts.get("weight", weight) == pytest.approx(weight, abs=1e-5)
        q = {"flat": 1 / C, "certain": 1.0, "tied": 1 / (2 + 9 * math.exp(-8))}[kind]
        assert parts.get("conf_t", q) == pytest.approx(q, rel=1e-6)
        if name == "u2pl":  # all entropies are equal: neither H < gamma nor H > gamma
            assert parts["unsup"] == 0 and parts["unsup_weight"] == 2 * 32 * 32
    if kind == "one class" and name != "u2pl":
        assert [bool(x) for x in scores["iou"]] == [c == 3 for c in range(C)]
    if name == "u2pl" and kind in TIED and "none" not in extra:
        # p(c) > 0.3: no class, class 3, classes 2 and 5; r_l = 3: of the three likeliest classes
        assert sum(step.parts["classes"] for step in steps) <= 2 * len(TIED[kind])
        pushed = finite(out)["state"]["pushed"].nonzero()[:, 0].tolist()
        assert pushed == {"flat": [0, 1, 2], "certain": [0, 1, 3], "tied": [0, 2, 5]}[kind]


@every_run
def test_networks_whose_outputs_are_ten_thousand(name, extra, trees, tmp_path, monkeypatch):
    def large(step, key, out):
        return {k: 1e4 * x / x.detach().abs().amax() for k, x in out.items()}

    steps, _ = made(monkeypatch, name, trees["drawn"], tmp_path / "run", extra, large)
    assert max(supervision(step) for step in steps) > 100


# ---- NaN and Inf at a step ----

BAD = 5  # of 8 steps; a line is due after every second


def argv_of(name, tree, out, **more):
    numbers = dict(iters=8, log=2, evaluate=4, save=2) | more
    return tiny.flags(tree, out, **numbers) + FLAGS[name]


@pytest.fixture(scope="module")
def undisturbed(trees, tmp_path_factory):
    """Returns the folder of a script's run in which nothing goes wrong, made when asked for."""
    root = tmp_path_factory.mktemp("undisturbed")

    def folder(name):
        if not (root / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                tiny.shrink(tiny.script(name), patch)
                tiny.train(tiny.script(name), argv_of(name, trees["drawn"], root / name))
        return root / name

    return folder


def disturb(patch, name, fault, at=BAD, value=math.nan):
    """Injects a fault into a step: loss, output, gradient, teacher or, of it, the logits."""
    script = tiny.script(name)
    tiny.shrink(script, patch)

    def change(step, key, out):
        hit = torch.is_grad_enabled() if fault == "output" else is_teacher(key)
        if step == at and hit and fault in ("output", "teacher", "logits"):
            return {k: x if (fault, k) == ("logits", "rep") else x * value for k, x in out.items()}

    live = hook(patch, script, change)
    loss, make = script.supervised_loss, script.make_optimizer

    def bad_loss(*inputs):
        return loss(*inputs) * (value if fault == "loss" and live["step"] == at else 1)

    def make_optimizer(*inputs):
        optimizer = make(*inputs)

        def spoil(*_):
            if fault == "gradient" and live["step"] == at:
                optimizer.param_groups[0]["params"][0].grad.fill_(value)

        optimizer.register_step_pre_hook(spoil)
        return optimizer

    patch.setattr(script, "supervised_loss", bad_loss)
    patch.setattr(script, "make_optimizer", make_optimizer)


FAULTS = [(f, BAD, v, 4) for f, v in (("loss", math.inf), ("output", -math.inf))]
FAULTS += [(f, BAD, math.nan, 4) for f in ("loss", "output", "teacher", "gradient", "logits")]
FAULTS += [("gradient", 2, math.nan, 0), ("gradient", 8, math.nan, 6)]  # a checkpoint is due
INJECTED = [(name, *fault) for name in tiny.SCRIPTS for fault in FAULTS]
INJECTED = [x for x in INJECTED if x[1] != "logits" or x[0] == "u2pl"]  # L_u = L_c = 0 there
few = ("supervised", "esl")  # what no method can change: in two scripts
INJECTED = [x for x in INJECTED if x[0] in few or not (math.isinf(x[3]) or x[2] == 8)]
INJECTED = [x for x in INJECTED if x[:2] != ("supervised", "teacher")]


@pytest.mark.parametrize("name, fault, at, value, saved", INJECTED)
def test_a_fault_is_refused_by_its_step_and_the_run_goes_on_from_the_checkpoint_before(
    name, fault, at, value, saved, trees, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    argv = argv_of(name, trees["drawn"], out)
    with monkeypatch.context() as patch:
        disturb(patch, name, fault, at, value)
        with pytest.raises(Refusal) as refusal:
            tiny.train(tiny.script(name), argv)
    # a gradient is seen in the next loss, or where a checkpoint is due
    step = at + (fault == "gradient" and at == BAD)
    start = f"loss or weights not finite at step {step}: nothing saved since; "
    assert str(refusal.value).startswith(start)
    assert not list(out.glob("*.pt")) if saved == 0 else finite(out)["step"] == saved
    if at == BAD:
        assert max(line.get("step", 0) for line in log(out)) == saved
    tiny.shrink(tiny.script(name), monkeypatch)
    tiny.train(tiny.script(name), argv + ["--resume"])
    assert differences(undisturbed(name), out) == []
    assert finite(out)["step"] == 8


def test_networks_and_keys_that_are_not_finite_are_neither_scored_nor_saved(
    trees, tmp_path, monkeypatch, capsys
):
    """The refusal is one line and exit code 2."""
    codes = []
    monkeypatch.setattr(run.os, "_exit", codes.append)
    disturb(monkeypatch, "supervised", "gradient", 4)
    argv = argv_of("supervised", trees["drawn"], tmp_path / "scored", save=8)
    run.refusing(lambda: tiny.train(tiny.script("supervised"), argv))
    (line,) = capsys.readouterr().err.splitlines()
    assert ": loss or weights not finite at step 4: nothing saved since; " in line
    assert codes == [2] and "eval" not in {line["kind"] for line in log(tmp_path / "scored")}
    whole = u2pl.unreliable_loss

    def unreliable_loss(rep_s, rep_t, masks, bank, pushed, *rest):
        result = whole(rep_s, rep_t, masks, bank, pushed, *rest)
        if live["step"] == 4:
            bank[0] = math.nan  # a key that no anchor met
        return result

    tiny.shrink(u2pl, monkeypatch)
    live = hook(monkeypatch, u2pl, lambda *_: None)
    monkeypatch.setattr(u2pl, "unreliable_loss", unreliable_loss)
    with pytest.raises(Refusal):
        tiny.train(u2pl, argv_of("u2pl", trees["drawn"], tmp_path / "run"))
    assert finite(tmp_path / "run")["step"] == 2
