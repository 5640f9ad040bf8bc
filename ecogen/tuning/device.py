"""What an end device does while its cluster tunes: takes orders from its edge, one attempt at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ecogen.config import Tuning, Wire
from ecogen.errors import NodeLostError, ProtocolError
from ecogen.models.tunables import Tunables, tunables_of
from ecogen.runtime.compression import restore_all
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.prefix_cache import PrefixCache, prefix_keys
from ecogen.runtime.stage import OptimizerSettings, Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message
from ecogen.tuning.augment import augment, strongly_augment
from ecogen.tuning.controls import Controls
from ecogen.tuning.data import Examples, Indices
from ecogen.tuning.feedback import Feedback
from ecogen.tuning.fixmatch import mixed_batch
from ecogen.tuning.local import LocalSteps
from ecogen.tuning.messages import (
    BACKWARD,
    FORWARD,
    TUNE,
    AttemptKey,
    Flow,
    Sampled,
    TuneOrder,
    TuneResult,
    split_controls,
    with_controls,
)
from ecogen.tuning.pairs import PairPassages
from ecogen.tuning.passages import Batch, Passages
from ecogen.tuning.route import Route
from ecogen.tuning.sampling import Draws
from ecogen.tuning.visits import LocalResult

logger = logging.getLogger(__name__)

_ORDER_KEY, _AUGMENT_KEY, _VIEW_KEY = 3, 4, 5

_MAX_EARLY = 256  # a cluster has at most two messages a credit under way


@dataclass(frozen=True)
class LocalData:
    """The training examples that a device owns, with labels or without, and how its local epochs go through them.

    Attributes:
        examples: images, or passages of text.
        views: the images that each example has, epoch by epoch in turn; empty where every epoch draws new ones.
        later: what it owns instead from a round on, where its edge's domain changes.
    """

    examples: Batch
    seed: int
    cluster_index: int
    owner_index: int = 0
    views: Sequence[Batch] = ()
    later: tuple[int, LocalData] | None = None

    def at(self, round_index: int) -> LocalData:
        """What it owns in a round."""
        return self.later[1] if self.later is not None and round_index >= self.later[0] else self

    def with_views(self, tuning: Tuning, prefix: str | None) -> LocalData:
        """The same with images that come again, where the recipe has them; with keys for a prefix of that version."""
        count = tuning.augmentation_views if tuning.augmentation else 1
        return replace(self, views=[self._view(tuning, index, prefix) for index in range(count)])

    @property
    def keys(self) -> Tensor | None:
        """Of all images that come again, where their prefix activations are to be kept [N]; those with a label do."""
        keys = [view.keys[view.is_known] for view in self.views if view.keys is not None]
        return torch.cat(keys) if keys else None

    def batches(self, tuning: Tuning, draw: int, epoch: int) -> Iterator[Batch]:
        """The batches of one local epoch: a pure function of the seed, the draw, the device and the epoch.

        Args:
            draw: the round; where clusters do not wait for each other, how many attempts of this one were counted.
        """
        generator = _generator([*self._key(draw, epoch), _AUGMENT_KEY])
        number = draw * tuning.local_epochs + epoch
        view = self.views[number % len(self.views)] if self.views else None
        for labelled, unlabelled in self._order(tuning, np.random.default_rng([*self._key(draw, epoch), _ORDER_KEY])):
            batch = view[labelled] if view else _augmented(self.examples[labelled], tuning, generator)
            if len(unlabelled):
                assert isinstance(self.examples, Examples)
                assert isinstance(batch, Examples)
                images = self.examples.images[unlabelled]
                strong = strongly_augment(images, tuning.unlabelled.strength, generator)
                batch = mixed_batch(batch, strong, augment(images, tuning.augmentation, generator))
            yield batch

    def _key(self, draw: int, epoch: int) -> list[int]:
        return [self.seed, draw, self.cluster_index, self.owner_index, epoch]

    def num_unlabelled(self, tuning: Tuning) -> int:
        """How many of its examples without a label it tunes on."""
        return int((~self.examples.is_known).sum()) if tuning.unlabelled.method == "fixmatch" else 0

    def num_examples(self, tuning: Tuning) -> int:
        """How many of its examples it tunes on, with a label or without."""
        return int(self.examples.is_known.sum()) + self.num_unlabelled(tuning)

    def _order(self, tuning: Tuning, rng: np.random.Generator) -> Iterator[tuple[Indices, Indices]]:
        """The labelled and unlabelled examples of each batch of an epoch.

        It goes once through the unlabelled ones, and through the labelled ones as often as that takes; where no
        unlabelled ones are tuned on, once through the labelled.
        """
        is_known = self.examples.is_known.numpy()
        known, unlabelled = np.flatnonzero(is_known), np.flatnonzero(~is_known)
        order = rng.permutation(known)
        size = max(1, min(tuning.batch_size, len(known)))
        if not self.num_unlabelled(tuning):
            yield from ((order[begin : begin + size], unlabelled[:0]) for begin in range(0, len(order), size))
            return
        unlabelled = rng.permutation(unlabelled)
        for begin in range(0, len(unlabelled), tuning.unlabelled.ratio * size):
            if len(order) < size:
                order = np.concatenate([order, rng.permutation(known)])
            labelled, order = order[:size], order[size:]
            yield labelled, unlabelled[begin : begin + tuning.unlabelled.ratio * size]

    def _view(self, tuning: Tuning, index: int, prefix: str | None) -> Batch:
        generator = _generator([self.seed, self.cluster_index, self.owner_index, index, _VIEW_KEY])
        view = _augmented(self.examples, tuning, generator)
        return view if prefix is None else replace(view, keys=prefix_keys(view.inputs, prefix))


class DeviceTuning:
    """One device's tuning role.

    Args:
        routes: one for each device of the cluster that owns data.
        data: what the device owns; None where it owns nothing.
        wire: the types in which it sends activations and gradients.
        cache: where it keeps prefix activations; None where none are kept.
        controls: this device's memory of SCAFFOLD; None for methods without.
        feedback: what makes of its tunables a change in fewer bytes; None where they are sent as they are.
        update_factor: times what it learned is what it answers with: 1, but for a fault on purpose.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        tuning: Tuning,
        stage: Stage,
        worker: Worker,
        neighbours: Neighbours,
        data: LocalData | None,
        *,
        wire: Wire | None = None,
        cache: PrefixCache | None = None,
        update_factor: float = 1.0,
        controls: Controls | None = None,
        feedback: Feedback | None = None,
    ) -> None:
        self._draws: Draws | None = None
        if stage.noise is not None and data is not None:
            assert isinstance(data.examples, Passages)
            self._draws = Draws.of(data.examples, tuning.batch_size)
        self._controls, self._feedback = controls, feedback
        self._routes, self._tuning, self._stage, self._worker = list(routes), tuning, stage, worker
        self._neighbours, self._data, self._update_factor = neighbours, data, update_factor
        wire = wire or Wire()
        self._wire_types = {FORWARD: wire.activations, BACKWARD: wire.gradients}
        self._cache = cache
        self._latest = AttemptKey(-1, -1)
        self._ordered: AttemptKey | None = None  # the latest, unless it was broken off
        self._current: LocalSteps | None = None
        self._early: list[tuple[Message, Flow]] = []
        self._lost: NodeLostError | None = None  # since the latest order

    async def tune(self, message: Message) -> Message:
        """Do this device's part of one attempt, and answer with its tunables.

        Raises:
            ProtocolError: if a later attempt was ordered before.
            NodeLostError: if another device of the cluster is lost.
        """
        order = message.read(TuneOrder)
        self._fence(order.key)
        await self.break_off()
        if order.key == self._latest:
            self._ordered = order.key
        await self._neighbours.connect(order.addresses)
        self._check_ordered(order.key)
        received, control = split_controls(message.tensors)
        tunables = await self._worker.compute(restore_all, received)
        correction = await self._worker.compute(self._recall, order.counted, control, tunables)
        settings = self._settings(order.key.round_index)
        by_edge = self._tuning.unlabelled.teacher == "edge"
        await self._worker.compute(self._stage.begin, tunables, settings, correction, keeps_begun=by_edge)
        self._check_ordered(order.key)
        data = None if self._data is None else self._data.at(order.key.round_index)
        steps = self._begin(order.key, order.key.round_index if order.draw is None else order.draw, data)
        result = await steps.run()
        usage = self._worker.usage("tuning", self._memory_bytes)
        num_examples = data.num_examples(self._tuning) if data else 0
        has_unlabelled = data is not None and data.num_unlabelled(self._tuning) > 0
        confident = result.confident if has_unlabelled else None
        body = TuneResult(num_examples, result.loss, usage, confident, self._sampled())
        answer = await self._worker.compute(self._answer, order.key.attempt, tunables, result)
        return Message.of(TUNE, body, kind="tunables", tensors=answer)

    def _sampled(self) -> Sampled | None:
        """How this device's examples were drawn in an attempt, where each is protected."""
        draws = self._draws
        return None if draws is None else Sampled(draws.rate, draws.num_steps * self._tuning.local_epochs)

    def _batches(self, data: LocalData, draw: int, epoch: int) -> Iterator[Batch]:
        """Of one local epoch: by the seed, but in secret where each example is protected."""
        if self._draws is None:
            return data.batches(self._tuning, draw, epoch)
        assert isinstance(data.examples, Passages)
        source, strength = random.SystemRandom(), self._tuning.augmentation
        drawn = self._draws.batches(data.examples, source)
        return (one.moved_apart(strength, source) if isinstance(one, PairPassages) else one for one in drawn)

    def _recall(
        self, counted: int | None, control: Mapping[str, Tensor], tunables: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor] | None:
        """Begin with what the attempt counted last left; returns SCAFFOLD's correction, where there is one."""
        if self._feedback is not None:
            self._feedback.begin(counted)
        return None if self._controls is None else self._controls.begin(counted, control, tunables)

    def _answer(self, attempt: int, begun: Mapping[str, Tensor], result: LocalResult) -> Mapping[str, Tensor]:
        """What this device sends of what it tuned, and of SCAFFOLD's memory."""
        answer, controls = result.tunables, {}
        if self._update_factor != 1:
            answer = {n: torch.lerp(begun[n], t, self._update_factor) for n, t in answer.items()}
        if self._controls is not None:
            changes = self._controls.end(attempt, self._stage.gradient_sums(), result.num_steps)
            controls = {name: changes[name] for name in answer}
        if self._feedback is not None:
            answer = self._feedback.end(attempt, begun, answer)
        return with_controls(answer, controls)

    async def break_off(self) -> None:
        """End the attempt under way, if one is: who ordered it has gone on, and its stage is needed."""
        self._ordered = None
        if self._current is not None:
            await self._current.break_off()

    def _check_ordered(self, key: AttemptKey) -> None:
        if self._ordered != key:
            raise ProtocolError(f"attempt {key} was broken off before it began")

    def deliver(self, message: Message) -> None:
        """Take a neighbour's message; one that belongs to an attempt not yet begun here waits for it."""
        flow = message.read(Flow)
        if self._current is not None and flow.key == self._current.key:
            self._current.deliver(message, flow)
        elif flow.key >= self._latest:  # equal while this device still takes the order's tunables
            self._keep_early(message, flow)
        else:
            logger.debug("dropped %s of the fenced attempt %s", message.method, flow.key)

    def _keep_early(self, message: Message, flow: Flow) -> None:
        """Hold a message for an attempt not yet ordered here; credits let only so many come in time."""
        if len(self._early) >= _MAX_EARLY:
            logger.warning(
                "dropped %s of attempt %s: %d messages came before their order", message.method, flow.key, _MAX_EARLY
            )
            return
        self._early.append((message, flow))

    def lose(self, error: NodeLostError) -> None:
        """A neighbour is lost: the attempt that needs it fails."""
        if self._current is not None:
            self._current.fail(error)
        self._lost = error

    def _begin(self, key: AttemptKey, draw: int, data: LocalData | None) -> LocalSteps:
        is_plain = self._stage.noise is None
        self._current = LocalSteps(
            key,
            self._routes,
            self._stage,
            self._worker,
            self._neighbours,
            num_epochs=self._tuning.local_epochs,
            batches=partial(self._batches, data, draw) if data else None,
            num_microbatches=self._tuning.microbatches,
            wire_types=self._wire_types,
            own_keys=data.keys if data and is_plain else None,  # private draws have no keys
            cache=self._cache,
            unlabelled=self._tuning.unlabelled,
            expected=self._draws.expected if self._draws else None,
            collect=self._own_tunables,
        )
        if self._lost is not None:
            self._current.fail(self._lost)
        early, self._early = self._early, []
        for message, flow in early:
            if flow.key == key:
                self._current.deliver(message, flow)
        return self._current

    @property
    def _memory_bytes(self) -> int:
        return self._stage.memory_bytes + (self._cache.memory_bytes if self._cache else 0)

    def _own_tunables(self) -> Tunables:
        """The tunables that end with this device: those of the first segment with the last owner only."""
        last = self._routes[-1 if self._tuning.local_epochs else 0]
        return tunables_of(self._stage.tunables, last.placement.segments_of(self._neighbours.node_id))

    def _fence(self, key: AttemptKey) -> None:
        if key <= self._latest:
            raise ProtocolError(f"attempt {key} is fenced off: attempt {self._latest} came before it")
        self._latest, self._lost = key, None

    def _settings(self, round_index: int) -> OptimizerSettings:
        tuning = self._tuning
        rate = tuning.learning_rate * tuning.learning_rate_decay**round_index
        return OptimizerSettings(
            rate, tuning.weight_decay, tuning.clip_norm, tuning.epsilon, tuning.proximal, tuning.optimizer
        )


def _augmented(examples: Batch, tuning: Tuning, generator: torch.Generator) -> Batch:
    if isinstance(examples, Examples):
        return Examples(augment(examples.images, tuning.augmentation, generator), examples.labels)
    return examples.moved(tuning.augmentation, generator) if isinstance(examples, PairPassages) else examples


def _generator(key: Sequence[int]) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))
