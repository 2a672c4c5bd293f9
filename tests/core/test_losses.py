"""Loss terms: right gradients, right signs, and nothing that a silent or missing item could break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from snac_core.codec.vq import ResidualVectorQuantize
from snac_core.losses import (
    MultiScaleSTFT,
    code_entropy,
    commitment,
    contrastive,
    cosine_distance,
    margin_ranking,
    mel_distance,
)

ALL = torch.ones(4, 3, dtype=torch.bool)


def units(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, 6, dtype=torch.float64), dim=-1)


def infonce(outputs: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor = ALL) -> Tensor:
    return contrastive(outputs, positives, negatives, mask, temperature=0.2)


def hinge(outputs: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor = ALL) -> Tensor:
    return margin_ranking(outputs, positives, negatives, mask, margin=2.5)  # always active: |d(+) - d(-)| <= 2


def towards(outputs: Tensor, goal: Tensor, share: float = 0.2) -> Tensor:
    return F.normalize(outputs + share * goal, dim=-1)


@pytest.mark.parametrize("loss", [infonce, hinge])
def test_gradients_in_the_outputs_are_those_of_finite_differences(loss: Callable[..., Tensor]) -> None:
    outputs = units(4).requires_grad_(True)
    positives, negatives = units(4), units(4, 3)
    assert gradcheck(lambda o: loss(o, positives, negatives), (outputs,))


def test_gradients_of_cosine_distance_and_spectra_are_those_of_finite_differences() -> None:
    a, b = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), units(3)
    assert gradcheck(cosine_distance, (a, b))
    stft = MultiScaleSTFT((8, 16)).double()
    audio, target = (torch.randn(2, 1, 40, dtype=torch.float64) for _ in range(2))
    assert gradcheck(lambda x: stft(x, target), (audio.requires_grad_(True),))


@pytest.mark.parametrize("loss", [infonce, hinge])
def test_an_output_that_moves_to_its_target_has_less_loss_and_to_a_negative_more(loss: Callable[..., Tensor]) -> None:
    outputs, positives, negatives = units(4), units(4), units(4, 3)
    now = loss(outputs, positives, negatives)
    assert loss(towards(outputs, positives), positives, negatives) < now
    assert loss(towards(outputs, negatives.sum(1)), positives, negatives) > now


@pytest.mark.parametrize("loss", [infonce, hinge])
def test_negatives_that_move_away_lower_the_loss(loss: Callable[..., Tensor]) -> None:
    outputs, positives, negatives = units(4), units(4), units(4, 3)
    away = F.normalize(negatives - 0.3 * outputs.unsqueeze(1), dim=-1)
    assert loss(outputs, positives, away) < loss(outputs, positives, negatives)


def test_the_hinge_rests_once_every_negative_is_farther_by_the_margin() -> None:
    outputs = torch.eye(4, dtype=torch.float64)
    negatives = torch.stack([outputs.roll(k, 0) for k in (1, 2, 3)], dim=1)  # all at distance 1, the positive at 0
    assert margin_ranking(outputs, outputs, negatives, ALL, margin=0.9) == 0
    assert margin_ranking(outputs, outputs, negatives, ALL, margin=1.3) == pytest.approx(0.3)


def test_infonce_is_the_cross_entropy_of_the_positive_among_the_negatives() -> None:
    outputs, positives, negatives = units(4), units(4), units(4, 3)
    logits = torch.stack([(outputs * other).sum(-1) for other in (positives, *negatives.unbind(1))], dim=1) / 0.2
    expected = (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean()
    torch.testing.assert_close(infonce(outputs, positives, negatives), expected)


@pytest.mark.parametrize("loss", [infonce, hinge])
def test_masked_negatives_do_not_count_and_rows_without_any_stay_finite(loss: Callable[..., Tensor]) -> None:
    outputs, positives, negatives = units(4).requires_grad_(True), units(4), units(4, 3)
    mask = ALL.clone()
    mask[:, 2] = False
    changed = negatives.clone()
    changed[:, 2] = units(4)
    assert torch.equal(loss(outputs, positives, negatives, mask), loss(outputs, positives, changed, mask))
    mask[1] = False
    value = loss(outputs, positives, negatives, mask)
    (grad,) = torch.autograd.grad(value, outputs)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert not grad[1].any(), "a row without negatives teaches nothing"
    assert bool((grad[[0, 2, 3]].abs().sum(1) > 0).all()), "and the others are not touched by its absence"
    assert loss(outputs, positives, negatives, torch.zeros_like(ALL)) == 0


@pytest.mark.parametrize("loss", [infonce, hinge])
def test_embeddings_that_are_compared_with_are_never_moved(loss: Callable[..., Tensor]) -> None:
    outputs, positives, negatives = units(4), units(4).requires_grad_(True), units(4, 3).requires_grad_(True)
    assert not loss(outputs, positives, negatives).requires_grad


def test_the_stft_distance_is_zero_for_equal_audio_and_finite_for_silence() -> None:
    stft, audio = MultiScaleSTFT((256, 512)), torch.randn(2, 1, 1000)
    assert stft(audio, audio) == 0
    silent = torch.zeros(2, 1, 1000, requires_grad=True)
    value = stft(silent, audio)
    (grad,) = torch.autograd.grad(value, silent)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert torch.autograd.grad(stft(silent, torch.zeros_like(silent)), silent)[0].isfinite().all()


def test_windows_of_several_lengths_are_compared() -> None:
    stft = MultiScaleSTFT((64, 256))
    assert [stft.magnitudes(torch.randn(1, 1, 1000), n).shape[1] for n in stft.n_ffts] == [33, 129]
    assert stft(torch.zeros(1, 1, 10), torch.zeros(1, 1, 10)) == 0, "audio shorter than a window is padded"


def test_louder_is_farther_in_mel_distance_by_the_level() -> None:
    audio = 0.1 * torch.randn(2, 1, 16000)
    assert mel_distance(audio, audio, 16000).tolist() == [0.0, 0.0]
    torch.testing.assert_close(mel_distance(10 * audio, audio, 16000), torch.ones(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", [infonce, hinge])
def test_several_positives_count_their_mean_and_never_against_each_other(loss: Callable[..., Tensor]) -> None:
    outputs, positives, negatives = units(4), units(4, 2), units(4, 3)
    each = [loss(outputs, positives[:, i], negatives) for i in range(2)]
    torch.testing.assert_close(loss(outputs, positives, negatives), torch.stack(each).mean())


def quantizer(*strides: int, width: int = 4) -> ResidualVectorQuantize:
    """Of double precision, its projections unit matrices, so that entries and latents are of one space."""
    made = ResidualVectorQuantize(width, 16, width, strides).double()
    with torch.no_grad():
        for level in made.quantizers:
            for projection in (level.in_proj, level.out_proj):
                norm = projection.parametrizations["weight"]
                norm.original0.fill_(1)
                norm.original1.copy_(torch.eye(width).unsqueeze(-1))
                projection.bias.zero_()
    return made.requires_grad_(False)


def test_commitment_is_zero_on_the_entries_and_the_square_of_the_way_from_them() -> None:
    made = quantizer(1)
    codes = torch.randint(16, (3, 10))
    entries = made.from_codes([codes])
    assert commitment(made, entries, [codes]) == pytest.approx(0, abs=1e-20)
    for scale in (0.0, 2.0, -1.0):
        assert float(commitment(made, scale * entries, [codes])) == pytest.approx((scale - 1) ** 2)


def test_commitment_pulls_a_latent_to_what_it_was_quantized_to_and_moves_no_entry() -> None:
    made = quantizer(2, 1)
    z = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    _, codes = made(z)
    assert gradcheck(lambda latent: commitment(made, latent, codes), (z,))
    before = commitment(made, z, codes)
    before.backward()
    assert z.grad is not None
    assert commitment(made, z - 0.5 * z.grad, codes) < before
    unfrozen = made.requires_grad_(True)
    commitment(unfrozen, z.detach(), codes).backward()
    assert all(parameter.grad is None for name, parameter in made.named_parameters() if "codebook" in name)


def test_code_entropy_is_that_of_a_softmax_over_cosines_level_by_level() -> None:
    made = ResidualVectorQuantize(6, 5, 3, (2, 1)).double().requires_grad_(False)
    z = torch.randn(2, 6, 4, dtype=torch.float64)
    wanted = made(torch.randn_like(z))[1]
    residual, expected = z, []
    for level, codes in zip(made.quantizers, wanted, strict=True):
        cosines = torch.stack(
            [F.cosine_similarity(level.project(residual), entry.view(1, -1, 1)) for entry in level.codebook.weight], 1
        )
        log = (cosines / 0.2).log_softmax(1).gather(1, codes.unsqueeze(1))
        expected.append(-log.mean((1, 2)))
        residual = residual - level.expand(level.codebook(codes).transpose(1, 2))
    torch.testing.assert_close(code_entropy(made, z, wanted, temperature=0.2), torch.stack(expected).mean(0))


def test_code_entropy_moves_a_latent_until_the_wanted_codes_are_chosen_and_moves_no_entry() -> None:
    made = ResidualVectorQuantize(6, 8, 4, (2, 1))
    z, wanted = torch.randn(1, 6, 4), made(torch.randn(1, 6, 4))[1]
    latent = z.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latent], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        code_entropy(made, latent, wanted, temperature=0.1).sum().backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(made(z)[1], wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(made(latent)[1], wanted, strict=True))
    assert made.quantizers[0].get_parameter("codebook.weight").grad is None
    frozen = made.double().requires_grad_(False)
    assert gradcheck(lambda x: code_entropy(frozen, x, wanted, temperature=0.5), (z.double().requires_grad_(True),))
