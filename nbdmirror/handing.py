"""What an engine is given that runs as another user than its launcher: configuration and key.

Owns the form of it, on both sides of a descriptor. The engine's user may read neither the file of
the configuration nor that of the key, and what can be read in arguments or environment is no
secret: so both travel in a nameless file in memory that only the engine has. Must never: leave it
open once it was read.
"""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from nbdmirror import memory
from nbdmirror.config import Config, of_text
from nbdmirror.errors import ConfigError


def hand(text: bytes, key: bytes) -> BinaryIO:
    """A file from which `taken` reads both.

    Raises:
        ConfigError: the system has no such file.
    """
    packed = json.dumps({"text": text.decode("utf-8"), "key": key.hex()}).encode()
    try:
        file = os.fdopen(os.memfd_create("nbdmirror", os.MFD_CLOEXEC), "w+b", buffering=0)
        try:
            file.write(packed)
            file.seek(0)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise ConfigError(f"configuration and key cannot be handed over: {error}") from error
    return file


def taken(parameters: Mapping[str, str]) -> tuple[Config, socket.socket]:
    """In the engine: the configuration with its key, and the bound control socket.

    Raises:
        ConfigError: the configuration has mistakes.
    """
    memory.hide()
    with os.fdopen(int(parameters["handed"]), "rb") as file:
        packed = json.loads(file.read())
    control = socket.socket(fileno=int(parameters["control"]))
    control.set_inheritable(False)
    source, node = Path(parameters["configuration"]), parameters.get("node")
    text, key = packed["text"].encode(), bytes.fromhex(packed["key"])
    return of_text(text, source, node, key=key), control
