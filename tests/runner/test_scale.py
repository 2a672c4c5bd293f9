"""What large banks cost is measured, not assumed; and the choices of negatives train."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_study import PHASES, Bench, arm, result

from large_corpus import at_scale as large_corpus
from scale import at_scale
from snac_runner.bench import covered


def test_the_table_of_costs_has_a_line_for_every_size() -> None:
    lines = list(at_scale(400, rounds=1))
    columns = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert len(columns) == lines[0].count("|") - 1
    assert columns[0] == "400"
    assert columns[4] == "Flat"
    assert float(columns[2]) < 500, "ms to open"
    assert float(columns[7]) == 1


@pytest.mark.parametrize("choice", ["in_batch", "stratified"])
def test_phase_3_trains_with_negatives_of_every_choice(bench: Bench, tmp_path: Path, choice: str) -> None:
    chosen = arm(
        PHASES[0], settings={PHASES[0]: {"negatives": choice, "strata": {"ratio_easy": 0.2, "ratio_hard": 0.4}}}
    )
    folder = bench.train([chosen], tmp_path, steps=2)[PHASES[0]]
    assert result(folder)["status"] == "success"


def test_the_time_of_kernels_that_overlap_counts_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4
    assert covered([]) == 0


def test_the_table_of_a_corpus_has_a_line_for_scanning_and_one_for_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(tmp_path / "cache"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in large_corpus(1000, tmp_path / "speech")]
    assert [row[:2] for row in rows[3:]] == [["scanned", "1,000"], ["opened again", "1,000"]]
    assert float(rows[4][2]) < 2, "s to open again"
