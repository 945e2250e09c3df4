"""What a recipe holds: the sections, their keys, ranges and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args

from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from unidpo.config.hf_arguments import MANY, RENAMED, model_of_arguments, words_of
from unidpo.losses import LOSSES, PreferenceLoss, UniDPO

ModelPart: TypeAlias = Literal["vision", "projector", "language"]
Attention: TypeAlias = Literal["auto", "varlen", "flash", "flex", "sdpa", "padded"]

Compile: TypeAlias = Literal["auto", "layers", "off"]


def _as_path(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str) and value else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_parts(value: Any) -> Any:
    return () if value == "none" else _as_tuple(value)


def _off_is_a_word(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


def _as_sources(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple({"path": source} if isinstance(source, str) else source for source in value)


FilePath: TypeAlias = Annotated[Path, BeforeValidator(_as_path)]
T = TypeVar("T")
Several: TypeAlias = Annotated[tuple[T, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys, no silent conversions, no infinities."""

    # A section's validator is built within the recipe's; building each alone as well would only cost time.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class ModelSection(Section):
    """The policy: what is loaded and which parts of it are trained."""

    name: str = Field(min_length=1)
    """A folder written by `save_pretrained`, or a hub id."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype. Losses are computed in float32 whatever it is."""
    freeze: Annotated[tuple[ModelPart, ...], BeforeValidator(_as_parts)] = ("vision", "projector")
    """Parts that are not trained, or `none`."""
    attention: Attention = "auto"
    """`padded` lays out one row per response; `auto` takes packs where the self-check agrees, by the fastest backend
    there is; any other names a backend and demands packs by it."""
    quantize: Literal["nf4", "int8"] | None = None
    """How the language model's weights are held under an adapter: in 4 or 8 bits (bitsandbytes); null for as loaded."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""


class SourceSection(Section):
    """One data set of a mixture."""

    path: str = Field(min_length=1)
    """As `data.path`."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often each of its rows is met in an epoch: 0.5 for half of them, 2 for each twice."""
    images: FilePath | None = None
    """As `data.images`; null for that."""


