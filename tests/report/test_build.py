"""The files of a report, built from complete, damaged and unfinished studies."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_study import write_study, write_tone

from snac_core.errors import UserError
from snac_runner.report.page import build, summary
from snac_runner.report.plots import thinned, ticks
from snac_runner.report.results import read
from snac_runner.report.samples import groups, spectrogram_png
from snac_runner.report.tables import Cell, Column, Row, Table, as_csv, as_markdown, as_tex


def outputs(folder: Path) -> dict[str, bytes]:
    files = [folder / f"report.{kind}" for kind in ("html", "md", "json")] + sorted((folder / "tables").iterdir())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


def test_deleting_the_report_and_building_again_gives_the_same_bytes(simulated: Path) -> None:
    before = outputs(simulated)
    for name in before:
        (simulated / name).unlink()
    build(simulated)
    assert outputs(simulated) == before


def test_the_page_is_one_file_without_requests(simulated: Path) -> None:
    html = (simulated / "report.html").read_text()
    assert "http://" not in html
    assert "https://" not in html
    assert "<link rel=" not in html.replace('<link rel="icon" href="data:,">', "")
    assert str(simulated.parent) not in html
    assert len(html) < 25e6


def test_the_page_contains_every_arm_control_section_and_clip(simulated: Path) -> None:
    html = (simulated / "report.html").read_text()
    for text in ("made_up_a", "floor: bare codec", "ceiling: bare codec", "source, unchanged", "other speaker"):
        assert text in html
    for section in ("verdict", "ranking", "trade", "measures", "listen", "training", "codes", "cost", "provenance"):
        assert f'id="{section}"' in html
    assert html.count("<audio") == 3 * (6 + 3)


def test_json_and_tables_hold_the_same_numbers(simulated: Path) -> None:
    report = json.loads((simulated / "report.json").read_text())
    rows = list(csv.DictReader(io.StringIO((simulated / "tables/speaker.csv").read_text())))
    mean = report["arms"]["made_up_b"]["metrics"]["secs"]["mean"]
    assert float(next(r for r in rows if r["Arm"] == "made_up_b")["SECS (cosine)"]) == pytest.approx(mean)
    assert report["ranking"][-1] == "made_up_a"
    pooled = [
        json.loads(p.read_text())["metrics"]["secs"]["mean"] for p in sorted(simulated.glob("made_up_b/*/result.json"))
    ]
    assert mean == pytest.approx(sum(pooled) / 2)


def test_normalised_secs_is_the_ratio_of_pooled_means(simulated: Path) -> None:
    report = json.loads((simulated / "report.json").read_text())
    arm = report["arms"]["made_up_c"]["metrics"]
    floor, ceiling = (report["controls"][c]["secs"]["mean"] for c in ("floor", "ceiling"))
    assert arm["normalised"]["mean"] == pytest.approx((arm["secs"]["mean"] - floor) / (ceiling - floor))


def test_the_folder_of_one_run_gets_a_report_with_the_studys_controls(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", samples=1)
    html = build(folder / "made_up_b" / "seed1").read_text()
    assert "One arm, made_up_b: there is nothing to compare it with." in html
    assert "floor: bare codec" in html
    assert "made_up_a" not in html


def test_a_run_without_any_controls_gets_a_report_too(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", samples=1)
    shutil.copytree(folder / "made_up_b" / "seed0", tmp_path / "alone")
    html = build(tmp_path / "alone").read_text()
    assert (
        "Controls missing: source, floor, ceiling, mismatched, signal-processing baseline and shuffled embeddings."
        in html
    )


def test_failed_cancelled_missing_and_broken_runs_are_stated(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", gains={f"arm_{c}": 0.1 for c in "abcde"}, samples=1)
    edit(folder / "arm_a/seed0/result.json", lambda r: r.update(status="failed", error="NaN loss at <step> 17"))
    edit(folder / "arm_b/seed1/result.json", lambda r: r.update(status="cancelled", utterances=None, metrics=None))
    (folder / "arm_c/seed0/result.json").write_text("{ not json")
    shutil.rmtree(folder / "arm_d/seed1")
    edit(folder / "arm_e/seed0/result.json", lambda r: r.update(schema=99))
    html = build(folder).read_text()
    assert "5 runs of 10 did not succeed (1 failed, 1 cancelled, 1 missing and 2 unreadable)" in html
    assert "NaN loss at &lt;step&gt; 17" in html
    assert "schema 99" in html
    assert "has not run" in html


def test_tables_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", samples=0)
    (folder / "tables").mkdir()
    for name in ("failures.csv", "failures.tex", "notes.txt"):
        (folder / "tables" / name).write_text("of before")
    build(folder)
    assert not list((folder / "tables").glob("failures.*"))
    assert (folder / "tables" / "notes.txt").is_file()


def test_a_study_without_a_successful_run_gets_a_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", gains={"x": 0.1, "y": 0.2}, seeds=1, samples=0)
    for arm in "xy":
        edit(
            folder / arm / "seed0/result.json",
            lambda r: r.update(status="failed", error="boom", utterances=[], metrics={}),
        )
    assert "No verdict: no arm has finished." in build(folder).read_text()
    assert "No verdict" in summary(folder)


def test_missing_metrics_and_nulls_leave_gaps_and_not_errors(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", samples=0, pairs=16)

    def strip(result: dict[str, Any]) -> None:
        result.update(codes=None, cost=None, noise_floor=None, speaker_encoder=None, judges=None, versions=None)
        for item in result["utterances"]:
            item["metrics"] = {"secs": None if item["pair"] == "p003" else item["metrics"]["secs"]}
        result["metrics"] = {}

    for path in folder.glob("*/*/result.json"):
        edit(path, strip)
    for path in folder.glob("*/*/metrics.jsonl"):
        path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    html = build(folder).read_text()
    assert "needs a judge" in html
    assert "30/32" in html
    assert 'id="cost"' not in html


def test_results_without_utterances_show_their_pooled_means(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", samples=0, pairs=16)
    for path in folder.glob("*/*/result.json"):
        edit(path, lambda r: r.update(utterances=[]))
    report = build(folder).with_suffix(".json")
    assert json.loads(report.read_text())["arms"]["made_up_a"]["metrics"]["secs"]["low"] is None


def test_an_unlisted_metric_is_shown_with_its_own_unit(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", samples=0, pairs=16)

    def add(result: dict[str, Any]) -> None:
        result["metrics"]["sparkle"] = {"mean": 3.0, "n_ok": 16, "n": 16, "unit": "glints", "direction": "up"}

    edit(folder / "made_up_a/seed0/result.json", add)
    html = build(folder).read_text()
    assert "sparkle ↑" in html
    assert "glints" in html


def test_names_from_results_are_escaped(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", gains={"a+b": 0.1, "c": 0.2}, samples=1, pairs=16)
    edit(folder / "a+b/seed0/result.json", lambda r: r.update(command="<script>alert(1)</script>"))
    assert "<script>alert" not in build(folder).read_text()


def test_broken_silent_and_nan_samples_do_not_stop_the_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", samples=2, pairs=16)
    samples = folder / "made_up_a/seed0/samples"
    (samples / "p000.wav").write_bytes(b"RIFF, but not really")
    write_tone(samples / "p001.wav", 0.0)
    html = build(folder).read_text()
    assert "cannot be read" in html


def test_audio_that_a_killed_process_was_writing_is_not_in_the_report(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    build(folder)
    before = outputs(folder)
    for samples in folder.rglob("samples"):
        whole = sorted(samples.glob("*.wav"))[0]
        half = whole.read_bytes()[: whole.stat().st_size // 2]
        for name in (f".{whole.stem}.unfinished-abcdefgh.wav", ".unfinished-1.converted.wav"):
            (samples / name).write_bytes(half)
            (samples / "worst").mkdir(exist_ok=True)
            (samples / "worst" / name).write_bytes(half)
    build(folder)
    assert outputs(folder) == before


def test_the_page_stays_small_when_there_is_much_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_study(tmp_path / "study", samples=5, pairs=16)
    monkeypatch.setattr("snac_runner.report.samples.MAX_BYTES", 400_000)
    found, more = groups(read(folder))
    assert len(found) == 2
    assert more == 3


def test_missing_metrics_and_notes_on_the_data_are_stated(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", samples=0, pairs=16)
    odd = {"missing": {"pesq": "needs pesq"}, "data": {"name": "d", "notes": ["one utterance a speaker"]}}
    edit(folder / "made_up_a/seed0/result.json", lambda r: r.update(odd))
    html = build(folder).read_text()
    assert "Not measured: pesq (needs pesq)." in html
    assert "Data: one utterance a speaker." in html


def test_a_higher_tone_is_drawn_higher(tmp_path: Path) -> None:
    t = np.arange(16_000, dtype=np.float32) / 16_000
    low, high = (spectrogram_png(np.sin(2 * np.pi * f * t).astype(np.float32), 16_000) for f in (200.0, 3000.0))
    import io as _io

    from PIL import Image

    rows = []
    for data in (low, high):
        alpha = np.asarray(Image.open(_io.BytesIO(data)).convert("RGBA"))[..., 3].astype(float)
        rows.append(alpha[:, 75].argmax())
    assert rows[1] < rows[0]


def test_a_folder_without_results_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a study folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no result\.json"):
        build(tmp_path)


def test_tables_survive_latex_markdown_and_csv() -> None:
    table = Table(
        "t",
        "A title",
        [Column("Arm", numeric=False), Column("SECS", "cosine", "↑")],
        [
            Row([Cell("a_b & 5%", "a_b & 5%"), Cell("−0.10", -0.1, "[−0.20, 0.00]", -0.2, 0.0)]),
            Row([Cell("x|y"), Cell("—")]),
        ],
    )
    assert r"a\_b \& 5\% & $-$0.10" in as_tex(table)
    assert "x\\|y" in as_markdown(table)
    assert as_csv(table).splitlines()[1] == "a_b & 5%,-0.1,-0.2,0"


def test_ticks_are_round_and_inside_the_axis() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(-3.2 <= t <= 17.9 for t in ticks(-3.2, 17.9))


def test_long_curves_are_thinned_without_losing_their_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    short = thinned(points)
    assert len(short) == 160
    assert np.mean([y for _, y in short]) == pytest.approx(3.0, abs=0.1)
