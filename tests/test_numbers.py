"""Numerical faults: every script's answer to pictures, labels, teachers and numbers gone wrong.

Whole runs of the tiny network of tests/helpers.py, of a few steps; every number that such a run
logs or saves must be finite. Where an equation says what a faulty teacher is worth, so do tests.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import supervised
import u2pl
from common import Refusal, run
from tests.helpers import differences, draw_tree, flags, flat, log, shrink, train

SCRIPTS = dict(supervised=supervised, mean_teacher=mean_teacher, cps_fpl=cps_fpl, ael_fpl=ael_fpl)
SCRIPTS |= {"u2pl": u2pl, "esl": esl}
TEACHING = [name for name in SCRIPTS if name != "supervised"]
BASE = {name: [] for name in SCRIPTS} | {"mean_teacher": ["--warmup-iters", "0"]}
BASE["u2pl"] = "--warmup-iters 0 --anchors 5 --negatives 6 --keys 7 --bank-sizes 20 12".split()
BASE["esl"] = "--anchors 5 --negatives 6 --queue 7 --zeta 0.2".split()
RUNS = [(name, "") for name in SCRIPTS]
RUNS += [("mean_teacher", "--consistency mse --cutmix")]
RUNS += [("cps_fpl", "--recipe official"), ("cps_fpl", "--no-cutmix --unsup-loss ce")]
RUNS += [("ael_fpl", "--recipe official"), ("ael_fpl", "--unsup-loss ce --skip-absent")]
RUNS += [("u2pl", "--unreliable-loss binary --ohem-kept 0.1 --aux-weight 0.4")]
RUNS += [("u2pl", "--unreliable-loss none --recipe official")]
RUNS += [("esl", "--label hard --ohem-kept 0.1 --aux-weight 0.4")]
RUNS += [("esl", "--label soft --no-contrast --no-cutmix")]
SURE = ["--scales", "1", "1.5"]  # of 48x36 pixels: a crop of 32 lies inside
C = 11
every_run = pytest.mark.parametrize("name, extra", RUNS)
every_script = pytest.mark.parametrize("name", SCRIPTS)


def repaint(root, picture=None, mask=None):
    """Draws a tree whose images are picture(number) and whose masks are mask throughout."""
    draw_tree(root)
    for number, path in enumerate(sorted(root.rglob("*.*"))):
        if path.suffix == ".jpg" and picture:
            Image.new("RGB", (48, 36), picture(number)).save(path)
        elif path.suffix == ".png" and mask is not None:
            Image.new("L", (48, 36), mask).save(path)
    return root


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    return {
        "drawn": draw_tree(root / "drawn"),
        "colours": repaint(root / "colours", lambda i: (20 * i % 256, 255 - 9 * i, 7 * i)),
        "equal": repaint(root / "equal", lambda _: (0, 0, 0)),
        "void": repaint(root / "void", mask=11),  # CamVid's void: 255
        "few": draw_tree(root / "few", ids=5),
    }


def finite(folder):
    """Asserts that nothing in the checkpoints of a run is NaN or Inf; returns the last one's."""
    for path in folder.glob("*.pt"):
        saved = flat(torch.load(path, weights_only=True))
        for key, value in saved.items():
            if torch.is_tensor(value) and value.is_floating_point():
                assert value.isfinite().all(), (path, key)
            assert not isinstance(value, float) or math.isfinite(value), (path, key)
    return torch.load(folder / "last.pt", weights_only=True)


def is_teacher(name):
    """Whether a network that is at work now teaches: the teacher, or a branch without gradient."""
    return name == "teacher" or name.startswith("branch") and not torch.is_grad_enabled()


