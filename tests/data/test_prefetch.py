import threading

import pytest

from ds_gpt2.data.prefetch import Prefetcher


def test_the_next_value_is_computed_in_advance() -> None:
    computed: list[int] = []
    second = threading.Event()

    def make(number: int) -> str:
        computed.append(number)
        if number == 8:
            second.set()
        return f"value {number}"

    prefetcher = Prefetcher(make)
    assert prefetcher.get(7) == "value 7"
    assert second.wait(10), "computed before it is requested"
    assert prefetcher.get(8) == "value 8"
    assert computed[:2] == [7, 8]


def test_numbers_may_be_requested_in_any_order() -> None:
    prefetcher = Prefetcher(lambda number: number)
    assert [prefetcher.get(number) for number in (1, 2, 9, 10, 3, 3)] == [1, 2, 9, 10, 3, 3]


def test_an_exception_is_raised_when_its_value_is_requested() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("no")
        return number

    prefetcher = Prefetcher(make)
    assert prefetcher.get(1) == 1
    with pytest.raises(OSError, match="no"):
        prefetcher.get(2)
    assert prefetcher.get(3) == 3
