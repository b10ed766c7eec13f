"""Copies are held by machine: outside the seams all scripts are one text, the parent's.

The docstring is a seam by itself, and so is section 1; ruff finds an import that is missing.

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
SCRIPTS = [path.name for path in ROOT.glob("*.py") if ">>> method:" in path.read_text()]
SEAMS = """network args network-needs needs recipe functions backbone head channels draw optimizer
    networks state losses after-step panels""".split()
# the parent's text too, in every script but one that stands on another network
INHERITED = ("network", "network-needs", "backbone", "channels", "optimizer")
OTHER_NETWORK = ("unimatch_v2.py",)
RECIPE = "# ---- 2. Recipe"
# caps of statements: a packed assignment has each of its parts, the flags of Args are none
SCRIPT = 620
FUNCTION = 40  # main excepted
COMMANDS = {"prepare_data.py": 532, "convert.py": 568, "predict.py": 425}
CAPS = COMMANDS | {"common/": 2140, "fused.py": 231, "track.py": 71, "outputs.py": 421}
CAPS |= {"cache.py": 138, "fpl_triton.py": 81, "pictures.py": 62}
# exceptions, none is to be added: A-FPL's choice of T beside two methods each; two methods in one
# script; DINOv2, DINOv3 and DPT beside the method
CAPS |= {"cps_fpl.py": 654, "ael_fpl.py": 712, "u2pl.py": 646, "esl.py": 672}
CAPS |= {"u2pl_ael.py": 786, "unimatch_v2.py": 725}
# over all scripts and common/, per 100 lines
TERNARIES = 1.2
SEAM = re.compile(r"^( *# >>> method: ([a-z-]+)\n)(.*?)^( *# <<< method: \2\n)", re.M | re.S)


def split(text, name):
    """Returns (shared text from section 2 on, {seam: its text}). Raises ValueError."""
    seams = {match[2]: match[3] for match in SEAM.finditer(text)}
    marks = re.findall("(?:>>>|<<<) method.*", text)
    expected = [f"{arrow} method: {seam}" for seam in SEAMS for arrow in (">>>", "<<<")]
    if marks != expected or list(seams) != SEAMS or text.count(RECIPE) != 1:
        raise ValueError(f"{name}: seams {marks} instead of {expected}, or not one {RECIPE}")
    return SEAM.sub(r"\1\4", RECIPE + text.partition(RECIPE)[2]), seams


def fixed(texts):
    """Returns texts with the shared text of the parent in every script; imports stay."""
    shared, inherited = split(texts[PARENT], PARENT)
    found = {}
    for name, text in texts.items():
        _, seams = split(text, name)
        if name not in OTHER_NETWORK:
            seams |= {seam: inherited[seam] for seam in INHERITED}
        body = SEAM.sub(lambda match, own=seams: match[1] + own[match[2]] + match[4], shared)
        found[name] = text.partition(RECIPE)[0] + body
    return found


def differences(texts):
    """Returns messages: texts {name: text}, the parent among them. [] if all copies are equal."""
    found, first_seen = [], {}
    for name, right in fixed(texts).items():
        text = texts[name]
        two = (whole.splitlines(keepends=True) for whole in (right, text))
        if lines := "".join(difflib.unified_diff(*two, PARENT, name, n=0)):
            found.append(f"{name} differs from {PARENT} outside the seams:\n{lines[:2000]}")
        if name in OTHER_NETWORK:
            text = SEAM.sub(lambda m: m[1] + m[3] * (m[2] not in INHERITED) + m[4], text)
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
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not docstring and not isinstance(node, ast.AnnAssign):
            total += len(node.value.elts) if is_packed(node) else 1
    return total


def is_packed(node):
    """Returns whether a node of ast is `a, b = x, y`."""
    tuples = isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
    return tuples and isinstance(node.targets[0], ast.Tuple)


def oversized(texts):
    """Returns a message for every cap that is passed: of a script, command, room or function."""
    sizes, found = Counter(), []
    for name, text in texts.items():
        tree = ast.parse(text)
        sizes[name if name in (*CAPS, *SCRIPTS) else "common/"] += statements(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                if statements(node) - 1 > FUNCTION:
                    found.append(f"{name}: {node.name}")
    found += [name for name, size in sizes.items() if size > CAPS.get(name, SCRIPT)]
    return [f"{name} has too many statements: delete or move" for name in found]


def read():
    """Returns ({script: text}, {file of common/ or command: text})."""
    texts = {name: (ROOT / name).read_text() for name in SCRIPTS}
    rooms = [*sorted((ROOT / "common").glob("*.py")), *(ROOT / name for name in COMMANDS)]
    return texts, {path.name: path.read_text() for path in rooms}


def test_all_scripts_are_one_text_outside_the_seams_and_below_their_caps():
    texts, rooms = read()
    assert not differences(texts) and not oversized(texts | rooms)


def test_the_text_is_simple_not_compressed_and_common_holds_no_method():
    scripts, rooms = read()
    common = {name: text for name, text in rooms.items() if name not in COMMANDS}
    texts = [*scripts.values(), *common.values()]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    lines = sum(len(text.splitlines()) for text in texts) / 100
    assert not any(map(is_packed, nodes))  # a, b = x, y
    assert sum(isinstance(node, ast.IfExp) for node in nodes) / lines <= TERNARIES
    operators = [node.op for node in nodes if isinstance(node, ast.AugAssign)]
    assert ast.BitOr not in map(type, operators)
    # what could change a loss, a gradient, a sample or a pseudo label belongs in the script
    method = r"nn\.Module|torch\.nn|\.backward\(|torch\.optim|autograd|torch\.rand|softmax"
    del common["fused.py"]  # twins are held equal to what the scripts define
    assert [name for name, text in common.items() if re.search(method, text)] == []


def test_a_change_outside_the_seams_is_found_and_fixed_and_one_inside_is_kept():
    parent = (ROOT / PARENT).read_text()
    texts = {PARENT: parent, "other.py": parent.replace(") ** 0.9", ") ** 0.8")}
    (message,) = differences(texts)
    assert "other.py differs from" in message and fixed(texts)["other.py"] == parent
    begin = "# >>> method: functions\n"
    texts["other.py"] = parent.replace(begin, f"{begin}def one():\n    return 1\n\n\n")
    assert not differences(texts) and fixed(texts) == texts
    texts["third.py"] = texts["other.py"].replace("return 1\n", "return 4\n", 1)
    (message,) = differences(texts)
    assert "one in third.py" in message


def main(argv):
    """The command line: check, --fix or --show NAME."""
    texts, rooms = read()
    if argv[:1] == ["--show"]:
        name = argv[1].removesuffix(".py") + ".py"
        for seam, own in split(texts[name], name)[1].items():
            print(f"# >>> method: {seam}\n{own}# <<< method: {seam}\n")
        return 0
    if argv == ["--fix"]:
        texts = fixed(texts)
        for name, text in texts.items():
            (ROOT / name).write_text(text)
    found = differences(texts) + oversized(texts | rooms)
    print("\n".join(found) if found else "all copies are equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
