"""What a model can take, found out by running it: packs or padded rows, features of images in place of pixels."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from unidpo.data.pairs import PromptGroup
from unidpo.distributed import gather
from unidpo.errors import ModelError, UserError
from unidpo.model.agreement import Tolerance, difference, numbers
from unidpo.model.attention import BACKENDS, PackAttentionError, missing
from unidpo.model.encode import EncodedGroup, Encoder, GroupEncoder
from unidpo.model.features import takes_features
from unidpo.model.packs import Collate, Pack, PaddedRows, images_of, pack, pad, split_vision, with_features
from unidpo.model.policy import Policy
from unidpo.model.tower import Tower, tower_of
from unidpo.model.transfer import to_device

_LOG = logging.getLogger(__name__)
# Between the two paths, by the compute dtype. The gradients of random models of 28 layers are up to 3e-6 apart in
# float32 and 0.005 to 0.03 in bfloat16, half of what bfloat16 itself is off. A mask that is wrong by one token moves
# them by 0.17 to 0.63 where attention is not near uniform. float16 has 8 times the resolution of bfloat16.
_TOLERANCE = {
    torch.float64: Tolerance(1e-9, gradients=1e-9),
    torch.float32: Tolerance(1e-4, gradients=1e-3),
    torch.bfloat16: Tolerance(0.1, gradients=0.1),
    torch.float16: Tolerance(0.02, gradients=0.02),
}
# bitsandbytes rounds the inputs of each layer to 8 bits too; how coarsely depends on what else is in the batch. A
# model of three layers was 0.008 nats and 0.011 of the gradient apart.
_TOLERANCE_8_BIT = Tolerance(0.1, gradients=0.1)
_ENDS = 4  # weights from the first layer, and from the last, whose gradients are compared
_NO_NUMBERS = "the model's log-probabilities are no finite numbers"


def padded_rows(encoder: Encoder, tower: Tower | None = None) -> Collate:
    """One padded row per response; `tower` as for `packs.pack`."""
    return functools.partial(pad, pad_token_id=encoder.tokenizer.pad_token_id or 0, tower=tower)


@dataclass(frozen=True, slots=True)
class BatchForm:
    """How batches are made for a model.

    Attributes:
        collate: makes a batch of groups.
        attention: the language model's attention that goes with it, by the name transformers knows.
    """

    collate: Collate
    attention: str

    @property
    def has_packs(self) -> bool:
        """Whether a batch is a pack, or else padded rows."""
        return self.attention in {backend.attention for backend in BACKENDS.values()}


def choose_batch_form(
    policy: Policy,
    encoder: Encoder,
    group: EncodedGroup,
    *,
    attention: str,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> BatchForm:
    """Packs, by the first backend whose log-probabilities and gradients agree with those of padded rows; else these.

    Leaves the model with its own attention. Every process must call it; all get the same answer.

    Args:
        group: a small one, with an image where the data has any.
        attention: `"auto"` (the fastest backend that is there and agrees), a backend (this one or an error), `"padded"`
            (no packs).
        compute_dtype: what the model computes in.

    Raises:
        ModelError: a backend is demanded that is not there, packs do not work with it, or the model gives no numbers.
    """
    tower = usable_tower(policy, group, device)
    rows = BatchForm(padded_rows(encoder, tower), policy.attention)
    if attention == "padded":
        return rows
    if attention not in ("auto", *BACKENDS):
        raise ModelError(f"model.attention={attention}: there is no such backend; {_listed_choices(BACKENDS)}")
    candidates = _candidates(policy, attention, compute_dtype, device)
    tolerance = _TOLERANCE_8_BIT if getattr(policy.plain, "is_loaded_in_8bit", False) else _TOLERANCE[compute_dtype]
    problem: str | None = None
    for backend in candidates:
        collate = functools.partial(pack, table=BACKENDS[backend].table, tower=tower)
        packs = BatchForm(collate, BACKENDS[backend].attention)
        problem = _problem(policy, group, rows, packs, tolerance, device)
        if problem is None:
            _LOG.info("packs, with attention by %s", backend)
            return packs
        if problem == _NO_NUMBERS:
            raise ModelError(f"{_NO_NUMBERS}; look at its weights, or set model.dtype=bfloat16 or float32")
        _LOG.debug("packs by %s: %s", backend, problem)
    if attention != "auto":
        raise ModelError(
            f"model.attention={attention}: packs do not work with this model ({problem}); set model.attention=padded"
        )
    _LOG.warning("packs do not work with this model (%s); using the slower padded path", problem)
    return rows


def _candidates(policy: Policy, attention: str, compute_dtype: torch.dtype, device: torch.device) -> list[str]:
    """The backends to try, the fastest first: those that are there in every process."""
    dropout = getattr(policy.plain.config.get_text_config(), "attention_dropout", None) or 0.0
    reasons: dict[str, str] = {}
    mine = {name: missing(name, device=device, dtype=compute_dtype, dropout=dropout) for name in BACKENDS}
    for there in gather([mine]):
        reasons |= {name: reason for name, reason in there.items() if reason is not None}
    if attention in reasons:
        here = [name for name in BACKENDS if name not in reasons]
        raise ModelError(f"model.attention={attention}: {reasons[attention]}; {_listed_choices(here)}")
    return [name for name in BACKENDS if name not in reasons and attention in ("auto", name)]


def _listed_choices(backends: Iterable[str]) -> str:
    return f"here there are {', '.join(('auto', *backends, 'padded'))}"


def _problem(
    policy: Policy, group: EncodedGroup, rows: BatchForm, packs: BatchForm, tolerance: Tolerance, device: torch.device
) -> str | None:
    """Why packs cannot take the place of padded rows, in some process, or `None`."""
    was_training = policy.wrapped.training
    policy.wrapped.eval()
    try:
        config = policy.plain.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise PackAttentionError(f"its attention layers are {', '.join(sorted(kinds))}")
        groups = [group, _text_of(group, getattr(policy.plain.config, "image_token_id", None))]
        weights = _weights_at_the_ends(policy)
        found = []
        for form in (rows, packs):
            policy.set_attention(form.attention)
            found.append(numbers(policy, to_device(form.collate(groups), device), weights))
        problem = difference(*found, tolerance=tolerance) if found[0].logps.isfinite().all() else _NO_NUMBERS
        _wait_for(device)  # a fault that comes late is still this backend's
    except Exception as error:
        # Whatever a foreign model does not understand about packs, the padded path is the answer.
        problem = str(error) or type(error).__name__
        _LOG.debug("packs failed", exc_info=True)
        try:
            _wait_for(device)
        except Exception as broken:
            raise ModelError(
                f"the GPU runs nothing any more in this process since attention by {packs.attention} was tried "
                f"({problem}); start again with another model.attention, such as sdpa"
            ) from broken
    finally:
        policy.set_attention(rows.attention)
        policy.wrapped.train(was_training)
    return next(filter(None, gather([problem])), None)


def _text_of(group: EncodedGroup, image_token: int | None) -> EncodedGroup:
    """A second group, of another shape: half of the text of a group's prompt, with half of its first response."""
    text = group.prompt_ids[(group.mm_token_type_ids == 0) & (group.prompt_ids != image_token)]
    half, response = text[len(text) // 2 :], group.response_ids[0]
    return EncodedGroup(
        prompt_ids=half,
        position_ids=torch.arange(len(half)).expand(len(group.position_ids), -1),
        mm_token_type_ids=torch.zeros_like(half),
        response_ids=(response[: -(-len(response) // 2)],),
        cut_tokens=(0,),
        vision={},
    )


def _weights_at_the_ends(policy: Policy) -> list[Tensor]:
    """Trainable weights of the first and of the last layer; none where they are sharded: no process has one whole."""
    ends = (policy.plain.get_input_embeddings(), policy.plain.get_output_embeddings())
    tables = {id(weight) for module in ends if module is not None for weight in module.parameters()}
    weights = [w for w in policy.model.parameters() if w.requires_grad and id(w) not in tables]
    if any(hasattr(weight, mark) for weight in weights for mark in ("ds_shape", "device_mesh")):
        return []
    return [*weights[:_ENDS], *weights[_ENDS:][-_ENDS:]]


def _wait_for(device: torch.device) -> None:
    """Until a device has done all it was asked to do; raises what went wrong meanwhile."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def usable_tower(policy: Policy, group: EncodedGroup, device: torch.device) -> Tower | None:
    """The policy's vision tower, where it makes the same of a group's images with what is made for it on the host.

    Every process must call it, with the same group.
    """
    if group.features is not None or not group.vision or not takes_features(policy.plain):
        return None
    tower = None
    try:
        if (tower := tower_of(policy.plain)) is not None:
            expected = policy.image_features(to_device(group.vision, device)).pooled
            vision, on_host = split_vision([group.vision], tower)
            found = policy.image_features({**to_device(vision, device), **on_host}).pooled
            # The kernels are the same, in the same order; anything but rounding is a mistake.
            if (found - expected).abs().max() > 0.01 * expected.abs().max():
                tower = None
    except Exception:
        # Whatever a foreign tower does with its images' sizes, it may look at them itself.
        tower = None
        _LOG.debug("what a vision tower takes from the host failed", exc_info=True)
    return tower if all(gather([tower is not None])) else None


def features_problem(policy: Policy, batch: Pack | PaddedRows) -> str | None:
    """Why features cannot take the place of the images of a batch, in some process; `None` where they can.

    Every process must call it, with a batch on the model's device.
    """
    problem: str | None = None
    try:
        if not takes_features(policy.plain):
            problem = (
                f"the forward of {type(policy.plain).__name__} takes none in transformers {transformers.__version__}"
            )
        else:
            features = policy.image_features(images_of(batch))
            with policy.measuring():
                expected = policy.response_logps(batch)
                found = policy.response_logps(with_features(batch, features))
            if not torch.allclose(found, expected, rtol=1e-4):
                problem = f"log-probabilities differ by {float((found - expected).abs().max()):.2g} nats"
    except Exception as error:
        # Whatever a foreign model does with its images, without features it still works.
        problem = str(error) or type(error).__name__
        _LOG.debug("features of images failed", exc_info=True)
    return next(filter(None, gather([problem])), None)


def smallest(groups: Sequence[PromptGroup], encoder: GroupEncoder) -> EncodedGroup:
    """The group to try a model on: one with an image where there is any, then the least text.

    Groups that cannot be read any more are skipped here; their rows are named where they are met.

    Raises:
        UserError: none can be read.
    """
    problem: UserError | None = None
    for group in sorted(groups, key=_size):
        try:
            return encoder.encode(group)
        except UserError as error:
            problem = problem or error
    raise problem or ValueError("no groups")


def _size(group: PromptGroup) -> tuple[bool, int]:
    text = [message.text for message in group.messages] + [response.text for response in group.responses]
    return not group.images, sum(map(len, text))
