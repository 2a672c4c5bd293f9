"""`runner export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snac_core.errors import UserError
from snac_runner.cli.console import Disable, Plugin, catalogue_of, say, terminal
from snac_runner.cli.convert import Base, Checkpoint, Run, Target


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: runner export --run RUN --out exported")(export)


def export(
    out: Annotated[Path, typer.Option(help="New folder for encoder, quantizer, decoder and export.json.")],
    run: Run = None,
    target: Target = [],  # noqa: B006
    file_format: Annotated[
        str, typer.Option("--format", help="onnx, or torch for archives of torch.export (.pt2).")
    ] = "onnx",
    checkpoint: Checkpoint = False,
    base: Base = None,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Export encoder, quantizer and decoder with their adapters, for use without this package.

    Each part is checked against the model. --target also writes the speaker embedding, speaker.npy, and reference.npy
    for an adapter that attends to speech of the target.
    """
    import numpy as np

    from snac_core.codec.export import check_possible
    from snac_core.codec.export import export as export_parts
    from snac_core.files import writing
    from snac_runner.batch_convert import target_files
    from snac_runner.convert import Converter, best_adapter

    check_possible(out, file_format)  # before the model is loaded
    with terminal() as console:
        if run is None:
            run = best_adapter(base, target)
            console.line(f"using the bundled adapter {run}; --run RUN uses another")
        catalogue = catalogue_of(plugin, disable_plugin, console)
        converter = Converter(run, "cpu", catalogue, base=base, checkpoint=checkpoint, console=console)
        cond = converter.target(target_files(target)) if target else None
        console.line("exporting; this takes about a minute")
        done = export_parts(converter.model, out, file_format)
        if cond is not None and done.files:
            for name, tensor in {"speaker": cond.speaker, **cond.extras}.items():
                with writing(out / f"{name}.npy") as temporary:
                    np.save(temporary, tensor.numpy())
    for path in done.files.values():
        say(str(path))
    for name, value in done.parity.items():
        equal = name.endswith("_equal")
        say(f"{name.replace('_', ' ')}: {f'{100 * value:.4g} %' if equal else f'{value:.3g}'}")
    if done.failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in done.failed.items())
        raise UserError(f"{len(done.failed)} of {len(done.failed) + len(done.files)} parts failed: {reasons}")
