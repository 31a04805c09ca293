"""Clusters as users start them."""
