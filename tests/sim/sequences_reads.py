"""Sequences of reads: what a primary that may have been deposed answers, and from when on the next
one serves (rule 17).

A is primary, B secondary, in sync, and the arbiter has a memory. W0 is what both hold; W1 is
acknowledged by B alone. Each function is one sequence; its docstring is what must come out. That no
answer lacks W1 is judged by the checks at each answer (A6).
"""

from collections.abc import Callable
from dataclasses import replace

from nbdmirror.core import io, roles
from nbdmirror.core.node import Role
from nbdmirror.core.superblock import Flags
from nbdmirror.limits import ACK_TIMEOUT_MS, READ_LEASE_MS
from tests.sim.host import Host
from tests.sim.sequences_crashes import until_target_took
from tests.sim.sequences_scene import Request, Scene
from tests.sim.sequences_words import speak

EXTENT = 5
# A promotion itself, its flush and its metadata.
QUICK_MS = 300


def takes_over(s: Scene) -> Request:
    """B loses A, gets the right and is promoted, all at once; returns W1."""
    loses_peer(s)
    assert s.claim(s.b)
    s.promote(s.b)
    return s.write(s.b, EXTENT)


def loses_peer(s: Scene) -> None:
    """B takes A for lost, for whatever reason; A hears nothing of it."""
    session = s.node(s.b).session
    if session is not None:
        s.node(s.b).lose_session(session, "cut off")


def reads_for(s: Scene, host: Host, duration_ms: int) -> list[Request]:
    """A read every few milliseconds."""
    reads = []
    until_ms = s.world.now_ms + duration_ms
    while s.world.now_ms < until_ms:
        reads.append(s.begin_read(host, EXTENT))
        s.run(7)
    return reads


def took_ms(s: Scene, act: Callable[[], object]) -> int:
    """How long it takes."""
    began_ms = s.world.now_ms
    act()
    return s.world.now_ms - began_ms


def deposed_primary_answers_nothing(s: Scene) -> None:
    """B is promoted while A still believes that it has a session: A's reads are held, and fail when
    A is told to step back.
    """
    s.pair()
    s.write(s.a, EXTENT)
    s.cut()
    loses_peer(s)
    assert s.claim(s.b)
    promoted = s.begin(s.b, roles.promote(s.node(s.b)))
    s.read(s.a, EXTENT)
    while s.node(s.b).role is not Role.PRIMARY:
        s.begin_read(s.a, EXTENT)
        s.run(7)
    s.until(lambda: promoted)
    assert s.node(s.a).session is not None
    s.write(s.b, EXTENT)
    held = reads_for(s, s.a, 2 * ACK_TIMEOUT_MS)
    assert {request.problem for request in held} == {None}
    assert s.node(s.a).question == "frozen"
    s.command(s.a, roles.demote(s.node(s.a)))
    s.run(10)
    assert all("NotPrimaryError" in str(request.problem) for request in held)
    s.heal()
    s.synced()


def stopped_primary_wakes_up(s: Scene) -> None:
    """A stands still, B takes over, A goes on: what it was asked meanwhile it does not answer."""
    s.pair()
    s.write(s.a, EXTENT)
    s.a.pause(10_000)
    waiting = [s.begin_read(s.a, EXTENT)]
    s.run(50)
    takes_over(s)
    waiting.append(s.begin_read(s.a, EXTENT))
    s.run(10_000)
    waiting.append(s.begin_read(s.a, EXTENT))
    s.run(1_000)
    assert not any(request.acknowledged for request in waiting)


def read_that_takes_long(s: Scene) -> None:
    """A's disk takes its time over a read, and B takes over meanwhile: it is not answered."""
    s.pair()
    s.write(s.a, EXTENT)
    s.run(1000)
    s.a.data.hold_ms["read"] = 1_700
    slow = s.begin_read(s.a, EXTENT)
    s.run(1)
    s.cut()
    takes_over(s)
    s.run(3_000)
    assert slow.problem is None


def block_status_is_held(s: Scene) -> None:
    """What reads as zeros is content: a deposed primary does not tell it either."""
    s.pair()
    s.cut()
    takes_over(s)
    ended = s.begin(s.a, io.extents(s.node(s.a), EXTENT * 4096, 4096))
    s.run(500)
    assert not ended


