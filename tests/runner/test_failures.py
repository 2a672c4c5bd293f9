"""What goes wrong in one arm stays in that arm; what could never work is refused before it costs anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_study import PHASES, Bench, arm, contents, plugin, records, result, runner, weights

from snac_core.errors import UserError
from snac_runner.evaluate.scoring import Scores
from snac_runner.report.page import build
from snac_runner.train import DEV_METRICS
from snac_runner.train_step import ArmStep

RAISES = """
    @hookimpl
    def loss(self, step):
        if step.index == 2:
            raise RuntimeError("a fault\\nof two lines")
        return {"likeness": step.identity.audio.square().mean()}
"""
NAN = """
    @hookimpl
    def loss(self, step):
        factor = float("nan") if step.index == 2 else 1.0
        return {"likeness": step.identity.audio.square().mean() * factor}
"""
DOUBLE = """
    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.gate = nn.Linear(taps.speaker_dim, taps.match(("quantized",))[0].channels, dtype=torch.float64)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
"""
AS_DOUBLE = """
    @hookimpl
    def after_vq(self, x, cond, tap):
        return x * (1 + self.gate(cond.speaker.double()).to(x)).unsqueeze(-1)
"""
LENGTH = """
    @hookimpl
    def after_vq(self, x, cond, tap):
        if x.shape[-1] > 150 and not self.training:
            raise RuntimeError("too long for me")
        return x * (1 + self.config.strength * self.gate(cond.speaker)).unsqueeze(-1)
"""


def test_arms_that_fail_are_marked_and_the_others_reach_the_report(bench: Bench, tmp_path: Path) -> None:
    files = [plugin(tmp_path, "raises", RAISES), plugin(tmp_path, "gives_nan", NAN)]
    out = tmp_path / "study"
    arms = [arm("raises"), arm(PHASES[2]), arm("gives_nan")]
    bench.train(arms, out, files=files, steps=3)
    assert "raises, seed 0: failed: loss of strategy 'raises' raises RuntimeError: a fault of two lines" in bench.lines
    expected = {
        "raises": "loss of strategy 'raises' raises RuntimeError: a fault of two lines",
        "gives_nan": "NaN or infinite loss at step 2, in gives_nan/likeness",
    }
    for name, reason in expected.items():
        found = result(out / name / "seed0")
        assert (found["status"], found["error"]) == ("failed", reason)
        assert found["metrics"] == {}
        assert found["cost"]["steps"] == {"raises": 1, "gives_nan": 1}[name]
        assert not (out / name / "seed0" / "model").exists()
    good = result(out / PHASES[2] / "seed0")
    assert good["status"] == "success"
    assert good["versions"]["plugins"][PHASES[2]]["distribution"] == "snac-conditioning"
    of_file = result(out / "raises" / "seed0")["versions"]["plugins"]["raises"]
    assert of_file["file"] == "raises.py"
    assert str(tmp_path) not in json.dumps(of_file)
    assert "a fault of two lines" in build(out).read_text()
    alone = bench.train([arm(PHASES[2])], tmp_path / "alone", steps=3)[PHASES[2]]
    ours, theirs = weights(out / PHASES[2] / "seed0"), weights(alone)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)  # the failures left no trace in it
    before = contents(out / "raises")
    bench.train(arms, out, files=files, steps=3)
    assert contents(out / "raises") == before  # a failed run is a finished one


def test_an_arm_whose_parameters_are_not_float32_trains(bench: Bench, tmp_path: Path) -> None:
    file = plugin(tmp_path, "in_double", DOUBLE, edit=AS_DOUBLE)
    folder = bench.train([arm("in_double")], tmp_path / "out", files=[file], steps=2)["in_double"]
    assert result(folder)["status"] == "success"
    assert all(tensor.dtype == torch.float64 for tensor in weights(folder).values())


def test_a_fault_of_one_update_is_that_arm_s(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = ArmStep.update

    def failing(step: ArmStep) -> None:
        if step.arm.settings.title == "first" and step.index == 2:
            raise RuntimeError("out of memory")
        update(step)

    monkeypatch.setattr(ArmStep, "update", failing)
    arms = [arm(PHASES[1], name="first"), arm(PHASES[1], name="second")]
    folders = bench.train(arms, tmp_path, steps=3)
    assert (result(folders["first"])["status"], result(folders["first"])["cost"]["steps"]) == ("failed", 1)
    assert "out of memory" in result(folders["first"])["error"]
    assert result(folders["second"])["status"] == "success"


def test_a_single_run_that_fails_ends_with_its_reason_and_exit_code_2(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = plugin(tmp_path, "gives_nan", NAN)
    command = ["train", "--strategy", "gives_nan", "--plugin", file, "--out", tmp_path / "run"]
    assert runner(*command, *bench.options(steps=3)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the run failed: NaN or infinite loss at step 2, in gives_nan/likeness")
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_arm_that_fails_in_judging_is_failed_alone(bench: Bench, tmp_path: Path) -> None:
    # training crops have 100 frames at `quantized`, dev and test sources up to 250
    file = plugin(tmp_path, "shortsighted", edit=LENGTH)
    folders = bench.train([arm("shortsighted"), arm(PHASES[1])], tmp_path, files=[file], steps=2)
    assert result(folders["shortsighted"])["status"] == "failed"
    assert "too long for me" in result(folders["shortsighted"])["error"]
    assert result(folders[PHASES[1]])["status"] == "success"


def test_a_failure_of_the_final_judging_leaves_the_other_arms(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import snac_runner.unit as unit

    evaluate = unit.evaluate_system

    def failing(result, *rest, **options):  # type: ignore[no-untyped-def]
        if result.arm == PHASES[0]:
            raise RuntimeError("cannot be judged")
        return evaluate(result, *rest, **options)

    monkeypatch.setattr(unit, "evaluate_system", failing)
    folders = bench.train([arm(PHASES[0]), arm(PHASES[1])], tmp_path, steps=1)
    assert result(folders[PHASES[0]])["error"] == "in evaluation: RuntimeError: cannot be judged"
    assert result(folders[PHASES[1]])["status"] == "success"
    assert "cannot be judged" in "".join(bench.lines)


REFUSED = {
    "changes_shape": ("return x[..., :-1]", "", r"'changes_shape' returned \(.*expected a tensor"),
    "returns_none": ("x * (1 + self.gate(cond.speaker)).unsqueeze(-1)", "", "'returns_none' returned None at tap"),
    "no_gradient": ("return x * (1 + self.gate(cond.speaker).detach()).unsqueeze(-1)", "", "gets no gradient"),
    "ignores": ("return x * (1 + self.gate.weight.sum(1) + self.gate.bias).unsqueeze(-1)", "", "ignores its speaker"),
    "mixes": (
        "return x * (1 + self.gate(cond.speaker).unsqueeze(-1) * (1 + x.mean(dim=0, keepdim=True)))",
        "",
        "mixes the batch",
    ),
    "in_place": (
        "return x.mul_((1 + self.gate(cond.speaker)).unsqueeze(-1))",
        "",
        "in_place",
    ),
    "touches_base": (
        "return x * (1 + self.gate(cond.speaker)).unsqueeze(-1)",
        """
    @hookimpl
    def training_start(self, context):
        self.captured = [context.model.codec]

    @hookimpl
    def loss(self, step):
        with torch.no_grad():
            next(self.captured[0].parameters()).mul_(1.01)
        return {"likeness": step.identity.audio.square().mean()}
