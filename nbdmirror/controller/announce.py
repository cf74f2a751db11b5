"""The packets of a virtual address: who has it, who has it now.

Owns the layout of the few frames that a change of holder needs: probe and announcement of ARP
(RFC 826, RFC 5227), solicitation and advertisement of IPv6 neighbours (RFC 4861, RFC 4862), each a
whole Ethernet frame, and what a received frame says about an address. Pure: bytes in, bytes out.
Must never send, receive, or believe a received frame that its RFC tells to drop.
"""

from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, TypeAlias

from construct import Bytes, Const, ConstructError, Int8ub, Int16ub, Int32ub, Struct

IpAddress: TypeAlias = IPv4Address | IPv6Address

MAC_BYTES: Final = 6
ETHERTYPE_ARP: Final = 0x0806
ETHERTYPE_IPV6: Final = 0x86DD
ICMPV6: Final = 58
SOLICITATION: Final = 135
ADVERTISEMENT: Final = 136
# The longest that is read of a received frame: no frame of ours, and none that answers it, comes
# near it.
FRAME_BYTES_MAX: Final = 1514

_BROADCAST: Final = b"\xff" * MAC_BYTES
_NO_MAC: Final = bytes(MAC_BYTES)
_REQUEST: Final = 1
_REPLY: Final = 2
_OVERRIDE: Final = 0x2000_0000
# A router lowers it, so a frame with 255 comes from this segment.
_HOP_LIMIT: Final = 255
_TARGET_LINK: Final = 2
_OPTION_UNIT_BYTES: Final = 8
_ALL_NODES: Final = IPv6Address("ff02::1")
_SOLICITED_NODE: Final = IPv6Address("ff02::1:ff00:0").packed[:13]

_ETHERNET: Final = Struct(
    "destination" / Bytes(MAC_BYTES),
    "source" / Bytes(MAC_BYTES),
    "type" / Int16ub,
)
_ARP: Final = Struct(
    "hardware" / Const(1, Int16ub),
    "protocol" / Const(0x0800, Int16ub),
    "hardware_bytes" / Const(MAC_BYTES, Int8ub),
    "protocol_bytes" / Const(4, Int8ub),
    "operation" / Int16ub,
    "sender_mac" / Bytes(MAC_BYTES),
    "sender" / Bytes(4),
    "target_mac" / Bytes(MAC_BYTES),
    "target" / Bytes(4),
)
_IPV6: Final = Struct(
    "version_class_flow" / Int32ub,
    "length" / Int16ub,
    "next_header" / Int8ub,
    "hop_limit" / Int8ub,
    "source" / Bytes(16),
    "destination" / Bytes(16),
)
_NEIGHBOUR: Final = Struct(
    "type" / Int8ub,
    "code" / Const(0, Int8ub),
    "checksum" / Int16ub,
    "flags" / Int32ub,
    "target" / Bytes(16),
)
_LINK_OPTION: Final = Struct(
    "type" / Const(_TARGET_LINK, Int8ub),
    "units" / Const(1, Int8ub),
    "mac" / Bytes(MAC_BYTES),
)


def ethertype(address: IpAddress) -> int:
    """The protocol number of the frames about this address."""
    return ETHERTYPE_ARP if isinstance(address, IPv4Address) else ETHERTYPE_IPV6


def mac_text(mac: bytes) -> str:
    """Like "02:00:00:00:00:0a"."""
    return mac.hex(":")


def multicast_mac(address: IPv6Address) -> bytes:
    """Where a frame to this multicast address goes (RFC 2464, section 7)."""
    return b"\x33\x33" + address.packed[12:]


def solicited_node(address: IPv6Address) -> IPv6Address:
    """The multicast address that every holder of `address` listens to (RFC 4291, 2.7.1)."""
    return IPv6Address(_SOLICITED_NODE + address.packed[13:])


def probe(mac: bytes, address: IpAddress) -> bytes:
    """Asks whether somebody has `address`, without claiming it; `mac` is the 6 bytes of ours."""
    if isinstance(address, IPv4Address):
        return _arp(mac, _REQUEST, bytes(4), _NO_MAC, address)
    # From the unspecified address, so without a link-layer option (RFC 4861, section 4.3).
    body = {"type": SOLICITATION, "flags": 0, "target": address.packed}
    return _icmpv6(mac, IPv6Address(0), solicited_node(address), body, b"")


