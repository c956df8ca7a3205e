"""Data sets on disk."""

import pytest
from datafiles import write_tiny


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path)
