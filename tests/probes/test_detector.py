"""The detector: scores and areas by hand, planted calibrations, models that are written down, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from distill_jax import detect
from distill_jax.checkpoint import read_json, write_json
from distill_jax.models.model import save_model
from distill_jax.pipeline.detector_reference import curves, curves_text
from distill_jax.probes import detector
from distill_jax.probes.detector import FeatureRow, Setting, fit_reference, roc
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.texts import TextPair, Texts
from distill_jax.tasks.base import TASKS, Problem, get_task
from tests.probes.bigram_models import EOS, bigram, probabilities, random_table, uniform

CONFIG = ProbeConfig(batch_size=4, chunk=4, resamples=200, unaligned_limit=0.5)


def row(gap: float | None, kind: str = "untouched", **others: float | None) -> FeatureRow:
    return FeatureRow(f"gap {gap}", kind, {"gap": gap, **others})


def planted(kind: str, count: int, gap: float, seed: int) -> list[FeatureRow]:
    """Models whose gap and its spread scatter by .1 around `gap` and .5, and move together."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=count), rng.normal(size=count)
    return [
        row(gap + 0.1 * a, kind, gap_spread=0.5 + 0.08 * a + 0.06 * b)
        for a, b in zip(common, own, strict=True)
    ]


def test_a_score_by_hand() -> None:
    """Gaps 0, 1, 2, 3, 9: median 2, mean squares (4 + 1 + 0 + 1 + 49) / 4, so one deviation is sqrt(13.75)."""
    reference = fit_reference([row(g) for g in (0.0, 9.0, 1.0, 3.0, 2.0)], false_alarm=0.5)
    deviation = math.sqrt(13.75)
    assert reference.centre[0] == 2.0 and reference.spread[0] == pytest.approx(deviation)
    assert reference.score({"gap": 7.0}) == pytest.approx(5.0 / deviation)
    assert reference.score({"gap": -3.0}) == pytest.approx(5.0 / deviation)
    # The 9 by 0, 1, 2, 3: median 1.5, mean squares (2.25 + .25 + .25 + 2.25) / 3.
    assert reference.held_out[-1] == pytest.approx(7.5 / math.sqrt(5 / 3))
    # ceil(.5 * 6) = the third smallest of five; at one in six it is the largest.
    assert reference.threshold == reference.held_out[2]
    assert fit_reference([row(g) for g in (0.0, 9.0, 1.0, 3.0, 2.0)]).threshold == reference.held_out[-1]
    assert reference.p_value(reference.held_out[-1]) == pytest.approx(2 / 6)
    assert reference.p_value(100.0) == pytest.approx(1 / 6)


def test_two_features_that_move_together_by_hand() -> None:
    """R = [[1, r], [r, 1]]: z' R^-1 z = (a^2 - 2 r a b + b^2) / (1 - r^2), over two features."""
    rows = planted("untouched", 40, 1.0, 0)
    reference = fit_reference(rows)
    r = reference.correlation[0, 1]
    table = np.array([list(x.features.values()) for x in rows])
    away = table - np.median(table, axis=0)
    plain = (away[:, 0] * away[:, 1]).sum() / np.sqrt((away**2).sum(axis=0).prod())
    assert r == pytest.approx((1 - reference.shrinkage) * plain) and 0.5 < r < plain
    a, b = reference.standardise({"gap": 1.3, "gap_spread": 0.3}).values()
    expected = math.sqrt((a * a - 2 * r * a * b + b * b) / (1 - r * r) / 2)
    assert reference.score({"gap": 1.3, "gap_spread": 0.3}) == pytest.approx(expected)
    # Against the grain is further away than along it, though each feature alone is as far.
    assert reference.score({"gap": 1.3, "gap_spread": 0.3}) > reference.score({"gap": 1.3, "gap_spread": 0.7})


def test_models_that_are_all_alike_do_not_make_a_hair_suspicious() -> None:
    reference = fit_reference([row(1.0, gap_spread=0.5)] * 8)
    assert reference.score({"gap": 1.001, "gap_spread": 0.5}) < 0.1
    assert reference.shrinkage == 1.0


