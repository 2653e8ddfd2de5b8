"""One measurement in a process of its own, so that its peak of memory is its own.

    python -m benchmarks.measure JOB SPEC

A job is a function of this file and SPEC its arguments as JSON. The last line printed is the result as JSON: seconds
of each timed piece of work, the first one left out, and what was worked on.
"""

import ctypes
import gc
import itertools
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tasks  # noqa: F401  first: it switches network and telemetry off before huggingface_hub reads the switches

# isort: split
import torch
import transformers

from benchmarks import flops
from benchmarks.machine import bandwidth_gb_s, product_gflops, products_seconds
from rlhf_core.config import Params, ValueNetwork, load_params
from rlhf_core.data import encode_prompt, load_prepared
from rlhf_core.ensemble import load_ensemble
from rlhf_core.folding import alike
from rlhf_core.models import Roles, TrunkCache, load_tokenizer
from rlhf_core.ppo import POLICY, VALUE, add_roles, train_ppo
from rlhf_core.reward import EncodedRanking, encode_rankings, train_reward
from rlhf_core.rollouts import sample
from rlhf_core.sft import Example, encode_demonstrations, train_sft
from rlhf_core.tracking import NullTracker
from rlhf_core.watch import GOLD
from tasks.stage import set_up_torch

PREPARED = Path("data/prepared")
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
EVERY_SPLIT = ("train", "validation", "gold", "test")
LORA = {"method": "lora", "lora_rank": 16, "lora_alpha": 32}


class Stopwatch(NullTracker):
    """Notes when a loop says that it has got further."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.tokens: list[int] = []

    def progress(self, done: int, total: int, *, unit: str, tokens: int = 0, note: str = "") -> None:
        self.moments.append(time.perf_counter())
        self.tokens.append(tokens)

    def result(self) -> dict[str, Any]:
        """What came after the first step, which has to fill caches and to allocate."""
        return {"seconds": between(self.moments), "tokens": self.tokens[1:]}


def between(moments: Sequence[float]) -> list[float]:
    """The seconds from each moment to the next."""
    return [late - early for early, late in itertools.pairwise(moments)]


class Endless:
    """A tokenizer whose end of turn is no token, so that every response has the full length."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.eos_token_id, self.pad_token_id = tokenizer, -1, tokenizer.pad_token_id

    def decode(self, *arguments: Any, **named: Any) -> str:
        return self.tokenizer.decode(*arguments, **named)


# ---- the machine


def machine() -> dict[str, Any]:
    """The peaks that shares are told of."""
    return {**product_gflops(), "bandwidth_gb_s": bandwidth_gb_s(), "threads": torch.get_num_threads()}


def products(*, shapes: list[tuple[int, int]], rows: int) -> dict[str, Any]:
    """The matrix products of a decode step alone."""
    return products_seconds([(out, inside) for out, inside in shapes], rows)


# ---- PPO


def prompts_of(model: str, count: int, length: int) -> list[list[int]]:
    """Prompts of the starter data, one after the other, cut into pieces of one length."""
    tokenizer = load_tokenizer(model)
    system = load_params().prepare.system
    texts = [record.prompt for record in load_prepared(PREPARED, "prompts", EVERY_SPLIT)]
    ids = [token for text in texts for token in encode_prompt(tokenizer, text, system)]
    assert len(ids) >= count * length, f"the starter prompts have {len(ids)} tokens, not {count * length}"
    return [ids[start : start + length] for start in range(0, count * length, length)]


