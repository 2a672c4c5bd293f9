"""An adapter that predicts codes: what it chooses, what it writes into the latent, and how it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from snac_core import SNAC, ConditionedCodec, Conditioning, UserError
from snac_core.codec.streaming import EncoderStream
from snac_core.codec.vq import CodeWriter, VectorQuantize
from snac_core.conditioning import REFERENCE, REFERENCE_SECONDS
from snac_core.seeding import generator
from snac_core.testing import Fixtures, small_codec
from snac_core.testing.probes import perturbed

NAME = "phase6_encoder_adapter"
SPEAKER_DIM = 8


@pytest.fixture(scope="module")
def fixtures() -> Fixtures:
    return Fixtures(small_codec(), SPEAKER_DIM)


def predicting(fixtures: Fixtures, *objectives: str, source_bias: float = 0.0, heads: int = 0) -> ConditionedCodec:
    torch.manual_seed(0)
    settings = {"adapter_type": "codes", "hidden_dim": 16, "dilations": (1, 2), "attention_heads": heads}
    config = {NAME: {**settings, "source_bias": source_bias}}
    return ConditionedCodec(fixtures.codec, [NAME, *objectives], speaker_dim=SPEAKER_DIM, config=config)


def random_codes(fixtures: Fixtures, frames: int) -> list[Tensor]:
    quantizer = fixtures.codec.quantizer
    return [
        torch.randint(len(level.codebook.weight), (2, frames // level.stride))
        for level in quantizer.quantizers
        if isinstance(level, VectorQuantize)
    ]


def test_the_quantizer_chooses_written_codes_and_no_smaller_correction_would_do(fixtures: Fixtures) -> None:
    quantizer, writer = fixtures.codec.quantizer, CodeWriter(fixtures.codec.quantizer)
    frames = 3 * quantizer.vq_strides[0]
    codes, z = random_codes(fixtures, frames), torch.randn(2, fixtures.codec.latent_dim, frames)
    entries = [
        level.codebook(chosen).transpose(1, 2) for level, chosen in zip(quantizer.quantizers, codes, strict=True)
    ]
    with torch.no_grad():
        written = writer(z, entries)
        assert all(map(torch.equal, quantizer(written)[1], codes))

        def encodings(change: Tensor) -> Tensor:  # linear: the parts that are subtracted cancel
            levels = quantizer.quantizers
            return torch.cat([(level.project(change) - level.project(0 * change)).flatten() for level in levels])

        # a direction without effect on any encoding is orthogonal to the least correction
        edit = (written - z)[:1, :, : quantizer.vq_strides[0]].double()
        columns = torch.eye(edit.numel()).view(-1, 1, *edit.shape[1:])
        matrix = torch.stack([encodings(column) for column in columns], dim=1).double()
        least = torch.linalg.lstsq(matrix, matrix @ edit.flatten(), driver="gelsd").solution
    assert torch.allclose(least, edit.flatten(), atol=1e-4)


def test_a_new_adapter_is_the_identity_and_gives_every_parameter_a_gradient(fixtures: Fixtures) -> None:
    model = predicting(fixtures, "code_prediction")
    bare, out = (model.reconstruct(fixtures.audio, cond) for cond in (None, Conditioning(torch.ones(1, SPEAKER_DIM))))
    assert torch.equal(bare.z, out.z)
    step = fixtures.step(model.train(), 1)
    terms = [term for _, loss in model.callers("loss") for term in loss(step=step).values()]
    torch.stack(terms).sum().backward()
    heads = [p.grad for name, p in model.trained_parameters() if ".heads." in name]
    assert heads
    assert all(grad is not None and grad.abs().max() > 0 for grad in heads)
    model.zero_grad()
    out.audio.square().mean().backward()  # a loss on the decoded audio reaches the choice of every level
    assert all(p.grad.abs().max() > 0 for name, p in model.trained_parameters() if ".heads." in name)


def test_the_codes_are_the_most_probable_ones_given_the_coarser(fixtures: Fixtures) -> None:
    model = perturbed(predicting(fixtures), seed=1).eval()
    cond = Conditioning(torch.randn(len(fixtures.audio), SPEAKER_DIM))
    with torch.no_grad():
        bare, out = model.latents(fixtures.audio), model.latents(fixtures.audio, cond)
        ((_, code_logits),) = model.callers("code_logits")
        logits = code_logits(x=bare.z, cond=cond, codes=out.codes)
    assert any(not torch.equal(*codes) for codes in zip(bare.codes, out.codes, strict=True))
    assert all(torch.equal(level.argmax(1), codes) for level, codes in zip(logits, out.codes, strict=True))


def test_a_bias_keeps_codes_of_the_source(fixtures: Fixtures) -> None:
    kept = []
    for bias in (0.0, 5.0, 1e6):
        model = perturbed(predicting(fixtures, source_bias=bias), seed=1).eval()
        with torch.no_grad():
            bare = model.latents(fixtures.audio)
            out = model.latents(fixtures.audio, Conditioning(torch.ones(1, SPEAKER_DIM)))
        kept.append(sum(int((a == b).sum()) for a, b in zip(bare.codes, out.codes, strict=True)))
    assert kept[0] < kept[1] < kept[2]
    assert torch.equal(bare.z, out.z)


def test_the_edit_scale_multiplies_what_the_network_adds_to_the_logits(fixtures: Fixtures) -> None:
    cond = Conditioning(torch.randn(len(fixtures.audio), SPEAKER_DIM))
    model = perturbed(predicting(fixtures), seed=1).eval()
    same = perturbed(predicting(fixtures), seed=1).eval()  # the most probable code does not depend on a common factor
    log_scales = same.attached[NAME].adapters["latent"].log_scales
    kept = []
    for scale in (0.0, 0.5, 1.0, 2.0):
        model.edit_scale = scale
        with torch.no_grad():
            bare, out = model.latents(fixtures.audio), model.latents(fixtures.audio, cond)
            if scale:
                log_scales.copy_(model.attached[NAME].adapters["latent"].log_scales - math.log(scale))
                assert all(map(torch.equal, same.latents(fixtures.audio, cond).codes, out.codes))
        kept.append(sum(int((a == b).sum()) for a, b in zip(bare.codes, out.codes, strict=True)))
        if not scale:
            assert torch.equal(bare.z, out.z)
    assert kept[0] > kept[1] > kept[2] > kept[3]


def test_no_frame_sees_further_than_the_receptive_field(fixtures: Fixtures) -> None:
    strategy = perturbed(predicting(fixtures), seed=1).attached[NAME]
    adapter, speaker = strategy.adapters["latent"], torch.randn(1, SPEAKER_DIM)
    (tap,) = (tap for tap in fixtures.codec.taps if tap.name == "latent")
    reach = int(strategy.receptive_field(tap))
    stride = fixtures.codec.vq_strides[0]
    frames = (2 * reach // stride + 3) * stride
    seen = 0
    for place in range(frames // 2, frames // 2 + stride):
        latent = torch.randn(1, fixtures.codec.latent_dim, frames)
        changed = latent.clone()
        changed[..., place] *= -3
        with torch.no_grad():
            differs = (adapter(changed, speaker) - adapter(latent, speaker)).abs().amax((0, 1)) > 1e-5
        seen = max(seen, int(differs.nonzero().flatten().sub(place).abs().max()))
    assert 0 < seen <= reach


def test_long_audio_in_chunks_has_the_codes_of_the_whole(fixtures: Fixtures) -> None:
    model = perturbed(predicting(fixtures), seed=1).eval()
    audio, cond = 0.1 * torch.randn(1, 1, 3 * 16000), fixtures.conditioning(1)
    with torch.no_grad():
        whole = model.encode(audio, cond)
        parts = list(EncoderStream(model, cond, seconds=0.3).run(audio.split(7000, dim=-1)))
    streamed = [torch.cat(level, dim=-1) for level in zip(*parts, strict=True)]
    same = [float((a == b).float().mean()) for a, b in zip(streamed, whole, strict=True)]
    assert min(same) > 0.99  # convolutions of another length round differently


@pytest.mark.parametrize("heads", [0, 2])
def test_with_autocast_a_new_adapter_has_the_codes_of_the_bare_codec(heads: int) -> None:
    codec = SNAC.from_pretrained("tiny")
    config = {NAME: {"adapter_type": "codes", "hidden_dim": 16, "attention_heads": heads}}
    model = ConditionedCodec(codec, [NAME], speaker_dim=SPEAKER_DIM, config=config).eval()
    audio, speech = 0.1 * torch.randn(1, 1, 16000), torch.randn(1, 1, 2 * 16000)
    cond = model.target(torch.nn.functional.normalize(torch.randn(1, SPEAKER_DIM)), speech)
    with torch.no_grad(), codec.computing(autocast=torch.bfloat16):
        bare, edited = model.latents(audio), model.latents(audio, cond)
        assert torch.equal(bare.z, edited.z)
        assert all(map(torch.equal, bare.codes, edited.codes))


def test_it_computes_in_half_precision() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)  # its own: the weights are changed
    model = perturbed(predicting(fixtures), seed=1).eval().to(torch.bfloat16)
    with torch.no_grad():
        out = model.latents(fixtures.audio.bfloat16(), Conditioning(torch.ones(1, SPEAKER_DIM)))
    assert out.z.dtype == torch.bfloat16
    assert out.z.isfinite().all()


def test_it_learns_codes_that_depend_on_the_speaker(fixtures: Fixtures) -> None:
    model = predicting(fixtures)
    adapter = model.attached[NAME].adapters["latent"]
    frames = 4 * fixtures.codec.vq_strides[0]
    codes = random_codes(fixtures, frames)
    z = torch.randn(1, fixtures.codec.latent_dim, frames).expand(2, -1, -1)
    speakers = torch.nn.functional.normalize(torch.randn(2, SPEAKER_DIM), dim=1)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(150):
        logits = adapter.code_logits(z, speakers, codes)
        levels = zip(logits, codes, strict=True)
        loss = torch.stack([torch.nn.functional.cross_entropy(*level) for level in levels]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = fixtures.codec.quantizer(adapter(z, speakers))[1]
    assert all(map(torch.equal, found, codes))


def test_with_attention_the_codes_depend_on_speech_of_the_target_as_well(fixtures: Fixtures) -> None:
    model = perturbed(predicting(fixtures, heads=2), seed=1).eval()
    cond, audio = fixtures.conditioning(len(fixtures.audio)), fixtures.audio
    other = fixtures.speech(torch.arange(len(audio)) + 1)
    with torch.no_grad():
        codes, again, changed = (
            model.encode(audio, Conditioning(cond.speaker, {REFERENCE: speech}))
            for speech in (cond.extras[REFERENCE], cond.extras[REFERENCE].clone(), other)
        )
        alone = model.encode(audio[:1], cond.first(1))
    assert all(map(torch.equal, codes, again))
    assert any(not torch.equal(*levels) for levels in zip(codes, changed, strict=True))
    assert all(torch.equal(level[:1], one) for level, one in zip(codes, alone, strict=True)), "items do not mix"


def test_attention_has_a_gradient_and_a_new_adapter_is_the_identity(fixtures: Fixtures) -> None:
    model = predicting(fixtures, "code_prediction", heads=2)
    audio, cond = fixtures.audio, fixtures.conditioning(len(fixtures.audio))
    assert torch.equal(model.reconstruct(audio, cond).z, model.reconstruct(audio).z)
    adapter = perturbed(model, seed=1).attached[NAME].adapters["latent"]
    codes, latent = model.latents(audio).codes, model.latents(audio).z
    logits = adapter.code_logits(latent, cond.speaker, codes, cond.extras[REFERENCE])
    torch.stack([level.square().mean() for level in logits]).sum().backward()
    grads = {name: p.grad for name, p in adapter.attention.named_parameters()}
    assert grads
    assert all(grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in grads.values())


def test_a_model_says_what_it_needs_and_prepares_it(fixtures: Fixtures) -> None:
    model = perturbed(predicting(fixtures, heads=2), seed=1).eval()
    cond, audio = fixtures.conditioning(1), fixtures.audio[:1]
    assert model.extras == {REFERENCE}
    with pytest.raises(UserError, match=r"needs reference beside the speaker embedding; give model.target\("):
        model(audio, cond.speaker)
    speech = 0.1 * torch.randn(1, 1, 16000, generator=generator("speech"))
    target = model.target(cond.speaker, speech)
    frames = -(-16000 // model.codec.hop_length)
    latent = model.codec.advance(model.codec.preprocess(speech), None, "latent")
    assert torch.equal(target.extras[REFERENCE], latent[..., :frames])
    longer = model.target(cond.speaker, speech.repeat(1, 1, 20)).extras[REFERENCE]
    assert longer.shape[-1] == -(-int(REFERENCE_SECONDS * 16000) // model.codec.hop_length)
    assert model(audio, target)[0].shape == audio.shape
    for wrong in (speech[0], speech.double(), torch.full_like(speech, float("nan")), speech.repeat(2, 1, 1)):
        with pytest.raises(UserError):
            model.target(cond.speaker, wrong)
    with pytest.raises(UserError, match=r"'reference' is a latent of the codec, .* got \(1, 2, 9\)"):
        model(audio, Conditioning(cond.speaker, {REFERENCE: torch.randn(1, 2, 9)}))
    without = predicting(fixtures)
    assert not without.extras
    assert without.target(cond.speaker, speech).extras == {}


def test_attention_is_refused_where_it_does_not_fit(fixtures: Fixtures) -> None:
    with pytest.raises(UserError, match="attention_heads belongs to adapter_type = 'codes'; 'conv' has none"):
        ConditionedCodec(fixtures.codec, [NAME], speaker_dim=8, config={NAME: {"attention_heads": 2}})
    with pytest.raises(UserError, match="hidden_dim = 16; expected a multiple of attention_heads = 3"):
        predicting(fixtures, heads=3)


def test_the_codes_of_a_voice_are_found_in_its_speech(fixtures: Fixtures) -> None:
    """Two voices with one embedding: only their speech tells which codes to choose."""
    adapter = predicting(fixtures, heads=2).attached[NAME].adapters["latent"]
    frames = 4 * fixtures.codec.vq_strides[0]
    codes = random_codes(fixtures, frames)
    z = torch.randn(1, fixtures.codec.latent_dim, frames).expand(2, -1, -1)
    speaker = torch.nn.functional.normalize(torch.randn(1, SPEAKER_DIM), dim=1).expand(2, -1)
    speech = fixtures.speech(torch.arange(2))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(150):
        levels = zip(adapter.code_logits(z, speaker, codes, speech), codes, strict=True)
        loss = torch.stack([torch.nn.functional.cross_entropy(*level) for level in levels]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = fixtures.codec.quantizer(adapter(z, speaker, speech))[1]
    assert all(map(torch.equal, found, codes))
