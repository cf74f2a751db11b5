"""Kill and freeze engines in turn, at random moments, under fio with verify, as long as you like.

    python -m tests.scenarios.campaign --kills 20 [--seed 1] [--size-mib 64]

Each round: fio writes through the export (depth 16, unaligned, crc32c in every block) beside a
client that remembers what was acknowledged; at a random moment one engine is killed or frozen, or
both are killed. The other one goes on (after a failover: as primary, with a load of its own), the
lost one returns, both get in sync, fio verifies what it wrote (where the export went away: writes
all of it once more first), and the two images are compared. Five rounds have each accident once,
in random order. Ends with an error at the first thing that does not hold, and says what it found
of each kind. Not part of CI.
"""

import argparse
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import monotonic

from tests.support.load import SLOT_BYTES, Load
from tests.support.pair import Engine, Pair

WAYS = ("kill primary", "kill secondary", "kill both", "freeze secondary", "freeze primary")
LOAD_SLOTS = 1024
AFTER_SLOTS = 256
FIO_OFFSET_BYTES = (LOAD_SLOTS + AFTER_SLOTS) * SLOT_BYTES
# Slow enough that it still writes when the accident comes.
FIO_RATE = "8m"
BOUND_S = 120


class Campaign:
    """The pair, who is primary, and the dice."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.primary = pair.alpha
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._deck: list[str] = []
        # One ledger each for the whole campaign: what was acknowledged once has to stay.
        self.load = Load(self.primary.uri, slots=LOAD_SLOTS, depth=8, seed=seed)
        self.after = Load(self.primary.uri, first=LOAD_SLOTS, slots=AFTER_SLOTS, seed=seed + 1)

    def round(self) -> str:
        """One accident; returns what it was.

        Raises:
            AssertionError, TimeoutError, RuntimeError: something did not hold.
        """
        if not self._deck:
            self._deck = self.dice.sample(WAYS, len(WAYS))
        way = self._deck.pop()
        served = self.primary
        load = self.load.start(served.uri)
        writer = self.fio("write", served)
        load.wait(self.dice.randrange(50, 1500), BOUND_S)
        assert writer.poll() is None, "fio was done before the accident"
        self.accident(way)
        if "secondary" in way:
            load.wait(50, BOUND_S)
            load.stop()
            assert not load.error, load.error
            assert writer.wait(BOUND_S) == 0, "fio saw an error although its export was there"
        else:
            load.ended(BOUND_S)
            assert writer.wait(BOUND_S) != 0, "fio saw no error although its export went away"
        self.pair.synced(BOUND_S)
        if "secondary" not in way:
            assert self.fio("write", self.primary).wait(BOUND_S) == 0, "fio cannot write"
        self.verify()
        self.primary.command("drain")
        self.pair.assert_equal()
        for each in (self.load, self.after):
            each.assert_kept(self.pair.alpha.data, self.pair.beta.data)
        self.counts[way] += 1
        return way

    def accident(self, way: str) -> None:
        """Carry it out and bring both back; the primary may be the other one afterwards."""
        what, who = way.split()
        if who == "secondary":
            self.lose_secondary(what)
        elif who == "primary":
            self.lose_primary(what)
        else:
            self.lose_both()

    def lose_secondary(self, what: str) -> None:
        """The primary goes on alone, and what it wrote is copied."""
        primary, secondary = self.primary, self.pair.other(self.primary)
        self.lose(secondary, what)
        primary.wait_state(lambda s: s["frozen"], "frozen", BOUND_S)
        primary.command("alone")
        self.load.wait(50, BOUND_S)
        if what == "kill":
            secondary.start()
        else:
            secondary.thaw()

    def lose_primary(self, what: str) -> None:
        """The other one takes over and is written to; one that wakes up has to be demoted."""
        lost, primary = self.primary, self.pair.other(self.primary)
        self.lose(lost, what)
        primary.wait_state(lambda s: s["session"] is None, "lost", BOUND_S)
        primary.command("promote")
        self.primary = primary
        self.after.start(primary.uri).wait(100, BOUND_S)
        if what == "kill":
            lost.start()
        else:
            lost.thaw()
            lost.wait_state(lambda s: s["frozen"], "the woken one freezes", BOUND_S)
            lost.command("demote")
        self.pair.synced(BOUND_S)
        self.after.wait(50, BOUND_S)
        self.after.stop()
        assert not self.after.error, self.after.error

    def lose_both(self) -> None:
        """Neither may go on without the other: they meet, and the same one is promoted again."""
        self.primary.kill()
        self.pair.other(self.primary).kill()
        for engine in self.pair.both:
            engine.start()
        self.pair.synced(BOUND_S)
        self.primary.command("promote")

    def lose(self, engine: Engine, what: str) -> None:
        """Kill or freeze."""
        if what == "kill":
            engine.kill()
        else:
            engine.freeze()

    def fio(self, way: str, engine: Engine) -> "subprocess.Popen[bytes]":
        """fio in the part of the device behind the slots of the other client."""
        offset = FIO_OFFSET_BYTES
        only = ["--verify_only=1"]
        if way == "write":
            only = ["--do_verify=0", f"--rate={FIO_RATE}"]
        return subprocess.Popen(
            [
                "fio", "--name=campaign", "--ioengine=nbd", f"--uri={engine.uri}",
                "--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=1", "--iodepth=16",
                f"--offset={offset}", f"--size={self.pair.size // 2 - offset}", "--verify=crc32c",
                "--verify_fatal=1", "--fsync=64", "--randseed=42", "--serialize_overlap=1",
                f"--aux-path={self.pair.root}", *only,
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.pair.root,
        )  # fmt: skip

    def verify(self) -> None:
        """Let fio read back what it wrote."""
        code = self.fio("verify", self.primary).wait(BOUND_S)
        assert code == 0, "fio found blocks that it had not written so"


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size-mib", type=int, default=64)
    options = parser.parse_args()
    began = monotonic()
    with Pair(size=options.size_mib << 20) as pair:
        campaign = Campaign(pair.up(), options.seed)
        for number in range(1, options.kills + 1):
            way = campaign.round()
            sys.stdout.write(f"{number:4d}  {monotonic() - began:7.1f} s  {way}: equal, kept\n")
            sys.stdout.flush()
        pair.stop()
        pair.assert_equal()
    for way, count in sorted(campaign.counts.items()):
        sys.stdout.write(f"{count:4d}  {way}\n")
    acknowledged = campaign.load.count + campaign.after.count
    sys.stdout.write(
        f"{options.kills} accidents, seed {options.seed}, {monotonic() - began:.0f} s, "
        f"{acknowledged} acknowledged writes in the ledger: all held\n"
    )
    return 0


if __name__ == "__main__":
    assert Path("nbdmirror").is_dir(), "run it from the top of the repository"
    sys.exit(main())
