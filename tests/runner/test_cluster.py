"""Units of a study on a Ray cluster: started here, with two workers, one of which is killed."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import PHASES, Bench, RecordedConsole, arm, plugin, result, steps, weights

from snac_core.errors import UserError
from snac_runner import bank_build, cluster, controls, external, remote_resources, remote_units
from snac_runner.cli.launch import without
from snac_runner.cluster import Cluster, Share, _Head, connected
from snac_runner.console import Console
from snac_runner.data.open_corpus import open_corpus
from snac_runner.distributed import ProcessLost, difference
from snac_runner.external import evaluate_on_other_speech
from snac_runner.lock import locked
from snac_runner.remote_resources import Setup, spread
from snac_runner.remote_units import divided, run_on_cluster
from snac_runner.resources import StudyResources
from snac_runner.run_folder import stored_run
from snac_runner.study import run_arms, run_study
from snac_runner.unit import Unit

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray, the extra [cluster]")
KILLED_ONCE = """
    @hookimpl
    def loss(self, step):
        import os, pathlib, signal
        marker = pathlib.Path({marker!r})
        if step.index == 4 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {{}}
"""
EXCLUDED = ["wer", "stoi", "pesq", "distillmos", "per"]  # take long


@pytest.fixture(autouse=True)
def _no_monitor_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full machine, Ray would end processes of its own accord."""
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")


def killed_once(folder: Path) -> tuple[Path, Path]:
    """A plugin file with the strategy `fragile`, the first process of which is killed at step 4; and its marker."""
    marker = folder / "killed"
    return plugin(folder, "fragile", KILLED_ONCE.format(marker=str(marker))), marker


@contextmanager
def two_workers(console: Console) -> Iterator[Cluster]:
    """A Ray cluster of this machine. Ray gives up where its own processes take more than 15 s to start."""
    try:
        with connected("local", console, gpus=0, cpus=1) as machines:
            yield machines
    except UserError as error:
        if "timed out during startup" in str(error):
            pytest.skip(f"this machine is too busy: {error}")
        raise


