"""The command line: parse, fill from the recipe, check ranges, explain. It knows no method's flag.

A script's Args declares what a flag takes at the field: `lr: Above0 | None = None  # sentence`.
"""

import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro

from common import Refusal, note
from common.checkpoints import load_checkpoint
from common.distributed import Group, share
from common.sources import load


class Range(NamedTuple):
    """The numbers that a flag takes, both ends included."""

    low: float
    high: float = math.inf


class Rising(NamedTuple):
    """The numbers of a flag rise; strict: none comes twice."""

    strict: bool = False


class Words(NamedTuple):
    """The words that a flag takes: one of these, or any that begins so."""

    words: tuple
    prefix: str


Count = Annotated[int, Range(1)]
Number = Annotated[int, Range(0)]  # whole, or none
Seed = Annotated[int, Range(0, 2**32 - 1)]  # torch's CPU generator keeps 32 bits
AtLeast0 = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(1e-12)]
Share = Annotated[float, Range(0, 1)]
Inside01 = Annotated[float, Range(1e-12, 0.9999)]  # neither nothing nor all
Backbone = Annotated[str, Words(("resnet18", "resnet50", "resnet101"), "timm/")]
Scales = Annotated[tuple[Above0, ...], Rising()]

# flags that change speed, output and rounding alone: these may change at a resume
NO_NUMBER = """out resume eval_only checkpoint eval_on dry_run list_presets device workers data_root
cache log_every save_every pictures_every tensorboard track fused""".split()

# what --eval-only has no use for, beside where weights come from
OF_TRAINING = """init resume out lr lr_head weight_decay decay_on log_every eval_every save_every
pictures_every tensorboard track compile""".split()

# what a run is of, not how: these are no part of a folder's name, or have their own place in it
OF = "dataset split seed num_classes ignore_index".split()
LONGEST = 135  # characters of a name: file systems take 255 bytes, encrypted ones 143


def cli(kind, argv=None, **more):
    """Returns what tyro.cli makes of the flags; its box around a mistake becomes a Refusal.

    Raises Refusal for a number outside the range that its field declares, too.
    """
    found = None
    with contextlib.redirect_stderr(io.StringIO()) as text:
        try:
            found = tyro.cli(kind, args=argv, **more)
        except SystemExit as stop:
            if stop.code != 2:  # --help
                raise
    if found is not None:
        check_ranges(found)
        return found
    lines = [line.strip("│ ") for line in text.getvalue().splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰─"]
    ends = [i for i, line in enumerate(lines) if line.startswith(("Argument help", "For full"))]
    raise Refusal(" ".join(lines[: min(ends, default=None)]).replace(" .", "."))


def parse(cls, preset, argv=None):
    """Returns cls filled from the flags; with --eval-only a checkpoint's stand below them.

    --help prints every flag with the value that it would have beside the others, and exits.
    """
    if argv is None:
        argv = sys.argv[1:]
    asked = {"-h", "--help"} & set(argv)
    args = cli(cls, [word for word in argv if word not in asked])
    if asked:
        print(explain(cls, merge(args, preset)))
        raise SystemExit(0)
    if not args.eval_only and (args.checkpoint or args.eval_on != "val"):
        raise Refusal("--checkpoint, --eval-on: with --eval-only; --init starts from a checkpoint")
    if not args.eval_only:
        return args
    given = given_names(args, argv)
    idle = [flag_of(n) for n in vars(args) if n in given & {*OF_TRAINING, *without_weights(given)}]
    if idle:
        raise Refusal(f"{', '.join(idle)}: of no use with --eval-only, which trains nothing")
    if not args.checkpoint:
        raise Refusal("--eval-only needs --checkpoint FILE")
    saved = as_fields(cls, load_checkpoint(args.checkpoint, inspect.getfile(cls))["args"])
    kept = set(saved) & set(vars(args)) - (set(NO_NUMBER) - {"data_root", "workers"})
    saved = {name: saved[name] for name in kept} | without_weights(vars(args))
    return cli(cls, argv, default=replace(args, **saved))


def flag_of(name):
    """Returns the flag of a field's name, as one types it."""
    return "--" + name.replace("_", "-")


def as_fields(cls, saved):
    """Returns a checkpoint's flags, {name: JSON value}, as cls has them: lists are tuples.

    A number where the flag takes several by now (--T of older runs) is the only one of them.
    """
    several = {field.name for field in fields(cls) if "tuple[" in str(field.type)}
    found = dict(saved)
    for name, value in saved.items():
        if isinstance(value, list):
            found[name] = tuple(value)
        elif name in several and isinstance(value, float):
            found[name] = (value,)
    return found


def merge(args, preset):
    """Returns args with what preset(args), a dict, has for a field that is None."""
    if args.labeled_list and args.split is None:
        args = replace(args, split="list")
    values = preset(args)
    if args.init:
        values.update(without_weights(values))
    return replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})


