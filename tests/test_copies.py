"""Copies are held by machine: outside the seams all scripts are one text, the parent's.

python tests/test_copies.py             # every check; prints what differs
python tests/test_copies.py --fix       # rewrite the shared text of all scripts from the parent
python tests/test_copies.py --show cps_fpl   # only what a script adds
"""

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARENT = "supervised.py"
SCRIPTS = ["supervised.py", "mean_teacher.py", "cps_fpl.py", "ael_fpl.py", "u2pl.py", "esl.py"]
SEAMS = (
    "header imports args presets functions head draw networks state losses after-step panels"
).split()
CAPS = {"shared text": 480, "seams of one script": 320, "common/": 1050, "common/fused.py": 300}
CAPS |= {"sources.py": 420, "prepare_data.py": 650}  # the rooms of real data
LINE, FUNCTION = 100, 60  # columns; lines of a function (main excepted)
MARK = re.compile(r"^ *# (>>>|<<<) method: ([a-z-]+)$")


def split(text, name):
    """Returns (shared lines with marks, {seam: its lines}); raises ValueError on a broken mark."""
    shared, seams, inside = [], {}, None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        mark = MARK.match(line.rstrip("\n"))
        if mark and mark[1] == ">>>":
            if inside or mark[2] in seams:
                raise ValueError(f"{name}:{number}: seam {mark[2]} opens inside another, or twice")
            inside, seams[mark[2]] = mark[2], []
        elif mark and mark[2] != inside:
            raise ValueError(f"{name}:{number}: seam {mark[2]} closes but {inside} is open")
        elif mark:
            inside = None
        elif inside:
            seams[inside].append(line)
            continue
        elif ">>> method" in line or "<<< method" in line:
            raise ValueError(f"{name}:{number}: a damaged seam mark: {line.strip()}")
        shared.append(line)
    if inside:
        raise ValueError(f"{name}: seam {inside} is never closed")
    if list(seams) != SEAMS:
        raise ValueError(f"{name}: seams {list(seams)} instead of {SEAMS}")
    return shared, seams


def join(shared, seams):
    """Returns the script with this shared text and these seams."""
    lines = []
    for line in shared:
        lines.append(line)
        mark = MARK.match(line.rstrip("\n"))
        if mark and mark[1] == ">>>":
            lines += seams[mark[2]]
    return "".join(lines)


def differences(texts):
    """Returns messages: texts {name: text}, the parent among them. [] if all copies are equal."""
    found, first_seen = [], {}
    parent, _ = split(texts[PARENT], PARENT)
    for name, text in texts.items():
        shared, _ = split(text, name)
        if shared != parent:
            lines = difflib.unified_diff(parent, shared, PARENT, name, n=0)
            found.append(
                f"{name} differs from {PARENT} outside the seams:\n" + "".join(lines)[:2000]
            )
        for source in definitions(text):
            word = re.search(r"^(?:def|class) (\w+)", source, re.M)[1]
            first, other = first_seen.setdefault(word, (name, source))
            if other != source and ">>> method" not in source:
                found.append(f"{word} in {name} is not the {word} of {first}")
    return found


def held(texts, name):
    """Returns how many lines of a script's seams stand in a script before it: whole blocks, from
    one pair of empty lines to the next."""
    before = [n for n in SCRIPTS[: SCRIPTS.index(name)] if n in texts] if name in SCRIPTS else []
    known = {block for n in before for block in blocks(texts[n], n)}
    return sum(block.count("\n") + 3 for block in blocks(texts[name], name) if block in known)


def blocks(text, name):
    """Returns the functions, classes and comments of a script's seams, without empty lines."""
    _, seams = split(text, name)
    parts = "\n\n\n".join("".join(seams[s]) for s in ("functions", "head")).split("\n\n\n")
    return [part.strip("\n") for part in parts if part.strip()]


