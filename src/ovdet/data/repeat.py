"""Repeat-factor sampling: images of rare classes come more often (Gupta et al. 2019, LVIS, appendix B)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.engine.data.sampler import EpochBatchSampler


def repeat_factors(image: np.ndarray, label: np.ndarray, images: int, threshold: float) -> np.ndarray:
    """How often an image comes in an epoch, at least once: float64 ``[images]``.

    ``max over its classes of max(1, sqrt(threshold / f))``, where f is the share of images with the class.

    Args:
        image, label: row of the image, and class, of each object that is trained on.
        images: number of them; those without objects come once.
        threshold: share of images below which a class counts as rare.
    """
    factors = np.ones(images)
    if not len(image):
        return factors
    pairs = np.unique(np.stack([np.asarray(image), np.asarray(label)]), axis=1)
    share = np.bincount(pairs[1]) / images
    of_class = np.sqrt(threshold / np.maximum(share, 1e-12))
    np.maximum.at(factors, pairs[0], of_class[pairs[1]])
    return factors


class RepeatSampler(EpochBatchSampler):
    """Batches of keys (epoch, index) of images that come as often as their factors say.

    An epoch has as many samples as the factors' sum, rounded down: an image of factor 2.3 comes twice, and in three
    epochs of ten once more. Everything else is as in :class:`~training.engine.data.sampler.EpochBatchSampler`.

    Args:
        factors: ``[size]``, 1 or more.
    """

    def __init__(
        self,
        factors: Sequence[float] | np.ndarray,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.factors = np.asarray(factors, np.float64)
        size = int(self.factors.sum() + 1e-9)
        super().__init__(size=size, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The samples of an epoch in their order; each image comes floor(factor) or ceil(factor) times."""
        images = rng.permutation(len(self.factors))
        # Marks one apart, from a random place on: an image gets those that fall into its stretch.
        bounds = np.floor(np.cumsum(self.factors[images]) + rng.random() + 1e-9).astype(np.int64)
        times = np.diff(bounds, prepend=0)
        return rng.permutation(np.repeat(images, times))[: self.size]
