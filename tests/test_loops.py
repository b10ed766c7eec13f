"""What one script's loop has and others have not: which network is scored, pairs, banks, panels."""

import itertools
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import ael_fpl
import cps_fpl
import esl
import processes
import recorder
import tiny
import u2pl
from benchmarks import runs
from common import Refusal, run
from common.distributed import Group


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


KINDS = {"branch1": ["branch1"], "branch2": ["branch2"], "mean": ["branch1", "branch2"]}


def bits(kind, networks):
    """The digest of what --evaluate names: one network, or both in a list."""
    states = [networks[name] for name in KINDS[kind]]
    if len(states) == 1:
        return processes.digest({"": states[0]})
    both = {f"{i}.{key}": x for i, state in enumerate(states) for key, x in state.items()}
    return processes.digest({"": both})


def test_the_network_that_evaluate_names_is_scored_and_best_follows_it(tree, tmp_path, monkeypatch):
    """[D19]; scoring changes nothing of the training; a checkpoint knows what was scored.

    No two networks of two seeds begin equal.
    """
    trained, begun = [], []
    for kind, seed in itertools.product(KINDS, "01"):
        out = tmp_path / kind / seed
        words = f"--evaluate {kind} --seed {seed} --lr 0.1 --batch-size-unlabeled 3".split()
        argv = small("cps_fpl", tree, out, *words, evaluate=1)
        found = watched(cps_fpl, argv, monkeypatch)
        lines = [line["miou"] for line in runs.log(out) if line["kind"] == "eval"]
        best = 1 + lines.index(max(lines))
        assert runs.log(out)[-1]["best_step"] == best
        order = [*found.steps, found.steps[-1], found.steps[best - 1]]
        assert found.scored == [(bits(kind, step.nets), {False}) for step in order]
        begun += [processes.digest({"": net}) for net in found.networks.values()]
        trained += [bits(branch, found.steps[-1].nets) for branch in ("branch1", "branch2")]
    assert len(set(begun[:4])) == 4 and begun == begun[:4] * 3
    assert len(set(trained[:4])) == 4 and trained == trained[:4] * 3
    path = tmp_path / "branch2/0/best.pt"
    saved = torch.load(path, weights_only=True)["networks"]
    for words in ([], ["--evaluate", "mean"]):
        argv = ["--eval-only", "--checkpoint", str(path), *words]
        ((scored, _),) = watched(cps_fpl, argv, monkeypatch).scored
        assert scored == bits((words or ["branch2"])[-1], saved)


@pytest.mark.parametrize("name", ["mean_teacher", "u2pl", "esl"])
def test_every_process_mixes_pairs_of_its_own(name, tree, tmp_path, monkeypatch):
    """8 unlabelled images are enough for 4 processes, and too few for 8."""
    script = tiny.script(name)
    tiny.shrink(script, monkeypatch)
    words = ["--cutmix", "--batch-size-unlabeled", "8"]
    args = tiny.resolved(script, small(name, tree, tmp_path / "run", *words, batch=8))

    begin = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(script, "Run", begin)
    monkeypatch.setattr(script, "parallel", lambda net, *_: net)
    for world, error in ((4, KeyboardInterrupt), (8, Refusal)):
        group = Group(0, world, torch.device("cpu"))
        monkeypatch.setattr(script.distributed, "setup", lambda device, group=group: group)
        with pytest.raises(error):
            script.main(args)


@pytest.mark.parametrize("words, cut", [("", "(3, 20)"), ("12 20", "(12, 20)"), ("3 11", "")])
def test_ranks_beyond_the_classes_are_cut_with_one_line(words, cut, tree, tmp_path, capsys):
    """r_l is at most 10 of 11 classes, r_h 11; so the last rank remains."""
    words = ["--ranks", *words.split()] if words else []
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(u2pl, patch)
        tiny.train(u2pl, small("u2pl", tree, tmp_path / "run", *words))
    printed = capsys.readouterr().out.splitlines()
    to = "(10, 11)" if "12" in cut else "(3, 11)"
    said = [f"--ranks {cut}: cut to {to}, as there are 11 classes"] if cut else []
    assert [line for line in printed if "--ranks" in line] == said
    lines = [line for line in runs.log(tmp_path / "run") if line["kind"] == "train"]
    assert lines[-1]["contrast"] > 0


@pytest.mark.smoke
def test_the_banks_of_a_run_begin_as_functions_of_the_seed(tree, tmp_path, monkeypatch):
    """Random confidences; four steps' partners by Eq. (9), any image, as none has been seen."""
    words = ["--batch-size-unlabeled", "3", "--seed", "8"]
    state = watched(ael_fpl, small("ael_fpl", tree, tmp_path / "run", *words), monkeypatch).state
    rng = np.random.default_rng([8, zlib.crc32(b"bank")])
    confidence = rng.random(11, np.float32)
    assert state["confidence"].tolist() == confidence.tolist()
    assert state["present"].tolist() == [[False] * 6] * 11
    score = np.exp(1 - confidence.astype(float))
    chances = np.cumsum(score) / score.sum()
    expected = []
    for _ in range(4):
        classes = [int((chances <= u).sum()) for u in rng.random(3)]
        expected.append([[c, int(rng.integers(6))] for c in classes])
    assert state["draws"].tolist() == expected


def test_a_damaged_partner_is_refused_by_name_in_one_line(tmp_path, monkeypatch, capsys):
    """Of seed 1 a first partner is none of the first images; threads do not hold up the end."""
    rng = np.random.default_rng([1, zlib.crc32(b"bank")])
    bank, empty = rng.random(11, np.float32), torch.zeros(11, 6, dtype=torch.bool)
    drawn = ael_fpl.draw_partners(torch.from_numpy(bank), empty, 2, rng)[:, 1].tolist()
    order = np.random.default_rng([1, zlib.crc32(b"unlabeled"), 0, 0]).permutation(6)
    partner = (set(drawn) - set(order[:2].tolist())).pop()
    tree = tiny.draw_tree(tmp_path / "data")
    path = tree / f"train/train{(1, 2, 3, 5, 6, 7)[partner]}.jpg"  # the unlabelled ones, at 1/4
    path.write_bytes(path.read_bytes()[:200])
    argv = small("ael_fpl", tree, tmp_path / "run", *"--batch-size-unlabeled 2 --seed 1".split())
    tiny.shrink(ael_fpl, monkeypatch)
    ended = Mock()
    monkeypatch.setattr(run.os, "_exit", ended)
    monkeypatch.setattr(run.signal, "signal", Mock())
    with run.refusals():
        tiny.train(ael_fpl, argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: not readable as an image" in line
    ended.assert_called_once_with(2)
    assert run.holds_nothing(tmp_path / "run")


def test_the_panel_of_parts_has_a_colour_for_each(tree, tmp_path, monkeypatch):
    argv = small("esl", tree, tmp_path / "run", "--no-cutmix", iters=1, pictures=1)
    (step,) = watched(esl, argv, monkeypatch, ["part_ids"]).steps
    parts = step.maps["parts"]
    assert parts.dtype == torch.uint8 and parts.shape == (2, 3, 32, 32)
    assert (parts == 255).all(1).equal(step.maps["pseudo label"] == -1)  # white
    ((_, ids),) = step.calls["part_ids"]
    ids = ids[2:]  # of the unlabelled images
    pixels = parts.movedim(1, -1)
    colours = {r: pixels[ids == r].unique(dim=0).tolist() for r in ids[ids < 33].unique().tolist()}
    assert all(len(colour) == 1 for colour in colours.values())
    assert len({tuple(colour[0]) for colour in colours.values()}) == len(colours) > 3
