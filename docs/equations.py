"""Writes docs/equations.md: every numbered equation, algorithm and table, function and test.

    python docs/equations.py [--write]

What is where is read from docstrings, comments and common/papers.json. A new script needs no line
below: it says whose an equation is ("UniMatch Eq. (1)"), or it is FPL's.
"""

import ast
import functools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/equations.md"
NUMBERED = {  # all that a paper numbers; of AEL and ESL's tables, not at hand, what is known
    "FPL": "Eq. 1-16, Alg. 1-1, Table 1-6",
    "FPL supplement": "Eq. 1-10, Table 1-7",
    "U2PL": "Eq. 1-16, Eq. A1-A1, Alg. 1-1, Table 1-7, Table A1-A8",
    "AEL": "Eq. 1-1, Eq. 4-7, Eq. 9-9, Eq. 12-13, Table 6-6",
    "ESL": "Eq. 1-12",
    "ESL supplement": "Table 1-3",
}
NOT_HERE = {
    "FPL Eq. (10)": "a range of the weight's argument, used by nothing; it fails where n = 1 "
    "(docs/cps_fpl.md, D24; tests/test_results.py counts)",
    "AEL Eq. (5)": "confidence by margin: the released code has that of Eq. (4) alone",
    "AEL Eq. (6)": "confidence by entropy: as Eq. (5)",
}
RESTATED = {  # the same thing in other words; tests/test_results.py compares them
    "FPL Eq. (4)": "FPL Eq. (7)",  # the aim
    "FPL Eq. (5)": "FPL Eq. (7)",  # before Eq. (6) makes it smooth
    "FPL supplement Eq. (2)": "FPL supplement Eq. (1)",
    "FPL supplement Eq. (3)": "FPL Eq. (7)",
    "FPL supplement Eq. (5)": "FPL Eq. (8)",  # in probabilities
}
DEFAULT = {"supervised": "U2PL", "mean_teacher": "U2PL", "ael_fpl": "AEL", "u2pl": "U2PL"}
DEFAULT |= {"u2pl_ael": "U2PL", "esl": "ESL", "ranks": "U2PL", "contrastive": "U2PL"}
# all others: FPL
FIRST = ["supervised.py", "mean_teacher.py", "cps_fpl.py"]  # a text of many scripts is theirs
VALUES = "test_equations.py: test_value_and_gradient"  # of what a loss has inside, too
STEP = "test_steps.py: test_every_step_is_the_literal_one"  # of main
FLAGS = "test_run.py: test_every_flag_has_an_effect_and_two_equal_runs_none"
CELLS = (
    "test_recipes.py: test_list_presets_prints_the_papers_results_and_their_flags_are_the_papers"
)
CITED = re.compile(
    r"\b(?P<paper>FPL|AEL|ESL|U2PL|[A-Z][\w&]*[A-Z]\w*(?= (Eq\.|Alg\.|Sec\.|App\.|Table) ))\b"
    r"|(?P<supplement>\b[Ss]upp(lement|\.))"
    r"|(?P<kind>Eq\.|Alg\.|Table|Sec\.|App\.)s? "
    r"(?P<numbers>\(?A?\d+[\d.]*\d*\)?((, | and | to |-)\(?A?\d+\)?)*|[A-F]\b)"
)
HEAD = """# Every equation and its test

What the papers number, what computes it here, and a test that fails when it is wrong: written by
`python docs/equations.py --write` from docstrings and comments, which cite the papers.
`--list-presets`: a table's entries with their flags. A text that stands in several scripts is named
once, in the first. Of {total} items {absent} have no function. AEL and ESL's main paper were not at
hand: of AEL what an audit of it names is listed, of ESL its equations, and its tables, whose
numbers are not known, stand in `python esl.py --list-presets`.
"""


