"""Training objectives: what the model is asked to predict, and how the parts add up to one loss."""
