#!/usr/bin/env bash
# torchvision 0.29.1, torchcodec 0.17.0 (torch 2.14.1), Pillow 13.0.0: a mask of ids as a PNG with a palette.
#
# One would guess: torchvision's decode_image(mode="UNCHANGED") gives the stored ids of any such mask; and
#   torchcodec's decode_png with the same mode, which torchvision's warning of 0.29 says to move to, gives what
#   torchvision gave.
# Behaviour: torchvision gives ids where the palette has more than 16 colours. Pillow stores smaller palettes in 4,
#   2 or 1 bits a pixel, and of these torchvision gives the packed bytes, two, four or eight pixels in one, at the
#   beginning of each row; shape and type are as always, and nothing is said. VOC's masks (256 colours) are right,
#   a data set of one's own with 16 classes is not; a palette filled up to 256 colours makes it readable. torchcodec
#   unpacks them and gives the colours of all, three channels: after the move each mask of ids is a photograph.
#   (Source: torchvision/csrc/io/image/cpu/decode_png.cpp; torchcodec/_core/DecodePng.cpp.)
# Output seen, first row of a mask that holds 0 to 7 (modulo the colours), palette of (7 i, 2 i, 3 i):
#   2 colours, torchvision: no ids, the first byte is 01010101 in bits
#   4 colours, torchvision: no ids, the first byte is 00011011 in bits
#   16 colours, torchvision: no ids, the first byte is 00000001 in bits
#   16 colours, filled up to 256, torchvision: ids
#   17 colours, torchvision: ids
#   2 colours, torchcodec: colours
#   4 colours, torchcodec: colours
#   16 colours, torchcodec: colours
#   16 colours, filled up to 256, torchcodec: colours
#   17 colours, torchcodec: colours
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
here=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 torchcodec==0.17.0 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - > seen <<'PY'
import numpy as np
from PIL import Image
from torchcodec.decoders import decode_png
from torchvision.io import decode_image


def told(name, number, found, ids):
    """Prints whether a reader has given ids or colours."""
    found = found.numpy()
    colours = ids[None] * np.array([7, 2, 3], np.uint8)[:, None, None]
    if found.shape == colours.shape and (found == colours).all():
        text = "colours"
    elif found.shape == (1, *ids.shape) and (found == ids).all():
        text = "ids"
    else:
        text = f"no ids, the first byte is {found[0, 0, 0]:08b} in bits"
    print(f"{number}, {name}: {text}")


for reader, name in ((decode_image, "torchvision"), (decode_png, "torchcodec")):
    for count, filled in ((2, 0), (4, 0), (16, 0), (16, 256), (17, 0)):
        ids = np.arange(64, dtype=np.uint8).reshape(8, 8) % count
        mask = Image.frombytes("P", (8, 8), ids.tobytes())
        colours = bytes(value for i in range(count) for value in (7 * i, 2 * i, 3 * i))
        mask.putpalette(colours.ljust(3 * filled, b"\0"))
        mask.save("mask.png")
        words = f"{count} colours" + f", filled up to {filled}" * bool(filled)
        told(name, words, reader("mask.png", mode="UNCHANGED"), ids)
PY
cat seen
diff seen <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$here")
echo "as described"
