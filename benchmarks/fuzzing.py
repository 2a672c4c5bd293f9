"""Generated and damaged files, read as commands read them: each gives a UserError, or is accepted."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.plugins import discover
from snac_core.speakers.bank import open_bank
from snac_core.speakers.index import open_index
from snac_runner.cli.train import check_strategies, read_settings
from snac_runner.code_files import read_item, write_items
from snac_runner.config import check_tables, compose, read_values, to_toml, with_overrides
from snac_runner.console import SILENT
from snac_runner.convert import Converter
from snac_runner.data.open_corpus import open_corpus
from snac_runner.report.page import build

MEMORY = 8 * 2**30  # bytes that reading a damaged file may address
DEEP: Any = "deep"  # stands for nested lists, deeper than Python's stack
ODD = [
    None, True, -1, 0, 1.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\x00", "../..", [], [1], [None], {},
    {"a": 1}, [[]], "1", "é" * 300, DEEP,
]  # fmt: skip


@dataclass(frozen=True)
class Files:
    """Good files that are damaged, and objects that read them.

    Attributes:
        folder: for new files.
        study: folder of a finished study.
        run: of its runs.
        base: the codec of the runs.
        speech: of the study, in flac.
        bank: folder of an embedding bank of the encoder `simple`.
        converter: of the run.
    """

    folder: Path
    study: Path
    run: Path
    base: Path
    speech: Path
    bank: Path
    converter: Converter


@dataclass(frozen=True)
class Check:
    """A kind of file.

    Attributes:
        originals: file name to the good content that is damaged.
        read: reads a folder with the damaged file, of this name.
        values: whether also the values of JSON are exchanged, not only bytes.
    """

    originals: Mapping[str, bytes]
    read: Callable[[Path], object]
    values: bool = False


@dataclass
class Found:
    """What happened: outcomes, and the first example of each fault."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)


# -------------------------------------------------------------------------------- damage


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """`original`, cut or with some bytes exchanged, inserted, removed or repeated."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 64)))
        match draw(st.sampled_from(["cut", "exchange", "insert", "remove", "repeat"])):
            case "cut":
                del data[at:]
            case "exchange":
                data[at:end] = draw(st.binary(min_size=end - at, max_size=end - at))
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "remove":
                del data[at:end]
            case "repeat":
                data[at:at] = data[at:end] * draw(st.integers(1, 50))
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts exchanged for an odd one, removed, or under another key."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.integers(0, 9)):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, key + "s": value[key]}
            case _:
                return {**value, key: draw(altered(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(altered(value[at])), *value[at + 1 :]]
    return draw(st.sampled_from(ODD))


def in_json(value: Any) -> str:
    """A value as JSON, with the numbers that JSON does not have, and `DEEP` written out."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000)


# -------------------------------------------------------------------------------- kinds of files


def _study_file(files: Files) -> Check:
    name = next(iter(json.loads((files.run / "config.json").read_text())["arm"]["strategies"]))
    values = {
        "study": {"name": "a", "seeds": [0, 1], "lr": [3e-4, 1e-3], "steps": 3, "judges": ["ge2e"], "plugins": []},
        "arm": [{"strategies": [name], "weights": {f"{name}/loss": 1.0}, name: {"taps": ["latent"]}}],
    }

    def read(folder: Path) -> None:
        path = next(folder.iterdir())
        tables = check_tables(read_settings(path, [], [], SILENT)[0], str(path))
        _, arms, _ = compose(tables["study"], tables["arm"], str(path))
        check_strategies(arms, discover())

    return Check({"study.toml": to_toml(values).encode(), "study.json": json.dumps(values).encode()}, read, values=True)


def _original_settings(files: Files) -> Check:
    originals = {
        path.name: json.dumps(read_values(path)).encode()
        for path in sorted((Path(__file__).parent.parent / "configs").glob("*.json"))
    }

    def read(folder: Path) -> None:
        path = next(folder.iterdir())
        values, original = read_settings(path, [], [], SILENT)
        if original:
            arm = {key: values.pop(key) for key in ("strategies", "objectives")}
            check_strategies(compose(values, [arm], str(path))[1], discover())

    return Check(originals, read, values=True)


def _manifests(files: Files) -> Check:
    lines = [json.loads(line) for line in (files.speech / "manifest.jsonl").read_text().splitlines()[:12]]
    for line in lines:
        line["path"] = str(files.speech / line["path"])
    columns = ["path", "speaker", "split", "start", "seconds"]
    rows = [",".join(columns), *(",".join(str(line.get(key, "")) for key in columns) for line in lines)]
    originals = {
        "manifest.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        "manifest.csv": "\n".join(rows).encode(),
    }
    return Check(originals, lambda folder: open_corpus(next(folder.iterdir()), warn=_ignore), values=True)


