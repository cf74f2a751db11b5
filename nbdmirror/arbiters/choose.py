"""Which store the configuration asks for.

Owns the name of a mirror's record, and that the libraries of a store are imported with it and not
before: they take 0.2 s and 10 to 20 MiB. Must never: be called for an arbiter without a memory.
"""

from nbdmirror.arbiters.conditional import Place
from nbdmirror.arbiters.port import RecordStore
from nbdmirror.config import Config
from nbdmirror.core.superblock import ArbiterKind
from nbdmirror.errors import ArbiterError

_EXTRAS = {ArbiterKind.S3: "s3", ArbiterKind.AZURE_BLOB: "azure"}


def open_store(config: Config, mirror_id: bytes) -> RecordStore:
    """The store of this mirror's record. Asks it nothing; takes up to half a second.

    Raises:
        ArbiterError: its libraries are not installed.
    """
    try:
        return _opened(config, mirror_id)
    except ImportError as error:
        extra = _EXTRAS.get(config.arbiter, "")
        raise ArbiterError(
            f'arbiter = "{config.arbiter.word}": a library is missing ({error}); install '
            f"nbdmirror[{extra}]"
        ) from error


def _opened(config: Config, mirror_id: bytes) -> RecordStore:
    def place(prefix: str) -> Place:
        key = f"{prefix}{config.mirror}-{mirror_id.hex()}.json"
        return Place(mirror_id, key, config.me.id)

    if config.arbiter is ArbiterKind.ETCD:
        from nbdmirror.arbiters.etcd import EtcdStore  # noqa: PLC0415 - heavy

        return EtcdStore(config.etcd, place(config.etcd.prefix))
    if config.arbiter is ArbiterKind.S3:
        from nbdmirror.arbiters.s3 import S3Store  # noqa: PLC0415 - heavy

        return S3Store(config.s3, place(config.s3.prefix))
    assert config.arbiter is ArbiterKind.AZURE_BLOB, config.arbiter
    from nbdmirror.arbiters.azure_blob import AzureBlobStore  # noqa: PLC0415 - heavy

    return AzureBlobStore(config.azure_blob, place(config.azure_blob.prefix))
