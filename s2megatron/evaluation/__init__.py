"""What a trained model can do: loss by position and on repeats, and retrieval."""
