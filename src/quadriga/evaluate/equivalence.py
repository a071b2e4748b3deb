r"""Whether two mathematical answers are the same: \frac{1}{2} and 0.5, (x+1)^2 and x^2+2x+1, (1, 2] and (1,2].

    final answer ──► answer_spelling.normal ──► equal text?               yes: the same
                                            ──► tuple, set, matrix?       each element by itself
                                            ──► arithmetic, by value      exact for rational numbers,
                                                                          else at three random points

Expressions with variables are compared by their values at complex points that depend on the variables' names only, so
no algebra system is needed; two different polynomials agree at such a point with probability 0. What is no arithmetic
(a word, a relation of several letters) is compared as text. A bound on one letter is the interval it stands for.
"""

from __future__ import annotations

import cmath
import math
import random
import re
from collections.abc import Callable
from fractions import Fraction

from quadriga.evaluate.answer_spelling import normal

Value = Fraction | complex

_LONGEST = 400
_POINTS = 3


def equivalent(left: str, right: str) -> bool:
    """True if two answers (LaTeX or plain text) are the same; see the module docstring."""
    return _same(normal(left), normal(right))


def _same(left: str, right: str) -> bool:
    if left == right or (left.lower() == right.lower() and re.fullmatch("[a-zA-Z]{3,}", left)):
        return bool(left)
    if not left or not right or max(len(left), len(right)) > _LONGEST:
        return False
    left, right = _interval(left), _interval(right)
    parts_left, parts_right = _parts(left), _parts(right)
    if parts_left is not None or parts_right is not None:
        return _same_parts(parts_left or ("", [left]), parts_right or ("", [right]))
    if left.count("=") == right.count("=") == 1:
        return _same_equation(left, right)
    return _same_value(left, right)


def _interval(text: str) -> str:
    """The interval that bounds on one letter stand for, as (a,b] for a<x\\le b; any other text as it is."""
    pieces = [piece.strip() for piece in re.split(r"(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z]))", text)]
    if len(pieces) not in (3, 5) or sum(bool(re.fullmatch("[a-zA-Z]", piece)) for piece in pieces) != 1:
        return text
    if ">" in pieces or r"\ge" in pieces:  # read from the right, its signs point the other way
        pieces = [{">": "<", "<": ">", r"\ge": r"\le", r"\le": r"\ge"}.get(one, one) for one in reversed(pieces)]
    if len(pieces) == 3:
        named = re.fullmatch("[a-zA-Z]", pieces[0])
        pieces = [r"-\infty", "<", *pieces] if named else [*pieces, "<", r"\infty"]
    low, below, name, above, high = pieces
    if not re.fullmatch("[a-zA-Z]", name) or not {below, above} <= {"<", r"\le"}:
        return text
    return f"{'(' if below == '<' else '['}{low},{high}{')' if above == '<' else ']'}"


def _parts(text: str) -> tuple[str, list[str]] | None:
    """(kind of brackets, elements) of a tuple, interval, set, list or matrix; None for a single expression."""
    matrix = re.fullmatch(r"\\begin\{([pbv]?matrix)\}(.*)\\end\{\1\}", text)
    if matrix:
        rows = [row for row in matrix[2].split("\\\\") if row]
        return f"matrix{len(rows)}", [cell for row in rows for cell in row.split("&")]
    if text == r"\emptyset":
        return "\x01\x02", []
    either = re.fullmatch(r"([^,]*)\\pm(?![a-zA-Z])([^,]*)", text)
    if either and r"\mp" not in text:
        return "", [f"{either[1]}+{either[2]}", f"{either[1]}-{either[2]}"]
    united = re.split(r"\\cup(?![a-zA-Z])", text)
    if len(united) > 1:
        return "\\cup", united
    inside = text[1:-1]
    if text[0] in "([\x01" and text[-1] in ")]\x02" and _balanced(inside):
        elements = _split(inside) if inside else []
        if len(elements) > 1 or text[0] == "\x01":
            return text[0] + text[-1], elements
    elements = _split(text)
    return ("", elements) if len(elements) > 1 else None


def _balanced(text: str) -> bool:
    """True if no bracket closes that was not opened in it."""
    depth = 0
    for letter in text:
        depth += (letter in "([{\x01") - (letter in ")]}\x02")
        if depth < 0:
            return False
    return depth == 0


