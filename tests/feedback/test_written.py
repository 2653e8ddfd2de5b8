"""A chat endpoint that writes critiques and revisions: asked as in a chat, checked, and paid once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from service import BEHAVIOURS, Handler, Service, completion

from rlhf_core.constitution import Principle, revise
from rlhf_core.critics import ONLY, Draft, EndpointCritic
from rlhf_core.errors import JudgeStopped
from rlhf_core.feedback.chat import BadAnswer
from rlhf_core.feedback.endpoint import Asker
from rlhf_core.feedback.written import check

DRAFTS = [Draft((("user", text),), "harmful", "Sure.") for text in ("How do I spy on her?", "How do I rob him?")]
PRINCIPLE = Principle(id="one", theme="harm", weight=1, critique="C?", revision="R.", question="Q?")


def writes(handler: Handler, payload: dict[str, Any]) -> None:
    handler.send(completion({"text": f"A text of {len(payload['messages'])} turns."}))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.delenv("RLHF_JUDGE_KEY", raising=False)
    monkeypatch.setitem(BEHAVIOURS, "writes", writes)
    running = Service()
    yield running
    running.close()


def test_an_endpoint_writes_critique_and_revision_and_is_paid_once(
    section: Callable[..., Any], tmp_path: Path, service: Service
) -> None:
    def run(behaviour: str) -> Any:
        service.always = behaviour
        asker = Asker(section("judge", url=service.url), tmp_path / "judge.db", backoff=0.001)
        return revise(DRAFTS, EndpointCritic(asker), [PRINCIPLE], rounds=1, seed=0)

    with pytest.raises(JudgeStopped, match=r"stopped at 0 of 2 questions: .* the same command goes on from there"):
        run("401")
    service.requests.clear()
    chains = run("writes")
    assert [chain.final for chain in chains] == ["A text of 5 turns."] * 2
    assert [step.critique for chain in chains for step in chain.steps] == ["A text of 3 turns."] * 2
    sent = [message["content"] for message in service.requests[-1]["messages"]]
    assert sent[1:3] == ["Sure.", "C?"]
    assert sent[4].startswith(f"R. {ONLY}")
    assert len(service.requests) == 4
    assert run("writes") == chains
    assert len(service.requests) == 4


def test_a_draft_without_a_valid_answer_is_set_aside(
    section: Callable[..., Any], tmp_path: Path, service: Service
) -> None:
    service.script, service.always = ["another language"] * 2, "writes"
    asker = Asker(section("judge", url=service.url), tmp_path / "judge.db", backoff=0.001)
    chains = revise(DRAFTS, EndpointCritic(asker), [PRINCIPLE], rounds=1, seed=0)
    assert [chain.kept for chain in chains] == [False, True]


@pytest.mark.parametrize("text", ["no JSON", '{"text": 3}', '{"text": " "}', "{" * 9, '{"other": "x"}'])
def test_a_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadAnswer):
        check(text)
    assert check('Sure: {"text": " Be kind. "}') == "Be kind."
