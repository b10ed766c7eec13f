"""Mutants: small faults put into the product, one at a time; which of them does a test tree notice?

    python tests/mutants_make.py map --tests tests                # first: which test runs what
    python tests/mutants.py run --tests tests --column new        # goes on where it was stopped
    python tests/mutants.py report                                # counts, and what one column lost
    python tests/mutants.py show 17
    python tests/mutants.py check 17 --tests tests                # one mutant; writes nothing
    python tests/mutants.py verify --tests tests --column new     # do the killers pass without one?

Run by hand: a whole run takes an hour of one core. mutants.tsv holds the list and the verdicts. A
mutant changes one operator, constant, comparison or argument, or deletes one line, in every script
that holds the same text. It is known by that text, not by a line number; one whose text is gone is
reported so. Killed: a test fails. Timeout: the limit came first, which counts as not killed.
"""

import argparse
import ast
import contextlib
import copy
import csv
import fcntl
import gc
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings

HERE = Path(__file__).resolve().parent
TABLE = HERE / "mutants.tsv"
NO_PRODUCT = ("__init__.py", "conftest.py")
# what holds texts, pages and results, not the product: a kill there would say nothing of a fault
NOT_FOR_MUTANTS = ("copies", "docs", "pages", "results", "analysis", "compare")
FIELDS = "number file function seam occurrence operator before after equivalent".split()
SEAM = re.compile(r"^ *# (>>>|<<<) method: ([a-z-]+)$", re.M)
CPU, WALL = 40, 180  # seconds for one mutant
ROUNDS = (0, 10, 80, None)  # most mutants end with the first tests, and few files are read for them
WARM = "torch torchvision numpy PIL tyro tqdm scipy.ndimage hypothesis pytest".split()


# ---- statements ----


class Statement(NamedTuple):
    """A statement: of a compound one, its first line alone."""

    node: ast.stmt
    key: tuple  # what finds it again: function, seam, source, which of several such
    top: str  # the text of the function or class of the file that it stands in


def header(node):
    """Returns a copy of a statement with nothing in its body."""
    bare = copy.copy(node)
    for name in ("body", "orelse", "handlers", "finalbody", "decorator_list"):
        if isinstance(getattr(bare, name, None), list):
            setattr(bare, name, [])
    return copy.deepcopy(bare)


def statements(text):
    """Returns the statements of a file but imports, docstrings and `if __name__`."""
    seams, inside = [], ""
    for line in text.splitlines():
        mark = SEAM.match(line)
        if mark:
            inside = mark[2] if mark[1] == ">>>" else ""
        seams.append(inside)
    found, times = [], Counter()

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
            found.append(Statement(node, (*name, times[name]), source))
            times[name] += 1
            for name in ("body", "orelse", "finalbody"):
                visit(getattr(node, name, []), inner, source)
            for handler in getattr(node, "handlers", []):
                visit(handler.body, inner, source)

    visit(ast.parse(text).body, "<module>", "")
    return found


class Product:
    """The texts of the product and their statements."""

    def __init__(self, root):
        paths = [*root.glob("*.py"), *root.glob("common/*.py")]
        paths.sort(key=lambda path: path.stat().st_size)  # of the scripts the parent is first
        self.places = {p.name: p.relative_to(root) for p in paths if p.name not in NO_PRODUCT}
        self.texts = {name: (root / place).read_text() for name, place in self.places.items()}
        self.scripts = [name for name, text in self.texts.items() if SEAM.search(text)]
        self.statements = {
            name: {s.key: s for s in statements(text)} for name, text in self.texts.items()
        }

    def holders(self, name, key):
        """Returns the files with this statement: all scripts with the text that is held equal."""
        having = [other for other, found in self.statements.items() if key in found]
        if name not in having or name not in self.scripts:
            return [name] if name in having else having[:1]  # moved to another file
        top, seam = self.statements[name][key].top, key[1]
        twins = [n for n in having if n in self.scripts]
        return [n for n in twins if not seam or n == name or self.statements[n][key].top == top]

    def mutate(self, mutant):
        """Returns {file: text} of a mutant; {} if what it changes is gone."""
        key = key_of(mutant)
        changed = {}
        for name in self.holders(mutant["file"], key):
            statement = self.statements[name][key]
            changed[name] = spliced(self.texts[name], statement.node, mutant["after"])
        return changed


def key_of(mutant):
    return (mutant["function"], mutant["seam"], mutant["before"], int(mutant["occurrence"]))


