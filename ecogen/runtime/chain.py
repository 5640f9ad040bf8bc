"""A cluster's stages in order, callable as one module: the same computation without a network in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ecogen.models.segmented import Segmented
from ecogen.placement import Placement, Visit


class Chain(nn.Module):
    """The visits of a placement, each on its node's model.

    `chain(pixels)`, of text `chain(tokens)`, gives logits, with gradients through every segment; `chain[i:j]` runs some
    of the visits only.
    """

    def __init__(self, placement: Placement, models: Mapping[str, Segmented]) -> None:
        super().__init__()
        self.visits = tuple(placement)
        self._models = dict(models)
        self.held = nn.ModuleList(self._models.values())

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits from pixels [B, C, H, W] or tokens [B, T]; a slice takes and gives what its visits do."""
        for visit in self.visits:
            inputs = self._models[visit.node_id](inputs, visit.segment)
        return inputs

    def __iter__(self) -> Iterator[Visit]:
        return iter(self.visits)

    def __len__(self) -> int:
        return len(self.visits)

    def __getitem__(self, part: slice) -> Chain:
        chain = Chain.__new__(Chain)
        nn.Module.__init__(chain)
        chain.visits, chain._models, chain.held = self.visits[part], self._models, self.held
        return chain
