"""A batch → the log-probabilities of its pairs under policy and reference, and what the loss makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from unidpo.losses import LossTerms, PairLogps, PreferenceLoss
from unidpo.model.batches import Batch
from unidpo.model.packs import images_of, with_features
from unidpo.model.policy import Policy


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss, and what it compares the policy with.

    Attributes:
        loss: from `unidpo.losses`, or another `PreferenceLoss`.
        live_reference: a model beside the policy; where `None` and a batch has no stored log-probabilities, the policy
            without its adapter is the reference.
        shares_features: whether such a reference and the policy make the same of images.
    """

    loss: PreferenceLoss
    live_reference: Policy | None = None
    shares_features: bool = False

    def of_pairs(
        self, policy: Policy, batch: Batch, *, policy_is_reference: bool, reward_shift: float
    ) -> tuple[PairLogps, LossTerms]:
        """Log-probabilities and loss terms of a batch that lies on the model's device.

        Args:
            policy_is_reference: whether nothing has changed the policy yet, which is its own reference till then, see
                docs/decisions/0005-nll-gate-at-equality.md.
            reward_shift: see `metrics.RewardShift`.
        """
        needs_reference = self.loss.needs_reference and not policy_is_reference
        images = images_of(batch.responses)
        if needs_reference and self.shares_features and images:
            # Computed once, where a live reference would compute the policy's own again.
            features = (self.live_reference or policy).image_features(images)
            batch = replace(batch, responses=with_features(batch.responses, features))
        # Before the policy's own forward: wrappers do not expect another one between that and its backward.
        ref_logps = self._reference_logps(policy, batch) if needs_reference else None
        logps = policy.response_logps(batch.responses)
        if self.loss.needs_reference and policy_is_reference:
            ref_logps = logps.detach()
        pairs, tokens = batch.pairs, batch.responses.response_tokens
        if self.loss.length_normalized:
            logps = logps / tokens
            ref_logps = None if ref_logps is None else ref_logps / tokens
        seen = PairLogps(
            chosen_logps=logps[pairs.chosen],
            rejected_logps=logps[pairs.rejected],
            ref_chosen_logps=None if ref_logps is None else ref_logps[pairs.chosen],
            ref_rejected_logps=None if ref_logps is None else ref_logps[pairs.rejected],
            chosen_scores=pairs.chosen_scores,
            rejected_scores=pairs.rejected_scores,
            chosen_tokens=tokens[pairs.chosen],
            rejected_tokens=tokens[pairs.rejected],
            reward_shift=logps.new_tensor(reward_shift) if self.loss.needs_reward_shift else None,
        )
        return seen, self.loss(seen)

    def _reference_logps(self, policy: Policy, batch: Batch) -> Float[Tensor, " responses"]:
        if batch.ref_logps is not None:
            return batch.ref_logps
        reference = self.live_reference or policy
        with policy.without_adapter(), reference.measuring():
            return reference.response_logps(batch.responses)
