"""Policies are judged on the same prompts with the same random numbers, and win rates are right by hand."""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlhf_core import evaluate
from rlhf_core.best_of_n import best_of_n_kl
from rlhf_core.evaluate import POLICIES, Evaluation, Response, axis_intervals, compare, evaluate_policies
from rlhf_core.feedback.exchange import find_items
from rlhf_core.models import Normaliser, Roles, load_policy, load_tokenizer
from rlhf_core.records import Demonstration, Prompt
from rlhf_core.rollouts import sample
from rlhf_core.statistics import length_controlled_win_rate
from rlhf_core.tracking import NullTracker
from tasks.evaluate import _answer_rows

PROMPTS = [Prompt((("user", text),)) for text in ("hi", "Why is the sky blue?", "Name a fruit.")]
DEMONSTRATIONS = [Demonstration(record.prompt, "A yellow banana.") for record in PROMPTS]
SUMMARY = {"reward", "gold_reward", "kl", "response_length", "eos_rate", "distinct_2"}
COMPARISON = {
    "gold_win_rate",
    "gold_win_rate_low",
    "gold_win_rate_high",
    "length_controlled_win_rate",
    "length_controlled_win_rate_low",
    "length_controlled_win_rate_high",
    "proxy_win_rate",
    "proxy_win_rate_low",
    "proxy_win_rate_high",
    "proxy_length_controlled_win_rate",
    "proxy_length_controlled_win_rate_low",
    "proxy_length_controlled_win_rate_high",
    "longest_wins",
    "prompts",
    "comparisons",
}


@pytest.fixture(autouse=True)
def few_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval of the length-controlled rate is statistics' business and takes a second a comparison."""

    def quick(*arguments: Any, samples: int, **options: Any) -> Any:
        return partial(length_controlled_win_rate, samples=5)(*arguments, **options)

    monkeypatch.setattr(evaluate, "length_controlled_win_rate", quick)


def response(prompt: int, *, gold: float, reward: float, tokens: int) -> Response:
    return Response(prompt, f"worth {gold} and {reward}", tokens, True, reward, gold, 0.0)


def test_comparing_by_hand_with_ties_and_clusters(section: Callable[..., Any]) -> None:
    left = [
        response(0, gold=1.0, reward=5.0, tokens=3),
        response(1, gold=0.0, reward=5.0, tokens=9),
        response(0, gold=2.0, reward=5.0, tokens=5),
    ]
    right = [
        response(0, gold=1.0, reward=5.0, tokens=4),
        response(0, gold=1.0, reward=9.0, tokens=3),
        response(1, gold=1.0, reward=1.0, tokens=2),
    ]
    # Prompt 0: gold 1 against 1, 1 and 2 against 1, 1: two ties and two wins, 3 of 4. Prompt 1: one loss, 0 of 1.
    # By the proxy: a tie and a loss, twice; then a win. By length: 3 against 4 and 3, 5 against 4 and 3; 9 against 2.
    found = compare(left, right, section("evaluate", bootstrap_samples=2000))
    assert set(found) == COMPARISON
    assert found["gold_win_rate"] == pytest.approx(3 / 5, rel=1e-12)
    assert found["proxy_win_rate"] == pytest.approx((0.5 + 0 + 0.5 + 0 + 1) / 5, rel=1e-12)
    assert found["longest_wins"] == pytest.approx((0 + 0.5 + 1 + 1 + 1) / 5, rel=1e-12)
    longer, clusters = [7, -1, 0, 1, 2], [1, 0, 0, 0, 0]
    for judge, wins in (("", [0, 0.5, 0.5, 1, 1]), ("proxy_", [1, 0.5, 0, 0.5, 0])):
        expected = length_controlled_win_rate(wins, longer, clusters, samples=0).mean
        assert found[f"{judge}length_controlled_win_rate"] == pytest.approx(expected, abs=1e-6)  # the fit's tolerance
    assert found["prompts"] == 2
    assert found["comparisons"] == 5
    # Prompts are drawn, not comparisons: twice prompt 0 is ¾, twice prompt 1 is 0, and both are 3/5.
    assert (found["gold_win_rate_low"], found["gold_win_rate_high"]) == (0.0, 0.75)


