"""Which part may know which, what files may be called, and what is imported when."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from snac_core import discover
from snac_core.hookspecs import PROJECT, StrategyHooks

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("snac_core", "plugins", "runner")
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers", "handler", "handlers"}


def sources(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports anywhere, relative ones resolved."""
    package = path.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_resolver_of_imports_sees_what_it_must() -> None:
    names = set(imported(REPOSITORY / "plugins" / "objectives" / "snac_objectives" / "__init__.py"))
    assert "snac_objectives.voice_conversion.VoiceConversion" in names
    assert "snac_core.hookimpl" in names


@pytest.mark.parametrize("path", sources("snac_core"), ids=str)
def test_the_core_knows_neither_plugins_nor_runner(path: Path) -> None:
    assert not [name for name in imported(path) if within(name, "plugins") or within(name, "runner")]


@pytest.mark.parametrize("path", sources("plugins"), ids=str)
def test_a_plugin_knows_the_core_and_libraries_and_no_other_plugin(path: Path) -> None:
    own = ".".join(path.relative_to(REPOSITORY).parts[:2])
    for name in imported(path):
        assert not within(name, "runner"), f"{path} imports {name}"
        assert not within(name, "plugins") or within(name, own), f"{path} imports {name}"
        assert not within(name, "tests"), f"{path} imports {name}"


def test_the_runner_knows_no_plugin_and_names_no_adapter() -> None:
    strategies = discover().strategies
    adapters = [
        name
        for name in strategies
        if any(hasattr(getattr(strategies[name], hook, None), f"{PROJECT}_impl") for hook in ("before_vq", "after_vq"))
    ]
    assert adapters
    assert "before_vq" in vars(StrategyHooks)
    for path in sources("runner"):
        assert not [name for name in imported(path) if within(name, "plugins")], path
        text = path.read_text()
        assert not [name for name in adapters if name in text], path


def test_no_file_is_called_by_a_name_that_says_nothing() -> None:
    vague = [path for package in PACKAGES for path in sources(package) if VAGUE & set(path.stem.split("_"))]
    assert not vague


def test_the_hook_page_fits_on_one_screen_and_holds_no_logic() -> None:
    path = REPOSITORY / "snac_core" / "hookspecs.py"
    text = path.read_text()
    assert len(text.splitlines()) <= 70
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert len(node.body) == 1, node.name
            assert isinstance(node.body[0], ast.Expr), f"{node.name} holds more than its docstring"


def test_no_pickle_is_read_without_weights_only() -> None:
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                call = ast.unparse(node.func)
                assert call not in {"pickle.load", "pickle.loads", "joblib.load", "dill.load"}, path
                if call == "torch.load":
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
                if call in {"np.load", "numpy.load"}:
                    assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"{path}:{node.lineno}"


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after running `code`."""
    code += "\nimport sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("line", ["import snac_core", "import snac_core.speakers", "import snac_core.plugins"])
def test_importing_the_core_imports_no_torch(line: str) -> None:
    assert not {"torch", "torchaudio", "scipy", "matplotlib"} & loaded_by(line)


def test_the_commands_help_imports_no_torch() -> None:
    if not (REPOSITORY / "runner" / "snac_runner" / "cli").is_dir():
        pytest.skip("there is no command line yet")
    code = (
        "from snac_runner.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
    )
    assert not {"torch", "torchaudio", "scipy", "matplotlib", "huggingface_hub"} & loaded_by(code)


def test_the_core_tells_type_checkers_that_it_is_typed() -> None:
    assert (REPOSITORY / "snac_core" / "py.typed").is_file()
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]
    assert {"module": "snac_core.*", "strict": True} in settings["overrides"]
