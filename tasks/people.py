"""Stage people: what people said of two policies' held-out answers, beside the gold model. See rlhf_core/people.py.

It asks nobody: `rlhf people` does (flows/people.py), and leaves judgements in data/people. Those of other answers than
stage evaluate's present ones count nothing. Where there are none, it says so and is done.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_core.data import parse_prompt, read_rows
from rlhf_core.errors import DataError
from rlhf_core.gate import Pair, pair_answers
from rlhf_core.people import in_report, people_beside_gold
from tasks.stage import stage_run, write_text

FOLDER = Path("artifacts/people")
ANSWERS, REPORT = Path("artifacts/evaluate/answers.jsonl"), Path("artifacts/evaluate/report.html")
SAID = Path("data/people")  # one file of JSON lines for each two policies
NAMES = {"base": "the base model", "sft": "SFT", "ppo": "PPO", "dpo": "DPO"}


def main() -> None:
    with stage_run("people", deps=[ANSWERS, REPORT], torch=False) as run:
        if not run.main:  # of several processes one is enough
            return
        config = run.params.people
        new, current = config.policies
        pairs = pairs_of(ANSWERS, new, current)
        said = [row for file in sorted(SAID.glob("*.jsonl")) for row in read_said(file)]
        people = people_beside_gold(_once(said, new, current), pairs, config)
        run.log_dataset("people", SAID, context="evaluation", judgements=len(said))
        if people is None:
            text = f"Nobody has compared these answers of {NAMES[new]} and {NAMES[current]}. `rlhf people` asks."
            write_text(FOLDER / "people.md", text + "\n")
            run.finish_metrics({"judgements": 0})
            print(f"people   nobody has compared {new} with {current}", flush=True)
            return
        page = in_report(REPORT.read_text(encoding="utf-8"), people, NAMES[new], NAMES[current])
        write_text(FOLDER / "report.html", page)
        write_text(FOLDER / "people.md", "\n".join(people.lines(NAMES[new])) + "\n")
        run.finish_metrics(people.metrics())
        print(f"people   {people.judgements} of {len(said)} judgements are of these answers", flush=True)


def _once(said: Iterable[dict[str, Any]], new: str, current: str) -> list[dict[str, Any]]:
    """Judgements of these two policies, each annotator's of a pair once, the last: files may have been put together."""
    found = {
        (row["annotator"], parse_prompt(row).prompt, *row["responses"]): row
        for row in said
        if row.get("policies", [new, current]) == [new, current]
    }
    return list(found.values())


def pairs_of(answers: Path, new: str, current: str) -> list[Pair]:
    """Every sampled answer of one policy beside every one of the other to its prompt.

    Raises:
        DataError: one of them has none.
    """
    rows = [row for _, row in read_rows(str(answers))]
    sampled = {row["policy"] for row in rows if row["how"] == "sampled"}
    if missing := {new, current} - sampled:
        raise DataError(
            f"people.policies names {', '.join(sorted(missing))}, but {answers} has sampled answers of "
            f"{', '.join(sorted(sampled)) or 'nobody'}. Name two of these, such as -S people.policies=[ppo,sft]"
        )
    return pair_answers(rows, rows, new, current)


def read_said(file: Path) -> list[dict[str, Any]]:
    """Judgements of two responses each.

    Raises:
        DataError: names the first row that is none.
    """
    found = []
    for line, row in read_rows(str(file)):
        try:
            parse_prompt(row)
            texts, ranks = row.get("responses"), row.get("ranks")
            good = all(isinstance(part, list) and len(part) == 2 for part in (texts, ranks))
            good = good and all(isinstance(text, str) for text in texts) and all(type(rank) is int for rank in ranks)
            if not good or not isinstance(row.get("annotator"), str):
                raise DataError("expected two responses as texts, two ranks as integers, and an annotator")
        except DataError as error:
            raise DataError(f"{file}, line {line}: {error}. `rlhf people` writes such files.") from error
        found.append(row)
    return found


if __name__ == "__main__":
    main()
