"""Pictures as they are found: orientation, depth, transparency, strips, bombs and what is no picture."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from zoo.config import ConfigError
from zoo.modalities import Patches
from zoo.modalities.pictures import STRIP, PictureError, open_picture, plain

RAMP = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
COLOUR = Patches.Config(image_size=32, patch=8)
UPSIDE_DOWN = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\3\0\0\0\0\0\0\0"
GREY = Patches.Config(image_size=32, patch=8, channels=1)


def content(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------- orientation


def exif(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """An EXIF block with an orientation of 6 and one more field, which is as odd as the arguments make it."""
    place = 8 + 2 + 24 + 4
    fields = [
        struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0"),
        struct.pack("<HHI", tag, kind, count) + (value if len(value) == 4 else struct.pack("<I", place)),
    ]
    fields.sort(key=lambda field: struct.unpack("<H", field[:2]))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(fields) + b"\0\0\0\0" + value


@pytest.mark.filterwarnings("ignore")
def test_an_orientation_counts_whatever_stands_beside_it():
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 255  # the left half is white, so once it is turned the upper one is
    tags = (0x010F, 0x011A, 0x0128, 0x8769, 0x8825, 0x02BC)
    for tag, kind, count in itertools.product(tags, range(1, 14), (0, 1, 40)):
        size = count * {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}.get(kind, 1)
        block = exif(tag, kind, count, b"\xa5abc" if size <= 4 else b"\xa5abc" * (size // 4 + 1))
        turned = np.asarray(open_picture(content(Image.fromarray(picture), "JPEG", exif=block)))
        assert turned.shape == (32, 16, 3), (tag, kind, count)
        assert turned[:12].min() > 240 and turned[20:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_once(orientation):
    picture = np.random.RandomState(0).randint(0, 256, (6, 9, 3)).astype(np.uint8)
    expected = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture),
    }
    for kind in ("PNG", "TIFF"):
        block = Image.Exif()
        block[0x0112] = orientation
        opened = open_picture(content(Image.fromarray(picture), kind, exif=block))
        assert np.array_equal(np.asarray(opened), expected[orientation])
        assert np.array_equal(np.asarray(plain(opened.convert("RGB"))), expected[orientation])


# --------------------------------------------------------------------------------------------------- depth and colour


@pytest.mark.parametrize(
    "file",
    [
        content(Image.fromarray(RAMP.astype(np.uint16) * 257)),
        content(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
        content(Image.fromarray(RAMP[::-1, ::-1].astype(np.uint16) * 257), exif=UPSIDE_DOWN),
        content(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF"),
        content(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
        content(Image.fromarray(RAMP).convert("LA")),
        content(Image.fromarray(RAMP).convert("P")),
        content(Image.fromarray(RAMP).convert("RGBA")),
        content(Image.fromarray(RAMP).convert("CMYK"), "TIFF"),
    ],
    ids=["16", "16 TIFF", "16 turned", "32", "float", "LA", "P", "RGBA", "CMYK"],
)
def test_a_ramp_stays_a_ramp(file):
    for config in (COLOUR, GREY):
        for channel in config.read(file).transpose(2, 0, 1).astype(int):
            assert np.abs(channel - RAMP).max() <= 1


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("LAB", (32, 32)), "is a LAB picture; save it as RGB"),
        (
            Image.fromarray(np.full((4, 4), 70_000, np.int32)),
            "has pixels from 70000 to 70000; its kind goes from 0 .black",
        ),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "has pixels from nan to nan"),
        (Image.fromarray(np.full((4, 4), 2, np.float32)), r"has pixels from 2 to 2; .* to 1 \(white\)"),
    ],
    ids=["LAB", "32 bit", "nan", "float"],
)
def test_pixels_without_a_meaning_are_named(image, reason):
    with pytest.raises(PictureError, match=reason):
        COLOUR.read(content(image, "TIFF"))


def see_through() -> Image.Image:
    """A black square on nothing, and the nothing is black too."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[8:24, 8:24, 3] = 255
    return Image.fromarray(pixels)


