"""Cost of large embedding banks on this machine: opening, indexing, and drawing easy, medium and hard speakers.

Example: python benchmarks/scale.py --rows 1000000 --threads 1
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from snac_core.conditioning import EncoderIdentity
from snac_core.seeding import derive
from snac_core.speakers.bank import Bank, open_bank, write_bank
from snac_core.speakers.index import FLAT_UP_TO, BankPool, build_index, open_index
from snac_core.speakers.sampling import SpeakerSampler, SpeakerTable

DIM = 192
EACH = 50  # utterances of a speaker
BATCH, COUNT = 64, 8  # anchors, and draws for each
PLANNED = 100_000_000
SAME = 0.75  # mean cosine of two utterances of one speaker

_OPEN = """
import json, sys, time
from snac_core.speakers.bank import open_bank
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 if sys.platform == "linux" else 0
open_bank(sys.argv[2])  # a bank of one speaker: what opening any bank loads is loaded
before, begun = resident(), time.perf_counter()
bank = open_bank(sys.argv[1])
seconds = time.perf_counter() - begun
print(json.dumps([seconds, resident() - before, len(bank)]))
"""


@dataclass(frozen=True)
class Cost:
    """Of one size: seconds, bytes, and the share of the true 100 nearest that the index finds."""

    rows: int
    bank_bytes: int
    opening: float
    resident: int
    kind: str
    building: float
    index_bytes: int
    recall: float
    targets: float
    negatives: float


def at_scale(rows: int, rounds: int) -> Iterator[str]:
    """A Markdown table of sizes up to `rows` synthetic embeddings, a line as soon as it is measured; then a plan.

    Speakers are drawn from a normal distribution whose variances fall as 1/i over 192 random directions (as much as 21
    of equal variance), and have 50 utterances each, of mean cosine 0.75. The cosines of two speakers' utterances then
    have a standard deviation of 0.16: hard ones, from 0.6 on, are one in ten thousand.

    Indexing (with its recall) and draws are in CPU time: on one thread of an idle machine, as much time passes.
    """
    yield (
        "| embeddings | bank MB | opened ms | resident MB | index | indexed CPU s | index MB | recall@100 | "
        f"targets of {BATCH}, CPU ms | negatives of {BATCH}, CPU ms |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    costs = []
    for size in (*(size for size in (10_000, 100_000) if size < rows), rows):
        with TemporaryDirectory() as folder:
            cost = _cost(synthetic(Path(folder) / "bank", size), synthetic(Path(folder) / "least", EACH), rounds)
        costs.append(cost)
        yield (
            f"| {cost.rows:,} | {cost.bank_bytes / 1e6:.1f} | {1e3 * cost.opening:.1f} | {cost.resident / 1e6:.1f} | "
            f"{cost.kind} | {cost.building:.1f} | {cost.index_bytes / 1e6:.1f} | {cost.recall:.3f} | "
            f"{1e3 * cost.targets:.1f} | {1e3 * cost.negatives:.1f} |"
        )
    yield from _plan(costs)


def synthetic(folder: Path, rows: int) -> Bank:
    """A bank of synthetic embeddings; see `at_scale`."""
    draw = np.random.default_rng(derive("scale", rows))
    speakers = -(-rows // EACH)
    spread = np.sqrt(1 / np.arange(1, DIM + 1)).astype(np.float32)
    turned = np.linalg.qr(draw.standard_normal((DIM, DIM)))[0].astype(np.float32)
    centres = _unit(draw.standard_normal((speakers, DIM), dtype=np.float32) * spread @ turned)
    labels = (np.arange(rows) // EACH).astype(np.int32)
    embeddings = np.empty((rows, DIM), dtype=np.float32)
    width = math.sqrt((1 / SAME - 1) / float(np.square(spread).sum()))
    for first in range(0, rows, 100_000):
        part = labels[first : first + 100_000]
        noise = draw.standard_normal((len(part), DIM), dtype=np.float32) * spread * np.float32(width)
        embeddings[first : first + len(part)] = _unit(centres[part] + noise @ turned)
    arrays: dict[str, NDArray[Any]] = {
        "embeddings": embeddings,
        "labels": labels,
        "keys": draw.integers(0, 256, (rows, 32), dtype=np.uint8),
        "conditioning": centres,
        "reference": centres,
        "speaker_keys": draw.integers(0, 256, (speakers, 32), dtype=np.uint8),
    }
    return write_bank(
        folder,
        encoder=EncoderIdentity("synthetic", embeddings.shape[1], "0" * 64),
        arrays=arrays,
        ids=[f"u{row}" for row in range(rows)],
        names=[f"s{label}" for label in range(speakers)],
        splits={"train": (0, rows)},
        speaker_splits={"train": (0, speakers)},
    )


def _cost(bank: Bank, least: Bank, rounds: int) -> Cost:
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(bank.folder), str(least.folder)], check=True, capture_output=True, text=True
    )
    opening, resident, _ = json.loads(done.stdout)
    begun = time.process_time()
    index, _ = build_index(bank)
    building = time.process_time() - begun
    bank = open_bank(bank.folder)
    reference = torch.from_numpy(np.array(bank.reference))
    table = SpeakerTable(tuple(bank.names), reference, reference, bank.header.encoder_digest)
    pool = BankPool(bank, open_index(bank), table)
    sampler = SpeakerSampler(table, 0, lambda: pool)
    draw = np.random.default_rng(0)
    anchors = [torch.from_numpy(draw.integers(0, len(table), BATCH)) for _ in range(rounds + 1)]
    others = [(of + len(table) // 2) % len(table) for of in anchors]
    targets = _median(lambda i: sampler.targets(anchors[i], i, COUNT, choice="stratified"), rounds)
    negatives = _median(lambda i: sampler.negatives(anchors[i], others[i], i, COUNT, choice="stratified"), rounds)
    header = index.header
    return Cost(
        len(bank), bank.bytes, opening, resident, header.kind, building, header.bytes, header.recall, targets, negatives
    )


def _plan(costs: list[Cost]) -> Iterator[str]:
    """What `PLANNED` embeddings would need, from the largest size measured.

    There are twice as many cells as the square root of the rows, so what a search looks at grows with the square root,
    and giving every row its cell with the power 1.5: the times planned are upper bounds. They hold for pages in memory;
    a draw reads about three thousand rows, so from a disk it waits for as many pages.
    """
    most, times = costs[-1], PLANNED / costs[-1].rows
    for name in ("targets", "negatives") if len(costs) > 1 else ():
        growth = getattr(most, name) / getattr(costs[0], name)
        yield f"stratified {name}: {most.rows / costs[0].rows:g} times the embeddings, {growth:.2f} times the time"
    if most.rows <= FLAT_UP_TO:
        return
    yield (
        f"planned for {PLANNED:,}: bank {most.bank_bytes * times / 1e9:.0f} GB on disk, "
        f"index {most.index_bytes * times / 1e9:.1f} GB in memory, indexed in at most "
        f"{most.building * times**1.5 / 3600:.0f} CPU h, targets of {BATCH} in at most "
        f"{1e3 * most.targets * times**0.5:.0f} CPU ms"
    )


def _median(work: Callable[[int], object], rounds: int) -> float:
    """Median CPU seconds of `work(1)` to `work(rounds)`, after `work(0)` to warm up."""
    work(0)
    taken = []
    for turn in range(1, rounds + 1):
        begun = time.process_time()
        work(turn)
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def main(
    rows: Annotated[int, typer.Option(min=1, help="Largest number of embeddings.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each measurement; the median is printed.")] = 7,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0: torch's default.")] = 0,
) -> None:
    """Print a table of costs by number of embeddings."""
    if threads:
        torch.set_num_threads(threads)
    for line in at_scale(rows, rounds):
        print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
