"""Results of one model or several, and the differences between them, as a page of Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jinja2

from unidpo.evaluate.comparing import Difference
from unidpo.evaluate.results import ModelResult


def page(models: Sequence[ModelResult], differences: Sequence[Difference] = ()) -> str:
    """The page of models that took the same benchmarks."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("unidpo.evaluate", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown; what is not ours goes through `text`
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"text": escaped, "number": number}
    same = zip(*(model.benchmarks for model in models), strict=True)
    # The metric is named as by the first model that has a result.
    benchmarks = [(next((each for each in row if each.failure is None), row[0]), row) for row in same]
    template = templates.get_template("results.md.j2")
    return template.render(models=models, benchmarks=benchmarks, differences=differences)


def escaped(text: str) -> str:
    """Text of anybody's on one line, without anything that Markdown or HTML would read as more than text."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore within a word is none of emphasis, and paths are copied from here.
    return re.sub(r"([\\`*\[\]|!#~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)


def number(value: float) -> str:
    """A metric, with at most one digit after the point."""
    return f"{value:.1f}".removesuffix(".0") if value == int(value) else f"{value:.1f}"
