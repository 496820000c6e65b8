"""redi/checkpoint/ against transformers and safetensors: folders in and out, and failures."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import child, die, main_in_this_process
from safetensors.torch import load_file, save_file
from small_run import HERE, refusal

from redi.checkpoint import __main__ as exporting
from redi.checkpoint import folder as checkpoint
from redi.checkpoint.config_json import read_rope_theta
from redi.checkpoint.folder import Source, load_model, open_model, save_model
from redi.checkpoint.resume import Checkpoints
from redi.checkpoint.weights import (
    HEAD,
    INDEX,
    WEIGHTS,
    fill,
    read_shards,
    weights_hash,
    write_shards,
)
from redi.data.files import hash_files
from redi.data.tokenizer import chatml
from redi.distributed import Parallelism, parallelize
from redi.objectives import Totals, sft
from redi.packing import TokenSequence, pack

MANY_SHARDS = 20_000  # bytes


@pytest.fixture
def folder(save_qwen2, save_tokenizer, tmp_path) -> Path:
    """A model with its tokenizer; the base model's stop token is not the template's."""
    save_qwen2(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": 0}')
    return save_tokenizer(tmp_path / "source")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def edit_json(path: Path, **changes) -> None:
    """Change fields of a JSON file; a value of ... removes one."""
    value = {**read_json(path), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def load_and_save(folder: Path, out: Path, **settings) -> Source:
    model, source = load_model(folder)
    save_model(model, out, source, **settings)
    return source


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, each stored once."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    assert all(files)  # none is empty
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    assert len(tensors) == sum(map(len, files))
    return tensors


def bits(folder: Path) -> dict[str, bytes]:
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in stored(folder).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def logits(folder: Path) -> torch.Tensor:
    """What transformers computes with the model of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None], use_cache=False).logits


# ---------------------------------------------------------------- in and out again (invariant 6)


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, MANY_SHARDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_load_then_save_is_bitwise_and_transformers_computes_the_same_logits(
    save_qwen2, tmp_path, monkeypatch, tied, dtype, shard_bytes
):
    """Of a folder in one file and of one that transformers wrote in shards, without tokenizer."""
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", shard_bytes)
    before, after = tmp_path / "in", tmp_path / "out"
    theirs = save_qwen2(before, dtype, tie_word_embeddings=tied)
    if shard_bytes == MANY_SHARDS:
        (before / WEIGHTS).unlink()
        theirs.save_pretrained(before, max_shard_size="20KB")
        assert (before / INDEX).is_file()
    model, source = load_model(before)
    assert (source.chat, source.stop_ids) == (None, [])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    save_model(model, after, source)
    assert bits(after) == bits(before)
    assert {tensor.dtype for tensor in stored(after).values()} == {dtype}
    assert ("lm_head.weight" in stored(after)) == (not tied)
    shards = [load_file(file).values() for file in after.glob("*.safetensors")]
    assert (len(shards) > 1) == (shard_bytes == MANY_SHARDS)
    assert all(len(s) == 1 or sum(t.nbytes for t in s) <= shard_bytes for s in shards)
    again, _ = load_model(after)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert torch.equal(logits(after), logits(before))
    assert not (after / "tokenizer_config.json").exists()


def test_weights_that_are_views_of_padded_shards_are_saved(folder, tmp_path):
    # 320 rows on 3 ranks: the gathered tensor is a view of 3 x 107 rows.
    model, source = load_model(folder)
    for parameter in model.parameters():
        parameter.data = torch.cat([parameter.data, parameter.data[:1]])[: len(parameter)]
    save_model(model, tmp_path / "saved", source)
    assert bits(tmp_path / "saved") == bits(folder)


