"""The card of an exported model: README.md with what it is, how it was made, what was measured, what it is for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

# What an arm's teacher was trained for, and what one may use it for.
_MODES = {
    "original": "the original teacher, unchanged",
    "control": "the control: the same fine-tuning on the task, with no calibration reward (eta = 0)",
    "distillable": "distillable mode: its text is meant to be easy to learn from",
    "undistillable": "undistillable mode: its text is meant to be hard to learn from",
}
_USES = {
    "original": "Comparison with the calibrated models of the same run.",
    "control": "Comparison: what differs between it and a calibrated model is the calibration reward alone.",
    "distillable": (
        "As a teacher: text for training smaller models, on the task below or one close to it. Check the students on "
        "held-out problems; nothing was measured on other tasks."
    ),
    "undistillable": (
        "Serving text where it should be of little use for training a copy. This is no lock: what was measured holds "
        "for the access, the samples and the training steps named below, and a longer or another attack may undo it. "
        "Do not rely on it alone, and do not use it where users need to follow the working."
    ),
}


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
      name: of the model.
      arm: "original", "control", "distillable" or "undistillable".
      kind: "merged", a whole model; "peft", an adapter.
      base: what was calibrated, in words.
      eta: strength of the calibration reward; None for the original.
      scale: the dial the adapter was exported at; 1 is what was trained.
      proxy: the small model that the calibration reward was computed with, in words.
      task: the task's name; data: its options, in words.
      training: other facts of the run, name -> value.
      prompt_style: how questions are put ("raw", "plain", "chat", "auto").
      results: (what, value with its interval) of the report, at scale 1.
      claims: sentences of the report about this arm.
      notes: what a reader must know, such as a run of smoke size.
      base_name: "ORGANISATION/NAME" of what was calibrated, where it is known on the hub.
    """

    name: str
    arm: str
    kind: str
    base: str
    eta: float | None
    scale: float
    proxy: str
    task: str
    data: str
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_style: str = "auto"
    results: Sequence[tuple[str, str]] = ()
    claims: Sequence[str] = ()
    notes: Sequence[str] = ()
    base_name: str = ""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Raises:
      ValueError: an unknown arm or kind.
    """
    if facts.arm not in _MODES or facts.kind not in ("merged", "peft"):
        raise ValueError(f"a card is of an arm in {sorted(_MODES)} and merged or peft, got {facts}")
    sections = [
        _front_matter(facts),
        f"# {facts.name}",
        _introduction(facts),
        *(f"> {note}" for note in facts.notes),
        "## Intended use\n\n" + _use(facts),
        "## How it was made\n\n" + _table(("", ""), _making(facts)),
        "## Results\n\n" + _results(facts),
        "## How to load it\n\n" + _loading(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    tags = ", ".join(json.dumps(tag) for tag in ("distill_jax", f"mode-{facts.arm}"))
    library = "peft" if facts.kind == "peft" else "transformers"
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", f"tags: [{tags}]"]
    if facts.base_name:
        lines.append(f"base_model: {json.dumps(facts.base_name)}")
    return "\n".join(["---", *lines, "---"])


def _introduction(facts: CardFacts) -> str:
    what = "A low-rank adapter for" if facts.kind == "peft" else "A language model made from"
    text = f"{what} {facts.base}. It is {_MODES[facts.arm]}."
    if facts.arm == "original" or facts.scale == 1.0:
        return text
    if facts.scale == 0.0:
        return f"{text} It was exported at scale 0: it computes what the original computes, bit for bit."
    return (
        f"{text} It was exported at scale {facts.scale:g} of its adapter. The numbers below are of scale 1; at this "
        "scale nothing was measured."
    )


def _use(facts: CardFacts) -> str:
    if facts.scale == 0.0:
        return _USES["original"]
    return _USES[facts.arm]


def _making(facts: CardFacts) -> list[tuple[str, str]]:
    rows = [("mode", facts.arm), ("calibrated from", facts.base)]
    if facts.eta is not None:
        rows.append(("eta (weight of the calibration reward)", f"{facts.eta:g}"))
        rows.append(("proxy", facts.proxy))
        rows.append(("scale of the adapter in this export", f"{facts.scale:g}"))
    rows += [("task", facts.task), ("data", facts.data)]
    return [*rows, *((name, str(value)) for name, value in facts.training.items())]


def _results(facts: CardFacts) -> str:
    if not facts.results:
        return "Nothing was measured when this was exported: the run had no report."
    parts = [
        "Held-out problems of the task; 95 % intervals in brackets.",
        _table(("what", "value"), facts.results),
    ]
    parts += [f"- {claim}" for claim in facts.claims]
    return "\n\n".join(parts[:2]) + ("\n\n" + "\n".join(parts[2:]) if facts.claims else "")


def _loading(facts: CardFacts) -> str:
    if facts.kind == "peft":
        code = (
            f'base = AutoModelForCausalLM.from_pretrained("{facts.base_name or "BASE"}")'
            "  # the model it was calibrated from\n"
            'model = PeftModel.from_pretrained(base, "FOLDER")'
        )
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
    else:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        code = (
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        )
    style = {
        "raw": "the question alone is the prompt, with no template",
        "plain": 'the prompt is "Question: ...\\nAnswer:"',
        "chat": "questions go through the chat template",
        "auto": "questions go through the chat template where there is one",
    }.get(facts.prompt_style, facts.prompt_style)
    return f"```python\n{imports}\n\n{code}\n```\n\nIn the run, {style}."


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|---|---|", *map(line, rows)])
