"""Two processes: the steps of one, one state on both, exact resume."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import processes
import recorder
import tiny
from benchmarks import runs
from benchmarks.runs import differences
from common.distributed import Group

SURE = "--scales 1 1.5 "  # of 48x36 pixels: a crop of 32 lies inside
SOFT = "--unsup-weight 20 --unsup-loss soft "  # a rounding cannot change the class that is taught
# Without BN and dropout, all pixels labelled and inside, a step is a mean over images. beta 0: no
# pixel is left out at random.
SHARED_OUT = {
    ("supervised", ""): "",
    ("mean_teacher", "squares"): "--consistency mse --cutmix --cutmix-prob 1 --warmup-iters 1",
    ("cps_fpl", "cutmix"): SOFT,
    ("cps_fpl", "plain"): SOFT + "--no-cutmix",
    ("cps_fpl", "same image"): SOFT + "--same-image-cutmix",
    ("unimatch", ""): "--no-feature-perturbation --threshold 0.13",
    ("ael_fpl", "mixed"): "--beta 0 --lr 0.002",
    ("ael_fpl", "all"): "--beta 0 --lr 0.002 --recipe official --T 0.3",
    ("ael_fpl", "skip"): "--beta 0 --lr 0.002 --skip-absent --pooled 1",
}
CALLS = {"u2pl": ["cutmix", "draw_features", "push_features"]}
CALLS["esl"] = ["cutmix", "first_prototypes"]


def moved(argv, end):
    """Returns the flags of the same run in another folder."""
    place = argv.index("--out") + 1
    return [*argv[:place], argv[place] + end, *argv[place + 1 :]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns a function of a script: the folder of its runs, by both processes and by one."""
    folder = tmp_path_factory.mktemp("pairs")
    sure = tiny.draw_tree(folder / "sure", ids=11)
    tree = tiny.draw_tree(folder / "tree")

    @functools.cache
    def of(name):
        jobs, rows = [], [row for script, row in SHARED_OUT if script == name]
        for row in rows:
            numbers = dict(iters=6 if name == "ael_fpl" else 3, log=1, evaluate=9, save=9, batch=4)
            argv = tiny.flags(sure, folder / f"{name} {row}", **numbers)
            argv += (SURE + SHARED_OUT[name, row]).split()
            unlabeled = "" if name == "supervised" else "--batch-size-unlabeled 4"
            jobs.append(dict(argv=tiny.with_acting(name, argv, unlabeled), bare=True))
        numbers = dict(iters=7, log=2, evaluate=7, save=2, batch=4)
        more = ["--seed", "3", *tiny.MORE.get(name, "").split()]
        argv = [*tiny.flags(tree, folder / f"{name} whole", **numbers), *more]
        jobs.append(dict(argv=argv, calls=CALLS.get(name, [])))
        argv = moved(argv, " cut")
        jobs += [dict(argv=argv, stop=6), dict(argv=argv + ["--resume"])]
        words = [str(tiny.ROOT / "tests/recorder.py"), name, json.dumps(jobs)]
        process = processes.Forked(words, 2)
        for row, job in zip(rows, jobs, strict=False):  # meanwhile, by one
            with pytest.MonkeyPatch.context() as patch:
                tiny.shrink(tiny.script(name), patch, bare=True)
                found = recorder.watch(patch, tiny.script(name), moved(job["argv"], " alone"))
            steps = [vars(step) for step in found.steps]
            torch.save(steps, f"{folder}/{name} {row} alone.steps")
        processes.finish(process)
        return folder

    return of


def assert_close(mine, theirs, rel):
    """Every tensor equals its namesake up to rel of its largest number."""
    mine, theirs = runs.flat(mine), runs.flat(theirs)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        scale = theirs[name].double().abs().max().item()
        assert (x.double() - theirs[name].double()).abs().max().item() <= rel * scale, name


