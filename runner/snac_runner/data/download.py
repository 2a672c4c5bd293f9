"""Public speech corpora: where their archives lie and what their checksums are.

URLs and SHA-256 digests are those of torchaudio 2.11 (torchaudio/datasets/librispeech.py, libritts.py, vctk.py).


Download a public corpus: resumed where it broke off, checked, unpacked once."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from snac_core.errors import UserError, nearest
from snac_core.files import write_text


@dataclass(frozen=True)
class Archive:
    """One file to download.

    Attributes:
        url: where it is.
        sha256: of its bytes, in hex.
        into: the folder, below the data folder, that it is unpacked into; "" for archives that bring their own.
    """

    url: str
    sha256: str
    into: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Source:
    """A corpus: its parts, those taken if none is named, and the folder that is there when they are unpacked."""

    parts: dict[str, Archive]
    usual: tuple[str, ...]
    folder: str


def _openslr(number: int, digests: dict[str, str]) -> dict[str, Archive]:
    base = f"https://www.openslr.org/resources/{number}"
    return {part: Archive(f"{base}/{part}.tar.gz", digest) for part, digest in digests.items()}


SOURCES = {
    "librispeech": Source(
        _openslr(
            12,
            {
                "dev-clean": "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3",
                "dev-other": "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365",
                "test-clean": "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23",
                "test-other": "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29",
                "train-clean-100": "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
                "train-clean-360": "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf",
                "train-other-500": "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2",
            },
        ),
        ("train-clean-100", "dev-clean", "test-clean"),
        "LibriSpeech",
    ),
    "libritts": Source(
        _openslr(
            60,
            {
                "dev-clean": "da0864e1bd26debed35da8a869dd5c04dfc27682921936de7cff9c8a254dbe1a",
                "dev-other": "d413eda26f3a152ac7c9cf3658ef85504dfb1b625296e5fa83727f5186cca79c",
                "test-clean": "234ea5b25859102a87024a4b9b86641f5b5aaaf1197335c95090cde04fe9a4f5",
                "test-other": "33a5342094f3bba7ccc2e0500b9e72d558f72eb99328ac8debe1d9080402f10d",
                "train-clean-100": "c5608bf1ef74bb621935382b8399c5cdd51cd3ee47cec51f00f885a64c6c7f6b",
                "train-clean-360": "ce7cff44dcac46009d18379f37ef36551123a1dc4e5c8e4eb73ae57260de4886",
                "train-other-500": "e35f7e34deeb2e2bdfe4403d88c8fdd5fbf64865cae41f027a185a6965f0a5df",
            },
        ),
        ("train-clean-100", "dev-clean", "test-clean"),
        "LibriTTS",
    ),
    "vctk": Source(
        {
            "0.92": Archive(
                "https://datashare.is.ed.ac.uk/bitstream/handle/10283/3443/VCTK-Corpus-0.92.zip",
                "f96258be9fdc2cbff6559541aae7ea4f59df3fcaf5cf963aae5ca647357e359c",
                "VCTK-Corpus-0.92",
            )
        },
        ("0.92",),
        "VCTK-Corpus-0.92",
    ),
}


_BLOCK = 1 << 20  # bytes
_TIMEOUT = 60  # s without a byte
Progress = Callable[[str, int, int], None]


def fetch(
    name: str,
    root: str | Path,
    *,
    parts: Sequence[str] | None = None,
    keep_archives: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download and unpack a corpus below `root`.

    A part that is there is left as it is; a download that broke off goes on; an archive that lies in `root` already,
    however it came there, is checked and used.

    Args:
        name: "librispeech", "libritts" or "vctk".
        root: the folder for the data.
        parts: e.g. ["train-clean-100"]; None: train-clean-100, dev-clean and test-clean, or all of VCTK.
        keep_archives: do not remove the archives after unpacking.
        progress: called with (archive, bytes done, bytes in all; 0 if not known).

    Returns:
        The corpus' folder, to be opened with open_corpus.

    Raises:
        UserError: for an unknown name or part, no connection, a wrong checksum, or a full disk.
    """
    key = name.lower()
    if key not in SOURCES:
        raise UserError(f"unknown corpus {name!r}{nearest(key, SOURCES)}")
    source = SOURCES[key]
    root = Path(root)
    wanted = source.usual if parts is None else tuple(parts)
    for part in wanted:
        if part not in source.parts:
            raise UserError(f"{name} has no part {part!r}{nearest(part, source.parts)}")
    if root.is_file():
        raise UserError(f"{root} is a file; expected a folder to put the data in")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for part in wanted:
            archive = source.parts[part]
            done = root / source.folder / f".{part}.{archive.sha256[:16]}"
            if done.is_file():
                continue
            packed = _download(archive, root, progress)
            _unpack(packed, root / archive.into, progress)
            write_text(done, f"{archive.url}\n")
            if not keep_archives:
                packed.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error.strerror or error}; run it again to go on") from None
    return root / source.folder


