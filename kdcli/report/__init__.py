"""What a person sees: the terminal, the pictures, the page."""
