"""SNAC, the multi-scale neural audio codec of Siuzdak et al. 2024, unchanged, with named taps along its signal path."""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snac_core import hub
from snac_core.codec.batches import checked_lengths, decode_each, encode_each
from snac_core.codec.checks import check_audio, check_codes, check_finite, resolved_config
from snac_core.codec.layers import (
    Decoder,
    Encoder,
    NoiseSource,
    ResidualUnit,
    Snake1d,
    WNConv1d,
    WNConvTranspose1d,
)
from snac_core.codec.pretrained import CodecFiles, load_weights, read_config, save_codec
from snac_core.codec.tokens import TokenLayout
from snac_core.codec.vq import ResidualVectorQuantize
from snac_core.errors import UserError, nearest
from snac_core.files import tensor_digest, write_text
from snac_core.model_card import base_card
from snac_core.taps import Tap, is_before_vq


class SignalPath:
    """The taps of one configuration, and the layers between them.

    Tap names count only the resampling blocks: attention and depthwise convolutions do not change them.

    Args:
        config: SNAC's constructor arguments, resolved.
        encoder_layers, decoder_layers: number of layers of each side.
    """

    def __init__(self, config: Mapping[str, Any], encoder_layers: int, decoder_layers: int) -> None:
        rate, channels = float(config["sampling_rate"]), config["encoder_dim"]
        taps = [Tap("encoder_0", channels, rate)]
        ends = {"encoder_0": 1}  # number of layers of its side before a tap
        for number, factor in enumerate(config["encoder_rates"], 1):
            rate, channels = rate / factor, channels * 2
            taps.append(Tap(f"encoder_{number}", channels, rate))
            ends[f"encoder_{number}"] = 1 + number
        taps += [Tap("latent", channels, rate), Tap("quantized", channels, rate)]
        ends |= {"latent": encoder_layers, "quantized": 0}
        channels = config["decoder_dim"]
        stem = decoder_layers - len(config["decoder_rates"]) - 3  # Snake, convolution and tanh come last
        for number, factor in enumerate([1, *config["decoder_rates"]]):
            rate = rate * factor
            taps.append(Tap(f"decoder_{number}", channels // 2**number, rate))
            ends[f"decoder_{number}"] = stem + number
        ends["audio"] = decoder_layers
        self.taps = tuple(taps)
        self._channels = {tap.name: tap.channels for tap in taps}
        self._ends = ends

    def between(self, after: str | None, upto: str) -> tuple[str, int, int]:
        """The side ("encoder" or "decoder") and its layers [first, last) from `after` to `upto`."""
        for name in (after, upto):
            if name is not None and name not in self._ends:
                raise UserError(f"no tap {name!r} in this codec{nearest(name, self._ends)}")
        if after == "audio":
            raise UserError("nothing comes after 'audio'")
        before = after is None or is_before_vq(after)
        if before != is_before_vq(upto):
            raise UserError(
                f"the quantizer is between {after or 'the start'!r} and {upto!r}; advance from the audio to 'latent', "
                f"call quantizer(z), and continue from 'quantized'"
            )
        first, last = 0 if after is None else self._ends[after], self._ends[upto]
        if first > last:
            raise UserError(f"{upto!r} comes before {after!r} in the signal path; taps go forward only")
        return "encoder" if before else "decoder", first, last

    def check(self, x: Tensor, after: str | None) -> None:
        """Raise UserError unless `x` has the shape (B, C, F) of the activation at `after`."""
        channels = 1 if after is None else self._channels[after]
        if x.dim() != 3 or x.shape[1] != channels:
            place = f"at tap {after!r}" if after else "for audio"
            raise UserError(f"an activation of shape {tuple(x.shape)}; expected (B, {channels}, F) {place}")


class SNAC(nn.Module):
    """The codec. Constructor arguments, defaults and parameter names are those of the `snac` package, version 1.2.1.

    Source: Siuzdak et al. 2024, arXiv 2410.14411, and github.com/hubertsiuzdak/snac.

    Args:
        sampling_rate: of the audio, in Hz.
        encoder_dim: channels after the first convolution; doubled by every downsampling block.
        encoder_rates: downsampling factors; their product is the hop.
        latent_dim: C of the latent; None, or encoder_dim * 2 ** len(encoder_rates).
        decoder_dim: channels before the first upsampling block; halved by every block.
        decoder_rates: upsampling factors; their product must be the hop.
        attn_window_size: frames of an attention window; None: no attention.
        codebook_size: entries of a codebook.
        codebook_dim: channels of an entry.
        vq_strides: latent frames per code of each codebook, coarse first.
        noise: whether decoder blocks add noise.
        depthwise: whether residual units use depthwise convolutions.

    Raises:
        UserError: for rates or widths that do not fit together.
    """

    def __init__(
        self,
        sampling_rate: int = 44100,
        encoder_dim: int = 64,
        encoder_rates: Sequence[int] = (3, 3, 7, 7),
        latent_dim: int | None = None,
        decoder_dim: int = 1536,
        decoder_rates: Sequence[int] = (7, 7, 3, 3),
        attn_window_size: int | None = 32,
        codebook_size: int = 4096,
        codebook_dim: int = 8,
        vq_strides: Sequence[int] = (8, 4, 2, 1),
        noise: bool = True,
        depthwise: bool = True,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = resolved_config(
            {
                "sampling_rate": sampling_rate,
                "encoder_dim": encoder_dim,
                "encoder_rates": encoder_rates,
                "latent_dim": latent_dim,
                "decoder_dim": decoder_dim,
                "decoder_rates": decoder_rates,
                "attn_window_size": attn_window_size,
                "codebook_size": codebook_size,
                "codebook_dim": codebook_dim,
                "vq_strides": vq_strides,
                "noise": noise,
                "depthwise": depthwise,
            }
        )
        self.name = ""
        self.revision: str | None = None
        self.sampling_rate = sampling_rate
        self.latent_dim: int = self.config["latent_dim"]
        self.hop_length = math.prod(encoder_rates)
        self.vq_strides = tuple(vq_strides)
        self.n_codebooks = len(self.vq_strides)
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.attn_window_size = attn_window_size
        self.noise = NoiseSource()
        self.encoder = Encoder(encoder_dim, encoder_rates, depthwise, attn_window_size)
        self.quantizer = ResidualVectorQuantize(self.latent_dim, codebook_size, codebook_dim, self.vq_strides)
        self.decoder = Decoder(
            self.latent_dim, decoder_dim, decoder_rates, self.noise if noise else None, depthwise, attn_window_size
        )
        self._frozen = False
        self._autocast: torch.dtype | None = None
        self._checkpoint_decoder = False
        self._path = SignalPath(self.config, len(self.encoder.block), len(self.decoder.model))
        self._digest: tuple[object, str] | None = None

    # ---------------------------------------------------------------- the path

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps of this codec, in signal order."""
        return self._path.taps

    def preprocess(self, audio: Tensor) -> Tensor:
        """Pad (B, 1, T) at the right with zeros to a multiple of hop * lcm(first stride, attention window).

        Raises:
            UserError: unless `audio` is (B, 1, T), of the weights' dtype and device.
        """
        check_audio(audio, next(self.parameters()))
        return nn.functional.pad(audio, (0, -audio.shape[-1] % self.padding_multiple))

    @property
    def padding_multiple(self) -> int:
        """hop * lcm(first stride, attention window): the samples to a multiple of which audio is padded."""
        return self.hop_length * math.lcm(self.vq_strides[0], self.attn_window_size or 1)

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode and decode.

        Args:
            audio: (B, 1, T) at `sampling_rate`, full scale 1.

        Returns:
            the reconstruction (B, 1, T), and codes as `encode` returns them.

        Raises:
            UserError: for another shape, dtype or device, and for NaN or infinity.
        """
        padded = self.preprocess(audio)
        check_finite(audio)
        z_q, codes = self.quantizer(self.advance(padded, None, "latent"))
        return self.advance(z_q, "quantized", "audio")[..., : audio.shape[-1]], codes

    def encode(self, audio: Tensor, *, lengths: Sequence[int] | Tensor | None = None) -> list[Tensor]:
        """Audio to codes.

        Args:
            audio: (B, 1, T) at `sampling_rate`, full scale 1; padded as in `preprocess`.
            lengths: of the items, in samples, for items of different lengths in one batch. Each item gets the codes
                that it gets alone; -1 follows the codes of a shorter one. Items of equal padded length are encoded
                together. None: all have length T.

        Returns:
            one integer tensor (B, F / stride) per codebook, coarse first, with F = padded T / hop_length.

        Raises:
            UserError: for another shape, dtype or device, for NaN or infinity, and for lengths beyond T.
        """
        if lengths is not None:
            check_audio(audio, next(self.parameters()))
            counts = checked_lengths(lengths, audio.shape[0], audio.shape[-1])
            return encode_each(lambda part, _: self.encode(part), audio, counts, self.padding_multiple)
        padded = self.preprocess(audio)
        check_finite(audio)
        codes: list[Tensor] = self.quantizer(self.advance(padded, None, "latent"))[1]
        return codes

    def decode(
        self, codes: Sequence[Tensor], length: int | None = None, *, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Codes to audio.

        The audio is longer than what was encoded, as in upstream, because `encode` pads: give `length` to cut it.

        Args:
            codes: one integer tensor (B, F / stride) per codebook, coarse first.
            length: number of samples to return; None: all, with the padding of `encode`.
            lengths: of the items, in samples, for codes of `encode(audio, lengths=lengths)`. Each item is decoded
                without the others' length; zeros follow a shorter one.

        Returns:
            (B, 1, T) at `sampling_rate`.

        Raises:
            UserError: for codes that are not this codec's, or a `length` beyond them.
        """
        if lengths is not None:
            return decode_each(
                lambda part, _: self.decode(part), codes, self.item_lengths(codes, lengths, length),
                [self.hop_length * stride for stride in self.vq_strides], self.padding_multiple,
            )  # fmt: skip
        self.check_codes(codes)
        samples = codes[0].shape[-1] * self.vq_strides[0] * self.hop_length
        if length is not None and not 0 < length <= samples:
            raise UserError(f"length {length} of audio from codes that hold {samples} samples; expected 1 to {samples}")
        return self.advance(self.quantizer.from_codes(codes), "quantized", "audio")[..., :length]

    def advance(self, x: Tensor, after: str | None, upto: str) -> Tensor:
        """Run the layers from tap `after` to tap `upto`, without edits; both are on one side of the quantizer.

        Several short runs give the same result as one run, bit for bit.

        Args:
            x: the activation (B, C, F) at `after`; padded audio (B, 1, T) where `after` is None.
            after: a tap, or None for the start of the encoder. If it equals `upto`, `x` is returned.
            upto: a tap, or "audio" for the end of the decoder.

        Returns:
            the activation (B, C, F) at `upto`, or audio (B, 1, T).

        Raises:
            UserError: for an unknown tap, taps on two sides of the quantizer or in the wrong order, and an `x` of
                another shape than that at `after`.
        """
        layers, dtype = self.layers(after, upto), x.dtype
        self._path.check(x, after)
        recompute = self._checkpoint_decoder and not is_before_vq(upto)
        with self.autocast(x.device):
            for layer in layers:
                if recompute and x.requires_grad:
                    x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = layer(x)
        return x.to(dtype)

    def layers(self, after: str | None, upto: str) -> list[nn.Module]:
        """The layers from tap `after` to tap `upto`; arguments and errors as in `advance`."""
        side, first, last = self._path.between(after, upto)
        return list(islice(self.encoder.block if side == "encoder" else self.decoder.model, first, last))

    @contextmanager
    def computing(self, *, autocast: torch.dtype | None = None, checkpoint_decoder: bool = False) -> Iterator[None]:
        """Inside the block, `advance` and the edits of strategies compute as these settings say.

        Args:
            autocast: lower precision for convolutions and products, as `torch.autocast` chooses them. Activations at
                taps keep their dtype, and the quantizer computes in float32.
            checkpoint_decoder: keep only the input of each decoder block for the gradient, and compute the rest again.
                Inside `fixed_noise`, the gradient is the same.
        """
        before = self._autocast, self._checkpoint_decoder
        self._autocast, self._checkpoint_decoder = autocast, checkpoint_decoder
        try:
            yield
        finally:
            self._autocast, self._checkpoint_decoder = before

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The precision of `computing` on a device, as a block for other modules."""
        return nullcontext() if self._autocast is None else torch.autocast(device.type, self._autocast)

    @contextmanager
    def fixed_noise(self, seed: int, first_frame: int = 0) -> Iterator[None]:
        """Inside the block, every decode starts from `seed`, and an item's noise does not depend on its batch.

        Outside, the decoder's noise comes from torch's global generator, as in upstream.

        Args:
            seed: a whole number.
            first_frame: position in the item, in latent frames, of the first frame that is decoded. A part of an item
                is decoded with the noise that it has in the whole.
        """
        with self.noise.fixed(seed, first_frame):
            yield

    def item_lengths(self, codes: Sequence[Tensor], lengths: Sequence[int] | Tensor, length: int | None) -> list[int]:
        """The arguments `lengths` and `length` of `decode`, checked: samples of each item."""
        if length is not None:
            raise UserError("give length for all items, or lengths with one for each; got both")
        if isinstance(codes, Tensor) or not codes or codes[0].dim() != 2:
            self.check_codes(codes)
        samples = codes[0].shape[1] * self.vq_strides[0] * self.hop_length
        return checked_lengths(lengths, codes[0].shape[0], samples)

    def token_layout(self, order: str = "frame", *, offsets: str = "level", first_token: int = 0) -> TokenLayout:
        """How to `flatten` codes of this codec to one sequence of tokens, and back; arguments as in `TokenLayout`."""
        return TokenLayout(self.vq_strides, self.codebook_size, order, offsets, first_token)

    def check_codes(self, codes: Sequence[Tensor]) -> None:
        """Raise UserError unless `codes` are (B, F / stride) integers in range, one per codebook, on its device."""
        check_codes(codes, self.vq_strides, self.codebook_size, self.attn_window_size, next(self.parameters()).device)

    # ---------------------------------------------------------------- frozen

    def freeze(self) -> Self:
        """Freeze permanently: eval mode, no gradients, weight norm folded. The state dict does not change."""
        self._frozen = True
        self.requires_grad_(False)
        super().train(False)
        for layer in self.modules():
            if isinstance(layer, WNConv1d | WNConvTranspose1d):
                layer.fold()
        return self

    @torch.no_grad()
    def compile(self) -> Self:  # type: ignore[override]  # nn.Module.compile compiles `forward`, for which see `layers`
        """Freeze permanently, and compile kernels for inference. Results are equal up to rounding.

        It takes some seconds and needs a C++ compiler; torch keeps the kernels on disk (`TORCHINDUCTOR_CACHE_DIR`). The
        kernels serve all lengths. Passes that need gradients use the layers as they are.

        Raises:
            UserError: if torch.compile does not work on this machine.
        """
        self.freeze()
        for layer in self.modules():
            if isinstance(layer, Snake1d):
                layer.compiled = True
            elif isinstance(layer, ResidualUnit):
                layer.compiled = self.config["depthwise"]
            elif isinstance(layer, WNConvTranspose1d):
                layer.compiled = True
                layer.fold()
        weight = next(self.parameters())
        try:
            with self.fixed_noise(0):
                z = self.advance(weight.new_zeros((1, 1, 2 * self.padding_multiple)), None, "latent")
                self.advance(z, "quantized", "audio")
        except Exception as error:  # compilers and torch raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"torch.compile does not work here; it needs a C++ compiler, as g++ ({reason})") from error
        return self

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; a frozen codec stays in eval mode."""
        return super().train(mode and not self._frozen)

    @property
    def digest(self) -> str:
        """sha256 (hex) over config and state dict; cached until the weights change."""
        state = self.state_dict()
        try:
            stamp: object = [(value.data_ptr(), value._version) for value in state.values()]
        except RuntimeError:  # inference tensors do not count their changes
            stamp = None
        if self._digest is None or stamp is None or self._digest[0] != stamp:
            preamble = json.dumps(self.config, sort_keys=True)
            self._digest = stamp, tensor_digest(sorted(state.items()), preamble)
        return self._digest[1]

    # ---------------------------------------------------------------- storage

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path) -> Self:
        """A codec with random weights.

        Args:
            config: constructor arguments, a JSON file of them, or the name of a released model ("snac_24khz").

        Raises:
            UserError: for a missing or damaged file, an unknown argument, or values that do not fit together.
        """
        return cls(**read_config(config, inspect.signature(cls).parameters))

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, revision: str | None = None, **options: Any) -> Self:
        """A codec with weights, in eval mode.

        Args:
            name_or_folder: a bundled name ("tiny"), a folder, or a hub id; the first that exists, in this order. Write
                "./tiny" for a folder with a bundled name. A folder contains config.json and model.safetensors or
                pytorch_model.bin, whose pickled objects are not executed.
            revision: branch, tag or commit on the hub.
            options: of `huggingface_hub.hf_hub_download`: `token`, `cache_dir`, `local_files_only`.

        Raises:
            UserError: for a name that is none of the three, and missing, damaged or other files.
        """
        files = CodecFiles.find(name_or_folder, revision=revision, **options)
        with torch.random.fork_rng(devices=[]):  # drawing initial values must not change the caller's random numbers
            codec = cls.from_config(files.config)
        load_weights(codec, files.weights)
        codec.name, codec.revision = files.name, files.revision
        return codec.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors.

        Args:
            folder: created if missing; each file is replaced as a whole.

        Raises:
            UserError: if `folder` is a file.
        """
        save_codec(Path(folder), self.config, self.state_dict())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes, and a model card.

        Args:
            repo_id: "owner/name"; created if missing.
            options: `token`, `private`, `revision` (a branch, created if missing).

        Returns:
            the address of the repository.

        Raises:
            UserError: without a network, a token, or write access.
        """
        parameters = sum(parameter.numel() for parameter in self.parameters())
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            card = base_card(self.name, self.config, self.digest, parameters)
            write_text(Path(folder) / "README.md", card)
            return hub.push(Path(folder), repo_id, **options)
