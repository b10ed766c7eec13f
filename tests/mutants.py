"""Mutants: small faults put into the product, one at a time; which of them do the tests notice?

    python tests/mutants_make.py generate       # the list, tests/mutants.tsv
    python tests/mutants_make.py map            # which test runs what
    python tests/mutants.py run --column new    # goes on where it was stopped
    python tests/mutants.py report

Run by hand: a whole run takes an hour of one core. A mutant changes one operator, constant or
argument, or deletes one line, in every script that holds the same text, by which it is known: gone
if the product has none. Timeout: the limit came before a test failed, which counts as not killed.
"""

import argparse
import ast
import copy
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = Path(os.environ.get("MUTANTS", f"{tempfile.gettempdir()}/mutants"))  # a folder
TABLE = HERE / "mutants.tsv"
FIELDS = "number file function seam occurrence operator before after equivalent".split()
SEAM = re.compile(r"^ *# (>>>|<<<) method: ([a-z-]+)$", re.M)
LIMIT = 60  # seconds for one mutant
WARM = "torch torchvision numpy PIL tyro tqdm scipy.ndimage".split()  # imported once, before forks


def header(node):
    """Returns a copy of a statement with nothing in its body: of a compound one, its first line."""
    bare = copy.copy(node)
    for name in ("body", "orelse", "handlers", "finalbody", "decorator_list"):
        if isinstance(getattr(bare, name, None), list):
            setattr(bare, name, [])
    return copy.deepcopy(bare)


def blocks(node):
    """Returns the lists of statements that stand directly below a node."""
    found = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
    found += [handler.body for handler in getattr(node, "handlers", [])]
    return [block for block in found if isinstance(block, list)]


def statements(text):
    """Returns {key: (node, text of the function or class of the file that it stands in)}.

    A key finds a statement again: function, seam, source, which of several such. Left out: imports,
    docstrings and `if __name__`.
    """
    seams, inside = [], ""
    for line in text.splitlines():
        if mark := SEAM.match(line):
            inside = mark[2] if mark[1] == ">>>" else ""
        seams.append(inside)
    found, times = {}, Counter()

    def visit(body, function, top):
        for node in body:
            constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            if constant or main or isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            inner, source = function, top
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{function}.{node.name}".removeprefix("<module>.")
                source = top or ast.get_source_segment(text, node)
            name = (inner, seams[node.lineno - 1], ast.unparse(header(node)).strip())
            found[(*name, times[name])] = (node, source)
            times[name] += 1
            for block in blocks(node):
                visit(block, inner, source)

    visit(ast.parse(text).body, "<module>", "")
    return found


class Product:
    """The texts of the product and their statements."""

    def __init__(self):
        paths = [*ROOT.glob("*.py"), *ROOT.glob("common/[!_]*.py")]
        paths.sort(key=lambda path: path.stat().st_size)  # of the scripts the parent is first
        self.places = {path.name: path.relative_to(ROOT) for path in paths}
        self.texts = {path.name: path.read_text() for path in paths}
        self.scripts = [name for name, text in self.texts.items() if SEAM.search(text)]
        self.statements = {name: statements(text) for name, text in self.texts.items()}

    def holders(self, name, key):
        """Returns the files with this statement: all scripts with the text that is held equal."""
        having = [other for other, found in self.statements.items() if key in found]
        if name not in having or name not in self.scripts:
            return [name] if name in having else []
        tops = {n: self.statements[n][key][1] for n in having if n in self.scripts}
        return [n for n in tops if not key[1] or tops[n] == tops[name]]

    def mutate(self, mutant):
        """Returns {file: text} of a mutant; {} if what it changes is gone."""
        found = {}
        for name in self.holders(mutant["file"], key_of(mutant)):
            node, _ = self.statements[name][key_of(mutant)]
            found[name] = spliced(self.texts[name], node, mutant["after"])
        return found


def key_of(mutant):
    return (mutant["function"], mutant["seam"], mutant["before"], int(mutant["occurrence"]))


def spliced(text, node, after):
    """Returns text with another statement, or another first line, in the place of node's."""
    lines = text.encode().splitlines(keepends=True)  # ast counts columns in bytes
    begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    if blocks(node):
        first = node.body[0]
        line = min(n.lineno for n in (first, *getattr(first, "decorator_list", [])))
        end = sum(map(len, lines[: line - 1]))
        after += "\n"
    whole = b"".join(lines)
    if whole[begin:].startswith(b"elif"):
        after = "el" + after
    return (whole[:begin] + after.encode() + whole[end:]).decode()


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


