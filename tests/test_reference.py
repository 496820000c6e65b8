"""Reference log-probs on disk: found again, never a wrong one, the same on all ranks.

python -m pytest tests/test_reference.py
"""

import shutil
from functools import partial
from pathlib import Path

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
    kind, here, scored, capsys
):
    run(dpo(out="one"))
    [path] = cached()
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[kind](whole))
    run(dpo(out="two"))
    assert scored == [10] * (1 if kind == "none" else 2)
    warning = f"warning: {path} is damaged; it is computed again"
    assert (warning in capsys.readouterr().err) == (kind != "none")
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
    assert load_reference(path, 2, HERE) is None
    save_reference(path, SUMS, World(1, 2, HERE.device, local_world_size=2))
    assert not path.parent.exists()  # only the first rank of a node writes
    save_reference(path, SUMS, HERE)
    assert torch.equal(load_reference(path, 2, HERE), SUMS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_reference(path, 3, HERE) is None  # of other rows


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    save_reference(tmp_path / "file" / "reference-0.bin", SUMS, HERE)
    assert "warning: reference log-probs are not cached" in capsys.readouterr().err


# ---------------------------------------------------------------- ranks

FOUND, OTHER, DAMAGED = "reference-0.bin", "reference-1.bin", "reference-2.bin"


def load_all() -> None:
    """What a rank does: load three files from its own cache."""
    world = distributed.start(timeout_minutes=2)
    caches = [Path(f"cache-{world.rank}", name) for name in (FOUND, OTHER, DAMAGED)]
    with distributed.report_lost_ranks(world, "two minutes"):
        found = [load_reference(path, 2, world) for path in caches]
    torch.save(found, f"out-{world.rank}.pt")


def test_all_ranks_take_what_rank_0_reads(tmp_path, monkeypatch):
    """Rank 1 lacks the first file; the others it has, whole and with other values."""
    monkeypatch.chdir(tmp_path)
    for path, values in (
        (f"cache-0/{FOUND}", SUMS), (f"cache-0/{DAMAGED}", SUMS),
        (f"cache-0/{OTHER}", SUMS), (f"cache-1/{OTHER}", SUMS + 1), (f"cache-1/{DAMAGED}", SUMS),
    ):  # fmt: skip
        save_reference(Path(path), values, HERE)
    damaged = Path("cache-0", DAMAGED)
    damaged.write_bytes(DAMAGE["one bit"](damaged.read_bytes()))
    run_ranks(tmp_path, [], main=load_all, local_world_size=1)
    for rank in (0, 1):
        first, second, third = torch.load(f"out-{rank}.pt")
        assert torch.equal(first, SUMS)
        assert torch.equal(second, SUMS)
        assert third is None
