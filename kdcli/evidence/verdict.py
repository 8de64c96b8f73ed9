"""Did it help? Intervals and paired tests over seeds."""

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, TypeVar

from kdcli.config import Section

ALPHA, POWER = 0.05, 0.8  # of the tests behind a verdict
J = TypeVar("J", bound="Judged")


class Spread(Section):
    """Errors over seeds: their mean, standard deviation and 95 % t-interval of the mean; the last two None of one seed,
    the interval where all are the same too."""

    errors: list[int]
    mean: float
    std: float | None = None
    interval: list[float] | None = None


class Verdict(Section):
    """Does one side make fewer errors than the other? `fewer_errors` is the mean over the seeds that they share."""

    verdict: Literal["helped", "hurt", "no evidence"]
    fewer_errors: float
    interval: list[float] | None = None
    p: float
    p_corrected: float | None = None  # for so many `comparisons`, where there are several: the verdict rests on it
    comparisons: int | None = None
    n: int
    test: str
    settle: int | None = None  # seeds that would settle an effect and a spread such as these, tested alone

    def sentence(self, subject: str = "The soft targets", reference: str = "the baseline") -> str:
        one, p, alone = self.n == 1, f"p = {self.p:.2g}", ""
        if self.comparisons:
            p, alone = f"{p}, {self.p_corrected:.2g} corrected for {self.comparisons} comparisons", ", tested alone"
        start = f"{subject} {self.verdict}{', on this one seed' if one else ''}"
        if self.verdict == "no evidence":
            start = f"No evidence at n = {self.n} that {subject.replace('The ', 'the ')} helped or hurt"
        sign, word, other = (1, "fewer", "more") if self.fewer_errors >= 0 else (-1, "more", "fewer")
        amount = f"{abs(self.fewer_errors):.{0 if one else 1}f} {word} errors than {reference}"
        if one:
            test = f"McNemar's exact test on the two nets' predictions: {p}"
            return f"{start}: {amount} ({test}). Other seeds may differ: --seeds 0-4 would tell."
        settle = f" About {self.settle:,} seeds would settle an effect of this size{alone}." if self.settle else ""
        if self.interval is None:
            return f"{start}: {amount} at each of {self.n} seeds (no spread to test; {self.test}: {p}).{settle}"
        low, high = sorted(sign * end for end in self.interval)
        least = f"{low:.1f}" if low >= 0 else f"{-low:.1f} {other}"
        spread = f"95 % interval of the mean over {self.n} seeds: {least} to {high:.1f} {word}"
        return f"{start}: {amount} ({spread}; {self.test}: {p}).{settle}"


class Judged(Section):
    """What verdicts are about, each perhaps one of several of its kind: see `corrected`."""

    verdict: Verdict | None = None
    than_first: Verdict | None = None  # at a point of a grid of losses: against the first point


def paired(fewer: Sequence[int], fixed: int, broken: int) -> Verdict:
    """The verdict on differences of errors, one a seed.

    Several: a paired t-test on them or, where all are the same, a sign test, since they tell nothing of the spread.
    One: McNemar's exact test on the images that only one side gets right, `fixed` and `broken`. The interval is of the
    mean over seeds; it does not cover the sampling of the test set.
    """
    from scipy import special

    n, mean, interval = len(fewer), statistics.mean(fewer), None
    if len(set(fewer)) > 1:
        name, std = "paired t-test", statistics.stdev(fewer)
        interval, settle = t_interval(mean, std, n), seeds_to_settle(mean, std)
        p = 2 * special.stdtr(n - 1, -abs(mean) / std * n**0.5)
    else:
        name = "McNemar's test" if n == 1 else "sign test"
        fewest, of = (min(fixed, broken), fixed + broken) if n == 1 else (0, n if mean else 0)
        p = min(1.0, 2 * special.bdtr(fewest, of, 0.5)) if of else 1.0  # both tails, which are alike
        settle = math.ceil(1 - math.log2(ALPHA)) if n > 1 and mean else None  # so many alike: 2 * 0.5^n is below 5 %
    word: Literal["helped", "hurt", "no evidence"] = "no evidence" if p >= ALPHA else "helped" if mean > 0 else "hurt"
    settle = settle if word == "no evidence" else None
    return Verdict(verdict=word, fewer_errors=mean, interval=interval, p=float(p), n=n, test=name, settle=settle)


def corrected(found: list[J]) -> list[J]:
    """The same, but of several verdicts of a kind each rests on its p corrected for them all: some become `no
    evidence`."""
    changed = list(found)
    for kind in ("verdict", "than_first"):
        family = [v.p for one in found if (v := getattr(one, kind))]
        by_p = dict(zip(family, holm(family), strict=True))
        for i, one in enumerate(changed):
            if (v := getattr(one, kind)) and len(family) > 1:
                word = v.verdict if by_p[v.p] < ALPHA else "no evidence"
                more = {"verdict": word, "p_corrected": by_p[v.p], "comparisons": len(family)}
                changed[i] = one.model_copy(update={kind: v.model_copy(update=more)})
    return changed


def holm(p: Sequence[float]) -> list[float]:
    """The p of several tests, dependent or not, corrected by the step-down procedure of Holm (Scandinavian Journal of
    Statistics 6, 1979): each times the number of those that are not below it; at most 1, and in the order of p."""
    steps = [min(1.0, own * sum(other >= own for other in p)) for own in p]
    return [max(step for step, other in zip(steps, p, strict=True) if other <= own) for own in p]


def seeds_to_settle(mean: float, std: float) -> int | None:
    """The seeds at which a paired t-test finds an effect of this mean and spread four times out of five, by the normal
    distribution and Guenther's correction for t (1981); None when 10,000 are not enough, or nothing is to be found."""
    z, power = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)
    seeds = ((z + power) * std / mean) ** 2 + z**2 / 2 if mean and std else math.inf
    return math.ceil(seeds) if seeds <= 10_000 else None


def spread(errors: Sequence[int]) -> Spread:
    """The errors over seeds with their mean, standard deviation and the interval of the mean."""
    n, mean = len(errors), statistics.mean(errors)
    std = statistics.stdev(errors) if n > 1 else None
    return Spread(errors=list(errors), mean=mean, std=std, interval=t_interval(mean, std, n) if std else None)


def t_interval(mean: float, std: float, n: int) -> list[float]:
    """The 95 % interval of the mean of n values of a normal distribution, by Student's t."""
    from scipy import special  # scipy.stats takes as long to import as a comparison of runs

    half = float(special.stdtrit(n - 1, 1 - ALPHA / 2)) * std / n**0.5
    return [mean - half, mean + half]


def against(reference: float, mean: float, interval: Sequence[float] | None) -> str:
    """better or worse where the interval of the mean leaves out a reference measured once; of one seed lower or
    higher."""
    low, high = interval or (mean, mean)
    if low <= reference <= high:
        return "not distinguishable" if interval else "the same"
    word = ("better", "worse") if interval else ("lower", "higher")
    return word[0] if mean < reference else word[1]