class DataSection(Section):
    """The preference data and how it is read."""

    path: Annotated[
        Annotated[str, Field(min_length=1), Tag("one")]
        | Annotated[tuple[SourceSection, ...], BeforeValidator(_as_sources), Field(min_length=1), Tag("several")],
        Discriminator(lambda path: "one" if isinstance(path, str) else "several"),
    ]
    """JSON, JSONL or Parquet file, relative to the working directory, or a hub data set (`name:config@split`); or a
    list of these, each a path or `{path, weight, images}`."""
    images: FilePath | None = None
    """Folder that relative image paths start from; null for the data file's own folder."""
    template: str | None = None
    """Chat template: null for the model's own, `chatml`, or a Jinja file."""
    max_length: int = Field(4096, gt=0, le=MANY)
    """Tokens of prompt plus response. A response is cut on the right; a prompt or an image token never is."""
    max_pixels: int = Field(768 * 768, ge=32 * 32, le=MANY)
    """Width times height above which an image is scaled down."""
    group_by_prompt: bool = False
    """Whether pairs that share prompt and images become one group, encoded once."""
    cache_image_features: bool = False
    """Whether what a frozen vision tower and projector make of each image is kept on disk and not computed again."""
    shuffle: bool = True
    """Whether each epoch visits the pairs in a new order, drawn from `train.seed`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What an unusable row does: stop before training, or be left out, counted and named."""
    max_lost_fraction: float = Field(0.01, ge=0.0, le=1.0)
    """Share of the pairs that may go bad after the check and be skipped; where it is more, the run stops."""
    min_score_margin: float | None = None
    """Pairs whose chosen minus rejected score is below this are left out; null keeps ties and reversed pairs."""
    eval_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the prompts held out for evaluation."""

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """`path` as a mixture, of one source where it is a single path."""
        return (SourceSection(path=self.path),) if isinstance(self.path, str) else self.path


class LoraSection(Section):
    """A low-rank adapter (peft). It alone is trained, whatever `model.freeze` says."""

    r: int = Field(16, gt=0, le=65536)
    """Rank."""
    alpha: float = Field(32, gt=0)
    """Scale: the adapter's output is multiplied by `alpha / r`."""
    rslora: bool = False
    """Whether the scale is `alpha / sqrt(r)`, which keeps large ranks learning (arXiv:2312.03732)."""
    dora: bool = False
    """Whether the length of each weight column is learned apart from its direction (DoRA, arXiv:2402.09353)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    target_modules: Annotated[tuple[str, ...] | str | None, BeforeValidator(_as_tuple)] = None
    """Names (or a regular expression) of the layers that get one; `all-linear` for every linear layer but the head,
    vision tower and projector included; null for those of the language model."""


if TYPE_CHECKING:
    HuggingFaceArguments = Section
else:
    HuggingFaceArguments = model_of_arguments(Section)


_OURS_ALONE = {"compile", "global_batch_pairs", "max_tokens_per_pack"}


class TrainSection(HuggingFaceArguments):
    """Hugging Face `TrainingArguments` under their own names; those listed here have defaults of ours."""

    global_batch_pairs: int | None = Field(None, gt=0, le=MANY)
    """Pairs per optimizer step over all processes; derives `gradient_accumulation_steps`."""
    max_tokens_per_pack: int | None = Field(None, gt=0, le=MANY)
    """Tokens that a micro-batch is filled up to; takes the place of `per_device_train_batch_size` there."""
    compile: Annotated[Compile, BeforeValidator(_off_is_a_word)] = "auto"
    """`layers`: torch compiles each layer of language model and vision tower, or it is an error; `auto`: on a CUDA GPU,
    where it works; `off`: nothing is compiled."""
    per_device_train_batch_size: int = Field(1, gt=0, le=MANY)
    """Pairs per micro-batch and process."""
    per_device_eval_batch_size: int = Field(1, gt=0, le=MANY)
    """The same during evaluation."""
    learning_rate: float = Field(1e-6, ge=0)
    """At the schedule's peak."""
    lr_scheduler_type: words_of("lr_scheduler_type") = "cosine"  # type: ignore[valid-type]
    """How the learning rate falls over the run."""
    warmup_steps: float = Field(0, ge=0, le=MANY)
    """Optimizer steps, or a share of all of them where below 1."""
    num_train_epochs: float = Field(1.0, gt=0, le=1_000_000)
    """Visits of each pair."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW, on every weight but norms and biases."""
    max_grad_norm: float = Field(1.0, ge=0)
    """The gradient's norm is clipped to this; 0 switches clipping off."""
    logging_steps: float = Field(1, gt=0, le=MANY)
    """Optimizer steps between two records of `metrics.jsonl`, or a share of all of them where below 1."""
    save_steps: float = Field(100, gt=0, le=MANY)
    """Optimizer steps between checkpoints, or a share of all of them where below 1; one more at the end."""
    save_total_limit: int | None = Field(2, gt=0, le=MANY)
    """Checkpoints kept, the newest ones."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Source of every random choice of the run."""
    fsdp: bool | None = None
    """Whether weights are sharded over the processes by FSDP2; `fsdp_config` tunes it."""

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `transformers.TrainingArguments`: what the recipe set, and our defaults."""
        return {name: value for name, value in self.given().items() if name not in _OURS_ALONE}

    def given(self) -> dict[str, Any]:
        """This section without the keys that are left to transformers' own defaults."""
        ours = TrainSection.__annotations__
        names = [*ours, *(name for name in type(self).model_fields if name in self.model_fields_set - ours.keys())]
        return {name: getattr(self, name) for name in names}


class EvalSection(Section):
    """Benchmarks that the model takes while it trains."""

    benchmarks: Several[Annotated[str, Field(min_length=1)]]
    """Files of own benchmarks, or names of the paper's."""
    steps: int = Field(100, gt=0, le=MANY)
    """Optimizer steps between two times; `train.eval_strategy` and `train.eval_steps` take its place."""
    limit: int | None = Field(200, gt=0, le=MANY)
    """Questions of each benchmark; null for all."""
    batch_size: int | None = Field(None, gt=0, le=MANY)
    """Questions answered together; null for what `unidpo eval` takes."""


