"""Voice conversion of files with a trained run: speech to speech, speech to codes, and codes to speech."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor

from snac_core.augment import change_voice
from snac_core.checkpoint import Stored, bundled_adapters, digest_of, load_state
from snac_core.codec.streaming import ConversionStream, DecoderStream, EncoderStream, split_codes
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import REFERENCE_SECONDS, Conditioning
from snac_core.errors import UserError
from snac_core.plugins import Catalogue, discover
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.code_files import Item
from snac_runner.config import NOISE_SEED
from snac_runner.console import SILENT, Console
from snac_runner.console import Progress as Display
from snac_runner.data.audio import audio_pieces, load_audio, resampled
from snac_runner.data.cache import cache_folder
from snac_runner.data.checks import MIN_SECONDS as UTTERANCE_SECONDS
from snac_runner.data.checks import AudioCheck, check_audio
from snac_runner.data.media import PIPE, AudioFormat, Level, decodable
from snac_runner.devices import device_named, precision_named
from snac_runner.embeddings import mean_embedding, two_voices, weighted_mean
from snac_runner.run_folder import (
    CHECKPOINT,
    read_config,
    read_result,
    result_status,
    stored_run,
    warn_of_changed_plugins,
)

MIN_SECONDS = 0.1  # of a source
MIN_SPEECH_SECONDS = 2.5  # of each of several target files, where a strategy attends to speech of the target
LONG_SECONDS = 60.0  # of a source: its progress is displayed
MIXING_DB = -4.0  # dB: below, averaging the channels of a file removes sound; two unrelated channels give -3
SYNTHETIC_SEMITONES, SYNTHETIC_FORMANTS = 2.0, 1.1  # pitch shift and formant factor of the synthetic stage
EMBEDDING_SUFFIXES = (".npy", ".safetensors")


class Converter:
    """A trained run, or an unconditioned codec, that converts files.

    Args:
        run: folder of a run or of its model, name of a bundled adapter, or hub id; None: an unconditioned codec.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        catalogue: the plugins; None: the installed ones.
        base: the codec. None: "tiny" without a run, or the base that the run was trained on.
        checkpoint: whether to use the run's latest checkpoint instead of its finished model.
        edit_scale: factor of the edits, see `ConditionedCodec`.
        console: where warnings about files are displayed.

    Attributes:
        model: the codec with the run's strategies, on the device and in eval mode.
        encoder: the conditioning encoder; None if nothing is conditioned.

    Raises:
        UserError: if there is no model in `run`, its base or a plugin is missing, the device does not exist, the
            scale is negative, or there is nothing to scale.
    """

    def __init__(
        self,
        run: str | Path | None,
        device: str = "auto",
        catalogue: Catalogue | None = None,
        *,
        base: str | None = None,
        checkpoint: bool = False,
        edit_scale: float = 1.0,
        console: Console = SILENT,
    ) -> None:
        self.device = device_named(device)
        self.console = console
        catalogue = catalogue or discover()
        if run is None:
            if edit_scale != 1.0:
                raise UserError("--edit-scale is for the edits of a trained run; give it with --run RUN")
            self.model = ConditionedCodec(base or "tiny")
        elif checkpoint:
            self.model = _load_checkpoint(Path(run), base, catalogue)
        else:
            self.model = _load_run(run, base, catalogue)
        if run is not None:
            warn_of_changed_plugins(Path(run), catalogue, console)
        self.model.to(self.device).eval()
        self.model.edit_scale = edit_scale
        self.encoder: SpeakerEncoder | None = None
        if self.model.encoder is not None:
            self.encoder = load_speaker_encoder(self.model.encoder.name, plugins=catalogue).to(self.device)
        self._mixed_before = False
        self._autocast: torch.dtype | None = None

    def accelerate(self, precision: str = "fp32", *, compiled: bool = False) -> None:
        """Compute in less time.

        Args:
            precision: "fp32", or "bf16" for the convolutions of the codec, which changes codes and, less, audio.
            compiled: whether to compile the codec; results are equal up to rounding. What is compiled is cached.

        Raises:
            UserError: for another precision, or if torch.compile does not work on this machine.
        """
        self._autocast = precision_named(precision)
        if compiled:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
            self.model.compile()

    @property
    def digest(self) -> str:
        """Identifies the base, the strategies with their weights, and a precision and scale that are not the usual."""
        precision = f" {self._autocast}" if self._autocast else ""
        scale = f" {self.model.edit_scale}" if self.model.edit_scale != 1.0 else ""
        return f"{self.model.codec.digest} {digest_of(self.model.attached)}{precision}{scale}"

    @torch.no_grad()
    def convert(
        self,
        source: Path,
        target: Conditioning | None,
        out: Path,
        *,
        stages: bool = False,
        audio_format: AudioFormat | None = None,
    ) -> list[Path]:
        """Convert one file to the voice of a target.

        Args:
            source: the speech to convert; "-" is standard input.
            target: from `target`; None: the unconditioned codec.
            out: the file to write; "-" is standard output.
            stages: whether to write also <out>.source.wav, .bare.wav (unconditioned codec), .identity.wav (the source's
                own embedding) and .synthetic.wav (the source with its pitch and formants changed, converted back to the
                source's own voice, as measured by spk_synth).
            audio_format: of the files; None: 16-bit wav.

        Returns:
            The files written.
        """
        audio_format = audio_format or AudioFormat()
        check_out(out, audio_format.suffix, [source])
        with decodable(source) as path, self._computing():
            check = self._check(path, "source", MIN_SECONDS)
            level, progress = Level(), self.console.progress(f"converting {source.name}")
            pieces = self._pieces(path, progress if check.seconds > LONG_SECONDS else None)
            outputs = {out: self._converted(level.measured(pieces), target)}
            if stages:
                outputs |= self._stages(path, out)
            for file, audio in outputs.items():
                self._write(file, audio, check.sample_rate, level, audio_format)
        return list(outputs)

    @torch.no_grad()
    def convert_together(
        self, sources: Sequence[Path], target: Conditioning, outs: Sequence[Path], audio_format: AudioFormat
    ) -> None:
        """Convert files in one batch, each to what `convert` makes of it, up to rounding.

        Args:
            sources: files that libsndfile decodes, of at most the length of a chunk (`chunk_seconds`).
            target: from `target`.
            outs: the file to write for each source.
            audio_format: of the files.

        Raises:
            UserError: if one of the sources cannot be used.
        """
        checks, audio, levels = [], [], [Level() for _ in sources]
        for path, level in zip(sources, levels, strict=True):
            checks.append(self._check(path, "source", MIN_SECONDS))
            audio.append(torch.cat(list(level.measured(self._pieces(path))), dim=-1)[0, 0])
        lengths = [len(item) for item in audio]
        batch = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True).unsqueeze(1)
        before, after = (target if self.model.acts(before_vq=side) else None for side in (True, False))
        with self._computing(), self.model.codec.fixed_noise(NOISE_SEED):
            codes = self.model.encode(batch, before, lengths=lengths)
            converted = self.model.decode(codes, after, lengths=lengths)[:, 0].cpu()
        for row, (out, check, level) in enumerate(zip(outs, checks, levels, strict=True)):
            self._write(out, [converted[row, : lengths[row]]], check.sample_rate, level, audio_format)

    def _write(
        self, out: Path, pieces: Iterable[Tensor], source_rate: int, level: Level, audio_format: AudioFormat
    ) -> None:
        """Write converted audio in pieces (n,), at the rate and the level that the format asks for."""
        rate = source_rate if audio_format.keep_rate else self.model.codec.sampling_rate
        pieces = resampled(pieces, self.model.codec.sampling_rate, rate)
        audio_format.write(out, audio_format.levelled(pieces, level), rate)

    def _stages(self, path: Path, out: Path) -> dict[Path, Iterator[Tensor]]:
        """The files of the stages, and their audio in pieces (n,)."""
        own = self._embedding([path])
        whole = torch.cat(list(self._pieces(path)), dim=-1)  # pitch and formants are changed on all of it
        shift = whole.new_tensor([SYNTHETIC_SEMITONES]), whole.new_tensor([SYNTHETIC_FORMANTS])
        other = change_voice(whole, self.model.codec.sampling_rate, *shift)
        return {
            _stage(out, "source"): iter([whole[0, 0].cpu()]),
            _stage(out, "bare"): self._converted([whole], None),
            _stage(out, "identity"): self._converted([whole], own),
            _stage(out, "synthetic"): self._converted([other], own),
        }

    def target(self, files: Sequence[Path]) -> Conditioning:
        """The mean embedding of a target speaker.

        Args:
            files: speech of the speaker, weighted by length; or embeddings (S,) or (N, S) as .npy or .safetensors,
                weighted equally. Of several speech files, those that cannot be used are left out with a warning.

        Raises:
            UserError: if nothing is conditioned, a single file cannot be used, or none of several can.
        """
        if self.encoder is None:
            raise UserError("a target needs a trained run; give it with --run RUN")
        stored = [path for path in files if path.suffix.lower() in EMBEDDING_SUFFIXES]
        if stored and len(stored) < len(files):
            raise UserError(f"targets are speech and embeddings ({stored[0]}); expected only one of the two")
        if stored:
            if self.model.extras:
                raise UserError(
                    f"{stored[0]} is an embedding, and this run attends to speech of the target; expected speech, "
                    "or with --run an adapter that needs the embedding alone"
                )
            rows = [row for path in stored for row in _read_embeddings(path, self.encoder.dim)]
            return Conditioning(weighted_mean(rows, [1.0] * len(rows)).to(self.device))
        usable: list[Tensor] = []
        speech: list[Tensor] = []
        names: list[Path] = []
        for path in files:
            try:
                with decodable(path) as file:
                    self._check(file, "target")
                    usable.append(load_audio(file, self.encoder.sample_rate))
                    speech.append(self._speech(file))
                    names.append(path)
            except UserError as error:
                if len(files) == 1:
                    raise
                self.console.warning(f"{error}; left out")
        if not usable:
            raise UserError(f"none of the {len(files)} target files can be used, for example {files[:1]}")
        if others := two_voices(self.encoder, usable):
            where = ", ".join(str(names[i]) for i in others[:3]) + (" and others" if len(others) > 3 else "")
            self.console.warning(
                f"the target seems to contain two speakers (the second in {where}); expected speech of one. The "
                "conversion has the mean of their embeddings"
            )
        return self._conditioning(usable, speech)

    @torch.no_grad()
    def encode(self, source: Path, target: Conditioning | None = None) -> Item:
        """The codes of a file, conditioned on a target if there is one."""
        stream, length, pieces = EncoderStream(self.model, target), 0, []
        with decodable(source) as path, self._computing():
            self._check(path, "source", MIN_SECONDS)
            for audio in self._pieces(path):
                pieces.append(stream.push(audio))
                length += audio.shape[-1]
            pieces.append(stream.flush())
        codes = [torch.cat(level, dim=-1) for level in zip(*pieces, strict=True)]
        return Item(codes, length, self.model.codec.digest, str(source))

    @torch.no_grad()
    def decode(self, item: Item, target: Conditioning | None, out: Path) -> Path:
        """Decode codes, conditioned on a target if there is one, and write the speech to a .wav file."""
        codec, levels = self.model.codec, [level.to(self.device) for level in item.codes]
        with codec.fixed_noise(NOISE_SEED):
            stream = DecoderStream(self.model, target)
        audio = (piece[0, 0].cpu() for piece in stream.run(split_codes(codec, levels), item.length))
        with self._computing():
            AudioFormat().write(out, audio, codec.sampling_rate)
        return out

    def _computing(self) -> AbstractContextManager[None]:
        """Inside the block, the codec computes in the precision of `accelerate`."""
        return self.model.codec.computing(autocast=self._autocast)

    def _converted(self, pieces: Iterable[Tensor], cond: Conditioning | None) -> Iterator[Tensor]:
        """Audio in pieces (1, 1, n) through the whole path, in pieces (n,) on the CPU."""
        with self.model.codec.fixed_noise(NOISE_SEED):
            stream = ConversionStream(self.model, cond)
        return (piece[0, 0].cpu() for piece in stream.run(pieces))

    def _pieces(self, path: Path, progress: Display | None = None) -> Iterator[Tensor]:
        """The audio of a file in pieces (1, 1, n) at the codec's sample rate, on the device."""
        rate = self.model.codec.sampling_rate
        total, done = math.ceil(soundfile.info(str(path)).duration), 0
        for piece in audio_pieces(path, rate):
            if piece.shape[-1]:
                yield piece.unsqueeze(0).to(self.device)
                done += piece.shape[-1]
            if progress is not None:
                progress(min(total, round(done / rate)), total, "s")

    def _check(self, path: Path, role: str, min_seconds: float = UTTERANCE_SECONDS) -> AudioCheck:
        """Refuse a file that is silent, cut off, too short or not finite; say once that channels are averaged."""
        if not path.is_file():
            raise UserError(f"no audio file {path}; expected a {role}")
        check = check_audio(path, min_seconds=min_seconds)
        if check.problem:
            raise UserError(f"{role} {path} {check.problem}")
        if check.mixing_db < MIXING_DB:
            self.console.warning(
                f"{role} {path}: the average of its {check.channels} channels is {-check.mixing_db:.0f} dB below the "
                "louder one (one is silent, or they cancel); extract one channel if that is not intended"
            )
        elif check.channels > 1 and not self._mixed_before:
            self._mixed_before = True
            self.console.line(f"{path} has {check.channels} channels; channels are averaged")
        return check

    def _embedding(self, paths: Sequence[Path]) -> Conditioning:
        """The mean embedding of files that libsndfile decodes."""
        if self.encoder is None:
            raise UserError("stages need a trained run; give it with --run RUN")
        waves = [load_audio(path, self.encoder.sample_rate) for path in paths]
        return self._conditioning(waves, [self._speech(path) for path in paths])

    def _speech(self, path: Path) -> Tensor:
        """The beginning of a file (1, T) at the codec's rate; empty if no strategy attends to speech of the target."""
        seconds = REFERENCE_SECONDS if self.model.extras else 0.0
        return load_audio(path, self.model.codec.sampling_rate, seconds=seconds) if seconds else torch.zeros(1, 0)

    def _conditioning(self, waves: Sequence[Tensor], speech: Sequence[Tensor]) -> Conditioning:
        """The mean embedding of waveforms (1, T) at the encoder's rate, and the same speech from `_speech`."""
        assert self.encoder is not None
        embedding = mean_embedding(self.encoder, waves).to(self.device)
        seconds = max(MIN_SPEECH_SECONDS, REFERENCE_SECONDS / len(speech))  # of each file
        length = round(seconds * self.model.codec.sampling_rate)
        beginnings = torch.cat([wave[:, :length] for wave in speech], dim=-1).unsqueeze(0).to(self.device)
        return self.model.target(Conditioning(embedding, encoder=self.encoder.digest), beginnings)


def best_adapter(base: str | None, targets: Sequence[str] = ()) -> str:
    """The bundled adapter with the highest speaker similarity (SECS) on test speakers, among those for `base`.

    Args:
        base: name of the codec; None: any.
        targets: files. If there are stored embeddings among them, only adapters that need nothing else are considered.

    Raises:
        UserError: if there is none.
    """
    found = {name: Stored.find(name).description for name in bundled_adapters()}
    suited = {name: about for name, about in found.items() if base is None or about.base.name == base}
    if not suited:
        listed = ", ".join(f"{name} (for {about.base.name})" for name, about in found.items()) or "none"
        raise UserError(f"no bundled adapter for base {base!r}; bundled: {listed}; give a trained run with --run RUN")

    def secs(name: str) -> float:
        evaluation = suited[name].evaluation
        figure = evaluation.metrics.get("secs") if evaluation else None
        return figure.mean if figure and figure.mean is not None else -1.0

    if any(name.lower().endswith(EMBEDDING_SUFFIXES) for name in targets):
        return max((name for name in suited if not ConditionedCodec.from_pretrained(name).extras), key=secs)
    return max(suited, key=secs)


def _load_run(run: str | Path, base: str | None, catalogue: Catalogue) -> ConditionedCodec:
    if not Path(run).is_dir():
        return ConditionedCodec.from_pretrained(str(run), codec=base, plugins=catalogue)
    folder = model_folder(Path(run))
    return ConditionedCodec.from_pretrained(folder, codec=base or _base_of(folder.parent), plugins=catalogue)


def model_folder(run: Path) -> Path:
    """The folder of the model of a run, given the folder of either.

    Raises:
        UserError: if there is no model; of an unfinished run, with the step it is at.
    """
    folder = run / "model" if (run / "model").is_dir() else run
    if not (folder / "config.json").is_file():
        raise UserError(f"no trained model at {run}; expected a run folder with model/, or the model's folder")
    if folder == run and "hash" in read_config(run):  # a run that has not written its model
        raise UserError(_unfinished(run))
    return folder


def _unfinished(run: Path) -> str:
    """Where a run without a model stopped, and what to do."""
    total = stored_run(run)[0].steps
    if not (run / CHECKPOINT).is_file():
        return f"{run} is a run without a trained model or checkpoint; train it with: runner train --resume {run}"
    step = _checkpoint_of(run)["progress"]["step"]
    failure = read_result(run).get("error") if result_status(run) == "failed" else None
    return (
        f"{run} is at step {step} of {total} and has no finished model{f' ({failure})' if failure else ''}; "
        f"continue with: runner train --resume {run}, or convert with its checkpoint: --checkpoint"
    )


def _load_checkpoint(run: Path, base: str | None, catalogue: Catalogue) -> ConditionedCodec:
    """The model of a run as its latest checkpoint has it."""
    study, arm = stored_run(run)
    if not (run / CHECKPOINT).is_file():
        raise UserError(f"{run} has no checkpoint; expected {run / CHECKPOINT}")
    state = _checkpoint_of(run)
    model = ConditionedCodec(
        base or study.base, arm.all_strategies, plugins=catalogue, config=arm.settings,
        speaker_encoder=load_speaker_encoder(study.speaker_encoder, plugins=catalogue),
    )  # fmt: skip
    if state["base"] != model.codec.digest:
        raise UserError(f"{run} was trained on a base with digest {state['base'][:12]}; got {model.codec.digest[:12]}")
    load_state(model.attached, state["model"], str(run / CHECKPOINT))
    return model


def _checkpoint_of(run: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("progress", "base", "model")}
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{run / CHECKPOINT} is not a complete checkpoint ({type(error).__name__})") from error


def _base_of(run: Path) -> str | None:
    """The folder of the base that a run was trained on; None if the base is not a folder, or was moved."""
    base = read_config(run).get("study", {}).get("base")
    return base if isinstance(base, str) and Path(base).is_dir() else None


def _read_embeddings(path: Path, dim: int) -> list[Tensor]:
    """The embeddings (S,), of unit norm, in a file with one array (S,) or (N, S)."""
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as stream:  # numpy leaves a damaged file open that it opened itself
                array = torch.from_numpy(np.load(stream))
        else:
            (array,) = load_file(path).values()
    except Exception as error:  # numpy raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a file with one speaker embedding ({reason})") from error
    rows = array.reshape(-1, array.shape[-1]) if array.dim() in (1, 2) else array
    if rows.dim() != 2 or rows.shape[1] != dim or not rows.is_floating_point() or not rows.isfinite().all():
        raise UserError(
            f"{path} holds {array.dtype} of shape {tuple(array.shape)}; expected finite ({dim},) or (N, {dim})"
        )
    return list(torch.nn.functional.normalize(rows.float(), dim=1))


def _stage(out: Path, name: str) -> Path:
    """Name of the file of a stage, beside the output."""
    return out.with_suffix(f".{name}{out.suffix}")


def check_out(out: Path, suffix: str, inputs: Sequence[Path]) -> None:
    """Refuse an output with another suffix, or one that would overwrite an input."""
    if str(out) == PIPE:
        return
    if out.suffix.lower() != suffix:
        raise UserError(f"--out {out}: expected a name that ends in {suffix}")
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise UserError(f"--out {out} is also an input; give another name")
