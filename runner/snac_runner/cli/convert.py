"""`runner convert`, `runner encode` and `runner decode`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snac_core.errors import UserError
from snac_runner.cli.console import Disable, Plugin, Stopped, catalogue_of, say, terminal

if TYPE_CHECKING:
    from snac_core.conditioning import Conditioning
    from snac_runner.batch_convert import Job
    from snac_runner.code_files import Item
    from snac_runner.convert import Converter
    from snac_runner.data.media import AudioFormat

Run = Annotated[
    str | None,
    typer.Option(
        help="Run folder or its model, a bundled adapter, or a hub id; if left out, the best bundled adapter.",
        show_default=False,
    ),
]
Target = Annotated[
    list[str],
    typer.Option(
        "--target",
        help="Speech of the target speaker: files, folders, patterns, a .txt list, or embeddings (.npy, .safetensors).",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Codec. Default: the base of the run, or tiny without a run.", show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[str, typer.Option(help="Of the codec's convolutions: fp32, or bf16, which changes the result.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the codec; some seconds, then faster on a CPU.")]
EditScale = Annotated[
    float, typer.Option(help="Factor of the edits: 0 is the bare codec; above 1 converts more and loses more words.")
]
Checkpoint = Annotated[bool, typer.Option("--checkpoint", help="Use the latest checkpoint of an unfinished run.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: runner convert --source a.wav --target b.wav --out c.wav")(convert)
    app.command(epilog="Example: runner encode --source a.wav --out codes.safetensors --run RUN --target b.wav")(encode)
    app.command(epilog="Example: runner decode --codes codes.safetensors --out c.wav")(decode)


def convert(
    out: Annotated[str, typer.Option(help="File to write (.wav, .flac, .opus), - for standard output, or a folder.")],
    source: Annotated[
        list[str], typer.Option(help="Speech to convert: files, a folder, a pattern, or - for standard input.")
    ] = [],  # noqa: B006
    target: Target = [],  # noqa: B006
    run: Run = None,
    pairs: Annotated[
        Path | None, typer.Option(help="CSV file with the columns source,target[,out].", show_default=False)
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Also write source, bare, identity, synthetic.")] = False,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Of the files in an output folder, and on standard output: wav (default), flac, opus.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits per sample: 16, 24, or 32 (floating point, wav only).")] = 16,
    keep_rate: Annotated[bool, typer.Option("--keep-rate", help="Write at the sample rate of the source.")] = False,
    keep_level: Annotated[bool, typer.Option("--keep-level", help="Scale to the RMS level of the source.")] = False,
    edit_scale: EditScale = 1.0,
    checkpoint: Checkpoint = False,
    base: Base = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compile_: Compile = False,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Convert speech to the voice of a target speaker; the embeddings of several target files are averaged.

    A folder, a pattern or several sources are converted into the folder --out, in which finished files are kept.
    """
    from snac_runner.batch_convert import is_many, jobs_of_list, jobs_of_sources, target_files
    from snac_runner.convert import Converter, best_adapter
    from snac_runner.data.media import PIPE, AudioFormat

    if pairs is not None and (source or target):
        raise UserError("--pairs lists sources and targets; do not give --source or --target with it")
    if pairs is None and not (source and target):
        raise UserError("give --source and --target, or --pairs LIST.csv")
    many = pairs is not None or is_many(source)
    if many and out == PIPE:
        raise UserError("--out - is standard output, which takes one source; give a folder")
    if PIPE in source and PIPE in target:
        raise UserError("--source - and --target - are both standard input; give a file for one of them")
    given = output_format and "." + output_format.lower().lstrip(".")
    if not many and PIPE not in (out, source[0]) and (Path(out).is_dir() or out.endswith(("/", os.sep))):
        out = str(Path(out, Path(source[0]).stem + (given or ".wav")))
    if not many and source[0] != PIPE and not Path(source[0]).exists():
        raise UserError(f"no audio file {source[0]}; expected a source")
    suffix = given or ".wav" if many or out == PIPE else Path(out).suffix.lower()
    if given and given != suffix:
        raise UserError(f"--out {out} and --format {output_format} are different formats; leave out --format")
    audio_format = AudioFormat(suffix, bits, keep_rate, keep_level)
    if stages and (many or out == PIPE):
        raise UserError("--stages writes files beside one output file; give one --source, and a file as --out")
    jobs = []
    if pairs is not None:
        jobs = jobs_of_list(pairs, Path(out), suffix)
    elif many:
        jobs = jobs_of_sources(source, target, Path(out), suffix)
    with terminal() as console:
        if run is None:
            if checkpoint:
                raise UserError("--checkpoint is of an unfinished run; give its folder with --run RUN")
            run = best_adapter(base, target)
            console.line(f"using the bundled adapter {run}; --run RUN uses another")
        catalogue = catalogue_of(plugin, disable_plugin, console)
        converter = Converter(
            run, device, catalogue, base=base, checkpoint=checkpoint, edit_scale=edit_scale, console=console
        )
        converter.accelerate(precision, compiled=compile_)
        if many:
            _convert_all(jobs, converter, Path(out), audio_format)
            return
        aim = converter.target(target_files(target))
        written = converter.convert(Path(source[0]), aim, Path(out), stages=stages, audio_format=audio_format)
    if out != PIPE:
        for path in written:
            say(str(path))


