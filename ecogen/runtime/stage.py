"""A stage: the segments that one node holds, loaded, with the graphs of the microbatches in flight.

Not thread-safe: one compute thread calls it. Shapes: B microbatch, T tokens, D hidden, L labels or, of text, the
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ecogen.errors import CheckpointError, ConfigError
from ecogen.models.segmented import Segmented
from ecogen.models.tunables import Tunables, copy_of, named_tunables, normalised_matrices, overwrite, tunables_of
from ecogen.placement import Segment
from ecogen.runtime.example_gradients import ExampleGradients, ExampleNoise

_SUM = "sum of gradients"  # beside an optimizer's own keys


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """The optimizer of local steps, made anew each round. clip_norm 0 turns clipping off.

    Attributes:
        optimizer: AdamW (Loshchilov & Hutter 2019), or plain SGD: w <- w - rate (g + decay w).
        proximal: mu of FedProx (Li et al. 2020, equation 2, https://arxiv.org/abs/1812.06127), 0 for none.
    """

    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    epsilon: float = 1e-8
    proximal: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"


class MicrobatchKey(NamedTuple):
    """Which microbatch of which local step, at which visit of the route."""

    step: int
    microbatch: int
    visit: int


class Stage:
    """Forward and backward of one node's segments, and the local steps of their tunables.

    Args:
        noise: what protects each example, where something does.

    Raises:
        CheckpointError: if examples are to be protected, and something is tuned of which their gradients are not told
            apart.
    """

    def __init__(
        self, model: Segmented, *, device: str = "cpu", dtype: str = "float32", noise: ExampleNoise | None = None
    ) -> None:
        self.device = torch.device(resolve_device(device))
        self.dtype = getattr(torch, dtype)
        self.model, self.noise = model.to(self.device), noise
        self._lower_frozen()
        self._named = dict(named_tunables(model))  # looked up once: walking the modules costs as much as a small block
        self._examples = ExampleGradients(model, self._named, noise) if noise else None
        self._parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._tunable_bytes = sum(parameter.nbytes for parameter in self._named.values())
        self._peak_bytes = 0
        self._graphs: dict[MicrobatchKey, tuple[Tensor, Tensor]] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._settings = OptimizerSettings(0.0)
        self._begun: Tunables = {}  # w_t, where a proximal term or a teacher needs it
        self._correction: Tunables = {}
        self._gradient_sums: Tunables = {}  # of the loss, over the local steps, where there is a correction

    def begin(
        self,
        tunables: Mapping[str, Tensor],
        settings: OptimizerSettings | None = None,
        correction: Mapping[str, Tensor] | None = None,
        *,
        keeps_begun: bool = False,
    ) -> None:
        """Take new tunables and, for tuning, a fresh optimizer; forget everything in flight.

        Args:
            correction: what is added to the gradients of each step, for all tunables; the loss's are then summed up.
            keeps_begun: `infer` will be asked for outputs with these tunables.
        """
        self._graphs.clear()
        if self._examples is not None:
            self._examples.clear()
        overwrite(self._named, tunables)
        parameters = list(self._named.values())
        for parameter in parameters:
            parameter.grad = None  # an attempt that was broken off leaves some behind
        self._settings = settings or self._settings
        is_needed = keeps_begun or self._settings.proximal
        self._begun = {name: p.detach().clone() for name, p in self._named.items()} if is_needed else {}
        self._correction = {name: tensor.to(self._named[name]) for name, tensor in (correction or {}).items()}
        self._gradient_sums = {name: torch.zeros_like(self._named[name]) for name in self._correction}
        self._optimizer = _optimizer(parameters, settings) if settings and parameters else None

    @property
    def tunables(self) -> Tunables:
        """A copy of the tunables as they are now."""
        return copy_of(self._named)

    @property
    def memory_bytes(self) -> int:
        """Bytes of parameters, gradients, what optimizer and correction keep, and tensors at cuts, at the fullest."""
        return self._parameter_bytes + self._peak_bytes

    @torch.no_grad()
    def infer(self, segment: Segment, inputs: Tensor, *, as_begun: bool = False) -> Tensor:
        """A segment's output, keeping nothing; `as_begun` with the tunables that `begin` took and was to keep."""
        if not as_begun:
            return self._run(segment, inputs)
        self._exchange_begun()
        try:
            return self._run(segment, inputs)
        finally:
            self._exchange_begun()

    def _exchange_begun(self) -> None:
        """Put the tunables of the beginning in the place of those of now, or back."""
        for name, parameter in self._named.items():
            parameter.data, self._begun[name] = self._begun[name], parameter.data

    def forward(self, key: MicrobatchKey, segment: Segment, inputs: Tensor, *, input_grads: bool) -> Tensor:
        """A segment's output, keeping its graph until `backward`."""
        inputs = inputs.to(self.device).detach()
        inputs.requires_grad_(input_grads)
        if self._examples is not None:
            self._examples.expect(key.microbatch, len(inputs), tunables_of(self._named, [segment]))
        outputs = self._run(segment, inputs)
        self._graphs[key] = (inputs, outputs)
        in_flight = sum(i.nbytes + o.nbytes for i, o in self._graphs.values())
        copies = 1 + 2 * (self._settings.optimizer == "adamw") + 2 * bool(self._gradient_sums) + bool(self._begun)
        self._peak_bytes = max(self._peak_bytes, copies * self._tunable_bytes + in_flight)
        return outputs.detach()

    def loss(
        self,
        key: MicrobatchKey,
        segment: Segment,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        weights: Tensor | None = None,
        input_grads: bool,
    ) -> float:
        """The microbatch's share of the batch's mean cross-entropy; `backward` with None starts from it.

        Args:
            labels: [B] class indices; of text [B, T], the token that follows each, below zero where none counts.
            batch_size: labels of the whole batch that count, so that shares of its microbatches sum to its mean.
            weights: [B], of text [B * T], times which each one's cross-entropy counts; None for 1.
        """
        logits = self.forward(key, segment, inputs, input_grads=input_grads)
        inputs, logits = self._graphs.pop(key)
        reduction = "sum" if weights is None else "none"
        rows, aims = logits.flatten(0, -2).float(), labels.to(self.device).flatten()
        total = torch.nn.functional.cross_entropy(rows, aims, reduction=reduction)
        if weights is not None:
            total = total @ weights.to(total)
        self._graphs[key] = (inputs, total / batch_size)
        return float(total.detach()) / batch_size

    def backward(self, key: MicrobatchKey, grads: Tensor | None) -> Tensor | None:
        """Back-propagate through a kept graph; returns the gradient of its inputs where that was asked for."""
        inputs, outputs = self._graphs.pop(key)
        if outputs.requires_grad:  # a decoder's lowest block may have none of the layers that adapters are for
            torch.autograd.backward(outputs, None if grads is None else grads.to(outputs.device, outputs.dtype))
        return inputs.grad

    @torch.no_grad()
    def correct(self, segment: Segment) -> None:
        """Add to the gradients of one segment's tunables, once a step, what methods add to those of the loss.

        FedProx adds the gradient of mu / 2 |w - w_t|^2, SCAFFOLD the correction.
        """
        if not (self._settings.proximal or self._gradient_sums):
            return
        for name in tunables_of(self._named, [segment]):
            parameter = self._named[name]
            if name in self._gradient_sums and parameter.grad is not None:
                self._gradient_sums[name] += parameter.grad
            if self._settings.proximal:
                _add_gradient(parameter, self._settings.proximal * (parameter - self._begun[name]))
            if name in self._correction:
                _add_gradient(parameter, self._correction[name])

    def gradient_sums(self, segments: Sequence[Segment] | None = None) -> Tunables:
        """The loss's gradients of each tunable summed over the local steps, where they were; None for all segments."""
        return copy_of(self._gradient_sums if segments is None else tunables_of(self._gradient_sums, segments))

    def squared_norm(self, segment: Segment) -> float:
        """The squared norm of the gradients of one segment's tunables."""
        named = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        grads = list(tunables_of(named, [segment]).values())
        return float(torch.stack(torch._foreach_norm(grads)).double().square().sum()) if grads else 0.0

    def example_norms(self, key: MicrobatchKey, segment: Segment) -> list[float]:
        """The squared norms of what each example of a microbatch gave to one segment's tunables."""
        assert self._examples is not None
        return self._examples.squared_norms(key.microbatch, tunables_of(self._named, [segment]))

    def noised_step(self, squared_norms: Sequence[float], expected: int) -> None:
        """One local step with examples clipped by their norms over the whole chain, and noise.

        Args:
            expected: how many examples a step has on average.
        """
        assert self._examples is not None
        copies = 1 + 2 * (self._settings.optimizer == "adamw")
        self._peak_bytes = max(self._peak_bytes, copies * self._tunable_bytes + self._examples.nbytes)
        means = self._examples.noised_means(squared_norms, expected)
        for name, parameter in self._named.items():
            parameter.grad = means.get(name)
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def step(self, squared_norm: float) -> None:
        """One local step, with gradients clipped by the norm over the whole chain."""
        if self._optimizer is None:
            return
        scale = clip_scale(squared_norm, self._settings.clip_norm)
        if scale < 1:
            grads: list[Tensor] = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
            if grads:
                torch._foreach_mul_(grads, scale)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def set_rate(self, learning_rate: float) -> None:
        """From the next local step on."""
        for group in self._optimizer.param_groups if self._optimizer else ():
            group["lr"] = learning_rate

    def hand_over(self, segment: Segment) -> Tunables:
        """One segment's tunables with their optimizer states, for the device that goes on with them."""
        state: Tunables = {}
        for name in tunables_of(self._named, [segment]):
            parameter = self._named[name]
            moments = self._optimizer.state.get(parameter, {}) if self._optimizer else {}
            state |= {f"{name}@{key}": moment.detach().clone().cpu() for key, moment in moments.items()}
            state[name] = parameter.detach().clone().cpu()
        return state | self.hand_over_sums([segment])

    def hand_over_sums(self, segments: Sequence[Segment]) -> Tunables:
        """Only what `gradient_sums` gives, for `take_over` at a device that takes no further steps."""
        return {f"{name}@{_SUM}": total for name, total in self.gradient_sums(segments).items()}

    @torch.no_grad()
    def take_over(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the tunables and optimizer states that `hand_over` gave."""
        for name, tensor in state.items():
            name, _, key = name.partition("@")
            parameter = self._named[name]
            if not key:
                parameter.copy_(tensor)
            elif key == _SUM:
                self._gradient_sums[name] = tensor.to(parameter, copy=True)
            elif self._optimizer is not None:
                dtype = tensor.dtype if key == "step" else parameter.dtype
                self._optimizer.state[parameter][key] = tensor.to(parameter.device, dtype, copy=True)

    def _run(self, segment: Segment, inputs: Tensor) -> Tensor:
        mixed = self.dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
            outputs: Tensor = self.model(inputs.to(self.device), segment)
        if not isinstance(outputs, Tensor):
            kind = self.model.whole.config.model_type
            raise CheckpointError(f"blocks of a {kind!r} model hand on more than hidden states; it cannot be tuned")
        return outputs

    def _lower_frozen(self) -> None:
        """Hold the frozen backbone's matrices in the node's type; tunables stay in float32.

        So do vectors: a CPU's layer norm takes activations of either type only with weights in float32. And so do the
        matrices whose rows DoRA divides by their norms, since the magnitudes were set from exact ones.
        """
        exact = set(normalised_matrices(self.model))
        for parameter in self.model.parameters():
            if not parameter.requires_grad and parameter.ndim > 1 and parameter not in exact:
                parameter.data = parameter.data.to(self.dtype)


def clip_scale(squared_norm: float, clip_norm: float) -> float:
    """The factor of `torch.nn.utils.clip_grad_norm_`, from a norm that was summed over the chain."""
    if not clip_norm:
        return 1.0
    return min(1.0, clip_norm / (math.sqrt(squared_norm) + 1e-6))


def resolve_device(name: str) -> str:
    """The torch device of a name; `auto` takes an accelerator where there is one.

    Raises:
        ConfigError: if the device is not on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    count = torch.cuda.device_count()
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= count:
        raise ConfigError(
            [f"compute.device: {name!r} is not on this machine, which has {count} CUDA devices; use 'auto'"]
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(["compute.device: 'mps' is not on this machine; use 'auto'"])
    return name


def _optimizer(parameters: list[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, eps=settings.epsilon, fused=True)


def _add_gradient(parameter: torch.nn.Parameter, term: Tensor) -> None:
    parameter.grad = term.clone() if parameter.grad is None else parameter.grad + term
