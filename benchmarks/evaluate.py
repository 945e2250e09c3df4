"""How much faster `unidpo eval` answers questions together than one at a time, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluate

A Qwen2-VL with random weights (about 110 million parameters, float32), one image of its own size for each question,
answers of a fixed length. Both ways take turns in one process, which counts its own processor seconds; the answers
have to be the same. Adds a record to benchmarks/results/eval.json.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.records import add_record
from benchmarks.shapes import SHAPES, save_model
from unidpo.generate.hugging_face import HuggingFace
from unidpo.generate.questions import Answer, Generation, Question
from unidpo.model.load import load_policy, load_processor

TOKEN_SIDE = 28
SIDES = {"small": (2, 8), "large": (10, 20)}
"""Shortest and longest side of the images, in tokens of 28 x 28 pixels."""
SETTINGS = (("small", 32), ("small", 8), ("large", 8))
"""Images and the length of answers in tokens."""
QUESTIONS, TOGETHER = 32, 16
WORDS = ("what", "is", "red", "blue", "number", "left", "of", "the")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_model(SHAPES["cpu"], Path(folder))
        model, processor = load_policy(folder), load_processor(folder)
        list(HuggingFace(model, processor).answer(questions("small", 2), Generation(2)))  # warms up
        settings = [measured(model, processor, *setting) for setting in SETTINGS]
    packages = {name: version(name) for name in ("torch", "transformers", "unidpo")}
    threads = torch.get_num_threads()
    add_record("eval", packages=packages, threads=threads, parameters=parameters, together=TOGETHER, settings=settings)


def measured(model: Any, processor: Any, images: str, tokens: int) -> dict[str, Any]:
    """Processor seconds for a question, alone and in a batch; both ways take turns after each batch."""
    asked, generation = questions(images, QUESTIONS), Generation(tokens)
    ways = {"alone": 1, "together": TOGETHER}
    streams = {
        way: HuggingFace(model, processor, batch_size=size).answer(asked, generation) for way, size in ways.items()
    }
    said: dict[str, dict[str, Answer]] = {way: {} for way in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for _ in range(QUESTIONS // TOGETHER):
        for way, size in ways.items():
            start = time.process_time()
            for _ in range(TOGETHER // size):
                said[way] |= next(streams[way])
            seconds[way] += time.process_time() - start
    assert said["alone"] == said["together"], "a batch changed an answer"
    assert len(said["alone"]) == QUESTIONS
    assert all(answer.truncated for answer in said["alone"].values()), "an answer ended early"
    each = {way: round(value / QUESTIONS, 3) for way, value in seconds.items()}
    times = round(seconds["alone"] / seconds["together"], 2)
    print(f"{images} images, answers of {tokens} tokens: {each} s, {times} x", flush=True)
    return {"images": images, "answer_tokens": tokens, "questions": QUESTIONS, **each, "times": times}


def questions(images: str, count: int) -> list[Question]:
    """Each with an image of its own size and 8 to 40 words."""
    rng = random.Random(0)
    shortest, longest = SIDES[images]
    found = []
    for i in range(count):
        width, height = (TOKEN_SIDE * rng.randint(shortest, longest) for _ in range(2))
        coarse = Image.frombytes("RGB", (8, 8), rng.randbytes(3 * 64))
        file = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
        found.append(Question(str(i), (file.getvalue(), " ".join(rng.choices(WORDS, k=rng.randint(8, 40))))))
    return found


if __name__ == "__main__":
    main()
