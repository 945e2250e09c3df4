"""What a recipe holds: the sections, their keys, ranges and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from unidpo.config.hf_arguments import RENAMED, SCHEDULERS, model_of_arguments, one_of
from unidpo.config.ranges import MANY

ModelPart: TypeAlias = Literal["vision", "projector", "language"]
Attention: TypeAlias = Literal["auto", "sdpa", "varlen", "flex", "flash", "padded"]


def _as_parts(value: Any) -> Any:
    if value == "none":
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be `none` or a list of {', '.join(get_args(ModelPart))}, not {value!r}")
    return tuple(value)


def _as_path(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str) and value else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


FilePath: TypeAlias = Annotated[Path, BeforeValidator(_as_path)]


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys, no silent conversions, no infinities."""

    # A section's validator is built within the recipe's; building each alone as well would only cost time.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class ModelSection(Section):
    """The policy: what is loaded and which parts of it learn."""

    name: str = Field(min_length=1)
    """A folder written by `save_pretrained`, or a hub id."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the arithmetic. Losses are computed in float32 whatever it is."""
    freeze: Annotated[tuple[ModelPart, ...], BeforeValidator(_as_parts)] = ("vision", "projector")
    """Parts that do not learn, or `none`."""
    attention: Attention = "auto"
    """`padded` lays out one row per response; `auto` takes packs where the self-check agrees, by the fastest backend
    there is; `sdpa`, `varlen`, `flex` and `flash` demand packs by that backend."""
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


