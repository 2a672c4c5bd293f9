"""Every study file that comes with the project is valid, and names strategies that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from snac_core.plugins import discover
from snac_core.settings import validated
from snac_runner.config import compose, read_values

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_study_file_is_valid(path: Path) -> None:
    values = read_values(path)
    study, arms, _ = compose(values["study"], values["arm"], str(path))
    assert study.name == path.stem
    strategies = discover().strategies
    for arm in arms:
        for name in arm.all_strategies:
            validated(strategies[name], arm.settings.get(name, {}))