def announcements(mac: bytes, address: IpAddress) -> tuple[bytes, ...]:
    """Tells the segment that `address` is at `mac` from now on.

    For IPv4 the same in both forms: RFC 5227 says a request; some hosts learn from replies alone.
    """
    if isinstance(address, IPv4Address):
        return (
            _arp(mac, _REQUEST, address.packed, _NO_MAC, address),
            _arp(mac, _REPLY, address.packed, mac, address),
        )
    body = {"type": ADVERTISEMENT, "flags": _OVERRIDE, "target": address.packed}
    return (_icmpv6(mac, address, _ALL_NODES, body, _LINK_OPTION.build({"mac": mac})),)


def claimant(frame: bytes, address: IpAddress) -> bytes | None:
    """The 6 bytes of the MAC that has `address`, or wants it, as this frame says; else None.

    A host that has it sends from it (ARP) or advertises it (IPv6). One that wants it probes for
    it, as we do (RFC 5227, section 2.1.1; RFC 4862, section 5.4.3).
    """
    if address.packed not in frame:  # most frames: said without taking them apart
        return None
    try:
        ethernet = _ETHERNET.parse(frame)
        if ethernet.type != ethertype(address):
            return None
        body = frame[_ETHERNET.sizeof() :]
        if isinstance(address, IPv4Address):
            return _claimed_by_arp(_ARP.parse(body), address)
        return _claimed_by_neighbour(ethernet.source, body, address)
    except ConstructError:
        return None


def _claimed_by_arp(arp: Any, address: IPv4Address) -> bytes | None:
    wanted = arp.operation == _REQUEST and arp.sender == bytes(4) and arp.target == address.packed
    return bytes(arp.sender_mac) if arp.sender == address.packed or wanted else None


def _claimed_by_neighbour(source_mac: bytes, body: bytes, address: IPv6Address) -> bytes | None:
    ip = _IPV6.parse(body)
    if ip.version_class_flow >> 28 != 6 or (ip.next_header, ip.hop_limit) != (ICMPV6, _HOP_LIMIT):
        return None
    message = body[_IPV6.sizeof() : _IPV6.sizeof() + ip.length]
    neighbour = _NEIGHBOUR.parse(message)
    if len(message) != ip.length or _checksum(ip.source, ip.destination, message):
        return None
    if neighbour.target != address.packed:
        return None
    if neighbour.type == ADVERTISEMENT:
        return _link_option(message[_NEIGHBOUR.sizeof() :]) or source_mac
    wanted = neighbour.type == SOLICITATION and ip.source == bytes(16)
    return source_mac if wanted else None


def _link_option(options: bytes) -> bytes | None:
    """The target's link-layer address among the options of an advertisement."""
    while len(options) >= _OPTION_UNIT_BYTES and options[1]:
        length_bytes = options[1] * _OPTION_UNIT_BYTES
        if options[0] == _TARGET_LINK:
            return options[2 : 2 + MAC_BYTES]
        options = options[length_bytes:]
    return None


def _arp(
    mac: bytes, operation: int, sender: bytes, target_mac: bytes, target: IPv4Address
) -> bytes:
    fields = {
        "operation": operation,
        "sender_mac": mac,
        "sender": sender,
        "target_mac": target_mac,
        "target": target.packed,
    }
    return _ethernet(_BROADCAST, mac, ETHERTYPE_ARP) + bytes(_ARP.build(fields))


def _icmpv6(
    mac: bytes, source: IPv6Address, group: IPv6Address, body: dict[str, Any], options: bytes
) -> bytes:
    bare = _NEIGHBOUR.build({**body, "checksum": 0}) + options
    checksum = _checksum(source.packed, group.packed, bare)
    message = _NEIGHBOUR.build({**body, "checksum": checksum}) + options
    header = _IPV6.build(
        {
            "version_class_flow": 6 << 28,
            "length": len(message),
            "next_header": ICMPV6,
            "hop_limit": _HOP_LIMIT,
            "source": source.packed,
            "destination": group.packed,
        }
    )
    return _ethernet(multicast_mac(group), mac, ETHERTYPE_IPV6) + bytes(header) + bytes(message)


def _ethernet(destination: bytes, source: bytes, kind: int) -> bytes:
    return bytes(_ETHERNET.build({"destination": destination, "source": source, "type": kind}))


def _checksum(source: bytes, destination: bytes, message: bytes) -> int:
    """Of ICMPv6 with its pseudo header (RFC 8200, 8.1); over a correct whole message it is 0."""
    counted = source + destination + Int32ub.build(len(message)) + Int32ub.build(ICMPV6) + message
    counted += b"\0" * (len(counted) % 2)
    total = sum(int.from_bytes(counted[at : at + 2]) for at in range(0, len(counted), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
