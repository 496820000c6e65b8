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

import pytest
import torch
from processes import child, die, main_in_this_process
from safetensors.torch import load_file, save_file
from small_run import HERE, files_in, refusal, sft_config
from small_step import backward, data_of
from small_template import chatml
from tokenizers import Tokenizer

from redi import programs
from redi.checkpoint import folder as checkpoint
from redi.checkpoint.config_json import read_config
from redi.checkpoint.folder import Source, load_model, open_model, save_model
from redi.checkpoint.weights import HEAD, INDEX, WEIGHTS, fill, read_shards, write_shards
from redi.data.files import hash_files
from redi.distributed import Parallelism, parallelize

MANY_SHARDS = 20_000  # bytes
NORM = "model.norm.weight"


@pytest.fixture
def folder(save_qwen2, save_tokenizer, tmp_path) -> Path:
    """A model with its tokenizer; the base model's stop token is not the template's."""
    save_qwen2(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": 0}')
    return save_tokenizer(tmp_path / "source")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def load_and_save(folder: Path, out: Path) -> Source:
    model, source = load_model(folder)
    save_model(model, out, source)
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


def logits(folder: Path) -> torch.Tensor:
    """What transformers computes with the model of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None], use_cache=False).logits


# ---------------------------------------------------------------- what is done to a folder

Change = Callable[[Path], object]


def write(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def edit(name: str, **changes) -> Change:
    """Change fields of a JSON file; a value of ... removes one."""

    def change(folder: Path) -> None:
        value = {**read_json(folder / name), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))

    return change


def shards(index: str) -> Change:
    """An index in place of the one file."""
    return lambda folder: (remove(WEIGHTS)(folder), write(INDEX, index)(folder))


def put(changes: dict[str, torch.Tensor]) -> Change:
    """Change tensors; a value of ... removes one."""

    def change(folder: Path) -> None:
        tensors = {**load_file(folder / WEIGHTS), **changes}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not ...}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return change


def add_token_320(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<|{i}|>" for i in range(tokenizer.get_vocab_size(), 321)])
    tokenizer.save(str(folder / "tokenizer.json"))


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
    assert (HEAD in stored(after)) == (not tied)
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


def test_a_tied_head_that_is_stored_and_equal_is_accepted_and_saved_once(folder, tmp_path):
    before = bits(folder)
    put({HEAD: stored(folder)["model.embed_tokens.weight"]})(folder)
    load_and_save(folder, tmp_path / "out")
    assert bits(tmp_path / "out") == before


def test_an_index_beside_the_one_file_and_rotary_frequencies_are_ignored_as_in_transformers(
    folder, tmp_path
):
    before, expected = bits(folder), logits(folder)
    put({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})(folder)
    write(INDEX, LOST)(folder)
    load_and_save(folder, tmp_path / "out")
    assert bits(tmp_path / "out") == before
    assert torch.equal(logits(folder), expected)


def test_an_older_config_json_and_overrides_are_saved_in_both_forms(folder, tmp_path, capsys):
    out = tmp_path / "out"
    absent = dict.fromkeys(("rope_parameters", "dtype", "layer_types"), ...)
    edit("config.json", rope_theta=1e4, torch_dtype="float32", **absent)(folder)  # the older form
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
    again = load_model(out)[0].config
    assert (again.rope_theta, again.max_positions) == (300_000.0, 512)
    # The oracle: transformers on the old weights, with its own field edited by hand.
    before = logits(folder)
    edit("config.json", rope_theta=300_000.0)(folder)
    assert torch.equal(logits(out), logits(folder))
    assert not torch.equal(logits(out), before)
    save_model(model, out, source, dtype=torch.bfloat16)  # another dtype than the source's
    assert {tensor.dtype for tensor in stored(out).values()} == {torch.bfloat16}
    assert read_json(out / "config.json")["dtype"] == "bfloat16"


def test_saving_over_a_model_replaces_it_and_leaves_other_files(folder, tmp_path, monkeypatch):
    """A template, shards or an index that the new model does not have would be read with it."""
    model, source = load_model(folder)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "MAX_SHARD_BYTES", MANY_SHARDS)
        save_model(model, out, source)
    for name in ("chat_template.jinja", "added_tokens.json", "metrics.jsonl"):
        (out / name).write_text("{}")
    save_model(model, out, source, card="# A model\n")
    saved = {path.name: content for path, content in files_in(out).items()}
    assert saved.keys() == {
        "config.json", "generation_config.json", "metrics.jsonl", "model.safetensors", "README.md",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (saved["README.md"], saved["metrics.jsonl"]) == (b"# A model\n", b"{}")
    for _ in range(2):
        save_model(model, folder, source)  # over itself
        assert bits(folder) == bits(out)
    assert load_model(folder)[1].stop_ids == source.stop_ids


OLDER = '{"eos_token": {"content": "<|endoftext|>"}}'  # it overrides tokenizer_config.json
IN_CONFIG = edit("config.json", eos_token_id=[1, 2])
STOPPING = {  # changes to the folder, and the stop ids: the template's <|im_end|> is 2
    "generation_config.json names 0": ([], [2, 0]),
    "special_tokens_map.json": ([write("special_tokens_map.json", OLDER)], [2, 0]),
    "chat_template.jinja": (
        [
            edit("tokenizer_config.json", chat_template=...),
            write("chat_template.jinja", chatml(system="You are terse.")),
        ],
        [2, 0],
    ),
    "generation_config.json names none": (
        [IN_CONFIG, write("generation_config.json", '{"eos_token_id": null}')], [2, 1],
    ),
    "no generation_config.json": ([IN_CONFIG, remove("generation_config.json")], [2, 1]),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPING)
def test_transformers_stops_and_tokenizes_with_the_saved_files_as_we_do(folder, tmp_path, case):
    from transformers import AutoTokenizer, GenerationConfig

    changes, stop_ids = STOPPING[case]
    for change in changes:
        change(folder)
    source, out = load_and_save(folder, tmp_path / "out"), tmp_path / "out"
    again, theirs = load_model(out)[1], AutoTokenizer.from_pretrained(out)
    assert source.stop_ids == again.stop_ids == stop_ids
    assert GenerationConfig.from_pretrained(out).eos_token_id == stop_ids
    assert read_json(out / "config.json")["eos_token_id"] == 2
    assert theirs.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "6-1=?"}]
    settings = {"add_generation_prompt": True, "return_dict": True}
    ids = theirs.apply_chat_template(messages, **settings)["input_ids"]
    assert source.chat.encode_prompt(messages) == again.chat.encode_prompt(messages) == ids


# ---------------------------------------------------------------- power cuts, kills, full disks


def test_files_are_flushed_inside_the_folder_before_they_get_their_names_and_config_json_is_last(
    folder, tmp_path, monkeypatch
):
    """After a power cut, a folder with a config.json is complete. A rename cannot cross from one
    file system to another, so nothing is written outside of the folder, which may be a mount."""
    model, source = load_model(folder)
    flushed, renamed, out = os.fsync, os.replace, tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    events, sources = [], []
    monkeypatch.setattr(
        os, "fsync", lambda file: (events.append(os.fstat(file).st_ino), flushed(file))
    )
    monkeypatch.setattr(
        os, "replace", lambda a, b: (sources.append(a), events.append(b.name), renamed(a, b))
    )
    save_model(model, ".", source, card="# A model")
    assert all(out in path.absolute().parents for path in sources)
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
    before = files_in(folder.parent)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = refusal(save_model, model, folder, source, card="x" * 60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"{folder}: the model could not be saved")
    assert files_in(folder.parent) == before


# ---------------------------------------------------------------- broken folders

LOST = '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
BROKEN = [  # what is done to a folder; what the error says
    (remove("config.json"), ["config.json: no such file"]),
    (write("config.json", '{"model_type": "qw'), ["config.json: not readable as JSON"]),
    (
        edit("config.json", max_position_embeddings=10**12),
        ["max_position_embeddings is 1000000000000; expected 1 to 2097152"],
    ),
    (edit("config.json", rms_norm_eps="tiny"), ["config.json: a field has", "type", "'tiny'"]),
    (edit("generation_config.json", eos_token_id=[0, 320]), ["eos_token_id is 320"]),
    (edit("generation_config.json", eos_token_id=[[1]]), ["eos_token_id is [1]"]),
    (add_token_320, ["tokenizer.json: token id 320 has no embedding", "vocab_size is 320"]),
    (remove(WEIGHTS), ["model.safetensors: no such file"]),
    (
        lambda folder: os.truncate(folder / WEIGHTS, 10_000),
        ["model.safetensors: not a complete safetensors file"],
    ),
    (shards(LOST), ["model-00001-of-00002.safetensors: no such file"]),
    (shards('{"weight_map": 3}'), [INDEX, "weight_map"]),
    (shards('{"weight_map": {}}'), [INDEX, "file names"]),
    (shards('{"weight_map": {"a": 5}}'), [INDEX, "'weight_map'"]),
    (put({NORM: torch.ones(31)}), ["model.norm.weight has shape [31]", "[32]"]),
    (put({NORM: torch.ones(32, dtype=torch.int8)}), ["model.norm.weight is I8"]),
    (
        put({NORM: ..., "model.final_norm.weight": torch.ones(32)}),
        ["missing: model.norm.weight", "unexpected: model.final_norm.weight"],
    ),
    (put({HEAD: torch.ones(320, 32)}), ["lm_head.weight", "tie_word_embeddings"]),
    (put({HEAD: torch.ones(3, 32)}), ["lm_head.weight has shape [3, 32]", "[320, 32]"]),
]


@pytest.mark.parametrize(("damage", "parts"), BROKEN, ids=[parts[0] for _, parts in BROKEN])
def test_a_broken_folder_is_one_line_that_names_it(folder, damage, parts):
    damage(folder)
    message = refusal(load_model, folder)
    assert [part for part in [*parts, str(folder)] if part not in message] == []


# ---------------------------------------------------------------- each rank its own rows


class Shard:
    """A rank's rows of a tensor, cut as FSDP2 does: ceil(rows / ranks) rows on each rank, as long
    as there are any."""

    def __init__(self, whole: torch.Tensor, rank: int, ranks: int):
        self.whole, chunks = whole, whole.chunk(ranks)
        self.local = chunks[rank].clone() if rank < len(chunks) else whole[:0].clone()
        self.device_mesh = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: rank)

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


def test_bf16_gradients_are_fp32_close_to_those_of_fp32_not_divided_and_add_up(sharded):
    _, plain, mixed = sharded
    exact, rounded = (backward(model, data_of("sft")) for model in (plain, mixed))
    assert 0 < abs(rounded - exact) < 0.02 * exact  # it did compute in bf16
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
    backward(mixed, data_of("sft"))
    torch.testing.assert_close(mixed.model.norm.weight.grad.full_tensor(), 2 * once)


def test_a_step_of_1e_6_moves_the_master_weights_and_they_are_what_is_saved(sharded, tmp_path):
    folder, _, mixed = sharded
    _, source = load_model(folder)
    save_model(mixed, tmp_path / "before", source)
    assert bits(tmp_path / "before") == bits(folder)

    mixed.zero_grad()
    backward(mixed, data_of("sft"))
    torch.optim.AdamW(mixed.parameters(), lr=1e-6, weight_decay=0.0).step()
    save_model(mixed, tmp_path / "after", source)
    before, after = stored(tmp_path / "before"), stored(tmp_path / "after")
    for name, parameter in mixed.named_parameters():
        assert torch.equal(after[name], parameter.full_tensor()), name
        moved = (after[name] - before[name]).abs().max()
        assert 0 < moved < 1.5e-6, name  # AdamW's first step is the learning rate


# ---------------------------------------------------------------- a checkpoint as a model folder

STEP = Path("run/checkpoints/step-000002")


@pytest.fixture
def stopped(here, stop_at) -> Path:
    """The working folder, with the checkpoint STEP of a run that started from parent/."""
    shutil.copytree("student", "parent")
    stop_at(sft_config(model=str(here / "parent"), rope_theta=5e5), 2)
    return here


def export(*arguments: object) -> int:
    return main_in_this_process(programs.export, *arguments)


def test_an_exported_checkpoint_is_a_model_folder_with_its_weights(stopped, monkeypatch, capsys):
    monkeypatch.chdir(STEP.parent)  # it may be named from within the run
    assert export(STEP.name, "--out", stopped / "exported") == 0
    assert f"{STEP.name} of {stopped / 'run'}" in capsys.readouterr().out
    trained, out = load_file(f"{STEP.name}/rank-0.safetensors"), stored(stopped / "exported")
    for name, before in stored(stopped / "parent").items():
        assert torch.equal(out[name], trained[f"model.{name}"])
        assert not torch.equal(out[name], before)
    assert read_config(read_json(stopped / "exported" / "config.json"), "").rope_theta == 5e5
    assert logits(stopped / "exported").isfinite().all()


NOT_EXPORTED = {  # message -> what is done to the folder of run/ and parent/
    "no checkpoint; expected RUN/checkpoints/step-NNNNNN": lambda here: shutil.rmtree(here / "run"),
    "config.toml: no such file": remove("run/config.toml"),
    "key 'model': expected text; got None": write("run/config.toml", ""),
    "rank-0.safetensors has changed since it was written": lambda here: os.truncate(
        here / STEP / "rank-0.safetensors", 1000
    ),
    "parent: has changed since": lambda here: put({NORM: torch.zeros(32)})(here / "parent"),
}


@pytest.mark.parametrize("message", NOT_EXPORTED)
def test_what_cannot_be_exported_is_one_line(message, stopped, capsys):
    NOT_EXPORTED[message](stopped)
    capsys.readouterr()
    assert export(STEP, "--out", "exported") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not Path("exported").exists()
    assert export(STEP, "--out", "parent") == 2  # it is not empty
    assert export("parent") == 2
    assert "parent: no checkpoint; expected RUN" in capsys.readouterr().err
