"""A card's memory: the caching allocator, its settings, a run played on it, and whether that fits."""
