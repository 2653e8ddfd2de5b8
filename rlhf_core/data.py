"""Read preference data, check every row, split it by prompt, and turn it into token ids.

Formats: demonstrations, rankings, pairs (K = 2), HH dialogues and prompts, as docs/data.md tells them; from JSON lines
(gzip too), Parquet, or the hub. Padding and batching belong to the loops.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from rlhf_core.config import Prepare, require_revision
from rlhf_core.errors import DataError, MissingArtifact
from rlhf_core.records import Demonstration, Message, Prompt, Ranking

if TYPE_CHECKING:  # as in records.py
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test", "gold")
SHOWN = 10  # bad rows named in the error
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_HALF = re.compile(r"[\ud800-\udfff]")  # of a character that JSON writes as two; no file in UTF-8 can hold it
Record = TypeVar("Record", Demonstration, Ranking, Prompt)


class BadRow(NamedTuple):
    """Why a row cannot be used."""

    source: str
    line: int
    field: str
    found: str
    expected: str
    row: Any

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}, {self.field}: found {self.found}, expected {self.expected}"


class BadField(DataError):
    """Raised by a parser: field, what was found, what was expected."""

    def __str__(self) -> str:
        field, found, expected = self.args
        return f"{field}: found {found}, expected {expected}"


# ---- reading


def read_rows(source: str, *, named_in: str = "params.yaml's section prepare") -> Iterator[tuple[int, Any]]:
    """Number and content of each row; a line that is no JSON object comes as the text it is.

    Args:
        source: a .jsonl, .jsonl.gz, .json or .parquet file, or hub:NAME@REVISION[:SPLIT].
        named_in: where whoever gave a wrong name has to mend it.

    Raises:
        MissingArtifact: it is not there.
        ConfigError: a data set of the hub without a revision.
        DataError: a file of another kind.
    """
    if source.startswith("hub:"):
        require_revision(source)
        name, _, split = source.removeprefix("hub:").partition(":")
        repo, _, revision = name.partition("@")
        yield from enumerate(_from_hub(repo, revision, split or "train", named_in), start=1)
        return
    path = Path(source)
    if not path.is_file():
        raise MissingArtifact(f"Data file {source} is not there. Mend the path in {named_in}.")
    if path.suffix == ".parquet":
        import datasets

        rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
        yield from enumerate(rows, start=1)
    elif path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError):  # no JSON, too deep, or a number of thousands of digits
                        yield number, line.rstrip("\n")
    else:
        raise DataError(f"Data file {source} ends in {path.suffix!r}; expected .jsonl, .jsonl.gz or .parquet.")


def _from_hub(repo: str, revision: str, split: str, named_in: str) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(repo, revision=revision, split=split)
    except (OSError, ValueError) as error:
        raise MissingArtifact(
            f"Data set hub:{repo}@{revision} cannot be loaded: {str(error).splitlines()[0]} "
            f"Run with HF_HUB_OFFLINE=0 to allow a download, or name a file in {named_in}."
        ) from error


# ---- one row


def parse_demonstration(row: Any) -> Demonstration:
    """A row with prompt and response."""
    fields = _object(row)
    return Demonstration(_prompt(fields), _text(fields, "response"), _label(fields, "category"))


def parse_prompt(row: Any) -> Prompt:
    """A row with prompt and, where told, category."""
    fields = _object(row)
    return Prompt(_prompt(fields), _label(fields, "category"))


def parse_ranking(row: Any) -> Ranking:
    """A ranking, a pair (prompt, chosen, rejected), or a pair of whole HH dialogues."""
    fields = _object(row)
    if "responses" in fields:
        return _ranking(fields)
    if "chosen" not in fields or "rejected" not in fields:
        raise BadField(
            "row", f"fields {', '.join(sorted(fields)) or 'none'}", "responses and ranks, or chosen and rejected"
        )
    chosen, rejected = _text(fields, "chosen"), _text(fields, "rejected")
    if "prompt" in fields:
        prompt = _prompt(fields)
    else:
        prompt, chosen = _dialogue("chosen", chosen)
        other, rejected = _dialogue("rejected", rejected)
        if prompt != other:
            raise BadField("rejected", "another dialogue before its last turn than chosen's", "the same one")
    return Ranking(
        prompt,
        (chosen, rejected),
        (1, 2),
        margin=_margin(fields),
        source=_label(fields, "source"),
        annotator=_label(fields, "annotator"),
        category=_label(fields, "category"),
    )


def _margin(fields: Mapping[str, Any]) -> float | None:
    margin = fields.get("margin")
    if margin is not None and not _is_number(margin):
        raise BadField("margin", repr(margin), "a number")
    return margin


def _ranking(fields: Mapping[str, Any]) -> Ranking:
    responses = fields["responses"]
    if not isinstance(responses, (list, tuple)) or len(responses) < 2:
        raise BadField("responses", _shown(responses), "a list of two texts or more")
    for index, text in enumerate(responses):
        if not isinstance(text, str) or not text.strip():
            raise BadField(f"responses[{index}]", _shown(text), "a text that is not empty")
        _unbroken(f"responses[{index}]", text)
    ranks: Any = fields.get("ranks")
    whole = isinstance(ranks, (list, tuple)) and all(type(rank) is int and rank >= 1 for rank in ranks)
    if not whole or len(ranks) != len(responses):
        raise BadField("ranks", _shown(ranks), f"{len(responses)} whole numbers from 1, one a response")
    scores = fields.get("scores")
    if scores is not None:
        if not isinstance(scores, dict):
            raise BadField("scores", _shown(scores), "lists of numbers by axis, such as {helpfulness: [4, 2]}")
        for axis, values in scores.items():
            _unbroken("scores", axis)
            if not isinstance(values, list) or len(values) != len(responses) or not all(map(_is_number, values)):
                raise BadField(f"scores.{axis}", _shown(values), f"{len(responses)} numbers, one a response")
    return Ranking(
        _prompt(fields),
        tuple(responses),
        tuple(ranks),
        margin=_margin(fields),
        scores=scores,
        source=_label(fields, "source"),
        annotator=_label(fields, "annotator"),
        category=_label(fields, "category"),
    )


def _object(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise BadField("row", _shown(row), "one JSON object a line")
    return {key: value for key, value in row.items() if value is not None}


def _prompt(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    value = fields.get("prompt")
    if isinstance(value, str) and value.strip():
        return (("user", _unbroken("prompt", value.strip())),)
    turns = value if isinstance(value, list) else None
    if not turns or not all(
        isinstance(turn, dict)
        and isinstance(turn.get("content"), str)
        and turn["content"].strip()
        and turn.get("role") in ("system", "user", "assistant")
        for turn in turns
    ):
        raise BadField("prompt", _shown(value), "a text that is not empty, or chat messages with role and content")
    if turns[-1]["role"] != "user":
        raise BadField("prompt", f"a last message by {turns[-1]['role']}", "the last message by user")
    return tuple((turn["role"], _unbroken("prompt", turn["content"].strip())) for turn in turns)


def _dialogue(field: str, text: str) -> tuple[tuple[Message, ...], str]:
    """An HH dialogue as its prompt and its last assistant turn."""
    lead, *parts = _TURN.split(text)
    roles, turns = parts[0::2], [turn.strip() for turn in parts[1::2]]
    if lead.strip() or not roles or roles[0] != "Human" or roles[-1] != "Assistant":
        raise BadField(field, _shown(text), "a dialogue from '\\n\\nHuman: ' to a last '\\n\\nAssistant: ' turn")
    if any(left == right for left, right in pairwise(roles)):
        raise BadField(field, "two turns in a row by one speaker", "turns by Human and Assistant that alternate")
    if not all(turns):
        raise BadField(field, "an empty turn", "turns that are not empty")
    names = {"Human": "user", "Assistant": "assistant"}
    return tuple((names[role], turn) for role, turn in zip(roles[:-1], turns[:-1], strict=True)), turns[-1]


def _text(fields: Mapping[str, Any], field: str) -> str:
    value = fields.get(field)
    if not isinstance(value, str) or not value.strip():
        raise BadField(field, _shown(value), "a text that is not empty")
    return _unbroken(field, value if value.startswith("\n\nHuman:") else value.strip())


def _label(fields: Mapping[str, Any], field: str) -> str:
    return _unbroken(field, str(fields.get(field, "")))


def _unbroken(field: str, text: str) -> str:
    """The text, which has to be one that can be written."""
    if half := _HALF.search(text):
        found = f"half a character, {half.group()!r}, after {half.start()} whole ones"
        raise BadField(field, found, "whole characters alone")
    return text


def _is_number(value: Any) -> bool:
    # JSON as Python reads it knows NaN and Infinity, and whole numbers past any float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- a whole data set


class Prepared(NamedTuple):
    """All data by split, with what was left out on the way."""

    demonstrations: dict[str, list[Demonstration]]
    rankings: dict[str, list[Ranking]]
    prompts: dict[str, list[Prompt]]
    bad_rows: list[BadRow]
    duplicates: int


def prepare(config: Prepare, tokenizer: PreTrainedTokenizerBase, context: int) -> Prepared:
    """Read, check, de-duplicate and split what params.yaml names.

    Args:
        context: the base model's longest sequence, in tokens.

    Raises:
        DataError: bad rows under `on_bad_row: stop` (the first ten and the count), or a split with nothing in it.
        MissingArtifact: a source that is not there.
    """
    bad_rows: list[BadRow] = []

    def load(sources: Sequence[str], parse: Callable[[Any], Record]) -> list[Record]:
        records = []
        for source in sources:
            for line, row in read_rows(source):
                try:
                    record = parse(row)
                    _check_length(record.prompt, config, tokenizer, context)
                    records.append(record)
                except BadField as bad:
                    field, found, expected = bad.args
                    bad_rows.append(BadRow(source, line, field, found, expected, row))
        return records

    demonstrations = load(config.demonstrations, parse_demonstration)
    rankings = load(config.rankings, parse_ranking)
    prompts = load(config.prompts, parse_prompt)
    if bad_rows and config.on_bad_row == "stop":
        raise DataError(
            f"{len(bad_rows)} bad row{'s' * (len(bad_rows) > 1)}:\n"
            + "\n".join(f"  {row}" for row in bad_rows[:SHOWN])
            + ("\n  ..." if len(bad_rows) > SHOWN else "")
            + "\nMend them, or set them aside: `rlhf run -S prepare.on_bad_row=quarantine`."
        )
    prompts += [Prompt(record.prompt, record.category) for record in demonstrations]
    prompts += [Prompt(record.prompt, record.category) for record in rankings]
    kinds = {record.prompt: record.category for record in prompts if record.category}
    kept_demonstrations, doubled = _unique(demonstrations, lambda record: (record.prompt, record.response))
    kept_rankings, doubled_rankings = _unique(rankings, _ranking_key)
    kept_prompts, _ = _unique(prompts, lambda record: record.prompt)
    if config.max_prompts:
        digests = sorted((_digest(record.prompt) for record in kept_prompts), key=lambda digest: digest[8:])
        chosen = set(digests[: config.max_prompts])  # by other bytes than those that tell the split
        kept_demonstrations = [record for record in kept_demonstrations if _digest(record.prompt) in chosen]
        kept_rankings = [record for record in kept_rankings if _digest(record.prompt) in chosen]
        kept_prompts = [record for record in kept_prompts if _digest(record.prompt) in chosen]
    prepared = Prepared(
        _split([record._replace(category=kinds.get(record.prompt, "")) for record in kept_demonstrations], config),
        _split([record._replace(category=kinds.get(record.prompt, "")) for record in kept_rankings], config),
        _split([record._replace(category=kinds.get(record.prompt, "")) for record in kept_prompts], config),
        bad_rows,
        doubled + doubled_rankings,
    )
    _refuse_empty(prepared, config)
    return prepared


def split_of(prompt: Sequence[Message], config: Prepare) -> str:
    """The split of a prompt, from its hash alone: adding rows moves none, and no prompt is in two."""
    place = int.from_bytes(_digest(prompt)[:8], "big") / 2**64
    for split in ("test", "gold", "validation"):
        place -= getattr(config, f"{split}_fraction")
        if place < 0:
            return split
    return "train"


def _digest(prompt: Sequence[Message]) -> bytes:
    # Folded as for duplicates: prompts that differ in case and spacing alone must not part.
    return hashlib.sha256(json.dumps(_folded(prompt), ensure_ascii=False).encode()).digest()


def _check_length(prompt: Sequence[Message], config: Prepare, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    count = len(encode_prompt(tokenizer, prompt, config.system))
    limit = min(config.max_prompt_tokens, context - config.max_response_tokens)
    if count > limit:
        raise BadField(
            "prompt", f"{count} tokens", f"{limit} at most (prepare.max_prompt_tokens, and the model's context)"
        )


def _unique(records: Sequence[Record], key: Callable[[Record], Any]) -> tuple[list[Record], int]:
    kept = list({_folded(key(record)): record for record in reversed(records)}.values())[::-1]
    return kept, len(records) - len(kept)


def _ranking_key(record: Ranking) -> Any:
    """What two annotators say of the same responses is two rankings; so is what one says the other way round."""
    judged = sorted((text, str(rank)) for text, rank in zip(record.responses, record.ranks, strict=True))
    return record.prompt, record.annotator, *judged


def _folded(key: Any) -> Any:
    """The key without case and spacing, so that near-identical rows count as one."""
    return " ".join(key.casefold().split()) if isinstance(key, str) else tuple(_folded(part) for part in key)


def _split(records: Sequence[Record], config: Prepare) -> dict[str, list[Record]]:
    parts: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for record in records:
        parts[split_of(record.prompt, config)].append(record)
    return parts


def _refuse_empty(prepared: Prepared, config: Prepare) -> None:
    needed = [("demonstrations", split) for split in ("train", "validation", "test")]
    needed += [("rankings", split) for split in SPLITS] + [("prompts", "train"), ("prompts", "test")]
    for split in SPLITS:
        found = prepared.rankings[split]
        if found and all(len(set(record.ranks)) == 1 for record in found):
            raise DataError(f"All {len(found)} rankings of split {split} are ties; expected some that prefer one.")
    shares = {split: getattr(config, f"{split}_fraction") for split in SPLITS if split != "train"}  # train has the rest
    for kind, split in needed:
        if not getattr(prepared, kind)[split]:
            counts = {name: len(rows) for name, rows in getattr(prepared, kind).items()}
            verb, share = ("lower", max(shares, key=shares.__getitem__)) if split == "train" else ("raise", split)
            raise DataError(
                f"Split {split} of {kind} is empty (found {counts}). Add rows, or {verb} prepare.{share}_fraction, "
                f"which is {shares[share]:g}: `rlhf run -S prepare.{share}_fraction=SHARE`."
            )


def summarise(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, system: str) -> dict[str, Any]:
    """Counts, token lengths and kinds of each split, as nested metrics."""
    summary: dict[str, Any] = {"bad_rows": len(prepared.bad_rows), "duplicates": prepared.duplicates}
    for split in SPLITS:
        demonstrations, rankings = prepared.demonstrations[split], prepared.rankings[split]
        prompts = prepared.prompts[split]
        prompt_lengths = [len(encode_prompt(tokenizer, record.prompt, system)) for record in prompts]
        lengths = [len(encode_response(tokenizer, record.response)) for record in demonstrations]
        best = [_longest_is_best(record) for record in rankings]
        summary[split] = {
            "prompts": len(prompts),
            "demonstrations": len(demonstrations),
            "rankings": len(rankings),
            "prompt_tokens_median": float(np.median(prompt_lengths)) if prompt_lengths else 0.0,
            "prompt_tokens_max": max(prompt_lengths, default=0),
            "response_tokens_median": float(np.median(lengths)) if lengths else 0.0,
            "response_tokens_max": max(lengths, default=0),
            "longest_ranked_first": float(np.mean(best)) if best else 0.0,
            "kinds": dict(sorted(Counter(record.category or "none" for record in prompts).items())),
        }
    return summary


def _longest_is_best(ranking: Ranking) -> bool:
    lengths = [len(response) for response in ranking.responses]
    return ranking.ranks[lengths.index(max(lengths))] == min(ranking.ranks)


def write_prepared(prepared: Prepared, folder: Path) -> None:
    """One JSON-lines file a kind and split, and the quarantine where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("demonstrations", "rankings", "prompts"):
        for split, records in getattr(prepared, kind).items():
            _write(folder / f"{kind}_{split}.jsonl", map(_as_row, records))
    if prepared.bad_rows:
        _write(folder / "quarantine.jsonl", ({**bad._asdict(), "row": bad.row} for bad in prepared.bad_rows))


