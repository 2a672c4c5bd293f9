"""Export of a codec with strategies as three programs of dynamic length: ONNX files, or torch.export archives.

    encoder     audio (1, 1, T), speaker (1, S)                    ->  z (1, C, F)
    quantizer   z (1, C, F)                                        ->  codes_0, codes_1, ... (1, F / stride)
    decoder     codes_0, ... , noise_0, ... (1, 1, T_i), speaker   ->  audio (1, 1, T)

T is a multiple of the padding of `SNAC.preprocess`. A part has the input `speaker` if a strategy acts on its side of
the quantizer, and `reference` (1, C, R), of any length R, if that strategy attends to speech of the target. Noise is an
input, so that results are repeatable: standard normal numbers, or zeros for none.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from snac_core.codec.layers import NoiseBlock
from snac_core.conditioning import REFERENCE, Conditioning
from snac_core.errors import UserError, nearest
from snac_core.files import write_bytes, write_json
from snac_core.seeding import generator
from snac_core.taps import is_before_vq

if TYPE_CHECKING:
    from snac_core.conditioned import ConditionedCodec

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
DESCRIPTION = "export.json"
AUDIO_TOLERANCE = 1e-4  # largest difference of a sample, full scale 1
CODES_TOLERANCE = 1e-3  # largest share of codes that differ: two entries can be equally near up to rounding
OPSET = 20
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
_TRACED_UNITS, _CHECKED_SECONDS = 16, 2.0  # length of the example, in units of the padding, and of the check

_ANY = 0  # instead of a length per unit: any length, whatever that of the audio

Run = Callable[[Sequence[Tensor]], list[Tensor]]


class _Encoder(nn.Module):
    def __init__(self, model: ConditionedCodec) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio: Tensor, speaker: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        return self.model.encode_latent(audio, _conditioning(speaker, reference))


class _Quantizer(nn.Module):
    def __init__(self, model: ConditionedCodec) -> None:
        super().__init__()
        self.quantizer = model.codec.quantizer

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.quantizer(z)[1])


class _Decoder(nn.Module):
    def __init__(self, model: ConditionedCodec) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, codes: list[Tensor], noise: list[Tensor], speaker: Tensor | None = None, reference: Tensor | None = None
    ) -> Tensor:
        codec = self.model.codec
        with codec.noise.given(noise):
            z_q = codec.quantizer.from_codes(codes)
            return self.model.decode_quantized(z_q, _conditioning(speaker, reference))


def _conditioning(speaker: Tensor | None, reference: Tensor | None) -> Conditioning | None:
    return None if speaker is None else Conditioning.attending(speaker, reference)


@dataclass(frozen=True)
class Part:
    """One program.

    Attributes:
        module: what is exported.
        inputs: names; per input, the length of its last dimension for one unit of the padding, None if it is fixed, or
            `_ANY`.
        outputs: names.
        grouped: from a list of inputs to the arguments of `module`.
    """

    module: nn.Module
    inputs: Mapping[str, int | None]
    outputs: Sequence[str]
    grouped: Callable[[Sequence[Any]], tuple[Any, ...]] = tuple

    def program(self, example: Sequence[Tensor]) -> ExportedProgram:
        """The traced program, for inputs of any length."""
        units = Dim("units", min=1, max=2**20)
        lengths: list[dict[int, Any]] = []
        for per_unit, tensor in zip(self.inputs.values(), example, strict=True):
            if per_unit is None:
                lengths.append({})
            elif per_unit == _ANY:
                lengths.append({tensor.dim() - 1: Dim("reference_frames", min=2, max=2**20)})
            else:
                lengths.append({tensor.dim() - 1: units if per_unit == 1 else per_unit * units})
        with torch.no_grad():
            return torch.export.export(
                self.module, self.grouped(example), dynamic_shapes=self.grouped(lengths), strict=False
            )


@dataclass
class Exported:
    """What an export did.

    Attributes:
        files: of the parts that work, by part.
        failed: reasons, by part.
        parity: largest difference of latents and samples, and share of equal codes.
    """

    files: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)


def parts_of(model: ConditionedCodec) -> dict[str, Part]:
    """The parts of a model by name."""
    codec = model.codec
    unit = codec.padding_multiple
    frames = unit // codec.hop_length
    codes = {f"codes_{level}": frames // stride for level, stride in enumerate(codec.vq_strides)}
    blocks = [layer for layer in codec.decoder.modules() if isinstance(layer, NoiseBlock)]
    noise = {f"noise_{block.number}": frames * block.samples_per_frame for block in blocks}
    before, after = (_conditions(model, before_vq=side) for side in (True, False))

    def grouped(values: Sequence[Any]) -> tuple[Any, ...]:
        last = len(codes) + len(noise)
        return (list(values[: len(codes)]), list(values[len(codes) : last]), *values[last:])

    return {
        "encoder": Part(_Encoder(model), {"audio": unit, **before}, ["z"]),
        "quantizer": Part(_Quantizer(model), {"z": frames}, list(codes)),
        "decoder": Part(_Decoder(model), {**codes, **noise, **after}, ["audio"], grouped),
    }


def _conditions(model: ConditionedCodec, *, before_vq: bool) -> dict[str, int | None]:
    """The inputs of one side of the quantizer that say what to convert to."""
    acting = {edit.strategy for tap, edits in model.edits.items() if is_before_vq(tap) == before_vq for edit in edits}
    inputs: dict[str, int | None] = {"speaker": None} if acting else {}
    if any(REFERENCE in model.attached[name].extras for name in acting):
        inputs[REFERENCE] = _ANY
    return inputs


def export(model: ConditionedCodec, folder: Path, file_format: str = "onnx") -> Exported:
    """Write encoder, quantizer and decoder, check each against the model, and describe them in export.json.

    Args:
        model: a codec with strategies, or with none.
        folder: created if missing; must be empty.
        file_format: "onnx", or "torch" for archives of `torch.export`.

    Returns:
        files, and the parts that cannot be exported or differ from the model, with the reason. A part that fails has no
        file.

    Raises:
        UserError: for an unknown format, a folder with files, and "onnx" without onnx and onnxruntime.
    """
    check_possible(folder, file_format)
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or model.training:
        got = f"{weight.dtype} on {weight.device}, {'training' if model.training else 'eval'} mode"
        raise UserError(f"an export needs a model in float32 on the CPU, in eval mode; got {got}")
    done, parts, unit = Exported(), parts_of(model), model.codec.padding_multiple
    example = _values(model, _TRACED_UNITS)
    check = _values(model, max(3, round(_CHECKED_SECONDS * model.codec.sampling_rate / unit)))
    for name, part in parts.items():
        try:
            with _quiet(), torch.no_grad():
                data, run = _written(part, [example[key] for key in part.inputs], file_format)
                done.parity |= _parity(model, name, run([check[key] for key in part.inputs]), check)
        except Exception as error:  # torch.export and ONNX Runtime raise many kinds
            done.failed[name] = _reason(error)
            continue
        done.files[name] = folder / f"{name}{FORMATS[file_format]}"
        write_bytes(done.files[name], data)
    if done.files:
        write_json(folder / DESCRIPTION, _description(model, parts, done, file_format))
    return done


def check_possible(folder: Path, file_format: str) -> None:
    """Raise UserError for an unknown format, a folder with files, and "onnx" without onnx and onnxruntime."""
    if file_format not in FORMATS:
        raise UserError(f"no export format {file_format!r}{nearest(file_format, FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; give another")
    if file_format == "onnx":
        for package in _PACKAGES["onnx"]:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"ONNX needs {package}; install it with: pip install 'snac-conditioning[export]'")


@torch.no_grad()
def _values(model: ConditionedCodec, units: int) -> dict[str, Tensor]:
    """Inputs of all parts by name, for a length in units of the padding, and "decoded", the audio of the decoder."""
    codec = model.codec
    draw = generator(0, "export", units)
    audio = 0.1 * torch.randn((1, 1, units * codec.padding_multiple), generator=draw)
    values = {"audio": audio}
    cond = None
    if model.encoder is not None:
        speaker = nn.functional.normalize(torch.randn((1, model.encoder.dim), generator=draw), dim=1)
        values["speaker"] = speaker
        cond = Conditioning(speaker)
        if REFERENCE in model.extras:
            cond = model.target(cond, 0.1 * torch.randn((1, 1, (units + 1) * codec.padding_multiple), generator=draw))
            values[REFERENCE] = cond.extras[REFERENCE]
    before, after = (cond if model.acts(before_vq=side) else None for side in (True, False))
    latents = model.latents(audio, before)
    values |= {"z": latents.z} | {f"codes_{level}": indices for level, indices in enumerate(latents.codes)}
    noise = []
    for name, per_unit in parts_of(model)["decoder"].inputs.items():
        if name.startswith("noise_"):
            assert per_unit is not None
            noise.append(torch.randn((1, 1, units * per_unit), generator=draw))
            values[name] = noise[-1]
    with codec.noise.given(noise):
        values["decoded"] = model.decode(latents.codes, after)
    return values


def _written(part: Part, example: Sequence[Tensor], file_format: str) -> tuple[bytes, Run]:
    """The file of a part, and what runs it."""
    program = part.program(example)
    if file_format == "torch":
        archive = io.BytesIO()
        torch.export.save(program, archive)
        module = torch.export.load(io.BytesIO(archive.getvalue())).module()

        def run_torch(inputs: Sequence[Tensor]) -> list[Tensor]:
            found = module(*part.grouped(inputs))
            return [found] if isinstance(found, Tensor) else list(found)

        return archive.getvalue(), run_torch
    import onnxruntime

    converted = torch.onnx.export(
        program, input_names=list(part.inputs), output_names=list(part.outputs), opset_version=OPSET, verbose=False
    )
    assert converted is not None
    data: bytes = converted.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run_onnx(inputs: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(part.inputs, inputs, strict=True)}
        return [torch.from_numpy(found) for found in session.run(list(part.outputs), feeds)]

    return data, run_onnx


def _parity(
    model: ConditionedCodec, name: str, found: list[Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """How far the outputs of a part are from the model's.

    Raises:
        UserError: if they are farther than the tolerances.
    """
    if name == "decoder":
        difference = float((found[0] - expected["decoded"]).abs().max())
        if not difference <= AUDIO_TOLERANCE:
            raise UserError(f"samples differ from the model's by {difference:.2g}; expected at most {AUDIO_TOLERANCE}")
        return {"audio_difference": difference}
    measured: dict[str, float] = {}
    if name == "encoder":
        measured["latent_difference"] = float((found[0] - expected["z"]).abs().max())
        found = model.codec.quantizer(found[0])[1]
    codes = [expected[f"codes_{level}"] for level in range(model.codec.n_codebooks)]
    differs = float(torch.cat([(a != b).flatten() for a, b in zip(found, codes, strict=True)]).float().mean())
    if differs > CODES_TOLERANCE:
        raise UserError(f"{100 * differs:.2g} % of the codes differ from the model's; expected none")
    return {**measured, f"{name}_codes_equal": 1 - differs}


def _description(
    model: ConditionedCodec, parts: Mapping[str, Part], done: Exported, file_format: str
) -> dict[str, Any]:
    """What a program needs to know to run the files."""
    codec, values = model.codec, _values(model, 1)

    def tensors(names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Shape for one unit, dtype, and, where the last dimension grows with the length, its size per unit."""
        found = {}
        for name in names:
            tensor = values["decoded" if name == "audio" else name]
            about: dict[str, Any] = {"shape": [*tensor.shape], "dtype": str(tensor.dtype).removeprefix("torch.")}
            if name == REFERENCE:
                found[name] = {**about, "shape": [*tensor.shape[:-1], None]}  # any length
            else:
                found[name] = about if name == "speaker" else {**about, "per_unit": tensor.shape[-1]}
        return found

    about: dict[str, Any] = {
        "format": file_format,
        "sampling_rate": codec.sampling_rate,
        "samples_per_unit": codec.padding_multiple,
        "vq_strides": list(codec.vq_strides),
        "codebook_size": codec.codebook_size,
        "base": {"name": codec.name, "digest": codec.digest},
        "strategies": list(model.attached),
        "speaker_encoder": None,
        "parts": {
            name: {
                "file": path.name,
                "inputs": tensors(parts[name].inputs),
                "outputs": tensors(parts[name].outputs),
            }
            for name, path in done.files.items()
        },
        "failed": done.failed,
        "parity": done.parity,
        "versions": {package: version(package) for package in ("torch", *_PACKAGES[file_format])},
    }
    if model.encoder is not None:
        about["speaker_encoder"] = {
            "name": model.encoder.name, "dim": model.encoder.dim, "digest": model.encoder.digest,
        }  # fmt: skip
    if file_format == "onnx":
        about["opset"] = OPSET
    return about


def _reason(error: BaseException) -> str:
    """The innermost cause of an error: torch.onnx wraps it in a report."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, which concern its own code."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
