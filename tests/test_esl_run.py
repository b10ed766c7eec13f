"""esl.py's loop: what feeds what in a step, K-means before it, queues over processes and resumes.

All use the tiny network of tests/helpers.py. As a program (python -m tests.test_esl_run SCRIPT
JSON) it is one of several processes.
"""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import esl
from common import Refusal, run
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
from tests.test_esl import WAITS, Calls, cosine, near, scalar_label

SMALL = "--anchors 6 --negatives 7 --queue 5 --parts 3 --zeta 0.12".split()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return draw_tree(tmp_path_factory.mktemp("esl") / "data")


def watched(patch, argv):
    """Runs main; returns its networks and its steps: batch, seen (forward passes), calls, parts."""
    steps, scoring, first = [], [], []
    restore, step, stream, score = run.Run.restore, run.Run.step, esl.open_stream, esl.evaluate

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
        return result

    def begin(self, networks, optimizer, state):
        for name, net in networks.items():

            def saw(module, inputs, out, name=name):
                if not scoring:
                    entry = dict(net=name, training=module.backbone.training, out=sorted(out))
                    entry |= {k: x.detach().clone() for k, x in out.items()}
                    entry |= dict(image=inputs[0].clone(), grad=torch.is_grad_enabled())
                    steps[-1].seen.append(entry)

            net.register_forward_hook(saw)
        first.extend((networks, state))
        return restore(self, networks, optimizer, state)

    def note(self, done, parts, *rest):
        steps[-1].parts = {k: v.item() for k, v in parts.items()}
        steps[-1].state = {k: v.clone() for k, v in first[1].items()}
        steps[-1].nets = {
            k: [x.clone() for x in n.state_dict().values()] for k, n in first[0].items()
        }
        return step(self, done, parts, *rest)

    for name in ("part_contrast", "push_keys", "first_prototypes"):
        call = getattr(esl, name)

        def called(*inputs, name=name, call=call):
            kept = [x.detach().clone() if torch.is_tensor(x) else x for x in inputs]
            if name == "first_prototypes":  # its network, modes, and that nothing of it moves
                net, before = inputs[0], digest({"": inputs[0]})
                (who,) = (key for key, one in first[0].items() if one is net)
            out = call(*inputs)
            if name == "first_prototypes":
                still = digest({"": net}) == before
                steps[-1].measured = who, net.backbone.training, net.head.training, still
            steps[-1].calls[name] = kept, out
            return out

        patch.setattr(esl, name, called)
    shrink(esl, patch)
    patch.setattr(esl, "open_stream", open_stream)
    patch.setattr(esl, "evaluate", evaluate)
    patch.setattr(run.Run, "restore", begin)
    patch.setattr(run.Run, "step", note)
    train(esl, argv)
    return first[0], steps


def mixed(number, args, *maps):
    """CutMix, image by image: the maps as the step's coin and boxes mix them."""
    rng = np.random.default_rng([args["seed"], number])
    if not args["cutmix"] or rng.random() >= args["cutmix_prob"]:
        return maps
    boxes, found = [esl.cutmix_box(rng, 32) for _ in maps[0]], [x.clone() for x in maps]
    for i, (top, left, h, w) in enumerate(boxes):
        for new, old in zip(found, maps, strict=True):
            box = (..., slice(top, top + h), slice(left, left + w))
            new[i][box] = old[i ^ 1][box]
    return found


