"""Which images there are and which are labelled: layouts on disk, lists, published splits.

common/data.py says what a data set is and reads an image; prepare_data.py has the commands.
"""

import functools
import hashlib
import http.client
import math
import os
import re
import shlex
import tempfile
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import Refusal, note, shapes
from common.cache import with_cache
from common.data import CONVERT, FACTS, IGNORE, SPLITS, Data, Item, counts, read_classes, set_hash

LISTS = Path("data/splits")  # <data set>/<family>/<split>.txt: one key per line
SCHEMES = ("https",)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # of photographs
LITTER = ("Thumbs.db", "desktop.ini")  # what file managers leave


def read_list(path, pattern, root=""):
    """Returns {key: (image, mask)} of a list file, in its order: the columns as written, or None.

    One or two columns, split at TAB if there is one, else at spaces. Leading slashes, "None", CRLF,
    empty lines and a missing final newline are fine; an absolute path below root is one from root.
    The key is what pattern finds in the first column. Raises Refusal on a line without one, a key
    that comes twice, a path with "..", no line.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise Refusal(f"{path}: not a readable list ({error})") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refusal(f"{path}: not a readable list (UTF-16): save it as UTF-8")
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    rows = {}
    text = text.replace("\\", "/")  # written on Windows
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line:
            continue
        separator = None
        if "\t" in line:
            separator = "\t"
        image, *masks = [from_root(column.strip(), root) for column in line.split(separator)]
        match = re.search(pattern, image)
        if wrong := fault(line, [image, *masks], match, rows):
            raise Refusal(f"{path}:{number}: {wrong}: {line}")
        rows[match[0]] = (image, None)
        if masks not in ([], ["None"]):
            rows[match[0]] = (image, masks[0])
    if not rows:
        raise Refusal(f"{path}: an empty list")
    return rows


def from_root(column, root):
    """Returns a column of a list without leading slashes; without root, where it is below that."""
    if root and os.path.isabs(column):
        for top in (os.path.abspath(root), os.path.realpath(root)):
            top = top.replace("\\", "/")
            if column.startswith(top + "/"):
                return column[len(top) :].lstrip("/")
    return column.lstrip("/")


def fault(line, columns, match, rows):
    """Returns what is wrong with a line of a list, "" if nothing; rows: those before it."""
    if "\0" in line:
        return "a NUL"
    if any(".." in Path(column).parts for column in columns):
        return "a path with .."
    ends = "|".join(SUFFIXES).replace(".", "[.]")
    between = re.search(rf"(?i)(?:{ends})([,;|])", line)
    if match and not between:
        between = re.match("([,;|])", columns[0][match.end() :])
    if between:
        return f"columns with {between[1]} between them: TAB or a space is read"
    if len(columns) > 2:
        return "more than two columns"
    if not match:
        return "no image key"
    if match[0] in rows:
        return "twice"
    return ""


def by_stem(rows, known):
    """Returns rows of a list, where a bare id that is no known key is the one image of that stem.

    known: {key: row} of the training images, whose keys may name sub-folders.
    """
    stems = {}
    for key in known:
        stems.setdefault(key.rpartition("/")[2], []).append(key)
    found = {}
    for key, row in rows.items():
        same = stems.get(key, [])
        if key not in known and "/" not in row[0] and len(same) == 1:
            key = same[0]
        if key in found:
            raise Refusal(f"{row[0]}: {key} twice in a list")
        found[key] = row
    return found


def load(args):
    """Returns the Data that the flags name; every file that will be opened exists. Raises Refusal.

    dataset, data_root; num_classes and ignore_index of a folder; which images are labelled as
    `training` has it (with eval_only none are looked for). All lists are sorted: a set gives one
    stream of samples, in whatever order it came.
    """
    own = args.dataset == "folder"
    tree = Tree(args.dataset, args.data_root, any_ids=bool(args.labeled_list))
    rows = tree.classes()
    if own:
        check_classes(args, tree, rows)
    if not own and (args.num_classes or args.ignore_index != IGNORE):
        raise Refusal("--num-classes, --ignore-index: with --dataset folder alone")
    scored = getattr(args, "eval_only", False)
    needed = ["val", "test"]
    if scored:
        needed = [args.eval_on]
    held = {"val": {}, "test": {}}
    for part in needed:
        held[part] = tree.part(part)
    part = needed[0]
    if not held[part]:
        where = ", ".join(tree.facts["parts"].get(part, ["it has no such images"]))
        unread = tree.unread(part)
        hint = f"; no photograph by its suffix: {unread[0]}" if unread else ""
        raise Refusal(f"{tree.root}: no {part} of {args.dataset} here ({where}){hint}")
    if published(args) and part == "val":
        known_set(f"val of {args.dataset}", held["val"], SPLITS[args.dataset]["parts"]["val"])
    val = tree.items("val", held["val"])
    test = tree.items("test", held["test"])
    if scored and not getattr(args, "precise_bn", 0):
        return with_cache(Data(args, [], [], val, test, rows), args)
    labeled, unlabeled, train = training(args, tree)
    labeled = tree.items("train", labeled, train, args.labeled_list)
    unlabeled = tree.items("train", unlabeled, train, args.unlabeled_list, masks=False)
    taught = files_of(labeled + unlabeled)
    leak = set(taught) & set(files_of(val + test))
    if leak:
        first = min(taught[file] for file in leak)
        raise Refusal(f"{len(leak)} images to train on are in val or test, {first} first")
    tell_strays(tree, {"train": train} | held)
    return with_cache(Data(args, labeled, unlabeled, val, test, rows), args)


def check_classes(args, tree, rows):
    """Raises Refusal where a folder's flags do not say which classes its masks have.

    rows: those of its classes.csv, if it has one; --num-classes may then be left out.
    """
    count = len({row.id for row in rows} - {IGNORE})
    if rows and args.num_classes not in (0, count):
        where = f"{tree.root / 'classes.csv'} has {count}"
        raise Refusal(f"--num-classes {args.num_classes}: {where}; leave it out")
    count = count or args.num_classes
    if not 2 <= count <= 254:
        raise Refusal(f"--num-classes {count}: how many the masks have, 2 to 254")
    ignored = args.ignore_index
    if not 0 <= ignored <= 255:
        raise Refusal(f"--ignore-index {ignored}: a value of a mask, 0 to 255")
    if ignored < count:  # a class that no label has would be predicted and scored
        ways = f"{CONVERT} that run from 0, and 255 for value {ignored}"
        raise Refusal(f"--ignore-index {ignored}: one of the classes 0 to {count - 1}; {ways}")


def files_of(items):
    """Returns {real file: file as named} of Items; the keys of those that have none."""
    names = [item.image or item.key for item in items]
    real_folder = functools.cache(os.path.realpath)  # asked once: each file is one look, not six
    found = {}
    for name in names:
        if os.path.islink(name):
            found[os.path.realpath(name)] = name
        else:
            folder, file = os.path.split(name)
            found[os.path.join(real_folder(folder), file)] = name
    return found


def tell_strays(tree, parts):
    """Says once which files of a tree nothing reads: parts {part: rows}."""
    for part, rows in parts.items():
        for line in tree.strays(part, rows):
            note(line)


def training(args, tree):
    """Returns (labelled, unlabelled, all training rows) of a Tree, by the flags. Raises Refusal.

    split with split_family, or with split_seed as `choose` has it; or labeled_list and
    unlabeled_list: without the second all other images are unlabelled. A folder's images without a
    mask are unlabelled whatever the split.
    """
    if args.unlabeled_list and not args.labeled_list:
        raise Refusal("--unlabeled-list without --labeled-list: give both")
    listed = {}
    if args.labeled_list:
        listed = read_list(args.labeled_list, tree.facts["key"], tree.root)
    other_ids = not all(re.search(FACTS[tree.name]["key"], image) for image, _ in listed.values())
    train = tree.part("train", fetch=not (args.unlabeled_list or other_ids))
    if other_ids and not train:
        train = tree.part("train of other ids")
    if args.labeled_list:
        labeled = by_stem(listed, train)
        unlabeled = {key: row for key, row in train.items() if key not in labeled}
        if args.unlabeled_list:
            unlabeled = read_list(args.unlabeled_list, tree.facts["key"], tree.root)
            unlabeled = by_stem(unlabeled, train)
        what = f"--labeled-list {args.labeled_list} with --split {args.split}"
        entry = SPLITS.get(args.dataset, {}).get(args.split_family, {}).get(args.split)
        if entry:
            known_set(what, labeled, entry, "leave --split out, or give another --split-family")
        count = 0
        if args.split != "all":
            count, _ = counts(args.dataset, args.split)
        if not entry and count not in (0, len(labeled)):
            raise Refusal(f"{what}: {len(labeled)} images, not {count}; leave --split out")
        return labeled, unlabeled, train
    masked = list(train)
    if args.dataset == "folder":  # a mask need not be there, but one that a list names must
        masked = [key for key, row in train.items() if row[1] or tree.file("train", key, [row], 1)]
    if not masked:
        lines = [f"{tree.root}: no image to train on with a mask", *tree.strays("train", train)]
        raise Refusal("; ".join([*lines, "see docs/data.md"]))
    if published(args):
        labeled, unlabeled = named(args, masked)
    else:
        labeled, unlabeled = choose(masked, args.split, args.split_seed)
    if len(masked) < len(train):
        unlabeled = train if args.split == "all" else set(train) - set(labeled)
    labeled = {key: train[key] for key in labeled}
    unlabeled = {key: train[key] for key in unlabeled}
    return labeled, unlabeled, train


class Tree:
    """A data set's folder in any of its known layouts. A row is (image, mask): places, or None."""

    def __init__(self, name, root="", any_ids=False):
        """root: "" takes the usual folder. Raises Refusal if there is none.

        any_ids: images of VOC's layout may have other names than VOC's; lists say which they are.
        """
        self.name = name
        self.facts = FACTS[name]
        if any_ids and "any_key" in self.facts:
            self.facts = self.facts | {"key": self.facts["any_key"]}
        self.root = Path(root or self.facts.get("root", "."))
        self.real = os.path.realpath(self.root)
        if not self.root.is_dir():
            what = f"--data-root names that of {name}, see docs/data.md"
            raise Refusal(f"{self.root}: no such folder; {what}")
        if name == "cityscapes" and list(self.root.glob("**/label_colors.txt"))[:1]:
            why = "label_colors.txt lies there: datumaro or CVAT wrote it, with ids of its own"
            raise Refusal(f"{self.root}: {why}; {CONVERT} by colour or name, for --dataset folder")

    def classes(self):
        """Returns the ClassRows of a folder's classes.csv, [] without one. Raises Refusal."""
        path = self.root / "classes.csv"
        if self.name != "folder" or not path.is_file():
            return []
        return read_classes(path)

    def image_folder(self, part):
        """Returns the folder whose files are the images of a part, where no list names them."""
        return self.root / self.facts["parts"][part][-1].partition("*")[0]

    def unread(self, part):
        """Returns the files below that folder which are no photographs by their suffix, sorted."""
        if len(self.facts.get("label", ())) != 1:  # not the one place of its images
            return []
        files = files_below(self.image_folder(part))
        return [path for path in files if path.suffix.lower() not in SUFFIXES]

    def strays(self, part, rows):
        """Returns lines on the files of a part that nothing reads; rows: {key: row} of the part.

        Photographs of unknown suffix and masks that go with no image, where the images are those of
        a folder: a list names what it wants.
        """
        if len(self.facts.get("label", ())) != 1 or not rows:
            return []
        if any(not isinstance(image, Path) for image, _ in rows.values()):
            return []
        lines = []
        unread = self.unread(part)
        place = self.facts["label"][0].partition("{key}")[0]
        masks = self.root / place.format(part=part)
        used = {self.file(part, key, [row], 1) for key, row in rows.items()}
        alone = []
        if "{part}" in place:  # COCO's lie together
            alone = [p for p in files_below(masks) if p not in used and not p.is_dir()]
        why = f"files that are no photograph by their suffix ({' '.join(SUFFIXES)})"
        links = [path for path in unread if path.is_dir()]
        for folder, files, reason in (
            (self.image_folder(part), [path for path in unread if path not in links], why),
            (self.image_folder(part), links, "links to folders, which are not followed"),
            (masks, alone, "masks that go with no image (named as it, with .png)"),
        ):
            if files:
                lines.append(f"{folder}: {reason}: {len(files)}, {files[0].name} first")
        return lines

    def part(self, part, fetch=True):
        """Returns {key: row}, sorted, of train, val or test: what is here, or a published list."""
        if self.name == "shapes":
            return dict.fromkeys(shapes.keys(part), (None, None))
        pattern = self.facts["key"]
        for place in self.facts["parts"].get(part, ()):
            rows = {}
            for path in self.root.glob(place):
                inside = path.relative_to(self.root).as_posix()
                match = re.search(pattern, inside)
                if place.endswith(".txt"):
                    rows = self.by_id(part, read_list(path, pattern, self.root))
                elif match and path.suffix.lower() in SUFFIXES and "/." not in f"/{inside}":
                    if match[0] in rows:
                        raise Refusal(f"{path}: another image has the key {match[0]} too")
                    rows[match[0]] = (path, None)
            if rows:
                return dict(sorted(rows.items()))
        found = any((self.root / p.split("{")[0]).is_dir() for p in self.facts["image"])
        if not found or part not in SPLITS.get(self.name, {}).get("parts", {}):
            return {}
        if part == "train" and not fetch:  # lists name all that is wanted
            return {}
        return dict(sorted(read_list(fetch_list(self.name, "parts", part), pattern).items()))

    def by_id(self, part, rows):
        """Returns rows of a folder's own list, with the file of each image that is named by id."""
        if self.name != "folder":
            return rows
        files = {}
        twice = {}
        for path in files_below(self.image_folder(part)):
            place = path.relative_to(self.root).as_posix()
            if path.suffix.lower() in SUFFIXES:
                key = re.search(self.facts["key"], place)[0]
                if key in files:
                    twice[key] = path
                files[key] = (place, None)
        found = by_stem(rows, files)
        for key in set(found) & set(files):
            image, mask = found[key]
            if (self.root / image).is_file():
                continue
            if key in twice:
                why = f"another image has the key {key} too; a list may name the file"
                raise Refusal(f"{twice[key]}: {why}")
            found[key] = (files[key][0], mask)
        return found

    def places(self, part, key, rows, kind):
        """Yields where a file may be (kind 0: an image, 1: a mask): the columns of rows first.

        What a list names is left out where links lead it out of the folder; a mask that it names
        for a folder has no other place.
        """
        for row in rows:
            if isinstance(row[kind], Path):
                yield row[kind]
            elif row[kind]:
                path = self.root / row[kind]
                if Path(os.path.realpath(path)).is_relative_to(self.real):
                    yield path
        if kind == 1 and self.name == "folder" and any(mask for _, mask in rows):
            return
        words = {"part": part, "key": key, "city": key.split("_")[0]}
        for pattern in self.facts.get(("image", "label")[kind], ()):
            yield self.root / pattern.format(**words)

    def file(self, *place):
        """Returns the first of the places that is a file, or None."""
        return next((path for path in self.places(*place) if os.path.isfile(path)), None)

    def items(self, part, rows, known=None, source="", masks=True):
        """Returns the Items of rows (known: {key: row} of the folder), without masks if not asked.

        Raises Refusal where a file is absent; source: the list to name then.
        """
        items = []
        for key, row in sorted(rows.items()):
            both = [row, (known or rows).get(key, row)]
            if both[1] == (None, None):  # generated
                items.append(Item(key))
                continue
            files = [self.file(part, key, both, kind) for kind in ((0, 1) if masks else (0,))]
            if None in files:
                what = ("image", "mask")[files.index(None)]
                tried = dict.fromkeys(map(str, self.places(part, key, both, files.index(None))))
                tried = ", ".join(tried) or "nothing: a link leads what its list names out of here"
                tried = "; ".join([tried, *self.strays(part, known or rows)])
                if what == "mask" and self.name.startswith("voc"):
                    command = f"prepare_data.py voc --root {shlex.quote(str(self.root))}"
                    tried += f"; python {command} makes SegmentationClassAug"
                if sign := re.search("[,;|]", key):
                    tried += f"; lists are read at TAB or a blank, not at {sign[0]}"
                raise Refusal(f"{source or self.root}: {key} has no {what} here; tried {tried}")
            items.append(Item(key, *files))
        return items