if TYPE_CHECKING:
    _Loss: TypeAlias = PreferenceLoss
else:
    _Loss = Annotated[Union[*LOSSES.values()], Field(discriminator="name")]


class Recipe(Section):
    """Everything a run depends on. `load_recipe` reads one; its attributes are the sections of the file."""

    output: FilePath
    """The run folder, relative to the working directory."""
    model: ModelSection
    data: DataSection
    loss: _Loss = Field(default_factory=UniDPO)
    reference: str = Field("stored", min_length=1)
    """`stored` (the policy before its first step, as numbers on disk), `live` (a frozen copy), or a model."""
    lora: LoraSection | None = None
    """An adapter, or null to train the weights themselves."""
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection | None = None
    """Benchmarks while the model trains, or null."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Values that are right each by itself and do not go together: the key to change, and what is wrong."""
        model, lora, train = self.model, self.lora, self.train
        if lora is None and set(model.freeze) == set(get_args(ModelPart)):
            yield "model.freeze", "names every part and there is no `lora`: nothing would be trained"
        if model.quantize is not None and lora is None:
            yield "model.quantize", "holds weights that cannot be trained: add a `lora` section, or leave it out"
        if model.quantize == "int8" and lora is not None and lora.dora:
            # peft reads the lengths of the columns from bitsandbytes' 8-bit layers, which do not survive it.
            yield "lora.dora", "does not work over `model.quantize: int8`; use nf4, or plain LoRA"
        if self.data.cache_image_features and lora is None and not {"vision", "projector"} <= set(model.freeze):
            needs = (
                "needs a frozen vision tower and projector: set `model.freeze: [vision, projector]`, or leave it out"
            )
            yield "data.cache_image_features", needs
        if train.given().get("eval_strategy", "no") != "no" and not self.data.eval_fraction and self.eval is None:
            needs = "needs something to evaluate on: set `data.eval_fraction` above 0, or `eval.benchmarks`"
            yield "train.eval_strategy", needs
        pairs, at_once = train.global_batch_pairs, train.per_device_train_batch_size
        if pairs is not None and "gradient_accumulation_steps" in train.model_fields_set:
            message = "is given beside `global_batch_pairs`, which derives it; give one of them, not both"
            yield "train.gradient_accumulation_steps", message
        elif pairs is not None and pairs % at_once:
            message = f"({pairs}) must be a multiple of `per_device_train_batch_size` ({at_once})"
            yield "train.global_batch_pairs", message
        if train.compile == "layers" and train.given().get("torch_compile"):
            yield "train.torch_compile", "compiles the whole model, and `compile: layers` each layer; leave it out"
        for old, new in RENAMED.items():
            if {old, new} <= train.model_fields_set:
                yield f"train.{old}", f"is another name of `{new}`, which is given too; give one of them, not both"

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain JSON values; `recipe_from` reads it back."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        plain["train"] = {name: plain["train"][name] for name in self.train.given()}
        return plain

    def to_yaml(self) -> str:
        """`resolved()` as a recipe file."""
        return OmegaConf.to_yaml(OmegaConf.create(self.resolved()))


class MethodSection(Section):
    """One method of a sweep: a recipe and the values to try."""

    recipe: FilePath
    """Recipe file, relative to the working directory."""
    name: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """What its runs are called by; null for the recipe's file name."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe keys that are the same in all its runs."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted recipe keys, each with the values to try; every combination is a run."""


class Sweep(Section):
    """A sweep file: several recipes, each with a grid of values."""

    output: FilePath
    """Folder of the run folders and the summary."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe keys that are the same in all runs; a method's own win over these, and its grid over both."""
    methods: Several[MethodSection]
    """The methods, in the order in which they run."""
