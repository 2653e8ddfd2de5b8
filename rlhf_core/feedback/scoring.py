"""Scores responses by a judge in the reward model's place: how much better each is than the SFT policy's own answer.

Direct RLAIF (Lee et al. 2023, §2.2.3, https://arxiv.org/abs/2309.00267) with a comparison where they ask for a grade
from 1 to 10: a comparison is what `rlhf judge-check` measures, and asking in both orders takes out what a judge leans
to by place. docs/decisions/0017 tells more. The loop that learns from the scores is rlhf_core/ppo.py.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import processes
from rlhf_core.feedback.annotators import Annotator, Item, Judgement
from rlhf_core.feedback.pairs import PairwiseJudge
from rlhf_core.models import REFERENCE, Roles
from rlhf_core.records import Message, Sampled
from rlhf_core.rollouts import sample


class JudgeScore:
    """What train_ppo takes as `score`: each response beside the SFT policy's greedy answer to the same prompt.

    The greedy answers are computed anew each time, so nothing is carried over that a run which goes on from a
    checkpoint would lack. What an endpoint said is remembered by content, so that such a run asks nothing twice.

    Args:
        judge: who compares. Of several processes the first asks, so that nothing is paid for twice; the others give
            None and get its numbers.
        roles: with the SFT policy as reference.
        prompts: the messages of each prompt by its token ids.
        max_tokens: longest greedy answer, as long as the responses may be.
    """

    def __init__(
        self,
        judge: Annotator | None,
        roles: Roles,
        prompts: Mapping[tuple[int, ...], tuple[Message, ...]],
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
    ) -> None:
        self.judge = judge
        self.roles, self.prompts = roles, prompts
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, sampled: Sampled) -> Tensor:
        """(B,) one score a response; raises what the judge raises where it has to stop."""
        baselines = self._baselines(sampled)
        items = [
            Item(self.prompts[tuple(prompt)], (self._text(response), baselines[tuple(prompt)]))
            for prompt, response in zip(sampled.prompts, sampled.responses(), strict=True)
        ]
        if not processes.state().is_main_process:
            return processes.place(torch.zeros(0), [], len(items))
        assert self.judge is not None, "the first process asks"
        return processes.place(torch.tensor(advantages(self.judge, items)), range(len(items)), len(items))

    def _baselines(self, sampled: Sampled) -> dict[tuple[int, ...], str]:
        """The SFT policy's likeliest answer to each prompt."""
        prompts = list(dict.fromkeys(map(tuple, sampled.prompts)))
        answers = sample(
            self.roles.language_model(REFERENCE),
            [list(ids) for ids in prompts],
            max_tokens=self.max_tokens,
            temperature=1.0,
            stop_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            generator=torch.Generator().manual_seed(0),  # decides nothing
            greedy=True,
        )
        return dict(zip(prompts, map(self._text, answers.responses()), strict=True))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def advantages(judge: Annotator, items: Sequence[Item]) -> list[float]:
    """By how much the first response of each item is better than the second; 0 for equal ones.

    A judge that compares: 2p − 1, with p the probability over both orders that the first is better, so from −1 to 1,
    and 0 where either order got no valid answer. A reward model: the difference of the scores, in its standard
    deviations. A rule, which says no more than which is better: 1 or −1.
    """
    if isinstance(judge, PairwiseJudge):
        return [2 * of_item[0].probability - 1 for of_item in judge.verdicts(items)]
    return [_lead(judgement) for judgement in judge.judge(items)]


def _lead(judgement: Judgement) -> float:
    if judgement.scores and "reward" in judgement.scores:
        first, second = judgement.scores["reward"]
        return first - second
    first_rank, second_rank = judgement.ranks
    return float((second_rank > first_rank) - (second_rank < first_rank))
