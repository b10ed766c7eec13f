"""u2pl.py's loop: what feeds what in a step, warm-up, the bank over processes and resumes.

All use the tiny network of tests/helpers.py. Every step of a run is compared with a literal one:
loops over pixels, classes and keys. As a program (python -m tests.test_u2pl_run SCRIPT JSON) it is
one of several processes.
"""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import u2pl
from common import Refusal, distributed, run
from tests.helpers import (
    differences,
    digest,
    draw_tree,
    finish,
    flags,
    kill_at_step,
    log,
    shrink,
    start,
    tiny_modules,
    train,
)
from tests.test_u2pl import generator, scalar_keys, scalar_loss, scalar_ranks, unit

SMALL = "--warmup-iters 2 --anchors 5 --negatives 6 --keys 7 --bank-sizes 20 12".split()
KEYS, ANCHORS, NEGATIVES, SIZES = 7, 5, 6, [20] + [12] * 10


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return draw_tree(tmp_path_factory.mktemp("u2pl") / "data")


def watched(patch, argv):
    """Runs main; returns its steps: batch, seen (forward passes in training), calls, parts, nets.

    Before them, its networks.
    """
    steps, scoring = [], []
    restore, step, stream, score = (run.Run.restore, run.Run.step, u2pl.open_stream, u2pl.evaluate)

    def open_stream(name, *rest):
        for batch in stream(name, *rest):
            if name == "labeled":
                steps.append(SimpleNamespace(batch={}, seen=[], calls={}))
            steps[-1].batch[name] = {k: x.clone() for k, x in batch.items()}
            yield batch

    def evaluate(*rest):
        scoring.append(1)
        result = score(*rest)
        scoring.pop()
        steps[-1].scored = rest[0]
        return result

    def begin(self, networks, optimizer, state):
        for name, net in networks.items():

            def saw(module, inputs, out, name=name):
                if not scoring and name == "teacher":
                    bits = {k: digest({"": net}) for k, net in networks.items()}
                    steps[-1].before = getattr(steps[-1], "before", bits)
                if not scoring:
                    entry = dict(net=name, training=module.training, image=inputs[0].clone())
                    entry |= {k: x.detach().clone() for k, x in out.items()}
                    entry["bits"] = digest({"": module})
                    entry["buffers"] = [b.clone() for b in module.buffers()]
                    steps[-1].seen.append(entry | {"grad": torch.is_grad_enabled()})

            net.register_forward_hook(saw)
        steps.append(networks)
        return restore(self, networks, optimizer, state)

    def note(self, done, parts, *rest):
        steps[-1].parts = {k: v.item() for k, v in parts.items()}
        nets = {k: [p.clone() for p in net.parameters()] for k, net in networks().items()}
        steps[-1].nets = nets
        steps[-1].buffers = [b.clone() for b in networks()["teacher"].buffers()]
        head = networks()["student"].head.represent
        steps[-1].slope = sum(p.grad.abs().sum().item() for p in head.parameters())
        return step(self, done, parts, *rest)

    def networks():
        return steps[0]

    for name in ("draw_keys", "push_keys", "unreliable_loss"):
        call = getattr(u2pl, name)

        def called(*inputs, name=name, call=call):
            kept = [x.detach().clone() if torch.is_tensor(x) else x for x in inputs]
            steps[-1].calls[name] = kept
            return call(*inputs)

        patch.setattr(u2pl, name, called)
    shrink(u2pl, patch)
    patch.setattr(u2pl, "open_stream", open_stream)
    patch.setattr(u2pl, "evaluate", evaluate)
    patch.setattr(run.Run, "restore", begin)
    patch.setattr(run.Run, "step", note)
    train(u2pl, argv)
    return steps[0], steps[1:]


