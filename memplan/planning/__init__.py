"""Answers: the plan, what fits beside it, and what to change."""
