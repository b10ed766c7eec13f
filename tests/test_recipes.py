"""What the flags of a command line become: data sets, splits, backbones, recipes, explicit flags.

recipes.json has every resolved recipe, reviewed against the tables below, which are the papers' and
the audits' own. `python tests/test_recipes.py --write` makes it again: read what changes in it.
"""

import dataclasses
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

from common import Refusal, run
from common.data import set_hash
from sources import load
from tiny import ROOT, SCRIPTS, draw_tree, flags, resolved, train
from tiny import script as module_of

GOLDEN = Path(__file__).with_name("recipes.json")
SHARES = "1/64 1/32 1/16 1/8 1/4 1/2 all"
SPLITS = {  # the usual one first, "" where none is given; nobody published VOC's last, Cityscapes'
    "voc": [*"92 183 366 732 1464 1/16 1/8 1/4 all 662".split(), ""],
    "voc_aug": [*SHARES.split(), "92", ""],
    "cityscapes": [*SHARES.split(), "186", ""],
    "folder": ["", "1/8", "all"],
    "camvid": ["", *SHARES.split()],
    "shapes": ["", *SHARES.split()],
}
BACKBONES = ("", "resnet18", "resnet50", "resnet101")
OPTIONS = {"supervised": "schedule=matched", "mean_teacher": "consistency=mse"}  # a preset looks
OPTIONS |= {"cps_fpl": "cutmix=", "ael_fpl": "unsup_loss=ce"}
FOLLOWED = "batch_size=8 batch_size=16 total_iters=150000 output_stride=16 init=last.pt"


def command_lines(name, dataset):
    """Yields all combinations for a script and a data set, as recipes.json has them."""
    recipes = ("", "recipe=official")
    splits = [f"split={split}" if split else "" for split in SPLITS[dataset]]
    backbones = [f"backbone={backbone}" if backbone else "" for backbone in BACKBONES]
    for words in itertools.product(splits, backbones, {"", OPTIONS.get(name, "")}, recipes):
        yield ",".join(filter(None, words))
    for word in FOLLOWED.split():
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
        args = run.resolve(module_of(name).Args(dataset=dataset, **given), module_of(name).preset)
    except Refusal as error:
        return str(error)
    return {key: value for key, value in run.plain(args).items() if key not in given}


def fields(name):
    """Returns {flag of a script: its type, without None}."""
    kinds = {}
    for field in dataclasses.fields(module_of(name).Args):
        kind, *rest = (*typing.get_args(field.type), field.type)
        kinds[field.name] = kind if type(None) in rest else field.type
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
            line = refusal(name, flag, several(kind, number_of(kind)(-1)))
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


# ---- the papers' tables ----

