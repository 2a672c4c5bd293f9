"""What lies beside the audio in speech corpora: who is a woman or a man, and what is said."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}
_TABLES = ("speakers.tsv", "SPEAKERS.TXT", "speaker-info.txt")


def sexes_beside(folder: Path, root: Path) -> dict[str, str]:
    """Speaker -> "F" or "M", from the first table found in `folder`, `root`, or the two folders above them.

    Read are speakers.tsv (columns speaker and sex, or LibriTTS's READER and GENDER), LibriSpeech's SPEAKERS.TXT
    (`14 | F | train-clean-360 | ...`) and VCTK's speaker-info.txt (`p225  23  F  English ...`, also without the p).
    """
    for place in dict.fromkeys((folder, root, folder.parent, root.parent)):
        for name in _TABLES:
            if (place / name).is_file():
                text = (place / name).read_text(encoding="utf-8", errors="replace")
                return _from_tsv(text) if name == "speakers.tsv" else _from_lines(text)
    return {}


def _from_tsv(text: str) -> dict[str, str]:
    sexes: dict[str, str] = {}
    for row in csv.DictReader(text.splitlines(), delimiter="\t"):
        cells = {str(key).strip().lower(): str(value).strip() for key, value in row.items() if key}
        speaker = cells.get("speaker") or cells.get("reader")
        sex = _SEXES.get((cells.get("sex") or cells.get("gender") or "").lower())
        if speaker and sex:
            sexes[speaker] = sex
    return sexes


def _from_lines(text: str) -> dict[str, str]:
    sexes: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith(";"):
            continue
        cells = line.replace("|", " ").split()
        sex = next((_SEXES[cell.lower()] for cell in cells[1:3] if cell.lower() in _SEXES), None)
        if sex:
            sexes[cells[0]] = sex
            if cells[0].isdigit():
                sexes["p" + cells[0]] = sex  # VCTK 0.80 drops the letter of its folders
    return sexes


def texts_beside(folder: Path, files: Iterable[str]) -> Callable[[str], str | None]:
    """A function from an utterance's stem to its text, for the audio files in `folder`.

    Read are LibriSpeech's `*.trans.txt` (a line per utterance) and, beside each file, `<stem>.normalized.txt`
    (LibriTTS) or `<stem>.txt`.
    """
    names = set(files)
    lines: dict[str, str] = {}
    for name in sorted(names):
        if name.endswith(".trans.txt"):
            for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines():
                stem, _, text = line.strip().partition(" ")
                lines[stem] = text.strip()

    def text_of(stem: str) -> str | None:
        if stem in lines:
            return lines[stem] or None
        for name in (f"{stem}.normalized.txt", f"{stem}.txt"):
            if name in names:
                return (folder / name).read_text(encoding="utf-8", errors="replace").strip() or None
        return None

    return text_of
