"""Stage ppo: the policy that climbs the reward model. The algorithm is rlhf_core/ppo.py, from top to bottom."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.data import encode_prompt, load_prepared
from rlhf_core.ensemble import load_ensemble
from rlhf_core.feedback.judges import admit, counts_of, open_judge
from rlhf_core.feedback.scoring import JudgeScore
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.ppo import POLICY, VALUE, add_roles, train_ppo
from rlhf_core.records import Prompt
from rlhf_core.watch import GOLD
from tasks.environment import how_to_set, record_folder
from tasks.files import write_jsonl
from tasks.prepare import BASE, PREPARED
from tasks.progress import ProgressTracker
from tasks.reward import FOLDERS as REWARD_FOLDERS
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import StageRun, require_watched, stage_run

POLICY_FOLDER, VALUE_FOLDER = "artifacts/ppo/policy", "artifacts/ppo/value"
SAMPLES = Path("artifacts/ppo/samples.jsonl")
SPLITS = ("train", "validation", "gold")  # every prompt that is not in test; PPO sees no ranking of them


def main() -> None:
    with stage_run("ppo", deps=[BASE, SFT_MODEL, *REWARD_FOLDERS.values(), PREPARED]) as run:
        config = run.params.ppo
        require_watched(run, "ppo.start", config.start)
        tokenizer = load_tokenizer(BASE)
        records = load_prepared(PREPARED, "prompts", SPLITS)
        prompts = [encode_prompt(tokenizer, record.prompt, run.params.prepare.system) for record in records]
        run.log_dataset("prepared", PREPARED, prompts=len(prompts))
        torch.manual_seed(config.seed)
        roles = Roles(SFT_MODEL, config)
        add_roles(
            roles,
            REWARD_FOLDERS["reward"],
            method=config.method,
            start=config.start,
            cost_axis=config.cost_axis,
            value_network=config.value_network,
        )
        if config.watch_every:  # nothing is learnt from what it says
            load_ensemble(roles, GOLD, REWARD_FOLDERS["gold"])
        score = judge_score(run, roles, records, prompts, tokenizer) if config.reward == "judge" else None
        final, shown = train_ppo(
            roles, prompts, config, tokenizer=tokenizer, tracker=run, checkpoints=run.checkpoints, score=score
        )
        if run.main:
            roles.save(POLICY, POLICY_FOLDER)
            roles.save(VALUE, VALUE_FOLDER)
            write_jsonl(SAMPLES, shown)
        if score is not None and score.judge is not None and (counts := counts_of(score.judge)):
            run.metrics(counts, step=config.updates)
        run.finish_metrics(final)
        run.register_model("policy", POLICY_FOLDER, final)


def judge_score(
    run: StageRun,
    roles: Roles,
    records: Sequence[Prompt],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> JudgeScore:
    """The judge of section judge in the reward model's place, once it has shown that it judges well enough.

    Args:
        records, prompts: what may be asked, and the token ids of each.

    Raises:
        RLHFError: there is no such judge, DVC would not see its weights change, or it misses the bar.
    """
    params, judge = run.params, None
    if params.judge.kind in ("local", "reward"):
        require_watched(run, "judge.model", params.judge.model)
    if run.main:
        judge = open_judge(
            params.judge, params.prepare, memory=record_folder() / "judge.db", tracker=ProgressTracker("judge")
        )
        if params.judge.bar > 0:
            known = load_prepared(PREPARED, "rankings", ["test"])
            found = admit(judge, known, params.judge, anyway=how_to_set("judge", "bar", "0")).agreement
            print(f"ppo      the judge {judge.name} agrees with {found.mean:.1%} of known answers", flush=True)
    by_ids = {tuple(ids): record.prompt for ids, record in zip(prompts, records, strict=True)}
    tokens = params.ppo.response_tokens
    return JudgeScore(judge, roles, by_ids, tokenizer=tokenizer, max_tokens=tokens)


if __name__ == "__main__":
    main()
