import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import fit_ranks, format_batches, parse_batches, plan_batch


def test_gpt2_124m_on_one_to_eight_gpus() -> None:
    assert [plan_batch(524_288, 16, 1024, ranks).accumulation for ranks in (1, 2, 4, 8)] == [32, 16, 8, 4]


@given(st.integers(1, 64), st.integers(1, 2048), st.integers(1, 64), st.integers(1, 16))
def test_a_plan_uses_the_whole_budget(micro_batch: int, sequence: int, accumulation: int, ranks: int) -> None:
    budget = micro_batch * sequence * accumulation * ranks
    plan = plan_batch(budget, micro_batch, sequence, ranks)
    assert (plan.accumulation, plan.tokens_per_step) == (accumulation, budget)
    assert plan.windows_per_step * sequence == budget


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 2048), st.integers(1, 16))
def test_every_proposal_of_the_error_is_valid(budget: int, micro_batch: int, sequence: int, ranks: int) -> None:
    try:
        plan_batch(budget, micro_batch, sequence, ranks)
    except UserError as error:
        proposed = str(error).split(": set ")[1]
    else:
        return
    proposed, _, count = proposed.partition(", or use ")
    if count:
        plan_batch(budget, micro_batch, sequence, int(count.split()[0]))
    for word in proposed.replace(",", "").split():
        if word.startswith("batch.micro_batch="):
            plan_batch(budget, int(word.split("=")[1]), sequence, ranks)
        elif word.startswith("batch.tokens_per_step=") or word.isdigit():
            plan_batch(int(word.split("=")[-1]), micro_batch, sequence, ranks)


def test_the_error_proposes_the_nearest_micro_batch() -> None:
    with pytest.raises(UserError, match=r"batch\.micro_batch=8, or batch\.tokens_per_step=516096 or 528384"):
        plan_batch(524_288, 6, 1024, 2)


@pytest.mark.parametrize(
    ("available", "expected"), [(4, (4, 16)), (3, (2, 16)), (1, (1, 16)), (8, (8, 16)), (7, (4, 16)), (64, (64, 8))]
)
def test_fit_ranks_keeps_the_token_budget(available: int, expected: tuple[int, int]) -> None:
    ranks, micro_batch = fit_ranks(524_288, 16, 1024, available)
    assert (ranks, micro_batch) == expected
    assert plan_batch(524_288, micro_batch, 1024, ranks).tokens_per_step == 524_288


def test_fit_ranks_returns_a_valid_plan_for_any_number_of_ranks() -> None:
    for windows in range(1, 40):
        for available in range(1, 20):
            ranks, micro_batch = fit_ranks(windows * 8, 6, 8, available)
            assert 1 <= ranks <= available
            assert plan_batch(windows * 8, micro_batch, 8, ranks).windows_per_step == windows


@given(st.sets(st.integers(1, 300)))
def test_batches_are_read_back(batches: set[int]) -> None:
    written = format_batches(sorted(batches))
    assert parse_batches(written) == tuple(sorted(batches))
    assert written.count(",") + written.count("-") < max(1, 2 * len(batches))


def test_batches_may_overlap_and_have_spaces() -> None:
    assert parse_batches("7, 3-5,4") == (3, 4, 5, 7)
    assert parse_batches(None) == ()
    assert format_batches([1, 2, 3, 9]) == "1-3,9"


@pytest.mark.parametrize("text", ["5-3", "0", "x", "1-", "1-99999999", "-4", "1,,2"])
def test_an_invalid_list_of_batches_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="leave_out"):
        parse_batches(text)
