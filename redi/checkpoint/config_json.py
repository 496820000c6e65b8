"""config.json of a Hugging Face folder -> ModelConfig.

Both forms are read: `rope_parameters` (transformers 5), and the older `rope_scaling` with
`rope_theta` at the top level. The dtype is that of the stored weights, whatever config.json says.
"""

from dataclasses import fields
from typing import Any

from redi.config import UserError
from redi.model import ModelConfig, RopeScaling

# Required fields, integers from 1 to LARGEST -> their names in ModelConfig.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
}
LARGEST = 1 << 21  # of these sizes; the rotary tables take a gigabyte per million positions
# model_type -> the facts of its family, which config.json does not name.
FAMILIES: dict[str, dict[str, bool]] = {
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "llama": {"qkv_bias": False, "qk_norm": False},
}
# What redi/model.py implements: field -> allowed values. A missing or null field is allowed too.
SUPPORTED: dict[str, list] = {
    "model_type": [*FAMILIES],
    "rope_type": ["default", "llama3"],
    "partial_rotary_factor": [1.0],
    "attention_bias": [False],  # Qwen3 and Llama: of q, k, v and o
    "mlp_bias": [False],
    "is_causal": [True],
    "use_sliding_window": [False],
    "layer_types": ["full_attention"],
    "hidden_act": ["silu"],
    "attention_dropout": [0.0],
    "tie_word_embeddings": [False, True],
    "quantization_config": [{}],
}


def read_config(config: dict[str, Any], where: str) -> ModelConfig:
    """The sizes of a model. Raises UserError, which begins with `where`, for a missing field, a
    wrong type, fields that disagree, and a value for which redi/model.py would compute other
    numbers than transformers."""
    try:
        rope = _read_rope(config, where)
        _refuse_unsupported(config, rope, where)
        optional = ("num_key_value_heads", "head_dim")
        for name in (*SIZES, *(name for name in optional if config.get(name) is not None)):
            if type(config[name]) is not int or not 1 <= config[name] <= LARGEST:
                raise UserError(f"{where}: {name} is {config[name]!r}; expected 1 to {LARGEST}")
        heads = config["num_attention_heads"]
        family, width = config["model_type"], config["hidden_size"]
        # The defaults are those of transformers.
        kv_heads = config.get("num_key_value_heads", heads if family == "llama" else 32) or heads
        head_dim = config.get("head_dim") or (128 if family == "qwen3" else width // heads)
        if heads % kv_heads:
            raise UserError(f"{where}: {heads} heads cannot share {kv_heads} key/value heads")
        scaling = None
        if rope.get("rope_type") == "llama3":
            scaling = RopeScaling(*(float(rope[field.name]) for field in fields(RopeScaling)))
        theta, eps = float(rope["rope_theta"]), float(config.get("rms_norm_eps", 1e-6))
        if head_dim % 2:
            raise UserError(f"{where}: head_dim is {head_dim}; expected an even number")
        return ModelConfig(
            **{field: config[name] for name, field in SIZES.items()},
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            **FAMILIES[family],
            norm_eps=eps,
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as missing:
        raise UserError(f"{where}: the field {missing} is missing") from None
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(f"{where}: a field has a value of the wrong type ({error})") from None


def _refuse_unsupported(config: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    found = {name: [config.get(name), rope.get(name)] for name in SUPPORTED}
    found["layer_types"] = config.get("layer_types") or []  # one per layer
    for name, allowed in SUPPORTED.items():
        for value in found[name]:
            if value is not None and value not in allowed:
                supported = " or ".join(map(repr, allowed))
                raise UserError(f"{where}: {name} is {value!r}; redi supports only {supported}")


def set_rope_theta(config: dict[str, Any], theta: float) -> None:
    """Write the rotary base, and the scaling if there is one, in both forms."""
    rope = {"rope_type": "default", **_read_rope(config, "config.json"), "rope_theta": theta}
    config |= {"rope_theta": theta, "rope_parameters": rope}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope


def _read_rope(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of both forms: rope_theta, rope_type, those of a scaling. Raises UserError if two
    disagree."""
    found: dict[str, Any] = {}
    top = {name: config.get(name) for name in ("rope_theta", "original_max_position_embeddings")}
    for table in (top, config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        for name, value in table.items():
            name = "rope_type" if name == "type" else name
            if isinstance(value, dict):
                raise UserError(
                    f"{where}: {name} has its own rotation; expected one for all layers"
                )
            if value is not None and found.setdefault(name, value) != value:
                raise UserError(f"{where}: {name} is {found[name]!r} and also {value!r}")
    return found
