"""Packaging: models (open_clip), training, open-vocabulary segmentation (ovseg) and detection (ovdet)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
requirements = [
    line.strip() for line in (root / "requirements.txt").read_text().splitlines() if line.strip() and line[0] != "#"
]
version = re.search(r'__version__ = "(.+)"', (root / "src/open_clip/version.py").read_text()).group(1)
DETECTION = ["faster-coco-eval"]
# What programs need beyond the requirements, by what they are for.
extras = {
    "fvit": DETECTION,
    "vild": DETECTION,
    "glip": [*DETECTION, "transformers>=4.48", "pyyaml"],  # BERT
    "segmentation": ["scipy"],  # labels of PASCAL Context and SBD as they are published (.mat)
    "hf": ["transformers", "tokenizers"],  # tokenizers of SigLIP, CLIPA and other models of the hub
    "page": ["gradio"],
    "notebook": ["jupyter"],  # docs/first_steps.ipynb
    "proposals": ["scikit-learn"],  # regions of a foundation model's map: python -m training.propose
    "remote": ["requests", "aiohttp", "s3fs"],  # images behind http(s):// and s3://
    "wandb": ["wandb"],
    "test": ["pytest", "pytest-xdist", "hypothesis", "scipy", "packaging", "scikit-learn", "tokenizers", "transformers",
             *DETECTION],
}

setup(
    name="open_clip_torch",
    version=version,
    description="CLIPSelf: CLIP vision transformers distilled into dense, region-aware ones (a fork of OpenCLIP)",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url="https://github.com/wusize/CLIPSelf",
    project_urls={
        "Paper": "https://arxiv.org/abs/2310.01403",
        "Published code": "https://github.com/wusize/CLIPSelf",
        "OpenCLIP": "https://github.com/mlfoundations/open_clip",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    keywords="CLIP vision-language open-vocabulary detection segmentation distillation",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "open_clip": ["model_configs/*.json", "*.txt.gz", "*.json", "*.txt"],
        "ovseg": ["*.json", "class_lists/*.json"],
        "ovdet": ["fvit/*.json"],
        "training": ["methods/*.json"],
    },
    python_requires=">=3.10",
    install_requires=requirements,
    extras_require=extras,
)
