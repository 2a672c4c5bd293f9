"""Stratified targets and negatives in training: from the bank of all utterances, or from the speakers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import PHASES, Bench, RecordedConsole, arm, records, runner, weights

from snac_core.errors import UserError
from snac_core.speakers.sampling import SpeakerSampler
from snac_runner.bank_build import EncoderSpec, build_bank
from snac_runner.data.synth import synthesize
from snac_runner.resources import StudyResources
from snac_runner.train import Interrupted

HARD = {"ratio_easy": 0.0, "ratio_medium": 0.0, "ratio_hard": 1.0, "threshold_easy_medium": -0.9,
        "threshold_medium_hard": 0.0, "same_speaker_threshold": 1.01}  # fmt: skip
CONTRASTIVE = arm(PHASES[0], settings={PHASES[0]: {"negatives": "stratified", "strata": HARD, "max_negatives": 3}})
SHORT: dict[str, Any] = {"dev_pairs": 0, "test_pairs": 0, "steps": 4, "target_choice": "stratified"}


@pytest.fixture(scope="module")
def bank(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bank that training has built."""
    folder = tmp_path_factory.mktemp("bank") / "given"
    resources = bench.resources(bench.study(bank=str(folder)))
    assert resources.utterances is not None
    return folder


def resources_of(bench: Bench, **changes: Any) -> tuple[StudyResources, list[str]]:
    """Resources of the small study, and what they say."""
    resources, lines = bench.resources(bench.study(**changes)), []
    resources.console = RecordedConsole(lines)
    return resources, lines


def test_a_missing_bank_is_built_and_an_existing_one_is_only_opened(bench: Bench, bank: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in bank.iterdir()}
    resources, lines = resources_of(bench, bank=str(bank))
    pool = resources.utterances
    assert pool is not None
    assert {path: path.stat().st_mtime_ns for path in bank.iterdir()} == written
    utterances = resources.corpus.split("train")
    assert len(pool) == len(utterances) == 4 * len(resources.table)
    names = [resources.table.names[row] for row in pool.speakers_of(torch.arange(len(pool))).tolist()]
    assert names == [utterance.speaker for utterance in utterances]
    (line,) = lines
    assert line.startswith(f"stratified targets and negatives are drawn from {len(pool)} utterances of 4 speakers in ")
    assert line.endswith(f"{bank} (index Flat, recall@100 1.00)")


