"""What a user without any rights reaches of a running node: run as a program, as that user.

Owns the attempts. Reads paths and processes as JSON from standard input, and prints what it could
do, one line each; nothing printed is as it should be, but for what the user is to have. Must never
change what it got at: it opens and closes.
"""

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NOBODY = 65534
BOUND_S = 60.0
SOCKET_S = 5.0
OF_A_PROCESS = ("environ", "mem", "maps", "fd", "cwd", "io")


def attempts(
    paths: list[Path], processes: list[int], user: tuple[int, int] = (NOBODY, NOBODY)
) -> list[str]:
    """What user and group could do with these, run in a process of its own."""
    asked = {"paths": [str(each) for each in paths], "processes": processes}
    program = Path(os.path.realpath(sys.executable))
    done = subprocess.run(
        [program, "-I", "-c", Path(__file__).read_text(encoding="utf-8")],
        input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=BOUND_S,
        user=user[0], group=user[1], extra_groups=[], cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def with_path(path: str) -> Iterator[str]:
    """Read, write, list, make, connect."""
    kind = 0
    with contextlib.suppress(OSError):
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    if kind == stat.S_IFDIR:
        with contextlib.suppress(OSError):
            os.listdir(path)  # noqa: PTH208 - what the system says, and no more
            yield f"list {path}"
        with contextlib.suppress(OSError):
            os.close(os.open(f"{path}/made-by-nobody", os.O_CREAT | os.O_WRONLY, 0o600))
            yield f"make in {path}"
        return
    for name, flags in (("read", os.O_RDONLY), ("write", os.O_WRONLY)):
        with contextlib.suppress(OSError):
            os.close(os.open(path, flags | os.O_NONBLOCK))
            yield f"{name} {path}"
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.settimeout(SOCKET_S)
        connection.connect(path)
        yield f"connect {path}"
        connection.sendall(b'{"id": 1, "command": "state"}\n')
        if connection.recv(100):
            yield f"ask {path}"


def with_process(pid: int) -> Iterator[str]:
    """Look inside, and send a signal."""
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        yield f"signal {pid}"
    for name in OF_A_PROCESS:
        path = f"/proc/{pid}/{name}"
        with contextlib.suppress(OSError):
            if name == "fd":
                os.listdir(path)  # noqa: PTH208 - as above
            elif name == "cwd":
                os.readlink(path)  # noqa: PTH115 - as above
            else:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.read(descriptor, 1)
                finally:
                    os.close(descriptor)
            yield f"look into {path}"


def main() -> None:
    """As whom it was started."""
    asked = json.load(sys.stdin)
    found = [line for path in asked["paths"] for line in with_path(path)]
    found += [line for pid in asked["processes"] for line in with_process(pid)]
    sys.stdout.write("".join(f"{line}\n" for line in found))


if __name__ == "__main__":
    main()
