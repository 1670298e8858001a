"""Formats of numbers and times."""

import pytest

from ds_gpt2.common.formatting import counted, done_share, duration, signed, size, tokens, truncated, uncapitalized
from ds_gpt2.config.batch_plan import BatchPlan


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0s"), (0, "0s"), (29.9, "29s"), (95, "1m 35s"), (3700, "1h 1m"), (200_000, "2d 7h"), (34 * 86_400, "34d")],
)
def test_durations_are_short(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_and_counts_of_tokens() -> None:
    assert [size(999_999_999), size(1_740_000_000), size(23 * 10**12)] == ["1000.0 MB", "1.74 GB", "23.00 TB"]
    assert [tokens(999), tokens(524_288), tokens(2_500_000), tokens(50e9)] == ["999", "524,288", "2.50 M", "50.00 B"]


def test_a_difference_that_rounds_to_zero_has_no_minus() -> None:
    assert [signed(value) for value in (0.3 - (0.1 + 0.2), -0.00004, -0.00006)] == ["+0.0000", "+0.0000", "-0.0001"]
    assert [signed(value, 0) for value in (-0.4, 1234.0, -1234.0)] == ["+0", "+1,234", "-1,234"]
    assert [signed(value) for value in (float("-inf"), float("nan"))] == ["-inf", "+nan"]


def test_the_noun_of_one_is_singular() -> None:
    assert [counted(number, "rank") for number in (0, 1, 2, 1000)] == ["0 ranks", "1 rank", "2 ranks", "1,000 ranks"]
    assert counted(1, "micro-batch", "micro-batches") == "1 micro-batch"
    assert counted(3, "micro-batch", "micro-batches") == "3 micro-batches"
    one = BatchPlan(micro_batch=1, sequence_length=64, accumulation=1, world_size=1)
    assert str(one) == "64 tokens per step = 1 window x 64 tokens x 1 micro-batch x 1 rank"


def test_a_share_is_rounded_down() -> None:
    assert [done_share(step, 2000) for step in (0, 1, 1999, 2000)] == ["0.0%", "0.0%", "99.9%", "100.0%"]
    assert done_share(1999, 2000, 0) == "99%"
    assert done_share(3, 2) == "100.0%"  # more steps are trained than planned now
    assert done_share(290, 1000) == "29.0%"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Input should be a number", "input should be a number"),
        ("GPT-2's token is 50256", "GPT-2's token is 50256"),
        ("JSON is needed", "JSON is needed"),
        ("W&B has no key", "W&B has no key"),
        ("", ""),
    ],
)
def test_names_and_acronyms_are_not_uncapitalized(text: str, words: str) -> None:
    assert uncapitalized(text) == words


def test_long_text_is_truncated_to_a_total_length() -> None:
    assert truncated("0123456789", 10) == "0123456789"
    assert truncated("0123456789", 9) == "012345..."
