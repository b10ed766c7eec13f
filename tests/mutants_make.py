"""Makes what mutants.py needs: the list of the mutants, and which test runs which statement.

    python tests/mutants_make.py generate             # writes mutants.tsv anew, without verdicts
    python tests/mutants_make.py map --tests tests    # runs all tests once

Over all functions as many mutants as they have statements, of each kind about as many. The map
comes of marked copies of the product; with it a mutant needs only the tests that run what it
changes.
"""

import argparse
import ast
import json
import os
import random
import re
from collections import Counter, defaultdict

import pytest

from mutants import (
    FIELDS,
    Product,
    enter,
    header,
    places,
    run_pytest,
    scratch,
    test_files,
    write_table,
)

# ---- changes ----

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
SWAPS |= {ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And}
SWAPS |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SWAPS |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In}
SWAPS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is}
NAMES = {"min": "max", "argmax": "argmin", "any": "all", "zeros": "ones", "zeros_like": "ones_like"}
NAMES |= {"sum": "mean", "log1p": "log", "w": "h", "labeled": "unlabeled"}
NAMES |= {b: a for a, b in NAMES.items()}
DROPPED = {"detach", "float", "clamp", "upcast", "sorted", "abs", "round", "masked_fill", "strip"}
DELETED = (ast.Expr, ast.AugAssign, ast.Delete, ast.Raise, ast.Assert, ast.Break, ast.Continue)


def changes(node):
    """Yields (kind, first line after) for all the ways to change one thing in a statement."""
    if isinstance(node, DELETED) or is_setting(node):
        yield "deleted line", "pass"
    before = ast.unparse(header(node)).strip()
    for index in range(len(list(inner(header(node))))):
        for which in range(4):
            tree = header(node)
            kind = change(list(inner(tree))[index], which)
            after = ast.unparse(ast.fix_missing_locations(tree)).strip() if kind else before
            if after != before:
                yield kind, after


def is_setting(node):
    """Returns whether a statement sets a field or an item: without it, the name still exists."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets)


def inner(tree):
    """Yields (node, its parent, field, index) of a statement's expressions; no texts, no types."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns") or isinstance(tree, (ast.JoinedStr, ast.ClassDef)):
            continue
        for index, node in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(node, ast.AST):
                yield node, tree, name, index if isinstance(value, list) else None
                yield from inner(node)


def is_text(node):
    """Returns whether an operation looks like one on texts or paths: another would only crash."""
    for part in (getattr(node, "left", None), getattr(node, "right", None)):
        if isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str):
            return True
    return isinstance(node, ast.BinOp) and re.search("path|folder|root", ast.unparse(node))


def replace(place, new):
    """Puts a new node in the place of one that `inner` gave."""
    _, parent, name, index = place
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new


def change(place, which):
    """Changes one node in the `which`-th way; returns the kind of the change, None if none."""
    node, parent, name, _ = place
    if isinstance(node, ast.BitOr):
        if which == 0 and isinstance(parent, ast.BinOp):  # most join dicts, where order decides
            parent.left, parent.right = parent.right, parent.left
            return "operator"
    elif type(node) in SWAPS and which == 0 and not is_text(parent):
        replace(place, SWAPS[type(node)]())
        return "comparison" if isinstance(node, ast.cmpop) else "operator"
    if isinstance(node, ast.Constant) and which == 0:
        return changed_constant(node)
    if isinstance(node, ast.UnaryOp) and which == 0:
        replace(place, node.operand)
        return "operator"
    if isinstance(node, ast.IfExp) and which == 0:
        node.body, node.orelse = node.orelse, node.body
        return "condition"
    if name == "test" and which == 1 and isinstance(parent, (ast.If, ast.While, ast.IfExp)):
        replace(place, ast.UnaryOp(ast.Not(), node))
        return "condition"
    if isinstance(node, (ast.Name, ast.Attribute)) and which == 2:
        field = "id" if isinstance(node, ast.Name) else "attr"
        other = NAMES.get(getattr(node, field))
        if other and isinstance(node.ctx, ast.Load):
            setattr(node, field, other)
            return "name"
    if isinstance(node, ast.Call):
        return changed_call(place, which)
    return None


def changed_constant(node):
    """Changes a number or a truth value; texts stay."""
    value = node.value
    if isinstance(value, bool):
        node.value = not value
    elif isinstance(value, int):
        node.value = value + 1 if value != 1 else 2 if random.random() < 0.5 else 0
    elif isinstance(value, float):
        node.value = round(value * 1.1, 12) if value else 0.1
    else:
        return None
    return "constant"


def changed_call(place, which):
    """Drops a named argument, else swaps two others; or leaves out the call around its argument."""
    node = place[0]
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    message = called in ("Refusal", "print", "field", "help")
    if which == 0 and node.keywords and not message:
        del node.keywords[random.randrange(len(node.keywords))]
        return "argument"
    if which == 1 and len(node.args) > 1 and not node.keywords and not message:
        node.args[0], node.args[1] = node.args[1], node.args[0]
        return "argument"
    if which == 2 and called in DROPPED:
        kept = node.func.value if isinstance(node.func, ast.Attribute) else node.args[0]
        replace(place, kept)
        return "call left out"
    return None