def test_the_same_answer_is_a_tie_however_its_scores_were_rounded(section: Callable[..., Any]) -> None:
    one = response(0, gold=1.0, reward=1.0, tokens=3)
    other = one._replace(gold_reward=1.0 + 1e-7, reward=1.0 - 1e-7)
    for found in (compare([one], [other], section("evaluate")), compare([other], [one], section("evaluate"))):
        assert (found["gold_win_rate"], found["proxy_win_rate"]) == (0.5, 0.5)
    cut_off = other._replace(stopped=False)  # the reward model has seen another last token
    assert compare([cut_off], [one], section("evaluate"))["gold_win_rate"] == 1.0


def test_turning_sides_turns_the_rate(section: Callable[..., Any]) -> None:
    left = [response(n, gold=n % 3, reward=n % 4, tokens=n % 5) for n in range(8)]
    right = [response(n, gold=(n + 1) % 3, reward=n % 2, tokens=n % 2) for n in range(8)]
    ours, theirs = compare(left, right, section("evaluate")), compare(right, left, section("evaluate"))
    for name in ("gold_win_rate", "proxy_win_rate", "longest_wins"):
        assert ours[name] + theirs[name] == pytest.approx(1, rel=1e-12)
    # the fit's tolerance
    assert ours["length_controlled_win_rate"] + theirs["length_controlled_win_rate"] == pytest.approx(1, abs=1e-6)


def test_an_answer_is_kept_with_the_whole_conversation() -> None:
    short = (("user", "Go on."),)
    long = (("user", "Cats."), ("assistant", "Yes?"), ("user", "Go on."))
    given = [response(place, gold=place, reward=0.0, tokens=1) for place in (0, 1)]
    evaluation = Evaluation({}, {"ppo": given, "sft": given}, {"ppo": [], "sft": []})
    rows = _answer_rows(evaluation, [Prompt(short), Prompt(long)])
    assert [row["prompt"] for row in rows[:2]] == ["Go on.", [{"role": role, "content": text} for role, text in long]]
    items = find_items("answers", list(enumerate(rows)), kind=None, policies=("ppo", "sft"), how="sampled")
    assert [tuple(item.prompt) for item in items] == [short, long]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, section: Callable[..., Any]
) -> Callable[..., dict[str, Path]]:
    """An SFT model, a policy that is no more than that or one that moved, and two reward models."""

    def build(*, move: bool) -> dict[str, Path]:
        work = tmp_path_factory.mktemp("evaluate")
        generator = torch.Generator().manual_seed(0)

        def save(role: str, start: Path, *, head: bool, by: float) -> Path:
            roles = Roles(start, section("sft"))
            roles.add(role, head=head)
            with torch.no_grad():
                for parameter in roles.trainable(role):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
            if head:
                roles.normalisers[role] = Normaliser(0.5, 2.0)
            roles.save(role, work / role)
            return work / role

        found = {"sft": save("policy", llama, head=False, by=0.1)}
        found["ppo"] = save("ppo", found["sft"], head=False, by=0.1 if move else 0.0)
        found["dpo"] = save("dpo", found["sft"], head=False, by=0.2)
        found |= {role: save(role, found["sft"], head=True, by=0.1) for role in ("reward", "gold")}
        return found

    return build


def run(
    llama: Path, folders: dict[str, Path], config: Any, tokenizer: PreTrainedTokenizerFast, *, dpo: bool = False
) -> Evaluation:
    tuned = Roles(folders["sft"])
    policies = (*POLICIES, "dpo") if dpo else POLICIES
    for policy in policies[2:]:
        tuned.add(policy, start=folders[policy])
    for role in ("reward", "gold"):
        tuned.add(role, head=True, start=folders[role])
    options = {"tokenizer": tokenizer, "system": "", "tracker": NullTracker(), "policies": policies}
    return evaluate_policies(Roles(llama), tuned, PROMPTS, DEMONSTRATIONS, config, **options)


