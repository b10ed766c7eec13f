"""Real data sets in: published splits, VOC with SBD, Cityscapes, CamVid, COCO; checks, statistics.

python prepare_data.py splits --family cps        # the published lists, into data/splits
"""

import re
import urllib.request
from pathlib import Path

from common import Refusal
from common.data import FACTS, SPLITS, choose, read_list, set_hash

LISTS = Path("data/splits")  # <data set>/<family>/<split>.txt: one key per line
SCHEMES = ("https",)


def same_set(keys, entry):
    """Returns "" if keys are the published set, else what differs."""
    found, true = (len(keys), set_hash(keys)), (entry["images"], entry["set"])
    if found == true:
        return ""
    return "{} images, set {}, instead of {}, set {}".format(*found, *true)


def fetch_list(dataset, family, split, source=""):
    """Returns the path of a published list under data/splits; fetched first if it is not there.

    family: "parts" (split: train or val) or a family of splits. source: a folder with lists in any
    format, searched for one with the right set, instead of the network. Raises Refusal.
    """
    entry, pattern = SPLITS[dataset][family][split], FACTS[dataset]["key"]
    path = LISTS / dataset / family / f"{split.replace('/', '_')}.txt"
    if not path.is_file():
        raise Refusal(f"{path}: python prepare_data.py splits --family {family}")
    return path


def named(args, pool, val):
    """Returns (labelled, unlabelled) keys of --split in its --split-family; every set is checked.

    pool, val: the keys of the training images and of val that are here. Raises Refusal where a set
    is not the published one.
    """
    splits, what = SPLITS[args.dataset], f"--split {args.split} of {args.dataset}"
    family, pool = splits[args.split_family], sorted(pool)
    if args.split not in ("all", *family):
        names = ", ".join(["all", *family])
        some = f"{args.split_family} has {names}; else --split-seed (1/r) or --labeled-list"
        raise Refusal(f"{what}: {some}")
    sets = [(pool, splits["parts"]["train"]), (val, splits["parts"]["val"])]
    labeled, unlabeled = choose(pool, "all", None)
    if args.split != "all":
        entry = family[args.split]
        if "url" in entry:
            path = fetch_list(args.dataset, args.split_family, args.split)
            labeled = list(read_list(path, FACTS[args.dataset]["key"]))
        else:
            labeled, _ = choose(pool, args.split, None)
        unlabeled = sorted(set(pool) - set(labeled))
        sets.append((labeled, entry))
    for keys, entry in sets:
        if wrong := same_set(keys, entry):
            raise Refusal(f"{what}: {wrong}; python prepare_data.py check, or --labeled-list")
    return labeled, unlabeled
