"""Training steps at the size of snac_24khz and ERes2NetV2, with random weights: time, GPU-busy share, memory.

Phases 3, 4 and 6 side by side, against the same one after the other, and against a plain loop over single items that
shares nothing. Then each precision, and less memory.

    python benchmarks/gpu.py                                                     # on a GPU: batch 32 x 2 s
    python benchmarks/gpu.py --device cpu --batch 2 --seconds 1 --base tiny --encoder simple --rounds 1      # a trial
    python benchmarks/gpu.py --device cpu --count                                # on any machine: operations, memory
    python benchmarks/gpu.py --device cpu --count configs/phase6_adapters.json   # of this study instead
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from snac_core import SNAC, ConditionedCodec, Conditioning, discover
from snac_core.losses import MultiScaleSTFT, cosine_distance
from snac_core.plugins import Catalogue
from snac_core.speakers.eres2netv2 import VARIABLE, ERes2NetV2Network
from snac_runner.arm import Arm
from snac_runner.bench import alternating, side_by_side
from snac_runner.cli.train import adapters, read_settings
from snac_runner.config import ArmSettings, StudySettings, compose
from snac_runner.console import SILENT
from snac_runner.data.synth import synthesize
from snac_runner.memory import gibibytes
from snac_runner.resources import StudyResources
from snac_runner.train_step import train_step

ARMS = [ArmSettings(strategies=(name,)) for name in adapters(discover())]


def plain_step(arms: list[Arm], audio: torch.Tensor, targets: torch.Tensor) -> None:
    """A step as a loop over arms and single items: every pass on its own, nothing shared, a gradient per item."""
    resources = arms[0].resources
    codec, encoder = resources.codec, resources.speaker_encoder
    stft = MultiScaleSTFT().to(audio.device)
    for arm in arms:
        model: ConditionedCodec = arm.model
        arm.optimizer.zero_grad(set_to_none=True)
        for item, target in zip(torch.split(audio, 1), torch.split(targets, 1), strict=True):
            with torch.no_grad():
                own = encoder(item, codec.sampling_rate)
                codec(item)
            identity = model.reconstruct(item, Conditioning(own)).audio
            converted = model.reconstruct(item, Conditioning(target)).audio
            loss = (identity - item).abs().mean() + stft(identity, item)
            loss = loss + cosine_distance(encoder(identity, codec.sampling_rate), own).mean()
            loss = loss + cosine_distance(encoder(converted, codec.sampling_rate), target).mean()
            loss.backward()
            float(loss)  # logged for each item
        arm.optimizer.step()


def count(study: StudySettings, arms: list[ArmSettings], folder: Path, catalogue: Catalogue) -> None:
    """Print the operations of a step of each arm, and the memory for its gradients, for each second of the batch.

    Both depend on no device. A multiplication and an addition are two operations; those of FFTs, activations and the
    optimizer are not counted. The memory is that of the tensors that the step keeps for its gradients, in float32.
    """
    seconds = study.batch_size * study.crop_seconds
    for less in (False, True):
        resources = StudyResources(study.model_copy(update={"checkpoint_decoder": less}), catalogue)
        for settings in arms:
            arm = Arm.new(settings, 0, folder / f"{settings.title}-{less}", resources)
            batch = resources.draw(1, resources.batches(0), arm.sampler)
            kept: dict[int, int] = {}

            def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
                if not isinstance(tensor, torch.nn.Parameter):
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            counter = FlopCounterMode(display=False)
            with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                train_step([arm], [batch], resources.context).checked()
            operations, memory = counter.get_total_flops() / 1e12 / seconds, sum(kept.values()) / 2**30 / seconds
            with_less = ", checkpoint_decoder" if less else ""
            print(f"  {settings.title}{with_less}: {operations:.3f} TFLOP, {memory:.2f} GiB", flush=True)


def main() -> None:
    """Print the measurements."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--batch", type=int, help="default: 32; with --count, 2")
    options.add_argument("--seconds", type=float, help="default: 2; with --count, 0.5")
    options.add_argument("--base", default="snac_24khz", help="configuration for random weights, or a bundled codec")
    options.add_argument("--encoder", default="eres2netv2", help="eres2netv2 with random weights, or another one")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument(
        "--count", nargs="*", metavar="FILE", help="count operations instead, of original files if given"
    )
    given = options.parse_args()
    counting = given.count is not None  # what is counted is proportional to the seconds
    items, seconds, speech = (2, 0.5, (8, 4)) if counting else (32, 2.0, (24, 6))
    items, seconds = given.batch or items, given.seconds or seconds
    warnings.simplefilter("ignore")
    catalogue = discover()
    with tempfile.TemporaryDirectory() as folder:
        base = given.base
        if base == "snac_24khz":
            base = str(Path(folder) / "base")
            SNAC.from_config("snac_24khz").save_pretrained(base)
        if given.encoder == "eres2netv2":
            os.environ[VARIABLE] = str(Path(folder) / "eres2netv2.ckpt")
            torch.save(ERes2NetV2Network().state_dict(), os.environ[VARIABLE])
        study = StudySettings(
            data=str(synthesize(Path(folder) / "speech", *speech)), base=base, speaker_encoder=given.encoder,
            batch_size=items, crop_seconds=seconds, device=given.device, dev_pairs=0, test_pairs=0,
        )  # fmt: skip
        if counting:
            print("for each second of the batch:")
            files = [read_settings(Path(file), (), (), SILENT)[0] for file in given.count]
            originals = [
                compose({k: v for k, v in values.items() if k not in StudySettings.model_fields}, [{}], "")[1][0]
                for values in files
            ]
            count(study, originals or ARMS, Path(folder), catalogue)
            return
        for precision in ("fp32", "tf32", "bf16"):
            print(f"precision {precision}:")
            changed = study.model_copy(update={"precision": precision})
            print("\n".join(side_by_side(changed, ARMS, catalogue, given.rounds)), flush=True)
        print("against a plain loop over single items, fp32:")
        resources = StudyResources(study, catalogue)
        arms = [Arm.new(arm, 0, Path(folder) / arm.title, resources) for arm in ARMS]
        batch = resources.draw(1, resources.batches(0), arms[0].sampler)
        targets = resources.table.conditioning[batch.targets].to(resources.device)
        numbers = iter(range(1, 10**6))
        taken = alternating(
            {
                "plain": lambda: plain_step(arms, batch.frozen.audio, targets),
                "together": lambda: train_step(
                    arms, [resources.draw(next(numbers), resources.batches(0), arms[0].sampler)], resources.context
                ).checked(),
            },
            given.rounds,
            resources.device,
        )
        ratio = taken["plain"] / taken["together"]
        print(f"  {taken['plain']:.2f} s against {taken['together']:.2f} s: {ratio:.1f} times faster")
        less_memory: dict[str, dict[str, Any]] = {
            "accumulate": {"accumulate": 2},
            "checkpoint": {"checkpoint_decoder": True},
        }
        for name, changes in less_memory.items():
            less = StudyResources(study.model_copy(update=changes), catalogue)
            one = Arm.new(ARMS[2], 0, Path(folder) / name, less)
            batches, started = less.batches(0), time.perf_counter()
            parts = [less.draw(1, batches, one.sampler, rows) for rows in less.parts]
            train_step([one], parts, less.context).checked()
            peak = gibibytes(one.progress.peak_memory)
            print(f"  {changes}: peak {peak}, first step {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
