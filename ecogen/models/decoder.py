"""A language model's decoder seen as segments: only the own blocks exist, under the whole model's names.

A causal language model of transformers whose configuration names its parts (`base_model_pp_plan`) is cut without code
of its own: it keeps its full list of blocks, with holes where another node holds one, and its own forward makes masks,
positions and rotary embeddings on every node. A hole below the segment hands on what came from the node before, one
above it what the segment's last block gave. So embeddings, scales and norms that are another node's never matter.

Shapes: B batch, T tokens, S those of the cache and T, D hidden, V vocabulary.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from ecogen.errors import CheckpointError
from ecogen.models.families import refusal
from ecogen.placement import Segment

_CACHE_LINE = 64
"""Bytes, as torch allocates; see `c10/core/alignment.h`."""

_BLOCK = re.compile(r"(?:\w+\.)*?layers\.(\d+)\.")

_LOADING = threading.Lock()
"""While transformers makes or loads a model it changes defaults of the whole process; nodes may share one."""

State = Tensor | tuple[Tensor, ...]
"""What passes between two blocks: hidden states [B, T, D], in some families with more beside them."""


class Hole(nn.Module):
    """Stands where another node holds a block; it has that block's plain attributes, which models look at.

    Attributes:
        writes_to: the layers of a cache that the block writes to.
        passing: what it hands on.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # on the meta device or another segment's, and not a module of ours
        self.writes_to: list[int] = block.writes_to if isinstance(block, Hole) else _layers_of_cache(block)
        self.passing: State | None = None
        self.cache: DynamicCache | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *_: object, **__: object) -> State:
        if self.passing is None:
            raise RuntimeError("this part of the model is on another node")
        if self.cache is not None:
            for index in self.writes_to:
                _advance(self.cache, index, _hidden(self.passing))
        return self.passing


class _Through(nn.Module):
    """In the place of a norm or a head that another node holds."""

    def forward(self, hidden: State, *_: object, **__: object) -> State:
        return hidden


class SegmentedDecoder(nn.Module):
    """The parts of a causal language model that one node holds.

    Attributes:
        whole: the transformers model with holes for what others hold, so that names, indices and PEFT see the whole
            model.
    """

    def __init__(self, whole: PreTrainedModel, segments: Sequence[Segment]) -> None:
        super().__init__()
        self.whole = whole
        self.segments = tuple(segments)
        self._views = {segment: _View(whole, segment) for segment in segments}

    def forward(
        self,
        inputs: State,
        segment: Segment,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        num_logits: int = 0,
    ) -> State:
        """Run one held segment, or a part of one.

        Args:
            inputs: token ids [B, T] where the segment has the embedding, else what the segment before gave.
            attention_mask: [B, S], 0 where padding is; None where there is none.
            position_ids: [B, T]; None for those that follow what the cache holds.
            num_logits: of how many last tokens logits are wanted; 0 for all.
            cache: this segment's, as `new_cache` makes it, or slabs; None where nothing is kept.

        Returns:
            Logits [B, T, V] where the segment has the head, else what its last block gave.
        """
        if not (len(segment) or segment.has_head):
            return inputs
        return self._view(segment).run(inputs, attention_mask, position_ids, cache, num_logits)

    def _view(self, segment: Segment) -> _View:
        if segment not in self._views and any(_is_part(segment, held) for held in self.segments):
            self._views[segment] = _View(self.whole, segment)
        return self._views[segment]


def new_cache(model: SegmentedDecoder) -> DynamicCache:
    """An empty cache of keys, values and states for one held segment."""
    return DynamicCache(config=model.whole.config)


def load_decoder(folder: Path, segments: Sequence[Segment], *, dtype: torch.dtype = torch.float32) -> SegmentedDecoder:
    """The segments of a model in a folder that `save_pretrained` wrote, sharded or not; nothing else is read.

    Raises:
        CheckpointError: if it is no causal language model that can be cut, or a tensor is missing or of another shape.
    """
    try:
        return _load(str(folder), open_config(folder), segments, dtype=dtype)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{folder} is corrupt or not complete ({problem}); restore it") from problem


