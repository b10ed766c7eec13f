"""results/compare.py: FPL supplement Table 6 from its own numbers, order, refusals, warnings."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import Refusal  # noqa: E402
from common.data import FACTS  # noqa: E402
from results import compare  # noqa: E402

CPS, FPL = (ROOT / f"results/cps_fpl/camvid-1_8-{name}.jsonl" for name in ("cps", "fpl"))
TABLE_6 = {  # FPL supplement, as printed: Cityscapes, 1/32, AEL and AEL+FPL
    "Wall": (44.40, 51.71, 7.31),
    "Fence": (45.26, 48.26, 3.00),
    "Truck": (51.35, 71.88, 20.53),
    "Terrain": (56.46, 60.67, 4.21),
    "Rider": (59.32, 59.78, 0.46),
    "Pole": (62.81, 62.97, 0.16),
    "Motorcycle": (65.82, 65.28, -0.54),
    "Train": (69.67, 71.69, 2.02),
    "Light": (70.71, 70.84, 0.13),
    "Bicycle": (76.87, 76.99, 0.12),
    "Sign": (76.92, 76.74, -0.18),
    "Sidewalk": (77.85, 77.93, 0.08),
    "Person": (80.95, 81.20, 0.25),
    "Bus": (82.24, 80.99, -1.25),
    "Building": (90.79, 91.10, 0.31),
    "Vegetation": (91.64, 92.00, 0.36),
    "Car": (93.39, 94.27, 0.88),
    "Sky": (93.59, 94.01, 0.42),
    "Road": (97.03, 96.97, -0.06),
}
SHUFFLED = """Road Sidewalk Building Wall Fence Pole Light Sign Vegetation Terrain Sky Person Rider
Car Truck Bus Train Motorcycle Bicycle""".split()  # in the order of Cityscapes' ids


def draw_log(path, iou, dataset="shapes", on="test", best=None, drop=(), **more):
    """Writes a log with the scores iou (0 to 1) in a run's format; returns its path as text."""
    args = {"dataset": dataset, "seed": more.get("seed", 0), "total_iters": more.get("steps", 600)}
    lists = {"labeled": [20, "aaaa"], "val": [64, "bbbb"], "test": [64, "cccc"]}
    lists |= more.get("lists", {})
    last, best = (
        {"miou": more.get("miou", sum(v or 0 for v in x) / len(x)), "iou": x}
        for x in (iou, best or iou)
    )
    lines = [{"kind": "start", "args": args, "lists": lists}, {"kind": "train", "step": 600}]
    lines += [{"kind": "done", "step": 600, "on": on, "last": last, "best": best}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in lines if e["kind"] not in drop))
    return str(path)


def printed(capsys, *argv):
    """Runs the comparison; returns (rows of cells without the dashes, the lines below)."""
    compare.main([str(word) for word in argv])
    table, below = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert set("".join(rows.pop(1))) == {"-", ":"}
    return rows, below.splitlines()


