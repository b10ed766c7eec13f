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
from PIL import Image

import u2pl
from common import Refusal, distributed, run
from tests.helpers import (
    differences,
    digest,
    draw_tree,
    finish,
    flags,
    in_one_group,
    kill_at_step,
    log,
    shrink,
    start,
    train,
)
from tests.test_ael_run import own_folder
from tests.test_u2pl import generator, scalar_keys, scalar_loss, scalar_ranks, unit

SMALL = "--warmup-iters 2 --anchors 5 --negatives 6 --keys 7 --bank-sizes 20 12".split()
KEYS, ANCHORS, NEGATIVES, SIZES = 7, 5, 6, [20] + [12] * 80


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


def mixed(number, args, size, *maps):
    """CutMix, image by image and pixel by pixel: the maps as the step's coin and boxes mix them."""
    rng = np.random.default_rng([args["seed"], number])
    if not args["cutmix"] or rng.random() >= args["cutmix_prob"]:
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
    x_u, pseudo, inside = mixed(number, args, 32, clean, pseudo, inside)
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
    sup = log_loss(student["logits"][:n], y_l)
    if args["aux_weight"]:
        sup += args["aux_weight"] * log_loss(student["aux"][:n], y_l)
    assert step.parts["sup"] == pytest.approx(sup, rel=1e-5)
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
    n, C, (h, w) = len(y_l), len(rings), student["rep"].shape[2:]
    rep_s, rep_t = (x["rep"].movedim(1, -1).flatten(0, 2) for x in (student, teacher))
    given_t, N_c, u = step.calls["draw_keys"]
    assert given_t.equal(rep_t) and u.shape == (C, KEYS + 1)
    A_c, v = (step.calls["unreliable_loss"][i] for i in (2, 6))
    assert step.calls["unreliable_loss"][0].equal(rep_s)
    prob = teacher["coarse"].softmax(1)
    r_l, r_h = min(args["ranks"][0], C - 1), min(args["ranks"][1], C)
    is_anchor, is_negative = A_c.T.tolist(), N_c.T.tolist()
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
                    assert is_anchor[pixel][c] == (label == c and p[c] > args["delta_p"])
                    if unlabeled:
                        negative = some[image - n, y, x].item() and r_l <= rank[c] < r_h
                    else:
                        negative = label not in (c, 255) and rank[c] < r_l
                    assert is_negative[pixel][c] == negative
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
    "other": "--seed 5 --cutmix-prob 1 --aux-weight 0.4",
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
    assert set(saved["state"]) == (set() if row == "none" else {"bank", "pushed"})
    assert not any(p.requires_grad for p in networks["teacher"].parameters())
    ready = steps[2].before  # the teacher of the first step after warm-up is the student, whole
    assert ready["teacher"] == ready["student"] == steps[2].seen[0]["bits"]
    assert steps[1].scored is networks["student"] and steps[3].scored is networks["teacher"]


@pytest.mark.smoke
@pytest.mark.parametrize("classes, sure", [(2, 0.3), (81, 0.005)])
def test_steps_of_2_and_of_81_classes_are_the_literal_ones(classes, sure, tmp_path, monkeypatch):
    root, out = own_folder(tmp_path / "data", classes), tmp_path / "run"
    argv = flags(root, out, iters=5, log=1, evaluate=5, save=5) + SMALL
    argv += ["--dataset", "folder", "--num-classes", str(classes), "--weights", "none"]
    _, steps = watched(monkeypatch, argv + ["--lr", "0.01", "--delta-p", str(sure)])
    args = json.loads((out / "log.jsonl").read_text().splitlines()[0])["args"]
    rings = [[[], 0] for _ in range(classes)]
    for number, step in enumerate(steps[2:], 2):
        literal(number, step, rings, 5, args)
        assert step.parts["contrast"] > 0
    assert len(log(out)[-1]["best"]["iou"]) == classes


def test_draws_are_functions_of_seed_and_step(tree, tmp_path, monkeypatch):
    seen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = flags(tree, tmp_path / name, iters=5) + SMALL + ["--seed", str(seed)]
        with monkeypatch.context() as patch:
            _, steps = watched(patch, argv)
        calls = [step.calls for step in steps[2:]]
        seen.append([x["draw_keys"][2].tolist() + x["unreliable_loss"][6].tolist() for x in calls])
    assert seen[0] == seen[1]
    flat = [u for steps in seen[1:] for step in steps for row in step for u in row]
    assert len(flat) == len(set(flat))
    assert sum(u != float(np.float32(u)) for u in flat) > 0.9 * len(flat)  # float64


