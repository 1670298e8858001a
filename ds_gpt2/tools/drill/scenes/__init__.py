"""The scenes of the drill: each module injects faults of one kind and verifies that the run recovers."""
