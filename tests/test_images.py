"""Opening, verifying and measuring images."""

import io
import math
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unidpo.data.images import (
    MAX_ASPECT,
    MIN_PIXELS,
    Inspection,
    cap_pixels,
    content_digest,
    image_size,
    inspect_image,
    open_image,
)
from unidpo.errors import ImageError

ORIENTATION = 0x0112


def picture(width: int = 12, height: int = 8) -> Image.Image:
    """No two pixels of a row or column alike, so that a turn shows."""
    image = Image.new("RGB", (width, height))
    image.putdata([(20 * x, 30 * y, 9) for y in range(height) for x in range(width)])
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_file_its_bytes_and_the_image_are_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    for source in (path, path.read_bytes(), picture()):
        image = open_image(source)
        assert image.mode == "RGB"
        assert image.tobytes() == picture().tobytes()
        assert image_size(source) == (12, 8)
        assert inspect_image(source).size == (12, 8)


def test_an_image_given_decoded_is_left_as_it_is() -> None:
    image = picture()
    image.getexif()[ORIENTATION] = 6
    assert open_image(image).size == (8, 12)
    assert image.size == (12, 8)
    assert image.getexif()[ORIENTATION] == 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_the_header_gives_the_size_the_picture_has_once_turned(kind: str, orientation: int) -> None:
    image = picture(16, 8)
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    data = encoded(image, kind, exif=exif)
    expected = (8, 16) if 5 <= orientation <= 8 else (16, 8)
    assert open_image(data).size == expected
    assert image_size(data) == expected


def test_a_turned_photograph_is_turned_back() -> None:
    upright = picture()
    exif = upright.getexif()
    exif[ORIENTATION] = 6  # the camera was held so that the scene's top is at the right
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    assert open_image(encoded(lying, "PNG", exif=exif)).tobytes() == upright.tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_modes_are_converted_plainly(mode: str) -> None:
    image = picture().convert(mode)
    data = encoded(image, "TIFF")
    assert open_image(data).tobytes() == image.convert("RGB").tobytes()


NOISE = encoded(Image.effect_noise((64, 64), 80).convert("RGB"))
JPEG = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no image that can be read"),
        (b"not an image", "no image that can be read"),
        (NOISE[: len(NOISE) // 2], "cannot be decoded"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded"),
        (NOISE[:100] + bytes(50) + NOISE[150:], "cannot be decoded"),
        # Pillow would start Ghostscript for it.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no image that can be read"),
    ],
)
def test_a_bad_image_says_what_is_wrong(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "bad[red].png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ImageError, match=problem) as caught:
            open_image(source)
        [finding] = caught.value.findings
        assert finding.kind == "broken-image"
        assert (str(path) in finding.message) == (source is path)
        assert inspect_image(source) == Inspection(None, (finding,))


def test_a_missing_image_is_its_own_kind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "gone.png", tmp_path / "file" / "gone.png"):
        [finding] = inspect_image(path).findings
        assert finding.kind == "missing-image"
        assert str(path) in finding.message


@pytest.mark.parametrize(
    ("name", "kind"), [(".", "broken-image"), ("a\0b", "broken-image"), ("\ud800.png", "broken-image")]
)
def test_odd_paths_are_findings_too(tmp_path: Path, name: str, kind: str) -> None:
    [finding] = inspect_image(tmp_path / name).findings
    assert finding.kind == kind
    assert finding.message.isprintable()
    with pytest.raises(ImageError):
        content_digest(tmp_path / name)
    with pytest.raises(ImageError):
        image_size(tmp_path / name)


