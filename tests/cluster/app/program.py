"""The application of the tests: a daemon that idles, writes numbered records, or answers HTTP.

    program.py DIRECTORY idle
    program.py DIRECTORY write FOLDER     records in FOLDER, each durable before DIRECTORY/ledger
    program.py DIRECTORY answer IP PORT   with the status in DIRECTORY/answer, 200 without it

Returns when the daemon is up, with its process id in DIRECTORY/NODE.pid. Must never write a number
into the ledger before the record is durable: the ledger is what a test believes.
"""

import http.server
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], object]

RECORD_BYTES = 16
BETWEEN_S = 0.005


def write(directory: Path, folder: str) -> Work:
    """Numbered records, from the first number that is not there yet."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    records = os.open(Path(folder) / "records", flags, 0o600)
    ledger = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    node = os.environ["NBDMIRROR_NODE"]

    def work() -> None:
        number = os.fstat(records).st_size // RECORD_BYTES
        while True:
            os.write(records, b"%15d\n" % number)
            os.fsync(records)
            os.write(ledger, f"{number} {node}\n".encode())
            number += 1
            select.select([], [], [], BETWEEN_S)

    return work


def answer(directory: Path, host: str, port: str) -> Work:
    """A web server that says how it is."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = directory / "answer"
            self.send_response(int(said.read_text()) if said.exists() else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    return http.server.HTTPServer((host, int(port)), Answers).serve_forever


def idle(_directory: Path) -> Work:
    """Nothing, for ever."""
    return lambda: select.select([], [], [])


def main(words: list[str]) -> None:
    """Begin, and go into the background."""
    directory = Path(words[0])
    kinds: dict[str, Callable[..., Work]] = {"idle": idle, "write": write, "answer": answer}
    work = kinds[words[1]](directory, *words[2:])
    pid = os.fork()
    if pid == 0:
        os.setsid()
        work()
    (directory / f"{os.environ['NBDMIRROR_NODE']}.pid").write_text(f"{pid}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
