"""Rules about files and imports that import-linter (pyproject.toml) cannot check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import soundfile

from snac_core import discover
from snac_core.hookspecs import PROJECT, StrategyHooks
from snac_core.testing.fixtures import speech_like
from snac_runner.config import ArmSettings

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("snac_core", "plugins", "runner", "recipes", "benchmarks")
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers", "handler", "handlers"}


def sources(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_a_plugin_of_one_module_imports_the_core_and_no_other_plugin() -> None:
    """What import-linter cannot check: it reads packages, not single modules."""
    modules = sorted((REPOSITORY / "plugins").glob("*/snac_*.py"))
    assert len(modules) == 2
    for path in modules:
        names = imported(path)
        assert "snac_core" in names, path
        assert not {name for name in names if name.startswith("snac_")} - {"snac_core"}, path


def test_import_linter_covers_every_package_and_every_single_module() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    built = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    linter = settings["tool"]["importlinter"]
    assert sorted(linter["root_packages"]) == sorted(Path(path).name for path in built if not path.endswith(".py"))
    forbidden = next(contract for contract in linter["contracts"] if contract["id"] == "plugins")["forbidden_modules"]
    singles = [*(REPOSITORY / "recipes").glob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")]
    assert {Path(path).stem for path in built if path.endswith(".py")} <= set(forbidden)
    assert {path.stem for path in singles} <= set(forbidden)


def test_the_runner_and_the_benchmarks_name_no_strategy() -> None:
    strategies = discover().strategies
    adapters = [
        name
        for name in strategies
        if any(hasattr(getattr(strategies[name], hook, None), f"{PROJECT}_impl") for hook in ("before_vq", "after_vq"))
    ]
    assert adapters
    assert "before_vq" in vars(StrategyHooks)
    names = {*adapters, *(name for name in strategies if "_" in name)}  # other names are also words of the language
    files = [path for folder in ("runner", "benchmarks") for path in (REPOSITORY / folder).rglob("*")]
    texts = [path for path in files if path.suffix in {".py", ".toml", ".html", ".js", ".css"}]
    assert {path.suffix for path in texts} >= {".py", ".html"}
    named = [(path.name, name) for path in texts for name in names for _ in range(path.read_text().count(name))]
    (default,) = ArmSettings().objectives
    assert named == [("config.py", default)], "only the default of the setting `objectives` names one"


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
    code = (
        "from snac_runner.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
    )
    assert not {"torch", "torchaudio", "scipy", "matplotlib", "huggingface_hub", "ray"} & loaded_by(code)


def test_a_conversion_imports_nothing_of_training_judging_and_reports(tmp_path: Path) -> None:
    """What takes long to import and is not needed: a conversion of a short file is mostly start-up."""
    for number in (1, 2):
        soundfile.write(tmp_path / f"{number}.wav", speech_like(16000, 1.0, number)[-1, 0].numpy(), 16000)
    arguments = ["convert"]
    for role, name in (("source", "1.wav"), ("target", "2.wav"), ("out", "c.wav")):
        arguments += [f"--{role}", str(tmp_path / name)]
    code = (
        "from snac_runner.cli import main\n"
        f"try:\n    main({arguments!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "import sys\n"
        "assert not {'snac_runner.resources', 'snac_runner.evaluate.judges'} & sys.modules.keys()\n"
    )
    loaded = loaded_by(code)
    assert "torch" in loaded
    assert not {"tensorboard", "faiss", "scipy", "matplotlib", "huggingface_hub", "jinja2", "onnx", "ray"} & loaded
    assert (tmp_path / "c.wav").is_file()


def test_the_core_tells_type_checkers_that_it_is_typed() -> None:
    assert (REPOSITORY / "snac_core" / "py.typed").is_file()
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]
    assert {"module": "snac_core.*", "strict": True} in settings["overrides"]


def test_pre_commit_and_continuous_integration_run_the_same_checks() -> None:
    integration = [line for line in (REPOSITORY / ".ci" / "run").read_text().splitlines() if line.startswith("uv run ")]
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^ +entry: (.*)$", hooks, flags=re.MULTILINE) == integration
    assert "uv run pytest" in integration