def decoder_of(
    config: PreTrainedConfig, segments: Sequence[Segment], tensors: Mapping[str, Tensor]
) -> SegmentedDecoder:
    """The segments of a model from the tensors of such a folder, under the names that they have in its files.

    Raises:
        CheckpointError: if a tensor is missing or of another shape.
    """
    return _load("what was delivered", config, segments, dtype=torch.float32, state_dict=dict(tensors))


def names_of_segments(config: PreTrainedConfig, segments: Sequence[Segment], names: Iterable[str]) -> list[str]:
    """Those of a folder's tensors that some segments need, by the names that they have in its files."""
    with _LOADING, torch.device("meta"):
        foreign = _foreign(_part_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], segments)(config))
    others = re.compile("|".join(foreign) or r"(?!)")
    return [name for name in names if not others.search(name)]


def block_index(name: str) -> int | None:
    """The block that a parameter is in, by its name; None for what is above or below all of them."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else None


def _load(source: str, config: PreTrainedConfig, segments: Sequence[Segment], **arguments: Any) -> SegmentedDecoder:
    part = _part_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], segments)
    folder = None if "state_dict" in arguments else source
    with _LOADING, _without_progress_bars():
        whole, found = part.from_pretrained(folder, config=config, output_loading_info=True, **arguments)
    wrong = {str(key) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in found[kind]}
    wrong |= {name for name, tensor in whole.state_dict().items() if tensor.is_meta}
    if wrong:
        raise CheckpointError(f"{source} does not fit its config.json: {len(wrong)} tensors, {min(wrong)!r} among them")
    align(whole)
    return SegmentedDecoder(whole.eval().requires_grad_(False), segments)


def align(model: nn.Module) -> None:
    """Have every tensor begin where a cache line does, as a file's do by chance only.

    The last bits of a product depend on it, and so whether two nodes' results equal one's.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.data_ptr() % _CACHE_LINE and not tensor.is_meta:
            tensor.data = tensor.data.clone()


def open_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a causal language model that can be cut.

    Raises:
        CheckpointError: if the folder holds none.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as problem:  # whatever its checks ran into: TypeError and ZeroDivisionError are among it
        text = " ".join(str(problem).split())
        raise CheckpointError(f"{folder} is no model folder: {text}; give one that save_pretrained wrote") from None
    if reason := refusal(config.model_type):
        raise CheckpointError(f"{folder} holds a {config.model_type!r} model, which cannot be cut: {reason}")
    return config


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Nodes load side by side, and their launcher shows how far each is."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _part_of(whole: type[PreTrainedModel], segments: Sequence[Segment]) -> type[PreTrainedModel]:
    """A class that is made as the whole model and then has holes, so that `from_pretrained` loads the rest alone."""

    def make(self: PreTrainedModel, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        whole.__init__(self, config, *args, **kwargs)
        _make_holes(self, segments)
        self._keys_to_ignore_on_load_unexpected = self._keys_to_ignore_on_load_unexpected | _foreign(self)

    return type(whole.__name__, (whole,), {"__init__": make, "__module__": whole.__module__})


def _make_holes(whole: PreTrainedModel, segments: Sequence[Segment]) -> None:
    base, held = whole.base_model, {index for segment in segments for index in segment.blocks}
    if any(segment.has_embedding and not len(segment) for segment in segments):
        raise CheckpointError("the embedding of a decoder goes with at least one block")
    if max(segment.stop for segment in segments) > len(base.layers):
        raise CheckpointError(f"no {'; '.join(map(str, segments))} in a model that has {len(base.layers)} blocks")
    has_head = any(segment.has_head for segment in segments)
    has_embedding = any(segment.has_embedding for segment in segments)
    for index, block in enumerate(base.layers):
        if index not in held:
            base.layers[index] = Hole(block)
    if not (has_embedding or (has_head and whole.all_tied_weights_keys)):
        whole.set_input_embeddings(Hole(whole.get_input_embeddings()))
    if not has_head:
        _replace(base, _above_blocks(whole), Hole)
        _replace(whole, _head_names(whole), Hole)
        whole._tied_weights_keys, whole.all_tied_weights_keys = {}, {}


def _foreign(whole: PreTrainedModel) -> set[str]:
    """Patterns of the names of what other nodes hold."""
    holes = [name for name, module in whole.named_modules() if isinstance(module, Hole)]
    return {rf"^{re.escape(name)}\." for name in holes}


class _View:
    """A segment as a model of its own, which shares its modules with the whole one."""

    def __init__(self, whole: PreTrainedModel, segment: Segment) -> None:
        self._segment, self._width = segment, whole.config.get_text_config().hidden_size
        base, self._whole = _shallow(whole.base_model), _shallow(whole)
        setattr(self._whole, whole.base_model_prefix, base)
        blocks = list(base.layers)
        self._holes = {i: Hole(block) for i, block in enumerate(blocks) if i not in segment.blocks}
        base.layers = nn.ModuleList([self._holes.get(index, block) for index, block in enumerate(blocks)])
        if len(segment):
            blocks[segment.stop - 1].register_forward_hook(self._take)
        if not segment.has_head:
            _replace(base, _above_blocks(whole), lambda _: _Through())
        self._model = self._whole if segment.has_head else base
        self._given: State | None = None

    def run(
        self,
        inputs: State,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        num_logits: int,
    ) -> State:
        arguments: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": cache,
        }
        if self._segment.has_head and num_logits:
            arguments["logits_to_keep"] = num_logits
        if self._segment.has_embedding:
            assert isinstance(inputs, Tensor)
            arguments["input_ids"] = inputs
            self._pass(inputs)  # counts the tokens
        else:
            hidden = _hidden(inputs)
            arguments["inputs_embeds"] = hidden.new_zeros(()).expand(*hidden.shape[:2], self._width)
            self._pass(inputs)
        try:
            for hole in self._holes.values():
                hole.cache = cache if isinstance(cache, DynamicCache) else None  # others know how long their rows are
            outputs = self._model(**arguments, use_cache=cache is not None)
            given = outputs.logits if self._segment.has_head else self._given
        finally:
            self._pass(None)
        assert given is not None
        return given

    def _take(self, _module: nn.Module, _args: object, state: State) -> None:
        """The last block gave this; unless it runs for another segment that has it too."""
        if self._given is not None:
            self._pass(state)

    def _pass(self, state: State | None) -> None:
        """What the holes that follow hand on."""
        self._given = state
        for hole in self._holes.values():
            hole.passing = state


