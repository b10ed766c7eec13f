"""What the documents say is run or compared: tags, commands, links, tables."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import prepare_data
import supervised
import u2pl
from common import pictures
from common.data import FACTS, set_hash
from common.run import cells, describe, parse, resolve
from docs import draw_shapes
from results import table
from sources import load, read_list
from tests import helpers
from tests.test_copies import ROOT, SCRIPTS

MODULES = {"supervised.py": supervised, "mean_teacher.py": mean_teacher, "cps_fpl.py": cps_fpl}
MODULES |= {"ael_fpl.py": ael_fpl, "u2pl.py": u2pl, "esl.py": esl}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def scripts():
    return [name for name in SCRIPTS if (ROOT / name).exists()]


def test_every_tag_of_a_script_has_its_row_and_every_row_its_tag():
    for name in scripts():
        tags = set(re.findall(r"\[D(\d+)\]", (ROOT / name).read_text()))
        page = (ROOT / "docs" / name.replace(".py", ".md")).read_text()
        rows = re.findall(r"^\| D(\d+) \|(.*)\|$", page, re.M)
        assert tags == {number for number, _ in rows}, name
        assert len(rows) == len(set(rows)), name
        for number, cells_ in rows:
            assert cells_.count("|") == 4, f"{name}: row D{number} has not the columns of its table"


def test_shared_tags_stand_in_every_script():
    for name in scripts():
        text = (ROOT / name).read_text()
        assert all(f"[D{i}]" in text for i in range(1, 7)), name


def commands():
    for page in PAGES:
        for line in page.read_text().splitlines():
            if line.startswith("    ") and re.search(r"\b\w+\.py\b", line):
                yield page.name, line.strip()
    for name in scripts():
        header = (ROOT / name).read_text().split('"""')[1].replace("\\\n", " ")
        for line in header.splitlines():
            if re.match(r" +(python|torchrun) ", line):
                yield name, line.strip()


def test_every_printed_command_parses_and_resolves():
    seen = 0
    for place, line in commands():
        for part in line.split(" && "):
            words = shlex.split(part.replace("\\", ""), comments=True)
            script = next((w for w in words if w in MODULES), None)
            if words[0] in ("python", "torchrun") and script:
                argv = words[words.index(script) + 1 :]
                module = MODULES[script]
                args = resolve(parse(module.Args, argv), module.preset)
                assert args.total_iters or args.list_presets, (place, line)
                seen += 1
            elif words[0] in ("python", "diff"):
                for word in words:
                    assert not word.endswith(".py") or (ROOT / word).exists(), (place, line)
    assert seen >= 10


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tables_are_what_the_logs_say():
    for page in table.PAGES:
        text = (ROOT / page).read_text()
        assert table.inserted(page) == text, "python results/table.py --write"


def test_every_published_log_is_whole():
    logs = sorted((ROOT / "results").glob("*/*.jsonl"))
    assert logs
    for path in logs:
        start, train, evals, done = table.read(path)
        assert start["kind"] == "start" and len(start["sha256"]) == 64, path
        assert train[-1]["step"] == done["step"] == start["args"]["total_iters"], path
        assert evals and max(e["miou"] for e in evals) > 0, path
        if "camvid" in path.name:
            assert done["step"] >= 600 and done["on"] == "test", path
            assert done["last"]["miou"] >= 2 * done["last"]["constant"], path


def test_presets_printed_are_the_papers_and_resolve():
    entries = json.loads((ROOT / "common/papers.json").read_text())
    for name, module in MODULES.items():
        lines = cells(name).splitlines()
        mine = [e for e in entries if e["script"] == name.removesuffix(".py")]
        assert len(lines) == sum(len(e["miou"]) for e in mine) > 12
        for line in lines:
            flags = shlex.split(re.search(r"--dataset .*?(?=  )", line)[0])
            text = describe(resolve(parse(module.Args, flags), module.preset), load)
            assert re.search(r"^total_iters +[1-9]\d+", text, re.M), line


