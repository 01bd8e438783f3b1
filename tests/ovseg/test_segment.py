"""Labels of photographs: any size, windows of several images in one pass, and one line for what cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import open_clip
from ovseg.classes import class_list, parse_classes
from ovseg.external import ExternalModel, load_external
from ovseg.protocols import OWN, Protocol
from ovseg.segment import ImageSegmenter, Segmenter, as_image, segment
from training.engine.errors import UserError

CORNERS = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1]]), dim=1)
NAMES = parse_classes(["red,green,violet,cyan"])


class Colours(ImageSegmenter):
    """Scores of a cell: cosines of the mean colour of each 8 x 8 patch."""

    def __init__(self, variants, classes=NAMES, colours=CORNERS):
        self.colours = colours
        super().__init__(
            classes, variants, patch_size=8, mean=(0, 0, 0), std=(1, 1, 1), device=torch.device("cpu"),
            windows_per_pass=3,
        )  # fmt: skip

    def read(self, windows):
        dense = F.normalize(F.avg_pool2d(windows, 8) + 1e-6, dim=1)
        return {None: torch.einsum("ndhw,cd->nchw", dense, self.colours)}, None


def four_colours(height, width):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, : height // 2], image[1, height // 2 :], image[2, :, width // 2 :] = 255, 255, 255
    return image


@pytest.mark.parametrize("size", [(50, 110), (1, 1), (1, 3000), (2, 7), (600, 400)])
@pytest.mark.parametrize("window", [0, 64, 20])
def test_labels_lie_on_the_image(size, window):
    """Wide, tall and tiny images: padding, windows and rounding must not shift the map."""
    protocol = replace(OWN, short_side=64, long_side=128, window=window, stride=window // 2)
    labels = Colours(protocol)(four_colours(*size))["default"].labels
    assert labels.shape == size and labels.dtype == torch.uint8
    height, width = size
    if min(size) >= 50:
        margin = max(size) // 16
        for label, (y, x) in enumerate([(1, 1), (3, 1), (1, 3), (3, 3)]):
            y, x = height * y // 4, width * x // 4
            assert (labels[y - margin : y + margin, x - margin : x + margin] == label).all()


def test_windows_of_several_images_share_passes():
    """Three images of two sizes, three windows a pass: scores as of each image alone."""
    segmenter = Colours(replace(OWN, short_side=48, window=32, stride=16))
    images = [four_colours(40, 70), four_colours(60, 45), four_colours(80, 140)]
    inputs = [segmenter.prepare(image) for image in images]
    sizes = [tuple(image.shape[1:]) for image in images]
    together = segmenter.score(inputs, sizes)
    for maps, prepared, size in zip(together, inputs, sizes, strict=True):
        alone = segmenter.score([prepared], [size])[0]["default"]
        torch.testing.assert_close(maps["default"].band(0, size[0]), alone.band(0, size[0]))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return open_clip.create_model("ViT-Ti-8-64").eval().requires_grad_(False)


def test_readings_and_refinements_of_a_photograph(model):
    image = torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embeddings = F.normalize(torch.randn(4, 128, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert embeddings.shape[1] == model.embed_dim
    protocol = Protocol(short_side=48, window=32, stride=16)
    variants = {
        "own": protocol,
        "naclip": replace(protocol, readout="naclip", pamr_steps=2, pamr_dilations=(1, 2)),
        "value": replace(protocol, readout="value", denoise=0.5, smooth=1.0),
        "released": replace(protocol, readout="value", denoise=0.5, smooth=1.0, key_form="released"),
    }
    results = Segmenter(model, NAMES, embeddings, variants)(image, confidence=True)
    assert set(results) == set(variants)
    for found in results.values():
        assert found.labels.shape == (70, 100) and int(found.labels.max()) < 4
        assert float(found.confidence.min()) >= 0 and float(found.confidence.max()) <= 1 + 1e-5
    alone = segment(image, model, NAMES, embeddings=embeddings, protocol=protocol, readout="value")
    assert torch.equal(alone.labels, results["own"].labels)  # the model's own reading is the value path
    from_pil = segment(
        Image.fromarray(image.permute(1, 2, 0).numpy()), model, ["red,green,violet", "cyan"], embeddings=embeddings,
        protocol=protocol,
    )  # fmt: skip
    assert torch.equal(from_pil.labels, alone.labels)


def test_synonyms_do_not_cost_a_class_its_place():
    """Red said three times: P of each word is below the threshold, that of the class is as that of one word."""
    image = four_colours(64, 64)
    expected = Colours(replace(OWN, short_side=64, denoise=0.5))(image)["default"].labels
    words = parse_classes(["red|crimson|scarlet,green,violet,cyan"])
    thrice = Colours(replace(OWN, short_side=64, denoise=0.5), words, CORNERS[[0, 0, 0, 1, 2, 3]])
    assert expected.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(thrice(image)["default"].labels, expected)


def test_weights_that_leave_padding_out(model):
    """A photograph that is not square is read as in training: with the positions of the square around it."""
    image = torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8)
    embeddings = F.normalize(torch.randn(len(NAMES.all_words), model.embed_dim), dim=-1)
    protocol = replace(OWN, short_side=model.visual.patch_size * 5, long_side=model.visual.patch_size * 8)
    patch = model.visual.patch_size
    model.visual.set_drop_padding(True)
    try:
        segmenter = Segmenter(model, NAMES, embeddings, protocol)
        prepared = segmenter.prepare(image)
        maps, _ = segmenter.dense(prepared)
        square = torch.zeros(1, 3, 8 * patch, 8 * patch)
        square[..., : prepared.shape[1], : prepared.shape[2]] = segmenter._normalize(prepared[None])
        expected = model.encode_dense(square, keep_shape=True, sizes=[tuple(prepared.shape[1:])])
        torch.testing.assert_close(maps[None], expected[0, :, :5].detach(), rtol=0, atol=1e-5)
    finally:
        model.visual.set_drop_padding(False)


def test_another_model_s_similarity(model):
    """A timm trunk on a grid of its own: the result lies on it, and is of unit length."""
    external = load_external("vit_tiny_patch16_224:random")
    assert isinstance(external, ExternalModel) and external.patch_size == 16
    embeddings = F.normalize(torch.randn(4, model.embed_dim), dim=-1)
    protocol = Protocol(readout="proxyclip", short_side=50, window=32, stride=16, remainder="centre")
    segmenter = Segmenter(model, NAMES, embeddings, protocol, external=external)
    image = torch.randint(0, 256, (3, 61, 90), dtype=torch.uint8)
    assert segmenter(image)["default"].labels.shape == (61, 90)
    assert segmenter.multiple == 16  # patches of 8 and 16 fit
    assert segmenter.score([segmenter.prepare(image)], [(61, 90)])[0]["default"].cells.shape[0] == 4
    smooth = replace(protocol, smooth=1.0)
    with pytest.raises(UserError, match="another grid than"):
        Segmenter(model, NAMES, embeddings, smooth, external=external)(image)


def test_other_trunks_normalise_pixels_their_own_way():
    """Pixels that come in CLIP's normalisation are turned into the trunk's."""
    seen = []

    class Trunk(torch.nn.Module):
        num_features, feature_info = 3, [{"reduction": 1}]

        def forward_features(self, pixels):
            seen.append(pixels)
            return pixels

    external = ExternalModel(Trunk(), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    image = torch.rand(1, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    shape = (3, 1, 1)
    normalised = (image - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    external(normalised, mean, std)
    expected = (image - torch.tensor((0.5, 0.4, 0.3)).view(shape)) / torch.tensor((0.2, 0.2, 0.1)).view(shape)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


def test_mistakes_are_one_line(model, tmp_path):
    embeddings = torch.randn(4, model.embed_dim)
    with pytest.raises(UserError, match="did you mean"):
        Segmenter(model, NAMES, embeddings, Protocol(readout="naclipp"))
    with pytest.raises(UserError, match="name one with --external"):
        Segmenter(model, NAMES, embeddings, Protocol(readout="proxyclip"))
    with pytest.raises(UserError, match="not in the space"):
        Segmenter(model, NAMES, embeddings, Protocol(readout="tokens"))
    with pytest.raises(UserError, match="stride is 112 and window 64.*at most 64, or 0 for half"):
        Protocol(window=64, stride=112)
    assert Protocol(stride=112).window == 0 and Protocol(window=112, stride=112).stride == 112
    with pytest.raises(UserError, match="another window"):
        Segmenter(model, NAMES, embeddings, {"a": Protocol(), "b": Protocol(window=32)})
    with pytest.raises(ValueError, match="3 embeddings for 4 words"):
        Segmenter(model, NAMES, embeddings[:3])
    with pytest.raises(ValueError, match="tokenizer"):
        segment(four_colours(9, 9), model, NAMES)
    with pytest.raises(ValueError, match="give uint8"):
        as_image(torch.zeros(3, 4, 4))
    with pytest.raises(UserError, match="no external|Unknown model|unknown"):
        load_external("no_such_trunk:random")
    with pytest.raises(UserError, match="is no file"):
        load_external(f"vit_tiny_patch16_224:{tmp_path / 'none.pt'}")


@pytest.mark.slow
def test_a_huge_photograph_takes_little_memory():
    """Scores of 171 classes at 4000 x 3000 pixels are 8.2 GB; a process of its own stays under 3 GB in all."""
    import json
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        str(root / "benchmarks" / "segmentation.py"),
        "--part",
        "memory",
        "--model",
        "ViT-Ti-8-64",
    ]
    out = subprocess.run([*command, "--memory-window", "256"], capture_output=True, text=True, timeout=900, check=True)
    result = json.loads(out.stdout.strip().splitlines()[-1])
    assert result["classes"] == len(class_list("coco_stuff171")) and result["scores_alone_gb"] > 8
    assert result["peak_gb"] < 3
