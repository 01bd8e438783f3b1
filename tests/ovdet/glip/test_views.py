"""Tests at several sizes and mirrored: an oracle that sees one bright box must find it once, in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ovdet.evaluation.arrays import Detections
from ovdet.glip.assemble import read_config
from ovdet.glip.config import GlipConfig
from ovdet.glip.decode import Selection
from ovdet.glip.inference import encode_prompts, find, find_own
from ovdet.glip.library import Grounder
from ovdet.glip.model import GLIP
from ovdet.glip.phrases import caption_prompt, noun_phrases
from ovdet.glip.prompts import make_prompts
from ovdet.glip.testing import ClassTest
from ovdet.glip.views import Views, detect_views, merge_views
from training.engine.distributed import init_distributed
from training.engine.errors import UserError
from training.engine.precision import make_precision

CONFIGS = Path(__file__).resolve().parents[3] / "GLIP" / "configs"
ALL = Selection(score=0.0, nms=0.6, per_image=10)


def oracle(originals: list[tuple[int, int]], seen: list) -> Callable:
    """The box around what is bright in each view, in pixels of the file; notes the views' sizes."""

    def detect(batch: Tensor, sizes: list[tuple[int, int]], mirrored: bool) -> list[dict[str, Tensor]]:
        found = []
        for image, size, original in zip(batch, sizes, originals, strict=True):
            seen.append((size, mirrored))
            rows, columns = (image[0] > 127).nonzero().T
            corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            box = corners * torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
            score = 0.4 + 0.1 * mirrored + size[0] / 1000
            found.append({"boxes": box[None], "scores": torch.tensor([score]), "labels": torch.tensor([3])})
        return found

    return detect


def pictures() -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    """Two images of different sizes in one batch, with a bright box each."""
    sizes = [(60, 90), (80, 40)]
    images, boxes = torch.zeros(2, 3, 80, 90, dtype=torch.uint8), torch.tensor([[6, 12, 30, 30], [4, 40, 20, 72]])
    for image, (x1, y1, x2, y2) in zip(images, boxes.tolist(), strict=True):
        image[:, y1:y2, x1:x2] = 255
    return images, sizes, boxes.float()


@pytest.mark.parametrize("merge", ["nms", "vote"])
def test_all_views_show_a_box_in_its_place(merge: str):
    images, sizes, boxes = pictures()
    seen: list = []
    views = Views((40, 60, 120), longest=150, mirror=True, merge=merge)
    results = detect_views(oracle(sizes, seen), images, sizes, views, [[[3]]] * 2, ALL, 32)
    assert len(seen) == 2 * 6
    # Of 90 by 60: the shorter side at 40, 60, and at 100, where the longer one is 150; of 40 by 80: at 40, 60 and 75.
    assert {size for size, _ in seen} == {(40, 60), (60, 90), (100, 150), (80, 40), (120, 60), (150, 75)}
    for result, box in zip(results, boxes, strict=True):
        assert len(result["boxes"]) == 1 and result["labels"].tolist() == [3]
        assert (result["boxes"][0] - box).abs().max() <= 1.5  # a pixel of the smallest view is one and a half here
    # The best is that of the largest view, mirrored.
    assert results[0]["scores"].tolist() == pytest.approx([0.4 + 0.1 + 0.1])


def test_ranges_choose_the_views_that_find_a_size():
    images, sizes, boxes = pictures()
    side = (boxes[0, 2:] - boxes[0, :2]).prod().sqrt().item()
    for ranges, scores in (
        (((0, side - 2), (side - 2, side + 2)), [0.4 + 0.06]),
        (((side - 2, side + 2), (side + 2, 1e5)), [0.4 + 0.04]),
        (((0, side - 2), (side + 2, 1e5)), []),
    ):
        views = Views((40, 60), ranges=ranges)
        (result,) = detect_views(oracle(sizes[:1], []), images[:1], sizes[:1], views, [[[3]]], ALL, 32)
        assert result["scores"].tolist() == pytest.approx(scores)
    with pytest.raises(ValueError, match="1 ranges for 2 sizes"):
        Views((40, 60), ranges=((0, 1),))
    with pytest.raises(ValueError, match="use nms or vote"):
        Views((40,), merge="soft")


def test_votes_are_means_by_score_and_prompts_have_limits_of_their_own():
    def part(*rows: tuple[float, int, list[float]]) -> dict[str, Tensor]:
        scores, labels, boxes = zip(*rows, strict=True)
        return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}

    first = part((0.9, 0, [0.0, 0, 10, 10]), (0.5, 1, [0.0, 0, 10, 10]), (0.2, 0, [50.0, 50, 60, 60]))
    second = part((0.3, 0, [0.0, 0, 12, 10]), (0.8, 2, [5.0, 5, 9, 9]))
    options = Selection(nms=0.6, per_image=1)
    result = merge_views([first, second], [[0, 1], [2]], options, "vote")
    assert result["labels"].tolist() == [0, 2] and result["scores"].tolist() == pytest.approx([0.9, 0.8])
    expected = [[0, 0, (0.9 * 10 + 0.3 * 12) / 1.2, 10], [5, 5, 9, 9]]
    torch.testing.assert_close(result["boxes"], torch.tensor(expected))
    plain = merge_views([first, second], [[0, 1], [2]], Selection(nms=0.6), "nms")
    assert plain["scores"].tolist() == pytest.approx([0.9, 0.8, 0.5, 0.2])
    torch.testing.assert_close(plain["boxes"][0], torch.tensor([0.0, 0, 10, 10]))


