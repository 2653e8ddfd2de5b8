"""Sample the base model's three responses a prompt for data/starter/rankings.jsonl.

    python scripts/starter_responses.py BASE_FOLDER PROMPTS.jsonl OUT.jsonl

Temperature, system turn and length limit are drawn for each response, so that quality and length vary; what was drawn
is kept in the row's `origins`. A response that ran into its limit is cut after its last whole sentence. Only sampling
is done here: the scores of the starter rankings came from reading (docs/data.md), not from code.
"""

import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPERATURES = (0.3, 0.6, 0.9, 1.2)
SYSTEMS = (
    "",
    "Answer in one or two short sentences.",
    "You are kind and careful. Answer plainly.",
    "Be brief, correct and friendly.",
)
LIMITS = (32, 48, 64, 96)
SENTENCE_END = re.compile(r"[.!?][\"')]*(?=\s|$)")


def main(base: str, prompts_file: str, out_file: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    prompts = [json.loads(line)["prompt"] for line in Path(prompts_file).read_text(encoding="utf-8").splitlines()]
    draw = random.Random(20261124)
    torch.manual_seed(20261124)
    jobs = defaultdict(list)  # (temperature, limit) -> the rows that one batch can hold
    for number, prompt in enumerate(prompts):
        for slot, temperature in enumerate(draw.sample(TEMPERATURES, 3)):
            jobs[temperature, draw.choice(LIMITS)].append((number, slot, prompt, draw.choice(SYSTEMS)))
    found: dict[tuple[int, int], dict] = {}
    for (temperature, limit), rows in sorted(jobs.items()):
        for start in range(0, len(rows), 48):
            batch = rows[start : start + 48]
            texts = [
                (f"<|im_start|>system\n{system}<|im_end|>\n" if system else "")
                + f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
                for _, _, prompt, system in batch
            ]
            encoded = tokenizer(texts, return_tensors="pt", padding=True)
            out = model.generate(
                **encoded, max_new_tokens=limit, do_sample=True, temperature=temperature, top_k=0, pad_token_id=0
            )
            for (number, slot, _, system), ids in zip(batch, out[:, encoded.input_ids.shape[1] :], strict=True):
                ended = tokenizer.eos_token_id in ids.tolist()
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                ends = [match.end() for match in SENTENCE_END.finditer(text)]
                if not ended and ends:
                    text = text[: ends[-1]]
                found[number, slot] = {
                    "response": text.strip(),
                    "origin": {"model": "base", "temperature": temperature, "system": system, "limit": limit},
                }
            print(f"{len(found)} of {3 * len(prompts)}", flush=True)
    with open(out_file, "w", encoding="utf-8") as out_handle:
        for number, prompt in enumerate(prompts):
            slots = [found[number, slot] for slot in range(3)]
            out_handle.write(json.dumps({"prompt": prompt, "samples": slots}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
