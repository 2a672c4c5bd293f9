"""Convert a 16-bit mono wav with exported ONNX files: python onnx_convert.py EXPORTED source.wav converted.wav"""

import json
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime

folder, source, out = sys.argv[1:]
about = json.loads(Path(folder, "export.json").read_text())
if about["failed"]:
    sys.exit(f"{folder} lacks {', '.join(about['failed'])}, which could not be exported")
known = {path.stem: np.load(path) for path in Path(folder).glob("*.npy")}  # written by runner export --target
needed = {name for part in about["parts"].values() for name in part["inputs"]} & {"speaker", "reference"}
if missing := needed - known.keys():
    sys.exit(f"{folder} has no {min(missing)}.npy; give runner export the speech of a target: --target b.wav")
with wave.open(source) as file:  # Python's module reads no floating point
    if file.getparams()[:3] != (1, 2, about["sampling_rate"]):
        sys.exit(f"{source} is not mono, 16-bit, at {about['sampling_rate']} Hz")
    audio = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
units = -(-len(audio) // about["samples_per_unit"])
known["audio"] = np.pad(audio, (0, units * about["samples_per_unit"] - len(audio)))[None, None]
for part in about["parts"].values():  # encoder, quantizer, decoder
    for name in [name for name in part["inputs"] if name.startswith("noise")]:
        known[name] = np.random.randn(1, 1, units * part["inputs"][name]["per_unit"]).astype(np.float32)
    session = onnxruntime.InferenceSession(f"{folder}/{part['file']}")
    found = session.run(None, {name: known[name] for name in part["inputs"]})
    known.update(zip(part["outputs"], found, strict=True))
with wave.open(out, "wb") as file:
    file.setparams((1, 2, about["sampling_rate"], 0, "NONE", ""))
    file.writeframes((known["audio"][0, 0, : len(audio)].clip(-1, 1) * 32767).astype("<i2").tobytes())
