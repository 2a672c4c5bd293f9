"""Names that a study keeps for itself."""

from __future__ import annotations

SHUFFLED = "shuffled"
"""The control arm, trained under wrong embeddings."""

CONTROL_ROWS = ("source", "floor", "ceiling", "mismatched", "moved_voice", SHUFFLED)
"""What every report compares the arms with."""

SYSTEMS = "systems"
"""Folder of other systems' results."""

RESERVED = frozenset({"controls", SYSTEMS, "tables", "trials", "export", "votes", SHUFFLED, ".", ".."})
"""What no arm can be called: folders of a study, and the control arm."""
