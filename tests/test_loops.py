"""What one script's loop has and others have not: which network is scored, refusals, panels."""

import contextlib
import re
import time
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ael_fpl
import cps_fpl
import esl
import processes
import recorder
import tiny
import u2pl
from benchmarks import runs
from common import Refusal, distributed, run

UNLABELED = (1, 2, 3, 5, 6, 7)  # of train0 to train7, at 1/4


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiny.draw_tree(tmp_path_factory.mktemp("loops") / "data")


def small(name, tree, out, *words, **numbers):
    """Flags of a run of a few steps in which a method does all that it does."""
    numbers = dict(iters=4, log=1, evaluate=9, save=9) | numbers
    return [*tiny.flags(tree, out, **numbers), *tiny.MORE.get(name, "").split(), *words]


def watched(script, argv, monkeypatch, calls=()):
    with monkeypatch.context() as patch:
        tiny.shrink(script, patch)
        return recorder.watch(patch, script, argv, calls)


# ---- cps_fpl: which of the two networks is scored, and how both begin ----

KINDS = {"branch1": ["branch1"], "branch2": ["branch2"], "mean": ["branch1", "branch2"]}


def bits(kind, networks):
    """The digest of what --evaluate names: one network, or both in a list."""
    states = [networks[name] for name in KINDS[kind]]
    states = {f"{i}.{key}": x for i, state in enumerate(states) for key, x in state.items()}
    if kind != "mean":
        states = {key.removeprefix("0."): x for key, x in states.items()}
    return processes.digest({"": states})


def test_the_network_that_evaluate_names_is_scored_and_best_follows_it(
    tree, tmp_path, monkeypatch, capsys
):
    trained, chosen, scores = [], set(), {}
    for kind in KINDS:
        out = tmp_path / kind
        words = f"--evaluate {kind} --lr 0.1 --batch-size-unlabeled 3".split()
        argv = small("cps_fpl", tree, out, *words, iters=6, evaluate=1)
        found = watched(cps_fpl, argv, monkeypatch)
        lines = [line["miou"] for line in runs.log(out) if line["kind"] == "eval"]
        best, done = 1 + lines.index(max(lines)), runs.log(out)[-1]
        assert done["best_step"] == best
        order = [*found.steps, found.steps[-1], found.steps[best - 1]]
        assert found.scored == [(bits(kind, step.nets), {False}) for step in order]
        chosen.add(best)
        trained.append([bits(branch, found.steps[-1].nets) for branch in KINDS])
        scores[kind] = done["best"]["miou"]
    assert len(chosen) > 1 and len(set(scores.values())) > 1  # not the best of one of them always
    assert trained[0] == trained[1] == trained[2]  # scoring changes nothing of the training
    tiny.shrink(cps_fpl, monkeypatch)
    evaluate, asked = cps_fpl.evaluate, []
    monkeypatch.setattr(cps_fpl, "evaluate", lambda net, *a: asked.append(net) or evaluate(net, *a))
    path = tmp_path / "branch2/best.pt"
    saved = torch.load(path, weights_only=True)["networks"]
    for words in ([], *(["--evaluate", kind] for kind in KINDS)):  # none: the checkpoint's own
        tiny.train(cps_fpl, ["--eval-only", "--checkpoint", str(path), *words])
        assert processes.digest({"": asked[-1]}) == bits((words or ["branch2"])[-1], saved)
    printed = capsys.readouterr().out
    assert len(re.findall(r"^mIoU +([\d.]+)$", printed, re.M)) == 4


@pytest.mark.smoke
def test_the_mean_is_that_of_the_probabilities_of_both_in_eval_mode(tree, tmp_path, monkeypatch):
    tiny.shrink(cps_fpl, monkeypatch)
    args = tiny.resolved(cps_fpl, tiny.flags(tree, tmp_path / "run"))
    images, modes = cps_fpl.load(args), []
    nets = [cps_fpl.Network(args, 11, cps_fpl.CPSHead) for _ in (1, 2)]
    for net in nets:
        net.register_forward_hook(lambda module, *_: modes.append(module.training))
    group = run.Group(0, 1, torch.device("cpu"))
    result, maps = cps_fpl.evaluate(cps_fpl.Average(nets), images, images.val, args, group)
    assert modes == [False] * 4 and all(net.training for net in nets)
    for image, prediction in zip(maps["image"], maps["prediction"], strict=True):
        with torch.no_grad():
            prob = [net.eval()(image[None])["logits"].double().softmax(1) for net in nets]
        mean = (prob[0] + prob[1]) / 2
        top = mean.topk(2, 1).values[0]
        clear = top[0] - top[1] > 1e-6  # where the likeliest two are not rounded together
        assert clear.float().mean() > 0.9
        assert torch.equal(prediction[clear], mean[0].argmax(0)[clear])