def generate(product, number, seed):
    """Returns mutants over all functions, as many in each as it has statements."""
    random.seed(seed)
    functions = defaultdict(list)
    for name in product.texts:
        for key, statement in product.statements[name].items():
            if product.holders(name, key)[0] == name:
                options = list(changes(statement.node))
                if options:
                    functions[name, key[0]].append((statement, options))
    total = sum(map(len, functions.values()))
    shares = {f: number * len(found) / total for f, found in functions.items()}
    counts = {f: int(share) for f, share in shares.items()}
    rest = number - sum(counts.values())
    lots = sorted(shares, key=lambda f: random.random() ** (1 / max(shares[f] % 1, 1e-9)))
    counts |= {f: counts[f] + 1 for f in lots[::-1][:rest]}
    used, mutants = Counter(), []
    for (name, function), found in functions.items():
        for statement, options in random.sample(found, counts[name, function]):
            rarest = min(used[kind] for kind, _ in options)
            kind, after = random.choice([o for o in options if used[o[0]] == rarest])
            used[kind] += 1
            _, seam, before, occurrence = statement.key
            values = [len(mutants) + 1, name, function, seam, occurrence, kind, before, after, ""]
            mutant = dict(zip(FIELDS, map(str, values), strict=True))
            for text in product.mutate(mutant).values():
                compile(text, name, "exec")
            mutants.append(mutant)
    return mutants


# ---- which test runs which statement ----

SEEN = """from os import O_APPEND, O_CREAT, O_WRONLY, environ, open, write
FILE = open({log!r}, O_WRONLY | O_CREAT | O_APPEND)
KNOWN = set()
def seen(number):
    data = environ._data
    test = data.get(b"MUTANTS_FIXTURE") or data.get(b"PYTEST_CURRENT_TEST", b"?")
    if (number, test) not in KNOWN:
        KNOWN.add((number, test))
        write(FILE, b"%d\\t%s\\n" % (number, test))
"""


def marked(text, numbers):
    """Returns a text that calls seen(number) before each statement of a function."""
    tree = ast.parse(text)

    def visit(body, inside):
        marks = []
        for node in body:
            name = (type(node).__name__, node.lineno, node.col_offset)
            if inside and name in numbers:
                marks.append(ast.parse(f"__seen__({numbers[name]})").body[0])
            marks.append(node)
            below = (
                isinstance(node, ast.FunctionDef) or inside and not isinstance(node, ast.ClassDef)
            )
            for field in ("body", "orelse", "finalbody"):
                if getattr(node, field, []):
                    setattr(node, field, visit(getattr(node, field), below))
            for handler in getattr(node, "handlers", []):
                handler.body = visit(handler.body, below)
        return marks

    tree.body = visit(tree.body, False)
    after = 1 if ast.get_docstring(tree) else 0
    tree.body.insert(after, ast.parse("from mutants_seen import seen as __seen__").body[0])
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


class Watch:
    """A pytest plugin of `map`: the seconds of each test, and which wide fixtures it uses."""

    def __init__(self):
        self.seconds, self.failed, self.fixtures = Counter(), [], {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        wide = fixturedef.scope != "function" and fixturedef.baseid
        if wide:
            os.environ["MUTANTS_FIXTURE"] = f"{fixturedef.baseid}::{fixturedef.argname}"
        try:
            return (yield)
        finally:
            if wide:
                os.environ.pop("MUTANTS_FIXTURE", None)

    def pytest_collection_modifyitems(self, items):
        for item in items:
            found = item._fixtureinfo.name2fixturedefs.values()
            wide = [d[-1] for d in found if d[-1].scope != "function" and d[-1].baseid]
            self.fixtures[item.nodeid] = [f"{d.baseid}::{d.argname}" for d in wide]

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def make_map(product, args):
    """Runs all tests once on marked files; writes which test ran which statement, and how long."""
    tests, work = args.tests, args.work
    folder = scratch(args.root, work / "map")
    log = work / f"{tests}.log"
    log.unlink(missing_ok=True)
    (folder / "mutants_seen.py").write_text(SEEN.format(log=str(log)))
    names = [(name, key) for name in product.texts for key in product.statements[name]]
    for name, place in product.places.items():
        own = {}
        for number, (other, key) in enumerate(names):
            if other == name:
                node = product.statements[name][key].node
                own[type(node).__name__, node.lineno, node.col_offset] = number
        (folder / place).write_text(marked(product.texts[name], own))
    facts = watched(folder, tests, test_files(folder, tests))
    reach = defaultdict(set)
    for line in log.read_bytes().decode(errors="replace").splitlines():
        number, _, test = line.partition("\t")
        reach[re.sub(r" \((setup|call|teardown)\)$", "", test)].add(int(number))
    found = defaultdict(list)
    for test, fixtures in facts["fixtures"].items():
        for number in set().union(reach[test], *(reach[name] for name in fixtures)):
            found[json.dumps(names[number])].append(test)
    failed = facts["failed"]  # of the marks or of themselves: once more, without marks
    failed = failed and watched(scratch(args.root, folder), tests, failed)["failed"]
    (work / f"{tests}.json").write_text(json.dumps(facts | dict(reach=found, failed=failed)))
    print(f"{len(facts['seconds'])} tests, {len(found)} statements of {len(names)} run")
    print("fail without a mutant, left out:", *failed, sep="\n  ")


def watched(folder, tests, arguments):
    """Runs tests in a fork; returns what Watch has seen."""
    answer = folder.with_suffix(".answer")
    if pid := os.fork():
        os.waitpid(pid, 0)
        return json.loads(answer.read_text())
    enter(folder, None)
    os.environ["PYTHONPATH"] = str(folder)
    watch = Watch()
    run_pytest(tests, arguments, watch)
    answer.write_text(json.dumps(vars(watch)))
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices=["generate", "map"])
    parser.add_argument("--number", type=int, default=330)
    parser.add_argument("--seed", type=int, default=0)
    args = places(parser)
    product = Product(args.root)
    if args.command == "map":
        return make_map(product, args)
    write_table(generate(product, args.number, args.seed))


if __name__ == "__main__":
    main()