def refusal(*argv):
    """Runs what has to be refused; returns its one line."""
    with pytest.raises(Refusal) as error:
        compare.main([str(word) for word in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- pure functions ----


def test_table_6_of_the_supplement_comes_out_as_printed():
    a, b = ([TABLE_6[name][i] for name in SHUFFLED] for i in (0, 1))
    rows = compare.cells(("AEL", "AEL+FPL"), SHUFFLED, a, b, (72.5, 74.75))
    assert rows[0] == ("Class", "AEL", "AEL+FPL", "Improvement")
    assert [row[0] for row in rows[1:-1]] == list(TABLE_6)
    assert rows[-1] == ("mIoU", "72.50", "74.75", "+2.25")
    for name, *numbers in rows[1:-1]:
        assert [float(x) for x in numbers] == list(TABLE_6[name])
        assert numbers[2] == f"{TABLE_6[name][2]:+.2f}"
    # by hand: 37.28 / 9 points and 0.93 / 10
    text = "15 of 19 classes rise, 4 fall; on average +4.14 in the 9 hardest, +0.09 in 10 others"
    assert compare.summary(a, b) == text


def test_ties_stand_by_index_and_absent_classes_last():
    a, b = [30.0, None, 10.0, 30.0, 5.0, 10.0], [1.0, 2.0, 3.0, 4.0, None, 6.0]
    assert compare.hardest_first(a, b) == ([2, 5, 0, 3], [1, 4])
    assert compare.hardest_first([0.0] * 12, [1.0] * 12) == (list(range(12)), [])
    with pytest.raises(ValueError):
        compare.hardest_first([1.0], [1.0, 2.0])


def test_absent_classes_count_nowhere():
    a, b = [40.0, None, 20.0, 10.0], [41.0, None, 20.0, 9.0]
    rows = compare.cells("AB", "wxyz", a, b, (70.01, 70.02))
    assert [row[0] for row in rows] == ["Class", *"zywx", "mIoU"]
    assert rows[-2][1:] == ("absent",) * 3
    assert rows[-1] == ("mIoU", "70.01", "70.02", "+0.01")  # as logged: over the present ones
    text = "1 of 3 classes rise, 1 fall; on average -1.00 in the 1 hardest, +0.50 in 2 others"
    assert compare.summary(a, b) == text


@pytest.mark.parametrize("turn", (1, -1))
def test_a_class_that_one_run_lacks_is_in_neither_miou(turn):
    a, b = ([40.0, 0.0, 20.0], [42.0, None, 21.0])[::turn]
    rows = compare.cells("AB", "xyz", a, b, (20.0, 31.5)[::turn])
    assert rows[-2] == ("y", "absent", "absent", "absent")
    assert sorted(rows[-1][1:3]) == ["30.00", "31.50"]
    assert rows[-1][3] == ("+1.50" if turn == 1 else "-1.50")
    # each lacks another one: the numbers of absent classes are equal, the classes are not
    rows = compare.cells("AB", "xyz", [None, 1.0, 8.0], [1.0, None, 9.0], (4.5, 5.0))
    assert rows[-1] == ("mIoU", "8.00", "9.00", "+1.00")
    # 0.0033 and 0.0067: the improvement is that between the printed 0.00 and 0.01
    rows = compare.cells("AB", "wxyz", [0.0, 0.0, 0.01, 1.0], [0.0, 0.0, 0.02, None], (1.0, 1.0))
    assert rows[-1] == ("mIoU", "0.00", "0.01", "+0.01")
    assert compare.cells("AB", "x", [None], [1.0], (0.0, 1.0))[-1][1:] == ("0.00", "0.00", "+0.00")


@pytest.mark.parametrize("a, counts", (([], "0 of 0"), ([None], "0 of 0"), ([3.0], "1 of 1")))
def test_few_classes_are_no_error(a, counts):
    b = [v and v + 1 for v in a]
    assert compare.summary(a, b).startswith(f"{counts} classes rise, 0 fall; ")
    assert compare.cells("AB", "x", a, b, (1.0, 2.0))[-1] == ("mIoU", "1.00", "2.00", "+1.00")


def test_equal_scores_neither_rise_nor_fall():
    assert compare.summary([1.1, 2.2], [1.1, 2.2]).startswith("0 of 2 classes rise, 0 fall; ")
    assert compare.cells("AB", "x", [1.1], [1.1], (1.1, 1.1))[1] == ("x", "1.10", "1.10", "+0.00")


def test_markdown_is_padded_to_the_widest_cell():
    text = compare.markdown([("Class", "road"), ("A", "100.00"), ("long name", "1.00")])
    assert text.splitlines() == [
        "|     Class |   road |",
        "| --------: | -----: |",
        "|         A | 100.00 |",
        "| long name |   1.00 |",
    ]


# ---- logs and folders ----


def test_a_run_is_a_folder_or_a_log_and_named_after_it(tmp_path, capsys, monkeypatch):
    iou = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    one = draw_log(tmp_path / "one/log.jsonl", iou)
    two = draw_log(tmp_path / "two.v1.jsonl", iou)
    assert printed(capsys, tmp_path / "one", two, "--rows")[0][0][1:3] == ["one", "two.v1"]
    assert printed(capsys, one, two, "--rows")[0][0][1:3] == ["one", "two.v1"]
    monkeypatch.chdir(tmp_path / "one")
    assert printed(capsys, ".", two, "--rows")[0][0][1] == "one"
    same = draw_log(tmp_path / "sub/two.v1.jsonl", iou)
    assert printed(capsys, two, same, "--rows")[0][0][1:3] == [two, same]


def test_rows_are_the_columns_turned(tmp_path, capsys):
    a = draw_log(tmp_path / "a.jsonl", [0.9, 0.2, 0.3, 0.4, None, 0.6, 0.7], miou=0.516667)
    b = draw_log(tmp_path / "b.jsonl", [0.8, 0.3, 0.3, 0.4, None, 0.6, 0.71], miou=0.518333)
    rows, below = printed(capsys, a, b, "--rows")
    columns, same = printed(capsys, a, b)
    assert [list(row) for row in zip(*columns, strict=True)] == rows and below == same
    assert columns == [
        ["Class", "disc", "ring", "square", "triangle", "star", "background", "diamond", "mIoU"],
        ["a", "20.00", "30.00", "40.00", "60.00", "70.00", "90.00", "absent", "51.67"],
        ["b", "30.00", "30.00", "40.00", "60.00", "71.00", "80.00", "absent", "51.83"],
        ["Improvement", "+10.00", *["+0.00"] * 3, "+1.00", "-10.00", "absent", "+0.16"],
    ]
    assert below == [
        "last step, test, 64 images, set cccc; one seed each",
        "2 of 6 classes rise, 1 fall; on average +3.33 in the 3 hardest, -3.00 in 3 others",
    ]


def test_last_or_best_is_read(tmp_path, capsys):
    last, best = [0.1] * 7, [0.2] * 7
    a, b = draw_log(tmp_path / "a.jsonl", last, best=best), draw_log(tmp_path / "b.jsonl", last)
    for flags, word, gain in ((), "last", "+0.00"), (("--score", "best"), "best", "-10.00"):
        rows, below = printed(capsys, a, b, "--rows", *flags)
        assert rows[-1][3] == rows[1][3] == gain and below[0].startswith(f"{word} step, ")


def test_a_folder_of_images_has_numbered_classes(tmp_path, capsys):
    a = draw_log(tmp_path / "a.jsonl", [0.3, 0.1], dataset="folder")
    b = draw_log(tmp_path / "b.jsonl", [0.3, 0.1], dataset="folder")
    rows, _ = printed(capsys, a, b)
    assert rows[0] == ["Class", "class 1", "class 0", "mIoU"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    iou = [0.1] * 7
    a = draw_log(tmp_path / "a.jsonl", iou)
    for name, more, words in (
        ("set", {"dataset": "folder"}, "data set shapes against folder"),
        (
            "on",
            {"on": "val"},
            "scored on test, 64 images, set cccc against val, 64 images, set bbb",
        ),
        ("images", {"lists": {"test": [64, "dddd"]}}, "set cccc against test, 64 images, set dddd"),
        ("count", {"lists": {"test": [65, "cccc"]}}, "64 images, set cccc against test, 65 images"),
    ):
        b = draw_log(tmp_path / f"{name}.jsonl", iou, **more)
        line = refusal(a, b)
        assert words in line and line.startswith(f"{a}, {b}: "), line
    few = draw_log(tmp_path / "few.jsonl", [0.1] * 2, dataset="folder")
    more = draw_log(tmp_path / "more.jsonl", [0.1] * 3, dataset="folder")
    assert "classes 2 against 3" in refusal(few, more)


def test_what_is_no_finished_run_is_refused(tmp_path):
    iou = [0.1] * 7
    a = draw_log(tmp_path / "a.jsonl", iou)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("half", "words", "list", "empty", "bin")}
    half = draw_log(tmp_path / "whole.jsonl", iou)
    files["half"].write_text(Path(half).read_text()[:-20])
    files["words"].write_text("no\nlog\n")
    files["list"].write_text("[1]\n2\n")
    files["empty"].write_text("")
    files["bin"].write_bytes(b"\xff\xfe\x00")
    cases = [(path, "") for path in files.values()]
    unfinished = draw_log(tmp_path / "unfinished.jsonl", iou, drop=["done"])
    cases.append((unfinished, "no line of kind done"))
    cases.append((draw_log(tmp_path / "cut.jsonl", iou, drop=["start"]), "KeyError: 'args'"))
    cases.append((tmp_path / "absent.jsonl", "(No such file or directory)"))
    cases.append((draw_log(tmp_path / "six.jsonl", iou[1:]), "6 classes, shapes has 7"))
    cases.append((draw_log(tmp_path / "strange.jsonl", iou, dataset="strange"), "strange"))
    cases.append((draw_log(tmp_path / "other.jsonl", iou, on="train"), "KeyError: 'train'"))
    files["lists"] = tmp_path / "lists.jsonl"
    files["lists"].write_text(Path(a).read_text().replace('"lists": {', '"lists": [], "other": {'))
    cases.append((files["lists"], "AttributeError"))
    for path, words in cases:
        for line in (refusal(a, path), refusal(path, a)):
            assert line.startswith(f"{path}: ") and words in line, line
    (tmp_path / "bare").mkdir()
    assert refusal(tmp_path / "bare", a).startswith(f"{tmp_path}/bare/log.jsonl: ")


def test_wrong_words_are_refused(tmp_path):
    a = draw_log(tmp_path / "a.jsonl", [0.1] * 7)
    assert "B" in refusal(a)
    assert "worst" in refusal(a, a, "--score", "worst")
    assert "third" in refusal(a, a, "third")


def test_other_labels_seeds_and_steps_are_warned_of_in_one_line(tmp_path, capsys):
    iou = [0.1] * 7
    a = draw_log(tmp_path / "a.jsonl", iou)
    for name, more, words in (
        ("labels", {"lists": {"labeled": [20, "eeee"]}}, "labelled 20 images, set aaaa against 20"),
        ("seed", {"seed": 1}, "seed 0 against 1"),
        ("steps", {"steps": 300}, "steps 600 against 300"),
        ("both", {"seed": 1, "steps": 300}, "seed 0 against 1; steps 600 against 300"),
    ):
        _, below = printed(capsys, a, draw_log(tmp_path / f"{name}.jsonl", iou, **more))
        assert len(below) == 3 and below[-1].startswith(f"warning: {words}"), below
    more = {"lists": {"val": [1, "ffff"]}}  # not what both were scored on
    assert len(printed(capsys, a, draw_log(tmp_path / "val.jsonl", iou, **more))[1]) == 2


# ---- the script ----


def test_the_script_compares_two_published_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "results/compare.py"), str(CPS), str(FPL)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4]]
    assert sorted(rows[0][1:-1]) == sorted(FACTS["camvid"]["classes"])
    assert rows[0][-5:] == ["car", "building", "road", "sky", "mIoU"]
    assert rows[2][0] == "camvid-1_8-cps" and rows[2][-5:-1] == ["1.50", "40.38", "57.43", "68.23"]
    assert rows[3][-2:] == ["82.97", "19.11"] and rows[2][-1] == "15.31"
    assert lines[4].endswith("| +14.74 | +3.80 |") and lines[5] == ""
    assert lines[6] == "last step, test, 233 images, set 5dadde69; one seed each"
    assert lines[7].startswith("4 of 11 classes rise, 1 fall; ") and len(lines) == 8


def test_a_refusal_is_one_line_and_exit_code_2(monkeypatch, capfd):
    script = str(ROOT / "results/compare.py")
    monkeypatch.setattr(sys, "argv", [script, str(CPS), "absent.jsonl"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith("compare.py: absent.jsonl: ") and err.count("\n") == 1
