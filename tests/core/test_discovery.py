"""Plugins: found by entry point and by file, named with their origin, and kept apart when they fail."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from snac_core import UserError, discover
from snac_core.hookspecs import API_VERSION
from snac_core.plugin_guard import torch_settings

STRATEGY = """
    from snac_core import Strategy, hookimpl

    class Still(Strategy):
        name = "{name}"

        @hookimpl
        def after_vq(self, x):
            return x

    @hookimpl
    def register_strategies(register):
        register(Still)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one module and its entry points on the path, as an installer would."""
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[str] = []

    def put(module: str, source: str, *, distribution: str = "acme", entries: tuple[str, ...] = ()) -> None:
        (tmp_path / f"{module}.py").write_text(dedent(source))
        info = tmp_path / f"{distribution}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"{entry} = {module}" for entry in entries or (module,)]
        (info / "entry_points.txt").write_text("\n".join(["[snac_core.plugins]", *lines]))
        modules.append(module)
        importlib.invalidate_caches()

    yield put
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(source: str) -> Path:
        path = tmp_path / "my_plugin.py"
        path.write_text(dedent(source))
        return path

    return write


# -------------------------------------------------------------------- entry points


def test_the_built_in_plugins_come_in_through_the_public_door() -> None:
    catalogue = discover()
    assert {"phase3_contrastive", "phase4_decoder_film", "phase6_encoder_adapter", "voice_conversion"} <= set(
        catalogue.strategies
    )
    assert "ge2e" in catalogue.speaker_encoders
    assert "secs" in catalogue.metrics
    assert str(catalogue.strategies.origins["voice_conversion"]).startswith("plugin 'objectives' of snac-conditioning ")


def test_a_third_partys_distribution_is_found_with_its_name_and_version(install: Install) -> None:
    install("acme_still", STRATEGY.format(name="still"))
    catalogue = discover()
    assert catalogue.strategies["still"].name == "still"
    assert str(catalogue.strategies.origins["still"]) == "plugin 'acme_still' of acme 1.2"
    assert not catalogue.failures


def test_one_module_behind_two_entry_points_registers_once(install: Install) -> None:
    install("acme_still", STRATEGY.format(name="still"), entries=("one", "two"))
    assert "still" in discover().strategies


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "registers nothing; expected a module-level function"),
        (
            "from snac_core import hookimpl\n@hookimpl\ndef register_strategy(register): ...",
            "unknown hook 'register_strategy'.*register_strategies",
        ),
        (
            "from snac_core import hookimpl\n@hookimpl\ndef register_strategies(register, more): ...",
            "register_strategies.*more",
        ),
        (
            "from snac_core import hookimpl\n@hookimpl\ndef register_strategies(register): raise KeyError('x')",
            "KeyError: 'x'",
        ),
    ],
)
def test_a_plugin_that_fails_is_named_with_the_reason_and_the_rest_still_works(
    install: Install, source: str, reason: str
) -> None:
    install("acme_broken", source)
    install("other_still", STRATEGY.format(name="still"), distribution="other")
    catalogue = discover()
    assert list(catalogue.failures) == ["plugin 'acme_broken' of acme 1.2"]
    message = catalogue.failures["plugin 'acme_broken' of acme 1.2"]
    assert re.search(reason, message), message
    assert "still" in catalogue.strategies
    assert "phase6_encoder_adapter" in catalogue.strategies


def test_one_failing_hook_leaves_the_plugins_other_hooks(install: Install) -> None:
    install(
        "acme_half",
        STRATEGY.format(name="still")
        + """
    @hookimpl
    def register_metrics(register):
        raise OSError("no tool")
    """,
    )
    catalogue = discover()
    assert "still" in catalogue.strategies
    assert catalogue.failures == {"plugin 'acme_half' of acme 1.2": "OSError: no tool"}


def test_a_plugin_that_claims_a_built_in_name_does_not_get_it(install: Install) -> None:
    install("acme_still", STRATEGY.format(name="phase6_encoder_adapter"))
    catalogue = discover()
    assert catalogue.strategies.origins["phase6_encoder_adapter"].distribution == "snac-conditioning"
    (told,) = catalogue.warnings
    assert re.search(
        r"'phase6_encoder_adapter' is offered twice: by plugin 'phase6_encoder_adapter' of snac-conditioning \S+ "
        r"and by plugin 'acme_still' of acme 1.2$",
        told,
    )
    assert not discover(disable=["acme_still"]).warnings


def test_a_name_that_two_plugins_claim_belongs_to_neither_until_one_is_disabled(install: Install) -> None:
    for distribution in ("acme", "other", "third"):
        install(f"{distribution}_still", STRATEGY.format(name="still"), distribution=distribution)
    catalogue = discover()
    assert "still" not in catalogue.strategies
    assert "phase6_encoder_adapter" in catalogue.strategies
    assert len(catalogue.warnings) == 2
    twice = "'still' is offered twice: by plugin 'acme_still' of acme 1.2 and by plugin 'other_still' of other 1.2"
    with pytest.raises(UserError, match=f"{twice}; choose with --disable-plugin"):
        catalogue.strategies["still"]
    assert "still" in discover(disable=["acme_still", "third_still"]).strategies


def test_a_file_that_claims_a_taken_name_is_an_error(file: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"'voice_conversion' is offered twice: by plugin 'objectives' .* and by file"):
        discover([file(STRATEGY.format(name="voice_conversion"))])


def test_a_class_registered_twice_is_there_once_and_said(install: Install) -> None:
    install("acme_still", STRATEGY.format(name="still") + "        register(Still)\n")
    catalogue = discover()
    assert "still" in catalogue.strategies
    assert catalogue.warnings == [
        "set aside: strategy 'still' is registered twice by plugin 'acme_still' of acme 1.2; once is enough"
    ]


@pytest.mark.parametrize("name", ["", "two words", "7th", "a-b"])
def test_a_name_that_is_no_identifier_is_set_aside(install: Install, file: Callable[[str], Path], name: str) -> None:
    install("acme_still", STRATEGY.format(name=name))
    (told,) = discover().warnings
    assert f"its name must be an identifier; got '{name}'" in told
    with pytest.raises(UserError, match=f"its name must be an identifier; got '{name}'"):
        discover([file(STRATEGY.format(name=name))], disable=["acme_still"])


def test_an_instance_in_place_of_a_class_is_set_aside(install: Install) -> None:
    install("acme_still", STRATEGY.format(name="still").replace("register(Still)", "register(Still.name)"))
    (told,) = discover().warnings
    assert "is not a class; register the class itself" in told


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (API_VERSION + 1, "a newer snac-conditioning is needed"),
        (1, "the plugin needs an update; API 2 calls critic_loss discriminator_loss, and self.critic self.discrim"),
        ("'one'", "the plugin needs an update"),
    ],
)
def test_a_plugin_for_another_hook_api_says_which_side_to_update(
    install: Install, file: Callable[[str], Path], version: object, remedy: str
) -> None:
    source = STRATEGY.format(name="still")
    source = source.replace("@hookimpl\n        def", f"api = {version}\n\n        @hookimpl\n        def")
    install("acme_still", source)
    catalogue = discover()
    assert "still" not in catalogue.strategies
    assert "phase6_encoder_adapter" in catalogue.strategies
    words = f"hook API {version}, this is {API_VERSION}: {remedy}"
    assert words in catalogue.warnings[0]
    with pytest.raises(UserError, match=f"'still' of plugin 'acme_still' of acme 1.2 is for {words}"):
        catalogue.strategies["still"]
    with pytest.raises(UserError, match=words):
        discover([file(source)], disable=["acme_still"])


def test_a_plugin_that_imports_what_another_version_has_is_told_so(install: Install) -> None:
    install("acme_still", "from snac_core import Teleporter")
    (told,) = discover().warnings
    assert f"another version of the hook API, this is {API_VERSION}" in told


CHANGES = {
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "number of threads": "torch.set_num_threads(3)",
    "gradient mode": "torch.set_grad_enabled(False)",
    "deterministic mode": "torch.use_deterministic_algorithms(True)",
    "matmul precision": "torch.set_float32_matmul_precision('medium')",
    "cuDNN benchmark mode": "torch.backends.cudnn.benchmark = True",
    "default device": "torch.set_default_device('meta')",
    "random seed": "torch.manual_seed(7)",
}


@pytest.mark.parametrize("setting", CHANGES)
def test_a_setting_of_torch_that_a_plugin_changes_is_put_back_and_named(
    install: Install, file: Callable[[str], Path], setting: str
) -> None:
    torch.manual_seed(1)
    before = torch_settings()
    change = f"    import torch\n    {CHANGES[setting]}\n"
    source = STRATEGY.format(name="still")
    install("acme_import", change + source)
    install(
        "other_register",
        source.replace('"still"', '"other"') + change.replace("    ", "        "),
        distribution="other",
    )
    catalogue = discover()
    assert torch_settings() == before
    assert {"still", "other"} <= set(catalogue.strategies), "the plugins stay usable"
    importing, registering = catalogue.warnings
    assert f"importing plugin 'acme_import' of acme 1.2 changed torch's {setting} from" in importing
    assert f"register_strategies of plugin 'other_register' of other 1.2 changes torch's {setting} from" in registering
    with pytest.raises(UserError, match=f"plugin file .*my_plugin.py changes torch's {setting}"):
        discover([file(change + source.replace('"still"', '"third"'))])
    assert torch_settings() == before


def test_a_disabled_plugin_is_not_even_imported(install: Install) -> None:
    install("acme_still", "raise SystemError('imported')")
    catalogue = discover(disable=["acme_still", "phase3_contrastive"])
    assert not catalogue.failures
    assert "phase3_contrastive" not in catalogue.strategies
    assert "phase4_decoder_film" in catalogue.strategies


def test_disabling_what_is_not_there_suggests_what_is() -> None:
    with pytest.raises(UserError, match="no plugin 'objectivs' to disable; did you mean 'objectives'"):
        discover(disable=["objectivs"])


def test_an_unknown_name_suggests_the_nearest() -> None:
    catalogue = discover()
    with pytest.raises(UserError, match="unknown strategy 'phase6'; did you mean 'phase6_encoder_adapter'"):
        catalogue.strategies["phase6"]
    with pytest.raises(UserError, match="unknown metric 'sec'; did you mean 'secs'"):
        catalogue.metrics["sec"]


def test_nothing_is_global_each_discovery_stands_alone(file: Callable[[str], Path]) -> None:
    with_file = discover([file(STRATEGY.format(name="still"))])
    assert "still" in with_file.strategies
    assert "still" not in discover().strategies


# -------------------------------------------------------------------- single files


def test_a_single_file_is_a_plugin_and_its_origin_is_the_file(file: Callable[[str], Path]) -> None:
    path = file(STRATEGY.format(name="still"))
    catalogue = discover([path, path])
    assert catalogue.strategies["still"].name == "still"
    assert str(catalogue.strategies.origins["still"]) == f"file {path}"


def test_a_file_is_imported_once_and_anew_after_a_change(file: Callable[[str], Path]) -> None:
    first = discover([file(STRATEGY.format(name="still"))]).strategies["still"]
    assert discover([file(STRATEGY.format(name="still"))]).strategies["still"] is first
    assert "moving" in discover([file(STRATEGY.format(name="moving"))]).strategies


def test_one_file_may_register_several_names_and_kinds(file: Callable[[str], Path]) -> None:
    catalogue = discover(
        [
            file(
                STRATEGY.format(name="still")
                + """
    class Other(Still):
        name = "other"

    from snac_core import Metric

    class Length(Metric):
        name = "length"

    @hookimpl
    def register_metrics(register):
        register(Length)

    @hookimpl(specname="register_speaker_encoders")
    def nothing_here():
        pass
    """
            )
        ]
    )
    assert "still" in catalogue.strategies
    assert "length" in catalogue.metrics


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_package", "does not import: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def broken(:", "does not import: SyntaxError"),
        ("import sys; sys.exit(3)", "does not import: SystemExit: 3"),
        ("x = 1", "registers nothing; expected a module-level function"),
        (
            "from snac_core import hookimpl\n@hookimpl\ndef register_strategie(register): ...",
            "unknown hook 'register_strategie'.*register_strategies",
        ),
        (
            "from snac_core import hookimpl\n@hookimpl\ndef register_strategies(register): raise KeyError('x')",
            "raises KeyError: 'x'",
        ),
    ],
)
def test_a_file_given_by_hand_must_load(file: Callable[[str], Path], source: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        discover([file(source)])
    assert "my_plugin.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plugin.txt").write_text("")
    for name in ("plugin.txt", "."):
        with pytest.raises(UserError, match=r"is not a Python file; expected the path of a \.py file"):
            discover([tmp_path / name])
    with pytest.raises(UserError, match=r"no plugin file .*nowhere\.py"):
        discover([tmp_path / "nowhere.py"])
