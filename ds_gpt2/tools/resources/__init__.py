"""Requirements of a run, resources of the machine, state and history of a run: shared by the tools."""
