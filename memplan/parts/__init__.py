"""What decoders are made of: modules, norms, rotation, attention, experts; the words are transformers'."""
