"""Checkpoints and small files that survive a kill: a step stands whole or not at all, and comes back bit for bit.

Arrays go through orbax (written beside their place, then renamed); JSON goes through a temporary file and one rename.
A state is any pytree of arrays: registered dataclasses, optax states, dictionaries; typed PRNG keys keep their type.
Orbax itself would cast on a wrong dtype, skip a repeated step and bury a full disk under background traces; here each
of these is one clear error.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

# Orbax numbers its operations for the whole process: of two saves at a time, one would wait for the other's folders.
_SAVING = threading.RLock()
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """No room for what was to be saved: the disk, the quota or the size of one file is at its limit."""


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as JSON, whole or not at all: an existing file stays as it was until the new one is complete.

    Args:
      path: the file; its folder is created.
      obj: anything that `json` takes; NaN and infinities are refused, because other programs cannot read them.

    Raises:
      TypeError, ValueError: `obj` is not JSON.
      DiskFullError: no room; the existing file is untouched.
    """
    path = _local(path)
    text = json.dumps(obj, indent=2, allow_nan=False) + "\n"
    with _disk_errors(f"{path}", "the old file, if there was one, is intact; free space and start again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads what `write_json` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not JSON.
    """
    path = _local(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def save_tree(path: str | os.PathLike[str], tree: Any, overwrite: bool = False) -> None:
    """Saves one finished tree of arrays (a base model, a final adapter) and returns when it stands.

    Args:
      path: the folder to create.
      tree: pytree of jax or numpy arrays; typed PRNG keys are fine, empty arrays and Python numbers are not.
      overwrite: replace what stands at `path`; the old tree stays until the new one is complete.

    Raises:
      FileExistsError: something stands at `path` and `overwrite` is False.
      TypeError, ValueError: a leaf that cannot be saved, with its name.
      DiskFullError: no room; what stood at `path` is intact.
    """
    path = _local(path)
    retired = path.with_name(path.name + ".old")
    _finish_replacement(path, retired)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another path, or pass overwrite=True")
    _check_leaves(tree)
    fresh = path.with_name(path.name + ".new") if path.exists() else path
    intact = "" if fresh is path else "the old tree is intact; "
    _quiet_orbax()
    with (
        _SAVING,
        _disk_errors(f"a tree to {path}", f"{intact}free space and start again"),
        ocp.StandardCheckpointer() as checkpointer,
    ):
        checkpointer.save(fresh, tree, force=True)
    if fresh is not path:
        shutil.rmtree(retired, ignore_errors=True)  # left by a kill after the second rename
        os.rename(path, retired)
        os.rename(fresh, path)
        shutil.rmtree(retired)


def load_tree(path: str | os.PathLike[str], abstract_tree: Any) -> Any:
    """Loads what `save_tree` wrote, onto the shardings of `abstract_tree`.

    Args:
      path: the folder that `save_tree` made.
      abstract_tree: same structure, leaves `jax.ShapeDtypeStruct` or arrays. A leaf with a sharding comes back on it,
        a `jax.ShapeDtypeStruct` without one on the first device, a numpy leaf as numpy.

    Returns:
      The tree with the containers of `abstract_tree` and the saved values, bit for bit.

    Raises:
      FileNotFoundError: nothing was saved there.
      ValueError: names, shapes or dtypes differ (all differences are listed), or the files are damaged.
    """
    path = _local(path)
    _finish_replacement(path, path.with_name(path.name + ".old"))
    if not path.exists():
        raise FileNotFoundError(f"there is no saved tree at {path}")
    return _restore_tree(path, abstract_tree, f"the tree at {path}", "save it again")


class Checkpointer:
    """The checkpoints of one training loop in one folder; the newest `keep` steps stay.

    `save` returns as soon as the arrays are copied and writes in the background, so the caller may donate them at once.
    A save that was cut off (a kill, a full disk) leaves no step behind: `latest_step` never names it.

        with Checkpointer(folder) as checkpointer:
            step, state, meta = checkpointer.restore(abstract_state)
            checkpointer.save(step + 1, state, {"data_position": 17})
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        """Opens or creates the folder, and removes what an interrupted save left in it.

        Args:
          directory: a local folder; relative paths are taken from the working directory of now.
          keep: number of newest steps that stay, at least 1.

        Raises:
          ValueError: `keep` below 1, or `directory` is a URL.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = _local(directory)
        self._keep = keep
        self._pending: int | None = None
        self._manager: ocp.CheckpointManager | None = None
        self._open()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts to save `state` as `step`; the save before it is finished first.

        Args:
          step: greater than every saved step.
          state: pytree of jax or numpy arrays, no empty ones.
          meta: JSON (data position, config, best score); tuples come back as lists.

        Raises:
          ValueError: the step is not new, `meta` is not JSON, or a leaf cannot be saved.
          TypeError: a leaf that is not an array.
          DiskFullError: no room for this step or the one before it; older steps are intact.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step {step} is not after step {latest}, the newest in {self.directory}")
        _check_leaves(state)
        try:
            json.dumps(dict(meta), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta of step {step} must be JSON: {error}") from error
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta)))
        self._pending = step
        with self._watch(), _SAVING:
            self._open().save(step, args=items, force=True)
            if threading.current_thread() is not threading.main_thread():
                self._open().wait_until_finished()  # somebody else may save next

    def wait(self) -> None:
        """Returns when the running save stands.

        Raises:
          DiskFullError: there was no room for it.
        """
        with self._watch():
            self._open().wait_until_finished()
        self._pending = None

    def latest_step(self) -> int | None:
        """The newest step that stands whole, after waiting for the running save; None when there is none."""
        self.wait()
        return self._open().latest_step()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """Restores a step onto the shardings of `abstract_state`.

        Args:
          abstract_state: as `abstract_tree` of `load_tree`.
          step: the step, by default the newest.

        Returns:
          `(step, state, meta)`, the arrays bit for bit as they were saved.

        Raises:
          FileNotFoundError: no such step; the steps that stand are listed.
          ValueError: names, shapes or dtypes differ, or the files are damaged.
        """
        self.wait()
        steps = sorted(self._open().all_steps())
        if not steps:
            raise FileNotFoundError(f"no checkpoint stands in {self.directory}")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; steps there: {steps}")
        folder = self.directory / str(step)
        older = [s for s in steps if s < step]
        remedy = f"remove {folder} to " + (
            f"go on from step {older[-1]}" if older else "start from the beginning"
        )
        state = _restore_tree(folder / "state", abstract_state, f"the checkpoint {folder}", remedy)
        meta = self._open().restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        return step, state, meta

    def close(self) -> None:
        """Waits for the running save and lets the folder go.

        Raises:
          DiskFullError: there was no room for the running save.
        """
        if self._manager is None:
            return
        self.wait()
        self._manager.close()
        self._manager = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what went wrong first is what the user must see

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            _quiet_orbax()
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
            with _SAVING:
                self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        """Turns a failed save into one error, and forgets orbax's manager, which would report it again and again."""
        try:
            yield
        except Exception as error:
            step, self._pending, self._manager = self._pending, None, None
            if not _is_disk_full(error):
                raise
            standing = ocp.utils.checkpoint_steps(self.directory)
            intact = (
                f"the checkpoint of step {max(standing)} is intact"
                if standing
                else "no older checkpoint stands"
            )
            raise DiskFullError(
                f"disk is full while saving step {step} to {self.directory}; {intact}; free space and start again"
            ) from error


def _restore_tree(path: Path, abstract_tree: Any, what: str, remedy: str) -> Any:
    """Restores the orbax tree at `path`, after comparing names, shapes and dtypes with those asked for."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            _check_same(_signature(stored), _signature(abstract_tree), what)
            restored = checkpointer.restore(path, jax.tree.map(_target, abstract_tree))
    except _MismatchError:
        raise
    except Exception as error:
        raise ValueError(
            f"{what} cannot be read, its files are damaged or missing; {remedy}: {error}"
        ) from error
    return jax.tree.map(
        lambda want, got: np.asarray(got) if isinstance(want, np.ndarray) else got, abstract_tree, restored
    )


class _MismatchError(ValueError):
    """A saved tree is not of the shape asked for."""


def _target(leaf: Any) -> Any:
    """A leaf as orbax's restore wants it: numpy, or shape, dtype and sharding."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _signature(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of every leaf, in the terms of the files: a typed key is its uint32 words."""
    signature = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        signature[_name(path)] = (tuple(leaf.shape), np.dtype(leaf.dtype).name)
    return signature


def _check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raises with every difference between two signatures."""
    lines = [
        f"{name}: in the checkpoint {stored.get(name, 'nothing')}, asked for {wanted.get(name, 'nothing')}"
        for name in sorted({*stored, *wanted})
        if stored.get(name) != wanted.get(name)
    ]
    if lines:
        raise _MismatchError(f"{what} is not of the state asked for:\n  " + "\n  ".join(lines))


def _check_leaves(tree: Any) -> None:
    """Refuses at the door what orbax would save wrongly or only fail on in the background."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(
                f"leaf {_name(path)!r} must be an array to be saved, got {type(leaf).__name__}: {leaf!r}"
            )
        if leaf.size == 0:
            raise ValueError(
                f"leaf {_name(path)!r} is empty (shape {leaf.shape}); empty arrays cannot be saved"
            )


