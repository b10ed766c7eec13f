"""What the documents say is run or compared: tags, commands, links, tables, pictures."""

import re
import shlex

import pytest

from results import differences, logs, table
from tiny import ROOT, SCRIPTS, resolved
from tiny import script as module_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_has_a_row_for_every_tag_of_its_script(name):
    script, page = (ROOT / f"{name}.py").read_text(), (ROOT / f"docs/{name}.md").read_text()
    tags = sorted(set(re.findall(r"\[D(\d+)\]", script)))
    assert tags == sorted(re.findall(r"^\| D(\d+) \|", page, re.M)) and set("123456") <= set(tags)


def test_every_script_is_one_that_the_tests_know():
    there = {path.stem for path in ROOT.glob("*.py") if "# >>> method: " in path.read_text()}
    assert there == set(SCRIPTS)


def commands():
    """Yields (place, words) of every printed command line."""
    texts = [(page.name, page.read_text(), r"    .*\b\w+\.py\b") for page in PAGES]
    texts += [(name, module_of(name).__doc__, r" +(python|torchrun) ") for name in SCRIPTS]
    for place, text, pattern in texts:
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(pattern, line):
                for part in line.split(" && "):
                    yield place, shlex.split(part, comments=True)


def test_every_printed_command_parses_and_resolves():
    runs_of_scripts = 0
    for place, words in commands():
        script = next((w for w in words if w.endswith(".py") and w[:-3] in SCRIPTS), None)
        if words[0] in ("python", "torchrun") and script:
            argv = words[words.index(script) + 1 :]
            args = resolved(module_of(script[:-3]), argv)
            assert args.total_iters or args.list_presets, (place, words)
            runs_of_scripts += 1
        elif words[0] in ("python", "diff"):
            named = [word for word in words if word.endswith(".py")]
            assert all((ROOT / word).exists() for word in named), (place, words)
    assert runs_of_scripts >= 10
    last = resolved(module_of("cps_fpl"), []).total_iters  # of README's first command
    assert f"{last:06}-train.png`, which the first command writes at its last step, {last}." in (
        PAGES[0].read_text()
    )


def test_links_and_named_tests_lead_somewhere():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for page in PAGES:
        text = page.read_text()
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
        paths = [page.parent / link for link in links if not link.startswith("http")]
        paths += [ROOT / name for name in re.findall(r"\btests/\w+\.\w+", text)]
        assert [path for path in paths if not path.exists()] == []
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, f"{page.name}: {name}"


def test_every_finding_has_its_line():
    found = re.findall(r"\(\.\./findings/(\w+)\.sh\)", (ROOT / "docs/findings.md").read_text())
    assert sorted(found) == sorted(path.stem for path in (ROOT / "findings").glob("*.sh"))
    assert f"findings.md): {len(found)} places" in PAGES[0].read_text()


SAID = {  # the rows behind the numbers of a script's docstring, in order
    "supervised": "labels all-labels",
    "mean_teacher": "mt cutmix-mt labels",
    "cps_fpl": "cps fpl-cps labels-cps",
    "ael_fpl": "ael fpl-ael labels",
    "u2pl": "u2pl u2pl-neither labels",
    "u2pl_ael": "u2pl-ael u2pl-ael-neither labels",
    "esl": "esl esl-soft-labels labels",
    "unimatch": "fixmatch-1_8 fpl-fixmatch-1_8 labels-1_8",
}


@pytest.mark.parametrize("name", SAID)
def test_a_docstring_has_what_the_logs_say(name):
    said = re.search("^CamVid.*mIoU: (.*three seeds.*)", module_of(name).__doc__, re.M)[1]
    means = [differences.mean_miou(row, differences.SEEDS) for row in SAID[name].split()]
    assert re.findall(r"\d+\.\d", said) == [f"{mean:.1f}" for mean in means]


def test_the_tables_are_what_the_logs_say_and_every_log_is_whole():
    for page in table.PAGES:
        assert table.inserted(page) == (ROOT / page).read_text(), "python results/table.py --write"
    page = (ROOT / "docs/results.md").read_text()
    assert set(differences.rows() + differences.by_class()) <= set(page.splitlines())
    told = re.findall(
        r"^\| .* (holds|does not hold|cannot be told) \|$", page.split("<!--")[1], re.M
    )
    known, wrong, open_ = map(told.count, ("holds", "does not hold", "cannot be told"))
    words = f"Of {len(told)} claims {known} hold, {wrong} do not, and {open_} cannot be told"
    assert words in " ".join(page.split())
    own = re.findall(r"^\| FPL.* \| FPL Table .*$", PAGES[0].read_text(), re.M)
    lines = re.findall(r"^\| FPL.* \| FPL Table .*$", page, re.M)
    assert own == [line for line in lines if "not yet told" not in line]
    for path in sorted((ROOT / "results").glob("*/*.jsonl")):
        assert '"/' not in path.read_text(), f"{path}: a place on somebody's machine"
        _, start, train_lines, evals, done = logs.read(path)
        assert train_lines[-1]["step"] == done["step"] == start["args"]["total_iters"], path
        assert len(start["sha256"]) == 64 and evals and done["last"]["miou"] > 0, path
