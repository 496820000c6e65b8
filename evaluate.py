"""Sample a model on benchmarks and grade its answers (Section 4 of arXiv 2505.24850).

    python evaluate.py                                        the paper's benchmarks and settings
    python evaluate.py --config recipes/eval_tables.toml      and the length limit of its code
    torchrun --nproc_per_node 8 evaluate.py --benchmark aime24 --samples 64
    python evaluate.py --config recipes/toy_eval.toml --model out/demo/sft --out out/demo/eval/sft
    python evaluate.py --completions made.jsonl               made by vLLM, SGLang, an API

Samples `--samples` answers per problem at temperature 0.6, top-p 0.95. Each completion is written
to disk when it is finished: a killed evaluation, started again, samples only the rest. Writes
completions/ and verdicts/, one line per completion, and report.json, .md and .html: pass@1 with its
SEM and interval, pass@k, majority vote, lengths and failures, and a page to read completions in.
Two graders judge every completion, Math-Verify's rules and the paper's; each number names its own.
`python -m redi.eval.grade regrade OUT` grades the same completions again, in seconds.
"""

try:
    from redi.programs import evaluate  # imports torch, which takes seconds
except KeyboardInterrupt:
    raise SystemExit(130) from None

if __name__ == "__main__":
    evaluate()
