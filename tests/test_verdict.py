from itertools import combinations
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from kdcli.evidence import results
from kdcli.evidence.results import Against, Document
from kdcli.evidence.verdict import Judged, Verdict, against, corrected, holm, paired, seeds_to_settle, spread
from kdcli.runs.spec import Counted
from kdcli.score import Quality


def judged(*pairs: tuple[int, int]) -> Verdict:
    """The verdict on (errors of the baseline, errors of the student) of each seed, where one alone gets right all that
    the two do not share."""
    fewer = [b - s for b, s in pairs]
    return paired(fewer, max(fewer[0], 0), max(-fewer[0], 0))


@pytest.mark.parametrize(
    ("pairs", "word"),
    [
        ([(146, 74), (140, 80), (150, 77)], "helped"),
        ([(74, 146), (80, 140), (77, 150)], "hurt"),
        ([(146, 140), (140, 146), (150, 149)], "no evidence"),
        ([(10, 9), (10, 9)], "no evidence"),
        ([(10, 10), (12, 12)], "no evidence"),
        ([(146, 74)], "helped"),
        ([(74, 146)], "hurt"),
        ([(12, 10)], "no evidence"),
        ([(10, 10)], "no evidence"),
    ],
)
def test_verdicts(pairs: list[tuple[int, int]], word: str) -> None:
    found = judged(*pairs)
    assert (found.verdict, found.n) == (word, len(pairs))
    assert found.sentence()


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), min_size=2, max_size=12))
def test_the_verdict_is_scipys_paired_t_test(pairs: list[tuple[int, int]]) -> None:
    assume(len({b - s for b, s in pairs}) > 1)
    wanted = stats.ttest_rel([b for b, _ in pairs], [s for _, s in pairs])
    found = judged(*pairs)
    assert found.p == pytest.approx(float(wanted.pvalue))
    assert found.interval == pytest.approx(wanted.confidence_interval(0.95))
    errors = [b for b, _ in pairs]
    assert spread(errors).interval == (pytest.approx(interval(errors)) if len(set(errors)) > 1 else None)


def interval(errors: list[int]) -> tuple[float, float]:
    found: tuple[float, float] = stats.t.interval(0.95, len(errors) - 1, sum(errors) / len(errors), stats.sem(errors))
    return found


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_one_seed_has_the_p_of_scipys_binomial_test(fixed: int, broken: int) -> None:
    wanted = stats.binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    assert paired([fixed - broken], fixed, broken).p == pytest.approx(float(wanted))


def test_one_seed_is_judged_by_mcnemars_exact_test() -> None:
    found = paired([5], 11, 6)
    assert found.p == pytest.approx(float(stats.binomtest(11, 17).pvalue))
    assert (found.interval, found.settle) == (None, None)
    assert found.sentence() == (
        "No evidence at n = 1 that the soft targets helped or hurt: 5 fewer errors than the baseline "
        "(McNemar's exact test on the two nets' predictions: p = 0.33). Other seeds may differ: --seeds 0-4 would tell."
    )
    assert paired([-40], 10, 50).sentence("B", "A").startswith("B hurt, on this one seed: 40 more errors than A (")


def test_the_same_difference_at_each_seed_has_no_spread_to_test() -> None:
    """Two differences of 5 are an interval of 5 to 5 to a t-test; a sign test finds n alike with p = 2 / 2^n."""
    found = paired([5, 5], 5, 0)
    assert (found.verdict, found.interval, found.p) == ("no evidence", None, 0.5)
    assert found.settle == 6
    assert found.sentence() == (
        "No evidence at n = 2 that the soft targets helped or hurt: 5.0 fewer errors than the baseline at each of 2 "
        "seeds (no spread to test; sign test: p = 0.5). About 6 seeds would settle an effect of this size."
    )
    assert paired([5] * 5, 5, 0).verdict == "no evidence"
    assert paired([-5] * 6, 0, 5).verdict == "hurt"
    six = paired([5] * 6, 5, 0)
    assert (six.verdict, six.p, six.settle) == ("helped", 2 / 2**6, None)
    none = paired([0, 0, 0], 0, 0)
    assert (none.verdict, none.p, none.settle) == ("no evidence", 1.0, None)


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_to_settle_are_those_of_the_textbooks(effect: float, seeds: int) -> None:
    """Cohen's small, medium and large effects, two-sided 5 %, power 80 %: the tables for a paired t-test."""
    assert seeds_to_settle(effect, 1.0) == seeds
    assert seeds_to_settle(-3 * effect, 3.0) == seeds


def test_nothing_settles_an_effect_of_nothing() -> None:
    assert seeds_to_settle(0.0, 1.0) is None
    assert seeds_to_settle(1e-6, 1.0) is None


def test_the_interval_is_scipys() -> None:
    errors = [97, 103, 99, 110, 94]
    wanted = interval(errors)
    found = spread(errors)
    assert (found.errors, found.mean) == (errors, sum(errors) / 5)
    assert found.interval == pytest.approx(wanted)
    assert spread([5, 5]).interval is None
    assert found.std == pytest.approx(stats.tstd(errors))
    assert spread([5]) == spread([5]).model_copy(update={"mean": 5, "std": None, "interval": None})


def test_a_verdict_without_evidence_says_how_many_seeds_would_settle_it() -> None:
    found = paired([10, -8, 12, 3, -4], 0, 0)
    assert found.verdict == "no evidence"
    assert found.settle == seeds_to_settle(2.6, stats.tstd([10, -8, 12, 3, -4]))
    assert f"About {found.settle} seeds would settle" in found.sentence()
    assert found.sentence("B", "A").startswith("No evidence at n = 5 that B helped or hurt: 2.6 fewer errors than A")


