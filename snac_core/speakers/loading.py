"""From the name of a speaker encoder to the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snac_core.errors import UserError
from snac_core.speakers.encoder import SpeakerEncoder

if TYPE_CHECKING:
    from snac_core.plugins import Catalogue


def load_speaker_encoder(
    name: str, *, weights: str | Path | None = None, plugins: Catalogue | None = None
) -> SpeakerEncoder:
    """Build a registered speaker encoder, frozen and in eval mode.

    Args:
        name: e.g. "ge2e".
        weights: file to load instead of the encoder's own.
        plugins: where to look the name up; the installed plugins when not given.

    Raises:
        UserError: for an unknown name, or weights that are missing or do not fit.
    """
    if plugins is None:
        from snac_core.plugins import discover

        plugins = discover()
    kind = plugins.speaker_encoders[name]
    if not (isinstance(kind, type) and issubclass(kind, SpeakerEncoder)):
        raise UserError(f"speaker encoder {name!r} is {kind!r}; expected a subclass of SpeakerEncoder")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"no file {weights} to load the weights of speaker encoder {name!r} from")
    from snac_core.containment import contained

    with contained(f"speaker encoder {name!r} of {plugins.speaker_encoders.origins[name]}"):
        return kind(weights)
