"""What a checkpoint says of its run, against the flags and classes that it is given with."""

import re

import pytest
import torch

import supervised
from common import Refusal
from tiny import SCRIPTS, draw_folder, draw_tree, flags, own_folder, resolved, script, shrink, train
from trees import listed, refusal


def classes_csv(root, *names):
    """Writes names (none: no file) into a folder's classes.csv."""
    (root / "classes.csv").unlink(missing_ok=True)
    if names:
        rows = [f"{i},{name},{90 * i},7,0" for i, name in enumerate(names)]
        listed(root / "classes.csv", "id,name,r,g,b", *rows)


def test_classes_of_other_names_are_refused_or_their_head_stays_random(
    tmp_path, monkeypatch, capsys
):
    """At --resume, --eval-only and --init; a class without a name may be any but for --init."""
    shrink(supervised, monkeypatch)
    root = draw_folder(tmp_path / "my", 3)
    classes_csv(root, "road", "car", "tree")
    run = tmp_path / "run"
    argv = own_folder(root, run, 3, iters=2, evaluate=2, save=2)
    train(supervised, argv)
    last = str(run / "last.pt")
    resume = [*argv, "--resume"]
    score = ["--eval-only", "--checkpoint", last]
    classes_csv(root, "road", "tree", "car")
    for words in (resume, score):
        with pytest.raises(Refusal, match="last.pt: class 1 is car there and tree here"):
            train(supervised, words)
    head = torch.load(last, weights_only=True)["networks"]["student"]["head.classify.1.weight"]
    for names, end in (
        (("road", "car", "tree"), ""),
        (("road", "tree", "car"), ", head random"),
        ((), ", head random"),
    ):
        classes_csv(root, *names)
        out = tmp_path / f"from {len(list(tmp_path.iterdir()))}"
        own = own_folder(root, out, 3, iters=1, evaluate=1, save=1)
        own = [word for word in own if word not in ("--weights", "none")]
        train(supervised, [*own, "--lr", "1e-9", "--init", last])
        said = re.search(r"student from its student(.*)$", capsys.readouterr().out, re.M)[1]
        begun = torch.load(out / "last.pt", weights_only=True)["networks"]["student"]
        same = torch.allclose(begun["head.classify.1.weight"], head, atol=1e-6)
        assert (said, same) == (end, not end), names
    for words in (resume, score):  # without names by now
        train(supervised, words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_split_family_that_nothing_reads_is_refused_and_one_of_a_preset_passes(name):
    """All images are every family's; a list without --split is nobody's."""
    base = ["--dataset", "voc_aug", "--total-iters", "9"]
    family = ["--split-family", "cac0"]
    for words in (["--split", "all"], ["--labeled-list", "l.txt"]):
        line = "--split-family cac0 does nothing here: it needs "
        assert refusal(resolved, script(name), base + words + family).startswith(line)
        assert resolved(script(name), base + words).split_family in ("cps", "u2pl")
    words = ["--labeled-list", "l.txt", "--split", "1/8"]  # its images are then checked
    assert resolved(script(name), base + words + family).split_family == "cac0"


def test_a_dry_run_says_how_many_images_a_process_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    tree = draw_tree(tmp_path / "data")
    for name, words, found in (
        ("esl", "--batch-size-unlabeled 8 --label topk --top-k 10", ["labelled 2", "unlabelled 2"]),
        ("cps_fpl", "--batch-size-unlabeled 4", ["labelled 2", "unlabelled 1"]),
        ("cps_fpl", "--unsup-weight 0", ["labelled 2"]),
        ("supervised", "", ["labelled 2"]),
    ):
        train(script(name), [*flags(tree, "", batch=8), *words.split(), "--dry-run"])
        rows = re.findall("^(.*labelled) per process +(.*)$", capsys.readouterr().out, re.M)
        assert [" ".join(row) for row in rows] == found, name
