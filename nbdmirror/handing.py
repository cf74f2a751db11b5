"""What an engine is given that runs as another user than its launcher: configuration and keys.

Owns the form of it, on both sides of a descriptor. The engine's user may read neither the file of
the configuration nor that of the key, and what can be read in arguments or environment is no
secret: so both travel in a nameless file in memory that only the engine has. Must never: leave it
open once it was read.
"""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from nbdmirror import memory
from nbdmirror.config import Config, of_text
from nbdmirror.config_files import TlsFiles
from nbdmirror.errors import ConfigError


def hand(text: bytes, key: bytes, tls: TlsFiles | None = None) -> BinaryIO:
    """A file from which `taken` reads them. `tls`: what the files for TLS hold that are named.

    Raises:
        ConfigError: the system has no such file.
    """
    files = (tls.certificate, tls.key, tls.ca) if tls is not None else ()
    shown = [None if each is None else each.hex() for each in files]
    facts = {"text": text.decode("utf-8"), "key": key.hex(), "tls": shown}
    packed = json.dumps(facts).encode()
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
    config = of_text(text, source, node, key=key)
    if packed["tls"]:
        mine, secret, ca = (None if each is None else bytes.fromhex(each) for each in packed["tls"])
        assert mine is not None
        assert secret is not None
        config = replace(config, tls_files=TlsFiles(mine, secret, ca))
    return config, control
