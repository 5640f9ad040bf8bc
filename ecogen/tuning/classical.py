"""Classifiers that see all training images in one place, to stand beside what was tuned."""

from __future__ import annotations

from ecogen.config import Recipe
from ecogen.tuning.data import load_splits

NEAREST, MACHINE = "1-NN", "SVM"


def classical_accuracies(recipe: Recipe) -> dict[str, float]:
    """Accuracy on the recipe's evaluation split, learnt from the pixels of all its training examples.

    Nearest neighbour, and a support vector machine with radial basis functions, C = 10 and scikit-learn's own gamma.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
    known, new = splits.train, getattr(splits, recipe.evaluation.split)
    pixels, new_pixels = known.images.flatten(1).numpy(), new.images.flatten(1).numpy()
    return {
        name: float(classifier.fit(pixels, known.labels.numpy()).score(new_pixels, new.labels.numpy()))
        for name, classifier in ((NEAREST, KNeighborsClassifier(1)), (MACHINE, SVC(C=10)))
    }
