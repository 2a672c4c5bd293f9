"""Public speech corpora: where their archives lie and what their checksums are.

URLs and SHA-256 digests are those of torchaudio 2.11 (torchaudio/datasets/librispeech.py, libritts.py, vctk.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """One file to download.

    Attributes:
        url: where it is.
        sha256: of its bytes, in hex.
        into: the folder, below the data folder, that it is unpacked into; "" for archives that bring their own.
    """

    url: str
    sha256: str
    into: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Source:
    """A corpus: its parts, those taken if none is named, and the folder that is there when they are unpacked."""

    parts: dict[str, Archive]
    usual: tuple[str, ...]
    folder: str


def _openslr(number: int, digests: dict[str, str]) -> dict[str, Archive]:
    base = f"https://www.openslr.org/resources/{number}"
    return {part: Archive(f"{base}/{part}.tar.gz", digest) for part, digest in digests.items()}


SOURCES = {
    "librispeech": Source(
        _openslr(
            12,
            {
                "dev-clean": "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3",
                "dev-other": "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365",
                "test-clean": "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23",
                "test-other": "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29",
                "train-clean-100": "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
                "train-clean-360": "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf",
                "train-other-500": "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2",
            },
        ),
        ("train-clean-100", "dev-clean", "test-clean"),
        "LibriSpeech",
    ),
    "libritts": Source(
        _openslr(
            60,
            {
                "dev-clean": "da0864e1bd26debed35da8a869dd5c04dfc27682921936de7cff9c8a254dbe1a",
                "dev-other": "d413eda26f3a152ac7c9cf3658ef85504dfb1b625296e5fa83727f5186cca79c",
                "test-clean": "234ea5b25859102a87024a4b9b86641f5b5aaaf1197335c95090cde04fe9a4f5",
                "test-other": "33a5342094f3bba7ccc2e0500b9e72d558f72eb99328ac8debe1d9080402f10d",
                "train-clean-100": "c5608bf1ef74bb621935382b8399c5cdd51cd3ee47cec51f00f885a64c6c7f6b",
                "train-clean-360": "ce7cff44dcac46009d18379f37ef36551123a1dc4e5c8e4eb73ae57260de4886",
                "train-other-500": "e35f7e34deeb2e2bdfe4403d88c8fdd5fbf64865cae41f027a185a6965f0a5df",
            },
        ),
        ("train-clean-100", "dev-clean", "test-clean"),
        "LibriTTS",
    ),
    "vctk": Source(
        {
            "0.92": Archive(
                "https://datashare.is.ed.ac.uk/bitstream/handle/10283/3443/VCTK-Corpus-0.92.zip",
                "f96258be9fdc2cbff6559541aae7ea4f59df3fcaf5cf963aae5ca647357e359c",
                "VCTK-Corpus-0.92",
            )
        },
        ("0.92",),
        "VCTK-Corpus-0.92",
    ),
}
