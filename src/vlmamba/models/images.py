"""Safe image reading: whatever the file holds, an upright RGB picture of bounded size, or a ValueError naming it.

The reader goes by content, never by the file's name.
"""

from __future__ import annotations

import io
import os
from typing import TypeAlias

import numpy as np
from PIL import Image

ImageSource: TypeAlias = str | os.PathLike | bytes | Image.Image

# Decoded, RGB takes 3 bytes a pixel: at this limit a picture takes 268 MB. The header is read first, so that a small
# file that would decode to more ("decompression bomb") costs nothing.
MAX_PIXELS = 89_478_485
# Sides above this are scaled down before a picture is padded to a square: a 20,000 x 20 strip would become 1.2 GB.
MAX_PADDED_SIDE = 4096

# Formats read; Pillow knows more, among them some that start other programs.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "ICO", "JPEG2000")

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: ImageSource) -> Image.Image:
    """Read a picture from a path, from encoded bytes or from a Pillow image, as upright RGB.

    The first frame of an animation; EXIF rotation applied; transparency composited on white; 16-bit and float
    samples scaled to 8 bits; CMYK and palettes converted.

    Raises:
        ValueError: no such file, not an image, damaged or truncated, or more than MAX_PIXELS pixels. The message
            names the file.
    """
    name = _name_of(source)
    image = _open(source, name)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} is {width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} million are read. Scale it down first"
        )
    if width == 0 or height == 0:
        raise ValueError(f"{name} is {width} x {height} pixels: nothing to see")
    try:
        image.load()
        return _upright_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged data raise nearly anything: OSError, SyntaxError, struct.error
        raise ValueError(f"{name} is damaged or truncated: {error}") from error


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of `colour`, the longer side long.

    As LLaVA pads; a picture with a side above MAX_PADDED_SIDE is scaled down first.
    """
    longest = max(image.size)
    if longest > MAX_PADDED_SIDE:
        size = [max(1, round(side * MAX_PADDED_SIDE / longest)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC, reducing_gap=2.0)
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def crop_strip(image: Image.Image, ratio: int = 16) -> Image.Image:
    """The middle of a strip whose sides are more than `ratio` apart; other pictures as they are.

    For processors that scale the shorter side to a size and then crop the centre: a 20,000 x 20 strip would first
    grow to 336,000 x 336. What is cut here lies outside their crop.
    """
    width, height = image.size
    if max(width, height) <= ratio * min(width, height):
        return image
    left = max(0, (width - ratio * height) // 2)
    top = max(0, (height - ratio * width) // 2)
    return image.crop((left, top, width - left, height - top))


def _name_of(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "image")
    text = str(source)
    return text if len(text) <= 300 else text[:300] + "..."


def _open(source: ImageSource, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, bytes | str | os.PathLike):
        raise ValueError(f"an image is a path, encoded bytes or a PIL image; got {type(source).__name__}")
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{name} is an address, not a file; download it first")
    try:
        Image.init()
        known = [format for format in _FORMATS if format in Image.OPEN]  # builds of Pillow differ in what they read
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be read safely: {str(error).split(',')[0]}. Scale it down") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read (JPEG, PNG, GIF, WebP, BMP, TIFF, ...)") from error
    except FileNotFoundError as error:
        raise ValueError(f"no such image: {name}") from error
    except MemoryError:
        raise
    except Exception as error:  # a folder, no permission, a name the system does not take; damaged AVIF: RuntimeError
        raise ValueError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(layer, mask=layer.getchannel("A"))
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the picture, which is taken as it stands
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or float to 8 bits; full scale is the smallest of 1, 255, 65535 that holds all values."""
    samples = np.nan_to_num(np.asarray(image, dtype=np.float32)).clip(min=0)
    if image.mode.startswith("I;16"):
        full = 65535.0
    else:
        peak = float(samples.max())
        full = next(
            (scale for scale in (1.0, 255.0, 65535.0) if peak <= scale and (scale > 1 or image.mode == "F")), peak
        )
    return Image.fromarray(np.round(samples * (255.0 / full)).astype(np.uint8))
