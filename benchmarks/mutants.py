"""Mutants: small faults put into the product, one at a time; which of them do the tests notice?

    python benchmarks/mutants.py generate          # writes the list, results/mutants.tsv, anew
    python benchmarks/mutants.py map               # which test runs which statement
    python benchmarks/mutants.py run --column new  # resumable; ends with the counts

Run by hand: a whole run takes some hours of one core. A mutant changes one operator, constant or
argument, or deletes one line, in every script that holds the same text, by which it is known: gone
if the product has none. Timeout: the limit came before a test failed, which counts as not killed.
"""

import argparse
import ast
import contextlib
import copy
import csv
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(os.environ.get("MUTANTS", f"{tempfile.gettempdir()}/mutants"))  # a folder
TABLE = ROOT / "results/mutants.tsv"
FIELDS = "number file function seam occurrence operator before after equivalent".split()
SEAM = re.compile(r"^ *# (>>>|<<<) method: ([a-z-]+)$", re.M)
NUMBER = 330
LIMIT = 60  # seconds for one mutant
# what holds texts and pages, not the product: a kill there would say nothing of a fault
NOT_FOR_MUTANTS = ("test_copies.py", "test_pages.py")


# ---- the product, by its statements ----


def header(node):
    """Returns a copy of a statement with nothing in its body: of a compound one, its first line."""
    bare = copy.copy(node)
    for name in vars(node).keys() & {"body", "orelse", "handlers", "finalbody", "decorator_list"}:
        setattr(bare, name, [])
    return copy.deepcopy(bare)


def statements(text):
    """Returns {key: (node, text of the function or class of the file around it, in a function)}.

    A key finds a statement again: function, seam, source, which of several such. Left out: imports,
    docstrings and `if __name__`.
    """
    seams, inside = [], ""
    for line in text.split("\n"):
        if mark := SEAM.match(line):
            inside = mark[2] if mark[1] == ">>>" else ""
        seams.append(inside)
    found, times = {}, Counter()

    def visit(parent, function, top, runs):
        for node in ast.iter_child_nodes(parent):
            constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            if constant or main or isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            inner, source = function, top
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{function}.{node.name}".removeprefix("<module>.")
                source = top or ast.get_source_segment(text, node)
            if isinstance(node, ast.stmt):
                name = (inner, seams[node.lineno - 1], ast.unparse(header(node)).strip())
                found[(*name, times[name])] = (node, source, runs)
                times[name] += 1
            visit(node, inner, source, runs or isinstance(node, ast.FunctionDef))

    visit(ast.parse(text), "<module>", "", False)
    return found


def first_line(node):
    return min(one.lineno for one in (node, *getattr(node, "decorator_list", [])))


def spliced(text, node, after):
    """Returns text with another statement, or another first line, in the place of node's."""
    lines = text.split("\n")
    begin, end = node.lineno - 1, node.end_lineno
    if hasattr(node, "body"):
        end = first_line(node.body[0]) - 1
    el = "el" * lines[begin].lstrip().startswith("elif")
    lines[begin:end] = [" " * node.col_offset + el + after]
    return "\n".join(lines)


class Product:
    """The texts of the product and their statements."""

    def __init__(self):
        paths = [*ROOT.glob("*.py"), *ROOT.glob("common/[!_]*.py")]
        paths.sort(key=lambda path: path.stat().st_size)  # of the scripts the parent is first
        self.places = {path.name: path.relative_to(ROOT) for path in paths}
        self.texts = {path.name: path.read_text() for path in paths}
        self.statements = {name: statements(text) for name, text in self.texts.items()}

    def holders(self, name, key):
        """Returns the files with this statement: all scripts with the text that is held equal."""
        having = [other for other, found in self.statements.items() if key in found]
        scripts = [other for other in having if SEAM.search(self.texts[other])]
        if name not in scripts:
            return [name] if name in having else []
        tops = {other: self.statements[other][key][1] for other in scripts}
        return [other for other in scripts if not key[1] or tops[other] == tops[name]]

    def mutate(self, mutant):
        """Returns {file: text} of a mutant; {} if what it changes is gone."""
        key = key_of(mutant)
        found = {}
        for name in self.holders(mutant["file"], key):
            node = self.statements[name][key][0]
            found[name] = spliced(self.texts[name], node, mutant["after"])
        return found


def key_of(mutant):
    return (mutant["function"], mutant["seam"], mutant["before"], int(mutant["occurrence"]))


# ---- the list ----

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
SWAPS |= {ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And}
SWAPS |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SWAPS |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In}
SWAPS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is}
DELETED = (ast.Expr, ast.AugAssign, ast.Delete, ast.Raise, ast.Assert, ast.Break, ast.Continue)


