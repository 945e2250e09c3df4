"""A plan, for people and for machines."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from unidpo.plan.gpus import GPU, GPUS, UTILISATION
from unidpo.plan.memory import Memory, Setting
from unidpo.plan.work import Work

CARD_SIZES = tuple(sorted({gpu.memory for gpu in GPUS} | {16}))


@dataclass(frozen=True, slots=True)
class Data:
    """What the data set is, and an epoch of it in tokens.

    Attributes:
        groups: prompts with their responses as the recipe takes them.
        prompts: distinct prompts, images included.
        images: of the distinct prompts.
        tokens, image_tokens, response_tokens: that go through the model in an epoch.
        too_long: prompts left out because they leave no room for a response.
        cut: responses that lose their end to `data.max_length`.
        unreadable: groups left out because of their images.
        packs: whether packs are expected; else padded rows.
    """

    groups: int
    pairs: int
    prompts: int
    images: int
    tokens: int
    image_tokens: int
    response_tokens: int
    too_long: int
    cut: int
    unreadable: int
    packs: bool


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast work is done: by a card's peak and an assumed utilisation, or as measured; one of the three.

    Attributes:
        gpu: a card of the table.
        tflops: 10¹² floating-point operations a second that one GPU reaches.
        pairs_per_second: of training, over all GPUs.
    """

    gpu: GPU | None = None
    tflops: float | None = None
    pairs_per_second: float | None = None

    def seconds(self, work: float, *, pairs: int, gpus: int) -> float:
        """For so much work on so many pairs."""
        if self.pairs_per_second is not None:
            return pairs / self.pairs_per_second
        reached = self.tflops if self.gpu is None else UTILISATION * self.gpu.tflops
        return work / (gpus * 1e12 * (reached or 0.0))

    def __str__(self) -> str:
        if self.gpu is not None:
            return f"{self.gpu.name}, {UTILISATION:.0%} of {self.gpu.tflops:g} TFLOP/s"
        if self.tflops is not None:
            return f"{self.tflops:g} TFLOP/s a GPU"
        return f"{self.pairs_per_second:g} pairs/s"


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of a run at some speed: of its steps, of a reference and of features of images computed before them."""

    speed: Speed
    training: float
    reference: float
    features: float

    @property
    def total(self) -> float:
        return self.training + self.reference + self.features

    def row(self) -> tuple[str, str, str]:
        """The speed, the whole time, and what of it comes before the steps."""
        first = {"the reference": self.reference, "features of images": self.features}
        said = ", ".join(f"{what} {clock(seconds)}" for what, seconds in first.items() if seconds)
        return str(self.speed), clock(self.total), f"of it {said}" if said else ""


@dataclass(frozen=True, slots=True)
class Features:
    """Features of images that are kept on disk.

    Attributes:
        work: of the pass that computes them.
        disk: bytes.
    """

    work: Work
    disk: int


@dataclass(frozen=True, slots=True)
class Way:
    """An epoch of the same data, policy and reference, laid out in some way: floating-point operations."""

    name: str
    work: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe will cost: an estimate.

    Attributes:
        weights, trainable_weights: of the model; of them, or of an adapter, those that are trained.
        steps: optimizer steps of the run.
        micro_batches_per_step: most that one GPU has in a step.
        longest_micro_batch: tokens of the longest one.
        epoch_work: of training, one epoch.
        reference_work: of the reference, the whole run; `None` where the loss needs none.
        features: of images, where they are kept on disk.
        total_work: of the run.
        ways: the same data laid out otherwise.
        memory: on each GPU.
        tokens_that_fit: length of a micro-batch for cards of several sizes in GB, see `memory.tokens_that_fit`.
        reference: as in the recipe, or `None` where the loss needs none.
    """

    model: str
    gpus: int
    setting: Setting
    weights: int
    trainable_weights: int
    data: Data
    epochs: float
    steps: int
    micro_batches_per_step: int
    longest_micro_batch: int
    epoch_work: Work
    reference_work: Work | None
    features: Features | None
    total_work: float
    ways: tuple[Way, ...]
    memory: Memory
    tokens_that_fit: dict[int, int]
    times: tuple[Time, ...]
    reference: str | None

    @property
    def fits(self) -> tuple[int, ...]:
        """Sizes of cards, in GB, that hold it."""
        return tuple(size for size in CARD_SIZES if self.memory.total <= size * 1e9)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values; work in floating-point operations, memory in bytes, time in seconds."""
        own: dict[str, Any] = as_values(self)
        return own | {"utilisation": UTILISATION, "fits": list(self.fits), "notes": self.notes()}

    def notes(self) -> list[str]:
        """What of the data is left out."""
        counts = {
            "prompts leave no room for a response and are skipped": self.data.too_long,
            "responses are cut at data.max_length": self.data.cut,
            "groups are left out because of their images": self.data.unreadable,
        }
        return [f"{count:,} {what}" for what, count in counts.items() if count]

    def render(self, console: Console) -> None:
        """Print it."""
        data, per_gpu = self.data, "" if self.gpus == 1 else " per GPU"
        text = data.tokens - data.image_tokens - data.response_tokens
        longest = f"at most,{per_gpu} the longest has {self.longest_micro_batch:,} tokens"
        tokens = [
            ("pairs", f"{data.pairs:,}", f"of {data.prompts:,} prompts with {data.images:,} images"),
            ("tokens an epoch", rounded(data.tokens), "in packs" if data.packs else "in padded rows, padding included"),
            ("  of images", rounded(data.image_tokens), ""),
            ("  of prompts", rounded(text), ""),
            ("  of responses", rounded(data.response_tokens), ""),
            ("optimizer steps", f"{self.steps:,}", f"in {self.epochs:.3g} epochs"),
            ("micro-batches a step", f"{self.micro_batches_per_step:,}", longest),
        ]
        _print(
            console,
            f"{self.model}: {rounded(self.weights)} weights, {rounded(self.trainable_weights)} trainable",
            tokens,
        )
        work = [("training, an epoch", operations(self.epoch_work.total), "")]
        if self.features is not None:
            disk = f"once, before the reference; {gigabytes(self.features.disk)} on disk"
            work.append(("features of images", operations(self.features.work.total), disk))
        if self.reference_work is not None:
            when = "in each step" if self.reference == "live" else "once, before the first step"
            work.append(("reference", operations(self.reference_work.total), when))
        work.append(("the run", operations(self.total_work), ""))
        _print(console, "Floating-point work", work)
        last = self.ways[-1].work
        ways = [(way.name, operations(way.work), f"{way.work / last:.1f} x") for way in self.ways]
        _print(console, "An epoch and its reference, laid out in other ways", ways)
        held: dict[str, Any] = as_values(self.memory)
        moment = held.pop("moment")
        memory = [(name, gigabytes(size), "") for name, size in held.items() if size]
        fits = f"{self.fits[0]} GB" if self.fits else "none"
        memory.append(("smallest card", fits, f"of those up to {CARD_SIZES[-1]} GB"))
        room = [f"{tokens:,} on {size} GB" for size, tokens in self.tokens_that_fit.items() if tokens]
        memory.append(("train.max_tokens_per_pack", "at most", ", ".join(room) or "none fits"))
        _print(console, f"Memory{per_gpu}, at its worst in: {moment}", memory)
        if self.times:
            cards = f" on {self.gpus} GPUs" if self.gpus > 1 else ""
            _print(console, f"Time{cards}", [time.row() for time in self.times])
        for note in self.notes():
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        console.print("all figures are estimates; what they leave out is in docs/plan.md", soft_wrap=True)


def as_values(value: Any) -> Any:
    """Dataclasses as dictionaries, each with its total if it has one."""
    if isinstance(value, tuple):
        return [as_values(each) for each in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if not is_dataclass(value):
        return value
    names = [field.name for field in fields(value)]
    if hasattr(value, "total"):
        names.append("total")
    return {name: as_values(getattr(value, name)) for name in names}


def _print(console: Console, title: str, rows: list[tuple[str, str, str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def rounded(count: float) -> str:
    """Three digits and a unit, e.g. `53.1 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def operations(work: float) -> str:
    """Floating-point operations in powers of ten, e.g. `2.5e17`."""
    return f"{work:.1e}".replace("e+", "e")


def gigabytes(size: float) -> str:
    """In GB of 10⁹ bytes."""
    return f"{size / 1e9:.1f} GB"


def clock(seconds: float) -> str:
    """A time in the unit it is spoken of, e.g. `3.4 hours`."""
    for unit, size, least in (("days", 86400, 2), ("hours", 3600, 1), ("minutes", 60, 2)):
        if seconds >= least * size:
            count = seconds / size
            return f"{count:.1f} {unit}" if count < 10 else f"{count:.0f} {unit}"
    return f"{seconds:.1f} seconds"
