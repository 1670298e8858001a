import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.data.shuffle import permute

SEEDS = st.integers(0, 2**63 - 1)


@given(st.integers(1, 5000), SEEDS, st.integers(0, 1000))
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


@given(st.integers(2, 2**40), SEEDS, st.data())
def test_a_single_position_gives_the_same_result_as_an_array(size: int, seed: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)), np.int64)
    combined = permute(positions, size, seed, 3)
    assert combined.min() >= 0
    assert combined.max() < size
    assert [int(permute(np.array([position]), size, seed, 3)[0]) for position in positions] == combined.tolist()


def test_the_order_never_changes_between_versions() -> None:
    """A run resumed under a newer version must read the same windows: these numbers must never change."""
    assert permute(np.arange(10), 10, seed=1337, epoch=0).tolist() == [4, 0, 5, 2, 1, 6, 8, 9, 7, 3]
    assert permute(np.arange(10), 10, seed=1337, epoch=1).tolist() == [5, 6, 3, 4, 2, 0, 8, 7, 9, 1]
    assert permute(np.arange(3), 9_765_625, seed=7, epoch=4).tolist() == [1489702, 3198709, 4326821]


def test_orders_of_epochs_and_seeds_are_uncorrelated() -> None:
    size = 20_000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    orders.append(np.arange(size))
    for first in range(len(orders)):
        for second in range(first):
            assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.03
            assert np.count_nonzero(orders[first] == orders[second]) < 12  # about one is expected


def test_neighboring_windows_are_separated() -> None:
    size = 20_000
    order = permute(np.arange(size), size, 1337, 0)
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 12  # about two are expected
    steps = order.reshape(-1, 500)  # every step contains all regions of the data
    assert steps.mean(axis=1).std() < 3 * (size / np.sqrt(12)) / np.sqrt(500) / 2
