"""What a loss is: its name in a recipe, its hyper-parameters with their ranges, what it needs, and its formula.

Nothing here needs torch, so that recipes are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from unidpo.losses.terms import LossTerms, PairLogps

Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]


class PreferenceLoss(BaseModel):
    """A loss over pairs: a class of hyper-parameters with the method `compute`.

    A subclass in this package is a loss of recipes: its `name`, a `Literal`, is what a recipe calls it, its other
    fields are the keys of a recipe's `loss` section. Imports of torch belong into `compute`.

    Attributes:
        length_normalized: whether log-probabilities are averaged over the response's tokens, in nats per token.
        needs_reference, needs_scores, needs_reward_shift: which optional fields of `PairLogps` must be there.

    Raises:
        ValueError: hyper-parameters are unknown, of the wrong type or out of range; all of them are named.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    if TYPE_CHECKING:
        name: str

        @property
        def length_normalized(self) -> bool: ...

    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair, in float32, or in float64 where the inputs are.

        Raises:
            ValueError: something that the loss needs is missing.
        """
        return self.compute(pairs.in_full_precision())

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The formula; its pieces are in `terms`."""
        raise NotImplementedError
