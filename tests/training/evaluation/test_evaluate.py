"""Evaluation against closed-form accuracies, a naive loop in float64, and one process against two."""

from __future__ import annotations

import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import roi_align

from open_clip.factory import build_model
from open_clip.regions import mask_features, roi_features
from open_clip.weights import load_state
from training.engine.errors import UserError
from training.engine.pictures import distinct_colours
from training.evaluation.evaluate import evaluate, format_table
from training.evaluation.metrics import SegmentRows
from training.evaluation.options import EvalOptions
from training.evaluation.panoptic import build_eval_data, collate_panoptic
from training.evaluation.pictures import evaluation_pictures

CLASSES = ["red", "green", "blue", "yellow", "violet", "turquoise", "white"]
COLOURS = torch.tensor([[1, 0.2, 0], [0.2, 1, 0.4], [0.4, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
EMBEDDINGS = F.normalize(COLOURS, dim=1)
STUFF = (5, 6)
# By cosine, the order of the classes is, for a blue region, blue, violet, white, turquoise, green, red, yellow; red is
# second for a yellow region and yellow second for a red one.


class ColourModel(nn.Module):
    """A dense map of mean colours per patch: the embedding of a one-coloured region is its colour."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = SimpleNamespace(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
        self.dense_passes, self.crop_batches, self.was_training = 0, [], []

    def encode_regions(self, image, normed_boxes=None, masks=None, normalize=False, sizes=None):
        self.dense_passes += 1
        self.was_training.append(self.training)
        dense = F.normalize(F.avg_pool2d(image.float(), 8), dim=1)
        features = roi_features(dense, normed_boxes), mask_features(dense, masks)
        return tuple(F.normalize(f, dim=-1) if normalize else f for f in features)

    def encode_dense(self, image, normalize=False, keep_shape=False, sizes=None):
        assert keep_shape and not self.training and sizes == [(64, 64)]
        return F.normalize(F.avg_pool2d(image.float(), 8), dim=1)

    def encode_image(self, image, normalize=False):
        self.crop_batches.append(len(image))
        middle = image.float()[..., 12:20, 12:20].mean((2, 3))
        return F.normalize(middle, dim=-1) if normalize else middle


def write_coloured(folder, scenes) -> EvalOptions:
    """Images of 64 x 64 whose quarters have given colours; ``scenes`` lists four (colour, label) per image."""
    content = {"images": [], "annotations": [], "categories": []}
    for i, name in enumerate(CLASSES):
        content["categories"].append({"id": i + 1, "name": name, "isthing": int(i not in STUFF)})
    for index, quarters in enumerate(scenes):
        ids, pixels, infos = np.zeros((64, 64), np.int32), np.zeros((64, 64, 3), np.uint8), []
        for q, (colour, label) in enumerate(quarters):
            y, x = 32 * (q // 2), 32 * (q % 2)
            ids[y : y + 32, x : x + 32] = q + 1
            pixels[y : y + 32, x : x + 32] = (255 * COLOURS[colour]).byte().numpy()
            infos.append({"id": q + 1, "category_id": label + 1, "bbox": [x, y, 32, 32]})
        Image.fromarray(pixels).save(folder / f"{index}_rgb.png")
        Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1).astype(np.uint8)).save(folder / f"{index}_ids.png")
        content["images"].append({"id": index, "file_name": f"{index}_rgb.png"})
        annotation = {"image_id": index, "file_name": f"{index}_ids.png", "segments_info": infos}
        content["annotations"].append(annotation)
    (folder / "panoptic.json").write_text(json.dumps(content))
    root = str(folder)
    return EvalOptions(val_data=f"{root}/panoptic.json", val_image_root=root, val_segm_root=root)


SCENES = [
    [(0, 0), (1, 1), (2, 2), (5, 5)],
    [(0, 0), (3, 0), (6, 6), (2, 5)],  # yellow called red: among the first five; blue called turquoise: likewise
    [(0, 3), (2, 3), (1, 1), (5, 5)],  # red called yellow: among the first five; blue called yellow: the last of seven
]
# things: red 2/3 and 1; green 1; blue 1; yellow 0 and 1/2. stuff: turquoise 2/3 and 1; white 1.
EXPECTED = {
    "thing.macc1": float((Fraction(2, 3) + 1 + 1 + 0) / 4),
    "thing.macc5": float((1 + 1 + 1 + Fraction(1, 2)) / 4),
    "stuff.macc1": float((Fraction(2, 3) + 1) / 2),
    "stuff.macc5": 1.0,
}


def data_of(args, sizes=(64,), **kwargs):
    return build_eval_data(args, image_sizes=list(sizes), patch_size=8, crop_size=32, **kwargs)


def test_known_accuracies(tmp_path):
    model, args, rows = ColourModel().train(), write_coloured(tmp_path, SCENES), SegmentRows()
    results = evaluate(
        model, data_of(args), 3 * EMBEDDINGS, device="cpu", progress=False, per_class_file=tmp_path / "classes.json",
        rows=rows,
    )  # fmt: skip
    for kind in ("rois", "maskpool", "crops"):
        for key, value in EXPECTED.items():
            assert results.pop(f"{kind}.{key}") == pytest.approx(value, abs=1e-12), (kind, key)
    assert results == {"count.images": 3, "count.skipped": 0, "count.thing": 8, "count.stuff": 4}
    assert model.dense_passes == 2 and model.crop_batches == [12]  # 2 + 1 images; all crops in one pass
    assert model.training and not any(model.was_training)
    records = json.loads((tmp_path / "classes.json").read_text())["rois"]
    assert {"class": "yellow", "kind": "thing", "segments": 2, "top1": 0.0, "top5": 0.5} in records
    table = rows.gather()
    assert table["image_id"] == [0] * 4 + [1] * 4 + [2] * 4
    assert table["label"] == [0, 1, 2, 5, 0, 0, 5, 6, 1, 3, 3, 5]  # of an image by label
    assert table["kind"] == ["stuff" if label in STUFF else "thing" for label in table["label"]]
    right = [1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    for kind in ("rois", "maskpool", "crops"):
        # Of the two red segments of image 1 and the two yellow ones of image 2 either may come first.
        assert sorted(table[f"{kind}.top1"][4:6]) == [0, 1] and sum(table[f"{kind}.top5"][9:11]) == 1
        assert table[f"{kind}.top1"][:4] + table[f"{kind}.top1"][6:] == right[:4] + right[6:]


def test_several_sizes_and_the_table(tmp_path):
    model, args = ColourModel(), write_coloured(tmp_path, SCENES)
    results = evaluate(model, data_of(args, (64, 128)), EMBEDDINGS, device="cpu", progress=False)
    names = ["64.rois", "64.maskpool", "128.rois", "128.maskpool", "crops"]
    assert {key for key in results if not key.startswith("count.")} == {f"{n}.{key}" for n in names for key in EXPECTED}
    assert results["128.rois.thing.macc1"] == results["64.rois.thing.macc1"] == EXPECTED["thing.macc1"]
    assert model.dense_passes == 4 and model.crop_batches == [12]  # crops once, not once per size
    lines = format_table(results).splitlines()
    assert [line.split()[:-4] for line in lines[1:-1]] == [
        ["rois", "at", "64"], ["maskpool", "at", "64"], ["rois", "at", "128"], ["maskpool", "at", "128"], ["crops"]
    ]  # fmt: skip
    assert lines[1].split()[-4:] == ["66.67", "87.50", "83.33", "100.00"]
    assert lines[-1] == "3 images, 8 thing and 4 stuff segments"


def test_without_stuff(tmp_path):
    args = write_coloured(tmp_path, [[(0, 0), (1, 1), (2, 2), (3, 3)]])
    results = evaluate(ColourModel(), data_of(args), EMBEDDINGS, device="cpu", progress=False)
    assert results["rois.thing.macc1"] == 1 and not any("stuff" in key for key in results if "count" not in key)
    assert format_table(results).splitlines()[1].split()[-4:] == ["100.00", "100.00", "-", "-"]


def test_crops_are_packed_over_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("training.evaluation.evaluate.CROP_CHUNK_DEFAULT", 5)
    model, args = ColourModel(), write_coloured(tmp_path, SCENES)
    results = evaluate(model, data_of(args), EMBEDDINGS, device="cpu", progress=False)
    assert model.crop_batches == [5, 5, 2]
    assert results["crops.thing.macc1"] == pytest.approx(EXPECTED["thing.macc1"], abs=1e-12)


def test_pictures_show_each_quarter_in_its_class_colour(tmp_path):
    """Two of three images at most; nothing of a damaged one; photograph, labels, legend, components."""
    model, args = ColourModel().train(), write_coloured(tmp_path, SCENES)
    data, colours = data_of(args), distinct_colours(len(CLASSES))
    found = dict(evaluation_pictures(model, data, EMBEDDINGS, 2, device="cpu"))
    assert list(found) == ["0_rgb.png", "2_rgb.png"] and model.training
    picture = found["0_rgb.png"].permute(1, 2, 0).numpy()
    assert picture.dtype == np.uint8 and picture.shape[0] == 384
    for quarter, (colour, _) in enumerate(SCENES[0]):
        y, x = 96 + 192 * (quarter // 2), 96 + 192 * (quarter % 2)
        grey = (255 * COLOURS[colour]).byte().numpy() @ np.asarray([0.299, 0.587, 0.114])
        expected = 0.35 * grey + 0.65 * colours[colour].astype(float)
        assert np.abs(picture[y, 384 + 6 + x] - expected).max() <= 1.5, quarter
    assert len(dict(evaluation_pictures(model, data, EMBEDDINGS, 99, device="cpu"))) == 3
    assert not dict(evaluation_pictures(model, data, EMBEDDINGS, 0, device="cpu"))
    (tmp_path / "2_rgb.png").write_bytes(b"nothing")
    assert list(dict(evaluation_pictures(model, data, EMBEDDINGS, 2, device="cpu"))) == ["0_rgb.png"]


def test_skipped_images_are_counted_and_bounded(tmp_path, caplog):
    args = write_coloured(tmp_path, SCENES)
    (tmp_path / "1_rgb.png").write_bytes(b"nothing")
    results = evaluate(ColourModel(), data_of(args, max_skipped=0.5), EMBEDDINGS, device="cpu", progress=False)
    assert results["count.skipped"] == 1 and results["count.images"] == 2
    assert "1_rgb.png" in caplog.text and format_table(results).endswith("1 images skipped")
    with pytest.raises(UserError, match=r"1 of 3 images .*1_rgb.png"):
        evaluate(ColourModel(), data_of(args), EMBEDDINGS, device="cpu", progress=False)


def golden_eva(folder):
    if not (folder / "eva" / "weights.safetensors").is_file():
        pytest.skip("no golden EVA model")
    model = build_model(json.loads((folder / "eva" / "config.json").read_text())).eval()
    load_state(model, load_file(folder / "eva" / "weights.safetensors"))
    return model


def golden_args(folder) -> EvalOptions:
    data = folder / "data"
    return EvalOptions(
        val_data=f"{data}/panoptic.json", val_image_root=f"{data}/images", val_segm_root=f"{data}/panoptic"
    )


def golden_embeddings(folder) -> torch.Tensor:
    classes = len(json.loads((folder / "data" / "panoptic.json").read_text())["categories"])
    width = json.loads((folder / "eva" / "config.json").read_text())["embed_dim"]
    return F.normalize(torch.randn(classes, width, generator=torch.Generator().manual_seed(1)), dim=1)


def golden_sizes(folder) -> dict:
    """Sizes for the golden EVA model: of a dense image of 8 x 8 cells, of a cell and of a crop."""
    vision = json.loads((folder / "eva" / "config.json").read_text())["vision_cfg"]
    patch = vision["patch_size"]
    return {"image_sizes": [8 * patch], "patch_size": patch, "crop_size": vision["image_size"]}


def naive_accuracy(model, dataset, embeddings, size: int) -> dict[str, float]:
    """One segment at a time, in double precision, with lists and fractions."""
    model, embeddings = model.double(), embeddings.double()
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (model.visual.image_mean, model.visual.image_std)
    )
    hits: dict[tuple, list[int]] = {}
    for sample in (collate_panoptic([dataset[i]]) for i in range(len(dataset))):
        image = (sample["images"][size].double() / 255 - mean) / std
        dense = model.encode_dense(image, keep_shape=True)
        for k, label in enumerate(sample["labels"].tolist()):
            box = sample["boxes"][size][k].double() * dense.shape[-1]
            crop = ((sample["crops"][k].double() / 255 - mean) / std)[None]
            features = {
                "rois": roi_align(dense, [box[None]], (1, 1), 1.0, -1, True).flatten(),
                "maskpool": torch.stack([dense[0, :, y, x] for y, x in sample["masks"][size][k].nonzero()]).mean(0),
                "crops": model.encode_image(crop)[0],
            }
            for name, feature in features.items():
                order = F.cosine_similarity(feature[None], embeddings).argsort(descending=True).tolist()
                for top in (1, 5):
                    key = (f"{name}.{'thing' if sample['is_thing'][k] else 'stuff'}.macc{top}", label)
                    hits.setdefault(key, []).append(int(label in order[:top]))
    means: dict[str, list[float]] = {}
    for (name, _), found in hits.items():
        means.setdefault(name, []).append(sum(found) / len(found))
    return {name: sum(values) / len(values) for name, values in means.items()}


def test_a_real_model_against_a_naive_loop(golden):
    model, embeddings, sizes = golden_eva(golden), golden_embeddings(golden), golden_sizes(golden)
    data = build_eval_data(golden_args(golden), **sizes)
    results = evaluate(model, data, embeddings, device="cpu", progress=False)
    with torch.no_grad():
        expected = naive_accuracy(model, data.loader.dataset, embeddings, *sizes["image_sizes"])
    assert set(expected) == {key for key in results if "count" not in key}
    for key, value in expected.items():
        assert results[key] == pytest.approx(value, abs=1e-12), key
    assert any(0 < results[key] < 1 for key in expected)  # not trivially


def _evaluate_in_process(rank: int, world: int, golden, folder) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world
    )
    try:
        data = build_eval_data(
            golden_args(golden),
            batch_size=1,
            rank=rank,
            world_size=world,
            **golden_sizes(golden),
        )
        model, embeddings = golden_eva(golden), golden_embeddings(golden)
        rows = SegmentRows()
        results = evaluate(
            model, data, embeddings, device="cpu", rank=rank, world_size=world, progress=False, rows=rows
        )
        (folder / f"{world}_{rank}.json").write_text(json.dumps([results, rows.gather()]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 6])
def test_processes_agree_with_one(golden, tmp_path, world, in_processes):
    """Two processes share five images unevenly; of six, one has none. All have the result of a single one."""
    data = build_eval_data(golden_args(golden), **golden_sizes(golden))
    rows = SegmentRows()
    alone = evaluate(golden_eva(golden), data, golden_embeddings(golden), device="cpu", progress=False, rows=rows)
    in_processes(_evaluate_in_process, world, world, golden, tmp_path)
    for rank in range(world):
        results, table = json.loads((tmp_path / f"{world}_{rank}.json").read_text())
        assert results == pytest.approx(alone, abs=1e-12)
        if rank:
            assert table is None
        else:
            assert {name: sorted(column) for name, column in table.items()} == {
                name: sorted(column) for name, column in rows.gather().items()
            }
