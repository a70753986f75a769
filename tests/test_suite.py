"""Tests of how the test suite is run."""

from __future__ import annotations

import pytest


def test_file_stays_in_one_process(request):
    """pytest-xdist groups tests only by group names at the ends of the tests' ids."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("not a process of pytest-xdist")
    assert request.node.nodeid.endswith("@tests/test_suite.py")
