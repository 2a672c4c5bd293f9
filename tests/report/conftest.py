"""A simulated study, written once for the tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated_study import write_study


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 arms x 2 seeds, 40 conversions to 10 target speakers, with its report built."""
    from snac_runner.report.page import build

    folder = write_study(tmp_path_factory.mktemp("studies") / "simulated")
    build(folder)
    return folder
