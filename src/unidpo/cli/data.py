"""`unidpo data ...`: look at preference data, turn it into other layouts, move its images, fetch some."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unidpo.cli.consoles import INPUT_WRONG, messages, results
from unidpo.errors import printable

data = typer.Typer(help="Check, convert, move and fetch preference data.", no_args_is_help=True)

# Names of `unidpo.data.formats.LAYOUTS`, which is not imported for `--help`. A test compares the two.
LAYOUT = "alpaca|sharegpt|swift|trl|ranked"
DataArgument = Annotated[
    str,
    typer.Argument(metavar="FILE", help="JSON, JSONL or Parquet file, or a hub data set.", show_default=False),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder that relative image paths start from.", show_default="the folder of FILE"),
]
To = Annotated[Path, typer.Option("--to", help="The new file.", show_default=False)]


@data.command()
def check(
    file: DataArgument,
    images: Images = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose limits and special tokens the data is held against.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt plus response, with --model.", min=1)] = 4096,
    scan_images: Annotated[bool, typer.Option(help="Whether to open every image.")] = True,
    fix: Annotated[Path | None, typer.Option(help="Write the usable rows to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report every problem of a data set, with its row. Exits with 2 where a row cannot be used."""
    from unidpo.data.check import check_data, write_usable
    from unidpo.data.formats.files import json_bytes
    from unidpo.progress import Stages

    options = {} if model is None else _limits_of(model, max_length)
    with Stages(messages()) as stages:
        report = check_data(file, images=images, scan_images=scan_images, on_progress=stages.update, **options)
    if as_json:
        typer.echo(json_bytes(report.to_json(), Path(file), indent=2))
    else:
        report.render(results())
    if fix is not None:
        rows = write_usable(report, fix)
        _say(f"{fix}: {rows} usable rows written")
    if report.errors:
        raise typer.Exit(INPUT_WRONG)


@data.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="What to convert.", show_default=False)],
    to: To,
    layout: Annotated[str, typer.Option(metavar=LAYOUT, help="Layout of the new file.")] = "ranked",
    from_layout: Annotated[
        str | None,
        typer.Option("--from", metavar=LAYOUT, help="Layout of SRC.", show_default="what each row says by its keys"),
    ] = None,
    images: Images = None,
    skip_bad_rows: Annotated[bool, typer.Option(help="Leave out rows that cannot be used.")] = False,
    drop_extra: Annotated[bool, typer.Option(help="Leave out columns that no layout knows.")] = False,
    score: Annotated[
        str | None,
        typer.Option(help="Ratings and their weights, such as helpfulness=2,honesty=1.", show_default="by data set"),
    ] = None,
) -> None:
    """Write a data set in another layout or kind of file (by the suffix: .json, .jsonl, .parquet)."""
    from unidpo.data.formats import convert as convert_file
    from unidpo.data.formats.layouts.rated import COUNTED
    from unidpo.data.formats.ratings import parse_weights

    report = convert_file(
        source,
        to,
        from_layout=from_layout,
        to_layout=layout,
        images=images,
        on_bad_row="skip" if skip_bad_rows else "error",
        keep_extra=not drop_extra,
        weights=None if score is None else parse_weights(score),
    )
    counts = Counter(finding.kind for finding in report.findings if finding.kind in COUNTED)
    left_out = [finding for finding in report.findings if finding.severity == "error"]
    _say(
        f"{to}: {report.rows_written} rows with {report.pairs} pairs in layout {layout}, from {report.rows_read} rows",
        *(f"left out: {finding}" for finding in left_out),
        *(f"{kind}: {count:,} left out of rows that are used" for kind, count in sorted(counts.items())),
        *(f"dropped column {name}: {rows} rows" for name, rows in report.dropped.items()),
    )
    if missing := report.images_not_found:
        row, path = next((row, path) for path, row in missing.items())
        _say(
            f"{len(missing):,} of {report.images:,} images were not found, such as {path} (row {row}); give "
            "--images FOLDER, or mend the new file with `unidpo data relocate`"
        )


