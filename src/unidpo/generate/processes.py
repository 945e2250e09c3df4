"""One model on several GPUs: a process each, every one answering its share."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from unidpo.errors import UserError
from unidpo.generate.hugging_face import load_model
from unidpo.generate.questions import Answer, Generation, GenerationFailed, LoadOptions, Question


class Processes:
    """The same model in several processes, the n-th of them on the n-th GPU.

    Args:
        name: folder or hub id of the model.
        options: how it is loaded, and in how many processes; no more than there are GPUs, where there are any.

    Raises:
        ModelError: the model cannot be used.
        GenerationFailed: a process ended.
    """

    def __init__(self, name: str, options: LoadOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(options.processes):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, name, options, rank), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(here)
            self._processes.append(process)
        try:
            self._identity, *_ = [self._receive(rank) for rank in range(options.processes)]
        except BaseException:
            self.close()
            raise

    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        """Answers by index, as they come from any of the processes. A failure of one is raised once all are done."""
        busy = dict(enumerate(self._pipes))
        for rank, pipe in busy.items():
            with contextlib.suppress(OSError):  # one that has ended says so when it is read from
                pipe.send((questions[rank :: len(self._pipes)], generation))
        failures: list[Exception] = []
        while busy:
            ready = wait(list(busy.values()))
            for rank in [rank for rank, pipe in busy.items() if pipe in ready]:
                try:
                    batch = self._receive(rank)
                except UserError as error:
                    failures.append(error)
                    batch = None
                if batch is None:
                    del busy[rank]
                else:
                    yield batch
        if failures:
            raise failures[0]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)  # an idle one ends by itself once its pipe is closed
            process.terminate()
            process.join()

    def _receive(self, rank: int) -> Any:
        try:
            received = self._pipes[rank].recv()
        except (EOFError, OSError) as error:
            self._processes[rank].join(timeout=5)
            code = self._processes[rank].exitcode
            raise GenerationFailed(f"process {rank} ended with code {code}; run the command again to go on") from error
        if isinstance(received, Exception):
            raise received
        return received


def _serve(pipe: Connection, name: str, options: LoadOptions, rank: int) -> None:
    """In a process of its own: answer what comes through the pipe, until it is closed."""
    try:
        backend = load_model(name, options, gpu=rank)
        pipe.send(backend.identity())
    except UserError as error:
        pipe.send(error)
        return
    while True:
        try:
            questions, generation = pipe.recv()
        except EOFError:
            return
        try:
            for batch in backend.answer(questions, generation):
                pipe.send(batch)
        except Exception as error:  # the process stays for the next questions
            pipe.send(GenerationFailed(f"process {rank}: {type(error).__name__}: {error}"))
        else:
            pipe.send(None)
