"""Find, evaluate and export a model, and encode activations with it."""
