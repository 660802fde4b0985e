"""Facts of model families, as rows: names, fused siblings, what stays BF16."""