def _split(text: str) -> list[str]:
    """A text at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{\x01") - (letter in ")]}\x02")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _same_parts(left: tuple[str, list[str]], right: tuple[str, list[str]]) -> bool:
    """Ordered inside brackets; lists, sets and unions in any order. A list is the set of what it lists."""
    (kind, ours), (other, theirs) = left, right
    if len(ours) != len(theirs) or (kind != other and {kind, other} != {"", "\x01\x02"}):
        return False
    if kind not in ("", "\x01\x02", "\\cup"):
        return all(_same(one, two) for one, two in zip(ours, theirs, strict=True))
    rest = list(theirs)
    for one in ours:
        match = next((i for i, two in enumerate(rest) if _same(one, two)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _same_equation(left: str, right: str) -> bool:
    """One equation is the other, or a multiple of it: left side less right side have the same ratio at all points."""
    sides, others = ("({})-({})".format(*text.split("=")) for text in (left, right))
    try:
        values = [
            (complex(Arithmetic(sides, k).value()), complex(Arithmetic(others, k).value())) for k in range(_POINTS)
        ]
        ratios = [one / two for one, two in values]
    except (ValueError, ArithmeticError, RecursionError):
        return False
    return ratios[0] != 0 and all(abs(ratio - ratios[0]) <= 1e-9 * abs(ratios[0]) for ratio in ratios)


def _same_value(left: str, right: str) -> bool:
    if any(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", text) for text in (left, right)):
        return False  # words: as products of letters, "east" would be "seat"
    for point in range(_POINTS):
        try:
            one, two = Arithmetic(left, point).value(), Arithmetic(right, point).value()
        except (ValueError, ArithmeticError, RecursionError):
            return False
        if isinstance(one, Fraction) and isinstance(two, Fraction):
            if one != two:
                return False
        elif not abs(complex(one) - complex(two)) <= 1e-9 * max(1e-3, abs(complex(one)), abs(complex(two))):
            return False  # also where one of them is not a number
    return True


_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "ln": cmath.log,
    "log": cmath.log,
    "exp": cmath.exp,
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: 1 / cmath.tan(x),
}
_MIXED = re.compile(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
"""A fraction that follows a whole number is added to it."""
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_PRODUCTS = ("\\cdot", "\\times", "*")


class Arithmetic:
    r"""Evaluates an expression: numbers, + - * / ^ !, \frac, \sqrt, \pi, i, e, functions, products without a sign.

    Args:
        text: without spaces.
        point: which of the random points variables are taken at.
    """

    def __init__(self, text: str, point: int = 0) -> None:
        self._text, self._at, self._point = text, 0, point

    def value(self) -> Value:
        """The value.

        Raises:
            ValueError: not such an expression.
            ArithmeticError: division by zero, or too large.
        """
        found = self._sum()
        if self._at != len(self._text):
            raise ValueError(f"no arithmetic: {self._text[self._at :]!r}")
        return found

    def _next(self, *signs: str) -> str | None:
        """Take one of the signs, if it is next."""
        self._skip()
        for sign in signs:
            after = self._text[self._at + len(sign) : self._at + len(sign) + 1]
            if self._text.startswith(sign, self._at) and not (
                sign[-1].isalpha() and sign[0] == "\\" and after.isalpha()
            ):
                self._at += len(sign)
                return sign
        return None

    def _skip(self) -> None:
        while self._text.startswith(" ", self._at):
            self._at += 1

    def _sum(self) -> Value:
        sign = self._next("-", "+")
        total = self._product()
        total = -total if sign == "-" else total
        while (sign := self._next("+", "-")) is not None:
            term = self._product()
            total = total + term if sign == "+" else total - term
        return total

    def _product(self) -> Value:
        total = self._power()
        while self._at < len(self._text):
            if self._next(*_PRODUCTS):
                total = total * self._signed()
            elif self._next("/", "\\div"):
                total = total / self._signed()
            elif self._text[self._at] in "+-)]}|,=<>!":
                break
            else:
                total = total * self._power()
        return total

    def _signed(self) -> Value:
        return -self._power() if self._next("-") else self._power()

    def _power(self) -> Value:
        base = self._atom()
        if self._next("!"):
            base = _factorial(base)
        return _raised(base, self._exponent()) if self._next("^") else base

    def _exponent(self) -> Value:
        """In braces, or a whole number, letter or power: 2^10 as people write it, not LaTeX's 2^1 times 0."""
        if self._text.startswith("{", self._at):
            return self._argument()
        return self._signed()

    def _atom(self) -> Value:
        self._skip()
        number = re.compile(r"\d+(?:\.\d+)?|\.\d+").match(self._text, self._at)
        if number:
            self._at = number.end()
            whole = Fraction(number[0])
            mixed = _MIXED.match(self._text, self._at)
            if mixed and "." not in number[0]:
                self._at = mixed.end()
                return whole + Fraction(int(mixed[1] or mixed[2]), int(mixed[3] or mixed[4]))
            return whole
        opened = self._next("(", "[", "{")
        if opened:
            inside = self._sum()
            self._must(_CLOSING[opened])
            return inside
        if self._next("|"):
            size = self._sum()
            self._must("|")
            return abs(size) if isinstance(size, Fraction) else complex(abs(size))
        return self._named()

    def _named(self) -> Value:
        if self._next("\\frac"):
            top = self._argument()
            return top / self._argument()
        if self._next("\\binom"):
            return _binomial(self._argument(), self._argument())
        if self._next("\\sqrt"):
            order: Value = Fraction(2)
            if self._next("["):
                order = self._sum()
                self._must("]")
            return _root(self._argument(), order)
        if self._text.startswith(r"\log_", self._at):
            self._at += len(r"\log_")
            base = self._argument()
            return cmath.log(complex(self._power())) / cmath.log(complex(base))
        for name, function in _FUNCTIONS.items():
            if self._next(f"\\{name}"):
                to = self._argument() if self._next("^") else Fraction(1)
                return _raised(function(complex(self._power())), to)
        variable = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\{\w+\}|\w))?").match(self._text, self._at)
        if variable is None:
            raise ValueError(f"no arithmetic: {self._text[self._at :]!r}")
        self._at = variable.end()
        return _constant(variable[0]) or _variable(variable[0], self._point)

    def _argument(self) -> Value:
        r"""What follows \frac or \sqrt: something in braces, or one digit or letter."""
        if self._next("{"):
            inside = self._sum()
            self._must("}")
            return inside
        if self._at < len(self._text) and self._text[self._at].isdigit():
            self._at += 1
            return Fraction(self._text[self._at - 1])
        return self._atom()

    def _must(self, sign: str) -> None:
        if self._next(sign) is None:
            raise ValueError(f"{sign} must follow at {self._at} of {self._text!r}")


