"""Attack the teachers of a finished calib_guard run, or any model, with the whole suite, and judge the suite itself.

    python launch/tpu_run.py --config=configs/attack.py[:PAIR] --workdir=DIR [--config.FIELD=VALUE ...]

DIR is the folder of a run of configs/calib_guard.py with the same PAIR and the same fields: its arms are attacked, its
students are the attackers, and its report gains a section. In a new folder the students are prepared first, and the
original teacher is the only arm; add models of your own:

    --config.roles.teacher.source=CLEAN_FOLDER --config.attack_suite.folders="guarded=FOLDER,other=FOLDER"

--config.attacks=tier1 (default), tier2, tier3, tier1-text, or ids such as "A1,A3,A7".
--config.attack_suite.grid=full tries every knob; .arms and .kinds choose teachers and students.

The command ends with an error when a positive control fails: then no number of this evaluation means anything.
"""

from ml_collections import config_dict

from distill_jax.pipeline.config_files import neighbour_config
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.settings import to_config


def get_config(arg: str = "tiny") -> config_dict.ConfigDict:
    """The config of a pair of calib_guard.py, with the attack suite on and the calibration off."""
    config = neighbour_config(__file__, "calib_guard", arg)
    config.stages = ("prepare", "report")  # the suite runs between them, because `attacks` is set
    config.attacks = "tier1"
    config.probes, config.dial = "none", to_config(DialConfig())  # their students come from a finished run
    return config
