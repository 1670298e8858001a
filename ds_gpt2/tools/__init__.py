"""What a person asks about a run: doctor, plan, status, report, drill."""
