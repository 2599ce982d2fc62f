"""Mesh text, placement by logical axes, and errors that name what does not divide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from distill_jax.mesh import (
    ShardingError,
    batch_sharding,
    constrain,
    make_mesh,
    named_sharding,
    place,
    place_batch,
    replicated,
)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=-1", (8, 1, 1)),
        ("tensor=-1", (1, 1, 8)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 2)),
        ("fsdp=-1,tensor=2", (1, 4, 2)),
        (" tensor = 2 , data = 4 ,", (4, 1, 2)),
    ],
)
def test_text_becomes_a_mesh_of_automatic_axes(text: str, sizes: tuple[int, ...]) -> None:
    mesh = make_mesh(text)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(mesh.devices.flat) == set(jax.devices())


def test_only_the_devices_that_are_given_are_used() -> None:
    devices = jax.devices()[2:6]
    mesh = make_mesh("data=2,tensor=-1", devices=devices)
    assert mesh.devices.shape == (2, 1, 2)
    assert set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=8", "'model=8' is not one of data=SIZE, fsdp=SIZE, tensor=SIZE"),
        ("data", "'data' is not one of"),
        ("data=2,data=4", "axis 'data' is given twice"),
        ("data=two", "size of 'data' must be an integer, got 'two'"),
        ("data=", "size of 'data' must be an integer, got ''"),
        ("data=0", "size of 'data' must be at least 1"),
        ("data=-2", "size of 'data' must be at least 1"),
        ("data=-1,tensor=-1", r"only one axis may be -1, got \['data', 'tensor'\]"),
        ("data=2,tensor=2", "needs 4 devices, but there are 8"),
        ("data=16", "needs 16 devices, but there are 8"),
        ("data=-1,tensor=3", "8 devices do not divide by 3"),
        ("", "needs 1 devices, but there are 8"),
    ],
)
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(text)


def test_shardings_of_logical_axes(mesh_cube: Mesh) -> None:
    assert named_sharding(mesh_cube, ("layers", "embed", "heads", "head_dim")).spec == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    assert batch_sharding(mesh_cube).spec == PartitionSpec(("data", "fsdp"))
    assert replicated(mesh_cube).spec == PartitionSpec()
    with pytest.raises(ValueError, match=r"unknown logical axes \['width'\]"):
        named_sharding(mesh_cube, ("embed", "width"))


def test_placed_values_are_the_same_and_cut_as_their_axes_say(mesh_cube: Mesh) -> None:
    tree = {
        "kernel": np.arange(4 * 6, dtype=np.float32).reshape(4, 6),
        "norm": {"scale": np.arange(5, dtype=np.float32)},
    }
    axes = {"kernel": ("embed", "mlp"), "norm": {"scale": ("norm",)}}
    placed = place(tree, axes, mesh_cube)
    # fsdp cuts 4 rows in two, tensor cuts 6 columns in two; data holds copies.
    assert {s.data.shape for s in placed["kernel"].addressable_shards} == {(2, 3)}
    assert {s.data.shape for s in placed["norm"]["scale"].addressable_shards} == {(5,)}
    jax.tree.map(np.testing.assert_array_equal, placed, tree)


def test_abstract_arrays_get_shardings_and_nothing_else_changes(mesh_cube: Mesh) -> None:
    tree = {"a": jax.ShapeDtypeStruct((4, 6), jnp.bfloat16), "b": jax.ShapeDtypeStruct((3,), jnp.int32)}
    placed = place(tree, {"a": ("vocab", "embed"), "b": ("norm",)}, mesh_cube)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in placed.values())
    assert (placed["a"].shape, placed["a"].dtype) == ((4, 6), jnp.bfloat16)
    assert placed["a"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert placed["b"].sharding.shard_shape((3,)) == (3,)
    with pytest.raises(ShardingError, match="dimension 0"):
        place({"a": jax.ShapeDtypeStruct((3, 6), jnp.float32)}, {"a": ("vocab", "embed")}, mesh_cube)


def test_an_empty_tree_is_placed(mesh_cube: Mesh) -> None:
    assert place({}, {}, mesh_cube) == {}


def test_the_error_names_parameter_dimension_axis_and_sizes(mesh_cube: Mesh) -> None:
    tree = {"layers": {"attn": {"k": {"kernel": np.zeros((2, 8, 3, 4), np.float32)}}}}
    axes = {"layers": {"attn": {"k": {"kernel": ("layers", "embed", "kv_heads", "head_dim")}}}}
    with pytest.raises(ShardingError) as caught:
        place(tree, axes, mesh_cube, what="teacher")
    text = str(caught.value)
    assert text.startswith("teacher['layers']['attn']['k']['kernel']: dimension 2 ('kv_heads')")
    assert "has size 3, which does not divide by 2" in text
    assert "mesh axis 'tensor' of mesh {'data': 2, 'fsdp': 2, 'tensor': 2}" in text
    assert isinstance(caught.value, ValueError)


def test_axes_that_do_not_match_the_dimensions_are_refused(mesh_cube: Mesh) -> None:
    with pytest.raises(ShardingError, match=r"params\['a'\]: shape \(4, 6\) has 2 dimensions"):
        place({"a": np.zeros((4, 6))}, {"a": ("embed",)}, mesh_cube)


@pytest.mark.parametrize(("axis", "piece"), [(0, (2, 4)), (1, (8, 1))])
def test_batches_are_cut_along_one_dimension(mesh_cube: Mesh, axis: int, piece: tuple[int, int]) -> None:
    x = np.arange(32).reshape(8, 4)
    placed = place_batch({"x": x, "count": np.float32(3)}, mesh_cube, axis=axis)
    assert {s.data.shape for s in placed["x"].addressable_shards} == {piece}
    np.testing.assert_array_equal(placed["x"], x)
    assert placed["count"].sharding.is_fully_replicated


def test_what_has_no_such_dimension_is_replicated(mesh_cube: Mesh) -> None:
    placed = place_batch({"per_replica": np.arange(3)}, mesh_cube, axis=1)
    assert placed["per_replica"].sharding.is_fully_replicated


@pytest.mark.parametrize(("axis", "shape"), [(0, (6, 4)), (1, (4, 6))])
def test_rows_that_do_not_divide_are_refused_by_name(
    mesh_cube: Mesh, axis: int, shape: tuple[int, int]
) -> None:
    with pytest.raises(ShardingError) as caught:
        place_batch({"tokens": np.zeros(shape, np.int32)}, mesh_cube, axis=axis)
    text = str(caught.value)
    assert text.startswith(f"batch['tokens']: dimension {axis} ('batch')")
    assert "has size 6, which does not divide by 4" in text and "('data', 'fsdp')" in text


def test_constraints_cut_inside_jit_and_do_nothing_without_a_mesh(mesh_cube: Mesh) -> None:
    x = jnp.arange(32.0).reshape(8, 4)
    cut = jax.jit(lambda x: constrain(2 * x, mesh_cube, ("batch", None)))(x)
    assert {s.data.shape for s in cut.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(cut, 2 * np.asarray(x))
    assert constrain(x, None, ("batch", None)) is x
