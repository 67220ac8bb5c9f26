"""Make and evaluate GPTQ checkpoints with the program `gptq`, which is in this package.

In a checkout of the project, which has a small model:

    >>> import gptq_rs, tempfile
    >>> demo = "calibration/demo"
    >>> out = tempfile.mkdtemp() + "/branches"
    >>> report = gptq_rs.quantize(
    ...     model=demo, out=out, dataset=f"{demo}/calibration.parquet", samples=8, seq_len=128,
    ...     variants=["4bit-128g"], quality="fast", no_eval=True, quiet=True,
    ... )
    >>> [branch] = report.branches
    >>> branch.branch, branch.variant, len(branch.linears)
    ('main', '4bit-128g', 28)
    >>> [evaluation] = gptq_rs.evaluate(
    ...     model=demo, quantized=out, dataset=f"{demo}/evaluation.parquet", seq_len=128, windows=4, quiet=True,
    ... )
    >>> 0.0 < evaluation.models[0].kl_divergence.value < 0.1
    True

Errors have a message and a hint:

    >>> gptq_rs.quantize(model=demo, out=out, dataset=f"{demo}/calibration.parquet", seq_len=4096)
    Traceback (most recent call last):
    ...
    gptq_rs.GptqError: sequence length 4096 is above the model's max_position_embeddings 512
    hint: use --seq-len 512 or less; only a model whose rotary embedding is scaled takes more, with --allow-long-windows
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ._program import GptqError, run
from ._reports import (
    Branch,
    Calibration,
    Compute,
    EvaluatedModel,
    Evaluation,
    Interval,
    Linear,
    Model,
    Reader,
    Report,
    read,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Branch",
    "Calibration",
    "Compute",
    "EvaluatedModel",
    "Evaluation",
    "GptqError",
    "Interval",
    "Linear",
    "Model",
    "Plan",
    "Protocol",
    "Reader",
    "Report",
    "evaluate",
    "quantize",
]

Path = str | os.PathLike[str]
DType = Literal["auto", "fp32", "bf16", "fp16"]


class Plan(TypedDict, total=False):
    """Options of `gptq quantize`; its `--help` describes them."""

    act_group_aware: bool
    allow_long_windows: bool
    asymmetric: float
    cache_dir: Path
    compute_dtype: DType
    damp: float
    dataset: Path | list[Path]
    dataset_dir: Path | list[Path]
    device: str
    equalize: bool
    eval: Path | list[Path]
    eval_windows: int
    journal_dir: Path
    main: str
    max_device_memory: int | str
    max_memory: int | str
    max_shard_size: int | str
    no_cache: bool
    no_eval: bool
    on_failure: Literal["error", "rtn"]
    output_hessian: float
    plan: Path
    quality: Literal["fast", "standard", "best"]
    quiet: bool
    require_readers: str | list[str]
    restart: bool
    rotate: bool
    samples: int
    scale_search: Literal["off", "diagonal", "block"]
    seed: int
    seq_len: int
    set: Literal["card", "serve", "all"]
    shared_hessian: bool
    shrinkage: bool
    signed_scales: bool
    split: str
    text_column: str
    variants: str | list[str]
    verbose: bool


class Protocol(TypedDict, total=False):
    """Options of `gptq eval`; its `--help` describes them."""

    allow_long_windows: bool
    cache_dir: Path
    compute_dtype: DType
    dataset: Path | list[Path]
    dataset_dir: Path | list[Path]
    device: str
    dump_logits: Path
    no_cache: bool
    no_save: bool
    quiet: bool
    seq_len: int | list[int]
    split: str
    stride: int
    text_column: str
    verbose: bool
    windows: int


# Options of the program whose presence is their value.
_FLAGS = {
    "allow_long_windows",
    "no_cache",
    "no_eval",
    "no_save",
    "quiet",
    "restart",
    "shared_hessian",
    "verbose",
}
# Options that have another name in a plan.
_NAMES = {"variants": "variant", "require_readers": "require_reader"}


def quantize(model: Path, out: Path, **plan: Unpack[Plan]) -> Report:
    """Quantizes a model into a folder for each variant, all below `out`: `gptq quantize`.

    Args:
        model: Folder of the fp16, bf16 or fp32 checkpoint, or `OWNER/NAME` on the Hub.
        out: Folder for the branches; must not exist. The same call resumes an interrupted run.
        plan: Options of the program, with `_` for `-`. Options that can be repeated take a list.

    Raises:
        GptqError: If the program reports an error.
    """
    report: Report = read(Report, run(["quantize", *_arguments({"model": model, "out": out, **plan})]))
    return report


def evaluate(model: Path, quantized: Path | list[Path], **protocol: Unpack[Protocol]) -> list[Evaluation]:
    """Compares quantized models with the unquantized one: `gptq eval`.

    Args:
        model: Folder of the unquantized checkpoint, or `OWNER/NAME` on the Hub.
        quantized: Folders of quantized checkpoints or of runs, or `OWNER/NAME:BRANCH` on the Hub.
        protocol: Options of the program, with `_` for `-`. Options that can be repeated take a list.

    Returns:
        An evaluation of all models for each text and window length.

    Raises:
        GptqError: If the program reports an error.
    """
    result = run(["eval", *_arguments({"model": model, "quantized": quantized, **protocol})])
    evaluations: list[Evaluation] = read(list[Evaluation], result["evaluations"])
    return evaluations


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """The options as the program's arguments."""
    arguments = []
    for name, value in options.items():
        option = f"--{_NAMES.get(name, name).replace('_', '-')}"
        if name == "signed_scales":
            arguments.append("--signed-scales" if value else "--unsigned-scales")
        elif name in _FLAGS:
            arguments += [option] if value else []
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                arguments.append(f"{option}={str(each).lower() if isinstance(each, bool) else each}")
    return arguments
