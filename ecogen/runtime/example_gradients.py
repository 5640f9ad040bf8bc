"""What each example by itself adds to the gradient of a stage's tunables, clipped and noised: DP-SGD's step.

Abadi et al. 2016, Algorithm 1, https://arxiv.org/abs/1607.00133, of a model that several devices hold: an example's
norm is of all its tunables wherever they are, so devices keep what each example gave until its squared norm has been
added up along the chain; then each clips its own part with the same factor and adds its own noise.

Shapes: N examples of a microbatch, R rows of each, T tokens, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ecogen.errors import CheckpointError, ProtocolError

Normal = Callable[[int], Tensor]
"""Draws so many independent standard normal numbers, in double precision."""


@dataclass(frozen=True)
class ExampleNoise:
    """How examples are clipped and noised.

    Attributes:
        clip_norm: C, the most that an example may add to the sum of gradients, over the whole chain.
        noise_multiplier: z; the noise's deviation is z C.
        rows: R, the rows of a batch that are one example, side by side.
        normal: where the noise comes from.
    """

    clip_norm: float
    noise_multiplier: float
    rows: int
    normal: Normal


class _Microbatch(NamedTuple):
    """Which microbatch goes through the layers, and its number of rows."""

    number: int
    rows: int


class ExampleGradients:
    """Gathers the gradients of linear layers' weights by example, of all microbatches of one local step.

    A microbatch's own graph brings what it needs, so many may be in flight and come back in any order.

    Args:
        named: the tunables by name.

    Raises:
        CheckpointError: if one is anything but a linear layer's weight.
    """

    def __init__(self, model: nn.Module, named: Mapping[str, nn.Parameter], noise: ExampleNoise) -> None:
        self._named, self._noise = named, noise
        self._gathered: dict[str, dict[int, Tensor]] = {}
        self._counts: dict[int, int] = {}  # microbatch -> N
        self._tuned: set[str] = set()
        self._microbatch: _Microbatch | None = None
        names = {id(parameter): name for name, parameter in named.items()}
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) in names:
                self._watch(module, names.pop(id(module.weight)))
        if names:
            raise CheckpointError(
                f"{min(names.values())!r} is no linear layer's weight, so examples' gradients cannot be told apart; "
                "tune with plain LoRA, or set privacy.unit = 'cluster'"
            )

    def clear(self) -> None:
        """Forget the step."""
        self._gathered, self._counts, self._tuned, self._microbatch = {}, {}, set(), None

    def expect(self, index: int, num_rows: int, names: Iterable[str]) -> None:
        """A microbatch goes forward through a segment with these tunables: its layers are gathered from."""
        self._microbatch = _Microbatch(index, num_rows)
        self._counts[index] = num_rows // self._noise.rows
        self._tuned.update(names)

    def squared_norms(self, index: int, names: Iterable[str]) -> list[float]:
        """Of what each example [N] of a microbatch gave to these tunables."""
        total = torch.zeros(self._counts[index], dtype=torch.float64)
        for name in names:
            if index in (parts := self._gathered.get(name, {})):
                total += parts[index].flatten(1).double().square().sum(1).cpu()
        return total.tolist()

    @property
    def nbytes(self) -> int:
        """Of what is kept."""
        return sum(part.nbytes for parts in self._gathered.values() for part in parts.values())

    @torch.no_grad()
    def noised_means(self, squared_norms: Sequence[float], expected: int) -> dict[str, Tensor]:
        """(sum_i clip(g_i, C) + N(0, (z C)^2)) / E of each tunable of the segments that the step went through.

        An example moves all of them over the chain by at most C / E, whatever it is; one whose gradient is not finite
        counts as none.

        Args:
            squared_norms: of each example of the step over the whole chain, in the order of microbatches.
            expected: E, how many examples a step has on average.

        Raises:
            ProtocolError: if there are not as many norms as examples.
        """
        if not self._counts:  # a device that had no part in the step
            return {}
        if len(squared_norms) != (count := sum(self._counts.values())):
            raise ProtocolError(f"the norms of {len(squared_norms)} examples came for a step on {count}")
        given = [clip_factor(norm, self._noise.clip_norm) for norm in squared_norms]
        factors = torch.tensor(given, dtype=torch.float64)
        parts = torch.split(factors, [self._counts[index] for index in sorted(self._counts)])
        by_microbatch = dict(zip(sorted(self._counts), parts, strict=True))
        means = {name: self._noised_sum(name, by_microbatch) / expected for name in sorted(self._tuned)}
        self.clear()
        return means

    def _noised_sum(self, name: str, factors: Mapping[int, Tensor]) -> Tensor:
        parameter, noise = self._named[name], self._noise
        total = torch.zeros(parameter.shape, dtype=torch.float64)
        for index, gradients in self._gathered.get(name, {}).items():
            own = factors[index]
            counted = own > 0  # what is not finite would stay so, times zero
            total += torch.tensordot(own[counted], gradients.cpu()[counted].double(), dims=1)
        if noise.noise_multiplier:
            total += noise.noise_multiplier * noise.clip_norm * noise.normal(total.numel()).view(total.shape)
        return total.to(parameter)

    def _watch(self, layer: nn.Linear, name: str) -> None:
        def watched(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and self._microbatch is not None:
                self._check_apart(name, args[0], self._microbatch)
                index, inputs = self._microbatch.number, args[0].detach()
                output.register_hook(lambda grads: self._gather(name, index, inputs, grads))  # type: ignore[no-untyped-call]

        layer.register_forward_hook(watched)

    def _check_apart(self, name: str, inputs: Tensor, microbatch: _Microbatch) -> None:
        if inputs.ndim != 3 or len(inputs) != microbatch.rows:
            raise CheckpointError(
                f"{name!r} is given the tokens of all examples together, as experts are, so that their gradients "
                "cannot be told apart; set tunables.lora_targets = ['attention'], or privacy.unit = 'cluster'"
            )

    def _gather(self, name: str, index: int, inputs: Tensor, grads: Tensor) -> None:
        """The gradient of the weights [N, O, I] from what entered the layer and the gradient of what it gave."""
        gradients = torch.einsum("nto,nti->noi", self._by_example(grads), self._by_example(inputs))
        parts = self._gathered.setdefault(name, {})
        parts[index] = parts[index] + gradients if index in parts else gradients

    def _by_example(self, rows: Tensor) -> Tensor:
        """[N R, T, D] as [N, R T, D]."""
        rows = rows.detach() if rows.dtype == torch.float64 else rows.detach().float()
        return rows.reshape(len(rows) // self._noise.rows, -1, rows.shape[-1])


def clip_factor(squared_norm: float, clip_norm: float) -> float:
    """min(1, C / norm); 0 where the norm is not finite."""
    if not math.isfinite(squared_norm):
        return 0.0
    return min(1.0, clip_norm / math.sqrt(squared_norm)) if squared_norm else 1.0


def example_weights(labels: Tensor, rows: int) -> Tensor:
    """What each token counts [B * T] for an example's loss to be the mean over its own tokens, whoever is beside it.

    Args:
        labels: [B, T], below zero where none counts.
        rows: R, of each example, side by side.
    """
    counts = (labels >= 0).reshape(-1, rows * labels.shape[1])
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return shares.flatten().float()
