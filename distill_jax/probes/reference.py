"""What untouched models look like: the reference that a suspect is compared with, and its file.

A model is a row of features. With N untouched rows and F features

    z_f   = (x_f - median_f) / s_f,     s_f = root mean square distance of the N rows from the median
    R     = (1 - lambda) correlation of the z + lambda I
    score = sqrt( z' R^-1 z / F )

a Mahalanobis distance in root mean square standard deviations: about 1 for a model of the reference's own kind. lambda
is the shrinkage that minimises the expected squared error of R (Schaefer and Strimmer, Statistical Applications in
Genetics and Molecular Biology 4 (2005) 32), never less than `LEAST_SHRINKAGE`: a handful of models does not estimate a
correlation, and two features that move together must not make each other infinitely surprising.

**The threshold** is read off the untouched models themselves. Each gets the score that the N - 1 others give it; of
these N scores, the ceil((1 - a)(N + 1))-th smallest is what an untouched model exceeds with probability a at most, if
it is one of their kind (a conformal quantile: no normal distribution is assumed). So N models can promise no
false-alarm rate below 1 / (N + 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.checkpoint import read_json, write_json

VERSION = 1
FEWEST_ROWS = 4
LEAST_SHRINKAGE = 0.1
# In all features' units (nats a byte, shares, log bytes) a difference that is of no interest, however alike the
# reference's models are.
RESOLUTION = 0.02
DEFAULT_FALSE_ALARM = 0.05


@dataclasses.dataclass(frozen=True)
class FeatureRow:
    """One model.

    Attributes:
      name: of the model, for people.
      kind: "untouched" belongs to the reference; any other word ("distillable", "undistillable") is a positive of ROCs.
      features: name -> value, None where it could not be measured.
    """

    name: str
    kind: str
    features: Mapping[str, float | None]

    @property
    def untouched(self) -> bool:
        """Whether the row belongs to the reference."""
        return self.kind == UNTOUCHED


UNTOUCHED = "untouched"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How rows were measured; features measured in another way cannot be compared with them.

    Attributes:
      task, options: of the registry.
      problems, samples: how many, and completions of each.
      max_new_tokens: of a completion.
      style, proxy_style, system: see `subjects.Subject`.
      original: whether the claimed original was given.
      seed: of problems and samples.
    """

    task: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problems: int = 64
    samples: int = 4
    max_new_tokens: int = 128
    style: str = "auto"
    proxy_style: str = "auto"
    system: str | None = None
    original: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.problems, self.samples, self.max_new_tokens) < 1:
            raise ValueError(f"problems, samples and max_new_tokens must be at least 1, got {self}")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A fitted reference.

    Attributes:
      names: the F features, in order.
      centre, spread: f64[F], median and s_f.
      correlation: f64[F, F], R. shrinkage: lambda.
      threshold: an untouched model's score exceeds it with probability `false_alarm` at most.
      held_out: f64[N], score of each row by the others, ascending.
      dropped: features that some row does not have, left out.
    """

    names: tuple[str, ...]
    centre: np.ndarray
    spread: np.ndarray
    correlation: np.ndarray
    shrinkage: float
    threshold: float
    false_alarm: float
    held_out: np.ndarray
    dropped: tuple[str, ...]

    def standardise(self, features: Mapping[str, float | None]) -> dict[str, float]:
        """name -> z, of the features that the model has."""
        return {
            name: (float(value) - self.centre[i]) / self.spread[i]
            for i, name in enumerate(self.names)
            if (value := features.get(name)) is not None
        }

    def score(self, features: Mapping[str, float | None]) -> float:
        """The distance; over the features that the model has.

        Raises:
          ValueError: it has none of them, or one that is not finite.
        """
        values = {name: np.array([features.get(name)], np.float64) for name in self.names}
        usable = {name: value for name, value in values.items() if not np.isnan(value[0])}
        score = float(self.scores(usable)[0])
        if not math.isfinite(score):
            raise ValueError(f"features must be finite, got {dict(features)}")
        return score

    def scores(self, draws: Mapping[str, np.ndarray]) -> np.ndarray:
        """f64[R] scores of R draws of the features: name -> f64[R]. NaN in a draw gives NaN.

        Raises:
          ValueError: none of the reference's features is there.
        """
        here = [i for i, name in enumerate(self.names) if name in draws]
        if not here:
            raise ValueError(f"the model has none of the reference's features {self.names}")
        x = np.stack([draws[self.names[i]] for i in here])
        z = (x - self.centre[here, None]) / self.spread[here, None]
        return np.sqrt((z * np.linalg.solve(self.correlation[np.ix_(here, here)], z)).sum(axis=0) / len(here))

    def p_value(self, score: float) -> float:
        """(1 + untouched models with at least this score) / (N + 1)."""
        return (1 + int((self.held_out >= score).sum())) / (len(self.held_out) + 1)


def fit_reference(rows: Sequence[FeatureRow], false_alarm: float | None = None) -> Reference:
    """Fits the untouched rows; see the head of this file.

    Args:
      rows: of which the untouched ones are used.
      false_alarm: a; None is the smallest rate that so many models can promise, but no less than .05.

    Raises:
      ValueError: fewer than `FEWEST_ROWS` untouched rows, a rate that they cannot promise (it says how many would), a
        value that is not finite, or no feature that all have.
    """
    used = [row for row in rows if row.untouched]
    if len(used) < FEWEST_ROWS:
        raise ValueError(
            f"a reference needs at least {FEWEST_ROWS} untouched models, got {len(used)} of {len(rows)} rows"
        )
    least = 1.0 / (len(used) + 1)
    rate = max(DEFAULT_FALSE_ALARM, least) if false_alarm is None else false_alarm
    if not least <= rate < 1.0:
        raise ValueError(
            f"a false-alarm rate of {rate:g} cannot be promised with {len(used)} untouched models: it must be at "
            f"least 1 / {len(used) + 1} and below 1"
            + (f"; {math.ceil(1 / rate) - 1} models would do" if 0 < rate < least else "")
        )
    known = {name for row in used for name in row.features}
    names = tuple(sorted(n for n in known if all(row.features.get(n) is not None for row in used)))
    if not names:
        raise ValueError("there is no feature that all untouched models have")
    table = np.array([[row.features[name] for name in names] for row in used], np.float64)
    if not np.isfinite(table).all():
        bad = used[int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])]
        raise ValueError(f"features must be finite, got {dict(bad.features)} in row {bad.name!r}")
    rest = np.arange(len(table))
    held_out = np.sort([_distance(table[rest != i], table[i]) for i in rest])
    place = math.ceil((1 - rate) * (len(table) + 1) - 1e-9)
    centre, spread, correlation, shrinkage = _fit(table)
    return Reference(
        names,
        centre,
        spread,
        correlation,
        shrinkage,
        float(held_out[place - 1]),
        rate,
        held_out,
        tuple(sorted(known - set(names))),
    )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows judged by references that do not know them.

    Attributes:
      scores: f64[N]. alarms: bool[N], beyond the threshold of the same reference.
      false_alarm: the rate that every one of these thresholds promises.
    """

    scores: np.ndarray
    alarms: np.ndarray
    false_alarm: float


def held_out(rows: Sequence[FeatureRow], groups: Sequence[Any] | None = None) -> HeldOut:
    """Judges every row by the untouched rows of other groups; what a ROC and a detection rate take.

    Args:
      rows: of any kind.
      groups: one a row. Rows of one group have something in common that a suspect does not have with its reference (a
        seed, a base model), so a group leaves the reference as a whole when one of it is judged, whether it is
        untouched or not. None: every untouched row is a group, and other rows are judged by all untouched ones.

    Raises:
      ValueError: see `fit_reference`, of what is left without a group.
    """
    names = [f"row {i}" for i in range(len(rows))] if groups is None else [str(group) for group in groups]
    if len(names) != len(rows):
        raise ValueError(f"expected one group a row, got {len(names)} for {len(rows)} rows")
    rest = {
        name: [r for r, of in zip(rows, names, strict=True) if of != name] for name in dict.fromkeys(names)
    }
    fewest = min((sum(row.untouched for row in left) for left in rest.values()), default=0)
    rate = max(DEFAULT_FALSE_ALARM, 1.0 / (fewest + 1))
    references = {name: fit_reference(left, rate) for name, left in rest.items()}
    scores = np.array([references[name].score(r.features) for r, name in zip(rows, names, strict=True)])
    limits = np.array([references[name].threshold for name in names])
    return HeldOut(scores, scores > limits, rate)


