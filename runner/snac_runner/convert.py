"""Voice conversion of files with a trained run: speech to speech, speech to codes, and codes to speech."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from snac_core.augment import change_voice
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning
from snac_core.errors import UserError
from snac_core.files import write_bytes
from snac_core.plugins import Catalogue, discover
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.data.audio import check_audio, load_audio
from snac_runner.embeddings import mean_embedding
from snac_runner.evaluate.systems import NOISE_SEED
from snac_runner.resources import device_named
from snac_runner.run_folder import write_wav

MIN_SECONDS = 0.1  # of a source
SYNTHETIC_SEMITONES, SYNTHETIC_FORMANTS = 2.0, 1.1  # pitch shift and formant factor of the synthetic stage
_CODES_FORMAT = "snac-codes 1"


class Converter:
    """A trained run, or an unconditioned codec, that converts files.

    Args:
        run: folder of a run, or of its model; None: an unconditioned codec.
        device: "cpu", "cuda" or "cuda:N".
        catalogue: the plugins; None: the installed ones.
        base: the codec. None: "tiny" without a run, or the base that the run was trained on.

    Attributes:
        model: the codec with the run's strategies, on the device and in eval mode.
        encoder: the conditioning encoder; None if nothing is conditioned.

    Raises:
        UserError: if there is no model in `run`, its base or a plugin is missing, or the device does not exist.
    """

    def __init__(
        self, run: Path | None, device: str, catalogue: Catalogue | None = None, *, base: str | None = None
    ) -> None:
        self.device = device_named(device)
        catalogue = catalogue or discover()
        self.model = ConditionedCodec(base or "tiny") if run is None else _load_run(run, base, catalogue)
        self.model.to(self.device).eval()
        self.encoder: SpeakerEncoder | None = None
        if self.model.encoder is not None:
            self.encoder = load_speaker_encoder(self.model.encoder.name, plugins=catalogue).to(self.device)

    @torch.no_grad()
    def convert(self, source: Path, targets: Sequence[Path], out: Path, *, stages: bool = False) -> list[Path]:
        """Convert speech to the voice of the targets.

        Args:
            source: the speech to convert.
            targets: speech of the target speaker; the embeddings of several files are averaged.
            out: the .wav file to write.
            stages: whether to write also <out>.source.wav, .bare.wav (unconditioned codec), .identity.wav (the source's
                own embedding) and .synthetic.wav (the source with its pitch and formants changed, converted back to the
                source's own voice, as measured by spk_synth).

        Returns:
            The files written.
        """
        _check_out(out, ".wav", [source, *targets])
        audio = self._source(source)
        outputs = {out: self._reconstruct(audio, self._target(targets))}
        if stages:
            own = self._embedding([source])
            shift = audio.new_tensor([SYNTHETIC_SEMITONES]), audio.new_tensor([SYNTHETIC_FORMANTS])
            other = change_voice(audio, self.model.codec.sampling_rate, *shift)
            outputs[out.with_suffix(".source.wav")] = audio[0, 0]
            outputs[out.with_suffix(".bare.wav")] = self._reconstruct(audio, None)
            outputs[out.with_suffix(".identity.wav")] = self._reconstruct(audio, own)
            outputs[out.with_suffix(".synthetic.wav")] = self._reconstruct(other, own)
        for path, wave in outputs.items():
            write_wav(path, wave.cpu(), self.model.codec.sampling_rate)
        return list(outputs)

    @torch.no_grad()
    def encode(self, source: Path, targets: Sequence[Path], out: Path) -> Path:
        """Encode speech, conditioned on the targets if there are any, and write the codes to a .safetensors file."""
        _check_out(out, ".safetensors", [source, *targets])
        audio = self._source(source)
        codes = self.model.encode(audio, self._target(targets) if targets else None)
        _write_codes(out, codes, self.model.codec.digest, audio.shape[-1])
        return out

    @torch.no_grad()
    def decode(self, codes: Path, targets: Sequence[Path], out: Path) -> Path:
        """Decode a file of codes, conditioned on the targets if there are any, and write the speech to a .wav file."""
        _check_out(out, ".wav", [codes, *targets])
        levels, length = _read_codes(codes, self.model.codec.digest)
        levels = [level.to(self.device) for level in levels]
        with self.model.codec.fixed_noise(NOISE_SEED):
            audio = self.model.decode(levels, self._target(targets) if targets else None, length=length)
        write_wav(out, audio[0, 0].cpu(), self.model.codec.sampling_rate)
        return out

    def _reconstruct(self, audio: Tensor, cond: Conditioning | None) -> Tensor:
        """Audio (1, 1, T) through the whole path: (T,)."""
        with self.model.codec.fixed_noise(NOISE_SEED):
            return self.model.reconstruct(audio, cond).audio[0, 0]

    def _source(self, path: Path) -> Tensor:
        """The source (1, 1, T) at the codec's sample rate."""
        audio = load_audio(path, self.model.codec.sampling_rate)
        if not audio.isfinite().all():
            raise UserError(f"{path} holds samples that are NaN or infinite; expected speech")
        if audio.shape[-1] < MIN_SECONDS * self.model.codec.sampling_rate:
            raise UserError(f"{path} holds {audio.shape[-1]} samples; expected at least {MIN_SECONDS} s of speech")
        return audio.unsqueeze(0).to(self.device)

    def _target(self, paths: Sequence[Path]) -> Conditioning:
        if self.encoder is not None:
            for path in paths:
                if problem := check_audio(path).problem:
                    raise UserError(f"target {path} {problem}")
        return self._embedding(paths)

    def _embedding(self, paths: Sequence[Path]) -> Conditioning:
        """The mean embedding of files."""
        if self.encoder is None:
            raise UserError("a target needs a trained run; give it with --run RUN")
        embedding = mean_embedding(self.encoder, [load_audio(path, self.encoder.sample_rate) for path in paths])
        return Conditioning(embedding.to(self.device), encoder=self.encoder.digest)


def _load_run(run: Path, base: str | None, catalogue: Catalogue) -> ConditionedCodec:
    folder = run / "model" if (run / "model").is_dir() else run
    if not (folder / "config.json").is_file():
        raise UserError(f"no trained model at {run}; expected a run folder with model/, or the model's folder")
    return ConditionedCodec.from_pretrained(folder, codec=base or _base_of(folder.parent), plugins=catalogue)


def _base_of(run: Path) -> str | None:
    """The folder of the base that a run was trained on; None if the base is not a folder, or was moved."""
    try:
        base = json.loads((run / "config.json").read_text())["study"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, str) and Path(base).is_dir() else None


def _write_codes(path: Path, codes: Sequence[Tensor], base: str, length: int) -> None:
    """Write codes (1, F_i) per level, with the digest of their base and the length of the audio in samples."""
    tensors = {f"codes_{level}": indices.to(torch.int32).cpu() for level, indices in enumerate(codes)}
    write_bytes(path, save(tensors, metadata={"format": _CODES_FORMAT, "base": base, "length": str(length)}))


def _read_codes(path: Path, base: str) -> tuple[list[Tensor], int]:
    """The codes (1, F_i) per level and the length of the audio in samples, from a file for the base of this digest."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            levels = [file.get_tensor(name).long() for name in sorted(file.keys())]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a file of codes as `runner encode` writes it: {error}") from error
    if metadata.get("format") != _CODES_FORMAT or "base" not in metadata or not metadata.get("length", "").isdecimal():
        raise UserError(f"{path} is not a file of codes as `runner encode` writes it")
    if metadata["base"] != base:
        raise UserError(f"{path} was encoded with a base of digest {metadata['base'][:12]}; this one has {base[:12]}")
    return levels, int(metadata["length"])


def _check_out(out: Path, suffix: str, inputs: Sequence[Path]) -> None:
    """Refuse an output with another suffix, or one that would overwrite an input."""
    if out.suffix.lower() != suffix:
        raise UserError(f"--out {out}: expected a name that ends in {suffix}")
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise UserError(f"--out {out} is also an input; give another name")
