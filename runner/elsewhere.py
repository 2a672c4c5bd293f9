"""A trained run on other speech than it was trained and judged on."""

from __future__ import annotations

from pathlib import Path

from runner.config import ArmSettings, StudySettings
from runner.controls import Console, fit_metrics, judged, run_controls
from runner.evaluate.noise import noise_floor
from runner.evaluate.pace import times_real_time
from runner.evaluate.systems import conditioned
from runner.materials import Materials
from runner.runs import check_folder, now, run_config, write_result
from snac_core import atomic
from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError


def judge_elsewhere(
    run: Path, study: StudySettings, arm: ArmSettings, out: Path, materials: Materials, console: Console
) -> None:
    """Judge the model of the run at `run` on the test split of the study's data, into `out`; what is there is kept.

    Args:
        run: folder of a trained run.
        study: its settings, with other data.
        arm: its arm.
        out: folder to write.
        materials: of `study`.
        console: where to say how far it is.

    Raises:
        UserError: if the run has no model, or `out` holds something else.
    """
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"{run} has no model; expected the folder of a finished run")
    seed = study.seeds[0]
    config = run_config(study, arm, seed, materials)
    if check_folder(out, config) == "success":
        console.line(f"{out}: judged already, left as it is")
        return
    started = now()
    model = ConditionedCodec.from_pretrained(run / "model", codec=materials.codec, plugins=materials.catalogue)
    model = model.to(materials.device)
    atomic.write_json(out / "config.json", config)
    materials.test_pairs.export(out / "pairs.json")
    run_controls(study, out, materials, console)
    metrics, missing = fit_metrics(out, materials)
    scores = judged(
        f"judging {arm.title} on {materials.corpus.name}", conditioned(model), out / "judged.jsonl",
        {"run": config["hash"]}, study, materials, console, metrics,
    )  # fmt: skip
    scores.missing = missing
    write_result(
        out, study=study, materials=materials, status="success", arm=arm.title, seed=seed, settings=arm, config=config,
        scores=scores, noise_floor={"secs": noise_floor(model, materials.test, materials.catalogue.metrics["secs"]())},
        cost={"times_real_time": times_real_time(model, materials.test)}, started=started,
    )  # fmt: skip
