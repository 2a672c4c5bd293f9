"""`runner app`: the page in headless Chromium, its HTTP API, what it refuses, and how it stops."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from small_study import Bench, runner

from snac_core import discover, load_speaker_encoder
from snac_core.errors import UserError
from snac_runner.app.adapters import offer
from snac_runner.app.conversion import Conversions, LevelChange, Limits, ProgressConsole
from snac_runner.app.server import listen
from snac_runner.convert import Converter
from snac_runner.data.audio import load_audio

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="the extra [app] is not installed")

ADAPTER = "phase6_encoder_adapter"
# The command, which names every connection to another machine on standard error.
COMMAND = """
import socket, sys
connect, resolve = socket.socket.connect, socket.getaddrinfo
def local(host):
    return host in (None, "", "127.0.0.1", "::1", "localhost")
def connecting(self, address):
    if isinstance(address, tuple) and not local(address[0]):
        print("OUTGOING", address, file=sys.stderr, flush=True)
    return connect(self, address)
def resolving(host, *rest, **options):
    if not local(host):
        print("OUTGOING", host, file=sys.stderr, flush=True)
    return resolve(host, *rest, **options)
socket.socket.connect, socket.getaddrinfo = connecting, resolving
from snac_runner.cli import main
main(sys.argv[1:])
"""


@dataclass
class Served:
    """A running page: its process, its address, and the folder of its temporary files."""

    process: subprocess.Popen[str]
    url: str
    temporary: Path
    errors: Path

    def client(self) -> Any:
        """A client of its HTTP API."""
        from gradio_client import Client

        return Client(self.url, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def served(runs: dict[str, Path], finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page of a run of phase 6 and of a finished study, on a free port, with small limits."""
    folder = tmp_path_factory.mktemp("served")
    temporary = folder / "tmp"
    temporary.mkdir()
    arguments = ["app", "--port", "0", "--max-mb", "2", "--max-minutes", "0.2", "--run", runs[ADAPTER], finished]
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=errors, text=True,
            cwd=folder, env={**os.environ, "TMPDIR": str(temporary), "SNAC_CACHE": str(folder / "cache")},
        )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"http://\S+", line)
    assert address, (line, (folder / "errors.txt").read_text())
    yield Served(process, address[0], temporary, folder / "errors.txt")
    process.kill()
    process.communicate()


@pytest.fixture
def handled(voices: list[Path]) -> tuple[Any, Any]:
    """A source and a target, as a client sends files."""
    from gradio_client import handle_file

    return handle_file(str(voices[0])), handle_file(str(voices[1]))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets variables of its process, which here is that of the tests."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        monkeypatch.setenv(name, "")


