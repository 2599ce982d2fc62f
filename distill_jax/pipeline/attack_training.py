"""Trains the students of a cell: an attack's texts, and what its recipe reads of the teacher beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.attacks.attack import Attack, Knob, Recipe
from distill_jax.attacks.tools import Text
from distill_jax.mesh import place_batch
from distill_jax.metrics import Progress
from distill_jax.models.adapter import adapter_scale
from distill_jax.models.decoder import Params
from distill_jax.models.model import Model
from distill_jax.optimizer import trapezoid
from distill_jax.pipeline.attack_budget import student_steps
from distill_jax.pipeline.attack_programs import on_policy_program, span_program
from distill_jax.pipeline.attack_tools import Bench, Student, encode_rows
from distill_jax.pipeline.distil import student_start
from distill_jax.rft.texts import EncodedTexts, encode_completions, encode_prompts, end_of_text_id
from distill_jax.sampling import RolloutBatch, SamplingConfig
from distill_jax.sequences import Sequences
from distill_jax.students.aligned_texts import (
    AlignedTexts,
    align_texts,
    same_tokens,
    score_sequences,
    take_rows,
)
from distill_jax.students.divergence_config import Divergence, StudentLoss
from distill_jax.students.on_policy import OnPolicyConfig, OnPolicyStep, train_on_policy
from distill_jax.students.scorers import cross_tokenizer_scorer, same_tokenizer_scorer
from distill_jax.students.step import CROSS_ENTROPY, init_student_state
from distill_jax.students.targets import Teacher, make_targets
from distill_jax.students.train import (
    Batches,
    StudentConfig,
    batch_rows,
    stack_replicas,
    train,
    without_schedule,
)

_ON_POLICY = 6  # purpose of random numbers


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one student seed learns from.

    texts: those that can be given to it; encoded: their rows in its tokens; order: seed of the order of its batches.
    """

    texts: list[Text]
    encoded: EncodedTexts
    order: int

    @property
    def rows(self) -> Sequences:
        return self.encoded.sequences


@dataclasses.dataclass(frozen=True)
class Group:
    """Students that are trained together: how, from where, for how long."""

    bench: Bench
    arm: str
    recipe: Recipe
    student: Student
    training: StudentConfig
    steps: int
    base: Params | None
    label: str

    @property
    def scale(self) -> float:
        """Of the adapters that are trained; 1 where the weights themselves are."""
        return 1.0 if self.base is None else float(adapter_scale(self.training.adapter))

    def teacher(self) -> Teacher:
        """The arm's teacher, to be run beside the students or before them."""
        source = self.bench.teachers.load(self.arm)
        tokenizer = source.model.tokenizer
        assert tokenizer is not None
        return Teacher(
            source.model.module, source.model.params, source.adapter, source.scale, tokenizer.vocabulary_hash
        )

    def teacher_model(self) -> Model:
        return self.bench.teachers.load(self.arm).model


def train_students(
    bench: Bench, arm: str, attack: Attack, knob: Knob, student: Student, seeds: Sequence[int]
) -> tuple[Params, Params | None, list[dict[str, int]]]:
    """Students of the seeds under one knob: (trained trees with a leading [R], weights below adapters, text counts).

    A seed for which the attack finds no text at all stays as it was: nothing was learned.
    """
    settings, recipe = bench.settings, attack.recipe_of(knob)
    lessons, counts, learning = [], [], []
    for place, seed in enumerate(seeds):
        texts = attack.texts(knob, bench.tools(arm, student, seed), seed)
        lesson = _lesson(bench, student, texts, settings.seed * 100 + seed, scored=recipe.loss == "top_k")
        kept = 0 if lesson is None else len(lesson.texts)
        counts.append({"kept": kept, "dropped": len(texts) - kept})
        if lesson is not None:
            lessons.append(lesson)
            learning.append(place)
    start, base = student_start(settings, student.model, len(seeds), seeds[0])
    if not learning:
        return start, base, counts
    ordinary = settings.distillation.training
    rate = ordinary.optimizer.learning_rate * recipe.learning_rate
    optimizer = dataclasses.replace(ordinary.optimizer, learning_rate=rate)
    group = Group(
        bench,
        arm,
        recipe,
        student,
        dataclasses.replace(ordinary, optimizer=optimizer, checkpoint_every=0),
        student_steps(settings, recipe),
        base,
        f"attack/{student.name}/{arm}/{attack.id} {knob.name}",
    )
    teach = {
        "spans": _teach_spans,
        "on_policy": _teach_on_policy,
        "policy_gradient": _teach_on_policy,
    }.get(recipe.loss, _teach_given_text)
    chosen = np.array(learning)
    trained = teach(group, jax.tree.map(lambda leaf: leaf[chosen], start), lessons)
    if len(learning) == len(seeds):
        return trained, base, counts
    return jax.tree.map(lambda old, new: old.at[chosen].set(new), start, trained), base, counts


