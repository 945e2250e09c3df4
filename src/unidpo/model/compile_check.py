"""Whether a model's layers can be compiled, found out by doing it: numbers and gradients must stay what they were."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from unidpo.config.schema import Compile
from unidpo.distributed import gather
from unidpo.errors import ModelError
from unidpo.model.compiling import layers_of
from unidpo.model.packs import Pack, PaddedRows
from unidpo.model.policy import Policy
from unidpo.model.transfer import to_device

_LOG = logging.getLogger(__name__)
# Largest difference that rounding explains, by the compute dtype: of a log-probability, in nats per token; and of the
# gradient's direction and length, as a part of its norm.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


def choose_compiled(
    policy: Policy,
    batch: Pack | PaddedRows,
    *,
    compile: Compile,  # noqa: A002
    compute_dtype: torch.dtype,
    device: torch.device,
    obstacle: str | None = None,
) -> bool:
    """Compile the layers of a model where that is wanted and its numbers stay; returns whether they are compiled.

    Every process must call it; all get the same answer. No gradient is left behind.

    Args:
        batch: a small one, for the attention that the model has.
        compile: `"auto"` (on a CUDA GPU, and where it works), `"layers"` (or an error), `"off"`.
        compute_dtype: what the model computes in.
        obstacle: why it cannot be, where that is known.

    Raises:
        ModelError: it is demanded, and does not work.
    """
    if compile == "off" or (compile == "auto" and device.type != "cuda"):
        return False
    problem = obstacle or _problem(policy, to_device(batch, device), compute_dtype)
    problem = next(filter(None, gather([problem])), None)
    policy.set_compiled(problem is None)
    if problem is None:
        _LOG.info("the layers are compiled")
    elif compile == "layers":
        raise ModelError(f"train.compile=layers: the layers cannot be compiled here ({problem}); set train.compile=off")
    else:
        _LOG.warning("the layers are not compiled, which is slower (%s); train.compile=off does not try", problem)
    return problem is None


def _problem(policy: Policy, batch: Pack | PaddedRows, compute_dtype: torch.dtype) -> str | None:
    """Why the compiled layers cannot take the place of the plain ones, in this process, or `None`."""
    if not layers_of(policy.plain):
        return f"transformers marks no layers of {type(policy.plain).__name__}"
    # What training goes through, checkpoints included; but two passes that drop at random cannot be compared.
    mode, was_training = not _drops(policy.model), policy.model.training
    policy.model.train(mode)
    try:
        torch.compiler.reset()  # of trainings before this one, in the same process
        plain = _numbers(policy, batch)
        policy.set_compiled(True)
        return _difference(plain, _numbers(policy, batch), compute_dtype)
    except Exception as error:
        # Whatever a compiler does not understand about a foreign model, it can do without.
        _LOG.debug("compiling failed", exc_info=True)
        return (" ".join(str(error).split()) or type(error).__name__)[:300]
    finally:
        policy.model.train(was_training)


@dataclass(frozen=True, slots=True)
class _Numbers:
    logps: Float[Tensor, " responses"]  # nats per token
    gradients: list[Tensor]


def _numbers(policy: Policy, batch: Pack | PaddedRows) -> _Numbers:
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    # Outside of the wrapper, and no weight's `.grad` is touched: DDP and DeepSpeed reduce gradients that are.
    logps = replace(policy, wrapped=policy.model).response_logps(batch) / batch.response_tokens
    gradients = torch.autograd.grad(logps.sum(), weights, allow_unused=True)
    return _Numbers(logps.detach(), [gradient for gradient in gradients if gradient is not None])


def _difference(plain: _Numbers, compiled: _Numbers, dtype: torch.dtype) -> str | None:
    of_logps = float((plain.logps - compiled.logps).abs().max())
    if not of_logps <= _TOLERANCE[dtype]:
        return f"log-probabilities differ by {of_logps:.2g} nats per token"
    if len(plain.gradients) != len(compiled.gradients):
        return f"{len(plain.gradients)} weights have a gradient, compiled {len(compiled.gradients)}"
    apart = _norm([a - b for a, b in zip(plain.gradients, compiled.gradients, strict=True)])
    of_gradients = apart / max(_norm(plain.gradients), torch.finfo(dtype).tiny)
    if not of_gradients <= _GRADIENT_TOLERANCE[dtype]:
        return f"gradients differ by {of_gradients:.2g} of their norm"
    return None


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.float()) for t in tensors])))


def _drops(model: torch.nn.Module) -> bool:
    """Whether some numbers are dropped at random in training."""
    return any(
        getattr(module, "attention_dropout", 0.0) or (isinstance(module, torch.nn.Dropout) and module.p)
        for module in model.modules()
    )
