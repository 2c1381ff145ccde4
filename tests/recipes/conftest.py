"""The inputs of the scripts, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from script_helpers import make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data in `build/smoke`; tests write elsewhere."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))
