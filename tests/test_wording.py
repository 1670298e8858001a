"""Numbers and times as a person reads them."""

import pytest

from ds_gpt2.wording import duration, size, tokens


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0s"), (0, "0s"), (29.9, "29s"), (95, "1m 35s"), (3700, "1h 1m"), (200_000, "2d 7h"), (34 * 86_400, "34d")],
)
def test_durations_are_short(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_and_counts_of_tokens() -> None:
    assert [size(999_999_999), size(1_740_000_000), size(23 * 10**12)] == ["1000.0 MB", "1.74 GB", "23.00 TB"]
    assert [tokens(999), tokens(524_288), tokens(2_500_000), tokens(50e9)] == ["999", "524,288", "2.50 M", "50.00 B"]
