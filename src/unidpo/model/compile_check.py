"""Whether a model's layers can be compiled, found out by doing it: numbers and gradients must stay what they were."""

from __future__ import annotations

import logging

import torch

from unidpo.config.schema import Compile
from unidpo.distributed import gather
from unidpo.errors import ModelError
from unidpo.model.agreement import Tolerance, difference, numbers
from unidpo.model.compiling import layers_of
from unidpo.model.packs import Pack, PaddedRows
from unidpo.model.policy import Policy
from unidpo.model.transfer import to_device

_LOG = logging.getLogger(__name__)
_TOLERANCE = {
    torch.float64: Tolerance(1e-9, gradients=1e-9),
    torch.float32: Tolerance(1e-4, gradients=1e-3),
    torch.bfloat16: Tolerance(0.1, gradients=0.05),
    torch.float16: Tolerance(0.02, gradients=0.05),
}


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
    if problem is None:
        _LOG.info("the layers are compiled")  # by the try itself
        return True
    policy.set_compiled(False)
    if compile == "layers":
        raise ModelError(f"train.compile=layers: the layers cannot be compiled here ({problem}); set train.compile=off")
    _LOG.warning("the layers are not compiled, which is slower (%s); train.compile=off does not try", problem)
    return False


def _problem(policy: Policy, batch: Pack | PaddedRows, compute_dtype: torch.dtype) -> str | None:
    """Why the compiled layers cannot take the place of the plain ones, in this process, or `None`."""
    if not layers_of(policy.plain):
        return f"transformers marks no layers of {type(policy.plain).__name__}"
    # What training goes through, checkpoints included; but two passes that drop at random cannot be compared.
    mode, was_training = not _drops(policy.model), policy.model.training
    policy.model.train(mode)
    try:
        torch.compiler.reset()  # of trainings before this one, in the same process
        weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
        plain = numbers(policy, batch, weights)
        policy.set_compiled(True)
        return difference(plain, numbers(policy, batch, weights), tolerance=_TOLERANCE[compute_dtype])
    except Exception as error:
        # Whatever a compiler does not understand about a foreign model, it can do without.
        _LOG.debug("compiling failed", exc_info=True)
        return (" ".join(str(error).split()) or type(error).__name__)[:300]
    finally:
        policy.model.train(was_training)


def _drops(model: torch.nn.Module) -> bool:
    """Whether some numbers are dropped at random in training."""
    return any(
        getattr(module, "attention_dropout", 0.0) or (isinstance(module, torch.nn.Dropout) and module.p)
        for module in model.modules()
    )
