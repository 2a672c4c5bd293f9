"""Evaluation of what a study did not train: another system's audio or a trained adapter on the same pairs, or a run on
other speech."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from snac_core.checkpoint import digest_of as digest_of_strategies
from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError
from snac_core.files import write_json, write_text
from snac_runner.config import SHUFFLED, SYSTEMS, ArmSettings, StudySettings
from snac_runner.console import Console
from snac_runner.controls import (
    CONTROLS,
    MetricSelection,
    check_versions,
    evaluate_system,
    informative_metrics,
    run_controls,
    wanted_metrics,
)
from snac_runner.convert import model_folder
from snac_runner.data.audio import resample
from snac_runner.data.corpus import Corpus, digest_of
from snac_runner.data.decode import AUDIO_SUFFIXES
from snac_runner.data.media import AudioFormat
from snac_runner.data.pairs import PairList, conversion_pairs
from snac_runner.distributed import check_machine
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.model_figures import noise_floor, times_real_time
from snac_runner.evaluate.systems import Rendering, System, conditioned, needed_outputs
from snac_runner.resources import StudyResources
from snac_runner.run_folder import (
    check_folder,
    read_config,
    result_status,
    run_config,
    warn_of_changed_plugins,
)
from snac_runner.run_result import Result, write_result

_README = """Convert every source/<pair>.wav into the voice of reference/<target>.wav, and write <pair>.wav into one
folder. pairs.csv lists the target of each pair. Then run:

runner evaluate --audio FOLDER --pairs {pairs} --name SYSTEM
"""


def export(resources: StudyResources, folder: Path, pairs_file: str) -> int:
    """Write what another system needs: sources, references of the targets, and the list of pairs.

    Returns:
        the number of pairs.

    Raises:
        UserError: if `folder` is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files; give a new folder to export to")
    rate, items = resources.codec.sampling_rate, resources.test.items
    names: dict[str, str] = {}  # of files; a manifest may name its speakers as it likes
    for number, speaker in enumerate(sorted({item.pair.target for item in items})):
        name = re.sub(r"[^\w.-]", "_", speaker)
        names[speaker] = name if name not in names.values() else f"{name}_{number}"
        parts = [resources.test.segment_audio(s)[0] for s in resources.test_pairs.references[speaker]["conditioning"]]
        AudioFormat().write(folder / "reference" / f"{names[speaker]}.wav", parts, rate)
    lines = ["pair,target"]
    for item in items:
        AudioFormat().write(folder / "source" / f"{item.pair.id}.wav", [item.audio[0]], rate)
        lines.append(f"{item.pair.id},{names[item.pair.target]}")
    write_text(folder / "pairs.csv", "\n".join(lines) + "\n")
    resources.test_pairs.export(folder / "pairs.json")
    write_text(folder / "README.txt", _README.format(pairs=pairs_file))
    return len(items)


def converted_files(folder: Path, pairs: PairList) -> dict[str, Path]:
    """Pair to the audio file that a system made of it.

    Raises:
        UserError: if a file is missing, or cannot be read as audio.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected one with <pair>.wav for every pair of the list")
    files = {path.stem: path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() in AUDIO_SUFFIXES}
    lacking = [pair.id for pair in pairs.pairs if pair.id not in files]
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} of {len(pairs)} conversions, the first {lacking[0]}.wav; "
            "a system is evaluated on all pairs of the list"
        )
    found = {pair.id: files[pair.id].resolve() for pair in pairs.pairs}
    for path in found.values():
        _read_header(path)
    return found


def _read_header(path: Path) -> None:
    try:
        if path.stat().st_size:
            soundfile.info(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read as audio: {error}") from error


def from_files(files: dict[str, Path], _: StudyResources | None = None) -> System:
    """A system with its output in files, by pair."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(converted=_read(files[item.pair.id], conversions.sample_rate))

    return render


def _read(path: Path, sample_rate: int) -> Tensor:
    """Mono audio (T,) at `sample_rate`; no samples if the file is empty, which gets the worst score."""
    if not path.stat().st_size:
        return torch.zeros(0)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read as audio: {error}") from error
    audio = torch.from_numpy(samples.mean(axis=1))
    return resample(audio.unsqueeze(0), rate, sample_rate)[0] if len(audio) else audio


