"""Other systems on a study's conversions: what they need goes out as wavs, what they return is judged like an arm."""

from __future__ import annotations

import re
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from runner.config import StudySettings
from runner.controls import CONTROLS, Console, fit_metrics, judged, run_controls
from runner.data import PairList
from runner.data.audio import resample
from runner.data.corpus import digest_of
from runner.evaluate.conversions import Conversions, Item
from runner.evaluate.systems import Rendering, System
from runner.materials import Materials
from runner.names import SHUFFLED, SYSTEMS
from runner.runs import now, result_status, write_result, write_wav
from snac_core import atomic
from snac_core.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")
_TOLD = """Convert every source/<pair>.wav into the voice of reference/<target>.wav, and write <pair>.wav into a
folder. pairs.csv says which target belongs to which pair. Then:

runner evaluate --audio FOLDER --pairs {pairs} --name SYSTEM
"""


def export(materials: Materials, folder: Path, pairs_file: str) -> int:
    """Write what another system needs: sources, references to condition on, and the list; how many pairs.

    Raises:
        UserError: if `folder` holds files already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files; give a new folder to export to")
    rate = materials.codec.sampling_rate
    lines = ["pair,target"]
    for item in materials.test.items:
        write_wav(folder / "source" / f"{item.pair.id}.wav", item.audio[0], rate)
        lines.append(f"{item.pair.id},{item.pair.target}")
    for speaker in sorted({item.pair.target for item in materials.test.items}):
        heard = [materials.test.segment_audio(s)[0] for s in materials.test_pairs.references[speaker]["conditioning"]]
        write_wav(folder / "reference" / f"{speaker}.wav", torch.cat(heard), rate)
    atomic.write_text(folder / "pairs.csv", "\n".join(lines) + "\n")
    materials.test_pairs.export(folder / "pairs.json")
    atomic.write_text(folder / "README.txt", _TOLD.format(pairs=pairs_file))
    return len(lines) - 1


def returned(folder: Path, pairs: PairList) -> dict[str, Path]:
    """Pair to the audio file that a system returned for it.

    Raises:
        UserError: if any is missing, or is no audio.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected one with <pair>.wav for every pair of the list")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    lacking = [pair.id for pair in pairs.pairs if pair.id not in files]
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} of {len(pairs)} conversions, the first {lacking[0]}.wav; "
            "a system is judged on all pairs of the list"
        )
    found = {pair.id: files[pair.id] for pair in pairs.pairs}
    for path in found.values():
        _read_header(path)
    return found


def _read_header(path: Path) -> None:
    try:
        if path.stat().st_size:
            soundfile.info(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read as audio: {error}") from error


def from_files(files: dict[str, Path]) -> System:
    """A system whose output lies in files."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(converted=_read(files[item.pair.id], conversions.sample_rate))

    return render


def _read(path: Path, sample_rate: int) -> Tensor:
    """Mono audio (T,) at `sample_rate`; none where the file is empty, which scores worst."""
    if not path.stat().st_size:
        return torch.zeros(0)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read as audio: {error}") from error
    audio = torch.from_numpy(samples.mean(axis=1))
    return resample(audio.unsqueeze(0), rate, sample_rate)[0] if len(audio) else audio


def judge_returned(
    folder: Path, name: str, study_folder: Path, study: StudySettings, materials: Materials, console: Console
) -> Path:
    """Judge a system's audio on a study's conversions into `study_folder`/systems/<name>; that folder."""
    if not re.fullmatch(r"[\w.+ -]+", name) or name in {".", ".."}:
        raise UserError(f"--name {name!r}: expected letters, digits, spaces and any of . + - _")
    taken = {*CONTROLS, SHUFFLED, *(place.parent.parent.name for place in study_folder.glob("*/seed*/config.json"))}
    if name in taken:
        raise UserError(f"--name {name!r} is the name of a control or an arm of {study_folder}; give another")
    files = returned(folder, materials.test_pairs)
    place = study_folder / SYSTEMS / name
    if result_status(place) is not None:
        raise UserError(f"{place} holds the judgement of a system of this name; give another --name")
    started = now()
    run_controls(study, study_folder, materials, console)
    metrics, missing = fit_metrics(study_folder, materials)
    heard = digest_of([[pair, path.stat().st_size, path.stat().st_mtime_ns] for pair, path in files.items()])
    scores = judged(
        f"judging {name}", from_files(files), place / "judged.jsonl", {"system": name, "files": heard},
        study, materials, console, metrics,
    )  # fmt: skip
    scores.missing = missing
    write_result(
        place,
        study=study,
        materials=materials,
        status="success",
        arm=name,
        kind="system",
        scores=scores,
        started=started,
    )
    return place