def watch(patch, name, change=None):
    """Shrinks a script; returns the list that its steps will fill: parts, and what students gave.

    change(step, network's name, dict of outputs) may put others in their place; steps from 1, an
    evaluation is step 0.
    """
    shrink(SCRIPTS[name], patch)
    steps, restore, step = [], run.Run.restore, run.Run.step
    score, scoring = SCRIPTS[name].evaluate, []

    def begin(self, networks, optimizer, state):
        start = restore(self, networks, optimizer, state)
        steps.append(SimpleNamespace(number=start + 1, logits=[]))
        for key, net in networks.items():

            def hook(module, inputs, out, key=key):
                if torch.is_grad_enabled():
                    steps[-1].logits.append(out["logits"].detach())
                return change and change(0 if scoring else steps[-1].number, key, out)

            net.register_forward_hook(hook)
        return start

    def note(self, done, parts, *rest):
        assert done == steps[-1].number
        steps[-1].parts = {k: v.item() for k, v in parts.items()}
        steps.append(SimpleNamespace(number=done + 1, logits=[]))
        return step(self, done, parts, *rest)

    def evaluate(*given):
        scoring.append(1)
        result = score(*given)
        scoring.pop()
        return result

    patch.setattr(SCRIPTS[name], "evaluate", evaluate)
    patch.setattr(run.Run, "restore", begin)
    patch.setattr(run.Run, "step", note)
    return steps


def made(patch, name, tree, out, extra="", change=None, iters=2):
    """Makes a run; returns its steps and scores, with all its numbers found finite."""
    with patch.context() as patch:
        steps = watch(patch, name, change)
        argv = flags(tree, out, iters=iters, log=1, evaluate=iters, save=iters) + BASE[name]
        train(SCRIPTS[name], argv + (extra.split() if isinstance(extra, str) else extra))
    steps.pop()
    assert len(steps) == iters
    for step in steps:
        assert all(math.isfinite(x) for x in step.parts.values()), step.parts
    assert finite(out)["step"] == iters
    done = log(out)[-1]
    assert done["kind"] == "done"
    return steps, done["last"]


def supervision(step):
    """L_s of a step: supervised.py logs it as its loss."""
    return step.parts.get("sup", step.parts["loss"])


# ---- images ----


@every_run
@pytest.mark.parametrize("kind", ["colours", "equal"])
def test_images_of_one_colour(kind, name, extra, trees, tmp_path, monkeypatch):
    steps, _ = made(monkeypatch, name, trees[kind], tmp_path / "run", extra)
    assert all(supervision(step) > 0 for step in steps)


# ---- labels ----


@every_run
def test_masks_of_nothing_but_void(name, extra, trees, tmp_path, monkeypatch):
    steps, scores = made(monkeypatch, name, trees["void"], tmp_path / "run", extra)
    assert all(supervision(step) == 0 for step in steps)
    assert scores == dict(miou=0.0, accuracy=0.0, constant=0.0, iou=[None] * C)


@every_run
def test_crops_of_almost_nothing_but_padding(name, extra, trees, tmp_path, monkeypatch):
    tiny = ["--scales", "0.03", "0.04"] + ["--paste-scales", "0.03", "0.04"] * (name == "ael_fpl")
    made(monkeypatch, name, trees["drawn"], tmp_path / "run", extra.split() + tiny)


@every_run
def test_crops_of_nothing_but_padding(name, extra, trees, tmp_path, monkeypatch):
    whole = SCRIPTS[name].augment

    def augment(image, label, *rest):
        pixels, label, inside = whole(image, label, *rest)
        return pixels, label if label is None else np.full_like(label, 255), inside & False

    monkeypatch.setattr(SCRIPTS[name], "augment", augment)
    steps, _ = made(monkeypatch, name, trees["drawn"], tmp_path / "run", extra)
    zero = {"loss", "sup", "unsup", "unsup_l", "conf", "K", "K_gt_1", "weight", "kept", "conf_t"}
    zero |= {"contrast", "classes", "pseudo_acc", "coverage"}
    for step in steps:
        assert all(x == 0 for k, x in step.parts.items() if k in zero), step.parts
    if name == "u2pl" and "none" not in extra:
        assert finite(tmp_path / "run")["state"]["pushed"].sum() == 0


@every_run
def test_classes_that_never_occur(name, extra, trees, tmp_path, monkeypatch):
    def never(step, key, out):
        for logits in (x for k, x in out.items() if k not in ("rep", "encoder")):
            logits[:, 5:] -= 1e4  # not predicted either

    tree, out = trees["few"], tmp_path / "run"
    _, scores = made(monkeypatch, name, tree, out, extra, never)
    assert scores["iou"][5:] == [None] * 6 and None not in scores["iou"][:5]
    assert scores["miou"] == pytest.approx(sum(scores["iou"][:5]) / 5, abs=1e-5)
    if name == "ael_fpl":  # their confidence: 0 in each of 2 steps, or not counted
        first = np.random.default_rng([0, ael_fpl.zlib.crc32(b"bank")]).random(C, np.float32)
        bank = finite(out)["state"]["confidence"][5:].numpy()
        assert bank == pytest.approx(first[5:] * (1 if "skip" in extra else 0.97**2), rel=1e-5)


