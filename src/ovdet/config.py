"""Configs: TOML files that inherit, read into typed sections; any value can be overridden as ``section.key=value``.

A file may start with ``inherit = "other.toml"`` (or a list of files), relative to itself; later values win.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class ModelConfig:
    """The ViT and the parts trained on it."""

    name: str = "EVA02-CLIP-B-16"  # one of open_clip.list_models()
    pretrained: str = "eva"  # a tag, a checkpoint file, "eva" with cache_dir, or "" for random weights
    cache_dir: str = ""  # checkpoint file when pretrained is "eva", else the download cache
    blocks: list[int] = field(default_factory=lambda: [3, 5, 7])  # outputs of levels 1-3; level 4 is the value path
    channels: int = 256  # of the feature pyramid
    # Region proposals.
    rpn_convs: int = 2
    anchor_scale: float = 8.0  # anchor side in strides
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # height / width
    rpn_samples: int = 256  # anchors per image in the loss
    rpn_positive_share: float = 0.5
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_pre_nms: int = 2000  # per level
    rpn_post_nms: int = 1000  # per image
    rpn_nms: float = 0.7
    # Boxes and classes.
    box_convs: int = 4
    box_fcs: int = 2
    box_width: int = 1024  # of the fully connected layers
    box_size: int = 7  # RoIAlign side
    roi_samples: int = 512  # RoIs per image in the loss
    roi_positive_share: float = 0.25
    roi_iou: float = 0.5
    roi_sampling: int = 0  # RoIAlign points per cell and axis; 0 = as many as the RoI's size asks for
    temperature: float = 50.0  # start value of the learned one
    background_weight: float = 0.6  # in the classification loss
    # Masks.
    masks: bool = False
    mask_convs: int = 4
    mask_size: int = 14  # RoIAlign side; masks have twice that


@dataclass
class DataConfig:
    """Images and annotations. Relative paths: see :func:`resolve_path`."""

    protocol: str = "coco"  # how AP is computed: "coco", "lvis" or "voc"
    train_annotations: str = ""  # COCO or LVIS json with base classes only
    train_images: str = ""
    val_annotations: str = ""  # COCO or LVIS json; its categories, sorted by id, are the classes evaluated
    val_images: str = ""
    novel: list[str] = field(default_factory=list)  # names of novel classes
    novel_frequency: list[str] = field(default_factory=list)  # LVIS frequencies (r, c, f) that are novel
    embeddings: str = ""  # .npy [C+1, D], background last; "" = computed with the text tower and cached
    image_size: int = 640  # side of the padded square input, a multiple of the patch size
    jitter: list[float] = field(default_factory=lambda: [0.1, 2.0])  # range of the large-scale jitter
    flip: float = 0.5  # probability
    min_box_side: float = 1.0  # boxes below it after jitter and crop are dropped, in pixels
    keep_empty: bool = False  # train on images without boxes as well
    workers: int = 4  # per process


@dataclass
class TrainConfig:
    """Optimisation."""

    epochs: int = 3
    decay_epochs: list[int] = field(default_factory=list)  # rate * decay_factor after each of these
    decay_factor: float = 0.1
    lr: float = 1e-4  # at base_batch images per step
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm
    warmup_steps: int = 250
    warmup_factor: float = 0.001  # first rate / base rate
    batch_size: int = 8  # images per process
    base_batch: int = 64
    scale_lr: bool = True  # lr * (batch_size * processes) / base_batch
    precision: str = "amp_bf16"  # "fp32", "amp_bf16" or "amp_fp16"
    sync_batch_norm: bool = True  # when several processes train on GPUs
    seed: int = 0
    log_every: int = 50  # steps
    save_every: int = 1  # epochs
    eval_every: int = 1  # epochs; 0 = never while training


@dataclass
class TestConfig:
    """Detection and score fusion: p = p_det^(1-w) * p_vlm^w."""

    __test__ = False  # not a test class

    batch_size: int = 1  # images per process
    score: float = 0.01  # smallest score kept
    nms: float = 0.4
    per_image: int = 100  # most detections
    vlm_weight_base: float = 0.1  # w of base classes (a)
    vlm_weight_novel: float = 0.8  # w of novel classes (b)
    vlm_temperature: float = 75.0
    temperature: float = 0.0  # of the detector's classifier; 0 = the learned one
    mask_threshold: float = 0.5


@dataclass
class Config:
    """A whole config; ``path`` is the file it was read from."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)
    path: str = ""


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "test": TestConfig}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply overrides.

    Args:
        path: a TOML file; ``inherit`` names files to start from.
        overrides: ``"section.key=value"``, value in TOML (``data.jitter=[0.5, 1.5]``); text needs no quotes.

    Raises:
        FileNotFoundError: the file, or one that it inherits, does not exist.
        ValueError: not TOML, an unknown section or key (with close matches), or a value of another type.
    """
    config = config_from_dict(_read(Path(path), ()), source=str(path))
    config.path = str(path)
    for override in overrides:
        _override(config, override)
    _check(config)
    return config


def config_from_dict(values: dict[str, dict[str, Any]], *, source: str = "config") -> Config:
    """A config from ``{section: {key: value}}``; ``source`` stands in messages. Raises as :func:`load_config`."""
    config = Config()
    for section, entries in values.items():
        if section not in SECTIONS:
            raise ValueError(f'{source}: section "{section}" is unknown{_near(section, SECTIONS)}')
        if not isinstance(entries, dict):
            raise ValueError(f"{source}: {section} must be a section ([{section}]), not a value")
        for key, value in entries.items():
            _assign(config, section, key, value, source)
    return config


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """``{section: {key: value}}`` of plain values, for checkpoints; :func:`config_from_dict` takes it back."""
    return {section: dataclasses.asdict(getattr(config, section)) for section in SECTIONS}


def format_config(config: Config) -> str:
    """The complete config as TOML text that :func:`load_config` reads."""
    lines = []
    for section, entries in config_to_dict(config).items():
        # json's text, numbers, true/false and lists are TOML's.
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items()), ""]
    return "\n".join(lines)


def resolve_path(path: str) -> str:
    """A path as given when it is absolute, a URL or exists in the working folder; else relative to the repository."""
    if not path or "://" in path or Path(path).is_absolute() or Path(path).exists():
        return path
    return str(REPOSITORY / path)


def _read(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """Values of a file over those it inherits; ``children`` are the files that led here."""
    by = f" (inherited by {children[-1]})" if children else ""
    if not path.is_file():
        raise FileNotFoundError(f"config {path}{by} does not exist: the configs are in F-ViT/configs")
    if path.resolve() in children:
        raise ValueError(f"config {path}{by} inherits itself: remove one of the inherit lines")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not TOML: {error}") from error
    parents = values.pop("inherit", [])
    merged: dict[str, Any] = {}
    for layer in [
        *(
            _read(path.parent / parent, (*children, path.resolve()))
            for parent in ([parents] if isinstance(parents, str) else parents)
        ),
        values,
    ]:
        for section, entries in layer.items():
            if isinstance(entries, dict):
                merged.setdefault(section, {}).update(entries)
            else:
                merged[section] = entries
    return merged


def _override(config: Config, override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise ValueError(f'override "{override}" is not of the form section.key=value, such as train.lr=2e-4')
    if section not in SECTIONS:
        raise ValueError(f'override "{override}": section "{section}" is unknown{_near(section, SECTIONS)}')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a word or path without quotes
    _assign(config, section, key, value, f'override "{override}"')


def _assign(config: Config, section: str, key: str, value: Any, source: str) -> None:
    types = typing.get_type_hints(SECTIONS[section])
    types.pop("__test__", None)
    if key not in types:
        raise ValueError(f'{source}: key "{section}.{key}" is unknown{_near(key, types)}')
    kind = types[key]
    fitting, fits = _convert(value, kind)
    if not fits:
        name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
        raise ValueError(f"{source}: {section}.{key} is {value!r}, but must be of type {name}")
    setattr(getattr(config, section), key, fitting)


def _convert(value: Any, kind: Any) -> tuple[Any, bool]:
    """(value as ``kind``, whether it is one); whole numbers pass for float."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            return value, False
        items = [_convert(item, typing.get_args(kind)[0]) for item in value]
        return [item for item, _ in items], all(fits for _, fits in items)
    if isinstance(value, bool) or kind is bool:
        return value, isinstance(value, bool) and kind is bool
    if kind is float and isinstance(value, int):
        return float(value), True
    return value, isinstance(value, kind)


