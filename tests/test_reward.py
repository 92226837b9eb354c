import pytest

from flags import UserError
from reward import exact, final_answer, last_number, load_reward, number


@pytest.mark.parametrize(("text", "expected"), [
    ("so 3 x 4 is $1,012.", "1012"), ("1,012.", "1012"), ("-7", "-7"), ("10.0", "10"), ("#### $10", "10"),
    ("it fell to -7.50 %", "-7.5"), ("50%", "50"), ("$-3", "-3"), ("-$3", "-3"), ("no idea", None), ("", None),
    ("8-5", "5"), ("(2)-5", "5"), ("x = -5", "-5"), ("007", "7"), ("0.50", "0.5"), (".5", "0.5"), ("-0", "0"),
    ("1,2,3", "3"), ("1,234,567.80 dollars", "1234567.8"), ("3 and 4.", "4"), ("v2", "2"), ("-0.0", "0"),
    ("١٢", None), ("12,34", "34"), ("2/3", "3"), ("1" * 5000, "1" * 5000),
])
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_number_compares_values_not_spellings():
    assert number("", "The total is $1,012.00.", "1012") == 1.0
    assert number("", "It is 1012, or was it 1013", "1012") == 0.0
    assert number("", "", "1012") == 0.0
    assert number("", "none", "none") == 0.0


def test_only_what_follows_the_last_think_tag_is_the_answer():
    assert final_answer("<think>a</think>b</think>c") == "c"
    assert exact("", "<think>8+7=15;4+2+1=7;</think>75", "75") == 1.0
    assert exact("", "75</think>", "75") == 0.0
    assert exact("", "75 ", "75") == 0.0
    assert number("", "12</think>", "12") == 0.0


def test_unknown_reward():
    with pytest.raises(UserError, match="--reward exakt: not one of exact, number"):
        load_reward("exakt")
