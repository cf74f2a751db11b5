"""A file system on a new device, made in its image before there is anything to copy.

Owns which kinds there are and how each is made. Must never touch an image that holds something.
"""

import os
import subprocess
from pathlib import Path
from typing import Final

from nbdmirror.errors import ConfigError
from nbdmirror.files import path_error

# Without discard: it would give back the space that was just reserved.
MAKE_FILE_SYSTEM: Final = {
    "ext4": ("-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("-q", "-f", "-K"),
}
MAKE_FILE_SYSTEM_S: Final = 3600.0


def make_file_system(kind: str, image: Path) -> None:
    """A file system in a new image, durable; the space that is reserved for it stays.

    Raises:
        ConfigError: the program for it is missing, or fails; what it said is in the text.
    """
    command = [f"mkfs.{kind}", *MAKE_FILE_SYSTEM[kind], str(image)]
    try:
        done = subprocess.run(  # noqa: S603 - one of two programs, no shell
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=MAKE_FILE_SYSTEM_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"--mkfs {kind}: {command[0]} cannot be run ({error}); install it"
        ) from error
    if done.returncode != 0:
        raise ConfigError(f"--mkfs {kind}: {command[0]} failed: {done.stderr.strip()[-300:]}")
    try:
        descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise path_error(error, str(image), "look at its disk") from error
