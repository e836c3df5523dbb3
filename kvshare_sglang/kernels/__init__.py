"""Copy, re-rotate and attend on tensors. Knows runs and plans, never sglang."""
