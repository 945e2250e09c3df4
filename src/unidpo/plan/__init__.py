"""What a recipe will cost, computed from its data and the model's configuration before anything is rented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rich.console import Console
from transformers import PreTrainedModel

from unidpo.config import Recipe
from unidpo.errors import ModelError
from unidpo.model.encode import Encoder, plain_positions
from unidpo.model.features import images_are_frozen, takes_features
from unidpo.model.lengths import Fitted, fit_to_length
from unidpo.model.load import empty_model, load_processor
from unidpo.plan.data import (
    LoadCounter,
    distinct_prompts,
    micro_batches,
    padded_pairs,
    patch_counter_of,
    prompt_packs,
    reference_batches,
)
from unidpo.plan.gpus import GPUS, gpu_by_name
from unidpo.plan.memory import Setting, features_bytes, peak_memory, sharding_of, tokens_that_fit
from unidpo.plan.report import CARD_SIZES, Data, Features, Plan, Speed, Time, Way
from unidpo.plan.shape import ModelShape, adapter_weights, shape_of
from unidpo.plan.work import Load, PatchCounter, Work, forward, in_chunks, training
from unidpo.progress import Stages
from unidpo.run.data import training_data

__all__ = ["GPUS", "Plan", "Speed", "gpu_by_name", "plan_recipe"]


def plan_recipe(recipe: Recipe, *, speeds: tuple[Speed, ...] = (), gpus: int = 1, console: Console) -> Plan:
    """Tokens, floating-point work, memory per GPU and time of a recipe. No weights are loaded, no image is decoded.

    Args:
        speeds: what the time is reckoned with.
        gpus: how many share the work.
        console: where progress and warnings go.

    Raises:
        UserError: something in the recipe, the data or the model's configuration cannot be used.
    """
    trust = recipe.model.trust_remote_code
    model = empty_model(recipe.model.name, trust_remote_code=trust)
    shape = shape_of(model)
    setting = setting_of(recipe, model, shape, gpus=gpus)
    frozen = images_are_frozen(model) if setting.adapter else not setting.trainable_parts & {"vision", "projector"}
    takes = frozen and takes_features(model)
    encoder = Encoder(
        load_processor(recipe.model.name, trust_remote_code=trust),
        plain_positions,
        template=recipe.data.template,
        max_length=recipe.data.max_length,
        max_pixels=recipe.data.max_pixels,
    )
    with Stages(console) as stages:
        groups, _ = training_data(recipe, stages, scan_images=False)
        fitted = fit_to_length(
            groups,
            encoder,
            skip_unreadable=recipe.data.on_bad_row == "skip",
            warn=False,
            on_progress=partial(stages.update, "counting tokens, groups"),
        )
    with_images = any(tokens.images for tokens in fitted.tokens)
    patches = patch_counter_of(encoder, patch_size=shape.patch_size) if with_images else PatchCounter()
    stores = recipe.data.cache_image_features and with_images
    if stores and not takes:
        raise ModelError(
            f"{recipe.model.name}: data.cache_image_features needs a forward that takes features of images, and a "
            "vision tower and projector that are not trained, nor an adapter in them; set it to false"
        )
    features = None
    if stores:
        images = sum((patches.load(tokens.images) for tokens in distinct_prompts(fitted)), Load())
        disk = features_bytes(shape, images.image_tokens, narrow=setting.narrow)
        features = Features(forward(shape, images), disk)
    counter = LoadCounter(shape.packs and recipe.model.attention != "padded", replace(patches, stored=stores))
    steps = list(micro_batches(recipe, fitted, counter, gpus=gpus))
    loads = [load for step in steps for load in step]
    epoch = sum((in_chunks(load, shape) for load in loads), Load())
    longest = max(loads, key=lambda load: load.tokens)
    micro_batches_per_step = -(-max(map(len, steps)) // gpus)
    max_steps = recipe.train.given().get("max_steps") or 0
    epochs = max_steps / len(steps) if max_steps > 0 else recipe.train.num_train_epochs
    work_of = partial(
        training,
        shape,
        trainable_parts=setting.trainable_parts,
        checkpointing=setting.checkpointing,
        adapter=setting.adapter,
    )
    once = work_of(epoch)
    beside = epoch.with_features() if takes else epoch  # a live reference takes the policy's features
    reference = _reference(recipe, shape, fitted, counter, beside, epochs) if recipe.loss.needs_reference else None
    first = features.work.total if features else 0.0
    apart = (reference.total if reference else 0.0) + first

    def both(load: Load) -> float:
        """Work of training on a load, and of the reference."""
        return work_of(load).total + (forward(shape, load).total if reference else 0.0)

    longest_load = (shape, setting, longest)
    plan = Plan(
        model=recipe.model.name,
        gpus=gpus,
        setting=setting,
        weights=sum(shape.weights.values()),
        trainable_weights=setting.adapter or sum(shape.weights[part] for part in setting.trainable_parts),
        data=_data(fitted, epoch, counter),
        epochs=epochs,
        steps=round(epochs * len(steps)),
        micro_batches_per_step=micro_batches_per_step,
        longest_micro_batch=longest.tokens,
        epoch_work=once,
        reference_work=reference,
        features=features,
        total_work=epochs * once.total + apart,
        ways=_ways(shape, fitted, counter, both, first=first),
        memory=peak_memory(*longest_load, micro_batches_per_step=micro_batches_per_step),
        tokens_that_fit={
            size: tokens_that_fit(*longest_load, size * 1e9, micro_batches_per_step=micro_batches_per_step)
            for size in CARD_SIZES
        },
        times=(),
        reference=recipe.reference if recipe.loss.needs_reference else None,
    )
    return replace(plan, times=tuple(_time(plan, speed) for speed in speeds))


def setting_of(recipe: Recipe, model: PreTrainedModel, shape: ModelShape, *, gpus: int = 1) -> Setting:
    """What a recipe says about memory and work. `model`, on the `meta` device, has the recipe's adapter afterwards.

    Raises:
        UserError: the adapter does not fit the model, or DeepSpeed's file cannot be read.
    """
    given = recipe.train.given()
    checkpointing = given.get("gradient_checkpointing") or given.get("activation_checkpointing")
    trainable = {part for part, weights in shape.weights.items() if weights and part not in recipe.model.freeze}
    return Setting(
        trainable_parts=frozenset(trainable if recipe.lora is None else ()),
        adapter=0 if recipe.lora is None else adapter_weights(recipe.lora, model),
        narrow=recipe.model.dtype != "float32",
        quantize=recipe.model.quantize,
        checkpointing=bool(checkpointing),
        optimizer=str(given.get("optim") or "adamw_torch_fused"),
        sharding=sharding_of(recipe, gpus),
        gpus=gpus,
        live_reference=recipe.reference == "live",
    )


def _reference(
    recipe: Recipe, shape: ModelShape, fitted: Fitted, counter: LoadCounter, epoch: Load, epochs: float
) -> Work:
    """Work of the reference: one pass over the distinct responses, or, live, a forward pass in each step."""
    if recipe.reference == "live":
        return forward(shape, epoch).times(epochs)
    if recipe.reference != "stored":
        shape = shape_of(empty_model(recipe.reference, trust_remote_code=recipe.model.trust_remote_code))
        # Whether its tower is the policy's only the weights would tell.
        counter = replace(counter, patches=replace(counter.patches, stored=False))
    return forward(shape, sum(reference_batches(fitted, counter), Load()))


def _ways(
    shape: ModelShape, fitted: Fitted, counter: LoadCounter, work: Callable[[Load], float], *, first: float
) -> tuple[Way, ...]:
    """One epoch of this data laid out in other ways. Packs need the work `first` before it."""
    seeing = replace(counter.patches, stored=False)
    every, selective = (padded_pairs(fitted, seeing, every_logit=every) for every in (True, False))
    ways = (Way("padded pairs, every logit", work(every)), Way("padded pairs, logits of responses", work(selective)))
    if not counter.packs:
        return ways
    together = sum((in_chunks(load, shape) for load in prompt_packs(fitted, counter)), Load())
    return *ways, Way("a pack per prompt", first + work(together))


def _data(fitted: Fitted, epoch: Load, counter: LoadCounter) -> Data:
    prompts = distinct_prompts(fitted)
    return Data(
        groups=len(fitted.groups),
        pairs=fitted.pairs,
        prompts=len(prompts),
        images=sum(len(tokens.images) for tokens in prompts),
        tokens=epoch.tokens,
        image_tokens=epoch.image_tokens,
        response_tokens=epoch.targets,
        too_long=len(fitted.too_long),
        cut=len(fitted.cut),
        unreadable=len(fitted.unreadable),
        packs=counter.packs,
    )


def _time(plan: Plan, speed: Speed) -> Time:
    once = plan.epoch_work.total
    seconds = speed.seconds(once, pairs=plan.data.pairs, gpus=plan.gpus) * plan.epochs
    # At the rate at which the training's own work is done.
    per_operation = seconds / (plan.epochs * once)
    # Measured pairs per second hold the work of a live reference already.
    measured = speed.pairs_per_second is not None and plan.reference == "live"
    return Time(
        speed,
        training=seconds,
        reference=0.0 if plan.reference_work is None or measured else per_operation * plan.reference_work.total,
        features=0.0 if plan.features is None else per_operation * plan.features.work.total,
    )