def spliced(text, node, after):
    """Returns text with another statement, or another first line, in the place of node's."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    if isinstance(getattr(node, "body", None), list):
        first = node.body[0]
        line = min([first.lineno] + [d.lineno for d in getattr(first, "decorator_list", [])])
        end = starts[line - 1]
        after += "\n"
    whole = b"".join(lines)
    if whole[begin:].startswith(b"elif"):
        after = "el" + after
    return (whole[:begin] + after.encode() + whole[end:]).decode()


def read_table():
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def write_table(rows):
    """Writes beside the table, then over it: a run that is stopped leaves a whole one."""
    columns = FIELDS + sorted({name for row in rows for name in row} - set(FIELDS))
    new = TABLE.with_suffix(".new")
    with new.open("w", newline="") as file:
        lines = ["\t".join(row.get(name) or "" for name in columns) for row in rows]
        file.write("\n".join(["\t".join(columns), *lines]) + "\n")
    new.replace(TABLE)


# ---- running ----


def scratch(root, folder):
    """Copies what git knows or would know of a checkout; dates are made of the contents."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=root, text=True).splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
            if name.endswith(".py"):
                put(folder / name, (root / name).read_text())
    return folder


def put(path, text):
    """Writes a file with a date of its own: Python trusts a compiled file of the same date."""
    path.write_text(text)
    date = zlib.crc32(text.encode()) & 0x7FFFFFFF
    os.utime(path, (date, date))


def test_files(folder, tests):
    found = sorted((folder / tests).rglob("test_*.py"))
    kept = [p for p in found if not any(word in p.stem.split("_") for word in NOT_FOR_MUTANTS)]
    return [str(path.relative_to(folder)) for path in kept]


def enter(folder, output):
    """In a child: a session of its own, in the scratch folder, as if started there."""
    os.setsid()
    os.chdir(folder)
    sys.path[:] = [str(folder)] + [p for p in sys.path if p and Path(p).resolve() != HERE]
    if output:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)


def run_pytest(tests, arguments, plugin):
    settings.register_profile("mutants", derandomize=True, database=None)
    settings.load_profile("mutants")
    places = ["--rootdir", ".", "-o", f"pythonpath=. {tests}", "-o", f"testpaths={tests}"]
    return pytest.main(["-q", "-p", "no:cacheprovider", *places, *arguments], [plugin])


class Chosen:
    """A pytest plugin of `run`: keeps these tests, in this order, and notes how it ended."""

    def __init__(self, order, cpu, answer):
        self.order = {test: number for number, test in enumerate(order)}
        self.cpu = cpu
        self.answer = answer

    def pytest_collection_modifyitems(self, items):
        kept = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(kept, key=lambda item: self.order[item.nodeid])

    def pytest_collectreport(self, report):
        if report.failed:
            self.end("killed", f"{report.nodeid} cannot be read")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.end("killed", report.nodeid)
        elif report.when == "teardown" and sum(os.times()[:4]) > self.cpu:
            self.end("timeout", "")

    def end(self, *words):
        self.answer.write_text("\t".join(words))
        sys.stdout.flush()
        end_children(os.getpid())
        os._exit(0)


def end_children(pid):
    """Ends all that a process has started, and what that has."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            for child in map(int, path.read_text().split()):
                end_children(child)
                os.kill(child, signal.SIGKILL)


def choose(facts, product, mutant):
    """Returns the tests that run what a mutant changes, quick and narrow ones first."""
    key, reach = key_of(mutant), facts["reach"]
    holders = product.holders(mutant["file"], key)
    found = {test for name in holders for test in reach.get(json.dumps((name, key)), [])}
    if not found:  # not in a function: what runs the statements that name it
        word = re.match(r"(?:def |class )?(\w+)", mutant["before"])[1]
        of_function = mutant["before"].startswith("def ")
        for text, tests in reach.items():
            _, (function, _, source, _) = json.loads(text)
            named = re.search(rf"\b{word}\b", source) and not of_function
            if named or of_function and function == mutant["function"]:
                found.update(tests)
    word = re.split(r"[_.]", mutant["file"])[0]

    def order(test):
        seconds, breadth = facts["seconds"].get(test, 0), facts["breadth"][test]
        size = sum(seconds > limit for limit in (0.05, 0.3, 1, 3, 10))
        return seconds > 3, word not in test, size, breadth // 200, test

    return sorted(found - set(facts["failed"]), key=order)


def judge(product, facts, mutant, folder, tests):
    """Returns (verdict, first failing test, seconds of computing) of one mutant."""
    changed = product.mutate(mutant)
    order = choose(facts, product, mutant) if changed else []
    verdict, test, spent, begin = "survived" if changed else "gone", "", 0, time.time()
    for name, text in changed.items():
        put(folder / product.places[name], text)
    for begin_at, end_at in itertools.pairwise(ROUNDS):
        part = order[begin_at:end_at]
        if part and verdict == "survived":
            limits = (CPU - spent, begin + WALL - time.time())
            verdict, test, seconds = in_child(folder, tests, part, *limits)
            spent += seconds
    for name in changed:
        put(folder / product.places[name], product.texts[name])
    return verdict, test, spent


def in_child(folder, tests, order, cpu, wall):
    """Runs tests in a fork of this process, which has imported what is slow to import."""
    answer = folder.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        enter(folder, folder.with_suffix(".out"))
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 1))
        files = sorted({test.partition("::")[0] for test in order})
        chosen = Chosen(order, cpu, answer)
        code = run_pytest(tests, files, chosen)
        if code not in (0, 5):  # 5: no tests
            chosen.end("killed", f"pytest ended with {code}")
        chosen.end("survived", "")
    until, done = time.time() + wall, 0
    while not done:
        time.sleep(0.02)
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if time.time() > until and not done:
            end_children(pid)
            os.kill(pid, signal.SIGKILL)
    seconds = usage.ru_utime + usage.ru_stime
    if answer.exists():
        return *answer.read_text().split("\t"), seconds
    limit = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
    return "timeout" if limit else "killed", "" if limit else "the tests' process ended", seconds


def run(product, args, worker):
    """Judges each mutant that has no verdict yet in a column, this worker's share of them."""
    facts = read_map(args)
    folder = scratch(args.root, args.work / f"{args.tests}{worker}")
    for row in read_table():
        number = int(row["number"])
        done = row.get(args.column) not in ("", None, args.again) or row["equivalent"]
        if done or number % args.workers != worker:
            continue
        verdict, test, seconds = judge(product, facts, row, folder, args.tests)
        print(f"{number:4} {verdict:8} {seconds:5.1f} s {row['file']} {test}", flush=True)
        with (args.work / "lock").open("w") as lock:  # another worker writes too
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = read_table()
            rows[number - 1] |= {args.column: verdict, f"{args.column}_test": test}
            write_table(rows)


