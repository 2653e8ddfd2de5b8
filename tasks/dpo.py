"""Stage dpo: a baseline beside PPO, trained on the rankings of stage reward. How it learns is in rlhf_core/dpo.py.

With `dpo.epochs: 0` there is none: the stage leaves a note in its folder, and what comes after leaves DPO out.
"""

from pathlib import Path

import torch

from rlhf_core.dpo import POLICY, encode_preferences, train_dpo
from rlhf_core.mixing import SPLITS, load_rankings
from rlhf_core.models import Roles, load_tokenizer
from tasks.prepare import BASE, PREPARED
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import StageRun, require_watched, stage_run, write_json

POLICY_FOLDER = "artifacts/dpo/policy"
NO_POLICY = Path(POLICY_FOLDER) / "none.json"  # a folder without a file would be lost on its way through DVC


def main() -> None:
    with stage_run("dpo", deps=[BASE, SFT_MODEL, PREPARED]) as run:
        if run.params.dpo.epochs:
            _train(run)
        else:
            if run.main:
                write_json(NO_POLICY, {"dpo.epochs": 0})
            run.finish_metrics({"steps": 0})
            print("dpo.epochs is 0: this run has no DPO policy.", flush=True)


def _train(run: StageRun) -> None:
    config, prepare = run.params.dpo, run.params.prepare
    tokenizer = load_tokenizer(BASE)
    require_watched(run, "reward.feedback", run.params.reward.feedback)
    records = load_rankings(run.params.reward, PREPARED, SPLITS)
    train, validation = (
        encode_preferences(
            records[split],
            tokenizer,
            system=prepare.system,
            max_response_tokens=prepare.max_response_tokens,
        )
        for split in SPLITS
    )
    run.log_dataset("prepared", PREPARED, rankings=len(train))
    torch.manual_seed(config.seed)
    roles = Roles(SFT_MODEL, config)
    roles.add(POLICY, method=config.method)
    final = train_dpo(
        roles, train, validation, config,
        pad_id=int(tokenizer.pad_token_id), tracker=run, checkpoints=run.checkpoints,
    )  # fmt: skip
    if run.main:
        roles.save(POLICY, POLICY_FOLDER)
    run.finish_metrics(final)
    run.register_model("dpo", POLICY_FOLDER, final)


if __name__ == "__main__":
    main()