# T of FPL's supplement, Tables 1 and 2: cps_fpl.py without and with CutMix, then FPL+AEL; Table 3,
# printed over 1/32, 1/16, 1/8, 1/4, which are the main paper's 1/16 to 1/2 of 1,464. Else: 0.9
T_TABLE = {
    "cityscapes": {
        ("resnet50", "-"): {"1/32": 0.95, "1/16": 0.9, "1/8": 0.9, "1/4": 0.9},
        ("resnet101", "-"): {"1/32": 0.95, "1/16": 0.95, "1/8": 0.95, "1/4": 0.9},
        ("resnet50", "CutMix"): {"1/32": 0.9, "1/16": 0.85, "1/8": 0.85, "1/4": 0.85},
        ("resnet101", "CutMix"): {"1/32": 0.9, "1/16": 0.85, "1/8": 0.85, "1/4": 0.85},
        ("resnet50", "AEL"): {"1/32": 0.95, "1/16": 0.95, "1/8": 0.9, "1/4": 0.9},
        ("resnet101", "AEL"): {"1/32": 0.9, "1/16": 0.9, "1/8": 0.85, "1/4": 0.85},
    },
    "voc_aug": {
        ("resnet50", "-"): {"1/16": 0.9, "1/8": 0.9, "1/4": 0.9},
        ("resnet101", "-"): {"1/16": 0.95, "1/8": 0.9, "1/4": 0.9},
        ("resnet50", "CutMix"): {"1/16": 0.95, "1/8": 0.9, "1/4": 0.9},
        ("resnet101", "CutMix"): {"1/16": 0.9, "1/8": 0.9, "1/4": 0.9},
        ("resnet50", "AEL"): {"1/16": 0.95, "1/8": 0.95, "1/4": 0.95},
        ("resnet101", "AEL"): {"1/16": 0.95, "1/8": 0.9, "1/4": 0.9},
    },
    "voc": {
        (backbone, "CutMix"): {"92": 0.95, "183": 0.85, "366": 0.85, "732": 0.85}
        for backbone in ("resnet18", "resnet50", "resnet101")
    },
}
# the audits' steps: of SupOnly, of the semi-supervised runs (matched), one pass of these; and ESL's
# 80 or 200 passes over the unlabelled images, 8 a step
STEPS = {
    "voc": {
        "92": (480, 52_400, 655, 104_880),
        "183": (960, 52_000, 650, 104_000),
        "366": (1840, 51_040, 638, 102_160),
        "732": (3680, 49_200, 615, 98_480),
        "1464": (7360, 45_600, 570, 91_200),
    },
    "voc_aug": {
        "1/16": (3360, 49_600, 620, 99_200),
        "1/8": (6640, 46_240, 578, 92_560),
        "1/4": (13_280, 39_680, 496, 79_360),
        "1/2": (26_480, 26_400, 330, 52_880),
    },
    "cityscapes": {
        "1/16": (2400, 34_800, 174, 69_800),
        "1/8": (4800, 32_600, 163, 65_200),
        "1/4": (9400, 27_800, 139, 55_800),
        "1/2": (18_600, 18_600, 93, 37_200),
    },
}
U2PL = ("supervised", "mean_teacher", "u2pl")
# batch, lr, of the head, decay, on, crop, pixels of OHEM, stride: what acted in the released runs
RATES = {
    ("cps_fpl", "voc"): (8, 0.0025, 1.0, 4e-4, "weights", 512, 0, 16),
    ("cps_fpl", "cityscapes"): (8, 0.0025, 1.0, 8e-4, "weights", 800, 50_000, 16),
    ("ael_fpl", "voc"): (16, 0.00125, 10.0, 8e-4, "all", 513, 50_000, 8),
    ("ael_fpl", "cityscapes"): (16, 0.00125, 10.0, 8e-4, "all", 769, 50_000, 8),
    ("esl", "voc"): (8, 0.001, 10.0, 1e-4, "all", 513, 0, 8),
    ("esl", "cityscapes"): (8, 0.01, 1.0, 5e-4, "all", 769, 50_000, 8),
    **{(name, "voc"): (16, 0.001, 10.0, 1e-4, "all", 513, 0, 8) for name in U2PL},
    **{(name, "cityscapes"): (16, 0.01, 1.0, 5e-4, "all", 769, 50_000, 8) for name in U2PL},
}
UNLABELED = {"cps_fpl": 8, "ael_fpl": 8, "esl": 8, "mean_teacher": 16, "u2pl": 16}
FPL_STEPS = {"cps_fpl": (39_680, 44_640), "ael_fpl": (39_680, 18_000)}  # VOC, Cityscapes


def all_outcomes(names):
    """Yields (script, data set, {flag: value}) of all that is not refused."""
    for name, dataset in itertools.product(names, SPLITS):
        for words in command_lines(name, dataset):
            values = outcome(name, dataset, words)
            if isinstance(values, dict) and not re.search("batch|total|stride|init|list", words):
                yield name, dataset, values | dict(w.split("=") for w in words.split(",") if w)


def test_T_is_the_supplements():
    seen = 0
    for name, dataset, values in all_outcomes(["cps_fpl", "ael_fpl"]):
        row = "AEL" if name == "ael_fpl" else "CutMix" if values["cutmix"] else "-"
        table = T_TABLE.get(dataset, {}).get((values["backbone"], row), {})
        assert values["T"] == table.get(values["split"], 0.9), (name, dataset, values)
        seen += values["split"] in table
    assert seen >= 64 + 28


