"""What a run needs and what the machine has; shared by the tools."""
