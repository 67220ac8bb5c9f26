"""The Python environment in which other GPTQ tools are run against this one, with the versions that work together."""

import os
import subprocess
import sys
import venv
from pathlib import Path

# Known to work together with Python 3.11 on Linux, CPU only. About 5 GB: PyPI's torch brings its CUDA libraries.
PINS = (
    "torch==2.15.0",
    "transformers==5.23.0",
    "optimum==2.3.0",
    "gptqmodel==7.7.0",
    "accelerate==1.15.0",
    "tokenizers==0.23.3",
    "torchao==0.18.0",
    "safetensors==0.8.0",
    "numpy==2.4.6",
)

# GPTQModel sizes its thread pool by this; left to itself it does not start on a machine of two cores.
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2"}


def enter(folder: Path) -> None:
    """Goes on in the environment at `folder`, made first when it is missing: the script starts again in it."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        print(f"making the Python environment {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS], check=True)
    os.environ.update(ENVIRONMENT)
    if Path(sys.prefix).resolve() != folder.resolve():
        os.execv(python, [str(python), *sys.argv])