def late_echo_lends_nothing(s: Scene) -> None:
    """B's answer to an echo is on its way for longer than a lease: A counts from its question."""
    s.pair()
    s.write(s.a, EXTENT)
    asked = s.node(s.a).lease.number
    s.net.cut(1)
    s.until(lambda: s.node(s.a).lease.number > asked)
    said = next(end.out for end in s.net.ends if end.life is s.b.life)
    s.until(lambda: said.chunks)
    s.run(50)
    s.net.cut(0)
    takes_over(s)
    answered = s.node(s.a).lease.answered_number
    # What B said arrives, the end of the connection not yet.
    said.finished = False
    s.heal()
    s.until(lambda: s.node(s.a).lease.answered_number > answered)
    s.cut()
    assert s.node(s.a).session is not None
    held = reads_for(s, s.a, 200)
    assert {request.problem for request in held} == {None}


def engine_that_knows_nothing_waits(s: Scene) -> None:
    """B's engine answered an echo and was killed; the next one cannot know, and waits too."""
    s.pair()
    s.write(s.a, EXTENT)
    s.run(1000)
    s.cut()
    s.b.end(power=False)
    s.start(s.b)
    assert took_ms(s, lambda: takes_over(s)) >= READ_LEASE_MS
    assert s.node(s.a).session is not None
    reads_for(s, s.a, 300)


def longer_lease_counts(s: Scene) -> None:
    """A has the longer lease; B is killed, and its next engine waits for it, by its metadata."""
    long_ms = 1_500
    s.a.settings = replace(s.a.settings, read_lease_ms=long_ms)
    s.b.settings = replace(s.b.settings, read_lease_ms=300)
    s.pair()
    assert {s.node(host).lease.length_ms for host in (s.a, s.b)} == {long_ms}
    s.write(s.a, EXTENT)
    answered = s.node(s.a).lease.answered_number
    s.until(lambda: s.node(s.a).lease.answered_number > answered)
    s.cut()
    s.b.end(power=False)
    s.start(s.b)
    assert s.node(s.b).lease.length_ms == long_ms
    assert took_ms(s, lambda: takes_over(s)) >= long_ms
    assert s.node(s.a).session is not None
    reads_for(s, s.a, 100)


def promoted_before_it_was_told(s: Scene) -> None:
    """A is promoted in the session, and B never hears of it: the echoes before that do not count,
    because B, which lent them to nobody, waits for nothing.
    """
    s.start(s.a)
    s.start(s.b)
    s.synced()
    s.run(2000)
    ended = s.begin(s.a, roles.promote(s.node(s.a)))
    while s.node(s.a).role is not Role.PRIMARY:
        s.run(1)
    s.cut()
    s.until(lambda: ended)
    s.net.ends[0].out.chunks.clear()
    s.net.ends[1].out.chunks.clear()
    assert not s.session(s.b).peer_primary
    assert took_ms(s, lambda: takes_over(s)) < QUICK_MS
    held = reads_for(s, s.a, 500)
    assert {request.problem for request in held} == {None}


def lease_from_the_joint_step_on(s: Scene) -> None:
    """A gave up its right in the joint step, B took J and goes on from it: A answers no read."""
    until_target_took(s)
    takes_over(s)
    held = reads_for(s, s.a, 500)
    assert {request.problem for request in held} == {None}


def reads_freeze_with_the_writes(s: Scene) -> None:
    """They go on when the peer is back, and when A goes on alone; alone they need no echo."""
    s.pair()
    s.write(s.a, EXTENT)
    s.net.reset_all()
    s.cut()
    s.run(1)
    held = s.begin_read(s.a, EXTENT)
    s.run(1_000)
    assert held.problem is None
    s.heal()
    s.until(lambda: held.acknowledged)
    assert s.told("A resumed")
    s.part()
    held = s.begin_read(s.a, EXTENT)
    s.run(500)
    assert held.problem is None
    s.alone(s.a)
    s.until(lambda: held.acknowledged)
    assert took_ms(s, lambda: s.read(s.a, EXTENT)) < 20
    s.heal()
    s.synced()
    s.read(s.a, EXTENT)


