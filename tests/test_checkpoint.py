"""redi/checkpoint/ against transformers and safetensors: folders in and out, and failures."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from redi.checkpoint import __main__ as exporting
from redi.checkpoint import folder as checkpoint
from redi.checkpoint.config_json import read_rope_theta
from redi.checkpoint.folder import load_model, open_model, save_model
from redi.checkpoint.resume import Checkpoints
from redi.checkpoint.weights import fill, read_shards, weights_hash, write_shards
from redi.config import UserError
from redi.data.files import hash_files
from redi.data.tokenizer import chatml
from redi.distributed import Parallelism, World, parallelize
from redi.objectives import Totals, sft
from redi.packing import TokenSequence, pack

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(save_qwen2, save_tokenizer, tmp_path) -> Path:
    """A model with its tokenizer; the base model's stop token is not the template's."""
    save_qwen2(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": 0}')
    return save_tokenizer(tmp_path / "source")


def edit_json(path: Path, **changes) -> None:
    """Change fields of a JSON file; a value of ... removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, each stored once."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    assert all(files)  # none is empty
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    assert len(tensors) == sum(map(len, files))
    return tensors


def bits(folder: Path) -> dict[str, bytes]:
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in stored(folder).items()}


def logits(folder: Path) -> torch.Tensor:
    """What transformers makes of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None], use_cache=False).logits


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- in and out again (invariant 6)


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_load_then_save_is_bitwise(save_qwen2, tmp_path, monkeypatch, tied, dtype, shard_bytes):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", shard_bytes)
    save_qwen2(tmp_path / "in", dtype, tie_word_embeddings=tied)
    model, source = load_model(tmp_path / "in")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    save_model(model, tmp_path / "out", source)
    assert bits(tmp_path / "out") == bits(tmp_path / "in")
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {dtype}
    assert ("lm_head.weight" in stored(tmp_path / "out")) == (not tied)
    assert (len(list(tmp_path.glob("out/*.safetensors"))) > 1) == (shard_bytes < 10**6)
    again, _ = load_model(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_shards_are_at_most_their_limit_and_the_index_lists_every_tensor(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 50_000)  # the embedding alone is 40,960
    model, source = load_model(folder)
    save_model(model, folder, source)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = stored(folder)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    sizes = []
    for file in sorted(folder.glob("*.safetensors")):
        shard = load_file(file)
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
        assert {name for name, of in index["weight_map"].items() if of == file.name} == set(shard)
    assert max(sizes) <= 50_000
    assert all(a + b > 50_000 for a, b in pairwise(sizes))  # none could be joined


def test_shards_written_by_transformers_load(save_qwen2, tmp_path):
    theirs = save_qwen2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, _ = load_model(tmp_path)
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_was_saved(save_qwen2, tmp_path, monkeypatch, tied, shard_bytes):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", shard_bytes)
    save_qwen2(tmp_path / "in", tie_word_embeddings=tied)
    save_model(*reversed_arguments(load_model(tmp_path / "in"), tmp_path / "out"))
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "in"))


def reversed_arguments(loaded, folder):
    model, source = loaded
    return model, folder, source


def test_weights_gathered_from_uneven_shards_are_saved(folder, tmp_path, monkeypatch):
    # 320 rows on 3 ranks: the gathered tensor is a view of 3 x 107 rows.
    padded = lambda tensor: torch.cat([tensor, tensor[:1]])[: len(tensor)]  # noqa: E731
    monkeypatch.setattr(checkpoint, "full_tensor", padded)
    model, source = load_model(folder)
    save_model(model, tmp_path / "saved", source)
    assert bits(tmp_path / "saved") == bits(folder)


def test_a_dtype_given_is_the_dtype_saved(folder, tmp_path):
    model, source = load_model(folder)
    save_model(model, tmp_path / "out", source, torch.bfloat16)
    saved = stored(tmp_path / "out")
    for name, tensor in stored(folder).items():
        assert torch.equal(saved[name], tensor.bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path / "out")[1].dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["new", "old"])
def test_overrides_are_printed_and_saved_in_both_forms(folder, tmp_path, capsys, form):
    if form == "old":
        changes = dict.fromkeys(("rope_parameters", "dtype", "layer_types"), ...)
        edit_json(folder / "config.json", rope_theta=10_000.0, torch_dtype="float32", **changes)
    model, source = open_model(folder, rope_theta=300_000.0, max_position_embeddings=512)
    model.to_empty(device="cpu")
    fill(model, folder)
    assert capsys.readouterr().out.splitlines() == [
        "max_position_embeddings: 128 -> 512",
        "rope_theta: 10000 -> 300000",
    ]
    save_model(model, tmp_path / "out", source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 300_000.0
    assert config["rope_parameters"]["rope_type"] == "default"
    assert config["max_position_embeddings"] == 512
    # The oracle: transformers on the old weights, with its own field edited by hand.
    before = logits(folder)
    rope = {"rope_theta": 300_000.0, "rope_type": "default"}
    edit_json(folder / "config.json", rope_parameters=rope, rope_theta=...)
    assert torch.equal(logits(tmp_path / "out"), logits(folder))
    assert not torch.equal(logits(tmp_path / "out"), before)
    again, _ = load_model(tmp_path / "out")
    assert (again.config.rope_theta, again.config.max_positions) == (300_000.0, 512)


@pytest.mark.parametrize("form", ["new", "old"])
def test_both_forms_of_the_configuration_are_written_whichever_was_read(folder, tmp_path, form):
    if form == "old":
        changes = dict.fromkeys(("rope_parameters", "dtype", "layer_types"), ...)
        edit_json(folder / "config.json", rope_theta=10_000.0, torch_dtype="float32", **changes)
    save_model(*reversed_arguments(load_model(folder), tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_saving_over_the_source_keeps_the_weights(folder):
    before = bits(folder)
    model, source = load_model(folder)
    save_model(model, folder, source)
    save_model(model, folder, source)
    assert bits(folder) == before
    assert load_model(folder)[1].stop_ids == source.stop_ids


# ---------------------------------------------------------------- one decision about stopping


@pytest.mark.parametrize("legacy", [False, True])
def test_the_three_files_agree_on_where_to_stop(folder, tmp_path, legacy):
    """The base model stops at <|endoftext|>, 0; the template ends a turn with <|im_end|>, 2."""
    from transformers import AutoTokenizer, GenerationConfig

    if legacy:  # the map counts for more than tokenizer_config.json where it is still written
        text = json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False}})
        (folder / "special_tokens_map.json").write_text(text)
    model, source = load_model(folder)
    assert source.stop_ids == [2, 0]
    save_model(model, tmp_path / "out", source)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    assert load_model(tmp_path / "out")[1].stop_ids == [2, 0]


def test_stop_ids_come_from_config_json_where_no_generation_config_names_them(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    edit_json(folder / "config.json", eos_token_id=[1, 2])
    assert load_model(folder)[1].stop_ids == [2, 1]
    (folder / "generation_config.json").unlink()
    assert load_model(folder)[1].stop_ids == [2, 1]


@pytest.mark.parametrize("template", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_saved_tokenizer_is_transformers_own(folder, tmp_path, template):
    from transformers import AutoTokenizer

    if template == "chat_template.jinja":
        edit_json(folder / "tokenizer_config.json", chat_template=...)
        (folder / template).write_text(chatml(system="You are terse."))
    model, source = load_model(folder)
    save_model(model, tmp_path / "out", source)
    messages = [{"role": "user", "content": "6-1=?"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    assert source.chat.encode_prompt(messages) == theirs["input_ids"]
    assert load_model(tmp_path / "out")[1].chat.encode_prompt(messages) == theirs["input_ids"]


def test_a_model_without_a_tokenizer_loads_and_saves(save_qwen2, tmp_path):
    save_qwen2(tmp_path / "in")
    model, source = load_model(tmp_path / "in")
    assert source.chat is None
    assert source.stop_ids == []
    save_model(model, tmp_path / "out", source)
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "in"))


def test_the_card_is_the_readme_and_other_files_stay(folder, tmp_path):
    model, source = load_model(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    save_model(model, out, source, card="# A model\n")
    assert (out / "README.md").read_text() == "# A model\n"
    assert (out / "metrics.jsonl").read_text() == "{}\n"


def test_nothing_of_another_model_stays_behind(folder, tmp_path, monkeypatch):
    """A template, shards or an index that the new model does not have would be read with it."""
    model, source = load_model(folder)
    out = tmp_path / "out"
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    save_model(model, out, source)
    (out / "chat_template.jinja").write_text("{{ 'another' }}")
    (out / "added_tokens.json").write_text("{}")
    monkeypatch.undo()
    save_model(model, out, source)
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_files_are_flushed_before_they_get_their_names_and_config_json_is_last(
    folder, tmp_path, monkeypatch
):
    """After a power cut, a folder with a config.json is complete."""
    model, source = load_model(folder)
    events, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(old, new):
        events.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    out = tmp_path / "out"
    save_model(model, out, source, card="# A model")
    names = {path.name for path in out.iterdir()}
    assert names == {event for event in events if isinstance(event, str)}
    for name in names:
        assert events.index((out / name).stat().st_ino) < events.index(name)
    assert events[-3:] == [out.stat().st_ino, "config.json", out.stat().st_ino]


# ---------------------------------------------------------------- failing writes


@contextmanager
def full_disk(limit: int):
    """No file may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing(original, at: int):
    """A stand-in for a function that raises at its `at`-th call."""
    calls = []

    def stand_in(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        return original(*arguments, **settings)

    return stand_in


@pytest.mark.parametrize(
    ("module", "name"), [(safetensors.torch, "save_file"), (checkpoint, "_write_json")]
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failing_write_leaves_the_previous_model_whole(folder, monkeypatch, module, name, at):
    model, source = load_model(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    monkeypatch.setattr(module, name, failing(getattr(module, name), at))
    with pytest.raises(UserError, match="could not be saved") as error:
        save_model(model, folder, source)
    assert one_line(error).startswith(f"{folder}: ")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_full_disk_is_an_error_of_one_line(folder):
    model, source = load_model(folder)
    before = bits(folder)
    with full_disk(10_000), pytest.raises(UserError, match="could not be saved") as error:
        save_model(model, folder, source)
    assert one_line(error)
    assert bits(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("at", range(1, 8))
def test_a_model_moved_halfway_does_not_load(folder, monkeypatch, at):
    model, source = load_model(folder)
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 50_000)
    moves, replace = [], checkpoint.os.replace

    def killed(old, new):
        moves.append(new)
        if len(moves) == at:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, folder, source)
    with pytest.raises(UserError, match=r"config.json: no such file"):
        load_model(folder)


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(folder, tmp_path):
    model, source = load_model(folder)
    aside = tmp_path / "out" / f".saving-{checkpoint.os.getpid()}"
    aside.mkdir(parents=True)
    (aside / "model-00001-of-00009.safetensors").write_bytes(b"half")
    save_model(model, tmp_path / "out", source)
    assert bits(tmp_path / "out") == bits(folder)
    assert not aside.exists()


def test_files_are_written_inside_the_folder_and_never_move_between_file_systems(
    folder, tmp_path, monkeypatch
):
    """A mounted folder, and the file system of its parent: os.replace cannot cross."""
    model, source = load_model(folder)
    (tmp_path / "mounted").mkdir()
    monkeypatch.chdir(tmp_path / "mounted")
    replace = checkpoint.os.replace

    def within_one(old, new):
        assert tmp_path / "mounted" in Path(old).absolute().parents
        replace(old, new)

    monkeypatch.setattr(checkpoint.os, "replace", within_one)
    save_model(model, ".", source)
    assert bits(tmp_path / "mounted") == bits(folder)


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(folder, tmp_path):
    model, source = load_model(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be saved") as error:
        save_model(model, tmp_path / "file" / "out", source)
    assert one_line(error)


# ---------------------------------------------------------------- broken folders


def rewrite(folder: Path, change) -> None:
    """Apply change(tensors) to the stored tensors, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def split_in_two_with_the_same_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file(tensors, folder / shards[0])
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / shards[1])
    index = {"weight_map": {**dict.fromkeys(tensors, shards[0]), "model.norm.weight": shards[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rename_a_tensor(tensors: dict) -> None:
    tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")


BREAKS = {
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        ["config.json: no such file"],
    ),
    "config.json is half written": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "qw'),
        ["config.json: not readable as JSON"],
    ),
    "config.json is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ["config.json: expected a JSON object"],
    ),
    "a context that no memory holds": (
        lambda folder: edit_json(folder / "config.json", max_position_embeddings=10**12),
        ["max_position_embeddings is 1000000000000; expected 1 to 2097152"],
    ),
    "an epsilon of another type": (
        lambda folder: edit_json(folder / "config.json", rms_norm_eps="tiny"),
        ["config.json: a field has a value of the wrong type", "'tiny'"],
    ),
    "an end token without an embedding": (
        lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[0, 320]),
        ["eos_token_id is 320"],
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ["model.safetensors: no such file"],
    ),
    "truncated weights": (truncate, ["model.safetensors: not a complete safetensors file"]),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ["model.safetensors: not a complete safetensors file"],
    ),
    "a missing shard": (lose_a_shard, ["model-00001-of-00002.safetensors: no such file"]),
    "an index without a map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "a tensor in two shards": (
        split_in_two_with_the_same_tensor,
        ["model-00002-of-00002.safetensors: model.norm.weight is stored in another file too"],
    ),
    "a wrong shape": (
        lambda folder: rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        ["model.norm.weight has shape [31]", "[32]"],
    ),
    "integers": (
        lambda folder: rewrite(
            folder, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
        ),
        ["model.norm.weight is I8"],
    ),
    "another name": (
        lambda folder: rewrite(folder, rename_a_tensor),
        ["missing: model.norm.weight", "unexpected: model.final_norm.weight"],
    ),
    "a tied head that differs": (
        lambda folder: rewrite(folder, lambda t: t.update({"lm_head.weight": torch.ones(320, 32)})),
        ["lm_head.weight", "tie_word_embeddings"],
    ),
    "a tied head of another size": (
        lambda folder: rewrite(folder, lambda t: t.update({"lm_head.weight": torch.ones(3, 32)})),
        ["lm_head.weight has shape [3, 32]", "[320, 32]"],
    ),
    "more tokens than embeddings": (
        lambda folder: edit_tokenizer(folder, 320),
        ["tokenizer.json: token id 320 has no embedding", "vocab_size is 320"],
    ),
}


def edit_tokenizer(folder: Path, token_id: int) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    added = {**value["added_tokens"][0], "content": "<|late|>", "id": token_id}
    value["model"]["vocab"]["<|late|>"] = token_id
    value["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(value))


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_an_error_of_one_line(folder, name):
    damage, said = BREAKS[name]
    damage(folder)
    with pytest.raises(UserError) as error:
        load_model(folder)
    for part in said:
        assert part in one_line(error)
    assert str(folder) in one_line(error)


def test_a_tied_head_that_is_stored_and_equal_is_accepted_and_saved_once(folder, tmp_path):
    before = bits(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, source = load_model(folder)
    save_model(model, tmp_path / "out", source)
    assert bits(tmp_path / "out") == before


# ---------------------------------------------------------------- fp32 weights, bf16 compute


@pytest.fixture(scope="module")
def sharded(save_qwen2, tmp_path_factory):
    """(folder, a model that computes in fp32, the same one under FSDP2 in bf16)."""
    folder = tmp_path_factory.mktemp("sharded")
    save_qwen2(folder, tie_word_embeddings=True)
    plain, mixed = load_model(folder)[0], load_model(folder)[0]
    parallelize(plain, ALONE, Parallelism())
    parallelize(mixed, ALONE, Parallelism(torch.bfloat16))
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


def sft_loss(model) -> torch.Tensor:
    rng = np.random.default_rng(0)
    rows = [
        TokenSequence(rng.integers(0, 320, n), prompt_length=3, row=0, sign=1) for n in (9, 5, 20)
    ]
    totals = Totals(num_rows=3, num_tokens=sum(row.response_length for row in rows))
    lengths = torch.tensor([row.response_length for row in rows])
    batch = pack(rows, sft().token_weights(torch.ones(3), lengths, totals))
    return sft().loss(model, batch, totals)[0]


def test_bf16_gradients_are_fp32_and_neither_divided_nor_far_from_those_of_fp32(sharded):
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


def test_gradients_of_two_packs_add_up(sharded):
    _, _, mixed = sharded
    norms = []
    for backwards in (1, 2):
        mixed.zero_grad()
        for _ in range(backwards):
            sft_loss(mixed).backward()
        norms.append(mixed.model.norm.weight.grad.full_tensor())
    torch.testing.assert_close(norms[1], 2 * norms[0])


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


# ---------------------------------------------------------------- a checkpoint made a folder


def saved_run(folder: Path, save_dtype: str = "source") -> Path:
    """A run's folder with one checkpoint, whose weights are the model's times two."""
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
    checkpoints = Checkpoints(run, ALONE, facts, keep=1)
    assert checkpoints.save(7, model, torch.optim.AdamW(model.parameters()))
    return run


def export(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["redi.checkpoint", "export", *map(str, arguments)])
    try:
        exporting.main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_checkpoint_exported_is_a_model_folder_with_its_weights(folder, tmp_path, monkeypatch):
    run = saved_run(folder)
    assert export(monkeypatch, run / "checkpoints/step-000007", "--out", tmp_path / "out") == 0
    before = stored(folder)
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, 2 * before[name])
    assert read_rope_theta(json.loads((tmp_path / "out" / "config.json").read_text()), "") == 5e5
    assert logits(tmp_path / "out").isfinite().all()


def test_an_export_has_the_dtype_the_run_would_have_saved(folder, tmp_path, monkeypatch):
    run = saved_run(folder, "bfloat16")
    assert export(monkeypatch, run / "checkpoints/step-000007", "--out", tmp_path / "out") == 0
    assert load_model(tmp_path / "out")[1].dtype == torch.bfloat16


def test_a_checkpoint_may_be_named_from_within_its_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(saved_run(folder) / "checkpoints")
    assert export(monkeypatch, "step-000007", "--out", tmp_path / "out") == 0
    assert f"step-000007 of {folder.parent / 'run'}" in capsys.readouterr().out


def half_the_rows(step: Path) -> None:
    """A file of another model, whose hash state.json has."""
    tensors = {name: tensor[: len(tensor) // 2] for name, tensor in stored(step).items()}
    save_file(tensors, step / "rank-0.safetensors")
    sha256 = hash_files([step / "rank-0.safetensors"])
    edit_json(step / "state.json", sha256={"rank-0.safetensors": sha256})


def another_parent(step: Path) -> None:
    path = step.parents[2] / "source/model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def edited(old: str, new: str) -> Callable[[Path], None]:
    def edit(step: Path) -> None:
        path = step.parents[1] / "config.toml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return edit


NOT_EXPORTED = {
    "no such folder": shutil.rmtree,
    "no such file": lambda step: (step.parents[1] / "config.toml").unlink(),
    "rank-0.safetensors has changed since it was written": lambda step: os.truncate(
        step / "rank-0.safetensors", 1000
    ),
    "rows of model.model.embed_tokens.weight; expected": half_the_rows,
    "has changed since": another_parent,
    "expected the settings of a training run": edited("rope_theta", "# rope_theta"),
    "key 'model': expected text; got 7": edited('model = "', 'model = 7 # "'),
    "key 'save_dtype': expected one of source": edited('"source"', '"int8"'),
    "not a readable TOML file": edited("rope_theta =", "rope_theta"),
}


@pytest.mark.parametrize("named", NOT_EXPORTED)
def test_what_cannot_be_exported_is_one_line(named, folder, tmp_path, monkeypatch, capsys):
    step = saved_run(folder) / "checkpoints/step-000007"
    capsys.readouterr()
    NOT_EXPORTED[named](step)
    assert export(monkeypatch, step, "--out", tmp_path / "out") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert not (tmp_path / "out").exists()
    assert export(monkeypatch, step.parent, "--out", folder) == 2  # it is not empty
