"""Stage 2: learn from right and wrong traces of the same problem (Eq. 5 of arXiv 2505.24850).

    python train_redi.py                                      the published run
    python train_redi.py --config recipes/toy_redi.toml
    python train_redi.py --config recipes/dpo.toml            a baseline of the paper

Reads the stage-1 model and pairs {"prompt": [messages], "chosen": [message], "rejected":
[message]}, as `python -m redi.prepare` writes them, or labeled rows {"prompt", "completion",
"label": true or false}, which are half a pair each, and minimizes per pair

    redi        -M_w + alpha M_l                              alpha 0.8
    symmetric   -M_w + M_l
    dpo         -log sigmoid(beta [(S_w - S_w_ref) - (S_l - S_l_ref)])
    simpo       -log sigmoid(beta (M_w - M_l) - gamma)

with M the mean and S the sum of a response's log-probs, or an objective of redi/related_losses.py:
positives, dpo_norm, irpo, dpop, ipo, apo_zero, orpo, npo, topr, dft, redi_weighted, asymre,
w_reinforce, uft. Writes a Hugging Face folder. Every setting with its default: redi/recipe.py.
"""

try:
    from redi.programs import train_redi  # imports torch, which takes seconds
except KeyboardInterrupt:
    raise SystemExit(130) from None

if __name__ == "__main__":
    train_redi()
