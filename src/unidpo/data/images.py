"""Open, inspect and measure the images of a data set."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from unidpo.data.pairs import ImageSource
from unidpo.errors import Finding, ImageError, shown
from unidpo.files.regular import open_regular

MIN_PIXELS = 32 * 32
MAX_PIXELS = 768 * 768
"""What images are scaled down to by default, as in the authors' implementation."""
MAX_ASPECT = 200
"""Qwen's image processors raise where one side is more than this many times the other."""
HUGE_PIXELS = 25_000_000
_one_huge_image = threading.Lock()


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at an image found.

    Attributes:
        size: width and height in pixels, as `open_image` gives them; ``None`` where it raises.
        findings: without a location. An error means that no model gets to see the image; a warning says what is
            done to it on the way.
    """

    size: tuple[int, int] | None
    findings: tuple[Finding, ...]


def open_image(source: ImageSource) -> Image.Image:
    """Decode an image completely, as RGB.

    Transparency is dropped and palettes are expanded by a plain ``convert("RGB")``, as the authors do. Unlike
    theirs, a rotation noted in the EXIF data is applied. Of an animation the first frame is taken.

    Args:
        source: a file, the encoded bytes of one, or a decoded image (left as it is, a new one is returned).

    Raises:
        ImageError: the file does not exist (finding ``missing-image``); it is no raster image, is truncated or
            damaged, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` (finding ``broken-image``).
    """
    with _opened(source) as image:
        return _rgb(ImageOps.exif_transpose(image))


def inspect_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Inspection:
    """Decode an image completely and note whatever is wrong or odd about it. Never raises.

    Costs less than `open_image`: a JPEG's data is read to its end, but only a few of its pixels are computed.

    Args:
        source: see `open_image`.
        max_pixels: what the image will be scaled down to, see `cap_pixels`.
    """
    try:
        with _opened(source) as image, _memory_for(image):
            return _inspected(image, source, max_pixels)
    except ImageError as error:
        return Inspection(None, error.findings)


def cap_pixels(image: Image.Image, max_pixels: int, min_pixels: int = MIN_PIXELS) -> Image.Image:
    """Scale an image, keeping its shape, to at most ``max_pixels`` and at least ``min_pixels`` (width x height).

    Sides are rounded down after scaling, as in LLaMA-Factory, so a result may miss ``min_pixels`` by a rim; an
    image within the limits is returned as it is. Sides never reach 0, where the authors' code would crash.
    """
    size = capped_size(image.size, max_pixels, min_pixels)
    return image if size == image.size else image.resize(size)


def capped_size(size: tuple[int, int], max_pixels: int, min_pixels: int = MIN_PIXELS) -> tuple[int, int]:
    """The size `cap_pixels` would give an image of this width and height."""
    width, height = size
    if width * height > max_pixels:
        width, height = _scaled(width, height, max_pixels)
    if width * height < min_pixels:
        width, height = _scaled(width, height, min_pixels)
    return width, height


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height as `open_image` would give them, from the file's header alone. Raises `ImageError`."""
    with _opened(source) as image:
        # Not `image.getexif()`: PNG's own decodes all pixels, for the rare orientation that is noted behind them.
        return _upright_size(image, Image.Image.getexif(image))


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
            state = source.stat()
            return _file_digest(source, state.st_size, state.st_mtime_ns)
        except (OSError, ValueError) as error:
            raise _image_error(source, error) from error
    image = open_image(source)
    digest = hashlib.blake2b(f"{image.mode} {image.size} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


@functools.lru_cache(maxsize=1 << 18)
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    """Of a file of this size and time of change, so that a process reads it once and notices when it is another."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


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
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file,
            Image.open(file, formats=_formats()) as image,
        ):
            # Pillow itself only warns up to twice its limit, and warnings cannot be made errors for one thread.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise _image_error(source, error) from error


def _memory_for(image: Image.Image) -> contextlib.AbstractContextManager[object]:
    """Threads that decode huge images side by side would take gigabytes."""
    return _one_huge_image if image.width * image.height > HUGE_PIXELS else contextlib.nullcontext()


def _rgb(image: Image.Image) -> Image.Image:
    if isinstance(image.info.get("transparency"), bytes):  # Pillow would warn that it is dropped, once per image
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _orientation(image: Image.Image, exif: Image.Exif) -> int | None:
    """The note on how to turn an image; of a TIFF none, because Pillow turns it, size included, by itself."""
    return None if image.format == "TIFF" else exif.get(ExifTags.Base.Orientation)


def _upright_size(image: Image.Image, exif: Image.Exif) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image, exif) in (5, 6, 7, 8) else image.size


def _is_see_through(image: Image.Image) -> bool:
    """Whether a decoded image has anything transparent. Screenshots often have an alpha channel that is all opaque."""
    if image.mode in ("RGBA", "LA", "PA"):
        return image.getchannel("A").getextrema()[0] != 255
    return "transparency" in image.info or image.mode in ("RGBa", "La")


def _inspected(image: Image.Image, source: ImageSource, max_pixels: int) -> Inspection:
    odd = _odd_encoding(image)  # before decoding, which changes what it looks at
    exif = image.getexif()
    size = _upright_size(image, exif)
    is_turned = _orientation(image, exif) in range(2, 9)
    if not isinstance(source, Image.Image):
        image.draft("RGB", (1, 1))
    # One pixel shows whether a mode can be converted; turning needs them all.
    _rgb(ImageOps.exif_transpose(image) if is_turned else image.crop((0, 0, 1, 1)))
    if is_turned:
        odd["rotated-image"] = "is stored turned; it is set upright as its EXIF data says, unlike in other trainers"
    if _is_see_through(image):
        odd["transparent-image"] = "has transparent parts; they show the colour stored under them, often black"
    odd |= _odd_size(*size, max_pixels)
    findings = [Finding(kind, f"{_name(source)} {problem}", severity="warning") for kind, problem in odd.items()]
    width, height = capped_size(size, max_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        limit = f"Qwen's processors refuse a side of over {MAX_ASPECT} times the other"
        problem = f"{_name(source)} is {size[0]:,} x {size[1]:,} pixels, and {limit}; crop or split it"
        findings.append(Finding("extreme-aspect", problem))
    return Inspection(size, tuple(findings))


def _odd_encoding(image: Image.Image) -> dict[str, str]:
    """What is unusual about a file, by kind of finding, as a sentence about it. Its pixels are not read."""
    odd = {}
    match image.mode:
        case "P" | "PA":
            odd["palette-image"] = "has a palette; it is expanded to RGB"
        case "CMYK":
            odd["cmyk-image"] = "is CMYK, for print; it is turned into RGB without its colour profile, so colours shift"
        case "I" | "F" | "I;16" | "I;16L" | "I;16B":
            problem = "has more than 8 bits per pixel; values over 255 become white, which may be all of it"
            odd["deep-image"] = f"{problem}; scale it to 8 bits"
    # An MPO is a photograph with further views of it.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        odd["animated-image"] = "is an animation or has several pages; only the first is used"
    return odd


def _odd_size(width: int, height: int, max_pixels: int) -> dict[str, str]:
    size = f"is {width:,} x {height:,} pixels"
    if width * height < MIN_PIXELS:
        return {"tiny-image": f"{size} and is enlarged to {MIN_PIXELS:,} pixels; check that it is the right file"}
    if width * height > HUGE_PIXELS:
        slow = f"it is decoded whole each time, to be scaled to {max_pixels:,} pixels"
        return {"huge-image": f"{size}; {slow}; a smaller file trains faster"}
    return {}


def _scaled(width: int, height: int, pixels: int) -> tuple[int, int]:
    factor = math.sqrt(pixels / (width * height))
    return max(1, int(width * factor)), max(1, int(height * factor))


def _name(source: ImageSource) -> str:
    if isinstance(source, Image.Image):
        return "the decoded image"
    return shown(source, most=400) if isinstance(source, Path) else "the image given as bytes"


def _image_error(source: ImageSource, error: Exception) -> ImageError:
    name, kind = _name(source), "broken-image"
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
