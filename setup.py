"""Installs the one module: pip install --no-build-isolation ."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
setup(
    name="mhkd",
    version=re.search(r'__version__ = "(.+)"', (here / "mhkd.py").read_text()).group(1),
    description="Multi-head knowledge distillation for model compression: the reference implementation",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    py_modules=["mhkd"],
    python_requires=">=3.10",
    install_requires=["torch>=2.6"],
    extras_require={
        "all": ["torchvision", "numpy", "tqdm", "scikit-learn", "scipy", "matplotlib"],
        "test": ["pytest", "hypothesis", "ruff"],
    },
    entry_points={"console_scripts": ["mhkd = mhkd:main"]},
)
