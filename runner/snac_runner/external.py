"""Other systems on a study's conversions: what they need goes out as wavs, what they return is judged like an arm.

A trained run on other speech than it was trained and judged on."""

from __future__ import annotations

import re
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError
from snac_core.files import write_json, write_text
from snac_runner.config import SHUFFLED, SYSTEMS, ArmSettings, StudySettings
from snac_runner.console import Console
from snac_runner.controls import CONTROLS, fit_metrics, judged, run_controls
from snac_runner.data.audio import resample
from snac_runner.data.corpus import digest_of
from snac_runner.data.pairs import PairList
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.model_figures import noise_floor, times_real_time
from snac_runner.evaluate.systems import Rendering, System, conditioned
from snac_runner.resources import StudyResources
from snac_runner.run_folder import check_folder, now, result_status, run_config, write_result, write_wav

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")
_TOLD = """Convert every source/<pair>.wav into the voice of reference/<target>.wav, and write <pair>.wav into a
folder. pairs.csv says which target belongs to which pair. Then:

runner evaluate --audio FOLDER --pairs {pairs} --name SYSTEM
"""


def export(resources: StudyResources, folder: Path, pairs_file: str) -> int:
    """Write what another system needs: sources, references to condition on, and the list; how many pairs.

    Raises:
        UserError: if `folder` holds files already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files; give a new folder to export to")
    rate = resources.codec.sampling_rate
    lines = ["pair,target"]
    for item in resources.test.items:
        write_wav(folder / "source" / f"{item.pair.id}.wav", item.audio[0], rate)
        lines.append(f"{item.pair.id},{item.pair.target}")
    for speaker in sorted({item.pair.target for item in resources.test.items}):
        heard = [resources.test.segment_audio(s)[0] for s in resources.test_pairs.references[speaker]["conditioning"]]
        write_wav(folder / "reference" / f"{speaker}.wav", torch.cat(heard), rate)
    write_text(folder / "pairs.csv", "\n".join(lines) + "\n")
    resources.test_pairs.export(folder / "pairs.json")
    write_text(folder / "README.txt", _TOLD.format(pairs=pairs_file))
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
    folder: Path, name: str, study_folder: Path, study: StudySettings, resources: StudyResources, console: Console
) -> Path:
    """Judge a system's audio on a study's conversions into `study_folder`/systems/<name>; that folder."""
    if not re.fullmatch(r"[\w.+ -]+", name) or name in {".", ".."}:
        raise UserError(f"--name {name!r}: expected letters, digits, spaces and any of . + - _")
    taken = {*CONTROLS, SHUFFLED, *(place.parent.parent.name for place in study_folder.glob("*/seed*/config.json"))}
    if name in taken:
        raise UserError(f"--name {name!r} is the name of a control or an arm of {study_folder}; give another")
    files = returned(folder, resources.test_pairs)
    place = study_folder / SYSTEMS / name
    if result_status(place) is not None:
        raise UserError(f"{place} holds the judgement of a system of this name; give another --name")
    started = now()
    run_controls(study, study_folder, resources, console)
    metrics, missing = fit_metrics(study_folder, resources)
    heard = digest_of([[pair, path.stat().st_size, path.stat().st_mtime_ns] for pair, path in files.items()])
    scores = judged(
        f"judging {name}", from_files(files), place / "judged.jsonl", {"system": name, "files": heard},
        study, resources, console, metrics,
    )  # fmt: skip
    scores.missing = missing
    write_result(
        place,
        study=study,
        resources=resources,
        status="success",
        arm=name,
        kind="system",
        scores=scores,
        started=started,
    )
    return place


def judge_elsewhere(
    run: Path, study: StudySettings, arm: ArmSettings, out: Path, resources: StudyResources, console: Console
) -> None:
    """Judge the model of the run at `run` on the test split of the study's data, into `out`; what is there is kept.

    Args:
        run: folder of a trained run.
        study: its settings, with other data.
        arm: its arm.
        out: folder to write.
        resources: of `study`.
        console: where to say how far it is.

    Raises:
        UserError: if the run has no model, or `out` holds something else.
    """
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"{run} has no model; expected the folder of a finished run")
    seed = study.seeds[0]
    config = run_config(study, arm, seed, resources)
    if check_folder(out, config) == "success":
        console.line(f"{out}: judged already, left as it is")
        return
    started = now()
    model = ConditionedCodec.from_pretrained(run / "model", codec=resources.codec, plugins=resources.catalogue)
    model = model.to(resources.device)
    write_json(out / "config.json", config)
    resources.test_pairs.export(out / "pairs.json")
    run_controls(study, out, resources, console)
    metrics, missing = fit_metrics(out, resources)
    scores = judged(
        f"judging {arm.title} on {resources.corpus.name}", conditioned(model), out / "judged.jsonl",
        {"run": config["hash"]}, study, resources, console, metrics,
    )  # fmt: skip
    scores.missing = missing
    write_result(
        out, study=study, resources=resources, status="success", arm=arm.title, seed=seed, settings=arm, config=config,
        scores=scores, noise_floor={"secs": noise_floor(model, resources.test, resources.catalogue.metrics["secs"]())},
        cost={"times_real_time": times_real_time(model, resources.test)}, started=started,
    )  # fmt: skip