def _is_part(part: Segment, whole: Segment) -> bool:
    """Whether who holds a segment holds another."""
    return (
        whole.start <= part.start <= part.stop <= whole.stop
        and part.has_embedding <= whole.has_embedding
        and part.has_head <= whole.has_head
    )


def _shallow(module: nn.Module) -> Any:
    """A module with its own list of the same children."""
    copy = type(module).__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    copy._modules = dict(module._modules)
    return copy


def _replace(parent: nn.Module, names: Sequence[str], by: Any) -> None:
    for name in names:
        setattr(parent, name, by(getattr(parent, name)))


def _above_blocks(whole: PreTrainedModel) -> list[str]:
    """The names of what the base model has above its blocks: its last norm."""
    names = list(whole.config.base_model_pp_plan)
    return names[names.index("layers") + 1 :]


def _head_names(whole: PreTrainedModel) -> list[str]:
    return [name for name, module in whole.named_children() if module is whole.get_output_embeddings()]


def _hidden(state: State) -> Tensor:
    """What has the batch and the tokens as its first dimensions."""
    return state if isinstance(state, Tensor) else state[0]


def _layers_of_cache(block: nn.Module) -> list[int]:
    """Which layers of a cache a block's attention writes to; most write to one, some to two."""
    indices = {getattr(module, "layer_idx", None) for module in block.modules() if module is not block}
    return sorted(index for index in indices if isinstance(index, int))


def _advance(cache: DynamicCache, index: int, hidden: Tensor) -> None:
    """Count tokens in the cache of a block that another node holds, with one number for keys that it does not hold."""
    layer, tokens = cache.layers[index], hidden.shape[1]
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
    if isinstance(layer, CacheLayerMixin):
        counted = hidden.new_zeros(1, 1, tokens, 1)
        layer.update(counted, counted)
    if hasattr(layer, "update_indexer"):
        layer.update_indexer(hidden.new_zeros(1, tokens, 1))
