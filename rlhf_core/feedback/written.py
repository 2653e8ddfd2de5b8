"""Lets a model behind a chat endpoint write a text: asked for in JSON, checked, asked once more, and remembered."""

import json
from collections.abc import Sequence

from rlhf_core.feedback.chat import BadAnswer
from rlhf_core.feedback.endpoint import Asker, Question
from rlhf_core.records import Message

ASK = "{text}\n\nAnswer with one JSON object and nothing else, with this field:\n{fields}"
SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}
LONGEST = 4000  # characters that are kept of a text


def written(asker: Asker, chats: Sequence[tuple[Message, ...]], what: str) -> list[str]:
    """What the model writes next in each chat, "" where it gave no valid answer.

    Args:
        what: what the text is, such as "a critique".

    Raises:
        JudgeStopped: as `Asker.ask` does.
    """
    fields = f'- "text": {what}'
    questions = []
    for chat in chats:
        turns = [{"role": role, "content": content} for role, content in chat]
        turns[-1] = {**turns[-1], "content": ASK.format(text=turns[-1]["content"], fields=fields)}
        questions.append(Question(turns, SCHEMA, fields, check))
    return [answer or "" for answer in asker.ask(questions)]


def check(text: str) -> str:
    """The field of the first JSON object in the answer.

    Raises:
        BadAnswer: there is none, or it holds no text.
    """
    try:
        found, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    except (ValueError, RecursionError):
        raise BadAnswer("it holds no JSON object", text) from None
    value = found.get("text")
    if not isinstance(value, str) or not value.strip():
        raise BadAnswer('"text" is no text', text)
    return value.strip()[:LONGEST].encode(errors="replace").decode()
