"""Fixtures that more than one test file needs."""

from __future__ import annotations

import os
from pathlib import Path

# Networks of a few thousand parameters gain nothing by a second thread, and on busy cores lose a lot by waiting for it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def librispeech_mini() -> Path:
    """The folder of real speech that some tests listen to; they are skipped where it is not at hand."""
    root = Path(os.environ.get("SNAC_SPEECH", REPOSITORY.parent / "shared" / "data" / "librispeech_mini"))
    if not root.is_dir():
        pytest.skip("needs librispeech_mini speech (set SNAC_SPEECH to a folder of real speech)")
    return root


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)