def files_below(folder):
    """Returns the files below a folder, sorted, links that lead nowhere or to a folder among them.

    Hidden files and what file managers leave are none.
    """
    found = []
    for path in folder.rglob("*"):
        hidden = any(name.startswith(".") for name in path.relative_to(folder).parts)
        if not hidden and path.name not in LITTER and (path.is_symlink() or path.is_file()):
            found.append(path)
    return sorted(found)


def choose(keys, split, seed):
    """Returns (labelled, unlabelled) keys: all, or every r-th of the sorted ones and the rest.

    split: "all" or "1/r". seed: None, or that of a random subset of ceil(n / r) keys, nested in r.
    """
    keys = sorted(keys)
    if split == "all":
        return keys, keys
    if seed is not None and seed < 0:
        raise Refusal(f"--split-seed {seed}: a number from 0")
    match = re.fullmatch(r"1/([1-9]\d*)", split)
    if not match or not 2 <= int(match[1]) <= len(keys):
        raise Refusal(f"--split {split}: all, or 1/r with r from 2 to {len(keys)}")
    r = int(match[1])
    order = np.random.default_rng(seed).permutation(keys)[: math.ceil(len(keys) / r)]
    chosen = set(keys[::r] if seed is None else order.tolist())
    return [k for k in keys if k in chosen], [k for k in keys if k not in chosen]


