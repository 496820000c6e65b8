"""Sample with vLLM the prompts that evaluate.py exported. Not run here: no GPU was available.

python docs/vllm.py PROMPTS COMPLETIONS MODEL

PROMPTS is a file of `evaluate.py --export-prompts`; COMPLETIONS is written for `--completions`.
"""

import json
import sys

from vllm import LLM, SamplingParams

prompts, completions, model = sys.argv[1:]
with open(prompts, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
answered = LLM(model).generate(
    [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows],
    [
        SamplingParams(
            n=row["samples"],
            temperature=row["temperature"],
            top_p=row["top_p"],
            max_tokens=row["max_tokens"],
            stop_token_ids=row["stop_token_ids"],
        )
        for row in rows
    ],
)
with open(completions, "w", encoding="utf-8") as file:
    for row, answers in zip(rows, answered):
        for sample, answer in enumerate(answers.outputs):
            completion = {
                "benchmark": row["benchmark"],
                "id": row["id"],
                "sample": sample,
                "text": answer.text,
                "num_tokens": len(answer.token_ids),
                "finish_reason": answer.finish_reason,
            }
            file.write(json.dumps(completion) + "\n")