@pytest.mark.parametrize("name, row", SHARED_OUT)
def test_two_processes_take_the_steps_of_one(name, row, pairs):
    """They share out its images, masks and draws; gradients go over them once a step."""
    folder = pairs(name)
    wrapped, shares = recorder.left_by(folder / f"{name} {row}")
    assert wrapped[0] == wrapped[1] == ["DistributedDataParallel"] * len(wrapped[0])
    alone = torch.load(f"{folder}/{name} {row} alone.steps", weights_only=True)
    assert len(alone) == len(shares[0]) == len(shares[1]) >= 3
    for one, *two in zip(alone, *shares, strict=True):
        first, second = two
        for stream, batch in one["batch"].items():
            if stream != "paste":
                assert batch["inside"].all() and (batch.get("label", torch.ones(1)) != 255).all()
            for key, x in batch.items():
                assert torch.equal(torch.cat([share.batch[stream][key] for share in two]), x)
        for i, entry in enumerate(one["seen"]):
            images = torch.cat([share.seen[i]["image"] for share in two])
            if len(images) == 8:  # two halves of four: each process has its part of both
                images = images[[0, 1, 4, 5, 2, 3, 6, 7]]
            assert torch.equal(images, entry["image"])
        for key, x in first.grads.items():
            assert torch.equal(x, second.grads[key])  # one reduced sum on both
        # float32 sums of 12,000 pixels in another order, through six layers; the weights differ
        # by as little in the steps before
        assert_close(first.grads, one["grads"], 5e-5)
        assert_close(first.nets, one["nets"], 2e-6)
        assert_close(first.state, one["state"], 1e-5)
        unsure = {"K", "K_gt_1", "weight", "pseudo_acc", "unsure_acc", "coverage"}
        for part in one["parts"].keys() - unsure:
            mean = (first.parts[part] + second.parts[part]) / 2
            if part != "balance" or name == "ael_fpl":
                assert mean == pytest.approx(one["parts"][part], rel=2e-5, abs=1e-7), part
        buckets = [0] * len(wrapped[0])
        assert (first.reduced, second.reduced, one["reduced"]) == (buckets, buckets, [])


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_two_processes_have_one_state_and_resume_exactly(name, pairs):
    folder = pairs(name)
    out, script = folder / f"{name} whole", tiny.script(name)
    assert differences(out, Path(f"{out} cut")) == []
    shares = recorder.left_by(out)[1]
    assert len(shares[0]) == len(shares[1]) == 7
    for first, second in zip(*shares, strict=True):  # BN's statistics too: those of the first
        one, other = (runs.flat([x.nets, x.state]) for x in (first, second))
        assert one.keys() == other.keys()
        assert all(runs.bits(x) == runs.bits(other[key]) for key, x in one.items())
        assert not torch.equal(first.seen[-1]["image"], second.seen[-1]["image"])
        assert first.random != second.random  # the channels that dropout leaves out
    if name not in CALLS:
        return
    for number, (first, second) in enumerate(zip(*shares, strict=True)):
        rng = np.random.default_rng([3, number])
        if "cutmix" in first.calls and rng.random() < script.Args().cutmix_prob:
            for share in (first, second):
                half = [list(script.cutmix_box(rng, 32)) for _ in range(2)]
                assert all(inputs[0] == half for inputs, _ in share.calls["cutmix"])
        if "draw_features" in first.calls:  # keys of both processes enter the bank, in their order
            both = [share.calls["draw_features"][0] for share in (first, second)]
            keys = torch.cat([drawn for _, drawn in both], 1)
            for share in (first, second):
                assert torch.equal(share.calls["push_features"][0][0][3], keys)
            assert not (both[0][0][2] == both[1][0][2]).any()  # numbers of their own
            assert both[0][0][2].dtype == torch.float64
    if name == "u2pl":
        assert first.state["pushed"].max() > 4 * 7  # more than one process brings in four steps
    else:  # the first prototypes are equal on both
        found = [share[0].calls["first_prototypes"][0][1] for share in shares]
        assert torch.equal(*found) and found[0].any()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_the_stream_of_samples_does_not_depend_on_the_number_of_processes(name, world, tmp_path):
    """Nor on where a run goes on."""
    script, tree = tiny.script(name), tiny.draw_tree(tmp_path / "tree")
    words = tiny.flags(tree, tmp_path / "run", batch=8)
    words += [] if name == "supervised" else ["--batch-size-unlabeled", "8"]
    args = tiny.resolved(script, words)
    data, cpu = script.load(args), torch.device("cpu")
    for stream in script.streams(data, args):

        def batches(rank, count, start, stream=stream):
            group = Group(rank, count, cpu)
            opened = script.open_stream(stream, data, args, group, start)
            return [batch["image"] for batch in opened]

        alone = batches(0, 1, 0)
        parts = [batches(rank, world, 5) for rank in range(world)]
        assert len(alone) == 8 and len(parts[0]) == 3
        for step, several in enumerate(zip(*parts, strict=True), 5):
            assert torch.cat(several).equal(alone[step])
