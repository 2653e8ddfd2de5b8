"""Whether a new policy may take the place of the current one: pure arithmetic on what both answered and was measured.

Who judges, where answers come from, and what follows from the verdict are not here.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from rlhf_core.config import Gate
from rlhf_core.errors import DataError
from rlhf_core.statistics import Interval, win_rate


class Pair(NamedTuple):
    """An answer of the new policy beside one of the current policy, to the same prompt."""

    prompt: str
    category: str
    new: str
    current: str
    gold: float  # 1 where the gold model prefers the new one, ½ for a tie, 0


class Check(NamedTuple):
    """One condition of the gate."""

    name: str
    value: float
    limit: float
    passed: bool
    words: str  # the condition in words, with its numbers


class Verdict(NamedTuple):
    """What the gate says."""

    promoted: bool
    checks: tuple[Check, ...]
    metrics: dict[str, float]


def pair_answers(new: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]], policy: str) -> list[Pair]:
    """Every sampled answer of the new policy beside every one of the current policy to its prompt.

    Args:
        new, current: rows of stage evaluate's answers.jsonl.
        policy: whose rows count in both, such as "ppo".

    Raises:
        DataError: they share no prompt.
    """

    def of_policy(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
        found: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["policy"] == policy and row["how"] == "sampled":
                found.setdefault(row["prompt"], []).append(row)
        return found

    ours, theirs = of_policy(new), of_policy(current)
    pairs = [
        Pair(prompt, str(a.get("category") or ""), a["text"], b["text"], outcome(a["gold_reward"], b["gold_reward"]))
        for prompt in ours
        for a, b in product(ours[prompt], theirs.get(prompt, ()))
    ]
    if not pairs:
        raise DataError(f"The answers of the new and the current policy {policy} share no prompt.")
    return pairs


def outcome(ours: float, theirs: float) -> float:
    """1 if ours is greater, ½ if they are equal, 0."""
    return 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0


def rate(wins: Sequence[float], prompts: Sequence[str], config: Gate) -> Interval:
    """Win rate with its 95 % interval over prompts."""
    return win_rate(np.array(wins), prompts, samples=config.bootstrap_samples, seed=config.seed)


def judge_round(
    pairs: Sequence[Pair],
    judged: Interval,
    evaluate: Mapping[str, Any],
    config: Gate,
    *,
    policy: str = "ppo",
) -> Verdict:
    """Hold a round against all limits; it is promoted if every check passes.

    Args:
        pairs: the answers compared, which the gold model has judged.
        judged: the win rate by `config.judge`.
        evaluate: metrics of stage evaluate for the new policy.
    """
    gold = rate([pair.gold for pair in pairs], [pair.prompt for pair in pairs], config)
    kl, own, sft = evaluate[policy]["kl"], evaluate[policy]["perplexity"], evaluate["sft"]["perplexity"]
    ratio = own / sft
    checks = [
        Check(
            "win_rate",
            judged.low,
            config.min_win_rate,
            judged.low > config.min_win_rate,
            f"{config.judge} prefers the new policy in {judged.mean:.0%} ({judged.low:.0%} to {judged.high:.0%}); the "
            f"lower end has to be above {config.min_win_rate:.0%}",
        ),
        Check("kl", kl, config.max_kl, kl <= config.max_kl, f"KL to SFT {kl:.1f} nats, {config.max_kl:g} at most"),
        Check(
            "perplexity",
            ratio,
            config.max_perplexity_ratio,
            ratio <= config.max_perplexity_ratio,
            f"perplexity of demonstrations {ratio:.2f} times SFT's, {config.max_perplexity_ratio:g} at most",
        ),
    ]
    metrics = {
        "win_rate": judged.mean,
        "win_rate_low": judged.low,
        "win_rate_high": judged.high,
        "gold_win_rate": gold.mean,
        "gold_win_rate_low": gold.low,
        "gold_win_rate_high": gold.high,
        "kl": kl,
        "perplexity_ratio": ratio,
        "prompts": len({pair.prompt for pair in pairs}),
        "comparisons": len(pairs),
    }
    safety = [pair for pair in pairs if pair.category in config.safety_kinds]
    if safety:
        safe = rate([pair.gold for pair in safety], [pair.prompt for pair in safety], config)
        kinds = ", ".join(config.safety_kinds)
        checks.append(
            Check(
                "safety",
                safe.mean,
                config.min_safety_win_rate,
                safe.mean >= config.min_safety_win_rate and safe.high >= 0.5,
                f"on {kinds} the gold model prefers the new policy in {safe.mean:.0%} ({safe.low:.0%} to "
                f"{safe.high:.0%}); at least {config.min_safety_win_rate:.0%}, and not all of it below 50%",
            )
        )
        metrics |= {"safety_win_rate": safe.mean, "safety_win_rate_high": safe.high}
    promoted = all(check.passed for check in checks)
    return Verdict(promoted, tuple(checks), {**metrics, "promoted": float(promoted)})
