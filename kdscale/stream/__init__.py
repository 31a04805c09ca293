"""A batch in, its soft targets out, over Arrow Flight from whichever teacher rank is free."""
