"""Preference and policy losses: tensors in, tensors out; no model, tokenizer, device or config."""
