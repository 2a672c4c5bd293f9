"""Several processes train one codec: equal weights everywhere, one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snac_core.errors import UserError
from snac_runner.distributed import DistributedContext, distributed_context

SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from snac_runner.pretrain.settings import PretrainSettings
from snac_runner.distributed import distributed_context
from snac_runner.pretrain.step import TrainingState
from snac_core.codec import SNAC
from snac_core.seeding import generator
codec, settings = json.loads(sys.argv[1])

class Noise:
    def __init__(self, rank): self.rank = rank
    def at(self, step): return 0.1 * torch.randn(2, 1, 1280, generator=generator(self.rank, step))

torch.manual_seed(0)
with distributed_context("cpu") as context:
    state = TrainingState(SNAC(**codec), PretrainSettings(**settings), context)
    for _ in range(4):
        state.train_step(Noise(context.rank))
    print(context.rank, context.world, state.codec.digest)
"""


def test_without_torchrun_there_is_one_process_and_it_writes() -> None:
    with distributed_context("cpu") as context:
        assert (context.rank, context.world, context.first) == (0, 1, True)
        gradient = torch.ones(3)
        context.average([gradient])
        assert torch.equal(gradient, torch.ones(3))
        assert "CPU" in context.describe()


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="unknown device 'abacus'"), distributed_context("abacus"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no such device"), distributed_context("cuda"):
            pass
    assert DistributedContext(torch.device("cpu"), rank=1, world=2).first is False


@pytest.mark.slow
def test_processes_with_different_speech_end_with_the_same_weights(small: str, tmp_path: Path) -> None:
    settings = {
        "quantizer": {"unquantized_steps": 1, "blend_steps": 1, "kmeans_batches": 2, "restart_every": 2},
        "adversary": {
            "start_step": 1,
            "warmup_steps": 1,
            "periods": [2],
            "n_ffts": [256],
            "period_channels": 2,
            "spectral_channels": 2,
        },
    }
    arguments = json.dumps([json.loads(Path(small).read_text()), settings])
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        arguments,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = sorted(line.split() for line in done.stdout.splitlines() if line.count(" ") == 2)
    assert [line[:2] for line in lines] == [["0", "2"], ["1", "2"]]
    assert lines[0][2] == lines[1][2]
