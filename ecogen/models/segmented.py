"""The models that nodes hold parts of: of each, only the own blocks exist, under the whole model's names.

Both have `whole`, the transformers model with holes for what others hold, and `segments`, and both are called with
inputs and one of these. In both `whole.base_model.layers` is the list of blocks.
"""

from __future__ import annotations

from ecogen.models.decoder import SegmentedDecoder
from ecogen.models.vit import SegmentedViT

Segmented = SegmentedViT | SegmentedDecoder
