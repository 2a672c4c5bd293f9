"""Speech from the Hugging Face `datasets` library: its audio is exported once into the cache, with a manifest.

A data set is named `hf:ID`, with an id of the Hub or a folder written by `save_to_disk`, and options after `?`:
`hf:openslr/librispeech_asr?config=clean&split=train.100&speaker=speaker_id&audio=audio&text=text`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from snac_core.errors import UserError, nearest
from snac_core.files import write_bytes, writing
from snac_runner.config import DATASET
from snac_runner.data.cache import cache_folder
from snac_runner.data.corpus import SPLITS
from snac_runner.data.formats import MANIFEST_NAME

OPTIONS = ("config", "split", "revision", "audio", "speaker", "text")
_SPEAKERS = ("speaker", "speaker_id", "speaker_name", "client_id", "spk", "spk_id", "reader", "reader_id")
_TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text")
_SPLITS = {"validation": "dev", "valid": "dev", "val": "dev", "eval": "dev"} | {name: name for name in SPLITS}
_MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3", b"\xff\xf3": ".mp3"}


def is_dataset(data: str | Path) -> bool:
    """Whether `data` names a data set: `hf:ID`, or a folder that `save_to_disk` has written."""
    path = Path(data)
    return str(data).startswith(DATASET) or any(
        (path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")
    )


@dataclass(frozen=True)
class _Source:
    """A data set by its id or folder, with the options after `?`."""

    id: str
    options: dict[str, str]

    @classmethod
    def of(cls, data: str) -> _Source:
        id, _, query = data.removeprefix(DATASET).partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        for key in options:
            if key not in OPTIONS:
                raise UserError(f"{data}: unknown option {key!r}{nearest(key, OPTIONS)}")
        if not id:
            raise UserError(f"{data} names no data set; expected hf:ID, with an id of the Hub or a folder")
        return cls(id, options)

    @property
    def is_folder(self) -> bool:
        return Path(self.id).is_dir()


def exported(data: str | Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The manifest of a data set, which is exported if it was not before.

    Audio stays in its format; a row with a path of a local file is used where it is. An interrupted export continues.

    Args:
        data: see the module.
        progress: called with (rows done, rows in all).

    Raises:
        UserError: if the library is missing, or the data set, a configuration, a split or a column does not exist.
    """
    source = _Source.of(str(data))
    parts = _loaded(source)
    columns = {split: _columns(part, source) for split, part in parts.items()}
    content = [[split, part._fingerprint, columns[split]] for split, part in parts.items()]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    folder = cache_folder() / "datasets" / f"{Path(source.id).name}-{digest}"
    manifest = folder / MANIFEST_NAME
    if manifest.is_file():
        return manifest
    total, done = sum(len(part) for part in parts.values()), 0
    splits = _disjoint_splits(parts, columns)
    with writing(manifest) as temporary, temporary.open("w", encoding="utf-8") as file:
        for split, part in parts.items():
            for number, row in enumerate(_rows(part, columns[split])):
                place = folder / split / f"{number:08d}"
                line = {
                    "id": f"{split}/{number:08d}",
                    "path": os.path.relpath(_stored(row["audio"], place), folder),
                    "speaker": str(row["speaker"]),
                    "split": splits.get(split),
                    "text": row.get("text") or None,
                }
                file.write(json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False) + "\n")
                done += 1
                if progress:
                    progress(done, total)
    return manifest