def mixed(number, seed, size, *maps, prob=0.5, mix=True):
    """CutMix, image by image and pixel by pixel: the maps as the step's coin and boxes mix them."""
    rng = np.random.default_rng([seed, number])
    if not mix or rng.random() >= prob:
        return maps
    boxes, found = [u2pl.cutmix_box(rng, size) for _ in maps[0]], [x.clone() for x in maps]
    for i, (top, left, h, w) in enumerate(boxes):
        for new, old in zip(found, maps, strict=True):
            box = (..., slice(top, top + h), slice(left, left + w))
            new[i][box] = old[i ^ 1][box]
    return found


def log_loss(logits, label):
    """Mean of -log p(label) over the labelled pixels."""
    p = logits.double().log_softmax(1).movedim(1, -1)[label != 255]
    y = label[label != 255]
    return -math.fsum(p[i, c].item() for i, c in enumerate(y.tolist())) / max(len(y), 1)


def literal(number, step, rings, total, args):
    """Asserts that a step after warm-up is the literal one; rings: each class's list of keys."""
    eye, student, teacher = step.seen
    assert [e["net"] for e in step.seen] == ["teacher", "student", "teacher"]
    assert [e["training"] for e in step.seen] == [False, True, True]
    assert [e["grad"] for e in step.seen] == [False, True, False]
    x_l, y_l = step.batch["labeled"]["image"], step.batch["labeled"]["label"]
    clean, inside = step.batch["unlabeled"]["image"], step.batch["unlabeled"]["inside"]
    assert eye["image"].equal(clean)
    pseudo = torch.where(inside, eye["logits"].argmax(1), 255)
    x_u, pseudo, inside = mixed(number, 0, 32, clean, pseudo, inside, mix=args["cutmix"])
    for entry in (student, teacher):
        assert entry["image"].equal(torch.cat([x_l, x_u]))
    # Eq. (5) to (8)
    n = len(x_l)
    p = teacher["logits"][n:].softmax(1)
    H = -(p * p.clamp(min=1e-30).log()).sum(1)
    t = math.floor(args["epochs"] * number / total) if args["dpa"] else 0
    alpha = args["alpha_0"] * (1 - t / args["epochs"])
    gamma, lower = np.percentile(H[inside].double().numpy(), [100 * (1 - alpha), 100 * alpha])
    near = (H - gamma).abs() < 1e-6  # where rounding decides
    y_u = torch.where(H < gamma, pseudo, 255)
    weight = args["eta"] * int(inside.sum()) / max(int((y_u != 255).sum()), 1)
    rough = dict(rel=2e-3 if near.any() else 1e-5, abs=1e-6)
    assert step.parts["unsup_weight"] == pytest.approx(weight, **rough)
    assert step.parts["sup"] == pytest.approx(log_loss(student["logits"][:n], y_l), rel=1e-5)
    assert step.parts["unsup"] == pytest.approx(log_loss(student["logits"][n:], y_u), **rough)
    contrast = 0.0
    if args["unreliable_loss"] != "none":
        contrast = literal_contrast(step, y_l, y_u, H, inside, gamma, lower, rings, args)
    assert step.parts["contrast"] == pytest.approx(contrast, rel=1e-5)
    loss = step.parts["sup"] + weight * step.parts["unsup"] + args["contrast_weight"] * contrast
    assert step.parts["loss"] == pytest.approx(loss, **rough)


