"""Mathematical answers that are the same, and ones that look alike and are not."""

from __future__ import annotations

import pytest

from quadriga.evaluate.answer_spelling import normal
from quadriga.evaluate.equivalence import Arithmetic, equivalent

SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\dfrac{1}{2}"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{3}{\sqrt{3}}", r"\sqrt3"),
    (r"\sqrt[3]{8}", "2"),
    (r"3\frac{1}{5}", "16/5"),
    ("(1, 2]", "(1,2]"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    ("3, 5", "5,3"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & \frac{4}{2} \\ 3 & 4 \end{pmatrix}"),
    (r"\text{Monday}", "Monday"),
    ("1,000", "1000"),
    ("10{,}000.5", "10000.5"),
    ("x=5", "5"),
    ("y=2x+3", "2x+3"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"6 \text{ square units}", "6"),
    (r"144 \mbox{ m}^3", "144"),
    (r"65 \text{ children tickets }", "65"),
    (r"8\frac47", r"\frac{60}{7}"),
    (r"\frac{12}{5,\!525}", "12/5525"),
    (r"7, -2, \text{ and } -5", "-5, -2, 7"),
    (r"\$18.90", "18.9"),
    (r"-\frac{2}{3}", r"\frac{-2}{3}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\alpha x", r"x\alpha"),
    (r"\pi r^2", r"r^2\pi"),
    ("1+2i", "2i+1"),
    ("5!", "120"),
    ("|-3|", "3"),
    (r"\boxed{7}", "7"),
    (r"x \le 5", r"x\le5"),
    ("5x - 7y + 4 = 0", "14y - 10x = 8"),
    (".5", r"\frac{1}{2}"),
    ("5cm", "5"),
    ("10 km/h", "10"),
    (r"\text{Even}", "even"),
    ("4343_6", "4343_{6}"),
    (r"x \ge 2", r"x \geq 2"),
    ("x > 2", "2 < x"),
    (r"-2 \le x < \frac{1}{2}", "[-2, 0.5)"),
    (r"x \le 3", r"(-\infty, 3]"),
    (r"7 \geq t > -1", "(-1,7]"),
    (r"(-\infty, 2) \cup (3, +\infty)", r"(3,\infty)\cup(-\infty,\frac{4}{2})"),
    (r"|x|", r"\lvert x \rvert"),
    (r"\pm 3", "3, -3"),
    (r"1 \pm \sqrt{2}", r"1 - \sqrt{2}, 1 + \sqrt{2}"),
    (r"\varnothing", r"\emptyset"),
    (r"\emptyset", r"\{\}"),
    (r"\{1, 2\}", "2, 1"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\log_2 8", "3"),
    (r"\log_{10} 1000", "3"),
    (r"\binom{5}{2}", "10"),
    (r"x = 1 \text{ or } x = 2", "1, 2"),
    ("x=1, y=2", "y=2, x=1"),
    ("−5", "-5"),
    ("2π", r"2\pi"),
    ("3½", "3.5"),
    ("√2", r"\sqrt2"),
    ("x²", "x^2"),
    ("**7**.", "7"),
    (r"\(\frac{1}{2}\)", "0.5"),
    ("5x**2", "5x^2"),
]
DIFFERENT = [
    (".5", "5"),
    (r"6 \text{ a.m.}", r"6 \text{ p.m.}"),
    ("x > 2", "x < 2"),
    ("x > 2", r"x \ge 2"),
    ("a < b", "b < a"),
    ("x=1, y=2", "x=2, y=1"),
    (r"(1,2) \cup (3,4)", "(1,2)"),
    (r"\pm 3", "3"),
    (r"\sqrt{-8}", "-2"),
    (r"\log_2 8", "8"),
    (r"\binom{5}{2}", r"\frac{5}{2}"),
    ("10_2", "10_3"),
    ("yes", "no"),
    ("(1,2)", "[1,2)"),
    ("(3,5)", "(5,3)"),
    ("0,1", "01"),
    ("5x-7y=4", "5x-7y=8"),
    ("5x-7y=4", "4"),
    (r"19 \text{ and }43", "1943"),
    ("10^{20}", "10^{20}+1"),
    ("x^2-1", "(x-1)(x+2)"),
    ("east", "seat"),
    ("3\\pi", "9.42"),
    ("7", "-7"),
    ("A", "B"),
    ("1/0", "1/0+1"),
    ("", ""),
    ("2^{1000000}", "1"),
    ("10^{999999999}", "1"),
    (r"\frac{1", "1"),
    ("(2+3", "5"),
    ("1,2", "1,2,2"),
    ("1, 1, 2", "1, 2, 2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same(one: str, other: str) -> None:
    assert equivalent(one, other) and equivalent(other, one), (normal(one), normal(other))


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_not_the_same(one: str, other: str) -> None:
    assert not equivalent(one, other) and not equivalent(other, one), (normal(one), normal(other))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("2^3^2", 512),
        ("2^10", 1024),
        ("2^-1*4", 2),
        (r"2^{1}0", 0),
        ("-2^2", -4),
        ("2(3+4)", 14),
        ("6/2(3)", 9),
        (r"\frac{6}{2}\cdot-3", -9),
    ],
)
def test_order_of_operations(text: str, value: int) -> None:
    assert Arithmetic(text).value() == value


def test_long_and_deep_texts_end() -> None:
    assert not equivalent("(" * 300 + "1", "2")
    assert not equivalent("1+" * 5000 + "1", "5001")
