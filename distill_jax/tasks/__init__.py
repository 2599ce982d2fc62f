"""Tasks: where prompts come from and how a completion is scored. One file a task.

    task = get_task("chain_arithmetic", operations=(3, 5))
    problems = task.problems("test", count=512, seed=0)
    reward = task.score(problems[0], problems[0].gold, ended=True)  # 1.0

To add a task, write one file and one registry line.

The file, `distill_jax/tasks/parity.py`, holds a class with the members of `Task`:

    class Parity:
        name = "parity"
        failures = 0  # this verifier cannot raise

        def __init__(self, bits: int = 12):
            self.bits = bits

        def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
            check_draw(split, count, seed)
            rng = task_rng(seed, f"{self.name} {split}")
            draws = ("".join(map(str, rng.integers(0, 2, self.bits))) for _ in itertools.count())
            texts = gather(((text, text) for text in draws), split, count, what=self.name)
            answers = [str(text.count("1") % 2) for text in texts]
            return [
                Problem(f"{text}?\\n", answer, f"#### {answer}", index)
                for index, (text, answer) in enumerate(zip(texts, answers))
            ]

        def score(self, problem: Problem, completion: str, ended: bool) -> float:
            return float(ended and completion.strip() == problem.gold)

The line, in `TASKS` of `distill_jax/tasks/base.py`:

    "parity": "distill_jax.tasks.parity:Parity",

The constructor's keyword arguments are the task's options: `get_task("parity", bits=8)`, or in a config file.
An option that the constructor does not know is an error there. `gather` makes the splits: which split a
question belongs to is a hash of its text, so that no seed, count or second data set can bring a held-out
question into training. A program that uses the library adds its own task without touching it:
`TASKS["parity"] = Parity`.
"""

from distill_jax.tasks.base import SPLITS, TASKS, Problem, Split, Task, get_task, split_of

__all__ = ["SPLITS", "TASKS", "Problem", "Split", "Task", "get_task", "split_of"]