def test_a_view_of_the_same_size_changes_nothing(tiny: Callable[..., GLIP]):
    """So do several prompts and captions; what speaks of a side is not asked of a mirrored image."""
    model, options = tiny(), Selection(score=0.0, per_image=8)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = [(64, 96), (64, 64)]
    query = encode_prompts(model, make_prompts(["dog", "cat", "left hand"], model.tokenizer, chunk=2))
    assert [p.sided for p in query.prompts] == [False, True]
    plain = find(model, images, sizes, sizes, query, options)
    same = find(model, images, sizes, sizes, query, options, Views((64,)))
    for a, b in zip(plain, same, strict=True):
        for key in ("labels", "scores", "boxes"):
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)
    both = find(model, images, sizes, sizes, query, options, Views((64,), mirror=True))
    flipped = find(model, images[:1].flip(-1), sizes[:1], sizes[:1], query.for_mirrored(), options)[0]
    known = torch.cat([plain[0]["scores"], flipped["scores"]])
    assert torch.cdist(both[0]["scores"][:, None], known[:, None]).amin(1).max() < 1e-5
    assert torch.equal(  # the other prompt's
        both[0]["scores"][both[0]["labels"] == 2], plain[0]["scores"][plain[0]["labels"] == 2]
    )
    captions = ("a dog on the left", "a red ball near a cat")
    prompts = [caption_prompt(c, noun_phrases(c), model.tokenizer) for c in captions]
    plain = find_own(model, images, sizes, sizes, prompts, options)
    both = find_own(model, images, sizes, sizes, prompts, options, Views((64,), mirror=True))
    torch.testing.assert_close(both[0]["scores"], plain[0]["scores"], rtol=0, atol=1e-5)
    assert not torch.equal(both[1]["boxes"], plain[1]["boxes"])


def test_the_library_looks_at_several_sizes(tiny: Callable[..., GLIP], config_of_tiny: Callable[..., GlipConfig]):
    config, model = config_of_tiny(), tiny()
    config.data.test_size, config.test.score, config.train.precision = 64, 0.0, "fp32"
    image = np.random.default_rng(0).integers(0, 256, (64, 90, 3), dtype=np.uint8)
    (plain,) = Grounder(model, config, torch.device("cpu"))([image], ["dog", "cat"])
    config.test.scales = [64]
    (same,) = Grounder(model, config, torch.device("cpu"))([image], ["dog", "cat"])
    np.testing.assert_allclose(same["scores"], plain["scores"], atol=1e-5)
    config.test.scales, config.test.mirror, config.test.merge = [48, 64, 96], True, "vote"
    (several,) = Grounder(model, config, torch.device("cpu"))([image], ["dog", "cat"])
    assert len(several["boxes"]) and (several["boxes"] >= 0).all() and (several["boxes"][:, 2] <= 90).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("test.scales=[0, 64]", "positive sides"),
        ("test.ranges=[0.0, 9.0]", "a least and a largest side for each of test.scales"),
        ("test.merge=soft", '"nms" or "vote"'),
        ("test.scales_longest=0", "test.scales_longest"),
    ],
)
def test_views_that_cannot_be(value: str, message: str):
    with pytest.raises(UserError, match=message):
        read_config(CONFIGS / "glip_l.toml", ["test.scales=[48, 64]", value])


def test_a_validation_set_is_looked_at_in_several_sizes(
    tiny: Callable[..., GLIP], config_of_tiny: Callable[..., GlipConfig], tmp_path: Path
):
    """Images of different sizes in a batch; one view of the test's own size gives what the test gives."""
    rng, model, config = np.random.default_rng(0), tiny(), config_of_tiny()
    categories = [{"id": 3, "name": "dog"}, {"id": 8, "name": "cat"}]
    content: dict = {"images": [], "annotations": [], "categories": categories}
    for i, (height, width) in enumerate([(64, 90), (80, 64), (64, 64)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        place = {"image_id": i, "category_id": 3, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
        content["annotations"].append({"id": i + 1, **place})
    (tmp_path / "val.json").write_text(json.dumps(content))
    config.data.val_annotations, config.data.val_images = str(tmp_path / "val.json"), str(tmp_path)
    config.data.test_size, config.data.workers, config.test.batch_size, config.test.score = 64, 0, 2, 0.0

    def detections(**test) -> Detections:
        for key, value in test.items():
            setattr(config.test, key, value)
        dist = init_distributed("cpu")
        task = ClassTest(config, model.tokenizer, model.image.divisor, dist)
        return task.detect(model, make_precision("fp32", dist.device))

    plain = detections()
    assert not len(detections(ranges=[1e4, 1e5]).scores)  # also without other sizes
    same, several = detections(scales=[64], ranges=[]), detections(scales=[48, 96], mirror=True)
    assert len(plain.scores) == len(same.scores) > 20
    np.testing.assert_allclose(same.scores, plain.scores, atol=1e-5)
    np.testing.assert_allclose(same.boxes, plain.boxes, atol=1e-3)
    assert len(several.scores) and not np.array_equal(several.scores, plain.scores)
