"""Training samples with proposals to distil, and the teacher's embeddings of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ovdet.data.dataset import TrainDataset
from ovdet.data.transforms import View, apply_view_to_boxes
from ovdet.vild.proposals import ProposalList
from training.engine.data.store import TeacherStore


class Distilled:
    """Proposals of the images of a training file, with their embeddings.

    Args:
        proposals: boxes in pixels of the upright image; store: a row of it for each.
        rows: row in ``proposals`` of each image of the training file.
        most: proposals an image, the first.
        min_side: of a box in the view, in pixels; min_share: of its area that must be left there.
    """

    def __init__(
        self,
        proposals: ProposalList,
        store: TeacherStore,
        rows: np.ndarray,
        *,
        most: int = 300,
        min_side: float = 1.0,
        min_share: float = 0.5,
    ) -> None:
        self.proposals, self.store, self.rows = proposals, store, rows
        self.most, self.min_side, self.min_share = most, min_side, min_share

    def of(self, image: int, view: View, original: tuple[int, int]) -> dict[str, torch.Tensor]:
        """``distil_boxes`` float32 ``[M, 4]`` in pixels of the view, ``distil_targets`` float16 ``[M, D]``.

        Boxes go with the image: scaled, cut off at the window and mirrored like its objects. A target remains that of
        the whole, unmirrored crop. Left out are boxes of which too little is in the view, and those that the teacher
        could not embed (rows of NaN).

        Args:
            image: of the training file; original: (height, width) of the upright image.
        """
        row = int(self.rows[image])
        own = self.proposals.of(row)
        number = min(own.stop - own.start, self.most)
        whole = torch.from_numpy(np.array(self.proposals.boxes[own.start : own.start + number]))
        boxes = apply_view_to_boxes(whole, view, original)
        scale = torch.tensor([view.scaled[1] / original[1], view.scaled[0] / original[0]])
        full = ((whole[:, 2:] - whole[:, :2]) * scale).prod(1)
        side = boxes[:, 2:] - boxes[:, :2]
        keep = (side >= self.min_side).all(1) & (side.prod(1) >= self.min_share * full)
        targets = torch.from_numpy(self.store.of_image(row)[:number])
        keep &= targets.isfinite().all(1)
        return {"distil_boxes": boxes[keep], "distil_targets": targets[keep]}


class DistilDataset(TrainDataset):
    """As :class:`~ovdet.data.dataset.TrainDataset`; samples also have what :meth:`Distilled.of` gives.

    Args:
        distilled: None where nothing is distilled.
        settings: see :class:`~ovdet.data.dataset.TrainDataset`.
    """

    def __init__(self, *args: Any, distilled: Distilled | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.distilled = distilled

    def extras(self, row: int, view: View, original: tuple[int, int]) -> dict[str, Any]:
        """Proposals of an image in its view, with their targets."""
        return {} if self.distilled is None else self.distilled.of(row, view, original)
