"""Why two nodes are not connected, in words that an operator can act on."""

import errno
import os
import socket

import pytest

from nbdmirror.errors import PeerProtocolError
from nbdmirror.peering import told_of_a_stranger, why_not_connected


def system(number: int) -> OSError:
    """An error as the loop raises it."""
    return OSError(number, f"Connect call failed ('10.1.0.2', {number})")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (system(errno.ECONNREFUSED), "nothing answers at 10.1.0.2:7789: connection refused"),
        (TimeoutError(), "no answer from 10.1.0.2:7789 in time"),
        (system(errno.ETIMEDOUT), "no answer from 10.1.0.2:7789 in time"),
        (system(errno.EHOSTUNREACH), "no route to 10.1.0.2:7789, or its host is down"),
        (system(errno.ENETUNREACH), "no route to 10.1.0.2:7789, or its host is down"),
        (system(errno.ECONNRESET), "10.1.0.2:7789: Connection reset by peer"),
        (PeerProtocolError("authentication failed"), "authentication failed"),
    ],
)
def test_dialing_fails_in_plain_words(error: Exception, told: str) -> None:
    """Breaks in the field: the reason in the status is "[Errno 111] Connect call failed (...)"."""
    assert why_not_connected(error, "10.1.0.2", 7789) == told


def test_an_address_of_six_has_brackets() -> None:
    """Breaks in the field: nobody can tell where the address ends and the port begins."""
    told = why_not_connected(ConnectionRefusedError(errno.ECONNREFUSED, ""), "fd00::2", 7789)
    assert "[fd00::2]:7789" in told


def test_a_refusal_of_the_system_is_known() -> None:
    """Breaks in the field: the system's own error is of a kind that has no words here."""
    with socket.socket() as silent, socket.socket() as dialer:
        silent.bind(("127.0.0.1", 0))
        host, port = silent.getsockname()
        with pytest.raises(ConnectionRefusedError) as refused:
            dialer.connect((host, port))
    assert why_not_connected(refused.value, host, port).endswith(": connection refused")


@pytest.mark.parametrize("error", [TimeoutError(), system(errno.EPIPE)])
def test_a_stranger_is_told_of_in_plain_words(error: Exception) -> None:
    """Breaks in the field: an event says "TimeoutError", or a number, and nothing else."""
    told = told_of_a_stranger(error)
    assert "Errno" not in told
    assert type(error).__name__ not in told
    assert told == os.strerror(errno.EPIPE) or "in time" in told
