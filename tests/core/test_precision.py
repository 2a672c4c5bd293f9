"""Half precision: what follows the model's dtype, and what stays in float32."""

from __future__ import annotations

import pytest
import torch
from small_codec import small
from toy_strategies import SPEAKER_DIM, Gain, Shift, learned, speakers

from snac_core import SNAC, ConditionedCodec
from snac_core.testing.fixtures import speech_like

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
def test_embeddings_follow_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model, audio, target = learned(Shift, Gain).to(dtype), torch.randn(1, 1, 240).to(dtype), speakers(1)
    assert target.dtype == torch.float32
    codes = model.encode(audio, target)
    assert model.decode(codes, target).dtype == dtype
    assert model(audio, target)[0].dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_the_search_of_the_quantizer_runs_in_float32(dtype: torch.dtype) -> None:
    """A half-precision latent and half-precision weights give the codes of the same values in float32."""
    half = small(codebook_size=512).quantizer.to(dtype)
    whole = small(codebook_size=512).quantizer
    whole.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    z = torch.randn(2, 16, 96).to(dtype)
    z_q, codes = half(z)
    expected_z_q, expected = whole(z.float())
    assert all(torch.equal(a, b) for a, b in zip(codes, expected, strict=True))
    assert z_q.dtype == dtype
    torch.testing.assert_close(z_q, expected_z_q.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(whole(z.float())[1], expected, strict=True))


def test_float16_changes_few_codes_of_tiny_and_bfloat16_more() -> None:
    """The search runs in float32: these changes come from the encoder."""
    codec, audio = SNAC.from_pretrained("tiny").freeze(), speech_like(16000, 3.0, 1)
    expected = torch.cat([level.flatten() for level in codec.encode(audio)])
    changed = {}
    for dtype in HALF:
        half = SNAC.from_pretrained("tiny").to(dtype).freeze()
        got = torch.cat([level.flatten() for level in half.encode(audio.to(dtype))])
        changed[dtype] = float((got != expected).float().mean())
    assert changed[torch.float16] < 0.06
    assert changed[torch.float16] < changed[torch.bfloat16] < 0.4


def test_a_model_in_double_precision_computes_in_double_precision() -> None:
    model = ConditionedCodec(small().double(), [Shift], speaker_dim=SPEAKER_DIM).double()
    audio = torch.randn(1, 1, 240, dtype=torch.float64)
    assert model.reconstruct(audio).z_q.dtype == torch.float64