def ppo_ours(
    *,
    model: str,
    layers: int,
    rollouts: int,
    prompt: int,
    response: int,
    epochs: int,
    updates: int,
    value_network: ValueNetwork = "own",
    watch_every: int = 0,
) -> dict[str, Any]:
    """Updates of our loop; `layers` 0 is LoRA on every layer. Each rollout has a prompt of its own, as TRL's have.

    With `watch_every` a gold model looks at every so many updates, beginning with the first, which is not timed.
    """
    params = load_params()
    shape = {**LORA, "lora_layers": layers}
    config = params.ppo.model_copy(
        update={
            **shape, "updates": updates + 1, "rollouts": rollouts, "samples_per_prompt": 1, "response_tokens": response,
            "epochs": epochs, "minibatch_size": min(8, rollouts), "micro_batch_size": min(8, rollouts),
            "value_warmup_updates": 0, "early_stop_kl": 1e9, "start": "", "value_network": value_network,
            "watch_every": watch_every,
        }
    )  # fmt: skip
    prompts = prompts_of(model, rollouts * (updates + 1), prompt)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        judge = Roles(model, params.reward.model_copy(update=shape))
        judge.add("reward", head=True)
        judge.save("reward", folder)
        del judge
        roles = Roles(model, config)
        add_roles(roles, folder, method="lora", value_network=value_network)
        if watch_every:
            load_ensemble(roles, GOLD, folder)
        loaded = settle()
        tokenizer: Any = Endless(load_tokenizer(model))
        train_ppo(roles, prompts, config, tokenizer=tokenizer, tracker=watch)
    trained = sum(part.numel() for role in (POLICY, VALUE) for part in roles.trainable(role))
    return {**watch.result(), **loaded, "trained": trained}


