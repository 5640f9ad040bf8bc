"""A text-image generator on one node: draws what captions say, says what images show, and makes pairs of nothing.

Shapes: N pairs, T codes of an image, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ecogen.models.image_tokenizer import ImageTokenizer, load_image_tokenizer
from ecogen.models.pair_tokens import TEMPERATURE, PairTokens, caption_of, pair_tokens, prompts_of
from ecogen.models.tokenizer import load_tokenizer

OnDone = Callable[[int, int], None]
"""Told how many are done, of how many, after each batch."""

_BATCH = 128
_LONGEST_CAPTION = 24  # tokens


@dataclass(frozen=True)
class Drawn:
    """Images in codes, what they are to show, and how likely the model holds them to be.

    Attributes:
        codes: of the images [N, T].
        log_likelihood: of all codes of each image, given its caption [N].
        tokenizer: that makes images of codes.
    """

    codes: Tensor
    captions: Sequence[str]
    log_likelihood: Tensor
    tokenizer: ImageTokenizer

    @cached_property
    def images(self) -> Tensor:
        """[N, C, S, S] in [0, 1]; made when they are first asked for, since most drawings are but read again."""
        return self.tokenizer.decode(self.codes)


class PairModel:
    """The whole generator.

    Args:
        model: a decoder with a language-modelling head, of transformers, on the CPU.
        temperature: of everything that is drawn from a distribution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageTokenizer,
        temperature: float = TEMPERATURE,
    ) -> None:
        self.model, self.tokenizer, self.images = model, tokenizer, images
        self._temperature = temperature
        self.tokens: PairTokens = pair_tokens(tokenizer, images.config)

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path, temperature: float = TEMPERATURE) -> PairModel:
        """A model, with the tokenizers of a folder.

        Raises:
            CheckpointError: if the folder has not both of them.
        """
        return cls(model, load_tokenizer(folder), load_image_tokenizer(folder), temperature)

    def draw(
        self,
        captions: Sequence[str],
        generator: torch.Generator,
        *,
        temperature: float | None = None,
        on_done: OnDone | None = None,
    ) -> Drawn:
        """An image for each caption.

        Args:
            temperature: None for the model's.
        """
        heat = self._temperature if temperature is None else temperature
        prompts = (prompts_of(self.tokenizer, captions[part]) for part in _parts(len(captions), on_done))
        drawn = [self.draw_codes(own, generator, heat) for own in prompts]
        codes, likelihoods = (torch.cat(one) for one in zip(*drawn, strict=True))
        return Drawn(codes, captions, likelihoods, self.images)

    def describe(self, images: Tensor) -> list[str]:
        """The likeliest caption of each image [N, C, S, S] in [0, 1]."""
        return self.describe_codes(self.images.encode(images))

    def describe_codes(self, codes: Tensor, *, on_done: OnDone | None = None) -> list[str]:
        """The likeliest caption of each image in codes [N, T]."""
        rows = (row for part in _parts(len(codes), on_done) for row in self.caption_tokens(codes[part]))
        return [caption_of(self.tokenizer, row) for row in rows]

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """How likely the model holds the codes of images [N, C, S, S] to be, given their captions [N]."""
        codes = self.images.encode(images)
        starts = range(0, len(captions), _BATCH)
        parts = [self._log_likelihood(codes[at : at + _BATCH], captions[at : at + _BATCH]) for at in starts]
        return torch.cat(parts)

    @torch.no_grad()
    def confidence(self, codes: Tensor, captions: Sequence[str]) -> Tensor:
        """How likely the model holds captions to be what images in codes [N, T] show [N], of 0 to 1.

        Of two captions, the one that is asked about and the one that it gives itself: 1 where these are the same, and
        less than half where its own is likelier, be it the same in other words.
        """
        starts = range(0, len(captions), _BATCH)
        parts = [self._confidence(codes[at : at + _BATCH], captions[at : at + _BATCH]) for at in starts]
        return torch.cat(parts) if parts else torch.empty(0)

    @torch.no_grad()
    def caption_log_likelihood(
        self, codes: Tensor, captions: Sequence[str], *, on_done: OnDone | None = None
    ) -> Tensor:
        """How likely the model, asked what images in codes [N, T] show, is to give these captions: logarithms [N]."""
        slices = _parts(len(captions), on_done)
        parts = [self._caption_log_likelihood(codes[part], captions[part]) for part in slices]
        return torch.cat(parts) if parts else torch.empty(0)

    def invent(self, count: int, generator: torch.Generator) -> Drawn:
        """Pairs of nothing: captions drawn from the model, and images for them."""
        starts = [count - start for start in range(0, count, _BATCH)]
        captions = [text for left in starts for text in self._invent_captions(min(left, _BATCH), generator)]
        return self.draw(captions, generator)

    def _log_likelihood(self, codes: Tensor, captions: Sequence[str]) -> Tensor:
        tokens, mask = _padded_left(self._asked(prompts_of(self.tokenizer, captions)), self._padding)
        own = codes + self.tokens.first
        mask = torch.cat([mask, torch.ones_like(own)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(torch.cat([tokens, own], 1), attention_mask=mask, position_ids=positions).logits
        first, stop = self.tokens.within
        logs = logits[:, tokens.shape[1] - 1 : -1, first:stop].float().log_softmax(-1)
        return logs.gather(2, codes[:, :, None]).sum((1, 2))

    def _confidence(self, codes: Tensor, captions: Sequence[str]) -> Tensor:
        said = self.describe_codes(codes)
        asked, own = (self.caption_log_likelihood(codes, one) for one in (captions, said))
        is_same = torch.tensor([ours == theirs for ours, theirs in zip(said, captions, strict=True)])
        return torch.where(is_same, 1.0, (asked - own).sigmoid())

    def _caption_log_likelihood(self, codes: Tensor, captions: Sequence[str]) -> Tensor:
        """Of a caption's tokens, and of its end, after an image [N]."""
        written = self.tokens.written(codes)
        shown = torch.cat([torch.full((len(codes), 1), self.tokenizer.bos_token_id), written], 1)
        rows = [torch.tensor([*row, self.tokenizer.eos_token_id]) for row in prompts_of(self.tokenizer, captions)]
        wanted = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        tokens = torch.cat([shown, wanted[:, :-1].clamp(min=0)], 1)  # what is behind a caption changes nothing before
        logs = self.model(tokens).logits[:, shown.shape[1] - 1 :].float().log_softmax(-1)
        each: Tensor = logs.gather(2, wanted.clamp(min=0)[:, :, None]).squeeze(2)
        return (each * (wanted >= 0)).sum(1)

    def _asked(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tokens that an image follows on."""
        return [[self.tokenizer.bos_token_id, *row, self.tokens.begin] for row in prompts]

    @torch.no_grad()
    def draw_codes(
        self, prompts: Sequence[Sequence[int]], generator: torch.Generator, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Codes [N, T] for the tokens of captions, and how likely they are [N]; no text or image is read or made."""
        state = _State(self.model, *_padded_left(self._asked(prompts), self._padding))
        codes, likelihood = [], torch.zeros(len(prompts))
        for _ in range(self.tokens.length):
            logits = state.logits[:, self.tokens.first : self.tokens.first + self.tokens.num_codes]
            logs = (logits.float() / temperature).log_softmax(-1)
            code = torch.multinomial(logs.exp(), 1, generator=generator)
            likelihood += logits.float().log_softmax(-1).gather(1, code).squeeze(1)
            codes.append(code)
            state.add(code + self.tokens.first)
        return torch.cat(codes, 1), likelihood

    @torch.no_grad()
    def caption_tokens(self, codes: Tensor) -> list[list[int]]:
        """The tokens of the likeliest caption of each image in codes [N, T]; no text or image is read or made."""
        written = self.tokens.written(codes).tolist()
        rows = [[self.tokenizer.bos_token_id, *row] for row in written]
        return self._captions(_State(self.model, *_padded_left(rows, self._padding)), None)

    @torch.no_grad()
    def _invent_captions(self, count: int, generator: torch.Generator) -> list[str]:
        rows = [[self.tokenizer.bos_token_id]] * count
        said = self._captions(_State(self.model, *_padded_left(rows, self._padding)), generator)
        return [caption_of(self.tokenizer, row) for row in said]

    def _captions(self, state: _State, generator: torch.Generator | None) -> list[list[int]]:
        """The tokens of text up to what ends it: the likeliest, or with a generator drawn."""
        ends = torch.tensor([self.tokenizer.eos_token_id, self.tokens.begin])
        said = list[Tensor]()
        for _ in range(_LONGEST_CAPTION):
            logits = state.logits.float()
            logits[:, self.tokens.first : self.tokens.first + self.tokens.num_codes] = -torch.inf
            if not said:  # a caption has a word
                logits[:, [*ends, self.tokens.end]] = -torch.inf
            if generator is None:
                said.append(logits.argmax(-1, keepdim=True))
            else:
                said.append(torch.multinomial((logits / self._temperature).softmax(-1), 1, generator=generator))
            state.add(said[-1])
            if torch.isin(torch.cat(said, 1), ends).any(1).all():
                break
        return [self._until_end(row) for row in torch.cat(said, 1).tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = {self.tokenizer.eos_token_id, self.tokens.begin}
        return tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]

    @property
    def _padding(self) -> int:
        padding: int = self.tokenizer.pad_token_id
        return padding


class _State:
    """A batch of sequences that a decoder goes on with, token by token.

    Attributes:
        logits: of each sequence's next token [N, V].
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> None:
        self._model, self._mask, self._cache = model, mask, None
        self._run(tokens, (mask.cumsum(1) - 1).clamp(min=0))

    def add(self, tokens: Tensor) -> None:
        """Go on with one token each [N, 1]."""
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], 1)
        self._run(tokens, positions)

    def _run(self, tokens: Tensor, positions: Tensor) -> None:
        given = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache, self.logits = given.past_key_values, given.logits[:, -1]


def _parts(total: int, on_done: OnDone | None) -> Iterator[slice]:
    """The places of each batch; when the next one is asked for, the last is done."""
    for start in range(0, total, _BATCH):
        stop = min(start + _BATCH, total)
        yield slice(start, stop)
        if on_done is not None:
            on_done(stop, total)


def _padded_left(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one tensor [N, T], and which places count."""
    length = max(map(len, rows))
    tokens = torch.tensor([[padding] * (length - len(row)) + [*row] for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask
