"""Rewards that are not one task's own: what tasks, calibration and evaluation share. One file a kind.

    math_answers    equality of mathematical answers, by the package math-verify
    choices         which option of a multiple-choice question a completion chose
    shaping         rewards for length and for form
    reward_model    a sequence classifier that scores open text
    functions       any Python function, called in child processes under a time limit (`worker` is the child)
    terms           rewards by name, for config files

Nothing here knows what a task is: a completion comes as an `Answered` (see `terms`) or as plain text.
"""
