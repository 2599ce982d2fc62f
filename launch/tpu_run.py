"""The main job: ``python launch/tpu_run.py --config=configs/calib_guard.py[:PAIR] --workdir=DIR --config.FIELD=VALUE``.

One command for TPU, GPU and CPU, on one host; the same workdir again goes on where it stopped.
"""

import os
import sys
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from distill_jax import pipeline

CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, or FILE:PAIR.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; without it, one under runs/.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 1, "Devices of a CPU backend; one uses all cores.")
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from, not only what it says.")
flags.mark_flag_as_required("config")
logging.set_verbosity(logging.WARNING)  # --verbosity=0 brings the notes of every library back


def fail(message: object) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except AttributeError as error:  # ml_collections: an unknown field, with the nearest name
        fail(
            f"unknown config field {error.args[0].args[0] if isinstance(error.args[0], KeyError) else error}"
        )
    except (
        flags.Error
    ) as error:  # an error of get_config brings its trace along; its last line is what it says
        fail(str(error).strip().splitlines()[-1].strip() if "Traceback" in str(error) else error)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unexpected arguments {argv[1:]}; flags are written --name=value")
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/distill_jax/xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    try:
        pipeline.run(CONFIG.value, WORKDIR.value)
    except (ValueError, OSError) as error:  # wrong input, or a disk that cannot take the run
        if TRACEBACK.value:
            raise
        fail(f"{error}\n(--traceback shows where it came from)")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
