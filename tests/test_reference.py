"""Reference log-probs on disk: found again, never a wrong one, the same on all ranks.

python -m pytest tests/test_reference.py
"""

import itertools
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import ranks
from safetensors.torch import load_file, save_file
from small_run import HERE, redi_config, run, steps, weights

from redi import distributed
from redi import run as run_module
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


def test_another_objective_lr_and_cut_into_packs_take_the_same(here, scored):
    run(dpo(out="one"))
    run(redi_config(out="two", objective="ipo", beta=0.1, lr=1e-5, pack_tokens=60))
    assert scored == [10]
    assert len(cached()) == 1


def test_held_out_pairs_have_their_own(here, scored):
    rows = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("held.jsonl").write_text("".join(rows[:4]))
    run(dpo(out="one", eval_data="held.jsonl"))
    run(dpo(out="two", eval_data="held.jsonl"))
    assert scored == [10, 4]
    assert len(cached()) == 2


def test_an_objective_without_a_reference_keeps_none(here, scored):
    run(redi_config())
    assert scored == cached() == []


DAMAGE = {
    "none": lambda content: content,
    "cut short": lambda content: content[:-8],
    "one bit": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_second_run_reads_the_file_or_replaces_a_damaged_one_and_learns_the_same_bits(
    kind, here, scored, capsys
):
    first = steps(run(dpo(out="one")))
    [path] = cached()
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[kind](whole))
    second = steps(run(dpo(out="two")))
    assert scored == [10] * (1 if kind == "none" else 2)
    warning = f"warning: {path} is damaged; it is computed again"
    assert (warning in capsys.readouterr().err) == (kind != "none")
    assert path.read_bytes() == whole
    assert [record["loss"] for record in first] == [record["loss"] for record in second]
    for name, tensor in weights("one").items():
        assert torch.equal(tensor, weights("two")[name])


# ---------------------------------------------------------------- what the key holds


def path_of(dtype=torch.float32, **changes) -> Path:
    config = redi_config(**changes)
    model, source = open_model(config.model, config.rope_theta)
    dataset = run_module.load_data(config.data, config, source, paired=True)
    return reference_path(config.cache, source.folder, model.config, dtype, dataset)


def test_another_model_template_dtype_or_selection_is_another_file(here):
    rows = Path("pairs.jsonl").read_text()
    Path("other.jsonl").write_text(rows.replace("Compute", "Work out"))
    for folder in ("copy", "template", "weights"):
        shutil.copytree("student", folder)
    for file in (Path("template/tokenizer_config.json"), Path("template/chat_template.jinja")):
        if file.is_file():
            file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|> "))
    tensors = load_file("weights/model.safetensors")
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
    save_reference(path, SUMS, HERE)
    assert torch.equal(load_reference(path, 2, HERE), SUMS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_reference(path, 3, HERE) is None  # of other rows


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    save_reference(tmp_path / "file" / "reference-0.bin", SUMS, HERE)
    assert "warning: reference log-probs are not cached" in capsys.readouterr().err


def test_only_the_first_rank_of_a_node_writes(tmp_path):
    world = World(1, 2, torch.device("cpu"), local_world_size=2)
    save_reference(tmp_path / "reference-0.bin", SUMS, world)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- ranks

RANK_0 = ["has the file", "has no file", "has a damaged file"]
RANK_1 = ["the same", "other values", "no file"]
CASES = list(itertools.product(RANK_0, RANK_1))


def cache_of(case: int, rank: int) -> Path:
    return Path(f"{case}-{rank}/reference-0.bin")


def load_all() -> None:
    """What a rank does: load the file of every case from its own cache."""
    world = distributed.start(timeout_minutes=2)
    with distributed.report_lost_ranks(world, "two minutes"):
        found = [load_reference(cache_of(case, world.rank), 2, world) for case in range(len(CASES))]
    torch.save(found, f"out-{world.rank}.pt")


def test_all_ranks_take_what_rank_0_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (rank_0, rank_1) in enumerate(CASES):
        if rank_0 != "has no file":
            save_reference(cache_of(number, 0), SUMS, HERE)
        if rank_0 == "has a damaged file":
            cache_of(number, 0).write_bytes(DAMAGE["one bit"](cache_of(number, 0).read_bytes()))
        if rank_1 != "no file":
            save_reference(cache_of(number, 1), SUMS + (rank_1 == "other values"), HERE)
    for rank in ranks(tmp_path, [], None, None, main=load_all, local_world_size=1):
        rank.ends(0)
    for rank in (0, 1):
        for (rank_0, rank_1), found in zip(CASES, torch.load(f"out-{rank}.pt")):
            expected = SUMS if rank_0 == "has the file" else None
            assert (found is None) == (expected is None), (rank, rank_0, rank_1)
            assert found is None or torch.equal(found, expected), (rank, rank_0, rank_1)
