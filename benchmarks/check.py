"""How fast `unidpo data check` is, and how much memory it takes.

    python -m benchmarks.check                    50,000 rows, 12,500 images of 640 x 480
    python -m benchmarks.check --rows 2000        a quick look

Writes the data to a temporary folder, checks it twice in processes of their own, with and without decoding the
images, prints what it took, and adds a record to benchmarks/results/check.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import PIL
from PIL import Image, ImageFilter

from benchmarks.records import add_record

PAIRS_PER_PROMPT = 4
ENCODINGS = 50
SENTENCE = "the image shows a red car beside two people who wait for bus number 42 under an old tree in light rain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-images", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, scan_images=not options.no_images)))
        return
    load = os.getloadavg()[0]  # other work on the machine shows in the seconds
    with tempfile.TemporaryDirectory() as folder:
        data = generate(Path(folder), options.rows)
        runs = {}
        for name, more in (("without images", ["--no-images"]), ("with images", [])):
            command = [sys.executable, "-m", "benchmarks.check", "--measure", str(data), *more]
            runs[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(
                "{0}: {rows:,} rows, {images:,} images in {seconds} s, {rows_per_second:,} rows/s, "
                "peak memory {peak_mib:,} MiB".format(name, **runs[name])
            )
    add_record("check", pillow=PIL.__version__, load_average_before=load, runs=runs)


def generate(folder: Path, rows: int) -> Path:
    """Rows of the published data's shape: four pairs per prompt, one photograph each, answers of about 100 tokens.

    As one JSON list, which takes more memory than lines.
    """
    rng = random.Random(0)
    encoded = [photograph(seed) for seed in range(ENCODINGS)]
    (folder / "images").mkdir()
    with (folder / "pairs.json").open("w") as file:
        for n in range(rows):
            prompt, pair = divmod(n, PAIRS_PER_PROMPT)
            name = f"images/{prompt:06}.jpg"
            if pair == 0:
                (folder / name).write_bytes(encoded[prompt % ENCODINGS])
                question = f"<image>Question {prompt}: {text(rng, 70)}?"
            row = {
                "instruction": question,
                "chosen": text(rng, 80),
                "rejected": text(rng, 80),
                "score_chosen": round(rng.uniform(2, 5), 2),
                "score_rejected": round(rng.uniform(1, 3), 2),
                "images": [name],
            }
            file.write(("[\n" if n == 0 else ",\n") + json.dumps(row))
        file.write("\n]\n")
    return folder / "pairs.json"


def photograph(seed: int) -> bytes:
    """A JPEG of 640 x 480 that compresses like a photograph: soft shapes under some grain."""
    random.seed(seed)
    shapes = Image.effect_noise((40, 30), 120).resize((640, 480), Image.Resampling.BICUBIC)
    grain = Image.effect_noise((640, 480), 30).filter(ImageFilter.GaussianBlur(1))
    image = Image.merge("RGB", [shapes, Image.blend(shapes, grain, 0.3), Image.blend(shapes, grain, 0.5)])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(SENTENCE.split(), k=rng.randint(words // 2, words * 3 // 2)))


def measure(data: Path, *, scan_images: bool) -> dict[str, float]:
    from unidpo.data.check import check_data

    start, cpu = time.perf_counter(), time.process_time()
    report = check_data(data, scan_images=scan_images)
    seconds = time.perf_counter() - start
    if not report.ok:
        sys.exit(f"the data should be good: {report.errors[:3]}")
    return {
        "rows": report.rows,
        "images": report.images if scan_images else 0,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "rows_per_second": round(report.rows / seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
