"""Stage preferences: answers of the current policy that annotators will judge. See rlhf_core/preferences.py.

It stands in a campaign's dvc.yaml only (flows/campaign.py). What annotators said is no output of a stage: the flow
keeps it under data/feedback/, where DVC versions it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_core.data import load_prepared
from rlhf_core.ensemble import combine, load_ensemble, member_scores, members_of
from rlhf_core.errors import ConfigError
from rlhf_core.models import Roles, load_tokenizer, pack
from rlhf_core.preferences import Asked, answer_prompts
from tasks.files import write_jsonl
from tasks.prepare import BASE, PREPARED
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import require_watched, stage_run

ITEMS = Path("artifacts/preferences/items.jsonl")
REWARD_MODEL = "artifacts/start/reward/model"  # whose members' disagreement chooses prompts
SPLITS = ("train", "validation")  # test judges the policies, and gold the judge


def main() -> None:
    with stage_run("preferences", deps=[BASE, SFT_MODEL, PREPARED]) as run:
        config = run.params.preferences
        require_watched(run, "preferences.policy", config.policy)
        prompts = load_prepared(PREPARED, "prompts", SPLITS)
        run.log_dataset("prepared", PREPARED, context="preferences", prompts=len(prompts))
        roles = Roles(SFT_MODEL)
        roles.add("policy", start=config.policy)
        chooses = config.choose == "disagreement"
        answered = answer_prompts(
            roles, "policy", prompts, config,
            tokenizer=load_tokenizer(BASE), system=run.params.prepare.system, tracker=run,
            disagreement=_disagreement(roles) if chooses else None,
        )  # fmt: skip
        rows: list[dict[str, Any]] = [
            {
                "prompt": [{"role": role, "content": content} for role, content in item.prompt.prompt],
                "responses": list(item.responses),
                "origins": [f"round-{config.round}"] * len(item.responses),
                "category": item.prompt.category,
            }
            for item in answered
        ]
        run.finish_metrics(
            {
                "items": len(rows),
                "responses": sum(len(row["responses"]) for row in rows),
                "response_length": sum(len(ids) for item in answered for ids in item.ids)
                / max(sum(len(item.ids) for item in answered), 1),
            }
        )
        if run.main:
            write_jsonl(ITEMS, rows)


def _disagreement(roles: Roles) -> Callable[[Sequence[Asked]], list[float]]:
    """How much the members of the reward model disagree: the mean spread of their scores over a prompt's answers."""
    load_ensemble(roles, "reward", REWARD_MODEL)
    if len(members_of(roles, "reward")) < 2:
        raise ConfigError(
            "preferences.choose = 'disagreement' needs several reward models, and reward.members is 1: one cannot "
            "disagree with itself. Begin a campaign with -S reward.members=3."
        )

    @torch.no_grad()
    def measure(asked: Sequence[Asked]) -> list[float]:
        spreads = []
        for prompt, responses in asked:
            trunk = roles.trunk(pack([prompt] * len(responses), responses, 0))
            spreads.append(float(combine(member_scores(roles, trunk, "reward")[:, :, 0]).spread_B.mean()))
        return spreads

    return measure


if __name__ == "__main__":
    main()
