"""A batch in parts, in the runner: on several processes, accumulated, in lower precision, with less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_study import PHASES, Bench, arm, plugin, records, result, weights

from snac_core.errors import UserError
from snac_runner.arm import Arm
from snac_runner.cli.launch import check_devices
from snac_runner.distributed import ALONE, DistributedContext, distributed_context
from snac_runner.logs import read_metrics
from snac_runner.resources import StudyResources
from snac_runner.train_step import computing, out_of_memory, train_step

NAN_ON_ONE = """
    @hookimpl
    def loss(self, step):
        term = step.converted.audio.square().mean()
        return {"power": term * float("nan") if step.index == 2 and int(step.rows[0]) > 0 else term}
"""
TWO = 2  # processes


def in_processes(bench: Bench, out: Path, *more: object, cache: Path) -> subprocess.CompletedProcess[str]:
    """`runner train --devices 2` of the small study, without evaluation."""
    command = ["train", "--out", out, *bench.options(steps=3, dev_pairs=0, test_pairs=0, batch_size=3), *more]
    environment = {**os.environ, "SNAC_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "snac_runner", *map(str, command), "--device", "cpu", "--devices", "2"],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip


def test_two_processes_give_the_run_that_one_gives(bench: Bench, tmp_path: Path, cache: Path) -> None:
    alone = bench.train([arm(PHASES[2])], tmp_path, steps=3, dev_pairs=0, test_pairs=0)[PHASES[2]]
    together = tmp_path / "together"
    done = in_processes(bench, together, "--strategy", PHASES[2], cache=cache)
    assert done.returncode == 0, done.stderr
    assert result(together)["status"] == "success"
    ours, theirs = weights(alone), weights(together)
    assert ours.keys() == theirs.keys()
    for record, other in zip(*(read_metrics(run / "metrics.jsonl") for run in (alone, together)), strict=True):
        for name in ("loss", "voice_conversion/recon", "phase6_encoder_adapter/commitment", "spk_vc"):
            assert other[name] == pytest.approx(record[name], rel=1e-6, abs=1e-6), name
    hashes = [json.loads((run / "config.json").read_text())["hash"] for run in (alone, together)]
    assert hashes[0] == hashes[1], "the report cannot tell them apart"


@pytest.mark.slow
def test_nan_on_one_process_fails_the_arm_on_all_and_names_the_process(
    bench: Bench, tmp_path: Path, cache: Path
) -> None:
    file = plugin(tmp_path, "sometimes_nan", NAN_ON_ONE)
    done = in_processes(bench, tmp_path / "run", "--strategy", "sometimes_nan", "--plugin", file, cache=cache)
    assert done.returncode == 2
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "NaN or infinite loss at step 2, in sometimes_nan/power, on process 1 of 2" in error
    assert result(tmp_path / "run")["status"] == "failed"


def test_more_parts_than_items_are_refused(bench: Bench) -> None:
    few = StudyResources(bench.study(batch_size=3, accumulate=4), bench.resources(bench.study()).catalogue)
    with pytest.raises(UserError, match=r"3 items cannot be divided into 4 parts .*batch_size of at least 4"):
        _ = few.parts
    many = DistributedContext(torch.device("cpu"), rank=3, world=4)
    with pytest.raises(UserError, match=r"into 4 parts \(4 device\(s\) x accumulate = 1\)"):
        _ = StudyResources(bench.study(batch_size=3), few.catalogue, context=many).parts


@pytest.mark.parametrize(("size", "world", "accumulate"), [(8, 2, 2), (7, 3, 1), (5, 1, 5), (6, 4, 1)])
def test_the_parts_of_all_processes_are_the_batch(bench: Bench, size: int, world: int, accumulate: int) -> None:
    catalogue = bench.resources(bench.study()).catalogue
    items: list[int] = []
    for rank in range(world):
        context = DistributedContext(torch.device("cpu"), rank, world)
        study = bench.study(batch_size=size, accumulate=accumulate)
        for rows in StudyResources(study, catalogue, context=context).parts:
            part = range(size)[rows]
            assert len(part) in (size // (world * accumulate), -(-size // (world * accumulate)))
            items += part
    assert items == list(range(size))


class Gathered(DistributedContext):
    """A context in which the other process has another value."""

    def gather(self, value):  # type: ignore[no-untyped-def]
        return [value, {**value, "digest of data": "another"}]


def test_a_process_with_other_data_is_named() -> None:
    with pytest.raises(UserError, match=r"process 1 \(on .*\) has digest of data 'another', the first process"):
        Gathered(torch.device("cpu"), 0, TWO).check_equal({"digest of data": "one", "settings": "{}"})


def test_devices_that_are_not_there_are_refused(bench: Bench, refusal) -> None:  # type: ignore[no-untyped-def]
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    options = ["--strategy", PHASES[2], *bench.options(steps=1)]
    options = [option for option in options if option not in ("--device", "cpu")]
    assert "has no CUDA device; --device cpu trains in 4 processes" in refusal("train", *options, "--devices", "4")
    with distributed_context("cpu") as context:
        assert context.world == 1


def test_more_devices_than_the_machine_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"--devices 4: this machine has 1 CUDA device\(s\); expected at most 1"):
        check_devices(4, "auto")
    check_devices(1, "auto")


def losses(bench: Bench, folder: Path, steps: int, **settings: object) -> list[float]:
    """The losses of an arm over steps."""
    resources = bench.resources(bench.study(**settings))
    one = Arm.new(arm(PHASES[2]), 0, folder, resources)
    batches = resources.batches(0)
    found = []
    for index in range(1, steps + 1):
        parts = [resources.draw(index, batches, one.sampler, rows) for rows in resources.parts]
        found.append(train_step([one], parts, ALONE).checked()[PHASES[2]]["loss"])
    assert one.progress.peak_memory > 0
    return found


def test_an_accumulated_batch_and_a_recomputed_decoder_train_like_the_whole_batch(bench: Bench, tmp_path: Path) -> None:
    whole = losses(bench, tmp_path, 3, batch_size=4)
    assert losses(bench, tmp_path, 3, batch_size=4, accumulate=4) == pytest.approx(whole, rel=1e-6)
    assert losses(bench, tmp_path, 3, batch_size=4, checkpoint_decoder=True) == pytest.approx(whole, rel=1e-6)


def test_bfloat16_stays_within_one_percent_and_leaves_the_quantizer_in_float32(bench: Bench, tmp_path: Path) -> None:
    whole, lower = (losses(bench, tmp_path, 5, precision=precision) for precision in ("fp32", "bf16"))
    assert lower == pytest.approx(whole, rel=0.01)
    assert lower != whole
    resources = bench.resources(bench.study(precision="bf16"))
    model = Arm.new(arm(PHASES[2]), 0, tmp_path, resources).model
    z = model.codec.advance(model.codec.preprocess(torch.randn(1, 1, 800)), None, "latent")
    with computing(model, resources.study):
        assert torch.equal(model.codec.quantizer(z)[1][0], model.codec.quantizer(z.clone())[1][0])
        assert model.codec.advance(model.codec.preprocess(torch.randn(1, 1, 800)), None, "latent").dtype == z.dtype


@pytest.mark.slow  # compilation takes a minute
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own, in its compiler
def test_a_compiled_training_starts_and_has_the_losses_of_the_usual_one(bench: Bench, tmp_path: Path) -> None:
    arms = [arm(PHASES[0]), arm(PHASES[1])]
    usual, compiled = (
        bench.train(arms, tmp_path / str(compiled), steps=3, compile=compiled) for compiled in (False, True)
    )
    for title, folder in usual.items():
        one, other = (
            [record["loss"] for record in records(place) if "loss" in record] for place in (folder, compiled[title])
        )
        assert other == pytest.approx(one, rel=1e-4)


def test_too_little_memory_ends_in_a_sentence_that_names_what_to_lower(bench: Bench) -> None:
    study = bench.study(batch_size=4)
    try:
        raise UserError("wrapped") from torch.OutOfMemoryError("CUDA out of memory")
    except UserError as error:
        said = out_of_memory(error, study, 7, 3 * 2**30)
    assert said == (
        "out of memory at step 7 (peak 3.00 GiB): set accumulate = 2, or checkpoint_decoder = true, or precision = "
        "'bf16', or lower batch_size (now 4) or crop_seconds (now 0.4)"
    )
    assert out_of_memory(ValueError("another error"), study, 7, 0) is None
