"""What a step is measured by: raw scalar terms, each under the name of its strategy, and the conditioning encoder's distances.

One arm with one seed: its model, its optimizers, and everything needed to go on exactly where it stopped."""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snac_core.checkpoint import load_state, state_of
from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError, nearest
from snac_core.files import write_bytes
from snac_core.frozen import FrozenActivations
from snac_core.losses import cosine_distance
from snac_core.seeding import derive, generator
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.step import Step, TrainingContext
from snac_core.strategy import DISCRIMINATOR
from snac_runner.config import ArmSettings
from snac_runner.resources import StudyResources
from snac_runner.schedule import learning_rate


class TrainingFailure(RuntimeError):
    """This arm cannot go on; the message says at which step and why. The other arms can."""


def terms_of(step: Step, hook: str) -> dict[str, Tensor]:
    """All raw terms of a hook of the step's model, as `<strategy>/<term>`."""
    terms: dict[str, Tensor] = {}
    for name, implementation in step.model.callers(hook):
        found = implementation(step=step)
        if not isinstance(found, dict) or not all(
            isinstance(value, Tensor) and value.numel() == 1 for value in found.values()
        ):
            raise TrainingFailure(f"{hook} of {name!r} must return a dict of scalar tensors; got {_shape(found)}")
        terms.update({f"{name}/{term}": value.reshape(()) for term, value in found.items()})
    return terms


def _shape(found: Any) -> str:
    if not isinstance(found, dict):
        return "None" if found is None else type(found).__name__
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in found.items()}
    return f"{shapes}"


@torch.no_grad()
def training_curves(step: Step) -> dict[str, float]:
    """How far the outputs are from their speakers, by the conditioning encoder: what training curves show beside the losses."""
    spk_id = float(cosine_distance(step.identity_embedding, step.own_reference).mean())
    spk_vc = float(cosine_distance(step.converted_embedding, step.target_reference).mean())
    return {"spk_id": spk_id, "spk_vc": spk_vc, "gap": spk_vc - spk_id}


SYNTHETIC = "spk_synth"  # a term of this name is also logged without its strategy's, as spk_id and spk_vc are
_LISTEN_EVERY = 10  # steps between looks at the conditioning encoder's distances where no loss asks for audio


@dataclass
class Progress:
    """How far an arm is, beside its weights.

    Attributes:
        step: steps done.
        seconds_own, seconds_shared: of training, in s: this arm's work, and what all arms of the batch share.
        best: lowest dev score so far; see `snac_runner.train.dev_score`.
        best_step: where it was reached.
        stale: judged evaluations since.
        finished: whether training ended, by its number of steps or by patience.
    """

    step: int = 0
    seconds_own: float = 0.0
    seconds_shared: float = 0.0
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    finished: bool = False


