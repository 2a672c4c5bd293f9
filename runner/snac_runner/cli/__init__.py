"""The command line. torch is imported only when a command that needs it runs."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress
from itertools import pairwise
from typing import Any

import typer

from snac_core.errors import UserError, system_error
from snac_runner.cli import app as app_page
from snac_runner.cli import bench, convert, data, evaluate, export, index, plugins, pretrain, train
from snac_runner.cli.console import Stopped, is_first
from snac_runner.cli.launch import Launch, launch

app = typer.Typer(
    name="runner",
    help="Train and compare speaker-conditioning strategies for a frozen SNAC codec.",
    epilog="Start with: runner quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (train, evaluate, convert, app_page, export, plugins, pretrain, bench):
    module.add_to(app)
app.add_typer(data.app, name="data")
app.add_typer(index.app, name="index")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        from snac_core.hookspecs import API_VERSION

        print(f"snac-conditioning {version('snac-conditioning')}, hook API {API_VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; allowed anywhere."),
) -> None:
    """Train and compare speaker-conditioning strategies for a frozen SNAC codec."""


RENAMED_OPTIONS = {"--teacher": "--speaker-encoder"}
"""Former names of options, to the names that replace them."""

# The exception for a mistyped command line: the base class of typer's BadParameter, in whichever click typer uses.
UsageProblem: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with 0, 2 (a mistake of the user, in one line), 130 (Ctrl-C) or 1."""
    # Threads that wait actively make torch ten times slower on a machine that also runs other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()
    threading.excepthook = _report_of_thread
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    arguments = _spread([argument for argument in given if argument != "--debug"])
    try:
        code = typer.main.get_command(app)(arguments, prog_name="runner", standalone_mode=False)
    except UserError as error:
        _end(str(error), 2, debug)
    except UsageProblem as error:
        _end(_explained(error, arguments), 2, debug)
    except Launch as request:
        sys.exit(launch(request.devices, given))
    except (Stopped, KeyboardInterrupt, typer.Abort) as error:
        _end(str(error) or "interrupted", 130, debug)
    except OSError as error:
        _end(system_error(error), 2, debug)
    if code == 130:  # typer's exit code for Ctrl-C
        print("error: interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _report_of_thread(arguments: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, unless it keeps its error for the main thread, as TensorBoard's writer does."""
    if not (isinstance(arguments.exc_value, OSError) and hasattr(arguments.thread, "exception")):
        threading.__excepthook__(arguments)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_KEPT, _LARGEST = 2**29, 2**25  # bytes: freed memory that is kept; the largest mmap threshold that glibc accepts


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory: activations that come from the system again cost a tenth of the codec's time."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        for option, value in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT)):
            ctypes.CDLL(None).mallopt(option, value)


SEVERAL = {**dict.fromkeys(("convert", "encode", "decode", "export"), ("--source", "--target")), "app": ("--run",)}
"""Commands to those of their options that take several values: a shell expands `--target b/*.wav`."""


def _spread(arguments: list[str]) -> list[str]:
    """Repeat an option of `SEVERAL` before each of its values."""
    spread: list[str] = []
    option = ""
    repeated = SEVERAL.get(arguments[0], ()) if arguments else ()
    for position, argument in enumerate(arguments):
        if argument.startswith("-") and argument != "-":
            option = argument
        elif option in repeated and arguments[position - 1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def _explained(error: Any, arguments: list[str]) -> str:
    """The message of a usage error, with the value that was given, or the new name of the option."""
    unknown = getattr(error, "option_name", None)
    if unknown in RENAMED_OPTIONS:
        return f"{unknown} is now {RENAMED_OPTIONS[unknown]}"
    if not error.format_message():  # no command at all: the help has been printed
        return "no command; give one of those above"
    options = getattr(getattr(error, "param", None), "opts", ())
    given = [value for option, value in pairwise(arguments) if option in options]
    got = f"; got {given[-1]!r}" if given else ""
    return f"{error.format_message()}{got} (runner --help lists the commands, runner COMMAND --help the options)"


def _end(message: str, code: int, debug: bool) -> None:
    if debug:
        raise
    who = "" if is_first() else f"process {os.environ['RANK']}: "
    printed = " ".join(message.split()).encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
    print(f"{who}error: {printed}", file=sys.stderr)
    sys.exit(code)
