"""Names and keys of DeepSpeed's checkpoint files (deepspeed/checkpoint/constants.py). Imports no torch."""

PARTITION_SUFFIX = "_optim_states.pt"  # of every rank's optimizer file

# Of the model file.
MODULE = "module"  # bf16 weights by parameter name
PARAM_SHAPES = "param_shapes"  # for each parameter group, shapes by parameter name
WORLD_SIZE = "dp_world_size"

# Of an optimizer file. EMA is this project's own: the moving average of the weights, in the form of MASTERS.
STATE, EMA = "optimizer_state_dict", "ema"

# Of the dictionary at ``STATE``.
BASE = "base_optimizer_state"  # of PyTorch's optimizer: moments
MASTERS = "single_partition_of_fp32_groups"  # for each parameter group, the rank's part of the fp32 weights, 1-D
COUNT = "partition_count"
GROUP_PADDINGS = "group_paddings"  # elements that fill up a group to a multiple of the number of ranks
ALIGNMENT_PADDINGS = "param_alignment_paddings"  # elements between parameters (zero_optimization.parameter_alignment)
