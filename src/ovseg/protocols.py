"""Settings of a prediction, and the published ones by name: input size, windows, words, thresholds, refinements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ovseg.classes import TEMPLATE_NAMES
from ovseg.refine import KEY_FORMS
from ovseg.windows import REMAINDERS
from training.engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How labels are made from an image.

    Attributes:
        readout: dense reading, see :mod:`open_clip.readouts`; None for the model's own.
        long_side, short_side: the image is made as large as these allow, the ratio of its sides kept.
        antialias: of that resize. The published evaluations go without, and shrink by dropping pixels.
        window, stride: sliding windows in pixels of the input; 0 for the whole image, and for half a window. The stride
            is no larger than the window: pixels between windows would have no scores.
        remainder: what is done where a window is no multiple of the patch, see :data:`ovseg.windows.REMAINDERS`.
        words: whose class words are embedded (:func:`ovseg.classes.class_list`).
        templates: prompt templates (:data:`ovseg.classes.TEMPLATE_NAMES`).
        scale: factor of cosines before the softmax over words.
        threshold: probability under which a pixel becomes background; None for none.
        area: share of the foreground that a class must exceed; None for none (SCLIP).
        denoise: threshold of prompt denoising; None for none (MaskCLIP).
        smooth: threshold of key smoothing; None for none (MaskCLIP).
        key_form: of key smoothing, ``paper`` or ``released``.
        pamr_steps, pamr_dilations: PAMR after upsampling; 0 steps for none.
    """

    readout: str | None = None
    long_side: int = 2048
    short_side: int = 512
    antialias: bool = True
    window: int = 0
    stride: int = 0
    remainder: str = "pad"
    words: str = "names"
    templates: str = "project"
    scale: float = 40.0
    threshold: float | None = None
    area: float | None = None
    denoise: float | None = None
    smooth: float | None = None
    key_form: str = "paper"
    pamr_steps: int = 0
    pamr_dilations: tuple[int, ...] = (8, 16)

    def __post_init__(self) -> None:
        for name in ("long_side", "short_side"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        for name in ("window", "stride", "pamr_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 or more")
        if self.stride > self.window > 0:
            raise UserError(
                f"stride is {self.stride} and window {self.window}: pixels between the windows would have no label; "
                f"give a stride (--stride) of at most {self.window}, or 0 for half a window"
            )
        for name in ("threshold", "area", "denoise", "smooth"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} is {value}: give a share from 0 to 1")
        for name, known in (("remainder", REMAINDERS), ("key_form", KEY_FORMS), ("templates", TEMPLATE_NAMES)):
            if getattr(self, name) not in known:
                raise UserError(f'{name} is "{getattr(self, name)}": use one of {", ".join(known)}')
        if self.pamr_steps and (not self.pamr_dilations or min(self.pamr_dilations) < 1):
            raise UserError(f"pamr_dilations is {self.pamr_dilations}: give distances of at least one pixel")


#: Settings of this project: the whole image, nothing tuned on any validation set.
OWN = Protocol()

_MASKCLIP = Protocol(
    readout="value", antialias=False, remainder="stretch", words="maskclip", templates="maskclip", scale=100.0
)
_SCLIP = Protocol(
    readout="sclip", antialias=False, short_side=336, window=224, stride=112, remainder="drop", words="sclip",
    templates="imagenet",
)  # fmt: skip
_NACLIP = replace(_SCLIP, readout="naclip", words="naclip", pamr_steps=10)
_CLEARCLIP = Protocol(
    readout="clearclip", antialias=False, short_side=448, window=448, stride=224, remainder="centre",
    words="clearclip", templates="imagenet", scale=50.0,
)  # fmt: skip
_PROXYCLIP = Protocol(
    readout="proxyclip", antialias=False, short_side=336, window=336, stride=112, remainder="centre",
    words="proxyclip", templates="imagenet",
)  # fmt: skip

#: release -> (settings of every data set, changes by data set). The thresholds, and SCLIP's scales and area rule, were
#: chosen on the validation sets by their authors; results without a background class do not depend on them.
_PUBLISHED: dict[str, tuple[Protocol, dict[str, dict]]] = {
    "maskclip": (
        _MASKCLIP,
        {
            "voc21": {"words": "names"},
            "context59": {"long_side": 520, "short_side": 520},
            "context60": {"long_side": 520, "short_side": 520, "words": "names"},
            "coco_object": {"words": "names"},
            "cityscapes19": {"long_side": 1024, "short_side": 512},
        },
    ),
    "sclip": (
        _SCLIP,
        {
            "voc21": {"scale": 65.0, "threshold": 0.1, "area": 0.1},
            "context60": {"scale": 50.0, "threshold": 0.1},
            "coco_object": {"scale": 50.0, "threshold": 0.1},
            "coco_stuff171": {"short_side": 448},
            "cityscapes19": {"short_side": 560},
        },
    ),
    "naclip": (
        _NACLIP,
        {
            "voc20": {"window": 0, "stride": 0},
            "voc21": {"window": 0, "stride": 0, "threshold": 0.1},
            "context60": {"threshold": 0.1},
            "coco_object": {"threshold": 0.1},
            "cityscapes19": {"short_side": 560},
        },
    ),
    "clearclip": (
        _CLEARCLIP,
        {
            "voc21": {"threshold": 0.5},
            "context60": {"threshold": 0.15},
            "coco_object": {"threshold": 0.4},
            "cityscapes19": {"window": 224, "stride": 224},
        },
    ),
    "proxyclip": (
        _PROXYCLIP,
        {
            "voc21": {"threshold": 0.2},
            "context60": {"threshold": 0.15},
            "coco_object": {"threshold": 0.25},
            "ade150": {"short_side": 448},
            "cityscapes19": {"short_side": 448, "window": 224},
        },
    ),
}
PROTOCOLS = ("own", *_PUBLISHED)


def preset(name: str, dataset: str) -> Protocol:
    """The settings of a published evaluation on a data set, or this project's own.

    Data sets that a release did not use (panoptic ones, own classes) take its general settings, and their own names.

    Raises:
        UserError: an unknown name.
    """
    if name == "own":
        return OWN
    if name not in _PUBLISHED:
        raise UserError(f'no protocol is called "{name}": use one of {", ".join(PROTOCOLS)}')
    general, changes = _PUBLISHED[name]
    known = {"voc20", "voc21", "context59", "context60", "coco_object", "coco_stuff171", "ade150", "cityscapes19"}
    return replace(general, **changes.get(dataset, {}), **({} if dataset in known else {"words": "names"}))
