"""Tests of the installed Python package: its examples, and what they do not show. Needs the checkout for the demo model."""

import contextlib
import doctest
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import gptq_rs
from gptq_rs import _program

ROOT = Path(__file__).resolve().parents[2]
DEMO = "calibration/demo"


def help_of(command):
    """The long options that a command's help names."""
    help = subprocess.run([sys.executable, "-m", "gptq_rs", command, "--help"], capture_output=True, text=True, check=True)
    return {name.replace("-", "_") for name in re.findall(r"^ +(?:-\w, )?--([a-z-]+)", help.stdout, re.MULTILINE)}


def test_the_examples():
    failed, tried = doctest.testmod(gptq_rs)
    assert tried > 5 and not failed, (tried, failed)


def test_every_option_has_its_type():
    for options, command, others in [
        (gptq_rs.Plan, "quantize", {"model", "out", "json", "help", "unsigned_scales"}),
        (gptq_rs.Protocol, "eval", {"model", "quantized", "json", "help"}),
    ]:
        typed = {gptq_rs._NAMES.get(name, name) for name in options.__annotations__}
        shown = help_of(command) - others
        assert typed == shown, (command, typed ^ shown)


def test_arguments():
    given = {"rotate": False, "restart": False, "no_eval": True, "variants": ["a", "b"], "model": Path("m"), "damp": 0.1}
    expected = ["--rotate=false", "--no-eval", "--variant=a", "--variant=b", "--model=m", "--damp=0.1"]
    assert gptq_rs._arguments(given) == expected
    assert gptq_rs._arguments({"signed_scales": False}) == ["--unsigned-scales"]


def test_errors():
    def error(**plan):
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            try:
                gptq_rs.quantize(model=DEMO, out="nowhere", **plan)
            except gptq_rs.GptqError as error:
                return error, printed.getvalue()
        raise AssertionError("no error")

    found, printed = error(dataset="missing.txt", seq_len=64)
    assert found.exit_code == 2 and "missing.txt" in found.message, found
    assert "\nerror: " + found.message in printed, printed
    found, _ = error(smaples=3)
    assert (found.message, found.hint) == (
        "unexpected argument '--smaples' found",
        "a similar argument exists: '--samples'",
    )


def test_a_torch_of_another_version():
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "site/gptq_rs")
        torch = Path(folder, "site/torch")
        (torch / "lib").mkdir(parents=True)
        (torch / "lib/libtorch_cpu.so").touch()
        (torch / "version.py").write_text("__version__ = '2.12.0+cpu'\n")
        kept, _program.PACKAGE = _program.PACKAGE, package
        try:
            _program.environment()
        except gptq_rs.GptqError as error:
            assert "is 2.12.0+cpu, and gptq needs 2.11" in error.message and "2.11" in error.hint, error
        else:
            raise AssertionError("no error")
        finally:
            _program.PACKAGE = kept


def test_a_torch_in_another_place():
    """The program starts with the libraries of a PyTorch that is not beside the package."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(_program.PACKAGE, Path(folder, "gptq_rs"))
        variables = {**os.environ, "PYTHONPATH": folder}
        version = subprocess.run(
            [sys.executable, "-m", "gptq_rs", "--version"], env=variables, capture_output=True, text=True, check=True, cwd=folder
        )
        assert version.stdout.startswith("gptq "), version


def test_ctrl_c_stops_the_run_and_keeps_the_layers():
    # A shell starts programs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        # After the first layer.
        class Watch(io.StringIO):
            def write(self, text):
                if text.startswith("layer 1/"):
                    threading.Timer(0.0, os.kill, [os.getpid(), signal.SIGINT]).start()
                return super().write(text)

        with contextlib.redirect_stderr(Watch()) as printed:
            try:
                gptq_rs.quantize(
                    model=DEMO, out=f"{folder}/out", dataset=f"{DEMO}/calibration.parquet", samples=32, seq_len=512, no_eval=True
                )
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("not interrupted")
        assert "layers are kept in" in printed.getvalue(), printed.getvalue()


def main():
    os.chdir(ROOT)
    tests = {name: test for name, test in globals().items() if name.startswith("test_")}
    for name, test in tests.items():
        test()
        print(f"  {name}")
    print(f"{len(tests)} passed, 0 failed")


if __name__ == "__main__":
    main()