def changes(node):
    """Yields (kind, first line after) for the ways to change one thing in a statement."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    setting = any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in targets)
    if setting or isinstance(node, DELETED):
        yield "deleted line", "pass"
    head = header(node)
    if isinstance(node, (ast.Try, ast.ClassDef)) or "\n" in ast.unparse(head).strip():
        return
    texts = [part for part in ast.walk(head) if isinstance(part, ast.JoinedStr)]
    in_texts = {part for text in texts for part in ast.walk(text)}
    for part in ast.walk(head):
        for kind, field, value in alternatives(part) if part not in in_texts else ():
            before = getattr(part, field)
            setattr(part, field, value)
            yield kind, ast.unparse(head).strip()
            setattr(part, field, before)


def alternatives(node):
    """Yields (kind, field, another value for it) for a node."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield "operator", "op", SWAPS[type(node.op)]()
    if isinstance(node, ast.UnaryOp):  # twice is not at all
        yield "operator", "operand", ast.UnaryOp(node.op, node.operand)
    if isinstance(node, ast.Compare):
        yield "comparison", "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        whole = isinstance(node.value, int) or node.value == 0
        yield "constant", "value", node.value + 1 if whole else round(1.1 * node.value, 12)
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield "condition", "test", ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.Call):
        for word in node.keywords:
            yield "argument", "keywords", [other for other in node.keywords if other is not word]


def generate():
    """Writes mutants over all statements alike, of each kind about as many, without verdicts."""
    random.seed(0)
    product, options = Product(), {}
    for name, found in product.statements.items():
        for key, (node, *_) in found.items():
            if product.holders(name, key)[0] == name:
                options[name, key] = list(changes(node))
    used, mutants = Counter(), []
    for name, key in random.sample([place for place in options if options[place]], NUMBER):
        random.shuffle(options[name, key])
        kind, after = min(options[name, key], key=lambda option: used[option[0]])
        used[kind] += 1
        function, seam, before, occurrence = key
        values = (len(mutants) + 1, name, function, seam, occurrence, kind, before, after, "")
        mutants.append(dict(zip(FIELDS, map(str, values), strict=True)))
        for text in product.mutate(mutants[-1]).values():
            compile(text, name, "exec")
    write_table(mutants)


def read_table():
    lines = TABLE.read_text().splitlines()
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def write_table(rows):
    """Writes beside the table, then over it: a run that is stopped leaves a whole one."""
    columns = dict.fromkeys(name for row in rows for name in row)
    lines = ["\t".join(row.get(name, "") for name in columns) for row in rows]
    new = TABLE.with_suffix(".new")
    new.write_text("\n".join(["\t".join(columns), *lines]) + "\n")
    new.replace(TABLE)


# ---- tests, on a copy of the checkout ----

# of pytest, and what marked files call: a line for each test that ends, and for what it runs
PLUGIN = """
import json
from os import O_APPEND, O_CREAT, O_WRONLY, environ, open, write
FILE = open({log!r}, O_WRONLY | O_CREAT | O_APPEND)
KNOWN = set()
def seen(number):
    test = environ._data.get(b"PYTEST_CURRENT_TEST", b"?")  # not decoded: this is called often
    if (number, test) not in KNOWN:
        KNOWN.add((number, test))
        write(FILE, (json.dumps([number, test.decode()]) + "\\n").encode())
def pytest_runtest_logreport(report):
    line = [report.nodeid, report.duration, report.failed]
    write(FILE, (json.dumps(line) + "\\n").encode())
"""


def scratch(name):
    """Copies the checkout into a folder of this name in WORK; returns it."""
    shutil.rmtree(WORK / name, ignore_errors=True)
    left_out = shutil.ignore_patterns(".*", "runs", "data", "shared", "__pycache__")
    return shutil.copytree(ROOT, WORK / name, ignore=left_out)


def put(path, text):
    """Writes a file; what Python has compiled of it before could have the same date and size."""
    path.write_text(text)
    Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)


def run_tests(folder, tests, *flags, limit=None):
    """Runs tests in a process; returns (its exit code, None at the limit; the lines of PLUGIN)."""
    log = folder.with_suffix(".log")
    log.write_text("")
    put(folder / "mutants_plugin.py", PLUGIN.format(log=str(log)))
    words = "-m pytest -n 0 -p no:cacheprovider -p mutants_plugin".split()
    more = dict(cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, start_new_session=True)
    with open(folder.with_suffix(".out"), "w") as out:
        command = [sys.executable, *words, *flags, *tests]
        process = subprocess.Popen(command, stdout=out, stderr=out, **more)
    code = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also where this is stopped
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
    return code, [json.loads(line) for line in log.read_text().splitlines()]


# ---- the map ----


def marked(text, nodes):
    """Returns a text that calls seen(number) before each of {number: statement}."""
    lines = text.split("\n")
    for number, node in sorted(nodes.items(), key=lambda pair: -pair[1].lineno):
        line = first_line(node) - 1
        indent, elif_, _ = lines[line].partition("elif")
        if not elif_ or indent.strip():  # before an elif stands no statement
            mark = f"__import__('mutants_plugin').seen({number})"
            lines.insert(line, " " * node.col_offset + mark)
    return "\n".join(lines)


