"""Whether a new policy may take the place of the current one: pure arithmetic on what both answered and was measured.

Who judges, where answers come from, and what follows from the verdict are not here.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np

from rlhf_core.agreement import judged_so_far, mean_interval
from rlhf_core.config import Gate, People
from rlhf_core.data import parse_prompt
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.records import Message
from rlhf_core.statistics import Interval, answers_outcome, length_controlled_win_rate, longest_wins, outcome, win_rate


class Pair(NamedTuple):
    """An answer of the new policy beside one of the current policy, to the same prompt."""

    prompt: tuple[Message, ...]  # the whole conversation
    category: str
    new: str
    current: str
    gold: float  # 1 where the gold model prefers the new one, ½ for a tie, 0
    longer: float = 0.0  # tokens of the new one less those of the current one


class _Answer(NamedTuple):
    """A row of answers.jsonl, as far as the gate goes by it."""

    text: str
    tokens: int
    stopped: bool
    gold_reward: float
    category: str


class Rates(NamedTuple):
    """A win rate, and what it would be between answers of equal length."""

    plain: Interval
    equal: Interval

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """As numbers with names, the ends of both intervals included."""
        return {
            f"{prefix}{name}{end}": value
            for name, found in (("win_rate", self.plain), ("length_controlled_win_rate", self.equal))
            for end, value in zip(("", "_low", "_high"), found, strict=True)
        }


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


def pair_answers(
    new: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]], policy: str, against: str | None = None
) -> list[Pair]:
    """Every sampled answer of the new policy beside every one of the current policy to its prompt.

    Args:
        new, current: rows of stage evaluate's answers.jsonl.
        policy: whose rows count in the first, such as "ppo".
        against: whose rows count in the second; the same if None.

    Raises:
        DataError: they share no prompt.
    """
    ours, theirs = _sampled(new, policy), _sampled(current, against or policy)
    pairs = [
        Pair(
            prompt,
            a.category,
            a.text,
            b.text,
            answers_outcome(a, b, lambda one: one.gold_reward),
            float(a.tokens - b.tokens),
        )
        for prompt in ours
        for a, b in product(ours[prompt], theirs.get(prompt, ()))
    ]
    if not pairs:
        raise DataError(f"The answers of {policy} and of what it is compared with share no prompt.")
    return pairs


def require_safety_kinds(kinds: Collection[str], config: Gate) -> None:
    """Stop where the data have kinds of prompts and a safety kind is none of them: its check would not be made.

    Data without any kinds have no such prompts, and nothing is misspelt.

    Args:
        kinds: of the test prompts.

    Raises:
        ConfigError: names the kind and those that there are.
    """
    found = sorted({kind for kind in kinds if kind})
    missing = [kind for kind in config.safety_kinds if kind not in found]
    if found and missing:
        raise ConfigError(
            f"gate.safety_kinds names {', '.join(missing)}, but no test prompt is of that kind, so that nothing would "
            f"be checked there. Found {', '.join(found)}. Begin another campaign with "
            "-R gate.safety_kinds=[...]; [] checks none."
        )


def to_compare(pairs: Sequence[Pair]) -> list[Pair]:
    """What people are shown: one pair a prompt, and none of answers that look alike, which nobody can compare."""
    first = {pair.prompt: pair for pair in reversed(pairs)}
    return [pair for pair in first.values() if not alike(pair.new, pair.current)]


def alike(one: str, other: str) -> bool:
    """Whether two answers are the same on a page: spaces around do not show, and some characters no database takes.

    The pages go by the same (rlhf_core.feedback: `exchange.Found.identical` of what is `stored`). They are not asked
    here, since a stage then would hang on the database's code.
    """
    return _on_a_page(one) == _on_a_page(other)


def _on_a_page(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8").strip()


def _sampled(rows: Sequence[Mapping[str, Any]], policy: str) -> dict[tuple[Message, ...], list[_Answer]]:
    """A policy's sampled answers by prompt."""
    found: dict[tuple[Message, ...], list[_Answer]] = {}
    for row in rows:
        if row["policy"] == policy and row["how"] == "sampled":
            answer = _Answer(
                row["text"], row["tokens"], row["stopped"], row["gold_reward"], str(row.get("category") or "")
            )
            found.setdefault(parse_prompt(row).prompt, []).append(answer)
    return found


def rates(
    wins: Sequence[float],
    longer: Sequence[float],
    prompts: Sequence[Hashable],
    config: Gate | People,
    *,
    peeked: bool = False,
) -> Rates:
    """Both win rates with their 95 % intervals over prompts.

    Args:
        longer: by how much the new policy's answer is longer, in any one unit.
        peeked: whether what came out so far may have decided when to stop. Then the plain rate is the mean over prompts
            and has the interval that holds whenever that is.
    """
    options = {"samples": config.bootstrap_samples, "seed": config.seed}
    plain = win_rate(np.array(wins), prompts, **options)
    if peeked:
        plain = judged_so_far(_prompt_means(wins, prompts)).win_rate
    elif plain.high - plain.low < 1e-9:  # all prompts went the same way: the bootstrap would be sure after one
        plain = mean_interval(_prompt_means(wins, prompts))
    return Rates(plain, length_controlled_win_rate(wins, longer, prompts, **options))


