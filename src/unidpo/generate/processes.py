"""One model on several GPUs: a process each."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from typing import Any

from unidpo.generate.hugging_face import BATCH_ON_GPU, HuggingFace, load_model, longest_first
from unidpo.generate.questions import Answer, Generation, GenerationFailed, LoadOptions, Question
from unidpo.generate.server import as_they_come

BATCHES_IN_A_SHARE = 4
"""What a process answers before it is given more."""


class Processes:
    """The same model in several processes, each on a GPU of its own.

    Args:
        name: folder or hub id of the model.
        options: how it is loaded, and in how many processes; no more than there are GPUs, where there are any.

    Raises:
        ModelError: the model cannot be used.
        GenerationFailed: a process ended.
    """

    def __init__(self, name: str, options: LoadOptions) -> None:
        context = multiprocessing.get_context("spawn")
        gpus: SimpleQueue[int] = context.SimpleQueue()
        for gpu in range(options.processes):
            gpus.put(gpu)
        self._options = options
        self._interrupted = False
        self._pool = ProcessPoolExecutor(options.processes, context, _start, (name, options, gpus))
        try:
            loading = [self._pool.submit(_identity) for _ in range(options.processes)]
            self._identity, *_ = [future.result() for future in loading]
        except BaseException:
            self.close()
            raise

    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        """Answers by index, a share at a time, as they come from any of the processes."""
        most = BATCHES_IN_A_SHARE * (self._options.batch_size or BATCH_ON_GPU)
        size = max(1, min(most, len(questions) // self._options.processes))
        ordered = longest_first(questions, generation)
        shares = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        self._interrupted = True
        try:
            for _, answers in as_they_come(self._pool, functools.partial(_answer, generation=generation), shares):
                yield answers
        except BrokenProcessPool as error:
            raise GenerationFailed(f"{error}; run the command again to resume") from error
        self._interrupted = False

    def close(self) -> None:
        """End the processes; after an interruption nobody waits for what they are at."""
        for process in list(self._pool._processes.values()) if self._interrupted else ():
            process.terminate()
        self._pool.shutdown(cancel_futures=True)


_model: Callable[[], HuggingFace]
"""In a process of its own: loads the model at the first call."""


def _start(name: str, options: LoadOptions, gpus: SimpleQueue[int]) -> None:
    """Loads nothing: an error here would end the process without saying why."""
    global _model
    _model = functools.cache(lambda: load_model(name, options, gpu=gpus.get()))


def _identity() -> dict[str, Any]:
    return _model().identity()


def _answer(questions: Sequence[Question], generation: Generation) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for batch in _model().answer(questions, generation):
        answers |= batch
    return answers
