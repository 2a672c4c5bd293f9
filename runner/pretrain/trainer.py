"""Everything that changes while a codec trains, one step of it, and its way to disk and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from runner.pretrain.devices import Place
from runner.pretrain.losses import SpeakerDistance, SpectralDistance
from runner.pretrain.optimizing import adamw, rate
from runner.pretrain.quantiser import Quantised, Usage, codebooks, lay_codebooks, quantise, restart_dead
from runner.pretrain.settings import PretrainSettings
from snac_core import atomic
from snac_core.codec import SNAC
from snac_core.critics import Critics, adversarial_loss, critic_loss, feature_loss
from snac_core.seeding import derive, generator
from snac_core.speakers.encoder import SpeakerEncoder

_WINDOW = 100  # steps over which the use of codes is counted where no entry is ever moved


class Diverged(ArithmeticError):
    """A loss or gradient is no number any more."""


class Batches(Protocol):
    """Where audio comes from: a pure function of the step."""

    def at(self, step: int) -> Tensor:
        """(B, 1, T)."""
        ...


class Trainer:
    """Codec, averaged codec, critics, optimizers and counts.

    Args:
        codec: trained in place.
        settings: how.
        place: where, and beside how many others.
        ear: the speaker encoder of the term `speaker`, on that place; None where the term has no weight.
    """

    def __init__(
        self, codec: SNAC, settings: PretrainSettings, place: Place, ear: SpeakerEncoder | None = None
    ) -> None:
        self.settings, self.place = settings, place
        self.step = 0
        self.seconds = 0.0  # of training so far
        self.speech: list[str] = []  # what is trained on; kept with the state
        self.codec = codec.to(place.device).train()
        self.average = {name: value.detach().clone() for name, value in codec.state_dict().items()}
        self.parameters = list(codec.parameters())
        self.optimizer = adamw(
            codec, settings.weight_decay, betas=settings.betas, codebook_lr=settings.quantiser.lr_scale
        )
        self.usage = Usage(codec.n_codebooks, codec.codebook_size, place.device)  # since entries were last moved
        self.use: dict[str, float] = {}  # of the codes in the last whole window
        self.distance = SpectralDistance(codec.sampling_rate).to(place.device)
        self.speaker = SpeakerDistance(ear, codec.sampling_rate) if ear is not None else None
        self.critics: Critics | None = None
        how = settings.adversary
        if how is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(settings.seed, "critics"))
                self.critics = Critics(
                    how.periods,
                    how.n_ffts,
                    period_channels=how.period_channels,
                    spectral_channels=how.spectral_channels,
                ).to(place.device)
            self.critic_parameters = list(self.critics.parameters())
            self.critic_optimizer = adamw(self.critics, settings.weight_decay)
        q, new = settings.quantiser, settings.start is None  # with weights to start from the codes are alive
        self.continuous = (300 if new else 0) if q.continuous is None else q.continuous
        self.blending = (300 if new else 0) if q.blend is None else q.blend
        gains = place.device.type == "cuda"
        self.bf16 = gains if settings.bf16 is None else settings.bf16
        if gains if settings.compile is None else settings.compile:
            for layer in (*codec.encoder.block, *codec.decoder.model):
                layer.compile()

    @property
    def blend(self) -> float:
        """Share of the rounding in this step."""
        return min(1.0, max(0.0, (self.step - self.continuous + 1) / (self.blending + 1)))

    def train_step(self, batches: Batches) -> dict[str, Tensor]:
        """One update; returns the raw terms, without gradient.

        Raises:
            Diverged: before the weights are touched, if a gradient is no finite number.
        """
        s, blend = self.settings, self.blend
        audio = batches.at(self.step).to(self.place.device, non_blocking=True)
        if self.step == self.continuous and s.quantiser.kmeans_batches and (s.start is None or s.levels):
            self._lay_codebooks(batches)
        with torch.random.fork_rng(devices=[self.place.device] if self.place.device.type == "cuda" else []):
            torch.manual_seed(derive(s.seed, self.step, self.place.rank, "decoder noise"))
            made, out = self._reconstruct(audio, blend)
        self.usage.add(out.codes)
        terms = self.distance(made, audio)
        if self.speaker is not None:
            terms["speaker"] = self.speaker(made, audio)
        terms["commitment"] = torch.stack(out.commitment).sum()
        terms["codebook"] = torch.stack(out.codebook).sum()
        scale = self._adversary_scale()
        critic = None
        if self.critics is not None and scale is not None:
            with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.bf16):
                real, fake = self.critics(audio), self.critics(made)
            terms["adversarial"], terms["features"] = adversarial_loss(fake), feature_loss(real, fake)
            terms["critic"] = critic = critic_loss(real, fake)
        # encodings are not pulled to entries that do not stand for anything yet
        shares = {"commitment": blend, "adversarial": scale or 0.0, "features": scale or 0.0}
        weights = {name: weight * shares.get(name, 1.0) for name, weight in s.weights.model_dump().items()}
        counted = [weights[name] * term for name, term in terms.items() if weights.get(name)]
        terms["loss"] = loss = torch.stack(counted).sum()
        # both networks take their gradients from one pass: the critics are seen as they were before this step. Theirs
        # come first, since what is compiled, the codec's layers, lets its graph be used once
        of_critics = None if critic is None else torch.autograd.grad(critic, self.critic_parameters, retain_graph=True)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if of_critics is not None and s.adversary is not None:
            self._update(self.critic_optimizer, self.critic_parameters, of_critics, s.adversary.lr)
        terms["gradient"] = self._update(self.optimizer, self.parameters, found, s.lr)
        self.step += 1
        self._remember()
        self._restart(out, blend)
        return {name: term.detach() for name, term in terms.items()}

    def _reconstruct(self, audio: Tensor, blend: float) -> tuple[Tensor, Quantised]:
        """What the codec makes of audio (B, 1, T): audio of that length, and what passed its quantiser."""
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.bf16):
            z = self.codec.advance(self.codec.preprocess(audio), None, "latent")
            out = quantise(self.codec.quantizer, z, blend=blend, levels=self._levels(len(audio)))
            last = self.codec.taps[-1].name
            x = self.codec.advance(out.z_q, "quantized", last)
        # the waveform itself in full: eight bits of it would put noise where speech is quiet
        made = self.codec.advance(x.float(), last, "audio")[..., : audio.shape[-1]]
        return made, out

    @torch.no_grad()
    def _lay_codebooks(self, batches: Batches) -> None:
        """New codebooks into the data, before rounding is first blended in; the same ones in every process."""
        numbers = range(self.settings.quantiser.kmeans_batches)
        crops = [batches.at(-1 - number).to(self.place.device) for number in numbers]
        z = torch.cat([self.codec.advance(self.codec.preprocess(crop), None, "latent") for crop in crops])
        first = 0 if self.settings.start is None else self.codec.n_codebooks - len(self.settings.levels)
        lay_codebooks(self.codec.quantizer, z, seed=self.settings.seed, first=first)
        self.place.agree(codebooks(self.codec.quantizer))

    def _restart(self, out: Quantised, blend: float) -> None:
        """Move entries that no process chose for a while; not near the end, where there is no time to learn them."""
        every = self.settings.quantiser.restart_every
        if self.step % (every or _WINDOW):
            return
        self.use = self.usage.figures()
        if every and blend > 0 and self.step < 0.9 * self.settings.steps:
            counts = self.place.total(self.usage.counts)
            seed = derive(self.settings.seed, self.step, "restart")
            restart_dead(self.codec.quantizer, counts, out.encodings, self.optimizer, seed)
            self.place.agree(codebooks(self.codec.quantizer))
        self.usage.counts.zero_()

    def _levels(self, count: int) -> Tensor | None:
        """How many levels each item keeps in this step, coarse ones first."""
        share, levels = self.settings.quantiser.level_dropout, self.codec.n_codebooks
        if share == 0 or levels == 1:
            return None
        draw = generator(self.settings.seed, self.step, self.place.rank, "level dropout")
        fewer = torch.randint(1, levels, (count,), generator=draw)
        kept = torch.where(torch.rand(count, generator=draw) < share, fewer, levels)
        return kept.to(self.place.device)

    def _adversary_scale(self) -> float | None:
        """Weight of the critics in this step, 0 to 1; None before they train."""
        how = self.settings.adversary
        if how is None or self.step < how.after:
            return None
        return min(1.0, (self.step - how.after) / max(1, how.rise))

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        found: Sequence[Tensor | None],
        peak: float,
    ) -> Tensor:
        """A step of an optimizer from gradients, clipped; returns their norm."""
        self.place.average([gradient for gradient in found if gradient is not None])
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        if not torch.isfinite(norm):
            raise Diverged(f"the loss is no number any more at step {self.step + 1}")
        for group in optimizer.param_groups:
            group["lr"] = rate(self.settings, self.step, peak) * group["scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _remember(self) -> None:
        """Move the averaged weights towards the present ones; fast at first, so that the start is forgotten."""
        keep = min(self.settings.ema, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), list(self.codec.state_dict().values()), 1 - keep)

    # ---------------------------------------------------------------- storage

    def save(self, path: Path) -> None:
        """Write all that the rest of the training depends on, whole or not at all."""
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "speech": self.speech,
            "codec": self.codec.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "usage": self.usage.counts,
        }
        if self.critics is not None:
            state |= {"critics": self.critics.state_dict(), "critic_optimizer": self.critic_optimizer.state_dict()}
        with atomic.writing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a written state."""
        state = torch.load(path, map_location=self.place.device, weights_only=True)
        self.step, self.seconds, self.speech = state["step"], state["seconds"], state["speech"]
        self.codec.load_state_dict(state["codec"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.usage.counts = state["usage"]
        if self.critics is not None:
            self.critics.load_state_dict(state["critics"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])

    def averaged(self) -> SNAC:
        """A copy of the codec with the averaged weights, on the CPU, in eval mode."""
        codec = SNAC.from_config(self.codec.config)
        codec.load_state_dict(self.average)
        return codec.eval()