def literal_contrast(step, y_l, y_u, H, inside, gamma, lower, rings, args):
    """Asserts the masks of a step to be the literal ones; returns its L_c, and fills the rings."""
    _, student, teacher = step.seen
    n, C, (h, w) = len(y_l), 11, student["rep"].shape[2:]
    rep_s, rep_t = (x["rep"].movedim(1, -1).flatten(0, 2) for x in (student, teacher))
    given_t, N_c, u = step.calls["draw_keys"]
    assert given_t.equal(rep_t)
    A_c, v = (step.calls["unreliable_loss"][i] for i in (2, 6))
    assert step.calls["unreliable_loss"][0].equal(rep_s)
    prob = teacher["coarse"].softmax(1)
    r_l, r_h = args["ranks"][0], min(args["ranks"][1], C)
    pixel, some = 0, {"unreliable": H > gamma, "reliable": H < lower, "all": inside}
    some = some[args["negatives_from"]] & inside
    for image in range(2 * n):
        for i in range(h):
            for j in range(w):
                y, x = i * 32 // h, j * 32 // w
                p = prob[image, :, i, j].tolist()
                rank, unlabeled = scalar_ranks(p), image >= n
                label = (y_u[image - n] if unlabeled else y_l[image])[y, x].item()
                sure = not unlabeled or abs(H[image - n, y, x].item() - gamma) > 1e-6
                for c in range(C) if sure else ():
                    assert A_c[c, pixel] == (label == c and p[c] > args["delta_p"])
                    if unlabeled:
                        negative = some[image - n, y, x].item() and r_l <= rank[c] < r_h
                    else:
                        negative = label not in (c, 255) and rank[c] < r_l
                    assert N_c[c, pixel] == negative
                pixel += 1
    for c in range(C):  # Alg. 1: push, then sample
        if not args["bank"]:
            rings[c] = [[], 0]
        for i in scalar_keys(N_c[c].tolist(), u[c].tolist()):
            keys, pushed = rings[c]
            key = unit(rep_t[i].double().tolist())
            if len(keys) < SIZES[c]:
                keys.append(key)
            else:
                keys[pushed % SIZES[c]] = key
            rings[c][1] += 1
    lists = rep_s.double().tolist(), rep_t.double().tolist(), A_c.tolist(), [r[0] for r in rings]
    v = v[:, :ANCHORS].tolist(), v[:, ANCHORS:].view(C, ANCHORS, NEGATIVES).tolist()
    classes = sum(bool(A_c[c].any()) and bool(rings[c][0]) for c in range(C))
    assert step.parts["classes"] == classes
    return scalar_loss(*lists, *v, args["unreliable_loss"], args["tau"])[0]


ROWS = {
    "paper": "",
    "binary": "--unreliable-loss binary",
    "none": "--unreliable-loss none",
    "reliable": "--negatives-from reliable",
    "all": "--negatives-from all --ranks 1 20",
    "no bank": "--no-bank --ranks 1 3",
    "no DPA": "--no-dpa --alpha-0 0.4 --no-cutmix",
    "hot": "--tau 0.01 --delta-p 0.05 --eta 2 --contrast-weight 1",
}


@pytest.mark.smoke
@pytest.mark.parametrize("row", ROWS)
def test_every_step_is_the_literal_one(row, tree, tmp_path, monkeypatch):
    argv = flags(tree, tmp_path / "run", iters=7, log=1, evaluate=2, save=7) + SMALL
    argv += ["--scales", "0.5", "1.5", "--delta-p", "0.1"] + ROWS[row].split()
    networks, steps = watched(monkeypatch, argv)
    args = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])["args"]
    rings = [[[], 0] for _ in range(11)]
    for step in steps[:2]:  # warm-up
        assert [(e["net"], e["training"], len(e["image"])) for e in step.seen] == [
            ("student", True, 2)
        ]
        assert step.parts["loss"] == step.parts["sup"]
        assert not any(step.parts[k] for k in ("unsup", "unsup_weight", "contrast", "classes"))
    seen = 0
    for number, step in enumerate(steps[2:], 2):
        literal(number, step, rings, 7, args)
        seen += step.parts["classes"] > 1
        assert (step.slope > 0) == (step.parts["classes"] > 0)  # L_c reaches the head's features
        own = zip(step.buffers, step.seen[2]["buffers"], strict=True)
        assert all(a.equal(b) for a, b in own)  # BN statistics: those of the teacher's own pass
        decay = min(1 - 1 / (number - 1), 0.99)
        before = steps[number - 1].nets["teacher" if number > 2 else "student"]
        for t, old, s in zip(step.nets["teacher"], before, step.nets["student"], strict=True):
            assert torch.allclose(t, decay * old + (1 - decay) * s, atol=1e-6)
    assert seen or row == "none"
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert set(saved["networks"]) == {"student", "teacher"}
    ready = steps[2].before  # the teacher of the first step after warm-up is the student, whole
    assert ready["teacher"] == ready["student"] == steps[2].seen[0]["bits"]
    assert steps[1].scored is networks["student"] and steps[3].scored is networks["teacher"]