def _fit(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(centre f64[F], spread f64[F], R f64[F, F], lambda) of f64[N, F]."""
    count = len(table)
    centre = np.median(table, axis=0)
    away = table - centre
    spread = np.maximum(np.sqrt((away**2).sum(axis=0) / (count - 1)), RESOLUTION)
    z = away / spread
    products = z[:, :, None] * z[:, None, :]  # [N, F, F]
    mean = products.mean(axis=0)
    correlation = mean * count / (count - 1)
    variance = ((products - mean) ** 2).sum(axis=0) * count / (count - 1) ** 3
    off = ~np.eye(table.shape[1], dtype=bool)
    signal = (correlation[off] ** 2).sum()
    shrinkage = float(np.clip(variance[off].sum() / signal, LEAST_SHRINKAGE, 1.0)) if signal > 0 else 1.0
    shrunken = (1 - shrinkage) * correlation
    np.fill_diagonal(shrunken, 1.0)
    return centre, spread, shrunken, shrinkage


def _distance(table: np.ndarray, row: np.ndarray) -> float:
    centre, spread, correlation, _ = _fit(table)
    z = (row - centre) / spread
    return float(np.sqrt(z @ np.linalg.solve(correlation, z) / len(z)))


def write_reference(path: str | Path, setting: Setting, rows: Sequence[FeatureRow]) -> None:
    """Writes rows with how they were measured: what `read_reference` reads."""
    write_json(
        path,
        {
            "version": VERSION,
            "setting": dataclasses.asdict(setting),
            "rows": [{"name": r.name, "kind": r.kind, "features": dict(r.features)} for r in rows],
        },
    )


def read_reference(path: str | Path) -> tuple[Setting, tuple[FeatureRow, ...]]:
    """Reads what `write_reference` wrote.

    Raises:
      FileNotFoundError: there is no such file. ValueError: it is no reference, with the place that is wrong.
    """
    data = read_json(path)
    if not isinstance(data, Mapping) or not {"version", "setting", "rows"} <= set(data):
        raise ValueError(f"{path} is no reference of the detector: expected version, setting and rows")
    if data["version"] != VERSION:
        raise ValueError(
            f"{path} is version {data['version']!r} of the format, expected {VERSION}; make it again"
        )
    fields = {field.name for field in dataclasses.fields(Setting)}
    given = data["setting"]
    if not isinstance(given, Mapping) or set(given) != fields:
        raise ValueError(f"{path}: setting must have the fields {sorted(fields)}, got {given!r}")
    if not isinstance(data["rows"], list):
        raise ValueError(f"{path}: rows must be a list, got {type(data['rows']).__name__}")
    return Setting(**given), tuple(_row(item, f"{path}: row {i}") for i, item in enumerate(data["rows"]))


def _row(item: Any, where: str) -> FeatureRow:
    if not isinstance(item, Mapping) or set(item) != {"name", "kind", "features"}:
        raise ValueError(f'{where} must be {{"name", "kind", "features"}}, got {item!r}')
    features = item["features"]
    if not isinstance(features, Mapping) or not features:
        raise ValueError(f"{where}: features must be named numbers, got {features!r}")
    for name, value in features.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where}: feature {name!r} must be a number or null, got {value!r}")
    return FeatureRow(str(item["name"]), str(item["kind"]), dict(features))
