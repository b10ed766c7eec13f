"""Decoded images and masks of a data set in one file that is mapped: the same pixels, not decoded.

python prepare_data.py cache makes such a folder, --cache of a script reads it. It holds pixels.bin,
the pixels of all files one after another, and index.json, which says where each file's are. It may
be deleted at any time: then the files themselves are read, to the same numbers.
"""

import hashlib
import json
import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features
from tqdm import tqdm

from common import Refusal, note
from common.data import FACTS, data_flags, read_mask, read_photograph

TOGETHER = 64  # files that are decoded before they are written


class Entry(NamedTuple):
    """Where the pixels of a file are, their sha1, and the file that they were decoded from."""

    begin: int  # byte of pixels.bin
    shape: list  # (H, W, 3) of a photograph, (H, W) of a mask; uint8
    sha1: str
    size: int  # of the file, in bytes
    time: int  # of its last change, in ns
    file_sha1: str


def decoders():
    """Returns the versions of what decodes files: JPEGs may differ by a grey level between two."""
    return {name: features.version(name) for name in ("pil", "jpg", "libjpeg_turbo", "webp")}


def data_folder(args):
    """Returns the folder of the data set that the flags name, as common/sources.py has it."""
    return Path(args.data_root or FACTS[args.dataset].get("root", "."))


def sha1_of(path):
    """Returns the sha1 of a file's bytes."""
    return hashlib.sha1(Path(path).read_bytes(), usedforsecurity=False).hexdigest()


class Cache:
    """The pixels of the files below a folder; what it lacks is to be read from the file itself."""

    def __init__(self, folder, root, command):
        """folder: the cache; root: that of the data set; command: what makes such a cache.

        Raises Refusal if it is none, or cut off. An absent one is told by its name: a path may be
        wrong.
        """
        self.folder = Path(folder)
        self.root = Path(root)
        self.command = command
        self.again = f"delete it, and {command} makes it again"
        self.seen = set()  # files whose pixels this process has checked
        try:
            index = json.loads((self.folder / "index.json").read_bytes())
            self.pixels = np.memmap(self.folder / "pixels.bin", np.uint8, "r")
            self.files = {name: Entry(*entry) for name, entry in index["files"].items()}
            found = index["decoders"]
            length = index["bytes"]
        except FileNotFoundError:
            raise Refusal(f"--cache {folder}: no cache there; {command} makes one") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(f"--cache {folder}: not a whole cache ({error}); {self.again}") from None
        if length != len(self.pixels):
            cut = f"{len(self.pixels)} of {length} bytes"
            raise Refusal(f"--cache {folder}: pixels.bin has {cut}; {self.again}")
        if found != decoders():
            other = f"decoded by {found}, not by {decoders()}"
            raise Refusal(f"--cache {folder}: {other}, whose pixels may differ; {self.again}")

    def __reduce__(self):
        folders = (str(self.folder), str(self.root))
        return reopened, (*folders, self.command)  # in a loader that is not forked

    def name_of(self, path):
        """Returns what the index calls a file."""
        return os.path.relpath(path, self.root)

    def image(self, path):
        """Returns the pixels of a file as PIL RGB or L, or None if the cache lacks it.

        Checked when a process reads them for the first time: their sha1, and that the file is still
        the one that was decoded. Raises Refusal if not.
        """
        name = self.name_of(path)
        entry = self.files.get(name)
        if entry is None:
            return None
        end = entry.begin + int(np.prod(entry.shape))
        pixels = self.pixels[entry.begin : end]
        if name not in self.seen:
            self.check(path, entry, pixels)
            self.seen.add(name)
        return Image.fromarray(pixels.reshape(entry.shape))

    def check(self, path, entry, pixels):
        """Raises Refusal if pixels or file are others than when the cache was made."""
        if hashlib.sha1(pixels, usedforsecurity=False).hexdigest() != entry.sha1:
            raise Refusal(f"--cache {self.folder}: pixels of {path} are damaged; {self.again}")
        try:
            found = os.stat(path)
        except OSError as error:
            raise Refusal(f"{path}: {error.strerror}") from None
        if (found.st_size, found.st_mtime_ns) == (entry.size, entry.time):
            return
        if sha1_of(path) != entry.file_sha1:  # the time alone: a copy
            raise Refusal(f"--cache {self.folder}: {path} has changed since; {self.again}")


