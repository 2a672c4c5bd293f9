"""From wav to wav, and by way of codes on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small_study import PHASES, Bench, contents, runner

from snac_core.augment import change_voice
from snac_core.codec import SNAC
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.config import NOISE_SEED
from snac_runner.convert import Converter
from snac_runner.embeddings import two_voices


def read(path: Path) -> np.ndarray:
    """Samples of a mono file."""
    samples, rate = soundfile.read(path)
    assert rate == 16000
    assert samples.ndim == 1
    return samples


@pytest.mark.parametrize("name", PHASES)
def test_a_conversion_has_the_sources_length_and_the_codecs_rate(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], name: str
) -> None:
    command = ["convert", "--run", runs[name], "--source", voices[0]]
    outputs = []
    for number, target in enumerate(voices[1:3]):
        out = tmp_path / f"{number}.wav"
        assert runner(*command, "--target", target, "--out", out) == 0
        outputs.append(read(out))
        assert len(outputs[-1]) == len(read(voices[0]))
    assert not np.array_equal(*outputs)  # the target matters
    assert runner(*command, "--target", voices[1], "--out", tmp_path / "again.wav") == 0
    assert (tmp_path / "again.wav").read_bytes() == (tmp_path / "0.wav").read_bytes()


def test_edits_of_scale_0_are_the_bare_codec(tmp_path: Path, runs: dict[str, Path], voices: list[Path]) -> None:
    command = ["convert", "--run", runs[PHASES[2]], "--source", voices[0], "--target", voices[1], "--stages"]
    for scale in (0, 1):
        assert runner(*command, "--edit-scale", scale, "--out", tmp_path / f"{scale}.wav") == 0
    bare = read(tmp_path / "1.bare.wav")
    assert np.allclose(read(tmp_path / "0.wav"), bare, atol=1e-4)
    assert not np.allclose(read(tmp_path / "1.wav"), bare, atol=1e-2)
    assert runner(*command, "--edit-scale", -1, "--out", tmp_path / "c.wav") == 2
    assert runner("encode", "--source", voices[0], "--edit-scale", 2, "--out", tmp_path / "c.npz") == 2


def test_several_targets_are_averaged_and_their_order_is_no_matter(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path]
) -> None:
    converter = Converter(runs[PHASES[1]], "cpu")
    one, two = (converter.target([voice]).speaker for voice in voices[1:3])
    both = converter.target(voices[1:3])
    back = converter.target(voices[2:0:-1])
    assert torch.allclose(both.speaker, back.speaker, atol=1e-6)
    assert both.speaker.norm() == pytest.approx(1, abs=1e-5)
    lengths = [soundfile.info(voice).frames for voice in voices[1:3]]
    mean = torch.nn.functional.normalize(one * lengths[0] + two * lengths[1], dim=1)
    assert torch.allclose(both.speaker, mean, atol=1e-5)


def test_stages_are_written_beside_the_conversion(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "c.wav"
    command = ["convert", "--run", runs[PHASES[2]], "--source", voices[0], "--target", voices[1], "--out", out]
    assert runner(*command, "--stages") == 0
    written = sorted(path.name for path in out.parent.iterdir())
    assert written == ["c.bare.wav", "c.identity.wav", "c.source.wav", "c.synthetic.wav", "c.wav"]
    parts = ("source", "bare", "identity", "synthetic")
    message = capsys.readouterr().out.splitlines()
    assert message == [str(out), *(str(out.with_name(f"c.{part}.wav")) for part in parts)]
    assert np.allclose(read(out.with_name("c.source.wav")), read(voices[0]), atol=2 / 32768)
    assert len({len(read(path)) for path in out.parent.iterdir()}) == 1
    # the synthetic stage is another voice made of the source, converted back to the source's own
    source = torch.from_numpy(read(voices[0])).float().view(1, 1, -1)
    moved = change_voice(source, 16000, torch.tensor([2.0]), torch.tensor([1.1]))[0, 0].numpy()
    soundfile.write(tmp_path / "moved.wav", moved, 16000, subtype="FLOAT")
    back = tmp_path / "back.wav"
    assert runner("convert", "--run", runs[PHASES[2]], "--source", tmp_path / "moved.wav", "--target", voices[0],
                  "--out", back) == 0  # fmt: skip
    assert np.allclose(read(back), read(out.with_name("c.synthetic.wav")), atol=2 / 32768)


def test_sources_of_another_rate_and_in_stereo_are_converted(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path]
) -> None:
    tone = 0.1 * np.sin(np.arange(8000 * 2) / 8000 * 2 * np.pi * 200)
    soundfile.write(tmp_path / "s.wav", np.stack([tone, tone], axis=1), 8000)
    out = tmp_path / "c.wav"
    assert runner("convert", "--run", runs[PHASES[1]], "--source", tmp_path / "s.wav", "--target", voices[1],
                  "--out", out) == 0  # fmt: skip
    assert len(read(out)) == 2 * 16000


def test_codes_conditioned_before_vq_decode_to_the_conversion(
    bench: Bench, tmp_path: Path, runs: dict[str, Path], voices: list[Path]
) -> None:
    run, codes = runs[PHASES[2]], tmp_path / "codes.safetensors"
    aim = ["--run", run, "--source", voices[0], "--target", voices[1]]
    assert runner("encode", *aim, "--out", codes) == 0
    assert runner("decode", "--base", bench.base, "--codes", codes, "--out", tmp_path / "d.wav") == 0  # a bare decoder
    assert runner("convert", *aim, "--out", tmp_path / "c.wav") == 0
    assert np.allclose(read(tmp_path / "d.wav"), read(tmp_path / "c.wav"), atol=2 / 32768)
    assert runner("encode", "--base", bench.base, "--source", voices[0], "--out", tmp_path / "bare.safetensors") == 0
    with safe_open(codes, framework="pt") as ours, safe_open(tmp_path / "bare.safetensors", framework="pt") as bare:
        assert ours.keys() == bare.keys()
        assert any(not torch.equal(ours.get_tensor(key), bare.get_tensor(key)) for key in ours.keys())  # noqa: SIM118


def test_codes_conditioned_after_vq_are_the_sources_and_the_voice_is_given_to_decode(
    bench: Bench, tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    run, codes = runs[PHASES[1]], tmp_path / "codes.safetensors"
    message = refusal("encode", "--run", run, "--source", voices[0], "--target", voices[1], "--out", codes)
    assert "acts only after VQ" in message
    assert "give it to decode" in message
    assert not codes.exists()
    assert runner("encode", "--run", run, "--source", voices[0], "--out", codes) == 0
    assert runner("decode", "--run", run, "--codes", codes, "--target", voices[1], "--out", tmp_path / "d.wav") == 0
    aim = ["--run", run, "--source", voices[0], "--target", voices[1]]
    assert runner("convert", *aim, "--out", tmp_path / "c.wav") == 0
    assert np.allclose(read(tmp_path / "d.wav"), read(tmp_path / "c.wav"), atol=2 / 32768)
    bare = ["--out", tmp_path / "bare.wav"], ["--out", tmp_path / "bare.npz"]
    assert "the run acts when you decode; give --target" in refusal("decode", "--run", run, "--codes", codes, *bare[0])
    before = ["encode", "--run", runs[PHASES[2]], "--source", voices[0], *bare[1]]
    assert "the run acts when you encode; give --target" in refusal(*before)
    message = refusal("decode", "--run", runs[PHASES[2]], "--codes", codes, "--target", voices[1], "--out", "x.wav")
    assert "acts only before VQ" in message
    assert "give it to encode" in message


def test_codes_of_another_base_or_of_nothing_are_refused(
    bench: Bench, tmp_path: Path, voices: list[Path], refusal: Callable[..., str]
) -> None:
    codes = tmp_path / "codes.safetensors"
    assert runner("encode", "--base", bench.base, "--source", voices[0], "--out", codes) == 0
    assert "was encoded with a base of digest" in refusal("decode", "--codes", codes, "--out", tmp_path / "d.wav")
    data = codes.read_bytes()
    codes.write_bytes(data[: len(data) // 2])
    assert "is not a file of codes" in refusal("decode", "--codes", codes, "--base", bench.base, "--out", "d.wav")
    save_file({"codes_0": torch.zeros(1, 4, dtype=torch.int32)}, codes)
    assert "is not a file of codes" in refusal("decode", "--codes", codes, "--base", bench.base, "--out", "d.wav")
    assert "is not a file of codes" in refusal(
        "decode", "--codes", tmp_path / "gone", "--base", bench.base, "--out", "d.wav"
    )
    digest = SNAC.from_pretrained(str(bench.base)).digest
    about = {"format": "snac-codes 1", "base": digest, "length": "100"}
    save_file({"codes_0": torch.full((1, 4), 999, dtype=torch.int32)}, codes, metadata=about)
    refusal("decode", "--codes", codes, "--base", bench.base, "--out", tmp_path / "d.wav")
    save_file({"codes_0": torch.zeros(1, 4, dtype=torch.int32)}, codes, metadata={"format": "snac-codes 1"})
    refusal("decode", "--codes", codes, "--base", bench.base, "--out", tmp_path / "d.wav")


def test_audio_that_cannot_be_used_is_named(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", np.zeros(2), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    run = ["convert", "--run", runs[PHASES[1]], "--out", tmp_path / "c.wav"]
    for name in ("gone.wav", "text.wav"):
        assert name in refusal(*run, "--source", tmp_path / name, "--target", voices[0])
        assert name in refusal(*run, "--source", voices[0], "--target", tmp_path / name)
    assert "short.wav" in refusal(*run, "--source", voices[0], "--target", tmp_path / "short.wav")
    assert "silent.wav" in refusal(*run, "--source", voices[0], "--target", tmp_path / "silent.wav")
    assert not (tmp_path / "c.wav").exists()


class Constant(SpeakerEncoder):
    """The embedding of a voice is the mean of its audio along one axis; samples beside the mean are noise."""

    name, dim, sample_rate, min_samples = "constant", 202, 1000, 1

    def __init__(self) -> None:
        super().__init__()
        self.freeze()

    def embed(self, audio: torch.Tensor) -> torch.Tensor:
        voice = audio.mean(-1, keepdim=True).round()  # 0 or 1
        return torch.cat([4 * voice, 4 * (1 - voice), audio[:, :200] - voice], dim=-1)


def speech(rng: torch.Generator, voice: int, seconds: int) -> torch.Tensor:
    """Audio of a voice (1, T) for the encoder above."""
    return voice + 0.3 * torch.randn(1, 1000 * seconds, generator=rng)


@given(seed=st.integers(0, 1000), seconds=st.sampled_from([8, 20, 80]))
def test_speech_of_two_speakers_is_told_from_that_of_one(seed: int, seconds: int) -> None:
    rng, encoder = torch.Generator().manual_seed(seed), Constant()
    one, other = speech(rng, 0, seconds), speech(rng, 1, seconds)
    assert two_voices(encoder, [one]) == []
    assert two_voices(encoder, [one[:, :3000], other[:, :3000]]) == []  # too short to tell
    assert two_voices(encoder, [one, other[:, :2000]]) == []  # one part that differs is not a speaker
    assert two_voices(encoder, [one, other]) in ([0], [1])  # the halves are equally long
    assert two_voices(encoder, [one, other, one]) == [1]
    assert two_voices(encoder, [torch.cat([one, other], dim=-1)]) == [0]


def test_a_target_of_two_speakers_is_converted_with_a_warning(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("snac_runner.convert.two_voices", lambda encoder, audio: [1])
    command = ["convert", "--run", runs[PHASES[2]], "--source", voices[0], "--out", tmp_path / "c.wav"]
    assert runner(*command, "--target", voices[1], "--target", voices[2]) == 0
    said = capsys.readouterr().err
    assert "two speakers" in said
    assert str(voices[2]) in said
    assert str(voices[1]) not in said
    assert (tmp_path / "c.wav").is_file()


def test_a_target_without_a_run_is_an_error(
    bench: Bench, tmp_path: Path, voices: list[Path], refusal: Callable[..., str]
) -> None:
    message = refusal(
        "encode",
        "--base",
        bench.base,
        "--source",
        voices[0],
        "--target",
        voices[1],
        "--out",
        tmp_path / "c.safetensors",
    )
    assert "give it with --run RUN" in message


def test_a_run_whose_base_has_changed_is_refused(
    bench: Bench, tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    shutil.copytree(runs[PHASES[1]] / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["base"]["digest"] = "0" * 64
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path)
    message = refusal(
        "convert", "--run", tmp_path, "--source", voices[0], "--target", voices[1], "--out", tmp_path / "c.wav",
        "--base", bench.base,
    )  # fmt: skip
    assert "with digest 000000000000" in message
    assert contents(tmp_path) == before


def test_a_run_whose_base_lies_elsewhere_now_takes_it_from_the_command_line(
    bench: Bench, tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    shutil.copytree(runs[PHASES[1]] / "model", tmp_path / "model")
    command = ["convert", "--run", tmp_path, "--source", voices[0], "--target", voices[1], "--out", tmp_path / "c.wav"]
    assert "was trained on base 'base'" in refusal(*command)
    assert runner(*command, "--base", bench.base) == 0
    expected = tmp_path / "expected.wav"
    assert runner("convert", "--run", runs[PHASES[1]], *command[3:7], "--out", expected) == 0
    assert (tmp_path / "c.wav").read_bytes() == expected.read_bytes()


def test_nothing_that_is_read_is_overwritten_and_only_files_are_written(
    bench: Bench, tmp_path: Path, voices: list[Path], refusal: Callable[..., str]
) -> None:
    source = tmp_path / "source.wav"
    soundfile.write(source, 0.1 * np.sin(np.arange(16_000)), 16_000)
    before = source.read_bytes()
    assert "is also an input" in refusal("decode", "--base", bench.base, "--codes", source, "--out", source)
    assert source.read_bytes() == before
    (tmp_path / "folder.safetensors").mkdir()
    message = refusal("encode", "--base", bench.base, "--source", source, "--out", tmp_path / "folder.safetensors")
    assert "is not a regular file" in message


def test_a_source_that_holds_no_speech_is_refused(bench: Bench, tmp_path: Path, refusal: Callable[..., str]) -> None:
    broken = np.full(16_000, 0.1, dtype=np.float32)
    broken[7] = np.nan
    for samples, words in ((broken, "NaN"), (broken[:2], "at least 0.1 s are needed")):
        source = tmp_path / "source.wav"
        soundfile.write(source, np.nan_to_num(samples) if "0.1" in words else samples, 16_000, subtype="FLOAT")
        message = refusal("encode", "--base", bench.base, "--source", source, "--out", tmp_path / "codes.safetensors")
        assert words in message


@torch.no_grad()
def test_a_file_of_several_chunks_is_converted_encoded_and_decoded_as_the_whole(
    bench: Bench, tmp_path: Path, runs: dict[str, Path], voices: list[Path]
) -> None:
    """45 s with chunks of 10 s: see `snac_core.codec.streaming`."""
    source, codes, out = tmp_path / "long.wav", tmp_path / "codes.safetensors", tmp_path / "c.wav"
    soundfile.write(source, 0.1 * np.random.default_rng(0).standard_normal(45 * 16000), 16000)
    aim = ["--run", runs[PHASES[2]], "--source", source, "--target", voices[1]]
    assert runner("convert", *aim, "--out", out) == 0
    assert runner("encode", *aim, "--out", codes) == 0
    converter = Converter(runs[PHASES[2]], "cpu")
    audio = torch.from_numpy(read(source)).float().view(1, 1, -1)
    with converter.model.codec.fixed_noise(NOISE_SEED):
        whole = converter.model.reconstruct(audio, converter.target(voices[1:2]))
    assert np.abs(read(out) - whole.audio[0, 0].clamp(-1, 1).numpy()).max() < 2 / 32768
    with safe_open(codes, framework="pt") as file:
        for level, expected in enumerate(whole.codes):
            assert torch.equal(file.get_tensor(f"codes_{level}").long(), expected)
    decoded = tmp_path / "d.wav"
    assert runner("decode", "--base", bench.base, "--codes", codes, "--out", decoded) == 0
    assert np.abs(read(decoded) - read(out)).max() <= 2 / 32768


def test_compiled_and_bfloat16_conversions_are_close_to_the_usual_one(
    tmp_path: Path, voices: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert runner("encode", "--source", voices[0], "--out", tmp_path / "codes.npz") == 0
    usual = ["decode", "--codes", tmp_path / "codes.npz", "--out"]
    outputs = {}
    for name, options in {"usual": [], "compiled": ["--compile"], "bf16": ["--precision", "bf16"]}.items():
        assert runner(*usual, tmp_path / f"{name}.wav", *options) == 0
        outputs[name] = read(tmp_path / f"{name}.wav")
    assert np.abs(outputs["compiled"] - outputs["usual"]).max() <= 2**-14, "up to rounding, of 16 bits"
    error = np.square(outputs["bf16"] - outputs["usual"]).sum()
    assert 30 < 10 * np.log10(np.square(outputs["usual"]).sum() / error) < 60


def test_an_unknown_precision_is_refused(
    tmp_path: Path, voices: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner("encode", "--source", voices[0], "--out", tmp_path / "c.npz", "--precision", "bf17") == 2
    assert "no precision 'bf17'" in capsys.readouterr().err
