"""The cache of decoded images: the same samples, bounded, checked, free to be deleted."""

import json
import os
import pickle
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

import prepare_data
from common.sources import load
from supervised import Samples, Stream
from tiny import draw_tree
from trees import flags, folder, own, picture, refusal

MASK = "trainannot/train0.png"


def make(tree, out, **more):
    prepare_data.Cache(dataset="camvid", data_root=str(tree), out=str(out), **more).run()
    return str(out)


def read_all(data):
    """Returns the arrays of all images and masks that a run may read."""
    items = data.labeled + data.unlabeled + data.val + data.test
    pairs = [data.read(item, item.label is not None) for item in items]
    return [np.asarray(picture) for pair in pairs for picture in pair if picture is not None]


@pytest.fixture
def tree(tmp_path):
    return draw_tree(tmp_path / "my tree")


def test_what_is_read_and_its_samples_are_the_same_bit_for_bit_whatever_is_cached(tree, tmp_path):
    """Whole, cut by --max-gb, in another process, and after it was deleted."""
    files = load(flags(tree, split="1/4"))
    for gb, number in ((1, 2 * (8 + 2 + 2)), (36 * 48 * (3 + 1 + 3) / 1e9, 3)):
        cache = make(tree, tmp_path / "cache", max_gb=gb)
        args = flags(tree, split="1/4", cache=cache)
        data = load(args)
        assert len(data.cache.files) == number
        copies = [data, pickle.loads(pickle.dumps(data))]  # as for a loader that is not forked
        shutil.rmtree(cache)
        copies.append(pickle.loads(pickle.dumps(data)))
        assert copies[1].cache.files and copies[2].cache is None
        stream = Stream(files.labeled, 4, True, args.scales)
        expected = Samples("labeled", stream, files, args)[3]
        for copy in copies:
            assert all(map(np.array_equal, read_all(files), read_all(copy)))
            sample = Samples("labeled", stream, copy, args)[3]
            assert all(torch.equal(sample[name], expected[name]) for name in expected)


def flip(cache, tree):
    np.memmap(f"{cache}/pixels.bin", np.uint8, "r+")[7] ^= 1


def older(cache, tree):
    index = json.load(open(f"{cache}/index.json"))
    json.dump(index | {"decoders": {"pil": "1.0"}}, open(f"{cache}/index.json", "w"))


WRONG = {  # what happened to a cache, or its files, and words of the refusal
    "a bit of a pixel": (flip, "damaged; delete it"),
    "cut off": (lambda cache, tree: os.truncate(f"{cache}/pixels.bin", 99), "99 of"),
    "empty": (lambda cache, tree: os.truncate(f"{cache}/pixels.bin", 0), "not a whole cache"),
    "another Pillow": (older, "may differ; delete it"),
    "another mask": (lambda _, tree: picture(tree / MASK, "L", 3, (48, 36)), f"{MASK} has changed"),
    "absent": (lambda cache, tree: shutil.rmtree(cache), "prepare_data.py cache --dataset camvid"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_cache_that_is_not_right_is_refused_with_its_remedy(what, tree, tmp_path):
    cache = make(tree, tmp_path / "cache")
    for path in tree.rglob("*.*"):
        os.utime(path, (0, 0))  # copied since: other times, the same content
    read_all(load(flags(tree, cache=cache)))
    spoil, words = WRONG[what]
    spoil(cache, tree)
    line = refusal(lambda: read_all(load(flags(tree, cache=cache))))
    assert words in line
    shutil.rmtree(cache, ignore_errors=True)
    prepare_data.main(shlex.split(re.search("prepare_data.py (.*) makes", line)[1]))
    read_all(load(flags(tree, cache=cache)))


def test_making_one_leaves_nothing_behind_where_it_cannot(tree, tmp_path):
    cache = make(tree, tmp_path / "cache")
    other = own(folder(tmp_path / "other"), cache=cache)
    assert "no file of this run" in refusal(load, other)
    assert "exists" in refusal(make, tree, cache)
    again = tmp_path / "again"
    assert "not even the first" in refusal(lambda: make(tree, again, max_gb=1e-6))
    (tree / "testannot/test1.png").write_bytes(b"no image")
    assert "test1.png: not readable" in refusal(make, tree, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "my tree", "other"]
