"""Metadata of the package; tools are configured in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "llm_jax" / "__init__.py").read_text())[1]

# TensorFlow's CPU build is a third of the full one; it is published for x86 Linux alone.
IS_X86_LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"
IS_OTHER = "sys_platform != 'linux' or platform_machine != 'x86_64'"

# What compiles for TPUs without one: libtpu in the version that JAX asks for, 214 MB.
AOT = f"jax[tpu]>=0.10.2; {IS_X86_LINUX}"

PICTURES = "matplotlib>=3.8"
METRICS = (
    "rouge-score>=0.1.2",
    "sacrebleu>=2.5",
    "scikit-learn>=1.6",
    "snowballstemmer>=2.2",
    "stop-words>=2025.11",
)

# EleutherAI's, without what its own models need (torch is in its extra `hf`).
HARNESS = "lm-eval>=0.4.13"

setuptools.setup(
    name="llm_jax",
    version=VERSION,
    description="A research codebase for language models on TPU pod slices, in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["llm_jax", "llm_jax.*"]),
    package_data={
        "llm_jax.kernels.flash_attention": ["block_table.json"],
        "llm_jax.understanding": ["*.html"],
        "llm_jax.data.builders.state_of_the_union": ["*.jsonl.xz", "README.md"],
    },
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.12.8",
        "gguf>=0.17",  # of llama.cpp: 120 kB, nothing that is not here already
        "importlib_resources>=6.4",  # of tensorflow-datasets, which does not declare it
        "jax>=0.10.2",
        "jinja2>=3.1",  # of chat templates
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "sentencepiece>=0.2",
        "tensorboard>=2.20",
        f"tensorflow-cpu>=2.20; {IS_X86_LINUX}",
        f"tensorflow>=2.20; {IS_OTHER}",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "aot": [AOT],
        # Kernels that the report stands ours beside.
        "peers": [AOT, "tokamax>=0.0.17; python_version >= '3.12'"],
        # Statistics and pictures of reports.
        "lab": [PICTURES, "scipy>=1.13"],
        # Metrics that others count by, baselines and classic preprocessing.
        "tasks": [PICTURES, *METRICS],
        # Tasks of lm-evaluation-harness.
        "harness": [HARNESS],
        "test": [
            AOT,
            HARNESS,
            PICTURES,
            *METRICS,
            "hypothesis>=6.100",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "safetensors>=0.6",  # what ours is held to; goldens are in its format
        ],
        # What conversions are held to, and timed beside.
        "live": ["peft>=0.17", "torch>=2.6", "transformers>=5.0"],
    },
)
