"""An engine that cannot start says so in one line and ends; it hangs never and deletes nothing."""

import pytest

from nbdmirror.errors import RefusedError
from tests.support.fixtures import MakePair
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


@pytest.fixture
def created(make_pair: MakePair) -> Pair:
    """A pair whose files are made and whose engines do not run."""
    return make_pair().create()


@pytest.mark.parametrize("victim", ["data", "meta", "key"])
def test_a_file_in_the_sockets_place_is_not_deleted(created: Pair, victim: str) -> None:
    """Breaks in the field: a slip in export.unix deletes the only copy, or the key."""
    alpha = created.alpha
    config = alpha.config
    path = {"data": config.data_file, "meta": config.metadata_file, "key": created.root / "key"}
    victim_path = path[victim]
    before = victim_path.stat()
    # Under another name, which no comparison of paths in the configuration can see.
    name = created.root / "a-name"
    name.hardlink_to(victim_path)
    alpha.config_path.write_text(created.config_text("alpha") + f'[export]\nunix = "{name}"\n')
    assert alpha.start_refused() == RefusedError.exit_code
    assert f"{name} is there and is no socket" in alpha.log()
    assert name.stat().st_ino == before.st_ino, "it has its name still"