def begun(argv, monkeypatch):
    """Returns the two networks of main before the first step."""
    found = []

    def make_optimizer(trained, args):
        found.extend(trained)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cps_fpl, "make_optimizer", make_optimizer)
        tiny.train(cps_fpl, argv)
    return [net.state_dict() for net in found]


def test_networks_begin_with_the_given_backbone_and_heads_of_their_own(tree, tmp_path, monkeypatch):
    """Random numbers are functions of the seed, and no two networks have the same."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, tmp_path / "w.pth")
    argv = tiny.flags(tree, tmp_path / "run")
    one, two = begun([*argv, "--weights", str(tmp_path / "w.pth")], monkeypatch)
    assert one.keys() == two.keys()
    for name, x in one.items():
        if name.startswith("backbone."):
            given = theirs[name.removeprefix("backbone.")]
            assert torch.equal(x, given) and torch.equal(two[name], given)
        else:
            random = x.ndim == 4 or name == "head.classify.bias"
            assert torch.equal(x, two[name]) != random, name  # BN: 1 and 0
    tiny.shrink(cps_fpl, monkeypatch)
    pairs = [begun([*argv, "--seed", str(seed)], monkeypatch) for seed in (0, 0, 1)]
    for name in (name for name, x in pairs[0][0].items() if x.ndim == 4):
        states = [state[name] for pair in pairs for state in pair]
        assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[3])
        assert len({runs.bits(x) for x in states}) == 4, name


# ---- pairs, groups, pasting: what is refused ----


@pytest.mark.smoke
def test_one_line_refuses_what_a_batch_does_not_allow(tree, tmp_path, monkeypatch):
    """And no folder is left; the command beside it runs."""
    pairs = "--cutmix mixes pairs: an even --batch-size-unlabeled"
    rows = [
        *((name, "--cutmix --batch-size-unlabeled 3", pairs) for name in ("mean_teacher",)),
        *((name, "--batch-size-unlabeled 3", pairs) for name in ("u2pl", "esl")),
        *((name, "--no-cutmix --batch-size-unlabeled 3", "") for name in ("u2pl", "esl")),
        ("mean_teacher", "--no-cutmix --batch-size-unlabeled 3", ""),
        ("ael_fpl", "--pooled 3", "--pooled 3: 2 labelled images per process do not divide"),
        ("ael_fpl", "--pooled 0", "--pooled 0"),
        (
            "ael_fpl",
            "--paste-not 0 1 2 3 4 5 6 7 8 9 10",
            "--paste-not: some of the classes 0 to 10",
        ),
        ("ael_fpl", "--paste-not 0 11", "--paste-not: some of the classes 0 to 10"),
        ("ael_fpl", "--paste-not 0 1 2 3 4 5 6 7 8 9", ""),
        ("ael_fpl", "--paste-not 0 1 2 3 4 5 6 7 8 9 10 --paste-draws 0", ""),
    ]
    for number, (name, words, line) in enumerate(rows):
        script, out = tiny.script(name), tmp_path / str(number)
        with monkeypatch.context() as patch:
            tiny.shrink(script, patch)
            argv = small(name, tree, out, *words.split(), iters=2)
            if not line:
                tiny.train(script, argv)
                assert runs.log(out)[-1]["kind"] == "done"
                continue
            with pytest.raises(Refusal) as refused:
                tiny.train(script, argv)
            assert line in str(refused.value) and "\n" not in str(refused.value)
            assert not out.exists()


@pytest.mark.parametrize("name", ["mean_teacher", "u2pl", "esl"])
def test_every_process_mixes_pairs_of_its_own(name, tree, tmp_path, monkeypatch):
    """8 unlabelled images are enough for 4 processes, and too few for 8."""
    script = tiny.script(name)
    tiny.shrink(script, monkeypatch)
    words = ["--cutmix", "--batch-size-unlabeled", "8"]
    args = tiny.resolved(script, small(name, tree, tmp_path / "run", *words, batch=8))

    class Begun(Exception):
        pass

    def begin(*_):
        raise Begun

    monkeypatch.setattr(script, "Run", begin)
    monkeypatch.setattr(script, "parallel", lambda net, *_: net)
    for world, error in ((4, Begun), (8, Refusal)):
        group = run.Group(0, world, torch.device("cpu"))
        monkeypatch.setattr(script.distributed, "setup", lambda device, group=group: group)
        with pytest.raises(error):
            script.main(args)


@pytest.mark.smoke
def test_ranks_beyond_the_classes_are_cut_with_one_line(tree, tmp_path, monkeypatch, capsys):
    tiny.shrink(u2pl, monkeypatch)
    lines = {
        "": ["--ranks (3, 20): cut to (3, 11), as there are 11 classes"],
        "--ranks 3 11": [],
        "--ranks 12 20": ["--ranks (12, 20): cut to (10, 11), as there are 11 classes"],
        "--ranks 12 20 --unreliable-loss none": [],
    }
    for number, (words, said) in enumerate(lines.items()):
        out = tmp_path / str(number)
        tiny.train(u2pl, small("u2pl", tree, out, *words.split()))
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if "--ranks" in line] == said
        contrast = [line["contrast"] for line in runs.log(out) if line["kind"] == "train"]
        assert (contrast[-1] > 0) == ("none" not in words)  # the last rank remains


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


# ---- ael_fpl ----


@pytest.mark.smoke
def test_the_banks_of_a_run_begin_as_functions_of_the_seed(tree, tmp_path, monkeypatch):
    """Random confidences; four steps' partners by Eq. (9), any image, as none has been seen."""
    words = ["--batch-size-unlabeled", "3", "--seed", "8"]
    state = watched(ael_fpl, small("ael_fpl", tree, tmp_path / "run", *words), monkeypatch).state
    rng = np.random.default_rng([8, zlib.crc32(b"bank")])
    confidence = rng.random(11, np.float32)
    assert state["confidence"].tolist() == confidence.tolist()
    assert state["present"].shape == (11, 6) and not state["present"].any()
    assert state["present"].dtype == torch.bool
    score = np.exp(1 - confidence.astype(float))
    chances = np.cumsum(score) / score.sum()
    for draws in state["draws"]:
        classes = [int((chances <= u).sum()) for u in rng.random(3)]
        assert draws.tolist() == [[c, int(rng.integers(6))] for c in classes]
    assert state["draws"].shape == (4, 3, 2)


