"""What runs on a host of `Lan`: the code under test on its own loop, or an ear on the cable.

Owns nothing; a line of standard input is a wish, a line of standard output a JSON object. It ends
with its input. `hold ADDRESS[@INTERFACE]...` has the addresses under test; `hear` prints the sender
of every packet that announces or probes, decoded here and not by the code under test.
"""

import asyncio
import dataclasses
import ipaddress
import json
import os
import socket
import sys
import threading
from typing import Any

import uvloop

from nbdmirror.config_cluster import VirtualAddressSection
from nbdmirror.controller.addresses import Addresses
from nbdmirror.controller.netlink import open_events
from nbdmirror.errors import NbdMirrorError


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def hold(words: list[str]) -> None:
    sections = []
    for word in words:
        address, _, interface = word.partition("@")
        sections.append(VirtualAddressSection(address=address, interface=interface or None))
    held = Addresses(sections, tell=lambda sentence: say(told=sentence))
    say(ready=True)
    while wish := (await asyncio.to_thread(sys.stdin.readline)).strip():
        try:
            say(answer=await fulfil(held, wish))
        except NbdMirrorError as error:
            say(answer=f"{type(error).__name__}: {error}")
    await held.close()


async def fulfil(held: Addresses, wish: str) -> Any:
    loop = asyncio.get_running_loop()
    start = loop.time()
    if wish == "take":
        await held.take()
    elif wish == "force":
        await held.take(force=True)
    elif wish == "drop":
        await held.drop()
    elif wish == "leftovers":
        return await held.leftovers()
    elif wish == "facts":
        return [dataclasses.asdict(each) for each in held.facts()]
    elif wish == "cancel":
        return await cancel(held)
    else:
        raise AssertionError(wish)
    return round((loop.time() - start) * 1000)


async def cancel(held: Addresses) -> str:
    """Take, and cancel it when the kernel says that an address is there; its thread goes on."""
    loop = asyncio.get_running_loop()
    there = asyncio.Event()
    with open_events() as events:

        def heard() -> None:
            data = events.recv(65_536)
            if any(packed(each.address) in data for each in held.facts()):
                there.set()

        loop.add_reader(events.fileno(), heard)
        taking = asyncio.create_task(held.take())
        watching = asyncio.create_task(there.wait())
        await asyncio.wait({taking, watching}, return_when=asyncio.FIRST_COMPLETED)
        taking.cancel()
        watching.cancel()
        await asyncio.wait({taking, watching})
        loop.remove_reader(events.fileno())
    return "cancelled" if taking.cancelled() else "done"


def packed(address: str) -> bytes:
    return ipaddress.ip_interface(address).ip.packed


def hear() -> None:
    """ARP by operation (1, 2), neighbour messages by type (135, 136)."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as ear:
        threading.Thread(target=end_with_input, daemon=True).start()
        say(ready=True)
        while True:
            frame = ear.recv(2048)
            if frame[12:14] == b"\x08\x06":
                sender = socket.inet_ntop(socket.AF_INET, frame[28:32])
                say(mac=frame[22:28].hex(":"), kind=frame[21], address=sender)
            elif frame[12:14] == b"\x86\xdd" and frame[20] == 58 and frame[54] in (135, 136):
                target = socket.inet_ntop(socket.AF_INET6, frame[62:78])
                say(mac=frame[6:12].hex(":"), kind=frame[54], address=target)


def end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "hear":
        hear()
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(hold(sys.argv[2:]))
