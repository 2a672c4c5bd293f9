"""Encoding, decoding and conversion in chunks: the same result as on the whole, in constant memory.

A layer of SNAC computes each output from a bounded stretch of its input. A chunk of the output is therefore computed on
a window: the chunk, and as much context on each side as the layers, and the edits of strategies between them, depend
on. Windows start and end at whole codes of the coarsest level and at whole attention windows, so that strides and
attention fall as in the whole. The first window starts where the item starts, and the last one ends where it ends: the
zero padding of the convolutions is that of the whole too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snac_core.codec.checks import check_audio, check_finite
from snac_core.codec.layers import LocalMHA
from snac_core.conditioning import Conditioning
from snac_core.errors import UserError
from snac_core.taps import is_before_vq

if TYPE_CHECKING:
    from snac_core.codec.snac import SNAC
    from snac_core.conditioned import ConditionedCodec
    from snac_core.hooks import Edit

CHUNK_SECONDS = 10.0
"""Largest default length of a chunk: the context around it costs little."""
_SHORTEST = 4.0  # s, of the default: shorter chunks are mostly context
_ACTIVATION = 28e6  # bytes: larger tensors take memory from the system each time, which takes as long as computing them
_PROBE = 1024  # frames on which the receptive field of an edit is measured, at least
_SAME = 1e-5  # largest difference of two equal results, relative to their largest value


# -------------------------------------------------------------------- receptive fields


def needed(layer: nn.Module, first: int, last: int) -> tuple[int, int]:
    """The stretch [first, last) of a layer's input on which the stretch [first, last) of its output depends.

    Residual connections add nothing: the stretch of the path beside them contains theirs.
    """
    parts = [part for part in layer.modules() if isinstance(part, nn.Conv1d | nn.ConvTranspose1d | LocalMHA)]
    for part in reversed(parts):
        if isinstance(part, LocalMHA):
            first, last = first // part.window_size * part.window_size, _up(last, part.window_size) * part.window_size
            continue
        stride, padding = part.stride[0], int(part.padding[0])
        reach = (part.kernel_size[0] - 1) * part.dilation[0]
        if isinstance(part, nn.ConvTranspose1d):  # input i adds to outputs i * stride - padding + [0, reach]
            first, last = _up(first + padding - reach, stride), (last - 1 + padding) // stride + 1
        else:
            first, last = first * stride - padding, (last - 1) * stride - padding + reach + 1
    return first, last


def _up(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)


@torch.no_grad()
def measured_receptive_field(edit: Edit, cond: Conditioning, period: int, like: Tensor) -> float:
    """Frames on each side of a frame that an edit depends on, found by changing one frame; `math.inf`: all frames.

    An edit that gives another result on a part of the item than on the whole (because it depends on the length or on
    the position in time), or where the other half of the item is louder or softer (because it compares a frame with
    the whole), counts as one that depends on all frames.

    Args:
        edit: one strategy's edit at one tap.
        cond: what the edit is conditioned on; its first row is used.
        period: frames at this tap of one code of the coarsest level, or of one attention window: where parts start.
        like: a weight of the model, for device and dtype.
    """
    frames = _up(max(_PROBE, 3 * period), period) * period
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, edit.tap.channels, frames), generator=generator).to(like)
    cond = cond.first(1)
    changed, middle = x.clone(), frames // 2
    changed[..., middle] += 3 * torch.randn((1, edit.tap.channels), generator=generator).to(like)
    whole = edit(x.clone(), cond)
    differs = (whole != edit(changed, cond)).any(dim=1)[0].nonzero().flatten()
    reach = int((differs - middle).abs().max()) if len(differs) else 0
    if reach >= min(middle, frames - middle) - 1:
        return math.inf
    tolerance = _SAME * float(whole.abs().max())
    for far, near in ((slice(middle, None), slice(middle - reach)), (slice(middle), slice(middle + reach, None))):
        for factor in (0.1, 10.0):
            scaled = x.clone()
            scaled[..., far] *= factor
            if float((edit(scaled, cond) - whole)[..., near].abs().max()) > tolerance:
                return math.inf
    for start, end in ((period, frames), (0, frames - period)):
        left, right = (reach if start else 0), (0 if start else reach)  # where the part ends and the whole goes on
        part = edit(x[..., start:end].clone(), cond)[..., left : end - start - right]
        difference = float((part - whole[..., start + left : end - right]).abs().max())
        if difference > tolerance:
            return math.inf
    return reach


@dataclass(frozen=True)
class Context:
    """What a chunk depends on beside itself.

    Attributes:
        unit: frames, or samples of audio, that windows are made of.
        before, after: units on each side of a chunk; `math.inf`: the whole item.
    """

    unit: int
    before: float
    after: float

    def limited(self, lookahead: float | None, rate: float) -> Context:
        """With at most `lookahead` seconds, in whole units, after a chunk; `rate`: frames or samples per second."""
        if lookahead is None:
            return self
        return Context(self.unit, self.before, min(self.after, int(_not_negative(lookahead) * rate / self.unit + 1e-6)))


def encoder_context(model: ConditionedCodec, cond: Conditioning | None = None) -> Context:
    """The context of the path from audio to codes, in units of samples: of whole coarse codes and attention windows.

    Args:
        model: a codec with strategies, or with none.
        cond: what the model is conditioned on; None: the bare codec.
    """
    codec = model.codec
    unit = _period(codec)
    taps = [None, *(tap.name for tap in codec.taps if is_before_vq(tap.name))]
    return _context(model, cond, taps, unit * codec.hop_length, unit)


def decoder_context(model: ConditionedCodec, cond: Conditioning | None = None) -> Context:
    """The context of the path from codes to audio, in units of latent frames, or of attention windows; see above."""
    codec = model.codec
    unit = codec.attn_window_size or 1
    taps = [*(tap.name for tap in codec.taps if not is_before_vq(tap.name)), "audio"]
    return _context(model, cond, taps, unit, unit * codec.hop_length)


def _period(codec: SNAC) -> int:
    """Latent frames after which strides and attention windows start together."""
    return math.lcm(codec.vq_strides[0], codec.attn_window_size or 1)


def _context(
    model: ConditionedCodec, cond: Conditioning | None, taps: Sequence[str | None], unit_in: int, unit_out: int
) -> Context:
    """Of the path along `taps`: from None, the start of the encoder, or "quantized", to "latent" or "audio"."""
    first, last = 0, unit_out
    for index in reversed(range(len(taps))):
        reach = _edits_receptive_field(model, cond, taps[index])
        if math.isinf(reach):
            return Context(unit_in, math.inf, math.inf)
        first, last = first - int(reach), last + int(reach)
        if index:
            for layer in reversed(model.codec.layers(taps[index - 1], str(taps[index]))):
                first, last = needed(layer, first, last)
    return Context(unit_in, _up(-first, unit_in), _up(last - unit_in, unit_in))


def _edits_receptive_field(model: ConditionedCodec, cond: Conditioning | None, tap: str | None) -> float:
    """Frames on each side that the edits at a tap depend on, as their strategies declare it, or measured."""
    if cond is None or tap is None or tap not in model.edits:
        return 0
    codec, total = model.codec, 0.0
    for edit in model.edits[tap]:
        frames = model.attached[edit.strategy].receptive_field(edit.tap)
        if frames is None:
            period = round(_period(codec) * codec.hop_length * edit.tap.frame_rate / codec.sampling_rate)
            frames = measured_receptive_field(edit, cond, period, next(codec.parameters()))
        if math.isinf(frames):
            warnings.warn(
                f"the edit of strategy {edit.strategy!r} at tap {tap!r} depends on all frames: the audio is processed "
                "whole, in memory that grows with its length",
                stacklevel=2,
            )
        total += frames
    return total


# -------------------------------------------------------------------- windows


class Windows:
    """Applies a function to a sequence that arrives in pieces of any length, one window at a time.

    The windows depend on the length of the sequence alone, not on the pieces.

    Args:
        apply: from a window (..., T) and the unit at which it starts, to tensors with a whole number of elements per
            unit in their last dimension. The elements of a chunk must depend on the chunk and its context alone.
        context: of the function.
        chunk: units of a chunk; windows are processed whenever so many more units have arrived.
        lag: units by which the arrival of the sequence is late: what waits for the end of a chunk of another stage.
        fade: whether chunks of audio are joined without a step. With less context than the function depends on, two
            windows differ where they meet, and a step would be a click.
    """

    def __init__(
        self,
        apply: Callable[[Tensor, int], Sequence[Tensor]],
        context: Context,
        chunk: float,
        lag: int = 0,
        fade: bool = False,
    ) -> None:
        self._apply, self._context, self._lag = apply, context, lag
        self._chunk = math.inf if math.isinf(context.after) else chunk
        self._held: Tensor | None = None  # what coming windows need of the sequence so far
        self._held_from = 0  # the unit at which it starts
        self._done = 0  # units that are finished
        self._fade, self._before = fade, list[Tensor]()  # results of the last window from its chunk's last element on
        self._due = self._chunk - lag % self._chunk if math.isfinite(self._chunk) else math.inf

    def push(self, piece: Tensor) -> list[Sequence[Tensor]]:
        """Add a piece (..., T); returns the results of all chunks that have their context now.

        Raises:
            UserError: for another number of items than before.
        """
        if self._held is not None and piece.shape[:-1] != self._held.shape[:-1]:
            raise UserError(f"got {len(piece)} items, after {len(self._held)}; expected as many until flush()")
        self._held = piece if self._held is None else torch.cat([self._held, piece], dim=-1)
        results = []
        while self._held_from + self._held.shape[-1] // self._context.unit >= self._due:
            end = int(self._due - self._context.after)
            if end > self._done:
                results.append(self._window(end, int(self._due)))
            self._due += self._chunk
        return results

    def flush(self) -> list[Sequence[Tensor]]:
        """The results of what remains; the sequence, a whole number of units, ends here."""
        results: list[Sequence[Tensor]] = []
        if self._held is None:
            return results
        total = self._held_from + self._held.shape[-1] // self._context.unit
        while self._done < total:
            end = int(min(self._done + self._chunk, total))
            results.append(self._window(end, int(min(end + self._context.after, total))))
        return results

    def _window(self, end: int, last: int) -> Sequence[Tensor]:
        """The results from the first unfinished unit to `end`, from a window that ends at `last`; all in units."""
        assert self._held is not None
        unit = self._context.unit
        first = int(max(0, self._done - self._context.before))
        window = self._held[..., (first - self._held_from) * unit : (last - self._held_from) * unit]
        results, rests = [], []
        for number, computed in enumerate(self._apply(window, first)):
            each = computed.shape[-1] // (last - first)
            start, stop = (self._done - first) * each, (end - first) * each
            joins = self._fade and self._done > 0
            result = _joined(self._before[number], computed, start, each // unit) if joins else computed
            results.append(result[..., start:stop])
            rests.append(result[..., stop - 1 :])
        self._before = rests
        self._done = end
        first = int(max(self._held_from, end - self._context.before))
        self._held = self._held[..., (first - self._held_from) * unit :].clone()  # a view would keep all of it
        self._held_from = first
        return results


def _joined(before: Tensor, after: Tensor, start: int, frame: int) -> Tensor:
    """`after` (..., n), whose element `start` follows the first one of `before` (..., 1 + m), without a step there.

    If m > 0, `before` is faded into `after` linearly over the first quarter of m: the farther beyond its chunk, the
    more of its context is missing. If m = 0, the difference where the two meet is subtracted, less and less over
    half of `frame` elements.
    """
    beyond = before.shape[-1] - 1
    count = min(beyond // 4 if beyond else frame // 2, after.shape[-1] - start)
    weight = (torch.arange(count, device=after.device, dtype=after.dtype) + 0.5) / max(1, count)
    new = after[..., start : start + count]
    step = before[..., 1 : 1 + count] - new if beyond else before - after[..., start - 1 : start]
    return torch.cat([after[..., :start], new + (1 - weight) * step, after[..., start + count :]], dim=-1)


# -------------------------------------------------------------------- streams


class EncoderStream:
    """Audio to codes, in chunks. The codes are those of `ConditionedCodec.encode` on the whole.

    A code can differ where two entries are equally near up to rounding: convolutions of another length round
    differently.

    Args:
        model: a codec with strategies, or with none, in eval mode.
        speaker_embedding: (B, S), (1, S) or (S,), of unit norm, or a `Conditioning`. None: the bare codec.
        seconds: length of a chunk; rounded to whole codes of the coarsest level. None: `chunk_seconds`.
        lookahead: seconds of audio after a chunk that its codes may depend on; None: all that they depend on.

    Attributes:
        context: of the chunks.
        chunk: units of a chunk.

    Raises:
        UserError: for an embedding if no strategy acts before VQ, or of another dimension or encoder.
    """

    def __init__(
        self,
        model: ConditionedCodec,
        speaker_embedding: Tensor | Conditioning | None = None,
        *,
        seconds: float | None = None,
        lookahead: float | None = None,
    ) -> None:
        self._model, self._cond = model, model.conditioning(speaker_embedding, before_vq=True)
        rate = model.codec.sampling_rate
        self.context = encoder_context(model, self._cond).limited(lookahead, rate)
        self.chunk = max(1, round(_length(model.codec, seconds) * rate / self.context.unit))
        self._start()

    def _start(self) -> None:
        self._windows = Windows(self._encode, self.context, self.chunk)
        self._pushed, self._rows = 0, 0

    def _encode(self, audio: Tensor, _first: int) -> list[Tensor]:
        return self._model.latents(audio, self._cond).codes

    @torch.no_grad()
    def push(self, audio: Tensor) -> list[Tensor]:
        """Add audio (B, 1, T) of any length; returns the codes (B, n) per codebook that are finished, n can be 0."""
        check_audio(audio, next(self._model.codec.parameters()))
        check_finite(audio)
        self._pushed, self._rows = self._pushed + audio.shape[-1], audio.shape[0]
        return self._codes(self._windows.push(audio))

    @torch.no_grad()
    def flush(self) -> list[Tensor]:
        """End the item; returns the remaining codes (B, n) per codebook. The next `push` starts another item.

        Raises:
            UserError: if nothing was pushed.
        """
        if self._pushed == 0:
            raise UserError("no audio was pushed; expected (B, 1, T)")
        weight = next(self._model.codec.parameters())
        padding = weight.new_zeros((self._rows, 1, -self._pushed % self.context.unit))
        codes = self._codes(self._windows.push(padding) + self._windows.flush())
        self._start()
        return codes

    def _codes(self, chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        if not chunks:
            device = next(self._model.codec.parameters()).device
            return [torch.zeros((self._rows, 0), dtype=torch.long, device=device) for _ in self._model.codec.vq_strides]
        return [torch.cat(level, dim=-1) for level in zip(*chunks, strict=True)]

    def run(self, pieces: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """The codes of an item that arrives in pieces (B, 1, T)."""
        yield from (self.push(piece) for piece in pieces)
        yield self.flush()


class DecoderStream:
    """Codes to audio, in chunks. The audio is that of `ConditionedCodec.decode` on the whole, up to rounding.

    The noise is that of `SNAC.fixed_noise` and does not depend on the chunks. Its seed is that of the `fixed_noise`
    block in which the stream is made, or else comes from torch's global generator.

    Args:
        model: a codec with strategies, or with none, in eval mode.
        speaker_embedding: (B, S), (1, S) or (S,), of unit norm, or a `Conditioning`. None: the bare codec.
        seconds: length of a chunk; rounded to whole codes of the coarsest level. None: `chunk_seconds`.
        lookahead: seconds of audio after a chunk that it may depend on; None: all that it depends on.
        delay: seconds of audio by which codes arrive late, as those of an `EncoderStream` do.

    Attributes:
        context: of the chunks.
        chunk: units of a chunk.

    Raises:
        UserError: for an embedding if no strategy acts after VQ, or of another dimension or encoder.
    """

    def __init__(
        self,
        model: ConditionedCodec,
        speaker_embedding: Tensor | Conditioning | None = None,
        *,
        seconds: float | None = None,
        lookahead: float | None = None,
        delay: float = 0.0,
    ) -> None:
        codec = model.codec
        self._model, self._cond = model, model.conditioning(speaker_embedding, before_vq=False)
        seed = codec.noise.seed
        self._seed = int(torch.randint(2**62, ())) if seed is None else seed
        frame_rate = codec.sampling_rate / codec.hop_length
        full = decoder_context(model, self._cond)
        self.context = full.limited(lookahead, frame_rate)
        self._fade = self.context != full
        period = _period(codec)
        self.chunk = max(1, round(_length(codec, seconds) * frame_rate / period)) * period // self.context.unit
        self._lag = round(delay * frame_rate / self.context.unit) if math.isfinite(delay) else 0
        self._start()

    def _start(self) -> None:
        self._windows = Windows(self._decode, self.context, self.chunk, self._lag, self._fade)
        self._rows = 0

    def _decode(self, z_q: Tensor, first: int) -> list[Tensor]:
        cond = None if self._cond is None else self._cond.expand(z_q.shape[0])
        with self._model.codec.fixed_noise(self._seed, first * self.context.unit):
            return [self._model.decode_quantized(z_q, cond)]

    @torch.no_grad()
    def push(self, codes: Sequence[Tensor]) -> Tensor:
        """Add codes, (B, F / stride) per codebook, for any F that `decode` accepts, or 0.

        Returns:
            the audio (B, 1, n) that is finished; n can be 0.
        """
        self._rows = codes[0].shape[0] if len(codes) else 0
        if self._rows and codes[0].shape[-1] == 0:
            return self._audio([])
        self._model.codec.check_codes(codes)
        return self._audio(self._windows.push(self._model.codec.quantizer.from_codes(codes)))

    @torch.no_grad()
    def flush(self) -> Tensor:
        """End the item; returns the remaining audio (B, 1, n), with the padding of `encode`.

        The next `push` starts another item, with the same noise.
        """
        audio = self._audio(self._windows.flush())
        self._start()
        return audio

    def _audio(self, chunks: Sequence[Sequence[Tensor]]) -> Tensor:
        if not chunks:
            return next(self._model.codec.parameters()).new_zeros((self._rows, 1, 0))
        return torch.cat([audio for (audio,) in chunks], dim=-1)

    def run(self, pieces: Iterable[Sequence[Tensor]], length: int | None = None) -> Iterator[Tensor]:
        """The audio (B, 1, n) of an item whose codes arrive in pieces; `length` is that of the whole, as in `decode`.

        Raises:
            UserError: for a `length` beyond the codes.
        """
        done = 0
        for audio in self._untrimmed(pieces):
            yield audio if length is None else audio[..., : max(0, length - done)]
            done += audio.shape[-1]
        if length is not None and length > done:
            raise UserError(f"length {length} of audio from codes that hold {done} samples; expected 1 to {done}")

    def _untrimmed(self, pieces: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        yield from (self.push(piece) for piece in pieces)
        yield self.flush()


def split_codes(codec: SNAC, codes: Sequence[Tensor], seconds: float = CHUNK_SECONDS) -> Iterator[list[Tensor]]:
    """Codes (B, F / stride) per codebook as pieces of at most `seconds` that `DecoderStream.push` accepts."""
    period = _period(codec)
    frames = max(1, round(seconds * codec.sampling_rate / codec.hop_length / period)) * period
    levels = [torch.split(level, frames // n, dim=-1) for level, n in zip(codes, codec.vq_strides, strict=True)]
    return (list(piece) for piece in zip(*levels, strict=True))


class ConversionStream:
    """Audio to converted audio, in chunks or live: `push` samples, and get the converted samples that are finished.

    The result is that of `ConditionedCodec.reconstruct` on the whole, up to rounding, however it is pushed. The noise
    is as in `DecoderStream`.

    Args:
        model: a codec with strategies, or with none, in eval mode.
        speaker_embedding: (B, S), (1, S) or (S,), of unit norm, or a `Conditioning`. None: the bare codec.
        seconds: length of a chunk; rounded to whole codes of the coarsest level. A short one has a low latency, a long
            one costs less time. None: `chunk_seconds`.
        lookahead: seconds of audio after a chunk that its conversion may depend on; None: all that it depends on. A
            smaller number shortens the latency, and changes the result; chunks are then joined without a step.

    Attributes:
        lookahead: seconds of audio after a chunk that its conversion depends on.
        latency: seconds of audio between a sample and its conversion, at most; computing time comes on top.

    Raises:
        UserError: for an embedding of another dimension or encoder.
    """

    def __init__(
        self,
        model: ConditionedCodec,
        speaker_embedding: Tensor | Conditioning | None = None,
        *,
        seconds: float | None = None,
        lookahead: float | None = None,
    ) -> None:
        before, after = (speaker_embedding if model.acts(before_vq=side) else None for side in (True, False))
        rate = model.codec.sampling_rate
        first, second = _shares(model, before, lookahead)
        self._encoder = EncoderStream(model, before, seconds=seconds, lookahead=first)
        delay = self._encoder.context.after * self._encoder.context.unit / rate
        self._decoder = DecoderStream(model, after, seconds=seconds, lookahead=second, delay=delay)
        context = self._decoder.context
        self.lookahead = delay + context.after * context.unit * model.codec.hop_length / rate
        self.latency = self.lookahead + self._encoder.chunk * self._encoder.context.unit / rate
        self._pushed = self._returned = 0

    def push(self, audio: Tensor) -> Tensor:
        """Add audio (B, 1, T) of any length; returns the converted audio (B, 1, n) that is finished, n can be 0."""
        converted = self._decoder.push(self._encoder.push(audio))
        self._pushed += audio.shape[-1]
        self._returned += converted.shape[-1]
        return converted

    def flush(self) -> Tensor:
        """End the item; returns the remaining converted audio (B, 1, n): in all, as much as was pushed.

        The next `push` starts another item, with the same noise.

        Raises:
            UserError: if nothing was pushed.
        """
        rest = torch.cat([self._decoder.push(self._encoder.flush()), self._decoder.flush()], dim=-1)
        rest = rest[..., : self._pushed - self._returned]
        self._pushed = self._returned = 0
        return rest

    def run(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The conversion (B, 1, n) of an item that arrives in pieces (B, 1, T)."""
        yield from (self.push(piece) for piece in pieces)
        yield self.flush()


