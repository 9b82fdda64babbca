"""A folder for ``sys.path``: in it, ``import deepspeed`` finds deepfast's."""
