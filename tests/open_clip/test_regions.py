"""Boxes and masks on a dense map: no images, and no waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from open_clip.regions import box_masks, mask_features, roi_features


def test_no_images_have_no_regions(tiny):
    dense = torch.zeros(0, 7, 4, 6)
    assert roi_features(dense, []).shape == mask_features(dense, []).shape == (0, 7)
    assert roi_features(dense.bfloat16(), []).dtype == torch.float32
    assert roi_features(dense.double(), []).dtype == torch.float64
    assert box_masks([], (4, 6)) == []
    model = tiny("vit")
    none = torch.zeros(0, 3, 32, 48)
    with torch.no_grad():
        assert model.encode_pseudo_boxes(none, []).shape == model.encode_masks(none, []).shape == (0, 24)
        assert model.encode_pseudo_boxes(none, [], extract_type="v1").shape == (0, 24)
        assert model.encode_masks(none, [], mask_attn=True).shape == (0, 24)
        assert model.encode_dense(none, keep_shape=True).shape == (0, 24, 4, 6)


class Copies(TorchDispatchMode):
    """Notes what halts a device's queue: values read on the host, and tensors made there and copied over."""

    def __init__(self) -> None:
        super().__init__()
        self.halts: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {a.device.type for a in args if isinstance(a, torch.Tensor)}
        goes = kwargs.get("device")
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default) and "cuda" in devices:
            self.halts.append(str(func))
        if func == torch.ops.aten._to_copy.default and goes is not None and {torch.device(goes).type} != devices:
            self.halts.append(f"{func} from {devices} to {goes}")
        return func(*args, **kwargs)


def test_boxes_on_the_device_are_pooled_without_a_copy_from_the_host():
    try:
        with FakeTensorMode():
            torch.full_like(torch.empty(1, device="cuda"), 1)
            roi_features(torch.empty(1, 8, 4, 6, device="cuda"), [torch.empty(3, 4, device="cuda")])
    except RuntimeError as error:  # torch 2.6 looks for a driver here
        if "driver" not in str(error):
            raise
        pytest.skip(f"no imagined GPU with torch {torch.__version__}: {str(error).splitlines()[0]}")
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        dense = torch.empty(2, 8, 4, 6, device="cuda", dtype=torch.bfloat16)
        boxes = [torch.empty(3, 4, device="cuda"), torch.empty(0, 4, device="cuda")]
        masks = [torch.empty(3, 4, 6, device="cuda", dtype=torch.bool)] * 2
        assert roi_features(dense, boxes).shape == (3, 8)
        assert mask_features(dense, masks).shape == (6, 8)
        assert [m.shape for m in box_masks(boxes, (4, 6))] == [(3, 4, 6), (0, 4, 6)]
        assert copies.halts == []
        torch.tensor([1.0], device="cuda")  # what was there before
        assert len(copies.halts) == 1, "the check sees such copies"


def test_regions_of_a_half_precision_map_are_pooled_in_float32():
    """Also under autocast, which would bring products of matrices back to bfloat16."""
    dense = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    masks, boxes = [torch.rand(3, 6, 6) > 0.5], [torch.tensor([[0.0, 0, 1, 1]])]
    wide = mask_features(dense.float(), masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask_features(dense, masks), wide)
        assert roi_features(dense, boxes).dtype == torch.float32