def reopened(folder, root, command):
    """Returns a Cache again, in another process; None if it was deleted meanwhile."""
    if not Path(folder).exists():
        return None
    return Cache(folder, root, command)


def with_cache(data, args):
    """Returns data, a Data, with the Cache of --cache, if there is that flag. Raises Refusal.

    Says how many of its files are not in it, to be decoded as ever; refuses one that has none.
    """
    folder = getattr(args, "cache", "")
    if not folder:
        return data
    command = f"python prepare_data.py cache {data_flags(args)} --out {shlex.quote(folder)}"
    data.cache = Cache(folder, data_folder(args), command)
    files = files_of(data.labeled + data.unlabeled + data.val + data.test)
    missing = [path for path in files if data.cache.name_of(path) not in data.cache.files]
    if len(missing) == len(files):
        where = f"no file of this run, below {data.cache.root}, is in it"
        raise Refusal(f"--cache {folder}: {where}: another --data-root, or {data.cache.again}")
    if missing:
        note(f"--cache {folder}: {len(missing)} of {len(files)} files are not in it, but decoded")
    return data


# ---- making one ----


def decoded(path, read):
    """Returns (pixels uint8, Entry that begins at 0) of a file; read: how. Raises Refusal."""
    found = os.stat(path)
    pixels = np.asarray(read(path)).astype(np.uint8)
    digest = hashlib.sha1(pixels.tobytes(), usedforsecurity=False).hexdigest()
    times = found.st_size, found.st_mtime_ns, sha1_of(path)
    return pixels, Entry(0, pixels.shape, digest, *times)


def files_of(items):
    """Returns {file: how it is read} of Items, each once, masks beside their images."""
    files = {}
    for item in items:
        files[item.image] = read_photograph
        if item.label is not None:
            files[item.label] = read_mask
    return files


def make(items, root, folder, most):
    """Writes a cache of the files of Items, as many of them, in this order, as fit into most bytes.

    root: folder of the data set. It is made beside its place, and renamed when it is whole. Returns
    (files in it, files, bytes). Raises Refusal, also if there is something at its place.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    files = files_of(items)
    if None in files:
        raise Refusal("--dataset shapes is generated: it needs no cache")
    if folder.exists():
        raise Refusal(f"--out {folder} exists: delete it, or give another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()  # of two calls at once one fails here
    except FileExistsError:
        why = "a call makes it now, or was killed: then delete it"
        raise Refusal(f"{partial} exists: {why}") from None
    try:
        entries, total = write_pixels(files, root, partial / "pixels.bin", most)
        if not entries:
            raise Refusal(f"--max-gb {most / 1e9:g}: not even the first image fits: a larger one")
        index = {"decoders": decoders(), "bytes": total, "files": entries}
        (partial / "index.json").write_text(json.dumps(index))
        os.replace(partial, folder)
    except BaseException:  # no space, a file that cannot be read, Ctrl-C
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return len(entries), len(files), total


def write_pixels(files, root, path, most):
    """Writes the pixels of files, {file: how it is read}, into one; returns ({name: Entry}, bytes).

    It ends before the file that would take it beyond most bytes. Few are decoded at a time.
    """
    entries = {}
    begin = 0
    names = list(files)
    bar = tqdm(total=len(names), desc="cache", unit="file", disable=None)
    with bar, ThreadPoolExecutor() as pool, open(path, "wb") as out:
        for first in range(0, len(names), TOGETHER):
            some = names[first : first + TOGETHER]
            for name, (pixels, entry) in zip(
                some, pool.map(decoded, some, map(files.get, some)), strict=True
            ):
                if begin + pixels.size > most:
                    return entries, begin
                out.write(pixels.tobytes())
                entries[os.path.relpath(name, root)] = entry._replace(begin=begin)
                begin += pixels.size
                bar.update()
    return entries, begin