def _name(path: tuple[Any, ...]) -> str:
    """A leaf's path as text, the same for a dataclass, a named tuple and the dictionary that orbax makes of them."""
    return "/".join(
        str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a))) for key in path
    )


def _finish_replacement(path: Path, retired: Path) -> None:
    """Puts the old tree back when a kill fell between the two renames of `save_tree`."""
    if retired.exists() and not path.exists():
        os.rename(retired, path)


def _local(path: str | os.PathLike[str]) -> Path:
    """The absolute path; orbax fails late and unclearly on a relative one."""
    if "://" in os.fspath(path):
        raise ValueError(f"{path} is a URL; give a folder of this machine (a bucket can be mounted as one)")
    return Path(path).expanduser().absolute()


def _is_disk_full(error: BaseException) -> bool:
    """Whether "no room" is anywhere in the chain, as an errno or in the words of orbax's C++ writer."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in NO_ROOM:
            return True
        if any(int(code) in NO_ROOM for code in re.findall(r"os_error_code='(\d+)'", str(link))):
            return True
        link = link.__cause__ or link.__context__
    return False


@contextlib.contextmanager
def _disk_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns "no room" into a `DiskFullError` that says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _is_disk_full(error):
            raise
        raise DiskFullError(f"disk is full while saving {what}; {remedy}") from error


@functools.cache
def _quiet_orbax() -> None:
    """Orbax logs the trace of a failed save from each of its threads and then raises it; raising is enough.

    The threads may log long after the call that failed, so the filter stays for the life of the process.
    """
    orbax = os.path.dirname(ocp.__file__)
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno != logging.ERROR or not record.pathname.startswith(orbax)
    )
