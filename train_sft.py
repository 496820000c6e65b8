"""Stage 1: fine-tune on the teacher's correct traces (Eq. 1 of arXiv 2505.24850).

    python train_sft.py                                       the published run
    python train_sft.py --config recipes/toy_sft.toml
    python train_sft.py --data my_traces.jsonl --dry-run      look before training

Reads a model folder or hub id and rows {"prompt": [messages], "completion": [message]}, as
`python -m redi.prepare` writes them. Minimizes minus the mean log-prob of the response tokens over
each optimizer step. Writes a Hugging Face folder, which is where train_redi.py starts.
Every setting with its published default: redi/recipe.py. The loop: redi/train.py.
"""

try:
    from redi.programs import train_sft  # imports torch, which takes seconds
except KeyboardInterrupt:
    raise SystemExit(130) from None

if __name__ == "__main__":
    train_sft()
