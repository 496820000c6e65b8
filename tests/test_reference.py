"""Reference log-probs on disk: found again, never a wrong one, by all ranks or by none.

python -m pytest tests/test_reference.py
"""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_ranks
from safetensors.torch import save_file
from small_run import HERE, assert_same_bits, loaded, redi_config, run, weights

from redi import distributed
from redi.checkpoint import reference
from redi.checkpoint.folder import open_model
from redi.checkpoint.reference import load_reference, reference_path, save_reference
from redi.distributed import World

SUMS = torch.tensor([[-1.5, -2.25], [-1e-9, -3e4]], dtype=torch.float64)
dpo = partial(redi_config, objective="dpo", beta=0.5, lr=3e-3)


def cached() -> list[Path]:
    return sorted(Path("out/tokens").glob("reference-*"))


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """How many rows were scored, pass by pass."""
    passes, score = [], reference._score

    def counted(model, data):
        passes.append(len(data.dataset))
        return score(model, data)

    monkeypatch.setattr(reference, "_score", counted)
    return passes


# ---------------------------------------------------------------- used again


def test_rows_are_scored_once_for_all_objectives_lrs_and_packs_and_only_if_one_needs_it(
    here, scored
):
    rows = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("held.jsonl").write_text("".join(rows[:4]))
    run(redi_config(out="none"))
    assert scored == cached() == []
    run(dpo(out="one", eval_data="held.jsonl"))
    run(redi_config(out="two", objective="ipo", beta=0.1, lr=1e-5, pack_tokens=60))
    run(dpo(out="three", eval_data="held.jsonl"))
    assert scored == [10, 4]
    assert len(cached()) == 2


DAMAGE = {
    "none": lambda content: content,
    "cut short": lambda content: content[:-8],
    "one bit": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_second_run_reads_the_file_or_replaces_a_damaged_one_and_learns_the_same_bits(
    kind, here, scored
):
    run(dpo(out="one"))
    [path] = cached()
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[kind](whole))
    run(dpo(out="two"))
    assert scored == [10] * (1 if kind == "none" else 2)
    assert path.read_bytes() == whole
    assert_same_bits("one", "two")


# ---------------------------------------------------------------- what the key holds


def path_of(dtype=torch.float32, **changes) -> Path:
    config = redi_config(**changes)
    model, source = open_model(config.model, config.rope_theta)
    _, data = loaded(config)
    return reference_path(config.cache, source.folder, model.config, dtype, data.dataset)


def test_another_model_template_dtype_or_selection_is_another_file(here):
    rows = Path("pairs.jsonl").read_text()
    Path("other.jsonl").write_text(rows.replace("Compute", "Work out"))
    for folder in ("copy", "template", "weights"):
        shutil.copytree("student", folder)
    template = Path("template/chat_template.jinja")
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    tensors = weights("weights")
    tensors[sorted(tensors)[len(tensors) // 2]].view(-1)[-1] += 1e-3
    save_file(tensors, "weights/model.safetensors", metadata={"format": "pt"})

    paths = [
        path_of(),
        path_of(torch.bfloat16),
        path_of(rope_theta=5e5),
        path_of(max_response=20),  # leaves rows out
        path_of(data="other.jsonl"),
        path_of(model="template"),
        path_of(model="weights"),
    ]
    assert len(set(paths)) == len(paths)
    assert path_of(lr=7.0, epochs=3) == path_of(model="copy") == paths[0]


# ---------------------------------------------------------------- the file


def test_what_was_saved_is_read_back_and_nothing_half_written_is_there(tmp_path):
    path = tmp_path / "cache" / "reference-0.bin"
    assert load_reference(path, 2) is None
    save_reference(path, SUMS, World(1, 2, HERE.device, local_world_size=2))
    assert not path.parent.exists()  # only the first rank of a node writes
    save_reference(path, SUMS, HERE)
    assert torch.equal(load_reference(path, 2), SUMS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_reference(path, 3) is None  # of other rows


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    save_reference(tmp_path / "file" / "reference-0.bin", SUMS, HERE)
    assert "warning: reference log-probs are not cached" in capsys.readouterr().err


# ---------------------------------------------------------------- ranks

WHOLE, MISSING, DAMAGED = "reference-0.bin", "reference-1.bin", "reference-2.bin"
SCORED = SUMS - 1


def ask_for_all() -> None:
    """What a rank does: ask for three files, each of a model that is already chosen."""
    world = distributed.start(timeout_minutes=2)
    reference._score = lambda *_: SCORED
    reference.reference_path = lambda cache, name, *_: Path(cache, name)
    model, data = SimpleNamespace(config=None), SimpleNamespace(dataset=range(2), world=world)
    with distributed.report_lost_ranks(world, "two minutes"):
        found = [
            reference.reference_logps(model, data, Path(name), torch.float32, f"cache-{world.rank}")
            for name in (WHOLE, MISSING, DAMAGED)
        ]
    torch.save(found, f"out-{world.rank}.pt")


def test_all_ranks_read_or_all_score_and_then_every_node_has_the_scores(tmp_path, monkeypatch):
    """Two nodes of one rank. Node 1 lacks the second file, and node 0 has a damaged third one."""
    monkeypatch.chdir(tmp_path)
    for name in (WHOLE, DAMAGED):
        save_reference(Path("cache-1", name), SUMS, HERE)
    for name in (WHOLE, MISSING, DAMAGED):
        save_reference(Path("cache-0", name), SUMS, HERE)
    damaged = Path("cache-0", DAMAGED)
    damaged.write_bytes(DAMAGE["one bit"](damaged.read_bytes()))
    run_ranks(tmp_path, [], main=ask_for_all, local_world_size=1)
    for rank in (0, 1):
        on_disk = [load_reference(Path(f"cache-{rank}", n), 2) for n in (WHOLE, MISSING, DAMAGED)]
        for found in (torch.load(f"out-{rank}.pt"), on_disk):
            assert all(map(torch.equal, found, (SUMS, SCORED, SCORED)))
