"""Decoder families written in shadow operations, and what a training recipe puts around them."""
