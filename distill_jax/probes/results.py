"""Results of probes as JSON and back: numbers as V of `summary.json`, {"mean", "ci95", "n", "seeds"}."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from distill_jax.probes.decoding import Decoding
from distill_jax.probes.gap import Gap
from distill_jax.probes.off_policy import OffPolicy
from distill_jax.probes.overconfidence import Overconfidence
from distill_jax.probes.self_correction import SelfCorrection
from distill_jax.probes.tail_noise import TailNoise
from distill_jax.probes.values import Value

Result = TailNoise | OffPolicy | Gap | Overconfidence | SelfCorrection | Decoding

RESULTS: dict[str, type[Any]] = {
    "tail_noise": TailNoise,
    "off_policy": OffPolicy,
    "gap": Gap,
    "overconfidence": Overconfidence,
    "self_correction": SelfCorrection,
    "decoding": Decoding,
}


def probe_of(result: Result) -> str:
    """The name of the probe that a result is of.

    Raises:
      TypeError: not a result of a probe.
    """
    for name, kind in RESULTS.items():
        if type(result) is kind:
            return name
    raise TypeError(f"expected the result of a probe ({', '.join(RESULTS)}), got {type(result).__name__}")


def value_to_json(value: Value) -> dict[str, Any]:
    """V. Raises ValueError for a number that JSON has no name for (NaN, infinity)."""
    numbers = [value.mean, *value.ci95, *(value.seeds or ())]
    if any(number is not None and not math.isfinite(number) for number in numbers):
        raise ValueError(f"a value must be finite or None, got {value}")
    seeds = None if value.seeds is None else list(value.seeds)
    return {"mean": value.mean, "ci95": list(value.ci95), "n": value.n, "seeds": seeds}


def value_from_json(data: Any, where: str = "value") -> Value:
    """Reads V. Raises ValueError, with `where`, for anything else."""
    if not isinstance(data, Mapping) or set(data) != {"mean", "ci95", "n", "seeds"} or len(data["ci95"]) != 2:
        raise ValueError(f'{where}: expected {{"mean", "ci95": [low, high], "n", "seeds"}}, got {data!r}')
    seeds = None if data["seeds"] is None else tuple(data["seeds"])
    return Value(data["mean"], (data["ci95"][0], data["ci95"][1]), int(data["n"]), seeds)


def to_json(result: Result) -> dict[str, Any]:
    """A result as plain data.

    Returns:
      {"probe": name, "metrics": {metric: V}, "facts": {name: text or number}, "notes": [text]}. A mapping becomes one
      metric a key, joined by a dot: "forward_tail.64". `metrics` is what `summary.json` holds under "probes".

    Raises:
      TypeError: not a result of a probe. ValueError: a number that is not finite.
    """
    metrics: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Value):
            metrics[field.name] = value_to_json(value)
        elif isinstance(value, Mapping):
            metrics |= {f"{field.name}.{key}": value_to_json(inner) for key, inner in value.items()}
        elif field.name != "notes":
            facts[field.name] = value
    return {"probe": probe_of(result), "metrics": metrics, "facts": facts, "notes": list(result.notes)}


def from_json(data: Mapping[str, Any]) -> Result:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: an unknown probe, or metrics that are missing, unexpected, or not V.
    """
    name = data.get("probe")
    if name not in RESULTS:
        raise ValueError(f"unknown probe {name!r}; expected one of {', '.join(RESULTS)}")
    kind = RESULTS[name]
    fields: dict[str, Any] = {**data["facts"], "notes": tuple(data["notes"])}
    mappings = {field.name for field in dataclasses.fields(kind) if "Mapping" in str(field.type)}
    fields |= {field: {} for field in mappings}
    for metric, value in data["metrics"].items():
        field, _, key = metric.partition(".")
        if field in mappings:
            fields[field][key] = value_from_json(value, f"{name}.{metric}")
        else:
            fields[field] = value_from_json(value, f"{name}.{metric}")
    expected = {field.name for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(kind):  # one that came later, with a default, may be absent
        if field.name not in fields and field.default is not dataclasses.MISSING:
            fields[field.name] = field.default
    if set(fields) != expected:
        raise ValueError(
            f"{name}: missing {sorted(expected - set(fields))}, unexpected {sorted(set(fields) - expected)}; the "
            "file is of another version"
        )
    result: Result = kind(**fields)
    return result
