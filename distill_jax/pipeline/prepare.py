"""Stage prepare: every model of the run on disk or at hand, trained from nothing where the config says so.

A trained model is saved as a Hugging Face folder under WORKDIR/models and read back by `load_model`, as any other is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from distill_jax.checkpoint import read_json
from distill_jax.models.decoder import Decoder, Params, init_params
from distill_jax.models.families import spec_from_config
from distill_jax.models.hub import PREFIX, check_hub_name, find_in_cache, is_hub_name
from distill_jax.models.model import Model, load_model, save_model
from distill_jax.models.packages import PACKAGE_MODELS, find_package_model
from distill_jax.models.quantised import check_weights
from distill_jax.models.spec import ModelSpec
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.settings import Phase, Role, Settings
from distill_jax.sequences import Sequences, pack_sequences
from distill_jax.students.train import Batches, StudentConfig, stack_replicas, train
from distill_jax.tasks import chain_arithmetic, get_task
from distill_jax.text.alignable import check_alignable
from distill_jax.text.token_ids import TokenIds
from distill_jax.text.tokenizers import Tokenizer

_BPE_TEXTS = 4000
STUDENT = "student_"  # stands before the name of a kind of student where all models have names
SCORED_ROWS = 64  # texts that are scored at a time


def all_roles(settings: Settings) -> dict[str, Role]:
    """Name -> role of every model: teacher, proxy, in an ensemble the further proxies, and each kind of student."""
    further = further_proxies(settings)
    return {
        **settings.roles,
        **further,
        **{f"{STUDENT}{name}": role for name, role in settings.students.items()},
    }


def further_proxies(settings: Settings) -> dict[str, Role]:
    """Name of the model -> role of the proxies beside roles.proxy; none without `calibration.ensemble`."""
    if settings.calibration.ensemble is None:
        return {}
    return {f"proxy_{name}": role for name, role in settings.proxies.items()}


def prepare(
    settings: Settings, mesh: Mesh, workdir: Path, ready: Callable[[str], None] = lambda name: None
) -> None:
    """Trains the models with source "train", and checks that teacher and proxies fit together.

    Args:
      ready: called with the name of each model that was trained, while others still may be: the place for work that
        needs no more than this model, on a core that would have nothing to do until the largest one is there.

    Raises:
      ValueError: tokenizers that cannot be aligned.
    """
    roles = all_roles(settings)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, role in roles.items():
        if role.source == "train":
            groups.setdefault((role.spec, role.tokenizer, role.phases), []).append(name)
    waiting = [
        names
        for names in groups.values()
        if not all((workdir / "models" / name / "config.json").exists() for name in names)
    ]
    # The longest first, so that the short ones run beside it.
    waiting.sort(key=lambda names: -sum(phase.steps for phase in roles[names[0]].phases))

    def train_group(names: list[str]) -> None:
        _train_group(settings, mesh, workdir, {name: roles[name] for name in names})
        for name in names:
            ready(name)

    run_at_once([functools.partial(train_group, names) for names in waiting], settings.at_once)
    teacher = load_role(settings, mesh, workdir, "teacher")
    for name in ("proxy", *further_proxies(settings)):
        proxy = load_role(settings, mesh, workdir, name)
        assert teacher.tokenizer is not None and proxy.tokenizer is not None
        check_alignable(teacher.tokenizer, proxy.tokenizer, _sample_texts(settings), continuation=True)


def check_sources(settings: Settings) -> None:
    """Checks that every role has weights, or can be trained.

    Raises:
      FileNotFoundError: weights of any role are not there.
      ValueError: models to be trained with a task that has no corpus; weights in 8 bits without the package for them.
    """
    roles = all_roles(settings)
    for name, role in roles.items():
        check_weights(role.weights)
        if role.source != "train":
            check_source(name, role.source)
    if settings.task != "chain_arithmetic" and any(role.source == "train" for role in roles.values()):
        raise ValueError(
            f"models with source='train' are trained on the corpus of chain_arithmetic, but task.name is "
            f"{settings.task!r}; give the models a source (a folder, a .gguf file or a demo model)"
        )


def check_source(name: str, source: str) -> None:
    """Checks that `load_model` can find the weights of `name`.

    Raises:
      FileNotFoundError: they are not there; says what to give. ValueError: no name of a model on the hub.
    """
    if Path(source).expanduser().exists():
        return
    if source not in PACKAGE_MODELS and not is_hub_name(source):
        raise FileNotFoundError(
            f"{name}: no model at {source!r}; expected a Hugging Face folder, a .gguf file, "
            f"{PREFIX}ORGANISATION/NAME, or one of the names {sorted(PACKAGE_MODELS)}"
        )
    try:
        if is_hub_name(source):
            check_hub_name(source)
        else:
            find_package_model(source)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def model_place(settings: Settings, workdir: Path, name: str) -> Path | None:
    """Where a role's model lies or will lie, None for one on the hub that is not fetched yet."""
    role = all_roles(settings)[name]
    if role.source == "train":
        return workdir / "models" / name
    return find_in_cache(role.source) if is_hub_name(role.source) else Path(role.source).expanduser()


