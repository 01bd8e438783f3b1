"""The whole chain against recorded label maps of the released codes, on a tiny model."""

from __future__ import annotations

import json
import re

import pytest
import torch

import open_clip
from ovseg.classes import ClassList
from ovseg.dense import DenseReader
from ovseg.external import ExternalModel
from ovseg.labels import LabelRule, ScoreMap, Smoothing, label_pixels
from ovseg.refine import key_smoothing, prompt_denoising
from ovseg.windows import plan_windows


def rule_of(case: str) -> LabelRule:
    """The rule that a recorded label map's name states (``sclip.scale65_bg10_area10``, shares in percent)."""
    if not (match := re.search(r"scale(\d+)_bg(\d+)(?:_area(\d+))?", case)):
        return LabelRule(40) if case.endswith("plain") else LabelRule(40, background=0, threshold=0.1)
    return LabelRule(int(match[1]), background=0, threshold=int(match[2]) / 100, area=int(match[3] or 0) / 100)


@pytest.fixture(scope="module")
def tiny(golden):
    """Tiny models by golden folder, with their images."""
    import numpy as np

    def load(name):
        folder = golden / name
        if not (folder / "weights.safetensors").is_file():
            pytest.skip(f"the golden model {name} is not there: set CLIPSELF_GOLDEN to the complete folder")
        open_clip.add_model_config(folder / "config.json", f"ovseg-{name}")
        model = open_clip.create_model(f"ovseg-{name}", str(folder / "weights.safetensors")).eval()
        with np.load(folder / "inputs.npz") as arrays:
            return model, {key: torch.from_numpy(arrays[key]).float() for key in arrays.files if "images" in key}

    return load


@pytest.mark.recorded("dense_labels/windows.npz", r"(.+)\.labels")
def test_windows_words_thresholds_and_pamr(recorded, golden, tiny, case):
    arrays = recorded("windows.npz")
    facts = json.loads((golden / "dense_labels" / "windows.json").read_text())
    model, _ = tiny("vit_quickgelu")
    readout, rule = re.split(r"[._]", case)[0], rule_of(case)
    image, embeddings, owner = arrays["image"][0].float(), arrays["name_embeddings"], arrays["name_to_class"]
    windows = plan_windows(*image.shape[1:], model.visual.patch_size, facts["crop"], facts["stride"], "drop")
    parts = windows.pad(torch.stack([windows.crop(image, i) for i in range(windows.count)]))
    maps, _ = DenseReader(model, [readout])(parts)
    cosine = torch.einsum("ndhw,cd->nchw", maps[readout], embeddings)
    scores = ScoreMap.of(cosine, windows, *facts["original_size"])
    smoothing = Smoothing(image, 10, (8, 16)) if case.endswith("pamr") else None
    found = label_pixels(scores, owner, int(owner.max()) + 1, rule, smoothing=smoothing)
    assert torch.equal(found.labels.long(), arrays[f"{case}.labels"][0].long())
    if case == f"{readout}.plain":
        merged = ScoreMap.of(cosine, windows, *image.shape[1:]).band(0, image.shape[1])
        torch.testing.assert_close(
            merged[facts["name_columns_kept"]], arrays[f"{readout}.merged"][0], atol=1e-5, rtol=0
        )  # fmt: skip
        whole = scores.band(0, facts["original_size"][0])
        p = (rule.scale * whole).softmax(0)
        expected = arrays[f"{case}.scores"]
        classes = torch.stack([p[owner == c].amax(0) for c in range(len(expected))])
        torch.testing.assert_close(classes, expected.float(), atol=1e-3, rtol=1e-3)  # kept as float16


@pytest.mark.recorded("dense_labels/maskclip_head.npz", r"(\w+)\.class_embeddings", argument="name")
def test_refinements_of_a_model_s_own_keys(recorded, tiny, name):
    arrays = recorded("maskclip_head.npz")
    model, inputs = tiny(name)
    maps, keys = DenseReader(model, ["value"], keys=True)(inputs["images_native"])
    torch.testing.assert_close(keys, arrays[f"{name}.keys"], atol=1e-5, rtol=1e-5)
    cosine = torch.einsum("ndhw,cd->nchw", maps["value"], arrays[f"{name}.class_embeddings"])
    torch.testing.assert_close(cosine, arrays[f"{name}.cosine"], atol=1e-5, rtol=0)
    refined = key_smoothing(prompt_denoising(cosine, 0.5), keys, 1.0, "released")
    # P of 100 times the cosine: rounding of 1e-7 in a cosine is 1e-5 of a probability, times sums of up to 18.
    torch.testing.assert_close(refined, arrays[f"{name}.pd50_ks100"], atol=1e-4, rtol=1e-5)


class Recorded(ExternalModel):
    """Another model whose map was recorded."""

    def __init__(self, features):
        torch.nn.Module.__init__(self)
        self.features = features

    def forward(self, image, mean, std):
        return self.features


@pytest.mark.parametrize("name", ["vit_gelu", "vit_quickgelu"])
def test_several_readings_in_one_pass_and_another_model_s_similarity(recorded, tiny, name):
    arrays, external = recorded(f"readings_{name}.npz"), recorded(f"readings_{name}_external.npz")
    model, inputs = tiny(name)
    for which in ("proxyclip_same", "proxyclip_finer"):
        features = external[f"native.{which}.external"][:1].float()  # its mean is over each image here
        readouts = ["value", "sclip", "sclip_bare", "clearclip", "naclip", "proxyclip"]
        reader = DenseReader(model, readouts, external=Recorded(features))
        maps, _ = reader(inputs["images_native"][:1])
        torch.testing.assert_close(maps["proxyclip"], arrays[f"native.{which}.image0_alone"], atol=1e-5, rtol=0)
        for readout in readouts[:-1]:
            torch.testing.assert_close(maps[readout], arrays[f"native.{readout}"][:1], atol=1e-5, rtol=0)


def test_words_of_a_class_list_are_in_the_order_that_labels_need():
    classes = ClassList(("a", "b"), (("x", "y"), ("z",)))
    assert classes.all_words == ["x", "y", "z"] and classes.word_classes.tolist() == [0, 0, 1]
