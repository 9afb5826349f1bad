"""LoRA layers: attaching, saving, and the fused function that trains them."""
