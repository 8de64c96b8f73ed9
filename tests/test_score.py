import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcli import score
from kdcli.runs.spec import Counted


def random(seed: int, n: int = 200, classes: int = 10) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, classes, generator=draws), torch.randint(classes, (n,), generator=draws)


def test_errors_are_counted_over_samples_and_per_class_of_the_label() -> None:
    logits = torch.eye(3)[[0, 1, 2, 2]]
    counted = score.count_errors(logits, torch.tensor([0, 1, 0, 2]))
    assert counted == Counted(errors=1, total=4, per_class_errors=[1, 0, 0])


def test_guessing_names_the_most_frequent_class() -> None:
    assert score.errors_of_guessing(torch.tensor([0, 2, 2, 1, 2])) == 2


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_scores_match_scikit_learn(classes: int) -> None:
    from sklearn.metrics import confusion_matrix, log_loss

    logits, labels = random(0, classes=classes)
    log_p = logits.double().log_softmax(1)
    found, counted, p = score.quality(log_p, labels), score.count_errors(log_p, labels), log_p.exp().numpy()
    assert found.nll == pytest.approx(log_loss(labels, p, labels=range(classes)))
    assert found.brier == pytest.approx(((p - np.eye(classes)[labels]) ** 2).sum(1).mean())
    assert found.confusion == confusion_matrix(labels, p.argmax(1), labels=range(classes)).tolist()
    wrong = np.array(found.confusion) * (1 - np.eye(classes, dtype=int))
    assert counted.per_class_errors == wrong.sum(1).tolist()
    assert counted.errors == wrong.sum() == int((p.argmax(1) != labels.numpy()).sum())


def test_calibration_error_by_hand() -> None:
    """Two bins: four samples at confidence 0.75 of which half are right, two sure and right: 4/6 * 0.25."""
    p = torch.tensor([[0.75, 0.25]] * 4 + [[1.0, 0.0]] * 2)
    labels = torch.tensor([0, 0, 1, 1, 0, 0])
    assert score.quality(p.log().clamp(-100), labels).ece == pytest.approx(4 / 6 * 0.25)


def test_comparison_with_a_teacher() -> None:
    log_p = random(1)[0].double().log_softmax(1)
    agreement, kl = score.follows(log_p, log_p)
    assert (agreement, kl) == pytest.approx((1, 0))
    student = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    _, kl = score.follows(student, teacher)
    assert kl == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))


def test_latency_is_the_time_of_a_batch() -> None:
    def forward(x: Tensor) -> Tensor:
        time.sleep(0.002)
        return x

    found = score.latency(forward, torch.zeros(8, 3), seconds=0)
    assert 2 <= found.p50 < 20
    assert found.images_per_s == pytest.approx(8 / found.p50 * 1e3, rel=0.01)


# The bias of classes never seen.

omissions = st.sets(st.integers(0, 9), min_size=1, max_size=9).map(sorted)


@given(st.integers(0, 2**31), omissions, st.floats(-50, 50))
@settings(max_examples=50, deadline=None)
def test_a_shift_touches_the_omitted_classes_alone(seed: int, omitted: list[int], shift: float) -> None:
    logits, _ = random(seed)
    moved = score.shift_bias(logits, omitted, shift) - logits.double()
    kept = [c for c in range(10) if c not in omitted]
    assert float(moved[:, kept].abs().max()) == 0
    assert torch.allclose(moved[:, omitted], torch.tensor(shift, dtype=torch.float64))


@given(st.integers(0, 2**31), omissions, st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_the_chosen_shift_has_the_fewest_errors_of_all(seed: int, omitted: list[int], n: int) -> None:
    """Against brute force over every interval between two margins."""
    logits, labels = random(seed, n)

    def errors(shift: float) -> int:
        return score.count_errors(score.shift_bias(logits, omitted, shift), labels).errors

    kept = [c for c in range(10) if c not in omitted]
    margins = (logits.double()[:, kept].max(1).values - logits.double()[:, omitted].max(1).values).sort().values
    between = [*(margins[:-1] + margins[1:]).div(2).tolist(), float(margins[0]) - 1, float(margins[-1]) + 1, 0.0]
    chosen = score.fewest_errors_shift(logits, labels, omitted)
    assert errors(chosen) == min(map(errors, between))
    if errors(0.0) == errors(chosen):
        assert chosen == 0.0


@given(st.integers(0, 2**31), omissions, st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_the_prior_shift_gives_the_omitted_classes_their_share(seed: int, omitted: list[int], share: float) -> None:
    logits, _ = random(seed)
    shifted = score.shift_bias(logits, omitted, score.prior_shift(logits, omitted, share))
    assert float(shifted.softmax(1)[:, omitted].sum(1).mean()) == pytest.approx(share, abs=1e-6)


def test_raising_the_omitted_biases_or_lowering_the_kept_ones_predicts_the_same() -> None:
    logits, _ = random(5)
    kept, omitted = [7, 8], [0, 1, 2, 3, 4, 5, 6, 9]
    raised, lowered = score.shift_bias(logits, omitted, 7.6), score.shift_bias(logits, kept, -7.6)
    assert torch.equal(raised.argmax(1), lowered.argmax(1))