def _as_sources(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple({"path": source} if isinstance(source, str) else source for source in value)


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


class UniDPOSection(Section):
    """Uni-DPO, arXiv:2506.10054."""

    name: Literal["uni_dpo"]
    beta: float = Field(2.0, gt=0)
    """Scale of the log-ratios (per nat per token)."""
    quality_eta: float = Field(0.7, ge=0)
    """Steepness of the quality weight, per unit of score margin."""
    tau_ref: float = 2.0
    """β times the log-ratio at which the performance weight is `2^-perf_gamma`."""
    perf_gamma: float = Field(3.0, ge=0)
    """Focusing exponent of the performance weight; 0 switches it off."""
    nll_weight: float = Field(0.001, ge=0)
    """Weight of the calibrated NLL term (loss per nat per token)."""
    tau_good: float = 2.5
    """Score from which a chosen response is guarded by the NLL term."""
    detach_performance_weight: bool = False
    """Whether the performance weight is a constant to the gradient; the reference differentiates through it."""


class DPOSection(Section):
    """DPO, arXiv:2305.18290."""

    name: Literal["dpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share of pairs whose preference is the wrong way round."""
    length_normalized: bool = False
    """Whether log-probabilities are averaged over a response's tokens instead of summed."""


class SimPOSection(Section):
    """SimPO, arXiv:2405.14734; needs no reference."""

    name: Literal["simpo"]
    beta: float = Field(2.0, gt=0)
    """Scale of the length-averaged log-probabilities."""
    gamma: float = Field(1.0, ge=0)
    """Target reward margin; the margin in nats per token is `gamma / beta`."""


class MMDPOSection(Section):
    """MM-DPO, arXiv:2502.10391: DPO whose β grows with the score margin."""

    name: Literal["mm_dpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios at a tie, β₀."""
    w: float = Field(0.5, ge=0)
    """Share by which β grows at most; 0 gives DPO."""
    k: float = Field(0.5, ge=0)
    """How fast β grows, per unit of score margin."""


class ODPOSection(Section):
    """DPO with an offset, arXiv:2402.10571."""

    name: Literal["odpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    alpha: float = Field(1.0, ge=0)
    """The reward margin asked for is `alpha` times the logarithm of the score margin; 0 gives DPO."""


class RPOSection(Section):
    """Reward-aware preference optimization, arXiv:2502.00203."""

    name: Literal["rpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    eta: float = Field(1.0, gt=0)
    """The reward margin aimed at, per unit of score margin."""
    distance: Literal["bwd_kl", "fwd_kl", "sq"] = "bwd_kl"
    """Between the two margins: Bernoulli KL with the scores' in front, with the policy's in front, or the square."""


class IPOSection(Section):
    """IPO, arXiv:2310.12036."""

    name: Literal["ipo"]
    tau: float = Field(0.1, gt=0)
    """Regularization: the margin aimed at is `1 / (2 tau)` nats per token."""


class MPOSection(Section):
    """Mixed preference optimization, arXiv:2411.10442."""

    name: Literal["mpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    w_p: float = Field(0.8, ge=0)
    """Weight of the preference term, DPO."""
    w_q: float = Field(0.2, ge=0)
    """Weight of the quality term, BCO."""
    w_g: float = Field(1.0, ge=0)
    """Weight of the generation term, the chosen response's NLL per token."""


class WPOSection(Section):
    """Weighted preference optimization, arXiv:2406.11827."""

    name: Literal["wpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    max_weight: float | None = Field(1.0, gt=0)
    """Bound of a pair's weight; null for none."""


LossSection: TypeAlias = Annotated[
    UniDPOSection
    | MMDPOSection
    | ODPOSection
    | RPOSection
    | DPOSection
    | SimPOSection
    | IPOSection
    | MPOSection
    | WPOSection,
    Field(discriminator="name"),
]
LOSS_SECTIONS: Mapping[str, type[Section]] = {
    get_args(section.model_fields["name"].annotation)[0]: section for section in get_args(get_args(LossSection)[0])
}


class LoraSection(Section):
    """A low-rank adapter (peft). It alone learns, whatever `model.freeze` says."""

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


_OURS_ALONE = {"global_batch_pairs", "max_tokens_per_pack"}


class TrainSection(HuggingFaceArguments):
    """Hugging Face `TrainingArguments` under their own names; those listed here have defaults of ours."""

    global_batch_pairs: int | None = Field(None, gt=0, le=MANY)
    """Pairs per optimizer step over all processes; derives `gradient_accumulation_steps`."""
    max_tokens_per_pack: int | None = Field(None, gt=0, le=MANY)
    """Tokens that a forward pass is filled up to; takes the place of `per_device_train_batch_size` there."""
    per_device_train_batch_size: int = Field(1, gt=0, le=MANY)
    """Pairs per forward pass and process."""
    per_device_eval_batch_size: int = Field(1, gt=0, le=MANY)
    """The same during evaluation."""
    learning_rate: float = Field(1e-6, ge=0)
    """At the schedule's peak."""
    lr_scheduler_type: Annotated[str, AfterValidator(one_of(SCHEDULERS))] = "cosine"
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
    """Whether weights are spread over the processes by FSDP2; `fsdp_config` tunes it."""

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainSection:
        if self.global_batch_pairs is None:
            return self
        if "gradient_accumulation_steps" in self.model_fields_set:
            raise ValueError("give `global_batch_pairs` or `gradient_accumulation_steps`, not both")
        if self.global_batch_pairs % self.per_device_train_batch_size:
            raise ValueError(
                f"`global_batch_pairs` ({self.global_batch_pairs}) must be a multiple of "
                f"`per_device_train_batch_size` ({self.per_device_train_batch_size})"
            )
        return self

    @model_validator(mode="after")
    def _one_name_each(self) -> TrainSection:
        for old, new in RENAMED.items():
            if {old, new} <= self.model_fields_set:
                raise ValueError(f"give `{new}` or `{old}`, two names of one thing, not both")
        return self

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `transformers.TrainingArguments`: what the recipe set, and our defaults."""
        values = {name: value for name, value in self.given().items() if name not in _OURS_ALONE}
        renamed = {old: new for old, new in RENAMED.items() if old in values and new in type(self).model_fields}
        return {renamed.get(name, name): value for name, value in values.items()}

    def given(self) -> dict[str, Any]:
        """This section without the keys that are left to transformers' own defaults."""
        ours = TrainSection.__annotations__
        names = [*ours, *(name for name in type(self).model_fields if name in self.model_fields_set - ours.keys())]
        return {name: getattr(self, name) for name in names}


class EvalSection(Section):
    """Benchmarks that the model takes while it trains."""

    benchmarks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)] = Field(
        min_length=1
    )
    """Files of own benchmarks, or names of the paper's."""
    steps: int = Field(100, gt=0, le=MANY)
    """Optimizer steps between two times; `train.eval_strategy` and `train.eval_steps` take its place."""
    limit: int | None = Field(200, gt=0, le=MANY)
    """Questions of each benchmark; null for all."""
    batch_size: int | None = Field(None, gt=0, le=MANY)
    """Questions answered together; null for what `unidpo eval` takes."""


class Recipe(Section):
    """Everything a run depends on. `load_recipe` reads one; its attributes are the sections of the file."""

    output: FilePath
    """The run folder, relative to the working directory."""
    model: ModelSection
    data: DataSection
    loss: LossSection = Field(default_factory=lambda: UniDPOSection(name="uni_dpo"))
    reference: str = Field("stored", min_length=1)
    """`stored` (the policy before its first step, as numbers on disk), `live` (a frozen copy), or a model."""
    lora: LoraSection | None = None
    """An adapter, or null to train the weights themselves."""
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection | None = None
    """Benchmarks while the model trains, or null."""

    @model_validator(mode="after")
    def _something_learns(self) -> Recipe:
        if self.lora is None and set(self.model.freeze) == set(get_args(ModelPart)):
            raise ValueError("`model.freeze` names every part and there is no `lora`: nothing would be trained")
        return self

    @model_validator(mode="after")
    def _quantized_weights_need_an_adapter(self) -> Recipe:
        if self.model.quantize is not None and self.lora is None:
            raise ValueError("`model.quantize` holds weights that cannot learn: add a `lora` section, or leave it out")
        if self.model.quantize == "int8" and self.lora is not None and self.lora.dora:
            # peft reads the lengths of the columns from bitsandbytes' 8-bit layers, which do not survive it.
            raise ValueError("`lora.dora` does not work over `model.quantize: int8`; use nf4, or plain LoRA")
        return self

    @model_validator(mode="after")
    def _features_do_not_learn(self) -> Recipe:
        frozen = {"vision", "projector"} <= set(self.model.freeze)
        if self.data.cache_image_features and self.lora is None and not frozen:
            raise ValueError(
                "`data.cache_image_features` keeps what vision tower and projector make of an image, and here they "
                "learn: set `model.freeze: [vision, projector]`, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_to_evaluate_on(self) -> Recipe:
        strategy = self.train.given().get("eval_strategy", "no")
        if strategy != "no" and not self.data.eval_fraction and self.eval is None:
            raise ValueError(
                "`train.eval_strategy` needs something to evaluate on: set `data.eval_fraction` above 0, or "
                "`eval.benchmarks`"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain JSON values; `recipe_from` reads it back."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        plain["train"] = {name: plain["train"][name] for name in self.train.given()}
        return plain

    def to_yaml(self) -> str:
        """`resolved()` as a recipe file."""
        return OmegaConf.to_yaml(OmegaConf.create(self.resolved()))
