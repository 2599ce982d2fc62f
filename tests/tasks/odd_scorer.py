"""A scorer that does something else for every answer, to stand in for those of reasoning_gym."""

import time


def score(answer):
    if answer == "1":
        raise ZeroDivisionError("division by zero")
    if answer == "2":
        raise RecursionError
    if answer == "3":
        while True:
            time.sleep(0.01)
    return {"4": float("nan"), "5": "seven", "6": None, "11": 1.5, "12": -0.5, "13": 0.25, "14": True}[answer]
