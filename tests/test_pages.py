"""What the documents say is run or compared: tags, commands, links, tables, pictures, --help."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import cps_fpl
import prepare_data
from benchmarks import runs
from common import pictures
from common.data import FACTS, set_hash
from common.run import parse
from docs import draw_shapes
from results import table
from sources import read_list
from tiny import ROOT, SCRIPTS, resolved, shrink, train
from tiny import script as module_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {name: ((ROOT / f"{name}.py").read_text(), ROOT / f"docs/{name}.md") for name in SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_tag_of_a_script_has_its_row_and_every_row_its_tag(name):
    text, page = TEXTS[name]
    tags = re.findall(r"\[D(\d+)\]", text)
    rows = re.findall(r"^\| D(\d+) \|(.*)\|$", page.read_text(), re.M)
    assert set(tags) == {number for number, _ in rows}
    assert len(rows) == len({number for number, _ in rows})
    assert {str(i) for i in range(1, 7)} <= set(tags)  # the shared text's
    for number, cells in rows:
        assert cells.count("|") == 4, f"row D{number} has not the columns of its table"


@pytest.mark.parametrize("name", SCRIPTS)
def test_code_words_in_the_pages_exist(name):
    """`name` in a page's "Where to look" table is a function, class or seam of the script."""
    section = TEXTS[name][1].read_text().split("## Where to look")[1].split("## ")[0]
    words = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*\|([^|]*)", section, re.M)))
    assert words
    for word in words:
        assert hasattr(module_of(name), word) or word in ("losses", "main"), word


def commands():
    """Yields (place, words) of every printed command line."""
    texts = [(page.name, page.read_text(), r"    .*\b\w+\.py\b") for page in PAGES]
    texts += [(n, text.split('"""')[1], r" +(python|torchrun) ") for n, (text, _) in TEXTS.items()]
    for place, text, pattern in texts:
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(pattern, line):
                for part in line.split(" && "):
                    yield place, shlex.split(part, comments=True)


def test_every_printed_command_parses_and_resolves():
    seen = 0
    for place, words in commands():
        script = next((w for w in words if w.endswith(".py") and w[:-3] in SCRIPTS), None)
        if words[0] in ("python", "torchrun") and script:
            argv = words[words.index(script) + 1 :]
            args = resolved(module_of(script[:-3]), argv)
            assert args.total_iters or args.list_presets, (place, words)
            seen += 1
        elif words[0] in ("python", "diff"):
            for word in words:
                assert not word.endswith(".py") or (ROOT / word).exists(), (place, words)
    assert seen >= 10


