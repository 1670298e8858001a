"""Invented rows in the formats that published evaluations have on the Hugging Face hub."""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]

_NOUNS = ("river", "engine", "café", "teacher", "window", "planet", "garden", "letter", "market", "signal")
_VERBS = ("moves", "breaks", "grows", "waits", "turns", "glows", "sinks", "opens")


def _sentence(rng: random.Random, words: int) -> str:
    chosen = [rng.choice(_NOUNS if number % 2 else _VERBS) for number in range(words)]
    return " ".join(chosen).capitalize()


def _choices(rng: random.Random, number: int) -> Row:
    """Return 3 to 5 choices, numbered by letters or digits, as in ARC."""
    count = 3 + number % 3
    labels = list("ABCDE" if number % 2 else "12345")[:count]
    texts = [_sentence(rng, rng.randint(1, 5)) for _ in range(count)]
    if number % 7 == 0:
        texts[2] = texts[1]
    return {"text": texts, "label": labels}


def rows_of(name: str, count: int) -> list[Row]:
    """Return rows of the evaluation ``name``; some have equal answers or odd white space."""
    rng = random.Random(name)
    return [_row(name, rng, number) for number in range(count)]


def _row(name: str, rng: random.Random, number: int) -> Row:
    question = _sentence(rng, rng.randint(2, 8))
    if name in ("arc_easy", "arc_challenge"):
        choices = _choices(rng, number)
        return {"id": f"Q{number}", "question": question + "?", "choices": choices, "answerKey": choices["label"][-1]}
    if name == "openbookqa":
        choices = _choices(rng, number)
        return {"id": f"Q{number}", "question_stem": question, "choices": choices, "answerKey": choices["label"][0]}
    if name == "piqa":
        return {"goal": question, "sol1": _sentence(rng, 4), "sol2": _sentence(rng, 6), "label": number % 2}
    if name == "winogrande":
        start = "" if number % 5 == 0 else f"{question}, because the "
        options = {"option1": rng.choice(_NOUNS[:5]), "option2": rng.choice(_NOUNS[5:])}
        return {"sentence": f"{start}_ {rng.choice(_VERBS)} today.", **options, "answer": str(1 + number % 2)}
    if name == "boolq":
        passage = f"{question}. {_sentence(rng, rng.randint(5, 30))}." + (" \n" if number % 4 == 0 else "")
        return {"question": f"is the {rng.choice(_NOUNS)} real", "passage": passage, "idx": number, "label": number % 2}
    if name == "copa":
        choices = {"choice1": _sentence(rng, 3) + ".", "choice2": _sentence(rng, 5) + "."}
        return {"premise": f"{question}. ", **choices, "question": ("cause", "effect")[number % 2], "label": number % 2}
    if name == "sciq":
        support = "" if number % 3 == 0 else f" {_sentence(rng, 9)}."
        wrong = {f"distractor{index}": rng.choice(_NOUNS) for index in (1, 2, 3)}
        return {"question": question + "?", **wrong, "correct_answer": rng.choice(_VERBS), "support": support}
    assert name == "lambada"
    return {"text": f"{question} “{_sentence(rng, rng.randint(1, 20))}” said the {rng.choice(_NOUNS)}"}
