"""What a run will take, before it starts: arithmetic, and a few real steps for what arithmetic cannot tell."""
