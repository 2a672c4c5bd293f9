"""From result files to a page that people can read, hear and check.

`build` writes report.html, report.md, report.json, abx.html and tables/ into a study folder, or into the folder of one
run; it reads nothing but result files and votes, and writes the same bytes whenever it is called on the same ones.
`build_leaderboard` does the same over several studies. `summary` is the short table for a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["add_votes", "build", "build_leaderboard", "summary"]


def build(study_folder: str | Path) -> Path:
    """Write the report of a study folder, or of a run's folder; return the path of report.html.

    Raises snac_core.errors.UserError where the folder is missing or holds no result. Whatever else is missing, failed
    or broken is stated in the page.
    """
    from runner.report.results import read
    from runner.report.write import write

    return write(read(study_folder))


def summary(study_folder: str | Path) -> str:
    """The verdict and a table of the arms as plain text, for the end of a command."""
    from runner.report.results import read
    from runner.report.write import summarise

    return summarise(read(study_folder))


def add_votes(study_folder: str | Path, votes: str | Path) -> Path:
    """Keep the votes that abx.html exported with their study; the next `build` shows them."""
    from runner.report.abx import accept
    from runner.report.results import read

    return accept(read(study_folder), Path(votes))


def build_leaderboard(study_folders: Sequence[str | Path], out: str | Path) -> tuple[Path, str, list[str]]:
    """Write one report over several studies into `out`.

    Returns:
        the path of report.html, the summary, and a line for each study that cannot be compared with the first.
    """
    from runner.report.leaderboard import merged
    from runner.report.write import summarise, write

    study, refused = merged([Path(folder) for folder in study_folders], Path(out))
    return write(study), summarise(study), refused
