"""Concepts: latents with a name, and the evidence for it (docs/concepts.md)."""
