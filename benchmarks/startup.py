"""What `unidpo train` costs before its first forward pass: check, lengths in tokens, digests of the data, stored keys.

    python -m benchmarks.startup                          50,000 rows over 12,500 images
    python -m benchmarks.startup --against 5e9b5a3        the same beside an earlier revision, in turn
    python -m benchmarks.startup --rows 2000 --runs 1     a quick look

Writes rows of the reference's shape to a temporary folder and measures each stage in a process of its own: CPU seconds
of it and its children, time on the wall, peak memory. The earlier revision is a temporary `git worktree`; this file
measures both, so it calls only what both have. Prints medians and adds a record to benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from PIL import Image

from benchmarks.check import photograph
from benchmarks.records import add_record

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "golden" / "model"
PAIRS_PER_PROMPT = 4
PICTURES = 100
WORDS = 20_000
SYLLABLES = [
    *"aeiou",
    "the",
    "ing",
    "con",
    "er",
    "car",
    "bus",
    "tree",
    "light",
    "rain",
    "per",
    "son",
    "two",
    "é",
    "num",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--against", metavar="REV", help="measure this revision too")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    load = os.getloadavg()[0]  # other work on the machine shows in the seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = generate(folder / "data", options.rows)
        trees = {"here": ROOT}
        if options.against:
            trees[options.against] = folder / "earlier"
            git("worktree", "add", "--detach", str(trees[options.against]), options.against)
        try:
            runs = [{name: measured(tree, data) for name, tree in trees.items()} for _ in range(options.runs)]
        finally:
            if options.against:
                git("worktree", "remove", "--force", str(trees[options.against]))
    medians = {name: medians_of([run[name] for run in runs]) for name in trees}
    for name, stages in medians.items():
        print(f"{name}, medians of {options.runs} runs")
        for stage, values in stages.items():
            print(f"  {stage:<20} {values['cpu_seconds']:7.1f} CPU s {values['seconds']:7.1f} s")
    values: dict[str, Any] = {"transformers": transformers.__version__, "rows": options.rows, "runs": options.runs}
    if options.against:
        if len({run[name]["same"] for run in runs for name in trees}) > 1:
            sys.exit("the two revisions come to different groups, lengths or keys")
        values["ratio"] = round(
            medians["here"]["together"]["cpu_seconds"] / medians[options.against]["together"]["cpu_seconds"], 3
        )
        print(f"CPU seconds here / {options.against}: {values['ratio']}")
    peak = {name: max(run[name]["peak_mib"] for run in runs) for name in trees}
    add_record("startup", **values, load_average_before=load, medians=medians, peak_mib=peak)


def generate(folder: Path, rows: int) -> Path:
    """Rows of the published data's shape, one JSON list: four responses to each prompt, of which four pairs are made.

    Questions of about 70 words, answers of about 100, and JPEG photographs of 200 to 640 pixels a side.
    """
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    pictures = [resized(photograph(seed), rng) for seed in range(PICTURES)]
    vocabulary = ["".join(rng.choices(SYLLABLES, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(WORDS)]
    # As in natural text, few words are most of it.
    weights = list(itertools.accumulate(1 / rank for rank in range(1, WORDS + 1)))

    def text(words: int) -> str:
        count = rng.randint(words // 2, words * 3 // 2)
        return " ".join(rng.choices(vocabulary, cum_weights=weights, k=count)) + "."

    with (folder / "pairs.json").open("w") as file:
        for prompt in range(-(-rows // PAIRS_PER_PROMPT)):
            name = f"images/{prompt:06}.jpg"
            (folder / name).write_bytes(pictures[prompt % PICTURES])
            question = f"<image>Question {prompt}: {text(70)}"
            responses = [(text(100), score) for score in (4.5, 3.5, 2.5, 1.0)]
            pairs = rng.sample(list(itertools.combinations(responses, 2)), PAIRS_PER_PROMPT)
            for place, (chosen, rejected) in enumerate(pairs[: rows - PAIRS_PER_PROMPT * prompt]):
                row = {
                    "instruction": question,
                    "chosen": chosen[0],
                    "rejected": rejected[0],
                    "score_chosen": chosen[1],
                    "score_rejected": rejected[1],
                    "images": [name],
                }
                file.write(("[\n" if prompt == place == 0 else ",\n") + json.dumps(row))
        file.write("\n]\n")
    return folder / "pairs.json"


def resized(picture: bytes, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(picture)).resize((rng.randint(200, 640), rng.randint(200, 640)))
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measured(tree: Path, data: Path) -> dict[str, Any]:
    """What a process with this tree's package measures."""
    result = subprocess.run(
        [sys.executable, __file__, "--measure", str(data)],
        env=os.environ | {"PYTHONPATH": str(tree / "src")},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(result.stdout)
    if not Path(found["package"]).is_relative_to(tree):
        sys.exit(f"{found['package']} was measured instead of {tree}")
    return found


def measure(data: Path) -> dict[str, Any]:
    from rich.console import Console

    import unidpo
    from unidpo.cache.keys import content_keys
    from unidpo.config import recipe_from
    from unidpo.model.encode import Encoder, plain_positions
    from unidpo.model.load import load_processor
    from unidpo.progress import Stages
    from unidpo.run.data import training_data

    try:
        from unidpo.model.lengths import fit_to_length
    except ModuleNotFoundError:  # where earlier revisions have it
        from unidpo.model.encode import fit_to_length

    recipe = recipe_from(
        {"output": "unused", "model": {"name": str(MODEL)}, "data": {"path": str(data), "eval_fraction": 0.02}}
    )
    encoder = Encoder(load_processor(recipe.model.name), plain_positions, template="chatml")
    stages: dict[str, Any] = {}
    start = spent()
    with Stages(Console(file=io.StringIO())) as progress:
        groups, held_out = staged(stages, "check and selection", lambda: training_data(recipe, progress))
        fitted = staged(
            stages, "lengths in tokens", lambda: [fit_to_length(side, encoder) for side in (groups, held_out)]
        )
        if importlib.util.find_spec("unidpo.run_folder.inputs"):  # earlier revisions resumed on any data
            from unidpo.run_folder.inputs import Inputs

            record = Inputs(data.parent, resume=False)
            staged(stages, "digests", lambda: record.check_data(groups, held_out, [(str(data), 1.0)]))
        keys = staged(stages, "keys", lambda: content_keys([*fitted[0].groups, *fitted[1].groups]))
    stages["together"] = since(start)
    result = [
        [(g.messages, g.images, g.responses, [(p.chosen, p.rejected, p.row) for p in g.pairs], t.prompt, t.responses)]
        for side in fitted
        for g, t in zip(side.groups, side.tokens, strict=True)
    ]
    return {
        "package": unidpo.__file__,
        "stages": stages,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "same": hashlib.blake2b(repr([result, keys.prompts, keys.responses]).encode()).hexdigest(),
    }


def staged(stages: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    start = spent()
    result = work()
    stages[name] = since(start)
    return result


def spent() -> tuple[float, float]:
    """CPU seconds of this process and its children so far, and the time on the wall."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    cpu, wall = (now - then for now, then in zip(spent(), start, strict=True))
    return {"cpu_seconds": round(cpu, 2), "seconds": round(wall, 2)}


def medians_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        stage: {key: statistics.median(run["stages"][stage][key] for run in runs) for key in values}
        for stage, values in runs[0]["stages"].items()
    }


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
