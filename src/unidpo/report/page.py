"""The page: everything gathered, escaped, and put into one file."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

import unidpo
from unidpo.errors import RunError
from unidpo.files.writing import write_atomically
from unidpo.report.alerts import FEWEST_STEPS, alerts_of
from unidpo.report.charts import COLOURS, charts_of
from unidpo.report.evaluation import read_evaluations
from unidpo.report.overview import names_of, overview
from unidpo.report.pairs import MOST_PAIRS, OUTCOMES, Pairs, pairs_of
from unidpo.report.reading import Note, Run, read_run
from unidpo.report.texts import PairTexts, Texts, small_pictures, texts_of

MOST_RUNS = 8
_LANGUAGES = ("en", "zh")
_TURNS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that turn the direction of writing; the page shows them by their numbers."""


def write_report(
    runs: Sequence[str | Path],
    to: str | Path,
    *,
    evaluations: Sequence[str | Path] = (),
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Path:
    """Write the page of one run, or of several beside each other; returns its path.

    Args:
        runs: run folders, of whatever state.
        to: the HTML file.
        evaluations: folders that `unidpo eval` wrote.
        on_progress: called with a stage, what is done and what is to do.

    Raises:
        RunError: a folder holds no run, or no results; there are too many runs; the file cannot be written.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise RunError(f"{len(runs)} runs: one page shows 1 to {MOST_RUNS}; name fewer")
    read = []
    for done, path in enumerate(runs, start=1):
        read.append(read_run(path))
        on_progress("reading, runs", done, len(runs))
    html = _page(read, evaluations, on_progress)
    try:
        # What is no text at all, half of a surrogate pair, has no bytes.
        write_atomically(Path(to), html.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(f"{to}: cannot be written ({error.strerror}); give another --to") from error
    return Path(to)


def _page(runs: Sequence[Run], evaluations: Sequence[str | Path], on_progress: Callable[[str, int, int], None]) -> str:
    words = _words()
    pairs = [pairs_of(run, MOST_PAIRS // len(runs)) for run in runs]
    overviews = [overview(run, name, each) for run, name, each in zip(runs, names_of(runs), pairs, strict=True)]
    charts = charts_of(runs)
    texts, notes = Texts(), [note for run in runs for note in run.notes]
    data = [_pairs_data(run, each, texts, notes) for run, each in zip(runs, pairs, strict=True)]
    for each, head in zip(data, overviews, strict=True):
        each["name"] = head.name
    cut, lengths = texts.cut()
    wanted = list(_wanted_pictures(data))
    total = len(set(wanted))
    small = small_pictures(texts.sources, wanted, lambda done: on_progress("drawing, images", done, total))
    if lengths:
        notes.append(Note("note-cut", {"n": f"{len(lengths):,}", "limit": f"{max(map(len, cut)):,}"}))
    if any(shown := [bool(address) for address in small]) and not all(shown):
        notes.append(Note("note-pictures", {"shown": f"{sum(shown):,}", "total": f"{len(shown):,}"}))
    payload = {
        "outcomes": OUTCOMES,
        "runs": data,
        "texts": cut,
        "lengths": lengths,
        "pictures": [[name, address] for name, address in zip(texts.pictures, small, strict=True)],
        "charts": {chart.idea.key: chart.data for chart in charts},
        "names": [head.name for head in overviews],
        "words": {language: {key: word[language] for key, word in words.items()} for language in _LANGUAGES},
    }
    script, style = _resource("report.js") + _resource("pairs.js"), _resource("report.css")
    say = _Sayer(words)
    html = _template().render(
        t=say,
        say=lambda note: say(note.key, **note.values),
        is_note=lambda value: isinstance(value, Note),
        word=lambda key: words[key]["en"],
        heads=overviews,
        alerts=[alerts_of(run) for run in runs],
        short=[run.last_step < FEWEST_STEPS for run in runs],
        fewest_steps=FEWEST_STEPS,
        charts=charts,
        colours=COLOURS,
        pairs=pairs,
        met_once=all(np.all(each.columns["visits"] == 1) for each in pairs),
        outcomes=OUTCOMES,
        notes=list({(note.key, *note.values.items()): note for note in notes}.values()),
        evaluation=read_evaluations(evaluations) if evaluations else None,
        data=Markup(embedded(payload)),  # escaped by `embedded`
        script=Markup(script),  # ours
        style=Markup(style),
        policy=f"default-src 'none'; img-src data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'",
        version=unidpo.__version__,
        folders=", ".join(str(run.path) for run in runs),
        time=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    )
    return html.translate({code: f"\\u{code:04x}" for code in _TURNS})


@functools.cache
def _template() -> jinja2.Template:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("unidpo.report", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html.j2")


class _Sayer:
    """Says a key of `words.json` in each language; the style sheet shows the one that is chosen."""

    def __init__(self, words: dict[str, dict[str, str]]) -> None:
        self._words = words

    def __call__(self, key: str, **values: Any) -> Markup:
        """Values are escaped."""
        spans = [
            Markup('<span lang="{}">{}</span>').format(language, Markup(self._words[key][language]).format(**values))
            for language in _LANGUAGES
        ]
        return Markup("").join(spans)


def _words() -> dict[str, dict[str, str]]:
    return dict(json.loads(_resource("words.json")))


def _resource(name: str) -> str:
    return resources.files("unidpo.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def embedded(value: Any) -> str:
    """JSON that can stand within a `<script>`: nothing in it ends the element, or a line of JavaScript."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.translate({code: f"\\\\u{code:04x}" for code in _TURNS})
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _pairs_data(run: Run, pairs: Pairs, texts: Texts, notes: list[Note]) -> dict[str, Any]:
    found: PairTexts = texts_of(run, pairs, texts, notes)
    numbers = {
        name: [None if math.isnan(value) else float(f"{value:.4g}") for value in column.tolist()]
        for name, column in pairs.columns.items()
        if name not in ("file", "row", "chosen", "rejected", "step", "visits")
    }
    whole = {name: pairs.columns[name].astype(np.int64).tolist() for name in ("file", "row", "step", "visits")}
    # A column without values, of a loss without a reference say, is none.
    kept = {name: column for name, column in numbers.items() if any(value is not None for value in column)}
    return {
        "files": [file or "?" for file in run.files],
        "columns": kept | whole,
        "outcome": pairs.outcome.tolist(),
        "prompt": found.prompt,
        "chosen": found.chosen,
        "rejected": found.rejected,
        "pictures": found.pictures,
    }


def _wanted_pictures(data: Sequence[dict[str, Any]]) -> chain[int]:
    """Images in the order in which a reader asks for them: pairs learnt most and pairs learnt least, by turns."""

    def places(run: dict[str, Any]) -> chain[int]:
        margins = run["columns"].get("margin", [])
        order = sorted(range(len(margins)), key=lambda place: margins[place] or 0.0)
        turns = chain.from_iterable(zip_longest(order[: len(order) // 2 + 1], reversed(order)))
        return chain.from_iterable(run["pictures"][place] for place in turns if place is not None)

    return chain.from_iterable(map(places, data))