def _loaded(source: _Source) -> dict[str, Any]:
    """Name of the split to the `datasets.Dataset`."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{DATASET}{source.id} needs the datasets library; expected pip install 'snac-conditioning[datasets]'"
        ) from None
    options = source.options
    try:
        if source.is_folder and is_dataset(source.id):
            loaded = datasets.load_from_disk(source.id)
        else:
            loaded = datasets.load_dataset(source.id, options.get("config"), revision=options.get("revision"))
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(f"no data set {source.id!r} on the Hugging Face Hub{_similar(source.id)}") from None
    except ConnectionError as error:
        raise UserError(
            f"no data set {source.id!r} here, and the Hugging Face Hub cannot be reached "
            f"({str(error).splitlines()[0]}); expected a folder written by save_to_disk, or a connection"
        ) from None
    except (ValueError, OSError, RuntimeError) as error:  # an unknown configuration; no permission
        raise UserError(f"cannot load the data set {source.id!r}: {' '.join(str(error).split())[:300]}") from error
    parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if (wanted := options.get("split")) is not None:
        names = wanted.split(",")
        for name in names:
            if name not in parts:
                raise UserError(f"{source.id} has no split {name!r}{nearest(name, parts)}")
        parts = {name: parts[name] for name in names}
    return {str(name): part for name, part in parts.items()}


def _similar(id: str) -> str:
    """Ids of the Hub that resemble an unknown one, for an error; empty if the Hub does not answer."""
    from huggingface_hub import list_datasets

    try:
        found = [info.id for info in list_datasets(search=id.rpartition("/")[2], limit=3)]
    except Exception:
        return ""
    return f"; did you mean {', '.join(found)}?" if found else ""


def _columns(part: Any, source: _Source) -> dict[str, str]:
    """What ("audio", "speaker", "text") to the name of its column."""
    import datasets

    names = list(part.column_names)
    audio = [name for name, feature in part.features.items() if isinstance(feature, datasets.Audio)]
    candidates = {"audio": audio, "speaker": _SPEAKERS, "text": _TEXTS}
    columns = {}
    for what, usual in candidates.items():
        wanted = source.options.get(what)
        if wanted is not None and wanted not in names:
            raise UserError(f"{source.id} has no column {wanted!r}{nearest(wanted, names)}")
        found = wanted or next((name for name in usual if name in names), None)
        if found:
            columns[what] = found
        elif what != "text":
            raise UserError(
                f"{source.id} has no column of {what} that is known; its columns are {', '.join(names)}: "
                f"name one as {DATASET}{source.id}?{what}=COLUMN"
            )
    if columns["audio"] not in audio:
        raise UserError(f"column {columns['audio']!r} of {source.id} has no audio; expected one of {', '.join(audio)}")
    return columns


def _disjoint_splits(parts: dict[str, Any], columns: dict[str, dict[str, str]]) -> dict[str, str]:
    """Split of the data set to ours, if no speaker is in two of them; else none: speakers are split by a hash."""
    stems = {name: re.split(r"[._]", name)[0] for name in parts}  # "train.clean.100" is of train
    ours = {name: _SPLITS[stem] for name, stem in stems.items() if stem in _SPLITS}
    speakers: dict[str, set[str]] = {}
    for name, split in ours.items():
        speakers.setdefault(split, set()).update(map(str, parts[name].unique(columns[name]["speaker"])))
    shared = sum(len(of) for of in speakers.values()) > len(set[str]().union(*speakers.values()))
    return {} if shared or len(ours) < len(parts) or "train" not in speakers or len(speakers) < 2 else ours


def _rows(part: Any, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows, with encoded audio: `{"bytes": ..., "path": ...}`."""
    import datasets

    kept = part.select_columns(list(dict.fromkeys(columns.values())))
    for row in kept.cast_column(columns["audio"], datasets.Audio(decode=False)):
        yield {what: row[name] for what, name in columns.items()}


def _stored(audio: dict[str, Any], place: Path) -> Path:
    """The file of a row: a local one that it names, else its bytes at `place`, with the suffix of their format."""
    name, data = audio["path"] or "", audio["bytes"]
    if data is None:
        if not Path(name).is_file():
            raise UserError(f"the data set names {name!r}, and there is no such file")
        return Path(name).absolute()
    suffix = Path(name).suffix.lower() or next((s for magic, s in _MAGIC.items() if data.startswith(magic)), ".wav")
    path = place.with_suffix(suffix)
    if not path.is_file() or path.stat().st_size != len(data):
        write_bytes(path, data)
    return path
