"""Open, verify and measure the images of a data set."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
from collections.abc import Iterator
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from unidpo.errors import Finding, ImageError, shown
from unidpo.pairs import ImageSource

MIN_PIXELS = 32 * 32


def open_image(source: ImageSource) -> Image.Image:
    """Decode an image completely, as RGB.

    Transparency is dropped and palettes are expanded by a plain ``convert("RGB")``, as the reference does. Unlike
    the reference, a rotation noted in the EXIF data is applied. Of an animation the first frame is taken.

    Args:
        source: a file, the encoded bytes of one, or a decoded image (left as it is, a new one is returned).

    Raises:
        ImageError: the file does not exist (finding ``missing-image``); it is no raster image, is truncated or
            damaged, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` (finding ``broken-image``).
    """
    with _opened(source) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def verify(source: ImageSource) -> Finding | None:
    """What `open_image` would raise for this source, as a finding without a location, or ``None`` if it decodes."""
    try:
        with _opened(source) as image:
            image.draft("RGB", (1, 1))  # JPEG data is still read to its end, but fewer pixels are computed
            ImageOps.exif_transpose(image).convert("RGB")
    except ImageError as error:
        return error.findings[0]
    return None


def cap_pixels(image: Image.Image, max_pixels: int, min_pixels: int = MIN_PIXELS) -> Image.Image:
    """Scale an image, keeping its shape, to at most ``max_pixels`` and at least ``min_pixels`` (width x height).

    Sides are rounded down after scaling, as in LLaMA-Factory, so a result may miss ``min_pixels`` by a rim; an
    image within the limits is returned as it is. Sides never reach 0, where the reference would crash.
    """
    if image.width * image.height > max_pixels:
        image = image.resize(_scaled(image, max_pixels))
    if image.width * image.height < min_pixels:
        image = image.resize(_scaled(image, min_pixels))
    return image


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height as `open_image` would give them, from the file's header alone. Raises `ImageError`."""
    with _opened(source) as image:
        # Pillow gives the size of a TIFF already turned.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def content_digest(source: ImageSource) -> bytes:
    """16 bytes (BLAKE2b) that name an image's content, wherever it lies.

    Files and bytes are hashed as they are, without decoding; a decoded image by its RGB pixels and size. One
    picture in two encodings therefore has two digests.

    Raises:
        ImageError: the file cannot be read, or the decoded image cannot be turned into RGB.
    """
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).digest()
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        except (OSError, ValueError) as error:
            raise _image_error(source, error) from error
    image = open_image(source)
    digest = hashlib.blake2b(f"{image.mode} {image.size} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


@functools.cache
def _formats() -> list[str]:
    """Raster formats only: Pillow hands EPS to Ghostscript, and a data set must not start a program."""
    Image.init()
    wanted = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "ICO")
    return [name for name in wanted if name in Image.OPEN]


@contextlib.contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image before its pixels are read. Whatever goes wrong inside the block becomes an `ImageError`."""
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            # Pillow itself only warns up to twice its limit, and warnings cannot be made errors for one thread.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise _image_error(source, error) from error


def _scaled(image: Image.Image, pixels: int) -> tuple[int, int]:
    factor = math.sqrt(pixels / (image.width * image.height))
    return max(1, int(image.width * factor)), max(1, int(image.height * factor))


def _image_error(source: ImageSource, error: Exception) -> ImageError:
    name = shown(source, most=400) if isinstance(source, Path) else "the image given as bytes"
    if isinstance(source, Image.Image):
        name = "the decoded image"
    kind = "broken-image"
    match error:
        case FileNotFoundError() | NotADirectoryError():
            kind = "missing-image"
            problem = f"there is no file {name}; check the path and the image folder (`--images`, `data.images`)"
        case IsADirectoryError():
            problem = f"{name} is a folder, not an image file"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            problem = f"{name} is too large to be safe ({error}); scale it down"
        case UnidentifiedImageError():
            problem = f"{name} is no image that can be read; replace it (PNG, JPEG and WebP always work)"
        case _:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            problem = f"{name} cannot be decoded ({reason}); replace the file"
    finding = Finding(kind, problem)
    return ImageError(str(finding), findings=[finding])
