"""What is counted and measured on predictions, and the bias correction for classes a student never saw."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from pydantic import field_serializer
from torch import Tensor
from torch.nn import functional as F

from kdcli.config import Section
from kdcli.runs.spec import Counted

BINS = 15  # of the top class's probability, for the calibration error and its picture


def count_errors(logits: Tensor, labels: Tensor) -> Counted:
    """Errors over all samples and per class of the label: logits [N, C], labels [N]."""
    wrong = logits.argmax(1) != labels
    per_class = torch.bincount(labels[wrong], minlength=logits.shape[1]).tolist()
    return Counted(errors=int(wrong.sum()), total=len(labels), per_class_errors=per_class)


def errors_of_guessing(labels: Tensor) -> int:
    """The errors on labels [N] of naming the most frequent class for all."""
    return len(labels) - int(torch.bincount(labels).max())


class Quality(Section):
    """Of log-probabilities: the confusion matrix (rows: label, columns: prediction); NLL in nats a sample; the Brier
    score (1950), squared distance to the one-hot label, summed over classes, 0 to 2; the expected calibration error
    (Guo et al., arXiv:1706.04599, eq. 3), mean |accuracy - confidence| over the bins, weighted by their samples."""

    confusion: list[list[int]]
    nll: float
    brier: float
    ece: float
    balanced: float | None = None  # the mean over the classes of their error rates, where they differ in number
    top5: int | None = None  # errors where none of the five likeliest classes is right, of more than ten

    @field_serializer("confusion")
    def _of_few(self, matrix: list[list[int]]) -> list[list[int]]:
        """Documents hold the matrix of up to 100 classes: of 1,000 it has a million numbers."""
        return matrix if len(matrix) <= 100 else []


def quality(log_p: Tensor, labels: Tensor) -> Quality:
    """The quality of log-probabilities [N, C] of samples with labels [N]."""
    classes, counts = log_p.shape[1], torch.bincount(labels, minlength=log_p.shape[1])
    pairs = torch.bincount(labels * classes + log_p.argmax(1), minlength=classes**2)
    there, right = counts[counts > 0], pairs.view(classes, classes).diag()[counts > 0]
    balanced = None if there.max() <= 1.5 * there.min() else float(1 - (right / there).mean())
    hits = (log_p.topk(min(5, classes), 1).indices == labels[:, None]).any(1)
    return Quality(
        confusion=pairs.view(classes, classes).tolist(),
        balanced=balanced,
        top5=int((~hits).sum()) if classes > 10 else None,
        nll=float(F.nll_loss(log_p, labels)),
        brier=float((log_p.exp() - F.one_hot(labels, classes)).square().sum(1).mean()),
        ece=sum(n * abs(right - confidence) for n, confidence, right in calibration(log_p, labels)) / len(labels),
    )


def calibration(log_p: Tensor, labels: Tensor) -> list[tuple[int, float, float]]:
    """Of each of the equal intervals of the top class's probability that hold samples: how many, their mean confidence,
    and the share of them that is right."""
    confidence, predicted = log_p.double().exp().max(1)
    bins, right = (confidence * BINS).ceil().long().clamp(1, BINS), (predicted == labels).double()
    mine = [bins == b for b in bins.unique().tolist()]
    return [(int(of.sum()), float(confidence[of].mean()), float(right[of].mean())) for of in mine]


def discordant(log_p: Tensor, other_log_p: Tensor, labels: Tensor) -> tuple[int, int]:
    """How many samples only the one gets right, and how many only the other; both log-probabilities [N, C]."""
    one, other = (log_p.argmax(1) == labels for log_p in (log_p, other_log_p))
    return int((one & ~other).sum()), int((other & ~one).sum())


def follows(log_p: Tensor, teacher_log_p: Tensor) -> tuple[float, float]:
    """How a student follows its teacher: the share of samples with the same prediction, and the mean
    KL(teacher || student) at T = 1, in nats; both log-probabilities [N, C]."""
    same = (log_p.argmax(1) == teacher_log_p.argmax(1)).double().mean()
    return float(same), float(F.kl_div(log_p, teacher_log_p, reduction="batchmean", log_target=True))


def shift_bias(logits: Tensor, omitted: Sequence[int], shift: float) -> Tensor:
    """Logits [N, C] after adding `shift` to the biases of the omitted classes, and of those alone."""
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    bias[list(omitted)] = shift
    return logits + bias


def fewest_errors_shift(logits: Tensor, labels: Tensor, omitted: Sequence[int]) -> float:
    """The shift of the omitted classes' biases with the fewest errors on labelled samples (section 3), exactly. One
    goes to its best omitted class once the shift exceeds its margin, best kept minus best omitted logit. So the errors
    change at margins only: they are sorted and swept. Among the best intervals the longest wins, and its middle is
    taken; 0 stays when nothing beats it."""
    kept = [c for c in range(logits.shape[1]) if c not in omitted]
    kept_logit, kept_class = shift_bias(logits, omitted, -torch.inf).max(1)
    omitted_logit, omitted_class = shift_bias(logits, kept, -torch.inf).max(1)
    margin, order = (kept_logit - omitted_logit).sort()
    gain = (omitted_class == labels)[order].int() - (kept_class == labels)[order].int()
    correct = torch.cat([gain.new_zeros(1), gain.cumsum(0)])  # after passing i margins, against passing none
    edges = torch.cat([margin[:1] - 2, margin, margin[-1:] + 2])
    length = edges.diff()
    best = correct[length > 0].max()
    if correct[int((margin < 0).sum())] == best:  # unshifted
        return 0.0
    i = int(torch.where(correct == best, length, -1.0).argmax())
    return float((edges[i] + edges[i + 1]) / 2)


def prior_shift(logits: Tensor, omitted: Sequence[int], share: float) -> float:
    """The shift at which the omitted classes' mean probability at T = 1 equals their known `share`, found by bisection;
    logits [N, C] of unlabelled samples in which all classes occur in their shares."""
    from scipy.optimize import bisect

    logits, kept = logits.double(), [c for c in range(logits.shape[1]) if c not in omitted]
    odds = logits[:, list(omitted)].logsumexp(1) - logits[:, kept].logsumexp(1)
    low, high = float(-odds.max()) - 50, float(-odds.min()) + 50
    return float(bisect(lambda shift: float(torch.sigmoid(odds + shift).mean()) - share, low, high, xtol=1e-9))


class Latency(Section):
    """Milliseconds of a batch, median and 95th percentile, and the images a second at the median."""

    p50: float
    p95: float
    images_per_s: int


def latency(forward: Callable[[Tensor], Tensor], inputs: Tensor, seconds: float = 0.05) -> Latency:
    """The time of `forward` on one batch, over 20 calls or more (of a slow one 5) and about `seconds`, warmed up."""
    wait: Callable[[], object] = torch.cuda.synchronize if inputs.is_cuda else lambda: None
    times: list[float] = []
    with torch.inference_mode():
        while len(times) < 8 or (sum(times[3:]) < 1 and (len(times) < 23 or sum(times[3:]) < seconds)):
            wait()
            start = time.perf_counter()
            forward(inputs)
            wait()
            times.append(time.perf_counter() - start)
    p50, p95 = (q * 1e3 for q in statistics.quantiles(times[3:], n=20)[9::9])
    return Latency(p50=round(p50, 4), p95=round(p95, 4), images_per_s=round(len(inputs) / p50 * 1e3))
