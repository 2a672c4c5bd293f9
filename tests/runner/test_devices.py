"""Precision of devices, and errors of one process among several."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from small_study import PHASES

from snac_core import ConditionedCodec
from snac_core.testing import small_codec
from snac_runner.config import StudySettings
from snac_runner.devices import device_named
from snac_runner.distributed import ProcessLost, _reaching_others
from snac_runner.run_result import hardware
from snac_runner.train_step import computing


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Iterator[None]:
    tf32, handler = torch.backends.cudnn.allow_tf32, signal.getsignal(signal.SIGTERM)
    yield
    torch.backends.cudnn.allow_tf32 = tf32
    signal.signal(signal.SIGTERM, handler)


def test_convolutions_are_exact_except_in_the_steps_of_a_study_with_another_precision() -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    device_named("cpu")
    model = ConditionedCodec(small_codec(), [PHASES[2]], speaker_dim=8)
    for precision, tf32 in {"fp32": False, "tf32": True, "bf16": True}.items():
        with computing(model, StudySettings(precision=precision)):  # type: ignore[arg-type]
            assert torch.backends.cudnn.allow_tf32 == tf32
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"


def test_too_little_memory_is_not_called_a_lost_process() -> None:
    with pytest.raises(torch.OutOfMemoryError), _reaching_others():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ProcessLost), _reaching_others():
        raise RuntimeError("Connection closed by peer")


def test_a_run_on_the_cpu_has_no_gpu() -> None:
    assert "gpu" not in hardware(torch.device("cpu"))
