"""Models outside of runs: Hugging Face directories, the hub, and single files for plain PyTorch."""
