"""Everything that changes while a codec trains, one step of it, and its way to disk and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from runner.pretrain.devices import Place
from runner.pretrain.losses import SpeakerDistance, SpectralDistance
from runner.pretrain.optimizing import adamw, load_state, rate, set_rate
from runner.pretrain.quantiser import Quantised, Usage, codebooks, lay_codebooks, quantise, restart_dead
from runner.pretrain.recording import Given, Replay
from runner.pretrain.settings import PretrainSettings
from snac_core import atomic
from snac_core.codec import SNAC
from snac_core.critics import Critics, adversarial_loss, critic_loss, feature_loss
from snac_core.seeding import derive, generator
from snac_core.speakers.encoder import SpeakerEncoder

_LOOK = 25  # steps after which those that were replayed are known to have been sound
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
        self.present = list(codec.state_dict().values())  # the tensors themselves
        self.average = {name: value.clone() for name, value in codec.state_dict().items()}
        for part in settings.frozen:
            codec.get_submodule(part).requires_grad_(False)
        self.parameters = [parameter for parameter in codec.parameters() if parameter.requires_grad]
        self.optimizer = adamw(
            codec, settings.weight_decay, betas=settings.betas, codebook_lr=settings.quantiser.lr_scale
        )
        self.usage = Usage(codec.n_codebooks, codec.codebook_size, place.device)  # since entries were last moved
        self.use: dict[str, float] = {}  # of the codes in the last whole window
        self.distance = SpectralDistance(codec.sampling_rate).to(place.device)
        self.speaker = SpeakerDistance(ear, codec.sampling_rate) if ear is not None else None
        self.finite = torch.tensor(True, device=place.device)  # all gradients so far
        self.critics: Critics | None = None
        self.stretch: Tensor | None = None  # of the critics, in samples from its start
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
            if how.seconds is not None:
                self.stretch = torch.arange(round(how.seconds * codec.sampling_rate), device=place.device)
            self.critic_parameters = list(self.critics.parameters())
            self.critic_optimizer = adamw(self.critics, settings.weight_decay)
        q, new = settings.quantiser, settings.start is None  # with weights to start from the codes are alive
        self.continuous = (300 if new else 0) if q.continuous is None else q.continuous
        self.blending = (300 if new else 0) if q.blend is None else q.blend
        on_cuda = place.device.type == "cuda"
        self.replay = Replay(self._work) if settings.graphs and on_cuda and place.world == 1 else None
        self.bf16 = on_cuda if settings.bf16 is None else settings.bf16
        if settings.compile or (settings.compile is None and on_cuda and self.replay is None):
            for layer in (*codec.encoder.block, *codec.decoder.model):
                layer.compile()

    @property
    def blend(self) -> float:
        """Share of the rounding in this step."""
        return min(1.0, max(0.0, (self.step - self.continuous + 1) / (self.blending + 1)))

    def train_step(self, batches: Batches) -> dict[str, Tensor]:
        """One update; returns the raw terms, without gradient.

        Raises:
            Diverged: if a gradient is no finite number; before the codec is touched, or, where steps are replayed,
                within `_LOOK` of them.
        """
        s = self.settings
        if self.step == self.continuous and s.quantiser.kmeans_batches and (s.start is None or s.levels):
            self._lay_codebooks(batches)
        given = self._given(batches)
        set_rate(self.optimizer, rate(s, self.step, s.lr))
        if given.scale is not None and s.adversary is not None:
            set_rate(self.critic_optimizer, rate(s, self.step, s.adversary.lr))
        with torch.random.fork_rng(devices=[self.place.device] if self.place.device.type == "cuda" else []):
            torch.manual_seed(derive(s.seed, self.step, self.place.rank, "decoder noise"))
            terms, out = self._work(given) if self.replay is None or self.blend < 1 else self.replay(given)
        self.step += 1
        if self.step % _LOOK == 0:
            self.check()
        self._remember()
        self._restart(out)
        return {name: term.detach().clone() for name, term in terms.items()}  # a replay would write over them

    def _given(self, batches: Batches) -> Given:
        """The inputs of this step, on the device."""
        device = self.place.device
        audio = batches.at(self.step).to(device, non_blocking=True)
        levels, scale = self._levels(len(audio)), self._adversary_scale()
        start = None
        if scale is not None and self.stretch is not None:
            draw = generator(self.settings.seed, self.step, self.place.rank, "critics' stretch")
            start = torch.randint(audio.shape[-1] - len(self.stretch) + 1, (), generator=draw)
        small = (None if x is None else x.to(device) for x in (levels, scale, start))
        return Given(audio, *small)

    def _work(self, given: Given) -> tuple[dict[str, Tensor], Quantised]:
        """From inputs to changed weights; looks at no tensor's values while it is recorded."""
        s, blend = self.settings, self.blend
        made, out = self._reconstruct(given, blend)
        self.usage.add(out.codes)
        terms = self.distance(made, given.audio)
        if self.speaker is not None:
            terms["speaker"] = self.speaker(made, given.audio)
        terms["commitment"] = torch.stack(out.commitment).sum()
        terms["codebook"] = torch.stack(out.codebook).sum()
        critic = None
        if self.critics is not None and given.scale is not None:
            with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.bf16):
                real, fake = (self.critics(self._stretch(audio, given)) for audio in (given.audio, made))
            terms["adversarial"], terms["features"] = adversarial_loss(fake), feature_loss(real, fake)
            terms["critic"] = critic = critic_loss(real, fake)
        # encodings are not pulled to entries that do not stand for anything yet
        shares = {"commitment": blend, "adversarial": given.scale, "features": given.scale}
        weights = {name: weight for name, weight in s.weights.model_dump().items() if weight and name in terms}
        terms["loss"] = loss = torch.stack(
            [w * shares.get(name, 1.0) * terms[name] for name, w in weights.items()]
        ).sum()
        # both networks take their gradients from one pass: the critics are seen as they were before this step. Theirs
        # come first, since what is compiled, the codec's layers, lets its graph be used once
        of_critics = None if critic is None else torch.autograd.grad(critic, self.critic_parameters, retain_graph=True)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if of_critics is not None:
            self._update(self.critic_optimizer, self.critic_parameters, of_critics)
        terms["gradient"] = self._update(self.optimizer, self.parameters, found)
        return terms, out

    def _stretch(self, audio: Tensor, given: Given) -> Tensor:
        """What critics hear of audio (B, 1, T)."""
        if given.start is None or self.stretch is None:
            return audio
        return audio.index_select(-1, given.start + self.stretch)

    def _reconstruct(self, given: Given, blend: float) -> tuple[Tensor, Quantised]:
        """What the codec makes of audio (B, 1, T): audio of that length, and what passed its quantiser."""
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.bf16):
            z = self.codec.advance(self.codec.preprocess(given.audio), None, "latent")
            out = quantise(self.codec.quantizer, z, blend=blend, levels=given.levels)
            last = self.codec.taps[-1].name
            x = self.codec.advance(out.z_q, "quantized", last)
        # the waveform itself in full: eight bits of it would put noise where speech is quiet
        made = self.codec.advance(x.float(), last, "audio")[..., : given.audio.shape[-1]]
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

    def _restart(self, out: Quantised) -> None:
        """Move entries that no process chose for a while; not near the end, where there is no time to learn them."""
        every = self.settings.quantiser.restart_every
        if self.step % (every or _WINDOW):
            return
        self.use = self.usage.figures()
        movable = "quantizer" not in self.settings.frozen
        if every and movable and self.step > self.continuous and self.step < 0.9 * self.settings.steps:
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
        return torch.where(torch.rand(count, generator=draw) < share, fewer, levels)

    def _adversary_scale(self) -> Tensor | None:
        """Weight of the critics in this step, 0 to 1, a scalar; None before they train."""
        how = self.settings.adversary
        if how is None or self.step < how.after:
            return None
        return torch.tensor(min(1.0, (self.step - how.after) / max(1, how.rise)))

    def _update(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], found: Sequence[Tensor | None]
    ) -> Tensor:
        """A step of an optimizer from gradients, clipped; returns their norm."""
        self.place.average([gradient for gradient in found if gradient is not None])
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        self.finite.logical_and_(torch.isfinite(norm))
        if not (self.place.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.check()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def check(self) -> None:
        """Raise Diverged if a gradient was no number since training began."""
        if not self.finite:
            raise Diverged(f"the loss is no number any more by step {self.step + 1}")

    @torch.no_grad()
    def _remember(self) -> None:
        """Move the averaged weights towards the present ones; fast at first, so that the start is forgotten."""
        keep = min(self.settings.ema, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), self.present, 1 - keep)

    # ---------------------------------------------------------------- storage

    def save(self, path: Path) -> None:
        """Write all that the rest of the training depends on, whole or not at all; raises Diverged as a step does."""
        self.check()
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
        if self.replay is not None:
            self.replay.forget()
        self.finite.fill_(True)
        self.codec.load_state_dict(state["codec"])
        self.average = state["average"]
        load_state(self.optimizer, state["optimizer"])
        self.usage.counts = state["usage"]
        if self.critics is not None:
            self.critics.load_state_dict(state["critics"])
            load_state(self.critic_optimizer, state["critic_optimizer"])

    def averaged(self) -> SNAC:
        """A copy of the codec with the averaged weights, on the CPU, in eval mode."""
        codec = SNAC.from_config(self.codec.config)
        codec.load_state_dict(self.average)
        return codec.eval()