def make_map():
    """Runs all tests once on marked files; writes which test ran which statement, and how long.

    What is run before the first test of a file (its fixtures) is run for all of them.
    """
    product, folder = Product(), scratch("map")
    names = []
    for name, found in product.statements.items():
        nodes = {len(names) + i: node for i, (node, _, runs) in enumerate(found.values()) if runs}
        names += [json.dumps((name, key)) for key in found]
        put(folder / product.places[name], marked(product.texts[name], nodes))
    files = [path.name for path in (folder / "tests").glob("test_*.py")]
    tests = [f"tests/{name}" for name in files if name not in NOT_FOR_MUTANTS]
    seconds, failed, ran = Counter(), set(), defaultdict(set)
    for first, second, *rest in run_tests(folder, tests)[1]:
        if rest:
            seconds[first] += second
            failed |= {first} if rest[0] else set()
            continue
        test, _, phase = second.rpartition(" ")
        ran[test.partition("::")[0] if phase == "(setup)" else test].add(first)
    reach = defaultdict(list)
    for test in seconds:
        for number in ran[test] | ran[test.partition("::")[0]]:
            reach[names[number]].append(test)
    if failed:  # of the marks or of themselves: once more, without marks
        again = run_tests(scratch("map"), sorted(failed))[1]
        failed = {test for test, _, bad in again if bad}
    facts = dict(seconds=seconds, failed=sorted(failed), reach=reach)
    (WORK / "tests.json").write_text(json.dumps(facts))
    print(f"{len(seconds)} tests, {len(reach)} statements of {len(names)} run")
    print("fail without a mutant, left out:", *facts["failed"], sep="\n  ")


# ---- verdicts ----


def choose(facts, product, mutant):
    """Returns the tests that run what a mutant changes: what killed it before, then quick ones."""
    key, reach = key_of(mutant), facts["reach"]
    holders = product.holders(mutant["file"], key)
    found = {test for name in holders for test in reach.get(json.dumps((name, key)), [])}
    if not found:  # not in a function: what runs its function, or statements that name it
        names = {re.match(r"(?:def |class )?(\w+)", mutant["before"])[1]}
        for function, _, source, _ in product.statements[mutant["file"]]:
            words = re.findall(r"\w+", source)
            if function == "<module>" and names & set(words[1:]):
                names.add(words[0])  # what is made of it: DATASETS of VOC
        for place, tests in reach.items():
            _, (function, _, source, _) = json.loads(place)
            if function == mutant["function"] or names & set(re.findall(r"\w+", source)):
                found.update(tests)
        found.update(test for test in facts["seconds"] if "/test_recipes.py" in test)  # all flags
    killers = [test.partition("[")[0] for name, test in mutant.items() if name.endswith("_test")]
    chosen = sorted(found - set(facts["failed"]), key=facts["seconds"].get)
    return sorted(chosen, key=lambda test: test.partition("[")[0] not in killers)


def judge(product, facts, mutant, folder):
    """Returns (verdict, first failing test) of one mutant."""
    changed = product.mutate(mutant)
    if not changed:
        return "gone", ""
    for name, text in changed.items():
        put(folder / product.places[name], text)
    order = choose(facts, product, mutant)
    verdict, failed = "survived", []
    for part in (order[:20], order[20:]):  # for the first ones few files are read
        if part and verdict == "survived":
            code, lines = run_tests(folder, part, "-x", limit=LIMIT)
            failed = [test for test, _, bad in lines if bad]
            verdict = {None: "timeout", 0: "survived", 5: "survived"}.get(code, "killed")
    for name in changed:
        put(folder / product.places[name], product.texts[name])
    return ("killed", failed[0]) if failed else (verdict, "")


def run(column):
    """Judges each mutant that has no verdict yet in a column."""
    product, rows, folder = Product(), read_table(), scratch("run")
    facts = json.loads((WORK / "tests.json").read_text())
    for row in rows:
        if not row.get(column) and not row["equivalent"]:
            verdict, test = judge(product, facts, row, folder)
            print(f"{row['number']:>4} {verdict:8} {row['file']} {test}", flush=True)
            row |= {column: verdict, f"{column}_test": test}
            write_table(rows)
    found = ["equivalent" if row["equivalent"] else row[column] for row in rows]
    print(*(f"{count} {word}" for word, count in Counter(found).items()), sep=", ")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices=["generate", "map", "run"])
    parser.add_argument("--column", default="new")
    args = parser.parse_args()
    if args.command == "run":
        return run(args.column)
    {"generate": generate, "map": make_map}[args.command]()


if __name__ == "__main__":
    main()