def _audio(files: Files) -> dict[str, bytes]:
    import soundfile

    wave, rate = soundfile.read(sorted(files.speech.rglob("*.flac"))[0])
    originals = {}
    for suffix in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(path := files.folder / f"good.{suffix}", wave[: rate // 2], rate)
        originals[path.name] = path.read_bytes()
    return originals


def _audio_to_convert(files: Files) -> Check:
    target = files.converter.target([sorted(files.speech.rglob("*.flac"))[0]])
    return Check(
        _audio(files), lambda folder: files.converter.convert(next(folder.iterdir()), target, files.folder / "out.wav")
    )


def _audio_of_corpora(files: Files) -> Check:
    good = sorted(files.speech.rglob("*.flac"))[:6]

    def read(folder: Path) -> None:
        for number, path in enumerate(good):
            speaker = folder / f"s{number // 2}"
            speaker.mkdir(exist_ok=True)
            shutil.copy(path, speaker)
        shutil.move(next(path for path in folder.iterdir() if path.is_file()), speaker)
        open_corpus(folder, warn=_ignore)

    return Check(_audio(files), read)


def _model_files(files: Files) -> Check:
    originals = {path.name: path.read_bytes() for path in (files.run / "model").iterdir() if path.suffix != ".md"}

    def read(folder: Path) -> None:
        for name, data in originals.items():
            if not (folder / name).is_file():
                (folder / name).write_bytes(data)
        Converter(folder, "cpu", base=str(files.base))

    return Check(originals, read, values=True)


def _base_files(files: Files) -> Check:
    originals = {path.name: path.read_bytes() for path in files.base.iterdir() if path.is_file()}
    originals.pop("README.md", None)

    def read(folder: Path) -> None:
        for name, data in originals.items():
            if not (folder / name).is_file():
                (folder / name).write_bytes(data)
        SNAC.from_pretrained(str(folder))

    return Check(originals, read, values=True)


def _code_files(files: Files) -> Check:
    codec = files.converter.model.codec
    item = files.converter.encode(sorted(files.speech.rglob("*.flac"))[0])
    originals = {}
    for suffix in ("safetensors", "npz", "jsonl"):
        write_items(path := files.folder / f"codes.{suffix}", [item])
        originals[path.name] = path.read_bytes()
    return Check(originals, lambda folder: read_item(next(folder.iterdir()), codec), values=True)


def _embedding_files(files: Files) -> Check:
    import io

    import numpy as np
    from safetensors.numpy import save

    encoder = files.converter.encoder
    assert encoder is not None
    rows = np.random.default_rng(0).standard_normal((2, encoder.dim)).astype(np.float32)
    np.save(stored := io.BytesIO(), rows)
    originals = {"a.npy": stored.getvalue(), "a.safetensors": save({"embeddings": rows})}
    return Check(originals, lambda folder: files.converter.target([next(folder.iterdir())]))


def _checkpoints(files: Files) -> Check:
    def read(folder: Path) -> None:
        (folder / "checkpoint").mkdir()
        shutil.move(folder / "state.pt", folder / "checkpoint")
        shutil.copy(files.run / "config.json", folder)
        Converter(folder, "cpu", base=str(files.base), checkpoint=True)

    return Check({"state.pt": (files.run / "checkpoint" / "state.pt").read_bytes()}, read)


def _bank_files(files: Files) -> Check:
    originals = {path.name: path.read_bytes() for path in files.bank.iterdir() if path.suffix != ".lock"}

    def read(folder: Path) -> None:
        for name, data in originals.items():
            if not (folder / name).is_file():
                (folder / name).write_bytes(data)
        bank = open_bank(folder, encoder=files.converter.encoder)
        bank.verify()
        open_index(bank)

    return Check(originals, read, values=True)


def _result_files(files: Files) -> Check:
    names = ("result.json", "config.json", "metrics.jsonl")
    originals = {
        **{name: (files.run / name).read_bytes() for name in names},
        **{name: (files.study / name).read_bytes() for name in ("pairs.json", "study.json", "study.toml")},
        "floor.json": (files.study / "controls" / "floor" / "result.json").read_bytes(),
    }

    def read(folder: Path) -> None:
        path = next(folder.iterdir())
        study = folder / "study"
        shutil.copytree(files.study, study)
        of_run = study / files.run.relative_to(files.study) / path.name
        place = of_run if path.name in names else study / path.name
        shutil.move(path, study / "controls" / "floor" / "result.json" if path.stem == "floor" else place)
        build(study)

    return Check(originals, read, values=True)


def _assignments(files: Files) -> Check:
    return Check(
        {"set.txt": b"phase.key=[1, 2.5, 'a']\nlr=3e-4\nweights.\"a/b\"=1.0\nsteps=3"},
        lambda folder: with_overrides({}, next(folder.iterdir()).read_text(errors="replace").splitlines()),
    )


CHECKS: dict[str, Callable[[Files], Check]] = {
    "study files (TOML)": _study_file,
    "settings of the original project (JSON)": _original_settings,
    "--set options": _assignments,
    "manifests (JSONL, CSV)": _manifests,
    "audio to convert (wav, flac, ogg, mp3)": _audio_to_convert,
    "audio of a corpus": _audio_of_corpora,
    "trained models (JSON, safetensors)": _model_files,
    "codecs (JSON, safetensors)": _base_files,
    "files of codes (safetensors, npz, JSONL)": _code_files,
    "embeddings (npy, safetensors)": _embedding_files,
    "checkpoints": _checkpoints,
    "banks and indexes (JSON, npy, FAISS)": _bank_files,
    "results (JSON) in a report": _result_files,
}


def _ignore(_: str) -> None:
    pass


# -------------------------------------------------------------------------------- running


def fuzzed(
    name: str, folder: Path, examples: int, first_seed: int, *, study: Path, bank: Path
) -> tuple[int, Counter[str], list[str]]:
    """Damage and read `examples` files of a kind, in a process of its own, which a damaged file could end.

    Args:
        name: key of `CHECKS`.
        folder: for files; holds base/ and speech/.
        examples: how many.
        first_seed: of the random choices.
        study: folder of a finished study.
        bank: of the encoder `simple`.

    Returns:
        the number of files read, the outcomes, and the faults.
    """
    report = folder / "found.json"
    report.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            place = folder / "fuzz"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            run = next(path.parent for path in sorted(study.rglob("checkpoint")))
            base = folder / "base"
            converter = Converter(run, "cpu", base=str(base))
            files = Files(place, study, run, base, folder / "speech", bank, converter)
            found = read_examples(CHECKS[name](files), place / "case", examples, first_seed)
            report.write_text(json.dumps([found.cases, found.outcomes, list(found.faults.values())]))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    if (code := os.waitstatus_to_exitcode(status)) != 0 or not report.is_file():
        return 0, Counter(), [f"{name}: the process ended with {code}; the last file is in {folder / 'fuzz' / 'case'}"]
    cases, outcomes, faults = json.loads(report.read_text())
    return cases, Counter(outcomes), [f"{name}: {fault}" for fault in faults]


def read_examples(check: Check, place: Path, examples: int, first_seed: int) -> Found:
    """Damage and read `examples` files of a kind, each in the folder `place`."""
    found = Found()
    structured = [key for key in check.originals if check.values and key.endswith((".json", ".jsonl"))]

    @seed(first_seed)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        if len(structured) > 0 and data.draw(st.booleans()):
            name = str(data.draw(st.sampled_from(structured)))
            content = data.draw(_altered_lines(check.originals[name], lines=name.endswith(".jsonl")))
        else:
            name = data.draw(st.sampled_from(sorted(check.originals)))
            content = data.draw(damaged(check.originals[name]))
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / name).write_bytes(content)
        found.cases += 1
        try:
            check.read(place)
            found.outcomes["accepted"] += 1
        except UserError as error:
            found.outcomes["a sentence" if str(error).strip() else "no words"] += 1
        except OSError as error:  # the command line prints it
            found.outcomes[f"a sentence ({type(error).__name__})"] += 1
        except Exception as error:
            where = [
                frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
            ]
            at = f"{Path(where[-1].filename).name}:{where[-1].lineno}"
            key = f"{type(error).__name__} at {at}"
            found.outcomes["fault"] += 1
            found.faults.setdefault(key, f"{key}: {str(error)[:200]!r}, {name} = {content[:200]!r}")

    one()
    return found


@st.composite
def _altered_lines(draw: st.DrawFn, original: bytes, *, lines: bool) -> bytes:
    """JSON, or one of several lines of JSON, with a value exchanged."""
    rows = original.decode().splitlines() if lines else [original.decode()]
    at = draw(st.integers(0, len(rows) - 1))
    rows[at] = in_json(draw(altered(json.loads(rows[at]))))
    return "\n".join(rows).encode()
