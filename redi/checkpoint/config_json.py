"""config.json of a Hugging Face folder -> ModelConfig.

Both forms are read: `rope_parameters` (transformers 5), and the older `rope_scaling` with
`rope_theta` at the top level. The dtype is that of the stored weights, whatever config.json says.
"""

from typing import Any

from redi.config import UserError
from redi.model import ModelConfig

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
# What redi/model.py implements: field -> its allowed values. None: missing or null.
SUPPORTED: dict[str, list] = {
    "model_type": ["qwen2"],
    "rope_type": ["default", None],
    "partial_rotary_factor": [1.0, None],
    "use_sliding_window": [False, None],
    "layer_types": ["full_attention"],
    "hidden_act": ["silu", None],
    "attention_dropout": [0.0, None],
    "quantization_config": [None, {}],
}


def read_config(config: dict[str, Any], where: str) -> ModelConfig:
    """The sizes of a model. Raises UserError, which begins with `where`, for a missing field, a
    wrong type, fields that disagree, and a value for which redi/model.py would compute other
    numbers than transformers."""
    try:
        _refuse_unsupported(config, where)
        optional = ("num_key_value_heads", "head_dim")
        for name in (*SIZES, *(name for name in optional if config.get(name) is not None)):
            if type(config[name]) is not int or not 1 <= config[name] <= LARGEST:
                raise UserError(f"{where}: {name} is {config[name]!r}; expected 1 to {LARGEST}")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(f"{where}: {heads} heads cannot share {kv_heads} key/value heads")
        return ModelConfig(
            **{field: config[name] for name, field in SIZES.items()},
            num_kv_heads=kv_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope_theta=read_rope_theta(config, where),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as missing:
        raise UserError(f"{where}: the field {missing} is missing") from None
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(f"{where}: a field has a value of the wrong type ({error})") from None


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    tables = _rope_tables(config)
    found = {name: [config.get(name)] for name in SUPPORTED}
    found["rope_type"] = [table.get("rope_type") or table.get("type") for table in tables]
    found["partial_rotary_factor"] += [table.get("partial_rotary_factor") for table in tables]
    found["layer_types"] = config.get("layer_types") or []  # one per layer
    for name, allowed in SUPPORTED.items():
        for value in found[name]:
            if value not in allowed:
                raise UserError(f"{where}: {name} is {value!r}; redi supports only {allowed[0]!r}")


def read_rope_theta(config: dict[str, Any], where: str) -> float:
    """The rotary base. Raises UserError if it is missing, or if two fields disagree."""
    values = [table.get("rope_theta") for table in (config, *_rope_tables(config))]
    found = {float(value) for value in values if value is not None}
    if len(found) != 1:
        raise UserError(f"{where}: expected one rope_theta; found {sorted(found) or 'none'}")
    return found.pop()


def set_rope_theta(config: dict[str, Any], theta: float) -> None:
    """Write the rotary base in both forms."""
    rope = config.get("rope_parameters") or {}
    config["rope_parameters"] = {**rope, "rope_theta": theta, "rope_type": "default"}
    config["rope_theta"] = theta


def _rope_tables(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
