"""Which GPT-2, which tokenizer: folders in the Hugging Face layout, or one of three shapes by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepfast.errors import UserError

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

log = logging.getLogger("deepfast")

SHAPES: dict[str, dict[str, int]] = {
    "gpt2-tiny": {
        "n_layer": 4,
        "n_embd": 192,
        "n_head": 6,
        "vocab_size": 1024,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".gguf", ".bin", ".safetensors", ".pt", ".pth")


class ModelError(UserError):
    """A model_dir that is no GPT-2."""


def configuration(model_dir: str, sequence_length: int) -> tuple[GPT2Config, Path | None]:
    """The model's shape, and its folder if it has one.

    Raises:
        ModelError: for a folder that holds no GPT-2, or one with too few positions.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(model_dir)
    if folder.is_file():
        raise ModelError(f"model_dir={model_dir!r}: is a file; a folder in the Hugging Face layout was expected")
    if folder.is_dir():
        path = folder / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise ModelError(f"model_dir={model_dir!r}: no config.json in it: it is no GPT-2 folder") from None
        except ValueError as error:
            raise ModelError(f"{path}: not JSON: {error}") from None
        kind = data.get("model_type") if isinstance(data, dict) else None
        if kind != "gpt2":
            raise ModelError(f"{path}: model_type is {kind!r}, not 'gpt2'")
        for name in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size"):
            value = data.get(name, 1)
            if type(value) is not int or value < 1:
                raise ModelError(f"{path}: describes no GPT-2: {name} is {value!r}")
        try:
            config = GPT2Config.from_dict(data)
            with torch.device("meta"):
                GPT2LMHeadModel(config)
        except Exception as error:  # whatever the libraries below raise for values that are no shape
            raise ModelError(f"{path}: describes no GPT-2: {_first_line(error)}") from None
        if config.n_positions < sequence_length:
            raise ModelError(
                f"train_sequence_length={sequence_length} is more than the {config.n_positions} positions of {path}"
            )
        return config, folder
    name = model_dir
    if name not in SHAPES:
        name = "gpt2" if torch.cuda.is_available() else "gpt2-tiny"
        log.info("model_dir=%r does not exist: a fresh %s is trained", model_dir, name)
    shape = dict(SHAPES[name])
    shape["n_positions"] = max(shape.get("n_positions", 1024), sequence_length)
    # Dropout off: pretraining sees hardly anything twice.
    return GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), None


def tokenizer(folder: Path | None) -> PreTrainedTokenizerFast | None:
    """The tokenizer in a folder, or None if there is none.

    Raises:
        ModelError: for one that cannot be read.
    """
    from transformers import AutoTokenizer

    if folder is None or not any((folder / n).is_file() for n in ("tokenizer.json", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True)
    except Exception as error:  # whatever the libraries below raise for a broken file
        raise ModelError(f"{folder}: its tokenizer cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def wrap(trained: Any) -> PreTrainedTokenizerFast:
    """A ``tokenizers.Tokenizer`` as transformers wants it."""
    from transformers import PreTrainedTokenizerFast

    from deepfast.train.data import END_OF_TEXT

    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


def model(config: GPT2Config, folder: Path | None) -> GPT2LMHeadModel:
    """The model, fp32: with the folder's weights if there are any, else freshly initialised.

    Raises:
        ModelError: for weights that are not of this shape, or not all there.
    """
    from transformers import GPT2LMHeadModel

    if folder is None or not any((folder / name).is_file() for name in _WEIGHTS):
        for path in () if folder is None else sorted(folder.iterdir()):
            if path.suffix in _OTHER_WEIGHTS:
                raise ModelError(f"{path}: weights in this form are not read: {_WEIGHTS[0]} is")
        return GPT2LMHeadModel(config)
    try:
        model, info = GPT2LMHeadModel.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever the libraries below raise for a broken file
        raise ModelError(f"{folder}: its weights cannot be read: {_first_line(error)}") from None
    for name, shape, wanted in sorted(info["mismatched_keys"]):
        raise ModelError(f"{folder}: its weights do not fit: {name} is {list(shape)}, by config.json {list(wanted)}")
    for name in sorted(info["missing_keys"]):
        raise ModelError(f"{folder}: its weights are not whole: {name} is missing")
    return model


def with_weights(config: GPT2Config, weights: dict[str, torch.Tensor]) -> GPT2LMHeadModel:
    """A model of these."""
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases and normalization."""
    params = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def sample(model: GPT2LMHeadModel, tokens: torch.Tensor, length: int, seed: int) -> list[int]:
    """``length`` tokens after ``tokens`` [n], drawn from the 40 likeliest each time."""
    import copy

    from transformers import DynamicCache

    wide = copy.deepcopy(model).float().eval()  # on a CPU, fp16 matrices are slow
    length = min(length, wide.config.n_positions - len(tokens))
    # A generator of our own: sampling must not move the one that training resumes from.
    generator = torch.Generator(device=tokens.device).manual_seed(seed)
    out = tokens[None]
    # The forward's second argument, which some versions of transformers call past_key_values and others cache.
    cache = DynamicCache()
    with torch.no_grad():
        for _ in range(length):
            result = wide(out[:, cache.get_seq_length() :], cache, use_cache=True)
            best, index = result.logits[0, -1].float().topk(min(40, wide.config.vocab_size))
            if not best.isfinite().all():
                break  # a run that has diverged has nothing to say
            chosen = index[torch.multinomial(best.softmax(-1), 1, generator=generator)]
            out = torch.cat([out, chosen[None]], dim=1)
    return out[0].tolist()
