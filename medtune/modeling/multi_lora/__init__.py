"""Several adapters on one frozen base model, in one pass."""
