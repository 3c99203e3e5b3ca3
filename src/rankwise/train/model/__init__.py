"""Pretrained models: loading them, text from them, and an adapter folded into them."""
