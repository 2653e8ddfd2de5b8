"""Runs the PPO loop on two tasks whose answer is known, with four seeds each: `make known-answers`, some minutes.

A score is a function that can be read here, so no reward model can be to blame: a loop that is right climbs. Each seed
makes a random model, teaches it demonstrations with the SFT loop, and lets PPO go on from there. Prints a markdown
table, of which docs/known-answers.md keeps one. Numbers after the script's name are other seeds.

walks: find the shortest way through a graph, as trlX's examples/randomwalks does (github.com/CarperAI/trlx) after
figure 2 of Chen et al. 2021 (arXiv:2106.01345). words: say kind words rather than curt ones.
"""

import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from rlhf_core.config import PPO, SFT
from rlhf_core.data import parse_demonstration, read_rows
from rlhf_core.models import REFERENCE, Roles
from rlhf_core.ppo import POLICY, VALUE, train_ppo
from rlhf_core.records import Sampled
from rlhf_core.rollouts import sample
from rlhf_core.sft import Example, encode_demonstrations, response_logprobs, train_sft
from rlhf_core.tiny import PAD, TEXT, make_llama, make_tokenizer
from rlhf_core.tracking import NullTracker, Tracker

SEEDS = (0, 1, 2, 3)
NODES, GOAL, EDGE, LONGEST, WALKS = 21, 0, 0.1, 10, 1000  # trlX's; a length counts nodes, both ends included
GRAPH_SEED = 1002  # trlX's too, though another generator makes another graph of it
KIND = frozenset(["you", "your", "can", "will", "please", "help", "good", "try", "ask", "let"])
CURT = frozenset(["no", "not", "but", "never", "without", "leave", "off", "over", "don't", "can't"])
DEMONSTRATIONS = Path(__file__).resolve().parents[1] / TEXT
QUIET = NullTracker()

# A value a line would make three screens of these.
# fmt: off
SHARED = {
    "method": "full", "lora_rank": 1, "lora_alpha": 1, "lora_layers": 0,  # the last three have no effect
    "weight_decay": 0.0, "max_grad_norm": 1.0, "gradient_checkpointing": False,
}
SFT_SETTINGS = {
    **SHARED, "epochs": 6, "batch_size": 16, "micro_batch_size": 16,
    "learning_rate": 5e-3, "schedule": "cosine", "warmup_fraction": 0.1, "keep": "best", "feedback": "", "weights": {},
}
PPO_SETTINGS = {
    **SHARED, "temperature": 1.0, "epochs": 4, "value_learning_rate": 1e-3, "schedule": "linear",
    "value_network": "own", "value_coef": 0.1,
    "warmup_updates": 0, "value_warmup_updates": 2, "early_stop_kl": 0.1, "clip_range": 0.2, "value_clip_range": 0.2,
    "kl_controller": "fixed", "kl_target": 6.0, "kl_horizon": 2000, "kl_penalty": "reward", "kl_estimator": "k1",
    "dual_clip": 0.0, "entropy_coef": 0.0, "gamma": 1.0, "lam": 0.95, "whiten_advantages": True,
    "whiten_rewards": False, "scale_scores": False, "score_clip": 1.0, "missing_eos_penalty": 0.0,
    "spread_coef": 0.0, "start": "", "reward": "reward", "objective": "score", "axis_weights": {}, "axis_order": [],
    "thresholds": {}, "cost_axis": "", "cost_limit": 0.0, "lambda_init": 1.0, "lambda_min": 0.05, "lambda_max": 20.0,
    "lambda_learning_rate": 0.2, "cost_memory": 4,
    "length_penalty": 0.0, "length_free": 0, "watch_every": 0, "watch_window": 10, "on_alarm": "log",
}
WALKS_SETTINGS = {
    "updates": 80, "rollouts": 200, "samples_per_prompt": 10, "response_tokens": LONGEST - 1,
    "minibatch_size": 100, "micro_batch_size": 100, "learning_rate": 3e-4, "kl_coef": 0.03,
}
WORDS_SETTINGS = {
    "updates": 40, "rollouts": 64, "samples_per_prompt": 1, "response_tokens": 24,
    "minibatch_size": 16, "micro_batch_size": 16, "learning_rate": 5e-4, "kl_coef": 0.02,
}
# fmt: on

Graph = tuple[tuple[int, ...], ...]  # the nodes that each node leads to


