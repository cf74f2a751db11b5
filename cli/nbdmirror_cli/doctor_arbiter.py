"""The check of `nbdmirror doctor` that asks the store of an arbiter with a memory.

Owns what this machine has to find there. Must never write: whether this node could claim is what
its controller proves, every minute.
"""

from nbdmirror import admin
from nbdmirror.config import Config
from nbdmirror.errors import ArbiterError, NbdMirrorError
from nbdmirror_cli.doctor import FAIL, OK, WARN, Finding
from nbdmirror_cli.options import Source

WHAT = "arbiter"


def store(source: Source) -> Finding:
    """Whether the store answers, is the one that the mirror was made with, and has its record."""
    try:
        config = source.load(with_key=True)
        identity, record = admin.look_at_store(config)
    except ArbiterError as error:
        remedy = "without it no node goes on alone: mend the way there, or its table in the file"
        return Finding(WHAT, FAIL, str(error), remedy)
    except NbdMirrorError as error:
        return Finding(WHAT, FAIL, str(error), "mend the configuration or the key first")
    agreed = _agreed(config)
    if agreed and identity != agreed:
        what = "this is not the store that the mirror was created with"
        return Finding(WHAT, FAIL, what, "put its address right; docs/arbiters.md")
    if record is None:
        what = "it answers, and holds no record of this mirror"
        return Finding(WHAT, WARN, what, "create the mirror; or, if it lost it: `nbdmirror resync`")
    owner = f"node {record.owner} owns" if record.owner else "both nodes share"
    return Finding(WHAT, OK, f"it answers; {owner} the record, counter {record.counter}")


def _agreed(config: Config) -> str:
    """The store's identity in the metadata of this node, "" if there is none yet."""
    try:
        return str(admin.show(config.metadata_file)["arbiter_identity"])
    except NbdMirrorError:
        return ""
