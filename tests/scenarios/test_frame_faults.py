"""A sample of the faults of frames between two real engines, and whether every type is tried."""

from random import Random

import pytest

from tests.scenarios.frame_faults import (
    ELSEWHERE,
    INTEGRITIES,
    NEVER,
    WAY_OF,
    WAYS,
    Case,
    Runner,
    all_cases,
    made,
    replay,
)
from tests.support.frame_proxy import FAULTS
from tests.support.frames import DIALER, KINDS, LISTENER, SENDERS

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

# Each fault, each way, both senders; the rest is a campaign.
SAMPLE = {
    "crc": (
        *(
            "WRITE:dialer:drop:3:0",
            "FLUSH:dialer:duplicate:1:0",
            "ACK:listener:corrupt-header:2:20",
        ),
        *("JointTake:dialer:close-after:1:0", "HASH_REPLY:listener:corrupt-payload:1:0"),
        *("Left:listener:close-before:1:0", "Role:dialer:hold:1:0"),
    ),
    "mac": (
        *("ECHO_REPLY:dialer:drop:1:0", "WRITE:dialer:replay-next:2:0", "ZERO:dialer:replay:1:0"),
        *("FLUSHED:listener:hold-long:1:0", "RESYNC_DATA:dialer:close-middle:1:0"),
        "Bye:listener:duplicate:1:0",
    ),
}


@pytest.mark.parametrize("integrity", INTEGRITIES)
def test_a_sample_of_harmed_frames(integrity: str) -> None:
    """Breaks in the field: a frame that is lost, doubled, late or changed on the way is taken for a
    good one, or the two nodes do not come together again.
    """
    runner = Runner()
    runner.run([Case.of(f"{integrity}:{text}") for text in SAMPLE[integrity]], float("inf"))
    assert not runner.violation, f"{runner.violation}\nreplay: {runner.replay}"
    assert runner.figures["frames harmed"] == len(SAMPLE[integrity])


def test_every_type_of_frame_is_made_to_be_sent() -> None:
    """Breaks in the field: a type of frame that no way sends is in no campaign, and nobody knows
    what its loss does.
    """
    with made("crc") as one:
        for way in WAYS:
            getattr(one, way)(None)
            one.together()
        one.judge()
        seen = {kind for kind, _ in one.proxy.seen}
    assert set(WAY_OF) <= seen, f"never sent: {set(WAY_OF) - seen}"
    assert not NEVER & seen, f"somebody sends it, so harm it, too: {NEVER & seen}"


def test_every_type_of_frame_has_a_way() -> None:
    """Breaks in the field: a new type of frame, or of message, is harmed by nobody."""
    assert {*WAY_OF, *NEVER, *ELSEWHERE} == set(KINDS)
    assert sum(map(len, WAYS.values())) + len(NEVER) + len(ELSEWHERE) == len(KINDS)


def test_the_campaign_is_the_full_product() -> None:
    """Breaks in the field: a fault of one type in one direction is never tried, in no night."""
    cases = {
        (case.integrity, case.fault.kind, case.fault.sender, case.fault.what)
        for case in all_cases(Random(1))
    }
    assert len(cases) == len(INTEGRITIES) * len(WAY_OF) * len(SENDERS) * (len(FAULTS) - 1)


def test_the_sample_has_every_fault_and_way() -> None:
    """Breaks in the field: a fault that the tests never try breaks unseen until the next night."""
    cases = [Case.of(f"{each}:{text}") for each in INTEGRITIES for text in SAMPLE[each]]
    assert {case.fault.what for case in cases} == {*FAULTS} - {"call"}
    assert {WAY_OF[case.fault.kind] for case in cases} == set(WAYS)
    assert {case.fault.sender for case in cases} == {DIALER, LISTENER}
    assert [str(Case.of(str(case))) for case in cases] == [str(case) for case in cases]
    assert str(cases[0]) in replay(cases)
