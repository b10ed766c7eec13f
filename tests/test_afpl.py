"""Several T: before CutMix, refusals, older checkpoints; results/unimatch_fpl.py; passes."""

import pytest
import torch

import cps_fpl
import tiny
import unimatch
from common import Refusal
from common.flags import as_fields
from results import unimatch_fpl


@pytest.mark.parametrize("name", ["cps_fpl", "ael_fpl", "unimatch"])
def test_several_T_are_chosen_before_cutmix_and_refused_where_they_cannot_act(name):
    words = ["--T", "0.2", "0.5", *("--unsup-loss fpl".split() if name == "unimatch" else [])]
    args = tiny.resolved(tiny.script(name), words)
    logits, inside = 2 * torch.randn(2, 2, 9, 8, 8), torch.rand(2, 2, 8, 8) < 0.8
    K = [cps_fpl.adaptive_assignment(*view, args) for view in zip(logits, inside, strict=True)]
    mask = torch.rand(2, 1, 8, 8) < 0.5
    if name != "unimatch":  # its step is the literal one: test_unimatch.py
        found = tiny.script(name).mixed_k(mask, *zip(logits, inside, strict=True), args)
        assert torch.equal(found, K[0] * ~mask[:, 0] + K[1] * mask[:, 0])
    rows = [("--fused on", "twin"), ("--unsup-loss ce", "nothing here"), ("--T 0.9 0.8", "rising")]
    rows += [("--k-strategy n", "n-1"), ("--k-strategy step", "n-1")] if name == "cps_fpl" else []
    for more, line in rows:
        with pytest.raises(Refusal, match=line):
            tiny.resolved(tiny.script(name), [*words, *more.split()])


def test_an_older_checkpoint_has_one_T():
    saved = {"T": 0.9, "scales": [0.5, 2.0], "lr": 0.1}
    assert as_fields(cps_fpl.Args, saved) == {"T": (0.9,), "scales": (0.5, 2.0), "lr": 0.1}


@pytest.mark.parametrize("name", ["mean_teacher", "u2pl", "esl", "unimatch"])
def test_passes_over_the_unlabelled_images_are_counted_in_their_batch(name):
    words = "--dataset voc --split 92 --batch-size 16 --batch-size-unlabeled".split()
    steps = [tiny.resolved(tiny.script(name), [*words, size]).total_iters for size in ("16", "32")]
    assert steps[1] == pytest.approx(steps[0] / 2, rel=0.01)


def test_what_fpl_does_there_is_counted_and_drawn(tmp_path, monkeypatch, capsys):
    """Pixels: sure and right; 0.65, wrong, the truth second; void. T 0.95: K is 1, 2, 2."""
    prob = torch.tensor([[0.97, 0.02, 0.01], [0.65, 0.25, 0.1], [0.4, 0.3, 0.3]])
    args = tiny.resolved(unimatch, "--unsup-loss fpl --T 0.95".split())
    found = unimatch_fpl.counts(prob.log().T[None, :, None], torch.tensor([[[0, 1, 255]]]), args)
    assert found.tolist() == [[0] * 4] * 2 + [[1, 0, 1, 1]] + [[0] * 4] * 3 + [[1, 1, 1, 0]]
    tiny.shrink(unimatch, monkeypatch)
    run, out = tmp_path / "run", tmp_path / "x.png"
    argv = tiny.flags(tiny.draw_tree(tmp_path / "data"), run, log=1, iters=2, evaluate=2, save=2)
    tiny.train(unimatch, [*argv, *"--unsup-loss fpl --T 0.2 0.5".split()])
    rows = (f"log {run}", 0), (f"val {run}/last.pt --images 2", 0)
    for words, code in (*rows, (f"val {run}/last.pt --images 9", 2), (f"log {out}", 2)):
        out.unlink(missing_ok=True)
        assert unimatch_fpl.main([*words.split(), "--out", str(out)]) == code
        assert out.exists() == (code == 0)
    text = capsys.readouterr().out
    assert "below 0.95" in text and "step 2, 2 images of val, T 0.2 0.5" in text
