"""Best-of-n: sample n responses of the SFT policy and keep the one that the reward model scores highest.

The baseline that needs no training, and the frontier that PPO has to reach (Stiennon et al. 2020, Gao et al. 2022).
What is left out is choosing a response for a user: n is only evaluated, from samples that evaluate.py makes.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from rlhf_core.statistics import Array


def best_of_n_kl(n: int) -> float:
    """How far the best of n is from the policy that is sampled, at most.

        KL(π_n ‖ π) ≤ log n − (n − 1) / n

    Equal where no two samples of a prompt share a score; below it where the policy often says the same, so it is an
    upper bound.
    Stiennon et al. 2020, app. G.3, https://arxiv.org/abs/2009.01325; the bound: Beirami et al. 2024, theorem 1,
    https://arxiv.org/abs/2401.01879

    Args:
        n: 1 or more.

    Returns:
        Nats a response.
    """
    return math.log(n) - (n - 1) / n


def chance_of_best(scores: ArrayLike, n: int) -> Array:
    """How likely each sample is the best of n that are drawn from all N without replacement.

        P_i = C(r_i − 1, n − 1) / C(N, n)          r_i: rank of sample i, 1 is the lowest score

    Samples that tie share their chances, as a coin would decide. The mean of any quantity under these chances is its
    mean over all C(N, n) subsets, and so unbiased for the best of n fresh samples, with less noise than one subset has.
    Nakano et al. 2021, app. I, https://arxiv.org/abs/2112.09332

    Args:
        scores: (N,) of one prompt's samples, by which the best is picked.
        n: from 1 to N.

    Returns:
        (N,) chances that add up to 1.

    Raises:
        ValueError: n is not from 1 to N.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not 1 <= n <= len(scores):
        raise ValueError(f"expected n from 1 to {len(scores)}, the number of samples; found {n}")
    # Ranks below r hold C(r, n) of the subsets; each group of ties holds what it adds to those below it.
    _, group_N, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    subsets = np.array([math.comb(int(rank), n) / math.comb(len(scores), n) for rank in (0, *last)])
    return (np.diff(subsets) / counts)[group_N]


def best_of_n(
    prompts: Sequence[int], picked_by: Sequence[float], values: Mapping[str, Sequence[float]], sizes: Sequence[int]
) -> dict[str, dict[str, float]]:
    """What the best of n is worth, for several n, from all samples there are.

    Args:
        prompts: (R,) which prompt each sample answers.
        picked_by: (R,) the score by which the best is picked.
        values: by name, (R,) each: whose mean over prompts is wanted.
        sizes: the n; none above the number of samples that a prompt has.

    Returns:
        By n as a string, since it becomes a part of metrics' names: the mean of each value, and `kl` in nats.
    """
    numbers, scores = np.asarray(prompts), np.asarray(picked_by, dtype=np.float64)
    rows = [np.flatnonzero(numbers == prompt) for prompt in np.unique(numbers)]
    found = {}
    for n in sizes:
        chances = [chance_of_best(scores[of_prompt], n) for of_prompt in rows]
        means = {
            name: float(np.mean([chance @ np.asarray(value, dtype=np.float64)[of_prompt]
                                 for chance, of_prompt in zip(chances, rows, strict=True)]))
            for name, value in values.items()
        }  # fmt: skip
        found[str(n)] = {**means, "kl": best_of_n_kl(n)}
    return found
