#!/usr/bin/env bash
# PyAV 18.1.0 and OpenCV 4.12.0.88 on one film of a telephone held upright.
#
# One would guess: two readers that both decode by FFmpeg give the same frames.
# Behaviour: the film is stored lying down, with a matrix that says how it is shown. OpenCV turns the
#   frames, PyAV (and imageio's plugin of it) gives them as stored and says frame.rotation: a mask
#   drawn on the frame of one lies across the frame of the other, and of a square film, or one turned
#   by 180 degrees, no size tells. np.rot90(frame, frame.rotation // 90) is OpenCV's frame. (Source:
#   av/video/frame.py; modules/videoio/src/cap_ffmpeg_impl.hpp, CAP_PROP_ORIENTATION_AUTO.)
# Output seen, height and width:
#   turned by 0: PyAV 32 x 64, OpenCV 32 x 64, equal as read True, equal when turned True
#   turned by 90: PyAV 32 x 64, OpenCV 64 x 32, equal as read False, equal when turned True
#   turned by 180: PyAV 32 x 64, OpenCV 32 x 64, equal as read False, equal when turned True
#   turned by -90: PyAV 32 x 64, OpenCV 64 x 32, equal as read False, equal when turned True
# Fails if that changes. Installs into a temporary folder (300 MB).
set -euo pipefail
here=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 opencv-python-headless==4.12.0.88 numpy==2.2.6
cd "$folder"
venv/bin/python - > seen <<'PY'
import av
import cv2
import numpy as np

drawn = np.zeros((32, 64, 3), np.uint8)
drawn[:16, :32] = 255  # white in one corner


def equal(one, other):
    """Returns whether two frames are one picture, but for what the coding has lost."""
    return one.shape == other.shape and bool(np.abs(one.astype(int) - other).max() < 40)


for degrees in (0, 90, 180, -90):
    with av.open("film.mp4", "w") as film:
        stream = film.add_stream("mpeg4", rate=5, width=64, height=32, pix_fmt="yuv420p")
        if degrees:
            stream.set_display_rotation(degrees)
        for _ in range(4):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(drawn)))
        film.mux(stream.encode())
    with av.open("film.mp4") as film:
        frame = next(film.decode(video=0))
    one = frame.to_ndarray(format="bgr24")
    _, other = cv2.VideoCapture("film.mp4").read()
    turned = np.rot90(one, frame.rotation // 90)
    sizes = "PyAV {} x {}, OpenCV {} x {}".format(*one.shape[:2], *other.shape[:2])
    facts = f"equal as read {equal(one, other)}, equal when turned {equal(turned, other)}"
    print(f"turned by {degrees}: {sizes}, {facts}")
PY
cat seen
diff seen <(sed -n 's/^#   \(turned by .*\)/\1/p' "$here")
echo "as described"
