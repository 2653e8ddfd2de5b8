"""Stage prepare: the base model and the checked, split data. The learning's side of it is rlhf_core/data.py."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.base import fetch_base
from rlhf_core.data import SPLITS, prepare, summarise, write_prepared
from rlhf_core.errors import ConfigError
from rlhf_core.models import context_length, load_tokenizer
from tasks.stage import StageRun, stage_run

BASE, PREPARED = Path("artifacts/base"), Path("data/prepared")


def main() -> None:
    with stage_run("prepare") as run:
        if not run.main:  # of several processes one is enough
            return
        config = run.params.prepare
        run.progress(0, 3, unit="steps", note="base model")
        sources = sorted({*config.demonstrations, *config.rankings, *config.prompts})
        _refuse_unwatched(sources, run)
        fetch_base(config.base, BASE)
        run.progress(1, 3, unit="steps", note="data")
        tokenizer = load_tokenizer(BASE)
        prepared = prepare(config, tokenizer, context_length(BASE))
        shutil.rmtree(PREPARED, ignore_errors=True)
        write_prepared(prepared, PREPARED)
        run.progress(2, 3, unit="steps", note="summary")
        summary = summarise(prepared, tokenizer, config.system)
        for split in SPLITS:
            kept = summary[split]
            print(
                f"prepare  {split:<10} {kept['prompts']:>5} prompts  {kept['demonstrations']:>5} demonstrations  "
                f"{kept['rankings']:>5} rankings",
                flush=True,
            )
        run.finish_metrics(summary)
        for source in sources:
            if Path(source).is_file():
                run.log_dataset(Path(source).stem, source, context="source")
        run.progress(3, 3, unit="steps")


def _refuse_unwatched(sources: Sequence[str], run: StageRun) -> None:
    """A file that DVC does not watch could change, and nothing would be run again."""
    for source in sources:
        if not source.startswith("hub:") and not run.is_dependency(source):
            raise ConfigError(
                f"{source} is none of the deps of stage prepare in dvc.yaml, so DVC would not see it change. "
                f"Add a line `- {source}` there."
            )


if __name__ == "__main__":
    main()
