"""Text that a student writes while it trains, for its teacher to judge: on-policy distillation."""
