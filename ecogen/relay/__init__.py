"""Knowledge relay: what generators draw and say, how good that is, and how models learn from it."""