def test_rates_batches_and_steps_are_those_that_acted():
    for name, dataset, values in all_outcomes(SCRIPTS):
        city, cell = dataset == "cityscapes", (name, dataset.removesuffix("_aug"))
        if cell not in RATES:
            continue
        words = "batch_size lr lr_head weight_decay decay_on crop_size ohem_kept output_stride"
        found = [values[word] for word in words.split()]
        found[6] = round(found[6] * values["crop_size"] ** 2)  # pixels
        assert tuple(found) == RATES[cell], (cell, values)
        assert values.get("batch_size_unlabeled") == UNLABELED.get(name)
        if name in FPL_STEPS:
            assert values["total_iters"] == FPL_STEPS[name][city]
        elif values["split"] in STEPS[dataset]:
            alone, semi, one_pass, esl = STEPS[dataset][values["split"]]
            total = esl if name == "esl" else semi
            short = name == "supervised" and values["schedule"] == "paper"
            assert values["total_iters"] == (alone if short else total)
            if "warmup_iters" in values:  # App. A: 1 pass of VOC's 80, 20 of Cityscapes' 200
                none = values.get("consistency") == "mse" or city and values["recipe"] == "official"
                assert values["warmup_iters"] == (0 if none else one_pass * (20 if city else 1))


# ---- layers: field default < preset < recipe < explicit flag ----

