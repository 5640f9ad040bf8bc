"""The two kinds of models, and what nodes do differently with them; chosen once, by the model's type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedConfig, ViTConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ecogen.models.checkpoint import FILE
from ecogen.models.decoder import decoder_of, names_of_segments
from ecogen.models.profile import VISION
from ecogen.models.segmented import Segmented
from ecogen.models.vit import load_vit, parameter_names
from ecogen.placement import Segment


class Family(Protocol):
    """How the segments of a kind of model are fetched and made."""

    def config(self, table: Mapping[str, Any]) -> PreTrainedConfig:
        """The configuration that its `to_dict` gave."""

    def names(self, config: PreTrainedConfig, segments: Sequence[Segment], offered: Iterable[str]) -> list[str]:
        """The tensors that some segments need.

        Args:
            offered: what the checkpoint has, where the configuration does not tell.
        """

    def load(self, config: PreTrainedConfig, segments: Sequence[Segment], tensors: Mapping[str, Tensor]) -> Segmented:
        """The segments with these tensors.

        Raises:
            CheckpointError: if they do not fit.
        """


class _VisionTransformers:
    """Tensors have the classification model's names, which its configuration tells."""

    def config(self, table: Mapping[str, Any]) -> PreTrainedConfig:
        return ViTConfig.from_dict(dict(table))

    def names(self, config: PreTrainedConfig, segments: Sequence[Segment], offered: Iterable[str]) -> list[str]:
        return parameter_names(config, segments)

    def load(self, config: PreTrainedConfig, segments: Sequence[Segment], tensors: Mapping[str, Tensor]) -> Segmented:
        return load_vit(config, segments, tensors)


class _Decoders:
    """Tensors have the names of the files, which transformers may fuse and rename as it loads them."""

    def config(self, table: Mapping[str, Any]) -> PreTrainedConfig:
        return CONFIG_MAPPING[table["model_type"]].from_dict(dict(table))

    def names(self, config: PreTrainedConfig, segments: Sequence[Segment], offered: Iterable[str]) -> list[str]:
        return names_of_segments(config, segments, [name for name in offered if not name.startswith(FILE)])

    def load(self, config: PreTrainedConfig, segments: Sequence[Segment], tensors: Mapping[str, Tensor]) -> Segmented:
        return decoder_of(config, segments, tensors)


def family_of(model_type: str) -> Family:
    """The kind of model that a type is of."""
    return _VisionTransformers() if model_type == VISION else _Decoders()


def whole_segment(config: PreTrainedConfig) -> Segment:
    """The segment that is the whole model."""
    return Segment(0, config.num_hidden_layers, has_embedding=True, has_head=True)