def evaluate_audio(folder: Path, name: str, study_folder: Path, resources: StudyResources) -> Path:
    """Score a system's audio on a study's conversions into `study_folder`/systems/<name>.

    Args:
        folder: `<pair>.wav` for every pair of the study.
        name: what to call the system.
        study_folder: of the study.
        resources: of the study.

    Returns:
        the folder of the result.

    Raises:
        UserError: for a name that cannot be used or is taken, or audio that is missing or cannot be read.
    """
    if not re.fullmatch(r"[\w.+ -]+", name) or name in {".", ".."}:
        raise UserError(f"--name {name!r}: expected letters, digits, spaces and any of . + - _")
    taken = {*CONTROLS, SHUFFLED, *(place.parent.parent.name for place in study_folder.glob("*/seed*/config.json"))}
    if name in taken:
        raise UserError(f"--name {name!r} is the name of a control or an arm of {study_folder}; give another name")
    files = converted_files(folder, resources.test_pairs)
    result = Result(study_folder / SYSTEMS / name, name, "system")
    if result_status(result.folder) is not None:
        raise UserError(f"{result.folder} holds the result of a system of this name; give another --name")
    run_controls(study_folder, resources)
    audio_digest = digest_of([[pair, path.stat().st_size, path.stat().st_mtime_ns] for pair, path in files.items()])
    result.scores = evaluate_system(
        result, partial(from_files, files), {"system": name, "files": audio_digest}, resources,
        informative_metrics(study_folder, resources),
    )  # fmt: skip
    write_result(result, resources)
    return result.folder


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter that was trained elsewhere, and the folder of its result in a study."""

    name: str
    model: ConditionedCodec
    folder: Path

    @property
    def config(self) -> dict[str, str]:
        """What the result depends on."""
        return {"adapter": self.name, "digest": digest_of_strategies(self.model.attached)}


def load_adapters(study_folder: Path, arms: Sequence[str], resources: StudyResources) -> list[TrainedAdapter]:
    """The adapters that a study evaluates beside its arms, on its device.

    Raises:
        UserError: if there is no such adapter, it belongs to another base or conditioning encoder, its name is that of
            an arm, a control or another adapter, or the study has a result of other weights under its name.
    """
    encoder, found = resources.speaker_encoder, list[TrainedAdapter]()
    for source in resources.study.adapters:
        place: str | Path = model_folder(Path(source)) if Path(source).is_dir() else source
        model = ConditionedCodec.from_pretrained(place, codec=resources.codec, plugins=resources.catalogue)
        if model.encoder is None or model.encoder.digest != encoder.digest:
            other = model.encoder.name if model.encoder else "no encoder"
            raise UserError(
                f"adapter {source} is conditioned with {other}, and the study with {encoder.name}; "
                f"give --speaker-encoder {other}, or leave the adapter out"
            )
        name = " ".join(Path(source).parts[-2:])
        if name in {*CONTROLS, SHUFFLED, *arms, *(adapter.name for adapter in found)}:
            raise UserError(f"adapter {source}: {name!r} is the name of an arm, a control or another adapter")
        adapter = TrainedAdapter(name, model.to(resources.device), study_folder / SYSTEMS / name)
        if (stored := read_config(adapter.folder)) not in ({}, adapter.config):
            raise UserError(
                f"{adapter.folder} holds the result of other weights (digest {str(stored.get('digest'))[:12]}; "
                f"{source} has {adapter.config['digest'][:12]}); give a new folder with --out"
            )
        found.append(adapter)
    return found


def evaluate_adapters(adapters: Sequence[TrainedAdapter], resources: StudyResources) -> None:
    """Score trained adapters on a study's conversions; finished results are kept."""
    context = resources.context
    done = context.agree([a.name for a in adapters if result_status(a.folder) == "success"])
    for adapter in adapters:
        if adapter.name in done:
            continue
        context.first_decides(partial(write_json, adapter.folder / "config.json", adapter.config))
        result = Result(adapter.folder, adapter.name, "system")
        selection = informative_metrics(adapter.folder.parents[1], resources)
        result.scores = evaluate_system(
            result, partial(_conditioned, adapter, selection), adapter.config, resources, selection
        )
        write_result(result, resources)