def test_the_picture_of_shapes_shows_the_pictures_that_are_drawn(tmp_path):
    palette = np.array(FACTS["shapes"]["palette"], np.uint8)
    pictures.save_panels(tmp_path / "now.png", draw_shapes.rows(), palette, height=112)
    now, then = (
        np.asarray(Image.open(p), float) for p in (tmp_path / "now.png", ROOT / "docs/shapes.png")
    )
    assert now.shape == then.shape
    assert abs(now - then).mean() < 2, "python docs/draw_shapes.py"  # fonts may differ


def test_code_words_in_the_pages_exist():
    """`name` in a page's "Where to look" table is a function, class or seam of the script."""
    for name in scripts():
        page = (ROOT / "docs" / name.replace(".py", ".md")).read_text()
        section = page.split("## Where to look")[1].split("## ")[0]
        for line in section.splitlines():
            if line.startswith("| ") and "|" in line[2:]:
                for word in re.findall(r"`(\w+)`", line.split("|")[2]):
                    exists = hasattr(MODULES[name], word)
                    assert exists or word in ("losses", "main"), f"{name}: {word}"


@pytest.mark.smoke
def test_help_shows_every_flag_and_what_it_means(capsys):
    for module in MODULES.values():
        with pytest.raises(SystemExit) as stop:
            parse(module.Args, ["--help"])
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert stop.value.code == 0
        for field in dataclasses.fields(module.Args):
            assert "--" + field.name.replace("_", "-") in text, field.name
        source = (ROOT / f"{module.__name__}.py").read_text().split("class Args")[1]
        meanings = re.findall(r"^    (\w+): .*?  # (.+)$", source.split("\ndef ")[0], re.M)
        assert len(meanings) > 35
        for name, meaning in meanings:
            assert " ".join(meaning.split()[:4]) in text, f"{name}: {meaning}"


def test_the_64_cells_of_fpls_tables_1_to_3_resolve_with_a_dry_run(capsys):
    seen = []
    for line in cells("cps_fpl.py").splitlines():
        words, source = re.search(r"(--dataset .*?)  +(.*)", line).groups()
        if re.match(r"FPL Table [123],", source):
            args = resolve(parse(cps_fpl.Args, shlex.split(words) + ["--dry-run"]), cps_fpl.preset)
            cps_fpl.main(args)
            rows = dict(row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines())
            assert rows["T"] in ("0.85", "0.9", "0.95"), words
            assert rows["total_iters"] == ("44640" if args.dataset == "cityscapes" else "39680")
            assert (rows["unsup_loss"] == "ce") == ("FPL" not in source.split(",")[1]), line
            assert (rows["cutmix"] == "True") == ("w/o" not in source), line
            seen.append(tuple(rows[n] for n in "dataset split backbone unsup_loss cutmix".split()))
    assert len(seen) == len(set(seen)) == 64


def test_the_28_cells_of_fpls_tables_1_and_2_on_ael_resolve_with_a_dry_run(capsys):
    seen = []
    for line in cells("ael_fpl.py").splitlines():
        words, source = re.search(r"(--dataset .*?)  +(.*)", line).groups()
        args = resolve(parse(ael_fpl.Args, shlex.split(words) + ["--dry-run"]), ael_fpl.preset)
        ael_fpl.main(args)
        rows = dict(row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines())
        assert rows["T"] in ("0.85", "0.9", "0.95"), words
        assert rows["total_iters"] == ("18000" if args.dataset == "cityscapes" else "39680")
        assert (rows["unsup_loss"] == "fpl") == ("FPL+AEL" in source), line
        assert rows["batch_size"] == "16" and rows["batch_size_unlabeled"] == "8"
        seen.append(tuple(rows[n] for n in "dataset split backbone unsup_loss".split()))
    assert len(seen) == len(set(seen)) == 28


