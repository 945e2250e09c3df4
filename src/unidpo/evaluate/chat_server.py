"""Servers that speak OpenAI's protocol: what answers a benchmark, and what judges answers."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from unidpo.evaluate.benchmarks import EvaluationError, EvaluationFailed

PAUSES = (1.0, 4.0, 10.0)
"""Seconds to wait before a request is sent again; after the last one it has failed."""
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
_MOST_SAID = 2000
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server answered.

    Attributes:
        text: of the answer.
        tokens: generated, where the server counts them, else 0.
        cut: whether it was cut at the longest answer allowed.
    """

    text: str
    tokens: int
    cut: bool


class ChatServer:
    """A server at an address.

    Args:
        address: such as http://localhost:8000; one without a path gets `/v1`.
        option: the option that named it, for messages.
        key: shown to the server and to nobody else; no message holds it.
        seconds: how long one request may take.

    Raises:
        EvaluationError: the address is none, or holds a password or a query.
    """

    def __init__(self, address: str, *, option: str, key: str | None = None, seconds: float = 600.0) -> None:
        if any(mark in address for mark in "@?#"):  # what stands there may be secret, and is not repeated
            raise EvaluationError(f"{option}: an address without user, password and query is expected")
        try:
            parts = urlsplit(address)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise EvaluationError(f"{option} is an address such as http://localhost:8000, not {address!r}")
        self.address = address.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self._key = key
        self._seconds = seconds

    def models(self) -> list[str]:
        """Names of the models it has. Raises `EvaluationError`; asks once."""
        try:
            return [str(model["id"]) for model in self._exchange("/models", None)["data"]]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{self.address}: no server answers there ({self._reason(error)})") from error

    def complete(self, request: dict[str, Any]) -> Completion:
        """Have a conversation answered, in several tries where the server is busy or cannot be reached.

        Raises:
            EvaluationFailed: it refuses, cannot be reached, or answers something else.
        """
        for pause in (*PAUSES, None):
            try:
                reply = self._exchange("/chat/completions", request)
                choice = reply["choices"][0]
                text, cut = choice["message"]["content"] or "", choice["finish_reason"] == "length"
                tokens = int((reply.get("usage") or {}).get("completion_tokens", 0))
                return Completion(str(text), tokens, cut)
            except urllib.error.HTTPError as error:
                if error.code not in _TRY_AGAIN or pause is None:
                    raise EvaluationFailed(f"{self.address}: the server refuses ({self._reason(error)})") from None
                error.close()
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                problem = f"the server's answer is not what was expected ({error})"
                raise EvaluationFailed(f"{self.address}: {problem}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                if pause is None or isinstance(error, TimeoutError):
                    raise EvaluationFailed(f"{self.address}: {self._reason(error)}") from None
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _exchange(self, path: str, request: dict[str, Any] | None) -> Any:
        data = None if request is None else json.dumps(request).encode()
        asked = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        if self._key is not None:
            asked.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with urllib.request.urlopen(asked, timeout=self._seconds) as response:
            return json.load(response)

    def _reason(self, error: Exception) -> str:
        said = str(error) or type(error).__name__
        if isinstance(error, urllib.error.HTTPError):
            with error:
                said = f"{error.code}: {error.read(_MOST_SAID).decode('utf-8', 'replace')}"
        return said if self._key is None else said.replace(self._key, "***")


def as_they_come(work: Callable[[T], R], items: Sequence[T], at_once: int) -> Iterator[tuple[T, R]]:
    """Items with what became of them, in the order they are done. The first error ends it; nothing else is begun."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
