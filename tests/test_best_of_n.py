"""Best-of-n from all samples: by hand, against every subset, against fresh draws, and its KL against a real one."""

import math
from itertools import combinations

import numpy as np
import pytest

from rlhf_core.best_of_n import best_of_n, best_of_n_kl, chance_of_best


def test_the_kl_by_hand() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5, rel=1e-12)
    assert best_of_n_kl(64) == pytest.approx(math.log(64) - 63 / 64, rel=1e-12)


def test_the_kl_is_that_of_the_best_of_many_and_a_bound_where_samples_repeat() -> None:
    # A policy of V equally likely responses with scores of their own: the best of n is response v with
    # (v/V)^n − ((v−1)/V)^n, and its KL comes near the formula as V grows, from below.
    def exact(size: int, n: int) -> float:
        edges = (np.arange(size + 1) / size) ** n
        best = np.diff(edges)
        return float((best * np.log(best * size)).sum())

    for n in (2, 4, 16):
        assert exact(4, n) < exact(40, n) < best_of_n_kl(n)
        assert exact(200_000, n) == pytest.approx(best_of_n_kl(n), rel=1e-3)


def test_chances_by_hand() -> None:
    # Scores 3 1 2: of the pairs {3,1} {3,2} {1,2} the best is 3, 3, 2.
    assert chance_of_best([3.0, 1.0, 2.0], 2).tolist() == pytest.approx([2 / 3, 0, 1 / 3], rel=1e-12)
    assert chance_of_best([3.0, 1.0, 2.0], 1).tolist() == pytest.approx([1 / 3] * 3, rel=1e-12)
    assert chance_of_best([3.0, 1.0, 2.0], 3).tolist() == [1.0, 0.0, 0.0]
    # Scores 5 5 1: the best of each pair is a 5, whichever a coin says.
    assert chance_of_best([5.0, 5.0, 1.0], 2).tolist() == pytest.approx([0.5, 0.5, 0], rel=1e-12)
    assert chance_of_best([2.0] * 4, 3).tolist() == pytest.approx([0.25] * 4, rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", range(1, 8))
def test_chances_are_those_over_all_subsets(n: int, ties: bool) -> None:
    rng = np.random.default_rng(n)
    scores = rng.integers(0, 3, 7).astype(float) if ties else rng.normal(size=7)
    expected = np.zeros(7)
    subsets = list(combinations(range(7), n))
    for subset in subsets:
        best = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
        for i in best:
            expected[i] += 1 / len(best) / len(subsets)
    found = chance_of_best(scores, n)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert found.sum() == pytest.approx(1, rel=1e-12)


def test_it_is_unbiased_for_the_best_of_n_fresh_samples() -> None:
    # Proxy and gold agree in part. From 6 samples a prompt the best of 3 is, on average over 20,000 prompts, what the
    # best of 3 is from 3 samples a prompt; and less noisy.
    rng = np.random.default_rng(0)
    prompts = 20_000
    gold = rng.normal(size=(prompts, 6))
    proxy = gold + rng.normal(size=gold.shape)
    every = np.array([chance_of_best(p, 3) @ g for p, g in zip(proxy, gold, strict=True)])
    fresh = np.take_along_axis(gold[:, :3], proxy[:, :3].argmax(1)[:, None], 1)[:, 0]
    truth = 0.8463 / math.sqrt(2)  # the mean of the largest of 3 normals, times the correlation
    assert every.mean() == pytest.approx(truth, abs=4 * every.std() / math.sqrt(prompts))
    assert fresh.mean() == pytest.approx(truth, abs=4 * fresh.std() / math.sqrt(prompts))
    assert every.std() < 0.8 * fresh.std()


def test_means_over_prompts_by_hand() -> None:
    # Prompt 7 has samples of proxy 3 1 2 and gold 10 20 30, prompt 3 of proxy 1 2 3 and gold 1 2 6, mixed up.
    prompts = [7, 3, 7, 3, 7, 3]
    proxy = [3.0, 1.0, 1.0, 2.0, 2.0, 3.0]
    gold = [10.0, 1.0, 20.0, 2.0, 30.0, 6.0]
    found = best_of_n(prompts, proxy, {"reward": proxy, "gold_reward": gold}, [1, 2, 3])
    assert list(found) == ["1", "2", "3"]
    assert found["1"] == pytest.approx({"reward": 2.0, "gold_reward": (20 + 3) / 2, "kl": 0.0}, rel=1e-12)
    # n = 2: prompt 7 10·⅔ + 30·⅓ = 50/3, prompt 3 6·⅔ + 2·⅓ = 14/3; proxy 3·⅔ + 2·⅓ = 8/3 in both
    assert found["2"] == pytest.approx(
        {"reward": 8 / 3, "gold_reward": (50 / 3 + 14 / 3) / 2, "kl": math.log(2) - 0.5}, rel=1e-12
    )
    assert found["3"]["gold_reward"] == pytest.approx((10 + 6) / 2, rel=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_there_is_no_best_of_more_than_there_are(n: int) -> None:
    with pytest.raises(ValueError, match=f"expected n from 1 to 3, the number of samples; found {n}"):
        chance_of_best([1.0, 2.0, 3.0], n)


def test_many_samples_overflow_nothing() -> None:
    chances = chance_of_best(np.arange(2000.0), 1000)
    assert chances.sum() == pytest.approx(1, rel=1e-9)
    assert np.isfinite(chances).all()
