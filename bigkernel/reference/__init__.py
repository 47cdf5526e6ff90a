"""What is right, op by op, in plain PyTorch; also the `torch` backend."""