def test_the_false_alarm_rate_is_kept() -> None:
    """Of 200 references of 19 untouched models each, one more untouched model passes the threshold about .05 times."""
    alarms = []
    for seed in range(200):
        rows = planted("untouched", 20, 1.0, seed)
        reference = fit_reference(rows[:19])
        alarms.append(reference.score(rows[19].features) > reference.threshold)
    assert reference.false_alarm == 0.05 and 0.0 < np.mean(alarms) < 0.1


def test_planted_calibrations_are_told_apart() -> None:
    rows = planted("untouched", 12, 1.0, 0)
    rows += planted("undistillable", 6, 1.6, 1) + planted("distillable", 6, 0.4, 2)
    result = curves(rows)
    for kind, positives in {"calibrated": 12, "undistillable": 6, "distillable": 6}.items():
        curve = result["roc"][kind]
        assert curve["auc"] > 0.95 and curve["positives"] == positives and curve["negatives"] == 12
        assert curve["ci95"][0] > 0.7 and curve["ci95"][1] <= 1.0
    same = curves(planted("untouched", 12, 1.0, 0) + planted("distillable", 12, 1.0, 5))
    assert 0.2 < same["roc"]["distillable"]["auc"] < 0.8
    json.dumps(result, allow_nan=False)
    assert set(curves(planted("untouched", 6, 1.0, 0))["roc"]) == set()


def test_the_area_by_hand() -> None:
    """Positives 3, 2, 2 against 2, 1: of six pairs four are won and two are ties, so 5 / 6."""
    curve = roc([3.0, 2.0, 2.0, 2.0, 1.0], [True, True, True, False, False])
    assert curve.auc == pytest.approx(5 / 6)
    assert curve.fpr.tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0])
    assert curve.tpr.tolist() == pytest.approx([0.0, 1 / 3, 1.0, 1.0])
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(curve.auc)
    turned = roc([-3.0, -2.0, -2.0, -2.0, -1.0], [1, 1, 1, 0, 0])
    assert turned.auc == pytest.approx(1 - curve.auc)
    assert turned.ci95 == pytest.approx((1 - curve.ci95[1], 1 - curve.ci95[0]), abs=1e-6)


def test_the_area_is_that_of_scipy_and_its_interval_knows_how_many_there_are() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2 == 0
    scores = rng.normal(size=40) + labels
    statistic = mannwhitneyu(scores[labels], scores[~labels]).statistic
    curve = roc(scores, labels)
    assert curve.auc == pytest.approx(statistic / 400)
    low, high = curve.ci95
    z, k, theta = 1.959964, 19.0, low  # the defining equation, at the lower end
    variance = theta * (1 - theta) * (1 + k * (1 - theta) / (2 - theta) + k * theta / (1 + theta)) / 400
    assert curve.auc - low == pytest.approx(z * math.sqrt(variance), rel=1e-4) and low < curve.auc < high
    few, many = (roc(np.arange(2 * n), np.arange(2 * n) >= n) for n in (3, 30))
    assert few.auc == many.auc == few.ci95[1] == 1.0
    assert few.ci95[0] < 0.6 < 0.9 < many.ci95[0]


def test_a_row_is_judged_without_its_group() -> None:
    """Gaps 0, 1, 2, 3 and the pair 9, 9.5 of one group: with its twin in the reference, 9 would look less odd."""
    rows = [row(g) for g in (0.0, 1.0, 2.0, 3.0, 9.0, 9.5)] + [row(20.0, "distillable")]
    groups = ["a", "b", "c", "d", "e", "e", "e"]
    apart, alone = detector.held_out(rows, groups), detector.held_out(rows)
    # By 0, 1, 2, 3: median 1.5, mean squares (2.25 + .25 + .25 + 2.25) / 3.
    assert apart.scores[4] == pytest.approx(7.5 / math.sqrt(5 / 3)) and apart.scores[4] > alone.scores[4]
    assert apart.scores[6] == pytest.approx(18.5 / math.sqrt(5 / 3))
    assert apart.alarms[[4, 5, 6]].all() and apart.false_alarm == pytest.approx(1 / 5)
    assert alone.false_alarm == pytest.approx(1 / 6)
    assert alone.scores[6] == pytest.approx(fit_reference(rows).score({"gap": 20.0}))
    with pytest.raises(ValueError, match="at least 4 untouched models, got 3"):
        detector.held_out(rows, ["a", "a", "a", "d", "e", "f", "e"])
    with pytest.raises(ValueError, match="one group a row, got 1 for 7 rows"):
        detector.held_out(rows, ["a"])


