import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "nfzoo/__init__.py").read_text(), re.M).group(1)
# What LiteRT and ONNX models are written and run with; a SavedModel needs TensorFlow alone.
EXPORT = ["ai-edge-litert>=2", "onnx>=1.17", "onnxruntime>=1.20"]

setup(
    name="nfzoo",
    version=VERSION,
    description="Keras 3 networks that train without batch normalization, with signal propagation plots",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["nfzoo", "nfzoo.*"]),
    package_data={"nfzoo": ["py.typed", "ARCHITECTURE.md", "models/manifest.json", "report/page.*", "report/*.js"]},
    install_requires=[
        "keras>=3.15",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pandas>=2.2",
        "pillow>=10",
        "plotly>=6",
        "pydantic>=2.7",
        "rich>=13",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "keras-tuner>=1.4.8",
        "tensorboard>=2.20",  # keras-tuner imports it and does not declare it
        "tensorflow>=2.21",
        "tensorflow-datasets>=4.9.8",
        "typer>=0.15",
        "wrapt>=1.16",
    ],
    extras_require={
        "dev": [
            *EXPORT,
            "ipykernel>=6",
            "keras-hub>=0.32",
            "nbclient>=0.10",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "selenium>=4.20",
        ],
        "export": EXPORT,
        "jax": ["jax>=0.6"],
    },
    entry_points={"console_scripts": ["nfzoo = nfzoo.cli:main"]},
)
