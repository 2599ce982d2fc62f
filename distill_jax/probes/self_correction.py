"""Can the student repair a wrong step, and does it still say that it is about to?

    repair rate    share of right final answers after a trace that was cut right after a first wrong step
    relative       repair rate of the student / repair rate of the undistilled student, paired by prompt
    marker rate    revision markers ("wait", "actually", "let me recheck") per 1000 of the student's tokens
    marker bits    -l(spans that a marker touches) / (ln 2 * their bytes), on the teacher's texts, under both models:
                   would distilling teach the student to revise, and does it find revising odd?

The forced traces are made by `force_wrong_step`, continued by `continue_after`, and judged by the task; `measure` gets
the judged texts, so that it is a function of texts alone.

Source: the symptom, *Distillation Traps and Guards*, arXiv 2604.18963, section 6.5; the definitions are this project's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from distill_jax.generation import generate
from distill_jax.models.model import Model
from distill_jax.probes.pairs import Likelihoods, ProbeConfig, excluded_note, likelihoods
from distill_jax.probes.subjects import Subject, as_subject
from distill_jax.probes.texts import Texts, check_same_questions, prompt_index
from distill_jax.probes.values import Bootstrap, Value, sum_by

RATE = (0.0, 1.0)
MARKERS = (
    r"\b(?:wait|hold on|actually|check(?:ing)?|re-?check|correction|mistake|oops|hmm|try again"
    r"|let me (?:re\w*|check|verify|correct|try))\b"
)
# The result of a step: the number behind "=". The last one of a trace is its answer and is left alone.
RESULT = r"=\s*(-?\d+)"


@dataclasses.dataclass(frozen=True)
class Corrections:
    """What the probe reads. All of them answer the same questions.

    Attributes:
      prefixes: forced traces, one for each row of `forced` (and of `base_forced`): its completion begins with it.
      forced: the student's completions of them, judged.
      texts: the student's own answers.
      teacher_texts: the teacher's, on which markers are scored.
      base_forced, base_texts: the same of the undistilled student; both or none.

    Raises:
      ValueError: rows that do not belong together.
    """

    prefixes: tuple[str, ...]
    forced: Texts
    texts: Texts
    teacher_texts: Texts
    base_forced: Texts | None = None
    base_texts: Texts | None = None

    def __post_init__(self) -> None:
        if (self.base_forced is None) != (self.base_texts is None):
            raise ValueError("base_forced and base_texts go together: both, or none")
        for name in ("forced", "base_forced"):
            forced = getattr(self, name)
            if forced is None:
                continue
            if len(forced) != len(self.prefixes) or forced.correct is None:
                raise ValueError(
                    f"{name} needs one judged row for each of the {len(self.prefixes)} prefixes, got {len(forced)} "
                    f"rows, {'not judged (correct is None)' if forced.correct is None else 'judged'}"
                )
            for row, (text, prefix) in enumerate(zip(forced.completions, self.prefixes, strict=True)):
                if not text.startswith(prefix):
                    raise ValueError(
                        f"completion {row} of {name} does not begin with its forced prefix {prefix[-30:]!r}; give "
                        "whole completions, prefix and continuation, in the order of the prefixes"
                    )
        if self.base_forced is not None and self.base_texts is not None:
            check_same_questions(self.forced, self.base_forced, "forced", "base_forced")
            check_same_questions(self.texts, self.base_texts, "texts", "base_texts")


@dataclasses.dataclass(frozen=True)
class SelfCorrection:
    """What `measure` found; "base" is the undistilled student, where one was given.

    Attributes:
      repair_rate: "student", "base": share of forced traces that end right.
      repair_relative: the student's over the base's; undefined without a base, or if the base never repairs.
      marker_rate: "student", "teacher", "base": per 1000 tokens, counted with the student's tokenizer in all texts.
      marker_bits: "student", "teacher": bits a byte of the markers in the teacher's texts under each model.
      other_bits: the same of all other spans of these texts.
      notes: what could not be measured.
    """

    repair_rate: Mapping[str, Value]
    repair_relative: Value
    marker_rate: Mapping[str, Value]
    marker_bits: Mapping[str, Value]
    other_bits: Mapping[str, Value]
    notes: tuple[str, ...] = ()


def measure(
    teacher: Model | Subject,
    student: Model | Subject,
    batch: Corrections,
    *,
    config: ProbeConfig | None = None,
    markers: str = MARKERS,
) -> SelfCorrection:
    """Measures repairs and markers.

    Args:
      teacher, student: models on one mesh.
      batch: see `Corrections`.
      config: see `ProbeConfig`.
      markers: regular expression of revision markers, case ignored.

    Raises:
      ValueError: what `pairs.encode_pair` raises.
    """
    teacher, student, config = as_subject(teacher), as_subject(student), config or ProbeConfig()
    pattern = re.compile(markers, re.IGNORECASE)
    named = {"student": batch.texts, "teacher": batch.teacher_texts}
    forced = {"student": batch.forced}
    if batch.base_texts is not None and batch.base_forced is not None:
        named["base"], forced["base"] = batch.base_texts, batch.base_forced
    indices, prompts = prompt_index(*named.values(), *forced.values())
    bootstrap = Bootstrap(prompts, config.resamples, config.seed)

    rates = {}
    for (name, texts), index in zip(forced.items(), indices[len(named) :], strict=True):
        assert texts.correct is not None
        rates[name] = sum_by(index, texts.correct, prompts), sum_by(index, np.ones(len(texts)), prompts)
    marker_rate = {}
    for (name, texts), index in zip(named.items(), indices, strict=False):
        found = np.array([len(pattern.findall(text)) for text in texts.completions])
        tokens = np.array([len(ids) for ids in student.tokenizer.encode_batch(texts.completions, True)])
        marker_rate[name] = bootstrap.ratio(
            sum_by(index, 1000.0 * found, prompts), sum_by(index, tokens, prompts)
        )

    spans = likelihoods(teacher, student, batch.teacher_texts, config)
    marked = _marked(spans, batch.teacher_texts, pattern)
    prompt = indices[1][spans.row]

    def bits(rows: np.ndarray) -> dict[str, Value]:
        width = sum_by(prompt[rows], (spans.end - spans.begin)[rows], prompts)
        return {
            name: bootstrap.ratio(-sum_by(prompt[rows], lp[rows], prompts) / np.log(2.0), width)
            for name, lp in (("student", spans.lp_s), ("teacher", spans.lp_t))
        }

    notes = list(excluded_note(spans.excluded, "of the teacher's texts"))
    if not marked.any():
        notes.append("the teacher's texts hold no revision marker: there is nothing to score them on")
    relative = bootstrap.quotient(rates["student"], rates.get("base", (np.zeros(prompts), np.zeros(prompts))))
    if "base" in rates and not rates["base"][0].any():
        notes.append("the undistilled student repairs nothing either: there is no rate to compare with")
    return SelfCorrection(
        repair_rate={name: bootstrap.ratio(*pair, RATE) for name, pair in rates.items()},
        repair_relative=relative,
        marker_rate=marker_rate,
        marker_bits=bits(marked),
        other_bits=bits(~marked),
        notes=tuple(notes),
    )


def _marked(spans: Likelihoods, texts: Texts, pattern: re.Pattern[str]) -> np.ndarray:
    """bool[M]: spans that share a byte with a marker."""
    marked = np.zeros(len(spans.row), bool)
    for row, text in enumerate(texts.completions):
        for match in pattern.finditer(text):
            begin, end = (len(text[:at].encode()) for at in match.span())
            marked |= (spans.row == row) & (spans.begin < end) & (spans.end > begin)
    return marked


def force_wrong_step(trace: str, seed: int = 0, result: str = RESULT) -> str | None:
    """The trace up to its first step, with another result: "6+4=0 0*6=0 ... #### 1" -> "6+4=3".

    Args:
      trace: a right completion with its working.
      seed: of the wrong number; a single digit becomes another digit, a longer number another of its length.
      result: regular expression whose first group is the result of a step.

    Returns:
      The forced prefix; None where fewer than two steps are found, since the only one may be the answer.
    """
    found = list(re.finditer(result, trace))
    if len(found) < 2:
        return None
    first = found[0]
    digits = list(first.group(1))
    # The last digit moves by 1 .. 9, so the number is another one and no longer.
    digits[-1] = str((int(digits[-1]) + 1 + np.random.default_rng([seed, len(trace)]).integers(9)) % 10)
    return trace[: first.start(1)] + "".join(digits)


def continue_after(
    subject: Model | Subject,
    questions: Sequence[str],
    prefixes: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    batch_size: int | None = None,
) -> tuple[list[str], np.ndarray]:
    """Lets a model go on after forced prefixes of its own answers.

    Args:
      subject: the model.
      questions, prefixes: one a row; the prefix is encoded as a continuation of the prompt.
      max_new_tokens, temperature, key, batch_size: see `generation.generate`; greedy by default.

    Returns:
      (whole completions, prefix and continuation; bool[N], whether they ended).

    Raises:
      ValueError: different numbers of rows, or what `generate` raises.
    """
    subject = as_subject(subject)
    if len(questions) != len(prefixes):
        raise ValueError(f"got {len(questions)} questions and {len(prefixes)} prefixes; expected one each")
    tokenizer = subject.tokenizer
    prompts = [
        tokenizer.encode_prompt(subject.prompt_text(question)) + tokenizer.encode(prefix, continuation=True)
        for question, prefix in zip(questions, prefixes, strict=True)
    ]
    rollouts = generate(
        subject.model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=key,
        adapter=subject.adapter,
        scale=subject.multiplier,
        batch_size=batch_size,
    )
    return [prefix + text for prefix, text in zip(prefixes, rollouts.texts, strict=True)], rollouts.ended
