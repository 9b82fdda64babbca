"""Fine-tunes GPT-2 in fp16 on a text."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import deepfast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a folder, or a name that transformers knows; without it a tiny one, of bytes")
parser.add_argument("--text", type=Path, default=argparse.__file__, help="a text file; without it Python's argparse")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--output", help="a folder for the model")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
try:
    if args.model:
        tokens = AutoTokenizer.from_pretrained(args.model)(args.text.read_text()).input_ids
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    else:
        tokens = list(args.text.read_bytes())
        shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": 256}
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).to(device)
except (OSError, ValueError) as error:  # a file or a model that is not there, a text that is none
    parser.error(str(error))
rows = torch.tensor(tokens[: len(tokens) // 64 * 64], device=device).view(-1, 64)
if len(rows) < 40:
    parser.error(f"--text: {args.text} has {len(tokens)} tokens: give at least {40 * 64}")
train, held_out = rows[:-32], rows[-32:]
config = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "fp16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-5 if args.model else 3e-3, "weight_decay": 0.01}},
}
model, *_ = deepfast.initialize(model=model, config=config)


def perplexity():
    model.eval()
    with torch.no_grad():
        return model(input_ids=held_out, labels=held_out).loss.float().exp().item()


print(f"held-out before: perplexity {perplexity():.2f}")
model.train()
for micro_step in range(2 * args.steps):
    batch = train[torch.randint(len(train), (8,))]
    loss = model(input_ids=batch, labels=batch).loss
    model.backward(loss)
    model.step()
    if micro_step % 10 == 0:
        print(f"step {micro_step // 2} loss {loss.item():.4f}")
print(f"held-out after: perplexity {perplexity():.2f}")
if args.output:
    model.save_pretrained(args.output)