@data.command()
def relocate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Data file in any layout.", show_default=False)],
    images: Annotated[Path, typer.Option(help="The folder the images are in now.", show_default=False)],
    to: Annotated[Path | None, typer.Option(help="The new file.", show_default=False)] = None,
    strip: Annotated[str | None, typer.Option(help="Take this off each path instead of finding out.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace FILE itself.")] = False,
) -> None:
    """Point the image paths of a data file to where the images lie now."""
    from unidpo.data.formats import relocate as relocate_file

    report = relocate_file(file, images, to, strip=strip, in_place=in_place)
    total = report.found + len(report.not_found)
    _say(f"{report.to}: found {report.found} of {total} image paths", *map(str, report.not_found))


@data.command()
def fetch(
    dataset: Annotated[Literal["mm-rlhf", "uni-dpo"], typer.Argument(metavar="mm-rlhf|uni-dpo", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder everything goes to.", show_default=False)],
    source: Annotated[Literal["huggingface", "modelscope"], typer.Option(help="Hub.")] = "huggingface",
    subsets: Annotated[str | None, typer.Option(help="Parts, with commas.", show_default="all with images")] = None,
    repo: Annotated[str | None, typer.Option(help="Another repository on the hub.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Another address of the hub.")] = None,
    delete_archives: Annotated[
        bool, typer.Option("--delete-archives", help="Delete zip files once they are unpacked.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be downloaded, and stop.")] = False,
) -> None:
    """Download a data set and unpack it; resumes an interrupted download."""
    from unidpo.data.mm_rlhf import fetch as fetch_planned
    from unidpo.data.mm_rlhf import plan_fetch
    from unidpo.progress import Stages

    wanted = None if subsets is None else _words(subsets)
    plan = plan_fetch(dataset, to, source=source, subsets=wanted, repo=repo, endpoint=endpoint)
    plan.render(messages())
    if dry_run:
        return
    with Stages(messages()) as stages:
        fetched = fetch_planned(plan, keep_archives=not delete_archives, on_progress=stages.update)
    fetched.render(results())


@data.command("from-mm-rlhf")
def from_mm_rlhf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `data fetch mm-rlhf` wrote.", show_default=False)],
    to: To,
    score: Annotated[str, typer.Option(help="Ratings and their weights.")] = "helpfulness=1,faithfulness=1",
    subsets: Annotated[str, typer.Option(help="Of long, short, mcq, safety.")] = "long,short,mcq",
    min_margin: Annotated[float | None, typer.Option(help="Leave out pairs whose scores differ by less.")] = None,
    conflicts: Annotated[
        Literal["drop", "keep"], typer.Option(help="Pairs that ranking and ratings see the other way round.")
    ] = "drop",
    best_rank: Annotated[Literal["lowest", "highest"], typer.Option(help="Place of the best response.")] = "lowest",
    join_pairs: Annotated[
        bool, typer.Option("--join-pairs", help="Score the pairs of dpo_pairs.jsonl instead of making all pairs.")
    ] = False,
    layout: Annotated[
        str | None, typer.Option(metavar=LAYOUT, help="Layout of the new file.", show_default="ranked")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the new file if it is there.")] = False,
) -> None:
    """Make scored pairs of MM-RLHF's human ratings."""
    from unidpo.data.mm_rlhf import Scoring, parse_weights
    from unidpo.data.mm_rlhf import from_mm_rlhf as score_folder

    scoring = Scoring(
        weights=parse_weights(score),
        subsets=tuple(_words(subsets)),
        min_margin=min_margin,
        conflicts=conflicts,
        best_rank=best_rank,
        join_pairs=join_pairs,
    )
    score_folder(folder, to, scoring, layout=layout, force=force).render(results())
    _say(f"written to {to}; `unidpo data check {to}` looks at the images")


def _limits_of(model: str, max_length: int) -> dict[str, Any]:
    """What `check_data` needs to hold data against a model."""
    from unidpo.model.encode import Encoder, plain_positions
    from unidpo.model.lengths import TokenCounter
    from unidpo.model.load import load_processor

    encoder = Encoder(load_processor(model), plain_positions, max_length=max_length)
    counter = TokenCounter(encoder)
    return {
        "special_tokens": encoder.tokenizer.all_special_tokens,
        "max_pixels": encoder.max_pixels,
        "count_tokens": counter.one,
        "extra": [counter.findings],
    }


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _say(*lines: str) -> None:
    for line in lines:
        messages().print(printable(line), markup=False, highlight=False, soft_wrap=True)
