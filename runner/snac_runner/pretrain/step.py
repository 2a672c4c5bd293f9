"""The optimizer of both networks and its rate.

A step's work on an accelerator, recorded once and replayed: thousands of kernels from one call.

The processor needs longer to start the small kernels of a codec and its discriminators than the accelerator to run them.


Everything that changes while a codec trains, one step of it, and its way to disk and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from snac_core.codec import SNAC
from snac_core.discriminators import Discriminators, adversarial_loss, discriminator_loss, feature_loss
from snac_core.files import writing
from snac_core.seeding import derive, generator
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.pretrain.distributed import DistributedContext
from snac_runner.pretrain.losses import SpeakerDistance, SpectralDistance
from snac_runner.pretrain.quantizer import Quantised, Usage, codebooks, lay_codebooks, quantise, restart_dead
from snac_runner.pretrain.settings import PretrainSettings

_OF_THE_DEVICE = ("lr", "fused", "foreach", "capturable")  # in an optimizer's groups


def rate(settings: PretrainSettings, step: int, peak: float) -> float:
    """Learning rate of a step: linear to the peak, then half a cosine."""
    if step < settings.lr_warmup:
        return peak * (step + 1) / settings.lr_warmup
    done = min(1.0, (step - settings.lr_warmup) / max(1, settings.steps - settings.lr_warmup))
    return peak * (settings.lr_min_ratio + (1 - settings.lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(
    network: nn.Module, weight_decay: float, *, betas: tuple[float, float] = (0.8, 0.99), codebook_lr: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; `scale` of a group is its rate relative to the others'.

    On an accelerator a step of it can be recorded: rates are tensors, and one kernel moves a group.
    """
    matrices, others, codebooks = [], [], []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("codebook.weight"):
            codebooks.append(parameter)
        elif parameter.numel() > max(parameter.shape) and not name.endswith("original0"):
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "scale": 1.0},
        {"params": others, "weight_decay": 0.0, "scale": 1.0},
        {"params": codebooks, "weight_decay": 0.0, "scale": codebook_lr},
    ]
    device = next(network.parameters()).device
    on_cuda = device.type == "cuda"
    for group in groups:
        group["lr"] = torch.zeros((), device=device) if on_cuda else 0.0
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=betas, fused=on_cuda or None, capturable=on_cuda
    )


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What an optimizer remembers, from whatever device; how it computes stays as this device wants it."""
    own = [{key: group[key] for key in _OF_THE_DEVICE} for group in optimizer.param_groups]
    groups = [{**group, **kept} for group, kept in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def set_rate(optimizer: torch.optim.Optimizer, peak: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(peak * group["scale"])
        else:
            group["lr"] = peak * group["scale"]


T = TypeVar("T")
_SET_UP = 5  # calls before the first that is recorded


class StepInputs(NamedTuple):
    """What a step is given; all else that changes with the steps is state.

    Attributes:
        audio: (B, 1, T).
        levels: (B,) how many levels of codes an item keeps; None: all.
        scale: weight of the discriminators' terms, 0 to 1, a scalar; None before discriminators train.
        start: where in the audio the discriminators begin to listen, a whole number; None: they hear all of it.
    """

    audio: Tensor
    levels: Tensor | None = None
    scale: Tensor | None = None
    start: Tensor | None = None


class CudaGraphStep(Generic[T]):
    """`work` from a CUDA graph of it.

    The first calls with inputs of one kind are not recorded, so that what is made on first use is there. Recording runs
    nothing; what is drawn at random follows the generator's state at each call.

    Args:
        work: what is recorded; it must not look at values of tensors, and finds its state where it was.
    """

    def __init__(self, work: Callable[[StepInputs], T]) -> None:
        self.work = work
        self.kind: tuple[bool, ...] = ()  # which inputs there are
        self.seen = 0  # calls with them
        self.recorded: tuple[torch.cuda.CUDAGraph, StepInputs, T] | None = None  # where inputs go and results come

    def __call__(self, given: StepInputs) -> T:
        """What `work` gives for these inputs; once recorded, in the same tensors each time."""
        kind = tuple(value is not None for value in given)
        if kind != self.kind:
            self.forget()
            self.kind = kind
        self.seen += 1
        if self.seen <= _SET_UP:
            return self.work(given)
        if self.recorded is None:
            self.recorded = self._record(given)
        graph, inputs, result = self.recorded
        for mine, value in zip(inputs, given, strict=True):
            if mine is not None and value is not None:
                mine.copy_(value)
        graph.replay()
        return result

    def forget(self) -> None:
        """Begin anew, because the state lies elsewhere now; the memory of what was recorded is free again."""
        self.kind, self.seen, self.recorded = (), 0, None

    def _record(self, given: StepInputs) -> tuple[torch.cuda.CUDAGraph, StepInputs, T]:
        audio, *small = given
        inputs = StepInputs(audio.clone(), *(None if value is None else value.clone() for value in small))
        graph = torch.cuda.CUDAGraph()
        # thread_local: others, which prepare batches, may ask the driver for memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.work(inputs)
        return graph, inputs, result


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
    """Codec, averaged codec, discriminators, optimizers and counts.

    Args:
        codec: trained in place.
        settings: how.
        place: where, and beside how many others.
        ear: the speaker encoder of the term `speaker`, on that place; None where the term has no weight.
    """

    def __init__(
        self, codec: SNAC, settings: PretrainSettings, place: DistributedContext, ear: SpeakerEncoder | None = None
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
        self.discriminators: Discriminators | None = None
        self.stretch: Tensor | None = None  # of the discriminators, in samples from its start
        how = settings.adversary
        if how is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(settings.seed, "discriminators"))
                self.discriminators = Discriminators(
                    how.periods,
                    how.n_ffts,
                    period_channels=how.period_channels,
                    spectral_channels=how.spectral_channels,
                ).to(place.device)
            if how.seconds is not None:
                self.stretch = torch.arange(round(how.seconds * codec.sampling_rate), device=place.device)
            self.discriminator_parameters = list(self.discriminators.parameters())
            self.discriminator_optimizer = adamw(self.discriminators, settings.weight_decay)
        q, new = settings.quantiser, settings.start is None  # with weights to start from the codes are alive
        self.continuous = (300 if new else 0) if q.continuous is None else q.continuous
        self.blending = (300 if new else 0) if q.blend is None else q.blend
        on_cuda = place.device.type == "cuda"
        self.replay = CudaGraphStep(self._work) if settings.graphs and on_cuda and place.world == 1 else None
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
            set_rate(self.discriminator_optimizer, rate(s, self.step, s.adversary.lr))
        with torch.random.fork_rng(devices=[self.place.device] if self.place.device.type == "cuda" else []):
            torch.manual_seed(derive(s.seed, self.step, self.place.rank, "decoder noise"))
            terms, out = self._work(given) if self.replay is None or self.blend < 1 else self.replay(given)
        self.step += 1
        if self.step % _LOOK == 0:
            self.check()
        self._remember()
        self._restart(out)
        return {name: term.detach().clone() for name, term in terms.items()}  # a replay would write over them

    def _given(self, batches: Batches) -> StepInputs:
        """The inputs of this step, on the device."""
        device = self.place.device
        audio = batches.at(self.step).to(device, non_blocking=True)
        levels, scale = self._levels(len(audio)), self._adversary_scale()
        start = None
        if scale is not None and self.stretch is not None:
            draw = generator(self.settings.seed, self.step, self.place.rank, "discriminators' stretch")
            start = torch.randint(audio.shape[-1] - len(self.stretch) + 1, (), generator=draw)
        small = (None if x is None else x.to(device) for x in (levels, scale, start))
        return StepInputs(audio, *small)

    def _work(self, given: StepInputs) -> tuple[dict[str, Tensor], Quantised]:
        """From inputs to changed weights; looks at no tensor's values while it is recorded."""
        s, blend = self.settings, self.blend
        made, out = self._reconstruct(given, blend)
        self.usage.add(out.codes)
        terms = self.distance(made, given.audio)
        if self.speaker is not None:
            terms["speaker"] = self.speaker(made, given.audio)
        terms["commitment"] = torch.stack(out.commitment).sum()
        terms["codebook"] = torch.stack(out.codebook).sum()
        discriminator = None
        if self.discriminators is not None and given.scale is not None:
            with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.bf16):
                real, fake = (self.discriminators(self._stretch(audio, given)) for audio in (given.audio, made))
            terms["adversarial"], terms["features"] = adversarial_loss(fake), feature_loss(real, fake)
            terms["discriminator"] = discriminator = discriminator_loss(real, fake)
        # encodings are not pulled to entries that do not stand for anything yet
        shares = {"commitment": blend, "adversarial": given.scale, "features": given.scale}
        weights = {name: weight for name, weight in s.weights.model_dump().items() if weight and name in terms}
        terms["loss"] = loss = torch.stack(
            [w * shares.get(name, 1.0) * terms[name] for name, w in weights.items()]
        ).sum()
        # both networks take their gradients from one pass: the discriminators are seen as they were before this step. Theirs
        # come first, since what is compiled, the codec's layers, lets its graph be used once
        of_discriminators = (
            None
            if discriminator is None
            else torch.autograd.grad(discriminator, self.discriminator_parameters, retain_graph=True)
        )
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if of_discriminators is not None:
            self._update(self.discriminator_optimizer, self.discriminator_parameters, of_discriminators)
        terms["gradient"] = self._update(self.optimizer, self.parameters, found)
        return terms, out

    def _stretch(self, audio: Tensor, given: StepInputs) -> Tensor:
        """What discriminators hear of audio (B, 1, T)."""
        if given.start is None or self.stretch is None:
            return audio
        return audio.index_select(-1, given.start + self.stretch)

    def _reconstruct(self, given: StepInputs, blend: float) -> tuple[Tensor, Quantised]:
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
        """Weight of the discriminators in this step, 0 to 1, a scalar; None before they train."""
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
        if self.discriminators is not None:
            state |= {
                "discriminators": self.discriminators.state_dict(),
                "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            }
        with writing(path) as temporary:
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
        if self.discriminators is not None:
            self.discriminators.load_state_dict(state["discriminators"])
            load_state(self.discriminator_optimizer, state["discriminator_optimizer"])

    def averaged(self) -> SNAC:
        """A copy of the codec with the averaged weights, on the CPU, in eval mode."""
        codec = SNAC.from_config(self.codec.config)
        codec.load_state_dict(self.average)
        return codec.eval()
