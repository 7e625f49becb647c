"""What a coder's latents can make a model do: interventions, and how far they reach."""