@pytest.mark.slow  # on a busy machine, Ray may not start
@needs_ray
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shared", [True, False])
def test_a_killed_worker_is_started_again_from_its_checkpoint(
    bench: Bench, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, marker = killed_once(tmp_path)
    arms = [arm("fragile"), arm(PHASES[1])]
    changes = {"steps": 5, "save_every": 2, "dev_pairs": 0, "test_pairs": 0, "plugins": [str(file)]}
    marker.touch()
    undisturbed = bench.train(arms, tmp_path / "local", files=[file], **changes)
    marker.unlink()
    resources = bench.resources(bench.study(**changes), [file])
    lines: list[str] = []
    resources.console = RecordedConsole(lines)
    root = tmp_path / "cluster"
    root.mkdir()
    runs = {(one.title, 0): root / one.title / "seed0" for one in arms}
    if not shared:  # the file by which a machine recognises the folder does not appear, and changes are sent at once
        monkeypatch.setattr(remote_units, "write_text", lambda *_: None)
        monkeypatch.setattr(remote_units, "Order", partial(remote_units.Order, send_every=0.0))
    with two_workers(resources.console) as machines:
        execute = partial(run_on_cluster, cluster=machines, root=root, disable=[], command=["ablate"])
        run_arms(arms, runs, resources, execute=execute)
    assert marker.exists()
    assert any("fragile: its process has died (WorkerCrashedError); it is started again" in line for line in lines)
    assert shared != any("is not shared with" in line for line in lines)
    for title, folder in undisturbed.items():
        ours = runs[title, 0]
        assert result(ours)["status"] == "success"
        assert result(ours)["command"] == "runner ablate"
        assert steps(ours) == [1, 2, 3, 4, 5]
        assert all(torch.equal(value, weights(ours)[key]) for key, value in weights(folder).items())
    assert sorted(path.name for path in root.iterdir()) == sorted(one.title for one in arms)  # nothing else is left


def timeless(report: Path) -> str:
    """A report without times, memory, and the line of the machine's state."""
    text = report.read_text()
    if report.suffix == ".json":
        return text
    text = re.sub(r"(?m)^\| (?:measured|hardware: \S+|git) \|.*$", "", text)
    return re.sub(r"(?s)\n## Cost of one run\n.*?\n(?=## )", "\n", text)


@pytest.mark.slow
@needs_ray
@pytest.mark.filterwarnings("default")
def test_the_report_of_a_study_on_a_cluster_is_that_of_a_local_one(bench: Bench, tmp_path: Path, cache: Path) -> None:
    file, marker = killed_once(tmp_path)
    study = ["ablate", "--strategies", f"fragile,{PHASES[2]}", "--plugin", file, "--seeds", "2", "--out", "study"]
    study += [*bench.options(exclude_metrics=EXCLUDED), "--device", "cpu"]
    environment = {**os.environ, "SNAC_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def command(folder: str, *more: str) -> subprocess.Popen[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "snac_runner", *map(str, study), *more],
            cwd=tmp_path / folder, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if pytest runs in the background
        )  # fmt: skip

    marker.touch()
    local = command("local")
    _, said = local.communicate(timeout=600)
    assert local.returncode == 0, said
    marker.unlink()
    first = command("cluster", "--cluster", "local", "--cpus-per-run", "1")
    trained = tmp_path / "cluster" / "study" / PHASES[2] / "seed0" / "checkpoint" / "state.pt"
    while first.poll() is None and not (marker.exists() and trained.exists()):
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 130, said
    assert said.splitlines()[-1] == "error: stopped; give the same command again to continue in study"
    again = command("cluster", "--cluster", "local", "--cpus-per-run", "1")
    _, said = again.communicate(timeout=600)
    assert again.returncode == 0, said
    for name in ("report.json", "report.md"):
        ours, theirs = (timeless(tmp_path / where / "study" / name) for where in ("cluster", "local"))
        assert ours == theirs, name


@pytest.mark.slow
@needs_ray
@pytest.mark.filterwarnings("default")
def test_conversions_and_embeddings_are_computed_on_a_cluster_bit_for_bit(
    bench: Bench, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished / PHASES[2] / "seed0"
    study, one = stored_run(run)
    study = study.model_copy(update={"exclude_metrics": tuple(EXCLUDED), "device": "cpu"})
    monkeypatch.setattr(controls, "BLOCK", 1)
    evaluate_on_other_speech(run, one, tmp_path / "here", bench.resources(study))
    corpus, spec = open_corpus(bench.speech), bank_build.EncoderSpec("simple")
    bank_build.build_bank(corpus, tmp_path / "bank here", spec, workers=1)
    with two_workers(RecordedConsole([])) as machines:
        evaluate_on_other_speech(run, one, tmp_path / "there", shared_out(bench.resources(study), machines))
        bank_build.build_bank(corpus, tmp_path / "bank there", spec, workers=machines)
    for part in ("status", "metrics", "utterances", "codes", "noise_floor"):
        assert result(tmp_path / "there")[part] == result(tmp_path / "here")[part], part
    assert bank_files(tmp_path / "bank here") == bank_files(tmp_path / "bank there") != {}


# ------------------------------------------------------------------------------------------ without Ray


class InThisProcess:
    """The part of Ray that `Cluster` uses; jobs run here, when they are waited for, and die as `deaths` says."""

    class exceptions:
        class RayError(Exception): ...

        class RayTaskError(RayError): ...

        class RayActorError(RayError): ...

        class RaySystemError(RayError): ...

        class WorkerCrashedError(RayError): ...

    def __init__(self, deaths: dict[str, int]) -> None:
        self.deaths, self.cancelled = deaths, 0

    def remote(self, what: Any) -> Any:
        if isinstance(what, type):
            one = what()
            methods = {name: SimpleNamespace(remote=getattr(one, name)) for name in ("put", "take")}
            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: SimpleNamespace(**methods)))
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *given: _Ref(what, given)))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return refs[:1], refs[1:]

    def get(self, ref: Any) -> Any:
        if not isinstance(ref, _Ref):
            return ref
        job = str(ref.given[1])
        if self.deaths.get(job, 0):
            self.deaths[job] -= 1
            raise self.exceptions.WorkerCrashedError
        return ref.act(*ref.given)

    def cancel(self, _ref: Any) -> None:
        self.cancelled += 1


