"""Find cached text anywhere in a prompt and say what of it is worth reusing. Pure: NumPy only."""
