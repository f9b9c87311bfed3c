"""Training a student to do what its teacher does."""
