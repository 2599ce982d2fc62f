"""Does a probe predict what a student learns? And does the detector tell calibrated teachers apart?

    python launch/tpu_run.py --config=configs/study.py[:PAIR] --workdir=DIR [--config.FIELD=VALUE ...]

DIR is the folder of a finished run of configs/calib_guard.py with the same PAIR and the same fields. More teachers are
calibrated from its original (12 with the values below, in DIR/study), every probe is measured on each of them and on
the run's own arms, short students are trained on what each writes, and the report gains a section: which numbers go
with the students' accuracy, and which do not. Positions of the dial join in where the run has turned it. A second start
goes on where the first one stopped; more strengths, seeds or controls may be added.

--config.study.eta, .seeds and .controls say how many teachers, .calibration_steps how long each is calibrated.

The same teachers are what the detector is tried on, those of one run or of several:

    python -m distill_jax.pipeline.detector_reference DIR [DIR ...] --out FOLDER
"""

from ml_collections import config_dict

from distill_jax.pipeline.config_files import neighbour_config
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.settings import to_config, with_full_values
from distill_jax.pipeline.study_settings import StudyConfig


def get_config(arg: str = "tiny") -> config_dict.ConfigDict:
    """The config of a pair of calib_guard.py, with the study on and everything else off."""
    config = neighbour_config(__file__, "calib_guard", arg)
    config.stages = ("prepare", "report")  # the study runs between them
    turned = config.dial
    # The dial's students: its positions can be compared only with students of the same sizes.
    study = StudyConfig(
        kind=turned.kind,
        student_seeds=turned.seeds,
        samples=turned.samples,
        student_steps=turned.steps,
        problems=turned.problems,
        calibration_steps=25,  # fewer than the run's: enough, and weaker calibrations are what ranks need
    )
    config.study = to_config(study)
    config.probes, config.dial = "none", to_config(DialConfig())  # their results come from the finished run
    smoke = {
        "study.eta": (0.5,),
        "study.controls": 1,
        "study.calibration_steps": 2,
        "study.samples": 64,
        "study.student_steps": 10,
        "study.problems": 32,
    }
    config.smoke_values = config.smoke_values + with_full_values(config, smoke)
    return config
