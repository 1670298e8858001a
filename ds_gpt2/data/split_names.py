"""The split of a shard, by the words in its file name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

Split = Literal["train", "val"]

# Words as in ..._val_000000 (llm.c, build-nanogpt), validation-00000-of-00001 or Test.bin.
_TRAIN = {"train", "training", "trainset"}
_VAL = {"val", "valid", "validation", "valset", "dev", "devel", "development", "devset"}
_VAL |= {"eval", "evaluate", "evaluation", "evalset", "heldout", "holdout"}
_TEST = {"test", "tests", "testing", "testset"}


def split_of(path: Path) -> Split | None:
    """Return the split of a shard by the last word of its name that denotes one.

    A test split gives None. A name without such a word is "train".
    """
    stem = re.sub(r"(held|hold)[^a-z]?out", r"\1out", path.name.lower().removesuffix(path.suffix.lower()))
    for word in reversed(re.findall(r"[a-z]+", stem)):
        if word in _TRAIN:
            return "train"
        if word in _VAL:
            return "val"
        if word in _TEST:
            return None
    return "train"