def load_prepared(folder: Path, kind: str, splits: Sequence[str]) -> list[Any]:
    """The records of a kind (demonstrations, rankings, prompts) in some splits.

    Raises:
        MissingArtifact: prepare has not run.
    """
    parse = {"demonstrations": parse_demonstration, "rankings": parse_ranking, "prompts": parse_prompt}[kind]
    records = []
    for split in splits:
        path = folder / f"{kind}_{split}.jsonl"
        if not path.is_file():
            raise MissingArtifact(f"{path.as_posix()} is not there. Run `dvc repro prepare`.")
        records += [parse(row) for _, row in read_rows(str(path))]
    return records


def _as_row(record: Demonstration | Ranking | Prompt) -> dict[str, Any]:
    row = {key: value for key, value in record._asdict().items() if value not in (None, "")}
    row["prompt"] = prompt_field(record.prompt)
    return row


def prompt_field(prompt: Sequence[Message]) -> str | list[dict[str, str]]:
    """A prompt as rows of files have it: one turn of the user as its text, a conversation as chat messages."""
    if len(prompt) == 1 and prompt[0][0] == "user":
        return prompt[0][1]
    return [{"role": role, "content": content} for role, content in prompt]


def _write(path: Path, rows: Iterable[Any]) -> None:
    # A row set aside may hold half a character, which becomes its escape, or a date or bytes from a Parquet column.
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


