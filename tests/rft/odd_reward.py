"""A user's own reward, as `test_further_rewards.py` names it: it counts letters, and cannot bear one of them."""


def score(completion: str) -> float:
    if "c" in completion:
        raise ValueError("no c, please")
    return float(completion.count("a"))