def without_weights(names):
    """Returns {flag: "none"} for those of these flags that say where weights come from."""
    return {name: "none" for name in names if name.partition("_")[0] == "weights"}


def fill(args, preset, argv=None):
    """Returns args with every None filled: field default < preset < recipe < explicit flag.

    preset: function of args to a dict. Raises Refusal for a field that nothing sets, for a number
    outside the range that its field declares, and for a flag of argv that cannot act.
    """
    filled = merge(args, preset)
    given = given_names(args, argv)
    advise_batch(args, preset)
    check_ranges(filled)
    for name in vars(filled):
        if getattr(filled, name) is None and name != "split_seed" and not args.list_presets:
            raise Refusal(f"no preset of {args.dataset} sets {flag_of(name)}: give a value")
    check_needs(filled, given)
    return filled


def check_needs(args, given):
    """Raises Refusal for the first flag of those given that cannot act, as NEEDS of args says."""
    for name in vars(args):
        need = type(args).NEEDS.get(name, "")
        if name in given and not met(need, args, given):
            words = f"{flag_of(name)} {getattr(args, name)}".removesuffix(" True")
            if getattr(args, name) is False:
                words = flag_of(f"no_{name}")
            raise Refusal(f"{words} does nothing {in_words(need)}")


def given_names(args, argv=None):
    """Returns the names of the flags in argv whose value is not the field's own default.

    argv: words; None: those of the command line.
    """
    if argv is None:
        argv = sys.argv[1:]
    defaults = {field.name: field.default for field in fields(args)}
    names = set()
    for word in argv:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        names.update({name, name.removeprefix("no_")})
    return {n for n in names & set(defaults) if getattr(args, n) != defaults[n]}


# what NEEDS of a script says a flag needs, all of it, separated by ", ": "cutmix" (it is not 0),
# "label=soft|hard" (one of these), "split!=all|list" (none of these), "a<b", "no total_iters" (not
# given), "never"


def met(need, args, given=()):
    """Returns whether what a flag needs holds."""
    return all(clause_met(clause, args, given) for clause in need.split(", ") if clause)


def clause_met(clause, args, given):
    """Returns whether one clause of a need holds."""
    if clause == "never":
        return False
    if clause.startswith("no "):
        return clause[3:] not in given
    name, sign, value = re.match(r"(\w+)(!=|=|<|)(.*)", clause).groups()
    own = getattr(args, name)
    if sign == "<":
        return own < getattr(args, value)
    if sign == "=":
        return str(own) in value.split("|")
    if sign == "!=":
        return str(own) not in value.split("|")
    return bool(own)


def in_words(need):
    """Returns where a flag acts, in the words that one would type."""
    if need == "never":
        return "in this script"
    clauses = []
    for clause in need.split(", "):
        name, sign, value = re.match(r"(?:no )?(\w+)(!=|=|<|)(.*)", clause).groups()
        flag = flag_of(name)
        if clause.startswith("no "):
            flag = f"no {flag}"
        elif sign == "!=":
            flag += " other than " + value.replace("|", " or ")
        elif sign == "<":
            flag += f" below {flag_of(value)}"
        elif sign:
            flag += " " + value.replace("|", " or ")
        clauses.append(flag)
    return "here: it needs " + " and ".join(clauses)


