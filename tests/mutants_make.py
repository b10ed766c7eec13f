"""Makes what mutants.py needs: the list of the mutants, and which test runs which statement.

    python tests/mutants_make.py generate    # writes mutants.tsv anew, without verdicts
    python tests/mutants_make.py map         # runs all tests once, on marked copies of the product

The mutants are spread over all statements, of each kind about as many. With the map a mutant needs
only the tests that run what it changes.
"""

import argparse
import ast
import json
import random
from collections import Counter, defaultdict

from mutants import FIELDS, WORK, Product, blocks, header, in_child, scratch, write_table

NUMBER = 330
# what holds texts, pages and results, not the product: a kill there would say nothing of a fault
NOT_FOR_MUTANTS = ("test_copies.py", "test_pages.py", "test_results.py")

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
SWAPS |= {ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And}
SWAPS |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SWAPS |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In}
SWAPS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is}
DELETED = (ast.Expr, ast.AugAssign, ast.Delete, ast.Raise, ast.Assert, ast.Break, ast.Continue)


def changes(statement):
    """Yields (kind, first line after) for the ways to change one thing in a statement."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    setting = any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets)
    if setting or isinstance(statement, DELETED):
        yield "deleted line", "pass"
    before = ast.unparse(header(statement)).strip()
    if isinstance(statement, (ast.Try, ast.ClassDef)) or "\n" in before:
        return
    tree = ast.parse("def f():\n " + before + " pass" * bool(blocks(statement)))
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {part for text in texts for part in ast.walk(text)}
    line = before.encode()  # ast counts columns in bytes
    for node in ast.walk(tree):
        for kind, old, new in alternatives(node) if node not in inside else ():
            begin, end = (column - 1 for column in (old.col_offset, old.end_col_offset))
            after = line[:begin] + f"({ast.unparse(new)})".encode() + line[end:]
            yield kind, after.decode()


def alternatives(node):
    """Yields (kind, expression, another for it) for a node."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        other = SWAPS[type(node.op)]()
        binary = isinstance(node, ast.BinOp)
        new = ast.BinOp(node.left, other, node.right) if binary else ast.BoolOp(other, node.values)
        yield "operator", node, new
    if isinstance(node, ast.Compare):
        ops = [SWAPS[type(node.ops[0])](), *node.ops[1:]]
        yield "comparison", node, ast.Compare(node.left, ops, node.comparators)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", node, ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        other = round(1.1 * node.value, 12)
        if isinstance(node.value, int) or node.value == 0:
            other = node.value + 1
        yield "constant", node, ast.Constant(other)
    if isinstance(node, ast.UnaryOp):
        yield "operator", node, node.operand
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield "condition", node.test, ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.Call):
        for word in node.keywords:
            kept = [other for other in node.keywords if other is not word]
            yield "argument", node, ast.Call(node.func, node.args, kept)


def generate(product):
    """Returns mutants over all statements alike, of each kind about as many."""
    options = {}
    for name, found in product.statements.items():
        for key, (node, _) in found.items():
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
    return mutants


SEEN = """from os import O_APPEND, O_CREAT, O_WRONLY, environ, open, write
FILE = open({log!r}, O_WRONLY | O_CREAT | O_APPEND)
KNOWN = set()
def seen(number):
    test = environ._data.get(b"PYTEST_CURRENT_TEST", b"?")
    if (number, test) not in KNOWN:
        KNOWN.add((number, test))
        write(FILE, b"%d\\t%s\\n" % (number, test))
"""


def marked(text, numbers):
    """Returns a text that calls seen(number) before each statement of a function."""
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    below = [block for f in functions for node in ast.walk(f) for block in blocks(node)]
    for block in {id(block): block for block in below}.values():
        for node in list(block):
            if (node.lineno, node.col_offset) in numbers:
                mark = ast.parse(f"__seen__({numbers[node.lineno, node.col_offset]})").body
                block[block.index(node) : block.index(node)] = mark
    after = 1 if ast.get_docstring(tree) else 0
    tree.body[after:after] = ast.parse("from mutants_seen import seen as __seen__").body
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


class Watch:
    """A pytest plugin: the seconds of each test, and what has failed."""

    def __init__(self, files):
        self.files = files
        self.seconds, self.failed = Counter(), []

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self):
        self.answer.write_text(json.dumps(dict(seconds=self.seconds, failed=self.failed)))


def make_map(product):
    """Runs all tests once on marked files; writes which test ran which statement, and how long.

    What is run before the first test of a file (its fixtures) is run for all of them.
    """
    folder, log = scratch("map"), WORK / "seen.log"
    log.unlink(missing_ok=True)
    (folder / "mutants_seen.py").write_text(SEEN.format(log=str(log)))
    names = []
    for name, found in product.statements.items():
        own = {(n.lineno, n.col_offset): len(names) + i for i, (n, _) in enumerate(found.values())}
        names += [json.dumps((name, key)) for key in found]
        (folder / product.places[name]).write_text(marked(product.texts[name], own))
    files = sorted(path.name for path in (folder / "tests").glob("test_*.py"))
    files = [f"tests/{name}" for name in files if name not in NOT_FOR_MUTANTS]
    facts = json.loads(in_child(folder, Watch(files)))
    ran = defaultdict(set)
    for line in log.read_bytes().decode(errors="replace").splitlines():
        number, _, test = line.partition("\t")
        test, _, phase = test.rpartition(" ")
        ran[test.partition("::")[0] if phase == "(setup)" else test].add(int(number))
    reach = defaultdict(list)
    for test in facts["seconds"]:
        for number in ran[test] | ran[test.partition("::")[0]]:
            reach[names[number]].append(test)
    if facts["failed"]:  # of the marks or of themselves: once more, without marks
        facts["failed"] = json.loads(in_child(scratch("map"), Watch(facts["failed"])))["failed"]
    (WORK / "tests.json").write_text(json.dumps(facts | dict(reach=reach)))
    print(f"{len(facts['seconds'])} tests, {len(reach)} statements of {len(names)} run")
    print("fail without a mutant, left out:", *facts["failed"], sep="\n  ")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices=["generate", "map"])
    if parser.parse_args().command == "map":
        return make_map(Product())
    random.seed(0)
    write_table(generate(Product()))


if __name__ == "__main__":
    main()
