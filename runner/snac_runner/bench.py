"""`runner bench`: speed and cost on this machine, as ratios of times that are measured in the same run."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snac_core.codec import SNAC
from snac_core.codec.layers import NoiseBlock
from snac_core.codec.streaming import ConversionStream
from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError
from snac_core.frozen import FrozenActivations
from snac_core.plugins import Catalogue
from snac_runner.arm import Arm
from snac_runner.config import ArmSettings, StudySettings
from snac_runner.memory import gibibytes
from snac_runner.resources import StudyResources
from snac_runner.train_step import train_step

SECONDS = 4.0  # of audio that the codecs are timed on
STREAM_SECONDS = (0.01, 0.16, 0.64)  # chunks of a stream; the first is rounded to the shortest that the codec has
USUAL_STEP = 2  # a step that decodes audio only if a loss needs it


def codec_table(base: str, rounds: int) -> list[str]:
    """Encode and decode by upstream and by this package in all its ways, with the same weights, in alternating rounds.

    The columns: speed relative to upstream and to real time, share of codes equal to those of eager float32, and
    signal-to-noise ratio of audio decoded from equal codes against it. Ways that are not installed are left out and
    named.
    """
    codec, fast = SNAC.from_pretrained(base).freeze(), SNAC.from_pretrained(base).compile()
    own = {
        "this package": (codec, None), "compiled": (fast, None),
        "bf16": (codec, torch.bfloat16), "compiled, bf16": (fast, torch.bfloat16),
    }  # fmt: skip
    audio = 0.1 * torch.randn(
        1, 1, round(SECONDS * codec.sampling_rate) // codec.padding_multiple * codec.padding_multiple
    )
    codes = codec.encode(audio)
    ways: dict[str, tuple[Way, Way]] = {}
    missing = []
    if importlib.util.find_spec("snac") is not None:
        theirs = _upstream(codec)
        ways["upstream"] = lambda: theirs.encode(audio), lambda: theirs.decode(codes)
    else:
        missing.append("snac")
    for name, (one, dtype) in own.items():
        ways[name] = partial(_encode, one, dtype, audio), partial(_decode, one, dtype, codes)
    if importlib.util.find_spec("onnxruntime") is not None and importlib.util.find_spec("onnxscript") is not None:
        ways["ONNX Runtime"] = _onnx(codec, audio, codes)
    else:
        missing.append("onnxruntime, onnxscript")
    with torch.inference_mode():
        taken = alternating({f"{name} {k}": way[k] for name, way in ways.items() for k in (0, 1)}, rounds)
        quality = {name: _against(codec, way, audio, codes) for name, way in own.items()}
    first, seconds = next(iter(ways)), audio.shape[-1] / codec.sampling_rate
    lines = [
        f"codec {base}, {seconds:.1f} s of audio, {torch.get_num_threads()} thread(s), speed relative to {first}:",
        "  way               encode  x real time    decode  x real time    equal codes  audio",
    ]
    for name in ways:
        cells = [
            f"{taken[f'{first} {k}'] / taken[f'{name} {k}']:6.2f}  {seconds / taken[f'{name} {k}']:11.1f}"
            for k in (0, 1)
        ]
        equal, snr = quality.get(name, (None, None))
        about = "" if equal is None else f"    {100 * equal:9.1f} %  {snr:.0f} dB"
        lines.append(f"  {name:16}  {cells[0]}    {cells[1]}{about}")
    return lines + [f"  not installed: {name}" for name in missing]


Way = Callable[[], object]


def _upstream(codec: SNAC) -> Any:
    """The codec of the `snac` package with the same weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream scripts a function in a way that torch deprecates
        from snac import SNAC as Upstream

    theirs = Upstream(**codec.config).eval()
    theirs.load_state_dict(codec.state_dict())
    return theirs


def _onnx(codec: SNAC, audio: Tensor, codes: Sequence[Tensor]) -> tuple[Way, Way]:
    """Encode and decode by ONNX Runtime, with torch's number of threads."""
    import onnxruntime

    from snac_core.codec.export import export

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with TemporaryDirectory() as folder:
        files = export(ConditionedCodec(codec).eval(), Path(folder) / "onnx").files
        sessions = {
            part: onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            for part, file in files.items()
        }
    feeds = {f"codes_{level}": indices.numpy() for level, indices in enumerate(codes)}
    frames = audio.shape[-1] // codec.hop_length
    for block in codec.decoder.modules():
        if isinstance(block, NoiseBlock):
            noise = np.random.default_rng(block.number).standard_normal((1, 1, frames * block.samples_per_frame))
            feeds[f"noise_{block.number}"] = noise.astype(np.float32)

    def encode() -> object:
        (z,) = sessions["encoder"].run(None, {"audio": audio.numpy()})
        return sessions["quantizer"].run(None, {"z": z})

    return encode, lambda: sessions["decoder"].run(None, feeds)


