"""Copies are held by machine: outside the seams all scripts are one text, the parent's.

The docstring is a seam by itself. Section 1 may import more than the parent's.

python tests/test_copies.py             # every check; prints what differs
python tests/test_copies.py --fix       # rewrite the shared text of all scripts from the parent
python tests/test_copies.py --show cps_fpl   # only what a script adds
"""

import ast
import difflib
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARENT = "supervised.py"
SCRIPTS = ["supervised.py", "mean_teacher.py", "cps_fpl.py", "ael_fpl.py", "u2pl.py", "esl.py"]
SEAMS = ("args needs recipe functions head draw networks state losses after-step panels").split()
IMPORTS = "# ---- 1. Imports"
RECIPE = "# ---- 2. Recipe"
# caps count statements: a packed assignment each of its parts, a call over many lines is one, and
# so is the table of flags
SCRIPT = 620
FUNCTION = 40  # main excepted
COMMANDS = {"prepare_data.py": 495, "convert.py": 495, "predict.py": 355}
ROOMS = COMMANDS | {"common/": 1780, "fused.py": 200, "track.py": 75, "outputs.py": 380}
EXCEPTIONS = {"ael_fpl.py": 678, "u2pl.py": 645, "esl.py": 675}  # none is to be added
# over all scripts and common/, per 100 lines
PACKED = 0.6  # a, b = x, y
TERNARIES = 1.2
SEAM = re.compile(r"^( *# >>> method: ([a-z-]+)\n)(.*?)^( *# <<< method: \2\n)", re.M | re.S)


def split(text, name):
    """Returns (shared text from section 2 on, {seam: its text}). Raises ValueError."""
    seams = {match[2]: match[3] for match in SEAM.finditer(text)}
    marks = re.findall("(?:>>>|<<<) method.*", text)
    expected = [f"{arrow} method: {seam}" for seam in SEAMS for arrow in (">>>", "<<<")]
    if marks != expected or list(seams) != SEAMS:
        wrong = [mark for mark in marks if mark not in expected or marks.count(mark) > 1]
        raise ValueError(f"{name}: seams {list(seams)} instead of {SEAMS}, strange marks {wrong}")
    if text.count(IMPORTS) != 1 or text.count(RECIPE) != 1:
        raise ValueError(f"{name}: sections 1 and 2 do not stand there once each")
    return SEAM.sub(r"\1\4", RECIPE + text.partition(RECIPE)[2]), seams


def join(text, parent):
    """Returns a script with the shared text of the parent; its imports stay as they are."""
    shared, _ = split(parent, PARENT)
    _, seams = split(text, "")
    docstring, _, section = text.partition(RECIPE)[0].partition(IMPORTS)
    body = SEAM.sub(lambda match: match[1] + seams[match[2]] + match[4], shared)
    return f"{docstring}{IMPORTS}{section}{body}"


def lacking(text, parent):
    """Returns the imports of the parent, a name a line, that a script uses and has not."""
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    missing = imports(parent) - imports(text)
    return {line for line in missing if line.split()[-1].partition(".")[0] in used}


def imports(text):
    """Returns what a script imports: one line for each name."""
    lines = set()
    for node in ast.parse(text.partition(RECIPE)[0]).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                alone = type(node)(**vars(node) | {"names": [alias]})
                lines.add(ast.unparse(alone))
    return lines


def differences(texts):
    """Returns messages: texts {name: text}, the parent among them. [] if all copies are equal."""
    found, first_seen = [], {}
    parent, _ = split(texts[PARENT], PARENT)
    for name, text in texts.items():
        shared, _ = split(text, name)
        if shared != parent:
            two = (text.splitlines(keepends=True) for text in (parent, shared))
            lines = "".join(difflib.unified_diff(*two, PARENT, name, n=0))
            found.append(f"{name} differs from {PARENT} outside the seams:\n{lines[:2000]}")
        for line in sorted(lacking(text, texts[PARENT])):
            found.append(f"{name} lacks {line}")
        for word, source in definitions(text).items():
            first, other = first_seen.setdefault(word, (name, source))
            if other != source and ">>> method" not in source:
                found.append(f"{word} in {name} is not the {word} of {first}")
    return found


