"""An HTTP proxy in front of a store, that changes requests, or loses and replaces answers.

Owns its listening socket and the threads of its connections. It keeps a client's connection open
between requests, as real servers do: a client library that sends a request again on a connection it
had kept is seen here as a second request. Must never: change what it was not told to.
"""

import http.client
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import urlsplit

BOUND_S = 30
_CONDITIONS = {"if-match", "if-none-match"}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Request:
    """One request on its way."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def is_write(self) -> bool:
        """Whether it can change what the store holds."""
        return self.method == "PUT" or self.path.endswith("/kv/txn")


@dataclass
class Answer:
    """One answer on its way back."""

    status: int
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)


# What becomes of a request: an answer, or None, which closes the connection without one.
Plan = Callable[[Request, Callable[[Request], Answer]], Answer | None]


def passing(request: Request, send: Callable[[Request], Answer]) -> Answer | None:
    """Nothing is changed."""
    return send(request)


def slowly(delay_s: float) -> Plan:
    """Each answer comes so late."""

    never = threading.Event()

    def plan(request: Request, send: Callable[[Request], Answer]) -> Answer | None:
        never.wait(delay_s)
        return send(request)

    return plan


def losing_writes(request: Request, send: Callable[[Request], Answer]) -> Answer | None:
    """What is written is written, and nobody is told."""
    answer = send(request)
    return None if request.is_write else answer


def answering_writes(answer: Answer) -> Plan:
    """Writes get this answer, and the store does not see them."""

    def plan(request: Request, send: Callable[[Request], Answer]) -> Answer | None:
        return answer if request.is_write else send(request)

    return plan


def answering_all(answer: Answer) -> Plan:
    """The store is never asked."""
    return lambda _request, _send: answer


def losing_all(_request: Request, _send: Callable[[Request], Answer]) -> Answer | None:
    """Connections are taken and closed."""
    return None


def without_conditions(request: Request, send: Callable[[Request], Answer]) -> Answer | None:
    """The store behind knows no conditions."""
    request.headers = [each for each in request.headers if each[0].lower() not in _CONDITIONS]
    if request.path.endswith("/kv/txn"):
        question = json.loads(request.body)
        question["compare"] = []
        request.body = json.dumps(question).encode()
    return send(request)


class HttpProxy:
    """Listens on `url`, asks `target`, does as `plan` says; `writes` are the writes it saw."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.plan: Plan = passing
        self.requests: list[Request] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout: ClassVar[float | None] = BOUND_S

            def answer(self) -> None:
                proxy._serve(self)

            do_GET = do_PUT = do_POST = do_HEAD = answer  # noqa: N815 - the names of http.server

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def writes(self) -> list[Request]:
        """The requests that could change what the store holds."""
        return [request for request in self.requests if request.is_write]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        request = Request(
            handler.command, handler.path, handler.headers.items(), handler.rfile.read(length)
        )
        self.requests.append(request)
        answer = self.plan(request, self._sent)
        if answer is None:
            handler.close_connection = True
            return
        handler.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in _HOP_BY_HOP:
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        handler.wfile.write(answer.body)

    def _sent(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(
            str(self.target.hostname), self.target.port, timeout=BOUND_S
        )
        try:
            connection.putrequest(
                request.method, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers:
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            if request.body or request.method != "GET":
                connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read(), answer.getheaders())
        finally:
            connection.close()

    def close(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._thread.join(BOUND_S)
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
