"""The training quantizer equals the codec's at full quantization, and restarts only unused entries."""

from __future__ import annotations

import pytest
import torch

from snac_core.codec.vq import ResidualVectorQuantize
from snac_runner.pretrain.quantizer import CodeUsage, initialize_codebooks, quantize, restart_unused


@pytest.fixture
def quantizer() -> ResidualVectorQuantize:
    return ResidualVectorQuantize(12, 16, 4, (2, 1))


def test_full_quantization_is_bit_equal_to_the_codecs_quantizer(quantizer: ResidualVectorQuantize) -> None:
    z = torch.randn(3, 12, 8)
    out = quantize(quantizer, z, blend=1.0)
    z_q, codes = quantizer(z)
    assert torch.equal(out.z_q, z_q)
    assert all(torch.equal(a, b) for a, b in zip(out.codes, codes, strict=True))


def test_without_quantization_the_codebooks_have_no_effect(quantizer: ResidualVectorQuantize) -> None:
    z = torch.randn(3, 12, 8)
    before = quantize(quantizer, z, blend=0.0).z_q
    for level in quantizer.quantizers:
        torch.nn.init.normal_(level.codebook.weight)
    assert torch.equal(quantize(quantizer, z, blend=0.0).z_q, before)


def test_an_item_that_keeps_one_level_gets_that_levels_part_alone(quantizer: ResidualVectorQuantize) -> None:
    z = torch.randn(2, 12, 8)
    whole = quantize(quantizer, z, blend=1.0)
    fewer = quantize(quantizer, z, blend=1.0, levels=torch.tensor([1, 2]))
    first = quantizer.quantizers[0]
    torch.testing.assert_close(fewer.z_q[0], first.expand(first.codebook(whole.codes[0]).transpose(1, 2))[0])
    assert torch.equal(fewer.z_q[1], whole.z_q[1])
    assert all(torch.equal(a, b) for a, b in zip(whole.codes, fewer.codes, strict=True))


def test_the_losses_reach_the_encoder_by_commitment_and_the_entries_by_the_codebook_term(
    quantizer: ResidualVectorQuantize,
) -> None:
    z = torch.randn(2, 12, 8, requires_grad=True)
    entries = [level.codebook.weight for level in quantizer.quantizers]
    out = quantize(quantizer, z, blend=1.0)
    to_z, *to_entries = torch.autograd.grad(sum(out.commitment), [z, *entries], allow_unused=True, retain_graph=True)
    assert to_z.abs().sum() > 0
    assert to_entries == [None, None]
    assert torch.autograd.grad(out.codebook[1], entries[1])[0].abs().sum() > 0


def test_codebooks_initialized_by_kmeans_use_most_of_their_entries(quantizer: ResidualVectorQuantize) -> None:
    z = torch.randn(16, 12, 32)
    for level in quantizer.quantizers:
        torch.nn.init.constant_(level.codebook.weight, 1.0)
    initialize_codebooks(quantizer, z, seed=0)
    usage = CodeUsage(2, 16)
    usage.add(quantize(quantizer, z, blend=1.0).codes)
    found = usage.statistics()
    assert found["used_0"] == found["used_1"] == 1.0
    assert min(found["perplexity_0"], found["perplexity_1"]) > 10


def test_perplexity_is_the_number_of_entries_when_all_are_chosen_alike_and_one_when_one_is() -> None:
    usage = CodeUsage(2, 8)
    usage.add([torch.arange(8).repeat(3).view(2, 12), torch.zeros(2, 12, dtype=torch.long)])
    found = usage.statistics()
    assert found["perplexity_0"] == pytest.approx(8)
    assert (found["used_0"], found["used_1"]) == (1.0, 0.125)
    assert found["perplexity_1"] == pytest.approx(1)


def test_only_unused_entries_are_restarted_and_their_momentum_is_reset(
    quantizer: ResidualVectorQuantize,
) -> None:
    weight = quantizer.quantizers[0].codebook.weight
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-3)
    out = quantize(quantizer, torch.randn(4, 12, 8), blend=1.0)
    sum(out.codebook).backward()
    optimizer.step()
    before = weight.detach().clone()
    counts = torch.ones(2, 16, dtype=torch.long)
    counts[0, 5] = 0
    optimizer.state[weight]["exp_avg"].fill_(1.0)
    assert restart_unused(quantizer, counts, out.encodings, optimizer, seed=0) == [1, 0]
    changed = (weight != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [5]
    points = out.encodings[0].transpose(1, 2).flatten(0, 1)
    assert (points == weight[5]).all(dim=1).any()
    assert optimizer.state[weight]["exp_avg"][5].abs().sum() == 0
    assert optimizer.state[weight]["exp_avg"][4].sum() == 4
