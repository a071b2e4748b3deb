"""Turn the scores of items into figures with standard errors.

The standard error of a mean of n items is s / sqrt(n), with s the sample standard deviation. Perplexities use a
delete-one jackknife: se^2 = (n - 1) / n * sum (f_(-i) - mean f_(-i))^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, fsum, log, nan, sqrt

from quadriga.evaluate.items import Scores


@dataclass(frozen=True)
class Figure:
    """A value and its standard error, which is None if there are too few items to estimate it."""

    value: float
    stderr: float | None


def mean(values: Sequence[float]) -> Figure:
    """The mean of at least one value, with its standard error."""
    n = len(values)
    middle = fsum(values) / n
    if n == 1:
        return Figure(middle, None)
    return Figure(middle, sqrt(fsum((v - middle) ** 2 for v in values) / (n - 1) / n))


def ratio(tops: Sequence[float], bottoms: Sequence[float], shape: Callable[[float], float]) -> Figure:
    """``shape(sum of tops / sum of bottoms)`` with a jackknife over the pairs; not a number where bottoms are all 0."""
    top, bottom, n = fsum(tops), fsum(bottoms), len(tops)
    if bottom == 0:
        return Figure(nan, None)
    value = shape(top / bottom)
    if any(bottom == one for one in bottoms):  # all of it is one item's
        return Figure(value, None)
    left_out = [shape((top - t) / (bottom - b)) for t, b in zip(tops, bottoms, strict=True)]
    middle = fsum(left_out) / n
    return Figure(value, sqrt((n - 1) / n * fsum((x - middle) ** 2 for x in left_out)))


def mean_of_groups(groups: Mapping[str, Sequence[float]]) -> Figure:
    """The unweighted mean of the groups' means; their errors are treated as independent."""
    figures = [mean(values) for values in groups.values()]
    value = fsum(f.value for f in figures) / len(figures)
    if any(f.stderr is None for f in figures):
        return Figure(value, None)
    return Figure(value, sqrt(fsum((f.stderr or 0.0) ** 2 for f in figures)) / len(figures))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k programs passes, drawn from n of which c pass: 1 - C(n-c, k) / C(n, k).

    Computed as a product, which stays accurate where the binomials overflow (Chen et al. 2021, section 2.1).
    """
    assert 0 <= c <= n and 1 <= k <= n, "c of n pass, and k of them are drawn"
    if n - c < k:
        return 1.0
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= 1.0 - k / i
    return 1.0 - missed


def figures(items: Sequence[Scores], ks: Sequence[int] = ()) -> dict[str, Figure]:
    """All figures that can be computed from the items' scores.

    Accuracies become means; logprob with words and tokens becomes perplexities; logprob alone a perplexity per
    continuation (LAMBADA's); passed and n become pass@k for every k <= n; counts such as inst_strict_count become
    inst_strict, their sum over that of inst_n.
    """
    names = items[0].keys()
    columns = {name: [item[name] for item in items] for name in names}
    found: dict[str, Figure] = {}
    if "n" in names:
        counts = [(int(n), int(c)) for n, c in zip(columns["n"], columns["passed"], strict=True)]
        for k in ks or (1,):
            if all(n >= k for n, _ in counts):
                found[f"pass@{k}"] = mean([pass_at_k(n, c, k) for n, c in counts])
        return found
    if "tokens" in names:
        logs = [-p for p in columns["logprob"]]
        found["word_perplexity"] = ratio(logs, columns["words"], exp)
        found["byte_perplexity"] = ratio(logs, columns["bytes"], exp)
        found["token_perplexity"] = ratio(logs, columns["tokens"], exp)
        found["bits_per_byte"] = ratio(logs, columns["bytes"], lambda x: x / log(2))
        return found
    for name, values in columns.items():
        whole = f"{name.partition('_')[0]}_n"
        if name.endswith("_n"):
            continue
        if name.endswith("_count"):
            found[name.removesuffix("_count")] = ratio(values, columns[whole], float)
        elif name == "logprob":
            found["perplexity"] = ratio([-v for v in values], [1.0] * len(values), exp)
        else:
            found[name] = mean(values)
    return found