SQUARE = np.asarray(see_through())[..., 3]


@pytest.mark.parametrize(
    "file",
    [
        content(see_through()),
        content(see_through().quantize(4)),
        content(see_through(), "GIF"),
        content(see_through(), "WEBP", lossless=True),
        content(see_through().getchannel("A").point(lambda a: 255 - a), transparency=255),
        content(Image.fromarray(np.where(SQUARE, 0, 40_000).astype(np.uint16)), transparency=40_000),
    ],
    ids=["RGBA", "palette", "GIF", "WebP", "grey", "16"],
)
def test_transparency_is_white(file):
    expected = 255 - SQUARE
    for config in (COLOUR, GREY):
        assert all(np.array_equal(channel, expected) for channel in config.read(file).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_picture_of_an_animation_counts(kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    read = COLOUR.read(content(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(read.astype(int) - (255, 0, 0)).max() <= 3  # WebP is lossy


@pytest.mark.parametrize("side", [None, 0], ids=["empty file", "no pixels"])
def test_what_holds_no_picture_is_refused(side):
    with pytest.raises(OSError, match="cannot identify image file"):
        COLOUR.read(b"" if side is None else header(side))


# --------------------------------------------------------------------------------------------------- strips and bombs


@pytest.mark.parametrize("width, height", [(1, 400), (3, 200), (7, 500), (640, 20), (900, 51)])
def test_a_strip_is_resized_as_if_it_were_whole(width, height):
    waves = np.sin(np.arange(height)[:, None, None] / 9 + np.arange(width)[:, None] / 7 + np.arange(3))
    picture = Image.fromarray((127 * waves + 128).astype(np.uint8))
    short = min(width, height)
    size = tuple(max(32, round(side * 32 / short)) for side in (width, height))
    left, top = ((side - 32) // 2 for side in size)
    whole = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    error = np.abs(COLOUR.square(picture).astype(int) - np.asarray(whole).astype(int)).max()
    assert error <= (1 if max(width, height) > STRIP * short else 0)  # Pillow may take the sides in another order


def test_memory_of_a_strip_is_that_of_what_is_kept(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: (sizes.append(size), resize(self, size, *rest))[1]
    )
    file = content(Image.new("RGB", (1, 1_000_000), (200, 10, 10)))
    assert (COLOUR.read(file) == (200, 10, 10)).all() and sizes == [(32, 32)]


def header(side: int) -> bytes:
    """The beginning of a PNG of `side` × `side` pixels."""
    sizes = b"IHDR" + struct.pack(">II5B", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(sizes) - 4) + sizes + struct.pack(">I", zlib.crc32(sizes))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "JPEG"])
def test_too_many_pixels_are_not_decoded(kind, monkeypatch):
    file = content(Image.new("L", (12, 9)), kind)
    assert open_picture(file, 108).size == (12, 9)
    monkeypatch.setattr("zoo.modalities.pictures.plain", None)
    with pytest.raises(PictureError, match=r"^has 12 × 9 pixels; some.key allows 107$"):
        open_picture(file, 107, "some.key")


def test_the_limit_where_none_is_set(monkeypatch):
    monkeypatch.setattr("zoo.modalities.pictures.plain", None)
    with pytest.raises(
        PictureError, match=r"has 9,000 × 9,000 pixels; modalities.image.max_megapixels allows 64,000,000"
    ):
        COLOUR.read(header(9_000))
    with pytest.raises(
        PictureError, match=r"has 2,000 × 2,000 pixels; modalities.image.max_megapixels allows 3,000,000"
    ):
        Patches.Config(max_megapixels=3).read(header(2_000))
    with pytest.raises(PictureError, match="has more than 178,956,970 pixels; modalities.image.max_megapixels allows"):
        COLOUR.read(header(60_000))
    with pytest.raises(ConfigError, match="max_megapixels: 999: must be less than or equal to 178"):
        Patches.Config.parse({"max_megapixels": 999}, "modalities.image")


def test_a_file_that_would_start_a_program_is_no_picture(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", None)
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(OSError, match="cannot identify image file"):
        open_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