def _lesson(bench: Bench, student: Student, texts: list[Text], order: int, *, scored: bool) -> Lesson | None:
    """The texts that can be given to the student as it sees them and, where they differ, as the teacher was asked.

    scored: the teacher's distributions are read on these rows.
    """
    if not texts:
        return None
    encoded, usable = encode_rows(bench.settings, student, texts)
    if scored or any(text.asked for text in texts):
        usable = usable & encode_rows(bench.settings, student, texts, as_asked=True)[1]
    if not usable.any():
        return None
    kept = EncodedTexts(
        take_rows(encoded.sequences, usable),
        encoded.byte_ends[usable],
        encoded.usable[usable],
        encoded.does_not_fit[usable],
    )
    return Lesson([text for text, keep in zip(texts, usable, strict=True) if keep], kept, order)


def _teach_given_text(group: Group, start: Params, lessons: list[Lesson]) -> Params:
    """Cross-entropy on the texts, or a divergence on them: to stored top tokens, or to the whole distribution."""
    options, data = group.recipe.options, [lesson.rows for lesson in lessons]
    loss, teacher, targets = CROSS_ENTROPY, None, None
    if group.recipe.loss == "logits":
        text = options["cross_entropy"]
        loss = StudentLoss(text, 1.0 - text, Divergence(temperature=options["temperature"]))
        teacher = group.teacher()
    elif group.recipe.loss == "top_k":
        divergence = Divergence(
            support="teacher_topk", top_k=options["top_k"], temperature=options["temperature"]
        )
        loss, source = StudentLoss(0.0, 1.0, divergence), group.teacher()
        targets = [
            make_targets(
                source,
                _as_asked(group, lesson).sequences,
                options["top_k"],
                temperature=options["temperature"],
                vocab_size=min(source.module.spec.vocab_size, group.student.model.spec.vocab_size),
                batch_size=group.training.batch_size,
                chunk=group.training.logit_chunk,
            )
            for lesson in lessons
        ]
    module = group.student.model.module
    batches = Batches(data, group.training.batch_size, [lesson.order for lesson in lessons], module, targets)
    trained: list[Params] = []
    train(
        module,
        start,
        batches,
        group.training,
        [group.steps],
        lambda _, tree: trained.append(tree),
        base=group.base,
        label=group.label,
        loss=loss,
        teacher=teacher,
        targets=None if targets is None else batches.targets,
    )
    return trained[0]


def _as_asked(group: Group, lesson: Lesson) -> EncodedTexts:
    """The lesson's rows as the teacher was asked; the completions are the same tokens, place by place."""
    own_style = group.student.role.prompt_style == group.bench.settings.roles["teacher"].prompt_style
    if own_style and not any(text.asked for text in lesson.texts):
        return lesson.encoded
    return encode_rows(group.bench.settings, group.student, lesson.texts, as_asked=True)[0]


def _teach_spans(group: Group, start: Params, lessons: list[Lesson]) -> Params:
    """Span likelihood matching: the teacher scores every text once, before training."""
    module, options = group.student.model.module, group.recipe.options
    aligned = [_align(group, lesson) for lesson in lessons]
    optimizer, step_of = span_program(
        module,
        without_schedule(group.training.optimizer),
        options["tau"],
        options["cross_entropy"],
        group.training.trainable,
        group.scale,
        group.training.logit_chunk,
        len(lessons),
    )
    state = init_student_state(start, optimizer, len(lessons))
    with Progress(group.steps, group.label) as bar:
        for step in range(group.steps):
            parts = [
                take_rows(
                    texts,
                    batch_rows(len(lesson.texts), group.training.batch_size, lesson.order, step),
                )
                for texts, lesson in zip(aligned, lessons, strict=True)
            ]
            batch = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
            if module.mesh is not None:
                batch = place_batch(batch, module.mesh, axis=1)
            state, _ = step_of(
                state, group.base, batch, trapezoid(group.training.optimizer, step, group.steps)
            )
            bar.update(1)
    return state.trainable


def _align(group: Group, lesson: Lesson) -> AlignedTexts:
    """A lesson in both models' tokens, scored by the teacher under the prompts that it was given."""
    theirs = _encode_for_teacher(
        group,
        [text.asked or text.prompt for text in lesson.texts],
        [text.completion for text in lesson.texts],
        np.array([text.ended for text in lesson.texts], bool),
    )
    scores = score_sequences(
        group.teacher(),
        theirs.sequences,
        batch_size=group.training.batch_size,
        chunk=group.training.logit_chunk,
    )
    return align_texts(
        lesson.rows,
        lesson.encoded.byte_ends,
        theirs.sequences,
        theirs.byte_ends,
        scores,
        usable=theirs.usable,
        unusable_limit=1.0,
    )


