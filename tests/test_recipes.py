"""What the flags of a command line become: data sets, splits, backbones, recipes, explicit flags.

recipes.json has every resolved recipe, reviewed against papers.json: the papers' and the audits'
own tables. `python tests/test_recipes.py --write` makes it again: read what changes in it.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import sys
import typing
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest

from common import Refusal, flags
from tiny import ROOT, SCRIPTS, resolved, train
from tiny import script as module_of
from trees import refusal

GOLDEN = Path(__file__).with_name("recipes.json")
SHARES = "1/64 1/32 1/16 1/8 1/4 1/2 all"
SPLITS = {  # the usual one first, "" where none is given; nobody published VOC's last, Cityscapes'
    "voc": [*"92 183 366 732 1464 1/16 1/8 1/4 all 662".split(), ""],
    "voc_aug": [*SHARES.split(), "92", ""],
    "cityscapes": [*SHARES.split(), "186", ""],
    "coco": [*"1/512 1/256 1/128 1/64 1/32 1/8 all".split(), ""],
    "ade20k": [*SHARES.split(), "1/128", ""],
    "folder": ["", "1/8", "all"],
    "camvid": ["", *SHARES.split()],
    "shapes": ["", *SHARES.split()],
}
BACKBONES, RECIPES = ("", "resnet18", "resnet50", "resnet101"), ("", "recipe=official")
DINO = ("", "dinov2_vitb14", "dinov2_vitl14", "dinov3_vits16")
OPTIONS = {"supervised": "schedule=matched", "mean_teacher": "consistency=mse"}  # a preset looks
OPTIONS |= {"cps_fpl": "cutmix=", "ael_fpl": "unsup_loss=ce"}
FOLLOWED = "batch_size=8 batch_size=16 total_iters=150000 output_stride=16 init=last.pt "
FOLLOWED += "batch_size_unlabeled=32"


def command_lines(name, dataset):
    """Yields all combinations for a script and a data set, as recipes.json has them."""
    splits = [f"split={split}" if split else "" for split in SPLITS[dataset]]
    names = DINO if name == "unimatch_v2" else BACKBONES
    backbones = [f"backbone={backbone}" if backbone else "" for backbone in names]
    for words in itertools.product(splits, backbones, {"", OPTIONS.get(name, "")}, RECIPES):
        yield ",".join(filter(None, words))
    for word in FOLLOWED.split():
        if hasattr(module_of(name).Args, word.split("=")[0]):
            yield ",".join(filter(None, (splits[0], word)))
    yield from ("labeled_list=l.txt", "labeled_list=l.txt,total_iters=9")


def outcome(name, dataset, words=""):
    """Returns what the flags become but for those given, or the line that refuses them."""
    given = dict(word.split("=") for word in words.split(",") if word)
    given |= {key: int(word) for key, word in given.items() if word.isdecimal() and key != "split"}
    if "cutmix" in given:
        given["cutmix"] = False
    try:
        args = module_of(name).Args(dataset=dataset, **given)
        args = flags.fill(args, module_of(name).preset, [])
    except Refusal as error:
        return str(error)
    if given.get("backbone") == getattr(args, "backbone_2", ""):  # it follows
        given["backbone_2"] = None
    return {key: value for key, value in flags.plain(args).items() if key not in given}


def declared(name):
    """Returns, by flag, the words that it takes, the range of its numbers and what it needs."""
    choices, numbers, Args = {}, {}, module_of(name).Args
    for flag, kind in typing.get_type_hints(Args, include_extras=True).items():
        for part in (kind, *typing.get_args(kind)):
            if typing.get_origin(part) is typing.Literal:
                choices[flag] = " ".join(map(str, typing.get_args(part)))
        for rule in flags.rules(kind):
            if isinstance(rule, flags.Range):
                numbers[flag] = f"{rule.low:g} to {rule.high}"
    return dict(choices=choices, numbers=numbers, needs=Args.NEEDS)


def golden(name):
    """Returns what recipes.json has of a script.

    usual: all flags. Of a data set the usual difference from these, and further ones: {command
    lines: difference}.
    """

    def difference(values, usual):
        if isinstance(values, str):
            return values
        return {key: value for key, value in values.items() if usual[key] != value}

    every = declared(name) | {"usual": outcome(name, "shapes")}
    for dataset in SPLITS:
        own = every["usual"] | outcome(name, dataset, next(command_lines(name, dataset)))
        further = {}
        for words in command_lines(name, dataset):
            text = json.dumps(difference(outcome(name, dataset, words), own), sort_keys=True)
            further.setdefault(text, []).append(words)
        further = {"; ".join(sorted(words)): json.loads(text) for text, words in further.items()}
        every[dataset] = {"usual": difference(own, every["usual"]), "further": further}
    return json.loads(json.dumps(every))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_recipe_is_the_reviewed_one(name):
    then, now = json.loads(GOLDEN.read_text()), golden(name)
    assert list(then) == SCRIPTS and list(then[name]) == list(now)
    for key, value in now.items():
        assert then[name][key] == value, key


PAPERS = json.loads(Path(__file__).with_name("papers.json").read_text())  # with notes
COLUMNS = "batch_size lr lr_head weight_decay decay_on crop_size ohem_kept output_stride".split()


def test_help_has_each_flag_with_its_sentence_its_choices_and_its_value_here(capsys):
    """A sentence stands behind its field, or on the line above where it is too long."""
    with pytest.raises(SystemExit) as end:
        train(module_of("cps_fpl"), ["--crop-size", "48", "--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert end.value.code == 0
    assert "--crop-size side of the square crops, in pixels [48]".split() in lines
    fused = next(i for i, words in enumerate(lines) if words[:1] == ["--fused"])
    assert (lines[fused][-1], lines[fused + 1]) == ("[auto]", "auto | on | off".split())
    there = {words[0].replace("[no-]", "") for words in lines if words and words[0][:2] == "--"}
    fields = dataclasses.fields(module_of("cps_fpl").Args)
    assert there == {flags.flag_of(field.name) for field in fields}


VOC_LIST = "--dataset voc --labeled-list l.txt --total-iters 9"
FAMILY = "--dataset other than shapes or camvid or folder and no --split-seed and "
FAMILY += "--split other than all or list"
NEEDS = [  # script, flag; flags with which it is idle, what it needs, flags with which it acts
    ("supervised", "--recipe official", "", "", None),
    ("supervised", "--data-root d", "", "--dataset other than shapes", "--dataset camvid"),
    ("supervised", "--split-family cac0", VOC_LIST, FAMILY, f"{VOC_LIST} --split 92"),
    ("supervised", "--weights w.pth", "--init last.pt", "no --init", ""),
    ("cps_fpl", "--batch-size-unlabeled 4", "--unsup-weight 0", "--unsup-weight", ""),
    ("unimatch", "--threshold 0.8", "--unsup-loss fpl", "--unsup-loss ce", ""),
    ("u2pl", "--ema-decay 0.9", "--warmup-iters 120", "--warmup-iters below --total-iters", ""),
    ("esl", "--eta 0.8", "--label topk", "--unsup-weight and --label dynamic", ""),
]


@pytest.mark.parametrize("name, flag, idle, needs, active", NEEDS)
def test_a_flag_that_cannot_act_is_refused_and_is_absent_from_those_that_act(
    name, flag, idle, needs, active
):
    script, key = module_of(name), flag.split()[0][2:].replace("-", "_")
    where = f"here: it needs {needs}" if needs else "in this script"
    line = refusal(resolved, script, f"{flag} {idle}".split())
    assert line == f"{flag} does nothing {where}"
    acts = key in flags.acting(resolved(script, idle.split()))
    assert acts == needs.startswith("no ")  # what another flag replaces is in the log
    if active is not None:
        assert key in flags.acting(resolved(script, f"{flag} {active}".split()))


@pytest.mark.parametrize("name, steps", [("mean_teacher", 52_400), ("cps_fpl", 0)])
def test_another_batch_size_says_what_it_leaves_and_what_it_moves(name, steps, capsys):
    script = module_of(name)
    usual = resolved(script, "--dataset voc --split 92".split())
    batch = usual.batch_size
    assert not capsys.readouterr().out
    resolved(script, "--dataset voc --split 92 --batch-size 4".split())
    rate = usual.lr * 4 / batch
    lines = [f"note: --lr {usual.lr:g} is kept; the linear rule would have {rate:g} for this batch"]
    if steps:  # 80 passes over 10,490 images, of which each of 4 processes has 2,623
        lines.append(
            f"note: --total-iters {80 * 2623}: the recipe has {steps} for a batch of {batch}"
        )
    assert capsys.readouterr().out.splitlines() == lines
    resolved(script, "--dataset voc --split 92 --batch-size 4 --lr 1 --total-iters 9".split())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_list_presets_prints_the_papers_results_and_their_flags_are_the_papers(name, capsys):
    train(module_of(name), ["--list-presets"])
    lines = capsys.readouterr().out.splitlines()
    entries = json.loads((ROOT / "common/papers.json").read_text())
    entries = [entry for entry in entries if entry["script"] == name]
    results = [(entry, *pair) for entry in entries for pair in entry["miou"].items()]
    assert len(results) >= 4 or not entries  # of no paper's table
    seen = set()
    for line, (entry, split, miou) in zip(lines if entries else [], results, strict=True):
        dataset, words, source = entry["dataset"], entry["flags"], entry["source"]
        command = f"--dataset {dataset} --split {split} {words}"
        assert line.split() == f"{miou:.2f} {command} {source}".split()
        args = resolved(module_of(name), shlex.split(command))
        found = [getattr(args, column, 14) for column in COLUMNS]  # a patch of DINOv2's
        found[6] = round(found[6] * args.crop_size**2)  # pixels
        if "--lr" not in words:  # of a table that varies it
            rates = list(PAPERS["rates"][f"{name} {dataset.removesuffix('_aug')}"])
            if name == "unimatch" and dataset == "voc_aug" and "cps" not in words:  # U2PL's lists
                rates[5] = 513
            assert found == rates, line
        both = args.batch_size if name == "unimatch_v2" else PAPERS["unlabeled"].get(name)
        assert getattr(args, "batch_size_unlabeled", None) == both
        city = dataset == "cityscapes"
        if re.match("FPL Table [123],", source):
            assert args.total_iters == PAPERS["FPL steps"][name][city], line
            assert (args.unsup_loss == "fpl") == ("FPL+" in source), line
            row = "AEL" if name == "ael_fpl" else "-" if "w/o" in source else "CutMix"
            assert name == "ael_fpl" or args.cutmix == (row == "CutMix"), line
            table = PAPERS["T"][f"{dataset} {args.backbone} {row}"].split()
            assert args.T == (float(table[table.index(split) + 1]),), line
            seen.add((dataset, split, args.backbone, row))
        elif name not in PAPERS["FPL steps"] and f"{dataset} {split}" in PAPERS["steps"]:
            alone, semi, one_pass, esl = PAPERS["steps"][f"{dataset} {split}"]
            total = {"supervised": alone, "esl": esl, "unimatch": esl}.get(name, semi)
            total = PAPERS["own steps"].get(f"{name} {dataset} {split}", total)
            warm = one_pass * (20 if city else 1)  # App. A: 1 pass of VOC's 80, 20 of 200
            assert (args.total_iters, getattr(args, "warmup_iters", warm)) == (total, warm), line
    assert len(seen) == {"cps_fpl": 32, "ael_fpl": 14}.get(name, 0)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):  # notes on batches
        found = {name: golden(name) for name in SCRIPTS}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
