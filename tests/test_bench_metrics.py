"""bench.metrics at a tiny size, and its checks with something broken on purpose.

python -m pytest tests/test_bench_metrics.py
"""

from dataclasses import replace

import pytest

from bench import metrics
from redi import train

TINY = replace(
    metrics.MODEL, vocab_size=97, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8,
)  # fmt: skip


@pytest.mark.parametrize("name", metrics.OBJECTIVE)
def test_it_runs_and_writes_a_ratio_for_each_part(name):
    found = metrics.measured(name, TINY, metrics.OBJECTIVE[name], pairs=3, rounds=2)
    assert list(found) == [name + part for part in ("", "_entropy", "_update", "_update_alone")]
    assert all(entry["n"] == 2 and entry["median"] > 0 for entry in found.values())


def test_a_wrong_entropy_is_not_timed(monkeypatch):
    training = metrics.Training(TINY, metrics.OBJECTIVE["M1"], pairs=3)
    metrics.compare(training)
    monkeypatch.setattr(metrics.Training, "entropy", lambda self: 4.0)
    with pytest.raises(AssertionError, match="of the whole logits"):
        metrics.compare(training)


def test_without_means_without(monkeypatch):
    asked = []
    squared_update_norm = train.squared_update_norm
    monkeypatch.setattr(
        train, "squared_update", lambda o: asked.append("update") or squared_update_norm(o)
    )
    training = metrics.Training(TINY, metrics.OBJECTIVE["M1"], pairs=3)
    neither = training(entropy=False, update=False, lr=1e-3)
    assert asked == []
    assert "chosen_entropy" not in neither
    assert neither["update_norm"] == 0.0
    both = training()
    assert asked == ["update"]
    assert both["chosen_entropy"] > 0
    assert both["update_norm"] > 0
