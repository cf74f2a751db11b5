"""Pairs whose arbiter has a memory; the record is the test's, kept by the commands of a controller.

Owns what a controller would do for such a pair, with a record that always says yes. Must never be
where a test asks whether a claim may be won.
"""

from dataclasses import replace

from nbdmirror.core.superblock import ArbiterKind, choose
from nbdmirror.metastore import FileMetaStore
from tests.support.pair import Engine, Pair


def remember(pair: Pair) -> None:
    """Let the arbiter of both nodes have a memory; before they start."""
    for engine in pair.both:
        meta = FileMetaStore.open(engine.config.metadata_file)
        sb = choose(*meta.read_slots()).superblock
        meta.write_superblock(replace(sb, arbiter=ArbiterKind.ETCD, sequence=sb.sequence + 1))
        meta.close()


def up(pair: Pair) -> Pair:
    """Create, start both, promote alpha, and wait until the two are in sync."""
    pair.create()
    remember(pair)
    for engine in pair.both:
        engine.start()
    pair.alpha.command("promote")
    record_joint(pair.alpha)
    pair.synced()
    return pair


def record_joint(engine: Engine) -> None:
    """Part (b) of the joint step, as soon as it is asked for."""
    asked = engine.wait_state(lambda s: s["question"] == "record-joint", "the joint step")
    engine.command("recorded", generation=asked["pending"])


def take_over(engine: Engine) -> None:
    """A claim from what both hold, which is won, and then the role."""
    record = engine.state()["generation"]
    claim = engine.command("claim", generation=record)["generation"]
    engine.command("claimed", generation=claim, won=True)
    engine.command("promote")