def test_a_class_predicted_but_absent_scores_0(trees, tmp_path, monkeypatch):
    def always(step, key, out):
        out["logits"][:, 7] += 1e4

    _, scores = made(monkeypatch, "supervised", trees["few"], tmp_path / "run", "", always)
    assert scores["iou"] == [0.0] * 5 + [None, None, 0.0, None, None, None]
    assert scores["miou"] == scores["accuracy"] == 0


# ---- teachers ----

TIED = {"flat": {}, "confident": {3: 1e4}, "tied": {2: 8.0, 5: 8.0}}  # class: logit; others 0
# Alg. 1 with T = 0.9 of 11 classes: n - 1 of n = 10, 1 and 2
K = {"flat": 9, "confident": 1, "tied": 1}
PROB = {kind: [1 / C] * C for kind in TIED} | {"confident": [float(c == 3) for c in range(C)]}
PROB["tied"] = [math.exp(8.0 * (c in (2, 5))) / (2 * math.exp(8) + 9) for c in range(C)]


def teaching(kind):
    """Returns a change that makes teachers of a kind; "one class": of their own logits."""

    def change(step, key, out):
        for name in ("logits", "coarse") if is_teacher(key) else ():
            if name in out and kind == "one class":
                out[name][:, 3] = out[name].amax(1) + 1
            elif name in out:
                out[name] = torch.zeros_like(out[name])
                for c, value in TIED[kind].items():
                    out[name][:, c] = value

    return change


def students(name, step):
    """Logits of the networks that learn from unlabelled images, for two of each kind of image."""
    first, *rest = step.logits
    return {"cps_fpl": [first, *rest[:1]], "ael_fpl": rest}.get(name, [first[2:]])


LOSSES = {  # of a student's log p, (B, C, H, W), and the teacher's q: (B, H, W)
    "ce": lambda log_p, q: -log_p[:, q.tolist().index(q.max())],  # ties: the lowest class
    "mse": lambda log_p, q: (log_p.exp() - q[:, None, None]).square().sum(1),
    "soft": lambda log_p, q: torch.xlogy(q, q).sum() - (log_p.movedim(1, -1) * q).sum(-1),
    "negative": lambda log_p, q: -torch.log1p(-log_p.exp())[:, q < 0.2].sum(1),
}
LOSSES["fpl"] = LOSSES["ce"]  # where K = 1 and the weight is 1
TEACHERS = [("mean_teacher", "ce", "--consistency ce"), ("mean_teacher", "mse", "--cutmix")]
TEACHERS += [("cps_fpl", loss, "--unsup-loss") for loss in ("ce", "fpl", "soft", "negative")]
TEACHERS += [("ael_fpl", loss, "--beta 0 --unsup-loss") for loss in ("ce", "fpl")]


