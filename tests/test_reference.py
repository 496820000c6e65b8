"""Reference log-probs on disk: found again, never a wrong one, the same on all ranks.

python -m pytest tests/test_reference.py
"""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import here, made, redi_config, run, steps, weights  # noqa: F401 (fixtures)

from redi import batches
from redi import run as run_room
from redi.checkpoint import reference
from redi.checkpoint.folder import load_model
from redi.checkpoint.reference import load_reference, reference_path, save_reference
from redi.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
SUMS = torch.tensor([[-1.5, -2.25], [-1e-9, -3e4]], dtype=torch.float64)
DPO = {"objective": "dpo", "beta": 0.5, "lr": 3e-3}


def kept(folder: str = "out/tokens") -> list[Path]:
    return sorted(Path(folder).glob("reference-*"))


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """How many rows were scored, pass by pass."""
    passes, score = [], batches._score

    def counted(model, task):
        passes.append(len(task.dataset))
        return score(model, task)

    monkeypatch.setattr(batches, "_score", counted)
    return passes


# ---------------------------------------------------------------- used again


def test_a_second_run_takes_them_from_disk_and_learns_the_same_bits(here, scored):  # noqa: F811
    first = steps(run(redi_config(out="one", **DPO)))
    assert scored == [10]
    assert len(kept()) == 1
    second = steps(run(redi_config(out="two", **DPO)))
    assert scored == [10]
    for name, tensor in weights("one").items():
        assert torch.equal(tensor, weights("two")[name])
    assert [record["loss"] for record in first] == [record["loss"] for record in second]


def test_another_objective_learning_rate_and_cut_into_packs_take_the_same(here, scored):  # noqa: F811
    run(redi_config(out="one", **DPO))
    run(redi_config(out="two", objective="ipo", beta=0.1, lr=1e-5, pack_tokens=60))
    assert scored == [10]
    assert len(kept()) == 1


def test_held_out_pairs_have_their_own(here, scored):  # noqa: F811
    rows = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("held.jsonl").write_text("".join(rows[:4]))
    run(redi_config(out="one", eval_data="held.jsonl", **DPO))
    run(redi_config(out="two", eval_data="held.jsonl", **DPO))
    assert scored == [10, 4]
    assert len(kept()) == 2


def test_an_objective_without_a_reference_keeps_none(here, scored):  # noqa: F811
    run(redi_config())
    assert scored == kept() == []


# ---------------------------------------------------------------- what the key holds


def path_of(config, dtype=torch.float32) -> Path:
    model, source = load_model(config.model, config.rope_theta)
    dataset = run_room.load_data(config.data, config, source, paired=True)
    return reference_path(config.cache, source.folder, model.config, dtype, dataset)


def test_another_model_data_template_dtype_selection_or_rotary_base_is_another_file(here):  # noqa: F811
    paths = [path_of(redi_config()), path_of(redi_config(), torch.bfloat16)]
    paths.append(path_of(redi_config(rope_theta=5e5)))
    paths.append(path_of(redi_config(max_response=20)))  # leaves rows out

    rows = Path("pairs.jsonl").read_text()
    Path("other.jsonl").write_text(rows.replace("Compute", "Work out"))
    paths.append(path_of(redi_config(data="other.jsonl")))

    shutil.copytree("student", "template")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        file = Path("template") / name
        if file.is_file():
            file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|> "))
    paths.append(path_of(redi_config(model="template")))

    shutil.copytree("student", "weights")
    file = Path("weights/model.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[-1] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    paths.append(path_of(redi_config(model="weights")))

    assert len(set(paths)) == len(paths)
    assert path_of(redi_config(lr=7.0, epochs=3)) == paths[0]
    shutil.copytree("student", "copy")
    assert path_of(redi_config(model="copy")) == paths[0]


# ---------------------------------------------------------------- damaged


def cut_short(content: bytes) -> bytes:
    return content[:-8]


def one_bit(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize("damage", [cut_short, one_bit, lambda content: b""])
def test_a_damaged_file_is_computed_again_with_a_notice(here, scored, capsys, damage):  # noqa: F811
    run(redi_config(out="one", **DPO))
    [path] = kept()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    run(redi_config(out="two", **DPO))
    assert scored == [10, 10]
    assert f"{path}: is not what was written; computed again" in capsys.readouterr().err
    assert path.read_bytes() == whole
    for name, tensor in weights("one").items():
        assert torch.equal(tensor, weights("two")[name])


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    save_reference(tmp_path / "file" / "reference-0.bin", SUMS, ALONE)
    assert "warning: reference log-probs are not kept" in capsys.readouterr().err


def test_what_was_saved_is_read_back_and_nothing_half_written_is_there(tmp_path):
    path = tmp_path / "cache" / "reference-0.bin"
    assert load_reference(path, 2, ALONE) is None
    save_reference(path, SUMS, ALONE)
    assert torch.equal(load_reference(path, 2, ALONE), SUMS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_reference(path, 3, ALONE) is None  # of other rows


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("others", ["the same", "other bytes", "nothing"])
def test_ranks_use_a_file_only_if_all_have_the_same(tmp_path, monkeypatch, others):
    """Two nodes whose caches are not shared, one after another: the first notes what it says."""
    said = []

    def add(tensor, world):
        said.append(tensor.clone())
        if len(said) == 2:
            tensor += said[0]

    monkeypatch.setattr(reference, "add_over_ranks", add)
    ranks = [replace(ALONE, rank=rank, world_size=2) for rank in (0, 1)]
    paths = [tmp_path / str(rank) / "reference-0.bin" for rank in (0, 1)]
    save_reference(paths[0], SUMS, ranks[0])
    if others != "nothing":
        save_reference(paths[1], SUMS + (others == "other bytes"), ranks[1])

    load_reference(paths[0], 2, ranks[0])  # its sum is not whole yet: only what it says counts
    found = load_reference(paths[1], 2, ranks[1])
    said[:] = [said[1]]
    again = load_reference(paths[0], 2, ranks[0])
    for one in (found, again):
        assert torch.equal(one, SUMS) if others == "the same" else one is None


def test_only_the_first_rank_of_a_node_writes(tmp_path):
    world = SimpleNamespace(is_local_rank_zero=False)
    save_reference(tmp_path / "reference-0.bin", SUMS, world)
    assert list(tmp_path.iterdir()) == []