def _near(name: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else f": use one of {', '.join(known)}"


def _check(config: Config) -> None:
    """Values that are of the right type and still impossible."""
    model, data, train, test = config.model, config.data, config.train, config.test
    rules = [
        ("model.blocks", model.blocks, len(model.blocks) == 3, "three block indices, one for each of levels 1 to 3"),
        ("model.anchor_ratios", model.anchor_ratios, min(model.anchor_ratios, default=0) > 0, "positive numbers"),
        ("data.protocol", data.protocol, data.protocol in ("coco", "lvis", "voc"), '"coco", "lvis" or "voc"'),
        ("data.jitter", data.jitter, len(data.jitter) == 2 and 0 < data.jitter[0] <= data.jitter[1], "[low, high]"),
        ("data.image_size", data.image_size, data.image_size > 0, "positive"),
        (
            "train.precision",
            train.precision,
            train.precision in ("fp32", "amp_bf16", "amp_fp16"),
            '"fp32", "amp_bf16" or "amp_fp16"',
        ),
        ("train.batch_size", train.batch_size, train.batch_size > 0, "positive"),
        ("test.batch_size", test.batch_size, test.batch_size > 0, "positive"),
        *(
            (f"test.{key}", getattr(test, key), 0 <= getattr(test, key) <= 1, "between 0 and 1")
            for key in ("score", "nms", "vlm_weight_base", "vlm_weight_novel", "mask_threshold")
        ),
    ]
    for name, value, good, wanted in rules:
        if not good:
            raise ValueError(f"{config.path or 'config'}: {name} is {value!r}, but must be {wanted}")