class _Ref:
    def __init__(self, act: Any, given: Any) -> None:
        self.act, self.given = act, given


def shout(job: str, console: Console) -> str:
    """The work of a job."""
    console.line(f"about {job}")
    if job == "wrong":
        raise UserError("this job is wrong")
    return job.upper()


def shouted(deaths: dict[str, int], jobs: list[str], lines: list[str]) -> tuple[list[tuple[str, str]], int]:
    """What jobs return, with a machine that dies, and how many were cancelled."""
    ray = InThisProcess(deaths)
    machines = Cluster(ray, Share(0.0, 1), 2, _Head(""), RecordedConsole(lines))  # type: ignore[arg-type]
    try:
        return list(machines.run(shout, jobs, pack=str)), ray.cancelled
    except UserError:
        lines.append(f"cancelled: {ray.cancelled}")
        raise


def test_a_job_is_started_again_three_times_and_an_error_stops_the_others() -> None:
    lines: list[str] = []
    done, cancelled = shouted({"b": 3}, ["a", "b", "c"], lines)
    assert sorted(done) == [("a", "A"), ("b", "B"), ("c", "C")]
    assert not cancelled
    assert lines.count("b: its process has died (WorkerCrashedError); it is started again") == 3
    assert lines.count("about b") == 1
    with pytest.raises(UserError, match="b: its process has died 4 times"):
        shouted({"b": 4}, ["b", "a"], lines)
    with pytest.raises(UserError, match="this job is wrong"):
        shouted({}, ["wrong", "a", "b"], lines)
    assert lines[-1] == "cancelled: 2"


@needs_ray
def test_jobs_are_done_by_processes_of_ray_of_which_one_is_killed(tmp_path: Path) -> None:
    marker, lines = tmp_path / "killed", []

    def work(job: str, console: Console) -> str:  # sent to the other process as code: that cannot import this file
        console.line(f"about {job}")
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return job.upper()

    try:
        with connected("local", RecordedConsole(lines), cpus=1) as machines:
            done = list(machines.run(work, ["a", "b"], pack=str))
    except UserError as error:
        if "Ray does not start" not in str(error):
            raise
        pytest.skip(f"{error} (a busy machine)")
    assert sorted(done) == [("a", "A"), ("b", "B")]
    assert sum("its process has died (WorkerCrashedError); it is started again" in line for line in lines) == 1
    assert {"about a", "about b"} <= set(lines)


def test_a_head_that_stops_answering_ends_the_command_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ASK", 0.02)
    ray = InThisProcess({})
    head = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(ray, "wait", lambda *_, **_kw: time.sleep(0.02) or ([], []))
    with _Head(f"127.0.0.1:{head.getsockname()[1]}") as watched:
        machines = Cluster(ray, Share(0.0, 1), 2, watched, RecordedConsole([]))  # type: ignore[arg-type]
        running = machines.run(shout, ["a"], pack=str)
        time.sleep(0.2)
        assert not watched.is_lost
        head.close()
        with pytest.raises(ProcessLost, match=r"more \(its head at 127.0.0.1:\d+ does not answer\)"):
            next(running)


