"""GPT-2 from scratch: the library behind the pipeline's stages."""

import os

# PyTorch's threads then sleep while they wait, where by default they spin: trainings that share the cores would starve
# each other. It is read when torch is loaded, so whoever computes imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