def _convert_all(jobs: list[Job], converter: Converter, out: Path, audio_format: AudioFormat) -> None:
    """Convert files into a folder.

    Raises:
        UserError: if a file could not be converted.
        Stopped: on Ctrl-C.
    """
    from snac_runner.batch_convert import convert_all

    try:
        outcome = convert_all(jobs, converter, out, audio_format)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; give the same command again to continue in {out}") from None
    before = f", {outcome.finished_before} were finished before" if outcome.finished_before else ""
    say(f"{outcome.converted} of {len(jobs)} files converted into {out}{before}")
    if outcome.failed:
        raise UserError(f"{outcome.failed} of {len(jobs)} files were not converted; the reasons are above")


def encode(
    source: Annotated[list[str], typer.Option(help="Speech to encode: files, a folder, or a pattern.")],
    out: Annotated[
        Path, typer.Option(help="File to write: .safetensors, .npz, or .jsonl (several sources, one a line).")
    ],
    run: Annotated[
        str | None, typer.Option(help="Trained run with a strategy that acts before VQ.", show_default=False)
    ] = None,
    target: Target = [],  # noqa: B006
    order: Annotated[
        str | None,
        typer.Option(
            help="Write one sequence of tokens in this order: coarse_to_fine, frame, interleaved.", show_default=False
        ),
    ] = None,
    offsets: Annotated[str, typer.Option(help="With --order, tokens differ by: none, level, position.")] = "level",
    first_token: Annotated[int, typer.Option(help="With --order, added to every token.")] = 0,
    edit_scale: EditScale = 1.0,
    checkpoint: Checkpoint = False,
    base: Base = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compile_: Compile = False,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Encode speech to codes or tokens, with or without conditioning."""
    from snac_runner.batch_convert import files_of
    from snac_runner.code_files import check_suffix, write_items
    from snac_runner.convert import Converter, check_out
    from snac_runner.data.media import media_suffixes

    check_suffix(out)
    if order is None and (offsets != "level" or first_token):
        raise UserError("--offsets and --first-token are of tokens; give --order too")
    files = [file for name in source for file, _ in files_of(name, media_suffixes(), "source")]
    if len(files) > 1 and out.suffix.lower() != ".jsonl":
        raise UserError(f"{len(files)} sources into {out}; several are written to a .jsonl file, one a line")
    check_out(out, out.suffix.lower(), files)
    failed = 0
    with terminal() as console:
        catalogue = catalogue_of(plugin, disable_plugin, console)
        converter = Converter(
            run, device, catalogue, base=base, checkpoint=checkpoint, edit_scale=edit_scale, console=console
        )
        converter.accelerate(precision, compiled=compile_)
        layout = None
        if order is not None:
            layout = converter.model.codec.token_layout(order, offsets=offsets, first_token=first_token)
        aim, progress = _target(converter, target, before_vq=True), console.progress("encoding")

        def items() -> Iterator[Item]:
            nonlocal failed
            for number, file in enumerate(files, 1):
                try:
                    yield converter.encode(file, aim)
                except UserError as error:
                    failed += 1
                    if failed == len(files):
                        raise
                    console.warning(f"{error}; left out")
                if len(files) > 1:
                    progress(number, len(files))

        write_items(out, items(), layout)
    say(str(out))
    if failed:
        raise UserError(f"{failed} of {len(files)} files were not encoded; the reasons are above")


def decode(
    codes: Annotated[Path, typer.Option(help="File of codes or tokens, as runner encode writes it.")],
    out: Annotated[Path, typer.Option(help="Wav file to write.")],
    run: Annotated[
        str | None, typer.Option(help="Trained run with a strategy that acts after VQ.", show_default=False)
    ] = None,
    target: Target = [],  # noqa: B006
    line: Annotated[int | None, typer.Option(help="Line of a .jsonl file, from 1.", show_default=False)] = None,
    edit_scale: EditScale = 1.0,
    checkpoint: Checkpoint = False,
    base: Base = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compile_: Compile = False,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Decode a file of codes to speech, with or without conditioning."""
    from snac_runner.code_files import read_item
    from snac_runner.convert import Converter, check_out

    check_out(out, ".wav", [codes])
    with terminal() as console:
        catalogue = catalogue_of(plugin, disable_plugin, console)
        converter = Converter(
            run, device, catalogue, base=base, checkpoint=checkpoint, edit_scale=edit_scale, console=console
        )
        converter.accelerate(precision, compiled=compile_)
        item = read_item(codes, converter.model.codec, line)
        written = converter.decode(item, _target(converter, target, before_vq=False), out)
    say(str(written))


def _target(converter: Converter, names: list[str], *, before_vq: bool) -> Conditioning | None:
    """What encoding (before VQ) or decoding (after it) is conditioned on; None for the bare codec.

    Raises:
        UserError: without a target for a run that acts there.
    """
    from snac_runner.batch_convert import target_files

    if names:
        return converter.target(target_files(names))
    if converter.model.acts(before_vq=before_vq):
        what = "encode" if before_vq else "decode"
        raise UserError(f"the run acts when you {what}; give --target, or leave --run out for the bare codec")
    return None
