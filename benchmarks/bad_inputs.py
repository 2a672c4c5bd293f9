"""Commands with bad input: each must end in a sentence and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

Case = tuple[str, list[str]]
"""What is wrong, and the command line."""

STUDY_FILES = {
    "a study file with one bracket": '[study]\n[arm]\nstrategies = ["a"]',
    "a study file without an arm": "[study]\nsteps = 3",
    "a study that is no table": 'study = 3\n[[arm]]\nstrategies = ["a"]',
    "a study file that is cut": "[study]\nsteps = 3\n[[arm]\nstra",
    "a study file with another encoding": "[study]\nname = '\udcff'",
    "an arm with an unknown strategy": '[[arm]]\nstrategies = ["phase_seven"]',
    "a setting that is a word": '[study]\npatience = "many"\n[[arm]]\nstrategies = ["{strategy}"]',
    "a clipping that is infinite": '[study]\ngrad_clip = inf\n[[arm]]\nstrategies = ["{strategy}"]',
    "seeds that occur twice": '[study]\nseeds = [1, 1]\n[[arm]]\nstrategies = ["{strategy}"]',
    "a plugin file that is missing": '[study]\nplugins = ["mine.py"]\n[[arm]]\nstrategies = ["{strategy}"]',
}


def refused(folder: Path, study: Path, speech: Path, options: Sequence[str], strategies: Sequence[str]) -> list[Case]:
    """The cases.

    Args:
        folder: for files.
        study: folder of a finished study.
        speech: folder of speech.
        options: of `train` and `ablate` for a small study.
        strategies: installed adapters.
    """
    made = _files(folder / "bad_files", study, speech, strategies[0])
    run = next(path.parent for path in sorted(study.rglob("checkpoint")))
    voice = str(sorted(speech.rglob("*.flac"))[0])
    out = str(folder / "bad_out")
    train = ["train", "--strategy", strategies[0], *options, "--out", out]
    arms = ["ablate", "--strategies", strategies[0], *options, "--out", out]
    convert = ["convert", "--run", str(run), "--target", voice, "--device", "cpu", "--out", f"{out}.wav"]
    decode = ["decode", "--device", "cpu", "--out", f"{out}.wav", "--codes"]
    cases: list[Case] = [
        ("an unknown command", ["trian"]),
        ("an unknown option", ["train", "--sets", "x=1"]),
        ("a train without a strategy", ["train"]),
        ("an unknown strategy", ["train", "--strategy", "phase_seven", *options]),
        ("two strategies in one name", ["train", "--strategy", "a+b", *options]),
        ("an unknown setting", [*train, "--set", "stpes=3"]),
        ("a setting without a value", [*train, "--set", "steps"]),
        ("a negative batch", [*train, "--set", "batch_size=-1"]),
        ("a crop of no length", [*train, "--set", "crop_seconds=0"]),
        ("an unknown device", [*train, "--device", "gpu"]),
        ("a GPU that is not there", [*train, "--device", "cuda:99"]),
        ("an unknown encoder", [*train, "--speaker-encoder", "simpel"]),
        ("a judge that is also the encoder", [*train, "--judge", "simple"]),
        ("a base that is missing", [*train, "--base", "no/such/base"]),
        ("a base that is cut", [*train, "--base", str(made["base"])]),
        ("data that is missing", [*train, "--data", "no/such/data"]),
        ("data that is one file of audio", [*train, "--data", voice]),
        ("data of one speaker", [*train, "--data", str(made["lonely"])]),
        ("silent data", [*train, "--data", str(made["silent"])]),
        ("a manifest that is cut", [*train, "--data", str(made["manifest.jsonl"])]),
        ("a manifest without columns", [*train, "--data", str(made["manifest.csv"])]),
        ("more parts than items", [*train, "--set", "accumulate=9"]),
        ("a run to resume that is missing", ["train", "--resume", "nowhere"]),
        ("a run to resume that is damaged", ["train", "--resume", str(made["run"])]),
        ("other settings for a run that is resumed", ["train", "--resume", str(run), "--seed", "9"]),
        ("a start that is missing", [*train, "--start", "nowhere"]),
        ("an output folder of something else", [*train[:-2], "--out", str(speech)]),
        ("neither study nor strategies", ["ablate"]),
        ("an empty name of an arm", [*arms, "--strategies", "a,,b"]),
        ("an arm twice", [*arms, "--strategies", f"{strategies[0]},{strategies[0]}"]),
        ("no test conversions", [*arms, "--set", "test_pairs=0"]),
        ("no seeds", [*arms, "--seeds", "0"]),
        ("a study folder that is a file", [*arms[:-2], "--out", voice]),
        ("a study folder of other settings", [*arms[:-2], "--steps", "7", "--out", str(study)]),
        ("more processes than GPUs", [*arms, "--device", "cuda", "--devices", "64"]),
        *((what, ["ablate", str(made[what]), *options, "--out", out]) for what in STUDY_FILES),
        ("a report of a missing folder", ["report", "nowhere"]),
        ("a report of a folder without results", ["report", str(speech)]),
        ("a report with a damaged result", ["report", str(made["study"])]),
        ("votes that are no votes", ["report", str(study), "--votes", str(made["manifest.jsonl"])]),
        ("an evaluation of nothing", ["evaluate"]),
        ("an evaluation of a missing run", ["evaluate", "nowhere", "--data", str(speech)]),
        ("pairs that are no pairs", ["evaluate", "--pairs", str(made["manifest.jsonl"]), "--export", out]),
        ("audio of another system that is missing", ["evaluate", "--pairs", str(study / "pairs.json"), "--audio", "x"]),
        ("a conversion without a target", ["convert", "--source", voice, "--out", f"{out}.wav"]),
        ("a source that is missing", [*convert, "--source", "gone.wav"]),
        ("a source that is no audio", [*convert, "--source", str(made["text.wav"])]),
        ("a source of NaN", [*convert, "--source", str(made["nan.wav"])]),
        ("a source of no samples", [*convert, "--source", str(made["empty.wav"])]),
        ("an output without a suffix", [*convert[:-1], out, "--source", voice]),
        ("a list of pairs without columns", [*convert[:1], "--pairs", str(made["manifest.csv"]), "--out", out]),
        ("a folder without audio", [*convert[:-1], out, "--source", str(made["base"])]),
        ("an embedding of another size", ["convert", "--run", str(run), "--source", voice, "--target",
                                          str(made["embedding.npy"]), "--out", f"{out}.wav"]),
        ("codes into a text file", ["encode", "--source", voice, "--out", f"{out}.txt"]),
        ("an unknown order of tokens", ["encode", "--source", voice, "--order", "upwards", "--out", f"{out}.npz"]),
        ("codes that are missing", [*decode, "gone.safetensors"]),
        ("codes that are cut", [*decode, str(made["codes.safetensors"])]),
        ("an export of a missing run", ["export", "--run", "nowhere", "--out", out]),
        ("an unknown format of an export", ["export", "--format", "keras", "--out", out]),
        ("an unknown plugin", ["plugins", "show", "phase_seven"]),
        ("a check of a missing file", ["check", "gone.py"]),
        ("a check of a file without plugins", ["check", str(made["plugin.py"])]),
        ("a pretraining without data", ["pretrain", "--data", "nowhere", "--out", out]),
        ("an unknown preset", ["pretrain", "--preset", "huge", "--data", str(speech), "--out", out]),
        ("an unknown setting of pretraining", ["pretrain", "--set", "stpes=3", "--data", str(speech), "--out", out]),
        ("a benchmark of a missing base", ["bench", "--base", "no/such/base"]),
        ("a page that offers a missing run", ["app", "--run", "nowhere"]),
        ("a page at an impossible port", ["app", "--port", "99999"]),
        ("three voices", ["data", "synth", out, "--speakers", "3"]),
        ("a scan of a missing folder", ["data", "scan", "nowhere"]),
        ("a corpus that is unknown", ["data", "fetch", "librispech", out]),
        ("an index of missing data", ["index", "build", "--data", "nowhere", "--out", out]),
        ("an index that was not built", ["index", "show", "--data", str(speech), "--encoder", "simple", "--out", out]),
        ("an index with an unknown encoder", ["index", "build", "--data", str(speech), "--encoder", "simpel"]),
        ("a quickstart of no steps", ["quickstart", "--steps", "0", "--out", out]),
    ]  # fmt: skip
    return cases


def _files(folder: Path, study: Path, speech: Path, strategy: str) -> dict[str, Path]:
    """Bad files, by name."""
    folder.mkdir()
    files = {what: folder / f"{number}.toml" for number, what in enumerate(STUDY_FILES)}
    for what, text in STUDY_FILES.items():
        files[what].write_bytes(text.replace("{strategy}", strategy).encode(errors="surrogateescape"))
    whole = {
        "manifest.jsonl": b'{"path": "a.wav", "speaker": "a"}\n{"path": "b.w',
        "manifest.csv": b"file,who\na.wav,a\n",
        "text.wav": b"not audio",
        "plugin.py": b"x = 1",
        "codes.safetensors": b"\x40\x00\x00\x00\x00\x00\x00\x00{",
    }
    for name, data in whole.items():
        files[name] = folder / name
        files[name].write_bytes(data)
    for name, wave in {"nan.wav": np.full(8000, np.nan), "empty.wav": np.zeros(0)}.items():
        files[name] = folder / name
        soundfile.write(files[name], wave, 16000, subtype="FLOAT")
    files["embedding.npy"] = folder / "embedding.npy"
    np.save(files["embedding.npy"], np.ones(7, dtype=np.float32))
    draw = np.random.default_rng(0)
    for name, speakers, loudness in (("lonely", 1, 0.1), ("silent", 3, 0.0)):
        files[name] = folder / name
        for speaker in range(speakers):
            (files[name] / f"s{speaker}").mkdir(parents=True)
            for number in range(2):
                noise = loudness * draw.standard_normal(16000)
                soundfile.write(files[name] / f"s{speaker}" / f"{number}.wav", noise, 16000)
    files["study"] = folder / "study"
    shutil.copytree(study, files["study"])
    for path in files["study"].rglob("result.json"):
        path.write_bytes(path.read_bytes()[:200])
    run = next(path.parent for path in sorted(files["study"].rglob("checkpoint")))
    files["run"] = run
    (run / "config.json").write_text(json.dumps({"study": {"stpes": 3}}))
    files["base"] = folder / "base"
    shutil.copytree(folder.parent / "base", files["base"])
    weights = files["base"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return files
