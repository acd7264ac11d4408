"""Arrays in, arrays out: the operations of a forward pass, once per device. Knows nothing of models."""