def definitions(text):
    """Returns the source of each top-level function and class of a script."""
    nodes = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    begins = [min(n.lineno for n in (node, *node.decorator_list)) for node in nodes]
    lines = text.splitlines()
    return ["\n".join(lines[b - 1 : n.end_lineno]) for b, n in zip(begins, nodes, strict=True)]


def oversized(texts, common):
    """Returns messages for every cap that is passed; common: {file name: text} of common/.

    What is held equal in the seams of several scripts counts where it first stands.
    """
    sizes = {name: common.get(name, "").count("\n") for name in ("sources.py", "prepare_data.py")}
    sizes["common/fused.py"] = common.get("fused.py", "").count("\n")
    sizes["common/"] = sum(t.count("\n") for t in common.values()) - sum(sizes.values())
    found = []
    for name, text in texts.items():
        shared, seams = split(text, name)
        sizes["shared text"] = len(shared)
        sizes["seams of one script"] = sum(map(len, seams.values())) - held(texts, name)
        found += [
            f"{name}: {k} has {v} lines, cap {CAPS[k]}" for k, v in sizes.items() if v > CAPS[k]
        ]
    for name, text in (texts | common).items():
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > LINE:
                found.append(f"{name}:{number}: {len(line)} columns, cap {LINE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                if node.end_lineno - node.lineno + 1 > FUNCTION:
                    found.append(
                        f"{name}:{node.lineno}: {node.name} is longer than {FUNCTION} lines"
                    )
    return found


def read():
    """Returns ({script: text}, {file of common/ or room of real data: text})."""
    texts = {n: (ROOT / n).read_text() for n in SCRIPTS if (ROOT / n).exists()}
    rooms = [*sorted((ROOT / "common").glob("*.py")), ROOT / "sources.py", ROOT / "prepare_data.py"]
    return texts, {path.name: path.read_text() for path in rooms}


def fixed(texts):
    """Returns texts with the shared text of the parent in every script."""
    parent, _ = split(texts[PARENT], PARENT)
    return {name: join(parent, split(text, name)[1]) for name, text in texts.items()}


# ---- tests ----


def test_all_scripts_are_one_text_outside_the_seams():
    assert not differences(read()[0])


def test_caps():
    assert not oversized(*read())


def test_format_is_ruffs():
    ruff = [sys.executable, "-m", "ruff", "format", "--check", *SCRIPTS, "common", "tests"]
    names = [a for a in ruff if not a.endswith(".py") or (ROOT / a).exists()]
    assert subprocess.run(names, cwd=ROOT, capture_output=True).returncode == 0


def test_importing_a_script_runs_nothing():
    for name, text in read()[0].items():
        for node in ast.parse(text).body:
            allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert (
                isinstance(node, allowed)
                or docstring
                or ast.unparse(node).startswith("if __name__ == '__main__':")
            ), f"{name}:{node.lineno}"


def test_common_holds_no_method():
    """What could change a loss, a gradient, a sample or a pseudo label belongs in the script."""
    forbidden = r"nn\.Module|torch\.nn|\.backward\(|torch\.optim|autograd|torch\.rand|softmax"
    for name, text in read()[1].items():
        if name != "fused.py":
            assert not re.search(forbidden, text), name


MUTATIONS = {
    "a changed exponent": lambda t: t.replace(") ** 0.9", ") ** 0.8"),
    "an extra last line": lambda t: t + "\n",
    "a line less": lambda t: t.replace("        optimizer.step()\n", ""),
    "a trailing space": lambda t: t.replace("optimizer.step()\n", "optimizer.step() \n"),
    "a line moved into a seam": lambda t: t.replace(
        "        # <<< method: losses\n        optimizer.step()\n",
        "        optimizer.step()\n        # <<< method: losses\n",
    ),
}


def test_a_change_outside_the_seams_is_found_and_fixed():
    parent = read()[0][PARENT]
    for name, mutate in MUTATIONS.items():
        assert mutate(parent) != parent, name
        texts = {PARENT: parent, "other.py": mutate(parent)}
        assert differences(texts), name
        if "moved" not in name:  # there the line would stand twice, which --fix cannot know
            assert fixed(texts)["other.py"] == parent, name


def test_a_change_inside_a_seam_is_allowed_and_kept():
    parent = read()[0][PARENT]
    other = parent.replace("# >>> method: functions\n", "# >>> method: functions\nLIMIT = 3\n")
    texts = {PARENT: parent, "other.py": other}
    assert not differences(texts)
    assert fixed(texts)["other.py"] == other


def test_one_name_has_one_definition_even_inside_seams():
    parent = read()[0][PARENT]
    seam = "# >>> method: functions\n"
    one = seam + "def weight(p):\n    return p\n\n\n"
    texts = {PARENT: parent.replace(seam, one), "other.py": parent.replace(seam, one)}
    assert not differences(texts)
    texts["other.py"] = texts["other.py"].replace("return p\n", "return 4 * p\n", 1)
    assert any("weight" in message for message in differences(texts))


def test_broken_marks_are_named():
    parent = read()[0][PARENT]
    for mutate in (
        lambda t: t.replace("# <<< method: losses\n", ""),
        lambda t: t.replace("# >>> method: losses\n", ""),
        lambda t: t.replace("method: losses", "method: loss"),
        lambda t: t.replace("# >>> method: losses", "# >>> method: losses!"),
        lambda t: t.replace("# >>> method: losses\n", "# >>> method: losses\n" * 2),
    ):
        try:
            split(mutate(parent), "x.py")
        except ValueError as error:
            assert "x.py" in str(error)
        else:
            raise AssertionError("a broken mark went unnoticed")


def test_caps_are_enforced():
    parent = read()[0][PARENT]
    long = "def long():\n" + "    x = 1\n" * FUNCTION + "    return x\n"
    wide = "A = " + "1 + " * 30 + "1\n"
    seam = "# >>> method: functions\n"
    many = seam + "B = 1\n" * (CAPS["seams of one script"] + 1)
    for extra, word in ((seam + long, "long"), (seam + wide, "columns"), (many, "seams")):
        assert any(word in m for m in oversized({PARENT: parent.replace(seam, extra)}, {})), word
    for name, room, cap in (
        ("a.py", "common/", 1050),
        ("fused.py", "common/fused.py", 300),
        ("sources.py", "sources.py", 420),
        ("prepare_data.py", "prepare_data.py", 650),
    ):
        assert not oversized({PARENT: parent}, {name: "a = 1\n" * cap})
        (message,) = oversized({PARENT: parent}, {name: "a = 1\n" * (cap + 1)})
        assert room in message, name
    assert any("shared" in m for m in oversized({PARENT: parent + "A = 1\n" * 481}, {}))


def main(argv):
    """The command line: check, --fix or --show NAME."""
    texts, common = read()
    if argv[:1] == ["--show"] and len(argv) == 2:
        name = argv[1].removesuffix(".py") + ".py"
        for seam, lines in split(texts[name], name)[1].items():
            print(f"# >>> method: {seam}\n{''.join(lines)}# <<< method: {seam}\n")
        return 0
    if argv == ["--fix"]:
        for name, text in fixed(texts).items():
            if text != texts[name]:
                (ROOT / name).write_text(text)
                print(f"{name}: shared text rewritten from {PARENT}")
        texts, common = read()
    elif argv:
        print(__doc__.strip())
        return 2
    found = differences(texts) + oversized(texts, common)
    for name, text in texts.items():
        shared, seams = split(text, name)
        copies, lines = held(texts, name), sum(map(len, seams.values()))
        own = f"{lines - copies} of its own and {copies} held copies in seams"
        print(f"{name}: {len(shared)} shared lines, {own}")
    print("\n".join(found) if found else "all copies are equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
