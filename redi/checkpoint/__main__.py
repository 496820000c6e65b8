"""Make a model folder of a checkpoint that training saved (resume.py).

python -m redi.checkpoint export OUT/checkpoints/step-000200 --out DIR
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from redi.checkpoint.folder import open_model, save_model
from redi.checkpoint.resume import load_weights
from redi.config import UserError, parse, program
from redi.distributed import DTYPES


@dataclass(kw_only=True)
class ExportConfig:
    action: Annotated[Literal["export"], "make a model folder of a checkpoint"]
    checkpoint: Annotated[str, "RUN/checkpoints/step-NNNNNN"]
    out: Annotated[str, "folder for the model"] = "out/exported"


@program
def main() -> None:
    asked = parse(ExportConfig, "Make a Hugging Face folder of a checkpoint of a run.")
    folder, out = Path(asked.checkpoint), Path(asked.out)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected RUN/checkpoints/step-NNNNNN")
    recorded = folder.parent.parent / "config.toml"
    try:
        run = tomllib.loads(recorded.read_text(encoding="utf-8"))
        settings = [run[name] for name in ("model", "rope_theta", "max_position_embeddings")]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{recorded}: not the settings of a run ({error})") from None
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; choose another folder")
    model, source = open_model(*settings)
    model.to_empty(device="cpu")
    load_weights(folder, model)
    save_dtype = run.get("save_dtype", "source")
    save_model(model, out, source, None if save_dtype == "source" else DTYPES[save_dtype])
    print(f"saved {out}: a Hugging Face folder, {folder.name} of {recorded.parent}")


if __name__ == "__main__":
    main()
