"""Copies are held by machine: outside the seams all scripts are one text, the parent's.

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
SEAMS = (
    "header imports args presets functions head draw networks state losses after-step panels"
).split()
# caps count statements: a packed assignment each of its parts, a call over many lines is one
SCRIPT, FUNCTION = 620, 40  # of a script; of a function, main excepted
ROOMS = {"common/, sources.py": 1145, "prepare_data.py": 495}
EXCEPTIONS = {"ael_fpl.py": 628, "esl.py": 659, "run.py: restore": 46}  # none is to be added
LINE = 100  # columns
SEAM = re.compile(r"^( *# >>> method: ([a-z-]+)\n)(.*?)^( *# <<< method: \2\n)", re.M | re.S)


def split(text, name):
    """Returns (shared text with marks, {seam: its text}); raises ValueError on a broken mark."""
    seams = {match[2]: match[3] for match in SEAM.finditer(text)}
    marks = re.findall("(?:>>>|<<<) method.*", text)
    expected = [f"{arrow} method: {seam}" for seam in SEAMS for arrow in (">>>", "<<<")]
    if marks != expected or list(seams) != SEAMS:
        wrong = [mark for mark in marks if mark not in expected or marks.count(mark) > 1]
        raise ValueError(f"{name}: seams {list(seams)} instead of {SEAMS}, strange marks {wrong}")
    return SEAM.sub(r"\1\4", text), seams


def join(shared, seams):
    """Returns the script with this shared text and these seams."""
    return SEAM.sub(lambda match: match[1] + seams[match[2]] + match[4], shared)


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
        for word, source in definitions(text).items():
            first, other = first_seen.setdefault(word, (name, source))
            if other != source and ">>> method" not in source:
                found.append(f"{word} in {name} is not the {word} of {first}")
    return found


def definitions(text):
    """Returns {name: source} of the top-level functions and classes of a script."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            begin = min(n.lineno for n in (node, *node.decorator_list))
            found[node.name] = "\n".join(lines[begin - 1 : node.end_lineno])
    return found


def statements(tree):
    """Returns how many statements stand below a node of ast; docstrings are none."""
    total = 0
    for node in ast.walk(tree):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and node is not tree and not docstring:
            packed = isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            packed = packed and isinstance(node.targets[0], ast.Tuple)
            total += len(node.value.elts) if packed else 1
    return total


def sizes(texts, rooms):
    """Returns {script, room, or "file: function": statements}; main is left out.

    texts: {script: text}; rooms: {file of common/, sources.py or prepare_data.py: text}.
    """
    found = Counter()
    for name, text in (texts | rooms).items():
        tree = ast.parse(text)
        own = name in texts or name in ROOMS
        found[name if own else "common/, sources.py"] += statements(tree)
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
    for name, text in (texts | rooms).items():
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > LINE:
                messages.append(f"{name}:{number}: {len(line)} columns, cap {LINE}")
    return messages


def read():
    """Returns ({script: text}, {file of common/, sources.py, prepare_data.py: text})."""
    texts = {name: (ROOT / name).read_text() for name in SCRIPTS}
    rooms = [*sorted((ROOT / "common").glob("*.py")), ROOT / "sources.py", ROOT / "prepare_data.py"]
    return texts, {path.name: path.read_text() for path in rooms}


def fixed(texts):
    """Returns texts with the shared text of the parent in every script."""
    parent, _ = split(texts[PARENT], PARENT)
    return {name: join(parent, split(text, name)[1]) for name, text in texts.items()}


# ---- tests ----


def test_all_scripts_are_one_text_outside_the_seams():
    assert not differences(read()[0])
    with_seams = {path.name for path in ROOT.glob("*.py") if ">>> method:" in path.read_text()}
    assert with_seams == set(SCRIPTS)


def test_caps():
    assert not oversized(*read())


def test_common_holds_no_method():
    """What could change a loss, a gradient, a sample or a pseudo label belongs in the script."""
    forbidden = r"nn\.Module|torch\.nn|\.backward\(|torch\.optim|autograd|torch\.rand|softmax"
    for name, text in read()[1].items():
        assert not re.search(forbidden, text), name


PARENT_TEXT = (ROOT / PARENT).read_text()
STEP = "        optimizer.step()\n"
END = "        # <<< method: losses\n"
BEGIN = "# >>> method: functions\n"
ONE = "def one():\n    return 1\n\n\n"
LONG = "def long():\n" + "    x = 1\n" * FUNCTION


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


def test_broken_marks_are_named():
    for old, new in ((BEGIN, ""), (BEGIN, 2 * BEGIN), (END, ""), ("functions\n", "functions!\n")):
        try:
            split(PARENT_TEXT.replace(old, new), "x.py")
        except ValueError as error:
            assert "x.py" in str(error)
        else:
            raise AssertionError(f"{old!r} as {new!r} went unnoticed")


def test_statements_are_counted_not_lines():
    text = "@d\nclass A:\n    x: int = 1\n    y = f(\n        a=1,\n    )\n    a, b = 1, 2; c = 3\n"
    assert statements(ast.parse(text)) == 6
    assert statements(ast.parse('def f():\n    """Says."""\n    if a:\n        return 1\n')) == 3


def test_caps_are_enforced():
    many = SCRIPT - statements(ast.parse(PARENT_TEXT)) + 1
    restore = "def restore():\n" + "    x = 1\n" * EXCEPTIONS["run.py: restore"]
    for name, text, words in (  # in a seam of the parent, or a file of its own
        (PARENT, LONG, ""),
        (PARENT, LONG + "    return x\n", "long has 41 statements, cap 40"),
        (PARENT, "A = " + "1 + " * 30 + "1\n", "125 columns, cap 100"),
        (PARENT, "B = 1\n" * many, f"{PARENT} has 621 statements, cap 620"),
        ("a.py", LONG.replace("long", "main") + "    return x\n", ""),
        ("run.py", restore, ""),
        ("run.py", restore + "    y = 2\n", "cap 40"),
        ("run.py", "def restore():\n    x = 1\n", "no exception any more"),
        ("sources.py", "a = 1\n" * 1146, "common/, sources.py has 1146 statements"),
        ("prepare_data.py", "a = 1\n" * 496, "prepare_data.py has 496 statements"),
    ):
        script = PARENT_TEXT.replace(BEGIN, BEGIN + text * (name == PARENT))
        messages = oversized({PARENT: script}, {} if name == PARENT else {name: text})
        assert len(messages) == bool(words) and words in "".join(messages)


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
