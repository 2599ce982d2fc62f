"""`attacks.tools.Tools` on a run's models and task: what an attack may do, for one arm, kind of student and seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from distill_jax.attacks.tools import Query, Text
from distill_jax.generation import generate
from distill_jax.logprobs import score_completions
from distill_jax.models.decoder import Decoder, Params
from distill_jax.models.model import Model
from distill_jax.pipeline.arms import make_task
from distill_jax.pipeline.attack_arms import Teachers, block, clean_texts
from distill_jax.pipeline.evaluate import judge
from distill_jax.pipeline.settings import Role, Settings
from distill_jax.pipeline.workdir import read_rows, write_rows
from distill_jax.rft.texts import (
    EncodedTexts,
    encode_completions,
    encode_prompts,
    end_of_text_id,
    put,
    score_texts,
)
from distill_jax.sequences import Sequences
from distill_jax.tasks.base import Problem

Rewriter = Callable[[Sequence[Text]], list[Text]]
SCORED_AT_A_TIME = 256
_OWN = 5  # purpose of random numbers
_VALIDATION = 1  # added to the run's seed: not the problems that calibration stopped on


@dataclasses.dataclass(frozen=True)
class Student:
    """A kind of student, untrained; name: of the kind."""

    name: str
    model: Model
    role: Role


def encode_rows(
    settings: Settings, student: Student, texts: Sequence[Text], *, as_asked: bool = False
) -> tuple[EncodedTexts, np.ndarray]:
    """(rows in the student's prompt style and tokens, bool[N] those that it can spell, that fit and are not empty).

    as_asked: as the teacher was asked: in its own prompt style, and under the prompt that it was given where that is
    another one. The completions are the same tokens, but for the end of a turn where the styles close it differently.
    """
    tokenizer, sizes = student.model.tokenizer, settings.distillation
    assert tokenizer is not None
    prompts, style, prompt_size = (
        [text.prompt for text in texts],
        student.role.prompt_style,
        sizes.prompt_size,
    )
    if as_asked:
        prompts = [text.asked or text.prompt for text in texts]
        style = settings.roles["teacher"].prompt_style
        prompt_size = max(prompt_size, *settings.calibration.prompt_sizes)
    encoded = encode_completions(
        tokenizer,
        encode_prompts(tokenizer, prompts, style, settings.calibration.system),
        [text.completion for text in texts],
        np.array([text.ended for text in texts], bool),
        end_id=end_of_text_id(tokenizer, style),
        prompt_sizes=(prompt_size,),
        completion_sizes=(sizes.completion_size,),
    )
    return encoded, encoded.usable & (np.asarray(encoded.sequences.completion_length) > 0)


class HostTools:
    """See `attacks.tools.Tools`.

    Args:
      settings, workdir: of the run; the student's own completions are kept in WORKDIR/attacks.
      teachers, arm: whom `ask` asks.
      student: the attacker's, untrained.
      seed: student seed; it draws its own training problems.
      rewriter: for `rewrite`; None if the attacker has none.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: Path,
        teachers: Teachers,
        arm: str,
        student: Student,
        seed: int,
        rewriter: Rewriter | None = None,
    ) -> None:
        self._settings, self._workdir, self._teachers, self._arm = settings, workdir, teachers, arm
        self._student, self._seed, self._rewriter = student, seed, rewriter
        self._task = make_task(settings)
        self._blocks: dict[int, list[Problem]] = {}
        self.answer_mark = settings.attack_suite.answer_mark

    def _problem(self, index: int) -> Problem:
        part, place = divmod(index, self._settings.distillation.samples)
        return self._block(part)[place]

    def _block(self, part: int) -> list[Problem]:
        if part not in self._blocks:
            self._blocks[part] = block(self._settings, self._seed, part)
        return self._blocks[part]

    def ask(self, query: Query) -> list[Text]:
        return self._teachers.ask(self._arm, self._seed, query)

    def gold(self, part: int = 0) -> list[Text]:
        first = part * self._settings.distillation.samples
        return [
            Text(problem.prompt, problem.gold, True, first + place)
            for place, problem in enumerate(self._block(part))
        ]

    def holdout(self, count: int) -> list[Text]:
        return clean_texts(self._settings, count, self._seed)

    def own(self, texts: Sequence[Text], samples: int, seed: int) -> list[Text]:
        """Drawn for every problem of the blocks at once and kept, so that a problem's texts do not depend on which
        others are asked for, and no arm draws them again."""
        size = self._settings.distillation.samples
        parts = {part: self._own_block(part, samples) for part in {text.problem // size for text in texts}}
        return [
            Text(text.prompt, row["completion"], row["ended"], text.problem)
            for text in texts
            for row in parts[text.problem // size][
                text.problem % size * samples : (text.problem % size + 1) * samples
            ]
        ]

    def _own_block(self, part: int, samples: int) -> list[dict]:
        path = (
            self._workdir
            / "attacks"
            / f"own_{self._student.name}_seed{self._seed}_part{part}_n{samples}.jsonl"
        )
        with self._teachers.locks(path):
            if not path.exists():
                write_rows(path, self._write_own(part, samples))
        return read_rows(path)

    def _write_own(self, part: int, samples: int) -> list[dict]:
        settings, model = self._settings, self._student.model
        assert model.tokenizer is not None
        prompts = encode_prompts(
            model.tokenizer,
            [problem.prompt for problem in self._block(part)],
            self._student.role.prompt_style,
            settings.calibration.system,
        )
        key = jax.random.fold_in(jax.random.key(settings.seed), _OWN)
        rollouts = generate(
            model,
            prompts,
            num_samples=samples,
            max_new_tokens=settings.distillation.completion_size,
            temperature=1.0,
            key=jax.random.fold_in(key, self._seed * 1000 + part),
            buckets=(settings.distillation.prompt_size,),
            batch_size=max(1, min(settings.evaluation.batch, len(prompts)) // samples),
        )
        pairs = zip(rollouts.texts, rollouts.ended, strict=True)
        return [{"completion": text, "ended": bool(ended)} for text, ended in pairs]

    def verified(self, texts: Sequence[Text]) -> np.ndarray:
        problems = [self._problem(text.problem) for text in texts]
        completions, ended = [text.completion for text in texts], [text.ended for text in texts]
        return np.array(judge(self._settings, self._task, problems, completions, ended), bool)

    def nats_per_byte(self, texts: Sequence[Text]) -> np.ndarray:
        sizes = self._settings.distillation
        scores = score_texts(
            self._student.model,
            [text.prompt for text in texts],
            [text.completion for text in texts],
            np.array([text.ended for text in texts], bool),
            prompt_sizes=(sizes.prompt_size,),
            completion_sizes=(sizes.completion_size,),
            batch_size=SCORED_AT_A_TIME,
            style=self._student.role.prompt_style,
            system=self._settings.calibration.system,
            chunk=sizes.training.logit_chunk,
        )
        usable = scores.usable & (scores.bytes > 0)
        return np.where(usable, -scores.lp / np.maximum(scores.bytes, 1), np.inf)

    def gain(self, texts: Sequence[Text], holdout: Sequence[Text]) -> np.ndarray:
        model, chunk = self._student.model, self._settings.distillation.training.logit_chunk
        clean = put(encode_rows(self._settings, self._student, holdout)[0].sequences, model)
        direction = unit_gradient(model.module, model.params, clean, chunk)
        gains = np.zeros(len(texts))
        for start in range(0, len(texts), SCORED_AT_A_TIME):
            places = np.minimum(np.arange(start, start + SCORED_AT_A_TIME), len(texts) - 1)
            encoded, usable = encode_rows(self._settings, self._student, [texts[place] for place in places])
            rows = put(encoded.sequences, model)
            slopes = np.asarray(logprob_slope(model.module, model.params, direction, rows, chunk))
            gains[places] = np.where(usable, slopes, 0.0)
        return gains

    def rewrite(self, texts: Sequence[Text]) -> list[Text]:
        if self._rewriter is None:
            raise ValueError(
                "this attack needs a rewriter; give a model folder as attack_suite.rewriter, or leave it out"
            )
        return self._rewriter(texts)


@functools.partial(jax.jit, static_argnames=("module", "chunk"))
def unit_gradient(module: Decoder, params: Params, rows: Sequences, chunk: int) -> Params:
    """The gradient of the rows' mean token log-likelihood, at length 1, in float32."""

    def objective(tree: Params) -> jax.Array:
        lp = score_completions(module, tree, rows, chunk=chunk).lp
        return lp.sum() / jnp.maximum(rows.completion_length.sum(), 1).astype(jnp.float32)

    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), jax.grad(objective)(params))
    norm = jnp.maximum(optax.tree.norm(gradient), 1e-30)
    return jax.tree.map(lambda leaf: leaf / norm, gradient)


@functools.partial(jax.jit, static_argnames=("module", "chunk"))
def logprob_slope(
    module: Decoder, params: Params, direction: Params, rows: Sequences, chunk: int
) -> jax.Array:
    """f32[B]: derivative of the mean log-probability of each row's completion tokens along `direction`.

    Forward-mode, and no difference of two weights: a small step is lost in the rounding of bfloat16 weights.
    """

    def mean_logprob(tree: Params) -> jax.Array:
        lp = score_completions(module, tree, rows, chunk=chunk).lp
        return lp.sum(axis=1) / jnp.maximum(rows.completion_length, 1).astype(jnp.float32)

    tangent = jax.tree.map(lambda weight, move: move.astype(weight.dtype), params, direction)
    return jax.jvp(mean_logprob, (params,), (tangent,))[1]


def model_rewriter(settings: Settings, model: Model) -> Rewriter:
    """A rewriter that asks a language model, greedily, to say every text in its own words.

    The answer must survive: texts that come back without the mark of a final answer keep their old words.
    """
    tokenizer, mark = model.tokenizer, settings.attack_suite.answer_mark
    assert tokenizer is not None
    sizes = settings.calibration

    def rewrite(texts: Sequence[Text]) -> list[Text]:
        questions = [
            f"Write this working again in your own words. Keep every step, and end with the same last words after "
            f"{mark}.\n\n{text.completion}\n"
            for text in texts
        ]
        prompts = encode_prompts(tokenizer, questions, "auto")
        rollouts = generate(
            model,
            prompts,
            max_new_tokens=2 * sizes.completion_size,
            temperature=0.0,
            batch_size=min(settings.evaluation.batch, len(prompts)),
        )
        return [
            dataclasses.replace(text, completion=new.strip(), ended=bool(ended)) if mark in new else text
            for text, new, ended in zip(texts, rollouts.texts, rollouts.ended, strict=True)
        ]

    return rewrite


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all cells share."""

    settings: Settings
    mesh: Mesh
    workdir: Path
    teachers: Teachers
    rewriter: Rewriter | None = None

    def tools(self, arm: str, student: Student, seed: int) -> HostTools:
        return HostTools(self.settings, self.workdir, self.teachers, arm, student, seed, self.rewriter)

    @property
    def search_seed(self) -> int:
        """The student seed on which knobs are chosen: none of those that are reported."""
        return self.settings.distillation.seeds

    def validation_problems(self) -> list[Problem]:
        settings = self.settings
        return make_task(settings).problems(
            "validation", settings.attack_suite.search_problems, settings.seed + _VALIDATION
        )