def literal(number, step, before, args):
    """Asserts that a step is the literal one; before: the prototypes before it."""
    eye, student = step.seen[-2:]
    assert [e["net"] for e in (eye, student)] == ["teacher", "student"]
    assert (eye["training"], student["training"]) == (False, True)
    assert (eye["grad"], student["grad"]) == (False, True)
    x_l, y_l = step.batch["labeled"]["image"], step.batch["labeled"]["label"]
    clean, inside = step.batch["unlabeled"]["image"], step.batch["unlabeled"]["inside"]
    n, C = len(x_l), eye["logits"].shape[1]
    assert eye["image"].equal(torch.cat([x_l, clean]) if args["contrast"] else clean)
    if "first_prototypes" in step.calls:  # of the teacher before it has seen anything
        assert step.measured == ("teacher", False, True, True)
    assert ("rep" in eye["out"]) == ("encoder" in eye["out"]) == args["contrast"]
    prob = eye["logits"][-len(clean) :].softmax(1)
    x_u, target, sure = mixed(number, args, clean, prob, inside)
    assert student["image"].equal(torch.cat([x_l, x_u]))
    # Eq. (2) to (6)
    log_p, values, counts = student["logits"].double().log_softmax(1), [], []
    for b, y, x in (~torch.zeros_like(sure)).nonzero().tolist():
        if sure[b, y, x]:
            p = target[b, :, y, x].tolist()
            label = scalar_label(p, args["label"], args["eta"], args["top_k"])
            pairs = zip(label, log_p[n + b, :, y, x].tolist(), strict=True)
            values.append(-math.fsum(a * v for a, v in pairs))
            counts.append(sum(v > 0 for v in label))
    area = max(int(sure.sum()), 1)
    assert step.parts["unsup"] == pytest.approx(math.fsum(values) / area, rel=1e-3)
    assert step.parts["dominant"] == pytest.approx(sum(counts) / area, rel=1e-3)
    assert step.parts["conf"] == pytest.approx(
        (target.amax(1) * sure).sum().item() / area, rel=1e-5
    )
    sup = F.cross_entropy(student["logits"][:n].double(), y_l, ignore_index=255).item()
    assert step.parts["sup"] == pytest.approx(sup, rel=1e-5)
    loss = sup + args["unsup_weight"] * step.parts["unsup"]
    loss += args["contrast_weight"] * step.parts["contrast"]
    assert step.parts["loss"] == pytest.approx(loss, rel=1e-5)
    if args["contrast"]:
        literal_parts(number, step, before, args, eye, prob, inside, target, sure, C)
    else:
        assert step.parts["contrast"] == step.parts["anchors"] == 0 and not step.calls


def literal_parts(number, step, before, args, eye, prob, inside, target, sure, C):
    """Eq. (7), (8), (12), the keys, and the candidates of Eq. (9)."""
    E, rep, K = eye["encoder"], eye["rep"], args["parts"]
    y_l, h, w = step.batch["labeled"]["label"], *E.shape[2:]
    label = torch.cat([y_l, torch.where(inside, prob.argmax(1), 255)])

    def part(b, y, x):
        c = int(label[b, y, x])
        if c == 255:
            return C * K
        e = E[b, :, near(y, 32, h), near(x, 32, w)].tolist()
        return c * K + max(range(K), key=lambda k: cosine(e, before[c, k].tolist()))

    given, ids = step.calls["part_contrast"][0], torch.empty_like(label)
    for b, y, x in (ids == ids).nonzero().tolist():
        ids[b, y, x] = part(b, y, x)
    n = len(y_l)
    (mixed_ids,) = mixed(number, args, ids[n:]) if args["cutmix"] else (ids[n:],)
    chosen = mixed_ids.masked_fill(~(sure & (target.amax(1) > args["zeta"])), C * K)
    assert given[1].equal(torch.cat([ids[:n], chosen]))
    assert given[0].equal(step.seen[-1]["rep"])
    offered, (H, W) = step.calls["push_keys"][0][3], rep.shape[2:]
    small = ids[:, [near(i, H, 32) for i in range(H)]][:, :, [near(i, W, 32) for i in range(W)]]
    cells = ids[:, [near(i, h, 32) for i in range(h)]][:, :, [near(i, w, 32) for i in range(w)]]
    for r in range(C * K):
        every = []
        for b in range(len(ids)):
            mask = small[b] == r
            assert offered[r, b, -1] == mask.sum()
            if mask.any():
                mu = rep[b][:, mask].mean(1)
                assert torch.allclose(offered[r, b, :-1], F.normalize(mu, dim=0), atol=1e-4)
            every += E[b][:, cells[b] == r].T.tolist()
        old = before.flatten(0, 1)[r]
        new = old
        if every:
            new = args["theta"] * old + (1 - args["theta"]) * torch.tensor(every).mean(0)
        assert torch.allclose(step.state["prototypes"].flatten(0, 1)[r], new, atol=1e-5)
    assert step.parts["contrast"] == step.calls["part_contrast"][1][0].item()


