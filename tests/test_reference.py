"""Reference log-probs on disk: found again, never a wrong one, the same on all ranks.

python -m pytest tests/test_reference.py
"""

import itertools
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import redi_config, run, steps, weights

from redi import run as run_module
from redi.checkpoint import reference
from redi.checkpoint.folder import open_model
from redi.checkpoint.reference import load_reference, reference_path, save_reference
from redi.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
SUMS = torch.tensor([[-1.5, -2.25], [-1e-9, -3e4]], dtype=torch.float64)
DPO = {"objective": "dpo", "beta": 0.5, "lr": 3e-3}


def cached(folder: str = "out/tokens") -> list[Path]:
    return sorted(Path(folder).glob("reference-*"))


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


def test_a_second_run_takes_them_from_disk_and_learns_the_same_bits(here, scored):
    first = steps(run(redi_config(out="one", **DPO)))
    assert scored == [10]
    assert len(cached()) == 1
    second = steps(run(redi_config(out="two", **DPO)))
    assert scored == [10]
    for name, tensor in weights("one").items():
        assert torch.equal(tensor, weights("two")[name])
    assert [record["loss"] for record in first] == [record["loss"] for record in second]


def test_another_objective_lr_and_cut_into_packs_take_the_same(here, scored):
    run(redi_config(out="one", **DPO))
    run(redi_config(out="two", objective="ipo", beta=0.1, lr=1e-5, pack_tokens=60))
    assert scored == [10]
    assert len(cached()) == 1


def test_held_out_pairs_have_their_own(here, scored):
    rows = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("held.jsonl").write_text("".join(rows[:4]))
    run(redi_config(out="one", eval_data="held.jsonl", **DPO))
    run(redi_config(out="two", eval_data="held.jsonl", **DPO))
    assert scored == [10, 4]
    assert len(cached()) == 2


def test_an_objective_without_a_reference_keeps_none(here, scored):
    run(redi_config())
    assert scored == cached() == []


# ---------------------------------------------------------------- what the key holds


def path_of(config, dtype=torch.float32) -> Path:
    model, source = open_model(config.model, config.rope_theta)
    dataset = run_module.load_data(config.data, config, source, paired=True)
    return reference_path(config.cache, source.folder, model.config, dtype, dataset)


def test_another_model_template_dtype_or_selection_is_another_file(here):
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
def test_a_damaged_file_is_computed_again_with_a_notice(here, scored, capsys, damage):
    run(redi_config(out="one", **DPO))
    [path] = cached()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    run(redi_config(out="two", **DPO))
    assert scored == [10, 10]
    assert f"warning: {path} is damaged; it is computed again" in capsys.readouterr().err
    assert path.read_bytes() == whole
    for name, tensor in weights("one").items():
        assert torch.equal(tensor, weights("two")[name])


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    save_reference(tmp_path / "file" / "reference-0.bin", SUMS, ALONE)
    assert "warning: reference log-probs are not cached" in capsys.readouterr().err


def test_what_was_saved_is_read_back_and_nothing_half_written_is_there(tmp_path):
    path = tmp_path / "cache" / "reference-0.bin"
    assert load_reference(path, 2, ALONE) is None
    save_reference(path, SUMS, ALONE)
    assert torch.equal(load_reference(path, 2, ALONE), SUMS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_reference(path, 3, ALONE) is None  # of other rows


# ---------------------------------------------------------------- ranks


RANK_0 = ["has the file", "has no file", "has a damaged file"]
RANK_1 = ["the same", "other values", "no file"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[tuple[str, str], list[torch.Tensor | None]]:
    """What two ranks load, on two nodes whose caches are not shared: one entry per rank."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = list(itertools.product(RANK_0, RANK_1))
    for number, (rank_0, rank_1) in enumerate(cases):
        paths = [cache_of(folder, number, rank) for rank in (0, 1)]
        if rank_0 != "has no file":
            save_reference(paths[0], SUMS, ALONE)
        if rank_0 == "has a damaged file":
            paths[0].write_bytes(one_bit(paths[0].read_bytes()))
        if rank_1 != "no file":
            save_reference(paths[1], SUMS + (rank_1 == "other values"), ALONE)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=load_on_rank, args=(rank, folder, len(cases))) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    by_rank = [torch.load(folder / f"out-{rank}.pt") for rank in (0, 1)]
    return dict(zip(cases, zip(*by_rank)))


def cache_of(folder: Path, number: int, rank: int) -> Path:
    return folder / f"{number}-{rank}" / "reference-0.bin"


def load_on_rank(rank: int, folder: Path, num_cases: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    world = replace(ALONE, rank=rank, world_size=2)
    found = [load_reference(cache_of(folder, n, rank), 2, world) for n in range(num_cases)]
    torch.save(found, folder / f"out-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rank_0", RANK_0)
@pytest.mark.parametrize("rank_1", RANK_1)
def test_all_ranks_take_what_rank_0_reads(loaded, rank_0, rank_1):
    for found in loaded[rank_0, rank_1]:
        assert torch.equal(found, SUMS) if rank_0 == "has the file" else found is None


def test_only_the_first_rank_of_a_node_writes(tmp_path):
    world = World(1, 2, torch.device("cpu"), local_world_size=2)
    save_reference(tmp_path / "reference-0.bin", SUMS, world)
    assert list(tmp_path.iterdir()) == []
