"""From a model's name to something that answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from unidpo.devices import accelerator
from unidpo.errors import ModelError
from unidpo.generate.hugging_face import load_model
from unidpo.generate.processes import Processes
from unidpo.generate.questions import Answerer, LoadOptions
from unidpo.generate.vllm import Engine, Server


@contextlib.contextmanager
def open_answerer(name: str, options: LoadOptions) -> Iterator[Answerer]:
    """A model ready to answer; processes and connections of its own end afterwards.

    Raises:
        UserError: the model, the server or the number of processes cannot be used.
    """
    if options.backend == "vllm":
        yield Engine(name, options) if options.server is None else Server(name, options)
        return
    if options.server is not None:
        raise ModelError("--server goes with --backend vllm")
    if options.processes == 1:
        yield load_model(name, options)
        return
    if accelerator() is not None and options.processes > torch.accelerator.device_count():
        raise ModelError(f"--nproc {options.processes}: there are {torch.accelerator.device_count()} GPUs")
    with contextlib.closing(Processes(name, options)) as answerer:
        yield answerer
