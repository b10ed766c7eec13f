"""The generated data set: a picture is a function of its number and nothing else.

Six figures on clutter, in three pairs. A pair shares its colours, so colour tells the pair and
only the outline tells the two apart: disc | ring, square | diamond, triangle | star. Figures
overlap, bars in any colour cross them (background), noise covers everything.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 64  # pixels, both sides
COUNTS = {"train": 320, "val": 64, "test": 64}
HUES = (0.04, 0.36, 0.64)  # of the three pairs, in [0, 1)


def keys(part):
    """Returns the keys of one part, "train-00000" and so on."""
    return [f"{part}-{i:05d}" for i in range(COUNTS[part])]


def polygon(rings, height, width):
    """Returns (height, width) bool: the pixels whose centre lies in an odd number of rings.

    rings: lists of (x, y), the pixel of row i and column j covering j to j + 1 and i to i + 1.
    Pillow's polygons differ from version to version, and have their outline too.
    """
    toggles = np.zeros((height, width + 1), np.int64)
    rows = np.arange(height) + 0.5
    for ring in rings:
        begin = np.array(ring, float).reshape(-1, 2)
        end = np.roll(begin, -1, 0)
        crossed = (begin[:, 1:] <= rows) != (end[:, 1:] <= rows)  # (edges, rows)
        edge, row = np.nonzero(crossed)
        x, y = begin[edge].T
        slope = (end[edge, 0] - x) / (end[edge, 1] - y)
        column = np.ceil(x + (rows[row] - y) * slope - 0.5)
        np.add.at(toggles, (row, np.clip(column, 0, width).astype(int)), 1)
    return toggles.cumsum(1)[:, :width] % 2 == 1


def _rgb(hue, saturation, value):
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _outline(kind, rng, x, y, r):
    """Corners of a figure of class kind (3 to 6), or of a disc as a polygon (1, 2)."""
    if kind <= 2:
        corners = 40
        start = 0.0
        radii = (1.0,)
    elif kind <= 4:
        tilt = rng.uniform(-0.2, 0.2)  # radians; a diamond is a square turned by an eighth
        corners = 4
        start = tilt
        if kind == 3:
            start += math.pi / 4
        radii = (1.15,)
    else:
        corners = 6
        start = rng.uniform(0, 2 * math.pi)
        radii = (1.25, 0.36)  # every second corner: hollow
        if kind == 5:
            radii = (1.25, 0.625)  # flat
    angles = [start + 2 * math.pi * i / corners for i in range(corners)]
    return [
        (x + r * radii[i % len(radii)] * math.cos(a), y + r * radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


def draw(key):
    """Returns (image RGB, label L), both SIZE x SIZE, of a key such as "train-00012".

    Labels: 0 background, 1 disc, 2 ring, 3 square, 4 diamond, 5 triangle, 6 star.
    """
    part, number = key.rsplit("-", 1)
    rng = np.random.default_rng([list(COUNTS).index(part), int(number)])
    n = SIZE
    # background: a dull gradient between two colours
    a, b = (_rgb(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.25, 0.9)) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    u, v = np.mgrid[0:n, 0:n] / n - 0.5
    t = np.clip(0.5 + u * math.cos(angle) + v * math.sin(angle), 0, 1)[..., None]
    image = Image.fromarray((np.array(a) * (1 - t) + np.array(b) * t).astype(np.uint8))
    label = Image.new("L", (n, n), 0)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 6)):  # clutter: blobs in any colour, the pairs' own among them
        x, y = rng.uniform(0, n, 2)
        w, h = rng.uniform(2, 9, 2)
        pen.ellipse((x - w, y - h, x + w, y + h), fill=_rgb(*rng.uniform((0, 0.1, 0.2), 1)))
    for _ in range(rng.integers(2, 4)):  # figures; later ones occlude earlier ones
        kind = int(rng.integers(1, 7))
        x, y = rng.uniform(0.15 * n, 0.85 * n, 2)
        r = rng.uniform(0.18, 0.32) * n
        inside = polygon([_outline(kind, rng, x, y, r)], n, n)
        mask = Image.fromarray(255 * inside.astype(np.uint8))
        if kind == 2:
            hole = Image.new("L", (n, n), 0)
            q = r * rng.uniform(0.35, 0.55)
            ImageDraw.Draw(hole).ellipse((x - q, y - q, x + q, y + q), fill=255)
            mask = ImageChops.subtract(mask, hole)
        hue = HUES[(kind - 1) // 2] + rng.normal(0, 0.035)
        paint = np.full((n, n, 3), _rgb(hue, rng.uniform(0.5, 1), rng.uniform(0.45, 1)), float)
        if kind % 2 == 0:  # faint stripes on the second of a pair
            t = (u * math.cos(angle) + v * math.sin(angle)) * n
            paint *= 1 - rng.uniform(0.1, 0.45) * (np.floor(t / 2) % 2)[..., None]
        image.paste(Image.fromarray(paint.astype(np.uint8)), mask=mask)
        label.paste(kind, mask=mask)
    for _ in range(rng.integers(0, 3)):  # bars across everything, labelled background
        line = tuple(rng.uniform(0, n, 4))
        width = int(rng.integers(2, 5))
        ImageDraw.Draw(image).line(line, fill=_rgb(*rng.uniform((0, 0.1, 0.2), 1)), width=width)
        ImageDraw.Draw(label).line(line, fill=0, width=width)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    noisy = np.asarray(image, np.float32) * rng.uniform(0.75, 1.1) + rng.normal(0, 8, (n, n, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), label