class Task(NamedTuple):
    """What is learned, and from what."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]  # for SFT
    held_out: list[Example]
    prompts: list[list[int]]  # for PPO
    asked: list[list[int]]  # for the figures
    score: Callable[[Sampled], Tensor]
    settings: dict[str, Any]


class Figures(NamedTuple):
    """Mean scores of a policy at temperature 1 and greedily, and its nats a response to the SFT policy."""

    sampled: float
    greedy: float
    kl: float


# ---- walks -----------------------------------------------------------------------------------------------------------


def make_graph(seed: int = GRAPH_SEED) -> Graph:
    """Each edge is there with probability 0.1; drawn again until the goal can be reached in time from everywhere."""
    draw = random.Random(seed)
    while True:
        edges = [[end for end in range(NODES) if draw.random() < EDGE and end != node] for node in range(NODES)]
        edges[GOAL] = []
        graph = tuple(map(tuple, edges))
        lengths = shortest_lengths(graph)
        if len(lengths) == NODES and max(lengths.values()) < LONGEST:
            return graph


def shortest_lengths(graph: Graph) -> dict[int, int]:
    """Nodes on the shortest walk to the goal, from each node that has one."""
    lengths, ends = {GOAL: 1}, [GOAL]
    for end in ends:  # grows while it is read: breadth first, against the edges
        for node, leads_to in enumerate(graph):
            if end in leads_to and node not in lengths:
                lengths[node] = lengths[end] + 1
                ends.append(node)
    return lengths


def random_walks(graph: Graph, *, seed: int = GRAPH_SEED) -> list[list[int]]:
    """Walks from random nodes along random edges, up to the goal or ten nodes."""
    draw = random.Random(seed)
    walks = []
    for _ in range(WALKS):
        walk = [draw.choice([node for node in range(NODES) if node != GOAL])]
        while walk[-1] != GOAL and len(walk) < LONGEST:
            walk.append(draw.choice(graph[walk[-1]]))
        walks.append(walk)
    return walks


def optimality(walk: Sequence[int], graph: Graph, shortest: dict[int, int]) -> float:
    """How near a walk comes to the shortest one from its first node: trlX's metric of that name, in [0, 1].

    (10 − length) / (10 − shortest)          length: nodes up to the goal; 10 if an edge is missing or it never arrives
    """
    length = LONGEST
    for index, node in enumerate(walk):
        if index and node not in graph[walk[index - 1]]:
            break
        if node == GOAL:
            length = min(index + 1, LONGEST)
            break
    return (LONGEST - length) / (LONGEST - shortest[walk[0]])


def walks_task() -> Task:
    """Token n is node n, and the goal is what ends a response: a walk that was cut at ten nodes has no end."""
    names = [chr(ord("a") + node) for node in range(NODES)]
    words = Tokenizer(models.WordLevel({name: node for node, name in enumerate([*names, PAD])}, PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=names[GOAL])
    graph = make_graph()
    shortest = shortest_lengths(graph)
    examples = [Example(walk[:1], walk[1:]) for walk in random_walks(graph)]
    starts = [[node] for node in range(NODES) if node != GOAL]

    def score(sampled: Sampled) -> Tensor:
        pairs = zip(sampled.prompts, sampled.responses(), strict=True)
        return torch.tensor([optimality([*prompt, *response], graph, shortest) for prompt, response in pairs])

    return Task("walks", tokenizer, examples[100:], examples[:100], starts, starts * 50, score, WALKS_SETTINGS)


# ---- words -----------------------------------------------------------------------------------------------------------


def kindness(text: str) -> float:
    """Share of a text's words that are kind, less the share that are curt: in [−1, 1], and 0 where it has no words."""
    words = re.findall(r"[a-z']+", text.lower())
    return sum((word in KIND) - (word in CURT) for word in words) / max(len(words), 1)


def words_task() -> Task:
    """The starter data's prompts of up to 64 tokens with their demonstrations, every sixth held out."""
    rows = [row for _, row in read_rows(str(DEMONSTRATIONS))]
    tokenizer = make_tokenizer([text for row in rows for text in (row["prompt"], row["response"])])
    records = [parse_demonstration(row) for row in rows]
    examples = encode_demonstrations(records, tokenizer, system="", max_response_tokens=48)
    examples = [example for example in examples if len(example.prompt) <= 64]
    held_out = examples[::6]
    examples = [example for index, example in enumerate(examples) if index % 6]
    prompts, asked = ([example.prompt for example in part] for part in (examples, held_out))

    def score(sampled: Sampled) -> Tensor:
        texts = tokenizer.batch_decode(sampled.responses(), skip_special_tokens=True)
        return torch.tensor([kindness(text) for text in texts])

    return Task("words", tokenizer, examples, held_out, prompts, asked * 4, score, WORDS_SETTINGS)


