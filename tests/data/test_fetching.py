"""Downloads from a small server on this machine: checked, resumed, unpacked once."""

from __future__ import annotations

import hashlib
import http.client
import io
import ssl
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tones import write_tone

from snac_core.errors import UserError
from snac_runner.data.download import PUBLIC_CORPORA, Archive, PublicCorpus, fetch
from snac_runner.data.open_corpus import open_corpus


class Server(BaseHTTPRequestHandler):
    """Serves the files of a folder, with ranges; breaks off after `limit` bytes while it is set."""

    def __init__(self, folder: Path, log: list[str], limit: list[int], *rest: object) -> None:
        self.folder, self.asked, self.limit = folder, log, limit
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        wanted = self.headers.get("Range", "")
        self.asked.append(wanted)
        if not path.is_file():
            self.send_error(404)
            return
        first = int(wanted[6:-1]) if wanted else 0
        data = path.read_bytes()[first:]
        if wanted and not data:
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: self.limit.pop()] if self.limit else data)

    def log_message(self, *_: object) -> None:
        return


class Site:
    """A server with a small LibriSpeech and VCTK, which stand in the list of sources."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.limit = folder, [], []  # type: tuple[Path, list[str], list[int]]
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, folder, self.asked, self.limit))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def archive(self, path: Path, into: str = "", url: str | None = None) -> Archive:
        url = url or f"http://127.0.0.1:{self.server.server_port}/{path.name}"
        return Archive(url, hashlib.sha256(path.read_bytes()).hexdigest(), into)


def packed(folder: Path) -> Path:
    """A LibriSpeech of two training and two test speakers."""
    path = folder / "dev-clean.tar.gz"
    with tarfile.open(path, "w:gz") as pack:
        for speaker in ("1", "2", "3", "4", "5", "6"):
            tone = write_tone(folder / "tones" / f"{speaker}.flac")
            pack.add(tone, f"LibriSpeech/dev-clean/{speaker}/9/{speaker}-9-0000.flac")
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = tmp_path / "server"
    folder.mkdir()
    site = Site(folder)
    source = PublicCorpus({"dev-clean": site.archive(packed(folder))}, ("dev-clean",), "LibriSpeech")
    monkeypatch.setitem(PUBLIC_CORPORA, "librispeech", source)
    yield site
    site.server.shutdown()
    site.server.server_close()


def test_a_corpus_is_downloaded_unpacked_and_opened(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = fetch("LibriSpeech", tmp_path / "data", progress=lambda *a: seen.append(a))
    assert len(open_corpus(folder).speakers("test")) >= 2
    assert open_corpus(tmp_path / "data").digest == open_corpus(folder).digest
    assert not list((tmp_path / "data").glob("*.tar.gz*"))
    assert seen[0][0] == "dev-clean.tar.gz"
    assert seen[0][1] == seen[0][2]
    fetch("librispeech", tmp_path / "data")
    assert len(site.asked) == 1


def test_a_download_that_broke_off_goes_on_where_it_was(site: Site, tmp_path: Path) -> None:
    site.limit.append(1000)
    with pytest.raises(UserError, match=r"broke off after 1000 of \d+ bytes; run it again to continue"):
        fetch("librispeech", tmp_path / "data")
    fetch("librispeech", tmp_path / "data", keep_archives=True)
    assert site.asked == ["", "bytes=1000-"]
    assert (tmp_path / "data" / "dev-clean.tar.gz").is_file()


def test_a_part_that_is_whole_but_not_renamed_is_used(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dev-clean.tar.gz.part").write_bytes((site.folder / "dev-clean.tar.gz").read_bytes())
    fetch("librispeech", tmp_path / "data")


def test_wrong_bytes_are_removed(site: Site, tmp_path: Path) -> None:
    (site.folder / "dev-clean.tar.gz").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"dev-clean.tar.gz has checksum .* it was removed"):
        fetch("librispeech", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b"x"), ssl.SSLError("record layer failure")])
def test_a_connection_that_fails_midway_is_not_a_full_disk(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: object) -> bytes:
        raise error

    with monkeypatch.context() as network:
        network.setattr(http.client.HTTPResponse, "read", broken)
        with pytest.raises(UserError, match="cannot download"):
            fetch("librispeech", tmp_path / "data")
    assert fetch("librispeech", tmp_path / "data").is_dir()


def test_without_a_connection_it_says_what_to_do_and_takes_a_copy(site: Site, tmp_path: Path) -> None:
    data = (site.folder / "dev-clean.tar.gz").read_bytes()
    (site.folder / "dev-clean.tar.gz").unlink()
    with pytest.raises(UserError, match="answers 404"):
        fetch("librispeech", tmp_path / "data")
    archive = Archive("http://127.0.0.1:9/dev-clean.tar.gz", hashlib.sha256(data).hexdigest())
    PUBLIC_CORPORA["librispeech"] = PublicCorpus({"dev-clean": archive}, ("dev-clean",), "LibriSpeech")
    with pytest.raises(UserError, match=r"cannot download .*put dev-clean.tar.gz into"):
        fetch("librispeech", tmp_path / "data")
    (tmp_path / "data" / "dev-clean.tar.gz").write_bytes(data)
    assert fetch("librispeech", tmp_path / "data").is_dir()


def test_a_zip_that_brings_no_folder_gets_one(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = site.folder / "VCTK-Corpus-0.92.zip"
    with zipfile.ZipFile(path, "w") as pack:
        for speaker in ("p225", "p226"):
            tone = write_tone(site.folder / "tones" / f"{speaker}.flac")
            pack.write(tone, f"wav48_silence_trimmed/{speaker}/{speaker}_001_mic1.flac")
    archive = site.archive(path, "VCTK-Corpus-0.92", path.as_uri())
    monkeypatch.setitem(PUBLIC_CORPORA, "vctk", PublicCorpus({"0.92": archive}, ("0.92",), "VCTK-Corpus-0.92"))
    assert open_corpus(fetch("vctk", tmp_path / "data")).speakers("train") == ["p225", "p226"]


@pytest.mark.parametrize("evil", ["../outside.txt", "link"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: str
) -> None:
    path = site.folder / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as pack:
        entry = tarfile.TarInfo(evil)
        if evil == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
        pack.addfile(entry, io.BytesIO(b""))
    monkeypatch.setitem(PUBLIC_CORPORA, "librispeech", PublicCorpus({"x": site.archive(path)}, ("x",), "LibriSpeech"))
    with pytest.raises(UserError, match="is not unpacked"):
        fetch("librispeech", tmp_path / "data")
    assert not (tmp_path / "outside.txt").exists()


def test_unknown_names_get_the_nearest_and_a_file_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown corpus 'librispech'; did you mean 'librispeech'"):
        fetch("librispech", tmp_path)
    with pytest.raises(UserError, match="no part 'train-clean'; did you mean 'train-clean-"):
        fetch("librispeech", tmp_path, parts=["train-clean"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        fetch("vctk", tmp_path / "file")


def test_the_checksums_are_those_of_torchaudio() -> None:
    from torchaudio.datasets import librispeech, libritts, vctk

    for name, module in {"librispeech": librispeech, "libritts": libritts, "vctk": vctk}.items():
        theirs = {url.rsplit("/", 1)[1]: digest for url, digest in module._CHECKSUMS.items()}
        assert {a.name: a.sha256 for a in PUBLIC_CORPORA[name].parts.values()} == theirs
