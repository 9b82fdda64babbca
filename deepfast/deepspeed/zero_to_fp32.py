"""The weights of a checkpoint in full fp32, in one process, without the engine.

``python -m deepfast.deepspeed.zero_to_fp32 CHECKPOINTS OUTPUT`` writes them to a file that torch.load (or safetensors)
reads. Of tied weights the first name is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from deepfast.deepspeed.launcher import Parser
from deepfast.engine import checkpoint
from deepfast.engine.checkpoint import CheckpointError
from deepfast.engine.reading import stored
from deepfast.errors import UserError

Place = str | os.PathLike[str]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: Place, tag: str | None = None, exclude_frozen_parameters: bool = False
) -> dict[str, Tensor]:
    """A state_dict: the masters where there are any, else the weights; floating-point tensors are fp32, on the CPU.

    Args:
        checkpoint_dir: what ``save_checkpoint`` was given.
        tag: which checkpoint; None: what ``latest`` names.
        exclude_frozen_parameters: must be False.

    Raises:
        CheckpointError: for a checkpoint that is missing, damaged, or of a format that has no names for its masters.
    """
    if exclude_frozen_parameters:
        raise UserError("exclude_frozen_parameters: a checkpoint does not tell them from buffers: drop them by name")
    directory = Path(checkpoint_dir)
    tag = checkpoint.latest(directory) if tag is None else str(tag)
    if tag is None:
        raise CheckpointError(f"{directory} holds no checkpoint")
    folder = checkpoint.verify(directory, tag)
    state = checkpoint.read_json(folder / "state.json")
    if state.get("format") == 1:
        raise CheckpointError(f"{folder}: format 1: load it with the engine and save it again")
    tensors, _ = stored(folder, state, [])
    names = [key.removeprefix("model.") for key in tensors.shapes if key.startswith("model.")]
    masters = {name: f"optim.state.{name}.master" for name in names}
    asked = {n: tensors.ask(masters[n] if masters[n] in tensors.shapes else f"model.{n}") for n in names}
    tensors.read()
    return {name: t.float() if t.is_floating_point() else t for name, t in asked.items()}


def load_state_dict_from_zero_checkpoint(model: nn.Module, checkpoint_dir: Place, tag: str | None = None) -> nn.Module:
    """Loads them into ``model``, which is moved to the CPU, and returns it.

    Raises:
        CheckpointError: also where they are another model's.
    """
    values = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    own = checkpoint.unique(model.state_dict())
    wrong = sorted(own.keys() ^ values.keys()) or [name for name, t in own.items() if t.shape != values[name].shape]
    if wrong:
        raise CheckpointError(f"{checkpoint_dir}: another model: {wrong[0]!r} does not fit")
    model.load_state_dict(values, strict=False)  # further names of tied weights are not there
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: Place,
    output_dir: Place,
    max_shard_size: str | None = None,
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> Path:
    """Writes them to one file, and returns that: ``output_dir`` itself if it ends as one, else
    ``output_dir/pytorch_model.bin``, or ``model.safetensors`` with ``safe_serialization``.

    ``max_shard_size`` is accepted; there is one file whatever its size.

    Raises:
        CheckpointError: for a checkpoint that cannot be read, and where the file cannot be written.
    """
    file = Path(output_dir)
    if file.suffix not in (".bin", ".pt", ".pth", ".safetensors"):
        file /= "model.safetensors" if safe_serialization else "pytorch_model.bin"
    values = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            checkpoint.write_tensors(file, values, {"format": "pt"})
        else:
            torch.save(values, file)
    except OSError as error:
        raise checkpoint.unwritable(file, error) from None
    return file


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = Parser(prog="python -m deepfast.deepspeed.zero_to_fp32", description=__doc__)
    parser.add_argument("checkpoint_dir", help="the folder that holds the checkpoints' folders")
    parser.add_argument("output_dir", help="a folder, or a file that ends in .bin, .pt or .safetensors")
    parser.add_argument("-t", "--tag", help="which checkpoint; else what `latest` names")
    parser.add_argument("--safe_serialization", action="store_true", help="safetensors, not torch.save")
    try:
        options = parser.parse_args(argv)
        file = convert_zero_checkpoint_to_fp32_state_dict(**vars(options))
    except UserError as error:
        print(f"zero_to_fp32: {error}", file=sys.stderr)
        return 2
    print(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
