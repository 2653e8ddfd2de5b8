"""Who criticises an answer and writes it anew: a policy on this machine, a chat endpoint, or a rule.

The prompts are those of Bai et al. 2022, §3.1 and App. C, as a plain chat: the request, the answer, the critique
request, the critique, the revision request. Their examples before each are left out; chat models need none, and the
default model has no room for them. A scripted critic is right by construction, so that what is learned from it can be
held against what it teaches.
"""

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.config import Constitution
from rlhf_core.data import encode_prompt
from rlhf_core.errors import ConfigError
from rlhf_core.feedback.annotators import Item, Judgement, Source, ranks_of
from rlhf_core.feedback.endpoint import Asker
from rlhf_core.feedback.written import written
from rlhf_core.models import Roles
from rlhf_core.records import Message
from rlhf_core.rollouts import sample
from rlhf_core.safety import HARMFUL, classify
from rlhf_core.tracking import NullTracker, Tracker

ROWS = 64  # chats that are answered at once
ONLY = "Answer with the new answer alone, as if the first one had never been written."


class Draft(NamedTuple):
    """An answer as it is now."""

    prompt: tuple[Message, ...]
    category: str
    response: str
    topic: str = ""  # of the request, for scripts


Revisable = tuple[Draft, str, str, str]  # the draft, the critique request, the critique, the revision request


class Critic(Protocol):
    """Criticises drafts, and writes them anew."""

    @property
    def name(self) -> str:
        """Who it is, as `annotator` of a demonstration says it."""

    def critique(self, drafts: Sequence[Draft], requests: Sequence[str]) -> list[str]:
        """One critique a draft, "" where there is none."""

    def revise(self, asked: Sequence[Revisable]) -> list[str]:
        """One new answer each, "" where there is none."""


class PolicyCritic:
    """A policy that criticises and revises in a chat with itself.

    Args:
        roles, role: whose words they are.
        name: what the demonstrations call it.
    """

    def __init__(
        self,
        roles: Roles,
        role: str,
        config: Constitution,
        *,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        system: str,
        tracker: Tracker | None = None,
    ) -> None:
        self.roles, self.role, self.config, self.name = roles, role, config, name
        self.tokenizer, self.system = tokenizer, system
        self.tracker = tracker or NullTracker()
        self.generator = torch.Generator().manual_seed(config.seed + 1)

    def critique(self, drafts: Sequence[Draft], requests: Sequence[str]) -> list[str]:
        """One critique a draft, "" where the chat is longer than the model can read."""
        chats = [critique_chat(draft, request) for draft, request in zip(drafts, requests, strict=True)]
        return self.answer(chats, max_tokens=self.config.critique_tokens, note="critiques")

    def revise(self, asked: Sequence[Revisable]) -> list[str]:
        """One new answer each, "" as above."""
        chats = [revision_chat(*one) for one in asked]
        return self.answer(chats, max_tokens=self.config.response_tokens, note="revisions")

    def answer(self, chats: Sequence[tuple[Message, ...]], *, max_tokens: int, note: str) -> list[str]:
        """What the policy says next in each chat; "" where it says nothing or has no room to."""
        rows = [encode_prompt(self.tokenizer, chat, self.system) for chat in chats]
        model = self.roles.language_model(self.role)
        limit = getattr(model.config, "max_position_embeddings", None) or max(map(len, rows), default=0) + max_tokens
        readable = [row for row in range(len(rows)) if len(rows[row]) + max_tokens <= limit]
        said = [""] * len(rows)
        for start in range(0, len(readable), ROWS):
            part = readable[start : start + ROWS]
            answers = sample(
                self.roles.language_model(self.role),
                [rows[row] for row in part],
                max_tokens=max_tokens,
                temperature=self.config.temperature,
                stop_id=self.tokenizer.eos_token_id,
                pad_id=self.tokenizer.pad_token_id,
                generator=self.generator,
            )
            found = answers.responses()
            for row, ids in zip(part, found, strict=True):
                said[row] = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            tokens = sum(map(len, found))
            self.tracker.progress(start + len(part), len(readable), unit="answers", tokens=tokens, note=note)
        return said


def critique_chat(draft: Draft, request: str) -> tuple[Message, ...]:
    """The chat that ends in the critique request."""
    return (*draft.prompt, ("assistant", draft.response), ("user", request))


def revision_chat(draft: Draft, request: str, critique: str, revision: str) -> tuple[Message, ...]:
    """The chat that ends in the revision request."""
    return (*critique_chat(draft, request), ("assistant", critique), ("user", f"{revision} {ONLY}"))


class EndpointCritic:
    """A model behind a chat endpoint; what it wrote is kept as a judge's word is, so that nothing is paid for twice.

    Args:
        asker: the endpoint of section judge.
    """

    def __init__(self, asker: Asker) -> None:
        self.asker, self.name = asker, asker.name

    def critique(self, drafts: Sequence[Draft], requests: Sequence[str]) -> list[str]:
        """One critique a draft, "" where there is no valid answer."""
        chats = [critique_chat(draft, request) for draft, request in zip(drafts, requests, strict=True)]
        return written(self.asker, chats, "a critique in one or two sentences")

    def revise(self, asked: Sequence[Revisable]) -> list[str]:
        """One new answer each, "" as above."""
        return written(self.asker, [revision_chat(*one) for one in asked], "the new answer, as the person will read it")


# ---- scripts


class Topic(NamedTuple):
    """How a script declines a request of a topic, and what it offers."""

    what: str
    why: str
    offers: tuple[str, ...]


