"""Checkpoints: exact round trips, clear errors, and nothing lost on a full disk or a kill."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import checkpoint
from distill_jax.checkpoint import Checkpointer, DiskFullError, load_tree, read_json, save_tree, write_json


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: jax.Array
    weights: dict[str, jax.Array]
    opt_state: optax.OptState
    key: jax.Array


def make_state(seed: int = 0) -> State:
    weights = {
        "float32": jnp.array([np.nan, -0.0, np.inf, np.float32(1e-42), 1 / 3], jnp.float32),
        "bfloat16": jax.random.normal(jax.random.key(seed), (8, 4)).astype(jnp.bfloat16),
        "flags": jnp.array([True, False]),
    }
    return State(
        step=jnp.int32(seed),
        weights=weights,
        opt_state=optax.adam(1e-3).init({"float32": weights["float32"]}),
        key=jax.random.split(jax.random.key(seed), 3),
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def raw_bytes(leaf) -> tuple:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (str(leaf.dtype), *raw_bytes(jax.random.key_data(leaf)))
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def assert_identical(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert raw_bytes(a) == raw_bytes(b)


def test_state_comes_back_bit_for_bit_with_its_containers_and_meta(tmp_path: Path) -> None:
    state = make_state(3)
    meta = {"data_position": 17, "config": {"lr": 1e-4, "names": ["a", "b"], "none": None}}
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(3, state, meta)
    with Checkpointer(tmp_path / "c") as checkpointer:
        step, restored, restored_meta = checkpointer.restore(abstract(state))
    assert step == 3 and restored_meta == meta
    assert isinstance(restored, State)
    assert_identical(restored, state)
    # the key is still a key: it draws what the saved one would have drawn
    assert jnp.array_equal(jax.random.bits(restored.key[0]), jax.random.bits(state.key[0]))


def test_numpy_leaves_stay_numpy_with_64_bits(tmp_path: Path) -> None:
    tree = {"rows": np.array([2**40, -1]), "floats": np.array([0.1, np.nan])}
    save_tree(tmp_path / "t", tree)
    restored = load_tree(tmp_path / "t", jax.tree.map(np.zeros_like, tree))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert_identical(restored, tree)


def test_restores_onto_the_shardings_asked_for(tmp_path: Path, mesh_cube: Mesh, mesh_single: Mesh) -> None:
    values = jax.random.normal(jax.random.key(0), (8, 6))
    spread = NamedSharding(mesh_cube, PartitionSpec("fsdp", "tensor"))
    save_tree(tmp_path / "t", {"w": jax.device_put(values, spread)})
    for sharding in (
        spread,
        NamedSharding(mesh_cube, PartitionSpec(None, "data")),
        NamedSharding(mesh_single, PartitionSpec()),
    ):
        target = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding)}
        restored = load_tree(tmp_path / "t", target)
        assert restored["w"].sharding == sharding
        assert_identical(restored, {"w": values})
    assert load_tree(tmp_path / "t", abstract({"w": values}))["w"].devices() == {jax.devices()[0]}


def test_a_state_donated_right_after_the_save_is_saved_as_it_was(tmp_path: Path) -> None:
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((256, 1024))
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        for step in range(3):
            checkpointer.save(step, {"x": x}, {})
            x = advance(x)
        for step in range(3):
            _, restored, _ = checkpointer.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, step)
            assert float(restored["x"].min()) == float(restored["x"].max()) == step


def test_keeps_the_newest_steps_and_takes_only_later_ones(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(FileNotFoundError, match="no checkpoint stands"):
            checkpointer.restore(abstract(state))
        for step in (1, 2, 5):
            checkpointer.save(step, replace(state, step=jnp.int32(step)), {"step": step})
        assert checkpointer.latest_step() == 5
        step, restored, meta = checkpointer.restore(abstract(state), 2)
        assert (step, int(restored.step), meta) == (2, 2, {"step": 2})
        with pytest.raises(FileNotFoundError, match=r"step 1 .*steps there: \[2, 5\]"):
            checkpointer.restore(abstract(state), 1)
        for step in (5, 3):
            with pytest.raises(ValueError, match=f"step {step} is not after step 5"):
                checkpointer.save(step, state, {})


def test_every_difference_of_name_shape_and_dtype_is_listed(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {})
        wanted = abstract(state)
        wanted.weights.pop("flags")
        wanted.weights["extra"] = jax.ShapeDtypeStruct((2,), jnp.int32)
        wanted.weights["float32"] = jax.ShapeDtypeStruct((5,), jnp.float16)
        wanted.weights["bfloat16"] = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
        with pytest.raises(ValueError, match="not of the state asked for") as caught:
            checkpointer.restore(wanted)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "weights/bfloat16: in the checkpoint ((8, 4), 'bfloat16'), asked for ((4, 8), 'bfloat16')",
        "weights/extra: in the checkpoint nothing, asked for ((2,), 'int32')",
        "weights/flags: in the checkpoint ((2,), 'bool'), asked for nothing",
        "weights/float32: in the checkpoint ((5,), 'float32'), asked for ((5,), 'float16')",
    ]


def test_what_cannot_be_saved_is_refused_at_the_door(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(TypeError, match=r"'b/lr' must be an array.*float"):
            checkpointer.save(0, {"a": jnp.ones(2), "b": {"lr": 0.1}}, {})
        with pytest.raises(ValueError, match=r"'a' is empty \(shape \(0, 3\)\)"):
            checkpointer.save(0, {"a": jnp.ones((0, 3))}, {})
        with pytest.raises(ValueError, match="meta of step 0 must be JSON"):
            checkpointer.save(0, {"a": jnp.ones(2)}, {"array": np.ones(2)})
        assert checkpointer.latest_step() is None
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpointer(tmp_path / "c", keep=0)
    with pytest.raises(ValueError, match="is a URL"):
        Checkpointer("gs://bucket/run")


def test_a_relative_folder_is_the_one_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run") as checkpointer:
        monkeypatch.chdir("/")
        checkpointer.save(1, {"a": jnp.ones(2)}, {})
    assert (tmp_path / "run" / "1").is_dir()


def test_a_finished_tree_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_tree(path, {"a": jnp.ones(2)})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_tree(path, {"a": jnp.zeros(2)})
    target = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert_identical(load_tree(path, target), {"a": jnp.ones(2)})
    save_tree(path, {"a": jnp.zeros(2)}, overwrite=True)
    assert_identical(load_tree(path, target), {"a": jnp.zeros(2)})
    assert sorted(os.listdir(tmp_path)) == ["model"]
    with pytest.raises(FileNotFoundError, match="no saved tree"):
        load_tree(tmp_path / "other", target)


@pytest.mark.parametrize(("killed_after", "stands"), [(".old", 1.0), ("model", 0.0)])
def test_a_kill_at_either_rename_of_an_overwrite_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: str, stands: float
) -> None:
    path, target = tmp_path / "model", {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    save_tree(path, {"a": jnp.ones(2)})
    rename = os.rename

    def rename_then_die(source, destination):
        rename(source, destination)
        if str(source).startswith(str(path)) and str(destination).endswith(killed_after):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "rename", rename_then_die)
    with pytest.raises(KeyboardInterrupt):
        save_tree(path, {"a": jnp.zeros(2)}, overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "model.old").exists()
    assert_identical(load_tree(path, target), {"a": jnp.full(2, stands)})
    save_tree(path, {"a": jnp.full(2, 2.0)}, overwrite=True)
    assert_identical(load_tree(path, target), {"a": jnp.full(2, 2.0)})
    assert os.listdir(tmp_path) == ["model"]


def test_damaged_files_say_which_folder_to_remove(tmp_path: Path) -> None:
    state = {"a": jax.random.normal(jax.random.key(0), (1000,))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        checkpointer.save(2, state, {})
    for file in (tmp_path / "2" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:100])
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=r"damaged or missing; remove .*/2 to go on from step 1"):
            checkpointer.restore(abstract(state))
        assert_identical(checkpointer.restore(abstract(state), 1)[1], state)


# Both programs below are real processes: one meets a real limit on file size, one is really killed. A full disk itself
# (a small tmpfs) gives the same error with another number, which `test_every_way_of_no_room_is_recognised` covers.
PROGRAM_HEAD = """
    import os, resource, signal, sys
    import jax, jax.numpy as jnp
    from distill_jax.checkpoint import Checkpointer, DiskFullError, save_tree
    folder, limit = sys.argv[1], int(sys.argv[2])
    state = {"x": jax.random.normal(jax.random.key(0), (200_000,))}