def published(args):
    """Returns whether --split is meant to name one of the published sets."""
    return args.dataset in SPLITS and args.split_seed is None and not args.labeled_list


def named(args, pool):
    """Returns (labelled, unlabelled) keys of --split in its --split-family.

    pool: the keys of the training images that are here. Raises Refusal where that set or the
    labelled one is not the published one.
    """
    splits = SPLITS[args.dataset]
    what = f"--split {args.split} of {args.dataset}"
    family = splits.get(args.split_family, {})
    pool = sorted(pool)
    if args.split not in ("all", *family):
        names = ", ".join(["all", *family])
        remedy = f"{args.split_family} has {names}; else --split-seed (1/r) or --labeled-list"
        raise Refusal(f"{what}: {remedy}")
    known_set(f"{what}, training images", pool, splits["parts"]["train"])
    if args.split == "all":
        return pool, pool
    entry = family[args.split]
    if "url" in entry:
        path = fetch_list(args.dataset, args.split_family, args.split)
        labeled = list(read_list(path, FACTS[args.dataset]["key"]))
    else:
        labeled, _ = choose(pool, args.split, None)
    known_set(f"{what}, labelled images", labeled, entry)
    return labeled, sorted(set(pool) - set(labeled))


def known_set(what, keys, entry, remedy=""):
    """Raises Refusal if keys are not the published set."""
    if wrong := same_set(keys, entry):
        remedy = remedy or "--labeled-list or --split-seed take what is here"
        raise Refusal(f"{what}: {wrong}; {remedy}")


