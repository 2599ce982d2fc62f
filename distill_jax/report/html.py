"""The report as one HTML file that needs nothing else: no network, no script, readable on a phone and in the dark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe

from distill_jax.report import dial_table, probe_table, study_table, words
from distill_jax.report.answer import answer, only_probes
from distill_jax.report.attack_table import page_view
from distill_jax.report.coloured import Piece, Span, full_tint, legend, pieces, read_spans
from distill_jax.report.records import ARMS, read_metrics, read_rollouts, write_bytes
from distill_jax.report.recovered import recovered_tables
from distill_jax.report.table import accuracy_table, alignment_lines, claim_numbers, claim_title

if TYPE_CHECKING:
    from distill_jax.report.plots import Plot

PROMPTS_SHOWN = 6
ROLLOUTS_SHOWN = 2  # of one arm for one prompt
Spans = Mapping[tuple[str, str], Sequence[Span]]
NO_SPANS: Spans = MappingProxyType({})
_FULL_REWARD = 1.0 - 1e-6


@dataclass(frozen=True)
class RolloutView:
    """One completion: its text in pieces, whether any has a colour, the verdict in words, its tone ("good" or "bad"),
    facts beside it."""

    pieces: list[Piece]
    coloured: bool
    verdict: str
    tone: str
    facts: str

    @property
    def text(self) -> str:
        """The whole completion."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class PromptView:
    """One prompt with the rollouts of each arm: (title of the arm, its rollouts)."""

    prompt: str
    answer: str
    arms: list[tuple[str, list[RolloutView]]]


def _rollout_view(row: Mapping[str, Any], spans: Spans, full: float) -> RolloutView:
    reward = float(row["reward"])
    if reward >= _FULL_REWARD:
        verdict, tone = "right", "good"
    else:
        verdict, tone = ("wrong" if reward <= 0.0 else f"reward {reward:.2f}"), "bad"
    facts = []
    if row.get("gap_per_byte") is not None:
        facts.append(f"gap {row['gap_per_byte']:+.2f} nats per byte")
    facts.append(f"{len(row['completion'].encode())} bytes")
    if row.get("style"):
        facts.append(str(row["style"]))
    text, own = row["completion"], spans.get((row["prompt"], row["completion"]))
    return RolloutView(pieces(text, own, full), bool(own), verdict, tone, ", ".join(facts))


def side_by_side(
    rollouts: Mapping[str, Sequence[Mapping[str, Any]]], spans: Spans = NO_SPANS, count: int = PROMPTS_SHOWN
) -> list[PromptView]:
    """The same prompts for all arms: first those that the most arms have answered, then in order of appearance.

    spans: from `coloured.read_spans`; texts without any are plain.
    """
    full = full_tint(spans)
    prompts: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for arm in ARMS:
        for row in rollouts.get(arm, ()):
            prompts.setdefault(row["prompt"], {}).setdefault(arm, []).append(row)
    chosen = sorted(prompts.items(), key=lambda item: -len(item[1]))[:count]
    views = []
    for prompt, arms in chosen:
        rows = next(iter(arms.values()))
        shown = [
            (
                words.ARM_TITLES[arm],
                [_rollout_view(row, spans, full) for row in arms.get(arm, ())[:ROLLOUTS_SHOWN]],
            )
            for arm in ARMS
            if arm in rollouts
        ]
        views.append(PromptView(prompt, str(rows[0].get("answer", "")), shown))
    return views


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """[("optimizer.lr", "0.003"), ...]: every leaf of a nested mapping with its path."""
    leaves = []
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            leaves += flatten(value, f"{path}.")
        else:
            leaves.append((path, str(value)))
    return leaves


def _unbroken(text: str) -> str:
    """Keeps a number and its unit on one line."""
    return re.sub(r"(\d) (%|points?|nats|bytes|steps|times)", "\\1\u00a0\\2", text)


