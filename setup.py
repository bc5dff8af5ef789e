"""Packages: s2_kernels (torch and triton only), s2_vllm (a vLLM plugin), s2megatron (Megatron)."""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
KERNELS = tomllib.loads((HERE / "kernels/pyproject.toml").read_text(encoding="utf-8"))["project"]

setup(
    name="s2megatron",
    version="0.1.0",
    description="Sparsely-Sharded (S2) attention for pretraining with Megatron-LM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    # kernels/ is a folder, not a package: a top-level `kernels` would shadow Hugging Face's.
    packages=[*find_packages("kernels"), *find_packages(include=["s2megatron*"])],
    package_dir={name: f"kernels/{name}" for name in ("s2_kernels", "s2_vllm")},
    package_data={"s2megatron": ["gpus/*.yaml"]},
    install_requires=[
        *KERNELS["dependencies"],
        "numpy",
        "megatron-core>=0.19,<0.20",
        "omegaconf>=2.3",  # megatron.training imports it without asking for it
        "psutil",  # so do its checkpoint writers
        "pydantic>=2",
        "pyyaml>=6",
        "tqdm",
        "tensorboard",
        "transformers>=4.50",
        "safetensors>=0.8",  # 0.8 reads tensors without mapping the file into memory
        "sentencepiece",
        "protobuf",  # what reads a SentencePiece model's rules
        "zstandard",  # reads .zst; Python has it from 3.14 on
        "matplotlib>=3.8",
    ],
    extras_require={
        # numpy: Triton 3.6's interpreter, which CI runs the kernels in, breaks with 2.3
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            "hypothesis>=6",
            "ruff>=0.9",
            "import-linter>=2",
            "numpy<2.3",
        ],
        # transformer-engine-torch builds from source; docs/install.md has the command
        "te": ["transformer-engine[pytorch]>=2.9"],
    },
    entry_points={
        "console_scripts": ["s2megatron=s2megatron.cli:main"],
        **{
            group: [f"{name}={value}" for name, value in points.items()]
            for group, points in KERNELS["entry-points"].items()
        },
    },
)