def test_bf16_networks_fill_a_bank_of_float32(tree, tmp_path, monkeypatch):
    argv = flags(tree, tmp_path / "run", iters=6, log=1) + SMALL + ["--amp", "bf16"]
    _, steps = watched(monkeypatch, argv + ["--delta-p", "0.05"])
    assert all(math.isfinite(v) for step in steps for v in step.parts.values())
    totals = []
    for step in steps[2:]:
        rep_s, rep_t, _, bank, pushed = step.calls["unreliable_loss"][:5]
        assert (rep_s.dtype, rep_t.dtype, bank.dtype) == (torch.bfloat16, *2 * [torch.float32])
        assert step.parts["contrast"] > 0 and step.slope > 0
        lengths = bank.norm(dim=1)
        assert ((lengths == 0) | ((lengths - 1).abs() < 1e-5)).all()
        totals.append(int(pushed.sum()))
    assert totals == sorted(set(totals)) and totals[0] > 0


@pytest.mark.parametrize("warmup, name", [(4, "student"), (0, "teacher")])
def test_the_student_is_scored_up_to_the_end_of_warmup(warmup, name, tree, tmp_path, monkeypatch):
    whole, scored = u2pl.evaluate, []

    def evaluate(net, *rest):
        scored.append(digest({"": net}))
        return whole(net, *rest)

    shrink(u2pl, monkeypatch)
    monkeypatch.setattr(u2pl, "evaluate", evaluate)
    argv = flags(tree, tmp_path / "run", iters=4, evaluate=2, save=4) + SMALL
    train(u2pl, argv + ["--warmup-iters", str(warmup)])
    for file in ("last.pt", "best.pt"):
        train(u2pl, ["--eval-only", "--checkpoint", str(tmp_path / "run" / file)])
    files = [torch.load(tmp_path / f"run/{f}.pt", weights_only=True) for f in ("last", "best")]
    last, best = (
        digest({"": SimpleNamespace(state_dict=lambda f=f: f["networks"][name])}) for f in files
    )
    assert scored[1:] == [last, last, best, last, best]  # validation, the two scores; --eval-only


def test_panels_show_what_the_student_saw_and_was_taught(tree, tmp_path, monkeypatch):
    whole, shown = run.Run.panels, []

    def panels(self, name, maps):
        if name.endswith("-train"):
            shown.append({key: x.detach().clone() for key, x in maps.items()})
        whole(self, name, maps)

    monkeypatch.setattr(run.Run, "panels", panels)
    argv = flags(tree, tmp_path / "run", iters=3, evaluate=9, pictures=1) + SMALL
    _, steps = watched(monkeypatch, argv + ["--cutmix-prob", "1"])
    assert set(shown[0]) == set(shown[1]) == {"image", "label", "prediction"}
    eye, student, teacher = steps[2].seen
    maps, n = shown[2], len(eye["image"])
    assert not maps["student's view"].equal(eye["image"])
    assert maps["student's view"].equal(student["image"][n:])
    p = teacher["logits"][n:].softmax(1)
    H = -(p * p.log()).sum(1) / math.log(11)
    assert torch.allclose(maps["entropy"], H, atol=1e-5)
    assert maps["student"].equal(student["logits"][n:].argmax(1))
    kept = maps["reliable"] != 255
    assert kept.any() and maps["reliable"][kept].equal(maps["pseudo label"][kept])
    assert (~kept & (maps["pseudo label"] != 255)).any()


def test_streams_and_masks_of_unlabelled_images_are_never_opened(tmp_path, monkeypatch):
    root, shown = draw_tree(tmp_path / "data"), {"labeled": set(), "unlabeled": set()}
    for i in range(8):
        Image.new("RGB", (48, 36), (30 * i + 10,) * 3).save(root / f"train/train{i}.jpg")
        if i not in (0, 4):
            (root / f"trainannot/train{i}.png").write_bytes(b"never opened")
    argv = flags(root, tmp_path / "run", iters=8, evaluate=8) + SMALL
    argv += ["--batch-size-unlabeled", "4", "--scales", "0.4", "0.5"]
    for step in watched(monkeypatch, argv)[1]:
        assert set(step.batch["unlabeled"]) == {"image", "inside"}
        assert {k: len(x["image"]) for k, x in step.batch.items()} == {"labeled": 2, "unlabeled": 4}
        for name, batch in step.batch.items():
            for image, inside in zip(batch["image"], batch["inside"], strict=True):
                assert 14 <= inside.any(1).sum() <= 18  # of 36 rows
                shown[name].add(round((image[:, inside].float().mean().item() - 10) / 30))
    assert shown == {"labeled": {0, 4}, "unlabeled": {1, 2, 3, 5, 6, 7}}


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


