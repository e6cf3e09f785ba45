"""Tables as text: columns end where their widest cell does, and a sentence widens none but the first."""

import pytest

from kr_fast.runtime.text import aligned


@pytest.mark.parametrize(
    ("right", "lines"), [(False, ["a    bcd  e", "fgh  i    jk"]), (True, ["  a  bcd   e", "fgh    i  jk"])]
)
def test_columns_are_aligned(right, lines):
    assert aligned([("a", "bcd", "e"), ("fgh", "i", "jk")], right=right) == lines


def test_a_row_of_fewer_cells_is_a_sentence():
    rows = [("", "x", "y"), ("longer", "a sentence of some length"), ("b", "1", "2")]
    assert aligned(rows) == ["        x  y", "longer  a sentence of some length", "b       1  2"]
