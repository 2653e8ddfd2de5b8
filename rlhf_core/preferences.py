"""Stage preferences: which prompts are worth a judgement, and several answers to each of them.

What annotators say of the answers, and how they are asked, is in rlhf_core/feedback.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.config import Preferences
from rlhf_core.data import encode_prompt
from rlhf_core.models import Roles
from rlhf_core.records import Prompt
from rlhf_core.rollouts import sample
from rlhf_core.tracking import Tracker

SAMPLED_ROWS = 128  # responses sampled at once: each holds its keys and values of all layers
CANDIDATES = 4  # where the ensemble chooses, this many times the prompts wanted are answered

Asked = tuple[list[int], list[list[int]]]  # ids of a prompt and of each of its answers
Disagreement = Callable[[Sequence[Asked]], list[float]]


class Answered(NamedTuple):
    """A prompt with its distinct answers."""

    prompt: Prompt
    responses: tuple[str, ...]
    ids: tuple[list[int], ...]  # the same, as they were sampled
    prompt_ids: list[int]


def choose_prompts(count: int, config: Preferences) -> list[int]:
    """Which of `count` prompts are answered, in a random order: all, or as many as are wanted or chosen from."""
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    wanted = {"all": count, "random": config.prompts, "disagreement": CANDIDATES * config.prompts}[config.choose]
    return order[:wanted]


def answer_prompts(
    roles: Roles,
    role: str,
    prompts: Sequence[Prompt],
    config: Preferences,
    *,
    tokenizer: PreTrainedTokenizerBase,
    system: str,
    tracker: Tracker,
    disagreement: Disagreement | None = None,
) -> list[Answered]:
    """Answers to be judged; a prompt with fewer than two distinct answers is left out, for it cannot be ranked.

    Args:
        role: whose answers.
        prompts: those that may be asked; `config` chooses among them.
        disagreement: of several (prompt ids, responses' ids): how much the reward ensemble disagrees about each. Needed
            with `choose: disagreement`; the prompts with the most are kept, the greatest first.
    """
    generator = torch.Generator().manual_seed(config.seed + 1)
    chosen = [prompts[row] for row in choose_prompts(len(prompts), config)]
    found: list[Answered] = []
    at_once = max(SAMPLED_ROWS // config.responses, 1)
    for start in range(0, len(chosen), at_once):
        part = chosen[start : start + at_once]
        encoded = [encode_prompt(tokenizer, record.prompt, system) for record in part]
        sampled = sample(
            roles.language_model(role),
            [ids for ids in encoded for _ in range(config.responses)],
            max_tokens=config.response_tokens,
            temperature=config.temperature,
            stop_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            generator=generator,
        )
        answers = sampled.responses()
        for place, record in enumerate(part):
            own = answers[place * config.responses : (place + 1) * config.responses]
            distinct: dict[str, list[int]] = {}
            for ids in own:
                text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                if text:
                    distinct.setdefault(text, ids)
            if len(distinct) > 1:
                found.append(Answered(record, tuple(distinct), tuple(distinct.values()), encoded[place]))
        tokens = sum(map(len, answers))
        tracker.progress(min(start + at_once, len(chosen)), len(chosen), unit="prompts", tokens=tokens)
    if config.choose == "disagreement":
        assert disagreement is not None, "choosing by disagreement needs a measure of it"
        spread = disagreement([(answered.prompt_ids, list(answered.ids)) for answered in found])
        order = sorted(range(len(found)), key=lambda row: -spread[row])
        found = [found[row] for row in order[: config.prompts]]
    return found
