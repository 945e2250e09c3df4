"""From the `train` section to `transformers.TrainingArguments`, or to one line about what it refuses."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments, get_scheduler

from unidpo.config import Recipe, TrainSection
from unidpo.devices import accelerator
from unidpo.errors import RecipeError, UserError
from unidpo.training.arguments import default_workers, spelled_for_transformers


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The arguments of transformers' loop. Raises `RecipeError` where it refuses keys that contradict each other."""
    values = spelled_for_transformers(recipe.train.training_arguments())
    if recipe.eval is not None:
        values = {"eval_strategy": "steps", "eval_steps": recipe.eval.steps} | values
    elif recipe.data.eval_fraction:
        values = {"eval_strategy": "epoch"} | values
    if values.setdefault("use_cpu", accelerator() is None):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, else looks for others
    else:
        values.setdefault("dataloader_num_workers", default_workers())
    if {"vision", "projector"} <= set(recipe.model.freeze):
        # Batches without an image get one, so that every trainable weight takes part in every micro-batch.
        values.setdefault("ddp_find_unused_parameters", False)
    # Keys with a default of ours were checked already, and cannot be the cause.
    with _refusals_of_transformers(recipe.train.model_fields_set - TrainSection.__annotations__.keys()):
        args = TrainingArguments(
            output_dir=str(recipe.output),
            bf16=recipe.model.dtype == "bfloat16",
            fp16=recipe.model.dtype == "float16",
            disable_tqdm=True,
            # A loss that is not a number must be seen, not averaged away.
            logging_nan_inf_filter=False,
            **{"report_to": "none"} | values,
        )
        if args.torch_compile:
            DynamoBackend(args.torch_compile_backend.upper())  # as the trainer will, once the data is read
    _try_optimizer_and_schedule(args)
    if args.fsdp and args.world_size == 1:
        raise RecipeError("train.fsdp: shards a model over several processes; add `--nproc N`, or leave it out")
    if args.deepspeed is not None and args.world_size > 1:
        import deepspeed

        # On a CPU transformers leaves this out, and ZeRO-3 asks while the model is loaded.
        deepspeed.init_distributed(dist_backend="gloo" if args.use_cpu else None, auto_mpi_discovery=False)
    return args


@contextlib.contextmanager
def _refusals_of_transformers(names: Iterable[str]) -> Iterator[None]:
    """Whatever a library raises of these keys of `train` is the recipe's error, and names those that it speaks of."""
    try:
        with packages_the_recipe_needs():
            yield
    except UserError:
        raise
    except Exception as error:  # transformers checks little, and the rest fails wherever a value is first used
        reason = " ".join(str(error).split()) or type(error).__name__
        named = [name for name in names if re.search(rf"\b{name}\b", reason)] or sorted(names)
        keys = ", ".join(f"train.{name}" for name in named)
        raise RecipeError(f"transformers refuses {keys}: {reason} ({type(error).__name__})") from error


def _try_optimizer_and_schedule(args: TrainingArguments) -> None:
    """Make both for a small layer, so that what they refuse is known before data and model are read."""
    layer = torch.nn.Linear(2, 2)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(layer.parameters())
    if not re.search("galore|apollo|lomo", args.optim):  # these look for layers of the model
        with _refusals_of_transformers(["optim", "optim_args"]):
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args, layer)
            optimizer = kind(layer.parameters(), **options)
    with _refusals_of_transformers(["lr_scheduler_type", "lr_scheduler_kwargs"]):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )


@contextlib.contextmanager
def packages_the_recipe_needs() -> Iterator[None]:
    """An optional package that `train` or `lora` asks for and that is not there is the recipe's error."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        # transformers' optimizers and reporters raise these, as others do for quite other things.
        reason = " ".join(str(error).split())
        if isinstance(error, ImportError) or re.search("to be installed|[Pp]lease install|failed to import", reason):
            raise RecipeError(f"this recipe asks for a package that is not installed: {reason}") from error
        if re.search("CPU-only version of bitsandbytes|optim_target_modules|swanlab.init", reason):
            raise RecipeError(f"this recipe asks for what cannot be used here: {reason}") from error
        raise
