"""One arm with one seed: its model, its optimizers, and all that an exact resume needs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snac_core.checkpoint import Description, Stored, load_state, read_tensors, state_of
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import REFERENCE
from snac_core.errors import UserError, nearest
from snac_core.files import write_bytes
from snac_core.seeding import derive, generator
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.step import TrainingContext
from snac_core.strategy import DISCRIMINATOR, Strategy
from snac_core.timing import Stopwatch
from snac_runner.config import ArmSettings
from snac_runner.resources import StudyResources
from snac_runner.run_folder import CHECKPOINT
from snac_runner.schedule import learning_rate


@dataclass
class Progress:
    """How far the training of an arm is.

    Attributes:
        step: steps done.
        seconds_own, seconds_shared: training time in s: of this arm alone, and of the work that all arms share.
        best: lowest dev score so far; see `snac_runner.train.dev_score`.
        best_step: the step of that score.
        stale: dev evaluations since then.
        finished: whether training has ended, after all steps or because patience ran out.
        peak_memory: largest memory in this arm's steps, in bytes; see `snac_runner.memory`.
        pending: whether the dev evaluation of this step is still to be done, because a process was lost meanwhile.
    """

    step: int = 0
    seconds_own: float = 0.0
    seconds_shared: float = 0.0
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    finished: bool = False
    peak_memory: int = 0
    pending: bool = False


@dataclass
class Arm:
    """An arm in training; `snac_runner.train` trains it.

    Build it with `Arm.new`. Nothing here reads a shared random stream: initial values come from (seed, "init"), so
    arms of one seed and the same strategies start alike.
    """

    settings: ArmSettings
    seed: int
    folder: Path
    resources: StudyResources
    model: ConditionedCodec
    sampler: SpeakerSampler
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer | None
    progress: Progress = field(default_factory=Progress)
    best_state: dict[str, Tensor] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=lambda: Stopwatch(torch.device("cpu")))  # of the current step

    @classmethod
    def new(cls, settings: ArmSettings, seed: int, folder: Path, resources: StudyResources) -> Arm:
        """A new arm, before step 1.

        Raises:
            UserError: if none of its strategies has parameters, or a strategy cannot be built.
        """
        torch.manual_seed(derive(seed, "init"))
        model = ConditionedCodec(
            resources.codec,
            settings.all_strategies,
            speaker_encoder=resources.speaker_encoder,
            config=settings.settings,
            plugins=resources.catalogue,
        ).to(resources.device)
        if REFERENCE in model.extras:
            resources.read_speech(settings.title)
        if resources.study.compile:
            _compile(model)
        if settings.start:
            start_from(settings.start, model, settings.frozen)
        table = resources.table
        if settings.shuffled_speakers:  # each speaker's conditioning is that of a fixed other speaker; references stay
            shift = 1 + derive(seed, "shuffled") % (len(table.names) - 1)
            table = replace(table, conditioning=table.conditioning.roll(shift, 0), shuffled=True)
        sampler = SpeakerSampler(table, seed, lambda: resources.utterances)
        for name, hook in model.callers("training_start"):
            hook(context=TrainingContext(model, sampler, table.names, generator(seed, name, "training start")))
        parameters = [parameter for _, parameter in model.trained_parameters()]
        if not parameters:
            raise UserError(f"arm {settings.title!r} has nothing to train: none of its strategies has parameters")
        discriminators = [parameter for _, parameter in model.discriminator_parameters()]
        options: dict[str, Any] = {"betas": settings.betas, "weight_decay": settings.weight_decay}
        return cls(
            settings=settings,
            seed=seed,
            folder=folder,
            resources=resources,
            model=model.train(),
            sampler=sampler,
            optimizer=torch.optim.AdamW(parameters, lr=settings.lr, **options),
            discriminator_optimizer=torch.optim.AdamW(discriminators, lr=settings.discriminator_lr, **options)
            if discriminators
            else None,
            stopwatch=Stopwatch(resources.device),
        )

    # ---------------------------------------------------------------- settings that a step reads

    def weight(self, term: str) -> float:
        """Weight of `<strategy>/<term>`."""
        strategy, _, short = term.partition("/")
        return self.settings.weights.get(term, self.model.attached[strategy].default_weights.get(short, 1.0))

    def check_weights(self, terms: set[str]) -> None:
        """Raise UserError for a weight of a term that no strategy computes."""
        for term in self.settings.weights:
            if term not in terms:
                raise UserError(f"arm {self.settings.title!r}: weight for {term!r}, which no strategy computes"
                                f"{nearest(term, terms)}")  # fmt: skip

    def learning_rate(self, peak: float, index: int) -> float:
        """Learning rate of a step: the decay begins after the warm-up and ends with the last step."""
        warmup = self.settings.warmup_steps
        return learning_rate(
            index,
            peak,
            warmup_steps=warmup,
            decay_start=warmup,
            decay_end=self.resources.study.steps,
            min_ratio=self.settings.lr_min_ratio,
        )

    # ---------------------------------------------------------------- on disk

    @property
    def checkpoint(self) -> Path:
        """The file that this arm resumes from."""
        return self.folder / CHECKPOINT

    def save(self) -> None:
        """Write the exact state; the previous checkpoint is replaced once the new one is complete.

        Of several processes, which all have the same state, the first writes.
        """
        if not self.resources.context.first:
            return
        state = {
            "progress": vars(self.progress),
            "base": self.model.codec.digest,
            "model": state_of(self.model.attached),
            "discriminator": {name: value.detach() for name, value in self._discriminator_state().items()},
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer and self.discriminator_optimizer.state_dict(),
            "best_state": self.best_state,
        }
        buffer = io.BytesIO()  # torch.save on a full disk reports only "unexpected pos"
        torch.save(state, buffer)
        write_bytes(self.checkpoint, buffer.getvalue())

    def load(self) -> bool:
        """Restore the state of the checkpoint, which the first process reads for all; False if there is none.

        Raises:
            UserError: for a damaged checkpoint, or one that belongs to another base.
        """
        stored = self.resources.context.agree(self.checkpoint.read_bytes() if self.checkpoint.is_file() else None)
        if stored is None:
            return False
        try:
            state = torch.load(io.BytesIO(stored), map_location=self.resources.device, weights_only=True)
            base, progress = state["base"], Progress(**state["progress"])
        except Exception as error:  # torch raises many kinds for a damaged file
            raise UserError(
                f"{self.checkpoint} is not a complete checkpoint ({type(error).__name__}); "
                f"delete {self.folder} to train this run from the start"
            ) from error
        if base != self.model.codec.digest:
            raise UserError(
                f"{self.checkpoint} was trained on a base with digest {base[:12]}; "
                f"{self.resources.study.base!r} has {self.model.codec.digest[:12]}"
            )
        load_state(self.model.attached, state["model"], str(self.checkpoint))
        discriminators = self._discriminator_state()
        with torch.no_grad():
            for name, value in state["discriminator"].items():
                discriminators[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.discriminator_optimizer is not None:
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        self.best_state = state["best_state"]
        study = self.resources.study  # of more steps than before, if a longer run continues a finished one
        progress.finished &= progress.step >= study.steps or 0 < study.patience <= progress.stale
        self.progress = progress
        return True

    def _discriminator_state(self) -> dict[str, Tensor]:
        """`<strategy>.discriminator.<tensor>` to the parameter or buffer itself, of each discriminator."""
        return {
            f"{name}.{key}": value
            for name, strategy in self.model.attached.items()
            for key, value in strategy.state_dict(keep_vars=True).items()
            if key.split(".")[0] == DISCRIMINATOR
        }


def _compile(model: ConditionedCodec) -> None:
    """Compile the modules of the strategies that are trained, on their first use, without the discriminators."""
    for strategy in model.attached.values():
        for name, child in strategy.named_children():
            of_list = isinstance(child, nn.ModuleDict | nn.ModuleList)
            for module in child.children() if of_list else [child]:
                if name != DISCRIMINATOR and next(module.parameters(), None) is not None:
                    module.compile()


def start_from(source: str, model: ConditionedCodec, frozen: Sequence[str] = ()) -> None:
    """Copy the trained strategies that `source` and `model` share into `model`.

    Args:
        source: a run folder, a folder written by `save_pretrained`, a bundled adapter, or a hub id.
        model: with the same base and speaker encoder.
        frozen: strategies that get no gradient.

    Raises:
        UserError: for another base or speaker encoder, no shared strategy, a frozen one that is not shared, or tensors
            of other shapes.
    """
    stored = Stored.find(source)
    about = stored.description
    if about.base.digest != model.codec.digest:
        raise UserError(
            f"start {source!r} belongs to base {about.base.name!r} with digest {about.base.digest[:12]}; "
            f"this one has {model.codec.digest[:12]}"
        )
    if about.encoder and about.encoder != model.encoder:
        raise UserError(f"start {source!r} is conditioned with {about.encoder.name!r}; this arm with another encoder")
    shared = {one.name: model.attached[one.name] for one in about.strategies if one.name in model.attached}
    if not shared:
        names = ", ".join(one.name for one in about.strategies)
        raise UserError(
            f"start {source!r} has {names}; this arm has {', '.join(model.attached)}; expected one in common"
        )
    if missing := [name for name in frozen if name not in shared]:
        raise UserError(f"start {source!r} has {', '.join(shared)}; expected {missing[0]}, which is frozen")
    for name in frozen:
        shared[name].requires_grad_(False)
    tensors = read_tensors(stored.weights).items()
    try:
        load_state(shared, {key: value for key, value in tensors if key.split(".")[0] in shared}, str(stored.weights))
    except UserError as error:
        raise UserError(f"start {source!r} does not fit: {error}{_other_settings(about, shared)}") from error


def _other_settings(about: Description, strategies: Mapping[str, Strategy]) -> str:
    """The end of an error message: options that give the strategies the settings of what is stored."""
    different = [
        f"--set '{stored.name}.{key}={json.dumps(value)}'"
        for stored in about.strategies
        if stored.name in strategies
        for key, value in stored.config.items()
        if value is not None and strategies[stored.name].config.model_dump(mode="json").get(key) != value
    ]
    return f"; it was trained with other settings, so add {' '.join(different)}" if different else ""