def same_set(keys, entry):
    """Returns "" if keys are the published set, else what differs."""
    count = len(keys)
    found = set_hash(keys)
    wanted = entry.get("set", found)  # of COCO's training images nobody published a list
    if (count, found) == (entry["images"], wanted):
        return ""
    return f"{count} images, set {found}, instead of {entry['images']}, set {wanted}"


def keys_of(path, pattern):
    """Returns the keys of a list in any format, in its order; none if the file is no such list."""
    try:
        return list(read_list(path, pattern))
    except Refusal:
        return []


@functools.cache
def lists_below(folder, pattern, every):
    """Returns {(images, set hash): keys} of all lists below a folder; every: so many apart."""
    found = {}
    for path in sorted(Path(folder).rglob("*.txt")):
        keys = keys_of(path, pattern)[::every]
        found.setdefault((len(keys), set_hash(keys)), keys)
    return found


def fetch_list(dataset, family, split, source=""):
    """Returns the path of a published list under data/splits; fetched first if it is not there.

    family: "parts" (split: train or val) or a family of splits. source: a folder with lists in any
    format, searched for one with the right set, instead of the network. Raises Refusal.
    """
    entry = SPLITS[dataset][family][split]
    pattern = FACTS[dataset]["key"]
    path = LISTS / dataset / family / f"{split.replace('/', '_')}.txt"
    if path.is_file():
        if wrong := same_set(keys_of(path, pattern), entry):
            raise Refusal(f"{path}: {wrong}; delete it, and it is fetched again")
        return path
    if family == "parts" and "url" not in entry:
        where = f"they are those in its folder, {FACTS[dataset]['parts'][split][0]}"
        raise Refusal(f"{dataset}: no list of its {split} images is published; {where}")
    if "url" not in entry:  # every r-th of the sorted training images
        pool = fetch_list(dataset, "parts", "train", source)
        keys, _ = choose(read_list(pool, pattern), split, None)
        wrong = same_set(keys, entry)
    elif source:
        sets = lists_below(source, pattern, entry.get("every", 1))
        keys = sets.get((entry["images"], entry["set"]))
        wrong = ""
        if not keys:
            wrong = f"no list of this set below {source}"
    else:
        try:
            with tempfile.TemporaryDirectory() as folder:
                download(entry["url"], raw := Path(folder) / "list.txt")
                keys = keys_of(raw, pattern)[:: entry.get("every", 1)]
            if wrong := same_set(keys, entry):
                wrong = f"{entry['url']}: {wrong}"
        except Refusal as error:
            wrong = str(error)
    if not wrong:
        try:
            write(path, "".join(f"{key}\n" for key in keys).encode())
        except OSError as error:
            wrong = str(error)
    if wrong:
        if family == "parts":  # they come with any family
            family = next(name for name in SPLITS[dataset] if name != "parts")
        command = f"python prepare_data.py splits --family {family.rstrip('012')}"
        raise Refusal(f"{path}: {wrong}; {command}, with --from DIR where the lists are on disk")
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: {len(keys)} images, set {entry['set']}", flush=True)
    return path