""",
        "touches the base",
    ),
    "loss_is_none": (
        "return x * (1 + self.gate(cond.speaker)).unsqueeze(-1)",
        "\n    @hookimpl\n    def loss(self, step):\n        pass\n",
        "loss of 'loss_is_none' must return a dict of scalar tensors; got None",
    ),
    "loss_raises": (
        "return x * (1 + self.gate(cond.speaker)).unsqueeze(-1)",
        "\n    @hookimpl\n    def loss(self, step):\n        raise KeyError('speaker')\n",
        "loss of strategy 'loss_raises' raises KeyError: 'speaker'",
    ),
    "misspelt": (
        "return x * (1 + self.gate(cond.speaker)).unsqueeze(-1)",
        "\n    @hookimpl\n    def after_qv(self, x, cond, tap):\n        return x\n",
        "unknown hook 'after_qv'; did you mean 'after_vq'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_strategy_that_could_not_work_is_refused_before_training(bench: Bench, tmp_path: Path, name: str) -> None:
    body, methods, message = REFUSED[name]
    edit = f"\n    @hookimpl\n    def after_vq(self, x, cond, tap):\n        {body}\n"
    file = plugin(tmp_path, name, methods, edit=edit)
    base = {key: value.clone() for key, value in bench.resources(bench.study()).codec.state_dict().items()}
    with pytest.raises(UserError, match=message):
        bench.train([arm(PHASES[1]), arm(name)], tmp_path / "out", files=[file])
    assert not (tmp_path / "out").exists()
    now = bench.resources(bench.study()).codec.state_dict()
    assert all(torch.equal(now[key], value) for key, value in base.items())


def test_a_weight_without_a_term_is_refused_before_training(bench: Bench, tmp_path: Path) -> None:
    weights = {"voice_conversion/spk_vv": 1.0}
    message = r"weight for 'voice_conversion/spk_vv', which no strategy computes; did you mean 'voice_conversion/spk_"
    with pytest.raises(UserError, match=message):
        bench.train([arm(PHASES[1], weights=weights)], tmp_path / "out")


def test_an_objective_alone_is_no_arm(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to train"):
        bench.train([arm("voice_conversion")], tmp_path / "out")


def test_patience_ends_an_arm_and_the_others_go_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([0.5, 0.9, 0.6, 0.8, 0.5, 0.7, 0.6])  # of still, moving, still, moving, still; then of moving alone
    monkeypatch.setattr("snac_runner.train.dev_score", lambda _: next(told))
    pooled = {name: {"mean": 0.0} for name in DEV_METRICS}
    monkeypatch.setattr("snac_runner.train.score", lambda *_, **__: Scores(pooled=pooled))
    monkeypatch.setattr("snac_runner.unit.evaluate_system", lambda *_, **__: Scores())
    arms = [arm(PHASES[1], name="still"), arm(PHASES[1], name="moving")]
    folders = bench.train(arms, tmp_path, steps=4, eval_every=1, patience=2)
    assert [record["step"] for record in records(folders["moving"]) if "dev" in record] == [1, 2, 3, 4]
    still = [record["step"] for record in records(folders["still"]) if "dev" in record]
    assert still == [1, 2, 3]
    assert result(folders["still"])["status"] == "success"
    assert result(folders["still"])["cost"]["steps"] == 3
