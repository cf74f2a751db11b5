"""A stand-in for a node's controller: listens where it would, and answers from a canned status.

Owns the shape of the status that the command line is built against, and the protocol of the real
one as far as a client can tell: JSON lines, one answer for each request, events that follow. What
is checked against this has to hold against the real controller, too. Must never decide anything: a
test says beforehand what an order leads to (`then`) or that it is refused (`refusals`).
"""

import contextlib
import copy
import json
import socket
import threading
from collections import deque
from pathlib import Path
from typing import Any

Facts = dict[str, Any]

# A healthy primary, as `status` has it; `engine` is the answer of its engine to `state`.
STATUS: Facts = {
    "mirror": "demo",
    "node": "alpha",
    "node_id": 1,
    "peer_name": "beta",
    "role": "PRIM",
    "readiness": "ready",
    "exit_code": 3,
    "reason": "this node serves, and the peer has every write",
    "row": "primary",
    "step": "nothing",
    "remedy": "",
    "wanted": True,
    "serving": True,
    "since_s": 7512.3,
    "explain": ["the engine is primary", "the peer's copy is up to date"],
    "engine": {
        "instance": "ab" * 16,
        "epoch": 3,
        "pid": 4711,
        "mirror": "demo",
        "node_id": 1,
        "role": "primary",
        "data_state": "uptodate",
        "generation": "cd" * 16,
        "flags": ["was_primary"],
        "frozen": False,
        "frozen_reason": "",
        "question": "",
        "failed": "",
        "refusal": "",
        "promote_refusal": "",
        "held": "",
        "dirty_bytes": 0,
        "device_bytes": 1 << 30,
        "arbiter": "none",
        "session": {"number": "00ff", "phase": "synced", "peer_primary": False},
        "resync": {},
    },
    "engine_reason": "",
    "peer": {
        "heard": True,
        "role": "SECOND",
        "readiness": "ready",
        "reason": "alpha serves; this node has every write",
        "data_state": "uptodate",
        "silent_ms": 120,
        "config_differs": False,
    },
    "links": [
        {
            "name": "1",
            "local": "10.1.0.1:7789",
            "remote": "10.1.0.2:7789",
            "up": True,
            "silent_ms": 40,
            "rtt_ms": 0.4,
            "reason": "",
        },
        {
            "name": "channel",
            "local": "10.1.0.1:7789",
            "remote": "10.1.0.2:7789",
            "up": False,
            "silent_ms": None,
            "rtt_ms": None,
            "reason": "no route to host",
        },
    ],
    "service": {
        "state": "up",
        "reason": "",
        "application": "running",
        "device": "/dev/loop0",
        "attach": "nbdfuse and a loop device",
        "mount_point": "/srv/demo",
        "mounted": True,
        "log": "/var/lib/nbdmirror/demo/log",
    },
    "addresses": [
        {"address": "10.0.0.100/24", "interface": "eth0", "held": True, "reason": ""},
    ],
    "checkers": [
        {
            "name": "web",
            "kind": "http",
            "state": "down",
            "reason": "status 500",
            "action": "restart",
            "when": "primary",
            "since_s": 12.0,
        },
    ],
    "switches": {"checkers": True, "failover": False, "boot": True},
    "actions": {"count": 1, "max": 3, "window_h": 24, "last": "restart, by web"},
    "arbiter": {"kind": "none", "verdict": "unasked", "reason": ""},
    "takeover": "automatic",
    "preferred": "none",
    "promise": ["(a) a write acknowledged now survives", "(b) so does a flush", "no (c)"],
    "order": None,
    "controller": {"pid": 4712, "uptime_s": 90_000.0, "version": "0.1.0"},
}


class FakeController:
    """One listening socket; a thread for each client.

    `requests`: (command, arguments), in order, `status` included. `status`: what is answered now.
    `then`: one change after the other, each applied with one `status` that follows an order.
    `refusals`: the error of a command, by its name. `extra`: more members of a command's answer.
    `events`: what is remembered; whoever follows waits after them for the end of this controller.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[tuple[str, Facts]] = []
        self.status: Facts = copy.deepcopy(STATUS)
        self.then: deque[Facts] = deque()
        self.refusals: dict[str, Facts] = {}
        self.extra: dict[str, Facts] = {}
        self.events: list[Facts] = []
        self._ordered = False
        self._lock = threading.Lock()
        self._clients: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start(self._accept)

    @property
    def orders(self) -> list[tuple[str, Facts]]:
        """What was asked of it, but for questions."""
        return [each for each in self.requests if each[0] not in {"status", "events"}]

    def change(self, **facts: Any) -> None:
        """Change members of the status; a dictionary is merged into the one that is there."""
        with self._lock:
            self._merge(facts)

    def _merge(self, facts: Facts) -> None:
        for key, value in facts.items():
            known = self.status.get(key)
            if isinstance(value, dict) and isinstance(known, dict):
                self.status[key] = {**known, **value}
            else:
                self.status[key] = value

    def _start(self, target: Any, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        # A client that goes away in the middle is what some tests want.
        with contextlib.suppress(OSError, ValueError), client, client.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line)
                for answer in self._answers(request):
                    whole = {"id": request["id"], **answer}
                    client.sendall(json.dumps(whole).encode() + b"\n")
                if request["command"] == "events" and request["args"].get("follow", True):
                    self._ended.wait(60)
                    return

    def _answers(self, request: Facts) -> list[Facts]:
        command, args = request["command"], request["args"]
        with self._lock:
            self.requests.append((command, args))
            if command in self.refusals:
                return [{"error": self.refusals[command]}]
            if command == "events":
                news = [each for each in self.events if each["number"] > args.get("since", 0)]
                end: list[Facts] = [] if args.get("follow", True) else [{"ok": {}}]
                return [*({"event": each} for each in news), *end]
            if command == "status":
                if self._ordered and self.then:
                    self._merge(self.then.popleft())
                return [{"ok": copy.deepcopy(self.status)}]
            self._ordered = True
            done = {"done": f"{command} is accepted"}
            return [{"ok": {**copy.deepcopy(self.status), **done, **self.extra.get(command, {})}}]

    def close(self) -> None:
        """End: the listener, every client, every thread."""
        self._ended.set()
        for each in (self._listener, *self._clients):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(5)
        self.path.unlink(missing_ok=True)
