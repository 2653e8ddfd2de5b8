"""Judges on this machine: label probabilities of a language model, and the scores of a reward model."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core.errors import ConfigError, MissingArtifact
from rlhf_core.feedback import local
from rlhf_core.feedback.annotators import Item
from rlhf_core.feedback.judges import open_judge
from rlhf_core.feedback.local import LabelComparer
from rlhf_core.feedback.pairs import Look, PairwiseJudge
from rlhf_core.models import Normaliser, Roles

PROMPT = (("user", "Name a fruit."),)
LOOKS = [
    Look(PROMPT, "A banana.", "Red."),
    Look(PROMPT, "Red.", "A banana."),
    Look(PROMPT, "A spider has eight legs, and a cat has four of them.", "x"),
]


@pytest.fixture(autouse=True)
def short_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models know few words and read 256 tokens, so they are asked briefly."""
    monkeypatch.setattr(local, "QUESTION", "{request} A {first} B {second}")
    monkeypatch.setattr(local, "LEAD", "Answer:")
    monkeypatch.setattr(local, "LABELS", ("A", "B"))


@pytest.fixture
def judge(llama: Path) -> LabelComparer:
    return LabelComparer(llama)


def test_p_first_is_the_labels_share_of_the_next_token(llama: Path, judge: LabelComparer) -> None:
    # With transformers alone, one row at a time and no padding.
    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama).eval()
    a, b = (tokenizer("Answer:" + label, add_special_tokens=False).input_ids[-1] for label in "AB")
    for look, opinion in zip(LOOKS, judge.compare(LOOKS), strict=True):
        turn = f"<|im_start|>user\nName a fruit. A {look.first} B {look.second}<|im_end|>\n"
        text = f"{turn}<|im_start|>assistant\nAnswer:"
        with torch.no_grad():
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            odds = model(ids).logits[0, -1].double().softmax(0)
        assert opinion is not None
        assert opinion.first == pytest.approx(float(odds[a] / (odds[a] + odds[b])), abs=1e-5)  # float32, 30 layers


def test_a_look_does_not_hang_on_its_neighbours(judge: LabelComparer) -> None:
    together = [opinion.first for opinion in judge.compare(LOOKS) if opinion]
    apart = [opinion.first for look in LOOKS for opinion in judge.compare([look]) if opinion]
    assert together == pytest.approx(apart, abs=1e-6)


def test_what_the_model_cannot_read_gets_no_answer(judge: LabelComparer) -> None:
    long = Look(PROMPT, "A spider has eight legs. " * 60, "Red.")
    first, missing = judge.compare([LOOKS[0], long])
    assert first is not None
    assert missing is None


def test_labels_of_several_tokens_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LABELS", ("zebra", "quagga"))
    with pytest.raises(ConfigError, match="no single token for the label 'zebra' after 'Answer:'"):
        LabelComparer(llama)


def test_a_folder_without_a_model_is_named(tmp_path: Path, section: Callable[..., Any]) -> None:
    config = section("judge", kind="local", url="", model=str(tmp_path / "nothing"))
    with pytest.raises(MissingArtifact, match="holds no model"):
        open_judge(config, section("prepare"), memory=tmp_path / "j.db")


def test_the_local_judge_ranks(llama: Path, section: Callable[..., Any]) -> None:
    judge = open_judge(section("judge", kind="local", url="", model=str(llama)), section("prepare"), memory="unused")
    assert isinstance(judge, PairwiseJudge)
    [judgement] = judge.judge([Item(PROMPT, ("A banana.", "Red.", "A cat."))])
    assert len(judgement.ranks) == 3
    assert judge.counts()["pairs"] == 3


@pytest.fixture
def reward_model(llama: Path, section: Callable[..., Any], tmp_path: Path) -> Path:
    """A saved reward role whose scores have a mean, a deviation and a temperature of their own."""
    torch.manual_seed(0)
    roles = Roles(llama, section("reward"))
    roles.add("reward", head=True)
    roles.normalisers["reward"] = Normaliser(0.5, 2.0, 4.0)
    roles.save("reward", tmp_path / "reward")
    return tmp_path / "reward"


def test_the_reward_judge_ranks_by_score(
    reward_model: Path, llama: Path, section: Callable[..., Any], tmp_path: Path
) -> None:
    config = section("judge", kind="reward", url="", model=os.fspath(reward_model))
    judge = open_judge(config, section("prepare"), memory=tmp_path / "j.db")
    items = [Item(PROMPT, ("A banana.", "Red.", "A lemon is yellow.")), Item(PROMPT, ("Red.", "Red."))]
    three, two = judge.judge(items)
    assert judge.source == "ai"
    assert three.scores is not None
    scores = three.scores["reward"]
    assert [sorted(scores, reverse=True).index(score) + 1 for score in scores] == list(three.ranks)
    # By hand: raw differences are 2 (the deviation) times the scores', halved again by the temperature of 4.
    lead = torch.tensor([abs(a - b) * 2 / 4 for a, b in ((scores[0], scores[1]), (scores[0], scores[2]),
                                                         (scores[1], scores[2]))])  # fmt: skip
    assert three.confidence == pytest.approx((2 * lead.sigmoid() - 1).mean().item(), abs=1e-6)
    assert (two.ranks, two.confidence) == ((1, 1), pytest.approx(0, abs=1e-6))
    assert judge.judge(items[:1])[0].ranks == three.ranks