@pytest.fixture(scope="module")
def moved(llama: Path, folders: Callable[..., dict[str, Path]], section: Any, tokenizer: Any) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(length_controlled_win_rate)
        patch.setattr(evaluate, "length_controlled_win_rate", lambda *a, **k: quick(*a, **{**k, "samples": 5}))
        return run(llama, folders(move=True), section("evaluate"), tokenizer)


def test_the_metrics_have_their_fixed_keys(moved: Evaluation) -> None:
    assert set(moved.metrics) == {*POLICIES, "ppo_vs_sft", "sft_vs_base"}
    for policy in POLICIES:
        assert set(moved.metrics[policy]) == {*SUMMARY, "perplexity", "greedy"}
        assert set(moved.metrics[policy]["greedy"]) == SUMMARY
    for name in ("ppo_vs_sft", "sft_vs_base"):
        assert set(moved.metrics[name]) == {*COMPARISON, "greedy"}
        assert set(moved.metrics[name]["greedy"]) == COMPARISON
        assert moved.metrics[name]["comparisons"] == 3 * 2 * 2  # every response against every other of its prompt
        assert moved.metrics[name]["greedy"]["comparisons"] == 3


def test_every_policy_answers_every_prompt(moved: Evaluation) -> None:
    for policy in POLICIES:
        assert [one.prompt for one in moved.sampled[policy]] == [0, 1, 2, 0, 1, 2]
        assert [one.prompt for one in moved.greedy[policy]] == [0, 1, 2]
        assert all(1 <= one.tokens <= 6 for one in moved.sampled[policy])
        assert all(one.stopped or one.tokens == 6 for one in moved.sampled[policy])


