"""Sentences from synthetic results: each verdict, the numbers in words, and what was not measured; JSON and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from distill_jax.probes.decoding import Decoding
from distill_jax.probes.diagnosis import RULES, as_text, diagnose, verdict_of
from distill_jax.probes.gap import Gap
from distill_jax.probes.off_policy import OffPolicy
from distill_jax.probes.overconfidence import Overconfidence
from distill_jax.probes.results import RESULTS, from_json, to_json, value_from_json, value_to_json
from distill_jax.probes.self_correction import SelfCorrection
from distill_jax.probes.tail_noise import TailNoise
from distill_jax.probes.values import Value, undefined


def near(mean: float, width: float = 0.01) -> Value:
    return Value(mean, (mean - width, mean + width), 40)


def tail_noise(tail: Value, growth: Value | None = None, unit: str = "token") -> TailNoise:
    one = {"16": near(0.8), "64": tail}
    curve = {"1": near(0.1), "2": near(0.2)}
    return TailNoise(
        unit, 512, 99, near(1.0), near(2.0), curve, curve, one, one, one,
        {"16": near(0.2), "all": near(0.3)}, growth or near(1.0), near(0.5),
    )  # fmt: skip


CELLS = {f"{d}.{s}": near(0.05) for d in ("forward", "reverse") for s in ("teacher", "student")}
GROUPS = {"all": near(0.9), "right": near(0.9), "wrong": near(0.9)}
AFTER = {"after": near(0.05), "before": near(0.04), "change": near(-0.05)}


def healthy() -> list[Any]:
    """Every probe, every trap absent."""
    events = {event: near(0.0) for event in ("repeated", "loops", "surprises", "no_end")}
    both = {"student": near(1.0), "teacher": near(1.0)}
    ratios = {"teacher": near(1.0), "student": near(1.0)}
    return [
        tail_noise(near(0.1)),
        OffPolicy(
            "token", CELLS, {"forward": near(-0.1), "reverse": near(0.1)}, CELLS, CELLS, ratios, near(0.9)
        ),
        Gap("token", near(0.3), GROUPS, near(0.2), near(0.4), GROUPS, GROUPS, top_k_share=16 / 32000),
        Overconfidence("token_mean", AFTER, AFTER, AFTER, AFTER, AFTER, AFTER, near(0.3)),
        SelfCorrection({**both, "base": near(1.0)}, near(1.0), both, both, both),
        Decoding(events, events, events, ratios, ratios),
    ]


def test_the_sentence_of_the_readme() -> None:
    (finding, _) = diagnose([tail_noise(Value(0.72, (0.68, 0.761), 200))])
    assert finding.verdict == "found"
    assert finding.sentence == (
        "72 % of the forward KL lies beyond the top 64 tokens [68 % to 76 %, n = 200]: use top-k with a tail bucket"
    )


@pytest.mark.parametrize(
    ("value", "above", "verdict"),
    [
        (Value(0.7, (0.6, 0.8), 9), True, "found"),
        (Value(0.7, (0.4, 0.8), 9), True, "suspected"),
        (Value(0.7, (None, None), 1), True, "suspected"),
        (Value(0.7, (0.6, 0.8), 8), True, "found"),
        (Value(0.7, (0.6, 0.8), 7), True, "suspected"),  # an interval of seven prompts is none
        (Value(0.5, (0.4, 0.6), 9), True, "absent"),
        (Value(0.3, (0.2, 0.4), 9), True, "absent"),
        (Value(0.3, (0.2, 0.4), 9), False, "found"),
        (Value(0.3, (0.2, 0.6), 9), False, "suspected"),
        (Value(0.7, (0.6, 0.8), 9), False, "absent"),
        (undefined(), True, "unknown"),
    ],
)
def test_verdicts(value: Value, above: bool, verdict: str) -> None:
    assert verdict_of(value, 0.5, above) == verdict


def test_a_healthy_pair_has_no_findings_and_every_rule_speaks() -> None:
    findings = diagnose(healthy())
    assert [finding.name for finding in findings] == [rule.name for rule in RULES]
    assert {finding.verdict for finding in findings} == {"absent"}
    assert all("{" not in finding.sentence for finding in findings)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_is_found_beyond_its_threshold(rule: Any) -> None:
    """Every number of every result is moved far to the wrong side of this rule's threshold."""
    bad = near(rule.threshold + (0.5 if rule.above else -0.05), 0.001)

    def moved(result: Any) -> Any:
        changes = {}
        for field in dataclasses.fields(result):
            value = getattr(result, field.name)
            if field.name == "accuracy":  # a student that clearly answers better is not judged by all rules
                continue
            if isinstance(value, Value):
                changes[field.name] = bad
            elif isinstance(value, dict):
                changes[field.name] = dict.fromkeys(value, bad)
        return dataclasses.replace(result, **changes)

    (finding,) = [f for f in diagnose(map(moved, healthy())) if f.name == rule.name]
    assert finding.verdict == "found" and finding.value == bad
    assert rule.advice.split("{")[0] in finding.sentence


