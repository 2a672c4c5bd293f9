"""The page of `runner app` in Gradio. Only `snac_runner.app.server` imports this module, after it has set Gradio up."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from snac_core.errors import UserError
from snac_runner.app.adapters import REPORT, Offer
from snac_runner.app.conversion import Conversions, ProgressConsole
from snac_runner.convert import best_adapter
from snac_runner.data.media import BITS, media_suffixes
from snac_runner.report.format import plural

_HERE = Path(__file__).parent
CSS = _HERE / "page.css"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
"""Without fonts of another server."""
_MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # events that compute run one by one

_log = logging.getLogger(__name__)


def build(conversions: Conversions) -> gr.Blocks:
    """The page. Its HTTP API has the endpoints /convert, /convert_files and /report."""
    offer, limits = conversions.offer, conversions.limits
    stopped: set[str | None] = set()  # sessions in which Stop was pressed
    page = gr.Blocks(title="snac-conditioning", analytics_enabled=False, delete_cache=(3600, 24 * 3600))
    with page:
        gr.Markdown(
            "# Convert speech\nThe words of a source in the voice of a target. Files stay on the computer that runs "
            f"this page. A recording can have {limits.minutes:g} minutes, a file {limits.megabytes:g} MB. "
            "Converting the voice of a person needs the agreement of that person."
        )
        with gr.Tab("Convert"):
            with gr.Row():
                source = _recording("Source: the words", "source")
                target = _recording("Target: the voice", "target")
            with gr.Accordion("More speech of the target", open=False):
                more = gr.File(
                    label="Recordings of the same speaker", file_count="multiple", height=140,
                    file_types=list(media_suffixes()),
                )  # fmt: skip
            adapters = _choice(offer, multiselect=True)
            scale = _scale()
            with gr.Row():
                convert = gr.Button("Convert", variant="primary", scale=4)
                stop = gr.Button("Stop", scale=1, min_width=80)
            shown = gr.HTML(label="Comparison", elem_classes="result")
            with gr.Accordion("Files", open=False):
                files = gr.File(label="Recordings of the comparison", file_count="multiple", interactive=False)
                scores = gr.JSON(label="Scores")
        with gr.Tab("Many files"):
            with gr.Row():
                uploads = gr.File(
                    label="Sources: recordings, or zip files of a folder", file_count="multiple", height=278,
                    file_types=[*media_suffixes(), ".zip"],
                )  # fmt: skip
                voice = _recording("Target: the voice", "voice")
            with gr.Row():
                adapter = _choice(offer)
                suffix = gr.Dropdown([name.lstrip(".") for name in BITS], value="wav", label="Format of the results")
                scale_all = _scale()
            with gr.Row():
                convert_all = gr.Button("Convert all", variant="primary", scale=4)
                stop_all = gr.Button("Stop", scale=1, min_width=80)
            told = gr.Markdown(label="Summary", elem_classes="result")
            archive = gr.DownloadButton("Download the results (zip)")
        with gr.Tab("Report"):
            if not offer.studies:
                gr.Markdown("There is no report. Start the page with `runner app --run STUDY` to read one here.")
            study = gr.Dropdown(list(offer.studies), label="Study", visible=len(offer.studies) > 1)
            report = gr.HTML(_frame(offer, next(iter(offer.studies), None)), label="Report", elem_classes="report")

        def compare(
            source: str | None, target: str | None, more: list[str] | None, adapters: list[str], scale: float,
            request: gr.Request, progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> tuple[str, list[str], dict[str, Any]]:  # fmt: skip
            with _errors_shown(conversions):
                console = _console(stopped, request, progress)
                targets = [Path(path) for path in (target, *(more or ())) if path]
                speech = _given(source, "source"), _all_given(targets, "target")
                found = conversions.compare(*speech, adapters, console, scale)
                paths = [str(sample.file) for sample in found.samples]
                return _template().render(comparison=found), paths, found.scores()

        def compare_many(
            uploads: list[str] | None, target: str | None, adapter: str, suffix: str, scale: float,
            request: gr.Request, progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> tuple[str, str]:  # fmt: skip
            with _errors_shown(conversions):
                console = _console(stopped, request, progress)
                sources = _all_given([Path(path) for path in uploads or ()], "source")
                targets = [_given(target, "target")]
                batch = conversions.convert_files(sources, targets, adapter, f".{suffix}", console, scale)
                lines = "".join(f"\n- {_escaped(line)}" for line in batch.lines)
                told = f"{plural(batch.converted, 'file')} converted.\n{lines}"
                return told, str(batch.archive)

        def show_report(study: str | None) -> str:
            with _errors_shown(conversions):
                return _frame(offer, study)

        def stop_session(request: gr.Request) -> None:
            stopped.add(request.session_hash)

        convert.click(
            compare, [source, target, more, adapters, scale], [shown, files, scores], api_name="convert",
            show_progress_on=shown, **_MODEL,
        )  # fmt: skip
        convert_all.click(
            compare_many, [uploads, voice, adapter, suffix, scale_all], [told, archive], api_name="convert_files",
            show_progress_on=told, **_MODEL,
        )  # fmt: skip
        study.change(show_report, study, report, api_name="report")
        for button in (stop, stop_all):
            button.click(stop_session, queue=False, api_visibility="private")
        page.unload(stop_session)
    return page


def _recording(label: str, name: str) -> gr.Audio:
    return gr.Audio(label=label, sources=["upload", "microphone"], type="filepath", buttons=[], elem_classes=name)


def _choice(offer: Offer, multiselect: bool = False) -> gr.Dropdown:
    """A list of the adapters; the first that `--run` names is selected, else the best bundled one."""
    first = next(iter(offer.adapters))
    names = {run: name for name, run in offer.adapters.items()}
    value = names.get(best_adapter(None), first) if first == min(offer.adapters) else first
    return gr.Dropdown(
        list(offer.adapters), value=[value] if multiselect else value, multiselect=multiselect,
        allow_custom_value=offer.typed, label="Adapters" if multiselect else "Adapter",
        info="Several are compared side by side." if multiselect else None,
    )  # fmt: skip


def _scale() -> gr.Slider:
    return gr.Slider(
        0, 2, value=1, step=0.1, label="Edit scale",
        info="1: as trained; 0: the bare codec; above 1: more of the target, fewer correct words.",
    )  # fmt: skip


def _console(stopped: set[str | None], request: gr.Request, progress: gr.Progress) -> ProgressConsole:
    session = request.session_hash
    stopped.discard(session)
    return ProgressConsole(lambda part, title: progress(part, desc=title), lambda: session in stopped)


def _given(path: str | None, what: str) -> Path:
    if not path:
        raise UserError(f"no {what}; upload or record speech of the {what}")
    return Path(path)


def _all_given(paths: Sequence[Path], what: str) -> Sequence[Path]:
    if not paths:
        raise UserError(f"no {what}; upload or record speech of the {what}")
    return paths


@contextmanager
def _errors_shown(conversions: Conversions) -> Iterator[None]:
    """Errors as messages in the page; those that are not the visitor's have their traceback on the terminal."""
    try:
        yield
    except UserError as error:
        raise _shown(conversions.plain(str(error))) from error
    except gr.Error:
        raise
    except Exception as error:
        _log.exception("a request failed")
        text = conversions.plain(" ".join(str(error).split()))[:300]
        raise _shown(f"{type(error).__name__}: {text}") from error


def _shown(text: str) -> gr.Error:
    """An error that is displayed until it is closed; Gradio renders its text as HTML."""
    return gr.Error(escape(text, quote=False), duration=None, print_exception=False)


def _frame(offer: Offer, study: str | None) -> str:
    """The report of a study; its scripts run in a sandbox, without access to this page."""
    if study is None:
        return ""
    if study not in offer.studies:
        raise UserError(f"no study {study!r}; expected one of {', '.join(offer.studies) or 'none'}")
    place = f"report/{list(offer.studies).index(study)}/{REPORT}"
    return f'<iframe title="Report" sandbox="allow-scripts allow-downloads" src="{place}"></iframe>'


def _escaped(text: str) -> str:
    """Text without meaning as Markdown or HTML."""
    return "".join(f"&#{ord(c)};" if c in "<>&*_`[]()#!|\\~" else c for c in text)


def _template() -> Any:
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    environment.filters["url"] = lambda path: f"gradio_api/file={quote(str(path))}"
    return environment.get_template("comparison.html")