def acting(args):
    """Returns the flags that act, as a dict of JSON values."""
    needs = type(args).NEEDS
    return {name: value for name, value in plain(args).items() if met(needs.get(name, ""), args)}


def run_name(script, args, preset, argv=None):
    """Returns <script>-<dataset>-<split>-<what differs>-s<seed>, the name of a run's folder.

    What differs are the flags of argv, in the order of Args, that act and whose value is not the
    one that they would have if left out. Longer names are cut, with a hash of the whole.
    """
    given = given_names(args, argv)
    acts = acting(args)
    words = [Path(script).stem, args.dataset, args.split]
    for field in fields(args):
        if field.name in given and field.name in acts and field.name not in (*NO_NUMBER, *OF):
            others = {name: getattr(args, name) for name in given - {field.name}}
            left_out = getattr(merge(type(args)(**others), preset), field.name)
            value = getattr(args, field.name)
            if value != left_out:
                words.append(in_a_name(field.name, value))
    name = re.sub(r"[^\w.-]+", "_", "-".join(words), flags=re.ASCII)
    end = f"-s{args.seed}"
    if len(name + end) > LONGEST:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: LONGEST - len(digest) - 1 - len(end)]}-{digest}"
    return name + end


def in_a_name(flag, value):
    """Returns a flag and its value as they stand in a name: lr0.02, no_cutmix, weight_linear."""
    if isinstance(value, bool):
        return flag if value else f"no_{flag}"
    if isinstance(value, str):  # of a path its last two parts
        return f"{flag}_{'_'.join(Path(value).parts[-2:])}"
    if isinstance(value, tuple):
        return flag + "_".join(map(str, value))
    return f"{flag}{value}"


def advise_batch(args, preset):
    """Says what another batch size leaves and what it moves: --lr stays, a number of passes too."""
    usual = preset(replace(args, batch_size=None))
    batch = usual.get("batch_size")
    if not batch or args.batch_size in (None, batch):
        return
    if args.lr is None and (lr := usual.get("lr")):
        rate = lr * args.batch_size / batch
        text = f"--lr {lr:g} is kept; the linear rule would have {rate:g} for this batch"
        note(text, sys.stdout)
    steps = preset(args).get("total_iters")
    usual_steps = usual.get("total_iters")
    if args.total_iters is None and steps != usual_steps:
        text = f"--total-iters {steps}: the recipe has {usual_steps} for a batch of {batch}"
        note(text, sys.stdout)


def rules(kind):
    """Returns all rules of an annotation, in whatever it is wrapped."""
    if get_origin(kind) is not Annotated:
        return [rule for inner in get_args(kind) for rule in rules(inner)]
    inner, *notes = get_args(kind)
    return [note for note in notes if isinstance(note, (Range, Rising, Words))] + rules(inner)