def in_this_process(monkeypatch: pytest.MonkeyPatch, console: Console, deaths: dict[str, int]) -> Cluster:
    """A cluster of this process, in which jobs die as `deaths` says; what they change of it is changed back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(Path.cwd())
    return Cluster(InThisProcess(deaths), Share(0.0, torch.get_num_threads()), 2, _Head(""), console)  # type: ignore[arg-type]


def shared_out(resources: StudyResources, machines: Cluster) -> StudyResources:
    """The same resources, with which conversions are evaluated on a cluster."""
    resources.spread = partial(spread, cluster=machines, setup=Setup.of(resources.study, [], machines, ["evaluate"]))
    return resources


def test_conversions_of_a_run_are_shared_out_and_get_the_same_result(
    bench: Bench, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished / PHASES[2] / "seed0"
    study, one = stored_run(run)
    study = study.model_copy(update={"exclude_metrics": tuple(EXCLUDED)})
    monkeypatch.setattr(controls, "BLOCK", 1)
    evaluate_on_other_speech(run, one, tmp_path / "here", bench.resources(study))
    monkeypatch.setattr(remote_resources, "_resources", lambda *_: bench.resources(study))
    asked: list[str] = []
    monkeypatch.setattr(controls, "rows_of", lambda *given, of=controls.rows_of: asked.append("") or of(*given))
    lines: list[str] = []
    pair = bench.resources(study).test.items[1].pair.id
    machines = in_this_process(monkeypatch, RecordedConsole(lines), {str([pair]): 2})
    evaluate_on_other_speech(run, one, tmp_path / "there", shared_out(bench.resources(study), machines))
    folders = ["", *(f"controls/{path.name}" for path in (tmp_path / "here" / "controls").iterdir())]
    assert len(asked) == 2 * len(folders) >= 8
    assert sum("its process has died" in line for line in lines) == 2
    for folder in folders:
        ours, theirs = (result(tmp_path / where / folder) for where in ("there", "here"))
        for part in ("status", "metrics", "utterances", "codes", "noise_floor", "missing", "digests", "pairs"):
            assert ours[part] == theirs[part], (folder, part)
    samples = [sorted(path.name for path in (tmp_path / where / "samples").iterdir()) for where in ("there", "here")]
    assert samples[0] == samples[1]


def test_a_machine_without_the_run_or_with_another_one_is_named(
    bench: Bench, finished: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    resources = bench.resources(bench.study())
    with pytest.raises(UserError, match=rf"{socket.gethostname()} does not find {tmp_path}.* on storage that all"):
        external._trained(tmp_path, 1.0, "", (), resources)
    with pytest.raises(UserError, match=rf"{socket.gethostname()} has digest of the run '.*', the command 'other'"):
        external._trained(runs[PHASES[1]], 1.0, "other", (), resources)


def test_metrics_that_a_machine_lacks_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = bench.resources(bench.study())
    metrics = controls.wanted_metrics(resources).metrics
    of_command = controls._compared([], metrics, resources)
    monkeypatch.setattr(controls, "_wanted_once", lambda _: {k: v for k, v in metrics.items() if k != "gap"})
    with pytest.raises(UserError, match=r"has metric gap 'none', the command '.*'; all machines need the same"):
        controls._rows(lambda _: pytest.fail("evaluated"), [], list(metrics), of_command, resources, ["a"])


@pytest.mark.parametrize("what", [["--calibrate", "--data", "x"], ["--pairs", "p.json", "--export", "x"]])
def test_what_a_cluster_does_not_evaluate_is_refused(what: list[str], refusal) -> None:  # type: ignore[no-untyped-def]
    said = refusal("evaluate", *what, "--cluster", "local")
    assert said == "error: --cluster is for conversions of a run (RUN) or of another system (--audio); leave it out"


def bank_files(folder: Path) -> dict[str, bytes]:
    """The files of a bank, but for the log of the time of its index."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".npy"}