def test_classes_that_are_not_there_move_the_bank_or_leave_it(tmp_path, monkeypatch):
    """Masks of nothing but void: absent classes count with 0, or with --skip-absent not at all."""
    root = tiny.draw_tree(tmp_path / "data")
    for i in range(8):
        Image.new("L", (48, 36), 11).save(root / f"trainannot/train{i}.png")
    for words in ([], ["--skip-absent"]):
        argv = small("ael_fpl", root, tmp_path / f"run{len(words)}", *words, iters=6)
        found = watched(ael_fpl, argv, monkeypatch)
        first, last = found.state["confidence"], found.steps[-1].state["confidence"]
        momentum = tiny.resolved(ael_fpl, argv).bank_momentum
        # six float32 multiplications
        assert torch.allclose(last, first if words else first * momentum**6, atol=1e-6)
        assert not torch.equal(last, first) or words


def partner_alone(tree):
    """Returns a seed, and the image that is a partner in the first step but no first image."""
    for seed in range(100):
        rng = np.random.default_rng([seed, zlib.crc32(b"bank")])
        bank, empty = rng.random(11, np.float32), torch.zeros(11, 6, dtype=torch.bool)
        drawn = ael_fpl.draw_partners(bank, empty, 2, rng)[:, 1].tolist()
        order = np.random.default_rng([seed, zlib.crc32(b"unlabeled"), 0, 0]).permutation(6)
        rest = [i for i in drawn if i not in order[:2]]
        if rest:
            return seed, tree / f"train/train{UNLABELED[rest[0]]}.jpg"
    raise AssertionError("no such seed")


