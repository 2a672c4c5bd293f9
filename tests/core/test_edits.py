"""What acts where, and in which order; and hooks that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_codec import small, tone
from torch import Tensor

from snac_core import ConditionedCodec, Conditioning, Strategy, Taps, UserError, hookimpl
from snac_core.hooks import hook_tables

TAPS = Taps(2, small().taps)


def strategy(name: str, **members: Any) -> Strategy:
    cls = type(name, (Strategy,), {"name": name, **members})
    return cls(cls.Config(), TAPS)


def adding(name: str, value: float, *, times: float = 1.0, **options: Any) -> Strategy:
    """Edits `quantized` to times * x + value."""

    @hookimpl(**options)
    def after_vq(self: Strategy, x: Tensor) -> Tensor:
        return times * x + value

    return strategy(name, after_vq=after_vq)


def folded(*strategies: Strategy) -> Tensor:
    x = torch.ones(1, 1, 1)
    for edit in hook_tables(strategies, TAPS).edits["quantized"]:
        x = edit(x, Conditioning(torch.zeros(1, 2)))
    return x


def test_edits_at_one_tap_are_folded_in_listed_order() -> None:
    add, double = adding("add", 3.0), adding("double", 0.0, times=2.0)
    assert folded(add, double) == 8
    assert folded(double, add) == 5


def test_tryfirst_and_trylast_move_an_edit_within_the_order() -> None:
    add = adding("add", 3.0)
    assert folded(add, adding("double", 0.0, times=2.0, tryfirst=True)) == 5
    assert folded(adding("double", 0.0, times=2.0, trylast=True), add) == 8


def test_the_model_folds_in_listed_order() -> None:
    class Add(Strategy):
        name = "plus"

        @hookimpl
        def after_vq(self, x: Tensor) -> Tensor:
            return x + 1

    class Double(Strategy):
        name = "times"

        @hookimpl
        def after_vq(self, x: Tensor) -> Tensor:
            return 2 * x

    codec, audio, cond = small(), tone(), Conditioning(torch.ones(1, 2))
    z_q = codec.quantizer(codec.advance(codec.preprocess(audio), None, "latent"))[0]
    for order, expected in (((Add, Double), 2 * (z_q + 1)), ((Double, Add), 2 * z_q + 1)):
        with codec.fixed_noise(1):
            got = ConditionedCodec(codec, order, speaker_dim=2).reconstruct(audio, cond).audio
            assert torch.equal(got, codec.advance(expected, "quantized", "audio")[..., : audio.shape[-1]])


def test_edits_are_scaled_on_both_sides_of_the_quantizer() -> None:
    class Push(Strategy):
        name = "push"

        @hookimpl
        def before_vq(self, x: Tensor) -> Tensor:
            return 1.5 * x + 1

        @hookimpl
        def after_vq(self, x: Tensor) -> Tensor:
            return 2 * x - 1

    codec, audio, cond = small(), tone(), Conditioning(torch.ones(1, 2))
    model = ConditionedCodec(codec, [Push], speaker_dim=2)
    edits: dict[tuple[float, str], Tensor] = {}
    for scale in (0.0, 0.5, 1.0, 2.0):
        model.edit_scale = scale
        with model.on_edit(lambda tap, before, after, scale=scale: edits.update({(scale, tap): after - before})):
            out = model.reconstruct(audio, cond)
        if not scale:
            assert torch.equal(out.z, model.reconstruct(audio).z)
            assert all(map(torch.equal, out.codes, model.reconstruct(audio).codes))
    for scale in (0.5, 2.0):
        assert torch.allclose(edits[scale, "latent"], scale * edits[1.0, "latent"], atol=1e-6)
    assert edits[0.0, "quantized"].abs().max() == 0
    assert edits[2.0, "quantized"].abs().max() > 0


def test_a_strategy_that_takes_the_scale_is_not_scaled_again() -> None:
    class Turn(Strategy):
        name = "turn"

        @hookimpl
        def before_vq(self, x: Tensor, scale: float) -> Tensor:
            return x * 2**scale

        @hookimpl
        def after_vq(self, x: Tensor) -> Tensor:
            return x + 1

    codec, audio, cond = small(), tone(), Conditioning(torch.ones(1, 2))
    model = ConditionedCodec(codec, [Turn], speaker_dim=2)
    bare = model.reconstruct(audio)
    for scale in (0.0, 0.5, 1.0, 3.0):
        model.edit_scale = scale
        changes: dict[str, Tensor] = {}
        with model.on_edit(lambda tap, before, after, changes=changes: changes.update({tap: after - before})):
            out = model.reconstruct(audio, cond)
        assert torch.equal(out.z, bare.z * 2**scale)
        assert torch.allclose(changes["quantized"], torch.full_like(bare.z, scale), atol=1e-5)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), "x", True])
def test_a_scale_that_is_not_a_number_of_at_least_0_is_refused(scale: Any) -> None:
    model = ConditionedCodec(small(), speaker_dim=2)
    with pytest.raises(UserError, match="edit_scale"):
        model.edit_scale = scale
    assert model.edit_scale == 1
    model.edit_scale = np.float32(0.5)
    assert model.edit_scale == 0.5


def test_only_taps_that_are_edited_are_in_the_table_in_signal_order() -> None:
    @hookimpl
    def edit(self: Strategy, x: Tensor) -> Tensor:
        return x

    both = strategy(
        "both", before_taps=("latent", "encoder_1"), after_taps=("decoder_[12]",), before_vq=edit, after_vq=edit
    )
    late = strategy("late", after_taps=("decoder_2", "quantized"), after_vq=edit)
    table = hook_tables([late, both], TAPS).edits
    assert list(table) == ["encoder_1", "latent", "quantized", "decoder_1", "decoder_2"]
    assert [e.strategy for e in table["decoder_2"]] == ["late", "both"]
    assert all(e.tap.name == tap for tap, edits in table.items() for e in edits)


def test_a_hook_may_take_fewer_arguments_in_any_order() -> None:
    @hookimpl
    def after_vq(self: Strategy, tap: Any, x: Tensor) -> Tensor:
        return x * len(tap.name)

    assert folded(strategy("by_name", after_vq=after_vq)) == len("quantized")


def test_other_hooks_are_called_in_listed_order_with_what_they_take() -> None:
    @hookimpl
    def loss(self: Strategy, step: Any) -> dict[str, Any]:
        return {self.name: step}

    @hookimpl
    def quiet(self: Strategy) -> dict[str, Any]:
        return {}

    listed = [strategy("b", loss=loss), strategy("a", loss=quiet), adding("c", 1.0), strategy("d", loss=loss)]
    calls = hook_tables(listed, TAPS).calls["loss"]
    assert [call.strategy for call in calls] == ["b", "a", "d"]
    assert [call(step=7) for call in calls] == [{"b": 7}, {}, {"d": 7}]


def test_an_edit_that_returns_something_else_is_named_with_tap_and_both_shapes() -> None:
    x, cond = torch.zeros(2, 3, 4), Conditioning(torch.zeros(2, 2))
    for given, got in (
        (None, "None"),
        ([1], "list"),
        (x[:1], r"\(1, 3, 4\) torch.float32"),
        (x.double(), r"\(2, 3, 4\) torch.float64"),
    ):

        @hookimpl
        def after_vq(self: Strategy, x: Tensor, given: Any = given) -> Any:
            return given

        edit = hook_tables([strategy("odd", after_vq=after_vq)], TAPS).edits["quantized"][0]
        with pytest.raises(UserError, match=rf"strategy 'odd' returned {got} at tap 'quantized'; .*\(2, 3, 4\)"):
            edit(x, cond)


def _plain(self: Strategy, x: Tensor) -> Tensor:
    return x


@hookimpl
def _marked(self: Strategy, x: Tensor) -> Tensor:
    return x


@hookimpl
def _too_many(self: Strategy, x: Tensor, speaker: Tensor) -> Tensor:
    return x


@hookimpl(wrapper=True)
def _wrapper(self: Strategy, x: Tensor):  # type: ignore[no-untyped-def]
    return (yield)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"critic_loss": _marked}, "strategy 'odd': the hook 'critic_loss' is called 'discriminator_loss'"),
        ({"critic_loss": _plain}, "strategy 'odd': the hook 'critic_loss' is called 'discriminator_loss'"),
        ({"after_qv": _marked}, "strategy 'odd': unknown hook 'after_qv'; did you mean 'after_vq'"),
        ({"after_vq": _plain}, "after_vq lacks the @hookimpl mark"),
        ({"after_vq": _too_many}, "strategy 'odd': .*speaker.*hooks: before_vq, after_vq"),
        ({"after_vq": _wrapper}, "after_vq cannot be a wrapper"),
        ({}, "strategy 'odd' implements no hook; expected one of before_vq"),
        ({"after_vq": _marked, "after_taps": ("decodr_*",)}, "'decodr_[*]' matches no tap of this codec; did you mean"),
        (
            {"after_vq": _marked, "after_taps": ("encoder_1",)},
            "after_taps names 'encoder_1', which is not after VQ",
        ),
        ({"before_vq": _marked, "before_taps": ("*",)}, "before_taps names 'quantized', which is not before VQ"),
    ],
)
def test_a_hook_that_does_not_fit_is_refused_by_name(members: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        hook_tables([strategy("odd", **members)], TAPS)
    assert "\n" not in str(caught.value)


def test_parameters_under_the_name_of_api_1_are_refused_with_the_new_name() -> None:
    odd = strategy("odd", after_vq=_marked)
    odd.critic = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"strategy 'odd': the attribute self\.critic is called self\.discriminator"):
        hook_tables([odd], TAPS)


def test_hooks_are_ordered_once_when_strategies_are_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def loss(self: Strategy, step: Any) -> dict[str, Any]:
        return {"step": step}

    cls = type("Odd", (Strategy,), {"name": "odd", "loss": loss})
    model = ConditionedCodec(small(), [cls], speaker_dim=2)
    monkeypatch.setattr("snac_core.hooks.hook_manager", None)  # not needed any more
    ((name, call),) = model.callers("loss")
    assert (name, call(step=3)) == ("odd", {"step": 3})


def test_patterns_matter_only_where_the_hook_exists() -> None:
    assert list(hook_tables([strategy("late", before_taps=("nowhere",), after_vq=_marked)], TAPS).edits) == [
        "quantized"
    ]


def test_patterns_name_taps_in_signal_order_once_each() -> None:
    assert [tap.name for tap in TAPS.match(["decoder_*", "quantized", "decoder_1"])] == [
        "quantized",
        "decoder_0",
        "decoder_1",
        "decoder_2",
    ]
    assert [tap.name for tap in TAPS.match("encoder_?")] == ["encoder_0", "encoder_1", "encoder_2"]
    with pytest.raises(UserError, match="'latnet' matches no tap of this codec; did you mean 'latent'"):
        TAPS.match(["latent", "latnet"])