def test_many_prompts_are_answered_in_pieces(
    llama: Path, folders: Callable[..., Any], section: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = []

    def watched(model: Any, prompts: list[list[int]], **options: Any) -> Any:
        widths.append(len(prompts))
        return sample(model, prompts, **options)

    monkeypatch.setattr(evaluate, "sample", watched)
    monkeypatch.setattr(evaluate, "SAMPLED_ROWS", 7)
    found = run(llama, folders(move=True), section("evaluate"), tokenizer)
    assert widths == [6, 3] * 3  # two prompts greedily and by two samples, then the third
    assert [one.prompt for one in found.sampled["ppo"]] == [0, 1, 2, 0, 1, 2]


def test_states_kept_while_sampling_change_no_number(
    llama: Path, folders: Callable[..., Any], section: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, trunk, saved = [], Roles.trunk, folders(move=True)

    def watched(self: Roles, packed: Any, cache: Any = None, *, states: Any = None, folded: bool = False) -> Any:
        given.append(states is not None)
        return trunk(self, packed, cache)  # and each row of its own

    ours = run(llama, saved, section("evaluate"), tokenizer)
    monkeypatch.setattr(Roles, "trunk", watched)
    plain = run(llama, saved, section("evaluate"), tokenizer)
    assert sum(given) == 3  # each policy's answers, measured in one piece
    for policy in POLICIES:
        for left, right in zip(ours.sampled[policy], plain.sampled[policy], strict=True):
            assert left.text == right.text
            numbers = [(one.reward, one.gold_reward, one.kl) for one in (left, right)]
            # float32: a KL is a sum over tokens of differences of log-probs many times its size
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=5e-5)


def test_a_base_with_other_lower_layers_keeps_no_states_for_the_tuned_model(
    llama: Path, folders: Callable[..., Any], section: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model = load_policy(llama)
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight.add_(0.01)
    model.save_pretrained(tmp_path)
    load_tokenizer(llama).save_pretrained(tmp_path)
    assert Roles(llama).begins_as(Roles(llama))
    assert not Roles(llama).begins_as(Roles(tmp_path))
    given, trunk = [], Roles.trunk

    def watched(self: Roles, packed: Any, cache: Any = None, **options: Any) -> Any:
        given.append(options.get("states") is not None)
        return trunk(self, packed, cache, **options)

    monkeypatch.setattr(Roles, "trunk", watched)
    run(tmp_path, folders(move=True), section("evaluate"), tokenizer)
    assert sum(given) == 2  # sft's and ppo's answers


def test_a_summary_is_the_mean_of_its_responses(moved: Evaluation) -> None:
    for policy in POLICIES:
        rows, found = moved.sampled[policy], moved.metrics[policy]
        for name, values in {
            "reward": [one.reward for one in rows],
            "gold_reward": [one.gold_reward for one in rows],
            "kl": [one.kl for one in rows],
            "response_length": [one.tokens for one in rows],
            "eos_rate": [one.stopped for one in rows],
        }.items():
            assert found[name] == pytest.approx(sum(values) / 6, rel=1e-9)


def test_kl_is_measured_to_the_sft_policy(moved: Evaluation) -> None:
    assert all(one.kl == 0 for one in moved.sampled["sft"])
    assert any(abs(one.kl) > 0.01 for one in moved.sampled["ppo"])
    assert any(abs(one.kl) > 0.01 for one in moved.sampled["base"])


def test_proxy_and_gold_are_two_judges(moved: Evaluation) -> None:
    assert all(one.reward != one.gold_reward for one in moved.sampled["ppo"])


def test_equal_policies_answer_alike_and_win_half(
    llama: Path,
    folders: Callable[..., dict[str, Path]],
    section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = run(llama, folders(move=False), section("evaluate"), tokenizer)
    for ours, theirs in ((found.sampled["ppo"], found.sampled["sft"]), (found.greedy["ppo"], found.greedy["sft"])):
        assert [one.text for one in ours] == [one.text for one in theirs]  # the same random numbers
        assert [one.kl for one in ours] == pytest.approx([0.0] * len(ours), abs=1e-5)  # float32
    for part in (found.metrics["ppo_vs_sft"], found.metrics["ppo_vs_sft"]["greedy"]):
        for name in ("gold_win_rate", "proxy_win_rate", "longest_wins"):
            assert part[name] == 0.5
        assert part["length_controlled_win_rate"] == pytest.approx(0.5, abs=1e-6)  # the fit's tolerance
    assert found.metrics["ppo"]["perplexity"] == pytest.approx(found.metrics["sft"]["perplexity"], rel=1e-5)  # float32
    assert found.metrics["base"]["perplexity"] != pytest.approx(found.metrics["sft"]["perplexity"], rel=1e-3)


def test_the_normaliser_is_applied_to_what_is_reported(
    llama: Path,
    folders: Callable[..., dict[str, Path]],
    section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    places, config = folders(move=True), section("evaluate", samples_per_prompt=1)
    before = run(llama, places, config, tokenizer)
    (places["gold"] / "score.json").write_text('{"mean": 0.0, "std": 1.0, "temperature": 1.0}')
    after = run(llama, places, config, tokenizer)
    for ours, theirs in zip(before.sampled["ppo"], after.sampled["ppo"], strict=True):
        assert ours.gold_reward == pytest.approx((theirs.gold_reward - 0.5) / 2.0, rel=1e-5, abs=1e-6)  # float32
        assert ours.reward == theirs.reward


def test_a_greedy_answer_does_not_hang_on_the_seed(
    llama: Path,
    folders: Callable[..., dict[str, Path]],
    section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    places = folders(move=True)
    first, other = (run(llama, places, section("evaluate", seed=seed), tokenizer) for seed in (0, 1))
    for policy in POLICIES:
        assert [one.text for one in first.greedy[policy]] == [one.text for one in other.greedy[policy]]
        assert [one.text for one in first.sampled[policy]] != [one.text for one in other.sampled[policy]]


@pytest.fixture(scope="module")
def beside(llama: Path, folders: Callable[..., dict[str, Path]], section: Any, tokenizer: Any) -> Evaluation:
    """With both baselines."""
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(length_controlled_win_rate)
        patch.setattr(evaluate, "length_controlled_win_rate", lambda *a, **k: quick(*a, **{**k, "samples": 5}))
        return run(llama, folders(move=True), section("evaluate", best_of_n=(2, 5)), tokenizer, dpo=True)


def test_a_dpo_policy_is_judged_as_the_others_are(beside: Evaluation) -> None:
    assert beside.policies == (*POLICIES, "dpo")
    assert set(beside.metrics) == {
        *beside.policies,
        "ppo_vs_sft",
        "sft_vs_base",
        "dpo_vs_sft",
        "ppo_vs_dpo",
        "best_of_n",
    }
    assert set(beside.metrics["dpo"]) == {*SUMMARY, "perplexity", "greedy"}
    assert set(beside.metrics["ppo_vs_dpo"]) == {*COMPARISON, "greedy"}
    assert any(abs(one.kl) > 0.01 for one in beside.sampled["dpo"])
    ppo, dpo = ([one.kl for one in beside.sampled[policy]] for policy in ("ppo", "dpo"))
    assert ppo != dpo
    assert beside.metrics["dpo"]["perplexity"] != beside.metrics["ppo"]["perplexity"]
    wins = beside.metrics["dpo_vs_sft"]["proxy_win_rate"]
    left, right = beside.sampled["dpo"], beside.sampled["sft"]
    pairs = [(a.reward, b.reward) for a in left for b in right if a.prompt == b.prompt]
    assert wins == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs), rel=1e-12)


def test_the_kl_of_dpo_is_its_own(llama: Path, folders: Callable[..., Any], section: Any, tokenizer: Any) -> None:
    found = run(llama, folders(move=False), section("evaluate"), tokenizer, dpo=True)  # PPO is SFT, DPO is not
    assert [one.kl for one in found.sampled["ppo"]] == pytest.approx([0.0] * 6, abs=1e-5)  # float32
    assert sum(one.kl for one in found.sampled["dpo"]) > 0.1


@pytest.mark.parametrize("at_once", [192, 6])
def test_baselines_change_no_number_of_the_others(
    llama: Path,
    folders: Callable[..., Any],
    section: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
) -> None:
    monkeypatch.setattr(evaluate, "SAMPLED_ROWS", at_once)  # where 6, the third prompt is answered after the others
    places = folders(move=True)
    moved = run(llama, places, section("evaluate"), tokenizer)
    beside = run(llama, places, section("evaluate", best_of_n=(4,)), tokenizer, dpo=True)
    for policy in POLICIES:
        ours, theirs = beside.sampled[policy], moved.sampled[policy]
        assert [one.text for one in ours] == [one.text for one in theirs]
        assert [one.reward for one in ours] == pytest.approx([one.reward for one in theirs], rel=1e-5)  # float32
    for name in ("ppo_vs_sft", "sft_vs_base"):
        assert beside.metrics[name].pop("greedy") == pytest.approx(moved.metrics[name].pop("greedy"), rel=1e-5)
        assert beside.metrics[name] == pytest.approx(moved.metrics[name], rel=1e-5)


def test_the_best_of_n_is_picked_by_the_reward_model_among_all_that_sft_said(
    llama: Path, folders: Callable[..., Any], section: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, every = folders(move=True), []
    pick = evaluate._best_of_n

    def watched(said: Any, sizes: Any) -> Any:
        every.extend(said)
        return pick(said, sizes)

    monkeypatch.setattr(evaluate, "_best_of_n", watched)
    found = run(llama, places, section("evaluate", best_of_n=(2, 5)), tokenizer)
    assert set(found.metrics["best_of_n"]) == {"2", "5"}
    assert len(found.sampled["sft"]) == 6
    assert every[:6] == found.sampled["sft"]
    assert [one.prompt for one in every[6:]] == [0, 1, 2] * 3  # and three more of each prompt, up to five
    assert all(len({one.text for one in every if one.prompt == n}) > 2 for n in range(3))  # not the samples again
    best = [max((one for one in every if one.prompt == n), key=lambda one: one.reward) for n in range(3)]
    assert found.metrics["best_of_n"]["5"] == pytest.approx(
        {
            "reward": sum(one.reward for one in best) / 3,
            "gold_reward": sum(one.gold_reward for one in best) / 3,
            "kl": best_of_n_kl(5),
        },
        rel=1e-6,
    )
    two = []
    for n in range(3):
        said = [one for one in every if one.prompt == n]
        two += [max(pair, key=lambda one: one.reward).gold_reward for pair in combinations(said, 2)]
    assert found.metrics["best_of_n"]["2"]["gold_reward"] == pytest.approx(sum(two) / len(two), rel=1e-6)


def test_where_enough_was_sampled_the_best_of_n_costs_nothing(
    llama: Path, folders: Callable[..., Any], section: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return sample(*arguments, **options)

    monkeypatch.setattr(evaluate, "sample", watched)
    places, count = folders(move=True), {}
    for sizes in ((), (2,), (2, 4)):
        calls.clear()
        found = run(llama, places, section("evaluate", best_of_n=sizes), tokenizer)
        count[sizes] = len(calls)
    assert count == {(): 3, (2,): 3, (2, 4): 4}
    assert set(found.metrics["best_of_n"]) == {"2", "4"}


def test_axes_and_costs_by_hand_with_their_intervals(section: Callable[..., Any]) -> None:
    def one(prompt: int, kind: float, gold: float) -> Response:
        axes = {"kind": kind, "true": 0.25}
        return response(prompt, gold=0, reward=0, tokens=1)._replace(
            reward_axes=axes, gold_axes={"kind": gold, "true": 1.0}
        )

    responses = [one(0, 1.0, 2.0), one(1, 3.0, -1.0), one(0, 2.0, 0.5)]  # two of prompt 0
    found = axis_intervals(responses, section("evaluate"), cost_axis="kind")
    assert found["cost"] == pytest.approx(-2.0, rel=1e-12)
    assert found["gold_cost"] == pytest.approx(-0.5, rel=1e-12)
    # Resamples of two prompts: prompt 0 twice gives 1.5, prompt 1 twice 3, and both of these come up often.
    assert (found["reward_axes_low"]["kind"], found["reward_axes_high"]["kind"]) == (1.5, 3.0)
    assert (found["cost_low"], found["cost_high"]) == (-3.0, -1.5)
    assert found["reward_axes_low"]["true"] == found["reward_axes_high"]["true"] == 0.25
    assert set(axis_intervals(responses, section("evaluate"))) == {
        f"{judge}_axes_{end}" for judge in ("reward", "gold") for end in ("low", "high")
    }
    assert axis_intervals([response(0, gold=0, reward=0, tokens=1)], section("evaluate"), cost_axis="kind") == {}


def test_a_win_on_an_axis_is_by_the_gold_models_head_of_it(section: Callable[..., Any]) -> None:
    def one(prompt: int, kind: float) -> Response:
        return response(prompt, gold=0, reward=kind, tokens=1)._replace(gold_axes={"kind": kind})

    found = compare([one(0, 1.0), one(1, 0.0)], [one(0, 0.0), one(1, 0.0)], section("evaluate"))
    # Won and tied: (1 + ½) / 2; a resample of prompts is between ½ and 1.
    kind = found["gold_axes"]["kind"]
    assert [kind[f"win_rate{end}"] for end in ("", "_low", "_high")] == [0.75, 0.5, 1.0]
    # All of one length: the plain rate, but for the ridge.
    assert kind["length_controlled_win_rate"] == pytest.approx(0.75, abs=0.01)
    assert kind["length_controlled_win_rate_low"] <= 0.75 <= kind["length_controlled_win_rate_high"]
    assert len(kind) == 6
    assert found["gold_win_rate"] == 0.5
