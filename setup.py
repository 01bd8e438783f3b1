"""Packaging of the model package (open_clip) and the training program (training)."""

from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
requirements = [
    line.strip() for line in (root / "requirements.txt").read_text().splitlines() if line.strip() and line[0] != "#"
]

setup(
    name="open_clip_torch",
    version="4.0.0",
    description="CLIPSelf: CLIP vision transformers distilled into dense, region-aware ones (a fork of OpenCLIP)",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"open_clip": ["model_configs/*.json", "*.txt.gz", "*.json", "*.txt"]},
    python_requires=">=3.10",
    install_requires=requirements,
    extras_require={
        "test": ["pytest", "hypothesis", "scipy", "faster-coco-eval"],
        "fvit": ["faster-coco-eval", "tomli; python_version < '3.11'"],
    },
)
