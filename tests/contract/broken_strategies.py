"""Strategies with one fault each, as an author might make it. `Sound` is what they would be without it."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import nn

from snac_core import SNAC, Strategy, hookimpl
from snac_core.testing import small_codec


def one_stage() -> SNAC:
    """A codec with one stage on each side: faults show as well on it, in a third of the time."""
    return small_codec(encoder_rates=[2], decoder_rates=[2], decoder_dim=16, vq_strides=[2, 1])


class Sound(Strategy):
    """x * (1 + g(s)) at `quantized`."""

    name = "sound"

    class Config(Strategy.Config):
        strength: float = Field(1.0, gt=0, description="Scales the edit.")

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.gate = nn.Linear(taps.speaker_dim, taps.match(("quantized",))[0].channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    @hookimpl
    def after_vq(self, x, cond, tap):
        return x * (1 + self.scale(x, cond))

    def scale(self, x, cond):
        return self.config.strength * self.gate(cond.speaker).unsqueeze(-1)


class Wasserstein(Sound):
    """Without fault: until something is learned, real and converted are equal, and cancel each other."""

    name = "wasserstein"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.discriminator = nn.Conv1d(1, 1, 9)

    @hookimpl
    def discriminator_loss(self, step):
        real, fake = step.frozen_activations.output, step.converted.audio.detach()
        return {"discriminator": self.discriminator(fake).mean() - self.discriminator(real).mean()}


class Double(Sound):
    """Without fault: parameters may have another dtype than the codec."""

    name = "double_precision"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.gate.double()

    def scale(self, x, cond):
        with torch.autocast(x.device.type, enabled=False):
            return self.config.strength * self.gate(cond.speaker.to(self.gate.weight)).to(x).unsqueeze(-1)


class ChangesShape(Sound):
    name = "changes_shape"

    @hookimpl
    def after_vq(self, x, cond, tap):
        return x[..., :-1]


class ReturnsNothing(Sound):
    name = "returns_nothing"

    @hookimpl
    def after_vq(self, x, cond, tap):
        x * (1 + self.scale(x, cond))


class NoGradient(Sound):
    name = "no_gradient"

    def scale(self, x, cond):
        return super().scale(x, cond).detach()


class SecondLayerUnused(Sound):
    name = "second_layer_unused"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.unused = nn.Linear(taps.speaker_dim, 4)


class IgnoresEmbedding(Sound):
    name = "ignores_embedding"

    def scale(self, x, cond):
        return (self.gate.bias + self.gate.weight.sum(1)).unsqueeze(-1)


class MixesBatch(Sound):
    name = "mixes_batch"

    def scale(self, x, cond):
        return super().scale(x, cond) * (1 + x.mean(dim=0, keepdim=True))


class Counts(Sound):
    name = "counts"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.register_buffer("calls", torch.zeros(()))

    @hookimpl
    def after_vq(self, x, cond, tap):
        self.calls += self.training
        return x * (1 + (1 + self.calls) * self.scale(x, cond))


class BatchNormed(Sound):
    name = "batch_normed"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.norm = nn.BatchNorm1d(self.gate.out_features)

    def scale(self, x, cond):
        return super().scale(x, cond) * self.norm(x)


class TouchesBase(Sound):
    name = "touches_base"

    @hookimpl
    def training_start(self, context):
        self.captured = [context.model.codec]

    @hookimpl
    def loss(self, step):
        with torch.no_grad():
            next(self.captured[0].parameters()).mul_(1.01)
        return {"likeness": step.identity.audio.square().mean()}


class OwnsBase(Sound):
    name = "owns_base"

    @hookimpl
    def training_start(self, context):
        self.captured = context.model.codec.decoder


class NotTheIdentity(Sound):
    name = "not_the_identity"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        nn.init.normal_(self.gate.weight)


class RandomIdentity(Sound):
    name = "random_identity"

    @hookimpl
    def after_vq(self, x, cond, tap):
        return nn.functional.dropout(x, 0.1, self.training) * (1 + self.scale(x, cond))


class MisspeltHook(Sound):
    name = "misspelt_hook"

    @hookimpl
    def after_qv(self, x, cond, tap):
        return x


class UnmarkedHook(Sound):
    name = "unmarked_hook"

    def before_vq(self, x, cond, tap):
        return x


class UnknownArgument(Sound):
    name = "unknown_argument"

    @hookimpl
    def after_vq(self, x, cond, tap, speaker):
        return x


class NoSuchTap(Sound):
    name = "no_such_tap"
    after_taps = ("decodr_*",)


class WrongSide(Sound):
    name = "wrong_side"
    after_taps = ("latent",)


class TakesAnyKey(Sound):
    name = "takes_any_key"

    class Config(Sound.Config):
        model_config = ConfigDict(extra="allow")


class NoDescription(Sound):
    name = "no_description"

    class Config(Sound.Config):
        depth: int = 2


class NoDefault(Sound):
    name = "no_default"

    class Config(Sound.Config):
        depth: int = Field(description="Layers.")


class NaNAfterPerturbation(Sound):
    name = "nan_after_perturbation"

    def scale(self, x, cond):
        scale = super().scale(x, cond)
        return scale + torch.log1p(-1e6 * scale.square())


class VectorLoss(Sound):
    name = "vector_loss"

    @hookimpl
    def loss(self, step):
        return {"each_item": step.identity.audio.square().mean(dim=(1, 2))}


class NumberInLoss(Sound):
    name = "number_in_loss"

    @hookimpl
    def loss(self, step):
        return {"likeness": step.identity.audio.square().mean().item()}


class TensorForLoss(Sound):
    name = "tensor_for_loss"

    @hookimpl
    def loss(self, step):
        return step.identity.audio.square().mean()


class LossOfCodes(Sound):
    name = "loss_of_codes"

    @hookimpl
    def loss(self, step):
        differences = [a.float() - b.float() for a, b in zip(step.converted.codes, step.bare.codes, strict=True)]
        return {"content": sum(difference.abs().mean() for difference in differences)}


class WeightWithoutTerm(Sound):
    name = "weight_without_term"
    default_weights = {"likness": 2.0}  # noqa: RUF012

    @hookimpl
    def loss(self, step):
        return {"likeness": step.identity.audio.square().mean()}


class WritesIntoInput(Sound):
    name = "writes_into_input"

    @hookimpl
    def after_vq(self, x, cond, tap):
        return x.mul_(1 + self.scale(x, cond))


class Meets(Sound):
    """Counts its instances, and lets the number matter."""

    name = "meets"
    instances = 0

    def __init__(self, config, taps):
        super().__init__(config, taps)
        Meets.instances += 1

    def scale(self, x, cond):
        return super().scale(x, cond) * Meets.instances


class Reseeds(Sound):
    name = "reseeds"

    def __init__(self, config, taps):
        torch.manual_seed(0)
        super().__init__(config, taps)


class ChangesSwitches(Sound):
    name = "changes_switches"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        torch.set_float32_matmul_precision("high")


class ReseedsPython(Sound):
    name = "reseeds_python"

    def scale(self, x, cond):
        np.random.seed(0)
        return super().scale(x, cond)


class SwitchesInEdit(Sound):
    name = "switches_in_edit"

    def scale(self, x, cond):
        torch.set_default_dtype(torch.float64)
        return super().scale(x, cond)


class ForgetsState(Sound):
    """Learns in a tensor that is neither parameter nor buffer."""

    name = "forgets_state"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.offset = torch.rand(self.gate.out_features)

    def scale(self, x, cond):
        return super().scale(x, cond) * self.offset.unsqueeze(-1)


class DiscriminatorMovesModel(Sound):
    name = "discriminator_moves_model"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.discriminator = nn.Conv1d(1, 1, 9)

    @hookimpl
    def discriminator_loss(self, step):
        return {"discriminator": self.discriminator(step.converted.audio).square().mean()}
