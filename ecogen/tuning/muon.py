"""Muon: momentum whose update is orthogonalised, so that all directions of a weight matrix learn at one pace.

Jordan et al. 2024: https://kellerjordan.github.io/posts/muon/. Ours computes in float32: `torch.optim.Muon` does so in
bfloat16, which processors without such instructions emulate. Only matrices learn so; the rest needs another optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

# Newton-Schulz coefficients (a, b, c) of X <- aX + b(XX')X + c(XX')^2 X, from the post above; five steps suffice.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NEWTON_SCHULZ_STEPS = 5


class Muon(Optimizer):
    """SGD with Nesterov momentum and decoupled weight decay, each update orthogonalised."""

    def __init__(
        self, matrices: Iterable[Tensor], *, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    direction = self._direction(matrix, matrix.grad, group["momentum"])
                    _move(matrix, direction, group["lr"], group["weight_decay"])

    def _direction(self, matrix: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
        average.lerp_(gradient, 1 - momentum)
        return orthogonalise(gradient.lerp(average, momentum))


def _move(matrix: Tensor, direction: Tensor, lr: float, weight_decay: float) -> None:
    """A step whose size does not depend on the matrix's shape."""
    tall = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    matrix.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr * tall)


def orthogonalise(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns: singular values end up between 0.7 and 1.2."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