@pytest.mark.parametrize("name, loss, extra", TEACHERS)
@pytest.mark.parametrize("kind", TIED)
def test_flat_confident_and_tied_teachers(kind, name, loss, extra, trees, tmp_path, monkeypatch):
    extra += f" {loss}" if extra.endswith("loss") else " --consistency mse" * (loss == "mse")
    run_of = (monkeypatch, name, trees["drawn"], tmp_path / "run", extra.split() + SURE)
    steps, _ = made(*run_of, teaching(kind))
    q = torch.tensor(PROB[kind], dtype=torch.float64)
    for step in steps:
        log_p = [z.double().log_softmax(1) for z in students(name, step)]
        expected = sum(LOSSES[loss](x, q).mean().item() for x in log_p)
        if loss == "fpl" and kind != "confident":  # Eq. (11): the next class is as likely
            expected = 0
        parts = step.parts
        assert parts["unsup"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert parts.get("K", K[kind]) == K[kind]
        assert parts.get("K_gt_1", kind == "flat") == (kind == "flat")
        weight = 1.0 if kind == "confident" else 0.0
        assert parts.get("weight", weight) == pytest.approx(weight, abs=1e-5)
        conf = parts.get("conf", parts.get("conf_t", q.max()))
        assert conf == pytest.approx(q.max().item(), rel=1e-6)


@pytest.mark.parametrize("name, loss, extra", [x for x in TEACHERS if x[1] == "ce"])
def test_a_teacher_that_predicts_one_class_everywhere(
    name, loss, extra, trees, tmp_path, monkeypatch
):
    extra = (extra + " ce" * extra.endswith("loss")).split() + SURE
    extra += ["--gamma", "0"] * (name == "ael_fpl")  # all pixels weigh 1
    run_of = (monkeypatch, name, trees["drawn"], tmp_path / "run", extra)
    steps, scores = made(*run_of, teaching("one class"))
    for step in steps:
        log_p = [z.double().log_softmax(1) for z in students(name, step)]
        expected = -sum(x[:, 3].mean().item() for x in log_p)
        assert step.parts["unsup"] == pytest.approx(expected, rel=1e-5)
    assert [bool(x) for x in scores["iou"]] == [c == 3 for c in range(C)]
    assert scores["accuracy"] == pytest.approx(scores["iou"][3], abs=1e-6)


@pytest.mark.parametrize("name", ["cps_fpl", "ael_fpl"])
@pytest.mark.parametrize("kind", [*TIED, "one class"])
def test_released_fpl_is_finite_with_teachers_of_every_kind(
    kind, name, trees, tmp_path, monkeypatch
):
    run_of = (monkeypatch, name, trees["drawn"], tmp_path / "run", "--recipe official")
    steps, _ = made(*run_of, teaching(kind))
    for step in steps:
        assert step.parts["loss"] >= step.parts["sup"] > 0


@pytest.mark.parametrize("loss", ["contrastive", "binary", "none"])
@pytest.mark.parametrize("kind", TIED)
def test_u2pl_keeps_no_label_where_all_entropies_are_equal(
    kind, loss, trees, tmp_path, monkeypatch
):
    """Eq. (6), (15): neither H < gamma nor H > gamma. Anchors and keys are of labelled pixels."""
    out, extra = tmp_path / "run", ["--unreliable-loss", loss, *SURE]
    found, whole = [], u2pl.entropy
    monkeypatch.setattr(u2pl, "entropy", lambda prob: found.append(whole(prob)) or found[-1])
    steps, _ = made(monkeypatch, "u2pl", trees["drawn"], out, extra, teaching(kind))
    H = -sum(p * math.log(p) for p in PROB[kind] if p)
    for step, each in zip(steps, found, strict=True):
        assert each.unique().tolist() == pytest.approx([H], rel=1e-5)
        assert step.parts["unsup"] == 0
        assert step.parts["unsup_weight"] == 2 * 32 * 32  # pixels inside, over none: over 1
        # p(c) > 0.3: no class, class 3, classes 2 and 5
        most = 0 if loss == "none" else len(TIED[kind])
        assert step.parts["classes"] <= most
        assert (step.parts["contrast"] > 0) == (step.parts["classes"] > 0)
    assert sum(step.parts["classes"] for step in steps) > 0 or not most
    if loss != "none":  # r_l = 3: negatives of the three likeliest classes alone
        pushed = finite(out)["state"]["pushed"].nonzero()[:, 0].tolist()
        assert pushed == {"flat": [0, 1, 2], "confident": [0, 1, 3], "tied": [0, 2, 5]}[kind]


def test_u2pl_learns_the_one_class_that_its_teacher_predicts(trees, tmp_path, monkeypatch):
    kept, whole = [], u2pl.reliable_labels

    def reliable_labels(pseudo, H, gamma):
        assert (pseudo == 3).all()
        kept.append(whole(pseudo, H, gamma))
        return kept[-1]

    monkeypatch.setattr(u2pl, "reliable_labels", reliable_labels)
    tree, out = trees["drawn"], tmp_path / "run"
    steps, _ = made(monkeypatch, "u2pl", tree, out, SURE, teaching("one class"))
    for step, y_u in zip(steps, kept, strict=True):
        log_p = step.logits[0][2:].double().log_softmax(1)[:, 3]
        assert step.parts["unsup"] == pytest.approx(-log_p[y_u == 3].mean().item(), rel=1e-5)
        assert 0.7 < (y_u == 3).double().mean() < 1


# ---- huge logits ----


def sides(logits):
    """Of logits within 1: all +-1e4, all up to 1e4, and 1e4 mixed with small ones."""
    return 1e4 * logits.sign(), 1e4 * logits, torch.where(logits > 0.5, 1e4, logits)


def huge(seed):
    """Three batches of logits up to 1e4, (2, 5, 4, 3), and labels with void."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 4, 3, generator=rng).clamp(-1, 1)
    label = torch.randint(0, 5, (2, 4, 3), generator=rng)
    label[0, 0] = 255
    return sides(logits), label


def unsup(name, **values):
    """Flags as consistency_loss and cross_loss take them."""
    values = dict(unsup_loss="fpl", T=0.9, k_max=0, strict=True, balance=False) | values
    values = dict(weight="concave", mean_over="positives", k_strategy="n-1") | values
    return SimpleNamespace(threshold=0.0, gamma=2.0, **values)


def cps(loss, **values):
    def call(z, t, inside):
        return cps_fpl.cross_loss([z, z], [t, t], inside, 0.5, unsup("cps", unsup_loss=loss))[0]

    return call


def ael(loss, **values):
    def call(z, t, inside):
        args = unsup("ael", unsup_loss=loss, **values)
        return ael_fpl.consistency_loss(z, t, inside, torch.ones(5), 1, args)[0]

    return call


def u2pl_loss(kind):
    """U2PL's L_c or L_b of features of 1e4: anchors are the logits, keys the teacher's."""

    def call(z, t, inside):
        rep_s, rep_t = u2pl.as_rows(z), u2pl.as_rows(t)
        masks = u2pl.class_ranks(F.softmax(rep_t, 1)) == 0
        sizes, pushed = torch.tensor([6] * 5), torch.zeros(5, dtype=torch.int64)
        bank = torch.zeros(31, 5, dtype=rep_t.dtype)
        u = torch.rand(5, 9, dtype=torch.float64)
        u2pl.push_keys(bank, pushed, sizes, u2pl.draw_keys(rep_t, ~masks, u))
        args = SimpleNamespace(anchors=3, negatives=2, unreliable_loss=kind, tau=0.5)
        return u2pl.unreliable_loss(rep_s, rep_t, masks, bank, pushed, sizes, u, args)[0]

    return call


def eq_6(z, t, inside):
    """U2PL Eq. (3), (5), (6)."""
    H = u2pl.entropy(F.softmax(t, 1))
    (gamma,) = u2pl.quantiles(H, inside, torch.tensor(0.8))
    return u2pl.cross_entropy(z, u2pl.reliable_labels(t.argmax(1), H, gamma))


def softened(loss):
    return lambda z, t, inside: loss(z, F.softmax(t, 1)).mean()


PAIRS = {f"cps {loss}": cps(loss) for loss in ("fpl", "ce", "soft", "negative")}
PAIRS |= {f"ael {loss}": ael(loss) for loss in ("fpl", "ce")}
PAIRS |= {"ael balance": ael("fpl", balance=True, k_max=3, strict=False)}
PAIRS |= {f"u2pl {kind}": u2pl_loss(kind) for kind in ("contrastive", "binary")}
PAIRS |= {"u2pl eq. 6": eq_6}
for kind in ("ce", "mse"):
    loss = getattr(mean_teacher, f"consistency_{kind}")
    PAIRS[f"mt {kind}"] = lambda z, t, inside, loss=loss: loss(z, F.softmax(t, 1), inside)


@pytest.mark.parametrize("what", PAIRS)
@pytest.mark.parametrize("seed", range(2))
def test_logits_of_ten_thousand_in_every_loss_with_a_teacher(what, seed):
    torch.manual_seed(seed)
    (ones, others), inside = (huge(seed + i)[0] for i in (0, 9)), huge(seed)[1] < 255
    for z, t in itertools.product(ones, (*others, *(-x for x in ones), torch.zeros_like(ones[0]))):
        z = z.clone().requires_grad_()
        value = PAIRS[what](z, t, inside)
        (gradient,) = torch.autograd.grad(value, z)
        assert 0 <= value < 1e6 and gradient.isfinite().all()


@every_script
def test_logits_of_ten_thousand_in_every_supervised_loss(name):
    script = SCRIPTS[name]
    for seed, dtype in itertools.product(range(3), (torch.float32, torch.bfloat16)):
        several, label = huge(seed)
        for z in several:
            z = z.to(dtype).requires_grad_()
            true = z.double().movedim(1, -1)[label < 255]
            nll = true.logsumexp(1) - true.gather(1, label[label < 255][:, None])[:, 0]
            some = SimpleNamespace(ohem_kept=0.2, crop_size=4, aux_weight=0.4)
            losses = [script.cross_entropy(z, label), script.ohem_cross_entropy(z, label, 0.7, 3)]
            losses += [script.supervised_loss(dict(logits=z, aux=z), label, some)]
            assert losses[0].item() == pytest.approx(nll.mean().item(), rel=1e-5)
            assert losses[1] >= losses[0] * 0.5 and losses[2] >= 1.4 * losses[1] * 0.999
            for value in losses:
                (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
                assert value.isfinite() and gradient.isfinite().all() and gradient.any()


def test_the_mean_of_cps_scores_windows_of_certain_networks_that_disagree():
    z = torch.full((1, 4, 1, 2), -1e4)
    z[0, 1, 0, 0] = z[0, 2, 0, 1] = 1e4  # two windows, of the class 1 and, surer, 2
    z[0, 2, 0, 1] *= 2

    class Certain(torch.nn.Module):
        def forward(self, x):
            return {"logits": z}

    logits = cps_fpl.Average([Certain(), Certain()])(z)["logits"]
    assert logits.isfinite().all()
    assert logits.sum(3).argmax(1).item() == 2


@every_run
def test_networks_whose_outputs_are_ten_thousand(name, extra, trees, tmp_path, monkeypatch):
    def large(step, key, out):
        return {k: 1e4 * x / x.detach().abs().amax() for k, x in out.items()}

    steps, _ = made(monkeypatch, name, trees["drawn"], tmp_path / "run", extra, large)
    assert max(supervision(step) for step in steps) > 100


# ---- NaN and Inf at a step ----

BAD = 5  # of 8 steps; a line is due after every second


def argv_of(name, tree, out, **more):
    return flags(tree, out, **dict(iters=8, log=2, evaluate=4, save=2) | more) + BASE[name]


@pytest.fixture(scope="module")
def undisturbed(trees, tmp_path_factory):
    """Folders of runs in which nothing goes wrong."""
    root = tmp_path_factory.mktemp("undisturbed")
    for name, script in SCRIPTS.items():
        with pytest.MonkeyPatch.context() as patch:
            shrink(script, patch)
            train(script, argv_of(name, trees["drawn"], root / name))
    return root


def disturb(patch, name, fault, at=BAD, value=math.nan):
    """Injects a fault into a step: loss, output, gradient, teacher or, of it, the logits."""
    script = SCRIPTS[name]

    def change(step, key, out):
        hit = torch.is_grad_enabled() if fault == "output" else is_teacher(key)
        if step == at and fault in ("output", "teacher", "logits") and hit:
            return {k: x if (fault, k) == ("logits", "rep") else x * value for k, x in out.items()}

    steps, optimizer, supervised_loss = watch(patch, name, change), [], script.supervised_loss

    def bad_loss(*given):
        loss = supervised_loss(*given)
        return loss * value if fault == "loss" and steps[-1].number == at else loss

    def make_optimizer(*given):
        optimizer.append(whole(*given))

        def spoil(*_):
            if fault == "gradient" and steps[-1].number == at:
                optimizer[0].param_groups[0]["params"][0].grad.fill_(value)

        optimizer[0].register_step_pre_hook(spoil)
        return optimizer[0]

    whole = script.make_optimizer
    patch.setattr(script, "supervised_loss", bad_loss)
    patch.setattr(script, "make_optimizer", make_optimizer)
    return steps


FAULTS = [("loss", math.nan), ("loss", math.inf), ("output", math.nan), ("output", -math.inf)]
FAULTS += [("teacher", math.nan), ("gradient", math.nan)]


INJECTED = [(name, *fault) for name in SCRIPTS for fault in FAULTS]
INJECTED.remove(("supervised", "teacher", math.nan))
INJECTED.remove(("u2pl", "teacher", math.nan))  # below


@pytest.mark.parametrize("name, fault, value", INJECTED)
def test_a_fault_is_refused_by_its_step_and_the_run_goes_on_from_the_checkpoint_before(
    name, fault, value, trees, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    argv = argv_of(name, trees["drawn"], out)
    step = BAD + (fault == "gradient")  # seen in the next loss
    with monkeypatch.context() as patch:
        disturb(patch, name, fault, value=value)
        with pytest.raises(Refusal) as refusal:
            train(SCRIPTS[name], argv)
    start = f"loss or weights not finite at step {step}: nothing saved since; "
    assert str(refusal.value).startswith(start)
    assert finite(out)["step"] == 4
    assert max(line.get("step", 0) for line in log(out)) == 4
    shrink(SCRIPTS[name], monkeypatch)
    train(SCRIPTS[name], argv + ["--resume"])
    assert differences(undisturbed / name, out) == []
    assert finite(out)["step"] == 8


@pytest.mark.parametrize("at", [2, 8])
@every_script
def test_gradients_of_nan_where_a_checkpoint_is_due_are_not_saved(
    name, at, trees, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    argv = argv_of(name, trees["drawn"], out)
    with monkeypatch.context() as patch:
        disturb(patch, name, "gradient", at)
        with pytest.raises(Refusal, match=f"not finite at step {at}:"):
            train(SCRIPTS[name], argv)
    assert (out / "last.pt").exists() == (at == 8) and not (at == 2 and list(out.glob("*.pt")))
    shrink(SCRIPTS[name], monkeypatch)
    train(SCRIPTS[name], argv + ["--resume"])
    assert differences(undisturbed / name, out) == []


@pytest.mark.parametrize("fault", ["teacher", "logits"])
def test_a_u2pl_teacher_of_nan_is_refused_by_its_step(fault, trees, tmp_path, monkeypatch):
    """H is NaN: no label and no anchor, so L_u = L_c = 0."""
    disturb(monkeypatch, "u2pl", fault)
    with pytest.raises(Refusal, match=f"not finite at step {BAD}:"):
        train(u2pl, argv_of("u2pl", trees["drawn"], tmp_path / "run"))
    assert finite(tmp_path / "run")["step"] == 4


def test_networks_that_are_not_finite_are_not_scored(trees, tmp_path, monkeypatch):
    disturb(monkeypatch, "supervised", "gradient", 4)
    with pytest.raises(Refusal):
        train(supervised, argv_of("supervised", trees["drawn"], tmp_path / "run", save=8))
    assert [line for line in log(tmp_path / "run") if line["kind"] == "eval"] == []


def test_keys_that_are_not_finite_are_not_saved(trees, tmp_path, monkeypatch):
    whole, steps = u2pl.unreliable_loss, watch(monkeypatch, "u2pl")

    def unreliable_loss(rep_s, rep_t, masks, bank, *rest):
        result = whole(rep_s, rep_t, masks, bank, *rest)
        if steps[-1].number == 4:
            bank[0] = math.nan  # a key that no anchor met
        return result

    monkeypatch.setattr(u2pl, "unreliable_loss", unreliable_loss)
    with pytest.raises(Refusal):
        train(u2pl, argv_of("u2pl", trees["drawn"], tmp_path / "run"))
    assert finite(tmp_path / "run")["step"] == 2


def test_the_refusal_is_one_line_and_exit_code_2(trees, tmp_path, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(run.os, "_exit", codes.append)
    disturb(monkeypatch, "cps_fpl", "loss")
    run.refusing(lambda: train(cps_fpl, argv_of("cps_fpl", trees["drawn"], tmp_path / "run")))
    (line,) = capsys.readouterr().err.splitlines()
    assert f": loss or weights not finite at step {BAD}: nothing saved since; " in line
    assert codes == [2]
