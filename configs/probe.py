"""Will this teacher distil into this student, and if not, why? Six probes on any two models, nothing calibrated.

    python launch/tpu_run.py --config=configs/probe.py[:PAIR[,TASK]] --workdir=DIR [--config.FIELD=VALUE ...]

Measures the student as it is, distils it briefly from the teacher's texts, measures it again, prints a diagnosis in
plain words with the numbers behind it, and writes it into DIR/report.

tiny (default)  teacher and student of configs/calib_guard.py, trained in the run for a short while; minutes on two CPU
                cores.
gemma3_270m     Gemma 3 270M into SmolLM2-135M: other family, other kind of tokenizer. Needs the demo-models packages.
                Made for two CPU cores and a quarter of an hour, so with few texts: intervals are wide.

Any other two models, each a Hugging Face folder, a .gguf file or the name of a demo model:

    --config=configs/probe.py:gemma3_270m --config.teacher=FOLDER --config.student=FOLDER

TASK asks them questions of yours instead of sums: "math_text", "multiple_choice" or "instructions", with the same
--config.task.options as in configs/calib_guard.py.

--config.probes="gap,decoding" chooses probes. --config.probe_suite.problems and .samples make the intervals narrower,
--config.distillation.samples and .steps the distillation longer. The arms of a finished run of configs/calib_guard.py
are probed in its own folder, by its own config and --config.probes=all.
"""

from ml_collections import config_dict

from distill_jax.pipeline.config_files import neighbour_config
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.probe_settings import ProbeSuite
from distill_jax.pipeline.settings import Phase, to_config, with_full_values

PAIRS = ("tiny", "gemma3_270m")


def get_config(arg: str = "tiny") -> config_dict.ConfigDict:
    """The config of a pair of calib_guard.py without calibrated arms, with one student, and with the probes on."""
    pair = (arg or "tiny").partition(",")[0]
    if pair not in PAIRS:
        raise ValueError(f"pair {pair!r} does not exist; choose from {list(PAIRS)}")
    config = neighbour_config(__file__, "calib_guard", arg or "tiny")
    config.stages = ("prepare", "report")  # the probes run between them, and distil what they need
    config.probes = "all"
    config.eta = config_dict.ConfigDict()  # the original teacher is the only arm
    config.dial = to_config(DialConfig())  # there is no adapter to turn
    student = config.students["bytes" if pair == "tiny" else "student"]
    config.students = config_dict.ConfigDict({"student": student})
    config.teacher, config.student = config.roles.teacher.source, student.source
    config.roles.teacher.source = config.get_ref("teacher")
    config.students.student.source = config.get_ref("student")
    # There is no calibration, so no proxy either: the student stands in where the run asks for one.
    config.roles.proxy = student.copy_and_resolve_references()
    config.roles.proxy.source = config.get_ref("student")
    config.distillation.seeds, config.distillation.budgets, config.distillation.long_budgets = 1, (1.0,), ()
    config = _tiny(config) if pair == "tiny" else _gemma3_270m(config)
    config.smoke_values = with_full_values(
        config,
        {
            "distillation.samples": 16,
            "distillation.steps": 2,
            "distillation.training.batch_size": 4,
            "probe_suite.problems": 4,
            "probe_suite.samples": 2,
        },
    )
    return config


def _tiny(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    mix = (("explicit", 0.5), ("folded", 0.5))
    config.roles.teacher.phases = to_config((Phase(600, 0.01, mix, (4, 6), 32),))
    config.distillation.samples, config.distillation.steps = 1024, 200
    config.probe_suite = to_config(ProbeSuite(distil=True, frequent=5))
    return config


def _gemma3_270m(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    config.distillation.samples, config.distillation.steps = 48, 12
    config.distillation.training.batch_size = 4
    config.distillation.training.optimizer.warmup_steps = 2
    config.distillation.training.checkpoint_every = 0
    config.evaluation.batch = 16
    config.probe_suite = to_config(
        ProbeSuite(
            problems=8,
            samples=2,
            distil=True,
            batch_size=8,
            frequent=5,
            answer_mark=config.probe_suite.answer_mark,
        )
    )
    return config
