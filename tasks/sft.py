"""Stage sft: the supervised fine-tuned policy. How it learns is in rlhf_core/sft.py."""

import torch

from rlhf_core.mixing import load_demonstrations
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.sft import POLICY, encode_demonstrations, train_sft
from tasks.prepare import BASE, PREPARED
from tasks.stage import require_watched, stage_run

MODEL = "artifacts/sft/model"


def main() -> None:
    with stage_run("sft", deps=[BASE, PREPARED]) as run:
        config, prepare = run.params.sft, run.params.prepare
        require_watched(run, "sft.feedback", config.feedback)
        tokenizer = load_tokenizer(BASE)
        records = load_demonstrations(config, PREPARED)
        train, validation = (
            encode_demonstrations(
                of_split, tokenizer, system=prepare.system, max_response_tokens=prepare.max_response_tokens
            )
            for of_split in records.values()
        )
        run.log_dataset("prepared", PREPARED, demonstrations=len(train))
        torch.manual_seed(config.seed)
        roles = Roles(BASE, config)
        roles.add(POLICY, method=config.method)
        final = train_sft(
            roles,
            train,
            validation,
            config,
            pad_id=int(tokenizer.pad_token_id),
            tracker=run,
            checkpoints=run.checkpoints,
        )
        if run.main:
            roles.save(POLICY, MODEL)
        run.finish_metrics(final)
        run.register_model("sft", MODEL, final)


if __name__ == "__main__":
    main()