def idle_pair_reads_at_once(s: Scene) -> None:
    """In sync no read ever waits for an echo."""
    s.pair()
    for _ in range(500):
        assert s.node(s.a).lease.until_ms > s.world.now_ms
        s.run(37)


def long_read_locks_nothing(s: Scene) -> None:
    """A read that is held longer than a disk may take is no failure of the disk, and no lock."""
    s.pair()
    s.write(s.a, EXTENT)
    s.part()
    held = s.begin_read(s.a, EXTENT)
    s.run(60_000)
    assert not s.node(s.a).failed
    assert not len(s.node(s.a).locks)
    s.heal()
    s.until(lambda: held.acknowledged)


def swap_waits_for_nothing(s: Scene) -> None:
    """A said that it serves no more: B is promoted at once, and answers reads when A is back."""
    s.pair()
    s.write(s.a, EXTENT)
    s.command(s.a, roles.demote(s.node(s.a)))
    s.until(lambda: not s.session(s.b).peer_primary)
    assert took_ms(s, lambda: s.promote(s.b)) < QUICK_MS
    assert took_ms(s, lambda: s.read(s.b, EXTENT)) < 2 * READ_LEASE_MS
    s.synced()


def word_waits_for_nothing(s: Scene) -> None:
    """A's engine died and its controller said so, or A left in order: B serves at once."""
    s.pair()
    s.write(s.a, EXTENT)
    s.run(1000)
    s.kill(s.a)
    speak(s, s.a)
    assert Flags.PEER_OUTDATED in s.on_disk(s.b).flags
    assert took_ms(s, lambda: takes_over(s)) < QUICK_MS
    s.start(s.a)
    s.synced()
    s.stop(s.b)
    s.until(lambda: Flags.PEER_OUTDATED in s.on_disk(s.a).flags)
    s.until(lambda: not s.node(s.a).changing)
    assert s.claim(s.a)
    assert took_ms(s, lambda: s.promote(s.a)) < QUICK_MS


def clock_that_stood_still(s: Scene) -> None:
    """A's whole machine was stopped, its clock as well, so that its lease looks fresh: with
    `confirm` it answers nothing before B's engine has answered an echo of that time.
    """
    s.a.settings = replace(s.a.settings, confirm_reads=True)
    s.pair()
    s.write(s.a, EXTENT)
    s.run(1000)
    life, stopped_ms = s.life(s.a), 10_000
    lease = s.node(s.a).lease
    s.until(lambda: lease.answered_number == lease.number)
    s.cut()
    s.a.pause(stopped_ms)
    now_ms, began_ms = life.now_ms, s.world.now_ms
    life.now_ms = lambda: max(began_ms, now_ms() - stopped_ms)  # type: ignore[method-assign] # it stands still
    takes_over(s)
    s.run(began_ms + stopped_ms - s.world.now_ms)
    held = reads_for(s, s.a, 300)
    assert s.node(s.a).session is not None
    assert {request.problem for request in held} == {None}


def reads_share_an_echo(s: Scene) -> None:
    """With `confirm`, many reads at once share an echo or two; one after them needs its own."""
    s.a.settings = replace(s.a.settings, confirm_reads=True)
    s.pair()
    asked = s.node(s.a).lease.number
    reads = [s.begin_read(s.a, extent) for extent in range(200)]
    s.until(lambda: all(request.acknowledged for request in reads), 50)
    shared = s.node(s.a).lease.number - asked
    assert 1 <= shared <= 5
    s.read(s.a, EXTENT)
    assert s.node(s.a).lease.number > asked + shared


def no_session_without_a_lease(s: Scene) -> None:
    """B's program knows no lease, and would serve while A still answers: they are no pair."""
    s.b.settings = replace(s.b.settings, read_lease_ms=0)
    s.start(s.a)
    s.start(s.b)
    s.until(lambda: "read lease is 0 ms" in s.node(s.a).refusal)
    s.run(5_000)
    assert not s.checker.both_synced()