def _encode(codec: SNAC, dtype: torch.dtype | None, audio: Tensor) -> list[Tensor]:
    with codec.computing(autocast=dtype):
        return codec.encode(audio)


def _decode(codec: SNAC, dtype: torch.dtype | None, codes: Sequence[Tensor]) -> Tensor:
    with codec.computing(autocast=dtype):
        return codec.decode(codes)


def _against(
    codec: SNAC, way: tuple[SNAC, torch.dtype | None], audio: Tensor, codes: Sequence[Tensor]
) -> tuple[float, float]:
    """Share of equal codes, and signal-to-noise ratio in dB of audio decoded from equal codes."""
    found = _encode(*way, audio)
    equal = torch.cat([(a == b).flatten() for a, b in zip(codes, found, strict=True)]).float().mean()
    with codec.fixed_noise(0), way[0].fixed_noise(0):
        expected, got = codec.decode(codes), _decode(*way, codes)
    error = (got - expected).square().sum().clamp(min=1e-12 * expected.square().sum())
    return float(equal), float(10 * torch.log10(expected.square().sum() / error))


def streaming(base: str, rounds: int) -> list[str]:
    """Latency of `ConversionStream`, and its time for a chunk: of the shortest chunk, and of longer ones."""
    model = ConditionedCodec(SNAC.from_pretrained(base))
    lines = []
    for seconds in STREAM_SECONDS:
        stream = ConversionStream(model, seconds=seconds)
        chunk = stream.latency - stream.lookahead
        audio = 0.1 * torch.randn(1, 1, round(chunk * model.codec.sampling_rate))
        while not stream.push(audio).shape[-1]:  # until every push gives a chunk
            pass
        taken = alternating({"chunk": lambda: stream.push(audio)}, rounds)["chunk"]  # noqa: B023
        lines.append(
            f"stream {base}: latency {1000 * stream.latency:.0f} ms (chunk {1000 * chunk:.0f}, look-ahead "
            f"{1000 * stream.lookahead:.0f}) and {1000 * taken:.0f} ms to compute a chunk"
            + ("" if taken < chunk else ", which is slower than real time")
        )
    return lines


def side_by_side(study: StudySettings, arms: Sequence[ArmSettings], catalogue: Catalogue, rounds: int) -> list[str]:
    """One step of all arms together, against the shared work once plus each arm's own work; without start-up."""
    resources = StudyResources(study, catalogue)
    with TemporaryDirectory() as folder:
        trained = [Arm.new(arm, 0, Path(folder) / str(i), resources) for i, arm in enumerate(arms)]
        batches = resources.batches(0)
        shared: dict[str, list[float]] = {}
        numbers = count(1)

        def step(arms: Sequence[Arm], shared_seconds: list[float]) -> None:
            batch = resources.draw(next(numbers), batches, trained[0].sampler)
            train_step(arms, [batch], resources.context).checked()
            shared_seconds.append(resources.shared_time.lap())

        works: dict[str, Callable[[], object]] = {}
        for name, group in {"all": trained, **{arm.settings.title: [arm] for arm in trained}}.items():
            shared[name] = []
            works[name] = partial(step, group, shared[name])
        taken = alternating(works, rounds, resources.device)
        common = {name: statistics.median(values) for name, values in shared.items()}
        expected = common["all"] + sum(taken[arm.settings.title] - common[arm.settings.title] for arm in trained)
        lines = [f"side by side, {len(trained)} arms, batch {study.batch_size} x {study.crop_seconds} s:"]
        lines.append(f"  shared work once: {common['all']:.3f} s")
        for arm in trained:
            title = arm.settings.title
            lines.append(f"  own work of {title}: {taken[title] - common[title]:.3f} s")
        alone = sum(taken[arm.settings.title] for arm in trained)
        lines.append(f"  one step of all: {taken['all']:.3f} s = {taken['all'] / expected:.2f} x (shared + own)")
        lines.append(f"  samples a second: {study.batch_size / taken['all']:.1f} crops for all arms")
        if resources.device.type == "cuda":
            lines.append(f"  the GPU is busy in {100 * busy_share(works['all'], resources.device):.0f} % of a step")
        lines.append(f"  against one after the other: {taken['all'] / alone:.2f} of {alone:.3f} s")
        lines += [f"  passes of a step of {arm.settings.title}: {passes(arm, resources)}" for arm in trained]
        lines += [
            f"  peak memory in a step of {arm.settings.title}: {gibibytes(arm.progress.peak_memory)}" for arm in trained
        ]
    return lines


