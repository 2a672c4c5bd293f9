"""The distance to another recording of the same words depends on their sound and their order, not on their timing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from snac_core.augment import resample_by
from snac_core.losses import aligned_distance, alignment

RATE = 8000


def sung(notes: list[float], seconds: float = 0.15) -> Tensor:
    """Two harmonics a note, one after the other: (1, 1, T)."""
    time = torch.arange(int(seconds * RATE)) / RATE
    waves = [0.1 * (torch.sin(2 * math.pi * n * time) + 0.5 * torch.sin(4 * math.pi * n * time)) for n in notes]
    return torch.cat(waves).view(1, 1, -1)


TUNE = sung([300, 700, 450, 1100])


def distance(estimate: Tensor, target: Tensor) -> float:
    return float(aligned_distance(estimate, target, torch.tensor([target.shape[-1]]), RATE))


def test_a_part_of_the_target_is_found_wherever_it_lies() -> None:
    whole = torch.cat([sung([900, 200]), TUNE, sung([500, 1300])], dim=-1)
    assert distance(TUNE, TUNE) < 0.01
    assert distance(TUNE, whole) < 0.1
    assert distance(sung([1100, 450, 700, 300]), whole) > 5 * distance(TUNE, whole), "in its order only"


def test_other_timing_costs_little_and_other_sounds_much() -> None:
    slower = sung([300, 700, 450, 1100], 0.25)
    assert distance(TUNE, slower) < 0.15
    higher = resample_by(sung([300, 700, 450, 1100], 0.25), torch.tensor([1.4]), TUNE.shape[-1])
    assert distance(TUNE, higher) > 2 * distance(TUNE, slower)


def test_padding_and_items_without_a_target_count_for_nothing() -> None:
    two = torch.cat([TUNE, TUNE])
    padded = torch.nn.functional.pad(two, (0, 4000))
    found = aligned_distance(two, padded, torch.tensor([TUNE.shape[-1], 0]), RATE)
    assert float(found[0]) == pytest.approx(distance(TUNE, TUNE), abs=0.02)
    assert float(found[1]) == 0


def test_the_gradient_is_that_of_finite_differences() -> None:
    estimate = (sung([300, 800]) + 0.02 * torch.randn(1, 1, 2400)).double().requires_grad_(True)
    target, way = TUNE.double(), torch.randn(1, 1, 2400, dtype=torch.float64)
    lengths = torch.tensor([TUNE.shape[-1]])
    (grad,) = torch.autograd.grad(aligned_distance(estimate, target, lengths, RATE).sum(), estimate)
    with torch.no_grad():
        ahead, behind = (aligned_distance(estimate + e * way, target, lengths, RATE) for e in (1e-7, -1e-7))
    assert float((grad * way).sum()) == pytest.approx(float(ahead - behind) / 2e-7, rel=1e-3)


def test_frames_are_matched_to_the_same_note_in_another_recording() -> None:
    hop = 80
    whole = torch.cat([sung([900, 200]), sung([300, 700, 450, 1100], 0.25)], dim=-1)
    (path,) = alignment(TUNE, whole, torch.tensor([whole.shape[-1]]), RATE, hop=hop)
    assert path.shape == (TUNE.shape[-1] // hop,)
    assert bool((path.diff() >= 0).all())
    middles = [round((n + 0.5) * 0.15 * RATE / hop) for n in range(4)]
    expected = [(2 * 0.15 + (n + 0.5) * 0.25) * RATE / hop for n in range(4)]
    for frame, middle in zip(path[middles].tolist(), expected, strict=True):
        assert frame == pytest.approx(middle, abs=0.1 * RATE / hop)


def test_what_colours_all_of_a_recording_does_not_move_the_alignment() -> None:
    lengths = torch.tensor([TUNE.shape[-1]])
    duller = torch.nn.functional.conv1d(TUNE, torch.full((1, 1, 3), 1 / 3), padding=1)
    plain, coloured = (alignment(TUNE, other, lengths, RATE, hop=80) for other in (TUNE, 0.1 * duller))
    assert int((plain - coloured).abs().max()) < 0.5 * 0.15 * RATE / 80, "a note stays with its note"