def test_the_last_labels_are_padding(tree, tmp_path, monkeypatch):
    """Nothing inside: images so small that a crop is nearly all padding still run."""
    argv = flags(tree, tmp_path / "run", iters=3, log=1, evaluate=3, save=3) + SMALL
    watched(monkeypatch, argv + ["--scales", "0.03", "0.04", "--warmup-iters", "0"])
    assert all(math.isfinite(x["loss"]) for x in log(tmp_path / "run") if x["kind"] == "train")


def test_ranks_are_clipped_with_one_line(tree, tmp_path, monkeypatch, capsys):
    shrink(u2pl, monkeypatch)
    argv = flags(tree, tmp_path / "run", iters=3, log=1, evaluate=3, save=3) + SMALL
    train(u2pl, argv)
    assert capsys.readouterr().out.count("--ranks (3, 20): cut to (3, 11)") == 1
    train(u2pl, argv + ["--ranks", "3", "11", "--out", str(tmp_path / "b")])
    assert "--ranks" not in capsys.readouterr().out
    train(u2pl, argv + ["--ranks", "12", "20", "--out", str(tmp_path / "d")])
    assert "--ranks (12, 20): cut to (10, 11), as there are 11 classes" in capsys.readouterr().out
    assert log(tmp_path / "d")[-3]["contrast"] > 0  # the last rank remains
    train(
        u2pl, argv + "--ranks 12 20 --unreliable-loss none".split() + ["--out", str(tmp_path / "e")]
    )
    assert "--ranks" not in capsys.readouterr().out
    odd = ["--batch-size-unlabeled", "3", "--out", str(tmp_path / "c")]
    with pytest.raises(Refusal, match="pairs"):
        train(u2pl, argv + odd)
    train(u2pl, argv + odd + ["--no-cutmix"])


# ---- resume, processes ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(dtype, tree, tmp_path, monkeypatch):
    shrink(u2pl, monkeypatch)
    whole = flags(tree, tmp_path / "whole", iters=8, save=2) + SMALL + ["--bank-dtype", dtype]
    train(u2pl, whole)
    saved = torch.load(tmp_path / "whole/last.pt", weights_only=True)["state"]
    assert saved["bank"].dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert (saved["pushed"] > 0).sum() > 5 and saved["bank"].any() and not saved["bank"][-1].any()
    keep = run.Run.keep_last
    folder = tmp_path / "cut"

    def keep_and_stop(self, step, *rest):
        keep(self, step, *rest)
        if step == 4 and not stopped:
            stopped.append(step)
            raise KeyboardInterrupt

    stopped = []
    monkeypatch.setattr(run.Run, "keep_last", keep_and_stop)
    argv = [str(folder) if word == str(tmp_path / "whole") else word for word in whole]
    with pytest.raises(KeyboardInterrupt):
        train(u2pl, argv)
    train(u2pl, argv + ["--resume"])
    if dtype == "bf16":  # numpy has no such type
        for path in (tmp_path / "whole/last.pt", folder / "last.pt"):
            content = torch.load(path, weights_only=True)
            content["state"]["bank"] = content["state"]["bank"].view(torch.int16)
            torch.save(content, path)
    assert differences(tmp_path / "whole", folder) == []


def test_a_killed_run_resumes_exactly(tree, tmp_path):
    argvs = [flags(tree, tmp_path / name, iters=16, save=2, log=1) + SMALL for name in ("a", "b")]
    finish(start("u2pl", argvs[0]))
    process = start("u2pl", argvs[1])
    kill_at_step(process, tmp_path / "b", 6)
    finish(start("u2pl", argvs[1] + ["--resume"]))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def offers(rank, C=5, P=60, D=6, K=8):
    """Returns what process `rank` has in a step: features, masks and numbers, in float64."""
    rng = generator(7, rank)
    rep_s, rep_t = (torch.randn(P, D, generator=rng, dtype=torch.float64) for _ in range(2))
    N_c = torch.rand(C, P, generator=rng) < torch.tensor([[0.0], [0.05], [0.1], [0.5], [1.0]])
    A_c = torch.rand(C, P, generator=rng) < 0.1
    u = torch.rand(C, K + 1 + 3 * 5, generator=rng, dtype=torch.float64)
    return rep_s.requires_grad_(), rep_t, N_c, A_c, u[:, : K + 1], u[:, K + 1 :]


