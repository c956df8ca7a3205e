"""A cache of costs that belongs to the test."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
