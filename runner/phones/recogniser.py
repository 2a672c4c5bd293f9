"""The phone recogniser as a judge: from audio to the phones that are heard in it."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from runner.data.audio import resample
from runner.phones.alphabet import PHONES
from runner.phones.network import BLANK, SAMPLE_RATE, PhoneNetwork
from snac_core.errors import UserError

ASSET = Path(__file__).resolve().parent / "assets" / "phones_tiny" / "model.safetensors"


class PhoneRecogniser:
    """Names the phones in speech; an item's are the same whatever is read before or beside it.

    Args:
        weights: safetensors of a PhoneNetwork; None: those that come with the package.

    Attributes:
        digest: sha256 (hex) of the file of weights.

    Raises:
        UserError: if there is no such file, or it does not fit.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        path = Path(weights) if weights is not None else ASSET
        if not path.is_file():
            raise UserError(
                f"no weights of the phone recogniser at {path}: reinstall this package, "
                "or train them with `python -m runner.phones train`"
            )
        self.network = PhoneNetwork()
        try:
            self.network.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path} does not load as weights of the phone recogniser: {reason}") from error
        self.network.eval().requires_grad_(False)
        self.digest = sha256(path.read_bytes()).hexdigest()

    def __call__(self, audio: Tensor, sample_rate: int) -> tuple[str, ...]:
        """Phones in audio (T,) or (1, T)."""
        wave = resample(audio.reshape(1, -1).float(), sample_rate, SAMPLE_RATE)
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            return decode(self.network(wave)[0])


@cache
def bundled() -> PhoneRecogniser:
    """The recogniser that comes with the package, loaded once."""
    return PhoneRecogniser()


def decode(logits: Tensor) -> tuple[str, ...]:
    """The likeliest class of each frame (F, 40), once for a run of them, without blanks (Graves et al. 2006, eq. 4)."""
    best = (index for index, _ in groupby(logits.argmax(-1).tolist()))
    return tuple(PHONES[index - 1] for index in best if index != BLANK)
