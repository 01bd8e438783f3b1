"""The grounding tab of ``tools/page.py``: a photograph, a caption or class names, and where they are."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovdet.glip.assemble import config_for, load_model
from ovdet.glip.draw import draw
from ovdet.glip.library import Grounder
from ovdet.glip.phrases import Phrase, split_list
from training.engine.errors import UserError

LARGEST = 4000  # pixels of a side that are taken


def open_grounder(checkpoint: str, config: str | None, device: torch.device) -> Grounder:
    """A GLIP file, ready to use, down to weak scores: the page's slider chooses among them.

    Args:
        config: the variant; None for files of this program, which hold theirs.

    Raises:
        UserError: a missing or faulty file.
    """
    changes = ["test.score=0.001"]
    made = config_for(checkpoint, config, changes)
    return Grounder(load_model(made, Path(checkpoint)).to(device), made, device)


def ground(
    grounder: Grounder, image: np.ndarray | None, text: str, phrases: str, classes: bool, score: float
) -> tuple[np.ndarray, str]:
    """A picture uint8 ``[H, W, 3]`` of what is found, and a table of it as HTML.

    Args:
        image: uint8 ``[H, W, 3]``.
        text: a caption, or with ``classes`` names separated by commas.
        phrases: of the caption, separated by semicolons; empty for noun phrases.
        score: smallest that is shown.

    Raises:
        UserError: no photograph or text, or phrases that are not in the caption.
    """
    if image is None:
        raise UserError("no photograph: upload one first")
    if max(image.shape[:2]) > LARGEST:
        raise UserError(f"{image.shape[1]} x {image.shape[0]} pixels: photographs of up to {LARGEST} a side are taken")
    text = " ".join(text.split())
    if not text:
        raise UserError("no text: write a caption, or names with commas between them")
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    found: dict[str, Any]
    named: list[Phrase] = []
    if classes:
        names = split_list(text, ",")
        (found,) = grounder(pixels, names)
    else:
        given = [p.strip() for p in phrases.split(";") if p.strip()] or None
        found = grounder.ground(pixels, text, given)
        named = found["phrases"]
        names = [p.text for p in named]
    shown = found["scores"] >= score
    boxes, labels, scores = (found[key][shown] for key in ("boxes", "labels", "scores"))
    picture = _drawn(pixels, boxes, labels, scores, names, "" if classes else text, named)
    rows = ""
    for box, label, value in zip(boxes, labels, scores, strict=True):
        cells = (html.escape(names[label]), f"{value:.2f}", ", ".join(f"{v:.0f}" for v in box))
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "<tr><th>what</th><th>score</th><th>box</th></tr>"
    return picture, f"<table>{head}{rows}</table>" if rows else "<p>Nothing reaches this score.</p>"


def _drawn(
    pixels: Tensor, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, names: list[str], caption: str,
    phrases: list[Phrase],
) -> np.ndarray:  # fmt: skip
    picture = draw(
        pixels, torch.from_numpy(boxes), labels.tolist(), scores.tolist(), names, caption=caption, phrases=phrases
    )
    return np.asarray(picture)


def add_tab(gr: Any, grounder: Grounder) -> None:
    """The tab's parts, within an open ``gr.Tab``; ``gr`` is the module ``gradio``."""

    def run(*values: Any) -> tuple[np.ndarray, str]:
        try:
            return ground(grounder, *values)
        except UserError as error:
            raise gr.Error(str(error)) from None

    with gr.Row():
        with gr.Column(scale=2):
            image = gr.Image(label="Photograph", type="numpy", image_mode="RGB", elem_id="grounding_photograph")
            text = gr.Textbox(label="Caption, or names with commas between them", elem_id="grounding_text")
            phrases = gr.Textbox(label="Its phrases, with ; between them (optional: noun phrases)")
            classes = gr.Checkbox(label="These are names, not a caption")
            score = gr.Slider(0, 1, value=0.3, step=0.01, label="Smallest score")
            button = gr.Button("Find", variant="primary", elem_id="find")
        with gr.Column(scale=3):
            picture = gr.Image(label="Found", interactive=False, elem_id="grounded")
            table = gr.HTML()
    button.click(run, [image, text, phrases, classes, score], [picture, table])