TOPICS: dict[str, Topic] = {
    "privacy": Topic(
        "spying on somebody",
        "it breaks their trust and often the law",
        (
            "I can help you find words to ask them openly.",
            "If you worry about them, I can help you plan an honest talk.",
        ),
    ),
    "fraud": Topic(
        "a deception",
        "somebody would lose by it, and it may be a crime",
        ("I can help you write an honest version.", "I can help you look for fair ways to get what you need."),
    ),
    "theft": Topic(
        "taking what is not yours",
        "it harms the person who owns it",
        (
            "If money is short, I can help you find support near you.",
            "I can help you make a plan to save up for it, or ask to borrow it.",
        ),
    ),
    "violence": Topic(
        "hurting or frightening anybody",
        "someone could get badly hurt",
        (
            "I can help you write a calm message about what happened.",
            "I can help you find somebody who settles disputes.",
        ),
    ),
    "hate": Topic(
        "words against a group of people",
        "nobody is worth less for who they are",
        ("I can help you write something that brings people together.", "I can help you look at the facts instead."),
    ),
    "bullying": Topic(
        "making somebody feel small",
        "it would hurt them for a long time",
        ("I can help you say what bothers you without an insult.", "I can help you think of something kind to do."),
    ),
    "self_harm": Topic(
        "anything that hurts you",
        "you matter, and you need not carry this alone",
        (
            "Please call a crisis line or tell somebody near you today; I can help you find the words.",
            "Please talk to a doctor or a person you trust today; I can help you prepare what to say.",
        ),
    ),
    "drugs": Topic(
        "that use of drugs or alcohol",
        "it could put you or others in danger",
        ("I can help you find a doctor or an advice line.", "I can help you plan a safe evening."),
    ),
    "hacking": Topic(
        "getting into what belongs to others",
        "it is a crime and breaks their trust",
        ("I can help you protect your own accounts.", "I can help you ask the owner or the support desk for access."),
    ),
    "danger": Topic(
        "something that puts people in danger",
        "somebody could be badly hurt",
        ("I can help you find a safe way to do it.", "I can help you work out whom to ask for advice."),
    ),
}
OTHER = Topic(
    "that",
    "it could hurt somebody",
    ("I can help you find a safe way to reach what you need.", "I can help you think about who could support you."),
)
DECLINES = (
    "I won't help with {what}, because {why}. {offer}",
    "I can't help with {what}: {why}. {offer}",
    "I'm not going to help with {what}, since {why}. {offer}",
)
FAULTS = {
    ("harmful", "compliance"): "The request would do harm, and the answer does not decline it.",
    ("harmful", "refusal"): "The answer declines, and leaves the person with nothing they could do instead.",
    ("look_alike", "refusal"): "The request is harmless, and the answer declines it.",
    ("look_alike", "refusal_with_help"): "The request is harmless, and the answer declines it.",
}


def _careful_revision(draft: Draft) -> str:
    """Declines a harmful request with an offer; an answer to a harmless one stays, or is set aside if it declines."""
    label = classify(draft.response, draft.category)
    if draft.category != HARMFUL:
        return draft.response if label == "compliance" else ""
    if label == "refusal_with_help":
        return draft.response
    topic = TOPICS.get(draft.topic, OTHER)
    pick = int.from_bytes(hashlib.sha256(draft.prompt[-1][1].encode()).digest()[:4], "big")
    offer = topic.offers[pick % len(topic.offers)]
    return DECLINES[pick // 7 % len(DECLINES)].format(what=topic.what, why=topic.why, offer=offer)


def _careful_value(category: str, response: str) -> int:
    """To a harmful request a refusal that offers something is best, then a bare one; to a harmless one an answer is."""
    label = classify(response, category)
    if category != HARMFUL:
        return int(label == "compliance")
    return {"refusal_with_help": 2, "refusal": 1, "compliance": 0}[label]


class Script(NamedTuple):
    """A critic and annotator that is written down."""

    revision: Callable[[Draft], str]  # "" sets the draft aside
    value: Callable[[str, str], int]  # of category and response; greater is better


SCRIPTS: dict[str, Script] = {"careful": Script(_careful_revision, _careful_value)}


def script(name: str) -> Script:
    """The script of that name.

    - `careful`: declines what is harmful with an offer by topic, and answers what only looks so

    Raises:
        ConfigError: there is no such script.
    """
    if name not in SCRIPTS:
        near = difflib.get_close_matches(name, SCRIPTS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"Found no script {name!r}, expected one of {', '.join(SCRIPTS)}; did you mean script:{near}?"
        )
    return SCRIPTS[name]


class ScriptedCritic:
    """A script as a critic. It knows a prompt's category and topic, and heeds no principle."""

    def __init__(self, name: str) -> None:
        self.name, self.script = f"script:{name}", script(name)

    def critique(self, drafts: Sequence[Draft], requests: Sequence[str]) -> list[str]:
        """What is wrong by the script, if anything."""
        found = [(draft.category, classify(draft.response, draft.category)) for draft in drafts]
        return [FAULTS.get(key, "There is nothing to mend.") for key in found]

    def revise(self, asked: Sequence[Revisable]) -> list[str]:
        """The script's answers."""
        return [self.script.revision(draft) for draft, *_ in asked]


class ScriptedAnnotator:
    """A script that ranks responses.

    Args:
        categories: of each prompt.
    """

    source: Source = "rule"

    def __init__(self, name: str, categories: Mapping[tuple[Message, ...], str]) -> None:
        self.name, self.script, self.categories = f"script:{name}", script(name), categories

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement an item, in their order; certain."""
        found = []
        for item in items:
            category = self.categories[item.prompt]
            found.append(Judgement(ranks_of([self.script.value(category, text) for text in item.responses])))
        return found
