"""Every code block of the documentation runs, every link has a target, and generated parts are up to date."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_study import SMALL, Bench, runner

from snac_runner import config
from snac_runner.config import StudySettings, compose
from snac_runner.pretrain.evaluate import compare
from snac_runner.pretrain.settings import PretrainSettings, recipe
from snac_runner.resources import StudyResources

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
TEXTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text()


@pytest.fixture
def world(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with speech, two recordings and the examples, in which studies are made small.

    What stands in the documentation is what runs; numbers alone are replaced (steps, seeds, pairs, a small base),
    and what all studies have in common is loaded once.
    """
    (tmp_path / "speech").symlink_to(bench.speech)
    (tmp_path / "examples").symlink_to(PROJECT / "examples")
    for name, speaker in zip("ab", sorted((bench.speech / "train").iterdir()), strict=False):
        shutil.copy(sorted(speaker.glob("*.flac"))[0], tmp_path / f"{name}.wav")
    compose_settings = config.compose

    def small(*arguments: Any) -> Any:
        study, arms, rates = compose_settings(*arguments)
        changes = {**SMALL, "base": str(bench.base), "steps": 2, "seeds": study.seeds[:1]}
        if study.speaker_encoder != StudySettings().speaker_encoder:
            del changes["speaker_encoder"]
        return study.model_copy(update=changes), arms, rates

    def loaded(study: StudySettings, catalogue: Any, **_: Any) -> StudyResources:
        if study.speaker_encoder != SMALL["speaker_encoder"]:
            return StudyResources(study, catalogue)
        resources = bench.resources(study)
        resources.catalogue = catalogue
        return resources

    def quick(name: str, **changes: Any) -> PretrainSettings:
        few = {
            "steps": 1,
            "batch_size": 1,
            "crop_seconds": 0.32,
            "synthetic": 0,
            "validate_every": 0,
            "adversary": "none",
        }
        return recipe(name, **{**changes, **few})

    monkeypatch.setattr(config, "compose", small)
    monkeypatch.setattr("snac_runner.resources.StudyResources", loaded)
    monkeypatch.setattr("snac_runner.pretrain.settings.recipe", quick)
    monkeypatch.setattr("snac_runner.pretrain.evaluate.compare", partial(compare, max_items=1, coarse=False))
    monkeypatch.setattr("snac_runner.unit.noise_floor", lambda *_: 0.0)
    monkeypatch.setattr("snac_core.testing.strategies.COMPILING", [])  # ten seconds; tested elsewhere
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def run_python(code: str, names: dict[str, Any]) -> None:
    """Run a block; one that begins with the name of a file is written there too."""
    if found := re.match(r"# (\w+\.py)\n", code):
        Path(found[1]).write_text(code)
        names = {"__name__": "documentation"}
    exec(compile(code, "documentation", "exec"), names)


def run_bash(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a block line by line: `runner` in this process, everything else in a shell."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["runner"]:
            assert runner(*words[1:]) == 0, f"{line}: {capsys.readouterr().err}"
        elif words and words[0] not in ("pip", "uv"):
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
            assert done.returncode == 0, f"{line}: {done.stderr}"
            assert done.stdout.strip(), f"{line} printed nothing"


def check_toml(code: str) -> None:
    """A study must be valid; other TOML must parse."""
    values = tomllib.loads(code)
    if "study" in values:
        study, arms, _ = compose(values["study"], values["arm"], "documentation")
        assert study.name == values["study"]["name"]
        assert len(arms) == len(values["arm"])


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(text_of(page))])
def test_the_blocks_of_a_page_run_from_top_to_bottom(
    page: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "documentation"}
    for language, code in BLOCK.findall(text_of(page)):
        if language == "python":
            run_python(code, names)
        elif language == "bash":
            run_bash(code, capsys)
        elif language == "toml":
            check_toml(code)
        elif language == "json" and (found := re.match(r"// (\w+\.json)\n", code)):
            Path(found[1]).write_text(code)
        elif language != "text":  # commands that take hours, and output; that options exist is tested below
            pytest.fail(f"docs/{page}.md has a block that no test runs: {language!r}")


def test_the_options_of_every_command_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for page in PAGES:
        for language, code in BLOCK.findall(text_of(page)):
            shell = language in ("bash", "text")
            lines = [shlex.split(line, comments=True) for line in code.splitlines()] if shell else []
            for words in lines:
                if words[:1] != ["runner"]:
                    continue
                names = words[1 : 3 if words[1] in ("data", "index", "plugins") else 2]
                assert runner(*names, "--help") == 0
                told = capsys.readouterr().out
                for option in (word for word in words if word.startswith("--")):
                    assert option in told, f"docs/{page}.md: runner {' '.join(names)} has no {option}"


def headings(path: Path) -> set[str]:
    """Anchors of a page, as repository pages make them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_link_leads_to_something_that_is_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", path.read_text())):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in headings(place), f"{path.name} links to {target}"


def test_the_index_links_every_page() -> None:
    index = text_of("README")
    for page in (*PAGES[1:], "objectives", "speakers"):
        assert f"({page}.md)" in index


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_up_to_date() -> None:
    make: Callable[[], dict[Path, str]] = generator().generated
    for path, text in make().items():
        assert path.read_text() == text, f"{path.name} is not what the code says; run: python docs/generate.py"


def test_the_lines_of_code_that_a_plugin_takes_are_few() -> None:
    for code in re.findall(r"^```python\n# \w+\.py\n(.*?)^```$", text_of("plugins"), flags=re.DOTALL | re.MULTILINE):
        assert len([line for line in code.splitlines() if line.strip()]) < 45


def test_the_readme_shows_the_columns_that_a_study_prints(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = shutil.copytree(finished, tmp_path / "study")
    assert runner("report", study) == 0
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("arm "))
    readme = next(line for line in (PROJECT / "README.md").read_text().splitlines() if line.startswith("arm "))
    columns = re.split(r"  +", readme)
    assert len(columns) == 8
    assert set(re.split(r"  +", printed.strip())) <= set(columns)
