"""GPT-2 from scratch: the library behind the pipeline's stages."""

import os

# PyTorch's threads then sleep while they wait, where by default they spin for long: trainings that share the cores
# would starve each other. GNU's OpenMP first spins for a moment: to wake a thread takes as long as a small product of a
# text's next token. Both are read when torch is loaded, so whoever computes imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