def scratch(name):
    """Copies the checkout into a folder of this name in WORK; returns it."""
    shutil.rmtree(WORK / name, ignore_errors=True)
    left_out = shutil.ignore_patterns(".*", "runs", "data", "shared", "__pycache__")
    return shutil.copytree(ROOT, WORK / name, ignore=left_out)


def put(path, text):
    """Writes a file; what Python has compiled of it before could have the same date and size."""
    path.write_text(text)
    Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)


class Chosen:
    """A pytest plugin: runs these tests in this order; the first that fails is its answer."""

    def __init__(self, order):
        self.order = {test: number for number, test in enumerate(order)}
        self.files = sorted({test.partition("::")[0] for test in order})

    def pytest_collection_modifyitems(self, items):
        kept = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(kept, key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.end(f"killed\t{report.nodeid}")

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus in (0, 5):  # 5: no tests
            self.end("survived\t")

    def end(self, text):
        """Writes the answer; ends this process and what it has started."""
        self.answer.write_text(text)
        os.killpg(0, signal.SIGKILL)


def in_child(folder, plugin, limit=0):
    """Runs pytest on plugin.files in a fork, for some seconds; returns the plugin's answer."""
    plugin.answer = folder.with_suffix(".answer")
    plugin.answer.write_text("killed\ta file of tests, or the process of the tests")
    if pid := os.fork():
        os.waitpid(pid, 0)
        return plugin.answer.read_text()
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder)] + [p for p in sys.path if p and Path(p).resolve() != HERE]
    output = os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGALRM, lambda *_: plugin.end("timeout\t"))
    signal.alarm(limit)
    pytest.main(["-n", "0", "-p", "no:cacheprovider", "--rootdir", ".", *plugin.files], [plugin])
    os._exit(1)


def choose(facts, product, mutant):
    """Returns the tests that run what a mutant changes: what killed it before, then quick ones."""
    key, reach = key_of(mutant), facts["reach"]
    holders = product.holders(mutant["file"], key)
    found = {test for name in holders for test in reach.get(json.dumps((name, key)), [])}
    if not found:  # not in a function: what runs its function, or statements that name it
        word = re.match(r"(?:def |class )?(\w+)", mutant["before"])[1]
        for place, tests in reach.items():
            _, (function, _, source, _) = json.loads(place)
            if function == mutant["function"] or re.search(rf"\b{word}\b", source):
                found.update(tests)
    killers = [test for name, test in mutant.items() if name.endswith("_test")]
    chosen = sorted(found - set(facts["failed"]), key=facts["seconds"].get)
    return sorted(chosen, key=lambda test: test not in killers)


def judge(product, facts, mutant, folder):
    """Returns (verdict, first failing test) of one mutant."""
    changed = product.mutate(mutant)
    order = choose(facts, product, mutant) if changed else []
    answer = "survived\t" if changed else "gone\t"
    for name, text in changed.items():
        put(folder / product.places[name], text)
    for part in (order[:10], order[10:80], order[80:]):  # for the first ones few files are read
        if part and answer == "survived\t":
            answer = in_child(folder, Chosen(part), LIMIT)
    for name in changed:
        put(folder / product.places[name], product.texts[name])
    return answer.split("\t")


def run(column):
    """Judges each mutant that has no verdict yet in a column."""
    product, rows, folder = Product(), read_table(), scratch("run")
    facts = json.loads((WORK / "tests.json").read_text())
    for name in WARM:
        __import__(name)
    for row in rows:
        if not row.get(column) and not row["equivalent"]:
            verdict, test = judge(product, facts, row, folder)
            print(f"{row['number']:>4} {verdict:8} {row['file']} {test}", flush=True)
            row |= {column: verdict, f"{column}_test": test}
            write_table(rows)


def report(rows):
    """Prints for each column its verdicts, and the numbers of what is not killed."""
    for column in [name[:-5] for name in rows[0] if name.endswith("_test")]:
        found = {r["number"]: "equivalent" if r["equivalent"] else r[column] for r in rows}
        counts = Counter(found.values())
        print(f"{column}:", *(f"{count} {word or 'not run'}" for word, count in counts.items()))
        print("  not killed:", *(n for n, word in found.items() if word in ("survived", "timeout")))


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--column", default="new")
    args = parser.parse_args()
    if args.command == "report":
        report(read_table())
    else:
        run(args.column)


if __name__ == "__main__":
    main()
