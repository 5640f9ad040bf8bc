"""Muon: its updates are orthogonal, and it learns what plain descent learns."""

import pytest
import torch

from ecogen.tuning.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_an_orthogonalised_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_orthogonalising_keeps_singular_directions() -> None:
    u, _, v = torch.linalg.svd(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    matrix = u @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.5, 1.0])) @ v
    rotated = u.T @ orthogonalise(matrix) @ v.T
    assert torch.allclose(rotated, rotated.diag().diag(), atol=1e-4)


def test_muon_fits_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, inputs = torch.randn(4, 6, generator=generator), torch.randn(64, 6, generator=generator)
    guess = torch.zeros(4, 6, requires_grad=True)
    optimizer = Muon([guess], lr=0.05)
    losses = []
    for _ in range(100):
        loss = (inputs @ (guess - truth).T).square().mean()
        guess.grad = torch.autograd.grad(loss, guess)[0]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    matrix = torch.ones(2, 2, requires_grad=True)
    matrix.grad = torch.zeros(2, 2)
    Muon([matrix], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.95))
