"""What a type checker must find: every line that says so, and no other. Never run."""

import torch
from torch import nn

import deepfast
import deepfast.deepspeed as deepspeed

model = nn.Linear(4, 2)
params = list(model.parameters())
adamw = deepfast.AdamW(params)
scaler = deepfast.LossScaler()
engine, *_ = deepfast.initialize(model=model, config={})
comm = deepfast.comm.Communicator()
t = torch.ones(4)
deepfast.AdamW(params, lr="x")  # wrong
deepfast.AdamW(model)  # wrong
deepfast.AdamW(params, betas=0.9)  # wrong
deepfast.AdamW(params, master="fp16")  # wrong
deepfast.SGD(params, state_dtype={"momentum_buffer": "fp8"})  # wrong
deepfast.SGD(params, state_dtype=torch.bfloat16)  # wrong
deepfast.Lion(params, rounding="up")  # wrong
deepfast.Lion(params, max_gradnorm=1.0)  # wrong
deepfast.LAMB(params, backend="gpu")  # wrong
deepfast.Adagrad(params, seed="x")  # wrong
deepfast.Adam(params, max_grad_norm="1")  # wrong
adamw.master = "half"  # wrong
adamw.backend + 1  # wrong
adamw.grad_norm.item()  # wrong
adamw.step(3)  # wrong
adamw.set_master(params[0])  # wrong
adamw.distinct_over("dp")  # wrong
adamw.setp()  # wrong
deepfast.step_in_backward(torch.optim.SGD(params))  # wrong
deepfast.LossScaler(init_scale="x")  # wrong
deepfast.LossScaler(scale=2.0)  # wrong
scaler.scale(1.0)  # wrong
scaler.step(model)  # wrong
scaler.get_scale().item()  # wrong
deepfast.initialize(model="gpt2")  # wrong
deepfast.initialize(model=model, config=3)  # wrong
deepfast.initialize(model=model, optimizer="AdamW")  # wrong
deepfast.initialize(model=model, lr_scheduler="cosine")  # wrong
deepfast.initialize(model=model, mpu=1)  # wrong
engine.backward()  # wrong
engine.backward(1.0)  # wrong
engine.backward(t, True, False)  # wrong
engine.backward(t, retain_graph="yes")  # wrong
engine.step(t)  # wrong
engine.step() + 1  # wrong
engine.save_checkpoint()  # wrong
engine.save_checkpoint("out", keep="x")  # wrong
engine.load_checkpoint(3)  # wrong
engine.get_lr() + 1.0  # wrong
comm.all_reduce_([1.0])  # wrong
comm.all_reduce_(t, "max")  # wrong
comm.empty("x")  # wrong
deepfast.comm.Communicator(timeout=3)  # wrong
deepfast.comm.communicate()  # wrong
deepfast.Adamw(params)  # wrong
deepfast.optim.AdamX  # wrong
deepfast.engine.Engin  # wrong
deepspeed.initialize(model="gpt2")  # wrong
