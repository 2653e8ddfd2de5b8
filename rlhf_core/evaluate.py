"""Judge policies on held-out prompts: reward, gold reward, KL, perplexity, lengths and win rates.

The base, SFT and PPO policies, DPO's where there is one, and the best of n of SFT's responses where that is asked for.

The gold reward model was trained on a split of prompts that PPO's reward model never saw. It scores a response by
itself, so there is no order of presentation that could sway it. Statistics come from statistics.py; the report and
files from elsewhere.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core import processes
from rlhf_core.best_of_n import best_of_n
from rlhf_core.config import Evaluate
from rlhf_core.data import encode_prompt
from rlhf_core.ensemble import SEED_STEP, member_scores
from rlhf_core.folding import batches
from rlhf_core.models import REFERENCE, Roles, TrunkCache, pack
from rlhf_core.records import Demonstration, Prompt, Sampled
from rlhf_core.rollouts import sample
from rlhf_core.sft import encode_demonstrations, perplexity
from rlhf_core.statistics import (
    answers_outcome,
    cluster_bootstrap,
    distinct_n,
    length_controlled_win_rate,
    longest_wins,
    win_rate,
)
from rlhf_core.tracking import Tracker

POLICIES = ("base", "sft", "ppo")  # of every run; "dpo" may come on top
COMPARISONS = (("ppo", "sft"), ("sft", "base"), ("dpo", "sft"), ("ppo", "dpo"))
JUDGES = ("reward", "gold")
SAMPLED_ROWS = 192  # responses sampled at once: each holds its keys and values of all layers
MEASURED_ROWS = 16  # rows in one forward pass when responses are measured
LENGTH_SAMPLES = 500  # refits for the interval of a length-controlled rate


class Response(NamedTuple):
    """One sampled response and what was measured of it."""

    prompt: int  # which held-out prompt
    text: str
    tokens: int
    stopped: bool
    reward: float  # the trained reward model's normalised score
    gold_reward: float
    kl: float  # log-ratio to the SFT policy, nats a response
    reward_axes: Mapping[str, float] = MappingProxyType({})  # the same scores on each axis that the models have
    gold_axes: Mapping[str, float] = MappingProxyType({})


class Evaluation(NamedTuple):
    """All that the report and metrics/evaluate.json are made from."""

    metrics: dict[str, Any]
    sampled: dict[str, list[Response]]  # policy -> responses, samples_per_prompt a prompt
    greedy: dict[str, list[Response]]  # policy -> one response a prompt

    @property
    def policies(self) -> tuple[str, ...]:
        """Who was judged."""
        return tuple(self.sampled)


def evaluate_policies(
    base: Roles,
    tuned: Roles,
    prompts: Sequence[Prompt],
    demonstrations: Sequence[Demonstration],
    config: Evaluate,
    *,
    tokenizer: PreTrainedTokenizerBase,
    system: str,
    tracker: Tracker,
    policies: Sequence[str] = POLICIES,
    cost_axis: str = "",
) -> Evaluation:
    """Sample every policy on every prompt, score, and compare.

    Args:
        base: the base model, with no role added.
        tuned: the SFT model, with roles "reward" and "gold", and one for each policy beyond base and sft.
        prompts, demonstrations: the test split.
        policies: who is judged.
        cost_axis: the axis of the models whose score is a cost with the opposite sign; empty for none.
    """
    encoded = [encode_prompt(tokenizer, record.prompt, system) for record in prompts]
    examples = encode_demonstrations(
        demonstrations, tokenizer, system=system, max_response_tokens=config.response_tokens
    )
    more = max(max(config.best_of_n, default=0) - config.samples_per_prompt, 0)  # of SFT, for its best of n
    rounds = {policy: [config.samples_per_prompt + 1] for policy in policies}  # how often a policy answers each prompt
    if more:
        rounds["sft"].append(more)
    total = 2 * sum(len(_parts(encoded, turns)) for of_one in rounds.values() for turns in of_one)
    done, demonstrated = 0, TrunkCache()  # the latter of demonstrations, for all but the base
    both_begin_alike = tuned.begins_as(base)

    def advance(note: str, answers: Sampled) -> None:
        nonlocal done
        done += 1
        tracker.progress(done, total, unit="passes", tokens=int(answers.mask_BT.sum()), note=note)

    sampled: dict[str, list[Response]] = {}
    greedy: dict[str, list[Response]] = {}
    pool: list[Response] = []  # what SFT said beyond its samples
    metrics: dict[str, Any] = {}
    for policy in policies:
        roles, role = (base if policy == "base" else tuned), (REFERENCE if policy in ("base", "sft") else policy)
        said: list[list[Response]] = []  # of each turn one response a prompt, the first of them greedy
        for number, turns in enumerate(rounds[policy]):
            # Every policy draws the same random numbers, so that differences are the policies' own. What SFT says
            # beyond its samples draws others, or its samples of a later part would not be those of the rest.
            generator = torch.Generator().manual_seed(config.seed + number * SEED_STEP)
            of_round: list[list[Response]] = [[] for _ in range(turns)]
            for first, part in _parts(encoded, turns):
                answers = sample(
                    roles.language_model(role),
                    part * turns,
                    max_tokens=config.response_tokens,
                    temperature=config.temperature,
                    stop_id=tokenizer.eos_token_id,
                    pad_id=tokenizer.pad_token_id,
                    generator=generator,
                    greedy=[number == turn == 0 for turn in range(turns) for _ in part],
                    keep_depth=tuned.depth if roles is tuned or both_begin_alike else 0,
                    logprobs=policy != "sft",
                )
                advance(f"{policy} answered", answers)
                measured = _measure(
                    tuned, policy, answers, config.temperature, tokenizer, first=first, prompts=len(part)
                )
                for turn, so_far in enumerate(of_round):
                    so_far += measured[turn * len(part) : (turn + 1) * len(part)]
                advance(f"{policy} measured", answers)
            said += of_round
        greedy[policy] = said[0]
        sampled[policy] = [one for turn in said[1 : config.samples_per_prompt + 1] for one in turn]
        pool += [one for turn in said[config.samples_per_prompt + 1 :] for one in turn]
        metrics[policy] = {
            **_summary(sampled[policy]),
            **axis_intervals(sampled[policy], config, cost_axis=cost_axis),
            "perplexity": perplexity(
                roles, role, examples, tokenizer.pad_token_id, cache=demonstrated if roles is tuned else None
            ),
            "greedy": _summary(greedy[policy]),
        }
    for left, right in COMPARISONS:
        if left not in policies or right not in policies:
            continue
        metrics[f"{left}_vs_{right}"] = {
            **compare(sampled[left], sampled[right], config),
            "greedy": compare(greedy[left], greedy[right], config),
        }
    if config.best_of_n:
        metrics["best_of_n"] = _best_of_n([*sampled["sft"], *pool], config.best_of_n)
    return Evaluation(metrics, sampled, greedy)


def _best_of_n(responses: Sequence[Response], sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    """The reward model picks, and the gold one says what that was worth."""
    proxy = [response.reward for response in responses]
    gold = [response.gold_reward for response in responses]
    return best_of_n([one.prompt for one in responses], proxy, {"reward": proxy, "gold_reward": gold}, sizes)


def compare(left: Sequence[Response], right: Sequence[Response], config: Evaluate) -> dict[str, Any]:
    """Win rate of `left` over `right`: every response of the one against every response of the other to its prompt.

    The 95 % intervals come from a bootstrap over prompts: a prompt's comparisons are one cluster.
    """
    pairs = [
        (ours, theirs)
        for prompt in sorted({response.prompt for response in left})
        for ours, theirs in product(
            (response for response in left if response.prompt == prompt),
            (response for response in right if response.prompt == prompt),
        )
    ]
    clusters = [ours.prompt for ours, _ in pairs]
    gold = np.array([answers_outcome(ours, theirs, lambda one: one.gold_reward) for ours, theirs in pairs])
    proxy = np.array([answers_outcome(ours, theirs, lambda one: one.reward) for ours, theirs in pairs])
    longer = np.array([float(ours.tokens - theirs.tokens) for ours, theirs in pairs])
    options = {"samples": config.bootstrap_samples, "seed": config.seed}
    rate, by_proxy = win_rate(gold, clusters, **options), win_rate(proxy, clusters, **options)
    controlled, by_proxy_controlled = (
        length_controlled_win_rate(wins, longer, clusters, samples=LENGTH_SAMPLES, seed=config.seed)
        for wins in (gold, proxy)
    )
    return {
        "gold_win_rate": rate.mean,
        "gold_win_rate_low": rate.low,
        "gold_win_rate_high": rate.high,
        "length_controlled_win_rate": controlled.mean,
        "length_controlled_win_rate_low": controlled.low,
        "length_controlled_win_rate_high": controlled.high,
        "proxy_win_rate": by_proxy.mean,
        "proxy_win_rate_low": by_proxy.low,
        "proxy_win_rate_high": by_proxy.high,
        "proxy_length_controlled_win_rate": by_proxy_controlled.mean,
        "proxy_length_controlled_win_rate_low": by_proxy_controlled.low,
        "proxy_length_controlled_win_rate_high": by_proxy_controlled.high,
        "longest_wins": longest_wins(longer),
        "prompts": len(set(clusters)),
        "comparisons": len(pairs),
        **_wins_by_axis(pairs, clusters, longer, **options),
    }


def _wins_by_axis(
    pairs: Sequence[tuple[Response, Response]], clusters: Sequence[int], longer: np.ndarray, **options: int
) -> dict[str, Any]:
    """Win rates by the gold model's head of each axis, under "gold_axes"; nothing where it has none."""
    found = {}
    for axis in pairs[0][0].gold_axes:
        wins = [answers_outcome(ours, theirs, lambda one: one.gold_axes[axis]) for ours, theirs in pairs]  # noqa: B023
        rate = win_rate(wins, clusters, **options)
        equal = length_controlled_win_rate(wins, longer, clusters, samples=LENGTH_SAMPLES, seed=options["seed"])
        found[axis] = {
            "win_rate": rate.mean,
            "win_rate_low": rate.low,
            "win_rate_high": rate.high,
            "length_controlled_win_rate": equal.mean,
            "length_controlled_win_rate_low": equal.low,
            "length_controlled_win_rate_high": equal.high,
        }
    return {"gold_axes": found} if found else {}