def test_what_was_not_measured_gives_its_reason() -> None:
    note = "wrong-trace preference needs right answers to compare with, and the student has none at all"
    nothing = dataclasses.replace(healthy()[2], wrong_trace_preference=undefined(), notes=(note,))
    finding = next(f for f in diagnose([nothing]) if f.name == "wrong_traces")
    assert finding.verdict == "unknown" and finding.sentence == f"wrong traces: not measured ({note})"


def test_rules_about_a_base_are_left_out_without_one() -> None:
    alone = dataclasses.replace(healthy()[3], confidence_wrong={"after": near(0.9)})
    unrepaired = dataclasses.replace(
        healthy()[4], repair_rate={"student": near(0.5)}, repair_relative=undefined()
    )
    assert {f.name for f in diagnose([alone, unrepaired])} == {"miscalibrated"}


def names_of(result: Any) -> set[str]:
    return {finding.name for finding in diagnose([result])}


def test_few_texts_say_nothing_of_their_effective_part() -> None:
    """Of 39 texts the effective part is at least 1 / 39, whatever the models are."""
    for n, asked in ((39, False), (40, True)):
        result = dataclasses.replace(healthy()[1], effective_sample_size=Value(0.05, (0.03, 0.07), n))
        assert ("few_texts_carry_weight" in names_of(result)) is asked


def test_confidence_of_a_better_student_is_no_trap() -> None:
    risen = {**AFTER, "change": near(0.3)}
    for change, asked in ((near(0.2), False), (near(0.005), True), (near(-0.2), True)):
        result = dataclasses.replace(
            healthy()[3], confidence_wrong=risen, accuracy={**AFTER, "change": change}
        )
        assert ("confident_errors" in names_of(result)) is asked


def test_self_consistency_is_too_noisy_to_call_a_student_miscalibrated() -> None:
    off = dataclasses.replace(healthy()[3], expected_calibration_error={**AFTER, "after": near(0.18)})
    assert "miscalibrated" in names_of(off)
    assert "miscalibrated" not in names_of(dataclasses.replace(off, confidence="self_consistency"))


def test_support_is_judged_only_where_k_is_a_small_share_of_the_outcomes() -> None:
    """16 of 258 bytes reach down to what neither model considers; 16 of 800 tokens do not."""
    poor = dataclasses.replace(healthy()[2], top_k_overlap=dict.fromkeys(GROUPS, near(0.2)))
    verdicts = {
        outcomes: [f.verdict for f in diagnose([dataclasses.replace(poor, top_k_share=16 / outcomes)])
                   if f.name == "support"]
        for outcomes in (16, 258, 799, 800, 262_144)
    }  # fmt: skip
    assert verdicts == {16: [], 258: [], 799: [], 800: ["found"], 262_144: ["found"]}


def test_a_result_from_before_a_field_had_a_default_reads_back() -> None:
    data = to_json(healthy()[2])
    del data["facts"]["top_k_share"]
    assert from_json(data) == dataclasses.replace(healthy()[2], top_k_share=1.0)


def test_the_unit_is_named_and_a_suspicion_is_hedged() -> None:
    (finding, _) = diagnose([tail_noise(Value(0.6, (0.4, 0.8), 5), unit="byte")])
    assert "top 64 bytes [40 % to 80 %, n = 5]: if more prompts confirm it, use top-k" in finding.sentence


def test_the_text_begins_with_what_was_found() -> None:
    text = as_text(diagnose([tail_noise(near(0.1), growth=near(3.0))]))
    first, second = text.split("\n")
    assert first.startswith("frequent tokens  found      the most frequent tokens hold 3 times as much")
    assert second.startswith("tail noise       absent     10 % of the forward KL")
    assert as_text([]) == ""


@pytest.mark.parametrize("result", healthy(), ids=list(RESULTS))
def test_results_go_through_json_unchanged(result: Any) -> None:
    data = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert from_json(data) == result
    assert all(set(value) == {"mean", "ci95", "n", "seeds"} for value in data["metrics"].values())
    assert not any(isinstance(value, dict) for value in data["facts"].values())


def test_values_go_through_json_unchanged() -> None:
    for value in (undefined(3), Value(0.5, (0.25, None), 4, (0.5, 0.75)), near(1.0)):
        assert value_from_json(json.loads(json.dumps(value_to_json(value)))) == value
    with pytest.raises(ValueError, match="must be finite or None"):
        value_to_json(Value(float("nan"), (None, None), 1))
    with pytest.raises(ValueError, match=r"gap\.forward: expected"):
        value_from_json({"mean": 1.0}, "gap.forward")


def test_refuses_what_is_not_a_result() -> None:
    with pytest.raises(TypeError, match="expected the result of a probe"):
        diagnose([near(1.0)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="unknown probe 'tale_noise'"):
        from_json({"probe": "tale_noise"})
    data = to_json(tail_noise(near(0.1)))
    del data["metrics"]["forward_kl"]
    with pytest.raises(ValueError, match=r"tail_noise: missing \['forward_kl'\], unexpected \[\]"):
        from_json(data)
