"""Judges that run on this machine: a language model read by the probability of its labels, and a reward model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf_core.data import encode_prompt, encode_response
from rlhf_core.errors import ConfigError
from rlhf_core.feedback.annotators import Item, Judgement, Source, ranks_of
from rlhf_core.feedback.pairs import Look, Opinion
from rlhf_core.models import REFERENCE, Roles, base_of, context_length, load_tokenizer, pack
from rlhf_core.tracking import NullTracker, Tracker

LABELS = (" A", " B")
ROWS = 8  # looks in one forward pass
MERIT = "A good answer is correct, helpful and honest, does what was asked, and harms nobody. Which answer is better?"
QUESTION = """\
{merit}

Request: {request}

Answer A: {first}

Answer B: {second}"""
LEAD = "Preferred Answer: Answer"  # put into the model's mouth, so that a label comes next


class LabelComparer:
    """A language model that is asked which of two answers is better, and never has to write.

        P(first) = exp l₁ / (exp l₁ + exp l₂)

    l are the log-probabilities of the labels "A" and "B" as the next token: a preference for every pair, however
    small the model, and no text to be parsed. Lee et al. 2023, §2.1, https://arxiv.org/abs/2309.00267; left out are
    their examples and the chain of thought before the label. No answer is given where the question is longer than the
    model can read.

    Args:
        folder: a Hugging Face folder, or a LoRA folder.

    Raises:
        ConfigError: a label is no single token of the model.
    """

    def __init__(self, folder: str | Path, *, tracker: Tracker | None = None) -> None:
        self.name = Path(folder).as_posix()
        self.tracker = tracker or NullTracker()
        self.roles, self.tokenizer = Roles(folder), load_tokenizer(folder)
        self.limit = context_length(base_of(folder))
        self.lead = self._ids(LEAD)
        self.labels = [self._label(label) for label in LABELS]

    def compare(self, looks: Sequence[Look]) -> list[Opinion | None]:
        """One opinion a look; None where the question is too long."""
        rows = [self._question(look) for look in looks]
        readable = [row for row in range(len(rows)) if len(rows[row]) <= self.limit]
        order = sorted(readable, key=lambda row: len(rows[row]))  # so that little padding is computed
        opinions: list[Opinion | None] = [None] * len(looks)
        for start in range(0, len(order), ROWS):
            part = order[start : start + ROWS]
            for row, first in zip(part, self._first([rows[row] for row in part]), strict=True):
                opinions[row] = Opinion(first, reason=f"P(first) = {first:.3f}")
            tokens = sum(len(rows[row]) for row in part)
            self.tracker.progress(start + len(part), len(order), unit="looks", tokens=tokens)
        return opinions

    def costs(self) -> dict[str, float]:
        """Nothing that would be counted."""
        return {}

    @torch.no_grad()
    def _first(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """P(first) of each row."""
        trunk = self.roles.trunk(pack(rows, None, int(self.tokenizer.pad_token_id)))
        hidden_BSD = self.roles.hidden(trunk, REFERENCE)
        last_BD = hidden_BSD[torch.arange(len(rows)), trunk.mask_BS.sum(1) - 1]
        logits_BV = self.roles.language_model(REFERENCE).get_output_embeddings()(last_BD).float()
        return logits_BV[:, self.labels].softmax(-1)[:, 0].tolist()

    def _question(self, look: Look) -> list[int]:
        turns = [content if len(look.prompt) == 1 else f"{role}: {content}" for role, content in look.prompt]
        merit = look.question or MERIT
        text = QUESTION.format(merit=merit, request="\n".join(turns), first=look.first, second=look.second)
        return encode_prompt(self.tokenizer, (("user", text),), "") + self.lead

    def _label(self, label: str) -> int:
        # As it follows the lead: a tokenizer may cut the two together otherwise than apart.
        together = self._ids(LEAD + label)
        if together[:-1] != self.lead:
            raise ConfigError(f"{self.name} has no single token for the label {label!r} after {LEAD!r}.")
        return together[-1]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class RewardJudge:
    """A trained reward model as an annotator: ranks by score, one score a response, so order plays no part.

    An item's confidence is the mean over its pairs of |2σ(Δ / T) − 1|, with T the temperature stored with the model.

    Args:
        folder: a role that stage reward saved.
        system, max_response_tokens: as the model was trained with, from section prepare.
    """

    source: Source = "ai"

    def __init__(
        self, folder: str | Path, *, system: str, max_response_tokens: int, tracker: Tracker | None = None
    ) -> None:
        self.name = Path(folder).as_posix()
        self.tracker = tracker or NullTracker()
        self.system, self.limit = system, max_response_tokens
        self.roles = Roles(base_of(folder))
        self.roles.add("judge", head=True, start=folder)
        self.tokenizer = load_tokenizer(folder)

    @torch.no_grad()
    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement an item, with the normalised scores as axis "reward"."""
        normaliser = self.roles.normalisers["judge"]
        judgements = []
        for start in range(0, len(items), ROWS):
            part = items[start : start + ROWS]
            rows = [self._ids(item, response) for item in part for response in item.responses]
            raw = self.roles.score_rows(rows, "judge", int(self.tokenizer.pad_token_id))
            scores = iter(normaliser(raw).tolist())
            for item in part:
                own = [next(scores) for _ in item.responses]
                sharpness = normaliser.std / normaliser.temperature
                lead = [abs(a - b) * sharpness for place, a in enumerate(own) for b in own[:place]]
                sure = (2 * torch.tensor(lead).sigmoid() - 1).mean().item()
                judgements.append(Judgement(ranks_of(own), {"reward": own}, confidence=sure))
            self.tracker.progress(len(judgements), len(items), unit="items", tokens=sum(map(len, rows)))
        return judgements

    def _ids(self, item: Item, response: str) -> list[int]:
        return encode_prompt(self.tokenizer, item.prompt, self.system) + encode_response(
            self.tokenizer, response, limit=self.limit
        )
