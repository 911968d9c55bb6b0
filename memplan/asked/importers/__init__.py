"""Readers of other projects' files: Hugging Face configurations and trainers' recipes."""
