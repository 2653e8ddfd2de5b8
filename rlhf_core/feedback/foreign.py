"""Rankings from other tools' exports: Label Studio's JSON and Argilla's, as rows in the form of docs/data.md.

Label Studio (labelstud.io/guide/task_format, /tags/ranker, /tags/pairwise): a list of tasks, each with `data` and
`annotations`; a result of type `ranker` holds the ids of the ranked `List`, best first, or buckets of them; one of type
`pairwise` says left, right or neither. Argilla (`dataset.records.to_json`, and records of its first version): a list of
records, each with `fields` and `responses` by question; a ranking's value names fields, best first, or with ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.errors import DataError

PROMPT_FIELDS = ("prompt", "instruction", "question", "input")


def read_foreign(tasks: Any, *, name: str, prompt: str = "", buckets: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of rankings from an export, whichever of the two tools it comes from.

    Args:
        tasks: the file's content.
        name: the file, for messages.
        prompt: the field that holds the prompt; the first of prompt, instruction, question, input if empty.
        buckets: Label Studio's buckets, best first; only needed where items were put into several.

    Raises:
        DataError: it is no such export, or a task in it cannot be read; names its place.
    """
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, Mapping) for task in tasks):
        raise DataError(f"{name} is no list of tasks or records, as Label Studio's JSON export and Argilla's are.")
    rows: list[dict[str, Any]] = []
    for place, task in enumerate(tasks, start=1):
        try:
            if "annotations" in task and "data" in task:
                rows += _label_studio(task, prompt, buckets)
            elif "fields" in task and "responses" in task:
                rows += _argilla(task, prompt)
            else:
                raise DataError(
                    f"found {', '.join(sorted(task))}; expected data and annotations (Label Studio), or fields and "
                    "responses (Argilla)"
                )
        except DataError as error:
            raise DataError(f"{name}, number {place}: {error}") from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{name}, number {place} is not in the form of an export ({what})") from error
    return rows


# ---- Label Studio


def _label_studio(task: Mapping[str, Any], prompt: str, buckets: Sequence[str]) -> Iterator[dict[str, Any]]:
    data = task["data"]
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):  # skipped
            continue
        for result in annotation.get("result", ()):
            if result.get("type") == "ranker":
                responses, ranks = _ranked_list(result, data, buckets)
            elif result.get("type") == "pairwise":
                responses, ranks = _pair(result, data, _prompt_name(data, prompt))
            else:
                continue
            if len(responses) > 1:
                yield _row(data[_prompt_name(data, prompt)], responses, ranks, _who(annotation.get("completed_by")))


def _ranked_list(
    result: Mapping[str, Any], data: Mapping[str, Any], buckets: Sequence[str]
) -> tuple[list[str], list[int]]:
    value = result["value"]["ranker"]
    lists = [field for field in data.values() if isinstance(field, list) and field and isinstance(field[0], Mapping)]
    texts = {str(item["id"]): str(item.get("body") or item.get("title") or "") for items in lists for item in items}
    if isinstance(value, list):
        order = [[str(one)] for one in value]
    else:
        kept = {bucket: ids for bucket, ids in value.items() if bucket != "_"}  # what was put into none
        if len(kept) == 1 and not buckets:
            order = [[str(one)] for one in next(iter(kept.values()))]
        elif set(kept) <= set(buckets):  # all in a bucket are alike
            order = [[str(one) for one in kept.get(bucket, ())] for bucket in buckets]
        else:
            raise DataError(f"found the buckets {', '.join(sorted(kept))}; say in which order they stand, best first")
    responses: list[str] = []
    ranks: list[int] = []
    for group in order:
        rank = len(responses) + 1  # 1, 2, 2, 4
        for one in group:
            if one not in texts:
                raise DataError(f"the ranking names {one!r}, which is none of the listed {', '.join(texts)}")
            responses.append(texts[one])
            ranks.append(rank)
    return responses, ranks


def _pair(result: Mapping[str, Any], data: Mapping[str, Any], prompt: str) -> tuple[list[str], list[int]]:
    named = [name for name in str(result.get("to_name", "")).split(",") if name in data]
    texts = named if len(named) == 2 else [name for name, value in data.items() if name != prompt and _is_text(value)]
    if len(texts) != 2:
        raise DataError(f"found the texts {', '.join(texts) or 'none'} beside {prompt}; expected the two compared")
    selected = result["value"].get("selected")
    if selected not in ("left", "right", "none", None):
        raise DataError(f"found selected {selected!r}, expected left or right")
    ranks = {"left": [1, 2], "right": [2, 1]}.get(str(selected), [1, 1])
    return [data[name] for name in texts], ranks


def _who(completed_by: Any) -> str:
    """Label Studio gives the annotator's number, or more of them."""
    if isinstance(completed_by, Mapping):
        return str(completed_by.get("email") or completed_by.get("id") or "")
    return "" if completed_by is None else f"label-studio-{completed_by}"


# ---- Argilla


def _argilla(record: Mapping[str, Any], prompt: str) -> Iterator[dict[str, Any]]:
    fields = record["fields"]
    name = _prompt_name(fields, prompt)
    responses = record["responses"]
    by_question = responses.items() if isinstance(responses, Mapping) else _first_version(responses)
    for _, given in by_question:
        for response in given:
            value: Any = response.get("value")
            if response.get("status", "submitted") != "submitted" or not _is_ranking(value, fields):
                continue  # drafts, and questions of other kinds
            ordered = [(one, place) for place, one in enumerate(value, start=1)]
            if isinstance(value[0], Mapping):
                ordered = [(one["value"], int(one["rank"])) for one in value]
            if len(ordered) > 1:
                texts, ranks = [fields[one] for one, _ in ordered], [rank for _, rank in ordered]
                yield _row(fields[name], texts, ranks, str(response.get("user_id") or ""))


def _first_version(responses: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A response of one user holds the values of all questions."""
    for response in responses:
        for question, answer in (response.get("values") or {}).items():
            about = {"user_id": response.get("user_id"), "status": response.get("status", "submitted")}
            yield question, [{"value": answer.get("value"), **about}]


def _is_ranking(value: Any, fields: Mapping[str, Any]) -> bool:
    if not isinstance(value, list) or not value:
        return False
    names = [one.get("value") if isinstance(one, Mapping) else one for one in value]
    return all(isinstance(name, str) and name in fields for name in names)


# ---- both


def _prompt_name(fields: Mapping[str, Any], prompt: str) -> str:
    found = [name for name in ([prompt] if prompt else PROMPT_FIELDS) if name in fields]
    if not found:
        expected = prompt or " or ".join(PROMPT_FIELDS)
        raise DataError(f"found the fields {', '.join(sorted(fields))}; expected a prompt in {expected}")
    return found[0]


def _row(prompt: Any, responses: Sequence[str], ranks: Sequence[int], who: str) -> dict[str, Any]:
    empty = [number for number, text in enumerate([prompt, *responses]) if not _is_text(text)]
    if empty:
        what = ", ".join(f"response {number}" if number else "the prompt" for number in empty)
        raise DataError(f"found no text in {what}")
    row = {"prompt": prompt, "responses": list(responses), "ranks": list(ranks), "source": "human", "annotator": who}
    return {name: value for name, value in row.items() if value != ""}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
