"""A server that speaks OpenAI's protocol, and says what it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub:
    """Attributes:
    models: names it says it serves.
    answer: what it answers to the text of a message; repeats it by default.
    codes: the statuses of the next requests; 200 once there are none.
    refusal: what it says with a status that is none of success.
    requests: what it was sent, with `headers`.
    """

    def __init__(self) -> None:
        self.models = ["served"]
        self.answer: Callable[[str], str] = lambda text: text
        self.codes: list[int] = []
        self.refusal = "no"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.address = ""

    def texts(self) -> list[str]:
        """Of all requests."""
        return [text_of(request) for request in self.requests]


def text_of(request: dict[str, Any]) -> str:
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@contextmanager
def stubbed() -> Iterator[Stub]:
    """A stub that listens."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stub.headers.append({name.title(): value for name, value in self.headers.items()})
            self.reply({"data": [{"id": name} for name in stub.models]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.requests.append(request)
            stub.headers.append({name.title(): value for name, value in self.headers.items()})
            if stub.codes:
                self.reply({"error": stub.refusal}, stub.codes.pop(0))
                return
            text = text_of(request)
            choice = {
                "message": {"content": stub.answer(text)},
                "finish_reason": "length" if "long" in text else "stop",
            }
            self.reply({"choices": [choice], "usage": {"completion_tokens": 3}})

        def reply(self, value: Any, code: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("retry-after-ms", "1")  # so that no test waits
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.address = f"http://127.0.0.1:{listening.server_address[1]}"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
