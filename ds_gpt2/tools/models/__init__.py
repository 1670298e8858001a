"""Open the model of a run or from outside of runs, evaluate it, export it."""
