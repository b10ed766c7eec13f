#!/usr/bin/env bash
# pyoxipng 9.1.1, zopfli 0.4.3, Pillow 13.0.0: masks of ids whose PNGs are made smaller, "without loss".
#
# One would guess: a lossless program keeps the numbers of a mask; at least of a grey one, which has no palette whose
#   order could be changed.
# Behaviour: what is kept is the picture. Both programs drop the colours of a palette that do not occur and number the
#   rest anew, zopflipng in the order in which they come, in each file by itself: here class 15 is 1 in one mask and 3
#   in the next, and the border of 255 is a class. zopflipng makes a palette of a grey mask, too: its values are colours
#   then, and what reads the numbers (np.array(Image.open(path)), as all VOC code does) gets other classes. No value is
#   out of range, and a viewer shows what it showed before.
#   - Pillow's optimize=True keeps numbers; oxipng does with palette_reduction=False.
#   - Undone: the colours are right, so a mask is what its colours are in the palette that it had.
# Output seen, of the ids 0 1 15 20 255:
#   palette, Pillow optimize: P 0 1 15 20 255
#   palette, oxipng: P 0 4 2 3 1
#   palette, oxipng palette_reduction=False: P 0 1 15 20 255
#   palette, zopflipng: P 0 2 1 4 3
#   palette, another mask, zopflipng: P 0 4 3 1 2
#   grey, Pillow optimize: L 0 1 15 20 255
#   grey, oxipng: L 0 1 15 20 255
#   grey, zopflipng: P 0 2 1 4 3
#   colours as before: all
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/smaller.py" <<'PY'
import io

import numpy as np
import oxipng
from PIL import Image
from zopfli import png as zopfli

IDS = (0, 1, 15, 20, 255)
PALETTE = np.array([[i * 67 % 256, i * 31 % 256, i] for i in range(256)], np.uint8)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


ids = np.zeros((64, 64), np.uint8)
ids[8:40, 8:40] = 15
ids[20:30, 20:60] = 1
ids[45:47] = 255
ids[50:60, 5:20] = 20
places = [tuple(np.argwhere(ids == i)[0]) for i in IDS]
grey = Image.fromarray(ids)
palette = grey.copy()
palette.putpalette(PALETTE.tobytes())
other = palette.transpose(Image.Transpose.ROTATE_180)
back = Image.Transpose.ROTATE_180
programs = {
    "Pillow optimize": lambda data: encoded(opened(data), optimize=True),
    "oxipng": oxipng.optimize_from_memory,
    "oxipng palette_reduction=False": lambda data: oxipng.optimize_from_memory(
        data, palette_reduction=False
    ),
    "zopflipng": zopfli.optimize,
}
rows = [("palette", palette, name) for name in programs]
rows.append(("palette, another mask", other, "zopflipng"))
rows += [("grey", grey, name) for name in ("Pillow optimize", "oxipng", "zopflipng")]
kept = []
for kind, mask, name in rows:
    result = opened(programs[name](encoded(mask)))
    kept.append(result.convert("RGB").tobytes() == mask.convert("RGB").tobytes())
    seen = np.asarray(result.transpose(back) if mask is other else result)
    print(f"{kind}, {name}: {result.mode} {' '.join(str(seen[place]) for place in places)}")
print(f"colours as before: {'all' if all(kept) else 'not all'}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q pyoxipng==9.1.1 zopfli==0.4.3 pillow==13.0.0 numpy
"$folder/env/bin/python" "$folder/smaller.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
