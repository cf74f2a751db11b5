"""Two nodes whose configuration files say different things."""

import re

import pytest

from nbdmirror.errors import RefusedError
from tests.support.cluster import Cluster

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def test_a_node_with_another_configuration_is_not_started() -> None:
    """Breaks in the field: after a takeover the application is started as nobody has it any more,
    and what differs is found out in the middle of the night.
    """
    with Cluster() as c:
        c.create()
        text = c.beta.config_path.read_text()
        c.beta.config_path.write_text(f'{text}\n[mount]\ntype = "xfs"\n')
        c.alpha.up()
        c.alpha.order("start")  # before it can know
        c.beta.up()
        c.alpha.is_now("ALONE")
        wanted = 'mount.type: here "xfs", there "ext4"'
        c.beta.wait(lambda s: s["peer"]["config_differences"] == [wanted], "what differs is known")
        with pytest.raises(RefusedError, match=re.escape(wanted)):
            c.beta.order("start")
        assert c.beta.status()["role"] == "STOP"
        c.beta.config_path.write_text(text)
        c.beta.kill()
        c.beta.up()
        c.beta.order("start")
        c.in_sync(c.alpha)
        assert c.beta.status()["peer"]["config_differences"] == []
