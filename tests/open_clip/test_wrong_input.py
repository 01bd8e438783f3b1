"""Wrong input to the public calls: one sentence each, and no waiting for a device to find it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import open_clip
from open_clip.checks import values_are_at_hand
from open_clip.prompts import class_embeddings, read_class_names


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    return open_clip.create_model("ViT-Ti-8-64", load_weights=False).eval()


IMAGE = torch.zeros(1, 3, 64, 64)
BOX = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
MASK = torch.ones(1, 8, 8, dtype=torch.bool)
TOKENIZER = open_clip.get_tokenizer("ViT-Ti-8-64")

WRONG = [
    (lambda m: m.encode_image(IMAGE.byte()), TypeError, "the images are uint8: give normalised floats"),
    (lambda m: m.encode_image(IMAGE[0]), ValueError, r"\(3, 64, 64\), without a batch dimension: give image\[None\]"),
    (lambda m: m.encode_image([IMAGE]), TypeError, "the image is a list of Tensor: give a float tensor"),
    (lambda m: m.encode_image(IMAGE.permute(0, 2, 3, 1)), ValueError, r"shape \(1, 64, 64, 3\): give \[B, 3, H, W\]"),
    (lambda m: m.encode_image("cat.jpg"), TypeError, "the image is a str"),
    (lambda m: m.encode_dense(IMAGE[..., :60]), ValueError, "64x60 pixels: both sides must be multiples of the patch"),
    (lambda m: m.encode_text(["a dog"]), TypeError, "the texts are a list of str: give token ids"),
    (lambda m: m.encode_text(torch.zeros(5, dtype=torch.long)), ValueError, r"shape \(5,\): give \[B, L\]"),
    (lambda m: m.encode_text(torch.zeros(1, 5)), TypeError, "the token ids are float32: give whole numbers"),
    (lambda m: m.encode_text(torch.full((1, 5), 50000)), ValueError, "to 50000, but the model knows 0 to"),
    (lambda m: m.encode_text(torch.zeros(1, 99, dtype=torch.long)), ValueError, "99 tokens a text"),
    (lambda m: m.encode_pseudo_boxes(IMAGE, [BOX * 300]), ValueError, "run from 30 to 150: give shares 0..1"),
    (lambda m: m.encode_pseudo_boxes(IMAGE, [BOX[:, [2, 3, 0, 1]]]), ValueError, r"box 0 of image 0 is \(0.5, 0.5"),
    (lambda m: m.encode_pseudo_boxes(IMAGE, [[[0.1, 0.1, 0.5, 0.5]]]), TypeError, "image 0 are a list of list"),
    (lambda m: m.encode_pseudo_boxes(IMAGE, BOX), ValueError, r"the boxes of image 0 have shape \(4,\): give \[K, 4\]"),
    (lambda m: m.encode_pseudo_boxes(IMAGE, [BOX, BOX]), ValueError, "2 lists of boxes for 1 images"),
    (lambda m: m.encode_pseudo_boxes(IMAGE, [BOX * torch.nan]), ValueError, "not all finite"),
    (lambda m: m.encode_pseudo_boxes(IMAGE, [BOX * 300], extract_type="v1"), ValueError, "give shares 0..1"),
    (lambda m: m.encode_regions(IMAGE, [BOX * 300]), ValueError, "give shares 0..1"),
    (lambda m: m.encode_rois_and_image(IMAGE, [BOX[0]]), ValueError, r"have shape \(4,\)"),
    (lambda m: m.encode_masks(IMAGE, [MASK[0]]), ValueError, r"masks of image 0 have shape \(8, 8\): give"),
    (lambda m: m.encode_masks(IMAGE, [MASK[:, :4]]), ValueError, r"masks of \(4, 8\) cells for a dense map of"),
    (lambda m: m.encode_masks(IMAGE, [[[True]]]), TypeError, "the masks of image 0 are a list of list"),
    (lambda m: m.encode_pseudo_boxes(IMAGE, [BOX] * 2, extract_type="v1"), ValueError, "2 lists of boxes for 1 images"),
    (lambda m: m.encode_masks(IMAGE, [MASK] * 2, mask_attn=True), ValueError, "2 lists of masks for 1 images"),
    (lambda m: m.encode_masks(IMAGE, [MASK[:, :4]], mask_attn=True), ValueError, r"masks of \(4, 8\) cells"),
    (lambda m: class_embeddings(m, TOKENIZER, "dog"), TypeError, r'are the text "dog": give a list, \["dog"\]'),
    (lambda m: class_embeddings(m, TOKENIZER, ["cat", " "]), ValueError, "class name 1 of 2 is empty: remove it"),
    (lambda m: class_embeddings(m, TOKENIZER, ["cat", 3]), TypeError, "class name 1 is a int"),
    (lambda m: class_embeddings(m, TOKENIZER, []), ValueError, "0 names"),
    (lambda m: open_clip.build_zero_shot_classifier(m, TOKENIZER, "dog", ["{}"]), TypeError, "give a list"),
    (lambda m: open_clip.build_zero_shot_classifier(m, TOKENIZER, ["dog"], []), ValueError, "0 templates"),
    (lambda m: TOKENIZER([3]), TypeError, "text 0 is a int: give texts"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_one_sentence(model, case):
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as error:
        call(model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 220


def test_an_empty_mask_is_said(model, caplog):
    with caplog.at_level(logging.WARNING), torch.no_grad():
        features = model.encode_masks(IMAGE, [torch.cat([MASK, ~MASK, ~MASK])])
    assert not features[1:].any() and "2 masks have no cell" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        model.encode_masks(IMAGE, [torch.cat([MASK, MASK]).byte()])  # as pycocotools decodes them
    assert not caplog.text


def test_values_are_read_only_where_that_costs_nothing(model):
    assert values_are_at_hand(BOX) and values_are_at_hand(torch.nn.Parameter(BOX))
    assert not values_are_at_hand(BOX.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        # Reading a value of these raises an error, as it would halt a real device.
        boxes, masks = mode.from_tensor(BOX), mode.from_tensor(MASK)
        assert not values_are_at_hand(boxes)
        open_clip.checks.check_boxes([boxes], 1)
        open_clip.checks.check_masks([masks], 1, (8, 8))
        open_clip.checks.check_texts(torch.zeros(1, 4, dtype=torch.long, device="cuda"), 8, 10)
        open_clip.checks.check_boxes([torch.zeros(2, 4, device="cuda")], 1)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda b: open_clip.checks.check_boxes([b], 1) or b + 1, backend=count, fullgraph=True)
    compiled(BOX)
    assert len(graphs) == 1


def test_class_names_of_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffdog\r\n\n  traffic light \nKätzchen\n".encode())
    assert read_class_names(file) == ["dog", "traffic light", "Kätzchen"]
    file.write_bytes("Kätzchen".encode("latin-1"))
    with pytest.raises(ValueError, match="is no UTF-8 text .*save it as UTF-8"):
        read_class_names(file)
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no class names"):
        read_class_names(file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_class_names(tmp_path / "none.txt")


def test_configs_with_a_byte_order_mark(tmp_path):
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + b'{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}')
    open_clip.add_model_config(tmp_path / "marked.json", "marked")
    assert open_clip.get_model_config("marked")["embed_dim"] == 8
    del open_clip.configs._configs["marked"]


def test_packages_are_needed_when_a_text_comes(monkeypatch):
    code = """
import sys
sys.modules.update(dict.fromkeys(["ftfy", "tokenizers", "pycocotools", "faster_coco_eval", "matplotlib"]))
import open_clip, torch
open_clip.create_model("ViT-Ti-8-64", load_weights=False).encode_image(torch.zeros(1, 3, 64, 64))
try:
    open_clip.get_tokenizer("ViT-Ti-8-64")("a cat")
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "texts are cleaned with the package ftfy, which is not installed: pip install ftfy\n"
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(ImportError, match="pip install regex"):
        open_clip.SimpleTokenizer(additional_special_tokens=["<new>"])("a cat")
