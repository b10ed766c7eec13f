"""Files of every format read as stored or refused with the cause; lists; the fill of polygons."""

import hashlib
import os

import numpy as np
import pytest

from common import shapes
from common.data import read_mask, read_photograph
from common.sources import load
from convert import box, ellipse
from formats import GREY, IDS, RGB, TURNED, WIDE, packed, png, saved, tiff
from trees import folder, own, refusal

FILES = [  # bytes; what is read of them, or words of the refusal; as a mask, then as a photograph
    (png(2, 3, packed(IDS, 2), bytes(range(12))), IDS, None),
    (tiff(IDS.tobytes(), kinds=(0, 1, 4)), IDS, IDS),
    (tiff(IDS.tobytes(), kinds=(0, 0, 1)), "2 pages or frames", "2 pages or frames"),
    (b"P5 8 4 255\n" + IDS.tobytes(), IDS, IDS),
    (saved(GREY, "BMP"), IDS, IDS),
    (saved(GREY, "GIF"), IDS, IDS),
    (saved(GREY, "TIFF", compression="tiff_lzw"), IDS, IDS),
    (png(2, 0, packed(IDS, 2)), "2 or 4 bits, which PIL rescales", IDS * 85),
    (tiff(packed(IDS, 4).tobytes(), bits=4), "2 or 4 bits", IDS * 17),
    (tiff(IDS.tobytes(), photo=0), "white is stored as 0", 255 - IDS),
    (b"P4 8 4\n" + packed(IDS % 2, 1).tobytes(), "white is stored as 0", 255 - IDS % 2 * 255),
    (b"P5 8 4 3\n" + IDS.tobytes(), "another maximum than 255", IDS * 85),
    (saved(GREY, "JPEG"), "JPEG, which blurs ids", None),
    (saved(GREY, "TIFF", compression="jpeg"), "TIFF with JPEG inside", None),
    (saved(GREY, "PCX"), "PCX (pcx L), not known to keep ids", IDS),
    (png(16, 0, IDS.astype(">u2").view(np.uint8)), "not one 8-bit channel", "not 8 bits"),
    (saved(GREY, "PNG", exif=TURNED), "EXIF orientation 3", IDS),
    (png(8, 2, RGB), "mode RGB, not one 8-bit channel", IDS),
    (png(16, 2, WIDE), "mode RGB", "not 8 bits a channel"),
    (png(16, 4, WIDE[:, :32]), "mode RGBA", "not 8 bits a channel"),
    (tiff(WIDE.tobytes(), 3, 16, 2), "mode RGB", "not 8 bits a channel"),
    (b"P6 8 4 4095\n" + WIDE.tobytes(), "mode RGB", "not 8 bits a channel"),
    *((tiff(bytes(128), 4, photo=2, alpha=n), "mode RGB", "a TIFF of 4 bands") for n in (0, 2)),
    (tiff(bytes(160), 5, photo=2, kinds=(0,)), "bands, bits or a compression", "bands, bits or"),
    (b"", "fetch it again", "fetch it again"),
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("data, mask, photograph", FILES)
def test_a_file_is_read_as_stored_or_refused_with_the_cause(tmp_path, data, mask, photograph):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    for read, found in ((read_mask, mask), (read_photograph, photograph)):
        if isinstance(found, str):
            assert found in refusal(read, path)
        elif found is not None:
            assert (np.asarray(read(path)).reshape(4, 8, -1) == found[..., None]).all()


@pytest.mark.smoke
def test_a_fill_has_the_pixels_whose_centres_it_holds_and_pictures_are_the_same_everywhere():
    square = [(2.5, 2.5), (6.5, 2.5), (6.5, 6.5), (2.5, 6.5)]
    assert shapes.polygon([square], 9, 9).sum() == 16
    edge = [(0, 0), (9, 0), (9, 9), (0, 9)]
    assert shapes.polygon([edge, square], 9, 9).sum() == 81 - 16  # a hole
    for x, y in np.random.default_rng(0).uniform(0, 9, (9, 2)):  # four triangles tile the square
        parts = [[edge[i], edge[i - 1], (x, y)] for i in range(4)]
        assert (sum(shapes.polygon([part], 9, 9).astype(int) for part in parts) == 1).all()
    disc = ellipse((10, 10), (8, 4), 30, 20, 20)
    assert abs(disc.sum() - 32 * np.pi) < 3 and disc[13, 15] and not disc[6, 15]  # clockwise
    turned = shapes.polygon([box(2, 4, 8, 6, 90, (5, 5))], 9, 9)
    assert np.array_equal(turned, shapes.polygon([box(4, 2, 6, 8)], 9, 9)) and turned.sum() == 12
    digest = hashlib.sha1()
    for key in (key for part in shapes.COUNTS for key in shapes.keys(part)):
        for picture in shapes.draw(key):
            digest.update(picture.tobytes())
    assert digest.hexdigest() == "9ae3527a81f34e3516d5b1a34facf18b5d56c833"


def test_lists_take_bare_ids_absolute_paths_and_any_bytes_and_name_what_they_cannot(tmp_path):
    strange = os.fsdecode(b"\xe9")
    root = folder(tmp_path / "own", [strange, "deep/b", "one/c", "two/c"])
    path = tmp_path / "l.txt"
    args = own(root, labeled_list=str(path))
    path.write_bytes(os.fsencode(f"b\n{root}/images/train/one/c.png\n{strange}"))
    data = load(args)
    assert [item.key for item in data.labeled] == ["deep/b", "one/c", strange]
    assert [item.key for item in data.unlabeled] == ["two/c"]
    assert data.hashes()["labeled"][0] == 3
    told = {"c": "c has no image", "b\ndeep/b": "twice", f"{strange}x": "\\udce9x has no image"}
    told |= {f"a.jpg{sign}b.png": f"columns with {sign} between" for sign in ",;"}
    for text, words in told.items():
        path.write_bytes(os.fsencode(text))
        assert words in refusal(load, args)
    path.write_text("a", "utf-16")
    assert "UTF-16" in refusal(load, args)
    assert "one of the classes 0 to 3" in refusal(load, own(root, ignore_index=2))
