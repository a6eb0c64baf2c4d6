"""Fast operations beside their plain references, and the one place that chooses between them."""
