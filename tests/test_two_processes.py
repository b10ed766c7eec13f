"""Two processes: the steps of one, one state on both, exact resume; the headline command."""

import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import processes
import recorder
import tiny
from benchmarks import runs
from benchmarks.runs import differences, log
from common import Refusal, run

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
    ("cps_fpl", "labels"): "--unsup-weight 0",
    ("ael_fpl", "mixed"): "--beta 0 --lr 0.002",
    ("ael_fpl", "all"): "--beta 0 --lr 0.002 --recipe official --T 0.3",
    ("ael_fpl", "skip"): "--beta 0 --lr 0.002 --skip-absent --pooled 1",
}
CALLS = {"u2pl": ["cutmix", "draw_keys", "push_keys"], "esl": ["cutmix", "first_prototypes"]}
OTHERS = {"u2pl": "--unreliable-loss none", "esl": "--no-contrast", "ael_fpl": "--recipe official"}
OTHERS |= {"cps_fpl": "--no-cutmix"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns a function of a script: the folder of its runs, by both processes and by one."""
    folder, made = tmp_path_factory.mktemp("pairs"), set()
    sure = tiny.draw_tree(folder / "sure", ids=11)
    tree = tiny.draw_tree(folder / "tree")

    def of(name):
        if name in made:
            return folder
        made.add(name)
        jobs, rows = [], [row for script, row in SHARED_OUT if script == name]
        for row in rows:
            numbers = dict(iters=6 if name == "ael_fpl" else 3, log=1, evaluate=9, save=9, batch=4)
            argv = tiny.flags(sure, folder / f"{name} {row}", **numbers) + SURE.split()
            if name != "supervised":
                argv += ["--batch-size-unlabeled", "4"]
            jobs.append(dict(argv=argv + SHARED_OUT[name, row].split(), bare=True))
        numbers = dict(iters=7, log=2, evaluate=7, save=2, batch=4)
        more = ["--seed", "3", *tiny.MORE.get(name, "").split()]
        for kind, words in (("whole", ""), ("other", OTHERS.get(name))):
            if words is not None:
                out = folder / f"{name} {kind}"
                argv = [*tiny.flags(tree, out, **numbers), *more, *words.split()]
                jobs.append(dict(argv=argv, calls=CALLS.get(name, [])))
                again = [str(out) + " cut" if word == str(out) else word for word in argv]
                jobs += [dict(argv=again, stop=6), dict(argv=again + ["--resume"])]
        process = processes.recorded(name, *jobs)
        for row, job in zip(rows, jobs, strict=False):  # meanwhile, by one
            with pytest.MonkeyPatch.context() as patch:
                tiny.shrink(tiny.script(name), patch, bare=True)
                out = f"{folder}/{name} {row} alone"
                argv = [out if word == f"{folder}/{name} {row}" else word for word in job["argv"]]
                found = recorder.watch(patch, tiny.script(name), argv)
            torch.save([vars(step) for step in found.steps], out + ".steps")
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
    pasted_onto = set()
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
        changed = one["seen"][0]["image"] != one["batch"]["labeled"]["image"]
        if len(changed) == 4:
            pasted_onto |= set(enumerate(changed.flatten(1).any(1).tolist()))
        for key, x in first.grads.items():
            assert torch.equal(x, second.grads[key])  # one reduced sum on both
        # float32 sums of 12,000 pixels in another order, through six layers; the weights differ
        # by as little in the steps before
        assert_close(first.grads, one["grads"], 5e-5)
        assert_close(first.nets, one["nets"], 2e-6)
        assert_close(first.state, one["state"], 1e-5)
        for part in one["parts"].keys() - {"K", "K_gt_1", "weight", "pseudo_acc", "coverage"}:
            mean = (first.parts[part] + second.parts[part]) / 2
            if part != "balance" or name == "ael_fpl":
                assert mean == pytest.approx(one["parts"][part], rel=2e-5, abs=1e-7), part
        buckets = [0] * len(wrapped[0])
        assert (first.reduced, second.reduced, one["reduced"]) == (buckets, buckets, [])
    if row == "all":  # each image has a coin of its own
        assert {(i, x) for i in (0, 3) for x in (True, False)} <= pasted_onto
    if row in ("cutmix", "plain", "same image"):  # the cross loss has its part in what was compared
        labels = torch.load(f"{folder}/{name} labels alone.steps", weights_only=True)[0]["grads"]
        for key, x in alone[0]["grads"].items():
            assert (x - labels[key]).abs().max() > 0.05 * x.abs().max(), key


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_two_processes_have_one_state_and_resume_exactly(name, pairs):
    folder = pairs(name)
    for kind in ["whole", *(["other"] if name in OTHERS else [])]:
        out = folder / f"{name} {kind}"
        assert differences(out, Path(f"{out} cut")) == []
        shares = recorder.left_by(out)[1]
        assert len(shares[0]) == len(shares[1]) == 7
        for first, second in zip(*shares, strict=True):  # BN's statistics too: those of the first
            one, other = (runs.flat([x.nets, x.state]) for x in (first, second))
            assert one.keys() == other.keys()
            assert all(runs.bits(x) == runs.bits(other[key]) for key, x in one.items())
            assert not torch.equal(first.seen[-1]["image"], second.seen[-1]["image"])
            assert first.random != second.random  # the channels that dropout leaves out
            assert all(math.isfinite(x) for x in first.parts.values())
        resumed = recorder.left_by(f"{out} cut")[1]
        for share, steps in zip(resumed, shares, strict=True):
            assert len(share) == 3  # from step 4
            for one, other in zip(share, steps[4:], strict=True):
                for a, b in zip(one.seen, other.seen, strict=True):
                    assert torch.equal(a["logits"], b["logits"])
    if name not in CALLS:
        return
    out, script = folder / f"{name} whole", tiny.script(name)
    shares = recorder.left_by(out)[1]
    for number, (first, second) in enumerate(zip(*shares, strict=True)):
        rng = np.random.default_rng([3, number])
        if "cutmix" in first.calls and rng.random() < script.Args().cutmix_prob:
            boxes = [call[0][0] for share in (first, second) for call in share.calls["cutmix"]]
            halves = [[list(script.cutmix_box(rng, 32)) for _ in range(2)] for _ in range(2)]
            assert boxes == halves
        if "draw_keys" in first.calls:  # keys of both processes enter the bank, in their order
            both = [share.calls["draw_keys"][0] for share in (first, second)]
            keys = torch.cat([drawn for _, drawn in both], 1)
            for share in (first, second):
                assert torch.equal(share.calls["push_keys"][0][0][3], keys)
            assert not (both[0][0][2] == both[1][0][2]).any()  # numbers of their own
            assert both[0][0][2].dtype == torch.float64
    if name == "u2pl":
        assert first.state["pushed"].max() > 4 * 7  # more than one process brings in four steps
    else:  # the first prototypes are equal on both, and those of a process alone
        found = [share[0].calls["first_prototypes"][0][1] for share in shares]
        assert torch.equal(*found) and found[0].any()
        argv = tiny.flags(folder / "tree", folder / "alone", iters=1, batch=4)
        argv += ["--seed", "3", *tiny.MORE[name].split()]
        with pytest.MonkeyPatch.context() as patch:
            tiny.shrink(script, patch)
            (step,) = recorder.watch(patch, script, argv, ["first_prototypes"]).steps
        assert torch.equal(step.calls["first_prototypes"][0][1], found[0])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_the_stream_of_samples_does_not_depend_on_the_number_of_processes(name, world, tmp_path):
    """Nor on where a run goes on. A share that is not whole, or one image, is refused by name."""
    script, tree = tiny.script(name), tiny.draw_tree(tmp_path / "tree")
    words = tiny.flags(tree, tmp_path / "run", batch=8)
    words += [] if name == "supervised" else ["--batch-size-unlabeled", "8"]
    args = tiny.resolved(script, words)
    data, cpu = script.load(args), torch.device("cpu")
    for stream in script.streams(data, args):

        def batches(rank, count, start, stream=stream):
            group = run.Group(rank, count, cpu)
            opened = script.open_stream(stream, data, args, group, start)
            return [batch["image"] for batch in opened]

        alone = batches(0, 1, 0)
        parts = [batches(rank, world, 5) for rank in range(world)]
        assert len(alone) == 8 and len(parts[0]) == 3
        for step, several in enumerate(zip(*parts, strict=True), 5):
            assert torch.cat(several).equal(alone[step])
        for count, line in ((3, "divide over 3 processes"), (8, "plain BN needs two")):
            with pytest.raises(Refusal, match=line) as refused:
                script.open_stream(stream, data, args, run.Group(0, count, cpu), 0)
            assert stream in str(refused.value) and "\n" not in str(refused.value)


# ---- the headline command ----

HEADLINE = ["--dataset", "cityscapes", "--split", "1/16", "--T", "0.9"]
# cityscapesScripts' labels.py: the id of each of the 19 classes; all others are ignored
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
VOID = [*(i for i in range(34) if i not in IDS), 255]
CITIES = {"train": ("aachen", "ulm", "weimar", "zurich"), "val": ("frankfurt", "lindau")}
WITH_IDS = ("ulm", "zurich", "lindau")  # masks with all 34 ids; the others with the 19 classes


def set_hash(keys):
    return hashlib.sha1("\n".join(sorted(keys)).encode()).hexdigest()[:8]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def draw_cityscapes(root, labelled):
    """Draws official names, masks of val and the labelled images; returns keys, val's classes."""
    rng, keys, val = np.random.default_rng(0), {"train": [], "val": []}, []
    for part, cities in CITIES.items():
        for city, i in itertools.product(cities, range(8 if part == "train" else 2)):
            key = f"{city}_{i:06d}_000019"
            keys[part].append(key)
            path = root / f"leftImg8bit/{part}/{city}/{key}_leftImg8bit.png"
            save(path, rng.integers(0, 256, (36, 48, 3)))
            if part == "train" and key not in labelled:
                continue
            classes = rng.choice([*range(7), 19], (6, 8)).repeat(6, 0).repeat(6, 1)
            if part == "val":
                val.append(classes.ravel())
            if city in WITH_IDS:
                mask = np.array([*IDS, 0])[classes]
                mask = np.where(classes == 19, rng.choice(VOID, classes.shape), mask)
            else:
                mask = np.where(classes == 19, 255, classes)
            kind = "labelIds" if city in WITH_IDS else "labelTrainIds"
            save(root / f"gtFine/{part}/{city}/{key}_gtFine_{kind}.png", mask)
    return keys, np.concatenate(val)


def test_the_headline_command_trains_on_a_list_that_it_fetches(tmp_path):
    """By torchrun from file://; then alone from the cache; then from a cache that was changed."""
    labelled = ["weimar_000003_000019", "ulm_000006_000019"]  # no every 16th; of both kinds
    keys, val = draw_cityscapes(tmp_path / "data/cityscapes", labelled)
    source = tmp_path / "published.txt"
    rows = [f"/images/train/{k}.png\t/segmentation/train/{k}_gtFine.png\n" for k in labelled]
    source.write_text("".join(rows))  # as TorchSemiSeg's
    entry = {"images": 2, "set": set_hash(labelled), "url": source.as_uri()}
    parts = {part: {"images": len(keys[part]), "set": set_hash(keys[part])} for part in keys}
    published = {"cityscapes": {"parts": parts, "cps": {"1/16": entry}, "u2pl": {}}}
    sizes = ["--crop-size", "32", "--total-iters", "2", "--workers", "0", "--device", "cpu"]
    words = processes.command("cps_fpl", HEADLINE + sizes, launch=True, published=published)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    quiet = dict(capture_output=True, text=True, timeout=300, cwd=tmp_path)
    done = subprocess.run([sys.executable, *torchrun, *words], **quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs/cps_fpl-cityscapes-1_16-s0"
    first, last = log(folder)[0], log(folder)[-1]
    assert first["world"] == 2 and first["argv"] == HEADLINE + sizes
    args = first["args"]
    assert (args["T"], args["protocol"], args["split_family"]) == (0.9, "slide", "cps")
    rest = sorted(set(keys["train"]) - set(labelled))
    expected = {"labeled": labelled, "unlabeled": rest, "val": keys["val"], "test": []}
    assert first["lists"] == {name: [len(k), set_hash(k)] for name, k in expected.items()}
    # masks of both kinds are read right: the score of the best constant, by hand
    found = np.bincount(val, minlength=20)[:19]
    constant = found.max() / found.sum() / (found > 0).sum()
    assert last["kind"] == "done" and last["on"] == "val"
    assert last["last"]["constant"] == pytest.approx(constant, abs=1e-12)
    cached = tmp_path / "data/splits/cityscapes/cps/1_16.txt"
    assert sorted(cached.read_text().split()) == sorted(labelled)
    assert f"1_16.txt: 2 images, set {entry['set']}" in done.stdout
    assert not [path for path in cached.parent.iterdir() if path != cached]

    source.unlink()
    processes.finish(processes.Forked(words, folder=tmp_path))
    assert log(Path(f"{folder}-2"))[0]["lists"] == first["lists"]

    cached.write_text(f"{labelled[0]}\nulm_000005_000019\n")
    process = processes.Forked(words, folder=tmp_path, apart=True)
    _, text = process.communicate()
    assert process.returncode == 2 and text.count("\n") == 1
    assert text.startswith("cps_fpl.py: data/splits/cityscapes/cps/1_16")
    assert entry["set"] in text and "delete it" in text
    assert not Path(f"{folder}-3").exists()