def test_few_utterances_are_too_few_for_an_index_and_it_is_said(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    resources, lines = resources_of(bench)
    assert resources.utterances is None
    assert lines == [
        "stratified targets and negatives are drawn from the embeddings of 4 speakers (4096 utterances are too few for "
        "an index; there are 16)"
    ]
    monkeypatch.setattr("snac_runner.resources.TABLE_UP_TO", 15)
    off, lines = resources_of(bench, bank="none")
    assert off.utterances is None
    assert "(bank = 'none'; there are 16)" in lines[0]
    more, lines = resources_of(bench)
    assert more.utterances is not None
    assert f" in {cache / 'banks'}" in lines[0], "in the cache folder, as `runner index build` makes it"


def test_a_bank_of_another_encoder_or_of_other_speech_is_refused_before_training(
    bench: Bench, bank: Path, tmp_path: Path, refusal: Any
) -> None:
    resources, _ = resources_of(bench, bank=str(tmp_path / "ecapa"))
    build_bank(resources.corpus, tmp_path / "ecapa", EncoderSpec("ge2e"), workers=1)
    with pytest.raises(UserError, match=r"is a bank of speaker encoder 'ge2e' .*expected 'simple'.*--encoder simple"):
        resources.check()
    other = synthesize(tmp_path / "other", 8, 2)
    options = [str(other) if option == str(bench.speech) else option for option in bench.options(steps=1)]
    said = refusal("train", "--strategy", PHASES[0], *options, "--set", f"bank={bank}", "--out", tmp_path / "run")
    assert f"{bank} is stale: it was made of other audio than {other}" in said
    assert f"runner index build --data {other} --encoder simple --out {bank}" in said
    assert not (tmp_path / "run" / "result.json").exists()


def test_training_draws_from_the_utterances_and_resumes_to_the_bit(bench: Bench, bank: Path, tmp_path: Path) -> None:
    whole = bench.train([CONTRASTIVE], tmp_path / "whole", bank=str(bank), **SHORT)[PHASES[0]]
    assert sum("drawn from 16 utterances of 4 speakers" in line for line in bench.lines) == 1
    table = bench.train([CONTRASTIVE], tmp_path / "table", bank="none", **SHORT)[PHASES[0]]
    assert records(whole)[0]["loss"] != records(table)[0]["loss"]

    def press(_title: str, done: int, *_: Any) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        bench.train([CONTRASTIVE], tmp_path / "stopped", bank=str(bank), step=press, **SHORT)
    resumed = bench.train([CONTRASTIVE], tmp_path / "stopped", bank=str(bank), **SHORT)[PHASES[0]]
    assert [record["loss"] for record in records(resumed)] == [record["loss"] for record in records(whole)]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
    logs = [(run / "training.log").read_text().splitlines() for run in (whole, table, resumed)]
    assert [len(log) for log in logs] == [1 + SHORT["steps"]] * 3, "what is drawn from is said once"
    assert logs[0][0] == logs[2][0] == f"# {next(line for line in bench.lines if 'drawn from 16' in line)}"
    assert "drawn from the embeddings of 4 speakers (bank = 'none'" in logs[1][0]


DRAWS = """
import sys
from snac_core.plugins import discover
from snac_core.speakers.sampling import SpeakerSampler
from snac_runner.config import StudySettings
from snac_runner.distributed import distributed_context
from snac_runner.resources import StudyResources
import torch

study = StudySettings.model_validate_json(sys.argv[1])
with distributed_context("cpu") as context:
    resources = StudyResources(study, discover(), context=context)
    sampler = SpeakerSampler(resources.table, 0, lambda: resources.utterances)
    anchors = torch.arange(4)
    targets = sampler.targets(anchors, 7, 3, choice="stratified")
    drawn = sampler.negative_embeddings(anchors, targets[:4], 7, 5, choice="stratified")
    print(targets.tolist(), drawn.rows.tolist(), drawn.embeddings.sum().item(), sampler.stratified_pool.bank.folder)
    context.wait()
"""


def test_two_processes_build_one_bank_and_draw_what_one_process_draws(bench: Bench, tmp_path: Path) -> None:
    study = bench.study(bank=str(tmp_path / "bank"))
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", DRAWS, study.model_dump_json()],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0] == said[1] != ""
    resources, _ = resources_of(bench, bank=str(tmp_path / "bank"))
    sampler = SpeakerSampler(resources.table, 0, lambda: resources.utterances)
    targets = sampler.targets(torch.arange(4), 7, 3, choice="stratified")
    assert said[0].startswith(str(targets.tolist()))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_an_empty_bank_setting_is_an_error(bench: Bench, refusal: Any) -> None:
    assert "bank" in refusal("train", "--strategy", PHASES[0], *bench.options(steps=1), "--set", 'bank=""')


def test_the_bank_that_the_command_builds_is_the_one_that_training_opens(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("snac_runner.resources.TABLE_UP_TO", 15)
    assert runner("index", "build", "--data", bench.speech, "--encoder", "simple") == 0
    assert "index: Flat" in capsys.readouterr().out
    monkeypatch.setattr("snac_runner.bank_build._embed", lambda *_: pytest.fail("embedded again"))
    pool = resources_of(bench)[0].utterances
    assert pool is not None
    assert pool.bank.folder.parent == tmp_path / "cache" / "banks"
    assert len(pool) == 16