"""


def run_program(body: str, *args: object) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(PROGRAM_HEAD) + textwrap.dedent(body)
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "limit", [100, 100_000]
)  # the first stops the small metadata files, the second the arrays
@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_is_one_clear_error_and_the_older_step_stands(
    tmp_path: Path, limit: int, keep: int
) -> None:
    result = run_program(
        f"""
        with Checkpointer(folder, keep={keep}) as checkpointer:
            checkpointer.save(1, state, {{"n": 1}})
            checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                checkpointer.save(2, state, {{"n": 2}})
                checkpointer.wait()
            except DiskFullError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print(checkpointer.latest_step())  # the same process can go on once there is room
            checkpointer.save(3, state, {{"n": 3}})
        print(sorted(os.listdir(folder)))
        """,
        tmp_path,
        limit,
    )
    assert result.returncode == 0, result.stderr
    message, latest, listing = result.stdout.splitlines()
    assert message == (
        f"disk is full while saving step 2 to {tmp_path}; "
        "the checkpoint of step 1 is intact; free space and start again"
    )
    assert latest == "1"
    assert listing == str(["3"] if keep == 1 else ["1", "3"])
    assert "Traceback" not in result.stderr and "ERROR" not in result.stderr


def test_a_full_disk_while_a_tree_is_replaced_keeps_the_old_tree(tmp_path: Path) -> None:
    result = run_program(
        """
        save_tree(folder, state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save_tree(folder, {"x": state["x"] + 1}, overwrite=True)
        except DiskFullError as error:
            print(error)
        """,
        tmp_path / "t",
        100_000,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"disk is full while saving a tree to {tmp_path / 't'}; the old tree is intact; free space and start again\n"
    )
    state = {"x": jax.random.normal(jax.random.key(0), (200_000,))}
    assert_identical(load_tree(tmp_path / "t", abstract(state)), state)


def test_a_killed_save_leaves_no_step_and_no_litter(tmp_path: Path) -> None:
    result = run_program(
        """
        checkpointer = Checkpointer(folder)
        checkpointer.save(1, state, {})
        checkpointer.wait()
        def kill_before_rename(source, destination, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename = os.replace = kill_before_rename
        checkpointer.save(2, state, {})
        checkpointer.wait()
        """,
        tmp_path,
        0,
    )
    assert result.returncode == -9, result.stderr
    assert any(name.startswith("2.") for name in os.listdir(tmp_path)), (
        "the half step must exist for this test to mean anything"
    )
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, {"x": jnp.ones(3)}, {})
        assert checkpointer.latest_step() == 2
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_every_way_of_no_room_is_recognised() -> None:
    def chained() -> BaseException:
        try:
            try:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            except OSError as error:
                raise RuntimeError("the save failed") from error
        except RuntimeError as error:
            return error

    assert checkpoint._is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert checkpoint._is_disk_full(chained())
    assert checkpoint._is_disk_full(
        ValueError("Failed to write 9 bytes: No space left on device [os_error_code='28']")
    )
    assert not checkpoint._is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not checkpoint._is_disk_full(ValueError("RESOURCE_EXHAUSTED: out of memory [os_error_code='12']"))


def test_other_errors_of_a_save_are_passed_on_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": jnp.ones(2)}, {})
        checkpointer.wait()

        def denied(*_args, **_kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(checkpointer._manager, "save", denied)
        with pytest.raises(PermissionError):
            checkpointer.save(2, {"a": jnp.ones(2)}, {})
        assert checkpointer.latest_step() == 1


def test_an_error_of_the_loop_is_not_hidden_by_one_of_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KeyError, match="first") as caught:
        with Checkpointer(tmp_path) as checkpointer:
            monkeypatch.setattr(checkpointer._manager, "wait_until_finished", full)
            raise KeyError("first")
    assert any("disk is full" in note for note in caught.value.__notes__)


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "summary.json"
    value = {"text": "é 日本 🙂", "list": [1, 2.5, None, True]}
    write_json(path, value)
    assert read_json(path) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"nan": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"array": np.ones(2)})
    assert read_json(path) == value
    path.write_text("{half")
    with pytest.raises(ValueError, match=r"summary\.json is not JSON"):
        read_json(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_json_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, function, full)
    with pytest.raises(
        DiskFullError, match=r"disk is full while saving .*summary\.json; .*intact; free space"
    ):
        write_json(path, {"new": 2})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["summary.json"]
    assert json.loads(path.read_text()) == {"old": 1}
