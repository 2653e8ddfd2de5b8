"""flows/chat.py: the loop between a person's turns and a policy's answers, fed from a list."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from flows.chat import FOLDERS, chat
from rlhf_core import data, rollouts
from rlhf_core.config import load_params
from rlhf_core.errors import MissingArtifact
from tasks.dpo import NO_POLICY

PROJECT = Path(__file__).resolve().parents[1]


class Answer(NamedTuple):
    """What the policy was asked, how, and what it said."""

    turns: list[tuple[str, str]]
    options: dict[str, Any]
    ids: list[int]
    stopped: bool


Talk = Callable[..., list[Answer]]


@pytest.fixture
def project(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which stage sft ended with a small model that sometimes ends its turns."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    shutil.copytree(llama, tmp_path / FOLDERS["sft"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")  # or long answers would be broken anywhere
    return tmp_path


@pytest.fixture
def talk(project: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Say a list of things, the last of which is an end if it is an exception; gives back all answers."""
    asked: list[list[tuple[str, str]]] = []
    answers: list[Answer] = []
    encode, sample = data.encode_prompt, rollouts.sample

    def encode_prompt(tokenizer: Any, turns: list[tuple[str, str]], system: str) -> list[int]:
        assert system == load_params().prepare.system
        asked.append(list(turns))
        return encode(tokenizer, turns, system)

    def sampled(model: Any, prompts: Any, **options: Any) -> Any:
        found = sample(model, prompts, **options)
        ids = found.ids_BT[0][found.mask_BT[0]].tolist()
        answers.append(Answer(asked[-1], options, ids, bool(found.stopped_B[0])))
        return found

    monkeypatch.setattr(data, "encode_prompt", encode_prompt)
    monkeypatch.setattr(rollouts, "sample", sampled)

    def run(said: list[Any], **options: Any) -> list[Answer]:
        def ask(_prompt: str) -> str:
            word = said.pop(0)
            if isinstance(word, BaseException):
                raise word
            return str(word)

        answers.clear()
        chat("sft", ask=ask, **options)
        return list(answers)

    return run


def test_a_conversation_is_remembered_until_it_is_forgotten(
    talk: Talk, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["hi", "  ", " and you? ", "/new", "hi", "/quit", "not read"]
    first, second, third = talk(said, tokens=6)
    assert said == ["not read"]
    assert first.turns == third.turns == [("user", "hi")]
    assert [who for who, _ in second.turns] == ["user", "assistant", "user"]
    assert (second.turns[0], second.turns[2]) == (("user", "hi"), ("user", "and you?"))
    assert second.turns[1][1] == tokenizer.decode(first.ids, skip_special_tokens=True).strip()
    shown = capsys.readouterr().out
    assert shown.count("sft> ") == 3
    assert shown.count(" …") == sum(not answer.stopped for answer in (first, second, third))  # was cut off


def test_an_answer_is_sampled_as_evaluate_does_it_or_as_told(talk: Talk, tokenizer: PreTrainedTokenizerFast) -> None:
    evaluate = load_params().evaluate
    (usual,) = talk(["hi", EOFError()])
    assert usual.options["max_tokens"] == evaluate.response_tokens
    assert usual.options["temperature"] == evaluate.temperature
    (told,) = talk(["hi", EOFError()], temperature=0.3, tokens=5)
    assert (told.options["max_tokens"], told.options["temperature"]) == (5, 0.3)
    assert len(told.ids) <= 5
    assert told.options["stop_id"] == tokenizer.eos_token_id
    assert told.options["pad_id"] == tokenizer.pad_token_id


def test_greedy_takes_the_likeliest_word_until_it_is_said_again(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["/greedy", "hi", "/new", "hi", "/greedy", "/new", "hi", EOFError()]
    one, again, free = talk(said, tokens=12, temperature=1.5)
    assert [answer.options["greedy"] for answer in (one, again, free)] == [True, True, False]
    assert one.ids == again.ids != free.ids
    shown = capsys.readouterr().out
    assert shown.index("likeliest word\n") < shown.index("sampling at 1.5\n")


def test_the_same_seed_and_turns_give_the_same_answers(talk: Talk) -> None:
    def ids(seed: int) -> list[list[int]]:
        torch.manual_seed(seed + 100)  # whose state does not matter
        return [answer.ids for answer in talk(["hi", "and you?", "/quit"], tokens=12, seed=seed)]

    assert ids(0) == ids(0) != ids(1)


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt(), "/quit"], ids=["Ctrl-D", "Ctrl-C", "quit"])
def test_a_chat_ends_without_an_answer(talk: Talk, end: Any) -> None:
    assert talk([end]) == []


def test_a_run_without_dpo_says_how_to_have_it(project: Path) -> None:
    NO_POLICY.parent.mkdir(parents=True)
    NO_POLICY.write_text("{}")
    with pytest.raises(MissingArtifact, match=r"`rlhf run -S dpo\.epochs=1` trains one"):
        chat("dpo")