def _download(archive: Archive, root: Path, progress: Progress | None) -> Path:
    """The archive in `root`, checked. What has come so far is kept as <name>.part."""
    whole, part = root / archive.name, root / f"{archive.name}.part"
    if not whole.is_file():
        _transfer(archive, part, progress)
        part.replace(whole)
    digest = hashlib.sha256()
    with whole.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != archive.sha256:
        whole.unlink()
        raise UserError(
            f"{archive.name} has checksum {digest.hexdigest()[:16]}..., not {archive.sha256[:16]}...; it was removed; "
            "run it again to download it anew"
        )
    return whole


def _transfer(archive: Archive, part: Path, progress: Progress | None) -> None:
    """Append to `part` what is missing of the archive."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            if getattr(answer, "status", None) != 206:  # the server sends all of it
                have = 0
            length = int(answer.headers.get("Content-Length") or 0)
            free = shutil.disk_usage(part.parent).free
            if length > free:
                raise UserError(f"{archive.name} needs {length / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")
            total = have + length if length else 0
            with part.open("ab" if have else "wb") as file:
                for block in _blocks(answer):
                    file.write(block)
                    have += len(block)
                    if progress:
                        progress(archive.name, have, total)
        if total and have < total:
            raise UserError(f"{archive.url} broke off after {have} of {total} bytes; run it again to go on")
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing; the checksum will tell
            return
        raise UserError(f"{archive.url} answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"cannot download {archive.url} ({reason}); without a connection, put {archive.name} into {part.parent} "
            "and run it again"
        ) from None


def _blocks(answer: IO[bytes]) -> Iterator[bytes]:
    while block := answer.read(_BLOCK):
        yield block


def _unpack(packed: Path, into: Path, progress: Progress | None) -> None:
    """Unpack a .zip or .tar.gz; links and names that lead out of the folder are refused."""
    into.mkdir(parents=True, exist_ok=True)
    try:
        if packed.suffix == ".zip":
            with zipfile.ZipFile(packed) as pack:
                members = [m for m in pack.infolist() if not m.is_dir()]
                for number, member in enumerate(members, 1):
                    with pack.open(member) as file:
                        _put(file, into, member.filename)
                    if progress:
                        progress(f"unpacking {packed.name}", number, len(members))
        else:
            size = packed.stat().st_size
            with packed.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as pack:
                for entry in pack:
                    content = pack.extractfile(entry) if entry.isfile() else None
                    if content is not None:
                        with content:
                            _put(content, into, entry.name)
                    elif not entry.isdir():
                        raise UserError(f"{packed.name} holds {entry.name!r}, which is no file; it is not unpacked")
                    if progress:
                        progress(f"unpacking {packed.name}", raw.tell(), size)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{packed} cannot be unpacked: {error}") from None


def _put(content: IO[bytes], into: Path, name: str) -> None:
    """Write one member below `into`."""
    place = into / name
    if not place.resolve().is_relative_to(into.resolve()):
        raise UserError(f"the archive holds {name!r}, which leads out of {into}; it is not unpacked")
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as file:
        shutil.copyfileobj(content, file, _BLOCK)