ROWS = {
    "paper": "",
    "hard": "--label hard",
    "soft": "--label soft --no-contrast",
    "topk": "--label topk --top-k 2 --theta 0.5",
    "eta": "--eta 0.5 --unsup-weight 1 --contrast-weight 2",
    "no CutMix": "--no-cutmix --parts 1",
    "other": "--seed 5 --cutmix-prob 0.5",
}


@pytest.mark.smoke
@pytest.mark.parametrize("row", ROWS)
def test_every_step_is_the_literal_one(row, tree, tmp_path, monkeypatch):
    argv = flags(tree, tmp_path / "run", iters=4, log=1, evaluate=2, save=4) + SMALL
    argv += ["--scales", "0.5", "1.5", *ROWS[row].split()]
    networks, steps = watched(monkeypatch, argv)
    args, pushed = log(tmp_path / "run")[0]["args"], 0
    for number, step in enumerate(steps):
        before = None
        if args["contrast"]:
            begin = step.calls.get("first_prototypes", (0, None))[1]
            assert (begin is not None) == (number == 0)
            before = steps[number - 1].state["prototypes"] if number else begin
            assert step.parts["anchors"] > 0 and step.parts["contrast"] > 0
            assert int(step.state["pushed"].sum()) > pushed
            pushed = int(step.state["pushed"].sum())
        literal(number, step, before, args)
        decay = min(1 - 1 / (number + 1), 0.99)
        nets = step.nets
        olds = steps[number - 1].nets["teacher"] if number else nets["teacher"]
        for t, old, s in zip(nets["teacher"], olds, nets["student"], strict=True):
            if t.is_floating_point():  # BN statistics too
                assert torch.allclose(t, decay * old + (1 - decay) * s, atol=1e-6)
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    names = {"prototypes", "bank", "pushed"} if args["contrast"] else set()
    assert set(saved["state"]) == names and set(saved["networks"]) == {"student", "teacher"}
    assert not any(p.requires_grad for p in networks["teacher"].parameters())
    assert not networks["teacher"].training


@pytest.mark.smoke
@pytest.mark.parametrize("classes, zeta", [(2, 0.5), (81, 0.01)])
def test_steps_of_2_and_of_81_classes_are_the_literal_ones(classes, zeta, tmp_path, monkeypatch):
    root, out = own_folder(tmp_path / "data", classes), tmp_path / "run"
    argv = flags(root, out, iters=2, log=1, evaluate=2, save=2) + SMALL
    argv += ["--dataset", "folder", "--num-classes", str(classes), "--weights", "none"]
    _, steps = watched(monkeypatch, argv + ["--lr", "0.01", "--zeta", str(zeta)])
    args, before = log(out)[0]["args"], steps[0].calls["first_prototypes"][1]
    for number, step in enumerate(steps):
        literal(number, step, before, args)
        before = step.state["prototypes"]
        assert step.parts["contrast"] > 0
    assert len(log(out)[-1]["best"]["iou"]) == classes


def test_a_step_of_a_run_never_waits(tree, tmp_path, monkeypatch):
    """From the gradient's clearing to the optimizer's step: the losses seam of main itself."""
    shrink(esl, monkeypatch)
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

    monkeypatch.setattr(torch.optim.SGD, "zero_grad", zero_grad)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    train(esl, flags(tree, tmp_path / "run", iters=4, evaluate=9, save=9) + SMALL)
    names = [name for name, _ in calls.seen]
    assert any("convolution_backward" in name for name in names)
    assert not [name for name in names if any(word in name for word in WAITS)]