def _encode_for_teacher(
    group: Group, prompts: Sequence[str], texts: Sequence[str], ended: np.ndarray
) -> EncodedTexts:
    settings, tokenizer = group.bench.settings, group.teacher_model().tokenizer
    assert tokenizer is not None
    style = settings.roles["teacher"].prompt_style
    return encode_completions(
        tokenizer,
        encode_prompts(tokenizer, prompts, style, settings.calibration.system),
        texts,
        ended,
        end_id=end_of_text_id(tokenizer, style),
        prompt_sizes=(max(settings.calibration.prompt_sizes),),
        completion_sizes=(settings.calibration.completion_size,),
    )


def _teach_on_policy(group: Group, start: Params, lessons: list[Lesson]) -> Params:
    """One student after another writes on its own prompts, and the teacher judges what it wrote."""
    trees = []
    for place, lesson in enumerate(lessons):
        tree = jax.tree.map(lambda leaf, place=place: leaf[place], start)
        step = _on_policy_step(group, lesson)
        state = step.start(tree, jax.random.fold_in(jax.random.key(lesson.order), _ON_POLICY))
        with Progress(group.steps, f"{group.label} {place + 1}/{len(lessons)}") as bar:
            state = train_on_policy(
                step,
                state,
                group.steps,
                lambda done: trapezoid(group.training.optimizer, done, group.steps),
                lambda *_, bar=bar: bar.update(1),
            )
        trees.append(state.student.trainable)
    return stack_replicas(trees)


def _on_policy_step(group: Group, lesson: Lesson) -> OnPolicyStep:
    model, options = group.student.model, group.recipe.options
    tokenizer, rows = model.tokenizer, lesson.rows
    assert tokenizer is not None
    teacher, share = group.teacher(), options["student_share"]
    # A teacher that is asked in another style reads the texts under its own prompts.
    same = (
        teacher.vocabulary_hash == tokenizer.vocabulary_hash
        and group.bench.settings.roles["teacher"].prompt_style == group.student.role.prompt_style
    )
    own_texts = None
    if share < 1:  # of the teacher's texts only the tokens are read
        blank = jnp.zeros(rows.completion.shape)
        own_texts = same_tokens(rows, blank) if same else _align(group, lesson)
    chunk = group.training.logit_chunk
    config = OnPolicyConfig(
        prompts_per_step=group.training.batch_size,
        student_share=share,
        trainable=group.training.trainable,
        scale=group.scale,
        logit_chunk=chunk,
        order_seed=lesson.order,
    )
    optimizer, divergence, update = on_policy_program(
        model.module,
        without_schedule(group.training.optimizer),
        dataclasses.replace(config, student_share=1.0, order_seed=0),
        options["beta"] if group.recipe.loss == "on_policy" else None,
    )
    return OnPolicyStep(
        model.module,
        optimizer,
        SamplingConfig(
            num_samples=1,
            max_new_tokens=rows.completion_size,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
        ),
        (np.asarray(rows.tokens)[:, : rows.prompt_size], np.asarray(rows.prompt_length)),
        same_tokenizer_scorer(teacher, chunk)
        if same
        else cross_tokenizer_scorer(teacher, _retokeniser(group, lesson), chunk),
        config,
        base=group.base,
        teacher_texts=own_texts,
        divergence=divergence,
        teacher=None if divergence is None else teacher,
        vocabulary_hash=tokenizer.vocabulary_hash,
        update=update,
    )


def _retokeniser(group: Group, lesson: Lesson) -> Callable[[np.ndarray, RolloutBatch], AlignedTexts]:
    """What a student has sampled, in the teacher's tokens and prompts. A sample that is no text counts nowhere."""
    tokenizer = group.student.model.tokenizer
    assert tokenizer is not None

    def retokenise(prompts: np.ndarray, rollouts: RolloutBatch) -> AlignedTexts:
        sequences: Any = jax.device_get(rollouts.sequences)
        ended = np.asarray(rollouts.ended)
        texts, ends = [], np.zeros(sequences.completion.shape, np.int32)
        is_text = np.ones(len(prompts), bool)
        for row, (ids, length) in enumerate(
            zip(sequences.completion, sequences.completion_length, strict=True)
        ):
            written = ids[: length - int(ended[row])].tolist()
            raw = tokenizer.token_bytes(written, True)
            try:
                texts.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                texts.append("")
                is_text[row] = False
            ends[row, : len(written)] = tokenizer.byte_ends(written, continuation=True)
            ends[row, len(written) : length] = len(raw) + 1
        asked = [lesson.texts[place] for place in prompts]
        theirs = _encode_for_teacher(group, [text.asked or text.prompt for text in asked], texts, ended)
        return align_texts(
            sequences,
            ends,
            theirs.sequences,
            theirs.byte_ends,
            usable=theirs.usable & is_text,
            unusable_limit=1.0,
        )

    return retokenise