@needs_gradio
def test_the_api_converts_as_the_command_does(
    served: Served, handled: tuple[Any, Any], voices: list[Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    _, files, scores = served.client().predict(*handled, None, [ADAPTER], api_name="/convert")
    by_name = {Path(file).name: Path(file) for file in files}
    out = tmp_path / "c.wav"
    assert runner("convert", "--run", runs[ADAPTER], "--source", voices[0], "--target", voices[1], "--out", out) == 0
    assert by_name[f"1_{ADAPTER}.wav"].read_bytes() == out.read_bytes()
    judge = load_speaker_encoder("ge2e")
    target = judge(load_audio(voices[1], 16000)[None], 16000)[0]
    for label, name in (("Bare codec", "bare_codec.wav"), (f"Conversion by {ADAPTER}", f"1_{ADAPTER}.wav")):
        with torch.no_grad():
            own = judge(load_audio(by_name[name], 16000)[None], 16000)[0]
        assert scores["similarity"][label] == pytest.approx(float(own @ target), abs=1e-4)
    converter = Converter(runs[ADAPTER], "cpu")
    audio = load_audio(voices[0], converter.model.codec.sampling_rate)[None]
    with torch.no_grad():
        bare = converter.model.codec.encode(audio)
        codes = converter.model.encode(audio, converter.target([voices[1]]))
    shares = [float((a != b).double().mean()) for a, b in zip(bare, codes, strict=True)]
    assert scores["codes_changed"][ADAPTER] == pytest.approx(shares, abs=1e-3)
    assert max(shares) > 0
    _, _, scores = served.client().predict(*handled, None, [ADAPTER], 0, api_name="/convert")  # edits of scale 0
    assert max(scores["codes_changed"][ADAPTER]) == 0


@needs_gradio
def test_an_archive_comes_back_with_the_names_of_its_files(
    served: Served, handled: tuple[Any, Any], voices: list[Path], tmp_path: Path
) -> None:
    from gradio_client import handle_file

    (tmp_path / "silent.wav").write_bytes(voices[2].read_bytes()[:50])
    with zipfile.ZipFile(tmp_path / "speech.zip", "w") as archive:
        archive.write(voices[0], "one/a.flac")
        archive.write(voices[1], "../../outside.flac")
        archive.write(tmp_path / "silent.wav", "one/bad.wav")
        archive.writestr("notes.txt", "no audio")
        archive.writestr("__MACOSX/one/._a.flac", "no audio")
    uploads = [handle_file(str(tmp_path / "speech.zip")), handle_file(str(voices[2]))]
    told, archive_file = served.client().predict(uploads, handled[1], ADAPTER, "flac", api_name="/convert_files")
    with zipfile.ZipFile(archive_file) as archive:
        assert set(archive.namelist()) == {"one/a.flac", "outside.flac", f"{voices[2].stem}.flac"}
        archive.extractall(tmp_path / "back")
    assert soundfile.info(tmp_path / "back/one/a.flac").frames == soundfile.info(voices[0]).frames
    assert told.startswith("3 files converted.")
    assert "bad.wav" in told
    assert "notes.txt" in told.replace("&#95;", "_")
    assert str(served.temporary) not in told
    assert not (served.temporary / "outside.flac").exists()


@needs_gradio
def test_bad_input_is_named_without_the_folders_of_the_server(
    served: Served, handled: tuple[Any, Any], tmp_path: Path
) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    client = served.client()
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 13 * 16000), 16000)
    expected = {"text.wav": "cannot be decoded", "silent.wav": "is silent", "long.wav": "at most 0.2 are accepted"}
    for name, reason in expected.items():
        with pytest.raises(AppError) as caught:
            client.predict(handle_file(str(tmp_path / name)), handled[1], None, [ADAPTER], api_name="/convert")
        assert name in str(caught.value)
        assert reason in str(caught.value)
        assert str(served.temporary) not in str(caught.value)
    for arguments, reason in (
        ((handled[0], None, None, [ADAPTER]), "no target"),
        ((None, handled[1], None, [ADAPTER]), "no source"),
        ((*handled, None, []), "select at least one"),
        ((*handled, None, ["phase6_tny"]), "did you mean 'phase6_tiny'"),
        ((*handled, None, ["/etc"]), "no adapter '/etc'"),
    ):
        with pytest.raises(AppError, match=reason):
            client.predict(*arguments, api_name="/convert")


@needs_gradio
def test_only_uploads_can_be_read_and_no_other_server(served: Served, voices: list[Path], finished: Path) -> None:
    import httpx

    with httpx.Client(base_url=served.url) as http:
        for path in (
            f"file={voices[0]}", f"file={finished}/study.toml", "file=/etc/passwd", "file=/proc/self/environ",
            f"file={served.temporary}/../errors.txt", "file=errors.txt", "file/etc/passwd", f"file={served.temporary}",
            "file=http://127.0.0.1:1/", "file=%20HTTPS://example.com/", "proxy=https://a.hf.space/file",
        ):  # fmt: skip
            assert http.get(f"/gradio_api/{path}").status_code == 403, path
        for path in ("0/study.toml", "0/..%2fstudy.toml", "-1/report.html", "1/report.html", "0/%2e%2e/study.toml"):
            assert http.get(f"/report/{path}").status_code in (404, 422), path
        report = http.get("/report/0/report.html")
        assert report.content == (finished / "report.html").read_bytes()
        assert "sandbox allow-scripts" in report.headers["content-security-policy"]
        assert http.get("/", headers={"Host": "other.example"}).status_code == 400
        upload = {"files": ("a.wav", b"0")}
        assert http.post("/gradio_api/upload", files=upload, headers={"Origin": "http://a.example"}).status_code == 403
        assert http.post("/gradio_api/upload", files={"files": ("a.wav", bytes(2_100_000))}).status_code == 413
        (own,) = http.post("/gradio_api/upload", files=upload).json()
        assert http.get(f"/gradio_api/file={own}").content == b"0"
        config = http.get("/config").json()
        convert = next(each["id"] for each in config["dependencies"] if each["api_name"] == "convert")
        for number, path in enumerate(
            (str(voices[0]), "/etc/passwd", "http://127.0.0.1:1/a.wav", "file:///etc/passwd")
        ):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            job = {"data": [file, file, None, [ADAPTER], 1], "fn_index": convert, "session_hash": f"attack{number}"}
            assert http.post("/gradio_api/queue/join", json=job).status_code == 200
            events = http.get(f"/gradio_api/queue/data?session_hash=attack{number}", timeout=120).text
            ended = next(line for line in events.splitlines() if "process_completed" in line)
            assert json.loads(ended.removeprefix("data: "))["success"] is False, path
    stored = [path.read_bytes() for path in served.temporary.rglob("*") if path.is_file()]
    assert Path("/etc/passwd").read_bytes() not in stored


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium: Playwright's own, or one of the system."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        found = [path for name in names if (path := shutil.which(name))]
        own = playwright.chromium.executable_path
        if not found and not Path(own).exists():
            pytest.skip("needs Chromium: playwright install chromium, or a package of the system")
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=found[0] if found else own, args=arguments)
        yield chromium
        chromium.close()


