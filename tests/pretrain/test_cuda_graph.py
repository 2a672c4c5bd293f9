"""CUDA graphs replay the steps they captured; the segment for the discriminators depends on the step only."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_runner.data.corpus import Corpus
from snac_runner.distributed import DistributedContext
from snac_runner.pretrain.cuda_graph import CudaGraphStep, StepInputs
from snac_runner.pretrain.data import SpeechMix
from snac_runner.pretrain.optimizer import adamw, load_optimizer_state, set_learning_rate
from snac_runner.pretrain.pretrain import pretrain
from snac_runner.pretrain.settings import Augmentation
from snac_runner.pretrain.step import Diverged, TrainingState

from .conftest import SMALL
from .test_loop import quick


def training_state(small: str, speech: Path, device: str = "cpu", **changes: object) -> TrainingState:
    torch.manual_seed(0)
    return TrainingState(
        SNAC.from_config(SMALL), quick(small, speech, **changes), DistributedContext(torch.device(device))
    )


def mix(corpus: Corpus) -> SpeechMix:
    return SpeechMix([(corpus, 1.0)], 8000, 1280, 2, Augmentation(), seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_steps_equal_eager_steps(small: str, speech: Path, corpus: Corpus, tmp_path: Path) -> None:
    """With level dropout, the warm-up of the discriminators, restarted entries, and a loaded checkpoint."""
    adversary = {"start_step": 2, "warmup_steps": 30, "periods": (2,), "n_ffts": (256,), "period_channels": 2}
    ends = []
    for graphs in (False, True):
        state = training_state(
            small, speech, "cuda", steps=40, graphs=graphs, bf16=False, compile=False, adversary=adversary
        )
        for _ in range(15):
            state.train_step(mix(corpus))
        state.save(tmp_path / f"{graphs}.pt")
        state.load(tmp_path / f"{graphs}.pt")
        terms = [state.train_step(mix(corpus)) for _ in range(15)]
        assert (state.cuda_graph is not None and state.cuda_graph.captured is not None) == graphs
        ends.append({name: float(value) for name, value in terms[-1].items()})
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def test_inputs_are_copied_to_the_captured_tensors_and_each_set_has_its_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fake graph records the tensors that it was captured with at each replay."""
    given: list[StepInputs] = []

    class Graph:
        def replay(self) -> None:
            given.append(recorded[-1])

    recorded: list[StepInputs] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: nullcontext())

    def work(inputs: StepInputs) -> str:
        recorded.append(inputs)
        return f"result {len(recorded)}"

    replay = CudaGraphStep(work)
    plain = [replay(StepInputs(torch.full((1, 1, 2), float(step)))) for step in range(8)]
    assert plain == [*(f"result {n}" for n in (1, 2, 3, 4, 5)), *3 * ["result 6"]]  # five eager calls, one capture
    assert all(inputs is recorded[5] for inputs in given)
    assert recorded[5].audio.tolist() == [[[7.0, 7.0]]]
    with_discriminators = [
        replay(StepInputs(torch.zeros(1, 1, 2), adversary_weight=torch.tensor(0.1 * step))) for step in range(7)
    ]
    assert with_discriminators[-2:] == 2 * ["result 12"]
    assert recorded[-1].adversary_weight is not None
    assert float(recorded[-1].adversary_weight) == pytest.approx(0.6)


def test_the_segment_of_the_discriminators_depends_on_the_step_only(
    small: str, speech: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments: list[Tensor] = []
    adversary = {"start_step": 0, "periods": (2,), "n_ffts": (256,), "period_channels": 2, "spectral_channels": 2}
    state = training_state(small, speech, adversary={**adversary, "seconds": 0.08})
    assert state.discriminators is not None
    state.discriminators.register_forward_pre_hook(lambda _, args: segments.append(args[0].detach()))
    for _ in range(3):
        state.train_step(mix(corpus))
    assert {tuple(audio.shape) for audio in segments} == {(2, 1, 640)}
    starts = []
    for step in range(3):
        real = segments[2 * step]
        windows = mix(corpus).at(step).unfold(-1, 640, 1)  # (2, 1, starts, 640)
        starts.append(int((windows == real.unsqueeze(2)).all(-1).all(0).flatten().nonzero()))
    assert len(set(starts)) > 1
    segments.clear()
    state.step = 1  # again
    state.train_step(mix(corpus))
    assert torch.equal(segments[0], mix(corpus).at(1)[..., starts[1] : starts[1] + 640])


@pytest.mark.parametrize("seconds", [0.5, 0.001])
def test_a_segment_longer_than_a_crop_or_too_short_is_refused(
    seconds: float, small: str, speech: Path, tmp_path: Path
) -> None:
    settings = quick(small, speech, adversary={"n_ffts": (256,), "seconds": seconds})
    with pytest.raises(UserError, match=r"these discriminators need 0\.016 s, and a crop has 0\.16"):
        pretrain(settings, tmp_path / "run")
    with pytest.raises(UserError, match="an adversary without discriminators"):
        pretrain(quick(small, speech, adversary={"n_ffts": (), "periods": ()}), tmp_path / "run")
    with pytest.raises(ValidationError, match="periods"):
        quick(small, speech, adversary={"periods": (0,)})


def test_an_optimizers_state_moves_between_devices_and_its_device_options_do_not() -> None:
    layer = torch.nn.Linear(2, 2)
    mine, other = adamw(layer, 0.0), adamw(layer, 0.0)
    state = other.state_dict()
    for group in state["param_groups"]:  # as a CUDA device has them
        group |= {"lr": torch.tensor(0.5), "fused": True, "capturable": True}
    load_optimizer_state(mine, state)
    for group in mine.param_groups:
        assert (group["lr"], group["fused"], group["capturable"]) == (0.0, None, False)
    set_learning_rate(mine, 0.1)
    assert {group["lr"] for group in mine.param_groups} == {0.1}


def test_nothing_is_saved_after_a_gradient_that_was_not_finite(small: str, speech: Path, tmp_path: Path) -> None:
    state = training_state(small, speech)
    state.finite.fill_(False)  # as after a replayed step
    with pytest.raises(Diverged, match="not finite"):
        state.save(tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()
