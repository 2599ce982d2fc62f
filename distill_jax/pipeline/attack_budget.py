"""What one student of an attack costs: teacher texts and training steps."""

from __future__ import annotations

from distill_jax.attacks.attack import Attack, Knob, Recipe
from distill_jax.pipeline.settings import Settings


def student_steps(settings: Settings, recipe: Recipe) -> int:
    """Training steps of one student under a recipe."""
    return max(1, round(settings.distillation.steps * recipe.steps))


def scored_rollouts(settings: Settings, recipe: Recipe) -> float:
    """How many texts of its own one student sends to the teacher while it is trained (their expected number)."""
    if recipe.loss not in ("on_policy", "policy_gradient"):
        return 0.0
    rows = student_steps(settings, recipe) * settings.distillation.training.batch_size
    return rows * float(recipe.options["student_share"])


def budget(settings: Settings, attack: Attack, knob: Knob) -> dict[str, float]:
    """What one student costs its attacker, as multiples of the run's samples and steps.

    queries: texts that the teacher is asked for, and the student's own that it is sent to score.
    """
    recipe = attack.recipe_of(knob)
    scored = scored_rollouts(settings, recipe) / settings.distillation.samples
    return {"queries": knob.queries + scored, "steps": recipe.steps}