def _shares(
    model: ConditionedCodec, embedding: Tensor | Conditioning | None, lookahead: float | None
) -> tuple[float | None, float | None]:
    """What encoder and decoder get of a look-ahead: two thirds and one, and the decoder what the encoder cannot use."""
    if lookahead is None:
        return None, None
    rate = model.codec.sampling_rate
    context = encoder_context(model, model.conditioning(embedding, before_vq=True)).limited(
        2 / 3 * _not_negative(lookahead), rate
    )
    encoder = min(context.after * context.unit / rate, lookahead)
    return encoder, lookahead - encoder


def chunk_seconds(codec: SNAC) -> float:
    """Default length of a chunk in s: 4 to 10, as far as the largest activation stays below 28 MB."""
    per_second = max(4 * tap.channels * tap.frame_rate for tap in codec.taps)
    return min(CHUNK_SECONDS, max(_SHORTEST, _ACTIVATION / per_second))


def _length(codec: SNAC, seconds: float | None) -> float:
    if seconds is None:
        return chunk_seconds(codec)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"seconds is a number above 0; got {seconds!r}")
    return seconds


def _not_negative(lookahead: float) -> float:
    if not (lookahead >= 0 and math.isfinite(lookahead)):
        raise UserError(f"lookahead is a number of seconds, 0 or more; got {lookahead!r}")
    return lookahead
