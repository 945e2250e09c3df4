"""Servers that speak OpenAI's protocol: what answers questions, and what judges answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import HttpUrl, ValidationError

from unidpo.errors import ModelError
from unidpo.generate.questions import Answer, GenerationFailed

if TYPE_CHECKING:
    import openai

_RETRIES = 3
_MOST_SAID = 2000
T = TypeVar("T")
R = TypeVar("R")


class ChatServer:
    """A server at an address.

    Args:
        address: such as http://localhost:8000; one without a path gets `/v1`.
        option: the option that named it, for messages.
        key: shown to the server and to nobody else; no message holds it.
        seconds: how long one request may take.

    Raises:
        ModelError: the address is none, or holds a password or a query.
    """

    def __init__(self, address: str, *, option: str, key: str | None = None, seconds: float = 600.0) -> None:
        if any(mark in address for mark in "@?#"):  # what stands there may be secret, and is not repeated
            raise ModelError(f"{option}: an address without user, password and query is expected")
        try:
            path = HttpUrl(address).path or ""
        except ValidationError:
            raise ModelError(f"{option} is an address such as http://localhost:8000, not {address!r}") from None
        self.address = address.rstrip("/") + ("" if path.strip("/") else "/v1")
        self._key = key
        self._seconds = seconds
        self._client = self._make_client(_RETRIES)

    def models(self) -> list[str]:
        """Names of the models it has. Raises `ModelError`; asks once."""
        try:
            return [model.id for model in self._make_client(retries=0).models.list().data]
        except Exception as error:  # whatever may listen there
            raise ModelError(f"{self.address}: no server answers there ({self._said(error)})") from error

    def complete(self, messages: Sequence[Any], **request: Any) -> Answer:
        """Have a conversation answered, in several tries where the server is busy or cannot be reached.

        Raises:
            GenerationFailed: it refuses, cannot be reached, or answers something else.
        """
        import openai

        try:
            reply = self._client.chat.completions.create(messages=list(messages), **request)
            choice, usage = reply.choices[0], reply.usage
            tokens = 0 if usage is None else usage.completion_tokens
            return Answer(choice.message.content or "", tokens, truncated=choice.finish_reason == "length")
        except openai.APIStatusError as error:
            said = self._redacted(f"{error.status_code}: {error.response.text[:_MOST_SAID]}")
            raise GenerationFailed(f"{self.address}: the server refuses ({said})") from None
        except openai.APIConnectionError as error:
            raise GenerationFailed(f"{self.address}: {self._said(error)}") from None
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"the server's answer is not what was expected ({self._said(error)})"
            raise GenerationFailed(f"{self.address}: {problem}") from None

    def _make_client(self, retries: int) -> openai.OpenAI:
        """A client that reads nothing from `OPENAI_*`: what stands there is for another server."""
        import openai

        client = openai.OpenAI(
            base_url=self.address, api_key=self._key or "EMPTY", timeout=self._seconds, max_retries=retries
        )
        client.organization = client.project = None
        client._custom_headers = {}
        return client

    def _said(self, error: Exception) -> str:
        return self._redacted(f"{error}" if error.__cause__ is None else f"{error} {error.__cause__}")

    def _redacted(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")


def as_they_come(pool: Executor, work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
    """Items with what became of them, in the order they are done. The first error ends it; nothing else is begun."""
    futures = {pool.submit(work, item): item for item in items}
    try:
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        for future in futures:
            future.cancel()
