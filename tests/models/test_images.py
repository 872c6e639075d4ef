"""Safe reading: every dirty picture gives RGB or a ValueError that names it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vlmamba.models import images
from vlmamba.models.images import MAX_PADDED_SIDE, crop_strip, pad_to_square, read_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def half_and_half(left=RED, right=BLUE) -> Image.Image:
    image = Image.new("RGB", (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


def header_only_png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels: what a bomb looks like before it is decoded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_path_bytes_and_pil_give_the_same(tmp_path):
    image = half_and_half()
    path = tmp_path / "picture.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image):
        read = read_image(source)
        assert read.mode == "RGB"
        assert np.array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "BMP", "TIFF"])
def test_reads_by_content_not_by_name(tmp_path, format):
    path = tmp_path / "ocr_vqa.jpg"
    path.write_bytes(encoded(half_and_half(), format))
    assert read_image(path).size == (8, 4)


def test_one_pixel():
    assert read_image(encoded(Image.new("RGB", (1, 1), GREEN))).getpixel((0, 0)) == GREEN


def test_truncated_png_names_the_file(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise)
    path = tmp_path / "cut.png"
    for length in (len(whole) // 2, 60, 20):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.png"):
            read_image(path)


def test_truncated_jpeg_is_an_error_too():
    whole = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_image(whole[: len(whole) // 2])


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (60_000, 60_000)])
def test_bomb_is_refused_before_decoding(size):
    with pytest.raises(ValueError, match=r"Scale it down"):
        read_image(header_only_png(*size))


def test_limit_holds_for_pictures_in_memory_too(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 32)
    assert read_image(half_and_half()).size == (8, 4)
    with pytest.raises(ValueError, match="9 x 4 pixels; at most"):
        read_image(Image.new("RGB", (9, 4)))


def test_animated_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, GREEN, BLUE)]
    image = read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.getpixel((3, 3)) == RED


def test_cmyk_jpeg():
    image = read_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = image.getpixel((4, 4))
    assert image.mode == "RGB"
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    read = np.asarray(read_image(encoded(Image.fromarray(ramp))))
    assert read.shape == (4, 4, 3)
    np.testing.assert_allclose(read[..., 0].ravel(), np.linspace(0, 255, 16), atol=1)


@pytest.mark.parametrize(("dtype", "peak"), [(np.float32, 1.0), (np.int32, 65535), (np.int32, 255)])
def test_float_and_integer_tiff(dtype, peak):
    samples = (np.linspace(0, 1, 16).reshape(4, 4) * peak).astype(dtype)
    read = np.asarray(read_image(encoded(Image.fromarray(samples), "TIFF")))
    np.testing.assert_allclose(read[..., 0].ravel(), np.linspace(0, 255, 16), atol=1)


def test_transparency_is_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_image(encoded(clear)).getpixel((0, 0)) == WHITE
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert read_image(encoded(half)).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    assert read_image(encoded(clear.convert("LA"))).getpixel((0, 0)) == WHITE


def test_palette_with_transparency():
    image = half_and_half().quantize(4)
    image.info["transparency"] = image.getpixel((0, 0))
    read = read_image(encoded(image, transparency=image.getpixel((0, 0))))
    assert read.getpixel((0, 0)) == WHITE
    assert read.getpixel((7, 0)) == BLUE
    assert read_image(encoded(half_and_half().quantize(4))).getpixel((0, 0)) == RED


def test_exif_rotation_is_applied():
    upright = half_and_half()
    stored = {3: upright.rotate(180), 6: upright.rotate(90, expand=True), 8: upright.rotate(-90, expand=True)}
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = read_image(encoded(image, exif=exif))
        assert np.array_equal(np.asarray(read), np.asarray(upright)), orientation


def test_broken_exif_does_not_cost_the_picture():
    data = encoded(half_and_half(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    assert read_image(data).size == (8, 4)


@pytest.mark.parametrize("content", [b"not an image", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_other_content_named_jpg(tmp_path, content):
    path = tmp_path / "text.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.jpg is not an image"):
        read_image(path)


def test_missing_file_folder_and_strange_names(tmp_path):
    with pytest.raises(ValueError, match=r"no such image: .*gone\.png"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path)
    for name in ("x" * 5000, "nul\0byte.png", ""):
        with pytest.raises(ValueError, match=r"cannot be read|no such image"):
            read_image(name)
    with pytest.raises(ValueError, match="download it first"):
        read_image("https://example.org/a.png")
    with pytest.raises(ValueError, match="got int"):
        read_image(3)


def test_threads_leave_the_process_s_warnings_alone():
    """Filters are put aside and back for the whole process: two threads at it would leave those of one behind."""
    before, data = list(warnings.filters), encoded(Image.new("RGB", (900, 900)))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_image, [data] * 200))
    assert warnings.filters == before


def test_pad_to_square_centres():
    padded = np.asarray(pad_to_square(half_and_half(), GREEN))
    assert padded.shape == (8, 8, 3)
    assert (padded[:2] == GREEN).all()
    assert (padded[6:] == GREEN).all()
    assert np.array_equal(padded[2:6], np.asarray(half_and_half()))
    tall = np.asarray(pad_to_square(half_and_half().rotate(90, expand=True), GREEN))
    assert (tall[:, :2] == GREEN).all()
    square = Image.new("RGB", (3, 3))
    assert pad_to_square(square, GREEN) is square


def test_long_strips_stay_small():
    strip = Image.new("RGB", (60_000, 3), RED)
    assert pad_to_square(strip, GREEN).size == (MAX_PADDED_SIDE, MAX_PADDED_SIDE)
    assert crop_strip(strip).size == (48, 3)
    assert crop_strip(half_and_half()).size == (8, 4)
    assert crop_strip(strip.rotate(90, expand=True)).size == (3, 48)
