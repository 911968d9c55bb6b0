"""From hidden states to the loss: one file a loss."""
