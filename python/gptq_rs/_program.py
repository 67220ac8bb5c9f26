"""The program `gptq` in this package: its place, its start and its results."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

PACKAGE = Path(__file__).resolve().parent
PROGRAM = PACKAGE / "gptq"
NEEDED = "2.11"
INSTALL_TORCH = f'pip install "torch=={NEEDED}.*"'


class GptqError(Exception):
    """An error of the program: what failed, and what helps."""

    __module__ = "gptq_rs"

    def __init__(self, message: str, hint: str | None = None, exit_code: int = 2) -> None:
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")
        #: What failed, what was expected, and what was found.
        self.message = message
        #: What helps, if known.
        self.hint = hint
        #: The program's exit code: 2 for an error, 143 after SIGTERM, negative for another signal.
        self.exit_code = exit_code


def environment() -> dict[str, str]:
    """The variables to start the program with.

    Raises:
        GptqError: If PyTorch is missing or has the wrong version.
    """
    torch = PACKAGE.parent / "torch"
    beside = (torch / "lib/libtorch_cpu.so").exists()
    if not beside:
        # `find_spec` finds the folder without running its code.
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise GptqError(f"PyTorch {NEEDED} is not installed for {sys.executable}", INSTALL_TORCH)
        torch = Path(spec.origin).parent
    version = re.search(r"__version__ = '([^']*)'", (torch / "version.py").read_text())
    found = version[1] if version else "of no known version"
    if not found.startswith(f"{NEEDED}."):
        raise GptqError(f"the PyTorch in {torch} is {found}, and gptq needs {NEEDED}", INSTALL_TORCH)
    # The program would start itself again to set it, because OpenMP reads it at the start.
    variables = {"OMP_WAIT_POLICY": "passive", **os.environ}
    if not beside:
        # The path in the program covers only the folder beside its own.
        folders = [str(torch / "lib"), variables.get("LD_LIBRARY_PATH", "")]
        variables["LD_LIBRARY_PATH"] = ":".join(filter(None, folders))
    return variables


def main() -> NoReturn:
    """The command `gptq`: replaces this process by the program."""
    try:
        variables = environment()
    except GptqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    os.execve(PROGRAM, ["gptq", *sys.argv[1:]], variables)


def run(arguments: Sequence[str]) -> Any:
    """Runs the program with `--json`, and returns the JSON. Its standard error goes to `sys.stderr`, line by line.

    Ctrl-C stops the program as in a terminal: it finishes the current step, and prints what it keeps.

    Raises:
        GptqError: If the program reports an error.
        KeyboardInterrupt: After Ctrl-C.
    """
    with tempfile.TemporaryFile() as result:
        process = subprocess.Popen(
            [PROGRAM, *arguments, "--json"],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=result,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            # A terminal's Ctrl-C reaches Python alone, which passes it on once.
            start_new_session=True,
        )
        lines, interrupted = [], False
        with process:
            assert process.stderr
            while True:
                try:
                    for line in process.stderr:
                        lines.append(line.rstrip("\n"))
                        print(lines[-1], file=sys.stderr, flush=True)
                    break
                except KeyboardInterrupt:
                    process.send_signal(signal.SIGINT)
                    interrupted = True
        if interrupted:
            raise KeyboardInterrupt
        if process.returncode != 0:
            raise error_of(lines, process.returncode)
        result.seek(0)
        return json.load(result)


def error_of(lines: Sequence[str], exit_code: int) -> GptqError:
    """The error that the program's lines on standard error end with."""
    error = re.search(r"^error: (.*)", "\n".join(lines), re.DOTALL | re.MULTILINE)
    if error is None:
        return GptqError(f"gptq ended with exit code {exit_code} and no message", None, exit_code)
    # Errors in arguments have a tip, and the usage behind it.
    message, _, rest = error[1].partition("\n\n")
    message, _, hint = message.partition("\nhint: ")
    tip = re.match(r"\s*tip: (.*)", rest)
    return GptqError(message, hint or (tip[1] if tip else None), exit_code)
