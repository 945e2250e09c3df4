"""What a user gives as data sets → the groups to train on and those held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from unidpo.data.formats import groups_of
from unidpo.data.pairs import PromptGroup
from unidpo.errors import DataError, Finding, from_findings
from unidpo.losses import PreferenceLoss
from unidpo.model.encode import Encoder
from unidpo.model.lengths import Fitted, fit_to_length


def given_groups(
    train_dataset: Any, eval_dataset: Any, loss: PreferenceLoss, on_bad_row: Literal["error", "skip"]
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """The groups to train on, and those held out; see `PreferenceTrainer`.

    Raises:
        DataError: a row cannot be used, or lacks the scores that the loss needs; names the rows.
    """
    train, held_out = (
        groups_of(given, name=name, require_scores=loss.needs_scores, on_bad_row=on_bad_row)
        for name, given in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset or ()))
    )
    findings = [
        Finding("missing-score", f"{type(loss).__name__} needs a score for both responses", pair.file, pair.row)
        for group in [*train, *held_out]
        for pair in group.pairs
        if loss.needs_scores and group.score_margin(pair) is None
    ]
    if findings:
        raise from_findings(DataError, f"{len(findings)} pairs have no scores; add them, or use DPO or SimPO", findings)
    return train, held_out


def fit_both(
    train: Sequence[PromptGroup],
    held_out: Sequence[PromptGroup],
    encoder: Encoder,
    on_progress: Callable[[str, int, int], None],
) -> tuple[Fitted, Fitted]:
    """Those that fit the length limit, see `lengths.fit_to_length`, with progress over both."""

    def fit(groups: Sequence[PromptGroup], before: int) -> Fitted:
        total = len(train) + len(held_out)
        return fit_to_length(
            groups, encoder, on_progress=lambda done, _: on_progress("tokenizing, groups", before + done, total)
        )

    return fit(train, 0), fit(held_out, len(train))
