"""Every operation in plain torch, in any dtype up to fp64 and complex.

The oracle in tests, and what runs where no kernel does: slower, the same result to rounding. The functions have the
names and arguments of the compiled operators, so a backend is whichever of the two is asked (:mod:`deepfast.ops`).
None of them reads a value back to the host.
"""

from deepfast.reference.codec import master_of, master_value, refresh, round_master
from deepfast.reference.formulas import RULES, Rule
from deepfast.reference.int8 import GROUPED, Order, grouped_dtype, order_of, pack, packed_size, unpack
from deepfast.reference.operators import accumulate_, decide_, reduced, scaler_update_, statistics
from deepfast.reference.plan import KEPT, RESET, WRITTEN, Plan, Range, check_distinct, detach, leave, mark, step_

__all__ = [
    "GROUPED",
    "KEPT",
    "RESET",
    "RULES",
    "WRITTEN",
    "Order",
    "Plan",
    "Range",
    "Rule",
    "accumulate_",
    "check_distinct",
    "decide_",
    "detach",
    "grouped_dtype",
    "leave",
    "mark",
    "master_of",
    "master_value",
    "order_of",
    "pack",
    "packed_size",
    "reduced",
    "refresh",
    "round_master",
    "scaler_update_",
    "statistics",
    "step_",
    "unpack",
]
