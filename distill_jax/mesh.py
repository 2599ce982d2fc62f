"""THE mesh: three axes, one table from logical axes to mesh axes, placement, and errors that name the parameter.

Every role (teacher, reference, proxy, students, sampler) is placed by this file. A parameter or an activation names its
dimensions with *logical* axes ("embed", "heads", "batch", ...); `LOGICAL_TO_MESH` says on which mesh axes they lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows: every chip of a tensor group works on the same rows
    "embed": "fsdp",  # the model width of weights; gathered layer by layer
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    "rank": None,
    "norm": None,  # norm scales are small: replicated
    "seeds": None,  # student replicas that are trained together
}


class ShardingError(ValueError):
    """A dimension does not divide by the mesh axes that it is laid on."""


def make_mesh(spec: str = "data=-1", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh from text such as ``"data=1,fsdp=4,tensor=2"``.

    Args:
      spec: comma-separated ``axis=size``; axes that are left out have size 1; one size may be -1, "the rest".
      devices: devices to use, all of them by default.

    Returns:
      A mesh with the axes ``("data", "fsdp", "tensor")``, all of them Auto.

    Raises:
      ValueError: an unknown or repeated axis, a size that is not a positive integer or -1, or sizes whose product is
        not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, equals, size = part.partition("=")
        name = name.strip()
        if not equals or name not in AXES:
            raise ValueError(f"mesh {spec!r}: {part!r} is not one of {', '.join(f'{a}=SIZE' for a in AXES)}")
        if name in sizes:
            raise ValueError(f"mesh {spec!r}: axis {name!r} is given twice")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ValueError(f"mesh {spec!r}: size of {name!r} must be an integer, got {size!r}") from None
        if sizes[name] < 1 and sizes[name] != -1:
            raise ValueError(f"mesh {spec!r}: size of {name!r} must be at least 1, or -1 for the rest")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"mesh {spec!r}: only one axis may be -1, got {rest}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        if len(devices) % fixed:
            raise ValueError(f"mesh {spec!r}: {len(devices)} devices do not divide by {fixed}")
        sizes[rest[0]] = len(devices) // fixed
        fixed = len(devices)
    if fixed != len(devices):
        raise ValueError(
            f"mesh {spec!r} needs {fixed} devices, but there are {len(devices)}; "
            "change the sizes, or give one axis -1 to take the rest"
        )
    shape = tuple(sizes.get(name, 1) for name in AXES)
    # Auto on purpose: the default of jax.make_mesh is Explicit, under which gathers need an output sharding.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of each dimension, by `LOGICAL_TO_MESH`; None is a replicated dimension."""
    unknown = [name for name in logical_axes if name is not None and name not in LOGICAL_TO_MESH]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; known: {sorted(LOGICAL_TO_MESH)}")
    return PartitionSpec(*(None if name is None else LOGICAL_TO_MESH[name] for name in logical_axes))


def named_sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """The sharding of an array whose dimensions carry these logical axes."""
    return NamedSharding(mesh, partition_spec(logical_axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ("data", "fsdp"), everything else replicated."""
    return named_sharding(mesh, ("batch",))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, mesh: Mesh | None, logical_axes: Sequence[str | None]) -> jax.Array:
    """`with_sharding_constraint` by logical axes; without a mesh the value goes through unchanged."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, logical_axes))


def axis_size(mesh: Mesh, logical_axis: str | None) -> int:
    """How many pieces a dimension with this logical axis is cut into."""
    (mesh_axes,) = partition_spec((logical_axis,))
    if mesh_axes is None:
        return 1
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return math.prod(mesh.shape[name] for name in names)


def check_divisible(mesh: Mesh, shape: Sequence[int], logical_axes: Sequence[str | None], name: str) -> None:
    """Raises `ShardingError` naming parameter, dimension, axis and sizes when a dimension does not divide."""
    if len(shape) != len(logical_axes):
        raise ShardingError(
            f"{name}: shape {tuple(shape)} has {len(shape)} dimensions, axes {tuple(logical_axes)}"
        )
    for dimension, (size, logical_axis) in enumerate(zip(shape, logical_axes, strict=True)):
        pieces = axis_size(mesh, logical_axis)
        if size % pieces:
            raise ShardingError(
                f"{name}: dimension {dimension} ({logical_axis!r}) of shape {tuple(shape)} has size {size}, which "
                f"does not divide by {pieces} (mesh axis {LOGICAL_TO_MESH[str(logical_axis)]!r} of mesh "
                f"{dict(mesh.shape)}); choose a mesh whose axis divides it"
            )


def place(tree: Any, axes: Any, mesh: Mesh, what: str = "params") -> Any:
    """Puts a tree of arrays on the mesh.

    Args:
      tree: arrays (or ShapeDtypeStructs: then the same tree with shardings comes back and nothing is moved).
      axes: the same tree with a tuple of logical axes for each leaf.
      mesh: where to.
      what: the name that error messages start with.

    Raises:
      ShardingError: a dimension does not divide; names the parameter, the dimension, the axis and the sizes.
    """

    def target(path: Any, leaf: Any, leaf_axes: Sequence[str | None]) -> NamedSharding:
        check_divisible(mesh, leaf.shape, leaf_axes, f"{what}{jax.tree_util.keystr(path)}")
        return named_sharding(mesh, leaf_axes)

    shardings = jax.tree_util.tree_map_with_path(target, tree, axes)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
    return jax.device_put(tree, shardings)


def place_batch(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Puts a tree of batches on the mesh, dimension `axis` over ("data", "fsdp"); scalars and keys are replicated."""

    def put(path: Any, leaf: Any) -> jax.Array:
        if np.ndim(leaf) <= axis:
            return jax.device_put(leaf, replicated(mesh))
        logical = (None,) * axis + ("batch",)
        check_divisible(mesh, np.shape(leaf)[: axis + 1], logical, f"batch{jax.tree_util.keystr(path)}")
        return jax.device_put(leaf, named_sharding(mesh, logical))

    return jax.tree_util.tree_map_with_path(put, tree)