def check_ranges(args):
    """Raises Refusal where a flag that is set breaks a rule of its field."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        if value is not None:
            check(flag_of(name), value, rules(kind))


def check(flag, value, wanted):
    """Raises Refusal if a value, a number or a tuple of them, breaks one of the rules."""
    numbers = value if isinstance(value, tuple) else [value]
    for rule in wanted:
        if isinstance(rule, Rising):
            if not numbers or list(numbers) != sorted(numbers):
                raise Refusal(f"{flag} {value}: one number or more, rising")
            if rule.strict and len(set(numbers)) < len(numbers):
                raise Refusal(f"{flag} {value}: rising, none twice")
        elif isinstance(rule, Words):
            if value not in rule.words and not value.startswith(rule.prefix):
                raise Refusal(f"{flag} {value}: {', '.join(rule.words)} or {rule.prefix}NAME")
        else:
            for number in numbers:
                if not rule.low <= number <= rule.high:
                    raise Refusal(f"{flag} {number}: a number from {rule.low:g} to {rule.high}")


def check_fit(args, world, num_classes):
    """Raises Refusal where flags do not fit the number of processes or that of classes.

    By what a script's Args declares. PAIRS: what has to hold, as in NEEDS, for a process to mix its
    unlabelled images in pairs. GROUPS: flags that say how many labelled images are a group.
    BELOW_CLASSES: flags that would leave nothing out if they had all classes.
    """
    script = type(args)
    if met(getattr(script, "PAIRS", "never"), args) and args.batch_size_unlabeled % (2 * world):
        raise Refusal("CutMix mixes pairs: an even --batch-size-unlabeled for every process")
    for name in getattr(script, "GROUPS", ()):
        if args.batch_size // world % getattr(args, name):
            raise Refusal(
                f"{flag_of(name)} {getattr(args, name)}: {args.batch_size // world} labelled "
                "images per process do not divide"
            )
    for name in getattr(script, "BELOW_CLASSES", ()):
        value = getattr(args, name)
        if met(script.NEEDS[name], args) and value >= num_classes:
            raise Refusal(f"{flag_of(name)} {value}: a number below {num_classes}, the classes")


def plain(args):
    """Returns the flags as a dict of JSON values (tuples become lists)."""
    return json.loads(json.dumps(asdict(args)))


# ---- what --help, --dry-run and --list-presets print ----


def explain(cls, args):
    """Returns --help: each flag in its group, with its sentence and its value in args."""
    script = Path(sys.argv[0]).name
    lines = [f"usage: python {script} [flags]", "", inspect.getdoc(cls)]
    lines.append("[In brackets: the values for the flags given on this command line.]")
    sentence = ""
    for line in inspect.getsource(cls).splitlines():
        text = line.strip()
        if text.startswith("# -- "):
            lines += ["", text.strip("# -")]
        elif text.startswith("# ") and ">>>" not in text and "<<<" not in text:
            sentence = text[2:]  # of the field below, whose own line has no room for it
        match = re.match(r"(\w+): [^#]+(?:  # (.+))?$", text)
        if match and match[1] in vars(args):
            lines += flag_lines(cls, match[1], match[2] or sentence, getattr(args, match[1]))
    return "\n".join(lines)


def flag_lines(cls, name, sentence, value):
    """Returns the lines of one flag: its sentence and value; the words that it takes, if few."""
    flag = flag_of(name)
    kind = next(field.type for field in fields(cls) if field.name == name)
    if kind is bool:
        flag = f"--[no-]{flag[2:]}"
        value = "on" if value else "off"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    ending = "" if value in ("", None) else f" [{value}]"
    lines = [f"  {flag:24} {sentence}{ending}"]
    for literal in (kind, *get_args(kind)):
        if get_origin(literal) is Literal:
            lines.append(" " * 29 + " | ".join(map(str, get_args(literal))))
    return lines


def about(args, script):
    """Does what --dry-run or --list-presets ask of a script (a path). Raises Refusal."""
    if os.environ.get("RANK", "0") != "0":
        return
    if args.list_presets:
        print(papers_results(script))
    else:
        describe(args)


def describe(args):
    """Prints the flags that act, images per process and what is found on the disk."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdecimal() or world == "0":
        raise Refusal(f"WORLD_SIZE {world} not set as torchrun does: start with torchrun")
    rows = {name: value for name, value in acting(args).items() if value not in ("", None)}
    group = Group(0, int(world), None)
    rows["labelled per process"] = share(args.batch_size, group, "labelled")
    if "batch_size_unlabeled" in rows:
        rows["unlabelled per process"] = share(args.batch_size_unlabeled, group, "unlabelled")
    for name, value in rows.items():
        print(f"{name:22} {value}")
    data = load(args)
    check_fit(args, group.world, data.num_classes)
    for name, (count, key) in data.hashes().items():
        if count:
            print(f"{name + ' images':22} {count}, set {key}")


def papers_results(script):
    """Returns the papers' results for a script, flags and mIoU, as lines."""
    lines = []
    for entry in json.loads((Path(__file__).parent / "papers.json").read_text()):
        if entry["script"] != Path(script).stem:
            continue
        for split, miou in entry["miou"].items():
            flags = f"--dataset {entry['dataset']} --split {split} {entry['flags']}"
            lines.append(f"{miou:6.2f}  {flags:82}  {entry['source']}")
    return "\n".join(lines) or f"common/papers.json has no results for {Path(script).name}"
