import pytest

from batchcap.schema import int64_or_none


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63), None])
def test_values_of_64_bits_are_kept(value: int | None) -> None:
    assert int64_or_none(value) == value


@pytest.mark.parametrize(
    "value", [2**63, 2.0**63, -(2**63) - 1, 10**400, float("nan"), float("inf"), float("-inf")]
)
def test_values_that_fit_no_column_are_none(value: float) -> None:
    assert int64_or_none(value) is None


def test_fractions_are_cut_off() -> None:
    assert int64_or_none(1.5) == 1