@pytest.mark.parametrize(
    "dtype, extra", [("fp32", []), ("bf16", []), ("fp32", ["--no-bank", "--ranks", "1", "4"])]
)
def test_a_resumed_run_is_the_uninterrupted_one(dtype, extra, tree, tmp_path, monkeypatch):
    shrink(u2pl, monkeypatch)
    whole = flags(tree, tmp_path / "whole", iters=8, save=2) + SMALL + ["--bank-dtype", dtype]
    whole += extra
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
    process = start("u2pl", argvs[1], hold=15)
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
    two, none = (
        flags(tree, tmp_path / name, iters=6, save=1, log=1, batch=4) + SMALL + extra
        for name, extra in (
            ("two", ["--cutmix-prob", "1", "--seed", "3"]),
            ("none", ["--unreliable-loss", "none"]),
        )
    )
    text = finish(start("u2pl", two, none, processes=2, program="tests.test_u2pl_run"))
    assert text.count("--ranks (3, 20): cut to (3, 11)") == 1
    for name in ("two", "none"):
        one, other = ((tmp_path / f"{name}.rank{r}").read_text().splitlines() for r in range(2))
        assert one == other and len(one) == 6
        lines = [x for x in log(tmp_path / name) if x["kind"] == "train"]
        assert len(lines) == 6 and all(math.isfinite(x["loss"]) for x in lines)
        assert (lines[-1]["contrast"] > 0) == (name == "two") and lines[-1]["unsup"] > 0
    saved = torch.load(tmp_path / "two/last.pt", weights_only=True)["state"]
    assert saved["pushed"].max() > 4 * KEYS  # more than one process brings in four steps
    one, other = (torch.load(tmp_path / f"two.seen{r}", weights_only=True) for r in range(2))
    for step in range(4):  # after warm-up
        keys = torch.cat([one["drawn"][step], other["drawn"][step]], 1)
        assert keys.equal(one["offered"][step]) and keys.equal(other["offered"][step])
        assert not (one["u"][step] == other["u"][step]).any()
        rng = np.random.default_rng([3, step + 2])
        rng.random()
        boxes = [u2pl.cutmix_box(rng, 32) for _ in range(4)]
        assert one["boxes"][step] + other["boxes"][step] == boxes


def watched_processes(argv):
    """A run as one of several; leaves <out>.rank<k> and what its method's functions were given."""
    seen = {name: [] for name in ("drawn", "u", "offered", "boxes")}

    def cutmix(boxes, *maps):
        seen["boxes"].append(boxes)
        return whole[0](boxes, *maps)

    def draw_keys(rep_t, masks, u):
        seen["u"].append(u)
        seen["drawn"].append(whole[1](rep_t, masks, u))
        return seen["drawn"][-1]

    def push_keys(bank, pushed, sizes, offered):
        seen["offered"].append(offered)
        whole[2](bank, pushed, sizes, offered)

    def keep_and_note(self, step, networks, optimizer, state):
        with open(f"{self.args.out}.rank{self.group.rank}", "a") as file:
            file.write(f"{step} {digest(networks)} {[x.tolist() for x in state.values()]}\n")
        torch.save(seen, f"{self.args.out}.seen{self.group.rank}")
        whole[3](self, step, networks, optimizer, state)

    whole = u2pl.cutmix, u2pl.draw_keys, u2pl.push_keys, run.Run.keep_last
    with pytest.MonkeyPatch.context() as patch:
        shrink(u2pl, patch)
        for call in (cutmix, draw_keys, push_keys):
            patch.setattr(u2pl, call.__name__, call)
        patch.setattr(run.Run, "keep_last", keep_and_note)
        train(u2pl, argv)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    if isinstance(given[0], str):  # two processes, functions alone
        group = distributed.setup("cpu")
        result = bank_and_loss(lambda turn, x: distributed.gathered(x), group.rank)
        torch.save(result, f"{given[0]}/{group.rank}.pt")
        distributed.teardown()
    else:
        in_one_group(u2pl, [lambda argv=argv: watched_processes(argv) for argv in given])
