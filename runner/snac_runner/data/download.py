"""Download public speech corpora: resumable, verified by checksum, unpacked once.

URLs and SHA-256 digests are those of torchaudio 2.11 (torchaudio/datasets/librispeech.py, libritts.py, vctk.py).

The transfer is our own: torch.hub and pooch discard what was received when a connection breaks (measured with a server
that breaks off after 16 of 20 MB: both transfer 36 MB in all), which matters for archives of many gigabytes.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import ssl
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from snac_core.errors import UserError, nearest
from snac_core.files import write_text


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        url: its URL.
        sha256: of its bytes, in hex.
        folder: where it is unpacked, below the data folder; "" for an archive that contains its own top folder.
    """

    url: str
    sha256: str
    folder: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class PublicCorpus:
    """A corpus that can be downloaded.

    Attributes:
        parts: name of each part -> its archive.
        default_parts: the parts that are downloaded if you name none.
        folder: the folder of the unpacked corpus, below the data folder.
    """

    parts: dict[str, Archive]
    default_parts: tuple[str, ...]
    folder: str


def _openslr(number: int, digests: dict[str, str]) -> dict[str, Archive]:
    base = f"https://www.openslr.org/resources/{number}"
    return {part: Archive(f"{base}/{part}.tar.gz", digest) for part, digest in digests.items()}


PUBLIC_CORPORA = {
    "librispeech": PublicCorpus(
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
    "libritts": PublicCorpus(
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
    "vctk": PublicCorpus(
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

    Parts that are there already are kept, and interrupted downloads are resumed. An archive that you put into `root`
    yourself is verified and used.

    Args:
        name: "librispeech", "libritts" or "vctk".
        root: the data folder.
        parts: e.g. ["train-clean-100"]; None: train-clean-100, dev-clean and test-clean, or all of VCTK.
        keep_archives: whether to keep the archives after unpacking.
        progress: called with (archive, bytes done, bytes in all; 0 if not known).

    Returns:
        The folder of the corpus, for open_corpus.

    Raises:
        UserError: for an unknown name or part, a failed connection, a wrong checksum, or a full disk.
    """
    key = name.lower()
    if key not in PUBLIC_CORPORA:
        raise UserError(f"unknown corpus {name!r}{nearest(key, PUBLIC_CORPORA)}")
    corpus = PUBLIC_CORPORA[key]
    root = Path(root)
    parts = corpus.default_parts if parts is None else parts
    for part in parts:
        if part not in corpus.parts:
            raise UserError(f"{name} has no part {part!r}{nearest(part, corpus.parts)}")
    if root.is_file():
        raise UserError(f"{root} is a file; expected a folder for the data")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for part in parts:
            archive = corpus.parts[part]
            unpacked = root / corpus.folder / f".{part}.{archive.sha256[:16]}"  # marks a part that is complete
            if unpacked.is_file():
                continue
            file = root / archive.name
            if not file.is_file():
                _download(archive, file, progress)
            _verify(archive, file)
            _unpack(file, root / archive.folder, progress)
            write_text(unpacked, f"{archive.url}\n")
            if not keep_archives:
                file.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error.strerror or error}; run it again to continue") from None
    return root / corpus.folder


def _download(archive: Archive, file: Path, progress: Progress | None) -> None:
    """Download an archive by way of <name>.part, which keeps what was received for the next attempt."""
    part = file.with_name(f"{file.name}.part")
    received = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={received}-"} if received else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            if getattr(response, "status", None) != 206:  # the server sends the whole file
                received = 0
            length = int(response.headers.get("Content-Length") or 0)
            free = shutil.disk_usage(file.parent).free
            if length > free:
                raise UserError(f"{archive.name} needs {length / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")
            total = received + length if length else 0
            with part.open("ab" if received else "wb") as output:
                for block in iter(partial(response.read, _BLOCK), b""):
                    output.write(block)
                    received += len(block)
                    if progress:
                        progress(archive.name, received, total)
        if total and received < total:
            raise UserError(f"{archive.url} broke off after {received} of {total} bytes; run it again to continue")
    except urllib.error.HTTPError as error:
        if error.code != 416 or not received:  # 416: the part is complete already
            raise UserError(f"{archive.url} answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"cannot download {archive.url} ({reason}); without a connection, put {archive.name} into {file.parent} "
            "and run it again"
        ) from None
    part.replace(file)


def _verify(archive: Archive, file: Path) -> None:
    """Check the digest of a downloaded archive; remove the file if it is wrong."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != archive.sha256:
        file.unlink()
        raise UserError(
            f"{archive.name} has checksum {digest[:16]}..., expected {archive.sha256[:16]}...; it was removed; "
            "run it again to download it again"
        )


def _unpack(file: Path, folder: Path, progress: Progress | None) -> None:
    """Unpack a .zip or .tar.gz. Members that lie outside the folder are refused (tar) or moved into it (zip)."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"unpacking {file.name}"
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                for number, member in enumerate(members, 1):
                    archive.extract(member, folder)
                    if progress:
                        progress(title, number, len(members))
        else:
            size = file.stat().st_size
            with file.open("rb") as compressed, tarfile.open(fileobj=compressed, mode="r:*") as archive:
                for entry in archive:
                    archive.extract(entry, folder, filter="data")
                    if progress:
                        progress(title, compressed.tell(), size)
    except tarfile.FilterError as error:
        raise UserError(f"{file.name} is not unpacked, because it contains an unsafe member: {error}") from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file} cannot be unpacked: {error}") from None
