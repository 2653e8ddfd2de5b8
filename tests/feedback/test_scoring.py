"""A judge in the reward model's place: what its word is worth, and that a run which goes on pays for nothing twice."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from service import Service
from transformers import PreTrainedTokenizerFast

from rlhf_core import checkpoints as module
from rlhf_core.checkpoints import Checkpoints
from rlhf_core.config import check_params
from rlhf_core.data import encode_prompt
from rlhf_core.errors import ConfigError, JudgeStopped
from rlhf_core.feedback.annotators import Item, Judgement, ranks_of, rule
from rlhf_core.feedback.endpoint import EndpointComparer
from rlhf_core.feedback.pairs import Look, Opinion, PairwiseJudge
from rlhf_core.feedback.scoring import JudgeScore, advantages
from rlhf_core.models import REFERENCE, Roles
from rlhf_core.ppo import POLICY, REWARD, add_roles, train_ppo
from rlhf_core.rollouts import sample
from rlhf_core.tracking import MemoryTracker

PROMPT = (("user", "Name a fruit."),)
PROMPTS = [(("user", text),) for text in ("Why is the sky blue?", "Name a fruit.", "How many legs has a spider?")]


class Says:
    """A comparer that is told what to say of each look."""

    name = "says"

    def __init__(self, opinions: dict[tuple[str, str], float | None]) -> None:
        self.opinions = opinions

    def compare(self, looks: Sequence[Look]) -> list[Opinion | None]:
        said = [self.opinions[look.first, look.second] for look in looks]
        return [None if first is None else Opinion(first) for first in said]

    def costs(self) -> dict[str, float]:
        return {}


def test_a_comparison_is_worth_its_probability_over_both_orders() -> None:
    # Leans to what stands first: 0.9 there and 0.7 there, so the first response has (0.9 + 0.3) / 2 = 0.6.
    judge = PairwiseJudge(Says({("a", "b"): 0.9, ("b", "a"): 0.7, ("c", "d"): 0.8, ("d", "c"): None}))
    items = [Item(PROMPT, pair) for pair in (("a", "b"), ("b", "a"), ("e", "e"), ("c", "d"))]
    assert advantages(judge, items) == pytest.approx([0.2, -0.2, 0.0, 0.0])


@pytest.mark.parametrize(("forward", "backward"), [(None, None), (0.9, None), (None, 0.1)])
def test_a_pair_that_lacks_an_answer_is_worth_nothing(forward: float | None, backward: float | None) -> None:
    judge = PairwiseJudge(Says({("a", "b"): forward, ("b", "a"): backward}))
    assert advantages(judge, [Item(PROMPT, ("a", "b"))]) == [0.0]


def test_a_rule_says_which_is_better_and_no_more() -> None:
    items = [Item(PROMPT, pair) for pair in (("aa", "a"), ("a", "aa"), ("a", "b"))]
    assert advantages(rule("longest"), items) == [1.0, -1.0, 0.0]


def test_a_reward_model_says_by_how_much() -> None:
    class Scores:
        name, source = "scores", "ai"

        def judge(self, items: Sequence[Item]) -> list[Judgement]:
            own = [[float(len(response)) for response in item.responses] for item in items]
            return [Judgement(ranks_of(scores), {"reward": scores}) for scores in own]

    assert advantages(Scores(), [Item(PROMPT, ("abcd", "a")), Item(PROMPT, ("", "a"))]) == [3.0, -1.0]


def ready(llama: Path, section: Callable[..., Any], folder: Path) -> Roles:
    reward = Roles(llama, section("reward"))
    torch.manual_seed(3)
    reward.add(REWARD, method="lora", head=True)
    reward.save(REWARD, folder / "reward")
    roles = Roles(llama, section("ppo"))
    torch.manual_seed(4)
    add_roles(roles, str(folder / "reward"), method="lora")
    return roles


def scored(roles: Roles, tokenizer: PreTrainedTokenizerFast, judge: Any, tokens: int = 6) -> tuple[JudgeScore, Any]:
    ids = [encode_prompt(tokenizer, prompt, "") for prompt in PROMPTS]
    by_ids = {tuple(row): prompt for row, prompt in zip(ids, PROMPTS, strict=True)}
    return JudgeScore(judge, roles, by_ids, tokenizer=tokenizer, max_tokens=tokens), ids


def test_each_response_stands_beside_the_sft_policys_own_answer(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    roles, seen = ready(llama, section, tmp_path), []

    class Watches:
        name, source = "watches", "rule"

        def judge(self, items: Sequence[Item]) -> list[Judgement]:
            seen.extend(items)
            return rule("longest").judge(items)

    score, ids = scored(roles, tokenizer, Watches())
    with torch.no_grad():
        for parameter in roles.trainable(POLICY):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    options = {"max_tokens": 6, "temperature": 1.0, "stop_id": tokenizer.eos_token_id, "pad_id": 0}
    sampled = sample(
        roles.language_model(POLICY), [*ids, ids[0]], generator=torch.Generator().manual_seed(1), **options
    )
    scores_B = score(sampled)
    greedy = sample(roles.language_model(REFERENCE), ids, generator=torch.Generator(), greedy=True, **options)
    own = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in greedy.responses()]
    said = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in sampled.responses()]
    assert [item.responses for item in seen] == list(zip(said, [*own, own[0]], strict=True))
    assert [item.prompt for item in seen] == [*PROMPTS, PROMPTS[0]]
    assert scores_B.tolist() == advantages(rule("longest"), seen)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.delenv("RLHF_JUDGE_KEY", raising=False)
    monkeypatch.setattr(module, "LARGEST_SHARE", 1.0)  # a checkpoint after every update
    running = Service()
    yield running
    running.close()


def test_a_run_that_goes_on_asks_the_judge_only_what_is_missing(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, service: Service
) -> None:
    config = section("ppo", updates=3, rollouts=4, minibatch_size=4, response_tokens=6)

    def run(name: str, cost: float) -> tuple[Any, list[Any], Roles]:
        judge = section("judge", url=service.url, max_cost=cost)
        comparer = EndpointComparer(judge, tmp_path / name / "judge.db", backoff=0.001)
        roles = ready(llama, section, tmp_path)
        score, ids = scored(roles, tokenizer, PairwiseJudge(comparer))
        tracker = MemoryTracker()
        points = Checkpoints(tmp_path / name / "points")
        train_ppo(roles, ids, config, tokenizer=tokenizer, tracker=tracker, checkpoints=points, score=score)
        return comparer, roles.trainable(POLICY), roles

    _, whole, _ = run("whole", 100.0)
    needed = len(service.requests)
    service.requests.clear()
    with pytest.raises(JudgeStopped, match=r"judge.max_cost .* the same command goes on from there"):
        run("cut", 0.0055)
    before = len(service.requests)
    assert 0 < before < needed
    comparer, resumed, _ = run("cut", 100.0)
    assert len(service.requests) == needed  # of both runs together
    assert comparer.costs()["requests"] == needed - before
    assert all(torch.equal(left, right) for left, right in zip(whole, resumed, strict=True))


def test_ppo_climbs_a_rule_in_the_judges_place(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    roles = ready(llama, section, tmp_path)
    score, ids = scored(roles, tokenizer, rule("longest"))
    config = section("ppo", updates=16, rollouts=16, minibatch_size=16, learning_rate=2e-2)
    tracker = MemoryTracker()
    train_ppo(roles, ids, config, tokenizer=tokenizer, tracker=tracker, score=score)
    scores = [values["ppo/score"] for _, values in tracker.history]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.2


def test_a_spread_is_of_reward_models_alone(params: dict[str, Any]) -> None:
    params["ppo"] |= {"reward": "judge", "spread_coef": 0.5}
    params["reward"]["members"] = 2
    with pytest.raises(ConfigError, match=r"ppo.spread_coef 0.5 is for ppo.reward reward; a judge is but one"):
        check_params(params)


@pytest.fixture
def params() -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((Path(__file__).resolve().parents[2] / "params.yaml").read_text()))
