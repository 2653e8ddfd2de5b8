"""Data is read in every format, checked row by row, split by prompt, and turned into the ids that a model sees."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_core.config import Prepare
from rlhf_core.data import (
    SPLITS,
    BadField,
    Prepared,
    encode_prompt,
    encode_response,
    load_prepared,
    parse_demonstration,
    parse_prompt,
    parse_ranking,
    prepare,
    read_rows,
    render_prompt,
    split_of,
    summarise,
    write_prepared,
)
from rlhf_core.errors import ConfigError, DataError, MissingArtifact
from rlhf_core.records import Demonstration, Prompt, Ranking
from rlhf_core.tiny import CHAT_TEMPLATE, make_tokenizer

PROJECT = Path(__file__).resolve().parents[1]
STARTER = PROJECT / "data" / "starter"
REAL_PAIRS = PROJECT.parent / "shared" / "data" / "hh-harmless" / "pairs.jsonl.gz"

HI = (("user", "hi"),)
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant: {}"


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def demonstrations(count: int, *, word: str = "question") -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {index}", "response": f"answer {index}"} for index in range(count)]


def rankings(count: int, *, word: str = "question") -> list[dict[str, Any]]:
    return [
        {"prompt": f"{word} {index}", "responses": [f"good {index}", f"bad {index}"], "ranks": [1, 2]}
        for index in range(count)
    ]


@pytest.fixture
def config(section: Callable[..., Any], tmp_path: Path) -> Callable[..., Prepare]:
    """A prepare section over files with 60 good rows each; keywords replace what they name."""

    def build(**changes: Any) -> Prepare:
        sources = {
            "demonstrations": [write_lines(tmp_path / "demonstrations.jsonl", demonstrations(60))],
            "rankings": [write_lines(tmp_path / "rankings.jsonl", rankings(60))],
        }
        return section("prepare", **{**sources, **changes})

    return build


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_json_lines_keep_their_line_numbers_over_blank_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "é"}, "", "{broken", {"prompt": "b"}])
    assert list(read_rows(path)) == [(1, {"prompt": "é"}), (3, "{broken"), (4, {"prompt": "b"})]


def test_a_line_that_json_chokes_on_comes_as_its_text(tmp_path: Path) -> None:
    deep, huge = "[" * 100_000, '{"prompt": ' + "1" * 5000 + "}"
    path = write_lines(tmp_path / "rows.jsonl", [deep, huge, {"prompt": "b"}])
    assert list(read_rows(path)) == [(1, deep), (2, huge), (3, {"prompt": "b"})]


def test_gzip_reads_as_the_plain_file(tmp_path: Path) -> None:
    rows = demonstrations(3)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    plain = write_lines(tmp_path / "rows.jsonl", rows)
    assert list(read_rows(str(tmp_path / "rows.jsonl.gz"))) == list(read_rows(plain))


@pytest.mark.parametrize(("source", "split"), [("hub:org/name@v1", "train"), ("hub:org/name@v1:test[:2]", "test[:2]")])
def test_the_hub_is_asked_for_the_revision_and_split_that_are_named(
    monkeypatch: pytest.MonkeyPatch, source: str, split: str
) -> None:
    asked = []

    def load_dataset(*names: str, **options: str) -> list[dict[str, Any]]:
        asked.append((names, options))
        return demonstrations(2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows(source)) == list(enumerate(demonstrations(2), start=1))
    assert asked == [(("org/name",), {"revision": "v1", "split": split})]


@pytest.mark.parametrize("error", [ConnectionError, ValueError])  # not reached; no such split
def test_a_data_set_that_the_hub_does_not_give_is_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def load_dataset(*_: str, **__: str) -> None:
        raise error("Couldn't reach it.\nDetails.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(MissingArtifact) as missing:
        list(read_rows("hub:org/name@v1"))
    assert str(missing.value) == (
        "Data set hub:org/name@v1 cannot be loaded: Couldn't reach it. Run with HF_HUB_OFFLINE=0 to allow a download, "
        "or name a file in params.yaml's section prepare."
    )


def test_a_data_set_of_the_hub_has_to_name_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigError, match=r"hub:org/name:test names no revision, .* expected hub:NAME@REVISION"):
        list(read_rows("hub:org/name:test"))


def test_parquet_reads_as_the_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    datasets.disable_progress_bars()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    rows = [
        {"prompt": chat, "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "source": "human"},
        {"prompt": chat[1:], "responses": ["d", "e"], "ranks": [1, 2], "source": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = list(read_rows(str(tmp_path / "rows.parquet")))
    assert [line for line, _ in found] == [1, 2]
    assert [parse_ranking(row) for _, row in found] == [parse_ranking(row) for row in rows]
    assert parse_ranking(found[0][1]).prompt == (("system", "Be brief."), ("user", "hi"))


def test_a_file_of_another_kind_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,response\n")
    with pytest.raises(DataError, match=r"rows\.csv ends in '\.csv'; expected \.jsonl, \.jsonl\.gz or \.parquet"):
        list(read_rows(str(tmp_path / "rows.csv")))
    with pytest.raises(MissingArtifact, match=r"Data file nowhere\.jsonl is not there\. Mend the path in params\.yaml"):
        list(read_rows("nowhere.jsonl"))


# ---- one row ---------------------------------------------------------------------------------------------------------


def test_a_demonstration_with_a_text_or_a_chat_prompt() -> None:
    chat = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": " and? "},
    ]
    assert parse_demonstration({"prompt": " hi ", "response": " hello ", "category": "chat"}) == Demonstration(
        HI, "hello", "chat"
    )
    assert parse_demonstration({"prompt": chat, "response": "hello"}).prompt == (
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "yes?"),
        ("user", "and?"),
    )


def test_a_prompt_with_and_without_its_kind() -> None:
    assert parse_prompt({"prompt": "hi"}) == Prompt(HI, "")
    assert parse_prompt({"prompt": "hi", "category": "chat", "more": 1}) == Prompt(HI, "chat")


def test_a_ranking_with_all_that_it_may_say() -> None:
    row = {
        "prompt": "hi",
        "responses": ["a", "b", "c"],
        "ranks": [2, 1, 2],
        "scores": {"helpfulness": [1, 5.5, 1]},
        "source": "ai",
        "annotator": "first",
        "category": "chat",
    }
    assert parse_ranking(row) == Ranking(
        HI, ("a", "b", "c"), (2, 1, 2), None, {"helpfulness": [1, 5.5, 1]}, "ai", "first", "chat"
    )
    assert parse_ranking({"prompt": "hi", "responses": ["a", "b"], "ranks": [1, 2]}) == Ranking(HI, ("a", "b"), (1, 2))


def test_a_pair_is_a_ranking_of_two() -> None:
    pair = {"prompt": "hi", "chosen": "a ", "rejected": " b", "margin": 0.5, "source": "human"}
    assert parse_ranking(pair) == Ranking(HI, ("a", "b"), (1, 2), 0.5, source="human")
    assert parse_ranking({**pair, "margin": None}).margin is None


def test_hh_dialogues_become_their_prompt_and_their_last_turns() -> None:
    found = parse_ranking({"chosen": HH.format("yes. "), "rejected": HH.format("no\n\nreally")})
    assert found.prompt == (("user", "hi"), ("assistant", "hello"), ("user", "and?"))
    assert found.responses == ("yes.", "no\n\nreally")
    assert found.ranks == (1, 2)


def bad(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, **fields}


PROMPT_EXPECTED = "a text that is not empty, or chat messages with role and content"
TEXT_EXPECTED = "a text that is not empty"
DIALOGUE_EXPECTED = "a dialogue from '\\n\\nHuman: ' to a last '\\n\\nAssistant: ' turn"
HALF = "found half a character, '\\ud83d', after 3 whole ones, expected whole characters alone"
BAD_DEMONSTRATIONS = [
    ("{broken", "row: found '{broken', expected one JSON object a line"),
    ([1], "row: found [1], expected one JSON object a line"),
    ({"response": "x"}, f"prompt: found nothing, expected {PROMPT_EXPECTED}"),
    (bad(" ", response="x"), f"prompt: found ' ', expected {PROMPT_EXPECTED}"),
    (bad(3, response="x"), f"prompt: found 3, expected {PROMPT_EXPECTED}"),
    (bad([], response="x"), f"prompt: found [], expected {PROMPT_EXPECTED}"),
    (
        bad([{"role": "tool", "content": "x"}], response="x"),
        f"prompt: found [{{'role': 'tool', 'content': 'x'}}], expected {PROMPT_EXPECTED}",
    ),
    (
        bad([{"role": "user", "content": " "}], response="x"),
        f"prompt: found [{{'role': 'user', 'content': ' '}}], expected {PROMPT_EXPECTED}",
    ),
    (bad([{"role": "user"}], response="x"), f"prompt: found [{{'role': 'user'}}], expected {PROMPT_EXPECTED}"),
    (
        bad([{"role": "assistant", "content": "x"}], response="x"),
        "prompt: found a last message by assistant, expected the last message by user",
    ),
    (bad(), f"response: found nothing, expected {TEXT_EXPECTED}"),
    (bad(response=None), f"response: found nothing, expected {TEXT_EXPECTED}"),
    (bad(response="\n "), f"response: found '\\n ', expected {TEXT_EXPECTED}"),
    (bad(response=7), f"response: found 7, expected {TEXT_EXPECTED}"),
    (bad("x" * 200), f"response: found nothing, expected {TEXT_EXPECTED}"),
    (bad(response="hi \ud83d"), f"response: {HALF}"),
    (bad("hi \ud83d", response="x"), f"prompt: {HALF}"),
    (bad([{"role": "user", "content": "hi \ud83d"}], response="x"), f"prompt: {HALF}"),
    (bad(response="x", category="hi \ud83d"), f"category: {HALF}"),
]
BAD_RANKINGS = [
    ({}, "row: found fields none, expected responses and ranks, or chosen and rejected"),
    (bad(chosen="a"), "row: found fields chosen, prompt, expected responses and ranks, or chosen and rejected"),
    (bad(responses=["a"], ranks=[1]), "responses: found ['a'], expected a list of two texts or more"),
    (bad(responses="ab", ranks=[1, 2]), "responses: found 'ab', expected a list of two texts or more"),
    (bad(responses=["a", " "], ranks=[1, 2]), "responses[1]: found ' ', expected a text that is not empty"),
    (bad(responses=["a", None], ranks=[1, 2]), "responses[1]: found nothing, expected a text that is not empty"),
    (bad(responses=["a", "b"]), "ranks: found nothing, expected 2 whole numbers from 1, one a response"),
    (bad(responses=["a", "b"], ranks=[1]), "ranks: found [1], expected 2 whole numbers from 1, one a response"),
    (bad(responses=["a", "b"], ranks=[0, 1]), "ranks: found [0, 1], expected 2 whole numbers from 1, one a response"),
    (
        bad(responses=["a", "b"], ranks=[True, 2]),
        "ranks: found [True, 2], expected 2 whole numbers from 1, one a response",
    ),
    (
        bad(responses=["a", "b"], ranks=[1, 2.5]),
        "ranks: found [1, 2.5], expected 2 whole numbers from 1, one a response",
    ),
    (
        bad(responses=["a", "b"], ranks=[1, 2], scores={"truth": [1]}),
        "scores.truth: found [1], expected 2 numbers, one a response",
    ),
    (
        bad(responses=["a", "b"], ranks=[1, 2], scores={"truth": [1, "2"]}),
        "scores.truth: found [1, '2'], expected 2 numbers, one a response",
    ),
    (
        bad(responses=["a", "b"], ranks=[1, 2], scores=[1, 2]),
        "scores: found [1, 2], expected lists of numbers by axis, such as {helpfulness: [4, 2]}",
    ),
    (bad(responses=["a", "b"], ranks=[1, 2], margin="1"), "margin: found '1', expected a number"),
    (bad(chosen="a", rejected="b", margin="1"), "margin: found '1', expected a number"),
    (bad(chosen="a", rejected="b", margin=float("nan")), "margin: found nan, expected a number"),
    (bad(chosen="a", rejected="b", margin=float("-inf")), "margin: found -inf, expected a number"),
    (bad(chosen="a", rejected="b", margin=10**309), f"margin: found 1{'0' * 309}, expected a number"),
    (
        bad(responses=["a", "b"], ranks=[1, 2], scores={"truth": [1, float("nan")]}),
        "scores.truth: found [1, nan], expected 2 numbers, one a response",
    ),
    (bad(chosen="a", rejected=""), f"rejected: found '', expected {TEXT_EXPECTED}"),
    (bad("", chosen="a", rejected="b"), f"prompt: found '', expected {PROMPT_EXPECTED}"),
    ({"chosen": "a", "rejected": "b"}, f"chosen: found 'a', expected {DIALOGUE_EXPECTED}"),
    (
        {"chosen": HH.format("a"), "rejected": "\n\nHuman: other\n\nAssistant: b"},
        "rejected: found another dialogue before its last turn than chosen's, expected the same one",
    ),
    (
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": HH.format("a")},
        "chosen: found two turns in a row by one speaker, expected turns by Human and Assistant that alternate",
    ),
    (
        {"chosen": HH.format(""), "rejected": HH.format("a")},
        "chosen: found an empty turn, expected turns that are not empty",
    ),
    (
        {"chosen": "\n\nHuman: a", "rejected": HH.format("a")},
        f"chosen: found '\\n\\nHuman: a', expected {DIALOGUE_EXPECTED}",
    ),
    (bad(responses=["a", "hi \ud83d"], ranks=[1, 2]), f"responses[1]: {HALF}"),
    (bad(responses=["a", "b"], ranks=[1, 2], scores={"hi \ud83d": [1, 2]}), f"scores: {HALF}"),
    (bad(chosen="hi \ud83d", rejected="b"), f"chosen: {HALF}"),
    (bad(chosen="a", rejected="b", annotator="hi \ud83d"), f"annotator: {HALF}"),
]  # fmt: skip


def messages_of(error: DataError) -> list[str]:
    return [line.strip() for line in str(error).splitlines()]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        *(("demonstrations", row, message) for row, message in BAD_DEMONSTRATIONS),
        *(("rankings", row, message) for row, message in BAD_RANKINGS),
        ("prompts", {"prompt": ["x"]}, f"prompt: found ['x'], expected {PROMPT_EXPECTED}"),
    ],
)
def test_a_bad_row_is_named_with_file_line_field_found_and_expected(
    config: Callable[..., Prepare],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    kind: str,
    row: Any,
    message: str,
) -> None:
    good = demonstrations(1) if kind != "rankings" else rankings(1)
    source = write_lines(tmp_path / "bad.jsonl", [*good, row])
    with pytest.raises(DataError) as error:
        prepare(config(**{kind: [source]}), tokenizer, 256)
    assert messages_of(error.value) == [
        "1 bad row:",
        f"{source}, line 2, {message}",
        "Mend them, or set them aside: `rlhf run -S prepare.on_bad_row=quarantine`.",
    ]


def test_a_long_finding_is_shortened() -> None:
    with pytest.raises(Exception, match="prompt") as error:
        parse_prompt({"prompt": {"x": "y" * 200}})
    assert error.value.args[1] == "{'x': '" + "y" * 70 + "..."


def test_the_first_ten_bad_rows_are_shown_and_all_are_counted(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "bad.jsonl", [{"prompt": f"p {n}"} for n in range(8)])
    other = write_lines(tmp_path / "worse.jsonl", [{"prompt": f"p {n}"} for n in range(5)])
    with pytest.raises(DataError) as error:
        prepare(config(demonstrations=[source], rankings=[other]), tokenizer, 256)
    lines = messages_of(error.value)
    assert lines[0] == "13 bad rows:"
    assert len(lines) == 1 + 10 + 1 + 1
    assert lines[8].startswith(f"{source}, line 8, ")
    assert lines[10].startswith(f"{other}, line 2, ")
    assert lines[11] == "..."


def test_quarantine_sets_bad_rows_aside_and_counts_them(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "mixed.jsonl", [*demonstrations(60), {"prompt": "no answer"}, "{broken"])
    prepared = prepare(config(demonstrations=[source], on_bad_row="quarantine"), tokenizer, 256)
    assert sum(map(len, prepared.demonstrations.values())) == 60
    assert summarise(prepared, tokenizer, "")["bad_rows"] == 2
    write_prepared(prepared, tmp_path / "out")
    kept = [row for _, row in read_rows(str(tmp_path / "out" / "quarantine.jsonl"))]
    assert [(row["line"], row["field"], row["row"]) for row in kept] == [
        (61, "response", {"prompt": "no answer"}),
        (62, "row", "{broken"),
    ]


def test_quarantine_takes_what_json_or_utf_8_cannot_hold(
    config: Callable[..., Prepare],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    datasets.disable_progress_bars()
    columns = [{"prompt": "ü", "response": "", "when": datetime(2024, 5, 1), "raw": b"\xff"}]
    datasets.Dataset.from_list(columns).to_parquet(str(tmp_path / "rows.parquet"))
    halves = write_lines(tmp_path / "halves.jsonl", [{"prompt": "x", "response": "hi \ud83d"}])
    sources = [*config().demonstrations, str(tmp_path / "rows.parquet"), halves]
    prepared = prepare(config(demonstrations=sources, on_bad_row="quarantine"), tokenizer, 256)
    write_prepared(prepared, tmp_path / "out")
    kept = [row["row"] for _, row in read_rows(str(tmp_path / "out" / "quarantine.jsonl"))]
    assert kept == [
        {"prompt": "ü", "response": "", "when": "2024-05-01 00:00:00", "raw": "b'\\xff'"},
        {"prompt": "x", "response": "hi \ud83d"},
    ]


# ---- a whole data set ------------------------------------------------------------------------------------------------


def everything(prepared: Prepared, kind: str) -> list[Any]:
    return [record for split in SPLITS for record in getattr(prepared, kind)[split]]


def test_prompts_of_demonstrations_and_rankings_are_added_to_the_prompts(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "question 0", "category": "kind"}, {"prompt": "alone"}])
    ranked = write_lines(tmp_path / "ranked.jsonl", [*rankings(60), *rankings(5, word="other")])
    prepared = prepare(config(prompts=[own], rankings=[ranked]), tokenizer, 256)
    texts = {record.prompt[0][1] for record in everything(prepared, "prompts")}
    assert texts == {f"question {n}" for n in range(60)} | {f"other {n}" for n in range(5)} | {"alone"}
    # the kind told in one file holds for the prompt wherever it stands
    for kind in ("demonstrations", "rankings", "prompts"):
        kinds = {record.prompt[0][1]: record.category for record in everything(prepared, kind)}
        assert kinds["question 0"] == "kind"
        assert kinds["question 1"] == ""


def test_rows_that_differ_in_case_and_spacing_alone_count_as_one(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    doubled = {"prompt": "Question  0", "response": "ANSWER 0"}
    other = {"prompt": "question 0", "response": "another answer"}
    turned = {"prompt": "question 1", "responses": ["bad 1", "good 1"], "ranks": [2, 1]}
    disagrees = {"prompt": "question 1", "responses": ["bad 1", "good 1"], "ranks": [1, 2]}
    second = {**turned, "annotator": "second"}
    shown = write_lines(tmp_path / "shown.jsonl", [*demonstrations(60), doubled, other])
    ranked = write_lines(tmp_path / "ranked.jsonl", [*rankings(60), turned, disagrees, second])
    prepared = prepare(config(demonstrations=[shown], rankings=[ranked]), tokenizer, 256)
    assert prepared.duplicates == 2
    assert summarise(prepared, tokenizer, "")["duplicates"] == 2
    answers = [r.response for r in everything(prepared, "demonstrations") if r.prompt[0][1].lower() == "question 0"]
    assert sorted(answers) == ["another answer", "answer 0"]  # the first of the two stays
    kept = [record for record in everything(prepared, "rankings") if record.prompt[0][1] == "question 1"]
    assert [(record.responses[0], record.ranks, record.annotator) for record in kept] == [
        ("good 1", (1, 2), ""),  # the first of the two that say the same
        ("bad 1", (1, 2), ""),
        ("bad 1", (2, 1), "second"),
    ]


def test_a_split_whose_rankings_are_all_ties_is_refused(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [row if split_of((("user", row["prompt"]),), config()) != "gold" else {**row, "ranks": [1, 1]}
            for row in rankings(60)]  # fmt: skip
    ranked = write_lines(tmp_path / "ranked.jsonl", rows)
    shown = write_lines(tmp_path / "shown.jsonl", demonstrations(60))
    with pytest.raises(DataError, match="rankings of split gold are ties"):
        prepare(config(demonstrations=[shown], rankings=[ranked]), tokenizer, 256)


def test_no_prompt_is_in_two_splits_and_all_kinds_agree(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast
) -> None:
    prepared = prepare(config(), tokenizer, 256)
    places = {
        split: {
            record.prompt
            for kind in ("demonstrations", "rankings", "prompts")
            for record in getattr(prepared, kind)[split]
        }
        for split in SPLITS
    }
    assert sum(map(len, places.values())) == 60
    for left, right in combinations(SPLITS, 2):
        assert not places[left] & places[right]


def test_prompts_that_differ_in_case_and_spacing_alone_share_a_split(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # They count as one prompt above; a split for each would put what is held out into training.
    rows = demonstrations(60) + [{"prompt": f"QUESTION  {n}", "response": f"other {n}"} for n in range(60)]
    prepared = prepare(config(demonstrations=[write_lines(tmp_path / "both.jsonl", rows)]), tokenizer, 256)
    places: dict[str, set[str]] = {}
    for split in SPLITS:
        for record in prepared.demonstrations[split]:
            places.setdefault(" ".join(record.prompt[0][1].lower().split()), set()).add(split)
    assert [name for name, splits in places.items() if len(splits) > 1] == []


def test_adding_rows_moves_none(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = prepare(config(), tokenizer, 256)
    more = write_lines(tmp_path / "more.jsonl", demonstrations(40, word="new") + demonstrations(60))
    after = prepare(config(demonstrations=[more]), tokenizer, 256)
    for split in SPLITS:
        assert set(before.demonstrations[split]) <= set(after.demonstrations[split])
        assert set(before.rankings[split]) == set(after.rankings[split])


def test_of_too_many_prompts_some_stay_with_all_their_rows_in_their_splits(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    twice = write_lines(tmp_path / "twice.jsonl", [*rankings(60), *({**row, "ranks": [2, 1]} for row in rankings(60))])
    whole = prepare(config(rankings=[twice]), tokenizer, 256)
    some, more = (prepare(config(rankings=[twice], max_prompts=count), tokenizer, 256) for count in (30, 40))
    for kind, each in (("prompts", 1), ("demonstrations", 1), ("rankings", 2)):
        assert sum(map(len, getattr(some, kind).values())) == 30 * each
        for split in SPLITS:
            kept = getattr(some, kind)[split]
            assert kept == [record for record in getattr(whole, kind)[split] if record in kept]
            assert set(kept) <= set(getattr(more, kind)[split])
    # Chosen by the bytes that tell the split, all would lie in the split that comes first.
    assert all(some.prompts[split] for split in SPLITS)


def test_splits_have_the_shares_asked_for(section: Callable[..., Any]) -> None:
    config = section("prepare", test_fraction=0.2, gold_fraction=0.25, validation_fraction=0.1)
    counts = Counter(split_of((("user", f"prompt {n}"),), config) for n in range(4000))
    # four standard deviations of a binomial share of 4,000 are at most 0.03
    for split, share in {"test": 0.2, "gold": 0.25, "validation": 0.1, "train": 0.45}.items():
        assert counts[split] / 4000 == pytest.approx(share, abs=0.03)


def test_the_split_of_a_prompt_never_changes(section: Callable[..., Any]) -> None:
    # sha256 of '[["user", "hi"]]' begins with 0x17d1…, so place 0.093
    import hashlib

    place = int(hashlib.sha256(b'[["user", "hi"]]').hexdigest()[:16], 16) / 16**16
    shares = {"gold_fraction": 1e-6, "validation_fraction": 0}
    assert split_of(HI, section("prepare", test_fraction=place + 1e-6, **shares)) == "test"
    assert split_of(HI, section("prepare", test_fraction=place - 1e-5, **shares)) == "train"


def test_a_larger_test_share_keeps_what_was_in_test(section: Callable[..., Any]) -> None:
    small, large = section("prepare", test_fraction=0.1), section("prepare", test_fraction=0.3)
    prompts = [(("user", f"prompt {n}"),) for n in range(300)]
    held = [prompt for prompt in prompts if split_of(prompt, small) == "test"]
    assert held
    assert all(split_of(prompt, large) == "test" for prompt in held)


@pytest.mark.parametrize(
    ("split", "kind", "fraction", "share", "advice"),
    [
        ("train", "demonstrations", "test_fraction", 0.6 - 1e-9, "lower prepare.test_fraction, which is 0.6"),
        ("train", "demonstrations", "gold_fraction", 0.6 - 1e-9, "lower prepare.gold_fraction, which is 0.6"),
        ("validation", "demonstrations", "validation_fraction", 0, "raise prepare.validation_fraction, which is 0"),
        ("test", "demonstrations", "test_fraction", 1e-9, "raise prepare.test_fraction, which is 1e-09"),
        ("gold", "rankings", "gold_fraction", 1e-9, "raise prepare.gold_fraction, which is 1e-09"),
    ],
)
def test_an_empty_split_names_its_kind_and_the_share_to_change(
    config: Callable[..., Prepare],
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    kind: str,
    fraction: str,
    share: float,
    advice: str,
) -> None:
    with pytest.raises(DataError) as error:
        prepare(config(**{fraction: share}), tokenizer, 256)
    assert str(error.value).startswith(f"Split {split} of {kind} is empty (found {{'train': ")
    assert str(error.value).endswith(f"). Add rows, or {advice}: `rlhf run -S prepare.{fraction}=SHARE`.")
    assert fraction in Prepare.model_fields


def test_a_prompt_may_be_as_long_as_the_limit_and_no_longer(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    length = max(len(encode_prompt(tokenizer, (("user", f"question {n}"),), "")) for n in range(60))
    prepare(config(max_prompt_tokens=length), tokenizer, 256)
    with pytest.raises(DataError, match=rf"found {length} tokens, expected {length - 1} at most"):
        prepare(config(max_prompt_tokens=length - 1), tokenizer, 256)
    # the model's context less the response's tokens is a limit too
    prepare(config(max_response_tokens=10), tokenizer, length + 10)
    with pytest.raises(DataError, match=rf"found {length} tokens, expected {length - 1} at most"):
        prepare(config(max_response_tokens=11), tokenizer, length + 10)


def test_what_is_written_is_what_is_loaded(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ünïcode\n\nhere"}]
    ranked = {"prompt": chat, "responses": ["a", "b"], "ranks": [1, 1], "scores": {"x": [1, 2]}, "annotator": "me"}
    source = write_lines(tmp_path / "ranked.jsonl", [*rankings(60), ranked])
    prepared = prepare(config(rankings=[source]), tokenizer, 256)
    write_prepared(prepared, tmp_path / "out")
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    for kind in ("demonstrations", "rankings", "prompts"):
        for split in SPLITS:
            assert load_prepared(tmp_path / "out", kind, [split]) == getattr(prepared, kind)[split]
    both = load_prepared(tmp_path / "out", "rankings", ["train", "gold"])
    assert both == prepared.rankings["train"] + prepared.rankings["gold"]


def test_a_margin_survives_writing_and_loading(
    config: Callable[..., Prepare], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pair = {"prompt": "pair", "chosen": "a", "rejected": "b", "margin": 0.5}
    source = write_lines(tmp_path / "pairs.jsonl", [*rankings(60), pair])
    write_prepared(prepare(config(rankings=[source]), tokenizer, 256), tmp_path / "out")
    (found,) = [r for r in load_prepared(tmp_path / "out", "rankings", SPLITS) if r.prompt[0][1] == "pair"]
    assert found.margin == 0.5


def test_loading_before_prepare_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"rankings_train\.jsonl is not there\. Run `dvc repro prepare`\."):
        load_prepared(tmp_path, "rankings", ["train"])


def test_the_summary_counts_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    empty: dict[str, list[Any]] = {split: [] for split in SPLITS}
    prepared = Prepared(
        {**empty, "train": [Demonstration(HI, "a"), Demonstration(HI, "a a a")]},
        {**empty, "train": [Ranking(HI, ("long one", "b"), (1, 2)), Ranking(HI, ("long one", "b"), (2, 1))]},
        {**empty, "train": [Prompt(HI, "chat"), Prompt((("user", "hi there"),))]},
        [],
        3,
    )
    found = summarise(prepared, tokenizer, "")["train"]
    prompts = sorted(len(encode_prompt(tokenizer, record.prompt, "")) for record in prepared.prompts["train"])
    responses = sorted(len(encode_response(tokenizer, text)) for text in ("a", "a a a"))
    assert found == {
        "prompts": 2,
        "demonstrations": 2,
        "rankings": 2,
        "prompt_tokens_median": sum(prompts) / 2,
        "prompt_tokens_max": prompts[-1],
        "response_tokens_median": sum(responses) / 2,
        "response_tokens_max": responses[-1],
        "longest_ranked_first": 0.5,
        "kinds": {"chat": 1, "none": 1},
    }


# ---- text to ids -----------------------------------------------------------------------------------------------------

BODY = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
USER = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
# as SmolLM2's: a system turn of its own where none is given
INSERTS = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    + BODY
    + OPEN
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + BODY + OPEN
# as Gemma's and Mistral's; the one takes no system turn, the other one before the rest
TURNS = (
    "{% for m in messages if m['role'] != 'system' %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
)
BOS = "{{ bos_token }}" + BODY + OPEN
# as Llama 3.1's, which looks at the first message before it writes any
BOS_LOOKS = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% endif %}" + BODY + OPEN


def speaking(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(["hi hello"], vocabulary=300)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, INSERTS, REFUSES])
def test_an_empty_system_means_none_whatever_the_template_would_insert(template: str) -> None:
    assert render_prompt(speaking(template), HI, "") == USER


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, INSERTS])
def test_the_projects_system_turn_stands_before_the_prompt(template: str) -> None:
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n" + USER
    assert render_prompt(speaking(template), HI, "Be brief.") == expected


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_prompts_own_system_turn_takes_its_place(system: str) -> None:
    own = (("system", "Be kind."), *HI)
    assert render_prompt(speaking(INSERTS), own, system) == "<|im_start|>system\nBe kind.<|im_end|>\n" + USER


def test_without_a_template_turns_have_names() -> None:
    dialogue = (("user", "hi"), ("assistant", "hello"), ("user", "and?"))
    tokenizer = speaking(None)
    assert render_prompt(tokenizer, dialogue, "") == "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    assert render_prompt(tokenizer, HI, "Be brief.") == "\n\nSystem: Be brief.\n\nHuman: hi\n\nAssistant:"
    own = (("system", "Be kind."), *HI)
    assert render_prompt(tokenizer, own, "Be brief.") == "\n\nSystem: Be kind.\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize("template", [BOS, BOS_LOOKS])
def test_a_template_that_opens_with_bos_keeps_it(template: str) -> None:
    # As Llama 3's and Gemma's do; cutting off the empty system turn must not take the BOS with it.
    tokenizer = speaking(template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert render_prompt(tokenizer, HI, "") == "<s>" + USER
    assert render_prompt(tokenizer, HI, "Be brief.") == "<s><|im_start|>system\nBe brief.<|im_end|>\n" + USER


def test_a_system_turn_that_the_template_refuses_is_the_users_to_mend() -> None:
    with pytest.raises(
        DataError, match=r"takes no system turn \(No system role\)\. Set prepare\.system to '' in params"
    ):
        render_prompt(speaking(REFUSES), HI, "Be brief.")


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("own", [(), (("system", "Be kind."),)])
def test_messages_that_the_template_refuses_are_a_bad_field(system: str, own: Any) -> None:
    tokenizer = speaking(TURNS + BODY + OPEN)
    assert render_prompt(tokenizer, (*own, *HI), system).endswith(USER)
    with pytest.raises(BadField, match=r"prompt: found messages by (system, )?user, user, .*\(Roles must alternate\)"):
        render_prompt(tokenizer, (*own, *HI, *HI), system)


def test_a_rows_own_system_turn_that_the_template_refuses_is_a_bad_field() -> None:
    with pytest.raises(BadField, match=r"prompt: found messages by system, user, .*\(No system role\), expected"):
        render_prompt(speaking(REFUSES), (("system", "Be kind."), *HI), "Be brief.")
    with pytest.raises(DataError, match="takes no system turn"):  # which is no row's fault
        render_prompt(speaking(REFUSES + TURNS), (*HI, *HI), "Be brief.")


def test_a_row_that_the_template_refuses_is_named(config: Callable[..., Prepare], tmp_path: Path) -> None:
    twice = [{"role": "user", "content": text} for text in ("hi", "are you there?")]
    source = write_lines(tmp_path / "bad.jsonl", [*demonstrations(1), {"prompt": twice, "response": "yes"}])
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2, prompt: found messages by user, user, which the base"):
        prepare(config(demonstrations=[source]), speaking(TURNS + BODY + OPEN), 256)


def test_ids_are_those_of_the_text_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(tokenizer, HI, "")
    assert tokenizer.decode(ids) == USER
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.eos_token_id in ids  # a prompt's own ends of turn are one token each


def test_a_whole_response_ends_its_turn_and_a_cut_one_does_not(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_response(tokenizer, "hello you")
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole[:-1]) == "hello you"
    assert encode_response(tokenizer, "hello you", limit=len(whole)) == whole
    assert encode_response(tokenizer, "hello you", limit=len(whole) - 1) == whole[:-1]


# ---- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_PAIRS.is_file(), reason="the shared folder with HH's harmless pairs is not here")
def test_real_hh_pairs_are_kept_or_quarantined(config: Callable[..., Prepare]) -> None:
    source = str(REAL_PAIRS)
    settings = config(rankings=[source], on_bad_row="quarantine", max_prompt_tokens=10**6)
    prepared = prepare(settings, speaking(None), 10**9)
    why = Counter((row.source, row.found) for row in prepared.bad_rows)
    assert why == {(source, "two turns in a row by one speaker"): 7, (source, "an empty turn"): 3}
    assert prepared.duplicates == 0
    assert {split: len(rows) for split, rows in prepared.rankings.items()} == {
        "train": 627,
        "validation": 329,
        "test": 287,
        "gold": 338,
    }  # 1,581


@pytest.fixture(scope="module")
def starter() -> dict[str, list[Any]]:
    parsers = {"demonstrations": parse_demonstration, "rankings": parse_ranking, "prompts": parse_prompt}
    return {
        kind: [parse(row) for _, row in read_rows(str(STARTER / f"{kind}.jsonl"))] for kind, parse in parsers.items()
    }


def test_the_starter_prompts_are_many_and_of_eight_kinds(starter: dict[str, list[Any]]) -> None:
    prompts = starter["prompts"]
    assert len({record.prompt for record in prompts}) == len(prompts) >= 320
    kinds = Counter(record.category for record in prompts)
    assert len(kinds) == 8
    assert "" not in kinds
    assert min(kinds.values()) >= 40


def test_no_two_starter_prompts_are_alike(starter: dict[str, list[Any]]) -> None:
    words = [set(re.findall(r"\w+", record.prompt[-1][1].casefold())) for record in starter["prompts"]]
    shared = max(len(left & right) / len(left | right) for left, right in combinations(words, 2))
    assert shared < 0.4  # two prompts on jet lag are told apart; two wordings of one share more


def test_the_starter_demonstrations_are_short_and_of_known_prompts(starter: dict[str, list[Any]]) -> None:
    assert max(len(record.response.split()) for record in starter["demonstrations"]) <= 60
    known = {record.prompt for record in starter["prompts"]}
    assert {record.prompt for record in starter["demonstrations"]} <= known
    assert {record.prompt for record in starter["rankings"]} <= known


def test_the_starter_ranks_are_rankings(starter: dict[str, list[Any]]) -> None:
    for record in starter["rankings"]:
        # rank 1 is best, ties share the best of their places: 1 2 2 4
        assert record.ranks == tuple(1 + sum(other < rank for other in record.ranks) for rank in record.ranks)
        assert len(set(record.ranks)) > 1  # one of nothing but ties would teach nothing
        assert record.source in ("human", "ai", "rule")


def test_the_starter_ranks_hardly_ever_contradict_their_scores(starter: dict[str, list[Any]]) -> None:
    pairs = contradictions = 0
    for record in starter["rankings"]:
        assert record.scores is not None
        scored = list(zip(*record.scores.values(), strict=True))
        for (left, left_rank), (right, right_rank) in combinations(zip(scored, record.ranks, strict=True), 2):
            pairs += 1
            for better, better_rank, worse, worse_rank in (
                (left, left_rank, right, right_rank),
                (right, right_rank, left, left_rank),
            ):
                dominates = better != worse and all(a >= b for a, b in zip(better, worse, strict=True))
                contradictions += dominates and better_rank > worse_rank
    # an annotator sees more than three scores say: 1 % of the pairs, no more
    assert contradictions / pairs < 0.01


def test_the_starter_rankings_do_not_reward_length(starter: dict[str, list[Any]]) -> None:
    first = []
    for record in starter["rankings"]:
        lengths = [len(text) for text in record.responses]
        first.append(record.ranks[lengths.index(max(lengths))] == 1)
    assert sum(first) / len(first) < 0.45


def test_the_starter_data_passes_prepare(section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    sources = {kind: [str(STARTER / f"{kind}.jsonl")] for kind in ("demonstrations", "rankings", "prompts")}
    prepared = prepare(section("prepare", **sources, max_prompt_tokens=400), tokenizer, 1000)
    assert prepared.bad_rows == []
    assert prepared.duplicates == 0
    assert {record.category for record in prepared.prompts["test"]} == {
        record.category for record in prepared.prompts["train"]
    }
