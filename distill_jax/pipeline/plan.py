"""What a config comes to, by arithmetic: models, mesh, batches, memory. Nothing is loaded or compiled."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from distill_jax.mesh import AXES
from distill_jax.metrics import format_table
from distill_jax.models.adapter import AdapterConfig
from distill_jax.models.quantised import weight_bytes
from distill_jax.models.spec import ModelSpec
from distill_jax.pipeline.prepare import all_roles, further_proxies
from distill_jax.pipeline.settings import Settings

GIB = 2**30


def mesh_sizes(spec: str) -> dict[str, int]:
    """Axis sizes of a mesh text, for any machine; -1 takes the devices that this one has, at least one.

    Raises:
      ValueError: an unknown or repeated axis, a size that is not a positive integer or -1, or more than one -1.
    """
    sizes, given = dict.fromkeys(AXES, 1), set[str]()
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, _, size = (text.strip() for text in part.partition("="))
        if name not in AXES or not (size == "-1" or (size.isdecimal() and int(size) > 0)):
            raise ValueError(f"mesh {spec!r}: {part!r} is not one of {', '.join(f'{a}=SIZE' for a in AXES)}")
        if name in given:
            raise ValueError(f"mesh {spec!r}: axis {name!r} is given twice")
        given.add(name)
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {spec!r}: only one axis may be -1")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    return {name: max(1, jax.device_count() // fixed) if size == -1 else size for name, size in sizes.items()}


def adapter_params(spec: ModelSpec, config: AdapterConfig) -> int:
    """Weights of an adapter: rank x (inputs + outputs) of every adapted kernel."""
    d, heads, kv = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    total = 0
    if "attn" in config.targets:
        total += spec.n_layers * (2 * (d + heads) + 2 * (d + kv))
    if "mlp" in config.targets:
        total += spec.n_layers * 3 * (d + spec.d_ff)
    if "head" in config.targets and not spec.tie_embeddings:
        total += d + spec.vocab_size
    return config.rank * total


def calibration_memory(settings: Settings) -> dict[str, float]:
    """Bytes a device of the calibration stage alone, by arithmetic: part -> bytes.

    An upper estimate of the parts that are named: not all of them exist at one time, and what the compiler needs in
    between is not counted. The other stages are not counted either; students that are trained with all their weights
    may need more than this stage.
    """
    mesh = mesh_sizes(settings.mesh)
    rows_cut, weights_cut = mesh["data"] * mesh["fsdp"], mesh["fsdp"] * mesh["tensor"]
    width = jnp.dtype(settings.dtype).itemsize
    teacher = settings.roles["teacher"].spec
    frozen = {
        name: weight_bytes(role.spec, settings.dtype, role.weights)
        for name, role in {**settings.roles, **further_proxies(settings)}.items()
    }
    config, proxies = settings.calibration, ("proxy", *further_proxies(settings))
    learning = {}
    if config.proxy == "learning":
        weights = sum(all_roles(settings)[name].spec.num_params for name in proxies)
        learning["learning proxy: weights, gradient, two moments"] = 4 * 4 * weights / weights_cut
    rows = config.prompts_per_step * config.rft.num_samples / rows_cut
    slots = max(config.prompt_sizes) + config.completion_size
    trained = adapter_params(teacher, config.adapter) if config.trainable == "adapter" else teacher.num_params
    micro_rows = rows / config.rft.micro_batches
    layers = teacher.n_layers if settings.remat == "full" else 8 * teacher.n_layers
    return {
        "teacher weights": frozen["teacher"] / weights_cut,
        "proxy weights": sum(frozen[name] for name in proxies) / weights_cut,
        **learning,
        "trained weights, gradient, two moments": 4 * 4 * trained / weights_cut,
        "key/value cache of the rollouts": 2
        * teacher.n_layers
        * rows
        * slots
        * teacher.n_kv_heads
        * teacher.head_dim
        * width
        / mesh["tensor"],
        "saved activations of a micro-batch": layers * micro_rows * slots * teacher.d_model * width,
        # Of one layer, or of all when they are saved for the backward pass: "dots" leaves these out.
        "attention scores of a micro-batch": (teacher.n_layers if settings.remat == "none" else 1)
        * 4
        * micro_rows
        * teacher.n_heads
        * slots**2
        / mesh["tensor"],
        "logits of a chunk": 2
        * 4
        * micro_rows
        * config.rft.logit_chunk
        * teacher.vocab_size
        / mesh["tensor"],
        # The reference is scored in pieces of as many rows, without a gradient.
        "logits of a chunk of reference scoring": 4
        * micro_rows
        * config.rft.logit_chunk
        * teacher.vocab_size
        / mesh["tensor"],
    }


def format_plan(settings: Settings) -> str:
    """The plan as text."""
    mesh, config, students = mesh_sizes(settings.mesh), settings.calibration, settings.distillation
    devices, evaluation = math.prod(mesh.values()), settings.evaluation
    rows = [
        (
            name,
            role.source,
            role.spec.family,
            role.spec.n_layers,
            role.spec.d_model,
            f"{role.spec.num_params / 1e6:.2f}M" + (f" {role.weights}" if role.weights != "full" else ""),
        )
        for name, role in all_roles(settings).items()
    ]
    memory = calibration_memory(settings)
    budgets = ", ".join(f"{multiple:g}x = {steps}" for steps, multiple in students.budget_steps.items())
    lines = [
        f"pair {settings.pair}, task {settings.task} {dict(settings.task_options)}, seed {settings.seed}",
        "",
        format_table(rows, ("role", "source", "family", "layers", "width", "weights")),
        "",
        f"mesh: {', '.join(f'{a}={n}' for a, n in mesh.items())} ({devices} devices), {settings.dtype}, "
        f"remat {settings.remat}",
        f"calibration: {len(settings.eta)} arms ({', '.join(f'{a} eta={e:g}' for a, e in settings.eta.items())}), "
        f"{config.steps} steps of {config.prompts_per_step} prompts x {config.rft.num_samples} rollouts = "
        f"{config.prompts_per_step * config.rft.num_samples} rows in {config.rft.micro_batches} micro-batches, "
        f"prompts up to {max(config.prompt_sizes)} and completions up to {config.completion_size} tokens, "
        f"{'adapter of rank ' + str(config.adapter.rank) if config.trainable == 'adapter' else 'all weights'} trained",
        f"students: {len(settings.students)} kinds x {1 + len(settings.arms)} sources of text x {students.seeds} "
        f"seeds, {students.samples} texts each, steps {budgets}, {students.training.batch_size} rows a step",
        f"evaluation: {evaluation.problems} held-out problems, greedy and T={evaluation.temperature:g}",
        "",
        "memory of the calibration stage (no other), GiB a device, by arithmetic:",
        format_table([(part, size / GIB) for part, size in memory.items()], ("part", "GiB")),
        f"sum {sum(memory.values()) / GIB:.3f} GiB a device",
    ]
    return "\n".join(lines)