def test_the_printed_command_draws_the_sets_that_fpl_had_on_ael(tmp_path):
    """docs/ael_fpl.md: seed 1 on the train.txt of CPS's repository, and the hashes of four sets."""
    folder = Path(os.environ.get("SPLITS", "")) / "cps/city/config_new"
    if not os.environ.get("SPLITS"):
        pytest.skip("SPLITS names no folder of published lists")
    page = (ROOT / "docs/ael_fpl.md").read_text()
    (line,) = re.findall(r"^    (python -c .*) > ael_1_16\.txt$", page, re.M)
    shutil.copy(folder / "train.txt", tmp_path)
    hashes = re.search(r"Seed 1 gives the sets (.*?);", page, re.S)[1]
    for key, count in re.findall(r"(\w{8}) \((\d+)\)", hashes):
        words = [w.replace("186", count) for w in shlex.split(line)]
        words[0] = sys.executable
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        (tmp_path / "l.txt").write_text(done.stdout)
        rows = read_list(tmp_path / "l.txt", FACTS["cityscapes"]["key"])
        assert (len(rows), set_hash(rows)) == (int(count), key)
    assert hashes.count("(") == 4


def draw_own_images(root, classes, ignore):
    """Draws 8 training images, 5 with masks, and 3 of val: odd sizes, 4 modes, holes in masks."""
    rng = np.random.default_rng(classes)
    modes = (("RGB", "jpg"), ("RGBA", "png"), ("L", "png"), ("P", "png"))
    for part, count in (("train", 8), ("val", 3)):
        for i in range(count):
            h, w = rng.integers(21, 60, 2)
            mask = rng.integers(0, classes, (h // 6 + 1, w // 6 + 1)).repeat(6, 0).repeat(6, 1)
            mask = mask[:h, :w].astype(np.uint8)
            picture = np.stack([mask * 40, mask * 90, mask * 7], 2).astype(np.uint8)
            mode, suffix = modes[i % 4]
            if part == "train" or classes > 2:  # where classes are two, val has 1-bit masks
                mask[: h // 3, : w // 3] = ignore
            masked, save = Image.fromarray(mask), part == "val" or i < 5
            if part == "val" and classes == 2:
                masked = Image.fromarray(mask * 255).convert("1", dither=Image.Dither.NONE)
            for folder in ("images", "masks"):
                (root / folder / part / "more").mkdir(parents=True, exist_ok=True)
            name = f"{part}/more/{i} b" if i == 1 else f"{part}/{i}"
            Image.fromarray(picture).convert(mode).save(root / f"images/{name}.{suffix}")
            masked.save(root / f"masks/{name}.png") if save else None


@pytest.mark.parametrize("classes, ignore", [(2, 255), (4, 255), (12, 12), (81, 200), (4, 0)])
def test_your_own_images_in_ten_lines(classes, ignore, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/data.md").read_text().split("## Your own images in ten lines")[1]
    block = [line[4:] for line in page.split("\n## ")[0].splitlines() if line.startswith("    ")]
    assert 5 <= len(block) <= 10
    monkeypatch.chdir(tmp_path)
    helpers.shrink(cps_fpl, monkeypatch)
    draw_own_images(tmp_path / "my", classes, ignore)
    small = "--backbone resnet18 --weights none --crop-size 32 --total-iters 2 --batch-size 2 "
    small += "--workers 0 --log-every 1 --save-every 2 --device cpu --out runs/my"
    own, done = ["--ignore-index", str(ignore)], []
    for words in (line.split() for line in block if line.startswith("python ")):
        argv = [str(classes) if w == "4" else w for w in words[2:]] + own
        if words[1] == "prepare_data.py":
            prepare_data.main(argv)
            done.append(argv[0])
        else:
            helpers.train(cps_fpl, argv + small.split())
            done.append("dry run" if "--dry-run" in argv else "run")
    assert done == ["check", "stats", "dry run", "run"]
    text = capsys.readouterr().out
    assert "every file can be read" in text
    start, *_, last = helpers.log(tmp_path / "runs/my")
    assert [start["lists"][n][0] for n in ("labeled", "unlabeled", "val")] == [5, 8, 3]
    assert len(last["last"]["iou"]) == classes
    with Image.open("classes.png") as chart:
        assert min(chart.size) > 100 and len(np.unique(chart.convert("L"))) > 10
