"""Small files in the format of each configured data set."""

from __future__ import annotations

from pathlib import Path

from tests.data.prepared import write_lines

# Enough that the hash puts some into every split.
COUNT = 60


def gsm8k(folder: Path) -> Path:
    def row(n: int) -> dict[str, object]:
        answer = f"He has {n} and gets 2, so {n} + 2 = <<{n}+2={n + 2}>>{n + 2}.\n#### {n + 2:,}"
        return {"question": f"Tom has {n} pens and gets 2 more. How many has he?", "answer": answer}

    write_lines(folder / "train.jsonl", [row(n) for n in range(COUNT)])
    write_lines(folder / "test.jsonl", [row(n) for n in range(1000, 1010)])
    return folder


def big_math(folder: Path) -> Path:
    rows = [
        {
            "prompt": f"What is $\\frac{{{n}}}{{7}}$ doubled?",
            "solution": f"\\frac{{{2 * n}}}{{7}}",
            "source": "orca_math",
            "domain": ["Mathematics -> Prealgebra"],
            "llama8b_solve_rate": 0.2,
        }
        for n in range(1, COUNT)
    ]
    return write_lines(folder / "train-00000-of-00001.jsonl", rows).parent


def commonsense_qa(folder: Path) -> Path:
    def row(n: int, key: str) -> dict[str, object]:
        choices = {"label": list("ABCDE"), "text": [f"place {n}", "home", "a shop", "the sea", "a zoo"]}
        return {
            "id": f"{n:032x}",
            "question": f"Where would you put thing {n}?",
            "question_concept": "thing",
            "choices": choices,
            "answerKey": key,
        }

    write_lines(folder / "train.jsonl", [row(n, "ABCDE"[n % 5]) for n in range(COUNT)])
    write_lines(folder / "validation.jsonl", [row(n, "B") for n in range(500, 508)])
    write_lines(folder / "test.jsonl", [row(n, "") for n in range(700, 704)])  # labels are not published
    return folder


def mmlu_pro(folder: Path) -> Path:
    rows = [
        {
            "question_id": n,
            "question": f"Which is number {n}?",
            "options": [f"option {n + k}" for k in range(4 + n % 7)],
            "answer": "ABCDEFGHIJ"[n % 4],
            "answer_index": n % 4,
            "cot_content": "",
            "category": "math",
            "src": "x",
        }
        for n in range(COUNT)
    ]
    write_lines(folder / "test.jsonl", rows)
    write_lines(folder / "validation.jsonl", [row | {"question": "example"} for row in rows[:3]])
    return folder


def super_gpqa(folder: Path) -> Path:
    rows = [
        {
            "uuid": f"{n:x}",
            "question": f"What holds in case {n}?",
            "options": [f"law {n}", "nothing", "everything", "both"],
            "answer": "nothing",
            "answer_letter": "B",
            "discipline": "Science",
            "difficulty": "hard" if n % 2 else "easy",
            "is_calculation": False,
        }
        for n in range(COUNT)
    ]
    return write_lines(folder / "train.jsonl", rows).parent


def dolly(folder: Path) -> Path:
    rows = [
        {
            "instruction": f"Name {n} fruits.",
            "context": "" if n % 2 else f"There are {n} baskets.",
            "response": f"Apple, and {n - 1} others.",
            "category": "open_qa",
        }
        for n in range(COUNT)
    ]
    return write_lines(folder / "train.jsonl", rows).parent


def vicuna(folder: Path) -> Path:
    rows = [
        {"question_id": n, "category": "generic", "turns": [f"How can I improve skill {n}?"]}
        for n in range(8)
    ]
    return write_lines(folder / "question.jsonl", rows)
