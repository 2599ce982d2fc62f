"""From numbers to sentences: which traps this pair of models is in, and what to do about them.

Every rule is a threshold on one number, written in `RULES`. A trap is

    "found"      the whole 95 % interval lies beyond the threshold
    "suspected"  the estimate does, the interval does not: more prompts would tell
    "absent"     the estimate does not
    "unknown"    the number is undefined; the sentence gives the probe's note

The thresholds are conventions of this project, chosen to be looked at, not constants of nature: .5 of the KL beyond the
top 64 means that truncation at 64 changes more than half of the loss; .5 of wrong-trace preference is a coin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from distill_jax.probes.results import Result, probe_of
from distill_jax.probes.values import Value

Verdict = Literal["found", "suspected", "absent", "unknown"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One rule's outcome.

    Attributes:
      probe, name: of the rule.
      verdict: see the head of this file.
      sentence: in plain language, with the number.
      value, threshold: what was compared.
    """

    probe: str
    name: str
    verdict: Verdict
    sentence: str
    value: Value
    threshold: float


@dataclasses.dataclass(frozen=True)
class Rule:
    """A threshold.

    Attributes:
      probe, name: the result's kind, and the trap.
      read: result -> the number; None where this result does not have it (no base was given, say), or it would mean
        something else, and the rule is left out.
      threshold: the trap is beyond it. above: whether beyond means above.
      says: the number in words, with {value}, {interval}, {unit} and {outcome}.
      advice: what follows if the trap is there. fine: what follows if it is not.
    """

    probe: str
    name: str
    read: Callable[[Any], Value | None]
    threshold: float
    above: bool
    says: str
    advice: str
    fine: str
    percent: bool = False


# Top-k overlap is about common support only where k is a small share of the outcomes: 16 of 800, not 16 of 258 bytes.
SMALL_SHARE = 0.02

# The effective part of N texts is at least 1 / N: of a few texts it cannot be small, and says nothing.
FEWEST_TEXTS = 40


def _of_enough_texts(effective: Value) -> Value | None:
    return effective if effective.n >= FEWEST_TEXTS else None


def _unless_improved(result: Any) -> Value | None:
    """The change of the confidence in wrong answers; None where the student clearly answers better than before.

    The trap is confidence that rises while accuracy does not: of a better student, the wrong answers that are left are
    others.
    """
    better = result.accuracy.get("change")
    if better is not None and better.ci95[0] is not None and better.ci95[0] > 0.0:
        return None
    return result.confidence_wrong.get("change")


# "miscalibrated" is not asked of self-consistency: the share of a few other samples is a noisy confidence, and noise
# alone makes an error of calibration (four samples of a calibrated student that gives one of two answers at .7: .18).
RULES: tuple[Rule, ...] = (
    Rule(
        "tail_noise", "tail_noise", lambda r: r.forward_tail["64"], 0.5, True,
        "{value} of the forward KL lies beyond the top 64 {unit}s",
        "use top-k with a tail bucket",
        "the loss over the whole vocabulary and over its top agree",
        percent=True,
    ),
    Rule(
        "tail_noise", "frequent_tokens", lambda r: r.frequent_growth, 1.5, True,
        "the most frequent {unit}s hold {value} times as much of the KL in the whole vocabulary as in its top 16",
        "the tail noise sits at words that are everywhere; truncate, or weight positions by entropy",
        "frequent {unit}s do not inflate the KL",
    ),
    Rule(
        "off_policy", "drift", lambda r: r.drift["forward"], 0.05, True,
        "the forward KL is {value} nats a {unit} higher on the student's prefixes than on the teacher's",
        "train on the student's own rollouts, or on a mixture",
        "the student's own prefixes are no harder than the teacher's",
    ),
    Rule(
        "off_policy", "slope", lambda r: r.slope["reverse.student"], 0.1, True,
        "from the first to the last position of the student's texts the reverse KL changes by {value} nats",
        "errors build up: shorten the texts, or train on-policy",
        "errors do not build up along a text",
    ),
    Rule(
        "off_policy", "few_texts_carry_weight", lambda r: _of_enough_texts(r.effective_sample_size), 0.1, False,
        "the teacher's texts are worth {value} of their number to the student",
        "expect a noisy signal from the teacher's texts; begin with the ones that the student finds likely",
        "the teacher's texts overlap with what the student writes",
        percent=True,
    ),
    Rule(
        "gap", "wrong_traces", lambda r: r.wrong_trace_preference, 0.5, True,
        "in {value} of the pairs the teacher's signal prefers the student's wrong answer to its right one",
        "do not distil on unverified student rollouts: filter them by the verifier, or change the teacher",
        "the teacher's signal ranks right answers first",
        percent=True,
    ),
    Rule(
        "gap", "support",
        lambda r: r.top_k_overlap["all"] if r.top_k_share <= SMALL_SHARE else None, 0.7, False,
        "teacher and student share {value} of their most probable {unit}s",
        "start with plain training on the teacher's texts before distilling distributions",
        "both models consider the same continuations",
        percent=True,
    ),
    Rule(
        "overconfidence", "confident_errors", _unless_improved, 0.02, True,
        "distilling changed the confidence on wrong answers by {value}",
        "soften the targets, or mix in verified texts; do not trust the student's probabilities",
        "the student did not become more confident in its mistakes",
    ),
    Rule(
        "overconfidence", "miscalibrated",
        lambda r: r.expected_calibration_error["after"] if r.confidence != "self_consistency" else None, 0.1, True,
        "the student's confidence is off by {value} on average",
        "calibrate its temperature before using its probabilities",
        "the student's confidence fits its accuracy",
    ),
    Rule(
        "self_correction", "repair_lost",
        lambda r: r.repair_relative if "base" in r.repair_rate else None, 0.8, False,
        "the student repairs a forced wrong step {value} times as often as before",
        "add traces with mistakes and their repair",
        "the student repairs wrong steps as well as before",
    ),
    Rule(
        "decoding", "loops", lambda r: r.excess["loops"], 0.02, True,
        "{value} more of the student's texts than of the teacher's run into a loop",
        "stop earlier, or train on the student's own rollouts",
        "the student does not loop more than the teacher",
        percent=True,
    ),
    Rule(
        "decoding", "no_end", lambda r: r.excess["no_end"], 0.05, True,
        "{value} more of the student's texts than of the teacher's have no end",
        "check that the end of sequence is in the training texts and is scored",
        "the student ends its texts as the teacher does",
        percent=True,
    ),
)  # fmt: skip


