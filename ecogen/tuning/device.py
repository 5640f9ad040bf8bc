"""What an end device does while its cluster tunes: takes orders from its edge, one attempt at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ecogen.config import Tuning
from ecogen.errors import NodeLostError, ProtocolError
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.stage import OptimizerSettings, Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message
from ecogen.tuning.augment import augment
from ecogen.tuning.data import Examples
from ecogen.tuning.local import LocalSteps, Route
from ecogen.tuning.messages import TUNE, AttemptKey, Flow, TuneOrder, TuneResult

logger = logging.getLogger(__name__)

_ORDER_KEY, _AUGMENT_KEY = 3, 4


@dataclass(frozen=True)
class LocalData:
    """The training examples that a device owns, and how its local epochs go through them."""

    examples: Examples
    seed: int
    cluster_index: int

    def batches(self, tuning: Tuning, round_index: int) -> Iterator[Examples]:
        """The batches of all local epochs of a round: a pure function of the seed, the round and the cluster."""
        for epoch in range(tuning.local_epochs):
            key = [self.seed, round_index, self.cluster_index, epoch]
            order = np.random.default_rng([*key, _ORDER_KEY]).permutation(len(self.examples))
            generator = torch.Generator().manual_seed(int(np.random.default_rng([*key, _AUGMENT_KEY]).integers(2**62)))
            for begin in range(0, len(order), tuning.batch_size):
                batch = self.examples[order[begin : begin + tuning.batch_size]]
                yield Examples(augment(batch.images, tuning.augmentation, generator), batch.labels)


class DeviceTuning:
    """One device's tuning role.

    Args:
        data: what the device owns; None where it owns nothing.
    """

    def __init__(
        self,
        route: Route,
        tuning: Tuning,
        stage: Stage,
        worker: Worker,
        neighbours: Neighbours,
        data: LocalData | None,
    ) -> None:
        self._route, self._tuning, self._stage, self._worker = route, tuning, stage, worker
        self._neighbours, self._data = neighbours, data
        self._latest = AttemptKey(-1, -1)
        self._current: LocalSteps | None = None
        self._early: list[tuple[Message, Flow]] = []

    async def tune(self, message: Message) -> Message:
        """Do this device's part of one attempt, and answer with its tunables.

        Raises:
            ProtocolError: if a later attempt was ordered before.
            NodeLostError: if another device of the cluster is lost.
        """
        order = message.read(TuneOrder)
        self._fence(order.key)
        await self._neighbours.connect(order.addresses)
        await self._worker.compute(self._stage.begin, message.tensors, self._settings(order.key.round_index))
        steps = self._begin(order.key)
        result = await steps.run()
        tunables = await self._worker.compute(lambda: self._stage.tunables)
        owned = len(self._data.examples) if self._data else 0
        body = TuneResult(owned, result.loss, self._worker.usage("tuning", self._stage.memory_bytes))
        return Message.of(TUNE, body, kind="tunables", tensors=tunables)

    def deliver(self, message: Message) -> None:
        """Take a neighbour's message; one that belongs to an attempt not yet ordered here waits for it."""
        flow = message.read(Flow)
        if self._current is not None and flow.key == self._current.key:
            self._current.deliver(message, flow)
        elif flow.key > self._latest:
            self._early.append((message, flow))
        else:
            logger.debug("dropped %s of the fenced attempt %s", message.method, flow.key)

    def lose(self, error: NodeLostError) -> None:
        """A neighbour is lost: the attempt that needs it fails."""
        if self._current is not None:
            self._current.fail(error)

    def _begin(self, key: AttemptKey) -> LocalSteps:
        batches = self._data.batches(self._tuning, key.round_index) if self._data else None
        self._current = LocalSteps(
            key,
            self._route,
            self._stage,
            self._worker,
            self._neighbours,
            batches=batches,
            num_microbatches=self._tuning.microbatches,
        )
        early, self._early = self._early, []
        for message, flow in early:
            if flow.key == key:
                self._current.deliver(message, flow)
        return self._current

    def _fence(self, key: AttemptKey) -> None:
        if key <= self._latest:
            raise ProtocolError(f"attempt {key} is fenced off: {self._latest} came before it")
        self._latest = key
        self._current = None

    def _settings(self, round_index: int) -> OptimizerSettings:
        rate = self._tuning.learning_rate * self._tuning.learning_rate_decay**round_index
        return OptimizerSettings(rate, self._tuning.weight_decay, self._tuning.clip_norm)
