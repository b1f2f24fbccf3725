"""How a second moment is stored: folded, packed to 16 bits, or as a low rank in 4 bits.

G is a symmetric (I, I) matrix, D = diag G its diagonal and C = D^-1/2 G D^-1/2 its correlations, which lie within
[-1, 1] whatever the scale of the channels. Three forms, from the largest to the smallest:

    folded      G itself in float32, each entry off the diagonal once: what the sum over every domain is stored as
    packed      D in float32, C folded in float16: a domain's contribution in full storage
    low rank    D in float32, U of C' = U U^T + diag(1 - diag(U U^T)) in 4 bits: a contribution in compact storage

U is made of the largest eigenvalues of C and their vectors, and the last term is what they leave of the diagonal. So C'
has a diagonal of ones and is positive semidefinite, as C is. Many columns of 4 bits do better than half as many of 8:
measured, they bring 45% less error into the solve (ours).

Shapes: I in features, J = I / 2 rounded up, O out features of all linears that read the same input, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = [
    "block_bytes",
    "fold",
    "pack",
    "pack_low_rank",
    "ranks",
    "unfold",
    "unpack",
    "unpack_low_rank",
]

_SHARE = 0.049  # of the 16-bit model, for a contribution in compact storage; with its files' headers at most 0.05
_ITERATIONS = 4  # of the subspace iteration; more of them change the error of the solve by less than 1%
_LEVELS = 7  # codes are -7..7, stored as 1..15


def fold(matrix: Tensor) -> Tensor:
    """The part off the diagonal of a symmetric (I, I) matrix as (2, J, J): each number once.

    With the matrix in four blocks [[A, B], [B^T, C]], the first (J, J) is B; the second is what lies above the diagonal
    of A together with what lies below the diagonal of C.
    """
    size, half = len(matrix), (len(matrix) + 1) // 2
    even = torch.zeros(2 * half, 2 * half, device=matrix.device, dtype=matrix.dtype)
    even[:size, :size] = matrix
    return torch.stack((even[:half, half:], even[:half, :half].triu(1) + even[half:, half:].tril(-1)))


def unfold(folded: Tensor, diagonal: Tensor) -> Tensor:
    """The inverse of `fold`, with `diagonal` (I,); symmetric to the last bit."""
    size, half = len(diagonal), folded.shape[-1]
    corner, triangles = folded
    even = torch.zeros(2 * half, 2 * half, device=folded.device, dtype=folded.dtype)
    even[:half, half:] = corner
    even[:half, :half] = triangles.triu(1)
    even[half:, half:] = triangles.tril(-1).T
    matrix = (even + even.T)[:size, :size]
    matrix.diagonal().copy_(diagonal)
    return matrix


def pack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric (I, I) matrix as its diagonal, float32, and its correlations (2, J, J), float16, folded.

    |G_kl| <= sqrt(G_kk G_ll) for a second moment, so float16 keeps 11 bits of each correlation whatever the scale of
    its channels (ours).
    """
    diagonal, unit = _correlations(matrix)
    return diagonal, fold(unit).to(torch.float16)


def unpack(diagonal: Tensor, correlations: Tensor) -> Tensor:
    """The (I, I) float32 matrix that `pack` took; symmetric to the last bit."""
    root = diagonal.sqrt()
    unit = unfold(correlations.float(), torch.ones_like(diagonal))
    matrix = unit * torch.outer(root, root)
    matrix.diagonal().copy_(diagonal)
    return matrix


def block_bytes(parameters: int, blocks: int) -> int:
    """Bytes that the contribution of one of `blocks` blocks may take, for a model of so many parameters."""
    return int(_SHARE * 2 * parameters / blocks)


def ranks(shapes: Mapping[str, tuple[int, int]], size: int) -> dict[str, int]:
    """The rank of each group of a block such that all of them take at most `size` bytes.

    In proportion to sqrt(O I): that gives most to inputs that many rows read and that are cheap to describe (ours).

    Args:
        shapes: group -> (O, I).

    Returns:
        Group -> r, even, at most I; 0 where `size` holds no more than the diagonals.
    """
    left = size - sum(4 * inputs + 8 for _, inputs in shapes.values())  # the diagonal and the weight of a group
    wanted = {group: math.sqrt(outputs * inputs) for group, (outputs, inputs) in shapes.items()}
    share = max(0.0, left / sum(wanted[group] * (inputs / 2 + 4) for group, (_, inputs) in shapes.items()))
    return {group: min(int(share * wanted[group]), inputs) // 2 * 2 for group, (_, inputs) in shapes.items()}


def pack_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A second moment (I, I) in compact form; `rank` is even.

    By subspace iteration from a seeded start (Halko, Martinsson, Tropp 2011), since all eigenvalues of a large matrix
    take minutes.

    Returns:
        The diagonal (I,) float32; U (I, r) as codes of 4 bits, two to a byte, (I, r / 2) uint8; the step of the codes
        of each column, (r,) float32.
    """
    diagonal, unit = _correlations(matrix)
    start = torch.randn(len(matrix), rank, generator=torch.Generator().manual_seed(0))
    basis = start.to(matrix.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(unit @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ unit @ basis)
    factor = basis @ vectors * values.clamp_min(0).sqrt()
    step = factor.abs().amax(0) / _LEVELS
    codes = (factor * torch.where(step > 0, step.reciprocal(), 0.0)).round() + (_LEVELS + 1)
    low, high = codes.to(torch.uint8).tensor_split(2, dim=1)
    return diagonal, low | high << 4, step


def unpack_low_rank(diagonal: Tensor, codes: Tensor, step: Tensor) -> Tensor:
    """The (I, I) float32 matrix that `pack_low_rank` took, as far as it was kept; symmetric to the last bit."""
    factor = (torch.cat((codes & 15, codes >> 4), dim=1).float() - (_LEVELS + 1)) * step
    length = factor.norm(dim=1, keepdim=True)
    factor = factor / length.clamp_min(1)  # rounding may bring the diagonal of U U^T above 1
    root = diagonal.sqrt()
    upper = torch.triu(factor @ factor.T * torch.outer(root, root), 1)
    matrix = upper + upper.T
    matrix.diagonal().copy_(diagonal)
    return matrix


def _correlations(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal (I,) of a second moment (I, I), and its entries by the roots of that; zero for a dead channel."""
    diagonal = matrix.diagonal().clamp_min(0)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    return diagonal, matrix * torch.outer(scale, scale)
