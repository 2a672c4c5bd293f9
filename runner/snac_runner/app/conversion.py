"""What the page of `runner app` computes: comparisons of one conversion, and conversions of many files.

Conversions are made by `snac_runner.convert.Converter` and `snac_runner.batch_convert.convert_all`, as by the command
`runner convert`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from torch import Tensor

from snac_core.errors import UserError
from snac_core.plugins import Catalogue
from snac_core.speakers.encoder import load_speaker_encoder
from snac_runner.app.adapters import Offer
from snac_runner.batch_convert import convert_all, jobs_of_sources
from snac_runner.console import Console
from snac_runner.convert import MIN_SECONDS, Converter
from snac_runner.data.audio import load_audio
from snac_runner.data.checks import MIN_SECONDS as UTTERANCE_SECONDS
from snac_runner.data.checks import check_audio
from snac_runner.data.media import AudioFormat, decodable, media_suffixes
from snac_runner.devices import device_named
from snac_runner.embeddings import mean_embedding, waveform_embedding
from snac_runner.evaluate.judges import check_judge
from snac_runner.report.format import plural
from snac_runner.report.samples import alpha_png, spectrogram_png

SPECTROGRAM = (480, 120)  # in pixels
LOADED = 4  # adapters that are kept in memory
KEPT_SECONDS = 24 * 3600.0  # after which results are deleted
MAX_ENTRIES = 10_000  # files in a zip file


@dataclass(frozen=True)
class Limits:
    """Limits of what is accepted.

    Attributes:
        megabytes: of an uploaded file, and of the contents of a zip file.
        minutes: of a recording.
    """

    megabytes: float
    minutes: float


class Stopped(UserError):
    """Stop was pressed, or the page was closed."""


class ProgressConsole(Console):
    """Collects lines, and passes progress on.

    Args:
        progress: called with (done, total), and a title.
        stopped: whether to stop; then the next report of progress raises Stopped.
    """

    def __init__(self, progress: Callable[..., Any], stopped: Callable[[], bool]) -> None:
        self.lines: list[str] = []
        self.report = progress
        self.stopped = stopped

    def line(self, text: str) -> None:
        self.lines.append(text)

    def show_progress(self, title: str, done: int, total: int, note: str = "") -> None:
        if self.stopped():
            raise Stopped("stopped")
        self.report((done, total), title)


@dataclass(frozen=True)
class Sample:
    """One recording of a comparison.

    Attributes:
        label: what it is.
        file: wav file.
        spectrogram: PNG data.
        similarity: the judge's cosine to the target; None for the target itself, or without a valid judge.
    """

    label: str
    file: Path
    spectrogram: bytes
    similarity: float | None


@dataclass(frozen=True)
class LevelChange:
    """The codes of one level that differ from those of the bare codec.

    Attributes:
        rate: codes per second.
        changed: (N,) bool, over the time of the source.
    """

    rate: float
    changed: NDArray[np.bool_]

    @property
    def share(self) -> float:
        """Share of changed codes, 0 to 1."""
        return float(self.changed.mean())

    def image(self, width: int = SPECTROGRAM[0]) -> bytes:
        """A PNG of one row with at most `width` columns over time; opacity is the share of changed codes."""
        parts = np.array_split(self.changed, min(width, len(self.changed)))
        return alpha_png(np.array([[round(15 * float(part.mean())) for part in parts]], dtype=np.uint8))


@dataclass(frozen=True)
class Comparison:
    """A conversion beside what it is compared with.

    Attributes:
        samples: source, bare codec (one per base), conversions (one per adapter) and target.
        codes: adapter to changes, coarse first.
        judge: name of the speaker encoder of the similarities.
        notes: warnings.
    """

    samples: list[Sample]
    codes: dict[str, list[LevelChange]]
    judge: str
    notes: list[str]

    def scores(self) -> dict[str, Any]:
        """The numbers, as JSON."""
        return {
            "judge": self.judge,
            "similarity": {s.label: s.similarity for s in self.samples if s.similarity is not None},
            "codes_changed": {name: [level.share for level in levels] for name, levels in self.codes.items()},
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Batch:
    """Converted files in a zip file (after a stop, those that were finished), their number, and lines about others."""

    archive: Path
    converted: int
    lines: list[str]


class Conversions:
    """Converts for a page, one request at a time. Results lie in a folder of their own below `folder`.

    Args:
        offer: the adapters.
        limits: of recordings and files.
        folder: temporary folder that also holds the uploads.
        judge: name of the speaker encoder that measures similarity.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        catalogue: the plugins.

    Raises:
        UserError: if there is no such judge or device.
    """

    def __init__(
        self, offer: Offer, limits: Limits, folder: Path, *, judge: str, device: str, catalogue: Catalogue
    ) -> None:
        self.offer = offer
        self.limits = limits
        self.folder = folder
        self.judge = load_speaker_encoder(judge, plugins=catalogue)
        self.catalogue = catalogue
        device_named(device)  # a device that does not exist is refused here
        self._busy = threading.Lock()
        self._converter = lru_cache(maxsize=LOADED)(lambda run: Converter(run, device, catalogue))

    def compare(
        self,
        source: Path,
        targets: Sequence[Path],
        adapters: Sequence[str],
        console: ProgressConsole,
        edit_scale: float = 1.0,
    ) -> Comparison:
        """Convert a source with one or several adapters, and measure the results.

        Args:
            source: the speech to convert.
            targets: speech of the target; embeddings are averaged.
            adapters: displayed names.
            console: where to report.
            edit_scale: factor of the edits, see `ConditionedCodec`.

        Raises:
            UserError: if no adapter is given, one cannot be loaded, or a recording is unusable or exceeds a limit.
        """
        if not adapters:
            raise UserError("no adapter is selected; select at least one")
        with self._busy, ExitStack() as opened:
            source, *targets = (opened.enter_context(decodable(path)) for path in (source, *targets))
            self._check(source, "source", MIN_SECONDS)
            for target in targets:
                self._check(target, "target", UTTERANCE_SECONDS)
            reference = mean_embedding(self.judge, [load_audio(path, self.judge.sample_rate) for path in targets])
            converters = {name: self._loaded(name, console, edit_scale) for name in dict.fromkeys(adapters)}
            codecs = {converter.model.codec.digest: converter for converter in converters.values()}
            out, done, steps = self._new_folder(), 0, len(codecs) + len(converters)
            bare_codes: dict[str, list[Tensor]] = {}
            bare, converted = list[Sample](), list[Sample]()
            for digest, converter in codecs.items():
                console.show_progress("bare codec", done, steps)
                codec, path = converter.model.codec, out / f"bare_codec{done + 1 if done else ''}.wav"
                converter.convert(source, None, path)
                bare_codes[digest] = converter.encode(source).codes
                bare.append(self._sample("Bare codec" + f" {codec.name}" * (len(codecs) > 1), path, reference))
                done += 1
            changes: dict[str, list[LevelChange]] = {}
            for name, converter in converters.items():
                console.show_progress(f"converting with {name}", done, steps)
                cond = converter.target(targets)
                path = out / f"{len(converted) + 1}_{re.sub(r'[^A-Za-z0-9+.-]+', '_', name)}.wav"
                converter.convert(source, cond, path)
                judged = reference if self._may_judge(converter, name, console) else None
                converted.append(self._sample(f"Conversion by {name}", path, judged))
                codes = converter.encode(source, cond if converter.model.acts(before_vq=True) else None).codes
                changes[name] = _changes(bare_codes[converter.model.codec.digest], codes, converter)
                done += 1
            rate = next(iter(converters.values())).model.codec.sampling_rate
            first = self._written(out / "source.wav", [load_audio(source, rate)], rate)
            last = self._written(out / "target.wav", [load_audio(path, rate) for path in targets], rate)
            samples = [self._sample("Source", first, reference), *bare, *converted, self._sample("Target", last, None)]
            notes = [self.plain(line) for line in dict.fromkeys(console.lines)]
            return Comparison(samples, changes, self.judge.name, notes)

    def convert_files(
        self,
        uploads: Sequence[Path],
        targets: Sequence[Path],
        adapter: str,
        suffix: str,
        console: ProgressConsole,
        edit_scale: float = 1.0,
    ) -> Batch:
        """Convert files and the files in zip archives; the result is a zip archive with the same folders and names.

        Args:
            uploads: recordings and zip files.
            targets: speech of the target.
            adapter: displayed name.
            suffix: of the files in the result, such as ".wav".
            console: where to report.
            edit_scale: factor of the edits, see `ConditionedCodec`.

        Raises:
            UserError: if the target, or every file, is unusable, or a zip file is damaged or too large.
        """
        audio_format = AudioFormat(suffix)
        with self._busy, tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            sources, converted = Path(temporary, "sources"), Path(temporary, "converted")
            sources.mkdir()
            converted.mkdir()
            for upload in uploads:
                self._collect(upload, sources)
            for target in targets:
                with decodable(target) as path:
                    self._check(path, "target", UTTERANCE_SECONDS)
            found = [path for path in sources.rglob("*") if path.is_file()]
            other = sorted(path.name for path in found if path.suffix.lower() not in media_suffixes())
            if len(other) == len(found):
                raise UserError(
                    f"no audio among {plural(len(found), 'file')} ({', '.join(other[:3])}); "
                    f"expected {', '.join(media_suffixes())}, or a zip file of them"
                )
            if other:
                console.line(f"{plural(len(other), 'file')} without audio: {', '.join(other[:10])}")
            converter = self._loaded(adapter, console, edit_scale)
            jobs = jobs_of_sources([str(sources)], [str(path) for path in targets], converted, suffix)
            accepted = [job for job in jobs if self._within(job.source, console)]
            with suppress(Stopped):
                convert_all(accepted, converter, converted, audio_format)
            done = sorted(job.out for job in accepted if job.out.exists())
            if console.stopped():
                console.line(f"stopped after {len(done)} of {plural(len(jobs), 'file')}")
            lines = [self.plain(line).removeprefix("warning: ") for line in console.lines]
            if not done:
                raise UserError(f"no file was converted: {'; '.join(lines[:5])}")
            archive = self._new_folder() / "converted.zip"
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
                for path in done:
                    packed.write(path, path.relative_to(converted))
            return Batch(archive, len(done), lines)

    def plain(self, text: str) -> str:
        """A message without the temporary folders of the files that it names."""
        folders = rf"{re.escape(str(self.folder))}/(?:[0-9a-f]{{16,}}/|tmp[^/\s]+/(?:sources/|converted/)?)?"
        return re.sub(folders, "", text)

    def _loaded(self, name: str, console: Console, edit_scale: float) -> Converter:
        run = self.offer.run_of(name)
        console.show_progress(f"loading {name}", 0, 1)
        converter = self._converter(run)
        converter.console = console
        converter.model.edit_scale = edit_scale
        return converter

    def _may_judge(self, converter: Converter, name: str, console: Console) -> bool:
        """Whether the judge is independent of an adapter's conditioning encoder; otherwise a line says why not."""
        try:
            if converter.encoder is not None:
                check_judge(self.judge, converter.encoder, self.catalogue)
        except UserError as error:
            console.line(f"no similarity of the conversion by {name}: {error}")
            return False
        return True

    def _check(self, path: Path, role: str, min_seconds: float) -> None:
        """Refuse a recording that is unusable or too long."""
        self._check_length(path)
        if problem := check_audio(path, min_seconds=min_seconds).problem:
            raise UserError(f"{role} {path} {problem}")

    def _check_length(self, path: Path) -> None:
        try:
            minutes = soundfile.info(str(path)).duration / 60
        except soundfile.LibsndfileError:
            return  # the reason is named where it is decoded
        if minutes > self.limits.minutes:
            raise UserError(
                f"{path} has {minutes:.1f} minutes; at most {self.limits.minutes:g} are accepted "
                "(runner app --max-minutes changes this; runner convert has no limit)"
            )

    def _within(self, path: Path, console: Console) -> bool:
        """Whether the length of a file is accepted; otherwise a line says why not."""
        try:
            with decodable(path) as file:
                self._check_length(file)
        except UserError as error:
            console.warning(f"not converted: {error}")
            return False
        return True

    def _sample(self, label: str, file: Path, reference: Tensor | None) -> Sample:
        samples, rate = soundfile.read(str(file), dtype="float32")
        similarity = None
        if reference is not None:
            own = waveform_embedding(self.judge, load_audio(file, self.judge.sample_rate))
            similarity = float(own.double() @ reference.double())
        return Sample(label, file, spectrogram_png(samples, rate, SPECTROGRAM), similarity)

    def _written(self, path: Path, audio: Sequence[Tensor], rate: int) -> Path:
        """Write audio (1, n) to a wav file, one after the other."""
        AudioFormat().write(path, [piece[0] for piece in audio], rate)
        return path

    def _collect(self, upload: Path, folder: Path) -> None:
        """Copy an upload into a folder, a zip file with its folders."""
        if upload.suffix.lower() != ".zip":
            place, number = folder / upload.name, 1
            while place.exists():
                number += 1
                place = folder / f"{upload.stem} {number}{upload.suffix}"
            shutil.copyfile(upload, place)
            return
        try:
            with zipfile.ZipFile(upload) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir() and _visible(entry.filename)]
                megabytes = sum(entry.file_size for entry in entries) / 1e6
                if megabytes > self.limits.megabytes or len(entries) > MAX_ENTRIES:
                    raise UserError(
                        f"{upload} holds {plural(len(entries), 'file')} with {megabytes:.0f} MB; at most {MAX_ENTRIES} "
                        f"files with {self.limits.megabytes:g} MB are accepted (runner app --max-mb changes this)"
                    )
                for entry in entries:
                    archive.extract(entry, folder)  # removes drive letters, leading slashes and ".."
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise UserError(f"{upload} cannot be unpacked: {error}; expected a zip file without password") from error

    def _new_folder(self) -> Path:
        """A new folder for results; those of yesterday are deleted."""
        root = self.folder / "results"
        root.mkdir(exist_ok=True)
        for old in root.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=root))


def _visible(name: str) -> bool:
    """Whether an entry of a zip file is neither hidden nor one of the extra files of macOS."""
    return not any(part.startswith((".", "__MACOSX")) and part != ".." for part in Path(name).parts)


def _changes(bare: Sequence[Tensor], codes: Sequence[Tensor], converter: Converter) -> list[LevelChange]:
    codec = converter.model.codec
    frames = codec.sampling_rate / codec.hop_length  # per second
    return [
        LevelChange(frames / stride, (one != other)[0].cpu().numpy())
        for one, other, stride in zip(bare, codes, codec.vq_strides, strict=True)
    ]