def diagnose(results: Iterable[Result]) -> tuple[Finding, ...]:
    """Applies every rule to every result that it is about.

    Args:
      results: of any probes, in any number.

    Returns:
      Findings in the order of `RULES`, those of one rule in the order of the results.

    Raises:
      TypeError: something that is not a result of a probe.
    """
    named = [(probe_of(result), result) for result in results]
    findings = []
    for rule in RULES:
        for probe, result in named:
            if probe == rule.probe and (value := rule.read(result)) is not None:
                findings.append(_apply(rule, value, result))
    return tuple(findings)


FEWEST_FOUND = 8  # prompts; drawing again from fewer gives ends that are no 95 % interval


def verdict_of(value: Value, threshold: float, above: bool) -> Verdict:
    """Compares a number and its interval with a threshold."""
    if value.mean is None:
        return "unknown"
    sign = 1.0 if above else -1.0
    if sign * (value.mean - threshold) <= 0:
        return "absent"
    nearest = value.ci95[0] if above else value.ci95[1]
    if value.n < FEWEST_FOUND:
        return "suspected"
    return "found" if nearest is not None and sign * (nearest - threshold) > 0 else "suspected"


def _apply(rule: Rule, value: Value, result: Result) -> Finding:
    verdict = verdict_of(value, rule.threshold, rule.above)
    words = {"unit": getattr(result, "unit", "token")}
    if verdict == "unknown":
        why = "; ".join(result.notes) or "there was nothing to measure"
        sentence = f"{rule.name.replace('_', ' ')}: not measured ({why})"
    else:
        number = _number(value.mean, rule.percent)
        low, high = (_number(end, rule.percent) for end in value.ci95)
        behind = f" [{low} to {high}, n = {value.n}]" if None not in value.ci95 else f" [n = {value.n}]"
        follows = rule.fine if verdict == "absent" else rule.advice
        if verdict == "suspected":
            follows = f"if more prompts confirm it, {follows}"
        sentence = rule.says.format(value=number, **words) + behind + ": " + follows.format(**words)
    return Finding(rule.probe, rule.name, verdict, sentence, value, rule.threshold)


def _number(value: float | None, percent: bool) -> str:
    if value is None:
        return "unknown"
    return f"{100 * value:.0f} %" if percent else f"{value:.2g}"


def as_text(findings: Iterable[Finding]) -> str:
    """One line a finding, what was found first.

    tail noise         found      72 % of the forward KL lies beyond the top 64 tokens [...]: use top-k ...
    """
    order: Mapping[str, int] = {"found": 0, "suspected": 1, "absent": 2, "unknown": 3}
    rows = sorted(findings, key=lambda finding: order[finding.verdict])
    width = max((len(finding.name) for finding in rows), default=0)
    return "\n".join(
        f"{finding.name.replace('_', ' '):<{width}}  {finding.verdict:<9}  {finding.sentence}"
        for finding in rows
    )
