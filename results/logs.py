"""Logs of runs: read, grouped by what differs but the seed, and named by it."""

import glob
import json
from pathlib import Path
from typing import NamedTuple

from common import Refusal
from common.data import FACTS
from common.flags import NO_NUMBER

NO_RECIPE = (*NO_NUMBER, "seed")  # runs that differ in these alone are of one recipe


class Log(NamedTuple):
    """A run's log. done is None while the run is not finished."""

    path: Path
    start: dict
    train: list
    evals: list
    done: dict | None

    @property
    def name(self):
        """The run folder's name, or the file's."""
        path = self.path.resolve()
        return path.parent.name if path.name == "log.jsonl" else path.stem

    @property
    def on(self):
        """Which images the final scores are of: test, or val where there is none."""
        if self.done:
            return self.done["on"]
        return "test" if self.start["lists"]["test"][0] else "val"

    @property
    def step(self):
        """The last step that the log knows of."""
        return max([0, *(line["step"] for line in (*self.train, *self.evals))])

    @property
    def recipe(self):
        """What a run of another seed has in common with this one, as text."""
        args = {k: v for k, v in self.start["args"].items() if k not in NO_RECIPE}
        names = self.start.get("classes") or FACTS[args["dataset"]].get("classes")
        return json.dumps([self.start["script"], args, self.start["lists"], names], sort_keys=True)

    @property
    def classes(self):
        """Names of the classes; older logs have them from the data set's facts, or numbers."""
        known = FACTS[self.start["args"]["dataset"]].get("classes")
        count = len(self.evals[0]["iou"])
        return self.start.get("classes") or known or [f"class {i}" for i in range(count)]


def read(place):
    """Returns the Log of a run folder or a log file. Raises Refusal.

    The last line may be half written, as that of a run that is under way.
    """
    path = Path(place)
    if path.is_dir():
        path = path / "log.jsonl"
    try:
        *lines, last = path.read_text().split("\n")
        entries = [json.loads(line) for line in lines]
        start = entries[0]
        if start["kind"] != "start":
            raise ValueError("its first line is none of kind start")
        dict(start["args"], script=start["script"], **start["lists"])
        if isinstance(start["args"].get("T"), float):  # of an older run: of the several by now one
            start["args"]["T"] = [start["args"]["T"]]
        kinds = {}
        for entry in entries:
            kinds.setdefault(entry["kind"], []).append(entry)
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise Refusal(f"{place}: no log of a run ({why}); give a run's folder") from None
    done = kinds.get("done", [None])[-1]
    return Log(path, start, kinds.get("train", []), kinds.get("eval", []), done)


def expanded(place):
    """Returns the paths that a pattern stands for, as Windows' shells leave it to the program."""
    if Path(place).exists():
        return [place]
    return sorted(glob.glob(str(place))) or [place]


def read_all(places):
    """Returns the Logs of run folders or log files, each given once. Raises Refusal."""
    if not places:
        raise Refusal("RUN...: give folders of runs, or their logs")
    places = [found for place in places for found in expanded(place)]
    logs = [read(place) for place in places]
    seen = {}
    for place, log in zip(places, logs, strict=True):
        other = seen.setdefault(log.path.resolve(), place)
        if other is not place:
            raise Refusal(f"{place}: given twice")
    return logs


def grouped(logs):
    """Returns lists of Logs, as first given: those that differ by seed alone, by seed."""
    groups = {}
    for log in logs:
        groups.setdefault(log.recipe, []).append(log)
    return [sorted(group, key=lambda log: log.start["args"]["seed"]) for group in groups.values()]


def notes(groups):
    """Returns lines that say what a reader of means over seeds has to know."""
    lines = []
    for group in groups:
        texts = {(log.start["sha256"], log.start.get("common")) for log in group}
        if len(texts) > 1:
            names = ", ".join(str(log.path) for log in group)
            lines.append(f"note: {names}: by {len(texts)} different texts of the script or common/")
        worlds = {log.start.get("world", 1) for log in group}
        if len(worlds) > 1:  # docs/scaling.md says what they change
            names = ", ".join(str(log.path) for log in group)
            lines.append(f"note: {names}: by different numbers of processes {sorted(worlds)}")
        seeds = [log.start["args"]["seed"] for log in group]
        if len(set(seeds)) < len(seeds):
            lines.append(f"note: {group[0].path}: seeds {seeds}, one more than once")
        for log in group:
            total = log.start["args"]["total_iters"]
            if not log.done:
                lines.append(f"note: {log.path}: not finished, step {log.step} of {total}")
    return lines


def unlike(groups):
    """Returns for each group {flag: value}, the flags that differ between groups of its script.

    Those that nobody gave on a command line are left out, as they follow from others, where the
    given ones tell the groups apart. Of groups of different scripts dataset and split alone are
    compared: each script has a recipe. A flag that an older log does not have yet differs from
    nothing.
    """
    every = differing([group[0].start for group in groups])
    words = {word for group in groups for log in group for word in log.start["argv"]}
    given = {w.partition("=")[0].removeprefix("--").removeprefix("no-") for w in words}
    given = {word.replace("-", "_") for word in given}
    found = []
    for own in every:
        found.append({flag: value for flag, value in own.items() if flag in given})
    keys = [(group[0].start["script"], own) for group, own in zip(groups, found, strict=True)]
    for i, key in enumerate(keys):
        if keys.count(key) > 1:
            found[i] = every[i]
    return found


def differing(starts):
    """Returns for each first line of a log {flag: value}, all that differ as `unlike` says."""
    found = []
    for start in starts:
        own = {}
        for flag, value in start["args"].items():
            others = [s for s in starts if flag in s["args"]]
            if flag not in ("dataset", "split"):
                others = [s for s in others if s["script"] == start["script"]]
            if flag not in NO_RECIPE and any(s["args"][flag] != value for s in others):
                own[flag] = value
        found.append(own)
    return found


def in_words(flag, value):
    """Returns a flag and its value as text."""
    if isinstance(value, bool):
        return flag if value else f"no {flag}"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"{flag} {value}"


def labels(groups):
    """Returns a name for each group: what differs between them; the folder where nothing does."""
    scripts = {group[0].start["script"] for group in groups}
    texts = []
    for group, own in zip(groups, unlike(groups), strict=True):
        words = [in_words(*pair) for pair in own.items()]
        if len(scripts) > 1 or not words:
            words.insert(0, Path(group[0].start["script"]).stem)
        texts.append(", ".join(words))
    named = []
    for group, text in zip(groups, texts, strict=True):
        if texts.count(text) > 1:
            text = f"{text} ({group[0].name})"
        if len(group) > 1:
            text = f"{text}, {len(group)} seeds"
        named.append(text)
    return named


def spread(values, digits=2):
    """Returns the mean of numbers and, of several, their range, as text; "-" of none."""
    if not values:
        return "-"
    text = f"{sum(values) / len(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text
