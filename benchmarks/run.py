"""Measures ours and TRL's on the same work, in turn, and writes benchmarks/results.json and docs/performance.md.

    make bench                      all of it
    make bench OPTIONS="--only ppo_update generation"

    make bench OPTIONS="--quick --results /tmp/quick.json"

Every measurement is a process of its own. Rounds alternate, so that a machine that is busier for some minutes is so for
both. Each part that is done is written down at once, with the run that it is of, and --only leaves the other parts of
results.json as they were.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoConfig

from benchmarks import flops
from benchmarks.page import write_page
from rlhf_core.config import load_params

RESULTS, PREPARED = Path("benchmarks/results.json"), Path("data/prepared")
BASE = "artifacts/base"
UPDATE = {"rollouts": 16, "prompt": 32, "response": 48, "epochs": 2}
WIDER = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 12,
         "num_key_value_heads": 4}  # fmt: skip
GROWTH_ROWS, GROWTH_RESPONSES = (4, 8, 16, 32, 64), (32, 64, 128, 256, 512)
Samples = dict[str, list[dict[str, Any]]]


class Bench:
    """What all parts share: the model, the number of rounds, the machine's peaks."""

    def __init__(self, model: str, rounds: int, quick: bool) -> None:
        self.model, self.rounds, self.quick = model, 1 if quick else rounds, quick
        self.updates = 1 if quick else 2
        self.shape = flops.Shape.of(AutoConfig.from_pretrained(model), rank=16)
        self.params = load_params()

    def adapted(self, section: Any) -> int:
        """How many layers have adapters."""
        return min(section.lora_layers or self.shape.layers, self.shape.layers)

    def child(self, job: str, **spec: Any) -> dict[str, Any]:
        """One measurement."""
        print(f"{job} {json.dumps(spec)}", flush=True)
        command = [sys.executable, "-m", "benchmarks.measure", job, json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{job} failed:\n{done.stderr.strip()[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if found.get("seconds"):
            print(f"    {median(found['seconds']):.2f} s, {found['peak_bytes'] / 1e9:.1f} GB at most", flush=True)
        return found

    def in_turn(self, jobs: dict[str, tuple[str, dict[str, Any]]]) -> Samples:
        """Each job once a round."""
        found: Samples = {name: [] for name in jobs}
        for _ in range(self.rounds):
            for name, (job, spec) in jobs.items():
                found[name].append(self.child(job, model=self.model, **spec))
        return found


def seconds_of(runs: list[dict[str, Any]]) -> list[float]:
    """All timed pieces of work of all rounds."""
    return [round(value, 3) for run in runs for value in run["seconds"]]


def rates_of(runs: list[dict[str, Any]]) -> list[float]:
    """Tokens a second of each round."""
    return [round(sum(run["tokens"]) / sum(run["seconds"]), 1) for run in runs]


def peak_of(runs: list[dict[str, Any]]) -> float:
    return median(run["peak_bytes"] for run in runs)


def compared(which: str, ratio: float, fewer: float) -> dict[str, float]:
    """A ratio, and how much of it is fewer operations and how much efficiency."""
    found = {"ratio": ratio, "flops_ratio": fewer, "efficiency_ratio": ratio / fewer}
    return {f"{name}{which}": round(value, 2) for name, value in found.items()}


# ---- the parts


def ppo_update(bench: Bench, peak_gflops: float) -> dict[str, Any]:
    """One update, 16 rollouts of 32 + 48 tokens, two epochs."""
    spec = {**UPDATE, "updates": bench.updates}
    config = bench.params.ppo
    layers, network = bench.adapted(config), config.value_network
    watched = {"watch_every": config.watch_every}
    runs = bench.in_turn(
        {
            "default": ("ppo_ours", {**spec, "layers": layers, "value_network": network, **watched}),
            "trl": ("ppo_trl", {**spec, "lora": False}),
            "separate": ("ppo_ours", {**spec, "layers": 0}),
            "shared": ("ppo_ours", {**spec, "layers": 0, "value_network": "shared"}),
            "trl_lora": ("ppo_trl", {**spec, "lora": True}),
        }
    )
    checkpointed = {**spec, "updates": 1, "lora": False, "checkpointed": True}  # for its memory, so once is enough
    runs["trl_checkpointed"] = [bench.child("ppo_trl", model=bench.model, **checkpointed)]
    rows = flops.Rows(UPDATE["rollouts"], UPDATE["prompt"], UPDATE["response"])
    needed = {
        "default": flops.ppo_ours(
            bench.shape, rows, prompts=rows.count, layers=layers, epochs=2, shared=network == "shared", **watched
        ),
        "separate": flops.ppo_ours(bench.shape, rows, prompts=rows.count, layers=bench.shape.layers, epochs=2),
        "shared": flops.ppo_ours(
            bench.shape, rows, prompts=rows.count, layers=bench.shape.layers, epochs=2, shared=True
        ),
        "trl": flops.ppo_trl(bench.shape, rows, epochs=2, lora=False),
        "trl_lora": flops.ppo_trl(bench.shape, rows, epochs=2, lora=True),
        "trl_checkpointed": flops.ppo_trl(bench.shape, rows, epochs=2, lora=False, checkpointed=True),
    }
    sides = _sides(runs, needed, peak_gflops)

    def ratio(which: str, ours: str, theirs: str = "trl") -> dict[str, float]:
        time = sides[theirs]["median_seconds"] / sides[ours]["median_seconds"]
        return compared(which, time, needed[theirs] / needed[ours])

    return {
        "work": spec,
        "sides": sides,
        **ratio("_default", "default"),
        **ratio("_default_lora", "default", "trl_lora"),
        **ratio("_separate", "separate"),
        **ratio("_shared", "shared"),
        "memory_ratio": round(sides["default"]["peak_gb"] / sides["trl"]["peak_gb"], 3),
        "memory_ratio_checkpointed": round(sides["default"]["peak_gb"] / sides["trl_checkpointed"]["peak_gb"], 3),
    }


def _sides(runs: Samples, needed: dict[str, int], peak_gflops: float) -> dict[str, Any]:
    found = {}
    for name, of_one in runs.items():
        seconds = seconds_of(of_one)
        middle = median(seconds)
        found[name] = {
            "median_seconds": round(middle, 2),
            "seconds": seconds,
            "gflop": round(needed[name] / 1e9, 1),
            "peak_share": round(needed[name] / middle / 1e9 / peak_gflops, 3),
            "tokens_per_second": round(of_one[0]["tokens"][0] / middle, 1),
            "peak_gb": round(peak_of(of_one) / 1e9, 2),
        } | {key: of_one[0][key] for key in ("trained",) if key in of_one[0]}
    return found


def training(bench: Bench, peak_gflops: float, stage: str) -> dict[str, Any]:
    """SFT or reward model: our recipe, ours in full, TRL's in full; tokens without padding."""
    section = getattr(bench.params, stage)
    steps = 3 if bench.quick else 12
    rows = steps * section.batch_size
    runs = bench.in_turn(
        {
            "default": (f"{stage}_ours", {"rows": rows, "layers": section.lora_layers, "epochs": section.epochs}),
            "trl": (f"{stage}_trl", {"rows": rows}),
            "full": (f"{stage}_ours", {"rows": rows, "layers": None, "epochs": 1}),
        }
    )
    sides = {}
    for name, of_one in runs.items():
        layers, rates = bench.adapted(section) if name == "default" else bench.shape.layers, rates_of(of_one)
        operations = operations_a_token(bench.shape, of_one[0], layers=layers, full=name != "default", steps=steps)
        sides[name] = {
            "tokens_per_second": rates,
            "mflop_per_token": round(operations / 1e6, 1),
            "peak_share": round(operations * median(rates) / 1e9 / peak_gflops, 3),
            "peak_gb": round(peak_of(of_one) / 1e9, 2),
        }
    rate = {name: median(side["tokens_per_second"]) for name, side in sides.items()}
    a_token = {name: side["mflop_per_token"] for name, side in sides.items()}
    return {
        "work": {"rows": rows, "batch_size": section.batch_size, "epochs": section.epochs},
        "sides": sides,
        **compared("_default", rate["default"] / rate["trl"], a_token["trl"] / a_token["default"]),
        **compared("_equal", rate["full"] / rate["trl"], a_token["trl"] / a_token["full"]),
        "peak_share": sides["full"]["peak_share"],
    }


def operations_a_token(shape: flops.Shape, run: dict[str, Any], *, layers: int, full: bool, steps: int) -> float:
    """Of the steps that were timed, by the tokens that they were given; an epoch has `steps`, the first is left out."""
    work, timed = flops.Work(*run["work"]), sum(run["tokens"])
    first, passes = sum(run["tokens"][: steps - 1]) / work.given, timed / work.given
    return flops.training(shape, work, layers=layers, full=full, first=first, passes=passes) / timed


def generation(bench: Bench, peak_gflops: float) -> dict[str, Any]:
    """16 rows, 64 new tokens: ours, `generate`, and the matrix products of a step alone."""
    rows, prompt, response = 16, 32, 64
    spec = {"rows": rows, "prompt": prompt, "response": response, "repeats": 1 if bench.quick else 3}
    runs = bench.in_turn({"ours": ("generation_ours", spec), "generate": ("generation_transformers", spec)})
    needed = dict.fromkeys(runs, flops.sampling(bench.shape, flops.Rows(rows, prompt, response), prompts=rows))
    products = bench.child("products", shapes=bench.shape.joined, rows=rows)
    products = {name: value for name, value in products.items() if name != "peak_bytes"}
    best = min(products, key=lambda name: products[name])
    whole, until_first = (
        {name: median(value for run in of_one for value in run[part]) for name, of_one in runs.items()}
        for part in ("seconds", "first_seconds")
    )
    step = {name: (whole[name] - until_first[name]) / (response - 1) for name in whole}
    return {
        "work": {"rows": rows, "prompt": prompt, "response": response},
        "sides": _sides(runs, needed, peak_gflops),
        "first_token_ms": {name: round(1e3 * value, 1) for name, value in until_first.items()},
        "step_ms": {name: round(1e3 * value, 1) for name, value in step.items()},
        "products_ms": {name: round(1e3 * value, 1) for name, value in products.items()},
        "fastest_products": best,
        "bytes_a_step": sum(4 * out * inside for out, inside in bench.shape.joined),
        "flop_a_step": rows * sum(2 * out * inside for out, inside in bench.shape.joined),
        **compared("", whole["generate"] / whole["ours"], 1.0),
        "bound_ratio": round(step["ours"] / products[best], 2),
    }


def growth(bench: Bench) -> dict[str, Any]:
    """Seconds and memory of an update of the default recipe over the batch, over the response, and of a wider model."""
    models: dict[str, Any] = {}
    for name, model in (("135M", bench.model), ("wider", _wider(bench.model))):
        every = 1 if name == "135M" else 2
        models[name] = {
            "rollouts": [_point(bench, model, rollouts=rows) for rows in GROWTH_ROWS[::every]],
            "response": [_point(bench, model, rollouts=4, response=tokens) for tokens in GROWTH_RESPONSES[::every]],
        }
    return {"models": models}


def _point(bench: Bench, model: str, **changes: int) -> dict[str, Any]:
    config = bench.params.ppo
    spec = {**UPDATE, **changes, "updates": 1, "layers": config.lora_layers, "model": model,
            "value_network": config.value_network, "watch_every": config.watch_every}  # fmt: skip
    run = bench.child("ppo_ours", **spec)
    return {
        "rollouts": spec["rollouts"], "response": spec["response"], "seconds": round(median(run["seconds"]), 2),
        "samples": len(run["seconds"]), "peak_gb": round(run["peak_bytes"] / 1e9, 3),
        "working_gb": round(run["working_bytes"] / 1e9, 3), "peak_reset": run["peak_reset"],
    }  # fmt: skip


def _wider(model: str) -> str:
    """A random model, wider and deeper than the default one, with its tokenizer."""
    folder = Path(".rlhf/bench/wider")
    if not (folder / "config.json").is_file():
        from transformers import LlamaForCausalLM

        from rlhf_core.models import load_tokenizer

        config = AutoConfig.from_pretrained(model)
        for name, value in WIDER.items():
            setattr(config, name, value)
        config.head_dim = WIDER["hidden_size"] // WIDER["num_attention_heads"]
        LlamaForCausalLM(config).save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parts: dict[str, Callable[[Bench, float], dict[str, Any]]] = {
        "ppo_update": ppo_update,
        "reward": lambda bench, peak: training(bench, peak, "reward"),
        "sft": lambda bench, peak: training(bench, peak, "sft"),
        "generation": generation,
        "growth": lambda bench, _: growth(bench),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="some parts")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--quick", action="store_true", help="one short round, to see whether it runs")
    parser.add_argument("--model", default=BASE, help="a Llama's folder; the base model if not given")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    published = options.results.resolve() == RESULTS.resolve()
    if published and (options.quick or Path(options.model) != Path(BASE)):
        found = "--quick" if options.quick else f"--model {options.model}"
        raise SystemExit(
            f"{RESULTS} and docs/performance.md are of whole runs of {BASE}, not of {found}. Add --results FILE."
        )
    if not (Path(options.model) / "config.json").is_file() or not PREPARED.is_dir():
        raise SystemExit(f"{options.model} or {PREPARED} is not there. Run `rlhf run --until prepare` first.")
    bench = Bench(options.model, options.rounds, options.quick)
    results = json.loads(options.results.read_text(encoding="utf-8")) if options.results.is_file() else {}
    machine = bench.child("machine")
    peaks = {name: round(machine[name], 1) for name in ("peak_gflops", "plain_gflops", "bandwidth_gb_s", "threads")}
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    results |= peaks  # of the latest run; each part has its own
    for name in options.only:
        found = parts[name](bench, machine["peak_gflops"])
        results[name] = {"run": {"started": started, "model": options.model, "rounds": bench.rounds, **peaks}, **found}
        part = options.results.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        part.replace(options.results)
    if published:
        write_page(results)


if __name__ == "__main__":
    main()
