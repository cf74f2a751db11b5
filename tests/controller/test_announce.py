"""The packets of a virtual address, held against the layouts of their RFCs, written out by hand."""

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.controller.announce import (
    IpAddress,
    announcements,
    claimant,
    ethertype,
    mac_text,
    multicast_mac,
    probe,
    solicited_node,
)

OURS = bytes.fromhex("0200 0000 0701")
THEIRS = bytes.fromhex("0200 0000 0702")
FOUR = IPv4Address("198.51.100.100")
SIX = IPv6Address("2001:db8:0:7::1:100")

# Ethernet: destination, source, type. ARP (RFC 826): hardware 1, protocol 0800, lengths 6 and 4,
# operation; sender's MAC and IP; target's MAC and IP.
ARP_PROBE = bytes.fromhex(
    "ffffffffffff 020000000701 08060001 0800 06 04 0001020000000701 00000000000000000000 c6336464"
)
ARP_REQUEST = bytes.fromhex(
    "ffffffffffff 020000000701 08060001 0800 06 04 0001020000000701 c6336464000000000000 c6336464"
)
ARP_REPLY = bytes.fromhex(
    "ffffffffffff 020000000701 08060001 0800 06 04 0002020000000701 c6336464020000000701 c6336464"
)
# IPv6: version 6, payload length, next header 58, hop limit 255, source, destination. ICMPv6: type,
# code, checksum, reserved or flags, target. The checksums by hand: the words of 16 bits that are
# not 0, added, the carry added again, inverted. Solicitation: ff02+1+ff01+100 (addresses), 18+3a
# (length, next header), 8700, 2001+db8+7+1+100 (target): 2b517, b519, 4ae6.
SOLICITATION = bytes.fromhex(
    "3333ff010100 020000000701 86dd"
    "60000000 0018 3a ff"
    "00000000000000000000000000000000"
    "ff0200000000000000000001ff010100"
    "87 00 4ae6 00000000"
    "20010db8000000070000000000010100"
)
# Twice 2001+db8+7+1+100 (source, target), ff02+1, 20+3a, 8800+2000, 201+200+701 (option): 20fe1,
# 0fe3, f01c.
ADVERTISEMENT = bytes.fromhex(
    "333300000001 020000000701 86dd"
    "60000000 0020 3a ff"
    "20010db8000000070000000000010100"
    "ff020000000000000000000000000001"
    "88 00 f01c 20000000"
    "20010db8000000070000000000010100"
    "02 01 020000000701"
)

ADDRESSES = pytest.mark.parametrize("address", [FOUR, SIX], ids=["IPv4", "IPv6"])


def test_the_probes_are_those_of_the_standards() -> None:
    """Breaks in the field: nobody understands the question, so a second holder is never found; or
    it claims the address while it asks, and takes it from the node that serves."""
    assert probe(OURS, FOUR) == ARP_PROBE
    assert probe(OURS, SIX) == SOLICITATION


def test_the_announcements_are_those_of_the_standards() -> None:
    """Breaks in the field: clients go on sending to the dead node until their entry is too old."""
    assert announcements(OURS, FOUR) == (ARP_REQUEST, ARP_REPLY)
    assert announcements(OURS, SIX) == (ADVERTISEMENT,)


def test_names_of_groups() -> None:
    """Breaks in the field: the question goes to a group in which no holder of the address is."""
    assert solicited_node(IPv6Address("4037::1:800:200e:8c6c")) == IPv6Address("ff02::1:ff0e:8c6c")
    assert multicast_mac(IPv6Address("ff02::1:ff0e:8c6c")).hex() == "3333ff0e8c6c"
    assert (ethertype(FOUR), ethertype(SIX)) == (0x0806, 0x86DD)
    assert mac_text(OURS) == "02:00:00:00:07:01"


def frames(address: IpAddress) -> list[bytes]:
    """Every frame of ours about an address, sent by the other host."""
    return [probe(THEIRS, address), *announcements(THEIRS, address)]


@ADDRESSES
def test_a_holder_is_recognised(address: IpAddress) -> None:
    """Breaks in the field: two hosts hold one address, and clients reach now this one, now that."""
    for frame in frames(address):
        assert claimant(frame, address) == THEIRS
        assert claimant(frame + bytes(18), address) == THEIRS, "padded to the least of Ethernet"
        assert claimant(frame, address + 1) is None
        assert claimant(frame, SIX if address == FOUR else FOUR) is None


def test_the_answer_to_a_probe_is_recognised() -> None:
    """Breaks in the field: as above. Most holders answer so: a reply to us, an advertisement
    without the option when the answer is for us alone."""
    reply = bytearray(ARP_REPLY)
    reply[0:6], reply[6:12], reply[22:28] = OURS, THEIRS, THEIRS
    reply[32:42] = OURS + bytes(4)
    assert claimant(bytes(reply), FOUR) == THEIRS
    bare = bytearray(ADVERTISEMENT[:-8])
    bare[6:12], bare[19] = THEIRS, 0x18
    # 20fe1 less the option (b02) and 8 of the length: 204d7, 04d9, fb26.
    bare[56:58] = bytes.fromhex("fb26")
    assert claimant(bytes(bare), SIX) == THEIRS


def test_a_question_of_somebody_who_has_another_address_is_none() -> None:
    """Breaks in the field: any client that looks for the address makes the takeover fail."""
    query = bytearray(ARP_REQUEST)
    query[22:28], query[28:32] = THEIRS, IPv4Address("198.51.100.3").packed
    assert claimant(bytes(query), FOUR) is None
    query = bytearray(SOLICITATION)
    query[37] = 3  # a source that is not unspecified; the sum counts it
    query[56:58] = bytes.fromhex("4ae3")
    assert claimant(bytes(query), SIX) is None


@pytest.mark.parametrize(
    ("at", "value"),
    [(21, 254), (20, 6), (14, 0x40), (55, 1), (57, 0x1D), (54, 133)],
    ids=["came through a router", "no ICMPv6", "version", "code", "checksum", "another type"],
)
def test_what_is_to_be_dropped_is_dropped(at: int, value: int) -> None:
    """Breaks in the field: somebody who is not on the segment can keep a node from taking over."""
    frame = bytearray(ADVERTISEMENT)
    assert claimant(bytes(frame), SIX) == OURS
    frame[at] = value
    assert claimant(bytes(frame), SIX) is None


@given(
    address=st.sampled_from([FOUR, SIX]),
    at=st.integers(0, 100),
    noise=st.binary(max_size=120),
    end=st.integers(0, 200),
)
def test_any_frame_can_be_read(address: IpAddress, at: int, noise: bytes, end: int) -> None:
    """Breaks in the field: one odd frame on the segment ends the controller's detection."""
    for frame in frames(address):
        odd = (frame[:at] + noise + frame[at:])[:end]
        said = claimant(odd, address)
        assert said is None or len(said) == 6