def _conditioned(adapter: TrainedAdapter, selection: MetricSelection, _: StudyResources) -> System:
    return conditioned(adapter.model, outputs=needed_outputs(selection.metrics.values()))


def study_of_other_speech(study: StudySettings, corpus: Corpus, console: Console) -> StudySettings:
    """The study with as many test conversions as the speech has: at most as many as it asks for, or as the default."""
    wanted = study.test_pairs or StudySettings().test_pairs
    if not corpus.splits.get("test"):
        return study.model_copy(update={"test_pairs": wanted})  # an error of `StudyResources.test_pairs`
    found = len(
        conversion_pairs(corpus, "test", n=wanted, seed=study.pair_seed, seconds=study.pair_seconds, at_most=True)
    )
    if found < wanted:
        console.warning(f"only {found} of {wanted} conversions are possible between the test speakers of {corpus.root}")
    return study.model_copy(update={"test_pairs": found})


def evaluate_on_other_speech(
    run: Path, arm: ArmSettings, out: Path, resources: StudyResources, edit_scale: float = 1.0
) -> None:
    """Score the model of the run at `run` on the test split of other speech, into `out`; a finished result is kept.

    Args:
        run: folder of a trained run.
        arm: its arm.
        out: folder to write.
        resources: of the run's study, with other data.
        edit_scale: factor of the edits, see `ConditionedCodec`.

    Raises:
        UserError: if the run has no model, `out` holds something else, or the scale is negative.
    """
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"{run} has no model; expected the folder of a finished run")
    seed = resources.study.seeds[0]
    model = _model_of(run, edit_scale, resources)
    weights = digest_of_strategies(model.attached)
    config = run_config(arm.model_copy(update={"start": ""}), seed, resources)  # what was trained says `weights`
    config |= {"weights": weights, "edit_scale": edit_scale}
    config["hash"] = digest_of([config["hash"], weights, edit_scale])
    pairs = resources.test_pairs  # what cannot be evaluated is an error before anything is written
    check_versions(out, wanted_metrics(resources).metrics, resources)
    if check_folder(out, config) == "success":
        resources.console.line(f"{out}: already evaluated")
        return
    warn_of_changed_plugins(run, resources.catalogue, resources.console)
    scaled = f", edit scale {edit_scale:g}" if edit_scale != 1.0 else ""
    result = Result(out, f"{arm.title}{scaled}", "arm", seed, arm, config)
    write_json(out / "config.json", config)
    pairs.export(out / "pairs.json")
    run_controls(out, resources)
    selection = informative_metrics(out, resources)
    make = partial(_trained, run.resolve(), edit_scale, weights, needed_outputs(selection.metrics.values()))
    result.scores = evaluate_system(result, make, {"run": config["hash"]}, resources, selection)
    result.noise_floor = {"secs": noise_floor(model, resources.test, resources.catalogue.metrics["secs"]())}
    result.cost = {"times_real_time": times_real_time(model, resources.test)}
    write_result(result, resources)


def _model_of(run: Path, edit_scale: float, resources: StudyResources) -> ConditionedCodec:
    model = ConditionedCodec.from_pretrained(run / "model", codec=resources.codec, plugins=resources.catalogue)
    model.edit_scale = edit_scale
    return model.to(resources.device)


def _trained(run: Path, edit_scale: float, digest: str, outputs: Collection[str], resources: StudyResources) -> System:
    """The model of a run, on this machine; its weights have this digest."""
    if not (run / "model" / "config.json").is_file():
        raise UserError(
            f"{socket.gethostname()} does not find {run}; with --cluster, the run is on storage that all machines share"
        )
    model = _model_of(run, edit_scale, resources)
    check_machine({"digest of the run": digest_of_strategies(model.attached)}, {"digest of the run": digest})
    return conditioned(model, outputs=outputs)
