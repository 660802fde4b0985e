"""What an output tensor becomes: plain, FP8 like a base, FP8 by a scheme."""
