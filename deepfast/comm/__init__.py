"""Sums over ranks: all-reduce, reduce-scatter and all-gather in shared memory, and DDP and FSDP2 on top of them."""

from deepfast.comm.backend import register_backend
from deepfast.comm.communicator import Communicator
from deepfast.comm.ddp import allreduce_hook
from deepfast.errors import PeerTimeout

__all__ = ["Communicator", "PeerTimeout", "allreduce_hook", "register_backend"]