def _timings(wall_clock_s: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(stage, duration in words, share of the total in per cent), the longest first."""
    total = sum(wall_clock_s.values()) or 1.0
    ordered = sorted(wall_clock_s.items(), key=lambda item: -item[1])
    return [(stage, words.seconds(duration), 100 * duration / total) for stage, duration in ordered]


def _teacher_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(arm, gap per byte, length, styles) of the arms that have rollouts."""
    rows = []
    for arm in ARMS:
        metrics = summary["arms"][arm]["teacher"]
        if "completion_bytes" not in metrics:
            continue
        gap = metrics.get("gap_per_byte")
        styles = sorted(
            (
                (value["mean"], name.partition("/")[2])
                for name, value in metrics.items()
                if name.startswith("style/")
            ),
            reverse=True,
        )
        rows.append(
            (
                words.ARM_TITLES[arm],
                "-" if gap is None else f"{gap['mean']:+.2f} ({words.interval(gap['ci95'], signed=True)})",
                f"{metrics['completion_bytes']['mean']:.0f}",
                ", ".join(f"{name} {words.percent(share, 0)}" for share, name in styles) or "-",
            )
        )
    return rows


def render_html(
    summary: Mapping[str, Any],
    plots: Sequence[Plot],
    rollouts: Mapping[str, Sequence[Mapping[str, Any]]],
    spans: Spans = NO_SPANS,
) -> str:
    """The page as text. Every string that comes from a run is escaped; only our own SVG is taken as markup.

    Args:
      summary: of schema 1. plots: from `make_plots`. rollouts: arm -> rows, from `read_rollouts`.
      spans: from `read_spans`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    headers, rows = accuracy_table(summary)
    prompts = side_by_side(rollouts, spans)
    figures = {
        group: [(plot.name, markupsafe.Markup(plot.svg)) for plot in plots if plot.group == group]
        for group in ("knob", "budget", "training", "probes", "dial", "study")
    }
    claims = [
        {**claim, "numbers": claim_numbers(claim), "title": claim_title(claim)} for claim in summary["claims"]
    ]
    return environment.get_template("template.html").render(
        answer=answer(summary),
        claims=claims,
        held=sum(claim["holds"] for claim in claims),
        judged=not only_probes(summary),
        # A run of probes alone misses nothing of what it never set out to do.
        missing=[
            line for line in summary["missing"] if not only_probes(summary) or line.startswith("probe ")
        ],
        headers=headers,
        rows=rows,
        figures=figures,
        teachers=_teacher_rows(summary),
        alignment=alignment_lines(summary),
        prompts=prompts,
        coloured=any(r.coloured for view in prompts for _, shown in view.arms for r in shown),
        legend=legend(full_tint(spans)),
        config=flatten(summary["config"]),
        environment=flatten(summary["environment"]),
        timings=_timings(summary["wall_clock_s"]),
        total=words.seconds(sum(summary["wall_clock_s"].values())),
        setting=summary["setting"],
        attacks=page_view(summary["attacks"]) if "attacks" in summary else None,
        recovered=recovered_tables(summary),
        probes=probe_table.page_view(summary),
        dial=dial_table.page_view(summary["dial"]) if "dial" in summary else None,
        study=study_table.page_view(summary["study"]) if "study" in summary else None,
    )


def write_report(workdir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Writes WORKDIR/report/index.html and report/plots/*, each file atomically; returns the page's path.

    Args:
      workdir: folder of the run; rollouts, their colours and training metrics are read from it.
      summary: what `summarise` returned for it.

    Raises:
      FileNotFoundError: no such folder. ValueError: a file that is present is broken.
      ImportError: matplotlib is not installed.
    """
    try:
        # matplotlib comes with the extra "report"
        from distill_jax.report.dial_plots import dial_plots
        from distill_jax.report.plots import make_plots, save_plots
        from distill_jax.report.probe_plots import probe_plots
        from distill_jax.report.study_plots import study_plots
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the report draws with matplotlib, and {error.name} is not installed: "
            'pip install "distill_jax[report]"; summarise and summary_table work without it'
        ) from error

    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"workdir: expected the folder of a run, got {workdir}, which does not exist")
    plots = [
        *make_plots(summary, read_metrics(workdir)),
        *dial_plots(summary),
        *probe_plots(summary),
        *study_plots(summary),
    ]
    page = render_html(summary, plots, read_rollouts(workdir), read_spans(workdir))
    save_plots(plots, workdir / "report" / "plots")
    return write_bytes(workdir / "report" / "index.html", page.encode("utf-8"))
