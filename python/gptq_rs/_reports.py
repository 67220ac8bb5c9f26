"""The program's JSON reports as dataclasses. `Report.json` and `Evaluation.json` are the whole JSON."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval over windows."""

    value: float
    #: Half the width of the interval; none with a single window.
    margin: float | None


@dataclass(frozen=True)
class Reader:
    """Software that loads GPTQ checkpoints, and whether it loads this one."""

    name: str
    #: Whether this version is maintained and reads GPTQ.
    living: bool
    #: Why it does not load the checkpoint; none if it does.
    refused: str | None


@dataclass(frozen=True)
class Linear:
    """A solved linear of a branch."""

    name: str
    #: `‖(W−Ŵ)X‖/‖WX‖` on the calibration tokens.
    relative_error: float
    #: Damping, as a fraction of the mean diagonal of the Hessian.
    damp: float
    #: How often damping was raised.
    damp_raised: int
    #: Input features that are zero for all calibration tokens.
    dead_columns: int
    #: Largest over median diagonal element of the Hessian.
    outlier_ratio: float
    #: Lower bound of the condition number of the damped Hessian.
    condition_estimate: float
    seconds: float
    #: Output features that are rounded to nearest, because compensation would have made their error larger.
    uncompensated_features: int = 0
    #: Why the linear was rounded to nearest, if it was.
    fallback: str | None = None
    #: Calibration tokens of an expert's linear.
    tokens: int | None = None


@dataclass(frozen=True)
class Branch:
    """A branch: the folder of one variant."""

    branch: str
    variant: str
    #: Bytes of all files.
    bytes: int
    #: Bytes of all tensors.
    weight_bytes: int
    #: Bits per quantized weight, with scales, zeros and group indices.
    bits_per_weight: float
    seconds: float
    readers: list[Reader]
    linears: list[Linear]
    #: Significant bits of the scales, of the linear whose scales have the fewest.
    scale_bits: int | None = None


@dataclass(frozen=True)
class Model:
    """The model that was quantized."""

    name: str
    layers: int
    hidden_size: int
    parameters: int
    bytes: int
    linears: int | None = None


@dataclass(frozen=True)
class Calibration:
    """The calibration text."""

    #: Each text: name, repository, revision, files, digests, windows.
    sources: list[Json]
    #: SHA-256 of the token ids of the windows.
    sha256: str
    #: Windows.
    samples: int
    #: Tokens a window.
    seq_len: int


@dataclass(frozen=True)
class Compute:
    """Where a run computed."""

    device: str
    solver: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class EvaluatedModel:
    """The quality of one quantized model. Fields `window_…` have a value for each window."""

    name: str
    weight_bytes: int
    perplexity: Interval
    #: Perplexity minus the unquantized model's.
    perplexity_change: Interval
    #: Mean KL divergence from the unquantized model, nats.
    kl_divergence: Interval
    #: 99th percentile of the divergence over positions.
    kl_p99: float
    kl_max: float
    #: Share of positions at which both models' most likely token is the same.
    top1_agreement: Interval
    window_nll: list[float]
    window_kl: list[float]
    window_top1: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Quantized models against the unquantized one, on the same windows of one text."""

    dataset: str
    #: SHA-256 of the token ids of the windows.
    sha256: str
    #: How the figures were measured.
    protocol: str
    #: Name of the unquantized model.
    model: str
    model_digest: str
    #: Data type and device.
    compute: str
    windows: int
    seq_len: int
    stride: int
    #: Tokens scored in each window.
    window_tokens: list[int]
    #: Perplexity of the unquantized model.
    reference_perplexity: Interval
    #: Negative log-likelihood of the unquantized model in each window, nats.
    window_nll: list[float]
    models: list[EvaluatedModel]
    seconds: float
    #: All of the JSON.
    json: Json = dataclasses.field(repr=False, compare=False)


@dataclass(frozen=True)
class Report:
    """A run of `gptq quantize`: the content of `run.json`."""

    schema: str
    generated_by: str
    command: list[str]
    #: The settings of the run.
    plan: Json
    #: The accuracy options that were in force.
    accuracy: Json
    model: Model
    calibration: Calibration
    compute: Compute
    branches: list[Branch]
    #: Deviations from the plan.
    warnings: list[str]
    #: Seconds of the run, without evaluation.
    seconds: float
    journal_seconds: float
    layer_seconds: list[float]
    stage_seconds: dict[str, float]
    stage_memory_bytes: dict[str, int | None]
    peak_memory_bytes: int | None
    evaluations: list[Evaluation]
    #: All of the JSON.
    json: Json = dataclasses.field(repr=False, compare=False)


def read(kind: Any, value: Any) -> Any:
    """The JSON value as a `kind`: a dataclass, a list of them, or the value itself."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return [read(arguments[0], element) for element in value]
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return value
    hints = typing.get_type_hints(kind)
    fields = {name: read(hint, value[name]) for name, hint in hints.items() if name in value}
    if "json" in hints:
        fields["json"] = value
    return kind(**fields)
