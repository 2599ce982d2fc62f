"""The report of a run: from the files in a WORKDIR to numbers with intervals, claims in words, and one page.

    setting = Setting(samples=6000, steps=800, student_parameters={"byte": 33024})
    summary = summarise(workdir, config, environment, setting)
    write_summary(workdir, summary)      # report/summary.json, schema 1
    write_report(workdir, summary)       # report/index.html, report/plots/*
    print(summary_table(summary))

Only `write_report` draws, so only it needs matplotlib (the extra "report").

What is read, each file only if it is there:

    stages/<stage>.json                  {"wall_clock_s": seconds}
    arms/<arm>/evaluation.jsonl          {"decoding": "greedy"|"sample", "problem": int, "correct": 0|1} a line
    arms/<arm>/rollouts.jsonl            {"step", "prompt", "answer", "completion", "reward", "gap_per_byte", "style"};
                                         the last step counts
    arms/<arm>/metrics.jsonl             {"step": int, metric: number}
    students/<arm>/<attack>/<student>/seed<k>/predictions.jsonl
                                         {"budget": multiple of the default, "decoding", "problem", "correct"}
    students/<arm>/<attack>/<student>/texts.json
                                         {"seeds": [{"kept": int, "dropped": int}]}, the texts of each student seed
    coloured_rollouts.json               per-span log-likelihoods of rollouts, see `coloured`
    dial/, study/, attacks/              see `dial_summary`, `study_summary`, `attack_summary`

arms: original, control, distillable, undistillable; among the students also gold (attack sft) and base (attack none).
`problem` is the index of the test problem, the same for every arm, student and seed: all comparisons are paired by it.
"""

from distill_jax.report.claims import Claim, Setting, make_claims
from distill_jax.report.html import render_html, write_report
from distill_jax.report.records import Results, read_results
from distill_jax.report.statistics import Value, difference, estimate, minimum_detectable_effect, ratio
from distill_jax.report.summary import summarise, write_summary
from distill_jax.report.table import summary_table

__all__ = [
    "Claim",
    "Results",
    "Setting",
    "Value",
    "difference",
    "estimate",
    "make_claims",
    "minimum_detectable_effect",
    "ratio",
    "read_results",
    "render_html",
    "summarise",
    "summary_table",
    "write_report",
    "write_summary",
]
