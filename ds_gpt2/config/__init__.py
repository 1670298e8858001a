"""Settings, DeepSpeed's configuration, the batch plan, and where a run is. Imports no torch."""
