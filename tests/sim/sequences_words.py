"""Sequences of leaving by way of the controllers: for an engine that was killed, or without a link.

A is primary, B secondary, in sync; W is a write acknowledged by both and flushed by nobody. Each
function is one sequence; its docstring is what must come out.
"""

from nbdmirror.core import roles
from nbdmirror.core.leave import Word
from nbdmirror.core.node import Role
from nbdmirror.core.superblock import DataState, Flags
from tests.sim.host import Host
from tests.sim.sequences_scene import Scene


def speak(s: Scene, host: Host) -> None:
    """The controller of a killed engine says for it what is to be said; until it has."""
    s.sim.words.begin(host)
    s.until(lambda: host.speaker is None and not s.node(host.peer).changing)


def word(s: Scene, host: Host) -> Word:
    """The answer of a node that it stays, for one of its own generation."""
    generation = s.on_disk(host).generation
    said = roles.stay_word(s.node(host), generation)
    assert said["stay"], said
    return Word(generation, int(str(said["session"]), 16))


def words_for_a_killed_primary(s: Scene) -> None:
    """A is killed: it is behind, durably, before B goes on, and returns as its target."""
    s.pair()
    first = s.write(s.a, 5)
    s.kill(s.a)
    speak(s, s.a)
    assert s.on_disk(s.a).data_state is DataState.OUTDATED
    assert Flags.PEER_OUTDATED in s.on_disk(s.b).flags
    if s.sim.arbiter is not None:
        assert s.claim(s.b)
    s.promote(s.b)
    second = s.write(s.b, 6)
    s.start(s.a)
    s.synced()
    assert s.leads(s.b)
    s.both_have(first, second)


def words_for_a_claim(s: Scene) -> None:
    """The same with an arbiter: the record lets B go on, and A not."""
    words_for_a_killed_primary(s)


def words_make_durable(s: Scene) -> None:
    """W is on B's disk before B relies on the word that A is behind."""
    s.pair()
    first = s.write(s.a, 5)
    s.kill(s.a)
    speak(s, s.a)
    assert Flags.PEER_OUTDATED in s.on_disk(s.b).flags
    assert s.has(s.b, first, durable=True)


def no_word_from_another_life(s: Scene) -> None:
    """B lost W with its power since: it does not stay for A, which is not marked as behind."""
    s.pair()
    first = s.write(s.a, 5)
    s.cut()
    s.power(s.b)
    s.start(s.b)
    s.kill(s.a)
    speak(s, s.a)
    assert s.on_disk(s.a).data_state is DataState.UPTODATE
    assert Flags.PEER_OUTDATED not in s.on_disk(s.b).flags
    s.heal()
    s.start(s.a)
    s.synced()
    s.both_have(first)


def no_word_about_another_line(s: Scene) -> None:
    """A has gone on alone: B, which was in sync until then, does not stay for that line."""
    s.pair()
    s.part()
    s.alone(s.a)
    s.write(s.a, 5)
    theirs = s.on_disk(s.a).generation
    s.kill(s.a)
    assert not roles.stay_word(s.node(s.b), theirs)["stay"]
    speak(s, s.a)
    assert s.on_disk(s.a).data_state is DataState.UPTODATE


def secondary_leaves_without_a_link(s: Scene) -> None:
    """A is frozen and asks: B leaves, and A answers its clients without a decision of anybody."""
    s.pair()
    s.part()
    pending = s.begin_write(s.a, 5)
    s.run(200)
    assert pending.problem is None
    s.begin(s.b, s.sim.words.leave(s.life(s.b)))
    s.until(lambda: pending.acknowledged)
    assert s.on_disk(s.b).data_state is DataState.OUTDATED
    assert s.node(s.a).right
    s.heal()
    s.synced()
    s.both_have(pending)


def both_asked_without_a_link(s: Scene) -> None:
    """Both are asked to leave at once, and both have answered that they stay: neither leaves."""
    s.pair()
    s.command(s.a, roles.demote(s.node(s.a)))
    s.part()
    words = [word(s, host) for host in (s.a, s.b)]
    for host, said in zip((s.a, s.b), reversed(words), strict=True):
        assert "stays itself" in s.refused(host, roles.leave_for_peer(s.node(host), said))
        assert s.on_disk(host).data_state is DataState.UPTODATE
    s.heal()
    s.synced()


def word_that_comes_too_late(s: Scene) -> None:
    """The link was back when B heard that A is behind: nothing is stored, and nobody goes alone."""
    s.pair()
    first = s.write(s.a, 5)
    s.kill(s.a)
    said = word(s, s.b)
    s.start(s.a)
    s.synced()
    assert "earlier moment" in s.refused(s.b, roles.peer_has_left(s.node(s.b), said))
    assert not s.node(s.b).right
    s.both_have(first)


def next_engine_waits_for_the_words(s: Scene) -> None:
    """The lock is held until all is said: no engine starts before, and the next one is behind."""
    s.pair()
    s.kill(s.a)
    s.sim.words.begin(s.a)
    s.a.start()
    assert s.a.life is None
    s.until(lambda: s.a.life is not None and s.a.life.ready)
    s.synced()
    assert s.told("A is marked as behind")
    assert s.node(s.a).role is not Role.PRIMARY
