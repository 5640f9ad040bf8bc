"""A language model as an edge serves it: what each device needs of its folder, and how large that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from ecogen.models.decoder import block_index, names_of_segments, open_config
from ecogen.models.folder import ModelFolder, read_text_files
from ecogen.models.slabs import has_states
from ecogen.placement import Segment
from ecogen.planning.decoding import Weights


class LanguageModel:
    """A causal language model in a folder.

    Args:
        dtypes: in which devices hold it, as recipes name them.

    Raises:
        CheckpointError: if it cannot be cut.
    """

    def __init__(self, folder: ModelFolder, dtypes: Iterable[str] = ("float32",)) -> None:
        names = set(dtypes)
        self.folder = folder
        self._weight_bytes = max(getattr(torch, name).itemsize for name in names)
        self._kept_bytes = max(computed_in(name).itemsize for name in names)
        self._config: PreTrainedConfig = open_config(folder.path)
        self._text: Any = self._config.get_text_config()

    @property
    def config(self) -> Mapping[str, Any]:
        return self.folder.config

    @cached_property
    def text_files(self) -> dict[str, bytes]:
        """The tokenizer's."""
        return read_text_files(self.folder.path)

    @cached_property
    def digest(self) -> str:
        return self.folder.digest

    @cached_property
    def has_states(self) -> bool:
        """Whether some layers keep states that have seen all tokens."""
        return has_states(self._config)

    def max_tokens(self, wanted: int) -> int:
        """As many as are wanted, but no more than the model was made for."""
        return min(wanted, getattr(self._text, "max_position_embeddings", None) or wanted)

    def shards(self, segments: Sequence[Segment]) -> dict[str, list[str]]:
        """The tensors that some segments need, by shard: one for each block, and for each tensor outside of them."""
        shards: dict[str, list[str]] = {}
        for name in names_of_segments(self._config, segments, self.folder.files):
            block = block_index(name)
            shards.setdefault(name if block is None else f"block-{block}", []).append(name)
        return shards

    def weights(self, slots: int, max_tokens: int) -> Weights:
        """How large it is with room for so many requests."""
        number, blocks = self._weight_bytes, [0] * self._text.num_hidden_layers
        for name, size in self.folder.sizes.items():
            if (block := block_index(name)) is not None:
                blocks[block] += size * number
        table = self._text.vocab_size * self._text.hidden_size
        kept = slots * max_tokens * self._numbers_kept * self._kept_bytes
        return Weights(tuple(blocks), table * self._kept_bytes, table * number, kept)

    @property
    def _numbers_kept(self) -> int:
        """Of each token in each block: keys and values of all heads; types that keep less are counted with as much."""
        text = self._text
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(2 * heads * width)


def computed_in(dtype: str) -> torch.dtype:
    """The type of activations where weights have one that a recipe names."""
    return torch.float32 if dtype == "int8" else getattr(torch, dtype)
