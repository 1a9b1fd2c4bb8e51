"""Calibration, similarity and intervals against closed forms and other libraries."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from m2mkd_jax.evaluate import calibration
from m2mkd_jax.evaluate.intervals import interval, paired_gap
from m2mkd_jax.evaluate.similarity import linear_cka


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.normal(size=(203, 7)), rng.integers(0, 7, 203)
    return logits, labels


def test_losses_and_accuracies_are_those_of_scikit_learn(drawn):
    logits, labels = drawn
    found, p = calibration.scores(logits, labels), calibration.softmax(logits)
    known = range(7)
    assert found["nll"] == pytest.approx(metrics.log_loss(labels, p, labels=known))
    assert found["top1"] == metrics.accuracy_score(labels, p.argmax(-1))
    assert found["top5"] == metrics.top_k_accuracy_score(labels, p, k=5, labels=known)
    each = [metrics.brier_score_loss(labels == k, p[:, k]) for k in known]
    assert found["brier"] == pytest.approx(sum(each))
    assert "top5" not in calibration.scores(logits[:, :5], labels % 5)


def test_calibration_error_of_bins_of_equal_count():
    # Two bins of two images: confidences 0.6 and 0.7 with one right, 0.8 and 0.9 with both right:
    # (2 * |0.5 - 0.65| + 2 * |1 - 0.85|) / 4 = 0.15.
    p = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]])
    labels = np.array([0, 0, 1, 0])
    found = calibration.reliability(p, labels, bins=2)
    np.testing.assert_allclose(found.confidence, [0.65, 0.85])
    np.testing.assert_allclose(found.accuracy, [0.5, 1.0])
    assert found.images.tolist() == [2, 2]
    assert calibration.expected_calibration_error(p, labels, bins=2) == pytest.approx(0.15)


def test_the_order_of_images_of_one_confidence_changes_nothing():
    """Half of them are right at a confidence of 0.5, in bins that no order can tell apart."""
    p, rng = np.full((31, 2), 0.5), np.random.default_rng(0)
    labels = np.arange(31) % 2
    expected = abs(16 / 31 - 0.5)
    for order in (labels, np.sort(labels), np.sort(labels)[::-1], rng.permutation(labels)):
        assert calibration.expected_calibration_error(p, order) == pytest.approx(expected)
    # One of three equal images is right: a third of each, in the bin of one and in that of two.
    confidence = np.array([0.6, 0.8, 0.8, 0.8])
    for right in ([0, 1, 0, 0], [0, 0, 0, 1]):
        found = calibration.binned(confidence, np.array(right, bool), bins=2)
        np.testing.assert_allclose(found.accuracy, [1 / 6, 1 / 3])


def test_the_loss_of_a_sure_and_wrong_network_has_no_bound():
    found = calibration.scores(np.array([[0.0, 60.0], [900.0, 0.0]]), np.array([0, 1]))
    assert found["nll"] == pytest.approx((60 + 900) / 2)


def test_a_calibrated_network_has_no_calibration_error():
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.5, 1, 200_000)
    labels = (rng.uniform(size=sure.size) > sure).astype(int)
    p = np.stack([sure, 1 - sure], -1)
    assert calibration.expected_calibration_error(p, labels) < 0.01
    assert calibration.expected_calibration_error(p, 1 - labels) > 0.3


def test_cka_of_rotated_scaled_shifted_and_of_independent_features():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(500, 6))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert linear_cka(x, rng.normal(size=(500, 6))) < 0.05
    assert linear_cka(x, np.ones((500, 2))) == 0


def test_cka_is_the_kernel_form_of_the_paper():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    centre = np.eye(40) - 1 / 40
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(x, y) == pytest.approx(expected)


def test_intervals_are_those_of_students_t():
    values = [0.81, 0.83, 0.79, 0.84]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = interval(values)
    assert found["mean"] - found["interval95"] == pytest.approx(low)
    assert found["mean"] + found["interval95"] == pytest.approx(high)
    assert interval([0.8])["interval95"] is None


def test_gaps_pair_the_seeds_that_both_have():
    ours, theirs = {0: 0.9, 2: 0.8, 3: 0.7}, {0: 0.8, 1: 0.1, 3: 0.5}
    found = paired_gap(ours, theirs)
    np.testing.assert_allclose(found["values"], [0.1, 0.2])
    test = stats.ttest_rel([0.9, 0.7], [0.8, 0.5]).confidence_interval(0.95)
    assert found["mean"] + found["interval95"] == pytest.approx(test.high)
    assert paired_gap(ours, {5: 0.1}) is None