def start_up() -> list[str]:
    """Seconds of `runner --help`, the fastest of three."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from snac_runner.cli import main; main(['--help'])"],
            check=True,
            capture_output=True,
        )
        taken.append(time.perf_counter() - started)
    return [f"runner --help: {min(taken):.2f} s"]


def passes(arm: Arm, resources: StudyResources) -> str:
    """Calls (and rows) of codec encoder, quantiser, decoder and conditioning encoder in one training step.

    These are the calls of most steps: if no loss needs audio, some steps decode it for the training curves.
    """
    codec = resources.codec
    watched = {
        "encoder": codec.encoder.block[0],
        "quantiser": codec.quantizer,
        "decoder": codec.decoder.model[0],
        "speaker_encoder": resources.speaker_encoder,
    }
    batch = resources.draw(USUAL_STEP, resources.batches(0), arm.sampler)
    with counting(watched) as counts:
        train_step([arm], [batch], resources.context).checked()
    return ", ".join(f"{name} {len(rows)} ({sum(rows)} items)" for name, rows in counts.items())


@contextmanager
def counting(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """While inside, the number of items of every forward call of each module."""
    counts: dict[str, list[int]] = {name: [] for name in modules}

    def hook(rows: list[int]) -> Callable[..., None]:
        return lambda _module, arguments: rows.append(len(arguments[0]))

    handles = [module.register_forward_pre_hook(hook(counts[name])) for name, module in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def busy_share(work: Callable[[], object], device: torch.device) -> float:
    """Share of the time of a work in which a kernel or a copy runs on a CUDA device, by torch's profiler."""
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    spans = [
        (event.time_range.start, event.time_range.end)  # in microseconds
        for event in profiler.events() or ()
        if event.device_type == torch._C._autograd.DeviceType.CUDA
    ]
    return covered(spans) / 1e6 / seconds


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def alternating(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device | None = None
) -> dict[str, float]:
    """Median seconds of each work, after one round to warm up; rounds alternate so that noise hits all alike.

    On a CUDA device, the time until the device has finished.
    """
    on_cuda = device is not None and device.type == "cuda"
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if on_cuda:
                torch.cuda.synchronize(device)
            if number:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def objectives(catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    """Every strategy that has a loss and works without an edit: its name to the settings under which it does."""
    found: dict[str, dict[str, Any]] = {}
    for name in catalogue.strategies:
        strategy = catalogue.strategies[name]
        if not hasattr(strategy, "loss"):
            continue
        if not _edits(strategy):
            found[name] = {}
        elif "path" in strategy.Config.model_fields:
            found[name] = {"path": False}
    return found


def objective_costs(study: StudySettings, catalogue: Catalogue, rounds: int) -> list[str]:
    """A step of each objective alone, with the first adapter before the quantiser and the first after it."""
    names = [name for name in catalogue.strategies if _edits(catalogue.strategies[name])]
    before = next((name for name in names if hasattr(catalogue.strategies[name], "before_vq")), None)
    after = next((n for n in names if "path" not in catalogue.strategies[n].Config.model_fields and n != before), None)
    resources = StudyResources(study, catalogue)
    lines = [f"a training step of each objective alone, batch {study.batch_size} x {study.crop_seconds} s:"]
    for adapter in (before, after):
        if adapter is not None:
            lines += _with(adapter, resources, rounds)
    return lines


def _with(adapter: str, resources: StudyResources, rounds: int) -> list[str]:
    default = ArmSettings().objectives[0]
    lines, works, counted = [], dict[str, Callable[[], object]](), dict[str, str]()
    with TemporaryDirectory() as folder:
        for name, settings in objectives(resources.catalogue).items():
            settings_of_arm = ArmSettings(strategies=(adapter,), objectives=(name,), settings={name: settings})
            try:
                arm = Arm.new(settings_of_arm, 0, Path(folder) / name, resources)
            except UserError as refusal:
                lines.append(f"  {adapter}, {name}: {refusal}")
                continue
            counted[name] = passes(arm, resources)
            works[name] = _step(arm, resources)
        taken = alternating(works, rounds, resources.device)
    first = taken.get(default)
    for name, seconds in taken.items():
        ratio = f" ({seconds / first:.2f} x {default})" if first and name != default else ""
        lines.append(f"  {adapter}, {name}: {seconds:.3f} s{ratio}; {counted[name]}")
    return lines


def _step(arm: Arm, resources: StudyResources) -> Callable[[], object]:
    batch = resources.draw(USUAL_STEP, resources.batches(0), arm.sampler)

    def step() -> None:
        again = replace(batch, frozen=FrozenActivations(resources.codec, batch.frozen.audio))
        train_step([arm], [again], resources.context).checked()

    return step


def _edits(strategy: Any) -> bool:
    return any(hasattr(strategy, hook) for hook in ("before_vq", "after_vq"))