@needs_gradio
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_the_page_converts_plays_and_names_errors(
    browser: Any, served: Served, voices: list[Path], width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)  # ms
    requests, problems = set[str](), list[str]()
    page.on("request", lambda request: requests.add(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(served.url)
    page.locator(".source input[type=file]").set_input_files(voices[0])
    page.locator(".source .waveform-container, .source .timestamps").first.wait_for()
    convert = page.get_by_role("button", name="Convert", exact=True)
    convert.click()
    page.get_by_text("no target; upload or record speech of the target").wait_for()
    page.locator(".target input[type=file]").set_input_files(voices[1])
    page.locator(".target .waveform-container, .target .timestamps").first.wait_for()
    convert.click()
    page.locator(".samples figure").nth(3).wait_for()
    labels = page.locator(".samples figcaption").all_inner_texts()
    assert labels == ["Source", "Bare codec", f"Conversion by {ADAPTER}", "Target"]
    assert page.locator(".samples figure", has_text="Similarity to the target: 0.").count() == 3
    assert page.locator(".level").count() == 2
    for number in range(4):
        audio = page.locator(".samples audio").nth(number)
        audio.evaluate("audio => audio.play()")
        audio.evaluate("audio => new Promise(done => { audio.ontimeupdate = () => audio.currentTime > 0 && done() })")
        assert audio.evaluate("audio => audio.duration") == pytest.approx(
            soundfile.info(voices[1 if number == 3 else 0]).duration, abs=0.05
        )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("tab", name="Report").click()
    report = page.frame_locator(".report iframe")
    report.locator("h1").wait_for()
    assert report.locator("body").evaluate("() => { try { return parent.document.title } catch { return '' } }") == ""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert {url for url in requests if not url.startswith((served.url, "data:", "blob:"))} == set()
    assert problems == []
    page.close()


@needs_gradio
def test_it_stops_while_it_converts_and_has_sent_nothing(
    served: Served, handled: tuple[Any, Any], tmp_path: Path
) -> None:
    """The last test of the server: it ends it."""
    assert list(served.temporary.glob("snac-app-*"))
    served.client().submit(*handled, None, [ADAPTER, "phase6_tiny", "phase4+6_tiny"], api_name="/convert")
    time.sleep(0.3)
    served.process.send_signal(signal.SIGTERM)
    out, _ = served.process.communicate(timeout=60)
    assert served.process.returncode == 0
    assert out == "stopped\n"
    assert not list(served.temporary.glob("snac-app-*"))
    assert "OUTGOING" not in served.errors.read_text()


@needs_gradio
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_ends_the_server_and_not_the_process(name: str) -> None:
    code = (
        "from fastapi import FastAPI; from snac_runner.app.server import listen, serve\n"
        "serve(FastAPI(), listen('127.0.0.1', 0), lambda address: print(address, flush=True)); print('ended')"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", int(address.rsplit(":", 1)[1]))) == 0:
                    break
        time.sleep(0.3)
        process.send_signal(getattr(signal, name))
        assert process.communicate(timeout=60)[0] == "ended\n"
    assert process.returncode == 0


@needs_gradio
def test_a_port_in_use_and_wrong_addresses_are_refused(refusal: Callable[..., str]) -> None:
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use; " in refusal("app", "--port", port)
    assert "expected an address of this machine" in refusal("app", "--port", 0, "--host", "192.0.2.1")
    assert "expected positive numbers" in refusal("app", "--port", 0, "--max-mb", 0)
    assert "no folder and no bundled adapter" in refusal("app", "--port", 0, "--run", "phase6_tny")
    assert "unknown speaker encoder 'ge2' " in refusal("app", "--port", 0, "--judge", "ge2").replace(";", " ")


def test_without_gradio_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'snac-conditioning[app]'" in refusal("app", "--port", 0)


def test_a_study_offers_its_runs_and_its_report(finished: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    found = offer([str(finished)], typed=False)
    assert found.adapters[f"study/{ADAPTER}/seed0"] == str(finished / ADAPTER / "seed0")
    assert found.studies == {"study": finished.resolve()}
    assert list(found.adapters)[-1] == "phase6_tiny"
    one = offer([str(finished / ADAPTER / "seed0"), str(runs[ADAPTER] / "model")], typed=True)
    assert list(one.adapters)[:2] == [f"study/{ADAPTER}/seed0", "model"]
    assert one.studies == found.studies
    shutil.copytree(runs[ADAPTER], tmp_path / ADAPTER)
    same_name = offer([str(runs[ADAPTER]), str(tmp_path / ADAPTER)], typed=False)
    assert list(same_name.adapters)[:2] == [ADAPTER, f"{ADAPTER} (2)"]
    assert one.run_of("owner/name") == "owner/name"
    with pytest.raises(UserError, match="no adapter 'owner/name'"):
        found.run_of("owner/name")
    with pytest.raises(UserError, match="no trained model"):
        offer([str(tmp_path)], typed=True)


@pytest.fixture
def conversions(runs: dict[str, Path], tmp_path: Path) -> Conversions:
    """Conversions with a limit of 0.1 MB."""
    offered = offer([str(path) for path in runs.values()], typed=False)
    folder = tmp_path / "work"
    folder.mkdir()
    return Conversions(offered, Limits(0.1, 1.0), folder, judge="ge2e", device="cpu", catalogue=discover())


def console(stopped: Callable[[], bool] = lambda: False) -> ProgressConsole:
    return ProgressConsole(lambda *_: None, stopped)


def test_an_adapter_after_the_quantizer_changes_no_code(conversions: Conversions, voices: list[Path]) -> None:
    found = conversions.compare(voices[0], voices[1:3], ["phase4_decoder_film", ADAPTER], console())
    assert [sample.label for sample in found.samples] == [
        "Source", "Bare codec", "Conversion by phase4_decoder_film", f"Conversion by {ADAPTER}", "Target",
    ]  # fmt: skip
    assert [level.share for level in found.codes["phase4_decoder_film"]] == [0.0, 0.0]
    assert max(level.share for level in found.codes[ADAPTER]) > 0
    assert [level.rate for level in found.codes[ADAPTER]] == [125.0, 250.0]
    assert soundfile.info(found.samples[-1].file).duration == pytest.approx(
        sum(soundfile.info(path).duration for path in voices[1:3]), abs=0.01
    )


def test_a_judge_of_the_conditioning_encoders_family_gives_no_similarity(
    runs: dict[str, Path], voices: list[Path], tmp_path: Path, bench: Bench
) -> None:
    offered = offer([str(runs[ADAPTER])], typed=False)
    judged = Conversions(offered, Limits(1, 1), tmp_path, judge="simple", device="cpu", catalogue=discover())
    found = judged.compare(voices[0], voices[1:2], [ADAPTER], console())
    assert [sample.similarity is None for sample in found.samples] == [False, False, True, True]
    assert "same family as the conditioning encoder" in found.notes[0]


def test_a_zip_file_that_unpacks_to_much_or_is_damaged_is_refused(
    conversions: Conversions, voices: list[Path], tmp_path: Path
) -> None:
    large, damaged = tmp_path / "large.zip", tmp_path / "damaged.zip"
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.wav", bytes(1_000_000))
    assert large.stat().st_size < 10_000
    damaged.write_bytes(b"PK" + bytes(100))
    (tmp_path / "notes.txt").write_text("no audio")
    for upload, reason in (
        (large, "1 file with 1 MB"), (damaged, "cannot be unpacked"), (tmp_path / "notes.txt", "no audio among 1 file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            conversions.convert_files([upload], voices[1:2], ADAPTER, ".wav", console())


def test_stop_ends_a_conversion(conversions: Conversions, voices: list[Path]) -> None:
    with pytest.raises(UserError, match="stopped"):
        conversions.compare(voices[0], voices[1:2], [ADAPTER], console(lambda: True))


def test_stop_keeps_the_files_that_are_finished(conversions: Conversions, voices: list[Path]) -> None:
    titles: list[str] = []
    stopping = ProgressConsole(lambda _, title: titles.append(title), lambda: "converting" in titles)
    batch = conversions.convert_files(voices[:3], voices[1:2], ADAPTER, ".flac", stopping)
    assert batch.converted == 2
    assert batch.lines == ["stopped after 2 of 3 files"]
    with zipfile.ZipFile(batch.archive) as archive:
        assert len(archive.namelist()) == 2


def test_the_image_of_changed_codes_has_their_share() -> None:
    changed = np.arange(4000) < 1000
    level = LevelChange(50.0, changed)
    assert level.share == 0.25
    assert level.image().startswith(b"\x89PNG")
    assert int.from_bytes(level.image()[16:20], "big") == 480
    assert int.from_bytes(LevelChange(50.0, changed[:7]).image()[16:20], "big") == 7
