"""A node's whole generator: it teaches by drawing, and learns from what others drew and what it drew itself before.

All of it runs on the compute thread, and is a pure function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ecogen.config import Relay
from ecogen.models.family import whole_segment
from ecogen.models.image_tokenizer import load_image_tokenizer
from ecogen.models.pair_model import OnDone, PairModel
from ecogen.models.tokenizer import load_tokenizer
from ecogen.models.tunables import Tunables
from ecogen.placement import Segment
from ecogen.planning.cost import ModelShape, backward_flops, forward_flops
from ecogen.relay.samples import Captions, Samples, unpacked
from ecogen.relay.teacher import Lesson, rehearse, teach
from ecogen.runtime.stage import MicrobatchKey, OptimizerSettings, Stage
from ecogen.runtime.worker import Worker
from ecogen.tuning.evaluate import Evaluator, rows_at_once
from ecogen.tuning.pairs import PairWriter
from ecogen.tuning.passages import IGNORED, Passages, joined

_CLIP_NORM, _WEIGHT_DECAY = 1.0, 0.01


class Generator:
    """The generator that a node holds as a whole.

    Args:
        folder: of its backbone, with both tokenizers.
        length: T, to which passages are padded.
        on_step: told how many steps of learning are done, and of how many.

    Raises:
        CheckpointError: if the folder has no image tokenizer.
    """

    def __init__(
        self,
        stage: Stage,
        folder: Path,
        shape: ModelShape,
        worker: Worker,
        spec: Relay,
        length: int,
        *,
        on_step: OnDone = lambda *_: None,
    ) -> None:
        tokenizer, images = load_tokenizer(folder), load_image_tokenizer(folder)
        self._stage, self._shape, self._worker, self._spec = stage, shape, worker, spec
        self._model = PairModel(stage.model.whole, tokenizer, images)
        self.writer = PairWriter(tokenizer, images, length)
        self.images, self._on_step = images.config, on_step

    def teach(
        self, tunables: Mapping[str, Tensor], evidence: Mapping[str, int], number: int, key: Sequence[int]
    ) -> Lesson:
        """As `teacher.teach`, with these tunables."""
        self._stage.begin(tunables)
        lesson = teach(self._model, evidence, number, keyed(key), self._spec.temperature)
        passes = 3 * lesson.num_drawn  # each is drawn, described, and its caption judged
        self._meter(passes, self._num_tokens(list(evidence)))
        return lesson

    def rehearse(
        self, tunables: Mapping[str, Tensor], evidence: Mapping[str, int], number: int, key: Sequence[int]
    ) -> Samples:
        """As `teacher.rehearse`, with these tunables."""
        self._stage.begin(tunables)
        self._meter(number, self._num_tokens(list(evidence)))
        return rehearse(self._model, evidence, number, keyed(key))

    def confidence(self, tunables: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """How likely a model with these tunables holds the captions of samples to be right [N]."""
        self._stage.begin(tunables)
        passes = 3 * len(samples)  # what it says itself, and how likely both are
        self._meter(passes, self._num_tokens(samples.captions))
        return self._model.confidence(samples.codes, samples.captions)

    def learn(
        self,
        tunables: Mapping[str, Tensor],
        new: Passages,
        known: Passages | None,
        key: Sequence[int],
        *,
        share: float = 1.0,
    ) -> Tunables:
        """The tunables after local steps.

        Args:
            known: what is rehearsed, `rehearsal` of each batch; None for nothing.
            share: of the recipe's steps, and of its rate.
        """
        spec, generator = self._spec, keyed(key)
        steps, rate = math.ceil(share * spec.steps), share * spec.learning_rate
        self._stage.begin(tunables, OptimizerSettings(rate, _WEIGHT_DECAY, _CLIP_NORM))
        num_known = round(spec.rehearsal * spec.batch_size) if known is not None and len(known) else 0
        for step in range(steps):
            self._worker.check_given_up()
            self._stage.set_rate(rate * (1 + math.cos(math.pi * step / steps)) / 2)
            parts = [_some(new, spec.batch_size - num_known, generator)]
            parts += [_some(known, num_known, generator)] if known is not None and num_known else []
            self._step(step, joined(parts).trimmed())
            self._on_step(step + 1, steps)
        return self._stage.tunables

    def _step(self, step: int, batch: Passages) -> None:
        key, segment = MicrobatchKey(step, 0, 0), self._segment
        counted = int((batch.labels != IGNORED).sum())
        self._stage.loss(key, segment, batch.tokens, batch.labels, counted, input_grads=False)
        self._stage.backward(key, None)
        self._stage.step(self._stage.squared_norm(segment))
        shape = self._shape.seeing(batch.tokens.shape[1])
        flops = forward_flops(shape, segment, len(batch)) + backward_flops(shape, segment, len(batch))
        self._worker.meter.add_flops(flops)

    def perplexity(self, passages: Passages) -> Callable[[Mapping[str, Tensor]], float]:
        """Of passages, as a function of tunables."""
        evaluate = Evaluator(self._stage, self._shape, self._worker, passages)

        def measured(tunables: Mapping[str, Tensor]) -> float:
            score = evaluate(tunables).perplexity
            assert score is not None
            return score

        return measured

    @torch.no_grad()
    def losses(self, tunables: Mapping[str, Tensor], passages: Passages) -> list[float]:
        """The mean cross-entropy of a token of each passage."""
        self._stage.begin(tunables)
        passages = passages.trimmed()
        rows = rows_at_once(passages, self._shape)
        return [loss for part in passages.split(-(-len(passages) // rows)) for loss in self._losses(part)]

    def _losses(self, part: Passages) -> list[float]:
        self._meter(len(part), part.tokens.shape[1])
        logits = self._stage.infer(self._segment, part.tokens).cpu().float()
        each = cross_entropy(logits.transpose(1, 2), part.labels, reduction="none", ignore_index=IGNORED)
        means: list[float] = (each.sum(1) / (part.labels != IGNORED).sum(1)).tolist()
        return means

    def passages(self, samples: Samples) -> Passages:
        """Samples as a model learns from them, each both ways."""
        return self.writer.both_of(samples.captions, samples.codes)

    def read(self, body: Captions, tensors: Mapping[str, Tensor], teachers: int = 1) -> Samples:
        """The samples in a message, of so many teachers at most.

        Raises:
            ProtocolError: if they are none, or more than were asked for.
        """
        most = teachers * self._spec.samples
        return unpacked(body, tensors, self.images.codebook_size, self.images.num_codes, most)

    def _meter(self, passes: int, num_tokens: int) -> None:
        """Of all tokens, each once, whether they are cached or not."""
        self._worker.meter.add_flops(forward_flops(self._shape.seeing(num_tokens), self._segment, passes))

    def _num_tokens(self, captions: Sequence[str]) -> int:
        """Of the longest passage of a picture with one of these captions."""
        codes = torch.zeros(len(captions), self.images.num_codes, dtype=torch.int64)
        return self.writer.both_of(captions, codes).trimmed().tokens.shape[1]

    @property
    def _segment(self) -> Segment:
        return whole_segment(self._stage.model.whole.config)


def keyed(key: Sequence[int]) -> torch.Generator:
    """A generator whose numbers are those of a key."""
    return torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))


def _some(passages: Passages, number: int, generator: torch.Generator) -> Passages:
    return passages[torch.randint(len(passages), (number,), generator=generator)]
