"""Builds the wheel: the hooks that pip calls (PEP 517), around those of maturin.

Maturin compiles the program and puts it among the scripts. From there a fixed path to the libraries of the installed PyTorch
does not exist, because the name of its folder contains Python's version. So the program moves into the Python package, beside
the folder of PyTorch, and a script of Python's starts it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import maturin
from maturin import (  # noqa: F401 - hooks that need no change
    build_sdist,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel,
)

# Folders of libtorch and of CUDA's libraries, as seen from the program in `gptq_rs/`.
LIBRARIES = "$ORIGIN/../torch/lib:$ORIGIN/../nvidia/cu13/lib"
# `uvx gptq-rs` runs a script of the package's name.
ENTRY_POINTS = "[console_scripts]\ngptq = gptq_rs._program:main\ngptq-rs = gptq_rs._program:main\n"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """The wheel's file name; compiles the program, with the libtorch in `$LIBTORCH` or from scripts/setup."""
    if "LIBTORCH" not in os.environ:
        run("scripts/setup")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        built = maturin.build_wheel(str(scratch), config_settings, metadata_directory)
        run(sys.executable, "-m", "wheel", "unpack", "--dest", scratch / "unpacked", scratch / built)
        (wheel,) = (scratch / "unpacked").iterdir()
        (data,) = wheel.glob("*.data")
        (information,) = wheel.glob("*.dist-info")

        program = data / "scripts/gptq"
        run(program, "man", data / "data/share/man/man1")
        run("strip", program)
        run("patchelf", "--force-rpath", "--set-rpath", LIBRARIES, program)
        program.rename(wheel / "gptq_rs/gptq")
        program.parent.rmdir()
        (information / "entry_points.txt").write_text(ENTRY_POINTS)

        run(sys.executable, "-m", "wheel", "pack", "--dest-dir", wheel_directory, wheel)
        return built


def run(*command):
    """Runs a command, whose output goes to standard error."""
    subprocess.run([str(word) for word in command], stdout=sys.stderr, check=True)
