import threading

import pytest

from ds_gpt2.data.prefetch import Ahead


def test_the_next_is_made_while_this_one_is_used() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(number: int) -> str:
        made.append(number)
        if number == 8:
            second.set()
        return f"value {number}"

    ahead = Ahead(make)
    assert ahead.take(7) == "value 7"
    assert second.wait(10), "nobody asked for it, and it is made"
    assert ahead.take(8) == "value 8"
    assert made[:2] == [7, 8]


def test_a_jump_is_followed() -> None:
    ahead = Ahead(lambda number: number)
    assert [ahead.take(number) for number in (1, 2, 9, 10, 3, 3)] == [1, 2, 9, 10, 3, 3]


def test_what_goes_wrong_is_raised_where_it_is_asked_for() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("no")
        return number

    ahead = Ahead(make)
    assert ahead.take(1) == 1
    with pytest.raises(OSError, match="no"):
        ahead.take(2)
    assert ahead.take(3) == 3
