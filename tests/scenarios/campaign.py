"""Kill and freeze engines at random moments under fio with verify, for as long as you like.

    python -m tests.scenarios.campaign --kills 20 [--seed 1] [--size-mib 64]

Each round: fio writes through the export (depth 16, unaligned, crc32c in every block) beside a
client that remembers what was acknowledged; at a random moment one engine is killed or frozen.
The other one goes on (after a failover: as primary), the lost one returns, both get in sync, fio
verifies what it wrote, the two images are compared. Ends with 1 at the first thing that does not
hold. Not part of CI.
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path
from time import monotonic

from tests.support.load import SLOT_BYTES, Load
from tests.support.pair import Engine, Pair

WAYS = ("kill primary", "kill secondary", "kill both", "freeze secondary", "freeze primary")
LOAD_SLOTS = 1024


class Campaign:
    """The pair, who is primary, and the dice."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.primary = pair.alpha
        self.dice = random.Random(seed)
        # One ledger for the whole campaign: what was acknowledged once has to stay.
        self.load = Load(self.primary.uri, slots=LOAD_SLOTS, depth=8, seed=seed)

    def round(self) -> str:
        """One accident; returns what it was.

        Raises:
            AssertionError, TimeoutError, RuntimeError: something did not hold.
        """
        way = self.dice.choice(WAYS)
        load = self.load.start(self.primary.uri)
        writer = self.fio("write", self.primary)
        load.wait(self.dice.randrange(50, 1500), 60)
        self.accident(way)
        if self.primary.uri == load.uri and not load.error:
            load.wait(50, 60)
            load.stop()
            assert not load.error, load.error
        else:
            load.ended()
        # Where the export went away fio ends with an error; else it has to end well, by itself.
        code = writer.wait(120)
        if "secondary" in way:
            assert code == 0, "fio saw an error although its export never went away"
            self.verify()
        self.pair.synced(60)
        self.primary.command("drain")
        self.pair.assert_equal()
        load.assert_kept(self.pair.alpha.data, self.pair.beta.data)
        return way

    def accident(self, way: str) -> None:
        """Carry it out and bring both back; the primary may be the other one afterwards."""
        primary, secondary = self.primary, self.pair.other(self.primary)
        what, who = way.split()
        if who == "secondary":
            self.lose(secondary, what)
            primary.wait_state(lambda s: s["right_alone"], "alone")
            self.bring_back(secondary, what)
        elif who == "primary":
            self.lose(primary, what)
            secondary.wait_state(lambda s: s["session"] is None, "lost")
            secondary.command("promote")
            self.primary = secondary
            if what == "freeze":
                # Its own launcher would let it go on alone: with arbiter `none` that is a split.
                primary.kill()
            primary.start()
        else:
            primary.kill()
            secondary.kill()
            primary.start()
            secondary.start()
            self.pair.synced(60)
            primary.command("promote")

    def lose(self, engine: Engine, what: str) -> None:
        """Kill or freeze."""
        if what == "kill":
            engine.kill()
        else:
            engine.freeze()

    def bring_back(self, engine: Engine, what: str) -> None:
        """Start or thaw."""
        if what == "kill":
            engine.start()
        else:
            engine.thaw()

    def fio(self, way: str, engine: Engine) -> "subprocess.Popen[bytes]":
        """fio in the part of the device behind the slots of the other client."""
        offset = LOAD_SLOTS * SLOT_BYTES
        only = ["--verify_only=1"] if way == "verify" else ["--do_verify=0"]
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
        code = self.fio("verify", self.primary).wait(120)
        assert code == 0, "fio found blocks that it had not written so"


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size-mib", type=int, default=64)
    options = parser.parse_args()
    began = monotonic()
    with Pair(size=options.size_mib << 20, engine={"on_freeze": "alone"}) as pair:
        campaign = Campaign(pair.up(), options.seed)
        for number in range(1, options.kills + 1):
            way = campaign.round()
            sys.stdout.write(f"{number:4d}  {monotonic() - began:7.1f} s  {way}: equal, kept\n")
            sys.stdout.flush()
        pair.stop()
        pair.assert_equal()
    sys.stdout.write(f"{options.kills} accidents, seed {options.seed}: all held\n")
    return 0


if __name__ == "__main__":
    assert Path("nbdmirror").is_dir(), "run it from the top of the repository"
    sys.exit(main())
