# PyAV 18.1.0 (its own FFmpeg): a film of class ids, written without loss and read back.
#
# One would guess: a lossless codec gives ids back, H.264 at qp 0 as well as FFV1, and grey pixels need no
#   conversion of colours.
# Behaviour: what loses is the range before the codec. yuv420p has 220 levels of grey, from 16 to 235, so ids
#   4, 11, 18, ... come back as the one below; read as rgb24 other ids go as well, 11 of VOC's 21 in all.
#   libx264 takes pix_fmt gray, and writes the ids themselves, but the film says yuv420p: ids 0 to 16 are
#   read as 0. FFV1 with pix_fmt gray is right, and H.264 in rgb24 is.
#   (Source: libswscale's conversion between full and limited range; the frame's format and planes.)
# Output seen:
#   libx264 yuv420p, read as yuv420p: of ids 0 to 20 3 wrong as gray, 11 as rgb24; of 256 ids 220 left; id 11 is 10
#   libx264 gray, read as yuv420p: of ids 0 to 20 20 wrong as gray, 20 as rgb24; of 256 ids 220 left; id 11 is 0
#   ffv1 yuv420p, read as yuv420p: of ids 0 to 20 3 wrong as gray, 11 as rgb24; of 256 ids 220 left; id 11 is 10
#   ffv1 gray, read as gray: of ids 0 to 20 0 wrong as gray, 0 as rgb24; of 256 ids 256 left; id 11 is 11
#   libx264rgb rgb24, read as gbrp: of ids 0 to 20 0 wrong as gray, 0 as rgb24; of 256 ids 256 left; id 11 is 11
# Fails if that changes. Installs into a temporary folder (150 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/film.py" <<'PY'
import sys

import av
import numpy as np

SIDE = 8
ids = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(SIDE, 0).repeat(SIDE, 1)
film = f"{sys.argv[1]}/labels.mkv"


def written(codec, pixels, options):
    """Writes a film of one frame of ids and reads it: the frame."""
    with av.open(film, "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = ids.shape
        stream.pix_fmt = pixels
        frame = av.VideoFrame.from_ndarray(ids, format="gray")
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with av.open(film) as container:
        return next(container.decode(video=0))


def middles(array):
    """Returns what has become of ids 0 to 255."""
    return array[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE].ravel()


for codec, pixels, options in (
    ("libx264", "yuv420p", {"qp": "0"}),
    ("libx264", "gray", {"qp": "0"}),
    ("ffv1", "yuv420p", {}),
    ("ffv1", "gray", {}),
    ("libx264rgb", "rgb24", {"qp": "0"}),
):
    frame = written(codec, pixels, options)
    gray = middles(frame.to_ndarray(format="gray"))
    rgb = middles(frame.to_ndarray(format="rgb24")[..., 0])
    wrong = [int((read[:21] != np.arange(21)).sum()) for read in (gray, rgb)]
    left = len(set(gray.tolist()))
    print(
        f"{codec} {pixels}, read as {frame.format.name}: of ids 0 to 20 {wrong[0]} wrong as gray, "
        f"{wrong[1]} as rgb24; of 256 ids {left} left; id 11 is {gray[11]}"
    )
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q av==18.1.0 numpy==2.4.6 2> "$folder/errors" ||
  { cat "$folder/errors"; exit 1; }
"$folder/env/bin/python" "$folder/film.py" "$folder" 2> "$folder/errors" | tee "$folder/seen" ||
  { cat "$folder/errors"; exit 1; }
diff "$folder/seen" <(sed -n 's/^#   \([a-z0-9]* [a-z0-9]*, read as .*\)/\1/p' "$0")