def test_an_interval_with_ends_of_two_signs_names_both() -> None:
    """By hand: mean 2.6, standard deviation 8.649, t of 4 degrees of freedom 2.776: 2.6 ± 10.7."""
    found = paired([10, -8, 12, 3, -4], 0, 0).sentence()
    assert "(95 % interval of the mean over 5 seeds: 8.1 more to 13.3 fewer; paired t-test: p = " in found
    found = paired([-10, 8, -12, -3, 4], 0, 0).sentence()
    assert "2.6 more errors than the baseline (95 % interval of the mean over 5 seeds: 8.1 fewer to 13.3 more" in found
    found = paired([9, 10, 11], 0, 0).sentence()
    assert "10.0 fewer errors than the baseline (95 % interval of the mean over 3 seeds: 7.5 to 12.5 fewer" in found


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 3 x 0.01, 2 x 0.03 also for 0.04, 4 x 0.005
        ([0.02, 0.02, 0.9], [0.06, 0.06, 0.9]),
        ([0.4, 0.6], [0.8, 0.8]),
        ([0.7, 0.6], [1.0, 1.0]),
        ([0.03], [0.03]),
        ([], []),
    ],
)
def test_holms_correction_by_hand(p: list[float], wanted: list[float]) -> None:
    assert holm(p) == pytest.approx(wanted)


probabilities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.005, 0.01, 0.0125, 0.025, 0.05, 1.0]))


@given(st.lists(probabilities, max_size=6))
def test_holms_correction_is_that_of_closed_testing(p: list[float]) -> None:
    """A test counts where Bonferroni's correction lets every set of tests that it is in count: Holm's is the short way."""
    every = range(len(p))
    sets = [some for size in every for some in combinations(every, size + 1)]
    for i, found in enumerate(holm(p)):
        wanted = max(min(1, len(some) * min(p[k] for k in some)) for some in sets if i in some)
        assert found == pytest.approx(wanted)


@given(st.lists(probabilities, max_size=20), st.randoms())
def test_holms_correction_keeps_the_order_and_never_lowers(p: list[float], random: Random) -> None:
    found = holm(p)
    assert all(raw <= own <= 1 for raw, own in zip(p, found, strict=True))
    assert all(found[i] <= found[j] for i in range(len(p)) for j in range(len(p)) if p[i] <= p[j])
    order = list(range(len(p)))
    random.shuffle(order)
    assert holm([p[i] for i in order]) == [found[i] for i in order]


def test_of_several_verdicts_each_rests_on_its_corrected_p() -> None:
    """The p, 0.00035, 0.019, 0.69, and that of the sign test, 1: times 4, 3, 2 and 1."""
    differences = [[30, 31, 32], [-10, -16, -12], [1, -2, 3], [0, 0, 0]]
    alone = [Judged(verdict=paired(fewer, 0, 0)) for fewer in differences]
    found = [one.verdict for one in corrected([*alone, Judged()]) if one.verdict]
    assert [one.verdict.verdict for one in alone if one.verdict] == ["helped", "hurt", "no evidence", "no evidence"]
    assert [v.verdict for v in found] == ["helped", *["no evidence"] * 3]
    raw = [float(stats.ttest_1samp(fewer, 0).pvalue) for fewer in differences[:3]]
    assert [v.p for v in found] == pytest.approx([*raw, 1])
    assert [v.p_corrected for v in found] == pytest.approx([4 * raw[0], 3 * raw[1], 1, 1])
    assert [v.comparisons for v in found] == [4] * 4
    assert "p = 0.019, 0.057 corrected for 4 comparisons)" in found[1].sentence()
    assert f"About {found[2].settle} seeds would settle an effect of this size, tested alone." in found[2].sentence()


def test_one_verdict_among_none_is_as_it_was() -> None:
    only = [Judged(), Judged(verdict=paired([10, 16, 12], 0, 0)), Judged()]
    assert corrected(only) == only
    assert corrected([]) == []


@pytest.mark.parametrize(
    ("mean", "interval", "word"),
    [
        (10, [8.0, 12.0], "not distinguishable"),
        (7, [4.5, 9.5], "better"),
        (14, [11.0, 17.0], "worse"),
        (10, None, "the same"),
        (9, None, "lower"),
        (11, None, "higher"),
    ],
)
def test_a_mean_is_held_against_a_figure_measured_once(mean: float, interval: list[float] | None, word: str) -> None:
    """An interval that holds the figure does not make them equal: it may be wide."""
    assert against(10, mean, interval) == word


def test_students_are_judged_against_the_baselines_of_their_seeds() -> None:
    def document(errors: int, baseline: int | None) -> Document:
        beside = Against(run="b", errors=baseline, fixed=80, broken=8) if baseline else None
        counted = Counted(errors=errors, total=500, per_class_errors=[errors])
        about = {"command": "distill", "experiment": "x", "run": "r", "seed": 0, "seconds": 1.0, "evaluated_on": "test"}
        whole = about | {"row": "student", "kind": "student", "test": counted, "baseline": beside}
        whole["quality"] = Quality(confusion=[], nll=0, brier=0, ece=0)
        return Document.model_validate(whole)

    found = results.verdict([document(74, 146), document(80, 140), document(60, None)])
    assert found
    assert (found.n, found.fewer_errors) == (2, 66)
    assert results.verdict([document(60, None)]) is None
