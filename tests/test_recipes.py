"""What the flags of a command line become: data sets, splits, backbones, recipes, explicit flags.

recipes.json has every resolved recipe, reviewed against papers.json: the papers' and the audits'
own tables. `python tests/test_recipes.py --write` makes it again: read what changes in it.
"""

import dataclasses
import functools
import itertools
import json
import re
import shlex
import sys
import typing
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest

from common import Refusal, flags
from tiny import ROOT, SCRIPTS, train
from tiny import script as module_of
from trees import refusal

GOLDEN = Path(__file__).with_name("recipes.json")
SHARES = "1/64 1/32 1/16 1/8 1/4 1/2 all"
SPLITS = {  # the usual one first, "" where none is given; nobody published VOC's last, Cityscapes'
    "voc": [*"92 183 366 732 1464 1/16 1/8 1/4 all 662".split(), ""],
    "voc_aug": [*SHARES.split(), "92", ""],
    "cityscapes": [*SHARES.split(), "186", ""],
    "coco": [*"1/512 1/256 1/128 1/64 1/32 1/8 all".split(), ""],
    "folder": ["", "1/8", "all"],
    "camvid": ["", *SHARES.split()],
    "shapes": ["", *SHARES.split()],
}
BACKBONES, RECIPES = ("", "resnet18", "resnet50", "resnet101"), ("", "recipe=official")
DINOV2 = ("", "dinov2_vitb14", "dinov2_vitl14")
OPTIONS = {"supervised": "schedule=matched", "mean_teacher": "consistency=mse"}  # a preset looks
OPTIONS |= {"cps_fpl": "cutmix=", "ael_fpl": "unsup_loss=ce"}
FOLLOWED = "batch_size=8 batch_size=16 total_iters=150000 output_stride=16 init=last.pt"


def command_lines(name, dataset):
    """Yields all combinations for a script and a data set, as recipes.json has them."""
    splits = [f"split={split}" if split else "" for split in SPLITS[dataset]]
    names = DINOV2 if name == "unimatch_v2" else BACKBONES
    backbones = [f"backbone={backbone}" if backbone else "" for backbone in names]
    for words in itertools.product(splits, backbones, {"", OPTIONS.get(name, "")}, RECIPES):
        yield ",".join(filter(None, words))
    for word in FOLLOWED.split():
        if name == "unimatch_v2" and "output_stride" in word:
            continue
        yield ",".join(filter(None, (splits[0], word)))
    yield from ("labeled_list=l.txt", "labeled_list=l.txt,total_iters=9")


def outcome(name, dataset, words=""):
    """Returns what the flags become but for those given, or the line that refuses them."""
    given = dict(word.split("=") for word in words.split(",") if word)
    for key in given.keys() & {"batch_size", "total_iters", "output_stride"}:
        given[key] = int(given[key])
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


def fields(name):
    """Returns {flag of a script: its type, without None}."""
    kinds, hints = {}, typing.get_type_hints(module_of(name).Args)  # without ranges
    for field in dataclasses.fields(module_of(name).Args):
        kind, *rest = (*typing.get_args(hints[field.name]), None)
        kinds[field.name] = kind if type(None) in rest else hints[field.name]
    return kinds


def golden(name):
    """Returns what recipes.json has of a script.

    choices: {flag: words}. numbers: {flag: the range that its refusal names}. usual: all flags. Of
    a data set the usual difference from these, and further ones: {command lines: difference}.
    """

    def difference(values, usual):
        if isinstance(values, str):
            return values
        return {key: value for key, value in values.items() if usual[key] != value}

    kinds = fields(name)
    every = {"choices": {}, "numbers": {}, "usual": outcome(name, "shapes")}
    for flag, kind in kinds.items():
        if typing.get_origin(kind) is typing.Literal:
            every["choices"][flag] = " ".join(map(str, typing.get_args(kind)))
        elif number_of(kind):
            line = refused(name, flag, several(kind, number_of(kind)(-1)))
            every["numbers"][flag] = line.partition("from ")[2]
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


def number_of(kind):
    """Returns int or float, of whichever a flag's values are; else None."""
    kinds = {kind, *typing.get_args(kind)} & {int, float}
    return kinds.pop() if kinds and typing.get_origin(kind) is not typing.Literal else None


def several(kind, value):
    """Returns a value as a flag of this type holds it: alone, in a tuple, or with another one."""
    more = (10**10,) * (typing.get_args(kind) == (int, int))
    return (value, *more) if typing.get_origin(kind) is tuple else value


def refused(name, flag, value):
    """Returns the line by which a script refuses a flag's value on camvid."""
    args = module_of(name).Args(**{"dataset": "camvid", flag: value})
    return refusal(flags.fill, args, module_of(name).preset, [])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_number_out_of_its_range_is_refused_and_its_ends_beat_every_preset(name):
    kinds = fields(name)
    for flag, words in NUMBERS[name].items():
        kind, number = kinds[flag], number_of(kinds[flag])
        low, high = (float(word) for word in words.split(" to "))
        wrong, right = [low - 1] if number is int else [low - 1, float("nan")], [number(low)]
        wrong += [0.0] * (number is float and low > 0)
        if high < float("inf"):
            wrong += [high + 1] if number is int else [high * 1.0001, 70.0, float("inf")]
            right.append(number(high))
        for value in wrong:
            value = number(value) if value == value else value
            line = f"--{flag.replace('_', '-')} {value}: a number from {words}"
            assert refused(name, flag, several(kind, value)) == line
        for dataset, value in itertools.product(SPLITS, right):
            given = {"dataset": dataset, "split": SPLITS[dataset][1], flag: several(kind, value)}
            args = flags.fill(module_of(name).Args(**given), module_of(name).preset, [])
            assert getattr(args, flag) == given[flag]


