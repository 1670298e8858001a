"""Models as they lie on disk outside of runs: Hugging Face directories, and one file for plain PyTorch."""
