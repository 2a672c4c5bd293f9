"""Bases side by side: the same speech of unseen speakers through each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_COLUMNS = (
    ("stoi", "STOI", ".3f"),
    ("pesq", "PESQ-WB", ".2f"),
    ("own", "to own", ".3f"),
    ("other", "to others", ".3f"),
    ("range", "range", ".3f"),
    ("wer_cost", "WER cost", ".1f"),
)


def compare(
    codecs: Iterable[str],
    data: Iterable[str],
    *,
    splits: Iterable[str] = ("dev", "test"),
    coarse: bool = True,
    recogniser: bool = False,
    encoder: str = "ge2e",
    most: int = 64,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """A row per codec, corpus, split and number of levels; printed as Markdown tables.

    Args:
        codecs: bundled names, folders or hub ids; those of different rates are judged on the same speech.
        data: folders of speech.
        splits: whose speakers are heard; each by itself.
        coarse: whether the first level, the first two and so on are decoded as well.
        recogniser: whether the offline recogniser reads it too; the slowest of the figures.
        encoder: judge of who speaks.
        most: utterances of each split.
        say: called with lines.

    Raises:
        UserError: if there is too little speech, or a codec or encoder is not known.
    """
    from runner.data import open_corpus
    from runner.pretrain.figures import choose_items, figures
    from runner.pretrain.words import Recogniser
    from snac_core.codec import SNAC
    from snac_core.speakers import load_speaker_encoder

    judge = load_speaker_encoder(encoder)
    read = Recogniser() if recogniser else None
    bases = {name: SNAC.from_pretrained(name).freeze() for name in codecs}
    rows: list[dict[str, Any]] = []
    for path in data:
        corpus = open_corpus(path, console=say)
        for split in splits:
            for name, codec in bases.items():
                items = choose_items(corpus, (split,), codec.sampling_rate, most=most)
                for levels in range(1 if coarse else codec.n_codebooks, codec.n_codebooks + 1):
                    found = figures(codec, items, judge, levels=levels, read=read)
                    rows.append({"data": f"{corpus.name}/{split}", "codec": name, "levels": levels, **found})
                    say(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()))
    for line in table(rows):
        say(line)
    return rows


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table; columns that nobody measured are left out."""
    rows = list(rows)
    columns = [column for column in _COLUMNS if any(column[0] in row for row in rows)]
    lines = ["| speech | codec | levels | " + " | ".join(title for _, title, _ in columns) + " | used | perplexity |"]
    lines.append("|---" * (5 + len(columns)) + "|")
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, _, form in columns]
        levels = range(sum(key.startswith("used_") for key in row))
        used = ", ".join(f"{100 * row[f'used_{level}']:.0f} %" for level in levels)
        perplexity = ", ".join(f"{row[f'perplexity_{level}']:.0f}" for level in levels)
        lines.append(
            f"| {row['data']} | {row['codec']} | {row['levels']} | {' | '.join(cells)} | {used} | {perplexity} |"
        )
    return lines
