"""Every image of a data set, decoded once, in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

from unidpo.data.formats import ImageUse
from unidpo.data.images import inspect_image
from unidpo.data.pairs import ImageSource
from unidpo.errors import Finding

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being checked (``images`` or ``rows``), how many are done and how many there are."""


@dataclass(frozen=True, slots=True)
class ImageScan:
    """What is wrong with images, for each use of one, and the sizes (width, height) of those that can be decoded."""

    findings: list[Finding]
    sizes: dict[ImageSource, tuple[int, int]]


def inspect_images(
    uses: Sequence[ImageUse], *, max_pixels: int, workers: int | None = None, on_progress: Progress | None = None
) -> ImageScan:
    """Inspect each distinct image, see `unidpo.data.images.inspect_image`.

    Args:
        uses: every mention of an image.
        max_pixels: what images will be scaled down to.
        workers: threads; as many as there are processors by default. Decoders run outside of Python's lock.
        on_progress: see `Progress`.
    """
    sources = list({use.source: None for use in uses})
    found: dict[ImageSource, tuple[Finding, ...]] = {}
    sizes: dict[ImageSource, tuple[int, int]] = {}
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        results = pool.map(lambda source: inspect_image(source, max_pixels=max_pixels), sources)
        for done, (source, inspection) in enumerate(zip(sources, results, strict=True), start=1):
            if inspection.findings:
                found[source] = inspection.findings
            if inspection.size is not None:
                sizes[source] = inspection.size
            if on_progress:
                on_progress("images", done, len(sources))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the images not begun
    findings = [replace(each, row=use.row, key=use.key) for use in uses for each in found.get(use.source, ())]
    return ImageScan(findings, sizes)
