"""Modes, groups and rates against recorded numbers; a training run from its command line."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from ovdet.config import format_config
from ovdet.glip import tuning
from ovdet.glip.assemble import read_config
from ovdet.glip.commands import test as test_command
from ovdet.glip.commands import train as train_command
from ovdet.glip.config import TUNING, GlipConfig, TrainConfig
from ovdet.glip.model import GLIP
from ovdet.glip.names import to_glip
from ovdet.glip.run import make_task
from ovdet.glip.task import Grounding
from training.engine.distributed import Dist
from training.engine.errors import UserError

# -- modes and rates --------------------------------------------------------------------------------------------------

PROBE = {"bbox_pred", "centerness", "text_projection", "log_scale", "bias_lang", "bias0"}


@pytest.mark.parametrize(
    ("mode", "behaviour", "wanted"),
    [
        ("linear_prob", "fixed", PROBE),
        ("language_prompt_v1", "fixed", {"text"}),
        ("language_prompt_v2", "fixed", {"prompt"}),
        ("language_prompt_v3", "fixed", {"text"} | PROBE),
        ("language_prompt_v4", "fixed", {"prompt"} | PROBE),
        ("language_prompt_v3", "reference", {"text"}),
        ("language_prompt_v4", "reference", {"prompt"}),
    ],
)
def test_modes_train_what_they_say(tiny: Callable[..., GLIP], mode: str, behaviour: str, wanted: set):
    model = tiny()
    model.prompt = torch.nn.Parameter(torch.zeros(1000, 24))
    tuning.apply_mode(model, mode, behaviour)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] if n.startswith("head.") else n.split(".")[0] for n in names} == wanted
    assert ("text" in wanted) == all(p.requires_grad for p in model.text.parameters())
    tuning.set_training(model)
    assert model.text.training == ("text" in wanted)
    # Dropout and drop paths are off where everything is frozen, in the blocks of the head in any of these modes.
    assert not model.image.training and not model.head.blocks.training and not model.image.fpn.drop.training


def test_full_training_trains_all_that_is_not_frozen(tiny: Callable[..., GLIP]):
    model = tiny(classifier=3)
    tuning.apply_mode(model, "full")
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "head.cls_logits.weight", "head.cls_logits.bias",
    }  # fmt: skip
    tuning.set_training(model)
    assert model.head.blocks.training and model.image.training
    model.text.requires_grad_(False)
    with pytest.raises(UserError, match="leaves nothing to train"):
        tuning.apply_mode(model, "language_prompt_v1")
    assert set(TUNING) >= {"full", "linear_prob"}


def test_rates_and_groups_match_the_recorded_ones(glip_golden: Path, tiny: Callable[..., GLIP]):
    recorded = json.loads((glip_golden / "train.json").read_text())
    config = TrainConfig()
    got = [
        config.lr
        * tuning.decayed(step, recorded["iters"], config.decay_at, config.decay_factor)
        * tuning.warmed(step, recorded["warmup"], config.warmup_factor)
        for step in range(recorded["iters"])
    ]
    assert got == pytest.approx(recorded["lr"])
    names = {to_glip(name, fusion=True): name for name, _ in tiny(classifier=3).named_parameters()}
    compared = 0
    for name, (rate, decay) in recorded["groups"].items():
        if name in names:
            factor, weight_decay = tuning.group_of(names[name], config)
            assert (config.lr * factor, weight_decay) == pytest.approx((rate, decay)), name
            compared += 1
    assert compared >= 10


def test_groups_hold_every_trained_parameter_once(tiny: Callable[..., GLIP]):
    model, config = tiny(), TrainConfig()
    groups = tuning.parameter_groups(model, config)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {(round(g["lr_factor"], 3), g["weight_decay"]) for g in groups} == {
        (1.0, 1e-4), (2.0, 0.0), (0.1, 1e-4), (0.2, 0.0),
    }  # fmt: skip


def test_patience():
    patience = tuning.Patience(3, 8, 0.1)
    best = [patience.add(v) for v in (0.0, 0.2, 0.2, 0.1, 0.2)]
    assert best == [True, True, False, False, False]  # a tie is no gain, a first 0 is one
    assert patience.rate == pytest.approx(0.1) and patience.without_gain == 3 and not patience.ended
    for value in (0.1, 0.1, 0.1):
        patience.add(value)
    assert patience.rate == pytest.approx(0.01) and not patience.ended
    patience.add(0.1)
    patience.add(0.1)
    assert patience.ended
    patience.add(0.3)
    assert patience.rate == pytest.approx(0.01) and not patience.ended and patience.without_gain == 0
    assert tuning.Patience(0, 0, 0.1, [0.5, 0.1, 0.1]).rate == 1.0


def test_averaged_weights():
    module = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(module.weight, 0.0)
    average = tuning.Average(module, 0.9)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(module.weight, value)
        average.update(module)
    assert torch.allclose(average.values["weight"], torch.full((1, 2), 0.9 * 0.1 + 0.1 * 2.0))


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of a bright and a dark square each, in COCO's form."""
    folder, rng = tmp_path_factory.mktemp("scene"), np.random.default_rng(0)
    images, annotations = [], []
    for i in range(6):
        pixels = np.full((64, 96, 3), 128, np.uint8)
        for k, value in enumerate((255, 0)):
            x, y = int(rng.integers(0, 20)) + 48 * k, int(rng.integers(0, 36))
            pixels[y : y + 24, x : x + 24] = value
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": k + 1,
                    "bbox": [x, y, 24, 24],
                    "area": 576,
                }
            )
        Image.fromarray(pixels).save(folder / f"{i + 1}.png")
        images.append({"id": i + 1, "file_name": f"{i + 1}.png", "height": 64, "width": 96})
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "scene.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def config_file(scene: Path, config_of_tiny: Callable[..., GlipConfig], tmp_path: Path) -> Path:
    """A config that trains the small model on the scene."""
    config = config_of_tiny(deform=False)
    data, train, test = config.data, config.train, config.test
    data.train_annotations = data.val_annotations = str(scene / "scene.json")
    data.train_images = data.val_images = str(scene)
    data.sizes, data.test_size, data.longest, data.workers = [64], 64, 200, 0
    train.epochs, train.batch_size, train.lr, train.text_lr, train.warmup_steps = 2, 2, 3e-3, 3e-4, 2
    train.precision, train.log_every, train.ema = "fp32", 1, 0.5
    test.score = 0.0
    config.model.checkpoint = False
    path = tmp_path / "config.toml"
    path.write_text(format_config(config))
    return path


