"""Encoders whose released weights come from a hub: structure and behaviour, with random weights."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_core.speakers import ecapa
from snac_core.speakers.ecapa import ECAPATDNN, SpeechBrainFbank
from snac_core.speakers.encoder import load_speaker_encoder


def test_ecapa_has_the_size_of_the_released_model() -> None:
    with torch.device("meta"):
        network = ECAPATDNN()
    assert sum(p.numel() for p in network.parameters()) == 20_767_552
    names = list(network.state_dict())
    for name in (
        "blocks.0.conv.conv.weight",
        "blocks.1.res2net_block.blocks.6.norm.norm.running_var",
        "blocks.3.se_block.conv2.conv.bias",
        "mfa.norm.norm.weight",
        "asp.tdnn.conv.conv.weight",
        "asp_bn.norm.running_mean",
        "fc.conv.bias",
    ):
        assert name in names


def test_the_features_of_ecapa_ignore_level_and_reach_at_most_80_db_down() -> None:
    audio = 0.1 * torch.randn(2, 8000, generator=generator("ecapa features"))
    audio[:, 4000:] *= 1e-3
    features = SpeechBrainFbank()(audio)
    assert features.shape == (2, 80, 51)
    assert torch.allclose(features, SpeechBrainFbank()(4 * audio), atol=1e-3)
    assert features.mean(-1).abs().max() < 1e-3
    assert (features.amax(-1) - features.amin(-1)).max() <= 80


def test_ecapa_loads_its_weights_and_is_differentiable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = partial(ECAPATDNN, channels=16, pooled=24)
    monkeypatch.setattr(ecapa, "ECAPATDNN", narrow)
    torch.save(narrow().state_dict(), tmp_path / "embedding_model.ckpt")
    encoder = load_speaker_encoder("ecapa", weights=tmp_path / "embedding_model.ckpt").double()
    audio = (0.1 * torch.randn(2, 1, 8000, generator=generator("ecapa"), dtype=torch.float64)).requires_grad_()
    embedding = encoder(audio, 16000)
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(embedding[1:], encoder(audio[1:], 16000))
    goal = torch.randn(embedding.shape, generator=generator("goal"), dtype=torch.float64)
    gradient = torch.autograd.grad((embedding * goal).sum(), audio)[0]
    direction = torch.randn(audio.shape, generator=generator("direction"), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (encoder(audio + step * direction, 16000) for step in (1e-9, -1e-9))
    slope = (((ahead - behind) * goal).sum() / 2e-9).item()
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


def test_ecapa_without_weights_says_what_to_download_and_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr(ecapa, "ECAPATDNN", partial(ECAPATDNN, channels=16, pooled=24))
    with pytest.raises(UserError, match=r"download embedding_model\.ckpt of speechbrain/.* use 'ecapa_tiny' or 'ge2e'"):
        load_speaker_encoder("ecapa")


@pytest.mark.slow
def test_ecapa_computes_what_the_speechbrain_package_computes() -> None:
    models = pytest.importorskip("speechbrain.lobes.models.ECAPA_TDNN", reason="needs speechbrain, the oracle")
    from speechbrain.lobes.features import Fbank
    from speechbrain.processing.features import InputNormalization

    widths = [1024, 1024, 1024, 1024, 3072]
    oracle = models.ECAPA_TDNN(80, channels=widths, kernel_sizes=[5, 3, 3, 3, 1], dilations=[1, 2, 3, 4, 1]).eval()
    for layer in oracle.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    ours = ECAPATDNN().eval()
    ours.load_state_dict(oracle.state_dict(), strict=True)
    features, normalise = Fbank(n_mels=80), InputNormalization(norm_type="sentence", std_norm=False)
    audio = 0.1 * torch.randn(3, 16123) * torch.linspace(0.001, 1, 16123)
    with torch.no_grad():
        expected_features = normalise(features(audio), torch.ones(3))
        assert torch.allclose(SpeechBrainFbank()(audio), expected_features.transpose(1, 2), atol=1e-4)
        expected = oracle(expected_features, torch.ones(3))[:, 0]
        assert torch.allclose(ours(SpeechBrainFbank()(audio)), expected, atol=1e-4)


def test_wavlm_without_transformers_says_what_to_install_and_what_to_use_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"install snac-conditioning\[hub-judges\]; without it, use 'ecapa_tiny'"):
        load_speaker_encoder("wavlm_sv")


def test_wavlm_is_differentiable_and_hears_each_item_by_itself(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[16] * 7,
        tdnn_dim=[16] * 5, xvector_output_dim=24, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.WavLMForXVector(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    encoder = load_speaker_encoder("wavlm_sv", weights=tmp_path / "model.safetensors")
    audio = (0.1 * torch.randn(2, 1, 9600)).requires_grad_()
    embedding = encoder(audio, 16000)
    assert embedding.shape == (2, 24)
    assert torch.allclose(embedding[1:], encoder(audio[1:], 16000), atol=1e-5)
    embedding[:, 0].sum().backward()
    assert audio.grad is not None
    assert audio.grad.isfinite().all()
    assert encoder(torch.randn(1, 1, 6400), 16000).isfinite().all()
