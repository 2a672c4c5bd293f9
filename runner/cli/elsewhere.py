"""What `runner evaluate RUN --data` and `runner evaluate --pairs` do, from their options to the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runner.cli.ablating import materials_of, stored_run
from runner.cli.console import progress, say
from runner.cli.plugin_options import catalogue_of
from runner.config import StudySettings, compose, read_values
from runner.data import PairList
from runner.elsewhere import judge_elsewhere
from runner.external import export, judge_returned
from runner.report import build, summary
from snac_core.errors import UserError


def judge_run(
    run: Path, data: str, out: Path | None, device: str, plugins: Sequence[str], disable: Sequence[str] = ()
) -> None:
    """Judge a trained run on other speech, into a folder of its own."""
    stored, arm = stored_run(run)
    study = stored.model_copy(update={"data": str(Path(data).resolve()), "device": device})
    with progress() as console:
        materials = materials_of(study, catalogue_of([*study.plugins, *plugins], disable, console.line), console)
        place = out or run / "elsewhere" / f"{materials.corpus.name}-{materials.corpus.digest[:8]}"
        judge_elsewhere(run, study, arm, place, materials, console)
        page = build(place)
    say(summary(place))
    say(f"report: {page}")


def judge_audio(
    pairs: Path, audio: Path | None, out: Path | None, name: str, data: str | None, device: str,
    plugins: Sequence[str], disable: Sequence[str] = (),
) -> None:  # fmt: skip
    """Export a study's conversions for another system (`out`), or judge what it made of them (`audio`)."""
    listed, folder = PairList.load(pairs), pairs.resolve().parent
    study = _study_of(folder).model_copy(update={"device": device})
    if data is not None:
        study = study.model_copy(update={"data": str(Path(data).resolve())})
    with progress() as console:
        materials = materials_of(study, catalogue_of([*study.plugins, *plugins], disable, console.line), console)
        listed.check(materials.corpus)
        if materials.test_pairs.digest != listed.digest:
            raise UserError(f"{pairs} is not the list of the study in {folder}: its settings give another one")
        if out is not None:
            count = export(materials, out, str(pairs))
            say(f"{count} conversions to {out}; {out / 'README.txt'} says how to bring them back")
            return
        assert audio is not None
        place = judge_returned(audio, name, folder, study, materials, console)
        page = build(folder)
    say(summary(folder))
    say(f"judged: {place}")
    say(f"report: {page}")


def _study_of(folder: Path) -> StudySettings:
    """The settings of the study, or of the single run, in `folder`."""
    if (folder / "study.toml").is_file():
        values = read_values(folder / "study.toml")
        return compose(values.get("study", {}), values.get("arm", []), str(folder / "study.toml"))[0]
    if (folder / "config.json").is_file():
        return stored_run(folder)[0]
    raise UserError(f"{folder} holds no study beside the list of pairs; give the pairs.json in the study's own folder")
