"""What is trained beside a frozen base: one file a kind."""
