"""A machine with a kernel of its own: Debian's user-mode Linux, run as an ordinary process.

For what the kernel of the test machine refuses or must not suffer: a lowered oom_score_adj, the
OOM killer, a kernel NBD device over an engine on the same host. Owns the guest's boot, its disk,
its bound in time, and every process of it. The guest sees the host's files read-only; it writes
to a tmpfs on /run and to its disk, both of which end with it. Must never: let a guest outlive
`run`, or take a guest that did not reach its end for one that passed.
"""

import contextlib
import ctypes
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = "/usr/lib/uml/modules"
DISK = "/dev/ubda"
MIB = 1 << 20

# The vector state of a CPU with AMX does not fit into the buffer of Debian 12's user-mode Linux,
# whose init then dies at its first register (ptrace(2), PTRACE_SETREGSET: EFAULT). Told that there
# is no such register set it takes the older one, x87 and SSE alone; so nothing in such a guest may
# use wider registers, which its threads would take from each other.
WIDE_STATE_FLAG = "amx_tile"
NO_WIDE_REGISTERS = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,"
    "-AVX_Fast_Unaligned_Load",
    "OPENSSL_ia32cap": "~0x1000000000000000:0",
}
SYS_PTRACE, PTRACE_GETREGSET = 101, 0x4204
# Classic BPF (seccomp(2)): opcode, jump if true, jump if false, constant.
NO_REGISTER_SETS = (
    (0x20, 0, 0, 0),  # load the system call's number
    (0x15, 0, 3, SYS_PTRACE),
    (0x20, 0, 0, 16),  # load its first argument
    (0x15, 0, 1, PTRACE_GETREGSET),
    (0x06, 0, 0, 0x00050000 | 22),  # answer EINVAL
    (0x06, 0, 0, 0x7FFF0000),  # allow
)
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2

# The init of the guest. RB_POWER_OFF of reboot(2): without it the kernel panics when init ends.
INIT = """\
export PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/run/tmp HOME=/run LANG=C.UTF-8
export PYTHONPATH={root} PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
mkdir /run/tmp /run/disk
{exports}
exec >/dev/tty1 2>&1
ip link set lo up
cd {root}
echo "{marker} begin"
{command} </dev/null
echo "{marker} exit $?"
exec {python} -c 'import ctypes, os; os.sync(); ctypes.CDLL(None).reboot(0x4321FEDC)'
"""


class GuestError(Exception):
    """The guest did not come to its end; the message holds what it said."""


@dataclass(frozen=True)
class Outcome:
    """What a program did in the guest: exit code, output (both streams), the kernel's messages."""

    code: int
    output: str
    kernel: str


def run(
    command: list[str], directory: Path, *, memory_mib: int, disk_mib: int, bound_s: float
) -> Outcome:
    """Boot a guest, run one command in it, power it off.

    `directory` takes the guest's disk (sparse, empty, `DISK` inside) and its logs. Paths in the
    command are the host's. Nothing of the guest is left when this returns.

    Raises:
        GuestError: no user-mode Linux, or no end within `bound_s` seconds, or it died.
    """
    kernel = shutil.which("linux.uml")
    if kernel is None:
        raise GuestError("linux.uml is not installed: apt-get install user-mode-linux")
    marker = f"guest-{secrets.token_hex(8)}"
    init, disk = directory / "init.sh", directory / "disk.img"
    words = {"root": shlex.quote(str(ROOT)), "python": shlex.quote(sys.executable)}
    wide = WIDE_STATE_FLAG in Path("/proc/cpuinfo").read_text().split()
    exports = "\n".join(f"export {k}={v!r}" for k, v in NO_WIDE_REGISTERS.items() if wide)
    init.write_text(
        INIT.format(marker=marker, command=shlex.join(command), exports=exports, **words)
    )
    with disk.open("wb") as file:
        file.truncate(disk_mib * MIB)
    arguments = [
        kernel,
        f"mem={memory_mib}M",
        *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet"),
        f"ubd0={disk}",
        f"uml_dir={directory}/",
        # The kernel speaks on one channel and the program on the other, so no line is cut in two.
        *("con=null", "con0=null,fd:2", "con1=null,fd:1", "console=tty0"),
        *("init=/bin/sh", "--", str(init)),
    ]
    try:
        _boot(arguments, directory, bound_s, _hide_register_sets if wide else None)
        return _outcome(directory, marker)
    finally:
        disk.unlink()


def _hide_register_sets() -> None:
    """In the child, before the guest's kernel: see NO_REGISTER_SETS."""
    code = b"".join(struct.pack("HBBI", *line) for line in NO_REGISTER_SETS)
    instructions = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(NO_REGISTER_SETS), ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def _boot(
    arguments: list[str],
    directory: Path,
    bound_s: float,
    before: Callable[[], None] | None,
) -> None:
    """Until the guest has powered itself off, or was ended."""
    with (directory / "output").open("wb") as out, (directory / "kernel").open("wb") as messages:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=messages,
            # The guest's memory is a deleted file there: on a disk it would be written back.
            env={**os.environ, "TMPDIR": "/dev/shm"},
            start_new_session=True,
            preexec_fn=before,  # noqa: PLW1509 - no other thread runs here that could hold a lock
        )
        try:
            ended = _ends_within(process.pid, bound_s)
        finally:
            # Each process of the guest is one of the host, in this session, and outlives the
            # first one's death. That one is reaped last: until then the number is ours.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not ended:
        said = "\n".join(_logs(directory))
        raise GuestError(f"the guest did not end within {bound_s} s\n{said}")


def _ends_within(pid: int, bound_s: float) -> bool:
    """Wait for the end of a process, without reaping it."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], bound_s)[0])
    finally:
        os.close(descriptor)


def _logs(directory: Path) -> tuple[str, str]:
    """What the program and the kernel wrote."""
    output, kernel = (
        (directory / name).read_text(errors="replace").replace("\r", "")
        for name in ("output", "kernel")
    )
    return output, kernel


def _outcome(directory: Path, marker: str) -> Outcome:
    output, kernel = _logs(directory)
    found = re.search(f"{marker} begin\n(.*){marker} exit ([0-9]+)\n", output, re.DOTALL)
    if found is None:
        raise GuestError(f"the guest died before its command ended\n{output}\n{kernel}")
    return Outcome(int(found[2]), found[1], kernel)
