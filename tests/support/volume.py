"""What clients of a mirror's volume do in tests: write and read a MiB, or write all the time."""

from tests.support.cluster import ClusterNode
from tests.support.load import Load


def write(node: ClusterNode, byte: bytes, offset: int = 0) -> None:
    """One MiB of one byte, flushed."""
    client = node.connect()
    client.pwrite(byte * (1 << 20), offset)
    client.flush()
    client.shutdown()


def read(node: ClusterNode, offset: int = 0) -> bytes:
    """The byte that fills this MiB."""
    client = node.connect()
    data = bytes(client.pread(1 << 20, offset))
    client.shutdown()
    assert data == data[:1] * len(data)
    return data[:1]


def begin(node: ClusterNode) -> Load:
    """A client that writes on this node."""
    load = Load(f"nbd+unix:///?socket={node.config.export_unix}", first=1, slots=256)
    load.start().wait(50)
    return load
