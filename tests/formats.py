"""Image files written byte by byte: what Pillow cannot write, and what it writes otherwise."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

IDS = np.arange(32, dtype=np.uint8).reshape(4, 8) % 4
RGB = np.repeat(IDS, 3, 1)
WIDE = RGB.astype(">u2").view(np.uint8)
GREY = Image.fromarray(IDS)
TURNED = Image.Exif()
TURNED[274] = 3


def png(bits, kind, rows, palette=b""):
    """A PNG of 8x4 pixels; kind 0 grey, 2 RGB, 3 palette, 4 grey and alpha."""
    head = struct.pack(">IIBBBBB", 8, 4, bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    text = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", head), (b"PLTE", palette), (b"IDAT", data), (b"IEND", b"")):
        if part or name == b"IEND":
            text += struct.pack(">I", len(part)) + name + part
            text += struct.pack(">I", zlib.crc32(name + part))
    return text


def packed(values, bits):
    return np.packbits(np.unpackbits(values[..., None], 2)[..., 8 - bits :].reshape(4, -1), 1)


def tiff(data, bands=1, bits=8, photo=1, kinds=(0,), alpha=None):
    """A TIFF of 8x4 pixels, of a page for each kind (tag 254: 1 an overview, 4 a mask)."""
    out = b"II*\0" + struct.pack("<I", 8 + len(data)) + bytes(data)
    tags = {256: 8, 257: 4, 259: 1, 262: photo, 273: 8, 277: bands, 278: 4, 279: len(data)}
    if alpha is not None:
        tags[338] = alpha
    for left, kind in enumerate(kinds, 1 - len(kinds)):
        rows = [(tag, 3, 1, value) for tag, value in (tags | {254: kind}).items()]
        end = len(out) + 2 + 12 * (len(rows) + 1) + 4
        rows.append((258, 3, bands, {1: bits, 2: bits * 65537}.get(bands, end)))
        entries = [struct.pack("<HHII", *row) for row in sorted(rows)]
        out += struct.pack("<H", len(rows)) + b"".join(entries)
        out += struct.pack("<I", end + 2 * bands if left else 0) + struct.pack("<H", bits) * bands
    return out


def saved(image, kind, **more):
    image.save(file := io.BytesIO(), kind, **more)
    return file.getvalue()
