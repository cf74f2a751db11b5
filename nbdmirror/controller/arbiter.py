"""The arbiters that have no memory: `none` and `ping`.

Owns the question "may this node go on without its peer?". Those with a memory come with a port of
their own. Must never be asked while the peer can be heard.
"""

from nbdmirror.config import Config
from nbdmirror.controller.ping import ping_any
from nbdmirror.core.cluster.view import Verdict
from nbdmirror.core.superblock import ArbiterKind


async def ask(config: Config) -> tuple[Verdict, str]:
    """Yes or no, and a sentence why. Bounded by `ping.timeout_ms`; raises nothing."""
    if config.arbiter is ArbiterKind.NONE:
        return Verdict.YES, 'arbiter = "none" lets every node go on'
    hosts = config.ping.addresses
    silence = await ping_any(hosts, config.ping.timeout_ms)
    if silence:
        return Verdict.NO, silence
    return Verdict.YES, f"the network is there: one of {', '.join(hosts)} answers"
