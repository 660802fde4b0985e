"""How conversions are planned, and how the bytes of their outputs are made; `fp8ckpt.convert` runs them."""
