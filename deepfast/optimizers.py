"""The optimizers there are, a line each: what the package's names, the configuration, benchmarks and tests read.

What a rule is (the moments that it keeps, whether it counts steps) stands beside its formula, in
``deepfast/reference/formulas.py``. Nothing is imported here: a configuration is read before any kernel is compiled.
"""

# The class in deepfast.optim, and those of its arguments that a configuration may set.
OPTIMIZERS = {
    "AdamW": "lr betas eps weight_decay amsgrad bias_correction",
    "Adam": "lr betas eps weight_decay amsgrad bias_correction",
    "SGD": "lr momentum dampening weight_decay nesterov",
    "Lion": "lr betas weight_decay",
    "LAMB": "lr betas eps weight_decay",
    "Adagrad": "lr lr_decay weight_decay initial_accumulator_value eps",
}
