"""Views of one run, made from what the store returns."""