def ppo_trl(
    *,
    model: str,
    lora: bool,
    rollouts: int,
    prompt: int,
    response: int,
    epochs: int,
    updates: int,
    checkpointed: bool = False,
) -> dict[str, Any]:
    """Updates of TRL's PPOTrainer: in full, or with LoRA on all linear layers of the policy (the value model in full).

    In float32 without gradient checkpointing, which on a CPU is the fastest that it does; or `checkpointed`, in policy
    and value model. PPOConfig asks for that by default, but PPOTrainer 1.10 leaves it to a method of Trainer that its
    own loop never calls, so it is switched on by hand.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    def scorer() -> Any:
        found = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        found.config.pad_token_id = tokenizer.pad_token_id
        return found

    tokenizer = load_tokenizer(model)
    params = load_params()
    rows = Dataset.from_dict({"input_ids": prompts_of(model, rollouts * (updates + 1), prompt)})
    watch, batch = _trl_watch(), min(8, rollouts)
    with tempfile.TemporaryDirectory() as folder, _quietly():
        trainer = PPOTrainer(
            args=PPOConfig(
                folder, total_episodes=rollouts * (updates + 1), per_device_train_batch_size=batch,
                gradient_accumulation_steps=rollouts // batch, num_mini_batches=rollouts // batch,
                num_ppo_epochs=epochs, response_length=response, temperature=params.ppo.temperature,
                num_sample_generations=0, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
                save_strategy="no", disable_tqdm=True, logging_strategy="no",
            ),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            ref_model=None,
            reward_model=scorer(),
            value_model=scorer(),
            train_dataset=rows,
            eval_dataset=rows.select(range(1)),
            callbacks=[watch],
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
            if lora
            else None,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        if checkpointed:
            trainer.model.gradient_checkpointing_enable()  # of the policy, which TRL switches off while it samples
            trainer.value_model.gradient_checkpointing_enable()
        trainer.train()
    trained = sum(part.numel() for part in trainer.model.parameters() if part.requires_grad)
    seconds = between(watch.moments)
    tokens = [rollouts * (prompt + response)] * len(seconds)
    return {"seconds": seconds, "tokens": tokens, "trained": trained}


# ---- SFT and the reward model


def examples_of(model: str, count: int) -> list[Example]:
    """Demonstrations of the starter data."""
    prepare = load_params().prepare
    records = load_prepared(PREPARED, "demonstrations", EVERY_SPLIT)[:count]
    return encode_demonstrations(
        records, load_tokenizer(model), system=prepare.system, max_response_tokens=prepare.max_response_tokens
    )


def pairs_of(model: str, count: int) -> list[EncodedRanking]:
    """The first and the last response of each of the starter rankings, as pairs."""
    prepare = load_params().prepare
    rankings = encode_rankings(
        load_prepared(PREPARED, "rankings", EVERY_SPLIT), load_tokenizer(model), system=prepare.system,
        max_response_tokens=prepare.max_response_tokens,
    )  # fmt: skip
    found = []
    for ranking in rankings:
        best, worst = (pick(range(len(ranking.ranks)), key=lambda k: ranking.ranks[k]) for pick in (min, max))
        if ranking.ranks[best] < ranking.ranks[worst]:
            found.append(
                EncodedRanking(
                    [ranking.ids[best], ranking.ids[worst]], (1, 2), [ranking.lengths[best], ranking.lengths[worst]]
                )
            )
    return found[:count]


def _section(params: Params, name: str, layers: int | None, epochs: int) -> Any:
    """The section of params.yaml, trained in full where `layers` is None."""
    shape = {"method": "full"} if layers is None else {**LORA, "lora_layers": layers}
    return getattr(params, name).model_copy(update={**shape, "epochs": epochs})


def sft_work(examples: Sequence[Example]) -> flops.Work:
    """Each demonstration stands by itself; its response is what is asked for."""
    answered = sum(len(example.response) for example in examples)
    return flops.Work.of([(0, [len(example)]) for example in examples], answered)


def reward_work(pairs: Sequence[EncodedRanking], *, folded: bool) -> flops.Work:
    """The two texts of a pair, by themselves or `folded`, as Roles.output_rows has them. There are no logits."""
    groups = []
    for pair in pairs:
        lengths = list(map(len, pair.ids))
        for count, common in alike(pair.ids) if folded else [(1, 0)] * len(lengths):
            groups.append((common, lengths[:count]))
            lengths = lengths[count:]
    return flops.Work.of(groups)


def sft_ours(*, model: str, layers: int | None, rows: int, epochs: int) -> dict[str, Any]:
    """Our SFT loop; `layers` None is in full."""
    section, examples, watch = _section(load_params(), "sft", layers, epochs), examples_of(model, rows), Stopwatch()
    roles = Roles(model, section)
    torch.manual_seed(section.seed)
    roles.add("policy", method=section.method)
    pad_id = int(load_tokenizer(model).pad_token_id)
    train_sft(roles, examples, examples[:1], section, pad_id=pad_id, tracker=watch)
    return {**watch.result(), "work": sft_work(examples)}


def reward_ours(*, model: str, layers: int | None, rows: int, epochs: int) -> dict[str, Any]:
    """Our reward loop; `layers` None is in full."""
    section, pairs, watch = _section(load_params(), "reward", layers, epochs), pairs_of(model, rows), Stopwatch()
    roles = Roles(model, section)
    torch.manual_seed(section.seed)
    roles.add("reward", method=section.method, head=True)
    pad_id = int(load_tokenizer(model).pad_token_id)
    cache = TrunkCache() if layers is not None else None
    train_reward(roles, "reward", pairs, pairs[:1], section, pad_id=pad_id, tracker=watch, cache=cache)
    return {**watch.result(), "work": reward_work(pairs, folded=roles.folds)}


def sft_trl(*, model: str, rows: int) -> dict[str, Any]:
    """TRL's SFTTrainer, in full, with our batch size, on ids whose prompts are left out of the loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    section, examples = load_params().sft, examples_of(model, rows)
    data = Dataset.from_dict(
        {
            "input_ids": [example.prompt + example.response for example in examples],
            "labels": [[-100] * len(example.prompt) + example.response for example in examples],
        }
    )

    def make(folder: str, watch: Any) -> Any:
        return SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            SFTConfig(folder, **_trl_settings(section)),
            train_dataset=data, processing_class=load_tokenizer(model), callbacks=[watch],
        )  # fmt: skip

    return {**_trl_steps(make, [len(example) for example in examples], section), "work": sft_work(examples)}


def reward_trl(*, model: str, rows: int) -> dict[str, Any]:
    """TRL's RewardTrainer, in full, with our batch size."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    section, pairs = load_params().reward, pairs_of(model, rows)
    data = Dataset.from_list([{"chosen_ids": pair.ids[0], "rejected_ids": pair.ids[1]} for pair in pairs])

    def make(folder: str, watch: Any) -> Any:
        return RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32),
            RewardConfig(folder, **_trl_settings(section)),
            train_dataset=data, processing_class=load_tokenizer(model), callbacks=[watch],
        )  # fmt: skip

    steps = _trl_steps(make, [sum(map(len, pair.ids)) for pair in pairs], section)
    return {**steps, "work": reward_work(pairs, folded=False)}


def _trl_settings(section: Any) -> dict[str, Any]:
    """TRL's own but for our batches and rate; bfloat16 and gradient checkpointing, its defaults, are off."""
    return {
        "num_train_epochs": 1, "per_device_train_batch_size": section.micro_batch_size,
        "gradient_accumulation_steps": section.batch_size // section.micro_batch_size,
        "learning_rate": section.learning_rate, "max_length": None, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_strategy": "no", "train_sampling_strategy": "sequential",
    }  # fmt: skip