def write(path, data):
    """Writes a file beside its place, then renames: it is whole or absent, whoever else writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_name(f".{uuid.uuid4().hex}")
    try:
        other.write_bytes(data)
        os.replace(other, path)
    finally:
        other.unlink(missing_ok=True)


def check_scheme(url):
    """Raises Refusal if an address is not by one of SCHEMES."""
    if url.partition(":")[0].lower() not in SCHEMES:
        raise Refusal(f"{url}: nothing is fetched but by {', '.join(SCHEMES)}")


class Redirect(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where a request of ours may go."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Returns the next request. Raises Refusal if its scheme is none of SCHEMES."""
        check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url, path, md5=""):
    """Fetches url to path by way of path.part, which the next call goes on with if this one fails.

    Raises Refusal: no network, cut off, another scheme, or not the file with this md5.
    """
    check_scheme(url)
    part = path.with_name(path.name + ".part")
    total = 0
    again = "; the same command goes on from there" if md5 else ""  # not for lists
    begin = 0
    if part.exists():
        begin = part.stat().st_size
    request = urllib.request.Request(url, headers={"User-Agent": "prepare_data.py"})
    if begin:
        request.add_header("Range", f"bytes={begin}-")
    try:
        with urllib.request.build_opener(Redirect).open(request, timeout=60) as answer:
            if not answer.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                begin = 0  # the whole file comes
            length = answer.headers.get("Content-Length", "")
            if length.isdecimal():
                total = begin + int(length)
            quiet = None if md5 else True  # lists are small
            bar = tqdm(total=total, initial=begin, unit="B", unit_scale=True, disable=quiet)
            with bar, open(part, "ab" if begin else "wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416 or not begin:  # 416: nothing comes after the part, it is whole
            line = " ".join(str(error).split())  # of a loop of redirects: several
            raise Refusal(f"{url}: {line}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # an address that is none
        raise Refusal(f"{url}: {error}{again}") from None
    if part.stat().st_size < total:
        cut = f"cut off after {part.stat().st_size} of {total} bytes"
        raise Refusal(f"{url}: {cut}{again}")
    check_md5(part, md5)
    os.replace(part, path)


def check_md5(path, md5):
    """Raises Refusal if a file is not the one with this md5 ("": any is right)."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while md5 and (block := file.read(1 << 20)):
            digest.update(block)
    if md5 and digest.hexdigest() != md5:
        raise Refusal(f"{path}: md5 {digest.hexdigest()} instead of {md5}; delete it and run again")
