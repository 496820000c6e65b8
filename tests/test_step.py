"""docs/step.md, executed, and README's own training loop.

python -m pytest tests/test_step.py
"""

import doctest
import re

import torch
from processes import ROOT


def test_one_redi_step_by_hand_is_what_the_code_computes():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "step.md"), module_relative=False)
    assert tried > 15
    assert failed == 0


def test_the_readmes_own_loop_has_redis_loss_and_moves_the_weights():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"<!-- own loop -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert len(code.splitlines()) <= 12
    torch.manual_seed(0)
    hidden = torch.nn.Embedding(6, 8).double()  # the simplest model: one state per token
    head = torch.nn.Linear(8, 6, bias=False).double()
    names = {
        "hidden": hidden(torch.tensor([0, 1, 2, 3, 4])),
        "output_weight": head.weight,
        "targets": torch.tensor([1, 2, 3, 4, 5]),
        "lengths": torch.tensor([3, 2]),  # |y| of the chosen and of the rejected trace
        "optimizer": torch.optim.SGD([head.weight, hidden.weight], lr=0.1),
    }
    before = head.weight.detach().clone()
    exec(code, names)
    logps = (names["hidden"] @ before.T).log_softmax(1).gather(1, names["targets"][:, None])[:, 0]
    expected = -logps[:3].mean() + 0.8 * logps[3:].mean()
    torch.testing.assert_close(names["loss"], expected)
    assert not torch.equal(before, head.weight)