@pytest.mark.parametrize("form", ["new", "old"])
def test_config_json_is_read_in_either_form_and_saved_in_both_with_overrides(
    folder, tmp_path, capsys, form
):
    out = tmp_path / "out"
    if form == "old":
        changes = dict.fromkeys(("rope_parameters", "dtype", "layer_types"), ...)
        edit_json(folder / "config.json", rope_theta=10_000.0, torch_dtype="float32", **changes)
    load_and_save(folder, out)
    config = read_json(out / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"

    model, source = open_model(folder, rope_theta=300_000.0, max_position_embeddings=512)
    model.to_empty(device="cpu")
    fill(model, folder)
    assert capsys.readouterr().out.splitlines() == [
        "max_position_embeddings: 128 -> 512",
        "rope_theta: 10000 -> 300000",
    ]
    save_model(model, out, source)
    config = read_json(out / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 300_000.0
    assert config["rope_parameters"]["rope_type"] == "default"
    assert config["max_position_embeddings"] == 512
    # The oracle: transformers on the old weights, with its own field edited by hand.
    before = logits(folder)
    rope = {"rope_theta": 300_000.0, "rope_type": "default"}
    edit_json(folder / "config.json", rope_parameters=rope, rope_theta=...)
    assert torch.equal(logits(out), logits(folder))
    assert not torch.equal(logits(out), before)
    again, _ = load_model(out)
    assert (again.config.rope_theta, again.config.max_positions) == (300_000.0, 512)


def test_saving_over_a_model_replaces_it_and_leaves_other_files(folder, tmp_path, monkeypatch):
    """A template, shards or an index that the new model does not have would be read with it."""
    model, source = load_model(folder)
    out = tmp_path / "out"
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", MANY_SHARDS)
    save_model(model, out, source)
    for name in ("chat_template.jinja", "added_tokens.json", "metrics.jsonl"):
        (out / name).write_text("{}")
    monkeypatch.undo()
    save_model(model, out, source, card="# A model\n")
    saved = contents(out)
    assert saved.keys() == {
        "config.json", "generation_config.json", "metrics.jsonl", "model.safetensors", "README.md",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (saved["README.md"], saved["metrics.jsonl"]) == (b"# A model\n", b"{}")
    for _ in range(2):
        save_model(model, folder, source)  # over itself
        assert bits(folder) == bits(out)
    assert load_model(folder)[1].stop_ids == source.stop_ids


# ---------------------------------------------------------------- one decision about stopping


@pytest.mark.parametrize("legacy", [False, True])
def test_the_three_files_agree_on_where_to_stop(folder, tmp_path, legacy):
    """The base model stops at <|endoftext|>, 0; the template ends a turn with <|im_end|>, 2."""
    from transformers import AutoTokenizer, GenerationConfig

    if legacy:  # where it is still written, it overrides tokenizer_config.json
        text = json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False}})
        (folder / "special_tokens_map.json").write_text(text)
    assert load_and_save(folder, tmp_path / "out").stop_ids == [2, 0]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 0]
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    assert load_model(tmp_path / "out")[1].stop_ids == [2, 0]