FOLLOWERS = {  # flags that presets derive from another one
    "batch_size": "batch_size_unlabeled total_iters warmup_iters rampup_iters",
    "total_iters": "warmup_iters rampup_iters",
    "output_stride": "aspp_rates",
    "backbone": "T",
    "cutmix": "T unsup_weight",
    "unsup_loss": "threshold",
    "consistency": "warmup_iters rampup_iters",
    "schedule": "total_iters",
    "init": "weights",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_explicit_flag_beats_preset_and_recipe_and_changes_no_other(name):
    module, kinds = module_of(name), fields(name)
    others = {bool: (False, True), int: (7, 9), float: (0.625, 1e-9), str: ("some",)}
    for dataset, recipe in itertools.product(SPLITS, ["paper", "official"][: 1 + (name != "esl")]):
        given = dict(dataset=dataset, recipe=recipe, split=SPLITS[dataset][1])
        before = vars(run.resolve(module.Args(**given), module.preset))
        for flag in set(kinds) - {"dataset", "recipe", "split", "labeled_list", "eval_only"}:
            kind = kinds[flag]
            values = others.get(kind) or typing.get_args(kind)
            if typing.get_origin(kind) is tuple:
                values = [(0.625,), (0.5, 0.75)] if number_of(kind) is float else [(3, 4), (2, 7)]
            nothing = NUMBERS[name].get(flag, "").startswith("0 ")  # which is a value too
            for value in [*values, *[several(kind, 0)] * nothing]:
                args = run.resolve(module.Args(**given | {flag: value}), module.preset)
                changed = {key for key, old in before.items() if getattr(args, key) != old}
                assert changed <= {flag, *FOLLOWERS.get(flag, "").split()}, (flag, value)
                assert getattr(args, flag) == value


def test_the_linear_rule_is_printed_and_not_applied(capsys):
    assert resolved(module_of("cps_fpl"), "--dataset camvid --batch-size 8".split()).lr == 0.01
    line = "--lr 0.01 is kept; the linear rule would have 0.02 for this batch\n"
    assert capsys.readouterr().out == line


# ---- which values a flag takes ----


def number_of(kind):
    """Returns int or float, of whichever a flag's values are; else None."""
    kinds = {kind, *typing.get_args(kind)} & {int, float}
    return kinds.pop() if kinds and typing.get_origin(kind) is not typing.Literal else None


def several(kind, value):
    """Returns a value as a flag of this type holds it: alone, in a tuple, or with another one."""
    more = (10**10,) * (typing.get_args(kind) == (int, int))
    return (value, *more) if typing.get_origin(kind) is tuple else value


def refusal(name, flag, value):
    """Returns the line by which a script refuses a flag's value on camvid."""
    with pytest.raises(Refusal) as refused:
        given = {"dataset": "camvid", flag: value}
        run.resolve(module_of(name).Args(**given), module_of(name).preset)
    return str(refused.value)


def own_flags(name):
    """Yields (flag, type) of what the parent has not; of the parent all; no switches and words."""
    shared = {} if name == "supervised" else fields("supervised")
    for field in dataclasses.fields(module_of(name).Args):
        if field.name not in shared and field.type not in (bool, str):
            yield field.name, fields(name)[field.name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_number_out_of_its_range_is_refused_and_its_ends_are_taken(name):
    for flag, kind in own_flags(name):
        number, words = number_of(kind), NUMBERS[name].get(flag, "")
        if " to " not in words:  # ESL's eta is refused in words of its own
            continue
        low, high = (float(word) for word in words.split(" to "))
        wrong, right = [low - 1] if number is int else [low - 1, float("nan")], [number(low)]
        wrong += [0.0] * (number is float and low > 0)
        if high < float("inf"):
            wrong += [high + 1] if number is int else [high * 1.0001, 70.0, float("inf")]
            right.append(number(high))
        for value in wrong:
            value = number(value) if value == value else value
            line = f"--{flag.replace('_', '-')} {value}: a number from {words}"
            assert refusal(name, flag, several(kind, value)) == line
        for value in (several(kind, value) for value in right):
            args = module_of(name).Args(**{"dataset": "camvid", flag: value})
            assert getattr(run.resolve(args, module_of(name).preset), flag) == value


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_word_that_is_no_choice_is_refused_with_the_right_ones(name):
    for flag, kind in own_flags(name):
        if typing.get_origin(kind) is typing.Literal:
            option = "--" + flag.replace("_", "-")
            with pytest.raises(Refusal) as refused:
                run.parse(module_of(name).Args, [option, "fuzy"])
            for word in (option, "fuzy", *typing.get_args(kind)):
                assert str(word) in str(refused.value) and "\n" not in str(refused.value)


# ---- --list-presets, --dry-run ----

SHOWN = {  # U2PL, arXiv:2203.03884v2, Tables 1 to 3
    "mean_teacher": {
        " 52.16  --dataset voc --split 92 --cutmix": "U2PL Table 1, CutMix",
        " 70.96  --dataset voc --split 1464": "U2PL Table 1, MT",
        " 78.15  --dataset cityscapes --split 1/2": "U2PL Table 3, MT",
    },
    "supervised": {" 67.87  --dataset voc_aug --split 1/16": "U2PL Table 2, SupOnly"},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_list_presets_prints_the_papers_results_and_each_resolves(name, capsys):
    train(module_of(name), ["--list-presets"])
    lines = capsys.readouterr().out.splitlines()
    entries = json.loads((ROOT / "common/papers.json").read_text())
    entries = [entry for entry in entries if entry["script"] == name]
    assert len(lines) == sum(len(entry["miou"]) for entry in entries) > 12
    for begin, source in SHOWN.get(name, {}).items():
        assert any(line.startswith(begin) and line.endswith(source) for line in lines)
    cells, parsed = set(), {}
    for line in lines:
        miou, dataset, split, words, source = re.fullmatch(
            r" *([\d.]+)  --dataset (\w+) --split (\S+) (.*?)  +(.*)", line
        ).groups()
        own = [dataset, words.strip(), source]
        (entry,) = (e for e in entries if [e["dataset"], e["flags"], e["source"]] == own)
        assert float(miou) == entry["miou"][split]
        argv = ["--dataset", dataset, *shlex.split(words)]
        if tuple(argv) not in parsed:
            parsed[tuple(argv)] = run.parse(module_of(name).Args, argv)
        args = parsed[tuple(argv)]
        args = run.resolve(run.replace(args, split=split), module_of(name).preset)
        text = run.describe(args, load)
        assert re.search(r"^total_iters +[1-9]\d+", text, re.M), line
        if re.match("FPL Table [123],", source):
            assert re.search(r"^T +0\.(85|9|95)$", text, re.M), line
            assert (args.unsup_loss == "fpl") == ("FPL+" in source), line
            assert name == "ael_fpl" or args.cutmix == ("w/o" not in source), line
            cells.add((dataset, split, args.backbone, args.unsup_loss, "w/o" in source))
    assert len(cells) == {"cps_fpl": 64, "ael_fpl": 28}.get(name, 0)


@pytest.mark.smoke
def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path, monkeypatch, capsys):
    tree = draw_tree(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    train(module_of("mean_teacher"), flags(tree, "") + ["--dry-run", "--cutmix"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    labeled = f"labeled images 2, set {set_hash(['train0', 'train4'])}"
    for line in ("cutmix True", "total_iters 8", "lr 0.01", "split 1/4", labeled):
        assert line in lines
    assert "labelled per process 2" in lines
    assert sorted(tmp_path.rglob("*")) == before


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    GOLDEN.write_text(json.dumps({name: golden(name) for name in SCRIPTS}, indent=1) + "\n")
if GOLDEN.exists():
    NUMBERS = {name: own["numbers"] for name, own in json.loads(GOLDEN.read_text()).items()}
