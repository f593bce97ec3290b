"""Linears for solvers, GPTQ above all, and what their solutions lose."""

import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved, Statistics
from llmpare.compress.quantize import gptq, refine


def gram(columns: int, seed: int, *, tokens: int | None = None) -> Tensor:
    """H of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 3 * columns + 20
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]
    h = x.t() @ x / tokens
    return (h + h.t()) / 2


def weights(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed)) * 0.05


def on_grid(grid: IntGrid, rows: int, columns: int, size: int) -> Tensor:
    """Weights that the grid holds exactly: in every group both ends of the range occur; scales have either sign."""
    codes = torch.randint(0, grid.top + 1, (rows, columns // size, size))
    codes[..., 0], codes[..., 1] = 0, grid.top
    codes = codes.gather(-1, torch.rand(codes.shape).argsort(-1))
    scale = (0.01 + torch.rand(rows, columns // size, 1)).to(grid.scale_dtype).float()
    if grid.symmetric:
        zero = torch.full_like(scale, grid.middle)
        scale *= torch.randint(0, 2, scale.shape) * 2 - 1
    else:
        zero = torch.randint(0, grid.top + 1, scale.shape).float()
    return ((codes - zero) * scale).view(rows, columns)


def solve(
    weight: Tensor,
    statistics: Statistics,
    grid: IntGrid,
    group_size: int,
    *,
    damping: float = 0.01,
    rounds: float = 2,
    sweeps: float = 2,
    correction: float = 0.0,
) -> Solved:
    return gptq.solve(
        weight, statistics, grid, group_size, damping=damping, rounds=rounds, sweeps=sweeps, correction=correction
    )


def lost(weight: Tensor, solved: Solved, h: Tensor) -> float:
    return float(refine.loss(weight.double(), solved.weight().double(), h.double()).sum())
