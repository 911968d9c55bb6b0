#!/usr/bin/env bash
# Make a virtual environment with what emulated runs need: `benchmarks/dry_gpu/install.sh FOLDER`,
# by $PYTHON, or else by python3; $PYTORCH: other packages of PyTorch's than those of constraints.txt.
# PyTorch's CUDA build comes from PyPI alone and without NVIDIA's packages, whose place the card's libraries take.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

"${PYTHON:-python3}" -m venv "$1"
pip() { "$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}" </dev/null 2>&1 | grep -v '^WARNING' || true; }
PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS='' pip "$1" --no-deps ${PYTORCH:-torch==2.13.0 triton==3.7.1 torchvision==0.28.0}
pip "$1" filelock typing-extensions sympy networkx jinja2 fsspec numpy setuptools
pip "$1" 'huggingface-hub<3' tokenizers safetensors pyyaml regex tqdm packaging psutil pydantic rich typer
pip "$1" --no-deps -c constraints.txt bitsandbytes peft accelerate transformers trl datasets
pip "$1" pyarrow dill xxhash multiprocess pandas httpx pillow
pip "$1" --no-deps -e .
"$1/bin/python" -m pip show --quiet torch trl memplan
