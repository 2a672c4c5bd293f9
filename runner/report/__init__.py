"""From result files to a page that people can read, hear and check.

`build` writes report.html, report.md, report.json and tables/ into a study folder, or into the folder of one run; it
reads nothing but result files, and writes the same bytes whenever it is called on the same ones. `summary` is the short
table for a terminal.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["build", "summary"]


def build(study_folder: str | Path) -> Path:
    """Write the report of a study folder, or of a run's folder; return the path of report.html.

    Raises snac_core.errors.UserError where the folder is missing or holds no result. Whatever else is missing, failed
    or broken is stated in the page.
    """
    from runner.report.write import write

    return write(Path(study_folder))


def summary(study_folder: str | Path) -> str:
    """The verdict and a table of the arms as plain text, for the end of a command."""
    from runner.report.write import summarise

    return summarise(Path(study_folder))