def run(config: Path, folder: Path, *more: str) -> int:
    return train_command.run([str(config), "--work-dir", str(folder), "--device", "cpu", *more])


def test_a_run_learns_writes_and_is_tested(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"
    assert run(config_file, folder, "train.epochs=4") == 0
    records = json.loads((folder / "results.json").read_text())
    assert [r["epoch"] for r in records] == [1, 2, 3, 4] and all("AP50" in r for r in records)
    content = torch.load(folder / "model_last.pt", weights_only=True)
    assert content["base"] is None and content["config"]["train"]["epochs"] == 4
    assert content["model"].keys() == content["model_ema"].keys()
    best = json.loads((folder / "best.json").read_text())
    assert best["AP"] == max(r["AP"] for r in records)
    capsys.readouterr()
    assert test_command.run([str(folder / "model_last.pt"), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert "AP50" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(records[-1]["AP"])
    results = json.loads((tmp_path / "out" / "results.bbox.json").read_text())
    assert {r["category_id"] for r in results} <= {1, 2} and {r["image_id"] for r in results} <= set(range(1, 7))
    assert test_command.run([str(folder / "model_last.pt"), "--ema", "--device", "cpu"]) == 0
    averaged = json.loads((folder / "model_last_ema_test" / "metrics.json").read_text())
    assert averaged["run"]["ema"] and averaged["run"]["checkpoint"] == str(folder / "model_last.pt")
    # Another test's results are not replaced, as those of other weights or settings are.
    for more, what in ((["--ema"], "weights"), (["test.nms=0.1"], "test.nms")):
        capsys.readouterr()
        out = ["--device", "cpu", "--out", str(tmp_path / "out")]
        assert test_command.run([str(folder / "model_last.pt"), *out, *more]) == 2
        assert f"out was made with other {what} (" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    # What is known of the classes, in place of their names.
    (tmp_path / "known.yaml").write_text("dog: {def_wiki: big and red}\ncat: {clean_name: a cat}\n")
    more = [f"test.knowledge={tmp_path / 'known.yaml'}", "--out", str(tmp_path / "known"), "--device", "cpu"]
    assert test_command.run([str(folder / "model_last.pt"), *more]) == 0
    known = json.loads((tmp_path / "known" / "results.bbox.json").read_text())
    assert {r["category_id"] for r in known} <= {1, 2} and known
    # Batches of any size give the same.
    options = ["--device", "cpu", "--out", str(tmp_path / "four"), "test.batch_size=4"]
    assert test_command.run([str(folder / "model_last.pt"), *options]) == 0
    assert json.loads((tmp_path / "four" / "metrics.json").read_text())["AP"] == pytest.approx(metrics["AP"], abs=1e-4)


def test_batches_are_pinned_and_sent_without_waiting(config_file: Path, tmp_path: Path, monkeypatch):
    config = read_config(config_file)
    task = make_task(config, Dist(0, 1, 0, torch.device("cpu"), False), tmp_path)
    pinned, waits, to = [], [], torch.Tensor.to

    def send(tensor: torch.Tensor, *places: object, **options: object) -> torch.Tensor:
        if places and isinstance(places[0], torch.device):
            waits.append(not options.get("non_blocking"))
        return to(tensor, *places, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor)
        batch = next(iter(task.loader))
        pin_memory(batch)  # as a loader does for a GPU
    own = [batch["images"], *(part for truth in batch["truth"] for part in truth)]
    assert len(batch["truth"]) == 2 and {id(t) for t in own} <= {id(t) for t in pinned}
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", send)
        task.module(next(task.batches(0, 0)))
    assert len(waits) >= len(own) + 2 and not any(waits)  # and the tokens of the texts


@pytest.mark.parametrize("place", ["inside an epoch", "before an evaluation"])
def test_a_run_goes_on_exactly(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    """With dropout, averages, and a rate that falls with patience."""
    more = ["train.epochs=3", "train.patience=1", "train.stop_patience=9"]
    assert run(config_file, tmp_path / "whole", *more) == 0
    with monkeypatch.context() as patch:
        if place == "inside an epoch":
            steps = iter(range(1, 100))
            end_step = Grounding.end_step

            def stop_at_five(task: Grounding) -> None:
                end_step(task)
                if next(steps) == 5:
                    os.kill(os.getpid(), signal.SIGTERM)

            patch.setattr(Grounding, "end_step", stop_at_five)
        else:

            def stop(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(Grounding, "_test", stop)
        assert run(config_file, tmp_path / "parts", *more) == (75 if place == "inside an epoch" else 130)
    assert run(config_file, tmp_path / "parts", *more, "--resume") == 0
    whole, parts = (torch.load(tmp_path / n / "model_last.pt", weights_only=True) for n in ("whole", "parts"))
    for key in ("model", "model_ema"):
        assert all(torch.equal(v, parts[key][n]) for n, v in whole[key].items())
    assert (tmp_path / "whole" / "best.json").read_text() == (tmp_path / "parts" / "best.json").read_text()


def test_tuning_writes_a_small_file(config_file: Path, tmp_path: Path):
    assert run(config_file, tmp_path / "base", "train.epochs=1") == 0
    start = f"model.weights={tmp_path / 'base' / 'model_last.pt'}"
    more = ["train.epochs=1", "train.mode=language_prompt_v2", "train.lr=0.05", start]
    assert run(config_file, tmp_path / "prompt", *more) == 0
    file = tmp_path / "prompt" / "model_last.pt"
    content = torch.load(file, weights_only=True)
    assert list(content["model"]) == ["prompt"] and content["model"]["prompt"].abs().sum() > 0
    assert file.stat().st_size < (tmp_path / "base" / "model_last.pt").stat().st_size
    records = json.loads((tmp_path / "prompt" / "results.json").read_text())
    out = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert test_command.run([str(file), *out]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["AP"] == pytest.approx(records[-1]["AP"])
    # On other weights it is refused.
    assert run(config_file, tmp_path / "other", "train.epochs=1", "train.seed=5") == 0
    assert test_command.run([str(file), *out, f"model.weights={tmp_path / 'other' / 'model_last.pt'}"]) == 2


def test_a_run_ends_when_nothing_is_gained(config_file: Path, tmp_path: Path):
    more = ["train.epochs=9", "train.stop_patience=2", "train.lr=1e-12", "train.text_lr=0"]
    assert run(config_file, tmp_path / "run", *more) == 0
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["text.weights="], "text.weights is empty"),
        (["image.weights="], "image.weights is empty"),
        (["text.weights=/nowhere/bert"], "text.weights /nowhere/bert does not exist"),
        (["text.weights=google-bert/absent"], "neither a folder nor in the cache"),
        (["image.weights=timm/absent"], "neither a file nor in the cache"),
        (["text.vocabulary=/nowhere/vocab.txt"], "does not exist"),
        (["text.tokens=30522"], "but the text encoder knows 30522"),
        (["model.weights=/nowhere/glip.pth"], "no such file"),
        (["train.mode=adapter"], "train.mode is 'adapter', but must be"),
        (["data.val_annotations=", "train.patience=2"], "train.patience needs an evaluation"),
        (["data.train_images=/nowhere"], "no such folder"),
        (["train.metric=AP99"], "is not among the results"),
        (["train.precision=amp_fp16"], "needs a GPU"),
        (["text.limit=4"], "class names need"),
    ],
)
def test_faulty_input_is_one_line(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    more: list[str], message: str,
):  # fmt: skip

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    logging.getLogger().setLevel(logging.WARNING)
    assert run(config_file, tmp_path / "run", "train.epochs=1", *more) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    if "not among" not in message:  # that is known after the first evaluation only
        assert not (tmp_path / "run").exists()


def test_a_used_folder_is_not_overwritten(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert run(config_file, tmp_path / "run") == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_and_test_as_one(config_file: Path, tmp_path: Path):
    """Twice one image a step, the counts of positives shared, against two images in one process."""
    program = Path(train_command.__file__).resolve().parents[4] / "GLIP"
    sure = ["fusion_dropout", "text_dropout"]
    more = [*(f"head.{name}=0" for name in sure), "text.dropout=0", "image.drop_path=0", "image.drop_block=0"]
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launch = [sys.executable]
        if processes == 2:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
        arguments = [
            str(config_file),
            "--work-dir",
            str(folder),
            "--device",
            "cpu",
            f"train.batch_size={2 // processes}",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parent / "src")}
        done = subprocess.run(
            [*launch, str(program / "train.py"), *arguments, *more], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        content = torch.load(folder / "model_last.pt", weights_only=True)["model"]
        results[processes] = content, json.loads((folder / "results.json").read_text())
        tested = subprocess.run(
            [*launch, str(program / "test.py"), str(folder / "model_last.pt"), "--device", "cpu"],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert tested.returncode == 0, tested.stderr[-2000:]
        metrics = json.loads((folder / "model_last_test" / "metrics.json").read_text())
        assert metrics["AP"] == pytest.approx(results[processes][1][-1]["AP"])
    (one, records), (two, other_records) = results[1], results[2]
    assert all(torch.allclose(value, two[name], atol=2e-4) for name, value in one.items())
    assert [r["step"] for r in records] == [r["step"] for r in other_records]