def _trl_watch() -> Any:
    """Notes when one of TRL's trainers has ended a step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.moments: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.moments.append(time.perf_counter())

    return Watch()


def _trl_steps(make: Callable[[str, Any], Any], lengths: Sequence[int], section: Any) -> dict[str, Any]:
    watch = _trl_watch()
    with tempfile.TemporaryDirectory() as folder, _quietly():
        trainer = make(folder, watch)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    seconds, size = between(watch.moments), section.batch_size
    tokens = [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]
    return {"seconds": seconds, "tokens": tokens[1 : 1 + len(seconds)]}


# ---- generation


def generation_ours(*, model: str, rows: int, prompt: int, response: int, repeats: int) -> dict[str, Any]:
    """Our sampler; no row ever stops."""
    prompts, whole = prompts_of(model, rows, prompt), Roles(model).model
    temperature = load_params().ppo.temperature

    def work(tokens: int) -> None:
        sample(whole, prompts, max_tokens=tokens, temperature=temperature, stop_id=-1, pad_id=0,
               generator=torch.Generator().manual_seed(0))  # fmt: skip

    return _generated(work, rows, response, repeats)


def generation_transformers(*, model: str, rows: int, prompt: int, response: int, repeats: int) -> dict[str, Any]:
    """transformers' `generate` on the same prompts."""
    ids, whole = torch.tensor(prompts_of(model, rows, prompt)), Roles(model).model
    temperature = load_params().ppo.temperature

    def work(tokens: int) -> None:
        with torch.no_grad():
            whole.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

    return _generated(work, rows, response, repeats)


def _generated(work: Callable[[int], None], rows: int, response: int, repeats: int) -> dict[str, Any]:
    """Seconds of whole responses, and of the prompts with one token, which a step is told without."""
    found: dict[str, list[float]] = {}
    for name, tokens in (("seconds", response), ("first_seconds", 1)):
        moments = []
        for _ in range(repeats + 1):  # the first is not counted
            began = time.perf_counter()
            work(tokens)
            moments.append(time.perf_counter() - began)
        found[name] = moments[1:]
    return {**found, "tokens": [rows * response] * repeats}


def settle() -> dict[str, Any]:
    """Once all is loaded: the memory held now, from where the peak is counted anew, and the peak of loading.

    Where the peak cannot be set back, which the result says, it stands for what is held; it is more.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # what loading has given back, lest work take it again unseen
        libc.malloc_trim(0)
    peak = peak_bytes()
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return {"loaded_bytes": peak, "loading_peak_bytes": peak, "peak_reset": False}
    return {"loaded_bytes": _status("VmRSS"), "loading_peak_bytes": peak, "peak_reset": True}


def peak_bytes() -> int:
    """The most memory that this process has held so far, or since `settle`."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    """A line of what Linux tells of this process, in bytes; 0 where there is none."""
    lines = STATUS.read_text(encoding="ascii").splitlines() if STATUS.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _quietly() -> Any:
    # TRL 1.10 and transformers 5.23 warn of each other's names.
    transformers.logging.set_verbosity_error()
    return warnings.catch_warnings(action="ignore")


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job
    for job in (
        machine,
        products,
        ppo_ours,
        ppo_trl,
        sft_ours,
        sft_trl,
        reward_ours,
        reward_trl,
        generation_ours,
        generation_transformers,
    )
}


def main() -> None:
    if sys.argv[1].endswith("_ours"):
        set_up_torch()  # as every stage is
    found = JOBS[sys.argv[1]](**json.loads(sys.argv[2]))
    peak = peak_bytes()
    if "loaded_bytes" in found:
        found["working_bytes"] = peak - found["loaded_bytes"]
    print(json.dumps({**found, "peak_bytes": max(peak, found.get("loading_peak_bytes", 0))}))


if __name__ == "__main__":
    main()