def report(rows):
    """Prints counts for each file and column, and the numbers of what only one column kills."""
    for column in [c for c in rows[0] if c not in FIELDS and not c.endswith("_test")]:
        print(f"\n{column}: file, verdicts")
        counts = defaultdict(Counter)
        for row in rows:
            verdict = "equivalent" if row["equivalent"] else row[column] or "not run"
            counts[row["file"]][verdict] += 1
            counts["all"][verdict] += 1
        for name, found in counts.items():
            print(f"  {name:16}", *(f"{k} {v}" for k, v in sorted(found.items())))
        alive = [r["number"] for r in rows if r[column] in ("survived", "timeout")]
        print("  not killed:", *(n for n in alive if not rows[int(n) - 1]["equivalent"]))
    if "old" in rows[0] and "new" in rows[0]:
        lost = [r for r in rows if r["old"] == "killed" and r["new"] not in ("killed", "")]
        print("\nkilled by old, not by new:", *(r["number"] for r in lost))


def verify(rows, args):
    """Runs without a mutant what a column says has failed on one: nothing may fail."""
    tests = {row[f"{args.column}_test"] for row in rows} - {None, ""}
    folder = scratch(args.root, args.work / "true")
    print(*in_child(folder, args.tests, sorted(tests), 10 * CPU, 10 * WALL), len(tests))


def read_map(args):
    """Returns what mutants_make.py has found: seconds, reach and breadth of the tests, failures."""
    facts = json.loads((args.work / f"{args.tests}.json").read_text())
    return facts | dict(breadth=Counter(itertools.chain(*facts["reach"].values())))


def places(parser):
    """Adds the flags that say where all is; returns what the command line says."""
    parser.add_argument("--tests", default="tests", help="folder of the tests, below the root")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the checkout to judge")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mutants")
    args = parser.parse_args()
    args.root, args.work = args.root.resolve(), args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices="run report show check verify".split())
    parser.add_argument("number", type=int, nargs="?", default=1, help="of a mutant")
    parser.add_argument("--column", default="new")
    parser.add_argument("--again", help="a verdict, timeout say, that is to be found anew")
    parser.add_argument("--workers", type=int, default=1)
    args = places(parser)
    product = Product(args.root)
    if args.command == "report":
        return report(read_table())
    mutant = read_table()[args.number - 1]
    if args.command == "show":
        return print(*mutant.items(), list(product.mutate(mutant)) or "gone", sep="\n")
    for name in WARM:
        __import__(name)
    gc.freeze()  # what stands still is not copied in a fork
    if args.command == "verify":
        return verify(read_table(), args)
    if args.command == "check":
        folder = scratch(args.root, args.work / "check")
        return print(*judge(product, read_map(args), mutant, folder, args.tests))
    for worker in range(1, args.workers):
        if not os.fork():
            return run(product, args, worker)
    run(product, args, 0)


if __name__ == "__main__":
    main()
