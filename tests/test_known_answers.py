"""scripts/known_answers.py: its graph and scores are what they are said to be, and a few updates of PPO climb one."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load_script

from rlhf_core.records import Sampled

# 0 is the goal.  3 → 2 → 1 → 0, and 3 → 1; the other nodes lead nowhere.
SMALL = ((), (0,), (1,), (2, 1), *[()] * 17)


@pytest.fixture(scope="module")
def known() -> Any:
    return load_script("known_answers")


def slow_shortest(graph: Sequence[Sequence[int]], start: int) -> int:
    """Nodes on the shortest walk, by trying all walks of one more node at a time."""
    reached, length = {start}, 1
    while 0 not in reached:
        reached, length = {end for node in reached for end in graph[node]}, length + 1
    return length


def test_shortest_lengths_count_nodes_and_leave_out_who_never_arrives(known: Any) -> None:
    assert known.shortest_lengths(SMALL) == {0: 1, 1: 2, 2: 3, 3: 3}


@pytest.mark.parametrize("seed", [1002, 0, 1, 2])
def test_a_graph_is_the_same_each_time_and_every_node_can_score(known: Any, seed: int) -> None:
    graph = known.make_graph(seed)
    assert graph == known.make_graph(seed)
    assert len(graph) == 21
    assert graph[0] == ()
    assert not [node for node, ends in enumerate(graph) if node in ends]
    found = known.shortest_lengths(graph)
    assert found == {node: slow_shortest(graph, node) for node in range(21)}
    assert max(found.values()) < 10


def test_walks_follow_edges_and_end_at_the_goal_or_after_ten_nodes(known: Any) -> None:
    graph = known.make_graph()
    walks = known.random_walks(graph)
    assert len(walks) == 1000
    for walk in walks:
        assert all(end in graph[start] for start, end in pairwise(walk))
        assert 0 not in walk[:-1]
        assert walk[-1] == 0 or len(walk) == 10
    assert {walk[0] for walk in walks} == set(range(1, 21))


@pytest.mark.parametrize(
    ("walk", "expected"),
    [
        ([3, 1, 0], 1.0),  # (10 − 3) / (10 − 3)
        ([3, 2, 1, 0], 6 / 7),  # (10 − 4) / (10 − 3)
        ([1, 0], 1.0),
        ([3, 1, 0, 5, 5], 1.0),  # what comes after the goal does not count
        ([3, 0], 0.0),  # no such edge
        ([3, 2, 3, 1, 0], 0.0),  # nor back
        ([3, 2, 1], 0.0),  # never arrives
        ([3], 0.0),
        ([3, 21, 0], 0.0),  # PAD is no node
    ],
)
def test_optimality_by_hand(known: Any, walk: list[int], expected: float) -> None:
    assert known.optimality(walk, SMALL, {1: 2, 2: 3, 3: 3}) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("You can.", 1.0),
        ("No, never!", -1.0),
        ("Please don't do that", 0.0),  # 1/4 − 1/4
        ("Try the blue door", 0.25),
        ("yours", 0.0),  # whole words only
        ("", 0.0),
        ("42 …", 0.0),
    ],
)
def test_kindness_by_hand(known: Any, text: str, expected: float) -> None:
    assert known.kindness(text) == pytest.approx(expected, rel=1e-12)


def sampled(prompts: list[list[int]], responses: list[list[int]]) -> Sampled:
    width = max(map(len, responses))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in responses])
    mask_BT = torch.arange(width) < torch.tensor([[len(row)] for row in responses])
    return Sampled(prompts, ids_BT, mask_BT, torch.ones(len(responses), dtype=torch.bool))


def test_a_walks_score_is_its_optimality_from_the_prompt_on(known: Any) -> None:
    task = known.walks_task()
    assert task.tokenizer.eos_token_id == 0
    assert task.tokenizer.pad_token_id == 21
    graph = known.make_graph()
    shortest = known.shortest_lengths(graph)
    best = [5]
    while best[-1] != 0:
        best.append(min(graph[best[-1]], key=shortest.__getitem__))
    # The second row is cut by its mask, with the goal's id as padding; the third jumps to the goal's neighbour.
    assert best[-2] not in graph[5]
    found = task.score(sampled([[5], [5], [5]], [best[1:], best[1:-1], best[-2:]]))
    assert found.tolist() == [1.0, 0.0, 0.0]


def test_a_responses_kindness_leaves_its_end_of_turn_out(known: Any) -> None:
    task = known.words_task()
    ids = [task.tokenizer(text)["input_ids"] for text in ("you can", "no door")]
    end = task.tokenizer.eos_token_id
    assert task.score(sampled([[5], [5]], [[*ids[0], end], [*ids[1], end]])).tolist() == [1.0, -0.5]


@pytest.mark.thorough
def test_a_few_updates_climb(known: Any, tmp_path: Path) -> None:
    task = known.walks_task()
    before, after = known.climb(task, 0, known.train_start(task, 0, tmp_path), updates=10)
    assert before.sampled < 0.2
    assert before.kl == pytest.approx(0, abs=1e-5)  # float32
    assert after.sampled > before.sampled + 0.3
    assert 0 < after.kl < 3  # nats a response
