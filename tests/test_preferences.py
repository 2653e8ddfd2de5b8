"""Which prompts are asked in a round, and what comes back to be judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_core.config import Preferences
from rlhf_core.models import REFERENCE, Roles
from rlhf_core.preferences import CANDIDATES, Answered, answer_prompts, choose_prompts
from rlhf_core.records import Prompt
from rlhf_core.tracking import NullTracker

VALUES: dict[str, Any] = {
    "round": 1,
    "annotator": "people",
    "seed": 0,
    "policy": "",
    "choose": "random",
    "prompts": 3,
    "responses": 4,
    "temperature": 1.0,
    "response_tokens": 6,
}
PROMPTS = [
    Prompt((("user", f"Why is the sky {word}?"),), "explain") for word in ("blue", "red", "green", "yellow", "brown")
]


def config(**changes: Any) -> Preferences:
    return Preferences.model_validate({**VALUES, **changes})


@pytest.fixture(scope="module")
def answer(llama: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[Answered]]:
    roles = Roles(llama)

    def ask(disagreement: Any = None, **changes: Any) -> list[Answered]:
        return answer_prompts(
            roles, REFERENCE, PROMPTS, config(**changes),
            tokenizer=tokenizer, system="", tracker=NullTracker(), disagreement=disagreement,
        )  # fmt: skip

    return ask


def test_all_prompts_are_asked_or_as_many_as_are_wanted() -> None:
    assert sorted(choose_prompts(10, config(choose="all"))) == list(range(10))
    chosen = choose_prompts(10, config())
    assert len(set(chosen)) == 3
    assert choose_prompts(10, config()) == chosen
    assert len(choose_prompts(50, config(choose="disagreement"))) == 3 * CANDIDATES


def test_another_round_asks_others() -> None:
    assert choose_prompts(100, config()) != choose_prompts(100, config(seed=1))


def test_a_prompt_comes_with_its_distinct_answers(answer: Callable[..., list[Answered]]) -> None:
    found = answer(choose="all")
    assert found
    for one in found:
        assert 2 <= len(one.responses) <= 4
        assert len(set(one.responses)) == len(one.responses) == len(one.ids)
        assert all(text.strip() == text != "" for text in one.responses)
        assert one.prompt.category == "explain"


def test_the_same_seed_gives_the_same_answers(answer: Callable[..., list[Answered]]) -> None:
    assert answer() == answer()
    assert answer() != answer(seed=7)


def test_a_prompt_whose_answers_are_all_alike_is_left_out(answer: Callable[..., list[Answered]]) -> None:
    assert answer(temperature=1e-4) == []  # as good as greedy: four times the same


def test_those_are_kept_about_which_the_ensemble_disagrees_most(answer: Callable[..., list[Answered]]) -> None:
    def in_order(asked: Any) -> list[float]:
        assert all(len(responses) >= 2 for _, responses in asked)
        return list(range(len(asked)))

    everything = answer(lambda asked: [0.0] * len(asked), choose="disagreement", prompts=5)
    kept = answer(in_order, choose="disagreement", prompts=2)
    assert [one.prompt for one in kept] == [everything[-1].prompt, everything[-2].prompt]


def test_what_is_sampled_is_what_is_shown(
    answer: Callable[..., list[Answered]], tokenizer: PreTrainedTokenizerFast
) -> None:
    for one in answer(choose="all"):
        assert [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in one.ids] == list(one.responses)
