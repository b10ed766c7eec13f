#!/usr/bin/env bash
# Pillow 10.1.0, 11.1.0 and 12.3.0, ImageDraw.polygon.
#
# One would guess: a polygon has the pixels whose centres it holds, in every version.
# Behaviour: it has its outline too, so a box from 2.5 to 6.5 has 25 pixels instead of 16, and the
#   versions differ at the edges: the rule changed in 11.1.0 and 11.2.1. common/shapes.py fills its
#   own polygons for that reason. (Source: the release notes; src/libImaging/Draw.c.)
# Output seen:
#   box 25 pixels, disc of radius 8 218 pixels (its area is 201)
#   Pillow 10.1.0, 11.1.0, 12.3.0: 3 different sums
# Fails if that changes. Installs into a temporary folder (100 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/draw.py" <<'PY'
import hashlib
import math
import random

from PIL import Image, ImageDraw


def pixels(corners):
    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).polygon(corners, fill=1)
    return image.tobytes()


box = sum(pixels([(2.5, 2.5), (6.5, 2.5), (6.5, 6.5), (2.5, 6.5)]))
angles = [math.tau * i / 40 for i in range(40)]
disc = sum(pixels([(16 + 8 * math.cos(a), 16 + 8 * math.sin(a)) for a in angles]))
draws = random.Random(0)
digest = hashlib.sha1()
for _ in range(500):
    digest.update(pixels([(draws.uniform(0, 32), draws.uniform(0, 32)) for _ in range(5)]))
print(box, disc, digest.hexdigest())
PY
for version in 10.1.0 11.1.0 12.3.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "pillow==$version"
  "$folder/$version/bin/python" "$folder/draw.py" | tee -a "$folder/seen"
done
[ "$(cut -d' ' -f1 "$folder/seen" | sort -u)" = 25 ] || { echo "changed: the box"; exit 1; }
[ "$(cut -d' ' -f3 "$folder/seen" | sort -u | wc -l)" = 3 ] || { echo "changed: the versions"; exit 1; }
echo "as described"
