"""Train the base `tiny` further, with discriminators, and then adapters on it: phases 6 and 4+6, three seeds each.

    python recipes/base_and_adapters.py --data speech/ --out runs/next --whisper base.en --minutes 9

For a GPU that is lent for minutes: after `--minutes`, the step that runs writes its checkpoint and stops, and the same
command continues there, with the same discriminators. The exit code is 3 until all steps are finished.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from snac_runner.run_folder import result_status

BASE_STEPS, CODES_STEPS, DECODER_STEPS = 9000, 6000, 400
SEEDS = range(3)
# stage 9 of the card of `tiny`; the discriminators are new, so the codec first trains without them
BASE = {
    "batch_size": 32, "crop_seconds": 1.28, "lr": 5e-4, "weights.mel_log": 25, "weights.stft_log": 6,
    "weights.mel_linear": 15, "weights.stft_linear": 15, "weights.speaker": 30, "weights.adversarial": 1.5,
    "weights.features": 25, "adversary.start_step": 500, "adversary.warmup_steps": 1000, "adversary.seconds": 0.64,
    "validate_every": 0, "synthetic_share": 0.35, "quantizer.level_dropout": 0.05, "augmentation.changed": 0.2,
    "checkpoint_seconds": 60,
}  # fmt: skip
PHASE6 = {
    "phase6_encoder_adapter.adapter_type": "codes", "phase6_encoder_adapter.hidden_dim": 88,
    "phase6_encoder_adapter.attention_heads": 4, "latent_cache": "true", "dev_pairs": 0,
}  # fmt: skip
CODES = PHASE6 | {  # the third arm of configs/codes_by_level.toml
    "objectives": '["code_prediction"]', "batch_size": 32, "imitations": 6, "code_prediction.imitate": "true",
    "weights.code_prediction/identity": 0.25, "weights.code_prediction/moved": 0.5,
}  # fmt: skip
DECODER = PHASE6 | {  # the second stage of the card of `phase4+6_tiny`
    "frozen": '["phase6_encoder_adapter"]', "phase3_contrastive.path": "false", "crop_seconds": 0.96,
    "phase6_encoder_adapter.source_bias": 8,
}  # fmt: skip
TRIAL = {"batch_size": 2, "save_every": 1, "test_pairs": 4}  # of `--trial`
LEAST_SECONDS = 20.0  # a step is not started with less time


class Step(NamedTuple):
    """A command of `runner` that can be stopped and resumed.

    Attributes:
        folder: that it writes.
        command: that starts it.
        resume: that continues it.
    """

    folder: Path
    command: list[str]
    resume: list[str]

    @property
    def is_finished(self) -> bool:
        """Whether the command has written its result, and succeeded."""
        return result_status(self.folder) == "success"


def settings(values: dict[str, object]) -> list[str]:
    """The options for these settings."""
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def steps(data: str, out: Path, whisper: str, discriminators: str, trial: bool) -> list[Step]:
    """All steps, in order."""
    base: dict[str, object] = dict(BASE)
    if discriminators:
        base |= {"adversary.start": discriminators, "adversary.start_step": 0}
    small = TRIAL if trial else {}
    count = {"base": BASE_STEPS, "codes": CODES_STEPS, "decoder": DECODER_STEPS}
    if trial:
        count = dict.fromkeys(count, 2)
        base |= {"batch_size": 2, "adversary.start_step": 0, "synthetic_share": 0}
    folder = out / "base"
    pretrain = ["pretrain", "--start", "tiny", "--data", data, "--out", str(folder), "--steps", str(count["base"])]
    pretrain += settings(base)
    found = [Step(folder, pretrain, pretrain)]

    def training(name: str, seed: int, strategies: list[str], values: dict[str, object], *more: str) -> None:
        place = out / name / f"seed{seed}"
        command = ["train", *(part for strategy in strategies for part in ("--strategy", strategy)), "--data", data]
        command += ["--base", str(folder / "model"), "--out", str(place), "--seed", str(seed)]
        command += ["--steps", str(count[name]), *(["--whisper", whisper] if whisper else []), *more]
        found.append(Step(place, command + settings(values | small), ["train", "--resume", str(place)]))

    for seed in SEEDS:
        training("codes", seed, ["phase6_encoder_adapter"], CODES)
    for seed in SEEDS:
        strategies = ["phase6_encoder_adapter", "phase4_decoder_film", "phase3_contrastive"]
        training("decoder", seed, strategies, DECODER, "--start", str(out / "codes" / f"seed{seed}"))
    return found


def run(step: Step, seconds: float) -> bool:
    """Run or resume a step for at most so many seconds; returns whether it has finished.

    Raises:
        typer.Exit: with the exit code of the command, if it fails.
    """
    started = (step.folder / "config.json").is_file()
    runner = [sys.executable, "-m", "snac_runner"]
    process = subprocess.Popen([*runner, *(step.resume if started else step.command)])
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # the command writes a checkpoint
        process.wait()
    except KeyboardInterrupt:  # of a terminal: the command has got it, too, and a second one would stop it at once
        process.wait()
    if step.is_finished:
        return True
    if process.returncode not in (0, 130):
        raise typer.Exit(process.returncode)
    return False


def main(
    data: Annotated[str, typer.Option(help="Folder of speech.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs.")],
    minutes: Annotated[float, typer.Option(help="Time until the command stops; 0: no limit.")] = 0.0,
    whisper: Annotated[str, typer.Option(help="Whisper for word errors: a folder or a name.")] = "",
    discriminators: Annotated[
        str, typer.Option(help="Run folder of a pretraining whose discriminators to continue.")
    ] = "",
    trial: Annotated[bool, typer.Option(help="Two steps of everything, to try the commands.")] = False,
) -> None:
    """Train the base further and adapters on it; the same command continues."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    for step in steps(data, out, whisper, discriminators, trial):
        if step.is_finished:
            continue
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS or not run(step, left if minutes else None):  # type: ignore[arg-type]
            typer.echo(f"stopped at {step.folder}; the same command continues there")
            raise typer.Exit(3)
    typer.echo(f"finished: {out}")


if __name__ == "__main__":
    typer.run(main)