def test_a_bank_that_a_cluster_embeds_has_the_same_bytes(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_build, "_CHUNK", 4)
    corpus, spec, done = open_corpus(bench.speech), bank_build.EncoderSpec("simple"), list[int]()
    here = bank_build.build_bank(corpus, tmp_path / "here", spec, workers=1)
    machines = in_this_process(monkeypatch, RecordedConsole([]), {})
    there = bank_build.build_bank(
        corpus, tmp_path / "there", spec, workers=machines, progress=lambda count, _: done.append(count)
    )
    assert there.embedded == here.embedded == done[-1]
    assert len(done) == -(-here.embedded // 4)
    assert bank_files(tmp_path / "here") == bank_files(tmp_path / "there") != {}


def test_addresses_that_do_not_answer_are_refused_at_once(refusal) -> None:  # type: ignore[no-untyped-def]
    command = ["ablate", "--strategies", PHASES[1], "--data", "speech", "--cluster"]
    forms = "expected auto (the Ray cluster that this machine belongs to), local (started here) or ray://HOST:PORT"
    assert f"--cluster 'localhost'; {forms}" in refusal(*command, "localhost")
    assert "--cluster with --devices" in refusal(*command, "auto", "--devices", "2")
    assert "--cluster with device 'mps'" in refusal(*command, "auto", "--device", "mps")
    assert "--gpus-per-run 0.5 with device 'cpu'" in refusal(
        *command, "local", "--gpus-per-run", "0.5", "--device", "cpu"
    )


@needs_ray
@pytest.mark.filterwarnings("default")
def test_a_port_on_which_nothing_listens_ends_in_a_sentence(refusal) -> None:  # type: ignore[no-untyped-def]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"ray://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    said = refusal("ablate", "--strategies", PHASES[1], "--data", "speech", "--cluster", address)
    assert f"--cluster {address}: no Ray cluster answers ([Errno 111] Connection refused)" in said
    assert time.monotonic() - began < 20


def test_a_cluster_that_may_want_a_token_is_answered_with_how_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(cluster, "_ray", lambda: SimpleNamespace(init=refuse))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no Ray cluster answers \(.*timeout; .* needs RAY_AUTH_MODE=token"):
            connected(address, RecordedConsole([])).__enter__()


def test_without_ray_the_extra_is_named(refusal, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refusal("ablate", "--strategies", PHASES[1], "--data", "speech", "--cluster", "local")
    assert said == "error: --cluster needs Ray; install it with: pip install 'snac-conditioning[cluster]'"


def test_ray_is_imported_only_inside_one_function() -> None:
    tree = ast.parse(Path(cluster.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import) and node.names[0].name == "ray"]
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_ray")
    assert [node for node in ast.walk(function) if node in imports] == imports


def test_a_share_is_a_gpu_and_its_cores_or_one_core() -> None:
    machines = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 12.0, "GPU": 2.0}, {"CPU": 8.0}, {}]
    assert Share.of(machines, None, None) == Share(1.0, 4)
    assert Share.of(machines, 0.5, None) == Share(0.5, 2)
    assert Share.of(machines[2:], None, None) == Share(0.0, 1)
    assert Share(1.0, 4).slots(machines) == 6
    assert Share(0.5, 2).slots(machines) == 12
    assert Share(0.3, 1).slots(machines) == 13 + 6
    assert Share(0.0, 3).slots(machines) == 5 + 4 + 2
    with pytest.raises(UserError, match=r"no machine of the cluster has 1 CPUs and 8 GPUs .* 16 CPUs, 4 GPUs; "):
        Share.of(machines, 8, 1)


@given(count=st.integers(1, 9), groups=st.integers(-1, 12))
def test_a_divided_unit_has_each_arm_once_in_groups_of_nearly_equal_size(count: int, groups: int) -> None:
    arms = tuple(arm(PHASES[1], name=f"arm{number}") for number in range(count))
    unit = Unit(0, arms, {one.title: Path(one.title) for one in arms}, None, True)
    parts = divided(unit, groups)
    assert len(parts) == max(1, min(groups, count))
    assert tuple(one for part in parts for one in part.arms) == arms
    sizes = [len(part.arms) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(part.folders == {one.title: Path(one.title) for one in part.arms} for part in parts)


def test_results_do_not_tell_that_a_cluster_was_used() -> None:
    given = ["ablate", "a.toml", "--cluster", "auto", "--gpus-per-run=0.5", "--cpus-per-run", "2", "--seeds", "3"]
    assert without(given) == ["ablate", "a.toml", "--seeds", "3"]
    assert without(["--devices=2", "--seeds", "3", "--devices", "4"], ["--devices"]) == ["--seeds", "3"]


def test_a_machine_with_other_data_is_named_with_the_difference() -> None:
    assert difference({"a": "1", "host": "x"}, {"a": "1", "host": "y"}) is None
    assert difference({"a": "1"}, {"a": "1", "digest of data": "0f"}) == ("digest of data 'none'", "'0f'")


def test_a_second_command_on_the_same_study_is_refused(bench: Bench, tmp_path: Path, refusal) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "study"
    command = ["ablate", "--strategies", PHASES[1], "--out", out, *bench.options(steps=1)]
    with locked(out, "is running the study in"):
        said = refusal(*command)
        with pytest.raises(UserError, match="another command is running"):
            run_study(out, [arm(PHASES[1])], [], bench.resources(bench.study(steps=1)), "")
    assert said == f"error: another command is running the study in {out}; wait for it, or give another --out"
    assert [path.name for path in out.iterdir()] == [".lock"]
