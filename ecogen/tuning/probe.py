"""Did pre-training teach anything? A linear probe on the foundation model, beside one on untrained weights."""

from __future__ import annotations

from transformers import ViTModel

from ecogen.config import Recipe
from ecogen.measurements import Probe
from ecogen.models.checkpoint import Foundation
from ecogen.tuning.data import load_splits
from ecogen.tuning.pretrain import linear_probe, new_model

_LABELLED = 200  # examples that the probe learns from


def probe_foundation(foundation: Foundation, recipe: Recipe) -> Probe | None:
    """Validation accuracy of logistic regression on frozen features, learnt from 200 labelled training examples.

    None where the recipe keeps no validation examples.
    """
    if not recipe.data.validation:
        return None
    splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
    known, new = splits.train[range(min(_LABELLED, len(splits.train)))], splits.validation
    trained = ViTModel.from_pretrained(foundation.folder, add_pooling_layer=False)
    untrained = new_model(foundation.config, recipe.pretraining.seed)
    accuracies = [
        linear_probe(model, known.images, known.labels, new.images, new.labels) for model in (trained, untrained)
    ]
    return Probe(*accuracies)