def axis_intervals(responses: Sequence[Response], config: Evaluate, *, cost_axis: str = "") -> dict[str, Any]:
    """Ends of the 95 % interval of each axis's mean score, by a bootstrap over prompts, and the mean cost with its own.

    A cost is the normalised score with the opposite sign, by the reward model and by the gold one.
    """
    found: dict[str, Any] = {}
    for judge, cost in (("reward_axes", "cost"), ("gold_axes", "gold_cost")):
        for axis in getattr(responses[0], judge):
            by_prompt: dict[int, list[float]] = {}
            for each in responses:
                by_prompt.setdefault(each.prompt, []).append(getattr(each, judge)[axis])
            mean, low, high = cluster_bootstrap(
                list(by_prompt.values()), samples=config.bootstrap_samples, seed=config.seed
            )
            found.setdefault(f"{judge}_low", {})[axis] = low
            found.setdefault(f"{judge}_high", {})[axis] = high
            if axis == cost_axis:
                found |= {cost: -mean, f"{cost}_low": -high, f"{cost}_high": -low}
    return found


def _parts(prompts: Sequence[list[int]], turns: int) -> list[tuple[int, list[list[int]]]]:
    """Prompts in such numbers that their answers of all turns are sampled at once, and the number of the first."""
    at_once = max(SAMPLED_ROWS // turns, 1)
    return [(first, list(prompts[first : first + at_once])) for first in range(0, len(prompts), at_once)]


@torch.no_grad()
def _measure(
    tuned: Roles,
    policy: str,
    answers: Sampled,
    temperature: float,
    tokenizer: PreTrainedTokenizerBase,
    *,
    first: int,
    prompts: int,
) -> list[Response]:
    """What a policy answered, in the same order: to some prompts, then to the same prompts again.

    Args:
        first: the number of the first prompt.
        prompts: how many they are.
    """
    responses, count = answers.responses(), len(answers.prompts)
    own = processes.own(range(count))  # the rows that this process sampled, and whose hidden states it may have kept
    kept = dict(zip(own, answers.states, strict=True)) if answers.states is not None else {}
    # A prompt's answers side by side, so that the prompt is computed once for all of them.
    places = sorted(own, key=lambda row: (row % prompts, row))
    kl_B = torch.zeros(count)
    scored = {judge: torch.zeros(count, 1 + len(tuned.axes[judge])) for judge in JUDGES}
    for numbers in batches([[*answers.prompts[row], *responses[row]] for row in places], MEASURED_ROWS):
        rows = [places[number] for number in numbers]
        packed = pack([answers.prompts[row] for row in rows], [responses[row] for row in rows], 0)
        states = [kept[row] for row in rows] if kept else None
        trunk = tuned.trunk(packed, states=states, folded=True)  # once, for the reference and both judges
        if policy != "sft":
            ref_BT, _ = tuned.logprobs(trunk, REFERENCE, packed.ids_BT, packed.mask_BT, temperature=temperature)
            kl_B[rows] = -ref_BT.sum(1).cpu()  # 0 beyond the response, as is what the policy says of its own tokens
        for judge, scores in scored.items():
            scores[rows] = member_scores(tuned, trunk, judge).mean(1).cpu()
    kl_B = processes.place(kl_B[own], own, count)
    if answers.logprobs_BT is not None:
        kl_B = kl_B + answers.logprobs_BT.sum(1)
    by_judge = {judge: processes.place(of[own], own, count).tolist() for judge, of in scored.items()}
    return [
        Response(
            prompt=first + row % prompts,
            text=str(tokenizer.decode(response, skip_special_tokens=True)).strip(),
            tokens=len(response),
            stopped=bool(answers.stopped_B[row]),
            reward=by_judge["reward"][row][0],
            gold_reward=by_judge["gold"][row][0],
            kl=float(kl_B[row]),
            reward_axes=dict(zip(tuned.axes["reward"], by_judge["reward"][row][1:], strict=True)),
            gold_axes=dict(zip(tuned.axes["gold"], by_judge["gold"][row][1:], strict=True)),
        )
        for row, response in enumerate(responses)
    ]


def _summary(responses: Sequence[Response]) -> dict[str, Any]:
    numbers: dict[str, Sequence[float]] = {
        "reward": [response.reward for response in responses],
        "gold_reward": [response.gold_reward for response in responses],
        "kl": [response.kl for response in responses],
        "response_length": [response.tokens for response in responses],
        "eos_rate": [response.stopped for response in responses],
    }
    found: dict[str, Any] = {name: float(np.mean(values)) for name, values in numbers.items()}
    found["distinct_2"] = distinct_n([response.text for response in responses], 2)
    for judge in ("reward_axes", "gold_axes"):
        if axes := getattr(responses[0], judge):
            found[judge] = {axis: float(np.mean([getattr(each, judge)[axis] for each in responses])) for axis in axes}
    return found
