"""Several dense readings of the same windows from one pass of the network, with the keys that smoothing needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip.padding import Sizes
from open_clip.readouts import Readout
from ovseg.external import ExternalModel
from training.engine.errors import UserError

PROXY = "proxyclip"  # the reading that follows another model


class DenseReader:
    """Dense maps of an image tower by reading.

    Args:
        model: a :class:`open_clip.CLIP`.
        readouts: names of dense readings (:mod:`open_clip.readouts`), None for the model's own.
        external: another model, for the reading ``proxyclip``.
        keys: also give the last block's keys.

    Raises:
        UserError: an unknown reading, one outside the joint space, ``proxyclip`` without another model, or another
            model that no reading follows.
    """

    def __init__(
        self,
        model: nn.Module,
        readouts: Sequence[str | None],
        *,
        external: ExternalModel | None = None,
        keys: bool = False,
    ) -> None:
        self.tower, self.external, self.keys = model.visual, external, keys
        self.readings: dict[str | None, Readout] = {}
        for name in dict.fromkeys(readouts):
            try:
                reading = self.tower.resolve_readout(name)
            except (ValueError, TypeError) as error:
                raise UserError(str(error)) from None
            if not reading.projected:
                raise UserError(f"the reading {name} is not in the space of the class names: use another one")
            if reading.name == PROXY and external is None:
                raise UserError(f"the reading {PROXY} follows another model: name one with --external")
            self.readings[name] = reading
        if external is not None and all(reading.name != PROXY for reading in self.readings.values()):
            raise UserError(f"--external does nothing: only the reading {PROXY} follows another model; leave it out")

    @torch.no_grad()
    def __call__(self, windows: Tensor, sizes: Sizes | None = None) -> tuple[dict[str | None, Tensor], Tensor | None]:
        """Read normalised windows ``[n, 3, H, W]``, sides multiples of the patch.

        Args:
            sizes: per window the pixels (height, width) that its image takes, top left. A tower that drops padding
                reads the image alone, and maps and keys repeat its border on the rest; others read all of it.

        Returns:
            Unit-length maps ``[n, D, h, w]`` by reading (on the other model's grid for ``proxyclip``), and keys
            ``[n, cells, W]`` through the output projection, as MaskCLIP smooths with, or None.
        """
        tower = self.tower
        last = len(tower.trunk.blocks) - 1
        blocks = {i for reading in self.readings.values() for i in reading.blocks(tower)}
        inputs = tower.block_inputs(windows, blocks | ({last} if self.keys else set()), sizes)
        maps = {}
        for name, reading in self.readings.items():
            if reading.name == PROXY:
                reading = reading.bound(self.external(windows, tower.image_mean, tower.image_std))
            dense = reading.map(inputs)
            maps[name] = dense if reading.normalized else F.normalize(dense, dim=1)
        return maps, inputs.projection("k", through_output=True) if self.keys else None