def _prompt_means(wins: Sequence[float], prompts: Sequence[Hashable]) -> list[float]:
    by_prompt: dict[Hashable, list[float]] = {}
    for won, prompt in zip(wins, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(won)
    return [sum(part) / len(part) for part in by_prompt.values()]


def gold_rates(pairs: Sequence[Pair], config: Gate | People) -> Rates:
    """Those by the gold model."""
    return rates([one.gold for one in pairs], [one.longer for one in pairs], [one.prompt for one in pairs], config)


def in_percent(found: Interval) -> str:
    """A rate with the ends of its interval."""
    return f"{found.mean:.0%} ({found.low:.0%} to {found.high:.0%})"


def predicted(ranks: Sequence[Sequence[int]], judged: Sequence[Sequence[int]]) -> Interval:
    """How often ranks order responses as judgements do: share of the pairs that a judgement decides, ties half.

    A judgement is one case, by its mean, since its pairs are not independent; 95 % interval over judgements. Nobody
    predicts more than half of what a coin says.

    Args:
        ranks: by the reward model, one row a judgement. 1 is best.
        judged: by the annotator, in the same order. None is all ties.
    """
    shares = []
    for ours, theirs in zip(ranks, judged, strict=True):
        decided = [(i, j) for i, j in permutations(range(len(theirs)), 2) if theirs[i] < theirs[j]]
        shares.append(sum(outcome(-ours[i], -ours[j]) for i, j in decided) / len(decided))
    return mean_interval(shares)


def judge_round(
    pairs: Sequence[Pair],
    judged: Rates,
    evaluate: Mapping[str, Any],
    config: Gate,
    *,
    policy: str = "ppo",
    learned: Interval | None = None,
) -> Verdict:
    """Hold a round against all limits; it is promoted if every check passes.

    Args:
        pairs: the answers compared, which the gold model has judged.
        judged: the win rates by `config.judge`. The plain one decides; the other is told beside it.
        evaluate: metrics of stage evaluate for the new policy.
        learned: how often the reward model predicts the round's own judgements; None where none was held out.
    """
    gold = judged if config.judge == "gold" else gold_rates(pairs, config)
    kl, own, sft = evaluate[policy]["kl"], evaluate[policy]["perplexity"], evaluate["sft"]["perplexity"]
    ratio = own / sft
    nothing = config.judge == "people" and not to_compare(pairs)
    checks = [
        Check(
            "win_rate",
            judged.plain.low,
            config.min_win_rate,
            judged.plain.low > config.min_win_rate,
            f"{config.judge} prefers the new policy in {in_percent(judged.plain)}; the lower end has to be above "
            f"{config.min_win_rate:.0%}; between answers of equal length it is {in_percent(judged.equal)}"
            + ("; both gave the same answers, so that people had nothing to compare: all ties" if nothing else ""),
        ),
        Check(
            "kl",
            kl,
            config.max_kl,
            kl <= config.max_kl,
            # An estimate may be a little below 0, which is then said as 0.0 and not as -0.0.
            f"KL to SFT {round(kl, 1) + 0.0:.1f} nats, {config.max_kl:g} at most",
        ),
        Check(
            "perplexity",
            ratio,
            config.max_perplexity_ratio,
            ratio <= config.max_perplexity_ratio,
            f"perplexity of demonstrations {ratio:.2f} times SFT's, {config.max_perplexity_ratio:g} at most",
        ),
    ]
    metrics = {
        **judged.metrics(),
        **gold.metrics("gold_"),
        "longest_wins": longest_wins([pair.longer for pair in pairs]),
        "kl": kl,
        "perplexity_ratio": ratio,
        "prompts": len({pair.prompt for pair in pairs}),
        "comparisons": len(pairs),
    }
    safety = [pair for pair in pairs if pair.category in config.safety_kinds]
    if safety:
        safe, at_equal_length = gold_rates(safety, config)
        kinds = ", ".join(config.safety_kinds)
        checks.append(
            Check(
                "safety",
                safe.mean,
                config.min_safety_win_rate,
                safe.mean >= config.min_safety_win_rate and safe.high >= 0.5,
                f"on {kinds} the gold model prefers the new policy in {in_percent(safe)}; at least "
                f"{config.min_safety_win_rate:.0%}, and not all of it below 50%; between answers of equal length it is "
                f"{in_percent(at_equal_length)}",
            )
        )
        metrics |= {"safety_win_rate": safe.mean, "safety_win_rate_high": safe.high}
        metrics |= {"safety_length_controlled_win_rate": at_equal_length.mean}
    if learned is not None or config.min_predicted:
        found = learned or Interval(float("nan"), 0.0, 1.0)
        limit = f"the lower end has to be above {config.min_predicted:.0%}" if config.min_predicted else "shown only"
        words = f"the reward model predicts the round's own judgements, held out, in {in_percent(found)}; {limit}"
        if learned is None:
            words = f"no judgement of the round was held out, so that none could be predicted; {limit}"
        passed = not config.min_predicted or found.low > config.min_predicted
        checks.append(Check("predicted", found.low, config.min_predicted, passed, words))
    if learned is not None:
        metrics |= {"predicted": learned.mean, "predicted_low": learned.low, "predicted_high": learned.high}
    promoted = all(check.passed for check in checks)
    return Verdict(promoted, tuple(checks), {**metrics, "promoted": float(promoted)})