def test_detection_rates_are_shares_of_the_alarms() -> None:
    rows = planted("untouched", 12, 1.0, 0) + planted("undistillable", 6, 1.9, 1)
    result = curves(rows)
    rates, alarms = result["detection"], [s["alarm"] for s in result["scores"]]
    assert rates["false_alarm"] == pytest.approx(1 / 12)  # of eleven others
    assert rates["untouched"]["rate"] == sum(alarms[:12]) / 12 and rates["untouched"]["n"] == 12
    assert rates["undistillable"]["rate"] == sum(alarms[12:]) / 6 == 1.0
    # Six of six: the exact lower bound is .025 ** (1 / 6).
    assert rates["undistillable"]["ci95"] == pytest.approx([0.025 ** (1 / 6), 1.0])
    text = curves_text(result)
    assert "found 6 of 6 (100% [54%, 100%])" in text and "promises 8.3% at most" in text
    with pytest.raises(ValueError, match="got 3 of 2"):
        detector.share(3, 2)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [True], "one score and one label a model"),
        ([1.0, math.nan], [True, False], "scores must be finite, got nan"),
        ([1.0, 2.0], [True, True], "got 2 positives and 0 negatives"),
        ([1.0, 2.0], [2, 0], "labels are True or False"),
    ],
)
def test_a_roc_that_is_none_is_refused(scores: list[float], labels: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roc(scores, labels)


@pytest.mark.parametrize(
    ("rows", "rate", "message"),
    [
        (
            [row(1.0)] * 3 + [row(2.0, "distillable")] * 9,
            None,
            "at least 4 untouched models, got 3 of 12 rows",
        ),
        ([row(1.0)] * 9, 0.05, "at least 1 / 10 and below 1; 19 models would do"),
        ([row(1.0)] * 9, 1.0, "cannot be promised"),
        ([row(1.0)] * 4 + [row(math.inf)], None, "must be finite, .* in row 'gap inf'"),
        ([row(1.0)] * 4 + [row(None)], None, "no feature that all untouched models have"),
    ],
)
def test_a_reference_that_promises_nothing_is_refused(
    rows: list[FeatureRow], rate: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_reference(rows, rate)


def test_a_feature_that_is_missing_somewhere() -> None:
    rows = [row(float(g), wrong_preference=None if g == 2 else 0.5) for g in range(5)]
    reference = fit_reference(rows)
    assert reference.names == ("gap",) and reference.dropped == ("wrong_preference",)
    both = fit_reference(planted("untouched", 8, 1.0, 0))
    assert both.score({"gap": 1.5}) == pytest.approx(abs(both.standardise({"gap": 1.5})["gap"]))
    with pytest.raises(ValueError, match="none of the reference's features"):
        both.score({"length": 1.0})


def test_a_reference_comes_back_from_its_file(tmp_path: Path) -> None:
    setting, rows = (
        Setting("chain_arithmetic", {"operations": [1, 2]}, original=True),
        planted("x", 3, 1.0, 0),
    )
    path = tmp_path / "reference.json"
    detector.write_reference(path, setting, [*rows, row(None)])
    assert detector.read_reference(path) == (setting, (*rows, row(None)))
    good = read_json(path)
    for change, message in (
        ({"version": 7}, "version 7 of the format, expected 1"),
        ({"setting": {"task": "x"}}, "setting must have the fields"),
        ({"rows": {}}, "rows must be a list, got dict"),
        ({"rows": [{"name": "a"}]}, "row 0 must be"),
        ({"rows": [{"name": "a", "kind": "b", "features": {"gap": "1"}}]}, "'gap' must be a number or null"),
        ({"rows": [{"name": "a", "kind": "b", "features": {}}]}, "features must be named numbers"),
    ):
        write_json(path, good | change)
        with pytest.raises(ValueError, match=message):
            detector.read_reference(path)
    write_json(path, [1])
    with pytest.raises(ValueError, match="no reference of the detector"):
        detector.read_reference(path)


# Models that are written down: see bigram_models.

OWN = Texts(tuple("aabb"), ("c", "cc", "d", "cd"), [True] * 4)
SMALL = Texts(tuple("aabb"), ("c", "d", "c", "d"), [True] * 4, correct=[True, False] * 2)


def test_features_by_hand() -> None:
    model, proxy, original = random_table(1), random_table(2), random_table(3)
    found = detector.features(
        bigram(model),
        bigram(proxy),
        TextPair(OWN, SMALL),
        original=bigram(original),
        original_texts=SMALL,
        config=CONFIG,
    )
    p, q, o = (np.log(probabilities(table)) for table in (model, proxy, original))

    def total(table: np.ndarray, texts: Texts) -> np.ndarray:
        paths = [
            [*("abcdef".index(x) for x in a + b), EOS]
            for a, b in zip(texts.questions, texts.completions, strict=True)
        ]
        return np.array([sum(table[x] for x in itertools.pairwise(path)) for path in paths])

    width = np.array([1, 2, 1, 2])
    gaps = (total(p, OWN) - total(q, OWN)) / width
    scores = total(p, SMALL) - total(q, SMALL)
    expected = {
        "gap": (gaps * width).sum() / 6,
        "gap_spread": gaps.std(),
        "own_surprise": -total(p, OWN).sum() / 6,
        "reverse_gap": -scores.sum() / 4,
        "wrong_preference": ((scores[1] > scores[0]) + 0.0 + (scores[3] > scores[2])) / 2,
        "log_bytes": math.log(6 / 4),
        "log_ratio": (total(p, OWN) - total(o, OWN)).sum() / 6,
        "gap_shift": (total(o, OWN) - total(q, OWN)).sum() / 6
        - (total(o, SMALL) - total(q, SMALL)).sum() / 4,
    }
    assert set(expected) == set(detector.FEATURES)
    assert {k: v.mean for k, v in found.values.items()} == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found.notes == () and all(value.n == 2 for value in found.values.values())


class Letters:
    """Asks "a" or "b"; an answer that holds a c is right."""

    name, failures = "letters", 0

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        return [Problem("ab"[i % 2] * (1 + i // 2), "c", "c", i) for i in range(count)]

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        return float("c" in completion)


SETTING = Setting("letters", problems=4, samples=3, max_new_tokens=4, style="raw", proxy_style="raw")


@pytest.fixture(scope="module")
def letters() -> list[FeatureRow]:
    """Untouched models: near-uniform tables of their own, sampled and measured as any model is."""
    proxy, task = bigram(uniform()), Letters()
    problems = task.problems("test", 4, 0)
    small = detector.sample_texts(proxy, task, problems, SETTING)
    rows = []
    for seed in range(6):
        subject = bigram(random_table(seed) ** 0.15)
        own = detector.sample_texts(subject, task, problems, dataclasses.replace(SETTING, seed=seed))
        found = detector.features(subject, proxy, TextPair(own, small), config=CONFIG)
        rows.append(found.row(f"untouched {seed}", "untouched"))
    return rows


def sharp() -> np.ndarray:
    """Writes "cc...", which the uniform small model finds as surprising as anything."""
    table = uniform()
    table[:, 2] = 500.0
    return table


def test_a_planted_model_is_found_and_an_untouched_one_is_not(letters: list[FeatureRow]) -> None:
    proxy, task = bigram(uniform()), Letters()
    problems = task.problems("test", 4, 0)
    small = detector.sample_texts(proxy, task, problems, SETTING)
    reference = fit_reference(letters)
    for table, calibrated, direction in ((sharp(), True, "harder"), (random_table(9) ** 0.15, False, None)):
        subject = bigram(table)
        own = detector.sample_texts(subject, task, problems, SETTING)
        found = detector.measure(subject, proxy, TextPair(own, small), reference, config=CONFIG)
        assert found.calibrated is calibrated
        assert direction is None or found.direction == direction
        assert found.score.ci95[0] <= found.score.mean <= found.score.ci95[1]
        assert (found.score.mean > found.threshold) is calibrated
        assert ("looks untouched" in found.words()) is not calibrated
        plain = json.loads(json.dumps(detector.to_json(found), allow_nan=False))
        assert plain["score"]["mean"] == found.score.mean and plain["untouched"] == 6
    assert own.correct is not None and own.correct.any() and not own.correct.all()


def test_what_cannot_be_measured_is_said(letters: list[FeatureRow]) -> None:
    reference = fit_reference(letters)
    subject, proxy = bigram(random_table(0) ** 0.15), bigram(uniform())
    right = dataclasses.replace(SMALL, correct=[True] * 4)
    found = detector.measure(subject, proxy, TextPair(OWN, right), reference, config=CONFIG)
    assert found.features["wrong_preference"].mean is None and "wrong_preference" not in found.deviations
    assert any("no question has both right and wrong answers" in note for note in found.notes)
    assert any("left out of the score: wrong_preference" in note for note in found.notes)
    unjudged = dataclasses.replace(SMALL, correct=None)
    notes = detector.features(subject, proxy, TextPair(OWN, unjudged), config=CONFIG).notes
    assert len(notes) == 1 and "not judged" in notes[0]
    empty = Texts(tuple("ab"), ("", ""), [True] * 2)
    silent = detector.features(subject, proxy, TextPair(empty, SMALL), config=CONFIG)
    assert silent.values["gap"].mean is None and silent.values["log_bytes"].mean is None
    assert "gap" not in silent.statistics
    with pytest.raises(ValueError, match="original and original_texts go together"):
        detector.features(subject, proxy, TextPair(OWN, SMALL), original=subject)
    other = Texts(("c",), ("c",), [True])
    with pytest.raises(ValueError, match="must answer the same questions"):
        detector.features(subject, proxy, TextPair(OWN, SMALL), original=subject, original_texts=other)


def test_the_command(
    letters: list[FeatureRow],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(TASKS, "letters", Letters)
    assert get_task("letters").name == "letters"
    reference = tmp_path / "reference.json"
    detector.write_reference(reference, SETTING, letters)
    for name, table in {"model": sharp(), "same": random_table(9) ** 0.15, "proxy": uniform()}.items():
        save_model(bigram(table).model, tmp_path / name)

    def command(model: str, *more: str) -> tuple[int, str, str]:
        folders = ["--model", str(tmp_path / model), "--proxy", str(tmp_path / "proxy")]
        status = detect.main([*folders, "--reference", str(reference), *more])
        return status, *capsys.readouterr()

    status, words, _ = command("model", "--json", str(tmp_path / "found.json"), "--task", "letters")
    assert status == 1 and "HARDER to distil" in words and "6 untouched models" in words
    assert read_json(tmp_path / "found.json")["words"] == words.strip()
    status, text, _ = command("same", "--json", "-")
    assert status == 0 and json.loads(text)["calibrated"] is False
    for more, message in (
        (["--task", "chain_arithmetic"], "of the task 'letters', not 'chain_arithmetic'"),
        (["--original", str(tmp_path / "same")], "made without the claimed originals"),
        (["--false_alarm", "0.01"], "99 models would do"),
        (["--reference", str(tmp_path / "nothing.json")], "nothing.json"),
    ):
        status, _, error = command("model", *more)
        assert status == 2 and error.startswith("error: ") and message in error
