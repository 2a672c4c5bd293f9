"""A few hundred steps train a small codec if quantization sets in gradually; otherwise its codes collapse."""

from __future__ import annotations

import torch

from snac_core.codec import SNAC
from snac_runner.data.corpus import Corpus
from snac_runner.distributed import DistributedContext
from snac_runner.pretrain.data import SpeechMix
from snac_runner.pretrain.quantizer import CodeUsage
from snac_runner.pretrain.settings import Augmentation, PretrainSettings, QuantizerTraining
from snac_runner.pretrain.step import TrainingState

from .conftest import SMALL

GRADUAL = QuantizerTraining(unquantized_steps=40, blend_steps=25, restart_every=15, kmeans_batches=6, level_dropout=0)
IMMEDIATE = QuantizerTraining(unquantized_steps=0, blend_steps=0, restart_every=0, kmeans_batches=0, level_dropout=0)


def trained(corpus: Corpus, how: QuantizerTraining, steps: int) -> tuple[float, float, dict[str, float]]:
    """Reconstruction loss before and after training, and the use of the codes at the end."""
    settings = PretrainSettings(
        steps=steps,
        lr=3e-3,
        warmup_steps=10,
        lr_min_ratio=0.1,
        adversary=None,
        quantizer=how,
        augmentation=Augmentation(gain_db=0, changed=0),
    )
    torch.manual_seed(0)
    state = TrainingState(SNAC(**SMALL), settings, DistributedContext(torch.device("cpu")))
    mix = SpeechMix([(corpus, 1.0)], SMALL["sampling_rate"], 1536, 4, settings.augmentation, seed=0)
    weights = settings.weights.model_dump()
    losses, usage = [], CodeUsage(2, SMALL["codebook_size"])
    for step in range(steps):
        terms = state.train_step(mix)
        losses.append(sum(weights[name] * float(terms[name]) for name in state.spectral_distance.terms))
        if step >= steps - 20:
            usage.add(state.codec.encode(mix.at(step)))
    return losses[0], sum(losses[-10:]) / 10, usage.statistics()


def test_gradual_quantization_halves_the_loss_and_keeps_codes_in_use_that_collapse_without_it(corpus: Corpus) -> None:
    before, after, use = trained(corpus, GRADUAL, 125)
    assert after < before / 2
    assert min(use["used_0"], use["used_1"]) > 0.5
    assert min(use["perplexity_0"], use["perplexity_1"]) > 16

    _, _, few = trained(corpus, IMMEDIATE, 60)
    assert max(few["used_0"], few["used_1"]) < 0.5
    assert max(few["perplexity_0"], few["perplexity_1"]) < 8