@dataclass
class Arm:
    """An arm in training.

    Build it with `Arm.new`. Nothing here reads a shared random stream: initial values come from (seed, "init"), so
    arms of one seed and the same strategies start alike, and each step's dropout comes from (seed, step).
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

    @classmethod
    def new(cls, settings: ArmSettings, seed: int, folder: Path, resources: StudyResources) -> Arm:
        """A fresh arm, before step 1."""
        torch.manual_seed(derive(seed, "init"))
        model = ConditionedCodec(
            resources.codec,
            settings.all_strategies,
            speaker_encoder=resources.speaker_encoder,
            config=settings.settings,
            plugins=resources.catalogue,
        ).to(resources.device)
        table = resources.table
        if (
            settings.shuffled_speakers
        ):  # every speaker is conditioned on as another one, always the same; what scores stays
            shift = 1 + derive(seed, "shuffled") % (len(table.names) - 1)
            table = replace(table, conditioning=table.conditioning.roll(shift, 0), shuffled=True)
        sampler = SpeakerSampler(table, seed)
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
        )

    # ---------------------------------------------------------------- one step

    def step(self, index: int, bare: FrozenActivations, speakers: Tensor, targets: Tensor) -> dict[str, float]:
        """Train on one batch; returns what is logged.

        Args:
            index: number of the step, from 1.
            bare: the unedited pass over the batch, shared by all arms.
            speakers, targets: rows of the sampler's table (B,) and (N * B,).

        Raises:
            TrainingFailure: if a loss or a gradient is not finite, or a plugin's hook raises.
        """
        torch.manual_seed(derive(self.seed, index, "arm"))
        with self.model.codec.fixed_noise(derive(self.seed, index, "noise")):
            step = self.make_step(index, bare, speakers, targets)
            terms = terms_of(step, "loss")
            curves = training_curves(step) if step.decoded or index % _LISTEN_EVERY == 1 else {}
            clip, rate = self.settings.grad_clip, self.learning_rate(self.settings.lr, index)
            loss = self.weighted(terms)
            self._update(self.optimizer, loss, rate, clip, terms, index)
            if self.discriminator_optimizer is not None:
                self.discriminator_optimizer.zero_grad(set_to_none=True)  # what the arm's own loss left there
                discriminator_terms = terms_of(step, "discriminator_loss")
                clip, rate = (
                    self.settings.discriminator_grad_clip,
                    self.learning_rate(self.settings.discriminator_lr, index),
                )
                self._update(
                    self.discriminator_optimizer,
                    self.weighted(discriminator_terms),
                    rate,
                    clip,
                    discriminator_terms,
                    index,
                )
                terms |= discriminator_terms
        self.progress.step = index
        logged = {name: float(value.detach()) for name, value in terms.items()}
        return {
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": float(loss.detach()),
            **logged,
            **curves,
            **{SYNTHETIC: logged[name] for name in logged if name.endswith(f"/{SYNTHETIC}")},  # noqa: B035
        }

    def make_step(
        self,
        index: int,
        bare: FrozenActivations,
        speakers: Tensor,
        targets: Tensor,
        model: ConditionedCodec | None = None,
    ) -> Step:
        """What the losses see: of this arm's model, or of a copy of it."""
        return Step(
            model or self.model,
            bare.audio,
            sample_rate=self.resources.codec.sampling_rate,
            speaker_ids=speakers,
            target_ids=targets,
            speaker_encoder=self.resources.speaker_encoder,
            sampler=self.sampler,
            index=index,
            frozen_activations=bare,
            parallel=lambda: self.resources.parallel(self.seed, index, targets, len(speakers)),
        )

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The one line where terms are weighted: by the study, else by the strategy's default, else by 1.

        A term of weight 0 is left out, whatever its value.
        """
        weights = {name: self.weight(name) for name in terms}
        counted = [weight * terms[name] for name, weight in weights.items() if weight]
        return torch.stack(counted).sum() if counted else torch.zeros(())

    def weight(self, term: str) -> float:
        """Weight of `<strategy>/<term>`."""
        strategy, _, short = term.partition("/")
        return self.settings.weights.get(term, self.model.attached[strategy].default_weights.get(short, 1.0))

    def check_weights(self, terms: set[str]) -> None:
        """Raise UserError for a weight of a term that nothing computes."""
        for term in self.settings.weights:
            if term not in terms:
                raise UserError(f"arm {self.settings.title!r}: weight for {term!r}, which no strategy computes"
                                f"{nearest(term, terms)}")  # fmt: skip

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        total: Tensor,
        rate: float,
        clip: float,
        terms: dict[str, Tensor],
        index: int,
    ) -> None:
        if not total.isfinite():
            bad = next((name for name, value in terms.items() if not value.isfinite()), "the sum")
            raise TrainingFailure(f"NaN or infinite loss at step {index}, in {bad}")
        optimizer.zero_grad(set_to_none=True)
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        if not norm.isfinite():
            raise TrainingFailure(f"NaN or infinite gradient at step {index}")
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

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
        """Where this arm goes on from."""
        return self.folder / "checkpoint" / "state.pt"

    def save(self) -> None:
        """Write the exact state; what stood there before survives until it is whole."""
        state = {
            "progress": vars(self.progress),
            "base": self.model.codec.digest,
            "model": state_of(self.model.attached),
            "discriminator": {name: value.detach() for name, value in self._discriminator_state().items()},
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer and self.discriminator_optimizer.state_dict(),
            "best_state": self.best_state,
        }
        whole = io.BytesIO()  # torch.save itself says nothing of a full disk but "unexpected pos"
        torch.save(state, whole)
        write_bytes(self.checkpoint, whole.getvalue())

    def load(self) -> bool:
        """Go on from the checkpoint where there is one; False where there is none.

        Raises:
            UserError: for a damaged checkpoint, or one that belongs to another base.
        """
        if not self.checkpoint.is_file():
            return False
        try:
            state = torch.load(self.checkpoint, map_location=self.resources.device, weights_only=True)
            base, progress = state["base"], Progress(**state["progress"])
        except Exception as error:  # torch raises many kinds for a damaged file
            raise UserError(
                f"{self.checkpoint} is no whole checkpoint ({type(error).__name__}); "
                f"delete {self.folder} to start this run anew"
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
        self.progress = progress
        return True

    def _discriminator_state(self) -> dict[str, Tensor]:
        """`<strategy>.discriminator.<tensor>` to the live parameter or buffer of each discriminator."""
        return {
            f"{name}.{key}": value
            for name, strategy in self.model.attached.items()
            for key, value in strategy.state_dict(keep_vars=True).items()
            if key.split(".")[0] == DISCRIMINATOR
        }

    def clock(self) -> float:
        """Seconds from an arbitrary start, after the device has done what it was given."""
        if self.resources.device.type == "cuda":
            torch.cuda.synchronize(self.resources.device)
        return time.perf_counter()