def bank_and_loss(gather, rank, turns=3):
    """Some steps of one process on its own candidates; returns bank, pushed, losses, gradients."""
    sizes = torch.tensor([20, 12, 12, 12, 12])
    bank = torch.zeros(int(sizes.sum()) + 1, 6, dtype=torch.float64)
    pushed, losses, gradients = torch.zeros(5, dtype=torch.int64), [], []
    args = SimpleNamespace(anchors=3, negatives=4, unreliable_loss="contrastive", tau=0.5)
    for turn in range(turns):
        rep_s, rep_t, N_c, A_c, u, v = offers(10 * turn + rank)
        offered = gather(turn, u2pl.draw_keys(rep_t, N_c, u))
        u2pl.push_keys(bank, pushed, sizes, offered.transpose(0, 1).flatten(1, 2))
        loss, _ = u2pl.unreliable_loss(rep_s, rep_t, A_c, bank, pushed, sizes, v, args)
        loss.backward()
        losses, gradients = [*losses, loss.detach()], [*gradients, rep_s.grad]
    return dict(bank=bank, pushed=pushed, losses=losses, gradients=gradients)


def test_two_processes_are_one_with_the_same_candidates(tmp_path):
    finish(start("u2pl", str(tmp_path), processes=2, program="tests.test_u2pl_run"))

    def every(turn, _):
        given = (offers(10 * turn + rank) for rank in range(2))
        return torch.stack([u2pl.draw_keys(x[1], x[2], x[4]) for x in given])

    for rank in range(2):
        there = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        here = bank_and_loss(every, rank)
        for name in ("bank", "pushed"):
            assert there[name].equal(here[name])
        for name in ("losses", "gradients"):
            assert all(a.equal(b) for a, b in zip(there[name], here[name], strict=True))
        assert here["pushed"].max() > 20 and here["pushed"][0] == 0
        assert all(x > 0 for x in here["losses"])


def test_two_processes_hold_the_same_bank_and_networks(tree, tmp_path):
    two = flags(tree, tmp_path / "two", iters=6, save=1, log=1, batch=4) + SMALL
    finish(start("u2pl", two, processes=2, program="tests.test_u2pl_run"))
    one, other = ((tmp_path / f"two.rank{r}").read_text().splitlines() for r in range(2))
    assert one == other and len(one) == 6
    lines = [x for x in log(tmp_path / "two") if x["kind"] == "train"]
    assert lines[-1]["contrast"] > 0 and all(math.isfinite(x["loss"]) for x in lines)
    saved = torch.load(tmp_path / "two/last.pt", weights_only=True)["state"]
    assert saved["pushed"].max() > 4 * KEYS  # more than one process brings in four steps


if __name__ == "__main__":
    (given,) = json.loads(sys.argv[2])
    if isinstance(given, str):  # two processes, functions alone
        group = distributed.setup("cpu")
        result = bank_and_loss(lambda turn, x: distributed.gathered(x), group.rank)
        torch.save(result, f"{given}/{group.rank}.pt")
        distributed.teardown()
    else:
        for name, value in tiny_modules(u2pl).items():
            setattr(u2pl, name, value)
        keep_last = run.Run.keep_last

        def keep_and_note(self, step, networks, optimizer, state):
            with open(f"{self.args.out}.rank{self.group.rank}", "a") as file:
                file.write(f"{step} {digest(networks)} {state['pushed'].tolist()} ")
                file.write(f"{state['bank'].double().sum().item()!r}\n")
            keep_last(self, step, networks, optimizer, state)

        run.Run.keep_last = keep_and_note
        train(u2pl, given)
