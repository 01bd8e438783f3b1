"""docs/first_steps.ipynb runs from its first cell to its last, on a tiny random model in place of the quick start's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import open_clip
from open_clip.weight_files import save_weights
from open_clip.weights import export_state_dict

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_steps.ipynb"


def cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_it_is_clean_and_is_python():
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and len(cells()) >= 5
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, capsys):
    for seed, key in enumerate(("BEFORE", "AFTER")):
        torch.manual_seed(seed)
        model = open_clip.create_model("ViT-Ti-8-64", pretrained=None)
        save_weights(export_state_dict(model), tmp_path / f"{key}.pt", "tiny")
        monkeypatch.setenv(key, str(tmp_path / f"{key}.pt"))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.setenv("IMAGE", str(tmp_path / "photo.jpg"))
    monkeypatch.setenv("QUICKSTART", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(NOTEBOOK.parent)
    try:
        import nbclient
        import nbformat
        from jupyter_client.kernelspec import KernelSpecManager

        kernels = KernelSpecManager().find_kernel_specs()
    except ImportError:
        kernels = {}
    if "python3" in kernels:
        nbclient.NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=300).execute()
        return
    import matplotlib

    matplotlib.use("Agg")
    space: dict = {}
    for cell in cells():
        exec(compile(cell, str(NOTEBOOK), "exec"), space)  # noqa: S102 (the document's own code)
    out = capsys.readouterr().out
    assert "3 classes, 128 dimensions" in out and "dense map (1, 128, 16, 16)" in out and "vanilla  sees" in out
    assert space["labels"]["after"].shape == (60, 90)
