"""Mutants of what a controller does at an arbiter with a memory: rules 9, 11 and 21."""

from typing import Final

from tests.sim.mutants.mutant import Mutant, core

MEMORY: Final = ("memory",)
# The engine itself stores no claim that the record answers with no.
ENGINE_REFUSES: Final = core(
    "claims",
    "    if record not in (*record_may_hold(node), node.sb.pending):\n",
    "    if node.stopping:\n",
)

ARBITER: Final = (
    Mutant(
        "claim-without-fence", 11,
        "a swap that was given up arrives later, and the record names what nobody holds any more",
        core("cluster/claiming",
             "        if not always and self._in_doubt not in (held.version, EARLIER_LIFE):\n",
             "        if not always:\n"),
        arbiters=MEMORY,
    ),
    Mutant(
        "settled-without-fence", 11,
        "a claim counts as lost while it may still be applied, and the node meets its peer",
        core("cluster/claiming",
             "            held = yield from self._fence(held, always=True)\n",
             "            pass\n"),
        arbiters=MEMORY,
    ),
    Mutant(
        "no-answer-is-no", 11,
        "a claim whose answer was lost counts as lost, and the record names this node",
        core("cluster/claiming",
             "        done = bool((yield Swap(held, record)))\n",
             "        try:\n            done = bool((yield Swap(held, record)))\n"
             "        except ArbiterError:\n            done = False\n"),
        arbiters=MEMORY,
    ),
    Mutant(
        "claims-whatever-it-holds", 11,
        "a node takes the right from a peer that went on alone",
        core("cluster/claiming",
             "        return record.owner == NOBODY and record.generation.hex() in holds\n",
             "        return True\n"),
        arbiters=MEMORY, defence=ENGINE_REFUSES,
    ),
    Mutant(
        "claims-what-it-does-not-hold", 11,
        "a node that lacks a generation takes the right from it",
        core("cluster/claiming",
             "        return record.owner == NOBODY and record.generation.hex() in holds\n",
             "        return record.owner == NOBODY\n"),
        arbiters=MEMORY, defence=ENGINE_REFUSES,
    ),
    Mutant(
        "won-without-being-named", 11,
        "a claim counts as won although the record changed before it was applied",
        core("cluster/claiming",
             "        won = record.names(self._me, wanted)\n        yield from claimed(wanted",
             "        won = True\n        yield from claimed(wanted"),
        arbiters=MEMORY,
    ),
    Mutant(
        "joint-told-and-not-recorded", 9,
        "(b) is told and not done: the record still names the source, which may claim again",
        core("cluster/claiming",
             "            record = self._after(record, state, joint, NOBODY)\n"
             "            if not (yield from self._swap(held, record)):\n",
             "            record = self._after(record, state, joint, NOBODY)\n"
             "            if held is None:\n"),
        arbiters=MEMORY,
    ),
)  # fmt: skip