def test_pairs_of_every_process(monkeypatch):
    """--cutmix mixes two images of one process: 8 of Cityscapes are enough for 4 processes."""

    class Begun(Exception):
        pass

    def build(*_):
        raise Begun

    words = "--dataset cityscapes --split 1/4 --weights none --device cpu".split()
    args = run.resolve(run.parse(esl.Args, words), esl.preset)
    monkeypatch.setattr(esl, "load", lambda args: SimpleNamespace(num_classes=19))
    monkeypatch.setattr(esl, "deepcopy", lambda net: net)
    monkeypatch.setattr(esl, "make_optimizer", lambda *_: None)
    monkeypatch.setattr(esl, "parallel", lambda net, *_: net)
    net = torch.nn.Module()
    net.head = SimpleNamespace(width=8, represent=[SimpleNamespace(out_channels=4)])
    monkeypatch.setattr(esl, "build", lambda *_: net)
    monkeypatch.setattr(esl, "Run", build)
    for world, error in ((4, Begun), (8, Refusal)):
        group = run.Group(0, world, torch.device("cpu"))
        monkeypatch.setattr(esl.distributed, "setup", lambda device, group=group: group)
        with pytest.raises(error):
            esl.main(args)


FLAGS = """--label hard|--label soft|--label topk --top-k 3|--label topk --top-k 2|--eta 0.8
--unsup-weight 1|--contrast-weight 1|--no-contrast|--parts 2|--theta 0.5|--zeta 0.5|--anchors 2
--anchor-share 0.5|--negatives 3|--sigma 0.1|--queue 2|--ema-decay 0.3|--no-cutmix
--cutmix-prob 0.5|--batch-size-unlabeled 4""".replace("\n", "|").split("|")


def test_every_flag_has_an_effect_and_two_equal_runs_none(tree, tmp_path, monkeypatch):
    shrink(esl, monkeypatch)
    found = {}
    for words in ["", "--seed 0", *FLAGS]:
        out = tmp_path / str(len(found))
        argv = flags(tree, out, iters=4, log=1, evaluate=4, save=4) + SMALL
        argv += ["--eta", "0.5", *words.split()]
        train(esl, argv)
        nets = torch.load(out / "last.pt", weights_only=True)["networks"]["student"]
        found[words] = digest({"": SimpleNamespace(state_dict=lambda nets=nets: nets)})
    assert found[""] == found.pop("--seed 0")
    assert len(set(found.values())) == len(found), found


def test_bf16_networks_fill_float32_queues(tree, tmp_path, monkeypatch):
    argv = flags(tree, tmp_path / "run", iters=3, log=1) + SMALL + ["--amp", "bf16"]
    _, steps = watched(monkeypatch, argv)
    for step in steps:
        assert all(math.isfinite(v) for v in step.parts.values()) and step.parts["contrast"] > 0
        assert step.seen[-1]["rep"].dtype == torch.bfloat16
        assert step.state["prototypes"].dtype == step.state["bank"].dtype == torch.float32
        lengths = step.state["bank"].norm(dim=1)
        assert ((lengths == 0) | ((lengths - 1).abs() < 1e-5)).all()


def test_the_teacher_is_scored(tree, tmp_path, monkeypatch):
    whole, scored = esl.evaluate, []

    def evaluate(net, *rest):
        scored.append(digest({"": net}))
        return whole(net, *rest)

    shrink(esl, monkeypatch)
    monkeypatch.setattr(esl, "evaluate", evaluate)
    train(esl, flags(tree, tmp_path / "run", iters=4, evaluate=2, save=4) + SMALL)
    for file in ("last.pt", "best.pt"):
        train(esl, ["--eval-only", "--checkpoint", str(tmp_path / "run" / file)])
    files = [torch.load(tmp_path / f"run/{f}.pt", weights_only=True) for f in ("last", "best")]
    last, best = (
        digest({"": SimpleNamespace(state_dict=lambda f=f: f["networks"]["teacher"])})
        for f in files
    )
    assert scored[1:] == [last, last, best, last, best]


