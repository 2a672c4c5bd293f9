"""Training a residual quantiser: what keeps its codes alive.

Without care the codes of a new codec collapse: the encoder moves, few entries follow, the others are never chosen and
never learn. So the latent first passes the projections unrounded; then the codebooks are laid into the data by k-means
and rounding is blended in; and an entry that nothing chose for a while is moved to where the data is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from snac_core.codec.vq import ResidualVectorQuantize, VectorQuantize
from snac_core.seeding import generator


@dataclass
class Quantised:
    """What the quantiser made of a batch.

    Attributes:
        z_q: (B, C, F), what the decoder gets.
        codes: one (B, F / stride) per level.
        encodings: what was compared with the codebooks, one (B, D, F / stride) per level, without gradient.
        commitment, codebook: squared distances per level, pulling encodings to entries and entries to encodings.
    """

    z_q: Tensor
    codes: list[Tensor]
    encodings: list[Tensor]
    commitment: list[Tensor]
    codebook: list[Tensor]


def quantise(quantizer: ResidualVectorQuantize, z: Tensor, *, blend: float, levels: Tensor | None = None) -> Quantised:
    """The quantiser's forward with its losses (van den Oord et al. 2017, eq. 3, per level).

    Args:
        quantizer: of the codec.
        z: (B, C, F).
        blend: share of the rounding that is applied: 0 passes encodings unrounded, 1 is the codec as it will be used.
        levels: (B,) how many levels an item keeps, coarse ones first; None: all (quantiser dropout, SoundStream 3.3).
    """
    out = Quantised(torch.zeros_like(z), [], [], [], [])
    residual = z
    for number, level in enumerate(quantizer.quantizers):
        assert isinstance(level, VectorQuantize)
        encoding = level.project(residual)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            codes = level.nearest(encoding.float())
        entry = level.codebook(codes).transpose(1, 2)
        out.commitment.append(F.mse_loss(encoding.float(), entry.detach().float()))
        out.codebook.append(F.mse_loss(entry.float(), encoding.detach().float()))
        part = level.expand(encoding + blend * (entry - encoding).detach())
        residual = residual - part
        if levels is not None:
            part = part * (levels > number).to(part.dtype)[:, None, None]
        out.z_q = out.z_q + part
        out.codes.append(codes)
        out.encodings.append(encoding.detach())
    return out


def codebooks(quantizer: ResidualVectorQuantize) -> list[Tensor]:
    """The entries (N, D) of every level, themselves."""
    return [quantizer.get_parameter(f"quantizers.{i}.codebook.weight") for i in range(len(quantizer.quantizers))]


class Usage:
    """How often every entry was chosen since the last count, per level; part of the resumable state."""

    def __init__(self, levels: int, entries: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(levels, entries, dtype=torch.long, device=device)

    def add(self, codes: list[Tensor]) -> None:
        """Count a batch: one (B, F') per level."""
        for level, chosen in enumerate(codes):
            flat = chosen.flatten()
            self.counts[level].index_add_(0, flat, torch.ones_like(flat))

    def figures(self) -> dict[str, float]:
        """Per level: the share of entries in use and the perplexity (2 to the entropy in bits)."""
        found = {}
        for level, counts in enumerate(self.counts.cpu()):
            share = counts.double() / counts.sum().clamp(min=1)
            entropy = -(share * share.clamp(min=1e-12).log()).sum()
            found[f"used_{level}"] = float((counts > 0).double().mean())
            found[f"perplexity_{level}"] = float(entropy.exp())
        return found


@torch.no_grad()
def lay_codebooks(quantizer: ResidualVectorQuantize, z: Tensor, *, seed: int, rounds: int = 10, first: int = 0) -> None:
    """Set the codebooks from level `first` on to the k-means of what reaches them, one by one, for z (B, C, F)."""
    residual = z
    for number, level in enumerate(quantizer.quantizers):
        assert isinstance(level, VectorQuantize)
        encoding = level.project(residual)
        if number >= first:
            points = encoding.transpose(1, 2).flatten(0, 1)
            draw = generator(seed, "k-means", number)
            level.codebook.weight.copy_(_kmeans(points, level.codebook.num_embeddings, rounds, draw))
        codes = level.nearest(encoding)
        residual = residual - level.expand(level.codebook(codes).transpose(1, 2))


@torch.no_grad()
def restart_dead(
    quantizer: ResidualVectorQuantize,
    counts: Tensor,
    encodings: list[Tensor],
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> list[int]:
    """Move entries that nothing chose onto encodings of this batch; returns how many per level.

    Args:
        quantizer: of the codec.
        counts: (levels, entries) choices since the last call.
        encodings: of this batch, one (B, D, F') per level.
        optimizer: what it remembers about a moved entry is forgotten.
        seed: decides which encodings.
    """
    moved = []
    for number, level in enumerate(quantizer.quantizers):
        assert isinstance(level, VectorQuantize)
        weight = level.codebook.weight
        dead = (counts[number] == 0).nonzero().flatten()
        points = encodings[number].float().transpose(1, 2).flatten(0, 1)
        order = torch.randperm(len(points), generator=generator(seed, "restart", number))[: len(dead)]
        dead = dead[: len(order)].to(weight.device)
        weight[dead] = points[order.to(points.device)].to(weight.dtype)
        for memory in optimizer.state.get(weight, {}).values():
            if isinstance(memory, Tensor) and memory.shape == weight.shape:
                memory[dead] = 0
        moved.append(len(dead))
    return moved


def _kmeans(points: Tensor, count: int, rounds: int, draw: torch.Generator) -> Tensor:
    """Means (count, D) of the points (N, D) nearest in direction, which is how entries are chosen."""
    order = torch.randperm(len(points), generator=draw).to(points.device)
    centres = points[order.repeat(-(-count // len(points)))[:count]].clone()
    directions = F.normalize(points)
    for _ in range(rounds):
        nearest = (directions @ F.normalize(centres).T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)
        alive = sizes > 0
        centres[alive] = sums[alive] / sizes[alive, None].to(sums.dtype)
        empty = (~alive).nonzero().flatten()
        again = torch.randint(len(points), (len(empty),), generator=draw).to(points.device)
        centres[empty] = points[again]
    return centres
