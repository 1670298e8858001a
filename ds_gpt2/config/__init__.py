"""Settings, DeepSpeed configuration, batch plan and the location of runs. Does not import torch."""
