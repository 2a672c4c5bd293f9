"""Train a residual quantizer without codebook collapse.

In a new codec the encoder moves so fast that few codebook entries follow it; the others are never chosen and never
trained. Therefore the latent first passes the projections without quantization. Then the codebooks are initialized by
k-means, quantization sets in gradually, and entries that are not used are restarted at encodings of the current batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from snac_core.codec.vq import ResidualVectorQuantize, VectorQuantize
from snac_core.seeding import generator


@dataclass
class Quantized:
    """Output of the quantizer for a batch.

    Attributes:
        z_q: (B, C, F), input of the decoder.
        codes: one (B, F / stride) per level.
        encodings: what was compared with the codebooks, one (B, D, F / stride) per level, detached.
        commitment, codebook: mean squared distance of encodings and entries, one scalar per level; its gradient
            reaches the encodings or the entries.
    """

    z_q: Tensor
    codes: list[Tensor]
    encodings: list[Tensor]
    commitment: list[Tensor]
    codebook: list[Tensor]


def quantize(quantizer: ResidualVectorQuantize, z: Tensor, *, blend: float, levels: Tensor | None = None) -> Quantized:
    """The forward pass of the quantizer with its losses (van den Oord et al. 2017, equation 3, per level).

    Args:
        quantizer: of the codec.
        z: (B, C, F).
        blend: share of the quantization, 0 to 1: 0 passes encodings unchanged, 1 equals `quantizer(z)`.
        levels: (B,) number of levels that each item uses, coarse ones first; None: all (quantizer dropout, Zeghidour
            et al. 2021, section III-C).
    """
    out = Quantized(torch.zeros_like(z), [], [], [], [])
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
    """The codebook parameters, one (N, D) per level."""
    return [quantizer.get_parameter(f"quantizers.{i}.codebook.weight") for i in range(len(quantizer.quantizers))]


class CodeUsage:
    """Counts how often each codebook entry is chosen.

    Args:
        levels: of the quantizer.
        entries: of each codebook.
        device: of the counts.
    """

    def __init__(self, levels: int, entries: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(levels, entries, dtype=torch.long, device=device)

    def add(self, codes: list[Tensor]) -> None:
        """Count the codes of a batch, one (B, F') per level."""
        for level, chosen in enumerate(codes):
            flat = chosen.flatten()
            self.counts[level].index_add_(0, flat, torch.ones_like(flat))

    def statistics(self) -> dict[str, float]:
        """Per level i `used_i`, the share of entries in use, and `perplexity_i`, the exponential of the entropy."""
        found = {}
        for level, counts in enumerate(self.counts.cpu()):
            share = counts.double() / counts.sum().clamp(min=1)
            entropy = -(share * share.clamp(min=1e-12).log()).sum()
            found[f"used_{level}"] = float((counts > 0).double().mean())
            found[f"perplexity_{level}"] = float(entropy.exp())
        return found


@torch.no_grad()
def initialize_codebooks(
    quantizer: ResidualVectorQuantize, z: Tensor, *, seed: int, rounds: int = 10, first: int = 0
) -> None:
    """Set codebooks to the k-means centres of their encodings, level by level.

    Args:
        quantizer: of the codec.
        z: (B, C, F).
        seed: of the first centres.
        rounds: of k-means.
        first: levels before this one are not changed.
    """
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
def restart_unused(
    quantizer: ResidualVectorQuantize,
    counts: Tensor,
    encodings: list[Tensor],
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> list[int]:
    """Move entries that were not chosen to random encodings of this batch; returns their number per level.

    Args:
        quantizer: of the codec.
        counts: (levels, entries) since the last restart.
        encodings: of this batch, one (B, D, F') per level.
        optimizer: its state for a moved entry is reset to 0.
        seed: decides which encodings.
    """
    moved = []
    for number, level in enumerate(quantizer.quantizers):
        assert isinstance(level, VectorQuantize)
        weight = level.codebook.weight
        unused = (counts[number] == 0).nonzero().flatten()
        points = encodings[number].float().transpose(1, 2).flatten(0, 1)
        order = torch.randperm(len(points), generator=generator(seed, "restart", number))[: len(unused)]
        unused = unused[: len(order)].to(weight.device)
        weight[unused] = points[order.to(points.device)].to(weight.dtype)
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value[unused] = 0
        moved.append(len(unused))
    return moved


def _kmeans(points: Tensor, count: int, rounds: int, draw: torch.Generator) -> Tensor:
    """Centres (count, D), each the mean of the points (N, D) nearest to it by cosine, as in the quantizer."""
    order = torch.randperm(len(points), generator=draw).to(points.device)
    centres = points[order.repeat(-(-count // len(points)))[:count]].clone()
    directions = F.normalize(points)
    for _ in range(rounds):
        nearest = (directions @ F.normalize(centres).T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)
        occupied = sizes > 0
        centres[occupied] = sums[occupied] / sizes[occupied, None].to(sums.dtype)
        empty = (~occupied).nonzero().flatten()
        again = torch.randint(len(points), (len(empty),), generator=draw).to(points.device)
        centres[empty] = points[again]
    return centres
