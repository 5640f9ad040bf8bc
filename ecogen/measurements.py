"""What is measured once a run is over: the probe of the foundation model, and the attacks on what crosses a cut."""

from __future__ import annotations

from dataclasses import dataclass

Image = tuple[tuple[float, ...], ...]
"""Rows of grey values in [0, 1]."""

EXACT_DB = 60.0
"""The highest PSNR that is told apart: an image rounded to 8 bits has 58.9 dB, so this is a perfect copy."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Accuracy of a linear probe on the foundation model: pre-trained, and with its first random weights."""

    trained: float
    untrained: float


@dataclass(frozen=True, slots=True)
class Inversion:
    """How much of the images an attack recovers from what crosses a cut.

    Attributes:
        blocks_before: transformer blocks between the image and the cut; 0 is the output of the embedding.
        psnr_db: peak signal-to-noise ratio of the reconstructions, mean over the attacked images, each at most
            `EXACT_DB`.
        baseline_psnr_db: the same for somebody who sees nothing and answers with the mean image.
        ssim: structural similarity, 1 for a perfect copy.
        label_accuracy: share of reconstructions that a classifier of real images still gets right.
        reconstructions: of the first few attacked images, in the order of `InversionAttack.originals`.
    """

    blocks_before: int
    psnr_db: float
    baseline_psnr_db: float
    ssim: float | None = None
    label_accuracy: float | None = None
    reconstructions: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class InversionAttack:
    """One attacker at several depths of the cut, and what it knew and did.

    Attributes:
        attacker: its name, unique in a run.
        original_label_accuracy: share of the attacked images themselves that the classifier gets right.
    """

    attacker: str
    description: str
    num_images: int
    results: tuple[Inversion, ...]
    originals: tuple[Image, ...] = ()
    original_label_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a generator draws and describes a domain, as `Drawings` says of more."""

    recognised: float | None
    frechet: float | None
    caption_accuracy: float


@dataclass(frozen=True, slots=True)
class VersionQuality:
    """That of a version of a node's model, which a lesson of the relay led to.

    Attributes:
        what: the delivered model; what was there before a lesson, or after it; what a rollback replaced.
        cycle: of the lesson; None where it is of none.
        domain: the edge whose domain it is.
    """

    node_id: str
    version: int
    what: str
    cycle: int | None
    domain: str
    quality: Quality


@dataclass(frozen=True, slots=True)
class Drawings:
    """How well a generator draws and describes what an edge knows, as a classifier of real images judges it.

    Attributes:
        num_drawn: images, each for a caption of the edge.
        recognised: share of them that shows what was asked for; None where captions name no labels.
        real_recognised: the same of the edge's real test images.
        frechet: distance of their features to those of real test images; see `relay.quality`.
        real_frechet: the same of as many real training images.
        copies: share of them that are near copies of the edge's training images.
        members_by_drawings: how well somebody who has the drawings tells training images from test images, by the
            distance to the nearest drawing: AUC, 0.5 is guessing. The full black-box attack of Chen et al.,
            "GAN-Leaks", arXiv 1909.03935.
        members_by_model: the same of somebody who has the model, by the likelihood of an image's codes, after Yeom et
            al., "Privacy Risk in Machine Learning", arXiv 1709.01604.
        caption_accuracy: share of the real test images whose caption names what they show.
        sheet: some of them as a PNG file, a row for each caption.
        real_sheet: real test images in the same order.
        captions: of the rows.
    """

    num_drawn: int
    recognised: float | None
    real_recognised: float | None
    frechet: float | None
    real_frechet: float | None
    copies: float
    members_by_drawings: float
    members_by_model: float
    caption_accuracy: float
    sheet: bytes = b""
    real_sheet: bytes = b""
    captions: tuple[str, ...] = ()
