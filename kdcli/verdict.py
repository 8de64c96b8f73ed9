"""Did it help? Intervals and paired tests over seeds."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from kdcli.runs import Document

ALPHA, POWER = 0.05, 0.8  # of the tests behind a verdict


class Verdict(NamedTuple):
    """Does one side make fewer errors than the other? `fewer_errors` is the mean over the seeds that they share."""

    verdict: str
    fewer_errors: float
    interval: tuple[float, float] | None
    p: float
    n: int
    test: str
    settle: int | None = None  # seeds that would settle an effect and a spread such as these

    def sentence(self, subject: str = "The soft targets", reference: str = "the baseline") -> str:
        one = self.n == 1
        start = {
            "helped": f"{subject} helped",
            "hurt": f"{subject} hurt",
            "no evidence": f"No evidence at n = {self.n} that {subject.replace('The ', 'the ')} helped or hurt",
        }[self.verdict] + (", on this one seed" if one and self.verdict != "no evidence" else "")
        sign, word = (1, "fewer") if self.fewer_errors >= 0 else (-1, "more")
        amount = f"{abs(self.fewer_errors):.{0 if one else 1}f} {word} errors than {reference}"
        if one:
            test = f"McNemar's exact test on the two nets' predictions: p = {self.p:.2g}"
            return f"{start}: {amount} ({test}). Other seeds may differ: --seeds 0-4 would tell."
        low, high = sorted(sign * end for end in self.interval or ())
        spread = f"95 % interval of the mean over {self.n} seeds: {low:.1f} to {high:.1f} {word}"
        settle = f" About {self.settle:,} seeds would settle an effect of this size." if self.settle else ""
        return f"{start}: {amount} ({spread}; {self.test}: p = {self.p:.2g}).{settle}"


def verdict(distilled: Sequence[Document]) -> Verdict:
    """The verdict on student against baseline of the same seed, from `distill` documents."""
    only = distilled[0]["baseline"]
    return paired([d["baseline"]["errors"] - d["test"]["errors"] for d in distilled], only["fixed"], only["broken"])


def paired(fewer: Sequence[int], fixed: int, broken: int) -> Verdict:
    """The verdict on differences of errors, one a seed.

    Several: a paired t-test on them. One: McNemar's exact test on the images that only one side gets right, `fixed`
    and `broken`. The interval is of the mean over seeds; it does not cover the sampling of the test set.
    """
    from scipy import stats

    n, mean, name = len(fewer), statistics.mean(fewer), "McNemar's test" if len(fewer) == 1 else "paired t-test"
    interval: tuple[float, float] | None = None
    if n == 1:
        p = float(stats.binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
    elif len(set(fewer)) == 1:  # no spread for a t-test to use: a sign test
        p, interval, name = (2 * 0.5**n if mean else 1.0), (mean, mean), "sign test"
    else:
        test = stats.ttest_1samp(fewer, 0)
        low, high = test.confidence_interval(1 - ALPHA)
        p, interval = float(test.pvalue), (float(low), float(high))
    word = "no evidence" if p >= ALPHA else "helped" if mean > 0 else "hurt"
    settle = seeds_to_settle(mean, statistics.stdev(fewer)) if n > 1 and word == "no evidence" else None
    return Verdict(word, mean, interval, p, n, name, settle)


def seeds_to_settle(mean: float, std: float) -> int | None:
    """The seeds at which a paired t-test finds an effect of this mean and spread four times out of five; None when
    10,000 are not enough, or nothing is to be found."""
    from scipy import stats

    def power(n: int) -> float:
        critical = stats.t.ppf(1 - ALPHA / 2, n - 1)
        return float(stats.nct.sf(critical, n - 1, abs(mean) / std * n**0.5))

    if not mean or not std or power(10_000) < POWER:
        return None
    low, high = 1, 10_000
    while high - low > 1:
        low, high = (low, middle) if power(middle := (low + high) // 2) >= POWER else (middle, high)
    return high


def spread(errors: Sequence[int]) -> Document:
    """The errors over seeds with their mean, standard deviation (None of one) and the interval of the mean."""
    std = statistics.stdev(errors) if len(errors) > 1 else None
    return {"errors": list(errors), "mean": statistics.mean(errors), "std": std, "interval": mean_interval(errors)}


def mean_interval(errors: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t-interval of the mean over seeds; None for fewer than two."""
    from scipy import stats

    if len(errors) < 2:
        return None
    half = float(stats.t.ppf(1 - ALPHA / 2, len(errors) - 1)) * statistics.stdev(errors) / len(errors) ** 0.5
    return statistics.mean(errors) - half, statistics.mean(errors) + half