def test_stop_ids_come_from_config_json_if_generation_config_names_none(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    edit_json(folder / "config.json", eos_token_id=[1, 2])
    assert load_model(folder)[1].stop_ids == [2, 1]
    (folder / "generation_config.json").unlink()
    assert load_model(folder)[1].stop_ids == [2, 1]


@pytest.mark.parametrize("template", ["tokenizer_config.json", "chat_template.jinja"])
def test_transformers_reads_the_saved_tokenizer_as_we_do(folder, tmp_path, template):
    from transformers import AutoTokenizer

    if template == "chat_template.jinja":
        edit_json(folder / "tokenizer_config.json", chat_template=...)
        (folder / template).write_text(chatml(system="You are terse."))
    source = load_and_save(folder, tmp_path / "out")
    messages = [{"role": "user", "content": "6-1=?"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    assert source.chat.encode_prompt(messages) == theirs["input_ids"]
    assert load_model(tmp_path / "out")[1].chat.encode_prompt(messages) == theirs["input_ids"]


# ---------------------------------------------------------------- power cuts, kills, full disks


def test_files_are_flushed_inside_the_folder_before_they_get_their_names_and_config_json_is_last(
    folder, tmp_path, monkeypatch
):
    """After a power cut, a folder with a config.json is complete. A rename cannot cross from one
    file system to another, so nothing is written outside of the folder, which may be a mount."""
    model, source = load_model(folder)
    events, fsync, replace = [], os.fsync, os.replace
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)

    def flushed(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(old, new):
        assert out in Path(old).absolute().parents
        events.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    save_model(model, ".", source, card="# A model")
    names = {path.name for path in out.iterdir()}
    assert names == {event for event in events if isinstance(event, str)}
    for name in names:
        assert events.index((out / name).stat().st_ino) < events.index(name)
    assert events[-3:] == [out.stat().st_ino, "config.json", out.stat().st_ino]
    assert bits(out) == bits(folder)


def save_in_shards() -> None:
    checkpoint.MAX_SHARD_BYTES = 50_000
    load_and_save(Path("source"), Path("out"))


def die_at_rename(number: int) -> None:
    replace, renamed = os.replace, []

    def dying(old, new) -> None:
        renamed.append(new)
        if len(renamed) == number:
            die()
        replace(old, new)

    os.replace = dying


@pytest.mark.parametrize("number", range(1, 8))
def test_a_model_killed_while_it_is_moved_does_not_load_and_is_no_obstacle(folder, number):
    out = shutil.copytree(folder, folder.parent / "out")
    child(folder.parent, [], partial(die_at_rename, number), save_in_shards).ends(-signal.SIGKILL)
    assert "config.json: no such file" in refusal(load_model, out)
    [left] = out.glob(".saving-*")
    left.rename(out / f".saving-{os.getpid()}")  # another process may get the same number
    load_and_save(folder, out)
    assert bits(out) == bits(folder)
    assert not list(out.glob(".saving-*"))


@pytest.mark.parametrize("limit", [10_000, 50_000])
def test_a_full_disk_is_one_line_and_leaves_the_previous_model_whole(folder, monkeypatch, limit):
    """No file may grow beyond the limit: the first shard, or the card, which is written last."""
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", MANY_SHARDS)
    model, source = load_model(folder)
    before = contents(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = refusal(save_model, model, folder, source, card="x" * 60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"{folder}: the model could not be saved")
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_cannot_be_made_is_one_line(folder, tmp_path):
    (tmp_path / "file").touch()
    assert "could not be saved" in refusal(load_and_save, folder, tmp_path / "file" / "out")


# ---------------------------------------------------------------- broken folders


def write(name: str, content: str) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_text(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit(name: str, **changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, **changes)


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    """Store another tensor under a name."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, name: tensor}, folder / WEIGHTS, {"format": "pt"})

    return change


def rename_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.final_norm.weight"] = tensors.pop(NORM)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def cut_short(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 10_000)


def split_in_two_with_the_same_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file(tensors, folder / shards[0])
    save_file({NORM: tensors[NORM]}, folder / shards[1])
    index = {"weight_map": {**dict.fromkeys(tensors, shards[0]), NORM: shards[1]}}
    (folder / INDEX).write_text(json.dumps(index))


def add_token_320(folder: Path) -> None:
    value = read_json(folder / "tokenizer.json")
    added = {**value["added_tokens"][0], "content": "<|late|>", "id": 320}
    value["model"]["vocab"]["<|late|>"] = 320
    value["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(value))


NORM = "model.norm.weight"
LOST = '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
BROKEN = [  # what is done to a folder; what the error says
    (remove("config.json"), ["config.json: no such file"]),
    (write("config.json", '{"model_type": "qw'), ["config.json: not readable as JSON"]),
    (write("config.json", "[]"), ["config.json: expected a JSON object"]),
    (
        edit("config.json", max_position_embeddings=10**12),
        ["max_position_embeddings is 1000000000000; expected 1 to 2097152"],
    ),
    (edit("config.json", rms_norm_eps="tiny"), ["config.json: a field has", "type", "'tiny'"]),
    (edit("generation_config.json", eos_token_id=[0, 320]), ["eos_token_id is 320"]),
    (add_token_320, ["tokenizer.json: token id 320 has no embedding", "vocab_size is 320"]),
    (remove(WEIGHTS), ["model.safetensors: no such file"]),
    (cut_short, ["model.safetensors: not a complete safetensors file"]),
    (write(WEIGHTS, ""), ["model.safetensors: not a complete safetensors file"]),
    (write(INDEX, LOST), ["model-00001-of-00002.safetensors: no such file"]),
    (write(INDEX, '{"weight_map": 3}'), [INDEX, "weight_map"]),
    (
        split_in_two_with_the_same_tensor,
        ["model-00002-of-00002.safetensors: model.norm.weight is stored in another file too"],
    ),
    (put(NORM, torch.ones(31)), ["model.norm.weight has shape [31]", "[32]"]),
    (put(NORM, torch.ones(32, dtype=torch.int8)), ["model.norm.weight is I8"]),
    (rename_a_tensor, ["missing: model.norm.weight", "unexpected: model.final_norm.weight"]),
    (put(HEAD, torch.ones(320, 32)), ["lm_head.weight", "tie_word_embeddings"]),
    (put(HEAD, torch.ones(3, 32)), ["lm_head.weight has shape [3, 32]", "[320, 32]"]),
]


@pytest.mark.parametrize(("damage", "parts"), BROKEN, ids=[parts[0] for _, parts in BROKEN])
def test_a_broken_folder_is_one_line_that_names_it(folder, damage, parts):
    damage(folder)
    message = refusal(load_model, folder)
    assert [part for part in [*parts, str(folder)] if part not in message] == []


def test_a_tied_head_that_is_stored_and_equal_is_accepted_and_saved_once(folder, tmp_path):
    before = bits(folder)
    put(HEAD, stored(folder)["model.embed_tokens.weight"])(folder)
    load_and_save(folder, tmp_path / "out")
    assert bits(tmp_path / "out") == before


# ---------------------------------------------------------------- fp32 weights, bf16 compute


@pytest.fixture(scope="module")
def sharded(save_qwen2, tmp_path_factory):
    """(folder, a model that computes in fp32, the same one under FSDP2 in bf16)."""
    folder = tmp_path_factory.mktemp("sharded")
    save_qwen2(folder, tie_word_embeddings=True)
    plain, mixed = load_model(folder)[0], load_model(folder)[0]
    parallelize(plain, HERE, Parallelism())
    parallelize(mixed, HERE, Parallelism(torch.bfloat16))
    yield folder, plain, mixed
    torch.distributed.destroy_process_group()


class Shard:
    """A rank's rows of a tensor, cut as FSDP2 does: ceil(rows / ranks) rows on each rank, as long
    as there are any."""

    def __init__(self, whole: torch.Tensor, rank: int, ranks: int):
        self.whole, chunks = whole, whole.chunk(ranks)
        self.local = chunks[rank].clone() if rank < len(chunks) else whole[:0].clone()
        self.device_mesh = SimpleNamespace(
            ndim=1, size=lambda dim: ranks, get_local_rank=lambda dim: rank
        )

    def __len__(self) -> int:
        return len(self.whole)

    def to_local(self) -> torch.Tensor:
        return self.local


@pytest.mark.parametrize("saved_by", [1, 2, 3, 8])
@pytest.mark.parametrize("read_by", [1, 2, 3, 8])
def test_rows_saved_by_some_ranks_are_read_by_others(saved_by, read_by, tmp_path):
    wholes = {
        "matrix": torch.randn(10, 3), "vector": torch.randn(5, dtype=torch.float64),
        "of fewer rows than ranks": torch.randn(3, 2, 2).bfloat16(), "last": torch.randn(16),
    }  # fmt: skip
    files = [tmp_path / f"rank-{rank}.safetensors" for rank in range(saved_by)]
    for rank, file in enumerate(files):
        shards = {name: Shard(whole, rank, saved_by) for name, whole in wholes.items()}
        assert write_shards(file, shards) == hash_files([file])
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, shards[name].local)
    for rank in range(read_by):
        shards = {name: Shard(whole, rank, read_by) for name, whole in wholes.items()}
        expected = {name: shard.local.clone() for name, shard in shards.items()}
        for shard in shards.values():
            shard.local.fill_(7)
        read_shards(files, shards)
        assert all(torch.equal(shards[name].local, expected[name]) for name in wholes)
    if saved_by > 1:
        assert "rows of matrix; expected 10" in refusal(read_shards, files[1:], shards)


def sft_loss(model) -> torch.Tensor:
    rng = np.random.default_rng(0)
    rows = [
        TokenSequence(rng.integers(0, 320, n), prompt_length=3, row=0, sign=1) for n in (9, 5, 20)
    ]
    totals = Totals(num_rows=3, num_tokens=sum(row.response_length for row in rows))
    lengths = torch.tensor([row.response_length for row in rows])
    batch = pack(rows, sft().token_weights(torch.ones(3), lengths, totals))
    return sft().loss(model, batch, totals)[0]


def test_bf16_gradients_are_fp32_close_to_those_of_fp32_not_divided_and_add_up(sharded):
    _, plain, mixed = sharded
    losses = []
    for model in (plain, mixed):
        model.zero_grad()
        losses.append(sft_loss(model))
        losses[-1].backward()
    assert abs(losses[1].item() - losses[0].item()) < 0.02 * losses[0].item()
    assert losses[1].item() != losses[0].item()  # it did compute in bf16
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    errors = {}
    for name, parameter in mixed.named_parameters():
        gradient = parameter.grad.full_tensor()
        assert parameter.dtype == gradient.dtype == torch.float32
        errors[name] = (gradient - expected[name]).norm()
        assert errors[name] < 0.1 * expected[name].norm(), name
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert torch.stack(list(errors.values())).norm() < 0.05 * norm
    once = mixed.model.norm.weight.grad.full_tensor().clone()
    sft_loss(mixed).backward()
    torch.testing.assert_close(mixed.model.norm.weight.grad.full_tensor(), 2 * once)


def test_a_step_of_1e_6_moves_the_master_weights_and_they_are_what_is_saved(sharded, tmp_path):
    folder, _, mixed = sharded
    _, source = load_model(folder)
    save_model(mixed, tmp_path / "before", source)
    assert bits(tmp_path / "before") == bits(folder)

    mixed.zero_grad()
    sft_loss(mixed).backward()
    torch.optim.AdamW(mixed.parameters(), lr=1e-6, weight_decay=0.0).step()
    save_model(mixed, tmp_path / "after", source)
    before, after = stored(tmp_path / "before"), stored(tmp_path / "after")
    for name, parameter in mixed.named_parameters():
        assert torch.equal(after[name], parameter.full_tensor()), name
        moved = after[name] - before[name]
        assert moved.abs().max() > 0, name
        assert moved.abs().max() < 1.5e-6, name  # AdamW's first step is the learning rate


# ---------------------------------------------------------------- a checkpoint as a model folder


def saved_run(folder: Path, save_dtype: str = "source") -> Path:
    """The checkpoint of a run, whose weights are the model's times two."""
    model, _ = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    run = folder.parent / "run"
    run.mkdir()
    settings = {
        "model": str(folder), "rope_theta": 5e5, "max_position_embeddings": "keep",
        "save_dtype": save_dtype,
    }  # fmt: skip
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    (run / "config.toml").write_text("".join(lines))
    facts = {"parent's weights sha256": weights_hash(folder)}
    checkpoints = Checkpoints(run, HERE, facts, keep=1)
    assert checkpoints.save(7, model, torch.optim.AdamW(model.parameters()))
    return checkpoints.at(7)


def export(*arguments: object) -> int:
    return main_in_this_process(exporting.main, "export", *arguments)


@pytest.mark.parametrize(
    ("dtype", "saved"), [("source", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_an_exported_checkpoint_is_a_model_folder_with_its_weights_in_the_runs_dtype(
    folder, tmp_path, monkeypatch, capsys, dtype, saved
):
    out = tmp_path / "out"
    monkeypatch.chdir(saved_run(folder, dtype).parent)  # it may be named from within the run
    assert export("step-000007", "--out", out) == 0
    assert f"step-000007 of {folder.parent / 'run'}" in capsys.readouterr().out
    before = stored(folder)
    for name, tensor in stored(out).items():
        assert torch.equal(tensor, (2 * before[name]).to(saved))
    config = read_json(out / "config.json")
    assert config["dtype"] == config["torch_dtype"] == str(saved).removeprefix("torch.")
    assert load_model(out)[1].dtype == saved
    assert read_rope_theta(config, "") == 5e5
    assert logits(out).isfinite().all()


def another_parent(step: Path) -> None:
    path = step.parents[2] / "source/model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


NOT_EXPORTED = {
    "no such folder": shutil.rmtree,
    "config.toml: no such file": lambda step: (step.parents[1] / "config.toml").unlink(),
    "expected the settings of a training run": lambda step: os.truncate(
        step.parents[1] / "config.toml", 0
    ),
    "rank-0.safetensors has changed since it was written": lambda step: os.truncate(
        step / "rank-0.safetensors", 1000
    ),
    "has changed since": another_parent,
}


@pytest.mark.parametrize("named", NOT_EXPORTED)
def test_what_cannot_be_exported_is_one_line(named, folder, tmp_path, capsys):
    step = saved_run(folder)
    capsys.readouterr()
    NOT_EXPORTED[named](step)
    assert export(step, "--out", tmp_path / "out") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert not (tmp_path / "out").exists()
    assert export(step.parent, "--out", folder) == 2  # it is not empty
