"""People's blind comparisons of two policies beside the gold model's word on the same answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_core.agreement import krippendorff_alpha, table
from rlhf_core.config import Gate
from rlhf_core.gate import Pair, rate
from rlhf_core.statistics import Interval


class People(NamedTuple):
    """What people said, and what the gold model says of the answers that they saw."""

    win_rate: Interval
    gold: Interval  # on the same pairs
    judgements: int
    annotators: int
    agreement: float  # share of decided judgements in which the gold model prefers the same answer; a tie of its is ½
    alpha: float | None  # Krippendorff's among people; None where no pair was judged twice, or all said the same

    def metrics(self) -> dict[str, float]:
        """As numbers with names."""
        found = {
            "win_rate": self.win_rate.mean,
            "win_rate_low": self.win_rate.low,
            "win_rate_high": self.win_rate.high,
            "gold_win_rate": self.gold.mean,
            "judgements": float(self.judgements),
            "annotators": float(self.annotators),
            "gold_agreement": self.agreement,
        }
        return found if self.alpha is None else {**found, "alpha": self.alpha}

    def lines(self) -> list[str]:
        """As a Markdown table."""
        among = "cannot be told" if self.alpha is None else f"{self.alpha:.2f}"
        return [
            "| the new policy's win rate, on the answers that people saw | |",
            "|---|---|",
            f"| by people ({self.annotators}, {self.judgements} judgements) | {_shown(self.win_rate)} |",
            f"| by the gold model | {_shown(self.gold)} |",
            f"| people and gold model prefer the same | {self.agreement:.0%} |",
            f"| agreement among people (Krippendorff's alpha) | {among} |",
        ]


def people_beside_gold(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pair], config: Gate) -> People | None:
    """Compare; None where nobody judged any of the pairs.

    Args:
        rows: judgements with `prompt`, `responses` (new policy's first), `ranks` and `annotator`; both bad is a tie.
        pairs: the answers that could be judged.
    """
    gold_of = {(pair.prompt, pair.new, pair.current): pair.gold for pair in pairs}
    said: list[tuple[str, tuple[str, str, str], float]] = []
    for row in rows:
        key = (_last(row["prompt"]), *row["responses"])
        if key in gold_of:
            new, current = row["ranks"]
            said.append((row["annotator"], key, 1.0 if new < current else 0.5 if new == current else 0.0))
    if not said:
        return None
    prompts = [key[0] for _, key, _ in said]
    golds = [gold_of[key] for _, key, _ in said]
    wins = [value for _, _, value in said]
    decided = [(gold, won) for gold, won in zip(golds, wins, strict=True) if won != 0.5]
    ratings_AI = table(said).ratings_AI
    twice = bool((np.isfinite(ratings_AI).sum(0) > 1).any())
    alpha = krippendorff_alpha(ratings_AI, metric="ordinal").mean if twice else math.nan
    return People(
        rate(wins, prompts, config),
        rate(golds, prompts, config),
        len(said),
        len({who for who, _, _ in said}),
        float(np.mean([1.0 - abs(gold - won) for gold, won in decided])) if decided else 0.5,
        alpha if math.isfinite(alpha) else None,
    )


def _last(prompt: Any) -> str:
    """The last message, by which answers name their prompt."""
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def _shown(found: Interval) -> str:
    return f"{found.mean:.0%} ({found.low:.0%} to {found.high:.0%})"