def numbers_of(text):
    """Yields "1", "2", "3" and "A1" of "(1)-(3), (A1)"."""
    for part in re.split(r", | and ", re.sub("[()]", "", text)):
        first, *last = re.split(" to |-", part)
        if not last:
            yield first.rstrip(".")
            continue
        letter = "A" if first.startswith("A") else ""
        for number in range(int(first.strip("A")), int(last[0].strip("A")) + 1):
            yield f"{letter}{number}"


@functools.cache
def parsed(path):
    """Returns the statements of a file."""
    return ast.parse(path.read_text()).body


def item(paper, kind, number):
    return f"{paper} {kind} ({number})" if kind == "Eq." else f"{paper} {kind} {number}"


def all_items():
    """Returns all numbered items of the papers in NUMBERED, in their order."""
    found = []
    for paper, text in NUMBERED.items():
        for part in text.split(", "):
            kind, numbers = part.split(" ")
            found += [item(paper, kind, number) for number in numbers_of(numbers)]
    return found


ITEMS = all_items()


def cited(text, paper):
    """Yields (item, its place in text) of all that text cites; paper: whose, if it does not say."""
    supplement = ""
    for match in CITED.finditer(text):
        if match["paper"]:
            paper = match["paper"]
            supplement = ""
        elif match["supplement"]:
            supplement = " supplement"
        else:
            for number in numbers_of(match["numbers"]):
                name = item(paper + supplement, match["kind"], number)
                if name not in ITEMS and supplement:
                    name = item(paper, match["kind"], number)
                if paper not in NUMBERED or match["kind"] not in ("Sec.", "App."):
                    yield name, match.start()


def comments(path, node):
    """Returns the comments inside a statement of a file."""
    lines = path.read_text().splitlines()[node.lineno - 1 : node.end_lineno]
    found = [re.search(r"(?:^|\s)(# .*)", line) for line in lines]
    return [match[1] for match in found if match]


def definitions(path):
    """Yields (name, [(text, rank)]) of a file's functions, classes and tables.

    rank: 0, a docstring; 2, a comment in a function; 3, of a table; 4, of the flags.
    """
    for node in parsed(path):
        if isinstance(node, ast.FunctionDef):
            texts = [(text, 2) for text in comments(path, node)]
            yield node.name, [(ast.get_docstring(node) or "", 0), *texts]
        elif isinstance(node, ast.ClassDef):
            texts = [(text, 4) for text in comments(path, node)]
            yield node.name, [(ast.get_docstring(node) or "", 0), *texts]
        elif isinstance(node, ast.Assign):
            yield ast.unparse(node.targets[0]), [("\n".join(comments(path, node)), 3)]


@functools.cache
def places():
    """Returns {item: [(rank, name, path)]}, the best first; ranks of definitions, and 1 and 5.

    1: a docstring that does not begin with it. 5: in benchmarks/. A text of several scripts is its
    first one's.
    """
    paths = [ROOT / name for name in FIRST]
    paths += [path for path in sorted(ROOT.glob("*.py")) if path not in paths]
    paths += sorted(ROOT.glob("results/*.py")) + sorted(ROOT.glob("benchmarks/*.py"))
    found = {}
    seen = set()
    for path in paths:
        for name, texts in definitions(path):
            shared = path.parent == ROOT and name.islower() and name != "main"
            if shared and name in seen:
                continue
            if shared:
                seen.add(name)
            for text, rank in texts:
                for key, start in cited(text, DEFAULT.get(path.stem, "FPL")):
                    later = rank == 0 and start > 30
                    own = 5 if path.parent.name == "benchmarks" else rank + later
                    found.setdefault(key, []).append((own, name, path))
    for entry in json.loads((ROOT / "common/papers.json").read_text()):
        for key, _ in cited(entry["source"].split(",")[0], "FPL"):
            place = (3, "--list-presets", ROOT / f"{entry['script']}.py")
            if place not in found.setdefault(key, []):
                found[key].append(place)
    return {key: sorted(places, key=lambda place: place[0]) for key, places in found.items()}


