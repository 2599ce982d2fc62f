"""Where on a text teacher and proxy part: per-span log-likelihoods of the rollouts that the report shows.

    value of a span = log p_0(span | before) - log p_C(span | before)        original teacher p_0, proxy p_C, nats

On the finest spans that both tokenizers have in common (`text.spans`); their sum over a text, divided by its bytes, is
the gap that the calibration reward is made of, up to the end of the text, which is left out here. The models are the
same for all arms, so a text has one colouring whoever wrote it. WORKDIR/coloured_rollouts.json holds

    {"rows": [{"prompt", "completion", "spans": [[first byte, end byte, log p_0, log p_C], ...] or null}],
     "why_not": null or why there are no spans at all}

null: the tokenizers do not give the text back byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from distill_jax.checkpoint import read_json, write_json
from distill_jax.pipeline.prepare import SCORED_ROWS, load_role
from distill_jax.pipeline.settings import Settings
from distill_jax.probes.pairs import ProbeConfig, likelihoods
from distill_jax.probes.subjects import Subject
from distill_jax.probes.texts import Texts
from distill_jax.report.records import read_rollouts

KEPT = 16  # rollouts of an arm, the first ones; more than the report shows
_DIGITS = 4  # of a log-likelihood in the file


def coloured_path(workdir: Path) -> Path:
    """The file."""
    return workdir / "coloured_rollouts.json"


def colour_rollouts(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Scores the first rollouts of every arm's last step, unless that has been done.

    Models that are not there any more leave the rollouts as they are: the report then shows plain text.
    """
    wanted = {
        (row["prompt"], row["completion"]): None
        for rows in read_rollouts(workdir).values()
        for row in rows[:KEPT]
        if row["completion"]
    }
    path = coloured_path(workdir)
    known = read_json(path)["rows"] if path.exists() else []
    if not wanted or set(wanted) <= {(row["prompt"], row["completion"]) for row in known}:
        return
    try:
        teacher, proxy = (load_role(settings, mesh, workdir, name) for name in ("teacher", "proxy"))
    except FileNotFoundError as error:
        print(f"rollouts are not coloured: {error}", flush=True)
        return
    system = settings.calibration.system
    one, other = (
        Subject(model, style=settings.roles[name].prompt_style, system=system)
        for name, model in (("teacher", teacher), ("proxy", proxy))
    )
    write_json(path, score_rollouts(one, other, list(wanted)))


def score_rollouts(teacher: Subject, proxy: Subject, rollouts: list[tuple[str, str]]) -> dict[str, Any]:
    """What the file holds, for (prompt, completion) pairs."""
    prompts, completions = zip(*rollouts, strict=True)
    texts = Texts(prompts, completions, np.zeros(len(rollouts), bool))
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "completion": completion, "spans": None} for prompt, completion in rollouts
    ]
    try:
        # Nearly all may be lost: what is left is still worth seeing.
        found = likelihoods(teacher, proxy, texts, ProbeConfig(SCORED_ROWS, unaligned_limit=0.99))
    except ValueError as error:  # the texts are the models': what cannot be scored is a finding
        return {"rows": rows, "why_not": str(error)}
    for index, row in enumerate(rows):
        if not found.excluded[index]:
            own = found.row == index
            columns = (found.begin[own], found.end[own], found.lp_t[own], found.lp_s[own])
            row["spans"] = [
                [int(begin), int(end), round(float(t), _DIGITS), round(float(c), _DIGITS)]
                for begin, end, t, c in zip(*columns, strict=True)
            ]
    return {"rows": rows, "why_not": None}
