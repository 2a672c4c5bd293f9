"""Simulated study folders for the tests: random numbers and tones, nothing that was measured on speech."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
GAINS = {"made_up_a": 0.05, "made_up_b": 0.30, "made_up_c": 0.29}


def write_tone(path: Path, hertz: float, seconds: float = 0.6) -> None:
    """A 16-bit mono wav of one decaying tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(RATE * seconds)) / RATE
    samples = (np.sin(2 * np.pi * hertz * t) * np.exp(-2 * t) * 20_000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())


def _result(arm: str, seed: int | None, kind: str, utterances: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    names = sorted({n for u in utterances for n in u["metrics"]})
    pooled = {}
    for name in names:
        values = [u["metrics"][name] for u in utterances if u["metrics"].get(name) is not None]
        down = name in {"secs_source", "spk_id", "spk_vc", "gap", "mel", "stft"}
        pooled[name] = {
            "mean": float(np.mean(values)),
            "n_ok": len(values),
            "n": len(utterances),
            "unit": "",
            "direction": "down" if down else "up",
        }
    return {
        "schema": 2,
        "study": "simulated",
        "arm": arm,
        "kind": kind,
        "seed": seed,
        "status": "success",
        "error": None,
        "strategies": [arm] if kind == "arm" else [],
        "objectives": ["voice_conversion"] if kind == "arm" else [],
        "config": {"steps": 200, "lr": 3e-4, "seed": seed, arm: {"hidden": 512}} if kind == "arm" else {},
        "config_hash": f"{abs(hash_of(arm)):016x}",
        "speaker_encoder": {"name": "pretend_speaker_encoder", "family": "pretend_lstm", "digest": "a1" * 32},
        "judges": [{"name": "pretend_judge", "family": "pretend_tdnn", "digest": "b2" * 32}],
        "split": "test",
        "pairs": {"digest": "c3" * 32, "n": len(utterances)},
        "metrics": pooled,
        "utterances": utterances,
        "cost": {},
        "codes": {},
        "noise_floor": {"secs": 0.01},
        "versions": {
            "snac-conditioning": "0.0.0",
            "torch": "0.0.0",
            "plugins": {arm: {"distribution": "simulated", "version": "0.0.0"}} if kind == "arm" else {},
        },
        "hardware": {"cpu": "none, these numbers are simulated", "cores": 2},
        "git": {"commit": "d4" * 20, "dirty": False},
        "missing": {},
        "data": {"name": "simulated", "notes": []},
        "digests": {"data": "e5" * 32, "base": "f6" * 32, "speaker_encoder": "a1" * 32, "judge": "b2" * 32},
        "started": "2001-01-01T00:00:00Z",
        "ended": f"2001-01-01T00:0{(seed or 0) + 1}:00Z",
        "command": "runner ablate simulated.toml",
        **more,
    }


def hash_of(name: str) -> int:
    """A number from a name, the same in every process."""
    return int.from_bytes(name.encode()[:7].rjust(7, b"\0"), "big")


def write_study(
    folder: Path,
    *,
    gains: dict[str, float] | None = None,
    seeds: int = 2,
    pairs: int = 40,
    targets: int = 10,
    samples: int = 3,
    controls: tuple[str, ...] = ("source", "floor", "ceiling"),
    seed_spread: float = 0.004,
    steps: int = 40,
    noise_floor: float = 0.01,
    random_seed: int = 0,
) -> Path:
    """A whole study folder: arms of known gain over the floor, controls, curves and tones."""
    gains, noise = GAINS if gains is None else gains, {"secs": noise_floor}
    rng = np.random.default_rng(random_seed)
    names = [f"p{i:03d}" for i in range(pairs)]
    target = [i % targets for i in range(pairs)]
    per_target, per_source = rng.normal(0, 0.03, targets), rng.normal(0, 0.03, pairs)
    floor = 0.30 + per_target[target] + per_source
    ceiling = 0.85 + 0.3 * per_target[target] + rng.normal(0, 0.02, pairs)

    def item(i: int, **metrics: float) -> dict[str, Any]:
        return {
            "pair": names[i],
            "source_speaker": f"s{(target[i] + 3) % targets:02d}",
            "target_speaker": f"s{target[i]:02d}",
            "same_sex": bool(i % 2),
            "metrics": {k: float(v) for k, v in metrics.items()},
        }

    def save(where: Path, result: dict[str, Any], hertz: float) -> None:
        where.mkdir(parents=True, exist_ok=True)
        (where / "result.json").write_text(json.dumps(result))
        for i in range(samples):
            write_tone(where / "samples" / f"{names[i]}.wav", hertz * (1 + i / 4))
            if result["kind"] == "arm":
                write_tone(where / "samples" / f"{names[i]}.identity.wav", 165 * (1 + i / 4))

    for number, (arm, gain) in enumerate(gains.items()):
        for seed in range(seeds):
            secs = floor + gain + rng.normal(0, seed_spread) + rng.normal(0, 0.03, pairs)
            identity = 0.12 + rng.normal(0, 0.02, pairs) + gain / 10
            utterances = [
                item(
                    i,
                    secs=secs[i],
                    secs_source=0.8 - gain + rng.normal(0, 0.03),
                    secs_own=floor[i] + rng.normal(0, 0.01),
                    secs_other=floor[i] + 0.2 * gain + rng.normal(0, 0.02),
                    specificity=0.8 * gain + rng.normal(0, 0.03),
                    spk_id=identity[i],
                    spk_vc=1 - secs[i],
                    gap=1 - secs[i] - identity[i],
                    speaker_encoder_secs=secs[i] + 0.08 + 0.03 * number,
                    stoi=0.90 - 0.2 * gain + rng.normal(0, 0.02),
                    pesq=2.6 - gain + rng.normal(0, 0.1),
                    mel=0.5 + gain + rng.normal(0, 0.05),
                    stft=1.1 + gain + rng.normal(0, 0.05),
                    si_sdr=4 - 6 * gain + rng.normal(0, 0.8),
                )
                for i in range(pairs)
            ]
            changed = [min(1.0, gain * (3 - level)) for level in range(3)]
            cost = {
                "seconds_alone": 60.0 + 5 * number,
                "seconds_own": 45.0 + 5 * number,
                "seconds_shared": 15.0,
                "steps": 200,
                "parameters": 120_000 * (number + 1),
                "bytes": 480_000 * (number + 1),
                "peak_memory_bytes": 9e8 + 5e7 * number,
            }
            codes = {"changed": changed, "perplexity": [210.0, 480.0, 900.0]}
            where = folder / arm / f"seed{seed}"
            save(
                where,
                _result(arm, seed, "arm", utterances, cost=cost, codes=codes, noise_floor=noise),
                220 * (number + 2),
            )
            _write_curves(where / "metrics.jsonl", rng, gain, steps)
    for control in controls:
        values = {"source": floor + 0.01, "floor": floor, "ceiling": ceiling}[control]
        utterances = [item(i, secs=values[i], secs_source=0.93, spk_id=0.10) for i in range(pairs)]
        result = _result(control, None, "control", utterances)
        save(folder / "controls" / control, result, {"source": 160, "floor": 165, "ceiling": 330}[control])
    plan = {
        "schema": 2,
        "name": "simulated",
        "title": "Simulated study",
        "seeds": list(range(seeds)),
        "arms": list(gains),
    }
    (folder / "study.json").write_text(json.dumps(plan))
    listed = [
        {
            "id": n,
            "source": [f"u{i // 2:03d}", 0.0, 3.0],
            "target": f"s{target[i]:02d}",
        }
        for i, n in enumerate(names)
    ]
    (folder / "pairs.json").write_text(json.dumps({"digest": "c3" * 32, "pairs": listed}))
    return folder


def _write_curves(path: Path, rng: np.random.Generator, gain: float, steps: int) -> None:
    lines = []
    for step in range(5, steps * 5 + 1, 5):
        done = 1 - np.exp(-step / (steps * 1.5))
        spk_vc = 0.7 - gain * done + rng.normal(0, 0.01)
        spk_id = 0.13 + rng.normal(0, 0.005)
        line: dict[str, Any] = {"step": step, "epoch": 1 + step // 50, "seconds": step / 4, "lr": 3e-4}
        line |= {"loss": float(2 - done + rng.normal(0, 0.05)), "voice_conversion/recon": 1.0}
        lines.append(line | {"spk_id": float(spk_id), "spk_vc": float(spk_vc), "gap": float(spk_vc - spk_id)})
        if step % 50 == 0:
            dev = {"judge/pretend_judge/secs": float(0.3 + gain * done), "gap": float(0.5 - gain * done)}
            lines.append({"step": step, "dev": dev})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
