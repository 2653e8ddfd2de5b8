"""Constitutional AI: answers to hard prompts are criticised and revised by principles, and compared by principles.

Bai et al. 2022, https://arxiv.org/abs/2212.08073. A chain is what becomes of one answer: round after round a principle
is drawn, somebody criticises the answer by it and writes it again. The last revision is a demonstration for SFT. Who
criticises is in critics.py; what an answer does, by a rule, in safety.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_core.critics import Critic, Draft
from rlhf_core.data import parse_prompt
from rlhf_core.errors import ConfigError, MissingArtifact
from rlhf_core.records import Message


class Principle(BaseModel):
    """One rule of conduct: what a critic is asked, how an answer is revised, and what a judge is asked of two."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    theme: Literal["harm", "honesty", "kindness", "over-refusal"]
    weight: float = Field(ge=0)
    critique: str = Field(min_length=1)
    revision: str = Field(min_length=1)
    question: str = Field(min_length=1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    principles: list[Principle] = Field(min_length=1)


def load_principles(path: str | Path) -> tuple[Principle, ...]:
    """Read and check a constitution.

    Raises:
        MissingArtifact: there is no such file.
        ConfigError: it is no YAML, a field is missing, unknown or impossible, an id stands twice, or no weight is
            above 0; names the principle.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingArtifact(f"Found no {path} with principles, which constitution.principles names.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = _File.model_validate(raw).principles
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [_explain(raw, detail) for detail in error.errors()]
        raise ConfigError(f"{path}: " + "\n".join(lines) + "\nMend it; docs/constitution.md tells its form.") from error
    ids = [principle.id for principle in found]
    if doubled := sorted({name for name in ids if ids.count(name) > 1}):
        raise ConfigError(f"{path}: found the id {', '.join(doubled)} more than once, expected each once.")
    if not any(principle.weight for principle in found):
        raise ConfigError(f"{path}: found no weight above 0 among {len(found)} principles, expected one at least.")
    return tuple(found)


def _explain(raw: Any, detail: Any) -> str:
    """One mistake with the principle's id, or its place where that is what is wrong."""
    place = list(detail["loc"])
    if len(place) > 1 and isinstance(place[1], int):
        row = raw["principles"][place[1]]
        name = row.get("id") if isinstance(row, dict) else None
        place = [f"principle {name or f'number {place[1] + 1}'}", *place[2:]]
    found = "" if detail["type"] in ("missing", "extra_forbidden") else f", found {str(detail['input'])[:60]!r}"
    return f"{'.'.join(map(str, place)) or 'the file'}: {detail['msg']}{found}"


def draw_principle(
    principles: Sequence[Principle], prompt: Sequence[Message], turn: int | str, *, seed: int
) -> Principle:
    """One by weight, from a hash of seed, prompt and turn: another prompt more or less changes no other's draw."""
    place = _chance(seed, prompt, turn) * sum(principle.weight for principle in principles)
    for principle in principles:
        place -= principle.weight
        if place < 0:
            return principle
    return next(principle for principle in reversed(principles) if principle.weight)  # where rounding left a rest


def _chance(seed: int, prompt: Sequence[Message], turn: int | str) -> float:
    """A number from 0 to below 1."""
    digest = hashlib.sha256(json.dumps([seed, list(prompt), turn], ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # as many bits as a float holds for certain


class Step(NamedTuple):
    """A critique, and the answer that came of it."""

    principle: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


class Chain(NamedTuple):
    """What became of one answer."""

    prompt: tuple[Message, ...]
    category: str
    response: str  # the policy's own
    steps: list[Step]
    kept: bool  # False where a critic had nothing to say, or found no answer worth showing: no demonstration

    @property
    def final(self) -> str:
        """The last revision."""
        return self.steps[-1].revision if self.steps else self.response


def revise(
    drafts: Sequence[Draft], critic: Critic, principles: Sequence[Principle], *, rounds: int, seed: int
) -> list[Chain]:
    """Chains of the drafts, in their order, all of a round at once.

    A draft of which the critic writes no critique or no revision goes no further and is not kept.

    Raises:
        RLHFError: what the critic raises where it has to stop.
    """
    steps: list[list[Step]] = [[] for _ in drafts]
    kept = [bool(draft.response.strip()) for draft in drafts]
    now = list(drafts)
    for turn in range(rounds):
        live = [row for row in range(len(now)) if kept[row]]
        drawn = {row: draw_principle(principles, now[row].prompt, turn, seed=seed) for row in live}
        critiques = critic.critique([now[row] for row in live], [drawn[row].critique for row in live])
        said = {row: text for row, text in zip(live, critiques, strict=True) if text}
        asked = [(now[row], drawn[row].critique, said[row], drawn[row].revision) for row in said]
        revisions = dict(zip(said, critic.revise(asked), strict=True))
        for row in live:
            text, by = revisions.get(row), drawn[row]
            kept[row] = bool(text)
            if text:
                steps[row].append(Step(by.id, by.critique, said[row], by.revision, text))
                now[row] = now[row]._replace(response=text)
    return [
        Chain(draft.prompt, draft.category, draft.response, own, keep)
        for draft, own, keep in zip(drafts, steps, kept, strict=True)
    ]


def chain_row(chain: Chain) -> dict[str, Any]:
    """The whole chain, for reading."""
    return {
        "prompt": messages(chain.prompt),
        "category": chain.category,
        "response": chain.response,
        "steps": [step._asdict() for step in chain.steps],
        "kept": chain.kept,
    }


def chain_of(row: Mapping[str, Any]) -> Chain:
    """The chain of such a row."""
    steps = [Step(**step) for step in row["steps"]]
    return Chain(parse_prompt(dict(row)).prompt, row["category"], row["response"], steps, row["kept"])


def answers_of_chains(chains: Sequence[Chain], *, seed: int) -> dict[tuple[Message, ...], tuple[str, ...]]:
    """What chains have to be compared with a policy's own answers, by prompt; those that were not kept are left out.

    The first answer and the last revision, and of a chain of another category, which is drawn, the last revision. A
    policy that has learned to decline declines all over or nowhere, so that its own answers hardly ever say when to.
    """
    kept = [chain for chain in chains if chain.kept]
    others = {own: [chain for chain in kept if chain.category != own] for own in {chain.category for chain in kept}}
    found = {}
    for chain in kept:
        of_others = others[chain.category]
        drawn = [of_others[int(_chance(seed, chain.prompt, "other") * len(of_others))].final] if of_others else []
        found[chain.prompt] = (chain.response, chain.final, *drawn)
    return found


def demonstration_row(chain: Chain, critic: str) -> dict[str, Any]:
    """The last revision as a demonstration of docs/data.md."""
    about = {"category": chain.category, "source": "ai", "annotator": critic}
    return {"prompt": messages(chain.prompt), "response": chain.final, **about}


def messages(prompt: Sequence[Message]) -> list[dict[str, str]]:
    """A prompt as the data formats have it."""
    return [{"role": role, "content": content} for role, content in prompt]


def count_chains(chains: Sequence[Chain]) -> Mapping[str, float]:
    """How many chains there are, how many were kept, and how many of these changed the answer."""
    kept = [chain for chain in chains if chain.kept]
    changed = sum(chain.final != chain.response for chain in kept)
    return {"chains": len(chains), "kept": len(kept), "changed": changed / max(len(kept), 1)}
