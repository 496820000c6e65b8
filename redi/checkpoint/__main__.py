"""Export a checkpoint as a model folder: python -m redi.checkpoint export CHECKPOINT --out DIR"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from redi.checkpoint.folder import open_model, save_model
from redi.checkpoint.resume import load_weights, read_state
from redi.checkpoint.weights import weights_hash
from redi.config import UserError, check_table, load_toml, parse, program, types_of
from redi.recipe import TrainConfig

USED = {"model", "rope_theta", "max_position_embeddings"}  # of config.toml


@dataclass(kw_only=True)
class ExportConfig:
    action: Annotated[Literal["export"], "make a model folder of a checkpoint"]
    checkpoint: Annotated[str, "RUN/checkpoints/step-NNNNNN"]
    out: Annotated[str, "folder for the model"] = "out/exported"


@program
def main() -> None:
    config = parse(ExportConfig, "Export a checkpoint of a run as a Hugging Face folder.")
    folder, out = Path(config.checkpoint), Path(config.out)
    if not folder.is_dir() or folder.absolute().parent.name != "checkpoints":
        raise UserError(f"{folder}: no checkpoint; expected RUN/checkpoints/step-NNNNNN")
    recorded = folder.absolute().parent.parent / "config.toml"
    run = load_toml(recorded, str(recorded))
    if not run.keys() >= USED:
        raise UserError(f"{recorded}: expected the settings of a training run")
    run = check_table({name: run[name] for name in USED}, types_of(TrainConfig), str(recorded))
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; choose another folder")
    model, source = open_model(run["model"], run["rope_theta"], run["max_position_embeddings"])
    model.to_empty(device="cpu")
    load_weights(folder, model)
    parent = read_state(folder)["facts"].get("parent's weights sha256")
    if parent != weights_hash(source.folder):
        raise UserError(f"{run['model']}: has changed since {recorded.parent} was trained from it")
    save_model(model, out, source)
    print(f"saved {out}: a Hugging Face folder, {folder.name} of {recorded.parent}")


if __name__ == "__main__":
    main()
