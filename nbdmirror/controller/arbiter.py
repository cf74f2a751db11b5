"""The arbiters that have no memory: `none` and `ping`.

Owns the question "may this node go on without its peer?". What an answer of the network is worth is
judged in core/cluster/asking.py. Arbiters with a memory of their own come with a port of their own.
Must never be asked while the peer can be heard.
"""

from nbdmirror.config import Config
from nbdmirror.controller.heart import boottime_ms
from nbdmirror.controller.ping import ping_any
from nbdmirror.core.cluster.asking import Patience
from nbdmirror.core.cluster.view import Verdict
from nbdmirror.core.superblock import ArbiterKind


async def ask(config: Config, patience: Patience) -> tuple[Verdict, str]:
    """Yes or no, and a sentence why. Bounded by `ping.timeout_ms`; raises nothing."""
    if config.arbiter is ArbiterKind.NONE:
        return Verdict.YES, 'arbiter = "none" lets every node go on'
    hosts, asked_ms = config.ping.addresses, boottime_ms()
    no_echo = await ping_any(hosts, config.ping.timeout_ms)
    return patience.verdict(no_echo, hosts, config.controller.silence_ms, asked_ms)