# ---- text to ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], system: str) -> list[int]:
    """Ids of a prompt up to where the response begins, in the model's chat template.

    Args:
        system: the project's system turn; "" for none, whatever the template would insert by itself.

    Raises:
        BadField: the template refuses the prompt's messages.
        DataError: it refuses every system turn, and the project has one.
    """
    return tokenizer(render_prompt(tokenizer, prompt, system), add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, *, limit: int | None = None) -> list[int]:
    """Ids of a whole response with the end-of-turn token; one that is cut at `limit` tokens has none."""
    ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ids[:limit]


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], system: str) -> str:
    """The prompt as the text that the model sees."""
    turns = [{"role": role, "content": content} for role, content in prompt]
    if not tokenizer.chat_template:
        names = {"user": "Human", "assistant": "Assistant", "system": "System"}
        lead = [{"role": "system", "content": system}] if system and turns[0]["role"] != "system" else []
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in lead + turns) + "\n\nAssistant:"
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    if turns[0]["role"] == "system":
        try:
            return _template(tokenizer, turns, True)
        except Exception as error:  # templates refuse a role by raising whatever they like
            if prompt[0][0] == "system" or _takes_system(tokenizer):
                raise _refused(turns, error) from error
            raise DataError(
                f"The base model's chat template takes no system turn ({error}). "
                "Set prepare.system to '' in params.yaml, and leave system messages out of the prompts."
            ) from error
    # A template may insert a system turn of its own where none is given. Give it an empty one, and cut that off.
    empty = {"role": "system", "content": ""}
    with suppress(Exception):  # as above
        whole, opening = _template(tokenizer, [empty, *turns], True), _template(tokenizer, [empty], False)
        if whole.startswith(opening):
            return _before_turns(tokenizer) + whole.removeprefix(opening)
    try:
        return _template(tokenizer, turns, True)
    except Exception as error:  # as above
        raise _refused(turns, error) from error


def _refused(turns: list[dict[str, str]], error: Exception) -> BadField:
    by = ", ".join(turn["role"] for turn in turns)
    found = f"messages by {by}, which the base model's chat template refuses ({error})"
    return BadField("prompt", found, "messages as it takes them, such as by user and assistant in turn")


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    with suppress(Exception):  # as above
        _template(tokenizer, [{"role": role, "content": "hi"} for role in ("system", "user")], True)
        return True
    return False


def _before_turns(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before any turn: BOS, or nothing.

    Found from a system turn given once and twice, since `apply_chat_template` takes no empty list, and since a
    template may insert a turn of its own where none of the system's is given.
    """
    turn = {"role": "system", "content": ""}
    try:
        once, twice = _template(tokenizer, [turn], False), _template(tokenizer, [turn, turn], False)
    except Exception:  # as above
        return ""
    repeated = twice.removeprefix(once)
    return once.removesuffix(repeated) if repeated and once.endswith(repeated) else ""


def _template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], generation: bool) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