def test_a_damaged_partner_is_refused_by_name_in_one_line(tmp_path, monkeypatch):
    tree = tiny.draw_tree(tmp_path / "data")
    seed, path = partner_alone(tree)
    path.write_bytes(path.read_bytes()[:200])
    words = ["--batch-size-unlabeled", "2", "--seed", str(seed)]
    argv = small("ael_fpl", tree, tmp_path / "run", *words)
    with pytest.raises(Refusal, match=re.escape(str(path))):
        watched(ael_fpl, argv, monkeypatch)
    # the real network and the real end of a process: threads do not hold it up
    program = [str(tiny.ROOT / "ael_fpl.py"), *argv, "--weights", "none"]
    process = processes.Forked(program, apart=True)
    _, text = process.communicate()
    assert process.returncode == 2, text
    (line,) = text.splitlines()
    assert line.startswith(f"ael_fpl.py: {path}: not readable as an image")
    assert not (tmp_path / "run").exists()


def test_the_time_of_the_banks_is_measured_before_and_after_the_networks(
    tree, tmp_path, monkeypatch
):
    """bank_ms: pasting, partners and masks; two sleeps of 10 ms are in it, and in no other part."""

    def slowly(function):
        def slower(*given):
            time.sleep(0.01)
            return function(*given)

        return slower

    for name in ("copy_paste", "partner_mask"):
        monkeypatch.setattr(ael_fpl, name, slowly(getattr(ael_fpl, name)))
    found = watched(ael_fpl, small("ael_fpl", tree, tmp_path / "run"), monkeypatch)
    for step in found.steps:
        assert list(step.spent) == ["data", "bank"] and step.spent["bank"] > 0.02


# ---- esl ----

WAITS = "_local_scalar_dense nonzero masked_select unique boolean".split()


class Calls(TorchDispatchMode):
    """Keeps the operations that are called, an index by booleans as "boolean"."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        for index in (y for x in inputs if isinstance(x, (list, tuple)) for y in x):
            if torch.is_tensor(index) and "index" in str(operation) and index.dtype == torch.bool:
                self.seen.append("boolean")
        self.seen.append(str(operation))
        return operation(*inputs, **(named or {}))

    def waits(self):
        return [name for name in self.seen if any(word in name for word in WAITS)]


def test_a_step_never_waits_for_the_device(tree, tmp_path, monkeypatch):
    """From the gradient's clearing to the optimizer's step: the losses seam of main itself."""
    with Calls() as calls:  # the detector sees
        torch.ones(2)[torch.ones(2).bool()].sum().item()
    assert len(calls.waits()) >= 2
    clear, move, number, calls = torch.optim.SGD.zero_grad, torch.optim.SGD.step, [0], Calls()

    def zero_grad(self, **options):
        clear(self, **options)
        number[0] += 1
        if number[0] == 3:
            calls.__enter__()

    def step(self):
        if number[0] == 3:
            calls.__exit__(None, None, None)
        move(self)

    tiny.shrink(esl, monkeypatch)
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", zero_grad)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    tiny.train(esl, small("esl", tree, tmp_path / "run"))
    assert any("convolution_backward" in name for name in calls.seen)
    assert not calls.waits()


@pytest.mark.parametrize("words", [[], ["--no-contrast"]])
def test_the_panel_of_parts_has_a_colour_for_each(words, tree, tmp_path, monkeypatch):
    argv = small("esl", tree, tmp_path / "run", *words, iters=1, pictures=1)
    (step,) = watched(esl, argv, monkeypatch, ["part_contrast"]).steps
    maps = step.maps
    assert maps["1 - 1/classes"].min() >= 0 and maps["1 - 1/classes"].max() <= 1 - 1 / 11
    assert ("parts" in maps) == (not words)
    if words:
        return
    parts = maps["parts"]
    assert parts.dtype == torch.uint8 and parts.shape == (2, 3, 32, 32)
    white = (parts == 255).all(1)
    assert white.equal(maps["pseudo label"] == -1)
    ids = step.calls["part_contrast"][0][0][1][2:]  # of candidates: Eq. (9)
    pixels = parts.movedim(1, -1)
    colours = {r: pixels[ids == r].unique(dim=0).tolist() for r in ids[ids < 33].unique().tolist()}
    assert all(len(colour) == 1 for colour in colours.values())
    assert len({tuple(colour[0]) for colour in colours.values()}) == len(colours) > 3


def test_prototypes_are_found_once_and_not_again_at_a_resume(tree, tmp_path, monkeypatch):
    """K-means over the labelled images: in step 0 alone."""
    argv = small("esl", tree, tmp_path / "run", save=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        recorder.stop_in(patch, 3)
        watched(esl, argv, patch)
    monkeypatch.setattr(esl, "first_prototypes", None)
    found = watched(esl, [*argv, "--resume"], monkeypatch)
    assert found.start == 2 and found.state["prototypes"].any()
