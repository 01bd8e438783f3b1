"""A page in the browser: a photograph, class names typed in, and what a model sees where.

Upload a photograph, type class names, choose checkpoint and reading; the slider compares photograph and label map, a
click on the photograph shows the cosine of everything to that point, and the label map can be downloaded.

    pip install -e ".[page]"
    python tools/page.py                                                        # the quick start's models
    python tools/page.py --model EVA02-CLIP-B-16 --pretrained eva.pt clipself.pt
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from open_clip.readouts import list_readouts
from ovseg.classes import ClassList, embed_words, parse_classes
from ovseg.options import REFINEMENTS, add_model_options, load_model, short_names, tokenizer_of
from ovseg.pictures import class_colours, write_label_png
from ovseg.protocols import OWN, Protocol
from ovseg.segment import Segmenter, at_pixels, on_input
from training.engine.distributed import init_distributed
from training.engine.errors import Flags, UserError, run_program
from training.engine.flags import Parser
from training.engine.pictures import overlay, similarity_to

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = {name: f"quickstart/logs/{name}/checkpoints/clipself.pt" for name in ("start", "clipself")}
QUICKSTART_MODEL = "ViT-Ti-8-64"
OWN_READING = "the model's own"
# Readings that need nothing besides the model, and give cells in the space of the class names.
READINGS = [OWN_READING, *(r for r in list_readouts() if r not in ("tokens", "proxyclip", "gated", "multi-v"))]
LARGEST = 4000  # pixels of a side that are shown; larger photographs are refused rather than sent back and forth
SHOWN = 640  # pixels of a side up to which small pictures are enlarged
KEPT = 8  # dense maps kept for clicks
FLAGS = Flags(resume="the same command", folder="--downloads", checkpointing="a smaller input")


class Models:
    """The checkpoints of a page, loaded when they are first asked for, and what was computed with them.

    Args:
        args: the program's arguments.
        device: where to compute.
        downloads: folder of label maps that are offered for download.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, downloads: Path) -> None:
        self.args, self.device, self.downloads = args, device, downloads
        self.files = dict(zip(short_names(args.pretrained), args.pretrained, strict=True))
        self._models: dict[str, tuple] = {}
        self._words: dict[tuple, Tensor] = {}
        self._maps: OrderedDict[tuple, tuple] = OrderedDict()

    def model(self, checkpoint: str) -> tuple:
        """(model, name) of a checkpoint."""
        if checkpoint not in self._models:
            self._models[checkpoint] = load_model(self.args, self.files[checkpoint], self.device)
        return self._models[checkpoint]

    def segmenter(self, checkpoint: str, classes: ClassList, protocol: Protocol) -> Segmenter:
        """The model of a checkpoint, for classes and settings."""
        model, name = self.model(checkpoint)
        key = (checkpoint, classes.words, protocol.templates)
        if key not in self._words:
            self._words[key] = embed_words(model, tokenizer_of(self.args, name), classes, templates=protocol.templates)
        return Segmenter(model, classes, self._words[key], protocol)

    def label(
        self,
        image: np.ndarray,
        names: str,
        background: str,
        checkpoint: str,
        reading: str,
        refinement: str,
        short_side: int,
    ) -> tuple[np.ndarray, str, str]:
        """Label a photograph uint8 ``[H, W, 3]``.

        Returns:
            The photograph under its labels' colours, the legend as HTML, and the path of the label map's PNG.

        Raises:
            UserError: no photograph, no class names, or some twice.
        """
        pixels, protocol = self._input(image, reading, short_side)
        classes = parse_classes(names.splitlines())
        words = [w.strip() for w in background.replace(",", "|").split("|") if w.strip()]
        if words:
            classes = classes.with_background(words)
        protocol = replace(protocol, **REFINEMENTS[refinement])
        segmenter = self.segmenter(checkpoint, classes, protocol)
        labels = segmenter(pixels)["default"].labels.cpu().numpy()
        colours = class_colours(classes)
        name = hashlib.sha256(labels.tobytes() + repr((classes.names, labels.shape)).encode()).hexdigest()[:16]
        path = self.downloads / f"labels-{name}.png"
        write_label_png(path, labels, colours)
        return overlay(image, labels, colours), legend(labels, classes, colours), str(path)

    def similarity(
        self, image: np.ndarray, x: int, y: int, checkpoint: str, reading: str, short_side: int
    ) -> np.ndarray:
        """Cosine of all cells to that under a point of the photograph, as a picture uint8 ``[H, W, 3]``."""
        pixels, protocol = self._input(image, reading, short_side)
        size = tuple(pixels.shape[-2:])
        key = (hashlib.sha256(image.tobytes()).digest(), size, checkpoint, protocol)
        if key not in self._maps:
            model, _ = self.model(checkpoint)
            nothing = ClassList(("nothing",), (("nothing",),))
            segmenter = Segmenter(model, nothing, torch.zeros(1, model.embed_dim), protocol)
            maps, plan = segmenter.dense(segmenter.prepare(pixels))
            self._maps[key] = maps[protocol.readout], plan
            while len(self._maps) > KEPT:
                self._maps.popitem(last=False)
        dense, plan = self._maps[key]
        point = (x / size[1], y / size[0])
        values = at_pixels(similarity_to(dense, on_input((*point, *point), plan))[None], plan, size)[0]
        low, high = float(values.min()), float(values.max())
        colours = matplotlib.colormaps["viridis"]((values - low) / max(high - low, 1e-6))[..., :3]
        shown = (0.3 * image.mean(-1, keepdims=True) + 0.7 * 255 * colours).astype(np.uint8)
        times = max(SHOWN // max(size), 1)
        return mark(shown.repeat(times, 0).repeat(times, 1), x * times + times // 2, y * times + times // 2)

    def _input(self, image: np.ndarray | None, reading: str, short_side: int) -> tuple[Tensor, Protocol]:
        if image is None:
            raise UserError("no photograph: upload one first")
        if max(image.shape[:2]) > LARGEST:
            raise UserError(
                f"{image.shape[1]} x {image.shape[0]} pixels: the page takes photographs of up to {LARGEST} a side"
            )
        readout = None if reading == OWN_READING else reading
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        return pixels, replace(OWN, readout=readout, short_side=int(short_side))


def legend(labels: np.ndarray, classes: ClassList, colours: np.ndarray) -> str:
    """HTML: the classes with their colours and areas, the largest first; what is nowhere comes last, in grey."""
    area = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    items = []
    for i in area.argsort(kind="stable")[::-1]:
        box = f"background:rgb{tuple(int(v) for v in colours[i])};border:1px solid #000"
        style = "" if area[i] else "opacity:.5;"
        items.append(
            f'<span style="display:inline-flex;align-items:center;gap:6px;margin:2px 14px 2px 0;{style}">'
            f'<span style="width:16px;height:16px;{box}"></span>{html.escape(classes.names[i])} {area[i]:.1%}</span>'
        )
    return f'<div id="legend">{"".join(items)}</div>'


def mark(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """A cross at a point, seen on light and dark alike."""
    height, width = image.shape[:2]
    arm = max(min(height, width) // 40, 3)
    for reach, colour in ((2, 0), (0, 255)):
        for dy, dx in ((reach // 2, arm + reach), (arm + reach, reach // 2)):
            image[max(y - dy, 0) : y + dy + 1, max(x - dx, 0) : x + dx + 1] = colour
    return image


def quickstart_classes() -> str:
    """Class names of the quick start's scenes, where they are there; else a few for a street."""
    file = ROOT / "quickstart" / "data" / "annotations" / "panoptic_val2017.json"
    try:
        categories = json.loads(file.read_text(encoding="utf-8"))["categories"]
        return ", ".join(category["name"] for category in sorted(categories, key=lambda c: c["id"]))
    except (OSError, ValueError, KeyError):
        return "person, car|truck, building, tree|bush, sky, road"


def build_page(models: Models):
    """The page as a Gradio app.

    Raises:
        UserError: Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError:
        raise UserError('the page needs Gradio: pip install -e ".[page]"') from None

    def shown(function):
        """A mistake of the user is a message on the page."""

        def call(*values):
            try:
                return function(*values)
            except UserError as error:
                raise gr.Error(str(error)) from None

        return call

    def label(image, names, background, checkpoint, reading, refinement, short_side):
        picture, text, path = models.label(image, names, background, checkpoint, reading, refinement, short_side)
        return (image, picture), text, gr.update(value=path, interactive=True)

    def click(image, checkpoint, reading, short_side, event):
        try:
            return models.similarity(image, *map(int, event.index), checkpoint, reading, short_side)
        except UserError as error:
            raise gr.Error(str(error)) from None

    click.__annotations__["event"] = gr.SelectData  # by which Gradio knows what to pass
    first = models.model(next(iter(models.files)))[0]
    native = max(first.visual.image_size * 2, 128)
    with gr.Blocks(title="What a model sees where", analytics_enabled=False) as page:
        gr.Markdown("## What a model sees where\nUpload a photograph, name classes, press **Label**.")
        with gr.Row():
            with gr.Column(scale=2):
                gr.Markdown("Photograph: a click on it shows the cosine to that point")
                image = gr.Image(show_label=False, type="numpy", image_mode="RGB", elem_id="photograph")
                names = gr.Textbox(
                    quickstart_classes(), label="Classes: commas between them, | between synonyms", lines=2,
                    elem_id="classes",
                )  # fmt: skip
                background = gr.Textbox("", label="Words for everything else (optional)", elem_id="background")
                checkpoint = gr.Dropdown(
                    list(models.files), value=list(models.files)[-1], label="Checkpoint", elem_id="checkpoint"
                )
                with gr.Row():
                    reading = gr.Dropdown(READINGS, value=OWN_READING, label="Reading", elem_id="reading")
                    refinement = gr.Dropdown(
                        [("none", "none"), ("prompt denoising", "pd"), ("key smoothing", "ks"), ("both", "pdks")],
                        value="none", label="Refinement",
                    )  # fmt: skip
                short_side = gr.Slider(64, 1024, value=native, step=16, label="Short side of the input, pixels")
                button = gr.Button("Label", variant="primary", elem_id="label")
            with gr.Column(scale=3):
                slider = gr.ImageSlider(label="Photograph and labels", type="numpy", elem_id="slider")
                text = gr.HTML()
                download = gr.DownloadButton("Download the label map", interactive=False, elem_id="download")
                heat = gr.Image(label="Cosine to the point", interactive=False, elem_id="heat")
        settings = [image, names, background, checkpoint, reading, refinement, short_side]
        button.click(shown(label), settings, [slider, text, download])
        image.select(click, [image, checkpoint, reading, short_side], heat)
    return page


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's arguments; without a model, those of the quick start."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, several=True, default_model=QUICKSTART_MODEL)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--downloads", default="", help="folder of label maps for download; a temporary one without")
    return parser.parse_args(argv)


def make_models(args: argparse.Namespace, downloads: Path) -> Models:
    """The checkpoints that the arguments name; the quick start's, where they name none.

    Raises:
        UserError: the quick start has not been run.
    """
    if args.pretrained == [""]:
        if args.model != QUICKSTART_MODEL:
            raise UserError(f"--model {args.model} needs weights: name them with --pretrained")
        args.pretrained = [str(ROOT / path) for path in QUICKSTART.values() if (ROOT / path).is_file()]
        if not args.pretrained:
            raise UserError("no models: run bash scripts/quickstart.sh first, or name --model and --pretrained")
    return Models(args, init_distributed(args.device).device, downloads)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv), FLAGS)


def _main(argv: Sequence[str] | None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        downloads = Path(args.downloads or folder)
        page = build_page(make_models(args, downloads))
        page.launch(server_name=args.host, server_port=args.port, allowed_paths=[str(downloads)], quiet=False)


if __name__ == "__main__":
    raise SystemExit(main())
