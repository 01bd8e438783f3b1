"""A tiny ViLD on generated scenes: its config, its proposals and its store, made once for all tests of the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ovdet.vild.assemble import read_config
from ovdet.vild.config import VildConfig
from training.engine.distributed import Dist
from training.scenes.generate import SceneOptions, write_dataset

TINY = """
[model]
trunk = "test_resnet"
trunk_weights = "random"
channels = 16
box_convs = 1
box_fcs = 1
box_width = 32
mask_convs = 1
rpn_convs = 1
rpn_pre_nms = 200
rpn_post_nms = 40
rpn_samples = 64
roi_samples = 32

[teacher]
name = "ViT-Ti-8-64"
pretrained = ""
batch_size = 32

[train]
precision = "fp32"
batch_size = 4
scale_lr = false
lr = 1e-2
clip = 1.0
warmup_steps = 2
log_every = 1
eval_every = 0
epochs = 100

[test]
score = 0.0
per_image = 20
batch_size = 2
"""


class Scenes:
    """Generated scenes and a config for them.

    Attributes:
        folder: of the scenes and what is made of them; config_file: of an ensemble with masks.
        novel: classes held out.
        alone: one process on the CPU.
        proposer: overrides that make the network that proposes regions.
    """

    alone = Dist(0, 1, 0, torch.device("cpu"), False)
    proposer = ("model.variant=supervised", "data.single_class=true", "model.masks=false", "data.keep_empty=false")

    def __init__(self, folder: Path, config_beside: Callable[..., Path]) -> None:
        self.folder = folder
        write_dataset(folder, train=12, val=6, options=SceneOptions(size=96, things=6), novel=2)
        file = folder / "annotations" / "instances_train2017.json"
        content = json.loads(file.read_text())
        bare = content["images"][3]["id"]  # an image without objects
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != bare]
        file.write_text(json.dumps(content))
        made = {name: str(folder / name) for name in ("proposals", "store")}
        self.config_file = str(config_beside(folder, TINY, prompts="single", **made))
        self.novel = self.config().data.novel

    def config(self, *overrides: str) -> VildConfig:
        """The config, with overrides."""
        return read_config(self.config_file, overrides)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory, config_beside: Callable[..., Path]) -> Scenes:
    """Scenes with the proposals of a network that was trained for two steps, and a full store."""
    from ovdet.vild.commands import embed, make_proposals, train

    made = Scenes(tmp_path_factory.mktemp("vild"), config_beside)
    work, file = made.folder / "proposer", made.config_file
    network = [*made.proposer, "--device", "cpu"]
    assert train.main([file, *network, "--work-dir", str(work), "--max-steps", "2"]) == 0
    make_proposals.main(
        [file, str(work / "latest.pt"), *network, "--most", "12", "--out", str(made.folder / "proposals")]
    )
    embed.main([file, "--device", "cpu"])
    return made