@functools.cache
def uses(node):
    """Returns the names that a statement of a test file uses: "helper", "script.function"."""
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            names.add(inner.id)
        elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            names.add(f"{inner.value.id}.{inner.attr}")
    return names


@functools.cache
def read_tests():
    """Returns [("file.py: test", names that it uses, itself or through its file's helpers)]."""
    first = ["equations", "borders", "draws", "results"]
    paths = list(ROOT.glob("tests/test_*.py"))
    paths.sort(key=lambda path: (*(path.stem != f"test_{name}" for name in first), path.name))
    found = []
    for path in paths:
        known = {}
        for node in parsed(path):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                known[node.name] = uses(node)
            elif isinstance(node, ast.Assign):
                known[ast.unparse(node.targets[0])] = uses(node)
        for name in [name for name in known if name.startswith("test_")]:
            reached = {name}
            while added := {n for r in reached for n in known.get(r, ())} - reached:
                reached |= added
            found.append((f"{path.name}: {name}", reached))
    return found


def test_of(name, path, tests):
    """Returns the first test that uses a function of a file, or else what calls it; or ""."""
    known = {"main": STEP, "Args": FLAGS, "--list-presets": CELLS}
    known |= dict.fromkeys(("adaptive_weight", "fuzzy_positive_loss"), VALUES)
    if name in known:
        return known[name]
    if name.isupper():
        return CELLS  # what a table says is in the flags of the entries
    scripts = [script.stem for script in ROOT.glob("*.py")]  # which may share the text
    modules = ["of", path.stem, *scripts] if path.parent == ROOT else [path.stem]
    callers = [name]
    for caller in callers:  # the function itself, then what calls it, and so on
        wanted = {f"{module}.{caller}" for module in modules}
        test = next((test for test, reached in tests if wanted & reached), "")
        if test:
            return test
        for node in parsed(path):
            if isinstance(node, ast.FunctionDef) and caller in uses(node):
                callers += {node.name} - {*callers, "main"}
    return ""


def row(key, found, tests):
    """Returns a row of the page; key: "FPL Eq. (7)"."""
    short = re.search(r"(Eq|Alg|Table|Sec|App).*", key)[0]
    if key in NOT_HERE:
        return f"| {short} | not here: {NOT_HERE[key]} | | |"
    restated = RESTATED.get(key)
    best = found.get(restated or key, [])
    best = [place for place in best if place[0] == best[0][0]]
    names = list(dict.fromkeys(f"`{name}`" for _, name, _ in best))[:3]
    files = list(dict.fromkeys(str(path.relative_to(ROOT)) for _, _, path in best))[:3]
    held = dict.fromkeys(test_of(name, path, tests) for _, name, path in best)
    test = ", ".join([one for one in held if one][:3])
    words = ", ".join(names) + (f" (restates {restated})" if restated else "")
    return f"| {short} | {words} | {', '.join(files)} | {test} |"


def page():
    """Returns docs/equations.md. An item that nothing computes, or no test, has empty cells."""
    found = places()
    tests = read_tests()
    text = HEAD.format(total=len(ITEMS), absent=len(NOT_HERE))
    others = sorted(set(found) - set(ITEMS))
    for paper in dict.fromkeys(
        re.split(r" (?:Eq|Alg|Table|Sec|App)\b", key)[0] for key in [*ITEMS, *others]
    ):
        text += f"\n## {paper}\n\n| paper | here | file | test |\n|-|-|-|-|\n"
        keys = [
            key for key in [*ITEMS, *others] if re.match(rf"{paper} (Eq|Alg|Table|Sec|App)", key)
        ]
        text += "".join(row(key, found, tests) + "\n" for key in keys)
    return text


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--write"]):
        sys.exit(f"equations.py {' '.join(sys.argv[1:])}: --write or nothing")
    if sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(page(), end="")
