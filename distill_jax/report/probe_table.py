"""The probes on the page: one number a trap, before and after distillation, arms side by side; then the diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_jax.report import words
from distill_jax.report.records import ARMS

TONES = {"found": "bad", "suspected": "bad", "absent": "good", "unknown": ""}


@dataclass(frozen=True)
class Panel:
    """One number of a probe.

    Attributes:
      probe, metric: where it stands. before: the metric of the untrained student; "": that of the same name that was
        measured on it.
      title, unit: in words. share: shown in per cent.
      drawn: has a figure of its own.
    """

    probe: str
    metric: str
    title: str
    unit: str = ""
    before: str = ""
    share: bool = False
    drawn: bool = False


PANELS = (
    Panel(
        "tail_noise",
        "forward_tail.64",
        "Forward KL beyond the top 64",
        "per cent of the KL",
        share=True,
        drawn=True,
    ),
    Panel("tail_noise", "forward_kl", "Forward KL on the teacher's texts", "nats a position"),
    Panel(
        "off_policy",
        "drift.forward",
        "Drift: KL on the student's prefixes minus the teacher's",
        "nats a position",
        drawn=True,
    ),
    Panel("off_policy", "slope.reverse.student", "Rise of the reverse KL along a text", "nats"),
    Panel(
        "off_policy", "effective_sample_size", "What the teacher's texts are worth", "per cent", share=True
    ),
    Panel(
        "gap",
        "wrong_trace_preference",
        "Wrong answer preferred to a right one",
        "per cent of pairs",
        share=True,
        drawn=True,
    ),
    Panel("gap", "reverse.all", "Reverse gap on the student's texts", "bits a byte"),
    Panel("gap", "top_k_overlap.all", "Common most probable tokens", "per cent", share=True),
    Panel(
        "overconfidence",
        "confidence_wrong.after",
        "Confidence in wrong answers",
        "per cent",
        before="confidence_wrong.before",
        share=True,
        drawn=True,
    ),
    Panel(
        "overconfidence",
        "expected_calibration_error.after",
        "Confidence is off by",
        "per cent",
        before="expected_calibration_error.before",
        share=True,
    ),
    Panel(
        "self_correction",
        "repair_rate.student",
        "Repaired after a forced wrong step",
        "per cent",
        before="repair_rate.base",
        share=True,
        drawn=True,
    ),
    Panel(
        "decoding",
        "per_response.no_end",
        "Texts without an end",
        "per cent",
        share=True,
        drawn=True,
    ),
    Panel("decoding", "per_response.loops", "Texts that run into a loop", "per cent", share=True),
    Panel("decoding", "per_1k.repeated", "Repeated 4-grams", "per 1000 tokens"),
)


def probed_kinds(summary: Mapping[str, Any]) -> list[str]:
    """Kinds of student that were probed, in the order in which they were."""
    return list(dict.fromkeys(kind for kinds in summary.get("diagnosis", {}).values() for kind in kinds))


def panel_values(
    summary: Mapping[str, Any], panel: Panel, kind: str
) -> dict[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]:
    """Arm -> (before, after) of the arms that have one of them."""
    found = {}
    for arm in ARMS:
        numbers = summary["arms"][arm]["probes"].get(panel.probe, {})
        earlier = f"{kind}/{panel.before}" if panel.before else f"{kind}/{panel.metric}@before"
        pair = tuple(
            value if value is not None and value["mean"] is not None else None
            for value in (numbers.get(earlier), numbers.get(f"{kind}/{panel.metric}"))
        )
        if any(value is not None for value in pair):
            found[arm] = (pair[0], pair[1])
    return found


def page_view(summary: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """For each kind of student the table and the diagnosis; None where nothing was probed."""
    kinds = probed_kinds(summary)
    return [_kind_view(summary, kind) for kind in kinds] or None


def _kind_view(summary: Mapping[str, Any], kind: str) -> dict[str, Any]:
    arms = [arm for arm in ARMS if kind in summary["diagnosis"].get(arm, {})]
    rows = []
    for panel in PANELS:
        values = panel_values(summary, panel, kind)
        if values:
            cells = [_cells(panel, *values.get(arm, (None, None))) for arm in arms]
            rows.append((panel.title, panel.unit, cells))
    order = list(TONES)
    return {
        "kind": kind,
        "headers": [words.ARM_TITLES[arm] for arm in arms],
        "rows": rows,
        "diagnosis": [
            (
                words.ARM_TITLES[arm],
                [
                    (finding["verdict"], TONES[finding["verdict"]], finding["sentence"])
                    for finding in sorted(
                        summary["diagnosis"][arm][kind], key=lambda finding: order.index(finding["verdict"])
                    )
                ],
            )
            for arm in arms
        ],
    }


def _cells(
    panel: Panel, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> tuple[str, str, str]:
    """('12', '34', '[30, 38]'): before, after, the interval of the latter."""
    return _number(panel, before), _number(panel, after), "" if after is None else _interval(panel, after)


def _number(panel: Panel, value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value['mean']:.0f}" if panel.share else f"{value['mean']:.2g}"


def _interval(panel: Panel, value: Mapping[str, Any]) -> str:
    ends = (
        "?" if end is None else f"{100 * end:.0f}" if panel.share else f"{end:.2g}" for end in value["ci95"]
    )
    return f"[{', '.join(ends)}]"