# ---- both ------------------------------------------------------------------------------------------------------------


def train_start(task: Task, seed: int, folder: Path) -> Path:
    """The folder of a random model of two layers that has learned the task's demonstrations."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "max_position_embeddings": 128}
    model = make_llama(task.tokenizer, seed=seed, tie_word_embeddings=False, bos_token_id=None, **sizes)
    model.save_pretrained(folder / "base")
    task.tokenizer.save_pretrained(folder / "base")
    section = SFT.model_validate({**SFT_SETTINGS, "seed": seed})
    roles = Roles(folder / "base", section)
    roles.add(POLICY, method="full")
    pad_id = task.tokenizer.pad_token_id
    train_sft(roles, task.examples, task.held_out, section, pad_id=pad_id, tracker=QUIET)
    roles.save(POLICY, folder / "sft")
    return folder / "sft"


@torch.no_grad()
def measure(roles: Roles, task: Task, section: PPO) -> Figures:
    """The policy as it is now; the same random numbers each time."""
    pad_id = task.tokenizer.pad_token_id
    drawn, likeliest = (
        sample(
            roles.language_model(POLICY),
            task.asked,
            max_tokens=section.response_tokens,
            temperature=1.0,
            stop_id=task.tokenizer.eos_token_id,
            pad_id=pad_id,
            generator=torch.Generator().manual_seed(section.seed),
            greedy=greedy,
        )
        for greedy in (False, True)
    )
    examples = [Example(*pair) for pair in zip(drawn.prompts, drawn.responses(), strict=True)]
    policy_BT, ref_BT = (response_logprobs(roles, role, examples, pad_id)[0] for role in (POLICY, REFERENCE))
    kl = (policy_BT - ref_BT).sum(1).mean()
    return Figures(task.score(drawn).mean().item(), task.score(likeliest).mean().item(), kl.item())


def climb(
    task: Task,
    seed: int,
    start: Path,
    tracker: Tracker = QUIET,
    gold: Callable[[Sampled], Tensor] | None = None,
    **changes: Any,
) -> tuple[Figures, Figures]:
    """Figures before and after PPO from the policy in folder `start`; `changes` are settings that differ.

    With `gold`, that judges and is not climbed.
    """
    section = PPO.model_validate({**PPO_SETTINGS, **task.settings, "seed": seed, **changes})
    torch.manual_seed(seed)
    roles = Roles(start, section)
    roles.add(POLICY, method="full")
    roles.add(VALUE, method="full", head=True, on=POLICY if section.value_network == "shared" else None)
    before = measure(roles, task, section)
    train_ppo(roles, task.prompts, section, tokenizer=task.tokenizer, tracker=tracker, score=task.score, gold=gold)
    return before, measure(roles, task, section)


def main(seeds: Sequence[int]) -> None:
    """One line a task and seed as soon as it is known, then mean and standard deviation."""
    torch.set_num_threads(1)  # on models this small more threads only wait for each other
    disable_progress_bar()
    print("| task | seed | sampled, before | after | greedy, before | after | KL to SFT, nats | seconds |")
    print("|---|---:|" + "---:|" * 6)
    for task in (walks_task(), words_task()):
        rows = []
        for seed in seeds:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                before, after = climb(task, seed, train_start(task, seed, Path(folder)))
            took = time.perf_counter() - began
            rows.append((before.sampled, after.sampled, before.greedy, after.greedy, after.kl, took))
            print(_line(task.name, seed, rows[-1]), flush=True)
        print(_line(task.name, "mean", [mean(column) for column in zip(*rows, strict=True)]))
        if len(rows) > 1:
            print(_line(task.name, "std", [stdev(column) for column in zip(*rows, strict=True)]), flush=True)


def _line(name: str, seed: object, numbers: Sequence[float]) -> str:
    *scores, kl, took = numbers
    return f"| {name} | {seed} | " + " | ".join(f"{score:.3f}" for score in scores) + f" | {kl:.2f} | {took:.0f} |"


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or SEEDS)
