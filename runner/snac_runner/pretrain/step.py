"""One training step of a base codec, and all state that changes with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snac_core.codec import SNAC
from snac_core.discriminators import Discriminators, adversarial_loss, discriminator_loss, feature_loss
from snac_core.files import writing
from snac_core.seeding import derive, generator
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.devices import to_device
from snac_runner.distributed import DistributedContext
from snac_runner.pretrain.cuda_graph import CudaGraphStep, StepInputs
from snac_runner.pretrain.losses import SpeakerDistance, SpectralDistance
from snac_runner.pretrain.optimizer import adamw, load_optimizer_state, set_learning_rate
from snac_runner.pretrain.quantizer import (
    CodeUsage,
    Quantized,
    codebooks,
    initialize_codebooks,
    quantize,
    restart_unused,
)
from snac_runner.pretrain.settings import PretrainSettings
from snac_runner.schedule import learning_rate

_CHECK_EVERY = 25  # steps between checks of the gradients of a CUDA graph; a check waits for the device
_USAGE_WINDOW = 100  # steps over which codes are counted if unused entries are never restarted


class Diverged(ArithmeticError):
    """A gradient is not finite."""


class Batches(Protocol):
    """Source of training audio, a pure function of the step."""

    def at(self, step: int) -> Tensor:
        """The batch of a step, (B, 1, T)."""
        ...


class TrainingState:
    """Codec, moving average of its weights, discriminators, optimizers and code counts; `train_step` updates them.

    Args:
        codec: trained in place.
        settings: of the training.
        context: device of this process, and the number of processes.
        speaker_encoder: of the loss term `speaker`, on that device; None if the term has no weight.
    """

    def __init__(
        self,
        codec: SNAC,
        settings: PretrainSettings,
        context: DistributedContext,
        speaker_encoder: SpeakerEncoder | None = None,
    ) -> None:
        s, device, on_cuda = settings, context.device, context.device.type == "cuda"
        self.settings, self.context = settings, context
        self.step = 0  # steps done
        self.seconds = 0.0  # training time so far
        self.data: list[str] = []  # digests and shares of the corpora; saved, to recognise other data on resuming
        self.codec = codec.to(device).train()
        self.weights = list(codec.state_dict().values())  # share memory with the codec
        self.average = {name: value.clone() for name, value in codec.state_dict().items()}
        for part in s.frozen:
            codec.get_submodule(part).requires_grad_(False)
        self.parameters = [parameter for parameter in codec.parameters() if parameter.requires_grad]
        self.optimizer = adamw(codec, s.weight_decay, betas=s.betas, codebook_lr=s.quantizer.lr_scale)
        self.usage = CodeUsage(codec.n_codebooks, codec.codebook_size, device)  # since the last restart of entries
        self.last_usage: dict[str, float] = {}  # statistics of the last complete window
        self.spectral_distance = SpectralDistance(codec.sampling_rate).to(device)
        self.speaker_distance = None
        if speaker_encoder is not None:
            self.speaker_distance = SpeakerDistance(speaker_encoder, codec.sampling_rate)
        self.finite = torch.tensor(True, device=device)  # whether all gradients so far were
        self.discriminators: Discriminators | None = None
        self.segment: Tensor | None = None  # sample numbers 0, 1, ... of the segment that discriminators get
        if s.adversary is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(s.seed, "critics"))  # names of random streams are part of the numbers
                self.discriminators = Discriminators(
                    s.adversary.periods,
                    s.adversary.n_ffts,
                    period_channels=s.adversary.period_channels,
                    spectral_channels=s.adversary.spectral_channels,
                ).to(device)
            if s.adversary.seconds is not None:
                self.segment = torch.arange(round(s.adversary.seconds * codec.sampling_rate), device=device)
            self.discriminator_parameters = list(self.discriminators.parameters())
            self.discriminator_optimizer = adamw(self.discriminators, s.weight_decay)
        default = 300 if s.start is None else 0  # the codes of trained weights are in use already
        q = s.quantizer
        self.unquantized_steps = default if q.unquantized_steps is None else q.unquantized_steps
        self.blend_steps = default if q.blend_steps is None else q.blend_steps
        self.cuda_graph = CudaGraphStep(self._update) if s.graphs and on_cuda and context.world == 1 else None
        self.bf16 = on_cuda if s.bf16 is None else s.bf16
        if s.compile or (s.compile is None and on_cuda and self.cuda_graph is None):
            for layer in (*codec.encoder.block, *codec.decoder.model):
                layer.compile()

    # ---------------------------------------------------------------- one step

    def train_step(self, batches: Batches) -> dict[str, Tensor]:
        """Update the weights once; returns the raw loss terms, detached.

        Raises:
            Diverged: if a gradient is not finite: before the codec changes, or, with a CUDA graph, within
                `_CHECK_EVERY` steps.
        """
        s, device = self.settings, self.context.device
        if self.step == self.unquantized_steps and s.quantizer.kmeans_batches and (s.start is None or s.levels):
            self._initialize_codebooks(batches)
        audio = to_device(batches.at(self.step), device)
        levels, adversary_weight, segment_start = self._drawn_levels(len(audio)), self._adversary_weight(), None
        if adversary_weight is not None and self.segment is not None:
            draw = generator(s.seed, self.step, self.context.rank, "critics' stretch")
            segment_start = torch.randint(audio.shape[-1] - len(self.segment) + 1, (), generator=draw)
        scalars = (None if x is None else x.to(device) for x in (levels, adversary_weight, segment_start))
        inputs = StepInputs(audio, *scalars)
        set_learning_rate(self.optimizer, self._learning_rate(s.lr))
        if adversary_weight is not None and s.adversary is not None:
            set_learning_rate(self.discriminator_optimizer, self._learning_rate(s.adversary.lr))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive(s.seed, self.step, self.context.rank, "decoder noise"))
            update = self._update if self.cuda_graph is None or self.blend < 1 else self.cuda_graph
            terms, quantized = update(inputs)
        self.step += 1
        if self.step % _CHECK_EVERY == 0:
            self.check_finite()
        with torch.no_grad():
            # the decay is small in the first steps, so that the initial weights are soon forgotten
            decay = min(s.ema, self.step / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), self.weights, 1 - decay)
        self._restart_unused(quantized)
        return {name: term.detach().clone() for name, term in terms.items()}  # the next replay writes to these tensors

    def _update(self, inputs: StepInputs) -> tuple[dict[str, Tensor], Quantized]:
        """Forward, losses, gradients and updates of both networks. It can be captured as a CUDA graph."""
        s, blend, device_type = self.settings, self.blend, self.context.device.type

        with torch.autocast(device_type, torch.bfloat16, enabled=self.bf16):
            z = self.codec.advance(self.codec.preprocess(inputs.audio), None, "latent")
            quantized = quantize(self.codec.quantizer, z, blend=blend, levels=inputs.levels)
            last = self.codec.taps[-1].name
            x = self.codec.advance(quantized.z_q, "quantized", last)
        # the waveform in float32: bf16 has 8 significant bits, which would be audible as noise in quiet speech
        output = self.codec.advance(x.float(), last, "audio")[..., : inputs.audio.shape[-1]]
        self.usage.add(quantized.codes)

        terms = self.spectral_distance(output, inputs.audio)
        if self.speaker_distance is not None:
            terms["speaker"] = self.speaker_distance(output, inputs.audio)
        terms["commitment"] = torch.stack(quantized.commitment).sum()
        terms["codebook"] = torch.stack(quantized.codebook).sum()
        adversarial = self.discriminators is not None and inputs.adversary_weight is not None
        if self.discriminators is not None and adversarial:
            with torch.autocast(device_type, torch.bfloat16, enabled=self.bf16):
                real, fake = (self.discriminators(self._cut(audio, inputs)) for audio in (inputs.audio, output))
            terms["adversarial"], terms["features"] = adversarial_loss(fake), feature_loss(real, fake)
            terms["discriminator"] = discriminator_loss(real, fake)
        # no commitment to entries before they quantize
        scales = {"commitment": blend, "adversarial": inputs.adversary_weight, "features": inputs.adversary_weight}
        weights = {name: weight for name, weight in s.weights.model_dump().items() if weight and name in terms}
        terms["loss"] = loss = torch.stack(
            [weight * scales.get(name, 1.0) * terms[name] for name, weight in weights.items()]
        ).sum()

        # Both gradients come from one forward pass, with the discriminators as they were before this step. Those of
        # the discriminators come first: the graph of the codec's compiled layers can be used only once.
        if adversarial:
            of_discriminators = torch.autograd.grad(
                terms["discriminator"], self.discriminator_parameters, retain_graph=True
            )
        of_codec = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if adversarial:
            self._apply(self.discriminator_optimizer, self.discriminator_parameters, of_discriminators)
        terms["gradient"] = self._apply(self.optimizer, self.parameters, of_codec)
        return terms, quantized

    def _apply(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: Sequence[Tensor | None]
    ) -> Tensor:
        """Average gradients over processes, clip them, and let the optimizer step; returns their norm before that."""
        self.context.average([gradient for gradient in gradients if gradient is not None])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        self.finite.logical_and_(torch.isfinite(norm))
        if not (self.context.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.check_finite()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def blend(self) -> float:
        """Share of the quantization in this step, 0 to 1."""
        return min(1.0, max(0.0, (self.step - self.unquantized_steps + 1) / (self.blend_steps + 1)))

    def _learning_rate(self, peak: float) -> float:
        s = self.settings
        return learning_rate(
            self.step + 1,
            peak,
            warmup_steps=s.warmup_steps,
            decay_start=s.warmup_steps + 1,
            decay_end=s.steps + 1,
            min_ratio=s.lr_min_ratio,
        )

    def _drawn_levels(self, count: int) -> Tensor | None:
        """Number of levels (B,) that each item uses in this step (quantizer dropout), coarse ones first."""
        share, levels = self.settings.quantizer.level_dropout, self.codec.n_codebooks
        if share == 0 or levels == 1:
            return None
        draw = generator(self.settings.seed, self.step, self.context.rank, "level dropout")
        fewer = torch.randint(1, levels, (count,), generator=draw)
        return torch.where(torch.rand(count, generator=draw) < share, fewer, levels)

    def _adversary_weight(self) -> Tensor | None:
        """Weight of the discriminators' loss terms in this step, a scalar from 0 to 1; None before they train."""
        adversary = self.settings.adversary
        if adversary is None or self.step < adversary.start_step:
            return None
        return torch.tensor(min(1.0, (self.step - adversary.start_step) / max(1, adversary.warmup_steps)))

    def _cut(self, audio: Tensor, inputs: StepInputs) -> Tensor:
        """The segment of audio (B, 1, T) that the discriminators get."""
        if inputs.segment_start is None or self.segment is None:
            return audio
        return audio.index_select(-1, inputs.segment_start + self.segment)

    # ---------------------------------------------------------------- codebooks

    @torch.no_grad()
    def _initialize_codebooks(self, batches: Batches) -> None:
        """k-means initialization, before quantization sets in; equal in all processes."""
        numbers = range(self.settings.quantizer.kmeans_batches)
        crops = [batches.at(-1 - number).to(self.context.device) for number in numbers]
        z = torch.cat([self.codec.advance(self.codec.preprocess(crop), None, "latent") for crop in crops])
        first = 0 if self.settings.start is None else self.codec.n_codebooks - len(self.settings.levels)
        initialize_codebooks(self.codec.quantizer, z, seed=self.settings.seed, first=first)
        self.context.broadcast(codebooks(self.codec.quantizer))

    def _restart_unused(self, quantized: Quantized) -> None:
        """Restart entries that no process has used; not in the last tenth, which is too short to train them."""
        every = self.settings.quantizer.restart_every
        if self.step % (every or _USAGE_WINDOW):
            return
        self.last_usage = self.usage.statistics()
        movable = "quantizer" not in self.settings.frozen
        if every and movable and self.unquantized_steps < self.step < 0.9 * self.settings.steps:
            counts = self.context.total(self.usage.counts)
            seed = derive(self.settings.seed, self.step, "restart")
            restart_unused(self.codec.quantizer, counts, quantized.encodings, self.optimizer, seed)
            self.context.broadcast(codebooks(self.codec.quantizer))
        self.usage.counts.zero_()

    # ---------------------------------------------------------------- checkpoints

    def check_finite(self) -> None:
        """Raise Diverged if a gradient was not finite since the training began."""
        if not self.finite:
            raise Diverged(f"the gradient is not finite at or before step {self.step + 1}")

    def save(self, path: Path) -> None:
        """Write the state atomically.

        Raises:
            Diverged: if a gradient was not finite.
        """
        self.check_finite()
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "data": self.data,
            "codec": self.codec.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "usage": self.usage.counts,
        }
        if self.discriminators is not None:
            state |= {
                "discriminators": self.discriminators.state_dict(),
                "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            }
        with writing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a state that `save` has written."""
        state = torch.load(path, map_location=self.context.device, weights_only=True)
        self.step, self.seconds, self.data = state["step"], state["seconds"], state["data"]
        if self.cuda_graph is not None:
            self.cuda_graph.reset()
        self.finite.fill_(True)
        self.codec.load_state_dict(state["codec"])
        self.average = state["average"]
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.usage.counts = state["usage"]
        if self.discriminators is not None:
            self.discriminators.load_state_dict(state["discriminators"])
            load_optimizer_state(self.discriminator_optimizer, state["discriminator_optimizer"])

    def averaged(self) -> SNAC:
        """A new codec with the averaged weights, on the CPU, in eval mode."""
        codec = SNAC.from_config(self.codec.config)
        codec.load_state_dict(self.average)
        return codec.eval()