def role_spec(settings: Settings, workdir: Path, name: str) -> ModelSpec:
    """A role's model in numbers, from its config.json where there is one, without touching its weights."""
    place = model_place(settings, workdir, name)
    if place is not None and (place / "config.json").is_file():
        return spec_from_config(read_json(place / "config.json"))
    return all_roles(settings)[name].spec


def load_role(settings: Settings, mesh: Mesh, workdir: Path, name: str, weights: str | None = None) -> Model:
    """The model of a role, placed on the mesh, its activations checkpointed as the config says.

    Args:
      weights: instead of the role's own `weights`.

    Raises:
      FileNotFoundError: its weights are not there. ValueError: no tokenizer beside them, or what `load_model` raises.
    """
    role = all_roles(settings)[name]
    source = workdir / "models" / name if role.source == "train" else role.source
    model = load_model(source, mesh, settings.dtype, weights=weights or role.weights)
    if model.tokenizer is None:
        raise ValueError(f"{name}: {source} holds no tokenizer; put its tokenizer.json beside the weights")
    module = model.module.clone(remat=settings.remat)
    return dataclasses.replace(model, module=module, mesh=mesh)


def _sample_texts(settings: Settings) -> list[str]:
    """Texts that both tokenizers of a pair must give back byte for byte: the task's own."""
    task = get_task(settings.task, **settings.task_options)
    problems = task.problems("validation", min(128, settings.calibration.validation_problems), settings.seed)
    return [text for problem in problems for text in (problem.prompt, problem.gold) if text]


def make_tokenizer(settings: Settings, kind: str) -> Tokenizer:
    """ "bytes", or a byte-level BPE trained on the teacher's corpus; digits stay single tokens."""
    if kind == "bytes":
        return Tokenizer.bytes_tokenizer()
    phases = settings.roles["teacher"].phases
    styles = {name: 1.0 for phase in phases for name, _ in phase.styles}
    texts = chain_arithmetic.corpus(_BPE_TEXTS, settings.seed, styles, phases[0].operations)
    return Tokenizer.train_bpe([prompt + trace for prompt, trace in texts], settings.bpe_vocab_size)


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    prompt_size: int | None = None,
    completion_size: int | None = None,
) -> Sequences:
    """(prompt, completion) texts as rows that end in an end of sequence; sizes default to the longest."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    prompts = [tokenizer.encode_prompt(prompt) for prompt, _ in pairs]
    texts = tokenizer.encode_batch([completion for _, completion in pairs], continuation=True)
    completions = [TokenIds([*ids, *end], tokenizer.vocabulary_hash) for ids in texts]
    return pack_sequences(
        prompts,
        completions,
        prompt_size or max(map(len, prompts)),
        completion_size or max(map(len, completions)),
        tokenizer.pad_id,
    )


def _train_group(settings: Settings, mesh: Mesh, workdir: Path, roles: dict[str, Role]) -> None:
    """Trains models of one shape together, each from its own seed on its own corpus, phase by phase."""
    first = next(iter(roles.values()))
    tokenizer = make_tokenizer(settings, first.tokenizer)
    # How many tokens a trained vocabulary has is known only now.
    spec = dataclasses.replace(first.spec, vocab_size=tokenizer.vocab_size)
    module = Decoder(spec, mesh, settings.dtype, remat=settings.remat)
    seeds = [settings.seed * 1000 + role.seed for role in roles.values()]
    state = stack_replicas([init_params(module, jax.random.key(seed)) for seed in seeds])
    for index, phase in enumerate(first.phases):
        state = _train_phase(
            settings, module, tokenizer, state, phase, seeds, index, workdir, "+".join(roles)
        )
    for replica, name in enumerate(roles):
        # Saved already by a start that was killed between two models; the weights would be the same.
        if (workdir / "models" / name / "config.json").exists():
            continue
        params = jax.tree.map(lambda leaf, r=replica: leaf[r], state)
        save_model(Model(spec, params, tokenizer, module, mesh), workdir / "models" / name)


def _train_phase(
    settings: Settings,
    module: Decoder,
    tokenizer: Tokenizer,
    state: Params,
    phase: Phase,
    seeds: Sequence[int],
    index: int,
    workdir: Path,
    label: str,
) -> Params:
    config = StudentConfig(
        batch_size=phase.batch_size,
        optimizer=dataclasses.replace(settings.base_optimizer, learning_rate=phase.learning_rate),
        logit_chunk=256,
        checkpoint_every=500,
    )
    rows = min(phase.steps * phase.batch_size, 100_000)
    corpora = [
        chain_arithmetic.corpus(rows, seed * 10 + index, dict(phase.styles), phase.operations)
        for seed in seeds
    ]
    # One layout for all replicas: the longest row of any of them.
    packed = [encode_pairs(tokenizer, corpus) for corpus in corpora]
    prompt = max(rows.prompt_size for rows in packed)
    completion = max(rows.completion_size for rows in packed)
    data = [encode_pairs(tokenizer, corpus, prompt, completion) for corpus in corpora]
    trained: list[Params] = []
    train(
        module,
        state,
        Batches(data, phase.batch_size, seeds, module),
        config,
        [phase.steps],
        lambda _, tree: trained.append(tree),
        directory=workdir / "models" / f"training_{label}" / f"phase{index}",
        label=f"prepare/{label} {index + 1}",
    )
    return trained[0]