def _constant(name: str) -> complex | None:
    return {"\\pi": complex(math.pi), "i": 1j, "e": complex(math.e)}.get(name)


def _variable(name: str, point: int) -> complex:
    chosen = random.Random(f"{name} {point}")
    return complex(chosen.uniform(0.5, 1.5), chosen.uniform(0.1, 0.9))


def _raised(base: Value, power: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(power, Fraction):
        if power.denominator == 1 and abs(power) <= 1000 and len(str(base)) < 50:
            return base ** int(power)
        root = round(abs(float(base)) ** (1 / power.denominator)) if power.denominator > 1 else 0
        if power.denominator <= 10 and base == root**power.denominator and base >= 0:
            return Fraction(root) ** power.numerator
    return complex(base) ** complex(power)


def _root(base: Value, order: Value) -> Value:
    """Of a negative number the real root, where there is one: of -8 the third is -2."""
    if isinstance(base, Fraction) and isinstance(order, Fraction) and base < 0 and order.denominator == 1 and order % 2:
        return -_raised(-base, 1 / order)
    return _raised(base, 1 / order)


def _binomial(n: Value, k: Value) -> Value:
    if (
        isinstance(n, Fraction)
        and isinstance(k, Fraction)
        and n.denominator == k.denominator == 1
        and 0 <= k <= n <= 1000
    ):
        return Fraction(math.comb(int(n), int(k)))
    raise ValueError("a binomial coefficient is of two numbers from 0 to 1000")


def _factorial(value: Value) -> Value:
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 170:
        return Fraction(math.factorial(int(value)))
    raise ValueError("a factorial is of a number from 0 to 170")