@pytest.mark.parametrize("extra", [[], ["--no-contrast"]])
def test_panels_show_what_the_student_saw_and_was_taught(extra, tree, tmp_path, monkeypatch):
    whole, shown = run.Run.panels, []

    def panels(self, name, maps):
        if name.endswith("-train"):
            shown.append({key: x.detach().clone() for key, x in maps.items()})
        whole(self, name, maps)

    monkeypatch.setattr(run.Run, "panels", panels)
    argv = flags(tree, tmp_path / "run", iters=1, evaluate=9, pictures=1) + SMALL + extra
    _, (step,) = watched(monkeypatch, argv)
    (maps,), student = shown, step.seen[-1]
    assert maps["student's view"].equal(student["image"][2:])
    assert maps["student"].equal(student["logits"][2:].argmax(1))
    assert maps["1 - 1/classes"].min() >= 0 and maps["1 - 1/classes"].max() <= 1 - 1 / 11
    assert ("parts" in maps) == (not extra)
    if not extra:
        parts = maps["parts"]
        assert parts.dtype == torch.uint8 and parts.shape == (2, 3, 32, 32)
        white = (parts == 255).all(1)
        assert white.equal(maps["pseudo label"] == -1)
        colours = {tuple(p) for p in parts.movedim(1, -1)[~white].tolist()}
        ids = step.calls["part_contrast"][0][1][2:]  # of candidates: Eq. (9)
        shown_ids = ids[ids < 33].unique()
        assert len(shown_ids) <= len(colours) <= 33 and len(colours) > len(shown_ids // 3)
        for r in shown_ids.tolist():
            assert len(parts.movedim(1, -1)[ids == r].unique(dim=0)) == 1
        assert len({tuple(parts.movedim(1, -1)[ids == r][0].tolist()) for r in shown_ids}) == len(
            shown_ids
        )


def test_streams_and_masks_of_unlabelled_images_are_never_opened(tmp_path, monkeypatch):
    root = draw_tree(tmp_path / "data")
    for i in range(8):
        if i not in (0, 4):
            (root / f"trainannot/train{i}.png").write_bytes(b"never opened")
    argv = flags(root, tmp_path / "run", iters=8, evaluate=8) + SMALL
    for step in watched(monkeypatch, argv + ["--batch-size-unlabeled", "4"])[1]:
        assert set(step.batch["unlabeled"]) == {"image", "inside"}
        assert {k: len(x["image"]) for k, x in step.batch.items()} == {"labeled": 2, "unlabeled": 4}


def test_images_of_padding_alone_still_run(tree, tmp_path, monkeypatch):
    argv = flags(tree, tmp_path / "run", iters=3, log=1, evaluate=3, save=3) + SMALL
    watched(monkeypatch, argv + ["--scales", "0.03", "0.04"])
    assert all(math.isfinite(x["loss"]) for x in log(tmp_path / "run") if x["kind"] == "train")


@pytest.mark.smoke
@pytest.mark.parametrize("label", ["dynamic", "hard", "soft", "topk"])
@pytest.mark.parametrize("extra", [[], ["--no-contrast"]])
def test_a_teacher_of_nan_stops_the_run(label, extra, tree, tmp_path, monkeypatch):
    shrink(esl, monkeypatch)
    whole = esl.update_teacher

    def update_teacher(teacher, *rest):
        whole(teacher, *rest)
        for p in teacher.parameters():
            p.fill_(math.nan)

    monkeypatch.setattr(esl, "update_teacher", update_teacher)
    argv = flags(tree, tmp_path / "run", iters=4, log=1, evaluate=9, save=9) + SMALL
    with pytest.raises(Refusal, match="not finite at step 2"):
        train(esl, argv + ["--label", label, *extra])
    assert not (tmp_path / "run/last.pt").exists()


def test_an_odd_batch_is_refused_where_pairs_are_mixed(tree, tmp_path, monkeypatch):
    shrink(esl, monkeypatch)
    argv = flags(tree, tmp_path / "run", iters=1) + SMALL + ["--batch-size-unlabeled", "3"]
    with pytest.raises(Refusal, match="pairs"):
        train(esl, argv)
    train(esl, argv + ["--no-cutmix"])


# ---- resume, processes ----


@pytest.mark.parametrize("extra", [[], ["--no-contrast", "--label", "hard"]])
def test_a_resumed_run_is_the_uninterrupted_one(extra, tree, tmp_path, monkeypatch):
    shrink(esl, monkeypatch)
    whole = flags(tree, tmp_path / "whole", iters=8, save=2) + SMALL + extra
    train(esl, whole)
    keep, stopped, folder = run.Run.keep_last, [], tmp_path / "cut"

    def keep_and_stop(self, step, *rest):
        keep(self, step, *rest)
        if step == 4 and not stopped:
            stopped.append(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "keep_last", keep_and_stop)
    argv = [str(folder) if word == str(tmp_path / "whole") else word for word in whole]
    with pytest.raises(KeyboardInterrupt):
        train(esl, argv)
    with monkeypatch.context() as patch:  # K-means is over
        patch.setattr(esl, "first_prototypes", None)
        train(esl, argv + ["--resume"])
    assert differences(tmp_path / "whole", folder) == []


def test_a_killed_run_resumes_exactly(tree, tmp_path):
    argvs = [flags(tree, tmp_path / name, iters=12, save=2, log=1) + SMALL for name in ("a", "b")]
    finish(start("esl", argvs[0]))
    process = start("esl", argvs[1])
    kill_at_step(process, tmp_path / "b", 6)
    finish(start("esl", argvs[1] + ["--resume"]))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_two_processes_hold_the_same_networks_prototypes_and_queues(tree, tmp_path):
    two, none = (
        flags(tree, tmp_path / name, iters=4, save=1, log=1, batch=4) + SMALL + extra
        for name, extra in (("two", ["--seed", "3"]), ("none", ["--no-contrast"]))
    )
    finish(start("esl", two, none, processes=2, program="tests.test_esl_run"))
    for name in ("two", "none"):
        one, other = ((tmp_path / f"{name}.rank{r}").read_text().splitlines() for r in range(2))
        assert one == other and len(one) == 4
        lines = [x for x in log(tmp_path / name) if x["kind"] == "train"]
        assert len(lines) == 4 and all(math.isfinite(x["loss"]) for x in lines)
        assert (lines[-1]["contrast"] > 0) == (name == "two") and lines[-1]["unsup"] > 0
    one, other = (torch.load(tmp_path / f"two.seen{r}", weights_only=True) for r in range(2))
    rng = np.random.default_rng([3, 0])
    rng.random()
    boxes = [esl.cutmix_box(rng, 32) for _ in range(4)]
    assert one["boxes"][0] + other["boxes"][0] == boxes
    # alone, with both labelled images: the same first prototypes, which a single process finds too
    assert one["first"].equal(other["first"]) and one["first"].any()
    finish(
        start("esl", [*two[:5], str(tmp_path / "alone"), *two[6:]], program="tests.test_esl_run")
    )
    alone = torch.load(tmp_path / "alone.seen0", weights_only=True)
    assert alone["first"].equal(one["first"])
    assert alone["offered"][0].shape == one["offered"][0].shape


def watched_process(argv):
    """A run as one of several; leaves <out>.rank<k> and what its method's functions were given."""
    seen = {name: [] for name in ("offered", "boxes")}

    def cutmix(boxes, *maps):
        seen["boxes"].append(boxes)
        return whole[0](boxes, *maps)

    def push_keys(bank, pushed, sizes, offered):
        seen["offered"].append(offered)
        whole[1](bank, pushed, sizes, offered)

    def first_prototypes(*inputs):
        seen["first"] = whole[2](*inputs)
        return seen["first"]

    def keep_and_note(self, step, networks, optimizer, state):
        with open(f"{self.args.out}.rank{self.group.rank}", "a") as file:
            file.write(f"{step} {digest(networks)} {[x.tolist() for x in state.values()]}\n")
        torch.save(seen, f"{self.args.out}.seen{self.group.rank}")
        whole[3](self, step, networks, optimizer, state)

    whole = esl.cutmix, esl.push_keys, esl.first_prototypes, run.Run.keep_last
    with pytest.MonkeyPatch.context() as patch:
        shrink(esl, patch)
        for call in (cutmix, push_keys, first_prototypes):
            patch.setattr(esl, call.__name__, call)
        patch.setattr(run.Run, "keep_last", keep_and_note)
        train(esl, argv)


if __name__ == "__main__":
    in_one_group(esl, [lambda argv=argv: watched_process(argv) for argv in json.loads(sys.argv[2])])
