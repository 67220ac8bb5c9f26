"""The Python environment in which other GPTQ tools are run against this one, with the versions that work together."""

import os
import subprocess
import sys
import venv
from pathlib import Path

# Known to work together with Python 3.11 on Linux, without a GPU.
PINS = (
    "torch==2.15.0",
    "transformers==5.23.0",
    "optimum==2.3.0",
    "gptqmodel==7.7.0",
    "accelerate==1.15.0",
    "tokenizers==0.23.3",
    "torchao==0.18.0",
    "safetensors==0.8.0",
    "gguf==0.19.0",
    "numpy==2.4.6",
)


def enter(folder: Path) -> None:
    """Goes on in the environment at `folder`, made first when it is missing: the script starts again in it."""
    folder = folder.resolve()
    done = folder / "pins.txt"
    if not done.exists() or done.read_text().split() != list(PINS):
        print(f"making the Python environment {folder}: about 5 GB from PyPI", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PINS], check=True)
        done.write_text("\n".join(PINS) + "\n")
    os.environ.update(environment(folder))
    if Path(sys.prefix).resolve() != folder:
        python = folder / "bin" / "python"
        os.execv(python, [str(python), *sys.argv])


def environment(folder: Path) -> dict[str, str]:
    """The variables that the packages need."""
    path = os.environ.get("PATH", os.defpath)
    bin_folder = str(folder / "bin")
    return {
        # As an activated environment has it: GPTQModel looks for ninja there to compile its kernels.
        "PATH": path if path.startswith(bin_folder) else bin_folder + os.pathsep + path,
        # The compiled kernels stay with the environment, not in the home folder.
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        # GPTQModel sizes its thread pool by this; left to itself it does not start on a machine of two cores.
        "GPTQMODEL_CPU_WORKERS": "2",
        # torch.compile of its dequantization takes longer than all the rest of a check.
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
