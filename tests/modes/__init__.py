"""Every way of distilling, end to end."""
