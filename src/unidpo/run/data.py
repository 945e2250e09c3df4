"""The data of a run: checked, mixed, selected, and split into what is trained on and what is held out."""

from __future__ import annotations

import logging

from unidpo.config import Recipe
from unidpo.data.check import ScoreKnobs, check_data
from unidpo.data.formats import mix, select_pairs, split_by_prompt
from unidpo.data.pairs import PromptGroup
from unidpo.errors import DataError
from unidpo.losses import PreferenceLoss, UniDPO
from unidpo.progress import Stages

_LOG = logging.getLogger(__name__)


def training_data(
    recipe: Recipe, stages: Stages, *, scan_images: bool = True
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """The groups to train on and those held out, after the check every data set goes through.

    Args:
        scan_images: decode every image, which is most of the check's time.
    """
    data, loss = recipe.data, recipe.loss
    reports = [
        check_data(
            source.path,
            images=source.images or data.images,
            scan_images=scan_images,
            require_scores=loss.needs_scores or data.min_score_margin is not None,
            max_pixels=data.max_pixels,
            knobs=_knobs(loss),
            on_progress=lambda stage, done, total, path=source.path: stages.update(  # type: ignore[misc]
                f"checking {path}, {stage}", done, total
            ),
        )
        for source in data.sources
    ]
    for report in reports:
        if report.findings:
            report.render(stages.console)
    errors = [finding for report in reports for finding in report.errors]
    if errors and data.on_bad_row == "error":
        verdicts = "; ".join(f"{report.file}: {report.verdict}" for report in reports if report.errors)
        if loss.needs_scores and all(finding.kind == "missing-score" for finding in errors):
            verdicts += " Add scores, or train with a loss that needs none: loss={name: dpo}."
        raise DataError(verdicts, findings=errors)
    weighted = [(report.groups, source.weight) for report, source in zip(reports, data.sources, strict=True)]
    groups = select_pairs(
        mix(weighted, seed=recipe.train.seed),
        min_score_margin=data.min_score_margin,
        group_by_prompt=data.group_by_prompt,
    )
    kept, held_out = split_by_prompt(groups, data.eval_fraction, recipe.train.seed)
    if not kept:
        raise DataError(f"data.eval_fraction={data.eval_fraction} holds out all {len(groups)} groups; lower it")
    _LOG.info("training on %d pairs of %d groups", sum(len(group.pairs) for group in kept), len(kept))
    if held_out:
        _LOG.info("held out: %d pairs of %d groups", sum(len(group.pairs) for group in held_out), len(held_out))
    return kept, held_out


def _knobs(loss: PreferenceLoss) -> ScoreKnobs | None:
    if not isinstance(loss, UniDPO):
        return None
    return ScoreKnobs(loss.quality_eta, loss.tau_good if loss.nll_weight else None, whose="of the recipe")
