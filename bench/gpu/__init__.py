"""The parts of `python -m bench.gpu_check`; they need torch, triton, numpy and safetensors only."""
