"""Real nodes with real controllers."""

import pytest

pytest.register_assert_rewrite("tests.support.cluster")
