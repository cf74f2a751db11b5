"""What a load balancer on the router sees: both nodes asked for /ready, again and again.

Run as a process: `prober.py TIMELINE ADDRESS ADDRESS`. A line (monotonic time in ns, status of the
first, status of the second; 0: no answer) for each change. Ends with 0 after SIGTERM.
"""

# ruff: noqa: INP001 - a directory that is run

import http.client
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

PORT: Final = 9010
PATH: Final = "/ready"
TIMEOUT_S: Final = 0.5
PERIOD_S: Final = 0.1


def ask(host: str) -> int:
    """The status, 0 without an answer in time."""
    connection = http.client.HTTPConnection(host, PORT, timeout=TIMEOUT_S)
    try:
        connection.request("GET", PATH)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def main(timeline: Path, hosts: list[str]) -> int:
    """Until told to stop."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    before: list[int] = []
    with timeline.open("a", buffering=1) as file:
        while not stopping.wait(PERIOD_S):
            now = [ask(host) for host in hosts]
            if now != before:
                file.write(f"{time.monotonic_ns()} {now[0]} {now[1]}\n")
                before = now
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