CITY = {"dataset": "cityscapes"}
CLAUSES = {  # of NEEDS: its words, flags with which it does not hold, flags with which it does
    "never": ("", {}, {}),
    "no init": ("no --init", {"init": "last.pt"}, {}),
    "no labeled_list": ("no --labeled-list", {"labeled_list": "l.txt"}, {}),
    "no split_seed": ("no --split-seed", {"split_seed": 1}, {}),
    "no total_iters": ("no --total-iters", {"total_iters": 7}, {}),
    "split!=all|list": ("--split other than all or list", {"split": "all"}, {"split": "1/8"}),
    "split!=all": ("--split other than all", {"split": "all"}, {}),
    "dataset!=shapes": ("--dataset other than shapes", {"dataset": "shapes"}, CITY),
    "dataset=cityscapes": ("--dataset cityscapes", {"dataset": "voc_aug"}, CITY),
    "dataset=voc|voc_aug|cityscapes|coco": (
        "--dataset voc or voc_aug or cityscapes or coco", {"dataset": "folder"}, CITY),
    "backbone=resnet18|resnet50|resnet101": (
        "--backbone resnet18 or resnet50 or resnet101", {"backbone": "timm/resnet18"}, {}),
    "warmup_iters<total_iters": (
        "--warmup-iters below --total-iters", {"warmup_iters": 9, "total_iters": 9}, {}),
    "k_strategy=n-1|n": ("--k-strategy n-1 or n", {"k_strategy": "step"}, {"k_strategy": "n"}),
    "weight!=none": ("--weight other than none", {"weight": "none"}, {}),
    "unsup_loss=fpl": ("--unsup-loss fpl", {"unsup_loss": "ce"}, {"unsup_loss": "fpl"}),
    "unsup_loss=ce": ("--unsup-loss ce", {"unsup_loss": "fpl"}, {}),
    "unreliable_loss!=none": ("--unreliable-loss other than none", {"unreliable_loss": "none"}, {}),
    "views=2": ("--views 2", {"views": 1}, {}),
    "label=dynamic": ("--label dynamic", {"label": "topk"}, {}),
    "label=topk": ("--label topk", {"label": "dynamic"}, {"label": "topk"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flag_that_cannot_act_is_refused_and_is_absent_from_those_that_act(name):
    Args, preset = module_of(name).Args, module_of(name).preset
    for flag, need in Args.NEEDS.items():
        kind, low = fields(name)[flag], NUMBERS[name].get(flag, "").partition(" ")[0]
        choices = {bool: (True, False), str: ("some.pt",)}.get(kind) or typing.get_args(kind)
        value = max({*choices} - {getattr(Args, flag)}) if not low else number_of(kind)(float(low))
        value = several(kind, value)
        rows, given = [], {"split": "1/8", flag: value}
        for clause in need.split(", "):  # one that is a flag alone: it is not 0, or it is on
            usual = ("--" + clause.replace("_", "-"), {clause: 0}, {clause: 1})
            rows.append(CLAUSES.get(clause, usual))
            given.update(rows[-1][2])
        words = "in this script"
        if need != "never":
            words = "here: it needs " + " and ".join(row[0] for row in rows)
            assert flag in flags.acting(flags.fill(Args(**given), preset, [f"--{flag}"]))
        for own, wrong, _ in rows:
            args, argv = Args(**given | wrong), [f"--{word}" for word in (flag, *wrong)]
            line = f"--{flag.replace('_', '-')} {value} does nothing {words}"
            assert refusal(flags.fill, args, preset, argv) == line
            acts = flag in flags.acting(flags.fill(args, preset, []))
            assert acts == own.startswith("no ")  # what another flag replaces is in the log


@pytest.mark.parametrize("name", SCRIPTS)
def test_list_presets_prints_the_papers_results_and_their_flags_are_the_papers(name, capsys):
    train(module_of(name), ["--list-presets"])
    lines = capsys.readouterr().out.splitlines()
    entries = json.loads((ROOT / "common/papers.json").read_text())
    entries = [entry for entry in entries if entry["script"] == name]
    assert len(lines) == sum(len(entry["miou"]) for entry in entries) >= 4
    Args, preset = module_of(name).Args, module_of(name).preset
    parsed = functools.cache(lambda words: flags.parse(Args, preset, shlex.split(words)))
    seen = set()
    for line in lines:
        miou, dataset, split, words, source = re.fullmatch(
            r" *([\d.]+)  --dataset (\w+) --split (\S+) (.*?)  +(.*)", line
        ).groups()
        own = [dataset, words.strip(), source]
        (entry,) = (e for e in entries if [e["dataset"], e["flags"], e["source"]] == own)
        assert float(miou) == entry["miou"][split]
        args = dataclasses.replace(parsed(f"--dataset {dataset} {words}"), split=split)
        args = flags.fill(args, preset, [])
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
            if name == "unimatch_v2":
                total = PAPERS["V2 steps"][f"{dataset} {split}"]
            if name == "unimatch" and city:
                total = {"1/16": 83_760, "1/8": 78_000, "1/4": 66_960, "1/2": 44_640}[split]
            warm = one_pass * (20 if city else 1)  # App. A: 1 pass of VOC's 80, 20 of 200
            assert (args.total_iters, getattr(args, "warmup_iters", warm)) == (total, warm), line
    assert len(seen) == {"cps_fpl": 32, "ael_fpl": 14}.get(name, 0)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    GOLDEN.write_text(json.dumps({name: golden(name) for name in SCRIPTS}, indent=1) + "\n")
if GOLDEN.exists():
    NUMBERS = {name: own["numbers"] for name, own in json.loads(GOLDEN.read_text()).items()}
