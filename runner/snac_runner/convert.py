"""Converted voices out of a frozen codec: wav in, wav or codes out."""

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

FORMAT = "snac-codes 1"
LEAST_SECONDS = 0.1
MOVED = torch.tensor([2.0, 1.1])
"""Semitones, and factor on the formants, of the synthetic stage."""


class Converter:
    """A trained run, or a bare codec, ready to convert files.

    Args:
        run: folder of a run, or of its model; None: the bare codec `base`.
        device: "cpu", "cuda" or "cuda:N".
        catalogue: the plugins; the installed ones where not given.
        base: the codec where there is no run ("tiny" where not given), or where the run's own base lies elsewhere now.
    """

    def __init__(
        self, run: Path | None, device: str, catalogue: Catalogue | None = None, *, base: str | None = None
    ) -> None:
        self.device = device_named(device)
        self.encoder: SpeakerEncoder | None = None
        if run is None:
            self.model = ConditionedCodec(base or "tiny")
        else:
            catalogue = catalogue or discover()
            folder = run / "model" if (run / "model").is_dir() else run
            if not (folder / "config.json").is_file():
                raise UserError(f"no trained model at {run}; expected a run folder with model/, or the model's folder")
            self.model = ConditionedCodec.from_pretrained(
                folder, codec=base or base_folder(folder.parent), plugins=catalogue
            )
            if self.model.encoder is not None:
                self.encoder = load_speaker_encoder(self.model.encoder.name, plugins=catalogue).to(self.device)
        self.model.to(self.device).eval()

    def convert(self, source: Path, targets: Sequence[Path], out: Path, *, stages: bool = False) -> list[Path]:
        """Write the source in the targets' voice to `out`; returns the files written."""
        _check_out(out, ".wav", [source, *targets])
        audio, cond = self._source(source), self._target(targets)
        assert cond is not None
        parts = {out: self._run(audio, cond)}
        if stages:
            stem = out.with_suffix("")
            parts[Path(f"{stem}.source.wav")] = audio[0, 0]
            parts[Path(f"{stem}.bare.wav")] = self._run(audio, None)
            own = self._embedding([load_audio(source, self._encoder().sample_rate)])
            parts[Path(f"{stem}.identity.wav")] = self._run(audio, own)
            # another voice made of the source, asked to become the source's again: what spk_synth measures
            moved = change_voice(audio, self.model.codec.sampling_rate, *MOVED.to(audio).unsqueeze(1))
            parts[Path(f"{stem}.synthetic.wav")] = self._run(moved, own)
        for path, wave in parts.items():
            write_wav(path, wave.cpu(), self.model.codec.sampling_rate)
        return list(parts)

    @torch.no_grad()
    def encode(self, source: Path, targets: Sequence[Path], out: Path) -> Path:
        """Write the codes of the source, conditioned where targets are given."""
        _check_out(out, ".safetensors", [source, *targets])
        audio = self._source(source)
        codes = self.model.encode(audio, self._target(targets))
        tensors = {f"codes_{level}": indices.to(torch.int32).cpu() for level, indices in enumerate(codes)}
        about = {"format": FORMAT, "base": self.model.codec.digest, "length": str(audio.shape[-1])}
        write_bytes(out, save(tensors, metadata=about))
        return out

    @torch.no_grad()
    def decode(self, codes: Path, targets: Sequence[Path], out: Path) -> Path:
        """Write the audio of stored codes, conditioned where targets are given."""
        _check_out(out, ".wav", [codes, *targets])
        levels, length = self._codes(codes)
        with self.model.codec.fixed_noise(NOISE_SEED):
            audio = self.model.decode(levels, self._target(targets), length=length)
        write_wav(out, audio[0, 0].cpu(), self.model.codec.sampling_rate)
        return out

    @torch.no_grad()
    def _run(self, audio: Tensor, cond: Conditioning | None) -> Tensor:
        with self.model.codec.fixed_noise(NOISE_SEED):
            return self.model.reconstruct(audio, cond).audio[0, 0]

    def _source(self, path: Path) -> Tensor:
        audio = load_audio(path, self.model.codec.sampling_rate)
        if not audio.isfinite().all():
            raise UserError(f"{path} holds samples that are NaN or infinite; expected speech")
        if audio.shape[-1] < LEAST_SECONDS * self.model.codec.sampling_rate:
            raise UserError(f"{path} holds {audio.shape[-1]} samples; expected at least {LEAST_SECONDS} s of speech")
        return audio.unsqueeze(0).to(self.device)

    def _target(self, paths: Sequence[Path]) -> Conditioning | None:
        if not paths:
            return None
        rate = self._encoder().sample_rate
        for path in paths:
            if problem := check_audio(path).problem:
                raise UserError(f"target {path} {problem}")
        return self._embedding([load_audio(path, rate) for path in paths])

    def _embedding(self, audio: Sequence[Tensor]) -> Conditioning:
        encoder = self._encoder()
        embedding = mean_embedding(encoder, audio)
        return Conditioning(embedding.to(self.device), encoder=encoder.digest)

    def _encoder(self) -> SpeakerEncoder:
        if self.encoder is None:
            raise UserError("a target needs a trained run; give it with --run RUN")
        return self.encoder

    def _codes(self, path: Path) -> tuple[list[Tensor], int]:
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                levels = [file.get_tensor(name).long().to(self.device) for name in sorted(file.keys())]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is no file of codes as runner encode writes it: {error}") from error
        if about.get("format") != FORMAT or "base" not in about or not about.get("length", "").isdecimal():
            raise UserError(f"{path} is no file of codes as runner encode writes it")
        if about["base"] != self.model.codec.digest:
            raise UserError(
                f"{path} was encoded with a base of digest {about['base'][:12]}; this one has "
                f"{self.model.codec.digest[:12]}"
            )
        return levels, int(about["length"])


def base_folder(run: Path) -> str | None:
    """The folder of the base that a run was trained on, where that is a folder which is still there."""
    try:
        base = json.loads((run / "config.json").read_text())["study"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, str) and Path(base).is_dir() else None


def _check_out(out: Path, suffix: str, inputs: Sequence[Path]) -> None:
    """Refuse an output of another kind, and one that would replace what is read."""
    if out.suffix.lower() != suffix:
        raise UserError(f"--out {out}: expected a name that ends in {suffix}")
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise UserError(f"--out {out} is one of the files that are read; give another name")
