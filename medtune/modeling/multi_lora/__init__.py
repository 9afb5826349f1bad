"""Several adapters on one frozen base in one pass."""