def definitions(text):
    """Returns {name: source} of the functions and classes that are one text in all scripts."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "preset":
            begin = min(n.lineno for n in (node, *node.decorator_list))
            found[node.name] = "\n".join(lines[begin - 1 : node.end_lineno])
    if "u2pl_recipe" in found:  # the tables that it reads go with it
        found["u2pl_recipe"] += text.partition("# fmt: off\n")[2].partition("# fmt: on\n")[0]
    return found


def statements(tree):
    """Returns how many statements stand below a node of ast; docstrings and flags are none."""
    total = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Args" and node is not tree:
            total -= statements(node)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and node is not tree and not docstring:
            total += len(node.value.elts) if is_packed(node) else 1
    return total


def is_packed(node):
    """Returns whether a node of ast is `a, b = x, y`."""
    tuples = isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
    return tuples and isinstance(node.targets[0], ast.Tuple)


def sizes(texts, rooms):
    """Returns {script, room, or "file: function": statements}; main is left out.

    texts: {script: text}; rooms: {file of common/ or command: text}.
    """
    found = Counter()
    for name, text in (texts | rooms).items():
        tree = ast.parse(text)
        own = name in texts or name in ROOMS
        found[name if own else "common/"] += statements(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                key = f"{name}: {node.name}"
                found[key] = max(statements(node), found[key])
    return found


def oversized(texts, rooms):
    """Returns messages for every cap that is passed, and for exceptions that none needs."""
    messages = []
    for name, size in sizes(texts, rooms).items():
        cap = FUNCTION if ": " in name else ROOMS.get(name, SCRIPT)
        if size > max(cap, EXCEPTIONS.get(name, 0)):
            messages.append(f"{name} has {size} statements, cap {cap}: delete or move")
        if name in EXCEPTIONS and size <= cap:
            messages.append(f"{name} has {size} statements: no exception any more")
    return messages


def read():
    """Returns ({script: text}, {file of common/ or command: text})."""
    texts = {name: (ROOT / name).read_text() for name in SCRIPTS}
    rooms = [*sorted((ROOT / "common").glob("*.py")), *(ROOT / name for name in COMMANDS)]
    return texts, {path.name: path.read_text() for path in rooms}


def fixed(texts):
    """Returns texts with the shared text of the parent in every script."""
    return {name: join(text, texts[PARENT]) for name, text in texts.items()}


# ---- tests ----


def test_all_scripts_are_one_text_outside_the_seams():
    assert not differences(read()[0])
    with_seams = {path.name for path in ROOT.glob("*.py") if ">>> method:" in path.read_text()}
    assert with_seams == set(SCRIPTS)


def test_caps():
    assert not oversized(*read())


def test_the_text_is_simple_not_compressed():
    scripts, rooms = read()
    texts = [*scripts.values(), *(text for name, text in rooms.items() if name not in COMMANDS)]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    lines = sum(len(text.splitlines()) for text in texts) / 100
    assert sum(map(is_packed, nodes)) / lines <= PACKED
    assert sum(isinstance(node, ast.IfExp) for node in nodes) / lines <= TERNARIES
    unions = [node for node in nodes if isinstance(node, ast.AugAssign)]
    assert not any(isinstance(node.op, ast.BitOr) for node in unions)


def test_common_holds_no_method():
    """What could change a loss, a gradient, a sample or a pseudo label belongs in the script."""
    forbidden = r"nn\.Module|torch\.nn|\.backward\(|torch\.optim|autograd|torch\.rand|softmax"
    for name, text in read()[1].items():
        if name not in ("fused.py", *COMMANDS):  # twins are held equal to what the scripts define
            assert not re.search(forbidden, text), name


PARENT_TEXT = (ROOT / PARENT).read_text()
STEP = "        optimizer.step()\n"
END = "        # <<< method: losses\n"
BEGIN = "# >>> method: functions\n"
ONE = "def one():\n    return 1\n\n\n"


def test_a_change_outside_the_seams_is_found_and_fixed():
    for old, new in ((") ** 0.9", ") ** 0.8"), (STEP, ""), (STEP, STEP.replace("\n", " \n"))):
        texts = {PARENT: PARENT_TEXT, "other.py": PARENT_TEXT.replace(old, new)}
        assert differences(texts) and fixed(texts)["other.py"] == PARENT_TEXT, old
    moved = PARENT_TEXT.replace(END + STEP, STEP + END)  # into a seam
    assert differences({PARENT: PARENT_TEXT, "other.py": moved})


def test_a_change_inside_a_seam_is_allowed_and_kept_but_one_name_has_one_definition():
    texts = {PARENT: PARENT_TEXT, "other.py": PARENT_TEXT.replace(BEGIN, BEGIN + ONE)}
    assert not differences(texts) and fixed(texts) == texts
    texts["third.py"] = texts["other.py"].replace("return 1\n", "return 4\n", 1)
    assert any("one in third.py" in message for message in differences(texts))


def test_an_import_that_the_shared_text_needs_is_named():
    other = PARENT_TEXT.replace("import zlib\n", "from copy import deepcopy\n")
    assert differences({PARENT: PARENT_TEXT, "other.py": other}) == ["other.py lacks import zlib"]


def test_broken_marks_are_named():
    for old, new in ((BEGIN, ""), (BEGIN, 2 * BEGIN), (END, ""), ("functions\n", "functions!\n")):
        try:
            split(PARENT_TEXT.replace(old, new), "x.py")
        except ValueError as error:
            assert "x.py" in str(error)
        else:
            raise AssertionError(f"{old!r} as {new!r} went unnoticed")


def test_caps_are_enforced():
    long = "def long():\n" + "    x = 1\n" * FUNCTION
    for name, text, words in (
        ("a.py", long, ""),
        ("a.py", long + "    return x\n", "long has 41 statements, cap 40"),
        ("a.py", long.replace("long", "main") + "    return x\n", ""),
        ("a.py", "a, b = 1, 2\n" * 891, "common/ has 1782 statements"),
        ("fused.py", "a = 1\n" * 201, "fused.py has 201 statements"),
        ("prepare_data.py", "a = 1\n" * 496, "prepare_data.py has 496 statements"),
    ):
        messages = oversized({PARENT: PARENT_TEXT}, {name: text})
        assert len(messages) == bool(words) and words in "".join(messages)
    text = PARENT_TEXT + "a = f(\n    b\n)\n" * SCRIPT
    assert f"statements, cap {SCRIPT}" in oversized({PARENT: text}, {})[0]


def main(argv):
    """The command line: check, --fix or --show NAME."""
    texts, rooms = read()
    if argv[:1] == ["--show"] and len(argv) == 2:
        name = argv[1].removesuffix(".py") + ".py"
        for seam, own in split(texts[name], name)[1].items():
            print(f"# >>> method: {seam}\n{own}# <<< method: {seam}\n")
        return 0
    if argv == ["--fix"]:
        for name, text in fixed(texts).items():
            if text != texts[name]:
                (ROOT / name).write_text(text)
                print(f"{name}: shared text rewritten from {PARENT}")
        texts, rooms = read()
    elif argv:
        print(__doc__.strip())
        return 2
    found = differences(texts) + oversized(texts, rooms)
    for name, size in sizes(texts, rooms).items():
        if ": " not in name:
            print(f"{name}: {size} statements")
    print("\n".join(found) if found else "all copies are equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