def test_links_and_named_tests_lead_somewhere():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
        for target in re.findall(r"\btests/\w+\.\w+", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in tests, f"{page.name}: {name}"


def test_the_tables_are_what_the_logs_say():
    for page in table.PAGES:
        assert table.inserted(page) == (ROOT / page).read_text(), "python results/table.py --write"


def test_every_published_log_is_whole():
    logs = sorted((ROOT / "results").glob("*/*.jsonl"))
    assert logs
    for path in logs:
        start, train_lines, evals, done = table.read(path)
        assert start["kind"] == "start" and len(start["sha256"]) == 64, path
        assert train_lines[-1]["step"] == done["step"] == start["args"]["total_iters"], path
        assert evals and max(e["miou"] for e in evals) > 0, path
        if "camvid" in path.name:
            assert done["step"] >= 600 and done["on"] == "test", path
            assert done["last"]["miou"] >= 2 * done["last"]["constant"], path


def test_the_picture_of_shapes_shows_the_pictures_that_are_drawn(tmp_path):
    palette = np.array(FACTS["shapes"]["palette"], np.uint8)
    pictures.save_panels(tmp_path / "now.png", draw_shapes.rows(), palette, height=112)
    now = np.asarray(Image.open(tmp_path / "now.png"), float)
    then = np.asarray(Image.open(ROOT / "docs/shapes.png"), float)
    assert now.shape == then.shape
    assert abs(now - then).mean() < 2, "python docs/draw_shapes.py"  # fonts may differ


@pytest.mark.smoke
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag_and_what_it_means(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(module_of(name).Args, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    for field in dataclasses.fields(module_of(name).Args):
        assert "--" + field.name.replace("_", "-") in text, field.name
    source = TEXTS[name][0].split("class Args")[1].split("\ndef ")[0]
    meanings = re.findall(r"^    (\w+): .*?  # (.+)$", source, re.M)
    assert len(meanings) > 35
    for flag, meaning in meanings:
        assert " ".join(meaning.split()[:4]) in text, f"{flag}: {meaning}"


@pytest.mark.skipif(not os.environ.get("SPLITS"), reason="SPLITS: a folder of published lists")
def test_the_printed_command_draws_the_sets_that_fpl_had_on_ael(tmp_path):
    """docs/ael_fpl.md: seed 1 on the train.txt of CPS's repository, and the hashes of four sets."""
    page = (ROOT / "docs/ael_fpl.md").read_text()
    (line,) = re.findall(r"^    (python -c .*) > ael_1_16\.txt$", page, re.M)
    shutil.copy(f"{os.environ['SPLITS']}/cps/city/config_new/train.txt", tmp_path)
    hashes = re.search(r"Seed 1 gives the sets (.*?);", page, re.S)[1]
    sets = re.findall(r"(\w{8}) \((\d+)\)", hashes)
    assert len(sets) == 4
    for key, count in sets:
        words = [sys.executable] + [w.replace("186", count) for w in shlex.split(line)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        (tmp_path / "l.txt").write_text(done.stdout)
        rows = read_list(tmp_path / "l.txt", FACTS["cityscapes"]["key"])
        assert (len(rows), set_hash(rows)) == (int(count), key)


def draw_own_images(root, classes, ignore):
    """Draws 8 training images, 5 with masks, and 3 of val: odd sizes, 4 modes, holes in masks."""
    rng = np.random.default_rng(classes)
    modes = (("RGB", "jpg"), ("RGBA", "png"), ("L", "png"), ("P", "png"))
    for part, i in [("train", i) for i in range(8)] + [("val", i) for i in range(3)]:
        h, w = rng.integers(21, 60, 2)
        mask = rng.integers(0, classes, (h // 6 + 1, w // 6 + 1)).repeat(6, 0).repeat(6, 1)
        mask = mask[:h, :w].astype(np.uint8)
        picture = np.stack([mask * 40, mask * 90, mask * 7], 2).astype(np.uint8)
        masked = Image.fromarray(mask)
        if part == "val" and classes == 2:  # 1-bit masks
            masked = Image.fromarray(mask * 255).convert("1", dither=Image.Dither.NONE)
        else:
            masked.paste(ignore, (0, 0, int(w) // 3, int(h) // 3))
        for kind in ("images", "masks"):
            (root / kind / part / "more").mkdir(parents=True, exist_ok=True)
        name = f"{part}/more/{i} b" if i == 1 else f"{part}/{i}"
        mode, suffix = modes[i % 4]
        Image.fromarray(picture).convert(mode).save(root / f"images/{name}.{suffix}")
        if part == "val" or i < 5:
            masked.save(root / f"masks/{name}.png")


@pytest.mark.parametrize("classes, ignore", [(2, 255), (4, 255), (12, 12), (81, 200), (4, 0)])
def test_your_own_images_in_ten_lines(classes, ignore, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/data.md").read_text().split("## Your own images in ten lines")[1]
    block = [line[4:] for line in page.split("\n## ")[0].splitlines() if line.startswith("    ")]
    assert 5 <= len(block) <= 10
    monkeypatch.chdir(tmp_path)
    shrink(cps_fpl, monkeypatch)
    draw_own_images(tmp_path / "my", classes, ignore)
    small = "--backbone resnet18 --weights none --crop-size 32 --total-iters 2 --batch-size 2 "
    small += "--workers 0 --log-every 1 --save-every 2 --device cpu --out runs/my"
    done = []
    for words in (line.split() for line in block if line.startswith("python ")):
        argv = [str(classes) if w == "4" else w for w in words[2:]] + [
            "--ignore-index",
            str(ignore),
        ]
        if words[1] == "prepare_data.py":
            prepare_data.main(argv)
            done.append(argv[0])
        else:
            train(cps_fpl, argv + small.split())
            done.append("dry run" if "--dry-run" in argv else "run")
    assert done == ["check", "stats", "dry run", "run"]
    assert "every file can be read" in capsys.readouterr().out
    start, *_, last = runs.log(tmp_path / "runs/my")
    assert [start["lists"][n][0] for n in ("labeled", "unlabeled", "val")] == [5, 8, 3]
    assert len(last["last"]["iou"]) == classes
    with Image.open("classes.png") as chart:
        assert min(chart.size) > 100 and len(np.unique(chart.convert("L"))) > 10