@pytest.mark.parametrize("pixels", [150, 250])  # Pillow warns over its limit, and raises over twice that
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, pixels: int, action: str) -> None:
    data = encoded(Image.new("RGB", (pixels, 1)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)  # type: ignore[arg-type]
        for look in (open_image, image_size):
            with pytest.raises(ImageError, match="too large to be safe"):
                look(data)
        [finding] = inspect_image(data).findings
    assert finding.kind == "broken-image"


def test_verifying_reads_a_photograph_to_its_end() -> None:
    assert inspect_image(JPEG) == Inspection((64, 64), ())
    assert inspect_image(JPEG[:-40]).size is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((768, 768), (768, 768)),
        ((769, 768), (768, 767)),
        ((1000, 2000), (543, 1086)),
        ((32, 32), (32, 32)),
        ((10, 40), (16, 64)),
        ((1, 1), (32, 32)),
    ],
)
def test_pixels_are_capped_as_the_reference_does(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert cap_pixels(Image.new("RGB", size), max_pixels=768 * 768).size == expected


@given(st.integers(1, 400), st.integers(1, 400), st.integers(4 * MIN_PIXELS, 40_000))
def test_capped_images_keep_their_shape_within_a_pixel(width: int, height: int, max_pixels: int) -> None:
    capped = cap_pixels(Image.new("1", (width, height)), max_pixels)
    assert capped.width * capped.height <= max_pixels
    factor = math.sqrt(min(max(width * height, MIN_PIXELS), max_pixels) / (width * height))
    assert -1e-6 < width * factor - capped.width < 1 + 1e-6 or capped.width == 1
    assert -1e-6 < height * factor - capped.height < 1 + 1e-6 or capped.height == 1


def test_a_thread_of_an_image_keeps_both_sides() -> None:
    assert cap_pixels(Image.new("RGB", (1, 5000)), max_pixels=2000).size == (1, 3162)


def test_a_digest_names_the_content_not_the_place(tmp_path: Path) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    a.write_bytes(encoded(picture()))
    b.write_bytes(encoded(picture()))
    assert content_digest(a) == content_digest(b) == content_digest(a.read_bytes())
    assert len(content_digest(a)) == 16
    b.write_bytes(encoded(picture(12, 9)))
    assert content_digest(a) != content_digest(b)


def test_decoded_images_differ_by_size_palette_and_pixels() -> None:
    flat = Image.new("P", (4, 6))
    palette = flat.copy()
    palette.putpalette([200, 0, 0])
    images = [flat, palette, Image.new("P", (6, 4)), picture(4, 6)]
    assert len({content_digest(image) for image in images}) == 4
    assert content_digest(picture()) == content_digest(picture())


def square(mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((64, 64), 80).convert(mode)


def faded(mode: str, alpha: int) -> Image.Image:
    image = square(mode)
    image.putalpha(Image.new("L", image.size, alpha))
    return image


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(square(), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (encoded(square("P")), "palette-image"),
        (encoded(square("CMYK"), "JPEG"), "cmyk-image"),
        (encoded(Image.new("I;16", (64, 64))), "deep-image"),
        (encoded(Image.new("I", (64, 64)), "TIFF"), "deep-image"),
        (encoded(Image.new("F", (64, 64)), "TIFF"), "deep-image"),
        (encoded(faded("RGB", 0)), "transparent-image"),
        (encoded(faded("L", 254)), "transparent-image"),
        (encoded(square("L"), transparency=0), "transparent-image"),
        (turned(6), "rotated-image"),
        (turned(2), "rotated-image"),
        (encoded(square(), "GIF", save_all=True, append_images=[square()]), "animated-image"),
        (encoded(square(), "PNG", save_all=True, append_images=[square()]), "animated-image"),
        (encoded(square(), "WEBP", save_all=True, append_images=[square()]), "animated-image"),
        (encoded(square(), "TIFF", save_all=True, append_images=[square()]), "animated-image"),
        (encoded(Image.new("RGB", (31, 33))), "tiny-image"),
        (encoded(Image.new("1", (5001, 5000))), "huge-image"),
    ],
)
def test_odd_images_are_usable_and_say_what_becomes_of_them(content: bytes, kind: str) -> None:
    inspection = inspect_image(content)
    found = {finding.kind: finding for finding in inspection.findings}
    assert set(found) == {kind} | ({"palette-image"} if content[:3] == b"GIF" else set())
    assert found[kind].severity == "warning"
    assert found[kind].message.startswith("the image given as bytes ")
    assert inspection.size == open_image(content).size


@pytest.mark.parametrize(
    "content",
    [
        encoded(square("L")),
        encoded(square("1")),
        encoded(faded("RGB", 255)),
        turned(1),
        encoded(square(), "MPO", save_all=True, append_images=[square()]),
        encoded(square(), "WEBP"),
        encoded(Image.new("RGB", (32, 32))),
        encoded(Image.new("1", (5000, 5000))),
    ],
)
def test_usual_images_are_not_odd(content: bytes) -> None:
    assert inspect_image(content).findings == ()


def test_an_image_may_be_odd_in_several_ways() -> None:
    image = Image.new("P", (20, 20))
    data = encoded(image, transparency=bytes([0, 128]))
    assert {finding.kind for finding in inspect_image(data).findings} == {
        "palette-image",
        "transparent-image",
        "tiny-image",
    }
    assert open_image(data).mode == "RGB"  # without Pillow's warning


@pytest.mark.parametrize(
    ("size", "max_pixels", "refused"),
    [
        ((6000, 30), 768 * 768, False),
        ((6001, 30), 768 * 768, True),
        ((30, 6001), 768 * 768, True),
        # Sides are rounded down when an image is scaled: 19,999 x 100 becomes 10,860 x 54.
        ((19_999, 100), 768 * 768, True),
        ((19_999, 100), 10**9, False),
        ((1, 5000), 768 * 768, True),
    ],
)
def test_extreme_shapes_are_errors(size: tuple[int, int], max_pixels: int, refused: bool) -> None:
    inspection = inspect_image(encoded(Image.new("1", size)), max_pixels=max_pixels)
    assert inspection.size == size
    errors = [finding for finding in inspection.findings if finding.severity == "error"]
    assert [finding.kind for finding in errors] == ["extreme-aspect"] * refused


def test_the_limit_on_shapes_is_that_of_the_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    smart_resize(30, 30 * MAX_ASPECT)
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_resize(30, 30 * MAX_ASPECT + 1)


def test_inspecting_leaves_a_decoded_image_as_it_is() -> None:
    image = faded("RGB", 128)
    before = image.tobytes()
    assert [finding.kind for finding in inspect_image(image).findings] == ["transparent-image"]
    assert (image.mode, image.tobytes()) == ("RGBA", before)
